//! DPM-Solver-2 in σ space, as k-diffusion's `sample_dpm_2` and `sample_dpm_2_ancestral` (diffusers `KDPM2DiscreteScheduler`,
//! `KDPM2AncestralDiscreteScheduler`): the derivative is taken at the geometric mean of a step's two levels.

use super::super::trajectory::{Register, Trajectory, sample, saved};
use super::Levels;
use super::kdiffusion::{ancestral, call, derivative};

/// Two evaluations a step, one for the last. `noisy`: ancestral, with fresh noise in every step but the last. `timestep`: that of a level.
pub(in super::super) fn dpm2(
    levels: &Levels,
    noisy: bool,
    timestep: &dyn Fn(f64) -> f64,
) -> Trajectory {
    let mut run = levels.trajectory(1);
    for (i, sigma, next) in levels.pairs() {
        let (down, up) = if noisy {
            ancestral(sigma, next)
        } else {
            (next, 0.0)
        };
        let (mut first, x0) = call(levels, i, (levels.timesteps[i], sigma), &sample());
        let d = derivative(sample(), x0, sigma);
        if down == 0.0 {
            first
                .then
                .push((sample() + d * -sigma).into(Register::Sample));
            run.calls.push(first);
            continue;
        }
        let middle = (sigma * down).sqrt();
        first.then.push(sample().into(Register::Saved(0)));
        let x2 = sample() + d * (middle - sigma);
        first.then.push(x2.into(Register::Sample));
        let (mut second, x0) = call(levels, i, (timestep(middle), middle), &sample());
        let x = saved(0) + derivative(sample(), x0, middle) * (down - sigma);
        second.then.push(if noisy {
            x.into_with_noise(Register::Sample, up)
        } else {
            x.into(Register::Sample)
        });
        run.calls.push(first);
        run.calls.push(second);
    }
    run
}

/// After the first of a step's two calls diffusers' inpainting has the known part at the level of the whole step already.
pub(in super::super) fn link_halves(run: &mut Trajectory) {
    for i in 1..run.calls.len() {
        if run.calls[i - 1].step == run.calls[i].step {
            run.calls[i - 1].next = run.calls[i].next;
        }
    }
}
