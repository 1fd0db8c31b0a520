//! DPM-Solver and DPM-Solver++, multistep, orders 1 to 3: Lu et al., arXiv 2206.00927 and 2211.01095 (diffusers
//! `DPMSolverMultistepScheduler`), deterministic and with noise.

use super::super::config::{BetaSchedule, SchedulerConfig, SigmaMap};
use super::super::prediction::estimates;
use super::super::schedule::NoiseSchedule;
use super::super::spacing;
use super::super::trajectory::{Linear, Register, Trajectory, output, sample, saved};
use super::{alpha_sigma, lambda, plain_call};
use crate::error::{Error, Result};

/// The variants of the algorithm.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Integrates the noise.
    Noise,
    /// Integrates the denoised latents.
    Data,
    /// The same with fresh noise.
    SdeNoise,
    /// The same with fresh noise.
    SdeData,
}

/// Noise levels and timesteps of diffusers' multistep solvers; `rounded`: whether remapped timesteps become whole numbers.
pub(super) fn levels(
    config: &SchedulerConfig,
    schedule: &NoiseSchedule,
    (steps, last): (usize, usize),
    rounded: bool,
) -> (Vec<f64>, Vec<f64>) {
    let remapped = spacing::remap(config, (schedule.sigma_max(), schedule.sigma_min()), steps);
    let (mut sigmas, timesteps) = match remapped {
        Some(sigmas) => {
            let t = sigmas.iter().map(|&s| schedule.timestep(s));
            // diffusers stores them as integers: rounded first for some maps, cut for the others
            let t = t
                .map(|t| {
                    if rounded {
                        t.round_ties_even()
                    } else {
                        t.trunc()
                    }
                })
                .collect();
            (sigmas, t)
        }
        None => {
            let t = spacing::multistep_timesteps(config, last, steps);
            (
                t.iter()
                    .map(|&t| schedule.interpolate(t))
                    .collect::<Vec<_>>(),
                t,
            )
        }
    };
    sigmas.push(if config.final_sigma_zero {
        0.0
    } else {
        schedule.sigma_min()
    });
    (spacing::to_f32(sigmas), timesteps)
}

pub(in super::super) fn dpm(
    config: &SchedulerConfig,
    schedule: &NoiseSchedule,
    steps: usize,
) -> Result<Trajectory> {
    let kind = match config.algorithm_type.as_str() {
        "dpmsolver++" | "deis" => Kind::Data,
        "dpmsolver" => Kind::Noise,
        "sde-dpmsolver++" => Kind::SdeData,
        "sde-dpmsolver" => Kind::SdeNoise,
        other => {
            return Err(Error::Unsupported(format!(
                "scheduler config field `algorithm_type` is \"{other}\", which is not supported"
            )));
        }
    };
    if config.final_sigma_zero && matches!(kind, Kind::Noise | Kind::SdeNoise) {
        return Err(Error::Usage(
            "scheduler config: `final_sigmas_type` zero does not go with `algorithm_type` dpmsolver; use sigma_min".to_owned(),
        ));
    }
    let heun = config.solver_type == "heun";
    let order = config.solver_order.min(3);
    let clipped = schedule
        .sigmas
        .iter()
        .rev()
        .filter(|&&s| lambda(s) < config.lambda_min_clipped)
        .count();
    let last = config.num_train_timesteps - clipped;
    let rounded = config.beta_schedule != BetaSchedule::SquaredCosine
        && matches!(config.sigma_map, SigmaMap::Karras | SigmaMap::Lu);
    let (sigmas, timesteps) = levels(config, schedule, (steps, last), rounded);
    let count = timesteps.len();
    let mut run = Trajectory {
        init_noise_sigma: 1.0,
        registers: 3,
        steps: count,
        sigmas: sigmas.clone(),
        calls: Vec::new(),
    };
    for i in 0..count {
        let (x0, epsilon) = estimates(
            config.prediction,
            alpha_sigma(sigmas[i]),
            &sample(),
            &output(),
        );
        let data = matches!(kind, Kind::Data | Kind::SdeData);
        let mut call = plain_call(i, timesteps[i], sigmas[i]);
        call.then
            .push((if data { x0 } else { epsilon }).into(Register::Saved(i % 3)));
        let few = config.lower_order_final && count < 15;
        let at_last = i + 1 == count && (config.euler_at_final || few || config.final_sigma_zero);
        let at_second_last = i + 2 == count && few;
        let this_order = if at_last {
            1
        } else {
            order.min(i + 1).min(if at_second_last { 2 } else { 3 })
        };
        let (x, noise) = update(kind, &sigmas, i, this_order, heun);
        call.then.push(match noise {
            Some(factor) => x.into_with_noise(Register::Sample, factor),
            None => x.into(Register::Sample),
        });
        run.calls.push(call);
    }
    Ok(run)
}

/// The step from level `i` to the next, and the factor of fresh noise.
fn update(kind: Kind, sigmas: &[f64], i: usize, order: usize, heun: bool) -> (Linear, Option<f64>) {
    let ((alpha_t, sigma_t), (alpha_s, sigma_s)) =
        (alpha_sigma(sigmas[i + 1]), alpha_sigma(sigmas[i]));
    let h = lambda(sigmas[i + 1]) - lambda(sigmas[i]);
    let m = |age: usize| saved((i - age) % 3);
    // divided differences of what is integrated
    let spread = |a: usize| lambda(sigmas[i - a]) - lambda(sigmas[i - a - 1]);
    let (d1, d2) = match order {
        1 => (Linear::default(), Linear::default()),
        2 => ((m(0) - m(1)) * (h / spread(0)), Linear::default()),
        _ => {
            let (r0, r1) = (spread(0) / h, spread(1) / h);
            let (a, b) = ((m(0) - m(1)) * (1.0 / r0), (m(1) - m(2)) * (1.0 / r1));
            let d1 = a.clone() + (a.clone() - b.clone()) * (r0 / (r0 + r1));
            (d1, (a - b) * (1.0 / (r0 + r1)))
        }
    };
    // the weights of value, slope and curvature; at infinite h (the last step to zero noise) only the value counts
    let midpoint = order == 2 && !heun;
    let (scale, w0, w1, w2, noise) = match kind {
        Kind::Data => {
            let e = (-h).exp_m1();
            let w1 = if midpoint { -0.5 * e } else { e / h + 1.0 };
            (
                sigma_t / sigma_s,
                -alpha_t * e,
                alpha_t * w1,
                -alpha_t * ((e + h) / (h * h) - 0.5),
                None,
            )
        }
        Kind::Noise => {
            let e = h.exp_m1();
            let w1 = if midpoint { 0.5 * e } else { e / h - 1.0 };
            (
                alpha_t / alpha_s,
                -sigma_t * e,
                -sigma_t * w1,
                -sigma_t * ((e - h) / (h * h) - 0.5),
                None,
            )
        }
        Kind::SdeData => {
            let e = -(-2.0 * h).exp_m1();
            let w1 = if midpoint {
                0.5 * e
            } else {
                e / (-2.0 * h) + 1.0
            };
            let w2 = (e - 2.0 * h) / (4.0 * h * h) - 0.5;
            let scale = sigma_t / sigma_s * (-h).exp();
            (
                scale,
                alpha_t * e,
                alpha_t * w1,
                alpha_t * w2,
                Some(sigma_t * e.sqrt()),
            )
        }
        Kind::SdeNoise => {
            let e = h.exp_m1();
            let w1 = if midpoint { e } else { 2.0 * (e / h - 1.0) };
            let noise = sigma_t * (2.0 * h).exp_m1().sqrt();
            (
                alpha_t / alpha_s,
                -2.0 * sigma_t * e,
                -sigma_t * w1,
                0.0,
                Some(noise),
            )
        }
    };
    let mut x = sample() * scale + m(0) * w0;
    if order > 1 {
        x = x + d1 * w1;
    }
    if order > 2 {
        x = x + d2 * w2;
    }
    (x, noise)
}
