//! Samplers of consistency models in σ space: LCM as A1111 runs it (Luo et al., arXiv 2310.04378) and TCD (Zheng et al., arXiv 2402.19159)
//! with the γ of its authors.

use super::super::schedule::NoiseSchedule;
use super::super::trajectory::{Register, Trajectory, sample};
use super::Levels;
use super::kdiffusion::{call, derivative};

/// What times are multiplied by in LCM's boundary condition, and the σ of the data there.
const TIME_SCALE: f64 = 10.0;
const SIGMA_DATA: f64 = 0.5;

/// LCM: the estimate, bent towards the latents at small times, and noised again for the next step.
pub(in super::super) fn lcm(levels: &Levels) -> Trajectory {
    let mut run = levels.trajectory(0);
    for (i, sigma, next) in levels.pairs() {
        let timestep = levels.timesteps[i];
        let (mut call, x0) = call(levels, i, (timestep, sigma), &sample());
        let time = timestep * TIME_SCALE;
        let norm = time * time + SIGMA_DATA * SIGMA_DATA;
        let (bend, keep) = (time / norm.sqrt(), SIGMA_DATA * SIGMA_DATA / norm);
        let x = x0 * bend + sample() * keep;
        // A1111 takes the bent one for the estimate
        let (seen, predicted) = call.denoised;
        call.denoised = (seen * bend + keep / call.scale, predicted * bend);
        call.then.push(if next > 0.0 {
            x.into_with_noise(Register::Sample, next)
        } else {
            x.into(Register::Sample)
        });
        run.calls.push(call);
    }
    run
}

/// The share of a step's time that is taken by noise instead of the network.
const GAMMA: f64 = 0.3;

/// TCD: down to (1 − γ) of the next timestep, and up to that by fresh noise; the last step ends at the first timestep of training, from
/// where latents of unit variance are what is asked for.
pub(in super::super) fn tcd(levels: &Levels, training: &NoiseSchedule) -> Trajectory {
    let mut run = levels.trajectory(0);
    run.init_noise_sigma = levels.init_noise_sigma.hypot(1.0);
    for (i, sigma, next) in levels.pairs() {
        let (mut call, x0) = call(levels, i, (levels.timesteps[i], sigma), &sample());
        let to = |level: f64| sample() + derivative(sample(), x0.clone(), sigma) * (level - sigma);
        call.then
            .push(if let Some(&timestep) = levels.timesteps.get(i + 1) {
                let down = training.interpolate(((1.0 - GAMMA) * timestep).floor());
                let up = (next * next - down * down).max(0.0).sqrt();
                to(down).into_with_noise(Register::Sample, up)
            } else {
                let end = training.sigma_min();
                (to(end) * (1.0 / end.hypot(1.0))).into(Register::Sample)
            });
        run.calls.push(call);
    }
    run
}
