//! How to step: one family of papers a file. Each turns noise levels or timesteps into a [`Trajectory`](super::Trajectory).

pub(super) mod consistency;
pub(super) mod ddim;
pub(super) mod deis;
pub(super) mod dpm;
pub(super) mod dpm2;
pub(super) mod edm;
pub(super) mod flow;
pub(super) mod kdiffusion;
pub(super) mod pndm;
pub(super) mod rectified;
pub(super) mod unipc;

use super::config::{SchedulerConfig, SigmaMap};
use super::prediction::{Prediction, estimates};
use super::schedule::NoiseSchedule;
use super::spacing;
use super::start::Span;
use super::trajectory::{Call, Trajectory, input, output, sample};

/// What σ-space solvers (x = x₀ + σ·ε) share: the levels, the timesteps that go with them, what the network predicts.
pub(super) struct Levels {
    /// One more than there are steps.
    pub(super) sigmas: Vec<f64>,
    /// What the network is told at each level but the last.
    pub(super) timesteps: Vec<f64>,
    /// What the network predicts.
    pub(super) prediction: Prediction,
    /// Standard deviation of the clean latents; 1 for models trained with betas.
    pub(super) data: f64,
    /// The initial noise is multiplied by this.
    pub(super) init_noise_sigma: f64,
    /// Limit of the estimate of x₀, for Heun.
    pub(super) clip: Option<f64>,
    /// The level that the run begins at.
    pub(super) first: usize,
}

impl Levels {
    /// Pairs of neighbouring levels, from the first of the run.
    pub(super) fn pairs(&self) -> impl Iterator<Item = (usize, f64, f64)> + '_ {
        self.sigmas
            .windows(2)
            .enumerate()
            .skip(self.first)
            .map(|(i, pair)| (i, pair[0], pair[1]))
    }

    /// A run without calls yet.
    pub(super) fn trajectory(&self, registers: usize) -> Trajectory {
        Trajectory {
            init_noise_sigma: self.init_noise_sigma,
            registers,
            steps: self.sigmas.len() - 1 - self.first,
            sigmas: self.sigmas[self.first..].to_vec(),
            ..Trajectory::default()
        }
    }
}

/// What a level of a multistep solver is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Space {
    /// σ/α of latents of unit variance.
    Unit,
    /// σ of a flow: α = 1 − σ.
    Flow,
}

impl Space {
    /// α and σ.
    fn place(self, level: f64) -> (f64, f64) {
        match self {
            Self::Unit => alpha_sigma(level),
            Self::Flow => (1.0 - level, level),
        }
    }

    /// σ/α.
    fn ratio(self, level: f64) -> f64 {
        match self {
            Self::Unit => level,
            Self::Flow => level / (1.0 - level),
        }
    }

    /// ln(α/σ).
    fn lambda(self, level: f64) -> f64 {
        lambda(self.ratio(level))
    }
}

/// What multistep solvers share: levels, one more than timesteps, and the timesteps.
struct UnitLevels {
    sigmas: Vec<f64>,
    timesteps: Vec<f64>,
    space: Space,
    /// The level that the run begins at.
    first: usize,
}

impl UnitLevels {
    /// diffusers' for a span of steps over the first `last` training timesteps; `rounded`: whether remapped timesteps are rounded to whole
    /// numbers or cut.
    fn new(
        config: &SchedulerConfig,
        schedule: &NoiseSchedule,
        (span, last): (Span, usize),
        rounded: bool,
    ) -> Self {
        let steps = span.steps;
        let ends = (schedule.sigma_max(), schedule.sigma_min());
        let remapped = spacing::remap(config, ends, steps);
        let (mut sigmas, timesteps) = match (remapped, &config.flow) {
            (None, Some(flow)) => flow::solver_levels(config, flow, steps),
            (Some(sigmas), _) => {
                let whole = |t: f64| {
                    if rounded {
                        t.round_ties_even()
                    } else {
                        t.trunc()
                    }
                };
                let timesteps = sigmas.iter().map(|&s| whole(schedule.timestep(s)));
                (sigmas.clone(), timesteps.collect())
            }
            (None, None) => {
                let timesteps = spacing::multistep_timesteps(config, last, steps);
                let sigmas = timesteps.iter().map(|&t| schedule.interpolate(t));
                (sigmas.collect::<Vec<_>>(), timesteps)
            }
        };
        sigmas.push(if config.final_sigma_zero {
            0.0
        } else {
            schedule.sigma_min()
        });
        let sigmas = spacing::to_f32(sigmas);
        Self {
            sigmas,
            timesteps,
            space: match config.flow {
                Some(_) => Space::Flow,
                None => Space::Unit,
            },
            first: span.first,
        }
    }

    /// UniPC and DEIS let remapped and flow levels end at their own last one where others end at the model's least noise.
    fn end_at_own_last(&mut self, config: &SchedulerConfig) {
        let n = self.sigmas.len();
        let own = config.sigma_map != SigmaMap::None || config.flow.is_some();
        if own && !config.final_sigma_zero && n > 1 {
            self.sigmas[n - 1] = self.sigmas[n - 2];
        }
    }

    /// A run without calls yet.
    fn trajectory(&self) -> Trajectory {
        Trajectory {
            init_noise_sigma: 1.0,
            steps: self.timesteps.len() - self.first,
            sigmas: self.sigmas[self.first..].to_vec(),
            ..Trajectory::default()
        }
    }

    /// The steps of the run.
    fn indices(&self) -> std::ops::Range<usize> {
        self.first..self.timesteps.len()
    }

    /// The call at level `i`.
    fn call(&self, i: usize, prediction: Prediction) -> Call {
        let sigma = self.sigmas[i];
        let told = (self.timesteps[i], sigma);
        plain_call(i, told, self.space.place(sigma), prediction)
    }
}

/// A call at latents `α·x₀ + σ·ε` that the network sees as they are, told a timestep; a noise level for display goes with that.
pub(super) fn plain_call(
    step: usize,
    (timestep, level): (f64, f64),
    scales: (f64, f64),
    prediction: Prediction,
) -> Call {
    let (x0, _) = estimates(prediction, scales, &input(), &output());
    Call {
        timestep,
        sigma: level,
        step,
        input: sample().combo(),
        then: Vec::new(),
        scale: 1.0,
        denoised: x0.of_call(),
        now: scales,
        next: (1.0, 0.0),
    }
}

/// α and σ of latents of unit variance at the noise level σ/α.
pub(super) fn alpha_sigma(level: f64) -> (f64, f64) {
    let alpha = 1.0 / (level * level + 1.0).sqrt();
    (alpha, level * alpha)
}

/// ln(α/σ) of the noise level σ/α.
pub(super) fn lambda(level: f64) -> f64 {
    -level.ln()
}
