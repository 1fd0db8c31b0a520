//! Which timesteps and noise levels a run passes through.

use super::config::{SchedulerConfig, SigmaMap, Spacing};
use super::schedule::NoiseSchedule;

/// `n` numbers from `start` to `end`.
pub(super) fn linspace(start: f64, end: f64, n: usize) -> Vec<f64> {
    let step = (end - start) / (n.max(2) - 1) as f64;
    (0..n)
        .map(|i| {
            if n > 1 && i == n - 1 {
                end
            } else {
                start + step * i as f64
            }
        })
        .collect()
}

/// Round half to even, as NumPy does.
fn round(x: f64) -> f64 {
    x.round_ties_even()
}

fn trailing(train: usize, steps: usize) -> Vec<f64> {
    let ratio = train as f64 / steps as f64;
    // `numpy.arange(train, 0, -ratio)`: as many as fit, by division
    let count = (train as f64 / ratio).ceil() as usize;
    (0..count)
        .map(|i| round(train as f64 - i as f64 * ratio) - 1.0)
        .collect()
}

/// diffusers' timesteps for solvers that take `steps` of them, noisiest first. `whole`: linspace rounded to integers.
pub(super) fn timesteps(config: &SchedulerConfig, steps: usize, whole: bool) -> Vec<f64> {
    let train = config.num_train_timesteps;
    match config.spacing {
        Spacing::Linspace => {
            let mut t = linspace(0.0, (train - 1) as f64, steps);
            t.reverse();
            t.iter()
                .map(|&t| if whole { round(t) } else { f64::from(t as f32) })
                .collect()
        }
        Spacing::Leading => {
            let ratio = train / steps;
            (0..steps)
                .rev()
                .map(|i| (i * ratio + config.steps_offset) as f64)
                .collect()
        }
        Spacing::Trailing => trailing(train, steps),
    }
}

/// diffusers' timesteps for multistep solvers, which spread `steps + 1` and leave out the last.
pub(super) fn multistep_timesteps(config: &SchedulerConfig, last: usize, steps: usize) -> Vec<f64> {
    match config.spacing {
        Spacing::Linspace => {
            let t = linspace(0.0, last.saturating_sub(1) as f64, steps + 1);
            t.iter().rev().take(steps).map(|&t| round(t)).collect()
        }
        Spacing::Leading => {
            let ratio = last / (steps + 1);
            (1..=steps)
                .rev()
                .map(|i| (i * ratio + config.steps_offset) as f64)
                .collect()
        }
        Spacing::Trailing => {
            let ratio = config.num_train_timesteps as f64 / steps as f64;
            let count = (last as f64 / ratio).ceil() as usize;
            (0..count)
                .map(|i| round(last as f64 - i as f64 * ratio) - 1.0)
                .collect()
        }
    }
}

/// Karras et al., arXiv 2206.00364, equation 5, ρ = 7.
pub(super) fn karras(min: f64, max: f64, n: usize) -> Vec<f64> {
    let (low, high) = (min.powf(1.0 / 7.0), max.powf(1.0 / 7.0));
    linspace(0.0, 1.0, n)
        .iter()
        .map(|ramp| (high + ramp * (low - high)).powi(7))
        .collect()
}

/// Even in log σ.
pub(super) fn exponential(min: f64, max: f64, n: usize) -> Vec<f64> {
    linspace(max.ln(), min.ln(), n)
        .iter()
        .map(|l| l.exp())
        .collect()
}

/// Remaps noise levels between `from` (noisiest, least noisy), or leaves them.
pub(super) fn remap(
    config: &SchedulerConfig,
    (max, min): (f64, f64),
    n: usize,
) -> Option<Vec<f64>> {
    let min = config.sigma_min.unwrap_or(min);
    let max = config.sigma_max.unwrap_or(max);
    match config.sigma_map {
        SigmaMap::None => None,
        SigmaMap::Karras => Some(karras(min, max, n)),
        SigmaMap::Exponential | SigmaMap::Lu => Some(exponential(min, max, n)),
    }
}

/// Noise levels as f32 keeps them.
pub(super) fn to_f32(sigmas: Vec<f64>) -> Vec<f64> {
    sigmas.into_iter().map(|s| f64::from(s as f32)).collect()
}

/// A schedule by A1111's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// Even in the timestep, from the last to the first.
    Normal,
    /// Karras et al.
    Karras,
    /// Even in log σ.
    Exponential,
    /// Even in the timestep over one more, the last left out.
    SgmUniform,
    /// Every n-th of the training levels.
    Simple,
}

impl Schedule {
    /// `steps` noise levels and the final 0 (k-diffusion `get_sigmas*`, A1111 `sd_schedulers.py`).
    pub(super) fn sigmas(self, schedule: &NoiseSchedule, steps: usize) -> Vec<f64> {
        let (min, max) = (schedule.sigma_min(), schedule.sigma_max());
        let last = (schedule.len() - 1) as f64;
        let mut sigmas = match self {
            Self::Normal => linspace(last, 0.0, steps)
                .iter()
                .map(|&t| schedule.sigma(t))
                .collect(),
            Self::Karras => karras(min, max, steps),
            Self::Exponential => exponential(min, max, steps),
            Self::SgmUniform => {
                let t = linspace(schedule.timestep(max), schedule.timestep(min), steps + 1);
                t[..steps].iter().map(|&t| schedule.sigma(t)).collect()
            }
            Self::Simple => {
                let stride = schedule.len() as f64 / steps as f64;
                (0..steps)
                    .map(|i| {
                        schedule.sigmas[schedule.len()
                            - 1
                            - ((i as f64 * stride) as usize).min(schedule.len() - 1)]
                    })
                    .collect()
            }
        };
        sigmas.push(0.0);
        to_f32(sigmas)
    }

    /// The name that reports and picture files carry.
    pub fn name(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Karras => "Karras",
            Self::Exponential => "Exponential",
            Self::SgmUniform => "SGM Uniform",
            Self::Simple => "Simple",
        }
    }
}
