//! UniPC: Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models", arXiv 2302.04867, with
//! B(h) = h or eʰ − 1 (diffusers `UniPCMultistepScheduler`).

use super::super::config::{SchedulerConfig, SigmaMap};
use super::super::prediction::{Prediction, estimates};
use super::super::schedule::NoiseSchedule;
use super::super::start::Span;
use super::super::trajectory::{
    Assign, Linear, Register, Trajectory, input, output, sample, saved,
};
use super::UnitLevels;
use crate::error::{Error, Result};

/// A solver on its levels.
pub(super) struct UniPc<'a> {
    config: &'a SchedulerConfig,
    levels: UnitLevels,
    /// Where velocities are turned into noise, if that is at other α and σ than those of the levels.
    velocities: Option<Vec<(f64, f64)>>,
    /// Converted predictions are kept in as many registers, one more than the order; the last register holds the latents that the
    /// last prediction step began from.
    history: usize,
}

pub(in super::super) fn unipc(
    config: &SchedulerConfig,
    schedule: &NoiseSchedule,
    span: Span,
) -> Result<Trajectory> {
    if !matches!(
        config.solver_type.as_str(),
        "bh1" | "bh2" | "midpoint" | "heun" | "logrho"
    ) {
        return Err(Error::Unsupported(format!(
            "scheduler config field `solver_type` is \"{}\", expected bh1 or bh2",
            config.solver_type
        )));
    }
    let rounded = config.sigma_map == SigmaMap::Karras;
    let mut levels = UnitLevels::new(
        config,
        schedule,
        (span, config.num_train_timesteps),
        rounded,
    );
    levels.end_at_own_last(config);
    Ok(UniPc::new(config, levels, None).run())
}

impl<'a> UniPc<'a> {
    pub(super) fn new(
        config: &'a SchedulerConfig,
        levels: UnitLevels,
        velocities: Option<Vec<(f64, f64)>>,
    ) -> Self {
        Self {
            config,
            levels,
            velocities,
            history: config.solver_order + 1,
        }
    }

    /// Estimates of x₀ and ε at level `i` for latents `x`.
    fn estimates(&self, i: usize, x: &Linear) -> (Linear, Linear) {
        let scales = self.levels.space.place(self.levels.sigmas[i]);
        let prediction = self.config.prediction;
        match self.velocities.as_ref().and_then(|places| places.get(i)) {
            Some(&place) => {
                let (_, epsilon) = estimates(prediction, place, x, &output());
                estimates(Prediction::Epsilon, scales, x, &epsilon)
            }
            None => estimates(prediction, scales, x, &output()),
        }
    }

    /// The run: each prediction corrects the step that led to it, and predicts the next.
    pub(super) fn run(&self) -> Trajectory {
        let config = self.config;
        let (count, first) = (self.levels.timesteps.len(), self.levels.first);
        let mut run = Trajectory {
            registers: self.history + 1,
            ..self.levels.trajectory()
        };
        let mut last_order = 0;
        for i in self.levels.indices() {
            let (x0, epsilon) = self.estimates(i, &sample());
            let mut call = self.levels.call(i, config.prediction);
            call.denoised = self.estimates(i, &input()).0.of_call();
            let converted = if config.predict_x0 { x0 } else { epsilon };
            call.then
                .push(converted.into(Register::Saved(i % self.history)));
            if let Some(to) = config.thresholding.filter(|_| config.predict_x0) {
                let register = Register::Saved(i % self.history);
                call.then.push(Assign::Limit { register, to });
            }
            if i > first && !config.disable_corrector.contains(&(i - 1)) {
                call.then
                    .push(self.step(i - 1, last_order, true).into(Register::Sample));
            }
            call.then.push(sample().into(Register::Saved(self.history)));
            let order = if config.lower_order_final {
                config.solver_order.min(count - i)
            } else {
                config.solver_order
            };
            last_order = order.min(i + 1 - first);
            call.then
                .push(self.step(i, last_order, false).into(Register::Sample));
            run.calls.push(call);
        }
        run
    }
}

impl UniPc<'_> {
    /// From level `from` to the next, by the predictor or (with the prediction at the next level in hand) the corrector.
    fn step(&self, from: usize, order: usize, correct: bool) -> Linear {
        let UnitLevels { sigmas, space, .. } = &self.levels;
        let ((alpha_t, sigma_t), (alpha_s, sigma_s)) =
            (space.place(sigmas[from + 1]), space.place(sigmas[from]));
        let at = |i: usize| space.lambda(sigmas[i]);
        let h = at(from + 1) - at(from);
        let hh = if self.config.predict_x0 { -h } else { h };
        let b_h = if self.config.solver_type == "bh1" {
            hh
        } else {
            hh.exp_m1()
        };
        let m = |i: usize| saved(i % self.history);
        let start = saved(self.history);
        let (scale, weight) = if self.config.predict_x0 {
            (sigma_t / sigma_s, alpha_t)
        } else {
            (alpha_t / alpha_s, sigma_t)
        };
        let x = start * scale - m(from) * (weight * hh.exp_m1());
        let ratios: Vec<f64> = (1..order).map(|k| (at(from - k) - at(from)) / h).collect();
        let mut residual = Linear::default();
        let weights = if correct {
            corrector(&ratios, hh, b_h)
        } else {
            predictor(&ratios, hh, b_h)
        };
        for (k, (ratio, rho)) in ratios.iter().zip(&weights).enumerate() {
            residual = residual + (m(from - k - 1) - m(from)) * (rho / ratio);
        }
        if correct {
            residual = residual + (m(from + 1) - m(from)) * weights[order - 1];
        }
        if residual == Linear::default() {
            x
        } else {
            x - residual * (weight * b_h)
        }
    }
}

/// Right-hand sides b₁ … bₙ of the order conditions.
fn conditions(n: usize, hh: f64, b_h: f64) -> Vec<f64> {
    let mut phi = hh.exp_m1() / hh - 1.0;
    let mut factorial = 1.0;
    (1..=n)
        .map(|i| {
            let b = phi * factorial / b_h;
            factorial *= (i + 1) as f64;
            phi = phi / hh - 1.0 / factorial;
            b
        })
        .collect()
}

fn predictor(ratios: &[f64], hh: f64, b_h: f64) -> Vec<f64> {
    match ratios.len() {
        0 => Vec::new(),
        1 => vec![0.5],
        n => solve(ratios, &conditions(n, hh, b_h)),
    }
}

fn corrector(ratios: &[f64], hh: f64, b_h: f64) -> Vec<f64> {
    if ratios.is_empty() {
        return vec![0.5];
    }
    let nodes: Vec<f64> = ratios.iter().copied().chain([1.0]).collect();
    solve(&nodes, &conditions(nodes.len(), hh, b_h))
}

/// Solves Σⱼ nodeⱼ^i · xⱼ = bᵢ, i from 0, by elimination with pivoting.
fn solve(nodes: &[f64], b: &[f64]) -> Vec<f64> {
    let n = nodes.len();
    let mut rows: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            nodes
                .iter()
                .map(|r| r.powi(i as i32))
                .chain([b[i]])
                .collect()
        })
        .collect();
    for column in 0..n {
        let pivot = (column..n)
            .max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs()))
            .unwrap_or(column);
        rows.swap(column, pivot);
        for row in 0..n {
            if row != column {
                let factor = rows[row][column] / rows[column][column];
                let pivot = rows[column].clone();
                for (value, pivot) in rows[row].iter_mut().zip(&pivot) {
                    *value -= factor * pivot;
                }
            }
        }
    }
    (0..n).map(|i| rows[i][n] / rows[i][i]).collect()
}
