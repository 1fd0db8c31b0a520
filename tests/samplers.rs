//! Sigma tables and trajectories against diffusers and k-diffusion, with an analytic model in place of the network.

use sd_rs::sampling::{self, Generator, NoiseSchedule, Prediction, SchedulerConfig, Trajectory};
use serde_json::Value;

/// The largest relative difference (of norms) that is let pass; the references in f32 and f64 differ by 3e-6.
const TOLERANCE: f64 = 1e-4;

fn cases(name: &str) -> Vec<Value> {
    let path = format!(
        "{}/tests/fixtures/samplers/{name}.json",
        env!("CARGO_MANIFEST_DIR")
    );
    let text = std::fs::read_to_string(&path).unwrap();
    serde_json::from_str::<Vec<Value>>(&text).unwrap()
}

fn floats(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap())
        .collect()
}

fn difference(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied()).max(1e-12)
}

/// The stand-in for the network of `make.py`.
fn run(trajectory: &Trajectory) -> Vec<f64> {
    let mut generator = Generator::torch(7);
    let mut model = |x: &[f32], t: f64| {
        let t = t as f32;
        x.iter()
            .map(|x| 0.6 * (1.3 * x + 0.001 * t).sin() + 0.2 * x)
            .collect()
    };
    let out = trajectory.run(&mut || generator.normal(24), &mut model);
    out.into_iter().map(f64::from).collect()
}

fn report(failures: &[String], count: usize) {
    assert!(count > 0, "no cases");
    assert!(
        failures.is_empty(),
        "{} of {count} cases differ:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

#[test]
fn diffusers_schedulers() {
    let cases = cases("diffusers");
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|case| {
            let steps = case["steps"].as_u64().unwrap() as usize;
            let config = SchedulerConfig::from_json(&case["config"]).unwrap();
            let (trajectory, warning) = sampling::diffusers(&config, steps).unwrap();
            assert_eq!(warning, None);
            let timesteps: Vec<f64> = trajectory.calls.iter().map(|call| call.timestep).collect();
            let want = floats(&case["timesteps"]);
            let mut config = case["config"].clone();
            config["trained_betas"] = config["trained_betas"].is_array().into();
            if timesteps.len() != want.len() {
                return Some(format!(
                    "{steps} steps, {config}: timesteps {timesteps:?}, want {want:?}"
                ));
            }
            let (times, last) = (
                difference(&timesteps, &want),
                difference(&run(&trajectory), &floats(&case["final"])),
            );
            let right = times <= 1e-5 && last <= TOLERANCE;
            (!right).then(|| format!("{last:.1e} (timesteps {times:.1e}) {steps} steps, {config}"))
        })
        .collect();
    report(&failures, cases.len());
}

#[test]
fn k_diffusion_samplers_by_name() {
    let cases = cases("kdiffusion");
    let levels = NoiseSchedule::default();
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|case| {
            let text = |name: &str| case[name].as_str().unwrap();
            let steps = case["steps"].as_u64().unwrap() as usize;
            let prediction = if text("prediction") == "epsilon" { Prediction::Epsilon } else { Prediction::V };
            let (sampler, schedule) = sampling::parse(text("sampler"), Some(text("schedule"))).unwrap();
            let trajectory = sampling::by_name(sampler, schedule, steps, (&levels, prediction)).unwrap();
            let sigmas = difference(&trajectory.sigmas, &floats(&case["sigmas"]));
            let last = difference(&run(&trajectory), &floats(&case["final"]));
            let right = sigmas <= 1e-5 && last <= TOLERANCE;
            (!right).then(|| {
                let (name, schedule) = (text("sampler"), text("schedule"));
                format!("{last:.1e} (sigmas {sigmas:.1e}) {steps} steps of {name}, {schedule}, {prediction:?}")
            })
        })
        .collect();
    report(&failures, cases.len());
}

#[test]
fn torch_cpu_generator() {
    let cases = cases("noise");
    for case in &cases {
        let mut generator = Generator::torch(case["seed"].as_u64().unwrap());
        let mut last = Vec::new();
        for size in floats(&case["sizes"]) {
            last = generator.normal(size as usize);
        }
        let got: Vec<f64> = last[last.len().saturating_sub(24)..]
            .iter()
            .map(|&v| f64::from(v))
            .collect();
        let want = floats(&case["last"]);
        assert!(difference(&got, &want) <= 1e-6, "{case}: got {got:?}");
    }
    assert!(!cases.is_empty());
}
