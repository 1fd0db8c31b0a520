//! Adapters against diffusers, PEFT and LyCORIS: merged weights of every form, whole runs from every spelling of names; what does not fit is
//! refused in a sentence. The cases are described in `fixtures/adapters/README.md`.

mod beside;
mod command;
mod dit;
mod forms;
mod hostile;
mod strengths;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};
use safetensors::Dtype;
use sd_rs::adapters::{Adapter, Adapters, Curve, Mode, Owner, Strength};
use sd_rs::checkpoint::{Checkpoint, ReadOptions, detect};
use sd_rs::pipeline::{Control, Engine, Plan, Request, bind_adapters};
use sd_rs::spec::ModelSpec;
use sd_rs::spec::Others;
use sd_rs::text::Syntax;
use serde_json::Value;

use crate::models::{RUN, close, flat, list, text};
use crate::support::Dir;
use crate::support::weights::{
    Case, FolderForm, Law, SingleForm, Stored, Values, encode, floats, uniform,
};

/// Relative distance that a merged weight may have.
const MERGED: f64 = 1e-6;
/// How a denoising network wears what it can wear in both ways.
const MODES: [Mode; 2] = [Mode::Merge, Mode::Runtime];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adapters")
}

/// `cases.json`.
pub(crate) fn record() -> Value {
    let text = std::fs::read_to_string(folder().join("cases.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

pub(crate) fn case(name: &str) -> Value {
    let cases = record()["cases"].as_array().unwrap().clone();
    cases.into_iter().find(|case| case["name"] == name).unwrap()
}

fn expected() -> HashMap<String, Values> {
    read("expected.safetensors")
}

fn read(file: &str) -> HashMap<String, Values> {
    floats(&folder().join(file))
}

/// The tensors of a case's file, stored as f32.
pub(crate) fn tensors(case: &Value) -> Vec<Stored> {
    let number = |value: &Value| value.as_f64().unwrap_or(0.0) as f32;
    let make = |row: &Value| {
        let name = text(&row[0]).to_owned();
        let dims = list(&row[1]).iter().map(|n| n.as_u64().unwrap() as usize);
        let shape: Vec<usize> = dims.collect();
        let law = Law {
            scale: number(&row[2]),
            offset: number(&row[3]),
        };
        let seed = format!("{}/{name}", text(&case["name"]));
        Stored {
            bytes: encode(&uniform(&seed, &shape, law), Dtype::F32, Dtype::F32),
            dtype: Dtype::F32,
            name,
            shape,
        }
    };
    list(&case["tensors"]).iter().map(make).collect()
}

/// Writes a case's file as its maker does.
pub(crate) fn write(case: &Value, path: &Path) {
    write_tensors(&tensors(case), &case["metadata"], path);
}

pub(crate) fn write_tensors(tensors: &[Stored], metadata: &Value, path: &Path) {
    let texts = metadata.as_object().into_iter().flatten();
    let texts: HashMap<String, String> = texts
        .map(|(key, value)| (key.clone(), text(value).to_owned()))
        .collect();
    let tensors = tensors.iter().map(|tensor| (&tensor.name, tensor));
    safetensors::serialize_to_file(tensors, Some(texts), path).unwrap();
}

/// The adapter at a path at one strength.
fn adapters(path: &Path, strength: f64) -> Adapters {
    let adapter = Arc::new(Adapter::open(path, &ReadOptions::default()).unwrap());
    let mut adapters = Adapters::default();
    adapters.add(&adapter, strength, strength).unwrap();
    adapters
}

/// The adapter at a path at one strength, merged everywhere or nowhere.
fn adapters_by(mode: Mode, path: &Path, strength: f64) -> Adapters {
    let adapter = Arc::new(Adapter::open(path, &ReadOptions::default()).unwrap());
    let mut adapters = Adapters::default();
    let strength = strength_by(mode, Strength::constant(strength, strength));
    adapters.wear(&adapter, strength).unwrap();
    adapters.set_mode(mode);
    adapters
}

/// Layers of these models are so small that few changes are thin: what may change over the steps, though it does not, is beside them nevertheless.
fn strength_by(mode: Mode, mut strength: Strength) -> Strength {
    if let (Mode::Runtime, Some(number)) = (mode, strength.denoiser.as_constant()) {
        strength.denoiser = Curve::parse(&format!("{number}@0-1")).unwrap();
    }
    strength
}

fn engine(model: &Path, adapters: &Adapters) -> Engine {
    let checkpoint = Checkpoint::open(model).unwrap();
    Engine::load_adapted(
        &checkpoint,
        Others::default(),
        adapters,
        &Device::Cpu,
        DType::F32,
    )
    .unwrap_or_else(|e| panic!("{}: {e}", model.display()))
}

/// The last latents of the fixtures' run.
fn latents(engine: &Engine, model: &Case, sampler: Option<&str>) -> candle_core::Tensor {
    latents_of(engine, model, sampler, None)
}

fn latents_of(
    engine: &Engine,
    model: &Case,
    sampler: Option<&str>,
    steps: Option<usize>,
) -> candle_core::Tensor {
    let record = record();
    let size = |name: &str| model.record["runs"][0][name].as_u64().map(|n| n as usize);
    let request = Request {
        prompt: text(&record["prompt"]).to_owned(),
        negative_prompt: Some(text(&record["negative_prompt"]).to_owned()),
        prompt_syntax: Syntax::Plain,
        width: size("width"),
        height: size("height"),
        steps: steps.or(record["steps"].as_u64().map(|n| n as usize)),
        cfg_scale: record["cfg_scale"].as_f64(),
        seed: record["seed"].as_u64(),
        sampler: sampler.map(str::to_owned),
        ..Request::default()
    };
    let plan = Plan::new(engine, &request).unwrap();
    let mut latents = None;
    let mut finish = |batch: sd_rs::pipeline::Batch| {
        latents = Some(batch.latents);
        Ok(())
    };
    engine
        .generate(&request, &plan, &mut |_| Control::Continue, &mut finish)
        .unwrap();
    latents.unwrap()
}

#[test]
fn runs_equal_diffusers() {
    for mode in MODES {
        runs_equal_diffusers_by(mode);
    }
}

fn runs_equal_diffusers_by(mode: Mode) {
    let expected = expected();
    for case in list(&record()["cases"]) {
        let name = text(&case["name"]);
        let (dir, model) = (Dir::new(), Case::load(text(&case["base"])));
        model.write_folder(&dir.path("model"), &FolderForm::default());
        write(case, &dir.path("lora.safetensors"));
        let strength = case["strength"].as_f64().unwrap();
        let adapters = adapters_by(mode, &dir.path("lora.safetensors"), strength);
        let engine = engine(&dir.path("model"), &adapters);
        assert_eq!(engine.warnings(), &[] as &[String], "{name}");
        let got = latents(&engine, &model, None);
        close(name, &got, &expected[text(&case["latents"])], RUN);
    }
}

#[test]
fn every_form_merges_as_lycoris_does() {
    let (case, expected) = (case("lycoris-sd1"), expected());
    let (dir, model) = (Dir::new(), Case::load(text(&case["base"])));
    model.write_folder(&dir.path("model"), &FolderForm::default());
    write(&case, &dir.path("lora.safetensors"));
    let checkpoint = Checkpoint::open(dir.path("model")).unwrap();
    let spec = ModelSpec::read(&checkpoint, &detect(&checkpoint)).unwrap();
    let bind = |strength| {
        let adapters = adapters(&dir.path("lora.safetensors"), strength);
        bind_adapters(&spec, &adapters).unwrap()
    };
    let (whole, part) = (bind(1.0), bind(-0.5));
    let mut seen = 0;
    for (place, key) in case["merged"].as_object().unwrap() {
        let (component, name) = place.split_once('/').unwrap();
        let owner = match component {
            "unet" => Owner::Denoiser,
            _ => Owner::Text("text_encoder"),
        };
        let weights = model.weights(component, Some(Dtype::F32));
        let base = weights.iter().find(|w| w.name == name).unwrap();
        let values = |w: &Stored| -> Vec<f32> {
            let numbers = w.bytes.as_chunks().0.iter();
            numbers.map(|b| f32::from_le_bytes(*b)).collect()
        };
        let want = &expected[text(key)];
        let before = values(base);
        let mut got = before.clone();
        whole.apply(owner, name, &base.shape, &mut got).unwrap();
        let tensor = |data: Vec<f32>| {
            candle_core::Tensor::from_vec(data, want.shape.clone(), &Device::Cpu).unwrap()
        };
        close(place, &tensor(got), want, MERGED);
        // a part of the strength is that part of the change, DoRA's and rotations included
        let mut got = before.clone();
        part.apply(owner, name, &base.shape, &mut got).unwrap();
        let halfway = before
            .iter()
            .zip(&want.data)
            .map(|(w, m)| w - 0.5 * (m - w));
        let want = Values {
            shape: want.shape.clone(),
            data: halfway.collect(),
        };
        close(place, &tensor(got), &want, MERGED);
        assert!(whole.changes(owner, name));
        seen += 1;
    }
    assert_eq!((seen, whole.len()), (30, 30));
}

#[test]
fn a_single_file_wears_what_a_folder_does() {
    // f16 in the file, so that plans would keep 16 bits of what is not changed
    for name in ["kohya-sd1", "kohya-sdxl"] {
        let case = case(name);
        let (dir, model) = (Dir::new(), Case::load(text(&case["base"])));
        model.write_folder(&dir.path("model"), &FolderForm::default());
        model.write_single_file(&dir.path("model.safetensors"), &SingleForm::default());
        write(&case, &dir.path("lora.safetensors"));
        let adapters = adapters(&dir.path("lora.safetensors"), 0.75);
        let of = |path: &str| {
            flat(&latents(
                &engine(&dir.path(path), &adapters),
                &model,
                Some("Euler"),
            ))
        };
        assert_eq!(of("model.safetensors"), of("model"), "{name}");
    }
}

/// `convert --lora` writes the weights that `generate --lora` computes with.
#[test]
fn baked_in_is_worn() {
    for case in list(&record()["cases"]).iter().take(3) {
        let name = text(&case["name"]);
        let (dir, model) = (Dir::new(), Case::load(text(&case["base"])));
        model.write_folder(&dir.path("model"), &FolderForm::default());
        write(case, &dir.path("lora.safetensors"));
        let strength = case["strength"].as_f64().unwrap();
        let (input, output) = (dir.path("model"), dir.path("baked"));
        let lora = format!("{}:{strength}", dir.path("lora.safetensors").display());
        let (from, to) = (input.to_str().unwrap(), output.to_str().unwrap());
        dir.ok(&["convert", "--dtype", "f32", "--lora", &lora, from, to]);
        let adapters = adapters(&dir.path("lora.safetensors"), strength);
        let of = |path: &Path, adapters: &Adapters| latents(&engine(path, adapters), &model, None);
        let worn = of(&input, &adapters);
        let baked = of(&output, &Adapters::default());
        let plain = of(&input, &Adapters::default());
        let distance = |other: candle_core::Tensor| -> f32 {
            let off = (&worn - other).unwrap().abs().unwrap();
            off.max_all().unwrap().to_scalar().unwrap()
        };
        let (off, change) = (distance(baked), distance(plain));
        assert!(off < 1e-5 && change > 1e-2, "{name}: {off} {change}");
        let unet = output.join("unet/diffusion_pytorch_model.safetensors");
        let bytes = std::fs::read(unet).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let note = &header.metadata().as_ref().unwrap()["sd_rs.loras"];
        assert!(note.contains("unet_weight"), "{note}");
    }
}

#[test]
fn strengths_add_up_and_none_is_nothing() {
    let case = case("old-sd1");
    let (dir, model) = (Dir::new(), Case::load("single-sd1"));
    model.write_folder(&dir.path("model"), &FolderForm::default());
    write(&case, &dir.path("lora.safetensors"));
    let of = |strengths: &[(f64, f64)]| {
        let mut adapters = Adapters::default();
        for (te, unet) in strengths {
            let adapter = Adapter::open(&dir.path("lora.safetensors"), &ReadOptions::default());
            adapters
                .add(&Arc::new(adapter.unwrap()), *te, *unet)
                .unwrap();
        }
        flat(&latents(
            &engine(&dir.path("model"), &adapters),
            &model,
            None,
        ))
    };
    let none = of(&[]);
    assert_eq!(of(&[(0.0, 0.0)]), none);
    // the file changes the UNet alone
    assert_eq!(of(&[(1.0, 0.0)]), none);
    assert_eq!(of(&[(0.5, 1.5), (0.0, -1.5)]), none);
    let one = of(&[(0.0, 0.75)]);
    assert_ne!(one, none);
    assert_eq!(of(&[(0.25, 0.5), (0.0, 0.25)]), one);
}

#[test]
fn what_a_file_is_of_is_told() {
    let dir = Dir::new();
    let about = |name: &str| {
        let path = dir.path("x.safetensors");
        write(&case(name), &path);
        Adapter::open(&path, &ReadOptions::default())
            .unwrap()
            .about()
    };
    let one = |key: &str, n| BTreeMap::from([(key.to_owned(), n)]);
    let xl = about("kohya-sdxl");
    assert_eq!(xl.base_model.as_deref(), Some("Stable Diffusion XL"));
    assert_eq!(xl.networks.len(), 3);
    assert_eq!(xl.forms, one("LoRA", xl.networks.values().sum()));
    let peft = about("peft-sd1");
    assert_eq!(peft.alphas, one("none", 128));
    assert_eq!(peft.ranks, BTreeMap::from([(4, 128)]));
    let all = about("lycoris-sd1");
    assert!(all.dora && all.forms.len() == 8, "{:?}", all.forms);
}
