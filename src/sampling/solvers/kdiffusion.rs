//! Solvers of Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364, and their kin, in
//! σ space (k-diffusion `sampling.py`; diffusers' Euler, Euler ancestral, Heun and LMS schedulers).

use super::super::prediction::{Prediction, denoised};
use super::super::trajectory::{
    Assign, Call, Linear, Register, Trajectory, input, output, sample, saved,
};
use super::{Levels, lambda};

/// The call at level `sigma` for latents `x`, and the estimate of the clean latents after it.
pub(super) fn call(
    levels: &Levels,
    step: usize,
    (timestep, sigma): (f64, f64),
    x: &Linear,
) -> (Call, Linear) {
    let flow = levels.prediction == Prediction::Flow;
    let norm = if flow { 1.0 } else { sigma.hypot(levels.data) };
    let place = (sigma, levels.data);
    let seen = input() * norm;
    let call = Call {
        timestep,
        sigma,
        step,
        input: (x.clone() * (1.0 / norm)).combo(),
        then: Vec::new(),
        scale: 1.0 / norm,
        denoised: denoised(levels.prediction, place, &seen, &output()).of_call(),
        now: (if flow { 1.0 - sigma } else { 1.0 }, sigma),
        next: (1.0, 0.0),
    };
    (call, denoised(levels.prediction, place, x, &output()))
}

/// `(x − denoised)/σ`.
pub(super) fn derivative(x: Linear, denoised: Linear, sigma: f64) -> Linear {
    (x - denoised) * (1.0 / sigma)
}

/// Algorithm 2 without its correction: one evaluation a step.
pub(in super::super) fn euler(levels: &Levels) -> Trajectory {
    let mut run = levels.trajectory(0);
    for (i, sigma, next) in levels.pairs() {
        let (mut call, x0) = call(levels, i, (levels.timesteps[i], sigma), &sample());
        let x = sample() + derivative(sample(), x0, sigma) * (next - sigma);
        call.then.push(x.into(Register::Sample));
        run.calls.push(call);
    }
    run
}

/// The level to step down to and the noise to add, for a step from `from` to `to` with η = 1.
pub(super) fn ancestral(from: f64, to: f64) -> (f64, f64) {
    let up = to.min(
        (to * to * (from * from - to * to) / (from * from))
            .max(0.0)
            .sqrt(),
    );
    ((to * to - up * up).max(0.0).sqrt(), up)
}

/// Euler with fresh noise. `draws_at_end`: diffusers draws noise for the last step too, where its factor is 0.
pub(in super::super) fn euler_ancestral(levels: &Levels, draws_at_end: bool) -> Trajectory {
    let mut run = levels.trajectory(0);
    for (i, sigma, next) in levels.pairs() {
        let (down, up) = ancestral(sigma, next);
        let (mut call, x0) = call(levels, i, (levels.timesteps[i], sigma), &sample());
        let x = sample() + derivative(sample(), x0, sigma) * (down - sigma);
        call.then.push(if next > 0.0 || draws_at_end {
            x.into_with_noise(Register::Sample, up)
        } else {
            x.into(Register::Sample)
        });
        run.calls.push(call);
    }
    run
}

/// Puts the estimate that follows `call` into register 1 and limits it there.
fn limited(call: &mut Call, x0: Linear, clip: Option<f64>) -> Linear {
    let Some(range) = clip else { return x0 };
    let register = Register::Saved(1);
    call.then.push(x0.into(register));
    call.then.push(Assign::Clamp {
        register,
        low: -range,
        high: range,
    });
    saved(1)
}

/// Algorithm 2: two evaluations a step, one for the last.
pub(in super::super) fn heun(levels: &Levels) -> Trajectory {
    // registers: the derivative, the limited estimate, where the step began
    let mut run = levels.trajectory(3);
    let start = Register::Saved(2);
    for (i, sigma, next) in levels.pairs() {
        let (mut first, x0) = call(levels, i, (levels.timesteps[i], sigma), &sample());
        let x0 = limited(&mut first, x0, levels.clip);
        let d = derivative(sample(), x0, sigma);
        if next == 0.0 {
            first
                .then
                .push((sample() + d * -sigma).into(Register::Sample));
            run.calls.push(first);
            continue;
        }
        first.then.push(d.into(Register::Saved(0)));
        first.then.push(sample().into(start));
        let x2 = sample() + saved(0) * (next - sigma);
        first.then.push(x2.into(Register::Sample));
        let timestep = levels.timesteps.get(i + 1).copied().unwrap_or_default();
        let (mut second, x0) = call(levels, i, (timestep, next), &sample());
        let x0 = limited(&mut second, x0, levels.clip);
        let d2 = derivative(sample(), x0, next);
        let x = saved(2) + (saved(0) + d2) * ((next - sigma) / 2.0);
        second.then.push(x.into(Register::Sample));
        run.calls.push(first);
        run.calls.push(second);
    }
    run
}

/// Order of the linear multistep method.
const LMS_ORDER: usize = 4;

/// Adams–Bashforth over uneven levels: the last derivatives, weighted by the integrals of their Lagrange polynomials.
pub(in super::super) fn lms(levels: &Levels) -> Trajectory {
    let mut run = levels.trajectory(LMS_ORDER);
    for (i, sigma, next) in levels.pairs() {
        let (mut call, x0) = call(levels, i, (levels.timesteps[i], sigma), &sample());
        call.then
            .push(derivative(sample(), x0, sigma).into(Register::Saved(i % LMS_ORDER)));
        let order = (i + 1).min(LMS_ORDER);
        let x = if next == 0.0 && levels.prediction == Prediction::Flow {
            // the program that runs flows so ends in a plain step
            sample() - saved(i % LMS_ORDER) * sigma
        } else {
            // diffusers weighs by the order of the whole run also where it began later and has fewer derivatives
            let kept = (i - levels.first + 1).min(order);
            (0..kept).fold(sample(), |x, j| {
                x + saved((i - j) % LMS_ORDER) * lms_weight(&levels.sigmas, order, i, j)
            })
        };
        call.then.push(x.into(Register::Sample));
        run.calls.push(call);
    }
    run
}

/// ∫ over step `i` of the Lagrange polynomial that is 1 at level `i − j` and 0 at the other `order − 1`: exact by Gauss–Legendre,
/// four points integrating polynomials up to degree 7.
fn lms_weight(sigmas: &[f64], order: usize, i: usize, j: usize) -> f64 {
    const POINTS: [(f64, f64); 4] = [
        (-0.861_136_311_594_052_6, 0.347_854_845_137_453_85),
        (-0.339_981_043_584_856_3, 0.652_145_154_862_546_1),
        (0.339_981_043_584_856_3, 0.652_145_154_862_546_1),
        (0.861_136_311_594_052_6, 0.347_854_845_137_453_85),
    ];
    let (middle, half) = (
        (sigmas[i + 1] + sigmas[i]) / 2.0,
        (sigmas[i + 1] - sigmas[i]) / 2.0,
    );
    let polynomial = |tau: f64| -> f64 {
        (0..order)
            .filter(|&k| k != j)
            .map(|k| (tau - sigmas[i - k]) / (sigmas[i - j] - sigmas[i - k]))
            .product()
    };
    POINTS
        .iter()
        .map(|&(x, w)| w * polynomial(middle + half * x))
        .sum::<f64>()
        * half
}

/// DPM-Solver++(2M), Lu et al., arXiv 2211.01095: one evaluation a step, the last denoised kept.
pub(in super::super) fn dpmpp_2m(levels: &Levels) -> Trajectory {
    let mut run = levels.trajectory(2);
    for (i, sigma, next) in levels.pairs() {
        let (mut call, x0) = call(levels, i, (levels.timesteps[i], sigma), &sample());
        let (now, before) = (i % 2, (i + 1) % 2);
        call.then.push(x0.into(Register::Saved(now)));
        let h = lambda(next) - lambda(sigma);
        let d = if i == 0 || next == 0.0 {
            saved(now)
        } else {
            let r = (lambda(sigma) - lambda(levels.sigmas[i - 1])) / h;
            saved(now) * (1.0 + 0.5 / r) - saved(before) * (0.5 / r)
        };
        let x = sample() * (next / sigma) - d * (-h).exp_m1();
        call.then.push(x.into(Register::Sample));
        run.calls.push(call);
    }
    run
}

/// DPM-Solver++(2S) with ancestral noise: two evaluations a step, one for the last.
pub(in super::super) fn dpmpp_2s_ancestral(
    levels: &Levels,
    timestep: &dyn Fn(f64) -> f64,
) -> Trajectory {
    let mut run = levels.trajectory(1);
    for (i, sigma, next) in levels.pairs() {
        let (down, up) = ancestral(sigma, next);
        let (mut first, x0) = call(levels, i, (levels.timesteps[i], sigma), &sample());
        let finish = |x: Linear| -> Assign {
            if next > 0.0 {
                x.into_with_noise(Register::Sample, up)
            } else {
                x.into(Register::Sample)
            }
        };
        if down == 0.0 {
            let x = sample() + derivative(sample(), x0, sigma) * -sigma;
            first.then.push(finish(x));
            run.calls.push(first);
            continue;
        }
        first.then.push(x0.into(Register::Saved(0)));
        let h = lambda(down) - lambda(sigma);
        let middle = (-(lambda(sigma) + h / 2.0)).exp();
        let x2 = sample() * (middle / sigma) - saved(0) * (-h / 2.0).exp_m1();
        let (mut second, x0) = call(levels, i, (timestep(middle), middle), &x2);
        let x = sample() * (down / sigma) - x0 * (-h).exp_m1();
        second.then.push(finish(x));
        run.calls.push(first);
        run.calls.push(second);
    }
    run
}
