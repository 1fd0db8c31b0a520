//! Solvers that step between timesteps by way of an estimate of x₀: DDIM (Song et al., "Denoising Diffusion Implicit Models", arXiv
//! 2010.02502, equation 12 with η = 0), TCD (Zheng et al., arXiv 2402.19159, with the γ = 0 that the pipelines give it), LCM (Luo et al.,
//! arXiv 2310.04378) and DDPM (Ho et al., arXiv 2006.11239, equation 7), as diffusers' classes of these names run them.

use super::super::config::SchedulerConfig;
use super::super::prediction::estimates;
use super::super::schedule::NoiseSchedule;
use super::super::spacing;
use super::super::start::Span;
use super::super::trajectory::{Assign, Call, Register, Trajectory, output, sample, saved};
use super::plain_call;
use crate::error::{Error, Result};

/// ᾱ at a timestep that a run visits. Some spacings give −1, which Python reads as the last.
pub(super) fn alpha_bar_at(schedule: &NoiseSchedule, timestep: f64) -> f64 {
    let last = schedule.len() - 1;
    schedule.alphas_cumprod[if timestep < 0.0 {
        last
    } else {
        (timestep as usize).min(last)
    }]
}

/// ᾱ at a timestep that is stepped to and may lie before the first.
pub(super) fn alpha_bar_to(
    config: &SchedulerConfig,
    schedule: &NoiseSchedule,
    timestep: f64,
) -> f64 {
    if timestep >= 0.0 {
        alpha_bar_at(schedule, timestep)
    } else if config.set_alpha_to_one {
        1.0
    } else {
        schedule.alphas_cumprod[0]
    }
}

fn trajectory(steps: usize) -> Trajectory {
    Trajectory {
        init_noise_sigma: 1.0,
        registers: 2,
        steps,
        ..Trajectory::default()
    }
}

/// The call at `timestep`, with x₀ left in register 0 (limited if the config says so) and ε in register 1.
fn estimate(config: &SchedulerConfig, step: usize, timestep: f64, bar: f64) -> Call {
    let scales = (bar.sqrt(), (1.0 - bar).sqrt());
    let (x0, epsilon) = estimates(config.prediction, scales, &sample(), &output());
    let told = (timestep, scales.1 / scales.0.max(1e-4));
    let mut call = plain_call(step, told, scales, config.prediction);
    call.then.push(x0.into(Register::Saved(0)));
    call.then.push(epsilon.into(Register::Saved(1)));
    if let Some(to) = config.thresholding {
        let register = Register::Saved(0);
        call.then.push(Assign::Limit { register, to });
    } else if config.clip_sample {
        let range = config.clip_sample_range;
        call.then.push(Assign::Clamp {
            register: Register::Saved(0),
            low: -range,
            high: range,
        });
    }
    call
}

/// DDIM, deterministic.
pub(in super::super) fn ddim(
    config: &SchedulerConfig,
    schedule: &NoiseSchedule,
    span: Span,
) -> Trajectory {
    let stride = (config.num_train_timesteps / span.steps) as f64;
    let timesteps = spacing::timesteps(config, span.steps, true);
    let mut run = trajectory(timesteps.len());
    for (i, &t) in timesteps.iter().enumerate().skip(span.first) {
        let mut call = estimate(config, i, t, alpha_bar_at(schedule, t));
        let next = alpha_bar_to(config, schedule, t - stride);
        let x = saved(0) * next.sqrt() + saved(1) * (1.0 - next).sqrt();
        call.then.push(x.into(Register::Sample));
        run.calls.push(call);
    }
    run
}

/// DDPM: the posterior's mean and fresh noise, but for the last step.
pub(in super::super) fn ddpm(
    config: &SchedulerConfig,
    schedule: &NoiseSchedule,
    span: Span,
) -> Result<Trajectory> {
    let large = match config.variance_type.as_str() {
        "fixed_small" | "fixed_small_log" => false,
        "fixed_large" => true,
        other => {
            return Err(Error::Unsupported(format!(
                "scheduler config field `variance_type` is \"{other}\", expected fixed_small or fixed_large"
            )));
        }
    };
    let timesteps = spacing::timesteps(config, span.steps, true);
    let mut run = trajectory(timesteps.len());
    for (i, &t) in timesteps.iter().enumerate().skip(span.first) {
        let now = alpha_bar_at(schedule, t);
        let next = match timesteps.get(i + 1) {
            Some(&next) if next >= 0.0 => alpha_bar_at(schedule, next),
            _ => 1.0,
        };
        let (alpha, beta) = (now / next, 1.0 - now / next);
        let mut call = estimate(config, i, t, now);
        let mean = saved(0) * (next.sqrt() * beta / (1.0 - now))
            + sample() * (alpha.sqrt() * (1.0 - next) / (1.0 - now));
        let small = ((1.0 - next) / (1.0 - now) * beta).max(1e-20);
        call.then.push(if t > 0.0 {
            mean.into_with_noise(Register::Sample, if large { beta } else { small }.sqrt())
        } else {
            mean.into(Register::Sample)
        });
        run.calls.push(call);
    }
    Ok(run)
}

/// Timesteps of models distilled to `original_inference_steps`: evenly among those, from the last.
fn distilled_timesteps(config: &SchedulerConfig, span: Span) -> Result<Vec<f64>> {
    let steps = span.steps;
    let original = config
        .original_inference_steps
        .min(config.num_train_timesteps);
    if steps > original {
        return Err(Error::Usage(format!(
            "--steps is {steps}, expected 1 to {original}, the `original_inference_steps` of the folder's {}",
            config.class_name
        )));
    }
    let last = (original as f64 * span.share) as usize;
    if steps > last {
        return Err(Error::Usage(format!(
            "--steps is {steps}, expected 1 to {last} at --strength {}; use fewer --steps or more --strength",
            span.share
        )));
    }
    let ratio = config.num_train_timesteps / original;
    let share = last as f64 / steps as f64;
    Ok((0..steps)
        .map(|i| {
            let skipped = (i as f64 * share).floor() as usize;
            ((last - skipped) * ratio) as f64 - 1.0
        })
        .collect())
}

/// TCD without noise: DDIM over the distilled timesteps, down to timestep 0.
pub(in super::super) fn tcd(
    config: &SchedulerConfig,
    schedule: &NoiseSchedule,
    span: Span,
) -> Result<Trajectory> {
    let timesteps = distilled_timesteps(config, span)?;
    let config = &SchedulerConfig {
        clip_sample: false,
        thresholding: None,
        ..config.clone()
    };
    let mut run = trajectory(span.steps);
    for (i, &t) in timesteps.iter().enumerate().skip(span.first) {
        let mut call = estimate(config, i, t, alpha_bar_at(schedule, t));
        let next = alpha_bar_at(schedule, timesteps.get(i + 1).copied().unwrap_or_default());
        let x = saved(0) * next.sqrt() + saved(1) * (1.0 - next).sqrt();
        call.then.push(x.into(Register::Sample));
        run.calls.push(call);
    }
    Ok(run)
}

/// The σ of the data in LCM's boundary condition.
const SIGMA_DATA: f64 = 0.5;

/// LCM: the estimate, bent towards the latents at small times, and noised again for the next step.
pub(in super::super) fn lcm(
    config: &SchedulerConfig,
    schedule: &NoiseSchedule,
    span: Span,
) -> Result<Trajectory> {
    let timesteps = distilled_timesteps(config, span)?;
    let mut run = trajectory(span.steps);
    for (i, &t) in timesteps.iter().enumerate().skip(span.first) {
        let mut call = estimate(config, i, t, alpha_bar_at(schedule, t));
        let time = t * config.timestep_scaling;
        let norm = time * time + SIGMA_DATA * SIGMA_DATA;
        let x = saved(0) * (time / norm.sqrt()) + sample() * (SIGMA_DATA * SIGMA_DATA / norm);
        call.then.push(match timesteps.get(i + 1) {
            Some(&next) => {
                let next = alpha_bar_to(config, schedule, next);
                (x * next.sqrt()).into_with_noise(Register::Sample, (1.0 - next).sqrt())
            }
            None => x.into(Register::Sample),
        });
        run.calls.push(call);
    }
    Ok(run)
}
