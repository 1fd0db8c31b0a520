//! Runs by a sampler's and a schedule's name: A1111's reading on models with betas, ComfyUI's on flow models, diffusers' for TCD.

use super::NoiseSchedule;
use super::names::Sampler;
use super::prediction::Prediction;
use super::solvers::{self, Levels, kdiffusion, rectified};
use super::spacing::Schedule;
use super::start::{Span, Start, StepCount, nothing_left};
use super::trajectory::Trajectory;
use crate::error::{Error, Result};

/// What a run by name needs to know of a model.
#[derive(Debug, Clone, Copy)]
pub struct Model<'a> {
    /// The noise levels that it was trained at.
    pub levels: &'a NoiseSchedule,
    /// What it predicts; models with a flow's levels predict [`Prediction::Flow`] whatever is said here.
    pub prediction: Prediction,
    /// Whether tables made for Stable Diffusion XL are for it.
    pub xl: bool,
}

/// Timesteps that consistency models were distilled at.
const DISTILLED: usize = 50;

/// The run that a sampler's and a schedule's name mean on the noise levels of a model. One that begins at a picture has the last of the
/// levels that are made for all steps, and no history.
///
/// # Errors
/// [`Error::Usage`] for no steps at all, or so many that two levels coincide, and for a strength that leaves none; [`Error::Unsupported`]
/// for names that mean nothing for this kind of model.
pub fn by_name(
    sampler: Sampler,
    schedule: Schedule,
    steps: usize,
    model: &Model<'_>,
    start: Start,
) -> Result<Trajectory> {
    if steps == 0 {
        return Err(Error::Usage("--steps is 0, expected at least 1".to_owned()));
    }
    let flow = model.levels.is_flow();
    let span = start.undistilled().span(steps, flow)?;
    refuse_meaningless(sampler, schedule, span.steps, model)?;
    let distilled = (sampler.is_distilled() && !flow).then(|| model.levels.distilled(DISTILLED));
    let levels = distilled.as_ref().unwrap_or(model.levels);
    let spread = Model {
        // whole timesteps are those of all training
        levels: match schedule {
            Schedule::Turbo => model.levels,
            _ => levels,
        },
        ..*model
    };
    let run = levels_of(levels, &spread, (sampler, schedule), span);
    if let (1, Start::Picture { strength, .. }) = (run.sigmas.len(), start) {
        return Err(nothing_left(steps, strength));
    }
    let middle = |sigma| levels.timestep(sigma);
    let mut run = match sampler {
        Sampler::Euler => kdiffusion::euler(&run),
        Sampler::EulerA if flow => rectified::euler_ancestral(&run),
        Sampler::EulerA => kdiffusion::euler_ancestral(&run, false),
        Sampler::Heun => kdiffusion::heun(&run),
        Sampler::Lms => kdiffusion::lms(&run),
        Sampler::Dpm2 => solvers::dpm2::dpm2(&run, false, &middle),
        Sampler::Dpm2A if flow => rectified::dpm2_ancestral(&run, &middle),
        Sampler::Dpm2A => solvers::dpm2::dpm2(&run, true, &middle),
        Sampler::DpmPp2m => kdiffusion::dpmpp_2m(&run),
        Sampler::DpmPp2sA if flow => rectified::dpmpp_2s_ancestral(&run, &middle),
        Sampler::DpmPp2sA => kdiffusion::dpmpp_2s_ancestral(&run, &middle),
        Sampler::Lcm if flow => rectified::lcm(&run),
        Sampler::Lcm => solvers::consistency::lcm(&run),
        Sampler::Tcd => solvers::consistency::tcd(&run, model.levels),
    };
    run.link();
    begin(&mut run, model, start);
    if !run.is_finite() {
        return Err(Error::Usage(format!(
            "--steps is {steps}, too many for {} with the schedule {}: two of its noise levels coincide",
            sampler.name(),
            schedule.name()
        )));
    }
    Ok(run)
}

/// The levels of a run, with what is told of each to the network by `levels`.
fn levels_of(
    levels: &NoiseSchedule,
    spread: &Model<'_>,
    (sampler, schedule): (Sampler, Schedule),
    span: Span,
) -> Levels {
    let skips = sampler.skips_last_but_one();
    let mut sigmas = schedule.sigmas(spread, span.steps + usize::from(skips));
    if skips && sigmas.len() > 2 {
        sigmas.remove(sigmas.len() - 2);
    }
    let skipped = span.skipped(sigmas.len());
    sigmas.drain(..skipped.min(sigmas.len() - 1));
    let timesteps = sigmas[..sigmas.len() - 1]
        .iter()
        .map(|&s| levels.timestep(s))
        .collect();
    Levels {
        init_noise_sigma: sigmas.first().copied().unwrap_or_default(),
        sigmas,
        timesteps,
        prediction: if levels.is_flow() {
            Prediction::Flow
        } else {
            spread.prediction
        },
        data: levels.data(),
        clip: None,
        first: 0,
    }
}

/// How near ComfyUI takes the first level for the most noise of the model.
const MOST_NOISE: f64 = 1e-5;

/// What a run that begins at a picture begins with.
fn begin(run: &mut Trajectory, model: &Model<'_>, start: Start) {
    if !start.is_picture() {
        return;
    }
    run.begin_at_picture();
    let comfy = matches!(start, Start::Picture { count: StepCount::ComfyUi, strength } if strength > 0.9999);
    let sigma = run.sigmas.first().copied().unwrap_or_default();
    if comfy && !model.levels.is_flow() && sigma >= model.levels.sigma_max() * (1.0 - MOST_NOISE) {
        run.init_noise_sigma = sigma.hypot(1.0);
    }
}

/// Names that say something of noise levels which the model does not have.
fn refuse_meaningless(
    sampler: Sampler,
    schedule: Schedule,
    steps: usize,
    model: &Model<'_>,
) -> Result<()> {
    let flow = model.levels.is_flow();
    if flow && matches!(schedule, Schedule::Turbo | Schedule::AlignYourSteps) {
        return Err(Error::Unsupported(format!(
            "schedule {} is a table for Stable Diffusion 1 and XL, which flow models such as this one cannot use; choose Simple, SGM Uniform, Normal or Beta",
            schedule.name()
        )));
    }
    if flow && sampler == Sampler::Tcd {
        return Err(Error::Unsupported(
            "sampler TCD is for models distilled from Stable Diffusion 1 and XL, it has no form for flow models such as this one; choose Euler or LCM".to_owned(),
        ));
    }
    if sampler.is_distilled() && !flow && model.levels.is_continuous() {
        return Err(Error::Unsupported(format!(
            "sampler {} is for models with timesteps, this one was trained at continuous noise levels; choose Euler or DPM++ 2M",
            sampler.name()
        )));
    }
    if sampler == Sampler::Tcd && steps > DISTILLED {
        return Err(Error::Usage(format!(
            "--steps is {steps}, expected 1 to {DISTILLED} with sampler TCD"
        )));
    }
    Ok(())
}
