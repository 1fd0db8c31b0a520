//! Plans against the eager executor, which is tested against definitions and references elsewhere.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use candle_core::{DType, Device};

use super::{Feed, Options, Plan, Precision, Store};
use crate::cpu::Level;
use crate::{
    Activation, Graph, Op, Padding, PatchOrder, Reader, Relative, Result, Source, Tensor, Weights,
    Window, Wrap, graph::SharedNorms, ops,
};

mod features;
mod gpu;
mod machines;
mod pictures;
mod windows;

use machines::{Machine, levels, machines};

/// Weights made up from their names, rounded to a type that they are stored as; `U8` stands for a compressed one.
struct Made(DType);

fn numbers(n: usize, seed: &str) -> Vec<f32> {
    let mut state = seed
        .bytes()
        .fold(17u64, |s, b| s.wrapping_mul(31).wrapping_add(u64::from(b)));
    (0..n)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

impl Source for Made {
    fn shape(&self, _: &str, wanted: &[usize]) -> Option<Vec<usize>> {
        Some(wanted.to_vec())
    }

    fn dtype(&self, _: &str) -> DType {
        match self.0 {
            DType::U8 => DType::F16,
            other => other,
        }
    }

    fn is_compressed(&self, _: &str) -> bool {
        self.0 == DType::U8
    }

    fn open(&self, name: &str, shape: &[usize]) -> Result<Box<dyn Reader + '_>> {
        let n: usize = shape.iter().product();
        let fan: usize = shape.iter().skip(1).product::<usize>().max(1);
        let scale = if shape.len() > 1 {
            1.7 / (fan as f32).sqrt()
        } else {
            0.5
        };
        let values = numbers(n, name).into_iter().map(|v| match self.0 {
            DType::F16 | DType::U8 => half::f16::from_f32(v * scale).to_f32(),
            DType::BF16 => half::bf16::from_f32(v * scale).to_f32(),
            _ => v * scale,
        });
        Ok(Box::new(Held(values.collect())))
    }
}

struct Held(Vec<f32>);

impl Reader for Held {
    fn read(&self, first: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.0[first..][..out.len()]);
    }
}

/// Inputs by name, and a network over them.
struct Net {
    /// What the weights are stored as.
    stored: DType,
    inputs: Vec<(&'static str, Vec<usize>)>,
    run: fn(&Weights, &[Tensor]) -> Result<Tensor>,
}

fn weights(stored: DType) -> Weights {
    Weights::new(Arc::new(Made(stored)), DType::F32, &Device::Cpu)
}

/// How many tokens are left where an input says which.
const PLACES: usize = 5;

/// Relative L2 distance of a plan's result from the eager one's.
fn distance(net: &Net, options: &Options) -> f64 {
    let values: Vec<Vec<f32>> = net
        .inputs
        .iter()
        .map(|(name, shape)| {
            let n: usize = shape.iter().product();
            let v = numbers(n, name);
            let halved = options.halved.iter().any(|halved| halved == name);
            let v = if halved {
                v[..n / options.copies].repeat(options.copies)
            } else {
                v
            };
            if options.timestep == Some(name) {
                vec![317.0; n]
            } else if *name == "places" {
                (0..n).map(|i| (i * 3 % PLACES) as f32).collect()
            } else {
                v
            }
        })
        .collect();
    let eager: Vec<Tensor> = net
        .inputs
        .iter()
        .zip(&values)
        .map(|((_, shape), v)| {
            candle_core::Tensor::from_vec(v.clone(), shape.as_slice(), &Device::Cpu)
                .unwrap()
                .into()
        })
        .collect();
    let want = (net.run)(&weights(net.stored), &eager)
        .unwrap()
        .into_data()
        .unwrap();
    let graph = Graph::new();
    let nodes: Vec<Tensor> = net
        .inputs
        .iter()
        .map(|(name, shape)| graph.input(name, shape))
        .collect();
    let output = (net.run)(&weights(net.stored), &nodes).unwrap();
    let store = Store::default();
    let mut plan = Plan::compile(&graph, &output, options, &store).unwrap();
    assert_eq!(plan.output_shape(), want.dims());
    let feeds: Vec<Feed<'_>> = net
        .inputs
        .iter()
        .zip(&values)
        .map(|((name, _), v)| Feed {
            name,
            values: if options.halved.iter().any(|halved| halved == name) {
                &v[..v.len() / options.copies]
            } else {
                v
            },
        })
        .collect();
    let mut got = Vec::new();
    // the second call finds the buffers used, and is the same
    plan.run(&feeds, &mut got).unwrap();
    let first = got.clone();
    plan.run(&feeds, &mut got).unwrap();
    assert_eq!(first, got);
    let want: Vec<f32> = want.flatten_all().unwrap().to_vec1().unwrap();
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    norm(
        &mut got
            .iter()
            .zip(&want)
            .map(|(a, b)| f64::from(*a) - f64::from(*b)),
    ) / norm(&mut want.iter().map(|&v| f64::from(v)))
}

fn conv(
    weights: &Weights,
    name: &str,
    x: &Tensor,
    (o, kernel, stride): (usize, usize, usize),
) -> Result<Tensor> {
    let c = x.dims4()?.1;
    let weights = weights.at(name);
    let op = Op::Conv2d {
        weight: weights.param("weight", &[o, c, kernel, kernel]),
        bias: Some(weights.param("bias", &[o])),
        stride,
        padding: Padding::same(kernel / 2),
        wrap: Wrap::default(),
    };
    ops::apply(op, &[x])
}

fn linear(weights: &Weights, name: &str, x: &Tensor, o: usize) -> Result<Tensor> {
    let c = *x.shape().last().unwrap();
    let weights = weights.at(name);
    ops::apply(
        Op::Linear {
            weight: weights.param("weight", &[o, c]),
            bias: Some(weights.param("bias", &[o])),
        },
        &[x],
    )
}

/// Every fusion of products: time embedding, residual, shortcut, join, enlargement, gate, activation, strides, views.
fn products(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
    let (x, temb) = (&inputs[0], &inputs[1]);
    let (b, _, h, wd) = x.dims4()?;
    let a = conv(w, "in", x, (14, 3, 1))?;
    let t = linear(w, "t", &ops::activate(temb, Activation::Silu)?, 14)?;
    let y = ops::add_channels(&conv(w, "c1", &a, (14, 3, 1))?, &t)?;
    let y = ops::add(&a, &conv(w, "c2", &y, (14, 3, 1))?)?; // plain residual
    let down = conv(w, "down", &y, (20, 3, 2))?;
    let seq = ops::flatten(&down)?;
    let s = linear(w, "up", &seq, 80)?;
    let s = linear(w, "back", &ops::geglu(&s)?, 20)?;
    let s = ops::add(&s, &seq)?;
    let s = ops::activate(&linear(w, "act", &s, 20)?, Activation::Gelu)?;
    let (_, _, dh, dw) = down.dims4()?;
    let down = ops::add(&down, &ops::unflatten(&s, dh, dw)?)?;
    let up = conv(w, "upc", &ops::upsample(&down, 2 * dh, 2 * dw)?, (12, 3, 1))?;
    let joined = ops::concat(&ops::upsample(&up, h, wd)?, &y)?;
    let z = conv(w, "c3", &joined, (9, 3, 1))?;
    let z = ops::add_channels(&z, &linear(w, "t2", temb, 9)?)?;
    let z = conv(w, "c4", &z, (9, 3, 1))?;
    let z = ops::add(&conv(w, "short", &joined, (9, 1, 1))?, &z)?; // folded shortcut of a join
    assert_eq!(z.shape()[0], b);
    ops::affine(&conv(w, "out", &z, (3, 3, 1))?, 0.5, 0.0)
}

#[test]
fn products_with_all_that_fuses_into_them() {
    let net = Net {
        stored: DType::F32,
        inputs: vec![("x", vec![2, 5, 13, 9]), ("temb", vec![2, 6])],
        run: products,
    };
    for machine in machines() {
        let error = distance(&net, &machine.options);
        assert!(error < 1e-6, "{}: {error}", machine.name);
        if let Some(bf16) = machine.bf16() {
            let error = distance(&net, &bf16);
            assert!(error < 2e-2 && error > 1e-4, "bf16: {error}");
        }
    }
}

#[test]
fn weights_of_16_bits_stay_so_and_lose_nothing() {
    for stored in [DType::F16, DType::BF16] {
        let net = Net {
            stored,
            inputs: vec![("x", vec![2, 5, 13, 9]), ("temb", vec![2, 6])],
            run: products,
        };
        for machine in machines() {
            let error = distance(&net, &machine.options);
            assert!(error < 1e-6, "{stored:?} {}: {error}", machine.name);
        }
    }
    let bytes = |stored| {
        let graph = Graph::new();
        let w = weights(stored);
        let output = linear(&w, "l", &graph.input("x", &[3, 64]), 48).unwrap();
        let store = Store::default();
        let options = Options::new(Level::current(), Precision::F32);
        Plan::compile(&graph, &output, &options, &store).unwrap();
        store.bytes()
    };
    let saved = if Level::current() > Level::Portable {
        64 * 48 * 2
    } else {
        0
    };
    assert_eq!(bytes(DType::F32) - bytes(DType::F16), saved);
}

/// A joint block of a diffusion transformer, with everything that its kin have: patches in and out, positions from a table, adaptive norms, norms
/// and turns of heads, two sequences that attend together, gates, and a product over two sources.
fn transformer(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
    let (latents, vector, context) = (&inputs[0], &inputs[1], &inputs[2]);
    let (h, wd) = (latents.shape()[2] / 2, latents.shape()[3] / 2);
    let x = ops::apply(Op::Patchify { patch: 2 }, &[latents])?;
    let x = linear(w, "in", &x, 40)?;
    let positions = Op::AddPositions {
        table: w.param("positions", &[99, 40]),
        rows: Some(Arc::new((0..h * wd).map(|i| 98 - 2 * i).collect())),
    };
    let x = ops::apply(positions, &[&x])?;
    let values = linear(w, "ada", &ops::activate(vector, Activation::Silu)?, 6 * 40)?;
    let norm = |x: &Tensor, shift, scale| {
        let eps = 1e-6;
        ops::apply(Op::AdaptiveNorm { eps, shift, scale }, &[x, &values])
    };
    let (n, c) = (
        norm(&x, 0, 1)?,
        norm(&linear(w, "context", context, 40)?, 3, 4)?,
    );
    let head = |x: &Tensor, name: &str| {
        let heads = 4;
        let x = linear(w, name, x, 40)?;
        let weight = w.param(&format!("{name}.norm"), &[10]);
        let x = ops::apply(Op::RmsNorm { weight, eps: 1e-6 }, &[&x])?;
        let turns = (0..x.shape()[1] * 5).map(|i| [(i as f32).cos(), (i as f32).sin()]);
        let turns = Arc::new(turns.collect());
        ops::apply(Op::Rotate { heads, turns }, &[&x])
    };
    let q = ops::join(&head(&c, "cq")?, &head(&n, "q")?)?;
    let k = ops::join(&head(&c, "ck")?, &head(&n, "k")?)?;
    let v = ops::join(&linear(w, "cv", &c, 40)?, &linear(w, "v", &n, 40)?)?;
    let y = ops::attention(&q, &k, &v, 4, false)?;
    let (first, count) = (context.shape()[1], h * wd);
    let own = linear(w, "out", &ops::tokens(&y, first, count)?, 40)?;
    let x = ops::add(&x, &ops::gate(&own, &values, 2)?)?;
    let mlp = ops::activate(
        &linear(w, "up", &norm(&x, 3, 4)?, 90)?,
        Activation::GeluTanh,
    )?;
    let both = ops::concat(&ops::tokens(&y, first, count)?, &mlp)?;
    let x = ops::add(&x, &ops::gate(&linear(w, "down", &both, 40)?, &values, 5)?)?;
    // a gate that nothing can take in, and T5's attention over the tokens
    let relative = Relative {
        table: w.param("buckets", &[32, 4]),
        max_distance: 20,
    };
    let attention = Op::Attention {
        heads: 4,
        causal: false,
        relative: Some(relative),
    };
    let z = ops::apply(attention, &[&x, &x, &ops::gate(&x, &values, 1)?])?;
    let z = ops::multiply(&z, &linear(w, "other", &x, 40)?)?;
    let order = PatchOrder::ChannelsLast;
    let patch = 2;
    let z = linear(w, "last", &z, 12)?;
    ops::apply(
        Op::Unpatchify {
            h,
            w: wd,
            patch,
            order,
        },
        &[&z],
    )
}

#[test]
fn a_transformer_with_and_without_halves_and_constants() {
    let net = Net {
        stored: DType::F16,
        inputs: vec![
            ("x", vec![2, 3, 10, 14]),
            ("vector", vec![2, 24]),
            ("context", vec![2, 9, 12]),
        ],
        run: transformer,
    };
    for machine in machines() {
        let plain = machine.options.clone();
        let split = Options {
            constant: vec!["context".into()],
            halved: vec!["x".into()],
            ..plain.clone()
        };
        for options in [&plain, &split] {
            let error = distance(&net, options);
            assert!(error < 3e-6, "{}: {error}", machine.name);
        }
        if let Some(bf16) = machine.bf16() {
            let error = distance(&net, &bf16);
            assert!(error < 3e-2 && error > 1e-4, "bf16: {error}");
        }
    }
}

/// What a T2I-Adapter and a ControlNet's pooled residuals need: halved odd sizes, a picture's mean in the place of its pixels.
fn pooled(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
    let halved = ops::average_pool(&inputs[0])?;
    let x = conv(w, "conv", &halved, (8, 3, 1))?;
    let tokens = ops::flatten(&x)?;
    let query = ops::affine(&ops::tokens(&tokens, 0, 1)?, 0.0, 0.0)?;
    let mean = ops::attention(&query, &tokens, &tokens, 2, false)?;
    let (_, _, h, wd) = x.dims4()?;
    ops::add(&x, &ops::upsample(&ops::unflatten(&mean, 1, 1)?, h, wd)?)
}

#[test]
fn odd_sizes_are_halved_and_means_spread() {
    let net = Net {
        stored: DType::F32,
        inputs: vec![("x", vec![2, 3, 9, 13])],
        run: pooled,
    };
    for machine in machines() {
        let plain = machine.options.clone();
        let split = Options {
            halved: vec!["x".into()],
            ..plain.clone()
        };
        for options in [&plain, &split] {
            let error = distance(&net, options);
            assert!(error < 3e-6, "{}: {error}", machine.name);
        }
    }
}

/// By hand: the last row and column of an odd picture count alone.
#[test]
fn a_pool_of_an_odd_picture() {
    let x: Vec<f32> = (0u8..15).map(f32::from).collect();
    let x = candle_core::Tensor::from_vec(x, (1, 1, 3, 5), &Device::Cpu).unwrap();
    let y = ops::average_pool(&x.into()).unwrap().into_data().unwrap();
    assert_eq!(y.dims(), [1, 1, 2, 3]);
    let y: Vec<f32> = y.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(y, [3.0, 5.0, 6.5, 10.5, 12.5, 14.0]);
}

#[test]
fn compressed_weights_and_those_without_room_are_not_kept() {
    for (stored, keep) in [(DType::U8, usize::MAX), (DType::F16, 0), (DType::F16, 9000)] {
        let net = Net {
            stored,
            inputs: vec![
                ("x", vec![2, 3, 10, 14]),
                ("vector", vec![2, 24]),
                ("context", vec![2, 9, 12]),
            ],
            run: transformer,
        };
        for machine in machines() {
            let options = Options {
                keep,
                ..machine.options.clone()
            };
            let error = distance(&net, &options);
            assert!(error < 3e-6, "{}: {error}", machine.name);
        }
    }
    let bytes = |stored, keep| {
        let graph = Graph::new();
        let w = weights(stored);
        let x = graph.input("x", &[3, 64]);
        let y = linear(&w, "b", &linear(&w, "a", &x, 64).unwrap(), 64).unwrap();
        let store = Store::default();
        let options = Options {
            keep,
            ..Options::new(Level::Portable, Precision::F32)
        };
        Plan::compile(&graph, &y, &options, &store).unwrap();
        store.bytes()
    };
    let (biases, each) = (2 * 64 * 4, 64 * 64 * 4);
    assert_eq!(bytes(DType::F32, usize::MAX), biases + 2 * each);
    assert_eq!(bytes(DType::F32, each + 100), biases + each);
    assert_eq!(bytes(DType::U8, usize::MAX), biases);
}

/// Convolutions wide enough for Winograd's forms, enlarged ones among them.
fn wide(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
    let x = conv(w, "in", &inputs[0], (40, 3, 1))?;
    let y = ops::add(&conv(w, "a", &x, (40, 3, 1))?, &x)?;
    let (h, wd) = (x.shape()[2], x.shape()[3]);
    let z = conv(w, "b", &ops::upsample(&y, 2 * h, 2 * wd)?, (33, 3, 1))?;
    let short = conv(w, "s", &z, (40, 1, 1))?;
    let z = ops::add(&conv(w, "c", &z, (40, 3, 1))?, &short)?;
    conv(w, "out", &z, (3, 3, 1))
}

#[test]
fn convolutions_in_winograds_forms() {
    let net = Net {
        stored: DType::F16,
        inputs: vec![("x", vec![2, 4, 34, 30])],
        run: wide,
    };
    // cards have no such forms
    for machine in levels() {
        for transient in [false, true] {
            let options = Options {
                transient,
                ..machine.options.clone()
            };
            let error = distance(&net, &options);
            assert!(error < 2e-6, "{}: {error}", machine.name);
        }
        if let Some(bf16) = machine.bf16() {
            let error = distance(&net, &bf16);
            assert!(error < 2e-2 && error > 1e-4, "bf16: {error}");
        }
    }
}

/// A dense block: joins of joins, leaky activations, slopes, scaled results added to what came in, pixels shuffled.
fn dense(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
    let leaky = |x: &Tensor| ops::activate(x, Activation::LeakyRelu { percent: 20 });
    let x = conv(w, "in", &ops::pixel_unshuffle(&inputs[0], 2)?, (34, 3, 1))?;
    let x1 = leaky(&conv(w, "1", &x, (32, 3, 1))?)?;
    let seen = ops::concat(&x, &x1)?;
    let x2 = ops::prelu(&conv(w, "2", &seen, (9, 3, 1))?, &w.param("slopes", &[9]))?;
    let x2 = ops::add(&x2, &conv(w, "short", &x, (9, 1, 1))?)?;
    let seen = ops::concat(&seen, &x2)?;
    let x3 = conv(w, "3", &ops::concat(&seen, &leaky(&x2)?)?, (34, 3, 1))?;
    let y = ops::add(&ops::affine(&x3, 0.2, 0.0)?, &x)?;
    // of what is no product any more
    let y = ops::add(&ops::affine(&y, 0.2, 0.0)?, &x)?;
    let y = ops::prelu(&ops::concat(&y, &x1)?, &w.param("more", &[66]))?;
    let y = ops::pixel_shuffle(&conv(w, "out", &y, (18, 3, 1))?, 3)?;
    leaky(&y)
}

#[test]
fn dense_blocks() {
    for size in [[2, 3, 40, 36], [1, 3, 6, 10]] {
        let net = Net {
            stored: DType::F32,
            inputs: vec![("x", size.to_vec())],
            run: dense,
        };
        for machine in machines() {
            if machine.options.gpu.is_some() && size[3] > 10 {
                continue; // the interpreter is slow
            }
            let error = distance(&net, &machine.options);
            assert!(error < 2e-6, "{}: {error}", machine.name);
            if let Some(bf16) = machine.bf16() {
                let error = distance(&net, &bf16);
                assert!(error < 2e-2 && error > 1e-4, "bf16: {error}");
            }
        }
    }
}

#[test]
fn wider_layers_than_kernels_take_are_refused() {
    let weights = weights(DType::F32);
    let graph = Graph::new();
    let x = graph.input("x", &[1, 2, 40_000]);
    let y = linear(&weights, "wide", &x, 3).unwrap();
    let refused = Plan::compile(
        &graph,
        &y,
        &Options::new(Level::current(), Precision::F32),
        &Store::default(),
    );
    assert!(refused.is_err_and(|e| e.to_string().contains("at most 32768 channels")));
}

/// A plan gives what is inside it beside its result, at every call, and is otherwise the same.
#[test]
fn taps_are_kept_until_the_next_call() {
    let shape = [2usize, 4, 34, 30];
    let values = numbers(shape.iter().product(), "x");
    let net = |x: &Tensor, w: &Weights| -> Result<[Tensor; 3]> {
        let a = conv(w, "in", x, (40, 3, 1))?;
        let b = ops::activate(&conv(w, "a", &a, (40, 3, 1))?, Activation::Silu)?;
        let c = ops::add(&conv(w, "b", &b, (40, 3, 1))?, &a)?;
        let out = conv(w, "out", &ops::concat(&c, &a)?, (3, 3, 1))?;
        Ok([out, b, c])
    };
    let data = candle_core::Tensor::from_vec(values.clone(), &shape, &Device::Cpu).unwrap();
    let want = net(&data.into(), &weights(DType::F32)).unwrap().map(|t| {
        let flat = t.into_data().unwrap().flatten_all().unwrap();
        flat.to_vec1::<f32>().unwrap()
    });
    let graph = Graph::new();
    let [out, b, c] = net(&graph.input("x", &shape), &weights(DType::F32)).unwrap();
    let options = Options::new(Level::current(), Precision::F32);
    let store = Store::default();
    let taps = [b, c];
    let mut plan = Plan::compile_tapped(&graph, (&out, &taps), &options, &store).unwrap();
    let mut got = Vec::new();
    for _ in 0..2 {
        let feed = Feed {
            name: "x",
            values: &values,
        };
        plan.run(&[feed], &mut got).unwrap();
        for (i, want) in want.iter().enumerate() {
            if i > 0 {
                plan.tap(i - 1, &mut got).unwrap();
            }
            assert_eq!(got.len(), want.len());
            let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs());
            assert!(worst.fold(0.0, f32::max) < 1e-4, "{i}");
        }
    }
    assert_eq!(plan.tap_shapes().nth(1), Some([2, 40, 34, 30].as_slice()));
    assert!(plan.tap(2, &mut got).is_err());
}
