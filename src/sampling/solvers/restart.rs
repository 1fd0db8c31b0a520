//! Heun's method and what was made of it: Restart (Xu et al., "Restart Sampling for Improving Generative Processes", arXiv 2306.14878, as A1111's
//! `sd_samplers_extra.py` runs it) and Heun++ (ComfyUI `sample_heunpp2`).

use super::super::spacing::karras_f32;
use super::super::trajectory::{Draw, Linear, Register, Trajectory, sample, saved};
use super::Levels;
use super::kdiffusion::{call, derivative};

/// The derivative, the second one, and where the step began.
const FIRST: usize = 0;
const SECOND: usize = 1;
const START: usize = 2;

/// Appends a call at `sigma` for the latents as they are; what follows it takes the derivative there.
fn evaluate(
    run: &mut Trajectory,
    levels: &Levels,
    (step, timestep, sigma): (usize, f64, f64),
    follow: impl FnOnce(Linear) -> Vec<(Linear, Register)>,
) {
    let (mut call, x0) = call(levels, step, (timestep, sigma), &sample());
    for (x, register) in follow(derivative(sample(), x0, sigma)) {
        call.then.push(x.into(register));
    }
    run.calls.push(call);
}

/// Where a long run goes back up: at about this level, to about that one.
const RESTART_AT: f64 = 0.1;
const RESTART_TO: f64 = 2.0;

/// The place of the level nearest to another.
fn nearest(sigmas: &[f64], to: f64) -> usize {
    let distance = |i: &usize| (sigmas[*i] as f32 - to as f32).abs();
    (0..sigmas.len())
        .min_by(|a, b| distance(a).total_cmp(&distance(b)))
        .unwrap_or_default()
}

/// The steps of a run, from level to level. From 20 on, some of the steps asked for are made once (from 36 on, twice) again at low noise,
/// on Karras' curve.
fn restarted(sigmas: &[f64]) -> Vec<(f64, f64)> {
    let steps = sigmas.len() - 1;
    let pairs = |sigmas: &[f64]| -> Vec<(f64, f64)> {
        sigmas.windows(2).map(|pair| (pair[0], pair[1])).collect()
    };
    let (again, times) = match steps {
        0..20 => return pairs(sigmas),
        20..36 => (9, 1),
        _ => (steps / 4, 2),
    };
    let curve =
        |low: f64, high: f64, n: usize| super::super::spacing::to_f32(karras_f32(low, high, n));
    let mut sigmas = curve(sigmas[steps - 1], sigmas[0], steps - again * times);
    sigmas.push(0.0);
    let (low, high) = (nearest(&sigmas, RESTART_AT), nearest(&sigmas, RESTART_TO));
    let mut list = pairs(&sigmas);
    if high < low {
        let back = pairs(&curve(sigmas[low], sigmas[high], again + 1));
        let tail = list.split_off(low);
        for _ in 0..times {
            list.extend(&back);
        }
        list.extend(tail);
    }
    list
}

/// Heun's steps, with noise before each that begins above where the last one ended.
pub(in super::super) fn restart(levels: &Levels, timestep: &dyn Fn(f64) -> f64) -> Trajectory {
    let mut run = levels.trajectory(START + 1);
    let list = restarted(&levels.sigmas);
    run.steps = list.len();
    run.sigmas = list.iter().map(|&(from, _)| from).collect();
    run.sigmas.extend(list.last().map(|&(_, to)| to));
    let mut before = f64::INFINITY;
    for (i, (sigma, next)) in list.into_iter().enumerate() {
        if before < sigma
            && let Some(last) = run.calls.last_mut()
        {
            let draw = Draw {
                factor: (sigma * sigma - before * before).sqrt(),
                between: None,
            };
            last.then.push(sample().into_with(Register::Sample, draw));
        }
        before = next;
        let (start, first) = (Register::Saved(START), Register::Saved(FIRST));
        let length = next - sigma;
        evaluate(&mut run, levels, (i, timestep(sigma), sigma), |d| {
            let x = sample() + saved(FIRST) * length;
            vec![(d, first), (sample(), start), (x, Register::Sample)]
        });
        if next > 0.0 {
            evaluate(&mut run, levels, (i, timestep(next), next), |d| {
                let x = saved(START) + (saved(FIRST) + d) * (length / 2.0);
                vec![(x, Register::Sample)]
            });
        }
    }
    run
}

/// Heun++: a third evaluation one level further on; derivatives count by the level that they are taken at.
pub(in super::super) fn heunpp2(levels: &Levels) -> Trajectory {
    let mut run = levels.trajectory(START + 1);
    let sigmas = &levels.sigmas;
    let (most, last) = (sigmas[0], sigmas.len() - 1);
    let told = |i: usize| levels.timesteps.get(i).copied().unwrap_or_default();
    for (i, sigma, next) in levels.pairs() {
        let length = next - sigma;
        let (start, first) = (Register::Saved(START), Register::Saved(FIRST));
        evaluate(&mut run, levels, (i, told(i), sigma), |d| {
            let x = sample() + saved(FIRST) * length;
            vec![(d, first), (sample(), start), (x, Register::Sample)]
        });
        if i + 1 == last {
            continue;
        }
        let after = sigmas[i + 2];
        if i + 2 == last {
            let share = next / (2.0 * most);
            evaluate(&mut run, levels, (i, told(i + 1), next), |d| {
                let mean = saved(FIRST) * (1.0 - share) + d * share;
                vec![(saved(START) + mean * length, Register::Sample)]
            });
            continue;
        }
        evaluate(&mut run, levels, (i, told(i + 1), next), |d| {
            let x = sample() + saved(SECOND) * (after - next);
            vec![(d, Register::Saved(SECOND)), (x, Register::Sample)]
        });
        let shares = (next / (3.0 * most), after / (3.0 * most));
        evaluate(&mut run, levels, (i, told(i + 2), after), |d| {
            let mean = saved(FIRST) * (1.0 - shares.0 - shares.1)
                + saved(SECOND) * shares.0
                + d * shares.1;
            vec![(saved(START) + mean * length, Register::Sample)]
        });
    }
    run
}
