//! Pictures without edges, and norms by statistics that were taken before.

use super::*;

/// Convolutions large enough for Winograd's forms, also of an enlarged picture.
fn large(w: &Weights, x: &Tensor) -> Result<Tensor> {
    let (_, _, h, wd) = x.dims4()?;
    let y = conv(w, "in", x, (40, 3, 1))?;
    let y = ops::add(&conv(w, "a", &y, (40, 3, 1))?, &y)?;
    let y = conv(w, "up", &ops::upsample(&y, 2 * h, 2 * wd)?, (36, 3, 1))?;
    conv(w, "five", &conv(w, "down", &y, (33, 3, 2))?, (4, 5, 1))
}

fn wrapping<const X: bool, const Y: bool>(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
    let wrap = Wrap { x: X, y: Y };
    ops::wrapped(wrap, || large(w, &inputs[0]))
}

fn small_wrapping(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
    ops::wrapped(Wrap { x: true, y: true }, || products(w, inputs))
}

#[test]
fn pictures_without_edges() {
    let net = |inputs, run| Net {
        stored: DType::F32,
        inputs,
        run,
    };
    let x = || vec![("x", vec![2, 34, 19, 26])];
    let temb = vec![("x", vec![2, 5, 13, 9]), ("temb", vec![2, 6])];
    let nets = [
        net(x(), wrapping::<true, false>),
        net(x(), wrapping::<false, true>),
        net(x(), wrapping::<true, true>),
        net(temb, small_wrapping),
    ];
    for (i, net) in nets.iter().enumerate() {
        for machine in machines() {
            for transient in [false, true] {
                if machine.options.gpu.is_some() && (transient || i < 2) {
                    continue; // the interpreter is slow
                }
                let options = Options {
                    transient,
                    ..machine.options.clone()
                };
                let error = distance(net, &options);
                assert!(error < 3e-6, "net {i}, {}: {error}", machine.name);
            }
        }
    }
}

#[test]
fn a_picture_that_wraps_may_be_shifted() {
    let weights = Weights::new(Arc::new(Made(DType::F32)), DType::F32, &Device::Cpu);
    let x = numbers(34 * 16 * 12, "shifted");
    let shifted = |x: &candle_core::Tensor, by: usize| {
        let size = x.dim(3).unwrap();
        let (a, b) = (
            x.narrow(3, 0, by).unwrap(),
            x.narrow(3, by, size - by).unwrap(),
        );
        candle_core::Tensor::cat(&[b, a], 3).unwrap()
    };
    let x = candle_core::Tensor::from_vec(x, (1, 34, 16, 12), &Device::Cpu).unwrap();
    let run = |x: candle_core::Tensor, wrap: Wrap| {
        let y = ops::wrapped(wrap, || large(&weights, &x.into())).unwrap();
        y.into_data().unwrap()
    };
    let far = |wrap: Wrap| {
        let want = shifted(&run(x.clone(), wrap), 5);
        let got = run(shifted(&x, 5), wrap);
        let difference = (got - want).unwrap().abs().unwrap().max_all().unwrap();
        difference.to_scalar::<f32>().unwrap()
    };
    assert!(far(Wrap { x: true, y: false }) < 1e-4);
    assert!(far(Wrap { x: false, y: true }) > 1e-2);
}

/// Two norms with a convolution between and an enlargement before the second.
fn norms(w: &Weights, x: &Tensor) -> Result<Tensor> {
    let norm = |name: &str, x: &Tensor| {
        let c = x.dims4()?.1;
        let w = w.at(name);
        let op = Op::GroupNorm {
            weight: w.param("weight", &[c]),
            bias: w.param("bias", &[c]),
            groups: 3,
            eps: 1e-5,
            activation: Some(Activation::Silu),
        };
        ops::apply(op, &[x])
    };
    let (_, _, h, wd) = x.dims4()?;
    let y = conv(w, "a", &norm("n1", x)?, (9, 3, 1))?;
    let y = norm("n2", &ops::upsample(&y, 2 * h, 2 * wd)?)?;
    conv(w, "b", &y, (4, 3, 1))
}

/// A picture's norms by statistics that were taken of it are the picture's norms; those of a part are the part's.
#[test]
fn norms_by_statistics_that_were_taken_before() {
    let weights = Weights::new(Arc::new(Made(DType::F32)), DType::F32, &Device::Cpu);
    let (h, w) = (21, 14);
    let x: Vec<f32> = numbers(6 * h * w, "norms")
        .iter()
        .map(|v| v + 3.0)
        .collect();
    let run = |given: &[Vec<f32>], part: Window, statistics: bool, options: &Options| {
        let graph = Graph::sharing(SharedNorms {
            given: given.len(),
            of: (h, w),
            part,
        });
        let mut output = norms(&weights, &graph.input("x", &[1, 6, h, w])).unwrap();
        assert_eq!(graph.norms(), 2);
        if statistics {
            output = graph.statistics().unwrap();
        }
        let mut plan = Plan::compile(&graph, &output, options, &Store::default()).unwrap();
        let names: Vec<String> = (0..given.len()).map(Graph::norm_input).collect();
        let mut feeds = vec![Feed {
            name: "x",
            values: &x,
        }];
        feeds.extend(
            names
                .iter()
                .zip(given)
                .map(|(name, values)| Feed { name, values }),
        );
        let mut out = Vec::new();
        plan.run(&feeds, &mut out).unwrap();
        out
    };
    let whole = Window {
        top: 0,
        left: 0,
        height: h,
        width: w,
    };
    let tensor = candle_core::Tensor::from_vec(x.clone(), (1, 6, h, w), &Device::Cpu).unwrap();
    let want = norms(&weights, &tensor.clone().into())
        .unwrap()
        .into_data()
        .unwrap();
    let want: Vec<f32> = want.flatten_all().unwrap().to_vec1().unwrap();
    let part = Window {
        top: 3,
        left: 5,
        height: 17,
        width: 8,
    };
    let op = Op::Statistics { groups: 3, part };
    let of_part = crate::eager::run(&op, &[&tensor]).unwrap();
    let of_part: Vec<f32> = of_part.flatten_all().unwrap().to_vec1().unwrap();
    for Machine { name, options } in &machines() {
        let first = run(&[], whole, true, options);
        let second = run(std::slice::from_ref(&first), whole, true, options);
        let got = run(&[first.clone(), second.clone()], whole, false, options);
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() < 2e-5, "{}: {got} {want}", name);
        }
        let other = vec![
            first[0] + 0.5,
            first[1],
            first[2],
            first[3],
            first[4],
            first[5],
        ];
        assert_ne!(run(&[other, second], whole, false, options), got);
        for (got, want) in run(&[], part, true, options).iter().zip(&of_part) {
            assert!((got - want).abs() < 1e-5, "{}: {got} {want}", name);
        }
    }
}
