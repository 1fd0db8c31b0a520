//! Which timesteps and noise levels a run passes through: diffusers' spacings, and the curves that remap them.

use super::Model;
use super::config::{Class, SchedulerConfig, SigmaMap, Spacing};
use super::schedule::linspace_f32;

/// `n` numbers from `start` to `end` (`numpy.linspace`).
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

/// `numpy.arange(last, 0, -train / steps).round() - 1`: for some numbers of steps one more than that many, the last at −1. NumPy steps by
/// the rounded difference of its first two values, which decides ties.
fn trailing(last: usize, train: usize, steps: usize) -> Vec<f64> {
    let ratio = train as f64 / steps as f64;
    let start = last as f64;
    let delta = (start - ratio) - start;
    let count = (start / ratio).ceil() as usize;
    (0..count)
        .map(|i| round(start + i as f64 * delta) - 1.0)
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
                .map(|&t| match config.class() {
                    _ if whole => round(t),
                    Class::DpmSde => t,
                    _ => f64::from(t as f32),
                })
                .collect()
        }
        Spacing::Leading => {
            let ratio = train / steps;
            (0..steps)
                .rev()
                .map(|i| (i * ratio + config.steps_offset) as f64)
                .collect()
        }
        Spacing::Trailing => trailing(train, train, steps),
    }
}

/// diffusers' timesteps for multistep solvers, which spread `steps + 1` over the first `last` and leave out the final one.
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
        Spacing::Trailing => trailing(last, config.num_train_timesteps, steps),
    }
}

/// The exponent of every Karras curve but those of models that say otherwise.
const RHO: f64 = 7.0;

/// Karras et al., arXiv 2206.00364, equation 5.
pub(super) fn karras(min: f64, max: f64, n: usize, rho: f64) -> Vec<f64> {
    let (low, high) = (min.powf(1.0 / rho), max.powf(1.0 / rho));
    linspace(0.0, 1.0, n)
        .iter()
        .map(|ramp| (high + ramp * (low - high)).powf(rho))
        .collect()
}

/// The same as k-diffusion computes it, in f32.
pub(super) fn karras_f32(min: f64, max: f64, n: usize) -> Vec<f64> {
    let (low, high) = (min.powf(1.0 / RHO), max.powf(1.0 / RHO));
    let (high, slope) = (high as f32, (low - high) as f32);
    let curve = |ramp: f32| f64::from(high + ramp * slope).powf(RHO);
    linspace_f32(0.0, 1.0, n).into_iter().map(curve).collect()
}

/// Even in log σ as k-diffusion computes it, in f32.
fn exponential_f32(min: f64, max: f64, n: usize) -> Vec<f64> {
    let logs = linspace_f32(max.ln(), min.ln(), n);
    logs.iter().map(|&log| f64::from(log).exp()).collect()
}

/// Even in log σ.
pub(super) fn exponential(min: f64, max: f64, n: usize) -> Vec<f64> {
    linspace(max.ln(), min.ln(), n)
        .iter()
        .map(|l| l.exp())
        .collect()
}

/// Both parameters of the beta distribution.
const BETA: f64 = 0.6;

/// Even in arctan σ, in f32.
fn kl_optimal(min: f64, max: f64, n: usize) -> Vec<f64> {
    let (low, high) = (min.atan() as f32, max.atan() as f32);
    (0..n)
        .map(|i| {
            let share = i as f32 / (n.max(2) - 1) as f32;
            f64::from(share * low + (1.0 - share) * high).tan()
        })
        .collect()
}

/// Quantiles of the symmetric beta distribution spread over σ: Lee et al., "Beta Sampling is All You Need", arXiv 2407.12173.
pub(super) fn beta(min: f64, max: f64, n: usize) -> Vec<f64> {
    linspace(0.0, 1.0, n)
        .iter()
        .map(|p| min + beta_quantile(1.0 - p) * (max - min))
        .collect()
}

/// ComfyUI's reading: the same quantiles spread over the training levels, each taken once.
fn beta_of_levels(levels: &[f64], n: usize) -> Vec<f64> {
    let last = levels.len().saturating_sub(1);
    let mut places: Vec<usize> = (0..n)
        .map(|i| round(beta_quantile(1.0 - i as f64 / n as f64) * last as f64) as usize)
        .collect();
    places.dedup();
    places
        .iter()
        .map(|&place| levels[place.min(last)])
        .collect()
}

/// ∫₀ˣ (u(1 − u))^(BETA − 1) du for x up to ½, by the binomial series.
fn beta_integral(x: f64) -> f64 {
    let mut factor = 1.0;
    let mut sum = 0.0;
    for n in 0..80 {
        let n = f64::from(n);
        sum += factor / (BETA + n);
        factor *= x * (n + 1.0 - BETA) / (n + 1.0);
    }
    sum * x.powf(BETA)
}

/// The x below which a share `p` of the distribution lies, by bisection of the half where it is.
fn beta_quantile(p: f64) -> f64 {
    if p == 0.5 {
        // exactly: it is rounded to whole places where half of one decides
        return 0.5;
    }
    if p > 0.5 {
        return 1.0 - beta_quantile(1.0 - p);
    }
    // by symmetry the integral up to ½ is half the whole
    let wanted = p * 2.0 * beta_integral(0.5);
    let (mut low, mut high) = (0.0, 0.5);
    for _ in 0..90 {
        let middle = (low + high) / 2.0;
        if beta_integral(middle) < wanted {
            low = middle;
        } else {
            high = middle;
        }
    }
    if p <= 0.0 { 0.0 } else { (low + high) / 2.0 }
}

/// Remaps noise levels between `max` and `min`, or the ends that the config sets, or leaves them.
pub(super) fn remap(
    config: &SchedulerConfig,
    (max, min): (f64, f64),
    n: usize,
) -> Option<Vec<f64>> {
    // LMS keeps its own ends for Karras, everything keeps them for Lu
    let own_ends = match config.sigma_map {
        SigmaMap::Karras => config.class() == Class::Lms,
        SigmaMap::Lu => true,
        SigmaMap::None | SigmaMap::Exponential | SigmaMap::Beta => false,
    };
    let (min, max) = if own_ends {
        (min, max)
    } else {
        (
            config.sigma_min.unwrap_or(min),
            config.sigma_max.unwrap_or(max),
        )
    };
    match config.sigma_map {
        SigmaMap::None => None,
        SigmaMap::Karras => Some(karras(min, max, n, RHO)),
        SigmaMap::Exponential | SigmaMap::Lu => Some(exponential(min, max, n)),
        SigmaMap::Beta => Some(beta(min, max, n)),
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
    /// Every n-th of the training levels from the second; may be more than asked for.
    Ddim,
    /// Quantiles of a beta distribution over σ (A1111's reading) or, for flow models, over the training levels (ComfyUI's).
    Beta,
    /// Sabour et al., "Align Your Steps", arXiv 2404.14507, equation 14; its last step ends at the least noise, not at 0 (but for flow models).
    KlOptimal,
    /// The tables of the same paper for Stable Diffusion 1.5 and XL.
    AlignYourSteps,
    /// Whole timesteps, backwards from the last.
    Turbo,
}

/// Align Your Steps' ten steps for Stable Diffusion 1.5.
const ALIGN_YOUR_STEPS: [f64; 11] = [
    14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029,
];
/// The same for XL.
const ALIGN_YOUR_STEPS_XL: [f64; 11] = [
    14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029,
];

impl Schedule {
    /// `steps` noise levels (more for DDIM where they do not divide the training's) and what the last step leads to, 0 but for A1111's KL optimal
    /// (k-diffusion `get_sigmas*`, A1111 `sd_schedulers.py`).
    pub(super) fn sigmas(self, model: &Model<'_>, steps: usize) -> Vec<f64> {
        let schedule = model.levels;
        let (min, max) = (schedule.sigma_min(), schedule.sigma_max());
        let train = schedule.len();
        let (first, last) = schedule.timesteps();
        let mut sigmas: Vec<f64> = match self {
            Self::Normal => linspace_f32(last, first, steps)
                .iter()
                .map(|&t| schedule.sigma(t.into()))
                .collect(),
            Self::Karras => karras_f32(min, max, steps),
            Self::Exponential => exponential_f32(min, max, steps),
            Self::Beta if schedule.is_flow() => beta_of_levels(&schedule.sigmas, steps),
            Self::Beta => beta(min, max, steps),
            Self::SgmUniform => {
                let t = linspace_f32(schedule.timestep(max), schedule.timestep(min), steps + 1);
                let t = t[..steps].iter();
                t.map(|&t| schedule.sigma(t.into())).collect()
            }
            Self::Simple => {
                let stride = train as f64 / steps as f64;
                let skipped = |i: usize| ((i as f64 * stride) as usize).min(train - 1);
                (0..steps)
                    .map(|i| schedule.sigmas[train - 1 - skipped(i)])
                    .collect()
            }
            Self::Ddim => {
                let stride = (train / steps).max(1);
                let mut sigmas: Vec<f64> = schedule
                    .sigmas
                    .iter()
                    .skip(1)
                    .step_by(stride)
                    .copied()
                    .collect();
                sigmas.reverse();
                sigmas
            }
            // ComfyUI's levels are one fewer, and a step to 0 follows them
            Self::KlOptimal if schedule.is_flow() => kl_optimal(min, max, steps),
            Self::KlOptimal => return to_f32(kl_optimal(min, max, steps + 1)),
            Self::AlignYourSteps if model.xl => align_your_steps(&ALIGN_YOUR_STEPS_XL, steps),
            Self::AlignYourSteps => align_your_steps(&ALIGN_YOUR_STEPS, steps),
            Self::Turbo => (1..=steps)
                .rev()
                .map(|i| {
                    let t = round((i as f64 * (train as f64 / steps as f64)) - 1.0);
                    schedule.interpolate(t)
                })
                .collect(),
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
            Self::Ddim => "DDIM",
            Self::Beta => "Beta",
            Self::KlOptimal => "KL Optimal",
            Self::AlignYourSteps => "Align Your Steps",
            Self::Turbo => "Turbo",
        }
    }
}

/// A table read at `n` even places between its entries, in log σ.
fn align_your_steps(levels: &[f64; 11], n: usize) -> Vec<f64> {
    let table = levels.map(f64::ln);
    // A1111 reverses the table before and the places after: a single place is the quiet end
    if n == 1 {
        return vec![levels[10]];
    }
    linspace(0.0, 10.0, n)
        .iter()
        .map(|&place| {
            let low = (place.floor() as usize).min(9);
            let w = place - low as f64;
            ((1.0 - w) * table[low] + w * table[low + 1]).exp()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beta_quantiles_equal_scipys() {
        // scipy.stats.beta.ppf(p, 0.6, 0.6)
        for (p, x) in [
            (0.0, 0.0),
            (0.01, 0.000_861_238_821_542_905_9),
            (0.1, 0.039_584_405_588_780_85),
            (0.25, 0.175_680_378_652_694_98),
            (0.5, 0.5),
            (0.9, 0.960_415_594_411_219_2),
            (1.0, 1.0),
        ] {
            assert!(
                (beta_quantile(p) - x).abs() < 1e-9,
                "{p}: {}",
                beta_quantile(p)
            );
        }
    }
}
