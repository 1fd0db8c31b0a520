//! Stable Diffusion XL and its kin of odd sizes against diffusers and transformers, as in `models.rs`.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use sd_models::{clip, unet, vae};
use sd_rs::checkpoint::{Checkpoint, Family, detect};
use sd_rs::pipeline::{Control, Engine, Plan, Request, SizeConditioning};
use sd_rs::text::Syntax;
use serde_json::Value;

use crate::models::{CALL, Memory, RUN, close, flat, list, tensor, text};
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm, SingleForm, Values};

fn cases() -> Vec<(String, Case)> {
    let cases: Vec<_> = Case::names()
        .into_iter()
        .map(|name| (name.clone(), Case::load(&name)))
        .filter(|(_, case)| case.is_sdxl())
        .collect();
    assert!(cases.len() >= 5);
    cases
}

fn numbers(value: &Value) -> Vec<f32> {
    let numbers = list(value).iter();
    numbers.map(|n| n.as_f64().unwrap() as f32).collect()
}

/// What diffusers makes of a text's vector and the numbers of each row.
fn added(config: &unet::Config, case: &Case, call: &Value) -> Tensor {
    let pooled = tensor(case.input(text(&call["text_embeds"])));
    let rows: Vec<Tensor> = list(&call["time_ids"])
        .iter()
        .map(|row| {
            let numbers = Tensor::new(numbers(row), &Device::Cpu).unwrap();
            let embedded = config.embed_numbers(&numbers.into()).unwrap();
            let embedded = embedded.into_data().unwrap();
            embedded.flatten_all().unwrap().unsqueeze(0).unwrap()
        })
        .collect();
    Tensor::cat(&[&pooled, &Tensor::cat(&rows, 0).unwrap()], 1).unwrap()
}

#[test]
fn unets_with_a_vector_beside_the_time() {
    for (name, case) in cases() {
        let config = unet::Config::from_json(case.config("unet")).unwrap();
        let weights = Memory::weights(&case, "unet");
        let network = unet::UNet::load(&weights, &config);
        weights.finish().unwrap_or_else(|e| panic!("{name}: {e}"));
        let expected = case.expected();
        for call in list(&case.record["unet_calls"]) {
            let latents = tensor(case.input(text(&call["latents"])));
            let timestep = call["timestep"].as_f64().unwrap() as f32;
            let timestep = Tensor::full(timestep, latents.dim(0).unwrap(), &Device::Cpu).unwrap();
            let context = tensor(case.input(text(&call["context"])));
            let got = network.forward(&unet::Inputs {
                sample: &latents.into(),
                timestep: &timestep.into(),
                context: &context.into(),
                added: Some(&added(&config, &case, call).into()),
                guidance: None,
                label: None,
                reference: None,
                steering: unet::Steering::default(),
            });
            let key = text(&call["expected"]);
            let got = got.unwrap().into_data().unwrap();
            close(&format!("{name} {key}"), &got, &expected[key], CALL);
        }
    }
}

#[test]
fn two_towers_and_a_whole_texts_vector() {
    for (name, case) in cases() {
        let expected = case.expected();
        let calls = &case.record["text_calls"];
        let rows: Vec<u32> = numbers(&calls["rows"]).iter().map(|&r| r as u32).collect();
        let rows = Tensor::new(rows, &Device::Cpu).unwrap();
        for (tower, call) in list(&calls["prompts"]).iter().flat_map(towers) {
            let config = clip::Config::from_json(case.config(tower)).unwrap();
            let weights = Memory::weights(&case, tower);
            // transformers' class with a projection has its prefix, the one without has lost it
            let nested = config.projection.is_some();
            let inside = if nested {
                weights.at("text_model")
            } else {
                weights.clone()
            };
            let plain = clip::Config {
                projection: None,
                ..config.clone()
            };
            let network = clip::TextEncoder::load(&inside, &plain);
            let ids: Vec<u32> = numbers(&call["tokens"]).iter().map(|&t| t as u32).collect();
            let end = ids.iter().position(|&id| id == 49407).unwrap();
            let ids = Tensor::new(ids, &Device::Cpu)
                .unwrap()
                .unsqueeze(0)
                .unwrap();
            for state in list(&call["states"]) {
                // diffusers' null leaves out one layer, its 1 two
                let skip = state["clip_skip"].as_u64().unwrap_or(0) as usize + 1;
                let key = text(&state["expected"]);
                let states = network.hidden(&ids.clone().into(), skip).unwrap();
                let states = states.into_data().unwrap().squeeze(0).unwrap();
                let got = states.index_select(&rows, 0).unwrap();
                close(&format!("{name} {key}"), &got, &expected[key], CALL);
            }
            if let Some(key) = call["pooled"].as_str() {
                let hidden = network.hidden(&ids.clone().into(), 1).unwrap();
                let last = network.finish(&hidden, 1).unwrap().into_data().unwrap();
                let last = last.narrow(1, end, 1).unwrap();
                let projection = weights.param(
                    "text_projection.weight",
                    &[config.projection.unwrap(), config.width],
                );
                let linear = sd_kernels::Op::Linear {
                    weight: projection,
                    bias: None,
                };
                weights.finish().unwrap();
                let got = sd_kernels::ops::apply(linear, &[&last.into()]).unwrap();
                let got = got.into_data().unwrap().flatten_all().unwrap();
                let want = Values {
                    shape: vec![got.elem_count()],
                    data: expected[key].data.clone(),
                };
                close(&format!("{name} {key}"), &got, &want, CALL);
            }
        }
    }
}

/// The towers of a prompt's record, with what each is given and gives.
fn towers(prompt: &Value) -> Vec<(&str, &Value)> {
    let towers = prompt["towers"].as_object().unwrap();
    towers
        .iter()
        .map(|(name, call)| (name.as_str(), call))
        .collect()
}

#[test]
fn autoencoders() {
    for (name, case) in cases() {
        let weights = Memory::weights(&case, "vae");
        let config = vae::Config::from_json(case.config("vae")).unwrap();
        let decoder = vae::Decoder::load(&weights, &config);
        weights.finish().unwrap();
        let expected = case.expected();
        let calls = &case.record["vae_calls"];
        let decode = |latents: Tensor| {
            let picture = decoder.forward(&latents.into()).unwrap();
            picture.into_data().unwrap()
        };
        // the reference's latents are already divided by the factor, ours are as the UNet knows them
        let latents = tensor(case.input(text(&calls["decode"]["latents"])));
        let picture = decode((latents.clone() * config.scaling_factor).unwrap());
        let key = text(&calls["decode"]["expected"]);
        close(&format!("{name} decoded"), &picture, &expected[key], CALL);
        let Some(key) = calls["decode_scaled"]["expected"].as_str() else {
            assert!(config.spread.is_none(), "{name}");
            continue;
        };
        let (_, _, h, w) = latents.dims4().unwrap();
        let mut values = flat(&latents);
        config.restore(&mut values, h * w);
        let restored = Tensor::from_vec(values, latents.shape(), &Device::Cpu).unwrap();
        let picture = decode(restored);
        close(&format!("{name} restored"), &picture, &expected[key], CALL);
    }
}

fn load(path: &Path) -> Engine {
    let checkpoint = Checkpoint::open(path).unwrap();
    let engine = Engine::load(&checkpoint, &Device::Cpu, DType::F32)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(engine.warnings(), &[] as &[String]);
    engine
}

fn latents(engine: &Engine, request: &Request) -> Tensor {
    let plan = Plan::new(engine, request).unwrap();
    let mut latents = None;
    let mut finish = |batch: sd_rs::pipeline::Batch| {
        latents = Some(batch.latents);
        Ok(())
    };
    engine
        .generate(request, &plan, &mut |_| Control::Continue, &mut finish)
        .unwrap();
    latents.unwrap()
}

/// Height and width, or top and left, in our order.
fn turned(value: &Value) -> Option<(usize, usize)> {
    let pair = numbers(value);
    (pair.len() == 2).then(|| (pair[1] as usize, pair[0] as usize))
}

/// Compares the pictures of a run, each made alone, with the reference's batch.
fn check_run(what: &str, case: &Case, engine: &Engine, run: &Value) {
    let expected = &case.expected()[text(&run["expected"])];
    let size = |name: &str| run[name].as_u64().map(|n| n as usize);
    let sizes = |prefix: &str, score: &str| SizeConditioning {
        original: turned(&run[format!("{prefix}original_size")]),
        crop: turned(&run[format!("{prefix}crops_coords_top_left")]),
        target: turned(&run[format!("{prefix}target_size")]),
        aesthetic_score: run[score].as_f64(),
    };
    let prompts = list(&run["prompts"]).iter().zip(list(&run["seeds"]));
    for (i, (prompt, seed)) in prompts.enumerate() {
        let request = Request {
            prompt: text(prompt).to_owned(),
            negative_prompt: run["negative_prompt"].as_str().map(str::to_owned),
            prompt_syntax: Syntax::Plain,
            width: size("width"),
            height: size("height"),
            steps: size("steps"),
            cfg_scale: run["cfg_scale"].as_f64(),
            seed: seed.as_u64(),
            sizes: sizes("", "aesthetic_score"),
            negative_sizes: sizes("negative_", "negative_aesthetic_score"),
            ..Request::default()
        };
        let count: usize = expected.shape[1..].iter().product();
        let want = Values {
            shape: [&[1], &expected.shape[1..]].concat(),
            data: expected.data[i * count..(i + 1) * count].to_vec(),
        };
        let got = latents(engine, &request);
        close(&format!("{what}, picture {i}"), &got, &want, RUN);
    }
}

fn set_scheduler(folder: &Path, run: &Value) {
    let path = folder.join("scheduler/scheduler_config.json");
    std::fs::write(path, run["scheduler"].to_string()).unwrap();
}

#[test]
fn whole_runs() {
    for (name, case) in cases() {
        if case.record["base"].is_string() {
            continue;
        }
        let dir = Dir::new();
        case.write_folder(dir.root(), &FolderForm::default());
        // diffusers leaves out more layers for the prompt alone, `--clip-skip` holds for the negative prompt too
        let runs = list(&case.record["runs"]).iter();
        for run in runs.filter(|run| run["clip_skip"].is_null()) {
            set_scheduler(dir.root(), run);
            let what = format!("{name} {}", text(&run["name"]));
            check_run(&what, &case, &load(dir.root()), run);
        }
    }
}

#[test]
fn a_refiner_finishes_what_the_base_began() {
    let case = Case::load("single-refiner");
    let base = Case::load(text(&case.record["base"]));
    let run = &list(&case.record["runs"])[0];
    let write = |case: &Case| {
        let dir = Dir::new();
        case.write_folder(dir.root(), &FolderForm::default());
        set_scheduler(dir.root(), run);
        dir
    };
    let (first, second) = (write(&base), write(&case));
    let switch = run["denoising_end"].as_f64().unwrap();
    let engine = load(first.root());
    let engine = engine.with_refiner(load(second.root()), switch).unwrap();
    check_run("ensemble", &case, &engine, run);
    assert!(
        load(first.root())
            .with_refiner(load(second.root()), 1.5)
            .is_err()
    );
}

#[test]
fn single_files_are_their_folders() {
    let forms = [
        SingleForm::default(),
        SingleForm {
            dtype: None,
            text_model: false,
            position_ids: None,
            ema: false,
            extras: false,
        },
    ];
    let singles = cases()
        .into_iter()
        .filter(|(_, case)| case.record["single_file"].is_object());
    let mut seen = 0;
    for (name, case) in singles {
        let folder = Dir::new();
        case.write_folder(folder.root(), &FolderForm::default());
        let request = Request {
            prompt: "a (red:1.2) fox, ".repeat(20),
            negative_prompt: (name != "single-sdxl").then(|| "blurry".to_owned()),
            width: Some(64),
            height: Some(96),
            steps: Some(2),
            seed: Some(5),
            clip_skip: Some(3),
            sampler: Some("Euler".to_owned()),
            ..Request::default()
        };
        let want = flat(&latents(&load(folder.root()), &request));
        for (i, form) in forms.iter().enumerate() {
            // what a bare file does not say, it cannot mean
            if i == 1 && name == "single-sdxl-v" {
                continue;
            }
            let dir = Dir::new();
            let path = dir.path("model.safetensors");
            case.write_single_file(&path, form);
            let family = detect(&Checkpoint::open(&path).unwrap()).family;
            let refiner = case.record["base"].is_string();
            assert_eq!(family == Family::SdxlRefiner, refiner, "{name}");
            assert_eq!(flat(&latents(&load(&path), &request)), want, "{name} {i}");
            seen += 1;
        }
    }
    assert!(seen >= 5);
}
