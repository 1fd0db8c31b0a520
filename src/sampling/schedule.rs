//! Betas to alphas to sigmas, and between sigma and timestep. Follows the f32 arithmetic of diffusers and k-diffusion where it shows.

use super::config::flow::shifted;
use super::config::{BetaSchedule, FlowConfig, SchedulerConfig};
use super::solvers::edm;
use super::spacing::linspace;

/// The noise levels that a model was trained at.
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseSchedule {
    /// ᾱ of each training timestep, from the least noisy.
    pub alphas_cumprod: Vec<f64>,
    /// σ = √((1 − ᾱ)/ᾱ) of each; finite also where ᾱ is 0.
    pub sigmas: Vec<f64>,
    log_sigmas: Vec<f32>,
    /// Standard deviation of the clean latents.
    data: f64,
    time: Time,
}

/// What the network is told of a noise level.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Time {
    /// A timestep of training, or a fraction between two.
    Interpolated,
    /// ¼ ln σ.
    Continuous,
    /// The nearest level's timestep; they are this far apart.
    Nearest(usize),
    /// 1000·σ of a flow, whose level at time t is t shifted by this.
    Flow(f64),
}

/// A network of flow matching is told σ times this.
const FLOW_TIME: f64 = 1000.0;

/// The ᾱ that A1111 puts in place of 0 at the end of a schedule with zero terminal SNR.
const LEAST_ALPHA: f64 = 4.897_345_189_085_343_5e-8;

impl Default for NoiseSchedule {
    /// The schedule of every Stable Diffusion 1 and 2 in one file, accumulated in f64 as the original code and A1111 do (diffusers' differs
    /// in the last bits).
    fn default() -> Self {
        let SchedulerConfig {
            beta_start,
            beta_end,
            num_train_timesteps,
            ..
        } = SchedulerConfig::default();
        let mut product = 1.0;
        let bars = linspace(beta_start.sqrt(), beta_end.sqrt(), num_train_timesteps)
            .into_iter()
            .map(|root| {
                product *= 1.0 - root * root;
                product as f32
            });
        Self::of(bars.collect())
    }
}

/// `torch.linspace` in f32: from both ends towards the middle, each product and sum rounded once.
pub(super) fn linspace_f32(start: f64, end: f64, n: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (n.max(2) - 1) as f32;
    (0..n)
        .map(|i| {
            if i < n / 2 || n == 1 {
                step.mul_add(i as f32, start)
            } else {
                (-step).mul_add((n - 1 - i) as f32, end)
            }
        })
        .collect()
}

/// Betas whose ᾱ follows `alpha_bar`, a function of time from 0 to 1.
fn betas_of(alpha_bar: impl Fn(f64) -> f64, n: usize) -> Vec<f32> {
    (0..n)
        .map(|i| {
            let (t1, t2) = (i as f64 / n as f64, (i + 1) as f64 / n as f64);
            (1.0 - alpha_bar(t2) / alpha_bar(t1)).min(0.999) as f32
        })
        .collect()
}

fn cosine(t: f64) -> f64 {
    ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2)
        .cos()
        .powi(2)
}

fn laplace(t: f64) -> f64 {
    let log_snr = -0.5 * (0.5 - t).signum() * (1.0 - 2.0 * (0.5 - t).abs() + 1e-6).ln();
    let snr = log_snr.exp();
    (snr / (1.0 + snr)).sqrt()
}

fn betas(config: &SchedulerConfig) -> Vec<f32> {
    let n = config.num_train_timesteps;
    if let Some(trained) = &config.trained_betas {
        return trained.iter().map(|&b| b as f32).collect();
    }
    let (start, end) = (config.beta_start, config.beta_end);
    match config.beta_schedule {
        BetaSchedule::Linear => linspace_f32(start, end, n),
        BetaSchedule::ScaledLinear => linspace_f32(start.sqrt(), end.sqrt(), n)
            .into_iter()
            .map(|b| b * b)
            .collect(),
        BetaSchedule::SquaredCosine => betas_of(cosine, n),
        BetaSchedule::Exponential => betas_of(|t| (-12.0 * t).exp(), n),
        BetaSchedule::Laplace => betas_of(laplace, n),
        BetaSchedule::Sigmoid => linspace_f32(-6.0, 6.0, n)
            .into_iter()
            .map(|x| 1.0 / (1.0 + (-x).exp()) * (end - start) as f32 + start as f32)
            .collect(),
    }
}

/// ᾱ as torch accumulates it: products in f64, kept in f32.
fn cumulative(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0;
    betas
        .iter()
        .map(|beta| {
            product *= f64::from(1.0 - beta);
            product as f32
        })
        .collect()
}

/// Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891, algorithm 1. In f32 throughout: near
/// the end differences of nearly equal roots are taken, and their rounding is visible in σ.
fn rescale_zero_snr(betas: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = cumulative(betas).iter().map(|a| a.sqrt()).collect();
    let (Some(&first), Some(&last)) = (roots.first(), roots.last()) else {
        return Vec::new();
    };
    let scale = first / (first - last);
    let mut before = 1.0;
    roots
        .iter()
        .map(|root| {
            let root = (root - last) * scale;
            let bar = root * root;
            let alpha = bar / before;
            before = bar;
            1.0 - alpha
        })
        .collect()
}

impl NoiseSchedule {
    /// The schedule that a config describes.
    pub fn new(config: &SchedulerConfig) -> Self {
        match &config.flow {
            Some(flow) if config.is_flow() => Self::of_flow(flow),
            _ => Self::of_betas(config),
        }
    }

    /// That of a config's betas, of which solvers keep the least level even where they run flow models.
    pub(super) fn of_betas(config: &SchedulerConfig) -> Self {
        let mut betas = betas(config);
        if config.rescale_betas_zero_snr {
            betas = rescale_zero_snr(&betas);
        }
        let mut bars = cumulative(&betas);
        if config.rescale_betas_zero_snr
            && !config.class().reaches_zero_snr()
            && let Some(last) = bars.last_mut()
        {
            *last = 2f32.powi(-24);
        }
        Self::of(bars)
    }

    /// The schedule of an ᾱ for each training timestep.
    fn of(bars: Vec<f32>) -> Self {
        let sigma = |bar: f32| {
            let bar = if bar > 0.0 { bar } else { LEAST_ALPHA as f32 };
            f64::from(((1.0 - bar) / bar).sqrt())
        };
        let sigmas: Vec<f64> = bars.iter().map(|&bar| sigma(bar)).collect();
        let log_sigmas = sigmas.iter().map(|s| s.ln() as f32).collect();
        Self {
            alphas_cumprod: bars.into_iter().map(f64::from).collect(),
            sigmas,
            log_sigmas,
            data: 1.0,
            time: Time::Interpolated,
        }
    }

    /// The levels of a flow model: `levels` times even from 1/levels to 1, shifted. ComfyUI has 1000 for Stable Diffusion 3 (shift 3) and FLUX
    /// schnell (shift 1), and 10000 for FLUX dev, whose shift is e^1.15 whatever the picture's size.
    pub fn flow(shift: f64, levels: usize) -> Self {
        let levels = levels.max(2);
        let sigmas: Vec<f64> = (1..=levels)
            .map(|i| f64::from(shifted(shift, i as f64 / levels as f64) as f32))
            .collect();
        Self {
            alphas_cumprod: sigmas
                .iter()
                .map(|s| (1.0 - s).powi(2) / ((1.0 - s).powi(2) + s * s))
                .collect(),
            log_sigmas: sigmas.iter().map(|s| s.ln() as f32).collect(),
            sigmas,
            data: 1.0,
            time: Time::Flow(shift),
        }
    }

    /// The flow that a config describes, by ComfyUI's reading: a shift that grows with the picture is that of the largest.
    fn of_flow(config: &FlowConfig) -> Self {
        match config.dynamic {
            Some(dynamic) => Self::flow(dynamic.largest(), 10_000),
            None => Self::flow(config.shift, 1000),
        }
    }

    /// Every n-th level so that `count` remain, up to the last: those that a consistency model was distilled at.
    pub(super) fn distilled(&self, count: usize) -> Self {
        let stride = (self.len() / count).max(1);
        fn kept<T: Copy>(list: &[T], stride: usize) -> Vec<T> {
            let skipped = list.len() % stride + stride - 1;
            list.iter().skip(skipped).step_by(stride).copied().collect()
        }
        Self {
            alphas_cumprod: kept(&self.alphas_cumprod, stride),
            sigmas: kept(&self.sigmas, stride),
            log_sigmas: kept(&self.log_sigmas, stride),
            data: self.data,
            time: Time::Nearest(stride),
        }
    }

    /// Whether the network is told the noise level itself, not a timestep of training.
    pub(super) fn is_continuous(&self) -> bool {
        self.time == Time::Continuous
    }

    /// Whether latents are `(1 − σ)·x₀ + σ·ε`.
    pub fn is_flow(&self) -> bool {
        matches!(self.time, Time::Flow(_))
    }

    /// The level of a flow that stands for its first, where ln(α/σ) has no end: ComfyUI's at a ten-thousandth of the way.
    pub(super) fn almost_noise(&self) -> Option<f64> {
        match self.time {
            Time::Flow(shift) => Some(f64::from(shifted(shift, 1.0 - 1e-4) as f32)),
            _ => None,
        }
    }

    /// Continuous levels between two, of clean latents with standard deviation `data` (Karras et al., arXiv 2206.00364, table 1), a thousand
    /// of them even in log σ where a list is wanted, as in ComfyUI.
    pub fn continuous(min: f64, max: f64, data: f64) -> Self {
        let logs = linspace(min.ln(), max.ln(), 1000);
        let sigmas: Vec<f64> = logs.iter().map(|log| log.exp()).collect();
        Self {
            alphas_cumprod: sigmas.iter().map(|s| 1.0 / (s * s + 1.0)).collect(),
            log_sigmas: logs.iter().map(|&log| log as f32).collect(),
            sigmas,
            data,
            time: Time::Continuous,
        }
    }

    /// Standard deviation of the clean latents: 1 for schedules of betas.
    pub fn data(&self) -> f64 {
        self.data
    }

    /// What the network is told of the least noise and of the most.
    pub fn timesteps(&self) -> (f64, f64) {
        match self.time {
            Time::Interpolated => (0.0, self.len().saturating_sub(1) as f64),
            Time::Continuous | Time::Nearest(_) | Time::Flow(_) => (
                self.timestep(self.sigma_min()),
                self.timestep(self.sigma_max()),
            ),
        }
    }

    /// Training timesteps.
    pub fn len(&self) -> usize {
        self.sigmas.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sigmas.is_empty()
    }

    /// The least noise.
    pub fn sigma_min(&self) -> f64 {
        self.sigmas.first().copied().unwrap_or_default()
    }

    /// The most noise.
    pub fn sigma_max(&self) -> f64 {
        self.sigmas.last().copied().unwrap_or_default()
    }

    /// The fractional timestep of a noise level, linear in log σ (k-diffusion `DiscreteSchedule.sigma_to_t`). In f32 as the references
    /// compute it, because some of diffusers' schedulers cut the result to a whole number: the most noise must give the last timestep.
    pub fn timestep(&self, sigma: f64) -> f64 {
        let log_sigma = sigma.max(1e-10).ln() as f32;
        match self.time {
            Time::Interpolated => {}
            Time::Continuous => return edm::timestep(sigma),
            Time::Flow(_) => return sigma * FLOW_TIME,
            Time::Nearest(stride) => {
                let distance = |i: &usize| (log_sigma - self.log_sigmas[*i]).abs();
                let nearest = (0..self.len()).min_by(|a, b| distance(a).total_cmp(&distance(b)));
                return ((nearest.unwrap_or_default() + 1) * stride - 1) as f64;
            }
        }
        let count = self.log_sigmas.iter().filter(|&&l| log_sigma >= l).count();
        let low = count.saturating_sub(1).min(self.len().saturating_sub(2));
        let (a, b) = (self.log_sigmas[low], self.log_sigmas[low + 1]);
        let w = ((a - log_sigma) / (a - b)).clamp(0.0, 1.0);
        f64::from(1.0 - w) * low as f64 + f64::from(w) * (low + 1) as f64
    }

    /// The noise level of a fractional timestep, linear in log σ (k-diffusion `DiscreteSchedule.t_to_sigma`). In f32 to the last
    /// bit where that can be, because the noise of stochastic samplers hangs on it.
    pub fn sigma(&self, timestep: f64) -> f64 {
        let (low, high, w) = match self.time {
            Time::Interpolated => self.place(timestep),
            Time::Continuous => return (4.0 * timestep).exp(),
            Time::Flow(shift) => {
                let (shift, t) = (shift as f32, timestep as f32 / FLOW_TIME as f32);
                return f64::from(shift * t / ((shift - 1.0) * t + 1.0));
            }
            Time::Nearest(stride) => {
                let before = stride as f64 - 1.0;
                self.place((timestep - before) / stride as f64)
            }
        };
        let w = w as f32;
        let log = (1.0 - w) * self.log_sigmas[low] + w * self.log_sigmas[high];
        f64::from(f64::from(log).exp() as f32)
    }

    /// The noise level of a timestep, linear in σ (diffusers' `np.interp`).
    pub fn interpolate(&self, timestep: f64) -> f64 {
        let (low, high, w) = self.place(timestep);
        (1.0 - w) * self.sigmas[low] + w * self.sigmas[high]
    }

    /// The entries around a timestep, and how far it lies from the first to the second.
    fn place(&self, timestep: f64) -> (usize, usize, f64) {
        let last = self.len() - 1;
        let t = timestep.clamp(0.0, last as f64);
        let low = t.floor() as usize;
        (low, (low + 1).min(last), t.fract())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stable_diffusions_levels() {
        let schedule = NoiseSchedule::default();
        assert!((schedule.sigma_min() - 0.029_167_5).abs() < 1e-6);
        assert!((schedule.sigma_max() - 14.614_642).abs() < 1e-4);
        for t in [0.0, 0.25, 17.5, 999.0] {
            assert!((schedule.timestep(schedule.sigma(t)) - t).abs() < 1e-3);
        }
    }

    #[test]
    fn zero_snr_leaves_finite_levels() {
        let config = SchedulerConfig {
            class_name: "DDIMScheduler".to_owned(),
            rescale_betas_zero_snr: true,
            ..SchedulerConfig::default()
        };
        let schedule = NoiseSchedule::new(&config);
        assert_eq!(schedule.alphas_cumprod.last(), Some(&0.0));
        assert!((schedule.sigma_max() - 4518.8).abs() < 0.1);
    }
}
