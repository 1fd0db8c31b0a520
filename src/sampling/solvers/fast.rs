//! DPM-Solver-fast: Lu et al., arXiv 2206.00927, as k-diffusion's `sample_dpm_fast` runs it with η = 1: steps of three evaluations each, even in
//! −ln σ, and at the end one of what is left over.

use super::super::trajectory::{Linear, Register, Trajectory, sample, saved};
use super::Levels;
use super::kdiffusion::{ancestral, call, derivative};

/// Registers of the noise's estimates, and of where a step began.
const START: usize = 2;

/// A run of `calls` evaluations between two levels.
pub(in super::super) fn dpm_fast(
    levels: &Levels,
    ((high, low), calls): ((f64, f64), usize),
    timestep: &dyn Fn(f64) -> f64,
) -> Trajectory {
    let mut run = levels.trajectory(START + 1);
    let steps = calls / 3 + 1;
    let mut orders = vec![3; steps];
    if let [.., one_but_last, last] = orders.as_mut_slice()
        && calls.is_multiple_of(3)
    {
        (*one_but_last, *last) = (2, 1);
    } else if let Some(last) = orders.last_mut() {
        *last = calls % 3;
    }
    let (start, end) = (-high.ln(), -low.ln());
    let level = |i: usize| (-(start + (end - start) * i as f64 / steps as f64)).exp();
    for (i, order) in orders.into_iter().enumerate() {
        let (sigma, next) = (level(i), level(i + 1));
        let down = ancestral(sigma, next).0.max(low);
        let up = (next * next - down * down).max(0.0).sqrt();
        let evaluations = step(levels, (sigma, down), order, timestep);
        for (k, (mut call, x)) in evaluations.into_iter().enumerate() {
            call.step = run.calls.len();
            call.then.push(if k + 1 == order {
                x.into_with_noise(Register::Sample, up)
            } else {
                x.into(Register::Sample)
            });
            run.calls.push(call);
        }
    }
    run.steps = run.calls.len();
    run.sigmas = (0..=steps).map(level).collect();
    run
}

/// The evaluations of one step, each with the latents that follow it.
fn step(
    levels: &Levels,
    (sigma, down): (f64, f64),
    order: usize,
    timestep: &dyn Fn(f64) -> f64,
) -> Vec<(super::super::trajectory::Call, Linear)> {
    let h = (sigma / down).ln();
    // between the step's ends, as a share of it in −ln σ
    let at = |share: f64| sigma * (-share * h).exp();
    let growth = |share: f64| at(share) * (share * h).exp_m1();
    let shares: &[f64] = match order {
        1 => &[0.0],
        2 => &[0.0, 0.5],
        _ => &[0.0, 1.0 / 3.0, 2.0 / 3.0],
    };
    let x = || saved(START);
    let e = |k: usize| saved(k);
    let mean = |share: f64| at(share) * ((share * h).exp_m1() / (share * h) - 1.0);
    let mut evaluations = Vec::new();
    for (k, &share) in shares.iter().enumerate() {
        let level = at(share);
        let (mut call, x0) = call(levels, 0, (timestep(level), level), &sample());
        if k == 0 {
            call.then.push(sample().into(Register::Saved(START)));
        }
        let epsilon = derivative(sample(), x0, level);
        // the third estimate of the noise is needed at once and no more
        let kept = k.min(1);
        let first = e(0);
        let latest = if k == 0 { first.clone() } else { e(1) };
        call.then.push(epsilon.into(Register::Saved(kept)));
        let following = match (order, k) {
            (1, _) => x() - first * growth(1.0),
            (2, 0) => x() - first * growth(0.5),
            (2, _) => x() - first.clone() * growth(1.0) - (latest - first) * growth(1.0),
            (_, 0) => x() - first * growth(1.0 / 3.0),
            (_, 1) => {
                let bend = (latest - first.clone()) * (2.0 * mean(2.0 / 3.0));
                x() - first * growth(2.0 / 3.0) - bend
            }
            _ => {
                let bend = (latest - first.clone()) * (1.5 * mean(1.0));
                x() - first * growth(1.0) - bend
            }
        };
        evaluations.push((call, following));
    }
    evaluations
}
