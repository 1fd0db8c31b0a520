//! Brownian trees and the samplers that draw from them (`fixtures/samplers/make_sde.py`).

use sd_rs::sampling::{
    self, BrownianTree, Call, Generator, NoiseSchedule, Prediction, SchedulerConfig, Slices, Start,
    StepCount, Trajectory,
};
use serde_json::Value;

use crate::samplers::{TOLERANCE, cases, difference, floats, network, report, size};
use crate::samplers_picture::{MASK, N};

fn generator(case: &Value) -> Generator {
    // text, because JSON's readers may take a large number for a fraction
    let seed = match &case["seed"] {
        Value::String(text) => text.parse().unwrap(),
        number => number.as_u64().unwrap(),
    };
    match case["rng"].as_str() {
        Some("nv") => Generator::philox(seed),
        _ => Generator::torch(seed),
    }
}

#[test]
fn brownian_trees_equal_torchsdes() {
    for case in cases("brownian") {
        let number = |value: &Value| value.as_f64().unwrap();
        let (n, ends) = (
            size(&case["n"]),
            (number(&case["low"]), number(&case["high"])),
        );
        let tree = BrownianTree::new(&generator(&case), ends, n);
        for draw in case["draws"].as_array().unwrap() {
            let got = tree.noise(number(&draw["from"]), number(&draw["to"]));
            let got: Vec<f64> = got.into_iter().map(f64::from).collect();
            let m = n.min(6);
            for (got, want) in [(&got[..m], "first"), (&got[n - m..], "last")] {
                let off = difference(got, &floats(&draw[want]));
                assert!(off <= 2e-5, "{off:.1e} {draw} of {}", case["seed"]);
            }
        }
    }
}

fn run(trajectory: &Trajectory, case: &Value) -> Vec<f64> {
    let mut generator = generator(case);
    let noise = generator.clone().normal(N);
    let z = Generator::torch(11).normal(N);
    let tree = trajectory.brownian.map(|brownian| {
        let own = brownian.seed.unwrap_or(generator.seed());
        BrownianTree::new(&generator.reseeded(own), (brownian.low, brownian.high), N)
    });
    let mut draw = |between: Option<(f64, f64)>| match (between, &tree) {
        (Some((from, to)), Some(tree)) => tree.noise(from, to),
        _ => generator.normal(N),
    };
    let masked = case["mask"].as_bool() == Some(true);
    let mut after = |call: &Call, sample: &mut [f64]| {
        for (i, x) in sample.iter_mut().enumerate().filter(|_| masked) {
            let known = call.next.0 * f64::from(z[i]) + call.next.1 * f64::from(noise[i]);
            *x = (1.0 - MASK[i % 3]) * known + MASK[i % 3] * *x;
        }
    };
    let out = trajectory.run_from(
        &z,
        &mut Slices {
            noise: &mut draw,
            model: &mut network,
            after: &mut after,
        },
    );
    out.into_iter().take(12).map(f64::from).collect()
}

fn trajectory(case: &Value) -> Trajectory {
    let steps = size(&case["steps"]);
    let start = |count| match case["strength"].as_f64() {
        Some(strength) => Start::Picture { strength, count },
        None => Start::Noise,
    };
    if let Some(config) = case.get("config") {
        let config = SchedulerConfig::from_json(config).unwrap();
        let start = start(StepCount::Diffusers);
        return sampling::diffusers(&config, steps, None, start).unwrap().0;
    }
    let text = |name: &str| case[name].as_str().unwrap();
    let (flow, levels) = match case["shift"].as_f64() {
        Some(shift) => (true, NoiseSchedule::flow(shift, size(&case["count"]))),
        None => (false, NoiseSchedule::default()),
    };
    let model = sampling::Model {
        levels: &levels,
        prediction: match text("prediction") {
            "v_prediction" => Prediction::V,
            _ => Prediction::Epsilon,
        },
        xl: false,
    };
    let start = start(if flow {
        StepCount::ComfyUi
    } else {
        StepCount::A1111
    });
    let (sampler, schedule) =
        sampling::parse(text("sampler"), Some(text("schedule")), flow).unwrap();
    let run = sampling::by_name(sampler, schedule, steps, &model, start).unwrap();
    assert_eq!(run.sigmas.len(), size(&case["levels"]), "{case}");
    run
}

#[test]
fn stochastic_samplers_draw_from_the_tree_of_each_tool() {
    let cases = cases("sde");
    let fault = |case: &Value| {
        let off = difference(&run(&trajectory(case), case), &floats(&case["final"]));
        (off > TOLERANCE).then(|| format!("{off:.1e}: {case}"))
    };
    let failures: Vec<String> = cases.iter().filter_map(fault).collect();
    report(&failures, cases.len());
}
