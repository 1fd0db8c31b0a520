//! Attention within windows, and what else networks of such blocks need: sigmoids, means, shifts.

use std::sync::Arc;

use candle_core::DType;

use super::{Net, distance, linear};
use crate::cpu::Level;
use crate::plan::{Options, Precision};
use crate::{Activation, Keys, Result, Tensor, Weights, WindowBias, Windows, ops};

/// A picture of 12×18 pixels in windows of 6, of three kinds one behind the other.
fn blocks(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
    let values = Arc::new(vec![0.5, -0.25, 1.5, 0.0, 2.0, -1.0]);
    let picture = ops::shift(&inputs[0], &values)?;
    let (_, _, height, width) = picture.dims4()?;
    let mut x = linear(w, "in", &ops::flatten(&picture)?, 42)?;
    let table = |name: &str, n: usize| WindowBias::Table(w.param(name, &[n * n, 3]));
    let learned = || WindowBias::Learned {
        distances: w.param("distances", &[11, 11, 2]),
        hidden: w.param("hidden", &[20, 2]),
        shift: w.param("shift", &[20]),
        output: w.param("output", &[3, 20]),
    };
    for (name, keys, bias, cosine) in [
        ("same", Keys::Same { shift: 0 }, table("same", 11), None),
        (
            "shifted",
            Keys::Same { shift: 3 },
            table("shifted", 11),
            None,
        ),
        ("cosine", Keys::Same { shift: 2 }, learned(), Some("powers")),
        (
            "around",
            Keys::Around { beyond: 2 },
            table("around", 15),
            None,
        ),
        ("far", Keys::Around { beyond: 9 }, table("far", 29), None),
    ] {
        let project = |what: &str| linear(w, &format!("{name}.{what}"), &x, 42);
        let windows = Windows {
            heads: 3,
            size: (height, width),
            side: 6,
            keys,
            bias,
            cosine: cosine.map(|cosine| w.param(cosine, &[3])),
        };
        let y = ops::window_attention(&project("q")?, &project("k")?, &project("v")?, windows)?;
        x = ops::add(&x, &linear(w, &format!("{name}.out"), &y, 42)?)?;
    }
    let picture = ops::unflatten(&x, height, width)?;
    let gates = linear(w, "gates", &ops::means(&picture)?, 42)?;
    let gates = ops::activate(&gates, Activation::Sigmoid)?;
    let y = ops::flatten(&picture)?;
    ops::activate(&ops::gate(&y, &gates, 0)?, Activation::Sigmoid)
}

#[test]
fn windows_of_all_kinds() {
    let net = Net {
        stored: DType::F32,
        inputs: vec![("x", vec![2, 6, 12, 18])],
        run: blocks,
    };
    for level in Level::supported() {
        let options = Options::new(level, Precision::F32);
        let error = distance(&net, &options);
        assert!(error < 1e-6, "{}: {error:e}", level.name());
        let halved = Options {
            halved: vec!["x".into()],
            ..options
        };
        let error = distance(&net, &halved);
        assert!(error < 1e-6, "{}: {error:e}", level.name());
        if level.has_bf16() {
            let error = distance(&net, &Options::new(level, Precision::Bf16));
            assert!(error < 3e-2 && error > 1e-5, "bf16: {error}");
        }
    }
}

/// Without a shift, a window sees itself alone: what stands elsewhere changes nothing; with one, those that the edges cut see no farther.
#[test]
fn windows_see_no_farther_than_they_should() {
    use candle_core::{Device, Tensor as Data};
    let weights = super::weights(DType::F32);
    let table = || WindowBias::Table(weights.param("table", &[25, 1]));
    let run = |keys: Keys, changed: usize| -> Vec<bool> {
        let windows = |bias| Windows {
            heads: 1,
            size: (6, 6),
            side: 3,
            keys,
            bias,
            cosine: None,
        };
        let bias = match keys {
            Keys::Same { .. } => table(),
            Keys::Around { .. } => WindowBias::Table(weights.param("wide", &[49, 1])),
        };
        let mut values = super::numbers(36 * 4, "x");
        let of = |values: &[f32]| -> Vec<f32> {
            let x: Tensor = Data::from_slice(values, (1, 36, 4), &Device::Cpu)
                .unwrap()
                .into();
            let y = ops::window_attention(&x, &x, &x, windows(bias.clone())).unwrap();
            let y = y.into_data().unwrap();
            y.flatten_all().unwrap().to_vec1().unwrap()
        };
        let before = of(&values);
        values[4 * changed] += 1.0;
        let after = of(&values);
        let rows = before.chunks(4).zip(after.chunks(4));
        rows.map(|(a, b)| a != b).collect()
    };
    // pixel (1, 1) of 6×6
    let seen = |rows: std::ops::Range<usize>, columns: std::ops::Range<usize>| -> Vec<bool> {
        let inside = |i: usize| rows.contains(&(i / 6)) && columns.contains(&(i % 6));
        (0..36).map(inside).collect()
    };
    assert_eq!(run(Keys::Same { shift: 0 }, 7), seen(0..3, 0..3));
    assert_eq!(run(Keys::Same { shift: 1 }, 7), seen(1..4, 1..4));
    assert_eq!(run(Keys::Same { shift: 2 }, 7), seen(0..2, 0..2));
    assert_eq!(run(Keys::Same { shift: 2 }, 35), seen(5..6, 5..6));
    // (1, 1) lies within two pixels of none but the first window's neighbours; (2, 2) within one of all four
    assert_eq!(run(Keys::Around { beyond: 1 }, 7), seen(0..3, 0..3));
    assert_eq!(run(Keys::Around { beyond: 1 }, 14), seen(0..6, 0..6));
}
