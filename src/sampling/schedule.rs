//! Betas to alphas to sigmas, and between sigma and timestep. Follows the f32 arithmetic of diffusers and k-diffusion where it shows.

use super::config::{BetaSchedule, SchedulerConfig};

/// The noise levels that a model was trained at.
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseSchedule {
    /// ᾱ of each training timestep, from the least noisy.
    pub alphas_cumprod: Vec<f64>,
    /// σ = √((1 − ᾱ)/ᾱ) of each.
    pub sigmas: Vec<f64>,
    log_sigmas: Vec<f64>,
}

impl Default for NoiseSchedule {
    /// The schedule of every Stable Diffusion 1 and 2.
    fn default() -> Self {
        Self::new(&SchedulerConfig::default())
    }
}

/// `torch.linspace` in f32: from both ends towards the middle.
fn linspace_f32(start: f64, end: f64, n: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (n.max(2) - 1) as f32;
    (0..n)
        .map(|i| {
            if i < n / 2 {
                start + step * i as f32
            } else {
                end - step * (n - 1 - i) as f32
            }
        })
        .collect()
}

fn betas(config: &SchedulerConfig) -> Vec<f32> {
    let n = config.num_train_timesteps;
    if let Some(trained) = &config.trained_betas {
        return trained.iter().map(|&b| b as f32).collect();
    }
    match config.beta_schedule {
        BetaSchedule::Linear => linspace_f32(config.beta_start, config.beta_end, n),
        BetaSchedule::ScaledLinear => {
            linspace_f32(config.beta_start.sqrt(), config.beta_end.sqrt(), n)
                .into_iter()
                .map(|b| b * b)
                .collect()
        }
        BetaSchedule::SquaredCosine => {
            let alpha_bar = |t: f64| {
                ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2)
                    .cos()
                    .powi(2)
            };
            (0..n)
                .map(|i| {
                    let (t1, t2) = (i as f64 / n as f64, (i + 1) as f64 / n as f64);
                    (1.0 - alpha_bar(t2) / alpha_bar(t1)).min(0.999) as f32
                })
                .collect()
        }
    }
}

/// ᾱ as torch accumulates it: products in f64, kept in f32.
fn cumulative(betas: &[f32]) -> Vec<f64> {
    let mut product = 1.0;
    betas
        .iter()
        .map(|beta| {
            product *= f64::from(1.0 - beta);
            f64::from(product as f32)
        })
        .collect()
}

/// Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891, algorithm 1.
fn rescale_zero_snr(betas: &[f32]) -> Vec<f32> {
    let roots: Vec<f64> = cumulative(betas).iter().map(|a| a.sqrt()).collect();
    let (Some(&first), Some(&last)) = (roots.first(), roots.last()) else {
        return Vec::new();
    };
    let scale = first / (first - last);
    let bars: Vec<f64> = roots
        .iter()
        .map(|root| ((root - last) * scale).powi(2))
        .collect();
    (0..bars.len())
        .map(|i| {
            let alpha = if i == 0 {
                bars[0]
            } else {
                bars[i] / bars[i - 1]
            };
            (1.0 - alpha) as f32
        })
        .collect()
}

impl NoiseSchedule {
    /// The schedule that a config describes.
    pub fn new(config: &SchedulerConfig) -> Self {
        let mut betas = betas(config);
        if config.rescale_betas_zero_snr {
            betas = rescale_zero_snr(&betas);
        }
        let mut alphas_cumprod = cumulative(&betas);
        if config.rescale_betas_zero_snr
            && config.keeps_last_alpha_above_zero()
            && let Some(last) = alphas_cumprod.last_mut()
        {
            *last = 2f64.powi(-24);
        }
        let sigmas: Vec<f64> = alphas_cumprod
            .iter()
            .map(|&a| f64::from(((1.0 - a as f32) / a as f32).sqrt()))
            .collect();
        let log_sigmas = sigmas.iter().map(|s| s.ln()).collect();
        Self {
            alphas_cumprod,
            sigmas,
            log_sigmas,
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

    /// The fractional timestep of a noise level, linear in log σ (k-diffusion `DiscreteSchedule.sigma_to_t`).
    pub fn timestep(&self, sigma: f64) -> f64 {
        let log_sigma = sigma.max(1e-10).ln();
        let count = self.log_sigmas.iter().filter(|&&l| log_sigma >= l).count();
        let low = count.saturating_sub(1).min(self.len().saturating_sub(2));
        let (a, b) = (self.log_sigmas[low], self.log_sigmas[low + 1]);
        let w = ((a - log_sigma) / (a - b)).clamp(0.0, 1.0);
        (1.0 - w) * low as f64 + w * (low + 1) as f64
    }

    /// The noise level of a fractional timestep, linear in log σ (k-diffusion `DiscreteSchedule.t_to_sigma`).
    pub fn sigma(&self, timestep: f64) -> f64 {
        let t = timestep.clamp(0.0, (self.len() - 1) as f64);
        let (low, w) = (t.floor() as usize, t.fract());
        let high = (low + 1).min(self.len() - 1);
        ((1.0 - w) * self.log_sigmas[low] + w * self.log_sigmas[high]).exp()
    }

    /// The noise level of a timestep, linear in σ (diffusers' `np.interp`).
    pub fn interpolate(&self, timestep: f64) -> f64 {
        let t = timestep.clamp(0.0, (self.len() - 1) as f64);
        let (low, w) = (t.floor() as usize, t.fract());
        let high = (low + 1).min(self.len() - 1);
        (1.0 - w) * self.sigmas[low] + w * self.sigmas[high]
    }
}
