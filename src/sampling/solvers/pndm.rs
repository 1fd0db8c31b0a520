//! PNDM: Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds", arXiv 2202.09778 (diffusers `PNDMScheduler`): linear
//! multistep over predictions, after Runge-Kutta steps unless `skip_prk_steps`.

use super::super::config::SchedulerConfig;
use super::super::prediction::Prediction;
use super::super::schedule::NoiseSchedule;
use super::super::spacing;
use super::super::start::Span;
use super::super::trajectory::{Assign, Linear, Register, Trajectory, output, sample, saved};
use super::ddim::{alpha_bar_at, alpha_bar_to};
use super::plain_call;
use crate::error::{Error, Result};

/// Predictions are kept in registers 0 to 3; then the latents of a step's beginning, then a Runge-Kutta sum.
const HISTORY: usize = 4;
const START: usize = HISTORY;
const SUM: usize = HISTORY + 1;

struct Pndm<'a> {
    config: &'a SchedulerConfig,
    schedule: &'a NoiseSchedule,
    /// Training timesteps between two of the run.
    stride: usize,
    /// The timesteps of Runge-Kutta's calls.
    runge_kutta: Vec<f64>,
    run: Trajectory,
    /// Predictions kept so far.
    kept: usize,
}

pub(in super::super) fn pndm(
    config: &SchedulerConfig,
    schedule: &NoiseSchedule,
    span: Span,
) -> Result<Trajectory> {
    let steps = span.steps;
    if config.prediction == Prediction::Sample {
        return Err(Error::Unsupported(
            "PNDM is not defined for models that predict the sample".to_owned(),
        ));
    }
    let falling = spacing::timesteps(config, steps, true);
    let stride = config.num_train_timesteps / steps;
    let (runge_kutta, multistep) = if config.skip_prk_steps {
        // the second timestep is evaluated twice to start the method
        let twice = falling.iter().skip(1).take(1).chain(falling.iter().skip(1));
        let list = falling.iter().take(1).chain(twice).copied().collect();
        (Vec::new(), list)
    } else if falling.len() < HISTORY {
        return Err(Error::Usage(format!(
            "PNDM with Runge-Kutta steps needs at least {HISTORY} steps, got {steps}; use more --steps"
        )));
    } else {
        let list = runge_kutta_timesteps(&falling, (stride / 2) as f64);
        (list, falling[HISTORY - 1..].to_vec())
    };
    let mut pndm = Pndm {
        config,
        schedule,
        stride,
        runge_kutta,
        run: Trajectory {
            init_noise_sigma: 1.0,
            registers: SUM + 1,
            steps: steps - span.first,
            ..Trajectory::default()
        },
        kept: 0,
    };
    let timesteps = [pndm.runge_kutta.clone(), multistep].concat();
    // a run that begins later counts its calls from 0 all the same
    for (count, &t) in timesteps.iter().skip(span.first).enumerate() {
        if count < pndm.runge_kutta.len() {
            pndm.runge_kutta(count, t);
        } else {
            pndm.multistep(count, t);
        }
    }
    for call in &mut pndm.run.calls {
        call.step += span.first;
    }
    Ok(pndm.run)
}

/// Four calls for each of the first three steps: at its timestep, twice in the middle, and at the next one.
fn runge_kutta_timesteps(falling: &[f64], half: f64) -> Vec<f64> {
    falling[..HISTORY]
        .windows(2)
        .flat_map(|pair| [pair[0], pair[1] + half, pair[1] + half, pair[1]])
        .collect()
}

impl Pndm<'_> {
    /// Equation 9 of the paper: from `x` at `t` to `to`, along `prediction`.
    fn transfer(&self, x: Linear, t: f64, to: f64, prediction: Linear) -> Linear {
        let (a, b) = (
            alpha_bar_at(self.schedule, t),
            alpha_bar_to(self.config, self.schedule, to),
        );
        let epsilon = match self.config.prediction {
            Prediction::V => prediction * a.sqrt() + x.clone() * (1.0 - a).sqrt(),
            _ => prediction,
        };
        let denominator = a * (1.0 - b).sqrt() + (a * (1.0 - a) * b).sqrt();
        x * (b / a).sqrt() - epsilon * ((b - a) / denominator)
    }

    fn push(&mut self, step: usize, t: f64, assigns: Vec<Assign>) {
        let bar = alpha_bar_at(self.schedule, t);
        let scales = (bar.sqrt(), (1.0 - bar).sqrt());
        let told = (t, scales.1 / scales.0);
        let mut call = plain_call(step, told, scales, self.config.prediction);
        call.then = assigns;
        self.run.calls.push(call);
    }

    /// The register of the prediction made `age` predictions ago.
    fn past(&self, age: usize) -> Linear {
        saved((self.kept - 1 - age) % HISTORY)
    }

    /// Adams-Bashforth of the order that the history allows. Where it starts the method, the second call makes the first step again with
    /// the mean of both ends.
    fn multistep(&mut self, count: usize, t: f64) {
        let stride = self.stride as f64;
        let step = match self.runge_kutta.len() {
            0 => count.saturating_sub(1),
            calls => count - calls + calls / 4,
        };
        if count == 1 {
            let mean = (output() + self.past(0)) * 0.5;
            let x = self.transfer(saved(START), t + stride, t, mean);
            return self.push(step, t, vec![x.into(Register::Sample)]);
        }
        let mut assigns = vec![output().into(Register::Saved(self.kept % HISTORY))];
        self.kept += 1;
        if count == 0 {
            assigns.push(sample().into(Register::Saved(START)));
        }
        let e = |age| self.past(age);
        let prediction = match self.kept {
            1 => e(0),
            2 => (e(0) * 3.0 - e(1)) * 0.5,
            3 => (e(0) * 23.0 - e(1) * 16.0 + e(2) * 5.0) * (1.0 / 12.0),
            _ => (e(0) * 55.0 - e(1) * 59.0 + e(2) * 37.0 - e(3) * 9.0) * (1.0 / 24.0),
        };
        let x = self.transfer(sample(), t, t - stride, prediction);
        assigns.push(x.into(Register::Sample));
        self.push(step, t, assigns);
    }

    /// One of four evaluations of a step: at its beginning, twice after half of it, at its end. Steps are from the timesteps at which the
    /// whole run has its Runge-Kutta steps, wherever this one began.
    fn runge_kutta(&mut self, count: usize, t: f64) {
        let half = (self.stride / 2) as f64;
        let from = self.runge_kutta[count / 4 * 4];
        let to = if count % 2 == 1 { t } else { t - half };
        let (sum, start) = (Register::Saved(SUM), Register::Saved(START));
        let mut assigns = Vec::new();
        let (x, prediction) = match count % 4 {
            0 => {
                assigns.push(output().into(Register::Saved(self.kept % HISTORY)));
                self.kept += 1;
                assigns.push(sample().into(start));
                assigns.push((output() * (1.0 / 6.0)).into(sum));
                (sample(), output())
            }
            3 => (saved(START), saved(SUM) + output() * (1.0 / 6.0)),
            _ => {
                assigns.push((saved(SUM) + output() * (1.0 / 3.0)).into(sum));
                (saved(START), output())
            }
        };
        let x = self.transfer(x, from, to, prediction);
        assigns.push(x.into(Register::Sample));
        self.push(count / 4, t, assigns);
    }
}
