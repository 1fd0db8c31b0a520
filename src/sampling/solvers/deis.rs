//! DEIS: Zhang & Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", arXiv 2204.13902, multistep in log ρ (diffusers
//! `DEISMultistepScheduler`).

use super::super::config::{SchedulerConfig, SigmaMap};
use super::super::prediction::estimates;
use super::super::schedule::NoiseSchedule;
use super::super::start::Span;
use super::super::trajectory::{Assign, Linear, Register, Trajectory, output, sample, saved};
use super::UnitLevels;
use super::dpm::multistep_order;

/// Estimates of the noise that are kept.
const HISTORY: usize = 3;

pub(in super::super) fn deis(
    config: &SchedulerConfig,
    schedule: &NoiseSchedule,
    span: Span,
) -> Trajectory {
    let rounded = config.sigma_map == SigmaMap::Karras;
    // this class always ends at the least noise
    let config = &SchedulerConfig {
        final_sigma_zero: false,
        ..config.clone()
    };
    let mut levels = UnitLevels::new(
        config,
        schedule,
        (span, config.num_train_timesteps),
        rounded,
    );
    levels.end_at_own_last(config);
    let mut run = Trajectory {
        registers: HISTORY,
        ..levels.trajectory()
    };
    for i in levels.indices() {
        let sigma = levels.sigmas[i];
        let (alpha, scale) = levels.space.place(sigma);
        let (x0, _) = estimates(config.prediction, (alpha, scale), &sample(), &output());
        // by way of x₀ whatever is predicted, also where α² + σ² is not 1
        let noise = |x0: Linear| (sample() - x0 * alpha) * (1.0 / scale);
        let mut call = levels.call(i, config.prediction);
        let register = Register::Saved(i % HISTORY);
        let epsilon = match config.thresholding {
            Some(to) => {
                call.then.push(x0.into(register));
                call.then.push(Assign::Limit { register, to });
                noise(saved(i % HISTORY))
            }
            None => noise(x0),
        };
        call.then.push(epsilon.into(register));
        let order = multistep_order(config, &levels, i, false);
        call.then
            .push(step(&levels, i, order).into(Register::Sample));
        run.calls.push(call);
    }
    run
}

/// From level `i` to the next: dx̂ = ε dρ for x̂ = x/α and ρ = σ/α, ε interpolated in log ρ.
fn step(levels: &UnitLevels, i: usize, order: usize) -> Linear {
    let alpha = |i: usize| levels.space.place(levels.sigmas[i]).0;
    let rho = |i: usize| levels.space.ratio(levels.sigmas[i]);
    let (alpha_t, alpha_s) = (alpha(i + 1), alpha(i));
    let (from, to) = (rho(i), rho(i + 1));
    let nodes: Vec<f64> = (0..order).map(|age| rho(i - age).ln()).collect();
    let scaled = sample() * (1.0 / alpha_s);
    let moved = (0..order).fold(scaled, |x, age| {
        let weight = integral(&nodes, age, to) - integral(&nodes, age, from);
        x + saved((i - age) % HISTORY) * weight
    });
    moved * alpha_t
}

/// The antiderivative in ρ of the Lagrange polynomial in log ρ that is 1 at node `which` and 0 at the others.
fn integral(nodes: &[f64], which: usize, rho: f64) -> f64 {
    let log = rho.ln();
    let others: Vec<f64> = (0..nodes.len())
        .filter(|&k| k != which)
        .map(|k| nodes[k])
        .collect();
    let scale: f64 = others.iter().map(|other| nodes[which] - other).product();
    // ∫ ln ρ dρ = ρ (ln ρ − 1), ∫ ln² ρ dρ = ρ (ln² ρ − 2 ln ρ + 2)
    let polynomial = match others.as_slice() {
        [a, b] => log * log - 2.0 * log + 2.0 - (a + b) * (log - 1.0) + a * b,
        [a] => log - 1.0 - a,
        _ => 1.0,
    };
    rho * polynomial / scale
}
