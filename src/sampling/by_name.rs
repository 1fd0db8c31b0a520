//! Runs by a sampler's and a schedule's name: A1111's reading on models with betas, ComfyUI's on flow models, diffusers' for TCD.

use super::NoiseSchedule;
use super::names::Sampler;
use super::prediction::Prediction;
use super::solvers::sde::{self, Multistep};
use super::solvers::{self, Levels, kdiffusion, rectified, timesteps};
use super::spacing::Schedule;
use super::start::{Span, Start, StepCount, nothing_left};
use super::trajectory::{Brownian, Trajectory};
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
    if sampler.goes_by_timesteps() {
        return by_timesteps(sampler, model, (span, start));
    }
    let (run, brownian) = levels_of(levels, &spread, (sampler, schedule), span);
    let first = run.sigmas[0];
    let run = away_from_pure_noise(run, levels, sampler);
    if let (1, Start::Picture { strength, .. }) = (run.sigmas.len(), start) {
        return Err(nothing_left(steps, strength));
    }
    let fast = match start {
        // from a picture it goes between the levels of the schedule, else between the model's
        Start::Picture { .. } => ((first, least(&run.sigmas)), run.sigmas.len() - 1),
        Start::Noise => ((levels.sigma_max(), levels.sigma_min()), steps),
    };
    let mut run = solve(sampler, &run, (levels, model), fast);
    run.link();
    run.brownian = brownian.filter(|_| sampler.is_stochastic());
    begin(&mut run, model, (start, first));
    if !run.is_finite() {
        return Err(Error::Usage(format!(
            "--steps is {steps}, too many for {} with the schedule {}: two of its noise levels coincide",
            sampler.name(),
            schedule.name()
        )));
    }
    Ok(run)
}

/// The steps of a sampler over the levels of a run, which `levels` tells the timesteps of. `fast`: between which, and in how many calls, for
/// the sampler that chooses its own.
fn solve(
    sampler: Sampler,
    run: &Levels,
    (levels, model): (&NoiseSchedule, &Model<'_>),
    fast: ((f64, f64), usize),
) -> Trajectory {
    let flow = levels.is_flow();
    let middle = |sigma| levels.timestep(sigma);
    match sampler {
        Sampler::Euler => kdiffusion::euler(run),
        Sampler::EulerA if flow => rectified::euler_ancestral(run),
        Sampler::EulerA => kdiffusion::euler_ancestral(run, false),
        Sampler::Heun => kdiffusion::heun(run),
        Sampler::Lms => kdiffusion::lms(run),
        Sampler::Dpm2 => solvers::dpm2::dpm2(run, false, &middle),
        Sampler::Dpm2A if flow => rectified::dpm2_ancestral(run, &middle),
        Sampler::Dpm2A => solvers::dpm2::dpm2(run, true, &middle),
        Sampler::DpmPp2m => kdiffusion::dpmpp_2m(run),
        Sampler::DpmPp2sA if flow => rectified::dpmpp_2s_ancestral(run, &middle),
        Sampler::DpmPp2sA => kdiffusion::dpmpp_2s_ancestral(run, &middle),
        Sampler::DpmPpSde => sde::dpmpp_sde(run, &|_, sigma| middle(sigma)),
        Sampler::DpmPp2mSde => sde::dpmpp_multistep_sde(run, Multistep::Midpoint),
        Sampler::DpmPp2mSdeHeun => sde::dpmpp_multistep_sde(run, Multistep::Heun),
        Sampler::DpmPp3mSde => sde::dpmpp_multistep_sde(run, Multistep::Third),
        Sampler::DpmFast => solvers::fast::dpm_fast(run, fast, &middle),
        Sampler::Restart => solvers::restart::restart(run, &middle),
        Sampler::HeunPp2 => solvers::restart::heunpp2(run),
        Sampler::Ipndm => solvers::ipndm::ipndm(run, false),
        Sampler::IpndmV => solvers::ipndm::ipndm(run, true),
        Sampler::Ddim | Sampler::Plms | Sampler::UniPc => Trajectory::default(),
        Sampler::Lcm if flow => rectified::lcm(run),
        Sampler::Lcm => solvers::consistency::lcm(run),
        Sampler::Tcd => solvers::consistency::tcd(run, model.levels),
    }
}

/// The least of some noise levels above 0, or what comes before the last.
fn least(sigmas: &[f64]) -> f64 {
    sigmas.iter().rev().nth(1).copied().unwrap_or_default()
}

/// The run of a sampler that goes by whole timesteps, in A1111's way.
fn by_timesteps(
    sampler: Sampler,
    model: &Model<'_>,
    (span, start): (Span, Start),
) -> Result<Trajectory> {
    let (least, most) = match sampler {
        // with a picture one is lost to the level that it has
        Sampler::UniPc => (timesteps::UNIPC_ORDER, 1000),
        _ => (2, 1000),
    };
    let least = least + usize::from(start.is_picture());
    let made = span.steps - span.first;
    if made < least || span.steps > most {
        return Err(Error::Usage(format!(
            "sampler {} is left with {made} of {} steps, expected at least {least} of at most {most}; use other --steps, more --strength or another --sampler",
            sampler.name(),
            span.steps
        )));
    }
    let span = (span, start.is_picture());
    let mut run = match sampler {
        Sampler::Ddim => timesteps::ddim(model.levels, model.prediction, span),
        Sampler::Plms => timesteps::plms(model.levels, model.prediction, span),
        _ => timesteps::unipc(model.levels, model.prediction, span),
    };
    run.link();
    if !run.is_finite() {
        return Err(Error::Usage(format!(
            "sampler {} divides by zero on this model's noise levels; use another --sampler",
            sampler.name()
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
) -> (Levels, Option<Brownian>) {
    let flow = levels.is_flow();
    let skips = sampler.skips_last_but_one(flow);
    let mut sigmas = schedule.sigmas(spread, span.steps + usize::from(skips));
    if skips && sigmas.len() > 2 {
        sigmas.remove(sigmas.len() - 2);
    }
    let skipped = span.skipped(sigmas.len());
    let whole = sde::brownian(&sigmas);
    sigmas.drain(..skipped.min(sigmas.len() - 1));
    // A1111's Brownian motion is over the levels of all steps, ComfyUI's over those that are made
    let brownian = match span.kept {
        None if !flow => whole,
        _ => sde::brownian(&sigmas),
    };
    let timesteps = sigmas[..sigmas.len() - 1]
        .iter()
        .map(|&s| levels.timestep(s))
        .collect();
    let levels = Levels {
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
    };
    (levels, brownian)
}

/// Levels that stochastic samplers can begin at.
fn away_from_pure_noise(mut run: Levels, levels: &NoiseSchedule, sampler: Sampler) -> Levels {
    let (Some(sigma), Some(timestep)) = (run.sigmas.first_mut(), run.timesteps.first_mut()) else {
        return run;
    };
    if let Some(level) = levels.almost_noise()
        && sampler.is_stochastic()
        && *sigma >= 1.0
    {
        *sigma = level;
        *timestep = levels.timestep(*sigma);
    }
    run
}

/// How near ComfyUI takes the first level for the most noise of the model.
const MOST_NOISE: f64 = 1e-5;

/// What a run that begins at a picture begins with.
fn begin(run: &mut Trajectory, model: &Model<'_>, (start, sigma): (Start, f64)) {
    if !start.is_picture() {
        return;
    }
    let flow = model.levels.is_flow();
    run.init_latents = if flow { 1.0 - sigma } else { 1.0 };
    run.init_noise_sigma = sigma;
    let comfy = matches!(start, Start::Picture { count: StepCount::ComfyUi, strength } if strength > 0.9999);
    if comfy && !flow && sigma >= model.levels.sigma_max() * (1.0 - MOST_NOISE) {
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
    if flow && sampler.is_for_betas() {
        return Err(Error::Unsupported(format!(
            "sampler {} is for Stable Diffusion 1, 2 and XL, it has no form for flow models such as this one; choose Euler or LCM",
            sampler.name()
        )));
    }
    let by_timesteps = sampler.is_distilled() || sampler.goes_by_timesteps();
    if by_timesteps && !flow && model.levels.is_continuous() {
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
