//! Stable Diffusion 3 and FLUX.1 of odd sizes against diffusers and transformers, as in `models.rs`: transformers in the UNet's place, T5 beside CLIP.

use candle_core::{Device, Tensor};
use sd_kernels::Graph;
use sd_kernels::cpu::Level;
use sd_kernels::plan::{Feed, Options, Plan, Precision, Store};
use sd_models::denoiser::{Config, Denoiser, Inputs};
use sd_models::{flux, mmdit};
use serde_json::Value;

use crate::models::{CALL, Memory, autoencoder, close, flat, list, tensor, text};
use crate::support::weights::Case;

fn cases(component: &str) -> Vec<(String, Case)> {
    let cases: Vec<_> = Case::names()
        .into_iter()
        .map(|name| (name.clone(), Case::load(&name)))
        .filter(|(_, case)| case.is_dit() && case.components().contains(&component))
        .collect();
    assert!(cases.len() >= 6);
    cases
}

/// The transformer's structure, from its folder.
fn config(case: &Case) -> Config {
    let config = case.config("transformer");
    if config["_class_name"] == "FluxTransformer2DModel" {
        Config::Flux(flux::Config::from_json(config).unwrap())
    } else {
        Config::Mmdit(mmdit::Config::from_json(config).unwrap())
    }
}

/// What one recorded call gives the network, by name.
fn given(config: &Config, case: &Case, call: &Value) -> Vec<(&'static str, Tensor)> {
    let sample = tensor(case.input(text(&call["latents"])));
    let batch = sample.dim(0).unwrap();
    let full = |value: f64| Tensor::full(value as f32, batch, &Device::Cpu).unwrap();
    let mut given = vec![
        ("sample", sample),
        ("timestep", full(call["timestep"].as_f64().unwrap())),
        ("context", tensor(case.input(text(&call["context"])))),
        ("added", tensor(case.input(text(&call["pooled"])))),
    ];
    if let Some(scale) = call["guidance"].as_f64() {
        let guidance = config.embed_guidance(&full(scale).into()).unwrap();
        given.push(("guidance", guidance.into_data().unwrap()));
    }
    given
}

/// The network on these inputs, data or nodes, without the blocks that the call leaves out.
fn predict(
    network: &Denoiser,
    call: &Value,
    given: &[(&str, sd_kernels::Tensor)],
) -> sd_kernels::Tensor {
    let of = |name: &str| given.iter().find(|(n, _)| *n == name).map(|(_, x)| x);
    let inputs = Inputs {
        sample: of("sample").unwrap(),
        timestep: of("timestep").unwrap(),
        context: of("context").unwrap(),
        added: of("added"),
        guidance: of("guidance"),
    };
    let skipped: Vec<usize> = list(&call["skip_layers"])
        .iter()
        .map(|i| i.as_u64().unwrap() as usize)
        .collect();
    match network {
        Denoiser::Mmdit(network) => network.forward(&inputs, &skipped),
        network => network.forward(&inputs),
    }
    .unwrap()
}

/// The same through a plan, as a run has it: times known before, the text constant.
fn planned(network: &Denoiser, call: &Value, given: &[(&'static str, Tensor)]) -> Tensor {
    let graph = Graph::new();
    let nodes: Vec<_> = given
        .iter()
        .map(|(name, x)| (*name, graph.input(name, x.dims())))
        .collect();
    let output = predict(network, call, &nodes);
    let options = Options {
        timestep: Some("timestep"),
        constant: vec!["context", "added", "guidance"],
        ..Options::new(Level::current(), Precision::F32)
    };
    let mut plan = Plan::compile(&graph, &output, &options, &Store::default()).unwrap();
    let time = call["timestep"].as_f64().unwrap() as f32;
    plan.prepare_timesteps(&[7.5, time]).unwrap();
    let values: Vec<_> = given.iter().map(|(name, x)| (*name, flat(x))).collect();
    let feeds: Vec<Feed<'_>> = values
        .iter()
        .map(|(name, values)| Feed { name, values })
        .collect();
    let mut out = Vec::new();
    // what is kept from one call must not change the next
    for _ in 0..2 {
        plan.run(&feeds, &mut out).unwrap();
    }
    Tensor::from_vec(out, plan.output_shape(), &Device::Cpu).unwrap()
}

#[test]
fn transformer_calls() {
    for (name, case) in cases("transformer") {
        let config = config(&case);
        let weights = Memory::weights(&case, "transformer");
        let network = Denoiser::load(&weights, &config);
        weights.finish().unwrap_or_else(|e| panic!("{name}: {e}"));
        let expected = case.expected();
        let calls = list(&case.record["transformer_calls"]);
        assert!(calls.len() >= 3);
        for call in calls {
            let key = text(&call["expected"]);
            let given = given(&config, &case, call);
            let data: Vec<_> = given.iter().map(|(n, x)| (*n, x.clone().into())).collect();
            // float32 keeps too few digits of a sinusoid of 30000: the reference's own last digit of a frequency moves its angle by 3e-3
            let strong = call["guidance"].as_f64().is_some_and(|scale| scale > 10.0);
            let bound = if strong { 1e-4 } else { CALL };
            let eager = predict(&network, call, &data).into_data().unwrap();
            close(&format!("{name} {key}"), &eager, &expected[key], bound);
            let planned = planned(&network, call, &given);
            let what = format!("{name} {key}, planned");
            close(&what, &planned, &expected[key], bound);
        }
    }
}

#[test]
fn autoencoders_of_sixteen_channels() {
    for (name, case) in cases("vae") {
        autoencoder(&name, &case);
    }
}
