//! Models trained at continuous noise levels: Karras et al., arXiv 2206.00364, table 1 (diffusers `EDMEulerScheduler`,
//! `EDMDPMSolverMultistepScheduler`; Playground 2.5, CosXL).

use super::super::config::SchedulerConfig;
use super::super::prediction::Prediction;
use super::super::spacing;
use super::super::start::Span;
use super::Levels;

/// The levels that a config describes.
pub(in super::super) fn levels(config: &SchedulerConfig, span: Span) -> Levels {
    let steps = span.steps;
    let (min, max) = config.edm_range();
    let mut sigmas = spacing::to_f32(if config.exponential {
        spacing::exponential(min, max, steps)
    } else {
        spacing::karras(min, max, steps, config.rho)
    });
    // a single level of the exponential curve is its quiet end in the reference
    if let ([only], true) = (sigmas.as_mut_slice(), config.exponential) {
        *only = min;
    }
    let timesteps = sigmas.iter().map(|&sigma| timestep(sigma)).collect();
    sigmas.push(if config.final_sigma_zero { 0.0 } else { min });
    Levels {
        sigmas,
        timesteps: spacing::to_f32(timesteps),
        prediction: match config.prediction {
            // these classes call F so
            Prediction::Epsilon => Prediction::Edm,
            other => other,
        },
        data: config.sigma_data,
        init_noise_sigma: (max * max + 1.0).sqrt(),
        clip: None,
        first: span.first,
    }
}

/// What the network is told of a noise level: c_noise.
pub(in super::super) fn timestep(sigma: f64) -> f64 {
    0.25 * sigma.ln()
}
