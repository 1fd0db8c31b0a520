//! Runs that begin at a picture against diffusers' pipelines: img2img, inpainting with ordinary models and with those that are given the mask,
//! instructions, on models of every family. The runs are described in `fixtures/from_picture/README.md`.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use clap::ValueEnum;
use sd_rs::checkpoint::Checkpoint;
use sd_rs::output::Image;
use sd_rs::picture::Picture;
use sd_rs::pipeline::{Control, Engine, Masking, Plan, Request, Source, Whose};
use sd_rs::text::Syntax;
use serde_json::Value;

use crate::models::{RUN, close, list, text};
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm, Values, floats};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/from_picture")
}

fn record(name: &str) -> Value {
    let text = fs::read_to_string(fixtures().join(format!("{name}.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The model of a run: one of `fixtures/models`, perhaps with another first layer and scheduler.
pub(crate) fn model(run: &Value) -> Case {
    let mut case = Case::load(text(&run["model"]));
    let network = &run["network"];
    let component = &mut case.record["components"][text(&network["component"])];
    component["config"] = network["config"].clone();
    for row in list(&network["tensors"]) {
        let tensors = component["tensors"].as_array_mut().unwrap();
        match tensors.iter_mut().find(|own| own[0] == row[0]) {
            Some(own) => *own = row.clone(),
            None => tensors.push(row.clone()),
        }
    }
    for (name, content) in run["files"].as_object().unwrap() {
        let files = case.record["files"].as_object_mut().unwrap();
        files.insert(name.clone(), content.clone());
    }
    case
}

fn pair(value: &Value) -> (usize, usize) {
    let side = |i: usize| usize::try_from(value[i].as_u64().unwrap()).unwrap();
    (side(0), side(1))
}

fn open(kind: &str, size: (usize, usize)) -> Picture {
    Picture::open(&fixtures().join(format!("{kind}-{}x{}.png", size.0, size.1))).unwrap()
}

/// A choice by its name on the command line.
fn word<T: ValueEnum + Default>(run: &Value, key: &str) -> T {
    let word = run[key]
        .as_str()
        .map(|name| T::from_str(name, true).unwrap());
    word.unwrap_or_default()
}

pub(crate) fn request(record: &Value, run: &Value) -> Request {
    let size = pair(&run["size"]);
    let mut source = Source::new(open("picture", size));
    source.strength = run["strength"].as_f64();
    if let Some(scale) = run["image_cfg_scale"].as_f64() {
        source.image_cfg_scale = scale;
    }
    if run["mask"].as_bool().unwrap_or(false) {
        source.masking = Some(Masking {
            mask: open("mask", size).to_luma(),
            blur: run["blur"].as_f64(),
            fill: word(run, "fill"),
            only_masked: run["around"].as_u64().map(|n| usize::try_from(n).unwrap()),
            edges: word(run, "edges"),
        });
    }
    if let Some(level) = run["noise_level"].as_u64() {
        source.noise_level = usize::try_from(level).unwrap();
    }
    source.own_size = run.get("_auto_resize").is_some();
    source.whose = run["like"]
        .as_str()
        .map(|name| Whose::from_str(name, true).unwrap());
    // one that needs no picture has no strength
    let begins = run
        .get("strength")
        .is_none_or(|strength| !strength.is_null());
    let output = run.get("output").map(pair);
    let absent = run.get("negative").is_some_and(Value::is_null)
        || run["pipeline"]
            .as_str()
            .is_some_and(|name| name.starts_with("Latent"));
    Request {
        prompt: text(&record["prompt"]).to_owned(),
        negative_prompt: (!absent).then(|| text(&record["negative"]).to_owned()),
        prompt_syntax: Syntax::Plain,
        width: output.or((!begins).then_some(size)).map(|size| size.0),
        height: output.or((!begins).then_some(size)).map(|size| size.1),
        sampler: run["sampler"].as_str().map(str::to_owned),
        schedule: run["schedule"].as_str().map(str::to_owned),
        steps: Some(usize::try_from(run["steps"].as_u64().unwrap()).unwrap()),
        cfg_scale: run["cfg_scale"].as_f64(),
        seed: run["seed"].as_u64(),
        source: begins.then_some(source),
        ..Request::default()
    }
}

/// Runs a request on the model and gives its latents and picture.
fn go(engine: &Engine, request: &Request) -> (candle_core::Tensor, Image) {
    let plan = Plan::new(engine, request).unwrap();
    let mut result = None;
    engine
        .generate(request, &plan, &mut |_| Control::Continue, &mut |batch| {
            result = Some((batch.latents, batch.pictures[0].image.clone()));
            Ok(())
        })
        .unwrap();
    result.unwrap()
}

fn expected(name: &str) -> HashMap<String, Values> {
    floats(&fixtures().join(format!("{name}.safetensors")))
}

fn engine(run: &Value) -> Engine {
    let dir = Dir::new();
    let folder = dir.path("model");
    model(run).write_folder(&folder, &FolderForm::default());
    let checkpoint = Checkpoint::open(&folder).unwrap();
    Engine::load(&checkpoint, &Device::Cpu, DType::F32)
        .unwrap_or_else(|e| panic!("{}: {e}", run["name"]))
}

fn check(family: fn(&str) -> bool) {
    let record = record("runs");
    let expected = expected("expected");
    let mut count = 0;
    for run in list(&record["runs"]) {
        if !family(text(&run["model"])) {
            continue;
        }
        count += 1;
        let name = text(&run["name"]);
        let engine = engine(run);
        let request = request(&record, run);
        let (latents, image) = go(&engine, &request);
        close(name, &latents, &expected[name], RUN);
        outside_is_untouched(name, &request, &image);
        let finished = fixtures().join(format!("{name}.png"));
        if finished.exists() {
            let wanted = Picture::open(&finished).unwrap();
            let mut pairs = image.rgb.iter().zip(wanted.rgb());
            // floats that are this close round apart now and then
            assert!(pairs.all(|(a, b)| a.abs_diff(*b) <= 1), "{name}");
        }
    }
    assert!(count > 3);
}

/// Where a mask is black, the finished picture is the one that was given, to the last bit.
fn outside_is_untouched(name: &str, request: &Request, image: &Image) {
    let Some(source) = &request.source else {
        return;
    };
    let Some(masking) = &source.masking else {
        return;
    };
    let reach = reach(request);
    let picture = &source.picture;
    assert_eq!(
        (image.width, image.height),
        (picture.width(), picture.height()),
        "{name}"
    );
    let (mut kept, mut painted) = (0, 0);
    for (i, &mask) in masking.mask.values().iter().enumerate() {
        let same = image.rgb[3 * i..][..3] == picture.rgb()[3 * i..][..3];
        if mask == 0 && reach == 0 {
            assert!(same, "{name}: pixel {i} was changed");
            kept += 1;
        } else if !same {
            painted += 1;
        }
    }
    assert!(
        painted > 100 && (kept > 100 || reach > 0),
        "{name}: {kept} kept, {painted} painted"
    );
}

/// Pixels by which a mask's blur reaches outside.
fn reach(request: &Request) -> usize {
    let masking = request
        .source
        .as_ref()
        .and_then(|source| source.masking.as_ref());
    let named = request.sampler.is_some();
    let like = request.source.as_ref().and_then(|source| source.whose);
    let usual = if named && like != Some(Whose::ComfyUi) {
        4.0
    } else {
        0.0
    };
    masking.map_or(0, |m| (2.5 * m.blur.unwrap_or(usual) + 0.5) as usize)
}

/// A1111's and ComfyUI's arithmetic around k-diffusion's samplers.
#[test]
fn web_uis() {
    let record = record("web_ui");
    let expected = expected("web_ui");
    for run in list(&record["runs"]) {
        let name = text(&run["name"]);
        let request = request(&record, run);
        let (latents, image) = go(&engine(run), &request);
        close(name, &latents, &expected[name], RUN);
        outside_is_untouched(name, &request, &image);
    }
}

#[test]
fn stable_diffusion() {
    check(|model| ["sd1-odd", "sd2-v", "five-levels", "lcm"].contains(&model));
}

#[test]
fn xl() {
    check(|model| model.starts_with("sdxl") || model.starts_with("edm"));
}

#[test]
fn transformers() {
    check(|model| model.starts_with("sd3") || model.starts_with("flux"));
}
