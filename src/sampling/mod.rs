//! The mathematics of noise. Two independent choices make a sampler: which noise levels a run passes through, and how it steps from one
//! to the next. Either way the result is a [`Trajectory`]: coefficients in f64, known before the run.

mod config;
mod names;
mod noise;
mod prediction;
mod schedule;
mod solvers;
mod spacing;
mod trajectory;

pub use config::{BetaSchedule, SchedulerConfig, SigmaMap};
pub use names::{Sampler, parse};
pub use noise::Generator;
pub use prediction::Prediction;
pub use schedule::NoiseSchedule;
pub use spacing::Schedule;
pub use trajectory::{Assign, Call, Combo, Register, Trajectory};

use crate::error::{Error, Result};
use solvers::{Levels, kdiffusion};

/// The run that diffusers 0.42.1 makes of a `scheduler_config.json`, with a notice when its class is not known.
///
/// # Errors
/// [`Error::Usage`] for a number of steps that the scheduler cannot take, [`Error::Unsupported`] for options that are not built.
pub fn diffusers(config: &SchedulerConfig, steps: usize) -> Result<(Trajectory, Option<String>)> {
    if steps == 0 || steps > config.num_train_timesteps {
        return Err(Error::Usage(format!(
            "--steps is {steps}, expected 1 to {}, the steps that the model was trained with",
            config.num_train_timesteps
        )));
    }
    let schedule = NoiseSchedule::new(config);
    let levels = || discrete_levels(config, &schedule, steps);
    let mut warning = None;
    let mut run = match config.class_name.as_str() {
        "PNDMScheduler" => solvers::pndm::pndm(config, &schedule, steps)?,
        "DDIMScheduler" => solvers::ddim::ddim(config, &schedule, steps),
        "EulerDiscreteScheduler" => kdiffusion::euler(&levels()),
        "EulerAncestralDiscreteScheduler" if config.prediction == Prediction::Sample => {
            return Err(Error::Unsupported(
                "Euler ancestral is not defined for models that predict the sample".to_owned(),
            ));
        }
        "EulerAncestralDiscreteScheduler" => kdiffusion::euler_ancestral(&levels(), true),
        "HeunDiscreteScheduler" => kdiffusion::heun(&levels()),
        "LMSDiscreteScheduler" => kdiffusion::lms(&levels()),
        "DPMSolverMultistepScheduler" => solvers::dpm::dpm(config, &schedule, steps)?,
        "UniPCMultistepScheduler" => solvers::unipc::unipc(config, &schedule, steps)?,
        other => {
            warning = Some(format!(
                "the folder's scheduler is {other}, which is not built yet; PNDM takes its place (name one with --sampler)"
            ));
            let config = SchedulerConfig {
                skip_prk_steps: true,
                ..config.clone()
            };
            solvers::pndm::pndm(&config, &schedule, steps)?
        }
    };
    run.steps = run.calls.last().map_or(0, |call| call.step + 1);
    Ok((run, warning))
}

/// Levels of diffusers' σ-space schedulers.
fn discrete_levels(config: &SchedulerConfig, schedule: &NoiseSchedule, steps: usize) -> Levels {
    let mut timesteps = spacing::timesteps(config, steps, false);
    let mut sigmas: Vec<f64> = if config.log_linear {
        // this reference interpolates levels one more than there are timesteps
        spacing::exponential(schedule.sigma_min(), schedule.sigma_max(), steps + 1)
    } else {
        timesteps.iter().map(|&t| schedule.interpolate(t)).collect()
    };
    let ends = (
        sigmas.first().copied().unwrap_or_default(),
        sigmas.last().copied().unwrap_or_default(),
    );
    // LMS spreads its Karras levels between its own ends too
    if let Some(remapped) = spacing::remap(config, ends, steps) {
        timesteps = remapped.iter().map(|&s| schedule.timestep(s)).collect();
        sigmas = remapped;
    }
    sigmas.push(if config.final_sigma_zero {
        0.0
    } else {
        schedule.sigma_min()
    });
    let sigmas = spacing::to_f32(sigmas);
    if config.continuous && config.prediction == Prediction::V {
        timesteps = sigmas[..sigmas.len() - 1]
            .iter()
            .map(|s| 0.25 * s.ln())
            .collect();
    }
    let timesteps: Vec<f64> = timesteps.iter().map(|&t| f64::from(t as f32)).collect();
    let max = sigmas.iter().copied().fold(0.0, f64::max);
    let init_noise_sigma = match config.spacing {
        config::Spacing::Leading => (max * max + 1.0).sqrt(),
        _ => max,
    };
    // with one level more than timesteps the last two are never reached
    let sigmas = if config.log_linear {
        sigmas[..=timesteps.len()].to_vec()
    } else {
        sigmas
    };
    Levels {
        sigmas,
        timesteps,
        prediction: config.prediction,
        init_noise_sigma,
    }
}

/// The run that A1111 makes of a sampler's and a schedule's name, on the noise levels of the model.
///
/// # Errors
/// Never for the samplers that are built; kept for those to come.
pub fn by_name(
    sampler: Sampler,
    schedule: Schedule,
    steps: usize,
    (levels, prediction): (&NoiseSchedule, Prediction),
) -> Result<Trajectory> {
    let sigmas = schedule.sigmas(levels, steps);
    let timesteps = sigmas[..steps]
        .iter()
        .map(|&s| levels.timestep(s))
        .collect();
    let init_noise_sigma = sigmas.first().copied().unwrap_or_default();
    let run = Levels {
        sigmas,
        timesteps,
        prediction,
        init_noise_sigma,
    };
    Ok(match sampler {
        Sampler::Euler => kdiffusion::euler(&run),
        Sampler::EulerA => kdiffusion::euler_ancestral(&run, true),
        Sampler::Heun => kdiffusion::heun(&run),
        Sampler::Lms => kdiffusion::lms(&run),
        Sampler::DpmPp2m => kdiffusion::dpmpp_2m(&run),
        Sampler::DpmPp2sA => kdiffusion::dpmpp_2s_ancestral(&run, &|sigma| levels.timestep(sigma)),
    })
}
