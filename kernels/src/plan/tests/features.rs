//! What special kinds of guidance ask for, and tokens that are merged. Cards refuse these.

use super::*;

/// What special kinds of guidance ask for, of pictures that are as wide as high or one pixel high.
fn features(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
    let x = conv(w, "in", &inputs[0], (38, 1, 1))?;
    let y = ops::apply(Op::LowFrequencies { scale: 0.3 }, &[&x])?;
    let (scale, by_mean) = (1.4, true);
    let y = ops::apply(Op::Amplify { scale, by_mean }, &[&y])?;
    let (scale, by_mean) = (0.7, false);
    let z = ops::apply(Op::Amplify { scale, by_mean }, &[&x])?;
    let z = ops::apply(Op::LowFrequencies { scale: 2.0 }, &[&z])?;
    let sequence = ops::flatten(&ops::add(&y, &z)?)?;
    let (q, k) = (
        linear(w, "q", &sequence, 36)?,
        linear(w, "k", &ops::join(&sequence, &inputs[1])?, 36)?,
    );
    let mass = ops::apply(Op::AttentionMass { heads: 3 }, &[&q, &k])?;
    linear(w, "up", &mass, 5)
}

#[test]
fn features_of_whole_pictures() {
    for (h, w) in [(7, 6), (1, 9), (8, 8)] {
        for copies in [1, 3] {
            let net = Net {
                stored: DType::F32,
                inputs: vec![("x", vec![3, 4, h, w]), ("more", vec![3, 5, 38])],
                run: features,
            };
            let options = Options {
                halved: vec!["x".into()],
                copies,
                ..Options::new(Level::current(), Precision::F32)
            };
            let error = distance(&net, &options);
            assert!(error < 2e-6, "{h} {w}: {error}");
        }
    }
}

/// Attention among what is left of tokens, with and without a choice of those that stay.
fn merging(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
    let (_, _, h, wd) = inputs[0].dims4()?;
    let merged = h * wd / 2;
    let x = ops::flatten(&conv(w, "in", &inputs[0], (36, 3, 1))?)?;
    let op = Op::Match { h, w: wd, merged };
    let choice = inputs.get(2).map(|x| ops::affine(x, 2.0, 2.0));
    let places = match choice {
        Some(choice) => ops::apply(op, &[&x, &choice?])?,
        None => ops::apply(op, &[&x])?,
    };
    let count = h * wd - merged;
    let y = ops::apply(Op::Merge { count }, &[&x, &places])?;
    let (q, k) = (linear(w, "q", &y, 36)?, linear(w, "k", &y, 36)?);
    let y = linear(w, "out", &ops::attention(&q, &k, &y, 3, false)?, 36)?;
    // the second half of a batch differs from here on
    let x = ops::add(&x, &inputs[1])?;
    let y = ops::apply(Op::Unmerge, &[&y, &places, &x])?;
    let z = ops::apply(Op::Unmerge, &[&ops::tokens(&y, 0, count)?, &places])?;
    linear(w, "last", &ops::add(&y, &z)?, 5)
}

/// Tokens go to the places that they are told: no rounding changes which.
#[test]
fn tokens_go_to_their_places() {
    fn run(w: &Weights, inputs: &[Tensor]) -> Result<Tensor> {
        let x = linear(w, "in", &inputs[0], 36)?;
        let y = ops::apply(Op::Merge { count: PLACES }, &[&x, &inputs[1]])?;
        let y = linear(w, "a", &y, 36)?;
        let back = ops::apply(Op::Unmerge, &[&y, &inputs[1], &x])?;
        let alone = ops::apply(Op::Unmerge, &[&linear(w, "b", &y, 36)?, &inputs[1]])?;
        linear(w, "out", &ops::add(&back, &alone)?, 5)
    }
    let net = Net {
        stored: DType::F32,
        inputs: vec![("x", vec![2, 23, 20]), ("places", vec![2, 23, 1])],
        run,
    };
    for level in Level::ALL.into_iter().filter(|level| level.is_supported()) {
        let error = distance(&net, &Options::new(level, Precision::F32));
        assert!(error < 2e-6, "{level:?}: {error}");
        if level.has_bf16() {
            let error = distance(&net, &Options::new(level, Precision::Bf16));
            assert!(error < 3e-2, "{level:?}: {error}");
        }
    }
}

#[test]
fn tokens_are_merged_and_come_back() {
    for (h, w) in [(7, 6), (2, 9), (8, 12)] {
        for copies in [1, 2] {
            for choice in [None, Some(("choice", vec![4, h / 2 * (w / 2)]))] {
                let mut inputs = vec![("x", vec![4, 4, h, w]), ("more", vec![4, h * w, 36])];
                inputs.extend(choice);
                let net = Net {
                    stored: DType::F32,
                    inputs,
                    run: merging,
                };
                let options = Options {
                    halved: vec!["x".into(), "choice".into()],
                    copies,
                    ..Options::new(Level::current(), Precision::F32)
                };
                let error = distance(&net, &options);
                assert!(error < 2e-6, "{h} {w}: {error}");
                if Level::current().has_bf16() {
                    let options = Options {
                        precision: Precision::Bf16,
                        ..options
                    };
                    // other tokens may be most alike: what is merged is not checked here
                    assert!(distance(&net, &options) < 0.5);
                }
            }
        }
    }
}
