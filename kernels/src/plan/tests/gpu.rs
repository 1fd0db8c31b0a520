//! What only cards have: kernels by width and size, graphs, weights that come and go. Cards are played by an interpreter of the kernels' PTX; what
//! all machines share is tested on them in the modules beside this.

use std::sync::Arc;

use candle_core::{DType, Device};

use super::machines::cards;
use super::{Net, conv, distance, linear, numbers, weights};
use crate::gpu::interpreted::Interpreted;
use crate::gpu::{Driver, Gpu, MODULES};
use crate::plan::{Feed, KERNELS, Options, Plan, Precision, Store};
use crate::{Graph, Op, Padding, Result, Tensor, Weights, Wrap, ops};

/// A card of its own, with so many processors, and what plays it.
fn card(processors: usize) -> (Gpu, Arc<Interpreted>) {
    let card = Arc::new(Interpreted::new(processors).unwrap());
    let driver: Arc<dyn Driver> = card.clone();
    (Gpu::new(driver).unwrap(), card)
}

fn on(gpu: &Gpu, precision: Precision) -> Options {
    Options {
        gpu: Some(gpu.clone()),
        precision,
        ..Options::new(crate::cpu::Level::Portable, Precision::F32)
    }
}

#[test]
fn the_kernels_that_plans_launch_are_those_that_there_are() {
    let modules = MODULES.map(|text| sd_ptx::Module::parse(text).unwrap());
    let mut there: Vec<&str> = modules
        .iter()
        .flat_map(|module| module.kernels().map(sd_ptx::Kernel::name))
        .collect();
    there.sort_unstable();
    let mut launched = KERNELS.to_vec();
    launched.sort_unstable();
    assert_eq!(there, launched);
}

/// Self-attention over `x [b, s, heads · width]`, and attention to `x2`.
fn attends<const HEADS: usize>(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
    let c = inputs[0].shape()[2];
    let of = |name: &str, x: &Tensor| linear(w, name, x, c);
    let x = &inputs[0];
    let own = ops::attention(&of("q", x)?, &of("k", x)?, &of("v", x)?, HEADS, false)?;
    let x2 = &inputs[1];
    let other = ops::attention(&of("q2", x)?, &of("k2", x2)?, &of("v2", x2)?, HEADS, false)?;
    linear(w, "out", &ops::add(&own, &other)?, 4)
}

#[test]
fn attention_of_every_width() {
    // tokens that fill no block and several, keys fewer than one takes
    for (width, tokens, keys) in [
        (8, 66, 77),
        (40, 130, 5),
        (48, 32, 64),
        (64, 20, 129),
        (72, 30, 33),
        (96, 10, 31),
        (160, 20, 34),
        (168, 20, 9),
        (264, 5, 70),
        (12, 40, 20),
    ] {
        let net = Net {
            stored: DType::F32,
            inputs: vec![
                ("x", vec![2, tokens, 2 * width]),
                ("text", vec![2, keys, 24]),
            ],
            run: attends::<2>,
        };
        for machine in &cards()[..1] {
            let error = distance(&net, &machine.options);
            assert!(error < 2e-6, "width {width}: {error}");
            let bf16 = machine.bf16().unwrap();
            let error = distance(&net, &bf16);
            assert!(error < 2e-2 && error > 1e-4, "width {width}, bf16: {error}");
            if width != 40 {
                continue;
            }
            // pictures that are the same until the text is read
            let halved = Options {
                halved: vec!["x".into()],
                constant: vec!["text".into()],
                ..bf16
            };
            let error = distance(&net, &halved);
            assert!(
                error < 2e-2 && error > 1e-4,
                "width {width}, halved: {error}"
            );
        }
    }
}

/// Layers of more columns and rows than a tile, deep ones and shallow ones.
fn tiles(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
    let x = conv(w, "a", &inputs[0], (136, 3, 1))?;
    let x = ops::add(&conv(w, "b", &x, (136, 3, 1))?, &x)?;
    let x = conv(w, "c", &x, (200, 3, 2))?;
    let x = linear(w, "d", &ops::flatten(&x)?, 272)?;
    linear(w, "e", &ops::geglu(&x)?, 7)
}

#[test]
fn products_of_many_tiles() {
    let net = Net {
        stored: DType::F16,
        inputs: vec![("x", vec![2, 9, 13, 12])],
        run: tiles,
    };
    for machine in cards() {
        let error = distance(&net, &machine.options);
        assert!(error < 2e-6, "{}: {error}", machine.name);
        let error = distance(&net, &machine.bf16().unwrap());
        assert!(error < 2e-2 && error > 1e-4, "{}: {error}", machine.name);
    }
}

/// A kernel of an even size, uneven padding, causal attention.
fn text(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
    let positions = Op::AddPositions {
        table: w.param("positions", &[20, 24]),
        rows: None,
    };
    let x = ops::apply(positions, &[&inputs[0]])?;
    let norm = Op::LayerNorm {
        weight: w.param("norm.weight", &[24]),
        bias: w.param("norm.bias", &[24]),
        eps: 1e-5,
    };
    let y = ops::apply(norm, &[&x])?;
    let (q, k, v) = (
        linear(w, "q", &y, 24)?,
        linear(w, "k", &y, 24)?,
        linear(w, "v", &y, 24)?,
    );
    let x = ops::add(&x, &ops::attention(&q, &k, &v, 3, true)?)?;
    let (b, s) = (x.shape()[0], x.shape()[1]);
    let picture = ops::unflatten(&x, s / 3, 3)?;
    let down = Op::Conv2d {
        weight: w.param("down.weight", &[10, 24, 2, 2]),
        bias: None,
        stride: 2,
        padding: Padding {
            before: 0,
            after: 1,
        },
        wrap: Wrap::default(),
    };
    let y = ops::apply(down, &[&picture])?;
    assert_eq!(y.shape()[0], b);
    Ok(y)
}

#[test]
fn texts_and_uneven_padding() {
    let net = Net {
        stored: DType::F32,
        inputs: vec![("x", vec![2, 15, 24])],
        run: text,
    };
    for machine in cards() {
        let error = distance(&net, &machine.options);
        assert!(error < 1e-6, "{}: {error}", machine.name);
    }
}

#[test]
fn tokens_become_rows_of_a_table() {
    let graph = Graph::new();
    let table = weights(DType::F32).param("table", &[11, 24]);
    let all = table.numbers().unwrap();
    let out = ops::apply(Op::Embed { table }, &[&graph.input("ids", &[2, 3])]).unwrap();
    let (gpu, _) = card(4);
    let options = on(&gpu, Precision::F32);
    let mut plan = Plan::compile(&graph, &out, &options, &Store::default()).unwrap();
    let feed = Feed {
        name: "ids",
        values: &[0.0, 10.0, 3.0, 3.0, 11.0, -1.0],
    };
    let mut got = Vec::new();
    plan.run(&[feed], &mut got).unwrap();
    for (row, id) in [0usize, 10, 3, 3].into_iter().enumerate() {
        assert_eq!(got[row * 24..][..24], all[id * 24..][..24]);
    }
    // beyond the table there is no number
    assert!(got[4 * 24..].iter().all(|x| x.is_nan()));
}

/// More timesteps than a batch has rows: their products need more room for split sums than any step of a call.
#[test]
fn many_timesteps() {
    fn run(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
        let (flip_sin_to_cos, freq_shift) = (false, 1.0);
        let time = Op::Sinusoid {
            width: 520,
            flip_sin_to_cos,
            freq_shift,
        };
        let time = ops::apply(time, &[&inputs[1]])?;
        ops::add_channels(
            &conv(w, "in", &inputs[0], (70, 1, 1))?,
            &linear(w, "t", &time, 70)?,
        )
    }
    let (gpu, _) = card(48);
    let graph = Graph::new();
    let (x, t) = (
        graph.input("x", &[1, 3, 2, 2]),
        graph.input("timestep", &[1]),
    );
    let output = run(&weights(DType::F32), &[x, t]).unwrap();
    let options = Options {
        timestep: Some("timestep"),
        ..on(&gpu, Precision::F32)
    };
    let mut plan = Plan::compile(&graph, &output, &options, &Store::default()).unwrap();
    let timesteps: Vec<f32> = (0..300u16).map(|t| 3.0 * f32::from(t)).collect();
    plan.prepare_timesteps(&timesteps).unwrap();
    let values = numbers(12, "x");
    for t in [0.0, 447.0, 897.0] {
        let feed = |name, values| Feed { name, values };
        let mut got = Vec::new();
        plan.run(&[feed("x", &values), feed("timestep", &[t])], &mut got)
            .unwrap();
        let data = |values: &[f32], shape: &[usize]| -> Tensor {
            candle_core::Tensor::from_slice(values, shape, &Device::Cpu)
                .unwrap()
                .into()
        };
        let inputs = [data(&values, &[1, 3, 2, 2]), data(&[t], &[1])];
        let want = run(&weights(DType::F32), &inputs)
            .unwrap()
            .into_data()
            .unwrap();
        let want: Vec<f32> = want.flatten_all().unwrap().to_vec1().unwrap();
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() < 1e-5, "{t}: {got} {want}");
        }
    }
}

/// A little UNet: what depends on the timestep, on the text, on the latents.
fn network(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
    let (x, timestep, context) = (&inputs[0], &inputs[1], &inputs[2]);
    let time = Op::Sinusoid {
        width: 16,
        flip_sin_to_cos: true,
        freq_shift: 0.0,
    };
    let time = ops::apply(time, &[timestep])?;
    let time = ops::activate(&linear(w, "t1", &time, 32)?, crate::Activation::Silu)?;
    let y = conv(w, "in", x, (32, 3, 1))?;
    let norm = |name: &str, x: &Tensor| {
        let c = x.dims4()?.1;
        let op = Op::GroupNorm {
            weight: w.param(&format!("{name}.weight"), &[c]),
            bias: w.param(&format!("{name}.bias"), &[c]),
            groups: 8,
            eps: 1e-5,
            activation: Some(crate::Activation::Silu),
        };
        ops::apply(op, &[x])
    };
    let z = conv(w, "c1", &norm("n1", &y)?, (32, 3, 1))?;
    let z = ops::add_channels(&z, &linear(w, "t2", &time, 32)?)?;
    let z = conv(w, "c2", &norm("n2", &z)?, (32, 3, 1))?;
    let y = ops::add(&y, &z)?;
    let (_, _, h, wd) = y.dims4()?;
    let s = ops::flatten(&y)?;
    let q = linear(w, "q", &s, 32)?;
    let (k, v) = (linear(w, "k", context, 32)?, linear(w, "v", context, 32)?);
    let s = ops::add(
        &s,
        &linear(w, "o", &ops::attention(&q, &k, &v, 4, false)?, 32)?,
    )?;
    conv(
        w,
        "out",
        &norm("n3", &ops::concat(&ops::unflatten(&s, h, wd)?, &y)?)?,
        (4, 3, 1),
    )
}

const SHAPES: [(&str, &[usize]); 3] = [
    ("x", &[2, 4, 9, 7]),
    ("timestep", &[2]),
    ("context", &[2, 5, 12]),
];

/// A run of several steps: what the eager executor says at each, on cards with graphs, with weights that come and go, and where nothing is kept.
#[test]
fn a_run_of_steps() {
    let w = weights(DType::F32);
    let timesteps = [901.0f32, 600.5, 1.0];
    let inputs = |step: usize| -> Vec<Vec<f32>> {
        let shapes = SHAPES.iter().map(|(name, shape)| {
            let n: usize = shape.iter().product();
            match *name {
                "timestep" => vec![timesteps[step]; n],
                // the text stays
                "context" => numbers(n, "context"),
                name => numbers(n, &format!("{name} {step}")),
            }
        });
        shapes.collect()
    };
    let (gpu, played) = card(4);
    for (keep, visits) in [(usize::MAX, false), (20_000, true), (0, true)] {
        let before = played.allocated();
        for precision in [Precision::F32, Precision::Bf16] {
            let graph = Graph::new();
            let nodes: Vec<Tensor> = SHAPES
                .iter()
                .map(|(name, shape)| graph.input(name, shape))
                .collect();
            let output = network(&w, &nodes).unwrap();
            let options = Options {
                timestep: Some("timestep"),
                constant: vec!["context".into()],
                keep,
                ..on(&gpu, precision)
            };
            let store = Store::default();
            let sizes = Plan::sizes(&graph, &output, &options).unwrap();
            let mut plan = Plan::compile(&graph, &output, &options, &store).unwrap();
            assert_eq!(plan.arena_bytes(), sizes.buffers);
            assert!(sizes.weights <= keep && store.bytes() >= sizes.weights);
            plan.prepare_timesteps(&timesteps).unwrap();
            let mut got = Vec::new();
            for (round, step) in [0, 1, 2, 1].into_iter().enumerate() {
                let values = inputs(step);
                let feeds: Vec<Feed<'_>> = SHAPES
                    .iter()
                    .zip(&values)
                    .filter(|((name, _), _)| round == 0 || *name != "context")
                    .map(|((name, _), values)| Feed { name, values })
                    .collect();
                plan.run(&feeds, &mut got).unwrap();
                let eager: Vec<Tensor> = SHAPES
                    .iter()
                    .zip(&values)
                    .map(|((_, shape), v)| {
                        candle_core::Tensor::from_vec(v.clone(), *shape, &Device::Cpu)
                            .unwrap()
                            .into()
                    })
                    .collect();
                let want = network(&w, &eager).unwrap().into_data().unwrap();
                let want: Vec<f32> = want.flatten_all().unwrap().to_vec1().unwrap();
                let far: f32 = got.iter().zip(&want).map(|(a, b)| (a - b).powi(2)).sum();
                let all: f32 = want.iter().map(|b| b * b).sum();
                let error = (far / all).sqrt();
                let most = match precision {
                    Precision::F32 => 1e-6,
                    Precision::Bf16 => 2e-2,
                };
                assert!(
                    error < most,
                    "step {step}, {precision:?}, keep {keep}: {error}"
                );
            }
            // one graph for all calls, where no weights have to come between launches
            assert_eq!(played.graphs(), usize::from(!visits));
            let ((), times) = crate::profile::measure(|| {
                let values = inputs(0);
                let feeds = SHAPES.iter().zip(&values);
                let feeds: Vec<_> = feeds
                    .map(|((name, _), values)| Feed { name, values })
                    .collect();
                plan.run(&feeds, &mut got).unwrap();
            });
            assert!(times.values().any(|time| !time.is_zero()));
        }
        assert_eq!(played.graphs(), 0);
        assert_eq!(played.allocated(), before, "memory of a plan that is gone");
    }
}

#[test]
fn what_a_card_cannot_do_is_said() {
    let (gpu, played) = card(4);
    let graph = Graph::new();
    let x = graph.input("x", &[1, 4, 6, 6]);
    let low = ops::apply(Op::LowFrequencies { scale: 0.5 }, &[&x]).unwrap();
    let refused = Plan::compile(&graph, &low, &on(&gpu, Precision::F32), &Store::default());
    let error = refused.map(|_| ()).unwrap_err().to_string();
    assert_eq!(error, "FreeU is not built for the gpu: use --device cpu");
    assert_eq!(played.allocated(), 0);
    assert!(
        played
            .launch(&crate::gpu::Launch {
                kernel: "row_norm",
                grid: [1, 1, 1],
                threads: 256,
                shared: 0,
                arguments: vec![0; 8],
            })
            .is_err_and(|e| e.to_string().contains("takes"))
    );
}
