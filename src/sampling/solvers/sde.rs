//! Solvers of the stochastic equation: DPM-Solver++ (Lu et al., arXiv 2211.01095) with noise that fills up to each level, as k-diffusion's
//! `sample_dpmpp_sde`, `sample_dpmpp_2m_sde` and `sample_dpmpp_3m_sde` run it with η = 1. On flow models, where α = 1 − σ, by ComfyUI's
//! formulas of these names, of which the others are the case α = 1.

use super::super::prediction::Prediction;
use super::super::trajectory::{Brownian, Draw, Register, Trajectory, sample, saved};
use super::Levels;
use super::kdiffusion::call;

/// The noise level of a flow's α and σ, or of α = 1.
struct Scale {
    flow: bool,
}

impl Scale {
    fn of(levels: &Levels) -> Self {
        Self {
            flow: levels.prediction == Prediction::Flow,
        }
    }

    fn alpha(&self, sigma: f64) -> f64 {
        if self.flow { 1.0 - sigma } else { 1.0 }
    }

    /// ln(α/σ), in f32 as the references have it: times of the Brownian motion are made of it.
    fn lambda(&self, sigma: f64) -> f32 {
        let ratio = sigma as f32 / self.alpha(sigma) as f32;
        -(f64::from(ratio).ln() as f32)
    }

    /// The σ of a λ.
    fn sigma(&self, lambda: f32) -> f64 {
        let exp = |x: f32| f64::from(x).exp() as f32;
        f64::from(if self.flow {
            1.0 / (1.0 + exp(lambda))
        } else {
            exp(-lambda)
        })
    }

    /// The σ/α of a λ.
    fn ratio(lambda: f32) -> f64 {
        f64::from((-f64::from(lambda)).exp() as f32)
    }
}

/// The level to step down to and the noise to add. In f32: at the first steps of wide levels the root is of a difference that f32 does not
/// hold, and the references go by what it makes of that.
fn ancestral(from: f64, to: f64) -> (f64, f64) {
    let (from, to) = (from as f32, to as f32);
    let (square, whole) = (to * to, from * from);
    let up = to.min((square * (whole - square) / whole).max(0.0).sqrt());
    let down = (square - up * up).max(0.0).sqrt();
    (down.into(), up.into())
}

/// The ends of the Brownian motion that a run's noise comes from: the least level above 0 and the most.
pub(in super::super) fn brownian(sigmas: &[f64]) -> Option<Brownian> {
    let above = || sigmas.iter().copied().filter(|&sigma| sigma > 0.0);
    Some(Brownian {
        low: above().reduce(f64::min)?,
        high: above().reduce(f64::max)?,
        seed: None,
    })
}

/// Two evaluations a step, at its beginning and halfway in λ; one for the last. `timestep`: that of a level.
pub(in super::super) fn dpmpp_sde(
    levels: &Levels,
    timestep: &dyn Fn(usize, f64) -> f64,
) -> Trajectory {
    let scale = Scale::of(levels);
    let mut run = levels.trajectory(2);
    for (i, sigma, next) in levels.pairs() {
        let (mut first, x0) = call(levels, i, (levels.timesteps[i], sigma), &sample());
        if next == 0.0 {
            first.then.push(x0.into(Register::Sample));
            run.calls.push(first);
            continue;
        }
        let (from, to) = (scale.lambda(sigma), scale.lambda(next));
        let half = from + (to - from) * 0.5;
        // k-diffusion takes levels by way of λ, ComfyUI as they are
        let visited = |lambda: f32, level: f64| {
            if scale.flow {
                level
            } else {
                scale.sigma(lambda)
            }
        };
        let (start, middle, end) = (visited(from, sigma), scale.sigma(half), visited(to, next));
        // towards an estimate, and up to the level with noise
        let step = |x0, (level, lambda): (f64, f32)| {
            let (down, up) = ancestral(Scale::ratio(from), Scale::ratio(lambda));
            let (alpha, kept) = (scale.alpha(level), down / Scale::ratio(from));
            let x = saved(1) * (alpha / scale.alpha(start) * kept) + x0 * (alpha * (1.0 - kept));
            x.into_with(
                Register::Sample,
                Draw {
                    factor: alpha * up,
                    between: Some((start, level)),
                },
            )
        };
        first.then.push(x0.into(Register::Saved(0)));
        first.then.push(sample().into(Register::Saved(1)));
        first.then.push(step(saved(0), (middle, half)));
        let told = (timestep(i, middle), middle);
        let (mut second, x0) = call(levels, i, told, &sample());
        second.then.push(step(x0, (end, to)));
        run.calls.push(first);
        run.calls.push(second);
    }
    run
}

/// Estimates that are kept.
const HISTORY: usize = 3;

/// How earlier estimates are made use of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Multistep {
    /// The last one, at half a step.
    Midpoint,
    /// The last one, by the integral.
    Heun,
    /// The last two.
    Third,
}

/// One evaluation a step.
pub(in super::super) fn dpmpp_multistep_sde(levels: &Levels, kind: Multistep) -> Trajectory {
    let scale = Scale::of(levels);
    let lambda = |sigma: f64| -(sigma / scale.alpha(sigma)).ln();
    let mut run = levels.trajectory(HISTORY);
    for (i, sigma, next) in levels.pairs() {
        let (mut call, x0) = call(levels, i, (levels.timesteps[i], sigma), &sample());
        if next == 0.0 {
            call.then.push(x0.into(Register::Sample));
            run.calls.push(call);
            continue;
        }
        call.then.push(x0.into(Register::Saved(i % HISTORY)));
        let alpha = scale.alpha(next);
        let h = lambda(next) - lambda(sigma);
        // steps before this one, in units of it
        let part =
            |age: usize| (lambda(levels.sigmas[i + 1 - age]) - lambda(levels.sigmas[i - age])) / h;
        let estimate = |age: usize| saved((i - age) % HISTORY);
        let slope = |age: usize| (estimate(age) - estimate(age + 1)) * (1.0 / part(age + 1));
        let decay = (-2.0 * h).exp_m1();
        let x = sample() * (next / sigma * (-h).exp()) - estimate(0) * (alpha * decay);
        let phi_2 = decay / (2.0 * h) + 1.0;
        let x = match kind {
            _ if i == 0 => x,
            Multistep::Midpoint => x - slope(0) * (0.5 * alpha * decay),
            Multistep::Third if i > 1 => {
                let (r0, r1) = (part(1), part(2));
                let bend = (slope(0) - slope(1)) * (1.0 / (r0 + r1));
                let phi_3 = phi_2 / (2.0 * h) - 0.5;
                x + (slope(0) + bend.clone() * r0) * (alpha * phi_2) - bend * (alpha * phi_3)
            }
            Multistep::Heun | Multistep::Third => x + slope(0) * (alpha * phi_2),
        };
        let draw = Draw {
            factor: next * (-decay).max(0.0).sqrt(),
            between: Some((sigma, next)),
        };
        call.then.push(x.into_with(Register::Sample, draw));
        run.calls.push(call);
    }
    run
}
