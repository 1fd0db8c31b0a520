//! Strengths that change over the steps or differ from block to block, against diffusers; taking off; strictness; embeddings inside a LoRA.

use std::sync::Arc;

use candle_core::{DType, Device};
use safetensors::Dtype;
use sd_rs::adapters::{Adapter, Adapters, Embedding, Mode, Strength};
use sd_rs::checkpoint::{Checkpoint, ReadOptions};
use sd_rs::pipeline::Engine;
use sd_rs::spec::Others;
use serde_json::Value;

use super::{
    MODES, adapters, case, engine, folder, latents, latents_of, read, strength_by, tensors, write,
    write_tensors,
};
use crate::models::{RUN, close, flat, list, text};
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm, Stored, encode};

/// A folder with Stable Diffusion 1 that samples by Euler, and a LoRA for it.
fn place() -> (Dir, Case) {
    let (dir, model) = (Dir::new(), Case::load("single-sd1"));
    model.write_folder(&dir.path("model"), &FolderForm::default());
    let path = dir.path("model/scheduler/scheduler_config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        config.replace("PNDMScheduler", "EulerDiscreteScheduler"),
    )
    .unwrap();
    write(&case("peft-sd1"), &dir.path("lora.safetensors"));
    (dir, model)
}

fn with(dir: &Dir, strength: Strength, mode: Mode) -> Engine {
    let adapter = Adapter::open(&dir.path("lora.safetensors"), &ReadOptions::default()).unwrap();
    let mut adapters = Adapters::default();
    let strength = strength_by(mode, strength);
    adapters.wear(&Arc::new(adapter), strength).unwrap();
    adapters.set_mode(mode);
    engine(&dir.path("model"), &adapters)
}

#[test]
fn weights_over_steps_and_by_blocks_equal_diffusers() {
    let record = std::fs::read_to_string(folder().join("cases_runs.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    let expected = read("expected_runs.safetensors");
    let (dir, model) = place();
    let steps = record["steps"].as_u64().map(|n| n as usize);
    let runs = list(&record["runs"]);
    for (run, mode) in runs.iter().flat_map(|run| MODES.map(|mode| (run, mode))) {
        let arguments: Vec<&str> = text(&run["arguments"]).split(':').collect();
        let strength = Strength::from_arguments(&arguments, "").unwrap();
        let engine = with(&dir, strength, mode);
        let what = text(&run["latents"]);
        // the second batch begins as the first did
        for _ in 0..2 {
            let got = latents_of(&engine, &model, None, steps);
            close(what, &got, &expected[what], RUN);
        }
    }
}

#[test]
fn what_is_taken_off_leaves_no_bit() {
    let (dir, model) = place();
    let of = |engine: &Engine| flat(&latents(engine, &model, None));
    let plain = of(&super::engine(&dir.path("model"), &Adapters::default()));
    let [merged, beside] = MODES.map(|mode| {
        let engine = with(&dir, Strength::constant(1.0, 1.0), mode);
        let worn = of(&engine);
        let none = Strength::constant(0.0, 0.0);
        engine.networks().set_strength(0, none);
        assert_eq!(of(&engine), plain, "{mode:?}");
        engine.networks().set_strength(0, Strength::default());
        assert_eq!(of(&engine), worn, "{mode:?}");
        assert_ne!(worn, plain, "{mode:?}");
        worn
    });
    // the same change, summed in another order
    assert_ne!(merged, beside);
}

#[test]
fn strictness_makes_an_error_of_what_has_no_place() {
    let (dir, _) = place();
    let mut odd = tensors(&case("peft-sd1"));
    for end in ["lora_A", "lora_B"] {
        odd.push(Stored {
            name: format!("unet.nowhere.{end}.weight"),
            shape: vec![1, 1],
            dtype: Dtype::F32,
            bytes: vec![0; 4],
        });
    }
    let path = dir.path("lora.safetensors");
    write_tensors(&odd, &case("peft-sd1")["metadata"], &path);
    let mut adapters = adapters(&path, 1.0);
    let engine = super::engine(&dir.path("model"), &adapters);
    let fits: Vec<_> = engine.networks().adapters().fits().collect();
    assert_eq!(
        (fits[0].modules, fits[0].used, fits[0].tensors),
        (129, 128, 128)
    );
    assert_eq!(fits[0].unmatched, ["unet.nowhere"]);
    adapters.set_strict(true);
    let checkpoint = Checkpoint::open(dir.path("model")).unwrap();
    let refused = Engine::load_adapted(
        &checkpoint,
        Others::default(),
        &adapters,
        &Device::Cpu,
        DType::F32,
    );
    let error = refused.err().unwrap().to_string();
    assert!(
        error.contains("unet.nowhere") && error.contains("--strict"),
        "{error}"
    );
    // as typed
    let flag = path.to_str().unwrap().to_owned();
    let args = [
        "generate", "-m", "model", "-p", "x", "--steps", "1", "-W", "64", "-H", "64", "--lora",
        &flag, "-o", "p.png",
    ];
    dir.ok(&args);
    let strict: Vec<&str> = args
        .into_iter()
        .chain(["--strict", "--overwrite"])
        .collect();
    assert!(dir.fails(&strict, 1).contains("--strict"));
}

#[test]
fn a_lora_brings_embeddings_along() {
    let (dir, _) = place();
    let mut both = tensors(&case("peft-sd1"));
    let numbers: Vec<f32> = (0..128u8).map(|i| f32::from(i) / 1000.0).collect();
    both.push(Stored {
        name: "bundle_emb.odd word.string_to_param.*".to_owned(),
        shape: vec![2, 64],
        dtype: Dtype::F32,
        bytes: encode(&numbers, Dtype::F32, Dtype::F32),
    });
    let path = dir.path("both.safetensors");
    write_tensors(&both, &case("peft-sd1")["metadata"], &path);
    let adapter = Adapter::open(&path, &ReadOptions::default()).unwrap();
    assert!(adapter.has_embeddings() && adapter.about().strange.is_empty());
    let found = Embedding::bundled(&path, &ReadOptions::default()).unwrap();
    assert_eq!(
        (found.len(), found[0].name(), found[0].count()),
        (1, "odd word", 2)
    );
    assert_eq!(*found[0].parts()[0].values, numbers);
    // the same as a file of its own
    let own = Stored {
        name: "emb_params".to_owned(),
        ..both.pop().unwrap()
    };
    write_tensors(&[own], &Value::Null, &dir.path("odd word.safetensors"));
    let run = |args: &[&str]| {
        let mut all = vec![
            "generate",
            "-m",
            "model",
            "-p",
            "an odd word",
            "--steps",
            "1",
            "-W",
            "64",
            "-H",
            "64",
            "-s",
            "1",
        ];
        all.extend([
            "-o",
            "p.png",
            "--overwrite",
            "--save-latents",
            "l.safetensors",
        ]);
        all.extend(args);
        dir.ok(&all);
        std::fs::read(dir.path("l.safetensors")).unwrap()
    };
    let bundled = run(&["--lora", "both.safetensors"]);
    let apart = run(&[
        "--lora",
        "lora.safetensors",
        "--embedding",
        "odd word.safetensors",
    ]);
    assert_eq!(bundled, apart);
    assert_ne!(bundled, run(&["--lora", "lora.safetensors"]));
}
