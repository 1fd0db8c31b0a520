//! Stable Diffusion 3 and FLUX.1 of odd sizes against diffusers and transformers, as in `models.rs`: transformers in the UNet's place, T5 beside CLIP.

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use sd_kernels::cpu::Level;
use sd_kernels::plan::{Feed, Options, Plan, Precision, Store};
use sd_kernels::{Graph, Source};
use sd_models::denoiser::{Config, Denoiser, Inputs, Steering};
use sd_models::{clip, flux, mmdit, t5};
use sd_rs::checkpoint::{Checkpoint, detect};
use sd_rs::pipeline::{Control, Engine, Plan as Pipeline, Request, SkipLayers};
use sd_rs::spec::{Component, ModelSpec, Others};
use sd_rs::text::Syntax;
use sd_rs::weights::CheckpointSource;
use serde_json::Value;

use crate::models::{CALL, Memory, RUN, autoencoder, close, flat, list, tensor, text};
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm, SingleForm, Values, save};

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
        label: None,
        reference: None,
        steering: Steering::default(),
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
        constant: ["context", "added", "guidance"].map(Into::into).to_vec(),
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

/// T5's states of the reference's tokens, filled up with zeros as the pipelines do.
#[test]
fn t5_states() {
    for (name, case) in cases("vae") {
        let calls = &case.record["text_calls"];
        let Some(folder) = t5_folder(&case) else {
            continue;
        };
        let component = folder.replace("tokenizer", "text_encoder");
        let weights = Memory::weights(&case, &component);
        let config = t5::Config::from_json(case.config(&component)).unwrap();
        let encoder = t5::T5Encoder::load(&weights, &config);
        weights.finish().unwrap_or_else(|e| panic!("{name}: {e}"));
        let expected = case.expected();
        let length = calls["max_sequence_length"].as_u64().unwrap() as usize;
        // what stands before T5's states
        let clip = if folder == "tokenizer_3" { 77 } else { 0 };
        for call in list(&calls["prompts"]) {
            let tokens = list(&call["tokens"][folder]).iter();
            let mut ids: Vec<u32> = tokens.map(|id| id.as_u64().unwrap() as u32).collect();
            ids.resize(length, 0);
            let ids = Tensor::new(ids, &Device::Cpu)
                .unwrap()
                .unsqueeze(0)
                .unwrap();
            let eager = encoder.forward(&ids.clone().into()).unwrap();
            let eager = eager.into_data().unwrap().squeeze(0).unwrap();
            let key = text(&call["states"]);
            let all = &expected[key];
            let rows: Vec<u32> = list(&calls["rows"])
                .iter()
                .map(|row| row.as_u64().unwrap() as u32)
                .collect();
            let before = rows.iter().filter(|&&row| row < clip).count();
            let want = Values {
                shape: vec![rows.len() - before, all.shape[1]],
                data: all.data[before * all.shape[1]..].to_vec(),
            };
            let rows: Vec<u32> = rows[before..].iter().map(|row| row - clip).collect();
            let rows = Tensor::new(rows, &Device::Cpu).unwrap();
            let got = eager.index_select(&rows, 0).unwrap();
            close(&format!("{name} {key}"), &got, &want, CALL);
        }
    }
}

/// The folder of T5's tokenizer, if the model has T5.
fn t5_folder(case: &Case) -> Option<&'static str> {
    ["tokenizer_2", "tokenizer_3"].into_iter().find(|folder| {
        let component = folder.replace("tokenizer", "text_encoder");
        let has = case.components().contains(&component.as_str());
        has && case.config(&component)["model_type"] == "t5"
    })
}

fn spec(path: &Path, others: Others<'_>) -> ModelSpec {
    let checkpoint = Checkpoint::open(path).unwrap();
    ModelSpec::read_with(&checkpoint, &detect(&checkpoint), others)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The component has this structure and, under canonical names, the case's tensors, bit for bit.
#[track_caller]
fn same<C: PartialEq + Debug>(case: &Case, component: &str, got: &Component<C>, config: &C) {
    assert_eq!(&got.config, config, "{component}");
    let source = CheckpointSource::new(Arc::clone(&got.tensors), got.layout.clone());
    for tensor in case.weights(component, Some(Dtype::F32)) {
        let name = tensor.name.trim_start_matches("text_model.");
        // Stable Diffusion 3 gives CLIP-L's vector as it is: in single files the projection is left out or not used
        if component == "text_encoder" && name == "text_projection.weight" {
            continue;
        }
        let mut shape = source
            .shape(name, &tensor.shape)
            .unwrap_or_else(|| panic!("{component} {name} is not found"));
        if name == "pos_embed.pos_embed" {
            shape.insert(0, 1);
        }
        assert_eq!(
            shape.iter().product::<usize>(),
            tensor.bytes.len() / 4,
            "{name}"
        );
        let mut values = vec![0.0; tensor.bytes.len() / 4];
        source.open(name, &shape).unwrap().read(0, &mut values);
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert!(bytes == tensor.bytes, "{component} {name} differs");
    }
}

/// All components are the folder's.
#[track_caller]
fn same_model(case: &Case, folder: &ModelSpec, got: &ModelSpec) {
    assert_eq!(got.family, folder.family);
    assert_eq!(got.prediction, folder.prediction);
    same(case, "transformer", &got.unet, &folder.unet.config);
    same(case, "vae", &got.vae, &folder.vae.config);
    assert_eq!(got.text.len(), folder.text.len());
    for (tower, other) in got.text.iter().zip(&folder.text) {
        let component = tower.role.component;
        let projection = other.component.config.projection;
        let config = clip::Config {
            projection: projection.filter(|_| component != "text_encoder"),
            ..other.component.config.clone()
        };
        same(case, component, &tower.component, &config);
    }
    let (t5, other) = (got.t5.as_ref().unwrap(), folder.t5.as_ref().unwrap());
    same(
        case,
        t5.role.component,
        &t5.component,
        &other.component.config,
    );
}

fn folder_of(case: &Case) -> (Dir, ModelSpec) {
    let dir = Dir::new();
    case.write_folder(dir.root(), &FolderForm::default());
    let spec = spec(dir.root(), Others::default());
    (dir, spec)
}

fn write_part(case: &Case, component: &str, prefix: &str, path: &Path) -> Checkpoint {
    save(case.part(component, prefix, None).iter(), path);
    Checkpoint::open(path).unwrap()
}

#[test]
fn single_files_are_their_folders() {
    for name in ["single-sd3", "single-flux"] {
        let case = Case::load(name);
        let (_dir, folder) = folder_of(&case);
        same(&case, "transformer", &folder.unet, &config(&case));
        for extras in [true, false] {
            let dir = Dir::new();
            let path = dir.path("model.safetensors");
            let form = SingleForm {
                ema: false,
                extras,
                ..SingleForm::default()
            };
            case.write_single_file(&path, &form);
            same_model(&case, &folder, &spec(&path, Others::default()));
        }
    }
}

#[test]
fn parts_in_files_of_their_own() {
    for name in ["single-sd3", "single-flux"] {
        let case = Case::load(name);
        let (_dir, folder) = folder_of(&case);
        let dir = Dir::new();
        let towers: Vec<Checkpoint> = case
            .components()
            .into_iter()
            .filter(|component| component.starts_with("text_encoder"))
            .map(|tower| write_part(&case, tower, "", &dir.path(&format!("{tower}.safetensors"))))
            .collect();
        let vae = write_part(&case, "vae", "", &dir.path("ae.safetensors"));
        let others = Others {
            vae: Some(&vae),
            text: &towers,
            t5_length: None,
        };
        for prefix in ["", "model.diffusion_model."] {
            let path = dir.path("transformer.safetensors");
            write_part(&case, "transformer", prefix, &path);
            same_model(&case, &folder, &spec(&path, others));
        }
    }
}

/// Structure from names and shapes alone: normed queries, blocks that attend twice, an embedded guidance.
#[test]
fn transformers_of_other_shapes_alone() {
    for name in ["sd35", "flux-dev"] {
        let case = Case::load(name);
        let (dir, folder) = folder_of(&case);
        let towers: Vec<Checkpoint> = case
            .components()
            .into_iter()
            .filter(|component| component.starts_with("text_encoder"))
            .map(|tower| Checkpoint::open(dir.path(&format!("{tower}/model.safetensors"))).unwrap())
            .collect();
        let vae = Checkpoint::open(dir.root()).unwrap();
        let others = Others {
            vae: Some(&vae),
            text: &towers,
            t5_length: None,
        };
        for prefix in ["", "model.diffusion_model."] {
            let path = dir.path("alone.safetensors");
            write_part(&case, "transformer", prefix, &path);
            same(
                &case,
                "transformer",
                &spec(&path, others).unet,
                &folder.unet.config,
            );
        }
    }
}

fn load(path: &Path, others: Others<'_>) -> Engine {
    let checkpoint = Checkpoint::open(path).unwrap();
    let engine = Engine::load_with(&checkpoint, others, &Device::Cpu, DType::F32);
    engine.unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn latents(engine: &Engine, request: &Request) -> Tensor {
    let plan = Pipeline::new(engine, request).unwrap();
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

/// What the reference was asked for picture `i` of a run.
fn request(run: &Value, i: usize) -> Request {
    let size = |name: &str| run[name].as_u64().map(|n| n as usize);
    let number = |name: &str| run[name].as_f64();
    let layers = list(&run["skip_guidance_layers"]).iter();
    let layers: Vec<usize> = layers.map(|i| i.as_u64().unwrap() as usize).collect();
    Request {
        prompt: text(&run["prompts"][i]).to_owned(),
        negative_prompt: run["negative_prompt"].as_str().map(str::to_owned),
        prompt_syntax: Syntax::Plain,
        width: size("width"),
        height: size("height"),
        steps: size("steps"),
        cfg_scale: number("cfg_scale"),
        seed: run["seeds"][i].as_u64(),
        skip_layers: number("skip_layer_guidance_scale").map(|scale| SkipLayers {
            scale,
            layers,
            span: (
                number("skip_layer_guidance_start").unwrap(),
                number("skip_layer_guidance_stop").unwrap(),
            ),
        }),
        ..Request::default()
    }
}

/// Whole runs, each picture made alone, against the reference's batch of two.
fn check_runs(name: &str, case: &Case, path: &Path) {
    let expected = case.expected();
    for run in list(&case.record["runs"]) {
        let others = Others {
            t5_length: run["max_sequence_length"].as_u64().map(|n| n as usize),
            ..Others::default()
        };
        let engine = load(path, others);
        let all = &expected[text(&run["expected"])];
        let count: usize = all.shape[1..].iter().product();
        for i in 0..all.shape[0] {
            let want = Values {
                shape: [&[1], &all.shape[1..]].concat(),
                data: all.data[i * count..(i + 1) * count].to_vec(),
            };
            let got = latents(&engine, &request(run, i));
            let what = format!("{name} {}, picture {i}", text(&run["name"]));
            close(&what, &got, &want, RUN);
        }
    }
}

fn folder_runs(t5: bool) {
    let mut seen = 0;
    for (name, case) in cases("vae") {
        if t5_folder(&case).is_some() == t5 {
            let dir = Dir::new();
            case.write_folder(dir.root(), &FolderForm::default());
            check_runs(&name, &case, dir.root());
            seen += 1;
        }
    }
    assert!(seen > 0);
}

#[test]
fn whole_runs_without_t5() {
    folder_runs(false);
}

#[test]
fn whole_runs() {
    folder_runs(true);
}

#[test]
fn single_files_make_their_folders_pictures() {
    for name in ["single-sd3", "single-flux"] {
        let (case, dir) = (Case::load(name), Dir::new());
        let path = dir.path("model.safetensors");
        let form = SingleForm {
            ema: false,
            ..SingleForm::default()
        };
        case.write_single_file(&path, &form);
        case.write_folder(dir.root(), &FolderForm::default());
        // by the family's scheduler, which is the folder's, and by names
        for sampler in [None, Some("Euler"), Some("DPM++ 2M")] {
            let request = Request {
                sampler: sampler.map(str::to_owned),
                ..request(&list(&case.record["runs"])[0], 1)
            };
            let of = |path: &Path| flat(&latents(&load(path, Others::default()), &request));
            assert_eq!(of(&path), of(dir.root()), "{name} {sampler:?}");
        }
    }
}
