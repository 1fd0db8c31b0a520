//! iPNDM (Zhang & Chen, arXiv 2204.13902, appendix): Adams–Bashforth over derivatives in σ with weights for even levels, or with those that zju-pi's
//! diff-sampler has for uneven ones (ComfyUI `sample_ipndm`, `sample_ipndm_v`); the last step is the estimate.

use super::super::trajectory::{Linear, Register, Trajectory, sample, saved};
use super::Levels;
use super::kdiffusion::{call, derivative};

/// Derivatives that are kept.
const HISTORY: usize = 4;

/// One evaluation a step. `variable`: weights by the levels.
pub(in super::super) fn ipndm(levels: &Levels, variable: bool) -> Trajectory {
    let mut run = levels.trajectory(HISTORY);
    for (i, sigma, next) in levels.pairs() {
        let (mut call, x0) = call(levels, i, (levels.timesteps[i], sigma), &sample());
        let d = derivative(sample(), x0.clone(), sigma);
        call.then.push(d.into(Register::Saved(i % HISTORY)));
        let order = (i + 1).min(HISTORY);
        let weights = if variable {
            uneven(&levels.sigmas, i, order)
        } else {
            even(order)
        };
        let x = if next == 0.0 {
            // the derivative is of the latents that are here still
            sample() - saved(i % HISTORY) * sigma
        } else {
            let mean = weights.iter().enumerate();
            mean.fold(sample(), |x: Linear, (age, weight)| {
                x + saved((i - age) % HISTORY) * (weight * (next - sigma))
            })
        };
        call.then.push(x.into(Register::Sample));
        run.calls.push(call);
    }
    run
}

/// Weights of derivatives at even distances, the latest first.
fn even(order: usize) -> Vec<f64> {
    let (weights, whole): (&[f64], f64) = match order {
        1 => (&[1.0], 1.0),
        2 => (&[3.0, -1.0], 2.0),
        3 => (&[23.0, -16.0, 5.0], 12.0),
        _ => (&[55.0, -59.0, 37.0, -9.0], 24.0),
    };
    weights.iter().map(|w| w / whole).collect()
}

/// Those of step `i` over the levels as they are.
fn uneven(sigmas: &[f64], i: usize, order: usize) -> Vec<f64> {
    if order == 1 {
        return vec![1.0];
    }
    // the length of the step, and of those before it
    let h = |age: usize| sigmas[i + 1 - age] - sigmas[i - age];
    let ratio = h(0) / h(1);
    let two = [(2.0 + ratio) / 2.0, -ratio / 2.0];
    if order == 2 {
        return two.to_vec();
    }
    let both = h(0) + h(1);
    let slope = h(1) / h(2);
    let third = (1.0 - h(0) / (3.0 * both) * (h(0) * both) / (h(1) * (h(1) + h(2)))) / 2.0;
    let three = [
        two[0] + third,
        two[1] - (1.0 + slope) * third,
        third * slope,
    ];
    if order == 3 {
        return three.to_vec();
    }
    let all = both + h(2);
    let fourth = ((1.0 - h(0) / (3.0 * both)) / 2.0
        + (1.0 - h(0) / (2.0 * both)) * h(0) / (6.0 * all))
        * (h(0) * both * all)
        / (h(1) * (h(1) + h(2)) * (h(1) + h(2) + h(3)));
    let far = h(1) * (h(1) + h(2)) / (h(2) * (h(2) + h(3)));
    vec![
        three[0] + fourth,
        three[1] - (1.0 + slope + far) * fourth,
        three[2] + (slope + far * (1.0 + h(2) / h(3))) * fourth,
        -fourth * far * slope,
    ]
}
