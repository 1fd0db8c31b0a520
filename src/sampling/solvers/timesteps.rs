//! A1111's samplers that go by whole timesteps, from the last down to 1, where they stop: DDIM (Song et al., arXiv 2010.02502, η = 0), PLMS
//! (Liu et al., arXiv 2202.09778) and UniPC (Zhao et al., arXiv 2302.04867; its times may be fractions). Latents have unit variance.

use super::super::config::SchedulerConfig;
use super::super::prediction::{Prediction, estimates};
use super::super::schedule::NoiseSchedule;
use super::super::start::Span;
use super::super::trajectory::{Linear, Register, Trajectory, output, sample, saved};
use super::ddim::alpha_bar_at;
use super::unipc::UniPc;
use super::{Space, UnitLevels, plain_call};

/// Timesteps of training, whatever the model says.
const TRAINED: usize = 1000;

/// Every ⌊1000/steps⌋-th timestep from the second, rising; more than `steps` where they do not divide.
fn rising(steps: usize) -> Vec<f64> {
    let stride = (TRAINED / steps.max(1)).max(1);
    let all = (0..TRAINED).step_by(stride);
    all.map(|t| (t + 1).min(TRAINED - 1) as f64).collect()
}

/// A run's timesteps, rising, and that of the level which a picture gets noise for: one above them.
struct Times {
    timesteps: Vec<f64>,
    picture: Option<f64>,
}

impl Times {
    fn new(span: Span, picture: bool) -> Self {
        let mut timesteps = rising(span.steps);
        // `first` leaves one step more to the samplers that go by levels
        let kept = span.steps - 1 - span.first;
        let above = timesteps.get(kept).copied().filter(|_| picture);
        if picture {
            timesteps.truncate(kept);
        }
        Self {
            timesteps,
            picture: above,
        }
    }

    /// A run of as many steps as there are between the timesteps, begun at the picture's level.
    fn trajectory(&self, schedule: &NoiseSchedule, registers: usize) -> Trajectory {
        let bar = self.picture.map(|t| alpha_bar_at(schedule, t));
        Trajectory {
            init_latents: bar.map_or(0.0, f64::sqrt),
            init_noise_sigma: bar.map_or(1.0, |bar| (1.0 - bar).sqrt()),
            registers,
            steps: self.timesteps.len().saturating_sub(1),
            ..Trajectory::default()
        }
    }
}

/// A step between two timesteps, α and σ at both.
struct Step {
    timestep: f64,
    now: (f64, f64),
    next: (f64, f64),
}

/// A run's steps, the noisiest first.
fn steps(times: &Times, schedule: &NoiseSchedule) -> Vec<Step> {
    let place = |t: f64| {
        let bar = alpha_bar_at(schedule, t);
        (bar.sqrt(), (1.0 - bar).sqrt())
    };
    let step = |pair: &[f64]| Step {
        timestep: pair[1],
        now: place(pair[1]),
        next: place(pair[0]),
    };
    times.timesteps.windows(2).rev().map(step).collect()
}

/// Along the estimate of the noise from one level to another.
fn transfer(x: Linear, epsilon: Linear, from: (f64, f64), to: (f64, f64)) -> Linear {
    (x - epsilon.clone() * from.1) * (to.0 / from.0) + epsilon * to.1
}

fn told(timestep: f64, (alpha, sigma): (f64, f64)) -> (f64, f64) {
    (timestep, sigma / alpha)
}

/// DDIM.
pub(in super::super) fn ddim(
    schedule: &NoiseSchedule,
    prediction: Prediction,
    (span, picture): (Span, bool),
) -> Trajectory {
    let times = Times::new(span, picture);
    let mut run = times.trajectory(schedule, 0);
    for (i, step) in steps(&times, schedule).into_iter().enumerate() {
        let Step {
            timestep,
            now,
            next,
        } = step;
        let mut call = plain_call(i, told(timestep, now), now, prediction);
        let (_, epsilon) = estimates(prediction, now, &sample(), &output());
        let x = transfer(sample(), epsilon, now, next);
        call.then.push(x.into(Register::Sample));
        run.calls.push(call);
    }
    run
}

/// Estimates of the noise that are kept, behind them the latents that the first step began at.
const HISTORY: usize = 4;

/// PLMS: the first step is made twice, with the mean of both ends.
pub(in super::super) fn plms(
    schedule: &NoiseSchedule,
    prediction: Prediction,
    (span, picture): (Span, bool),
) -> Trajectory {
    let times = Times::new(span, picture);
    let mut run = times.trajectory(schedule, HISTORY + 1);
    let steps = steps(&times, schedule);
    for (
        i,
        &Step {
            timestep,
            now,
            next,
        },
    ) in steps.iter().enumerate()
    {
        let mut call = plain_call(i, told(timestep, now), now, prediction);
        let (_, epsilon) = estimates(prediction, now, &sample(), &output());
        call.then.push(epsilon.into(Register::Saved(i % HISTORY)));
        let e = |age: usize| saved((i - age) % HISTORY);
        let mean = match i {
            0 => e(0),
            1 => (e(0) * 3.0 - e(1)) * 0.5,
            2 => (e(0) * 23.0 - e(1) * 16.0 + e(2) * 5.0) * (1.0 / 12.0),
            _ => (e(0) * 55.0 - e(1) * 59.0 + e(2) * 37.0 - e(3) * 9.0) * (1.0 / 24.0),
        };
        if i == 0 {
            call.then.push(sample().into(Register::Saved(HISTORY)));
        }
        let x = transfer(sample(), mean, now, next);
        call.then.push(x.into(Register::Sample));
        run.calls.push(call);
        if i == 0 {
            let timestep = times.timesteps[times.timesteps.len() - 2];
            let mut again = plain_call(i, told(timestep, next), next, prediction);
            let (_, epsilon) = estimates(prediction, next, &sample(), &output());
            let mean = (saved(0) + epsilon) * 0.5;
            let x = transfer(saved(HISTORY), mean, now, next);
            again.then.push(x.into(Register::Sample));
            run.calls.push(again);
        }
    }
    run
}

/// The order of A1111's UniPC, which needs as many steps.
pub(in super::super) const UNIPC_ORDER: usize = 3;

/// UniPC of order 3 with B(h) = h, over even times down to the first.
pub(in super::super) fn unipc(
    schedule: &NoiseSchedule,
    prediction: Prediction,
    (span, picture): (Span, bool),
) -> Trajectory {
    let times = Times::new(span, picture);
    let top = match (picture, times.timesteps.last()) {
        (true, Some(&last)) => last,
        _ => TRAINED as f64 - 1.0,
    };
    let count = times.timesteps.len();
    let places: Vec<f64> = (0..=count)
        .map(|i| top * (1.0 - i as f64 / count as f64))
        .collect();
    // ln α is linear between timesteps
    let log_alpha = |t: f64| {
        let low = (t.floor() as usize).min(TRAINED - 2);
        let log = |i: usize| 0.5 * alpha_bar_at(schedule, i as f64).ln();
        log(low) + (t - low as f64) * (log(low + 1) - log(low))
    };
    let levels = UnitLevels {
        sigmas: places
            .iter()
            .map(|&t| (-2.0 * log_alpha(t)).exp_m1().sqrt())
            .collect(),
        timesteps: places[..count].to_vec(),
        space: Space::Unit,
        first: 0,
    };
    let config = SchedulerConfig {
        prediction,
        solver_order: UNIPC_ORDER,
        solver_type: "bh1".to_owned(),
        ..SchedulerConfig::default()
    };
    let begun = times.trajectory(schedule, 0);
    // A1111 takes the velocity for that of the whole timestep
    let velocities = (prediction == Prediction::V).then(|| {
        let bars = places.iter().map(|t| alpha_bar_at(schedule, t.floor()));
        bars.map(|bar| (bar.sqrt(), (1.0 - bar).sqrt())).collect()
    });
    let mut run = UniPc::new(&config, levels, velocities).run();
    (run.init_latents, run.init_noise_sigma) = (begun.init_latents, begun.init_noise_sigma);
    run
}
