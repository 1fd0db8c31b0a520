//! PNDM: Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds", arXiv 2202.09778 (diffusers `PNDMScheduler`): linear
//! multistep over predictions, after Runge-Kutta steps unless `skip_prk_steps`.

use super::super::config::SchedulerConfig;
use super::super::prediction::Prediction;
use super::super::schedule::NoiseSchedule;
use super::super::spacing;
use super::super::trajectory::{Linear, Register, Trajectory, output, sample, saved};
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
    stride: f64,
    run: Trajectory,
    /// Predictions kept so far.
    kept: usize,
}

pub(in super::super) fn pndm(
    config: &SchedulerConfig,
    schedule: &NoiseSchedule,
    steps: usize,
) -> Result<Trajectory> {
    if config.prediction == Prediction::Sample {
        return Err(Error::Unsupported(
            "PNDM is not defined for models that predict the sample".to_owned(),
        ));
    }
    let mut rising = spacing::timesteps(config, steps, true);
    rising.reverse();
    let stride = config.num_train_timesteps / steps;
    let mut pndm = Pndm {
        config,
        schedule,
        stride: stride as f64,
        run: Trajectory {
            init_noise_sigma: 1.0,
            registers: SUM + 1,
            steps,
            ..Trajectory::default()
        },
        kept: 0,
    };
    if config.skip_prk_steps {
        pndm.multistep_from_scratch(&rising);
    } else if rising.len() < HISTORY {
        return Err(Error::Usage(format!(
            "PNDM with Runge-Kutta steps needs at least {HISTORY} steps, got {steps}; use more --steps"
        )));
    } else {
        pndm.runge_kutta(&rising, stride);
        let rest: Vec<f64> = rising[..rising.len() - 3].iter().rev().copied().collect();
        for (i, &t) in rest.iter().enumerate() {
            pndm.multistep(HISTORY - 1 + i, t);
        }
    }
    Ok(pndm.run)
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

    fn push(&mut self, step: usize, t: f64, assigns: Vec<super::super::trajectory::Assign>) {
        let bar = alpha_bar_at(self.schedule, t);
        let mut call = plain_call(step, t, ((1.0 - bar) / bar).sqrt());
        call.then = assigns;
        self.run.calls.push(call);
    }

    /// The register of the prediction made `age` predictions ago.
    fn past(&self, age: usize) -> Linear {
        saved((self.kept - 1 - age) % HISTORY)
    }

    /// Without Runge-Kutta: the second timestep is evaluated twice to start the method.
    fn multistep_from_scratch(&mut self, rising: &[f64]) {
        let falling: Vec<f64> = rising.iter().rev().copied().collect();
        let Some(&first) = falling.first() else {
            return;
        };
        // the first step, keeping where it began
        self.kept = 1;
        let keep = output().into(Register::Saved(0));
        let start = sample().into(Register::Saved(START));
        let x = self.transfer(sample(), first, first - self.stride, saved(0));
        self.push(0, first, vec![keep, start, x.into(Register::Sample)]);
        if falling.len() == 1 {
            return;
        }
        // the same step again with the mean of both ends
        let second = falling[1];
        let mean = (output() + saved(0)) * 0.5;
        let x = self.transfer(saved(START), second + self.stride, second, mean);
        self.push(0, second, vec![x.into(Register::Sample)]);
        for (i, &t) in falling[1..].iter().enumerate() {
            self.multistep(i + 1, t);
        }
    }

    /// Adams-Bashforth of the order that the history allows.
    fn multistep(&mut self, step: usize, t: f64) {
        let keep = output().into(Register::Saved(self.kept % HISTORY));
        self.kept += 1;
        let e = |age| self.past(age);
        let prediction = match self.kept {
            1 => e(0),
            2 => (e(0) * 3.0 - e(1)) * 0.5,
            3 => (e(0) * 23.0 - e(1) * 16.0 + e(2) * 5.0) * (1.0 / 12.0),
            _ => (e(0) * 55.0 - e(1) * 59.0 + e(2) * 37.0 - e(3) * 9.0) * (1.0 / 24.0),
        };
        let x = self.transfer(sample(), t, t - self.stride, prediction);
        self.push(step, t, vec![keep, x.into(Register::Sample)]);
    }

    /// Three steps of four evaluations each.
    fn runge_kutta(&mut self, rising: &[f64], stride: usize) {
        let half = (stride / 2) as f64;
        let top: Vec<f64> = rising.iter().rev().take(HISTORY).copied().collect();
        for step in 0..HISTORY - 1 {
            let (t, next) = (top[step], top[step + 1]);
            let keep = output().into(Register::Saved(self.kept % HISTORY));
            self.kept += 1;
            // 1: at t, half a step along it
            let x = self.transfer(sample(), t, t - half, self.past(0));
            let begin = vec![
                keep,
                sample().into(Register::Saved(START)),
                (self.past(0) * (1.0 / 6.0)).into(Register::Saved(SUM)),
                x.into(Register::Sample),
            ];
            self.push(step, t, begin);
            // 2: at the middle, half a step from the beginning again; 3: at the middle, a whole step
            let middle = next + half;
            for (told, target) in [(middle, middle), (middle, next)] {
                let to = if target == next { told - half } else { told };
                let add = (saved(SUM) + output() * (1.0 / 3.0)).into(Register::Saved(SUM));
                let x = self.transfer(saved(START), t, to, output());
                self.push(step, told, vec![add, x.into(Register::Sample)]);
            }
            // 4: at the end, a whole step along the mean
            let mean = saved(SUM) + output() * (1.0 / 6.0);
            let x = self.transfer(saved(START), t, next, mean);
            self.push(step, next, vec![x.into(Register::Sample)]);
        }
    }
}
