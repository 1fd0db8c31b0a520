//! Ancestral samplers on flow models, by ComfyUI's reading (`sample_euler_ancestral_RF`, `sample_dpm_2_ancestral_RF`,
//! `sample_dpmpp_2s_ancestral_RF` and `sample_lcm` of its `k_diffusion/sampling.py`): a step goes below the next level, and fresh noise
//! brings it up to that, while what is there shrinks so that latents stay `(1 − σ)·x₀ + σ·ε`.

use super::super::trajectory::{Assign, Linear, Register, Trajectory, sample, saved};
use super::Levels;
use super::kdiffusion::{call, derivative};

/// From a level to the next with η = 1: the level below it, the factor of what is there, the factor of the noise.
struct Step {
    down: f64,
    kept: f64,
    noise: f64,
}

impl Step {
    fn new(sigma: f64, next: f64) -> Self {
        let down = next * (next / sigma);
        let kept = (1.0 - next) / (1.0 - down);
        Self {
            down,
            kept,
            noise: (next * next - (down * kept).powi(2)).max(0.0).sqrt(),
        }
    }

    fn finish(&self, x: Linear) -> Assign {
        (x * self.kept).into_with_noise(Register::Sample, self.noise)
    }
}

/// Along the line through the latents and the estimate, from a level to another.
fn towards(x0: Linear, from: f64, to: f64) -> Linear {
    let ratio = to / from;
    sample() * ratio + x0 * (1.0 - ratio)
}

/// Euler.
pub(in super::super) fn euler_ancestral(levels: &Levels) -> Trajectory {
    let mut run = levels.trajectory(0);
    for (i, sigma, next) in levels.pairs() {
        let (mut call, x0) = call(levels, i, (levels.timesteps[i], sigma), &sample());
        call.then.push(if next > 0.0 {
            let step = Step::new(sigma, next);
            step.finish(towards(x0, sigma, step.down))
        } else {
            x0.into(Register::Sample)
        });
        run.calls.push(call);
    }
    run
}

/// DPM-Solver-2: the derivative at the geometric mean of the levels, one evaluation for the last step.
pub(in super::super) fn dpm2_ancestral(
    levels: &Levels,
    timestep: &dyn Fn(f64) -> f64,
) -> Trajectory {
    let mut run = levels.trajectory(1);
    for (i, sigma, next) in levels.pairs() {
        let (mut first, x0) = call(levels, i, (levels.timesteps[i], sigma), &sample());
        if next == 0.0 {
            first.then.push(x0.into(Register::Sample));
            run.calls.push(first);
            continue;
        }
        let step = Step::new(sigma, next);
        let middle = (sigma * step.down).sqrt();
        first
            .then
            .push(derivative(sample(), x0, sigma).into(Register::Saved(0)));
        let x2 = sample() + saved(0) * (middle - sigma);
        let (mut second, x0) = call(levels, i, (timestep(middle), middle), &x2);
        let x = sample() + derivative(x2, x0, middle) * (step.down - sigma);
        second.then.push(step.finish(x));
        run.calls.push(first);
        run.calls.push(second);
    }
    run
}

/// The level that stands for the middle of a step from 1, where ln((1 − σ)/σ) has none.
const ALMOST_ALL_NOISE: f64 = 0.9999;

/// DPM-Solver++(2S): the estimate at the middle of ln((1 − σ)/σ), one evaluation for the last step.
pub(in super::super) fn dpmpp_2s_ancestral(
    levels: &Levels,
    timestep: &dyn Fn(f64) -> f64,
) -> Trajectory {
    let lambda = |sigma: f64| ((1.0 - sigma) / sigma).ln();
    let mut run = levels.trajectory(1);
    for (i, sigma, next) in levels.pairs() {
        let (mut first, x0) = call(levels, i, (levels.timesteps[i], sigma), &sample());
        if next == 0.0 {
            first.then.push(x0.into(Register::Sample));
            run.calls.push(first);
            continue;
        }
        let step = Step::new(sigma, next);
        let middle = if sigma >= 1.0 {
            ALMOST_ALL_NOISE
        } else {
            1.0 / (f64::midpoint(lambda(sigma), lambda(step.down)).exp() + 1.0)
        };
        first.then.push(x0.into(Register::Saved(0)));
        let x2 = towards(saved(0), sigma, middle);
        let (mut second, x0) = call(levels, i, (timestep(middle), middle), &x2);
        second.then.push(step.finish(towards(x0, sigma, step.down)));
        run.calls.push(first);
        run.calls.push(second);
    }
    run
}

/// Consistency models: the estimate, noised again.
pub(in super::super) fn lcm(levels: &Levels) -> Trajectory {
    let mut run = levels.trajectory(0);
    for (i, sigma, next) in levels.pairs() {
        let (mut call, x0) = call(levels, i, (levels.timesteps[i], sigma), &sample());
        call.then.push(if next > 0.0 {
            (x0 * (1.0 - next)).into_with_noise(Register::Sample, next)
        } else {
            x0.into(Register::Sample)
        });
        run.calls.push(call);
    }
    run
}
