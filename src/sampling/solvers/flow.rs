//! Flow matching, where latents are `(1 − σ)·x₀ + σ·ε` for σ from 1 to 0 and networks predict `ε − x₀`: which levels diffusers' schedulers
//! pass through (`FlowMatchEulerDiscreteScheduler`, `FlowMatchHeunDiscreteScheduler`, `FlowMatchLCMScheduler`, and the `use_flow_sigmas` of
//! others), and the solvers that only these have.

use super::super::config::flow::shifted;
use super::super::config::{Class, FlowConfig, SchedulerConfig, SigmaMap};
use super::super::prediction::Prediction;
use super::super::spacing::{self, linspace};
use super::super::start::Span;
use super::super::trajectory::{Call, Register, Trajectory, output, sample};
use super::{Levels, plain_call};
use crate::error::{Error, Result};

/// The levels of a flow-matching scheduler. `given`: the pipeline hands it those from 1 to 1/steps and it shifts them.
pub(in super::super) fn levels(
    config: &SchedulerConfig,
    flow: &FlowConfig,
    (span, given): (Span, bool),
) -> Levels {
    let steps = span.steps;
    let train = config.num_train_timesteps as f64;
    let takes_levels = config.class() != Class::FlowMatchHeun;
    let start = if given && takes_levels {
        linspace(1.0, 1.0 / steps as f64, steps)
    } else {
        // a fixed shift is in the least level already, and comes upon it once more
        let least = match flow.dynamic {
            Some(_) => 1.0 / train,
            None => f64::from(shifted(flow.shift, 1.0 / train) as f32),
        };
        linspace(train, least * train, steps)
            .iter()
            .map(|t| t / train)
            .collect()
    };
    let mut sigmas: Vec<f64> = start.iter().map(|&t| flow.shifted(t)).collect();
    stretch(&mut sigmas, flow);
    let ends = (
        sigmas.first().copied().unwrap_or_default(),
        sigmas.last().copied().unwrap_or_default(),
    );
    if let Some(remapped) = spacing::remap(config, ends, steps) {
        sigmas = remapped;
    }
    if flow.invert_sigmas {
        for sigma in &mut sigmas {
            *sigma = 1.0 - *sigma;
        }
    }
    let timesteps = sigmas.iter().map(|sigma| sigma * train).collect();
    sigmas.push(if flow.invert_sigmas { 1.0 } else { 0.0 });
    Levels {
        sigmas: spacing::to_f32(sigmas),
        timesteps: spacing::to_f32(timesteps),
        prediction: Prediction::Flow,
        data: 1.0,
        init_noise_sigma: 1.0,
        clip: None,
        first: span.first,
    }
}

/// Moves levels away from 1 so that the last is `shift_terminal`.
fn stretch(sigmas: &mut [f64], flow: &FlowConfig) {
    let (Some(terminal), Some(&last)) = (flow.shift_terminal, sigmas.last()) else {
        return;
    };
    let scale = (1.0 - last) / (1.0 - terminal);
    for sigma in sigmas {
        *sigma = 1.0 - (1.0 - *sigma) / scale;
    }
}

/// The levels of solvers for models with betas when they run flow models, and their timesteps, cut to whole numbers; the level that the
/// last step leads to is not among them.
pub(super) fn solver_levels(
    config: &SchedulerConfig,
    flow: &FlowConfig,
    steps: usize,
) -> (Vec<f64>, Vec<f64>) {
    let train = config.num_train_timesteps as f64;
    let mut start = linspace(1.0, 1.0 / train, steps + 1);
    let mut sigmas: Vec<f64> = if config.class() == Class::UniPc {
        start.truncate(steps);
        start.iter().map(|&t| flow.shifted(t)).collect()
    } else {
        start.reverse();
        start[..steps]
            .iter()
            .map(|&alpha| shifted(flow.shift, 1.0 - alpha))
            .collect()
    };
    if config.class() == Class::UniPc {
        stretch(&mut sigmas, flow);
        // at 1 nothing is left of x₀, which these formulas divide by
        if let Some(first) = sigmas.first_mut()
            && (*first - 1.0).abs() < NOT_QUITE_ONE
        {
            *first -= NOT_QUITE_ONE;
        }
    }
    let timesteps = sigmas.iter().map(|sigma| (sigma * train).trunc()).collect();
    (sigmas, timesteps)
}

const NOT_QUITE_ONE: f64 = 1e-6;

/// What the two forms of a solver have in common stops at remapped levels, which lie above 1.
pub(in super::super) fn refuse_remapped(config: &SchedulerConfig) -> Result<()> {
    if config.sigma_map == SigmaMap::None {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "scheduler config: `use_flow_sigmas` of {} does not go with Karras, exponential, beta or Lu levels; leave one of them out",
        config.class_name
    )))
}

fn flow_call(levels: &Levels, i: usize, sigma: f64) -> Call {
    let told = (levels.timesteps[i], sigma);
    plain_call(i, told, (1.0 - sigma, sigma), Prediction::Flow)
}

/// Straight along the prediction.
pub(in super::super) fn euler(levels: &Levels) -> Trajectory {
    let mut run = levels.trajectory(0);
    for (i, sigma, next) in levels.pairs() {
        let mut call = flow_call(levels, i, sigma);
        let x = sample() + output() * (next - sigma);
        call.then.push(x.into(Register::Sample));
        run.calls.push(call);
    }
    run
}

/// Down to the estimate and up again with fresh noise, of which the last step also draws some, with a factor of 0.
pub(in super::super) fn renoised(levels: &Levels) -> Trajectory {
    let mut run = levels.trajectory(0);
    for (i, sigma, next) in levels.pairs() {
        let mut call = flow_call(levels, i, sigma);
        let x0 = sample() - output() * sigma;
        call.then
            .push((x0 * (1.0 - next)).into_with_noise(Register::Sample, next));
        run.calls.push(call);
    }
    run
}
