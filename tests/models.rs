//! Whole models of odd sizes against diffusers and transformers: each network alone, then whole runs from every form of file. The cases
//! are described in `fixtures/models/README.md`.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use sd_kernels::{Reader, Source, Weights};
use sd_models::{clip, unet, vae};
use sd_rs::checkpoint::{Checkpoint, ReadOptions};
use sd_rs::pipeline::{Control, Engine, Plan, Request};
use sd_rs::text::Syntax;
use serde_json::Value;

use crate::support::Dir;
use crate::support::containers::{Gguf, torch_archive, torch_stream};
use crate::support::weights::{Case, FolderForm, SingleForm, Stored, Values, read, save};

/// Relative L2 distance that one call of a network may have; f32 and f64 are up to 1.2e-6 apart in the reference itself.
pub(crate) const CALL: f64 = 2e-5;
/// The same for a whole run; the project's promise is 1e-3.
pub(crate) const RUN: f64 = 1e-4;

/// The weights of one component under canonical names.
pub(crate) struct Memory(HashMap<String, (Vec<usize>, Vec<f32>)>);

impl Memory {
    pub(crate) fn weights(case: &Case, component: &str) -> Weights {
        let tensors = case
            .weights(component, Some(Dtype::F32))
            .into_iter()
            .map(|stored| {
                let values = stored
                    .bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|b| f32::from_le_bytes(*b))
                    .collect();
                (stored.name, (stored.shape, values))
            });
        Weights::new(Arc::new(Self(tensors.collect())), DType::F32, &Device::Cpu)
    }

    /// These tensors: names, shapes, numbers.
    pub(crate) fn of(tensors: Vec<(String, Vec<usize>, Vec<f32>)>) -> Self {
        let tensors = tensors.into_iter();
        Self(
            tensors
                .map(|(name, shape, values)| (name, (shape, values)))
                .collect(),
        )
    }
}

impl Source for Memory {
    fn shape(&self, name: &str, _wanted: &[usize]) -> Option<Vec<usize>> {
        self.0.get(name).map(|(shape, _)| shape.clone())
    }

    fn dtype(&self, _: &str) -> DType {
        DType::F32
    }

    fn open(&self, name: &str, _shape: &[usize]) -> sd_kernels::Result<Box<dyn Reader + '_>> {
        Ok(Box::new(Held(&self.0[name].1)))
    }
}

struct Held<'a>(&'a [f32]);

impl Reader for Held<'_> {
    fn read(&self, first: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.0[first..][..out.len()]);
    }
}

pub(crate) fn tensor(values: Values) -> Tensor {
    Tensor::from_vec(values.data, values.shape, &Device::Cpu).unwrap()
}

pub(crate) fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
pub(crate) fn close(what: &str, got: &Tensor, want: &Values, bound: f64) {
    assert_eq!(got.dims(), want.shape, "{what}");
    let got = flat(got);
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(
        &mut got
            .iter()
            .zip(&want.data)
            .map(|(a, b)| f64::from(*a) - f64::from(*b)),
    );
    let relative = difference / norm(&mut want.data.iter().map(|&v| f64::from(v)));
    assert!(
        relative <= bound,
        "{what}: {relative:.1e} relative, at most {bound:.0e} expected"
    );
}

/// Cases of Stable Diffusions 1 and 2 that have the component.
fn cases(component: &str) -> Vec<(String, Case)> {
    let cases: Vec<_> = Case::names()
        .into_iter()
        .map(|name| (name.clone(), Case::load(&name)))
        .filter(|(_, case)| {
            case.components().contains(&component) && !case.is_sdxl() && !case.is_dit()
        })
        .collect();
    assert!(!cases.is_empty());
    cases
}

/// Whether the case needs an input that no network here takes.
fn is_refused(case: &Case) -> bool {
    list(&case.record["needs"])
        .iter()
        .any(|need| need == "class_labels")
        && case.config("unet").get("class_embed_type").is_some()
}

pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

pub(crate) fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

#[test]
fn text_states() {
    for (name, case) in cases("text_encoder") {
        let weights = Memory::weights(&case, "text_encoder");
        let config = clip::Config::from_json(case.config("text_encoder")).unwrap();
        let tower = clip::TextEncoder::load(&weights, &config);
        weights.finish().unwrap();
        let expected = case.expected();
        let calls = &case.record["text_calls"];
        let rows: Vec<u32> = list(&calls["rows"])
            .iter()
            .map(|r| r.as_u64().unwrap() as u32)
            .collect();
        let rows = Tensor::new(rows, &Device::Cpu).unwrap();
        for call in list(&calls["prompts"]) {
            let ids: Vec<u32> = list(&call["tokens"])
                .iter()
                .map(|t| t.as_u64().unwrap() as u32)
                .collect();
            let ids = Tensor::new(ids, &Device::Cpu)
                .unwrap()
                .unsqueeze(0)
                .unwrap();
            for state in list(&call["states"]) {
                // diffusers' null takes the last layer, its 1 the one before
                let skip = state["clip_skip"].as_u64().unwrap_or(0) as usize;
                let key = text(&state["expected"]);
                let states = tower
                    .forward(&ids.clone().into(), skip)
                    .unwrap()
                    .into_data()
                    .unwrap();
                let states = states.squeeze(0).unwrap().index_select(&rows, 0).unwrap();
                close(&format!("{name} {key}"), &states, &expected[key], CALL);
            }
        }
    }
}

#[test]
fn unet_calls() {
    for (name, case) in cases("unet") {
        let config = unet::Config::from_json(case.config("unet"));
        if is_refused(&case) {
            let refusal = config.unwrap_err().to_string();
            assert!(refusal.contains("not supported"), "{name}: {refusal}");
            continue;
        }
        let weights = Memory::weights(&case, "unet");
        let network = unet::UNet::load(&weights, &config.unwrap());
        weights.finish().unwrap_or_else(|e| panic!("{name}: {e}"));
        let expected = case.expected();
        for call in list(&case.record["unet_calls"]) {
            let latents = tensor(case.input(text(&call["latents"])));
            let context = tensor(case.input(text(&call["context"])));
            let timestep = call["timestep"].as_f64().unwrap() as f32;
            let timestep = Tensor::full(timestep, latents.dim(0).unwrap(), &Device::Cpu).unwrap();
            let input = |name: &str| {
                let input = call[name].as_str().map(|input| tensor(case.input(input)));
                input.map(sd_kernels::Tensor::from)
            };
            let label = call["class_labels"].as_array().map(|labels| {
                let rows = labels.iter().map(|label| {
                    let class = usize::try_from(label.as_u64().unwrap()).unwrap();
                    network.label(class).unwrap().unwrap()
                });
                let rows: Vec<Vec<f32>> = rows.collect();
                let width = rows[0].len();
                let rows = Tensor::from_vec(rows.concat(), (labels.len(), width), &Device::Cpu);
                sd_kernels::Tensor::from(rows.unwrap())
            });
            let got = network.forward(&unet::Inputs {
                sample: &latents.into(),
                timestep: &timestep.into(),
                context: &context.into(),
                added: None,
                guidance: input("timestep_cond").as_ref(),
                label: label.as_ref(),
                reference: None,
                steering: unet::Steering::default(),
            });
            let key = text(&call["expected"]);
            close(
                &format!("{name} {key}"),
                &got.unwrap().into_data().unwrap(),
                &expected[key],
                CALL,
            );
        }
    }
}

#[test]
fn autoencoder_calls() {
    for (name, case) in cases("vae") {
        autoencoder(&name, &case);
    }
}

/// Decodes and encodes as the reference did.
pub(crate) fn autoencoder(name: &str, case: &Case) {
    let weights = Memory::weights(case, "vae");
    let config = vae::Config::from_json(case.config("vae")).unwrap();
    let (decoder, encoder) = (
        vae::Decoder::load(&weights, &config),
        vae::Encoder::load(&weights, &config),
    );
    weights.finish().unwrap();
    let expected = case.expected();
    let calls = &case.record["vae_calls"];
    // the reference's latents are already divided by the factor, ours are as the UNet knows them
    let latents = tensor(case.input(text(&calls["decode"]["latents"])));
    let latents = ((latents - config.shift_factor).unwrap() * config.scaling_factor).unwrap();
    let picture = decoder
        .forward(&latents.into())
        .unwrap()
        .into_data()
        .unwrap();
    close(
        &format!("{name} decoded"),
        &picture,
        &expected[text(&calls["decode"]["expected"])],
        CALL,
    );
    let image = tensor(case.input(text(&calls["encode"]["image"])));
    let moments = encoder
        .moments(&image.into())
        .unwrap()
        .into_data()
        .unwrap()
        .chunk(2, 1)
        .unwrap();
    for (part, moment) in ["mean", "logvar"].iter().zip(&moments) {
        close(
            &format!("{name} {part}"),
            moment,
            &expected[text(&calls["encode"][part])],
            CALL,
        );
    }
}

/// Runs `run` of a case from the model at `path`, one prompt and seed at a time, and compares with the reference's batch.
fn check_run(what: &str, case: &Case, path: &Path, run: &Value) {
    let engine = Engine::load(&Checkpoint::open(path).unwrap(), &Device::Cpu, DType::F32)
        .unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(engine.warnings(), &[] as &[String], "{what}");
    let expected = &case.expected()[text(&run["expected"])];
    let size = |name: &str| usize::try_from(run[name].as_u64().unwrap()).unwrap();
    for (i, (prompt, seed)) in list(&run["prompts"])
        .iter()
        .zip(list(&run["seeds"]))
        .enumerate()
    {
        let request = Request {
            prompt: text(prompt).to_owned(),
            negative_prompt: run["negative_prompt"].as_str().map(str::to_owned),
            prompt_syntax: Syntax::Plain,
            width: Some(size("width")),
            height: Some(size("height")),
            steps: Some(size("steps")),
            cfg_scale: run["cfg_scale"].as_f64(),
            seed: seed.as_u64(),
            ..Request::default()
        };
        let plan = Plan::new(&engine, &request).unwrap();
        let mut latents = None;
        engine
            .generate(&request, &plan, &mut |_| Control::Continue, &mut |batch| {
                latents = Some(batch.latents);
                Ok(())
            })
            .unwrap();
        let count: usize = expected.shape[1..].iter().product();
        let mut shape = expected.shape.clone();
        shape[0] = 1;
        let want = Values {
            shape,
            data: expected.data[i * count..(i + 1) * count].to_vec(),
        };
        close(
            &format!("{what}, picture {i}"),
            &latents.unwrap(),
            &want,
            RUN,
        );
    }
}

/// The first run of a model, its first prompt, from a folder.
pub(crate) fn check_first_run(name: &str, case: &Case) {
    let dir = Dir::new();
    let form = FolderForm {
        dtype: None,
        variant: None,
        shards: None,
        old_names: false,
    };
    case.write_folder(dir.root(), &form);
    let mut run = list(&case.record["runs"])[0].clone();
    set_scheduler(dir.root(), &run);
    let first = list(&run["prompts"])[..1].to_vec();
    run["prompts"] = Value::Array(first);
    check_run(name, case, dir.root(), &run);
}

fn whole_models() -> Vec<(String, Case)> {
    cases("vae")
}

fn set_scheduler(folder: &Path, run: &Value) {
    std::fs::write(
        folder.join("scheduler/scheduler_config.json"),
        run["scheduler"].to_string(),
    )
    .unwrap();
}

#[test]
fn runs_of_folders() {
    for (name, case) in whole_models() {
        let dir = Dir::new();
        let form = FolderForm {
            dtype: None,
            variant: None,
            shards: None,
            old_names: false,
        };
        case.write_folder(dir.root(), &form);
        // diffusers leaves out layers for the prompt alone, `--clip-skip` holds for the negative prompt too: such a run is no reference
        for run in list(&case.record["runs"])
            .iter()
            .filter(|run| run["clip_skip"].is_null())
        {
            set_scheduler(dir.root(), run);
            check_run(
                &format!("{name} {}", text(&run["name"])),
                &case,
                dir.root(),
                run,
            );
        }
    }
}

#[test]
fn every_form_of_folder() {
    for (name, case) in whole_models().into_iter().take(2) {
        for (variant, shards, old_names) in [
            (Some("fp16"), None, true),
            (None, Some(3), false),
            (Some("fp16"), Some(2), true),
        ] {
            let dir = Dir::new();
            case.write_folder(
                dir.root(),
                &FolderForm {
                    dtype: None,
                    variant,
                    shards,
                    old_names,
                },
            );
            let run = &list(&case.record["runs"])[0];
            set_scheduler(dir.root(), run);
            check_run(
                &format!("{name} {variant:?} {shards:?} {old_names}"),
                &case,
                dir.root(),
                run,
            );
        }
    }
}

/// The last latents of a short run.
fn latents(engine: &Engine) -> Vec<f32> {
    let request = Request {
        prompt: "a (red:1.2) fox".to_owned(),
        negative_prompt: Some("blurry".to_owned()),
        width: Some(64),
        height: Some(72),
        steps: Some(3),
        seed: Some(5),
        sampler: Some("Euler".to_owned()),
        ..Request::default()
    };
    let plan = Plan::new(engine, &request).unwrap();
    let mut latents = None;
    let mut finish = |batch: sd_rs::pipeline::Batch| {
        latents = Some(flat(&batch.latents));
        Ok(())
    };
    engine
        .generate(&request, &plan, &mut |_| Control::Continue, &mut finish)
        .unwrap();
    latents.unwrap()
}

fn engine(path: &Path) -> Engine {
    let engine = Engine::load(&Checkpoint::open(path).unwrap(), &Device::Cpu, DType::F32);
    let engine = engine.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(engine.warnings(), &[] as &[String], "{}", path.display());
    engine
}

#[test]
fn every_container_gives_the_same_picture() {
    for name in ["single-sd1", "single-sd2-v"] {
        let (case, dir) = (Case::load(name), Dir::new());
        case.write_single_file(&dir.path("model.safetensors"), &SingleForm::default());
        let reference = latents(&engine(&dir.path("model.safetensors")));
        let stored = read(&dir.path("model.safetensors"));
        for (file, bytes) in [
            ("model.ckpt", torch_archive(&stored)),
            ("old.pt", torch_stream(&stored)),
            ("model.gguf", Gguf::plain(&stored).bytes()),
            // the name does not matter
            ("gguf.safetensors", Gguf::plain(&stored).bytes()),
        ] {
            std::fs::write(dir.path(file), bytes).unwrap();
            assert_eq!(
                latents(&engine(&dir.path(file))),
                reference,
                "{name} {file}"
            );
        }
        // folders as they were before safetensors
        let (folder, old) = (Dir::new(), Dir::new());
        case.write_folder(folder.root(), &FolderForm::default());
        case.write_folder(old.root(), &FolderForm::default());
        for (from, to) in [
            (
                "unet/diffusion_pytorch_model.safetensors",
                "unet/diffusion_pytorch_model.bin",
            ),
            (
                "vae/diffusion_pytorch_model.safetensors",
                "vae/diffusion_pytorch_model.bin",
            ),
            (
                "text_encoder/model.safetensors",
                "text_encoder/pytorch_model.bin",
            ),
        ] {
            std::fs::write(old.path(to), torch_archive(&read(&old.path(from)))).unwrap();
            std::fs::remove_file(old.path(from)).unwrap();
        }
        let want = latents(&engine(folder.root()));
        assert_eq!(latents(&engine(old.root())), want, "{name} folder");
    }
}

/// A tensor's numbers in Q8_0's blocks, and those that the blocks hold.
fn q8_0(numbers: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let (mut bytes, mut held) = (Vec::new(), Vec::new());
    for block in numbers.chunks_exact(32) {
        let most = block.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        let scale = half::f16::from_f32(most / 127.0);
        bytes.extend(scale.to_le_bytes());
        for v in block {
            let q = (v / scale.to_f32()).round() as i8;
            bytes.extend(q.to_le_bytes());
            held.push(scale.to_f32() * f32::from(q));
        }
    }
    (bytes, held)
}

/// Whether a stored tensor is one that tools quantise: a matrix of whole blocks.
fn is_matrix(tensor: &Stored) -> bool {
    let wide = matches!(tensor.shape[..], [_, columns] if columns % 32 == 0);
    wide && tensor.dtype == Dtype::F32 && !tensor.name.contains("embedding")
}

#[test]
fn compressed_weights_give_what_their_numbers_give() {
    let (case, dir) = (Case::load("single-sd1"), Dir::new());
    let form = SingleForm {
        dtype: Some(Dtype::F32),
        ..SingleForm::default()
    };
    case.write_single_file(&dir.path("model.safetensors"), &form);
    let mut held = read(&dir.path("model.safetensors"));
    let mut packed = Gguf::plain(&held);
    let mut eight = held.clone();
    let mut of_eight = held.clone();
    let mut count = 0;
    for (i, tensor) in held.iter_mut().enumerate().filter(|(_, t)| is_matrix(t)) {
        count += 1;
        let bytes = tensor.bytes.as_chunks().0.iter();
        let numbers: Vec<f32> = bytes.map(|b| f32::from_le_bytes(*b)).collect();
        let (blocks, values) = q8_0(&numbers);
        tensor.bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        (packed.tensors[i].2, packed.tensors[i].3) = (8, blocks);
        // e5m2 is the upper half of an f16; the scale is a power of two and so exact
        let scale = 0.0625f32;
        let codes = numbers
            .iter()
            .map(|v| half::f16::from_f32(v / scale).to_le_bytes()[1]);
        let codes: Vec<u8> = codes.collect();
        let values = codes
            .iter()
            .map(|c| half::f16::from_le_bytes([0, *c]).to_f32() * scale);
        of_eight[i].bytes = values.flat_map(f32::to_le_bytes).collect();
        (eight[i].dtype, eight[i].bytes) = (Dtype::F8_E5M2, codes);
        let stem = tensor.name.strip_suffix("weight").unwrap();
        for (last, value) in [("scale_weight", scale), ("scale_input", 1.0)] {
            eight.push(Stored {
                name: format!("{stem}{last}"),
                shape: vec![],
                dtype: Dtype::F32,
                bytes: value.to_le_bytes().to_vec(),
            });
        }
    }
    assert!(count > 30, "{count}");
    eight.push(Stored {
        name: "scaled_fp8".to_owned(),
        shape: vec![2],
        dtype: Dtype::F8_E5M2,
        bytes: vec![0; 2],
    });
    std::fs::write(dir.path("model.gguf"), packed.bytes()).unwrap();
    save(held.iter(), &dir.path("q8.safetensors"));
    save(eight.iter(), &dir.path("fp8.safetensors"));
    save(of_eight.iter(), &dir.path("of-fp8.safetensors"));
    let run = |file: &str| latents(&engine(&dir.path(file)));
    let values = |data: Vec<f32>| Values {
        shape: vec![data.len()],
        data,
    };
    let near = |what: &str, got: Vec<f32>, want: Vec<f32>, bound: f64| {
        close(what, &tensor(values(got)), &values(want), bound);
    };
    // 16-bit copies of the weights round: by half a step of f16 where blocks are, and not at all for two bits of mantissa
    near("Q8_0", run("model.gguf"), run("q8.safetensors"), 1e-3);
    near(
        "e5m2, scaled",
        run("fp8.safetensors"),
        run("of-fp8.safetensors"),
        1e-6,
    );
    let apart = |a: &[f32], b: &[f32]| a.iter().zip(b).any(|(a, b)| (a - b).abs() > 1e-4);
    assert!(apart(&run("model.safetensors"), &run("q8.safetensors")));
}

#[test]
fn every_form_of_single_file() {
    let singles: Vec<_> = whole_models()
        .into_iter()
        .filter(|(_, case)| case.record["single_file"].is_object())
        .collect();
    assert_eq!(singles.len(), 3);
    for (name, case) in singles {
        for (text_model, position_ids, ema, extras) in [
            (true, Some(Dtype::I64), true, true),
            (false, None, false, false),
            (true, Some(Dtype::F32), false, true),
        ] {
            let dir = Dir::new();
            let path = dir.path("model.safetensors");
            case.write_single_file(
                &path,
                &SingleForm {
                    dtype: None,
                    text_model,
                    position_ids,
                    ema,
                    extras,
                },
            );
            let what = format!("{name} single file {text_model} {position_ids:?} {ema} {extras}");
            let engine = Engine::load(&Checkpoint::open(&path).unwrap(), &Device::Cpu, DType::F32)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            let folder = Dir::new();
            case.write_folder(
                folder.root(),
                &FolderForm {
                    dtype: None,
                    variant: None,
                    shards: None,
                    old_names: false,
                },
            );
            let reference = Engine::load(
                &Checkpoint::open(folder.root()).unwrap(),
                &Device::Cpu,
                DType::F32,
            )
            .unwrap();
            assert_eq!(latents(&engine), latents(&reference), "{what}");
            // plain reads give the same numbers as a mapping
            let options = ReadOptions {
                no_mmap: true,
                ..ReadOptions::default()
            };
            let read = Checkpoint::open_with(&path, &options).unwrap();
            let read = Engine::load(&read, &Device::Cpu, DType::F32).unwrap();
            assert_eq!(latents(&read), latents(&engine), "{what}, read");
        }
    }
}
