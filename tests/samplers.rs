//! Noise levels, trajectories and random numbers against diffusers, k-diffusion and torch, with an analytic model in place of the network.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use sd_rs::error::Error;
use sd_rs::sampling::{
    self, Generator, NoiseSchedule, Prediction, SchedulerConfig, Start, Trajectory,
};
use serde_json::{Value, json};

/// The largest relative difference (of norms) that is let pass; the references in f32 and f64 differ by up to 3e-5.
pub(crate) const TOLERANCE: f64 = 1e-4;

pub(crate) fn cases(name: &str) -> Vec<Value> {
    let path = format!(
        "{}/tests/fixtures/samplers/{name}.json",
        env!("CARGO_MANIFEST_DIR")
    );
    let cases: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    assert!(!cases.is_empty(), "{path} is empty");
    cases
}

pub(crate) fn floats(value: &Value) -> Vec<f64> {
    let list = value.as_array().unwrap();
    list.iter().map(|v| v.as_f64().unwrap()).collect()
}

pub(crate) fn size(value: &Value) -> usize {
    usize::try_from(value.as_u64().unwrap()).unwrap()
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|v| v * v).sum::<f64>().sqrt()
}

pub(crate) fn difference(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    norm(got.iter().zip(want).map(|(a, b)| a - b)) / norm(want.iter().copied()).max(1e-12)
}

/// All of them up to eight, else the first four and the last four, as the fixtures keep lists.
fn ends(list: &[f64]) -> Vec<f64> {
    match list.len() {
        n if n <= 8 => list.to_vec(),
        n => [&list[..4], &list[n - 4..]].concat(),
    }
}

/// The stand-in for the network of `make.py`.
pub(crate) fn network(x: &[f32], t: f64) -> Vec<f32> {
    let t = t as f32;
    x.iter()
        .map(|x| 0.6 * (1.3 * x + 0.001 * t).sin() + 0.2 * x)
        .collect()
}

fn run(trajectory: &Trajectory) -> Vec<f64> {
    let mut generator = Generator::torch(7);
    let out = trajectory.run(&mut || generator.normal(24), &mut network);
    out.into_iter().map(f64::from).collect()
}

pub(crate) fn report(failures: &[String], count: usize) {
    let list = failures.join("\n");
    assert!(
        failures.is_empty(),
        "{} of {count} cases differ:\n{list}",
        failures.len()
    );
}

/// What is wrong with the run of one case of `diffusers.json`.
fn diffusers_fault(case: &Value) -> Option<String> {
    config_fault(case, &config_of(case), None)
}

/// A case's config, its betas written out.
pub(crate) fn config_of(case: &Value) -> Value {
    let mut config = case["config"].clone();
    if config["trained_betas"] == "ramp" {
        let ramp: Vec<f64> = (0..1000).map(|i| 0.0005 + 0.00001 * f64::from(i)).collect();
        config["trained_betas"] = json!(ramp);
    }
    config
}

/// What is wrong with diffusers' run of a config.
fn config_fault(case: &Value, config: &Value, flow: Option<sampling::Flow>) -> Option<String> {
    let steps = size(&case["steps"]);
    let name = format!("{steps} steps of {} ({flow:?})", case["config"]);
    let config = SchedulerConfig::from_json(config).unwrap();
    let (trajectory, warning) = match sampling::diffusers(&config, steps, flow, Start::Noise) {
        Ok(run) => run,
        Err(error) => return Some(format!("{name}: {error}")),
    };
    assert_eq!(warning, None, "{name}");
    let timesteps: Vec<f64> = trajectory.timesteps().collect();
    let (got, want) = (ends(&timesteps), floats(&case["timesteps"]));
    if timesteps.len() != size(&case["calls"])
        || got.iter().zip(&want).any(|(a, b)| (a - b).abs() > 2e-3)
    {
        return Some(format!("{name}: timesteps {got:?}, want {want:?}"));
    }
    let last = difference(&run(&trajectory), &floats(&case["final"]));
    let right = last <= TOLERANCE;
    (!right).then(|| format!("{name}: {last:.1e} (floor {})", case["floor"]))
}

#[test]
fn diffusers_schedulers() {
    let cases = cases("diffusers");
    let failures: Vec<String> = cases.iter().filter_map(diffusers_fault).collect();
    report(&failures, cases.len());
}

/// What is wrong with a run by name.
fn named_fault(case: &Value, levels: &NoiseSchedule, prediction: Prediction) -> Option<String> {
    let text = |name: &str| case[name].as_str().unwrap();
    let (name, schedule, steps) = (text("sampler"), text("schedule"), size(&case["steps"]));
    let (sampler, schedule) = sampling::parse(name, Some(schedule), levels.is_flow()).unwrap();
    let model = sampling::Model {
        levels,
        prediction,
        xl: false,
    };
    let trajectory = sampling::by_name(sampler, schedule, steps, &model, Start::Noise).unwrap();
    assert_eq!(trajectory.sigmas.len(), size(&case["levels"]), "{case}");
    let sigmas = difference(&ends(&trajectory.sigmas), &floats(&case["sigmas"]));
    let last = difference(&run(&trajectory), &floats(&case["final"]));
    let right = sigmas <= 1e-5 && last <= TOLERANCE;
    (!right).then(|| {
        format!("{last:.1e} (sigmas {sigmas:.1e}) {steps} steps of {name}, {schedule:?}, {prediction:?}, {case}")
    })
}

#[test]
fn k_diffusion_samplers_by_name() {
    let cases = cases("kdiffusion");
    let levels = NoiseSchedule::default();
    let fault = |case: &Value| {
        let prediction = match case["prediction"].as_str() {
            Some("epsilon") => Prediction::Epsilon,
            _ => Prediction::V,
        };
        named_fault(case, &levels, prediction)
    };
    let failures: Vec<String> = cases.iter().filter_map(fault).collect();
    report(&failures, cases.len());
}

#[test]
fn diffusers_schedulers_of_flow_models() {
    let cases = cases("flow");
    let fault = |case: &Value| {
        let flow = sampling::Flow {
            patches: size(&case["patches"]),
            gives_levels: case["gives_levels"].as_bool().unwrap(),
        };
        config_fault(case, &case["config"], Some(flow))
    };
    let failures: Vec<String> = cases.iter().filter_map(fault).collect();
    report(&failures, cases.len());
}

#[test]
fn comfyui_samplers_on_flow_models_by_name() {
    let cases = cases("flow_named");
    let fault = |case: &Value| {
        let shift = case["shift"].as_f64().unwrap();
        let levels = NoiseSchedule::flow(shift, size(&case["count"]));
        named_fault(case, &levels, Prediction::Flow)
    };
    let failures: Vec<String> = cases.iter().filter_map(fault).collect();
    report(&failures, cases.len());
}

#[test]
fn samplers_of_consistency_models_by_name() {
    let cases = cases("distilled");
    let levels = NoiseSchedule::default();
    let fault = |case: &Value| named_fault(case, &levels, Prediction::Epsilon);
    let failures: Vec<String> = cases.iter().filter_map(fault).collect();
    report(&failures, cases.len());
}

#[test]
fn what_means_nothing_for_a_model_is_refused_in_words() {
    let refused = |sampler: &str, schedule: &str, levels: &NoiseSchedule| {
        let model = sampling::Model {
            levels,
            prediction: Prediction::Epsilon,
            xl: false,
        };
        let (sampler, schedule) = sampling::parse(sampler, Some(schedule), false).unwrap();
        let error = sampling::by_name(sampler, schedule, 8, &model, Start::Noise).unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)), "{error}");
        error.to_string()
    };
    let flow = NoiseSchedule::flow(3.0, 1000);
    assert!(refused("Euler", "Align Your Steps", &flow).contains("Align Your Steps"));
    assert!(refused("Euler", "Turbo", &flow).contains("Turbo"));
    assert!(refused("TCD", "Simple", &flow).contains("TCD"));
    let continuous = NoiseSchedule::continuous(0.002, 80.0, 0.5);
    assert!(refused("LCM", "Normal", &continuous).contains("LCM"));
}

#[test]
fn a_folder_whose_scheduler_is_for_other_models() {
    let sd3 = Some(sampling::Flow {
        patches: 4096,
        gives_levels: false,
    });
    let read = |config: Value| SchedulerConfig::from_json(&config).unwrap();
    let euler = read(json!({"_class_name": "EulerDiscreteScheduler"}));
    assert!(matches!(
        sampling::diffusers(&euler, 5, sd3, Start::Noise),
        Err(Error::Unsupported(_))
    ));
    let dynamic =
        json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": true});
    assert!(matches!(
        sampling::diffusers(&read(dynamic), 5, None, Start::Noise),
        Err(Error::Unsupported(_))
    ));
    let karras = json!({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": true, "use_karras_sigmas": true});
    assert!(matches!(
        sampling::diffusers(&read(karras), 5, sd3, Start::Noise),
        Err(Error::Unsupported(_))
    ));
    // flow matching's Euler with the shift that the file has takes an unknown one's place
    let novel = json!({"_class_name": "NovelScheduler", "shift": 3.0});
    let (run, warning) = sampling::diffusers(&read(novel), 5, sd3, Start::Noise).unwrap();
    let known = json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0});
    let (known, none) = sampling::diffusers(&read(known), 5, sd3, Start::Noise).unwrap();
    assert!(warning.unwrap().contains("NovelScheduler") && none.is_none());
    assert_eq!(run, known);
}

#[test]
fn torch_cpu_generator() {
    for case in cases("noise") {
        let mut generator = Generator::torch(case["seed"].as_u64().unwrap());
        let mut drawn = Vec::new();
        for count in case["sizes"].as_array().unwrap() {
            drawn = generator
                .normal(size(count))
                .into_iter()
                .map(f64::from)
                .collect();
        }
        let n = drawn.len().min(12);
        for (got, want) in [(&drawn[..n], "first"), (&drawn[drawn.len() - n..], "last")] {
            assert!(
                difference(got, &floats(&case[want])) <= 1e-6,
                "{case}: got {got:?}"
            );
        }
    }
}

#[test]
fn an_unknown_class_is_replaced_and_said_so() {
    let config = SchedulerConfig::from_json(&json!({"_class_name": "NovelScheduler"})).unwrap();
    let (trajectory, warning) = sampling::diffusers(&config, 5, None, Start::Noise).unwrap();
    assert_eq!(trajectory.calls.len(), 6);
    assert!(warning.unwrap().contains("NovelScheduler"));
}

#[test]
fn what_diffusers_cannot_run_is_refused() {
    let refused = |config: Value, steps| {
        let config = SchedulerConfig::from_json(&config).unwrap();
        sampling::diffusers(&config, steps, None, Start::Noise).unwrap_err()
    };
    // ᾱ is 0 at the first step: ε says nothing about x₀
    let config = json!({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": true, "timestep_spacing": "trailing"});
    assert!(matches!(refused(config, 5), Error::Usage(_)));
    let config = json!({"_class_name": "PNDMScheduler", "prediction_type": "sample"});
    assert!(matches!(refused(config, 5), Error::Unsupported(_)));
    let config =
        json!({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"});
    assert!(matches!(refused(config, 5), Error::Usage(_)));
    for steps in [0, 1001] {
        assert!(matches!(refused(json!({}), steps), Error::Usage(_)));
    }
}
