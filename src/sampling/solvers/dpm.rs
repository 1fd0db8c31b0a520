//! DPM-Solver and DPM-Solver++ of orders 1 to 3: Lu et al., arXiv 2206.00927 and 2211.01095 (diffusers `DPMSolverMultistepScheduler` and
//! `DPMSolverSinglestepScheduler`), deterministic and with noise.

use super::super::config::{BetaSchedule, Class, SchedulerConfig, SigmaMap, Spacing};
use super::super::prediction::estimates;
use super::super::schedule::NoiseSchedule;
use super::super::start::Span;
use super::super::trajectory::{Assign, Call, Linear, Register, Trajectory, output, sample, saved};
use super::{Levels, Space, UnitLevels, edm, kdiffusion, lambda};
use crate::error::{Error, Result};

/// The variants of the algorithm.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Integrates the noise.
    Noise,
    /// Integrates the denoised latents.
    Data,
    /// As [`Kind::Noise`], with fresh noise.
    SdeNoise,
    /// As [`Kind::Data`], with fresh noise.
    SdeData,
}

/// Values of the last three calls are kept in as many registers; single steps also keep where they began.
const HISTORY: usize = 3;
const START: usize = HISTORY;

struct Dpm<'a> {
    config: &'a SchedulerConfig,
    kind: Kind,
    heun: bool,
    levels: UnitLevels,
    /// Of models of continuous levels: latents are not kept at unit variance.
    edm: Option<Levels>,
}

impl<'a> Dpm<'a> {
    fn kind(config: &SchedulerConfig) -> Result<Kind> {
        let kind = match config.algorithm_type.as_str() {
            "dpmsolver++" | "deis" => Kind::Data,
            "dpmsolver" => Kind::Noise,
            "sde-dpmsolver++" => Kind::SdeData,
            "sde-dpmsolver" if config.class() == Class::DpmMultistep => Kind::SdeNoise,
            other => {
                return Err(Error::Unsupported(format!(
                    "scheduler config field `algorithm_type` is \"{other}\", which {} does not know",
                    config.class_name
                )));
            }
        };
        if config.final_sigma_zero && matches!(kind, Kind::Noise | Kind::SdeNoise) {
            return Err(Error::Usage(format!(
                "scheduler config: `final_sigmas_type` zero does not go with `algorithm_type` {}; use sigma_min",
                config.algorithm_type
            )));
        }
        Ok(kind)
    }

    fn new(config: &'a SchedulerConfig, schedule: &NoiseSchedule, span: Span) -> Result<Self> {
        let kind = Self::kind(config)?;
        let clipped = schedule
            .sigmas
            .iter()
            .rev()
            .filter(|&&s| lambda(s) < config.lambda_min_clipped)
            .count();
        let last = config.num_train_timesteps.saturating_sub(clipped);
        let rounded = config.beta_schedule != BetaSchedule::SquaredCosine
            || config.class() == Class::DpmSinglestep;
        let rounded = rounded && matches!(config.sigma_map, SigmaMap::Karras | SigmaMap::Lu);
        Ok(Self {
            config,
            kind,
            heun: config.solver_type == "heun",
            levels: UnitLevels::new(config, schedule, (span, last), rounded),
            edm: None,
        })
    }

    fn of_continuous(config: &'a SchedulerConfig, span: Span) -> Result<Self> {
        let levels = edm::levels(config, span);
        Ok(Self {
            config,
            kind: Self::kind(config)?,
            heun: config.solver_type == "heun",
            levels: UnitLevels {
                sigmas: levels.sigmas.clone(),
                timesteps: levels.timesteps.clone(),
                space: Space::Unit,
                first: span.first,
            },
            edm: Some(levels),
        })
    }

    /// A call whose converted prediction goes to register `i` modulo the history.
    fn call(&self, i: usize) -> Call {
        let (sigma, timestep) = (self.levels.sigmas[i], self.levels.timesteps[i]);
        if let Some(levels) = &self.edm {
            let (mut call, x0) = kdiffusion::call(levels, i, (timestep, sigma), &sample());
            call.then.push(x0.into(Register::Saved(i % HISTORY)));
            self.limit(&mut call, i);
            return call;
        }
        let (x0, epsilon) = estimates(
            self.config.prediction,
            self.levels.space.place(sigma),
            &sample(),
            &output(),
        );
        let data = matches!(self.kind, Kind::Data | Kind::SdeData);
        let mut call = self.levels.call(i, self.config.prediction);
        let register = Register::Saved(i % HISTORY);
        if data || self.config.thresholding.is_none() {
            let integrated = if data { x0 } else { epsilon };
            call.then.push(integrated.into(register));
            if data {
                self.limit(&mut call, i);
            }
            return call;
        }
        // the noise that goes with the limited estimate
        let (alpha, scale) = self.levels.space.place(sigma);
        call.then.push(x0.into(register));
        self.limit(&mut call, i);
        let epsilon = (sample() - saved(i % HISTORY) * alpha) * (1.0 / scale);
        call.then.push(epsilon.into(register));
        call
    }

    /// Limits the estimate in register `i` modulo the history.
    fn limit(&self, call: &mut Call, i: usize) {
        if let Some(to) = self.config.thresholding {
            let register = Register::Saved(i % HISTORY);
            call.then.push(Assign::Limit { register, to });
        }
    }

    fn lambda(&self, i: usize) -> f64 {
        self.levels.space.lambda(self.levels.sigmas[i])
    }

    /// The weights of a step from level `from` to level `to`.
    fn weights(&self, from: usize, to: usize) -> Weights {
        let place = |level: f64| match self.edm {
            Some(_) => (1.0, level),
            None => self.levels.space.place(level),
        };
        let h = self.lambda(to) - self.lambda(from);
        let (from, to) = (self.levels.sigmas[from], self.levels.sigmas[to]);
        Weights::new(self.kind, h, (place(from), place(to)))
    }

    /// The multistep formula from level `i` to the next, and the factor of fresh noise.
    fn multistep(&self, i: usize, order: usize) -> (Linear, Option<f64>) {
        let w = self.weights(i, i + 1);
        let h = self.lambda(i + 1) - self.lambda(i);
        let m = |age: usize| saved((i - age) % HISTORY);
        // differences of neighbouring values over their distance in λ, in units of this step
        let slope = |age: usize| {
            (m(age) - m(age + 1)) * (h / (self.lambda(i - age) - self.lambda(i - age - 1)))
        };
        let mut x = sample() * w.scale + m(0) * w.value;
        if order == 2 {
            x = x + slope(0) * if self.heun { w.slope } else { w.midpoint };
        } else if order > 2 {
            let (h0, h1) = (
                self.lambda(i) - self.lambda(i - 1),
                self.lambda(i - 1) - self.lambda(i - 2),
            );
            let bend = slope(0) - slope(1);
            let d1 = slope(0) + bend.clone() * (h0 / (h0 + h1));
            x = x + d1 * w.slope + bend * (h / (h0 + h1) * w.curvature);
        }
        (x, w.noise)
    }

    /// The single-step formula to the level after `i`, from the level `order − 1` before it.
    fn singlestep(&self, i: usize, order: usize) -> (Linear, Option<f64>) {
        let from = i + 1 - order;
        let w = self.weights(from, i + 1);
        let h = self.lambda(i + 1) - self.lambda(from);
        let m = |level: usize| saved(level % HISTORY);
        let part = |level: usize| (self.lambda(level) - self.lambda(from)) / h;
        let slope = |level: usize| (m(level) - m(from)) * (1.0 / part(level));
        let start = if order == 1 { sample() } else { saved(START) };
        let mut x = start * w.scale + m(from) * w.value;
        if order == 2 {
            x = x + slope(i) * if self.heun { w.slope } else { w.midpoint };
        } else if order > 2 && self.heun {
            let (r0, r1) = (part(i), part(i - 1));
            let d1 = (slope(i - 1) * r0 - slope(i) * r1) * (1.0 / (r0 - r1));
            let d2 = (slope(i) - slope(i - 1)) * (2.0 / (r0 - r1));
            x = x + d1 * w.slope + d2 * w.curvature;
        } else if order > 2 {
            x = x + slope(i) * w.slope;
        }
        (x, w.noise)
    }
}

/// What a step multiplies the latents, the integrated value and its first two differences with.
struct Weights {
    scale: f64,
    value: f64,
    slope: f64,
    /// The cheaper weight of the slope, for order 2.
    midpoint: f64,
    curvature: f64,
    noise: Option<f64>,
}

/// (e^x − 1)/x − 1, also near 0.
fn phi(x: f64) -> f64 {
    if x.abs() < 1e-4 {
        x / 2.0 + x * x / 6.0
    } else {
        x.exp_m1() / x - 1.0
    }
}

/// ((e^x − 1)/x − 1)/x − ½, also near 0.
fn psi(x: f64) -> f64 {
    if x.abs() < 1e-3 {
        x / 6.0 + x * x / 24.0
    } else {
        phi(x) / x - 0.5
    }
}

impl Weights {
    /// For a step over `h` between the α and σ of two noise levels; at infinite h (a step to zero noise) only the value counts.
    fn new(
        kind: Kind,
        h: f64,
        ((alpha_s, sigma_s), (alpha_t, sigma_t)): ((f64, f64), (f64, f64)),
    ) -> Self {
        match kind {
            Kind::Data => {
                let value = -alpha_t * (-h).exp_m1();
                Self {
                    scale: sigma_t / sigma_s,
                    value,
                    slope: -alpha_t * phi(-h),
                    midpoint: 0.5 * value,
                    curvature: -alpha_t * psi(-h),
                    noise: None,
                }
            }
            Kind::Noise => {
                let value = -sigma_t * h.exp_m1();
                Self {
                    scale: alpha_t / alpha_s,
                    value,
                    slope: -sigma_t * phi(h),
                    midpoint: 0.5 * value,
                    curvature: -sigma_t * psi(h),
                    noise: None,
                }
            }
            Kind::SdeData => {
                let value = -alpha_t * (-2.0 * h).exp_m1();
                Self {
                    scale: sigma_t / sigma_s * (-h).exp(),
                    value,
                    slope: -alpha_t * phi(-2.0 * h),
                    midpoint: 0.5 * value,
                    // the reference's formula, which is not the paper's expansion
                    curvature: -alpha_t * (psi(-2.0 * h) + 1.0),
                    noise: Some(sigma_t * (-(-2.0 * h).exp_m1()).max(0.0).sqrt()),
                }
            }
            Kind::SdeNoise => Self {
                scale: alpha_t / alpha_s,
                value: -2.0 * sigma_t * h.exp_m1(),
                slope: -2.0 * sigma_t * phi(h),
                midpoint: -sigma_t * h.exp_m1(),
                curvature: 0.0,
                noise: Some(sigma_t * (2.0 * h).exp_m1().max(0.0).sqrt()),
            },
        }
    }
}

fn assign((x, noise): (Linear, Option<f64>)) -> Assign {
    match noise {
        Some(factor) => x.into_with_noise(Register::Sample, factor),
        None => x.into(Register::Sample),
    }
}

/// The order of each multistep: as much as the history allows, less in the last two.
pub(super) fn multistep_order(
    config: &SchedulerConfig,
    levels: &UnitLevels,
    i: usize,
    first_at_end: bool,
) -> usize {
    let count = levels.timesteps.len();
    let few = config.lower_order_final && count < 15;
    if i + 1 == count && (few || first_at_end) {
        return 1;
    }
    let limit = if i + 2 == count && few { 2 } else { 3 };
    config.solver_order.min(i + 1 - levels.first).min(limit)
}

/// Multistep: one call a step, its value kept for the next ones.
pub(in super::super) fn multistep(
    config: &SchedulerConfig,
    schedule: &NoiseSchedule,
    span: Span,
) -> Result<Trajectory> {
    let dpm = Dpm::new(config, schedule, span)?;
    let run = dpm.levels.trajectory();
    multistep_of(&dpm, run)
}

/// The same for models of continuous levels.
pub(in super::super) fn edm_multistep(config: &SchedulerConfig, span: Span) -> Result<Trajectory> {
    let dpm = Dpm::of_continuous(config, span)?;
    let run = edm::levels(config, span).trajectory(0);
    multistep_of(&dpm, run)
}

fn multistep_of(dpm: &Dpm<'_>, mut run: Trajectory) -> Result<Trajectory> {
    let config = dpm.config;
    run.registers = START + 1;
    for i in dpm.levels.indices() {
        let mut call = dpm.call(i);
        let order = multistep_order(
            config,
            &dpm.levels,
            i,
            config.euler_at_final || config.final_sigma_zero,
        );
        if dpm.kind == Kind::SdeNoise && order > 2 {
            return Err(Error::Unsupported(
                "scheduler config: `algorithm_type` sde-dpmsolver is defined for `solver_order` 1 and 2 only".to_owned(),
            ));
        }
        call.then.push(assign(dpm.multistep(i, order)));
        run.calls.push(call);
    }
    Ok(run)
}

/// Single step: steps of one, two and three calls that each begin where the last one of a single call began.
pub(in super::super) fn singlestep(
    config: &SchedulerConfig,
    schedule: &NoiseSchedule,
    span: Span,
) -> Result<Trajectory> {
    if config.solver_order > 3 {
        return Err(Error::Unsupported(format!(
            "scheduler config field `solver_order` is {}, expected 1 to 3",
            config.solver_order
        )));
    }
    let linspace = SchedulerConfig {
        spacing: Spacing::Linspace,
        ..config.clone()
    };
    let dpm = Dpm::new(&linspace, schedule, span)?;
    let mut run = Trajectory {
        registers: START + 1,
        ..dpm.levels.trajectory()
    };
    let orders = singlestep_orders(config, span.steps);
    for (i, order) in orders.into_iter().enumerate().skip(span.first) {
        // a run that begins inside a group has fewer values than its order asks for
        let order = order.min(i + 1 - span.first);
        let mut call = dpm.call(i);
        if order == 1 {
            call.then.push(sample().into(Register::Saved(START)));
        }
        call.then.push(assign(dpm.singlestep(i, order)));
        run.calls.push(call);
    }
    Ok(run)
}

/// 1, 2, 3, 1, 2, 3 … up to the solver's order, ending in lower ones where the steps do not divide.
fn singlestep_orders(config: &SchedulerConfig, steps: usize) -> Vec<usize> {
    let order = config.solver_order;
    let lower_at_end =
        config.lower_order_final || !steps.is_multiple_of(order) || config.final_sigma_zero;
    let mut orders: Vec<usize> = (0..steps).map(|i| i % order + 1).collect();
    if lower_at_end && steps.is_multiple_of(order) {
        // a full last group gives up its highest order for a single step
        if let Some(last) = orders.last_mut() {
            *last = 1;
        }
    }
    if config.final_sigma_zero
        && let Some(last) = orders.last_mut()
    {
        *last = 1;
    }
    orders
}
