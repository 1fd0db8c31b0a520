//! Runs that begin at a picture: where, with which history, at which levels between their calls. The analytic model of `samplers` stands in
//! for the network (`fixtures/samplers/make_picture.py`).

use sd_rs::error::Error;
use sd_rs::sampling::{
    self, Call, Flow, Generator, NoiseSchedule, Prediction, SchedulerConfig, Slices, Start,
    StepCount, Trajectory,
};
use serde_json::{Value, json};

use crate::samplers::{TOLERANCE, cases, config_of, difference, floats, network, report, size};

/// Elements of the latents; fixtures keep the first twelve.
pub(crate) const N: usize = 24;
/// What is repainted: all, half, or nothing of an element.
pub(crate) const MASK: [f64; 3] = [0.0, 1.0, 0.5];

/// The result, and the estimate of the clean latents at call `at`.
fn run(trajectory: &Trajectory, masked: bool, at: usize) -> (Vec<f64>, Vec<f64>) {
    let z = Generator::torch(11).normal(N);
    let noise = Generator::torch(7).normal(N);
    let mut generator = Generator::torch(7);
    let mut calls = trajectory.calls.iter();
    let (mut count, mut x0) = (0, Vec::new());
    let mut model = |x: &[f32], t: f64| {
        let output = network(x, t);
        let (seen, predicted) = calls.next().unwrap().denoised;
        if count == at {
            let value = |(x, y): (&f32, &f32)| seen * f64::from(*x) + predicted * f64::from(*y);
            x0 = x.iter().zip(&output).take(12).map(value).collect();
        }
        count += 1;
        output
    };
    let mut after = |call: &Call, sample: &mut [f64]| {
        for (i, x) in sample.iter_mut().enumerate().filter(|_| masked) {
            let known = call.next.0 * f64::from(z[i]) + call.next.1 * f64::from(noise[i]);
            *x = (1.0 - MASK[i % 3]) * known + MASK[i % 3] * *x;
        }
    };
    let mut slices = Slices {
        noise: &mut |_| generator.normal(N),
        model: &mut model,
        after: &mut after,
    };
    let out = trajectory.run_from(&z, &mut slices);
    (out.into_iter().take(12).map(f64::from).collect(), x0)
}

fn diffusers_fault(case: &Value) -> Option<String> {
    let (steps, strength) = (size(&case["steps"]), case["strength"].as_f64().unwrap());
    let flag = |name: &str| case[name].as_bool().unwrap();
    let name = format!("{case}");
    let flow = case["patches"].as_u64().map(|_| Flow {
        patches: size(&case["patches"]),
        gives_levels: flag("gives_levels"),
    });
    let start = Start::Picture {
        strength,
        count: if flag("distilled") {
            StepCount::Distilled
        } else {
            StepCount::Diffusers
        },
    };
    let config = SchedulerConfig::from_json(&config_of(case)).unwrap();
    let trajectory = match sampling::diffusers(&config, steps, flow, start) {
        Ok((run, _)) => run,
        Err(error) => return Some(format!("{error}: {name}")),
    };
    let first = trajectory.timesteps().next().unwrap();
    if trajectory.calls.len() != size(&case["calls"])
        || (first - case["first"].as_f64().unwrap()).abs() > 2e-3
    {
        let calls = trajectory.calls.len();
        return Some(format!("{calls} calls from {first}: {name}"));
    }
    let at = case["at"]
        .as_u64()
        .map_or(usize::MAX, |_| size(&case["at"]));
    let (out, x0) = run(&trajectory, flag("mask"), at);
    let last = difference(&out, &floats(&case["final"]));
    let clean = match case.get("x0") {
        Some(want) => difference(&x0, &floats(want)),
        None => 0.0,
    };
    let right = last <= TOLERANCE && clean <= TOLERANCE;
    (!right).then(|| format!("{last:.1e}, estimate {clean:.1e}: {name}"))
}

#[test]
fn diffusers_schedulers_from_a_picture() {
    let cases = cases("picture");
    let failures: Vec<String> = cases.iter().filter_map(diffusers_fault).collect();
    report(&failures, cases.len());
}

/// A run of a case by name, its prediction's levels and all.
fn by_name(case: &Value, start: Start) -> sd_rs::Result<Trajectory> {
    let text = |name: &str| case[name].as_str().unwrap();
    let flow = text("prediction") == "flow";
    let levels = if flow {
        NoiseSchedule::flow(3.0, 1000)
    } else {
        NoiseSchedule::default()
    };
    let model = sampling::Model {
        levels: &levels,
        prediction: match text("prediction") {
            "v" | "v_prediction" => Prediction::V,
            _ => Prediction::Epsilon,
        },
        xl: false,
    };
    let (sampler, schedule) =
        sampling::parse(text("sampler"), Some(text("schedule")), flow).unwrap();
    sampling::by_name(sampler, schedule, size(&case["steps"]), &model, start)
}

/// What is wrong with a run of this trajectory.
fn run_fault(case: &Value, trajectory: &Trajectory) -> Option<String> {
    let (last, _) = run(trajectory, false, usize::MAX);
    let last = difference(&last, &floats(&case["final"]));
    (last > TOLERANCE).then(|| format!("{last:.1e}: {case}"))
}

fn named_fault(case: &Value) -> Option<String> {
    let start = Start::Picture {
        strength: case["strength"].as_f64().unwrap(),
        count: match case["count"].as_str().unwrap() {
            "a1111" => StepCount::A1111,
            "exact" => StepCount::Exact,
            _ => StepCount::ComfyUi,
        },
    };
    let trajectory = match by_name(case, start) {
        Ok(run) => run,
        Err(error) => return Some(format!("{error}: {case}")),
    };
    if trajectory.sigmas.len() != size(&case["levels"]) {
        return Some(format!("{} levels: {case}", trajectory.sigmas.len()));
    }
    run_fault(case, &trajectory)
}

#[test]
fn k_diffusion_samplers_from_a_picture_as_each_tool_counts() {
    let cases = cases("picture_named");
    let failures: Vec<String> = cases.iter().filter_map(named_fault).collect();
    report(&failures, cases.len());
}

/// What is wrong with a case of `extra.json`.
fn extra_fault(case: &Value) -> Option<String> {
    let count = match case["prediction"].as_str() {
        Some("flow") => StepCount::ComfyUi,
        _ => StepCount::A1111,
    };
    let start = match case["strength"].as_f64() {
        Some(strength) => Start::Picture { strength, count },
        None => Start::Noise,
    };
    match by_name(case, start) {
        Ok(trajectory) => run_fault(case, &trajectory),
        Err(error) => Some(format!("{error}: {case}")),
    }
}

#[test]
fn samplers_of_a1111_and_comfyui_that_k_diffusion_has_not() {
    let cases = cases("extra");
    let failures: Vec<String> = cases.iter().filter_map(extra_fault).collect();
    report(&failures, cases.len());
}

#[test]
fn levels_between_calls_are_joined() {
    let start = Start::Picture {
        strength: 0.6,
        count: StepCount::A1111,
    };
    let levels = NoiseSchedule::default();
    let model = sampling::Model {
        levels: &levels,
        prediction: Prediction::V,
        xl: false,
    };
    for name in ["Euler", "Heun", "DPM2 a", "DPM++ 2S a", "LCM", "TCD"] {
        let (sampler, schedule) = sampling::parse(name, None, false).unwrap();
        let run = sampling::by_name(sampler, schedule, 10, &model, start).unwrap();
        assert_eq!((run.init_latents, run.init_noise_sigma), run.calls[0].now);
        assert_eq!(run.calls.last().unwrap().next, (1.0, 0.0));
        for pair in run.calls.windows(2) {
            assert_eq!(pair[0].next, pair[1].now, "{name}");
        }
        for call in &run.calls {
            // latents that are z with noise, and a network that sees through them
            let (z, noise) = (0.7, -1.3);
            let x = call.now.0 * z + call.now.1 * noise;
            let norm = call.sigma.hypot(1.0);
            let velocity = (noise - call.sigma * z) / norm;
            let x0 = call.denoised.0 * x * call.scale + call.denoised.1 * velocity;
            assert!((x0 - z).abs() < 0.02, "{name}: {x0}");
        }
    }
}

#[test]
fn strengths_that_leave_nothing_are_refused() {
    let config = json!({"_class_name": "EulerDiscreteScheduler"});
    let config = SchedulerConfig::from_json(&config).unwrap();
    for strength in [0.0, 0.04, -0.1, 1.5] {
        let start = Start::Picture {
            strength,
            count: StepCount::Diffusers,
        };
        let refused = sampling::diffusers(&config, 20, None, start).unwrap_err();
        assert!(matches!(refused, Error::Usage(_)), "{refused}");
        assert!(refused.to_string().contains("--strength"), "{refused}");
    }
    let whole = sampling::diffusers(&config, 20, None, Start::Noise)
        .unwrap()
        .0;
    assert_eq!((whole.init_latents, whole.calls.len()), (0.0, 20));
}
