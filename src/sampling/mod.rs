//! The mathematics of noise. Two independent choices make a sampler: which noise levels a run passes through, and how it steps from one
//! to the next. Either way the result is a [`Trajectory`]: coefficients in f64, known before the run.

mod brownian;
mod by_name;
mod config;
mod names;
mod noise;
mod prediction;
mod schedule;
mod solvers;
mod spacing;
mod start;
mod threshold;
mod trajectory;

pub use brownian::BrownianTree;
pub use by_name::{Model, by_name};
pub use config::{
    BetaSchedule, Class, DynamicShift, FlowConfig, SchedulerConfig, SigmaMap, Spacing,
};
pub use names::{Sampler, parse};
pub use noise::{Choices, Generator};
pub use prediction::Prediction;
pub use schedule::NoiseSchedule;
pub use spacing::Schedule;
pub use start::{Start, StepCount};
pub use threshold::{Threshold, quantile};
pub use trajectory::{Assign, Brownian, Call, Combo, Draw, Register, Slices, Trajectory};

use crate::error::{Error, Result};
use solvers::{Levels, kdiffusion};
use start::Span;

/// What diffusers' pipeline of a flow model tells its scheduler beside the number of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Patches of the picture's latents (`image_seq_len`): (height/16)·(width/16) pixels of Stable Diffusion 3 and FLUX.
    pub patches: usize,
    /// The pipeline gives levels from 1 to 1/steps to be shifted (FLUX); otherwise the scheduler spreads its own (Stable Diffusion 3).
    pub gives_levels: bool,
}

/// The run that diffusers 0.42.1 makes of a `scheduler_config.json`, with a notice when its class is not known and the family's own takes
/// its place: PNDM, or flow matching's Euler for a model of `flow`. A run that begins at a picture makes the last of the steps, with the
/// history and the orders that the class has there.
///
/// # Errors
/// [`Error::Usage`] for a number of steps that the scheduler cannot take and a strength that leaves none, [`Error::Unsupported`] for
/// options that are not built.
pub fn diffusers(
    config: &SchedulerConfig,
    steps: usize,
    flow: Option<Flow>,
    start: Start,
) -> Result<(Trajectory, Option<String>)> {
    let distilled = matches!(config.class(), Class::Lcm | Class::Tcd);
    let start = if distilled {
        start
    } else {
        start.undistilled()
    };
    let span = start.span(steps, flow.is_some())?;
    let (mut run, warning) = whole_or_part(config, span, flow)?;
    for call in &mut run.calls {
        call.step = call.step.saturating_sub(span.first);
    }
    run.link();
    if matches!(
        config.class(),
        Class::Kdpm2 | Class::Kdpm2Ancestral | Class::DpmSde
    ) {
        solvers::dpm2::link_halves(&mut run);
    }
    if start.is_picture() {
        run.begin_at_picture();
    }
    run.steps = run.calls.last().map_or(0, |call| call.step + 1);
    if run.is_finite() {
        return Ok((run, warning));
    }
    Err(Error::Usage(format!(
        "the folder's {} divides by zero at {steps} steps, as it does in diffusers; use other --steps or name a --sampler",
        config.class_name
    )))
}

/// The calls of [`diffusers`], their steps counted from the first of the whole run.
fn whole_or_part(
    config: &SchedulerConfig,
    span: Span,
    flow: Option<Flow>,
) -> Result<(Trajectory, Option<String>)> {
    let steps = span.steps;
    if steps == 0 || steps > config.num_train_timesteps {
        return Err(Error::Usage(format!(
            "--steps is {steps}, expected 1 to {}, the steps that the model was trained with",
            config.num_train_timesteps
        )));
    }
    refuse_undefined(config)?;
    let unknown = config.class() == Class::Unknown;
    if let Some(fields) = config.flow.filter(|_| flow.is_some() || !unknown) {
        return flows(config, fields, span, flow);
    }
    if flow.is_some() {
        return Err(Error::Unsupported(format!(
            "the folder's {} has no form for flow models, which this one is; name a --sampler",
            config.class_name
        )));
    }
    let config = &SchedulerConfig {
        flow: None,
        ..config.clone()
    };
    let schedule = NoiseSchedule::of_betas(config);
    let levels = || discrete_levels(config, &schedule, span);
    let middle = |sigma| schedule.timestep(sigma);
    let mut warning = None;
    let run = match config.class() {
        Class::Pndm => solvers::pndm::pndm(config, &schedule, span)?,
        Class::Ddim => solvers::ddim::ddim(config, &schedule, span),
        Class::Ddpm => solvers::ddim::ddpm(config, &schedule, span)?,
        Class::Euler => kdiffusion::euler(&levels()),
        Class::EulerAncestral => kdiffusion::euler_ancestral(&levels(), true),
        Class::Heun => kdiffusion::heun(&levels()),
        Class::Lms => kdiffusion::lms(&levels()),
        Class::DpmSde => dpm_sde(config, &schedule, &levels()),
        Class::Kdpm2 => solvers::dpm2::dpm2(&levels(), false, &middle),
        Class::Kdpm2Ancestral => solvers::dpm2::dpm2(&levels(), true, &middle),
        Class::DpmMultistep => solvers::dpm::multistep(config, &schedule, span)?,
        Class::DpmSinglestep => solvers::dpm::singlestep(config, &schedule, span)?,
        Class::UniPc => solvers::unipc::unipc(config, &schedule, span)?,
        Class::Deis => solvers::deis::deis(config, &schedule, span),
        Class::Lcm => solvers::ddim::lcm(config, &schedule, span)?,
        Class::Tcd => solvers::ddim::tcd(config, &schedule, span)?,
        Class::EdmEuler => kdiffusion::euler(&solvers::edm::levels(config, span)),
        Class::EdmDpmMultistep => solvers::dpm::edm_multistep(config, span)?,
        Class::Unknown | Class::FlowMatchEuler | Class::FlowMatchHeun | Class::FlowMatchLcm => {
            warning = Some(format!(
                "the folder's scheduler is {}, which is not built; PNDM takes its place (name one with --sampler)",
                config.class_name
            ));
            let config = SchedulerConfig {
                skip_prk_steps: true,
                ..config.clone()
            };
            solvers::pndm::pndm(&config, &schedule, span)?
        }
    };
    Ok((run, warning))
}

/// The same for flow models.
fn flows(
    config: &SchedulerConfig,
    fields: FlowConfig,
    span: Span,
    flow: Option<Flow>,
) -> Result<(Trajectory, Option<String>)> {
    let fields = fields.resolved(flow.map(|flow| flow.patches))?;
    let config = &SchedulerConfig {
        flow: Some(fields),
        ..config.clone()
    };
    let given = flow.is_some_and(|flow| flow.gives_levels);
    let levels = || solvers::flow::levels(config, &fields, (span, given));
    let solver = |run: fn(&SchedulerConfig, &NoiseSchedule, Span) -> Result<Trajectory>| {
        solvers::flow::refuse_remapped(config)?;
        run(config, &NoiseSchedule::of_betas(config), span)
    };
    let mut warning = None;
    let run = match config.class() {
        Class::FlowMatchEuler if fields.stochastic_sampling => solvers::flow::renoised(&levels()),
        Class::FlowMatchEuler => solvers::flow::euler(&levels()),
        Class::FlowMatchHeun => kdiffusion::heun(&levels()),
        Class::FlowMatchLcm => solvers::flow::renoised(&levels()),
        Class::DpmMultistep => solver(solvers::dpm::multistep)?,
        Class::DpmSinglestep => solver(solvers::dpm::singlestep)?,
        Class::UniPc => solver(solvers::unipc::unipc)?,
        Class::Deis => solver(|c, s, n| Ok(solvers::deis::deis(c, s, n)))?,
        _ => {
            warning = Some(format!(
                "the folder's scheduler is {}, which is not built; flow matching's Euler takes its place (name one with --sampler)",
                config.class_name
            ));
            solvers::flow::euler(&levels())
        }
    };
    Ok((run, warning))
}

/// Some classes are not defined for every kind of prediction.
fn refuse_undefined(config: &SchedulerConfig) -> Result<()> {
    let undefined = matches!(
        config.class(),
        Class::Pndm
            | Class::Unknown
            | Class::EulerAncestral
            | Class::Kdpm2
            | Class::Kdpm2Ancestral
            | Class::DpmSde
    );
    if undefined && config.prediction == Prediction::Sample {
        return Err(Error::Unsupported(format!(
            "{} is not defined for models that predict the sample; name a --sampler",
            config.class_name
        )));
    }
    Ok(())
}

/// `DPMSolverSDEScheduler`. Its Brownian motion has the seed of the config, or one that nobody knows: the image's own is as good.
fn dpm_sde(config: &SchedulerConfig, schedule: &NoiseSchedule, levels: &Levels) -> Trajectory {
    let mut run = solvers::sde::dpmpp_sde(levels, &|_, sigma| schedule.timestep(sigma));
    run.brownian = solvers::sde::brownian(&levels.sigmas).map(|brownian| Brownian {
        seed: config.noise_sampler_seed,
        ..brownian
    });
    run
}

/// Levels of diffusers' σ-space schedulers.
fn discrete_levels(config: &SchedulerConfig, schedule: &NoiseSchedule, span: Span) -> Levels {
    let steps = span.steps;
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
    if let Some(remapped) = spacing::remap(config, ends, steps) {
        // DPM-Solver-2 rounds the timesteps of Karras levels
        let rounded = config.sigma_map == SigmaMap::Karras
            && matches!(config.class(), Class::Kdpm2 | Class::Kdpm2Ancestral);
        let whole = |t: f64| if rounded { t.round_ties_even() } else { t };
        timesteps = remapped
            .iter()
            .map(|&s| whole(schedule.timestep(s)))
            .collect();
        sigmas = remapped;
    }
    sigmas.push(if config.final_sigma_zero {
        0.0
    } else {
        schedule.sigma_min()
    });
    let mut sigmas = spacing::to_f32(sigmas);
    if config.continuous && config.prediction == Prediction::V {
        timesteps = sigmas[..sigmas.len() - 1]
            .iter()
            .map(|s| 0.25 * s.ln())
            .collect();
    }
    let max = sigmas.iter().copied().fold(0.0, f64::max);
    // where there is one level more than timesteps the last one is never reached
    sigmas.truncate(timesteps.len() + 1);
    Levels {
        sigmas,
        timesteps: spacing::to_f32(timesteps),
        prediction: config.prediction,
        data: 1.0,
        init_noise_sigma: match config.spacing {
            config::Spacing::Leading => (max * max + 1.0).sqrt(),
            config::Spacing::Linspace | config::Spacing::Trailing => max,
        },
        clip: config.clip_sample.then_some(config.clip_sample_range),
        first: span.first,
    }
}
