//! Textual inversions against diffusers and transformers: states and runs from every form of file; names in every tool's prompts; what does not fit is
//! refused in a sentence. The cases are described in `fixtures/embeddings/README.md`.

mod command;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};
use safetensors::Dtype;
use sd_rs::adapters::Embedding;
use sd_rs::checkpoint::{Checkpoint, ReadOptions};
use sd_rs::pipeline::{Control, Engine, Plan, Request};
use sd_rs::text::{Syntax, Texts, encode};
use serde_json::Value;

use crate::models::{RUN, close, list, text};
use crate::support::Dir;
use crate::support::weights::{
    Case, FolderForm, Law, Stored, Values, encode as bytes_of, floats, uniform,
};

/// Relative distance that text states may have.
const STATES: f64 = 1e-5;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/embeddings")
}

/// A case of `cases.json`.
fn record(case: &str) -> Value {
    let text = std::fs::read_to_string(folder().join("cases.json")).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    all[case].clone()
}

fn expected() -> HashMap<String, Values> {
    floats(&folder().join("expected.safetensors"))
}

/// The numbers of a word of a case.
fn vectors(case: &str, word: &str) -> (Vec<usize>, Vec<f32>) {
    let record = record(case);
    let shape = list(&record["words"][word]).iter();
    let shape: Vec<usize> = shape.map(|n| n.as_u64().unwrap() as usize).collect();
    let law = Law {
        scale: record["scale"].as_f64().unwrap() as f32,
        offset: 0.0,
    };
    let numbers = uniform(&format!("{case}/{word}"), &shape, law);
    (shape, numbers)
}

/// Writes words of a case to a file, each as a tensor of the name given.
fn write(path: &Path, case: &str, words: &[(&str, &str)], dtype: Dtype) {
    let tensors = words.iter().map(|(word, name)| {
        let (shape, numbers) = vectors(case, word);
        Stored {
            bytes: bytes_of(&numbers, Dtype::F32, dtype),
            dtype,
            name: (*name).to_owned(),
            shape,
        }
    });
    let tensors: Vec<Stored> = tensors.collect();
    let tensors = tensors.iter().map(|tensor| (&tensor.name, tensor));
    safetensors::serialize_to_file(tensors, None, path).unwrap();
}

fn open(path: &Path) -> Vec<Arc<Embedding>> {
    let found = Embedding::open(path, &ReadOptions::default());
    let found = found.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    found.into_iter().map(Arc::new).collect()
}

fn engine(model: &Path, embeddings: &[Arc<Embedding>]) -> Engine {
    let checkpoint = Checkpoint::open(model).unwrap();
    let engine = Engine::load(&checkpoint, &Device::Cpu, DType::F32).unwrap();
    engine.with_embeddings(embeddings).unwrap()
}

/// The rows that fixtures keep of a negative prompt's and a prompt's states, and the prompt's vector.
fn states(
    engine: &Engine,
    prompt: &str,
    negative: &str,
    syntax: Syntax,
) -> ([Values; 2], Option<Values>) {
    let texts = Texts {
        prompt,
        negative: Some(negative),
        syntax,
        clip_skip: 1,
    };
    let conditioning = encode(&engine.readers(), texts).unwrap();
    let both = [conditioning.negative(), conditioning.prompt()];
    let record = record("sd1");
    let rows = list(&record["rows"]).iter();
    let rows: Vec<u32> = rows.map(|n| n.as_u64().unwrap() as u32).collect();
    let rows = candle_core::Tensor::new(rows.as_slice(), &Device::Cpu).unwrap();
    let values = |tensor: candle_core::Tensor| Values {
        shape: tensor.dims().to_vec(),
        data: tensor.flatten_all().unwrap().to_vec1().unwrap(),
    };
    let of = |i: usize| {
        let states = both[i].states.squeeze(0).unwrap();
        values(states.index_select(&rows, 0).unwrap())
    };
    let pooled = both[1].pooled.clone().map(values);
    ([of(0), of(1)], pooled)
}

fn near(what: &str, got: &Values, want: &Values) {
    let got = candle_core::Tensor::from_vec(got.data.clone(), got.shape.clone(), &Device::Cpu);
    close(what, &got.unwrap(), want, STATES);
}

/// A folder with the case's model, and its words in diffusers' files.
fn sd1() -> (Dir, Vec<Arc<Embedding>>) {
    let dir = Dir::new();
    Case::load("single-sd1").write_folder(&dir.path("model"), &FolderForm::default());
    write(
        &dir.path("toy.safetensors"),
        "sd1",
        &[("<cat-toy>", "<cat-toy>")],
        Dtype::F32,
    );
    write(
        &dir.path("ink.safetensors"),
        "sd1",
        &[("ink_style", "ink_style")],
        Dtype::F32,
    );
    let all = ["toy.safetensors", "ink.safetensors"].map(|name| open(&dir.path(name)));
    (dir, all.concat())
}

#[test]
fn words_are_read_as_diffusers_reads_them() {
    let ((dir, embeddings), record, expected) = (sd1(), record("sd1"), expected());
    let engine = engine(&dir.path("model"), &embeddings);
    let (prompt, negative) = (text(&record["prompt"]), text(&record["negative_prompt"]));
    // without weights A1111's prompts say the same
    for syntax in [Syntax::Plain, Syntax::A1111] {
        let ([got_negative, got], _) = states(&engine, prompt, negative, syntax);
        near("prompt", &got, &expected["sd1/states"]);
        // in upper case diffusers takes the first vector alone
        let wanted = match syntax {
            Syntax::Plain => "sd1/negative",
            Syntax::A1111 => "sd1/negative_in_lower_case",
        };
        near("negative", &got_negative, &expected[wanted]);
    }
    let ([_, second], _) = states(&engine, "an ink_style_1 fox", "", Syntax::Plain);
    near("second vector", &second, &expected["sd1/second"]);
    let ([_, weighted], _) = states(&engine, text(&record["weighted"]), "", Syntax::A1111);
    near("weighted", &weighted, &expected["sd1/weighted"]);
    // ComfyUI's way to name it, among brackets
    let named = text(&record["weighted"]).replace("ink_style", "embedding:ink");
    let ([_, named], _) = states(&engine, &named, "", Syntax::A1111);
    near("named", &named, &expected["sd1/weighted"]);
}

#[test]
fn runs_equal_diffusers() {
    let ((dir, embeddings), record, expected) = (sd1(), record("sd1"), expected());
    let engine = engine(&dir.path("model"), &embeddings);
    let model = Case::load("single-sd1");
    let size = |name: &str| model.record["runs"][0][name].as_u64().map(|n| n as usize);
    let request = Request {
        prompt: text(&record["prompt"]).to_owned(),
        negative_prompt: Some(text(&record["negative_prompt"]).to_owned()),
        prompt_syntax: Syntax::Plain,
        width: size("width"),
        height: size("height"),
        steps: record["steps"].as_u64().map(|n| n as usize),
        cfg_scale: record["cfg_scale"].as_f64(),
        seed: record["seed"].as_u64(),
        ..Request::default()
    };
    assert_eq!(engine.embeddings_in(&request).unwrap().len(), 2);
    let plan = Plan::new(&engine, &request).unwrap();
    let mut latents = None;
    let mut finish = |batch: sd_rs::pipeline::Batch| {
        latents = Some(batch.latents);
        Ok(())
    };
    engine
        .generate(&request, &plan, &mut |_| Control::Continue, &mut finish)
        .unwrap();
    close("latents", &latents.unwrap(), &expected["sd1/latents"], RUN);
}

#[test]
fn both_towers_of_xl_learn_a_word() {
    let (dir, record, expected) = (Dir::new(), record("sdxl"), expected());
    Case::load("single-sdxl").write_folder(&dir.path("model"), &FolderForm::default());
    let path = dir.path("hat_man.safetensors");
    write(
        &path,
        "sdxl",
        &[("clip_l", "clip_l"), ("clip_g", "clip_g")],
        Dtype::F32,
    );
    let engine = engine(&dir.path("model"), &open(&path));
    let prompt = text(&record["prompt"]);
    for (syntax, pooled) in [
        (Syntax::Plain, "sdxl/pooled"),
        (Syntax::A1111, "sdxl/pooled_at_end"),
    ] {
        let ([_, got], vector) = states(&engine, prompt, "", syntax);
        near("states", &got, &expected["sdxl/states"]);
        near("pooled", &vector.unwrap(), &expected[pooled]);
    }
}

/// A file's vectors, which are those of a case's word rounded to the type.
fn holds(path: &Path, word: &str, dtype: Dtype) -> Arc<Embedding> {
    let found = open(path);
    assert_eq!(found.len(), 1, "{}", path.display());
    let (shape, numbers) = vectors("sd1", word);
    let rounded = bytes_of(&numbers, dtype, Dtype::F32);
    let rounded: Vec<f32> = rounded
        .as_chunks()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect();
    let part = &found[0].parts()[0];
    assert_eq!(
        (part.count * part.width, part.width),
        (numbers.len(), *shape.last().unwrap())
    );
    assert_eq!(*part.values, rounded, "{}", path.display());
    Arc::clone(&found[0])
}

#[test]
fn every_form_of_file_is_read() {
    let a1111 = holds(&folder().join("a1111.pt"), "ink_style", Dtype::F16);
    assert_eq!((a1111.name(), a1111.token()), ("a1111", Some("ink-train")));
    assert_eq!(a1111.words(), ["a1111"]);
    assert_eq!(a1111.tokens(), ["ink-train"]);
    let first = holds(&folder().join("first.pt"), "ink_style", Dtype::F32);
    assert_eq!((first.name(), first.token()), ("first", None));
    let learned = holds(
        &folder().join("learned_embeds.bin"),
        "<cat-toy>",
        Dtype::BF16,
    );
    assert_eq!(learned.words(), ["learned_embeds", "<cat-toy>"]);
    let dir = Dir::new();
    let path = dir.path("e.safetensors");
    for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
        write(&path, "sd1", &[("ink_style", "emb_params")], dtype);
        assert_eq!(holds(&path, "ink_style", dtype).words(), ["e"]);
    }
    // several words in one file
    write(
        &path,
        "sd1",
        &[("ink_style", "<a>"), ("<cat-toy>", "b")],
        Dtype::F32,
    );
    let several: Vec<String> = open(&path).iter().flat_map(|e| e.words()).collect();
    assert_eq!(several, ["<a>", "b"]);
}

#[test]
fn what_does_not_fit_is_told_in_a_sentence() {
    let (dir, embeddings) = sd1();
    Case::load("single-sdxl").write_folder(&dir.path("xl"), &FolderForm::default());
    let path = dir.path("hat.safetensors");
    write(
        &path,
        "sdxl",
        &[("clip_l", "clip_l"), ("clip_g", "clip_g")],
        Dtype::F32,
    );
    let refuse = |model: &str, embeddings: &[Arc<Embedding>]| {
        let checkpoint = Checkpoint::open(dir.path(model)).unwrap();
        let engine = Engine::load(&checkpoint, &Device::Cpu, DType::F32).unwrap();
        let error = engine.with_embeddings(embeddings).err().unwrap();
        error.to_string()
    };
    let error = refuse("xl", &embeddings);
    assert!(
        error.contains("made for") && error.contains("SDXL"),
        "{error}"
    );
    let error = refuse("model", &open(&path));
    assert!(
        error.contains("Stable Diffusion XL") && error.contains("Stable Diffusion 1 checkpoint"),
        "{error}"
    );

    let broken = |name: &str, shape: &[usize], number: f32| {
        let count = shape.iter().product();
        let numbers = vec![number; count];
        let tensor = Stored {
            bytes: bytes_of(&numbers, Dtype::F32, Dtype::F32),
            dtype: Dtype::F32,
            name: name.to_owned(),
            shape: shape.to_vec(),
        };
        let path = dir.path("broken.safetensors");
        safetensors::serialize_to_file([(name, &tensor)], None, &path).unwrap();
        let error = Embedding::open(&path, &ReadOptions::default()).unwrap_err();
        assert_eq!(error.code(), "bad-model", "{error}");
        error.to_string()
    };
    for (name, shape, number, words) in [
        ("emb_params", &[76, 64][..], 1.0, "75"),
        ("emb_params", &[0, 64], 1.0, "1 to 75"),
        ("emb_params", &[2, 3, 64], 1.0, "[vectors, width]"),
        ("emb_params", &[2, 64], f32::NAN, "NaN"),
        ("conv.weight", &[2, 64], 1.0, "not a textual inversion"),
    ] {
        let error = broken(name, shape, number);
        assert!(error.contains(words), "{error}");
    }
}
