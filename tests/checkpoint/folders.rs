//! Diffusers folders: variants, shards, what is missing, what must not be opened.

use std::fs;
use std::path::Path;

use sd_rs::checkpoint::{
    Checkpoint, EmbeddedCheckpoint, EmbeddedComponent, Family, Prediction, ReadOptions, Variant,
    detect,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::build::{Tensors, clip_l};
use crate::support::containers::torch_archive;
use crate::support::weights::Stored;

fn write_json(path: &Path, value: &Value) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, value.to_string()).unwrap();
}

fn unet() -> Tensors {
    let mut tensors = Tensors::default();
    tensors.add("conv_in.weight", &[48, 4, 3, 3]);
    tensors.add("down_blocks.0.resnets.0.conv1.weight", &[48, 48, 3, 3]);
    tensors.add("conv_out.weight", &[4, 48, 3, 3]);
    tensors
}

/// A small Stable Diffusion 1 folder.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_json(
        &at("model_index.json"),
        &json!({
            "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1",
            "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [null, null],
        }),
    );
    write_json(
        &at("unet/config.json"),
        &json!({ "in_channels": 4, "out_channels": 4 }),
    );
    write_json(&at("vae/config.json"), &json!({}));
    write_json(
        &at("text_encoder/config.json"),
        &json!({ "hidden_act": "quick_gelu" }),
    );
    write_json(
        &at("scheduler/scheduler_config.json"),
        &json!({ "prediction_type": "epsilon" }),
    );
    write_json(
        &at("tokenizer/tokenizer_config.json"),
        &json!({ "pad_token": "<|endoftext|>" }),
    );
    unet().write(&at("unet/diffusion_pytorch_model.safetensors"));
    let mut vae = Tensors::default();
    vae.add("decoder.conv_in.weight", &[512, 4, 3, 3]);
    vae.write(&at("vae/diffusion_pytorch_model.safetensors"));
    let mut text = Tensors::default();
    clip_l(&mut text, "", 768);
    text.write(&at("text_encoder/model.safetensors"));
    folder
}

#[track_caller]
fn refused(folder: &TempDir, words: &str) {
    let error = Checkpoint::open(folder.path()).unwrap_err();
    assert_eq!(error.code(), "bad-model", "{error}");
    assert!(error.to_string().contains(words), "{error}");
}

#[test]
fn a_folder_opens() {
    let folder = folder();
    write_json(&folder.path().join("sd-rs.json"), &json!({ "steps": 7 }));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(checkpoint.is_folder());
    assert!(checkpoint.single().is_none());
    let names: Vec<_> = checkpoint.component_names().collect();
    assert_eq!(
        names,
        ["scheduler", "text_encoder", "tokenizer", "unet", "vae"]
    );
    assert_eq!(checkpoint.config("unet").unwrap()["in_channels"], 4);
    assert_eq!(
        checkpoint.config("tokenizer").unwrap()["pad_token"],
        "<|endoftext|>"
    );
    assert_eq!(checkpoint.defaults().unwrap()["steps"], 7);
    assert_eq!(
        checkpoint.component_path("tokenizer"),
        Some(folder.path().join("tokenizer").as_path())
    );
    let unet = checkpoint.require("unet").unwrap();
    assert_eq!(unet.shape("conv_in.weight"), Some(&[48, 4, 3, 3][..]));
    assert_eq!(unet.bytes("conv_in.weight").unwrap().len(), 48 * 4 * 9 * 2);
    let below = unet.strip_prefix("down_blocks.0.");
    assert_eq!(
        below.names().collect::<Vec<_>>(),
        ["resnets.0.conv1.weight"]
    );
    assert_eq!(
        below.bytes("resnets.0.conv1.weight").unwrap().len(),
        48 * 48 * 9 * 2
    );
    assert!(
        unet.bytes("no\u{1b}")
            .unwrap_err()
            .to_string()
            .contains("no\\u{1b}")
    );
    assert!(
        checkpoint
            .require("tokenizer")
            .unwrap_err()
            .to_string()
            .contains("`tokenizer` has no .safetensors or .bin file")
    );
    assert!(
        checkpoint
            .require("image_encoder")
            .unwrap_err()
            .to_string()
            .contains("no component `image_encoder`")
    );
    let found = detect(&checkpoint);
    assert_eq!(
        (found.family, found.variant),
        (Family::Sd1, Variant::Text2Image)
    );
    assert_eq!(
        (found.prediction, found.refusal()),
        (Some(Prediction::Epsilon), None)
    );
    // without the index the parts are enough
    fs::remove_file(folder.path().join("model_index.json")).unwrap();
    write_json(
        &folder.path().join("unet/config.json"),
        &json!({ "_class_name": "UNet2DConditionModel", "in_channels": 9, "out_channels": 4 }),
    );
    let found = detect(&Checkpoint::open(folder.path()).unwrap());
    assert_eq!(
        (found.family, found.variant),
        (Family::Sd1, Variant::Inpainting)
    );
}

#[test]
fn folders_say_what_they_are() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let found = || detect(&Checkpoint::open(folder.path()).unwrap());
    write_json(
        &at("scheduler/scheduler_config.json"),
        &json!({ "prediction_type": "v_prediction" }),
    );
    write_json(
        &at("text_encoder/config.json"),
        &json!({ "hidden_act": "gelu" }),
    );
    let two = found();
    assert_eq!(
        (two.family, two.prediction),
        (Family::Sd2, Some(Prediction::V))
    );
    write_json(&at("text_encoder/config.json"), &json!({}));
    write_json(
        &at("unet/config.json"),
        &json!({ "use_linear_projection": true }),
    );
    assert_eq!(found().family, Family::Sd2);
    for (class, family) in [
        ("StableDiffusionXLPipeline", Family::Sdxl),
        ("StableDiffusion3Pipeline", Family::Sd3),
        ("FluxPipeline", Family::Flux1),
        ("FluxFillPipeline", Family::Flux1),
        ("Flux2Pipeline", Family::Flux2),
        ("ChromaPipeline", Family::Chroma),
        ("StableVideoDiffusionPipeline", Family::Svd),
        ("StableDiffusionUpscalePipeline", Family::X4Upscaler),
        ("StableUnCLIPImg2ImgPipeline", Family::UnClip),
        ("StableDiffusionInpaintPipeline", Family::Sd2),
        ("KandinskyPipeline\u{1b}", Family::Unknown),
    ] {
        write_json(&at("model_index.json"), &json!({ "_class_name": class }));
        let found = found();
        assert_eq!(found.family, family, "{class}");
        let refusal = found.refusal().unwrap_or_default();
        let taken = matches!(family, Family::Sd2 | Family::X4Upscaler);
        assert_eq!(refusal.is_empty(), taken, "{refusal}");
        assert!(!refusal.contains('\u{1b}'));
    }
}

#[test]
fn the_plain_files_come_before_the_variants() {
    let folder = folder();
    let at = |name: &str| folder.path().join("unet").join(name);
    let mut half = unet();
    half.add("half", &[1]);
    half.write(&at("diffusion_pytorch_model.fp16.safetensors"));
    let has_half = |options: &ReadOptions| {
        let checkpoint = Checkpoint::open_with(folder.path(), options).unwrap();
        checkpoint.tensors("unet").unwrap().info("half").is_some()
    };
    let fp16 = ReadOptions {
        variant: Some("fp16".to_owned()),
        no_mmap: true,
    };
    assert!(!has_half(&ReadOptions::default()));
    assert!(has_half(&fp16));
    fs::remove_file(at("diffusion_pytorch_model.safetensors")).unwrap();
    assert!(has_half(&ReadOptions::default()));
    fs::rename(
        at("diffusion_pytorch_model.fp16.safetensors"),
        at("diffusion_pytorch_model.non_ema.safetensors"),
    )
    .unwrap();
    refused(
        &folder,
        "only there as `diffusion_pytorch_model.non_ema.safetensors`, a variant that was not asked for",
    );
}

#[test]
fn shards() {
    let folder = folder();
    let at = |name: &str| folder.path().join("unet").join(name);
    fs::remove_file(at("diffusion_pytorch_model.safetensors")).unwrap();
    let (one, two) = (
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    );
    let write = |file: &str, names: &[&str]| {
        let mut tensors = Tensors::default();
        for name in names {
            tensors.add(*name, &[2, 2]);
        }
        tensors.write(&at(file));
    };
    let index =
        |map: &Value| write_json(&at("diffusion_pytorch_model.safetensors.index.json"), map);
    write(one, &["a", "b"]);
    write(two, &["c"]);
    index(&json!({ "weight_map": { "a": one, "b": one, "c": two } }));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let tensors = checkpoint.require("unet").unwrap();
    assert_eq!(tensors.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(tensors.bytes("c").unwrap().len(), 8);
    index(&json!({ "weight_map": { "a": one, "b": one, "c": two, "d": two } }));
    refused(
        &folder,
        "tensor `d` is in `diffusion_pytorch_model-00002-of-00002.safetensors`, and it is not",
    );
    index(&json!({ "weight_map": { "a": one, "b": one, "c": "gone.safetensors" } }));
    refused(&folder, "`gone.safetensors`, which is not in the folder");
    for outside in [
        "/etc/passwd",
        "../vae/x.safetensors",
        "x/../../y",
        "C:\\x",
        "..\\x",
        "",
    ] {
        index(&json!({ "weight_map": { "a": outside } }));
        refused(&folder, "outside the folder; it is not opened");
    }
    index(&json!({ "weight_map": { "a": 7 } }));
    refused(&folder, "no file name for tensor `a`");
    index(&json!({ "weight_map": {} }));
    refused(&folder, "names no files");
    index(&json!([]));
    refused(&folder, "no object `weight_map`");
    write(two, &["c", "a"]);
    index(&json!({ "weight_map": { "a": one, "b": one, "c": two } }));
    refused(
        &folder,
        "tensor `a` is also in diffusion_pytorch_model-00001-of-00002.safetensors",
    );
    // a variant's index
    fs::remove_file(at("diffusion_pytorch_model.safetensors.index.json")).unwrap();
    write_json(
        &at("diffusion_pytorch_model.safetensors.index.fp16.json"),
        &json!({ "weight_map": { "b": one } }),
    );
    assert!(
        Checkpoint::open(folder.path())
            .unwrap()
            .tensors("unet")
            .unwrap()
            .info("b")
            .is_some()
    );
}

#[test]
fn pickles_stand_in_where_there_is_nothing_else() {
    let folder = folder();
    let at = |name: &str| folder.path().join("text_encoder").join(name);
    let tensors = |name: &str| {
        let values = [1.0f32, 2.0].iter().flat_map(|v| v.to_le_bytes());
        torch_archive(&[Stored {
            name: name.to_owned(),
            shape: vec![2],
            dtype: safetensors::Dtype::F32,
            bytes: values.collect(),
        }])
    };
    let names = || -> Vec<String> {
        let opened = Checkpoint::open(folder.path()).unwrap_or_else(|e| panic!("{e}"));
        let tensors = opened.tensors("text_encoder").unwrap();
        tensors.names().map(str::to_owned).collect()
    };
    let plain = names();
    fs::write(at("pytorch_model.bin"), tensors("a")).unwrap();
    assert_eq!(names(), plain);
    fs::remove_file(at("model.safetensors")).unwrap();
    assert_eq!(names(), ["a"]);
    fs::rename(at("pytorch_model.bin"), at("pytorch_model.fp16.bin")).unwrap();
    assert_eq!(names(), ["a"]);
    fs::rename(at("pytorch_model.fp16.bin"), at("part-1.bin")).unwrap();
    refused(&folder, "only there as `part-1.bin`");
    fs::write(at("part-2.bin"), tensors("b")).unwrap();
    let map = json!({ "weight_map": { "a": "part-1.bin", "b": "part-2.bin" } });
    write_json(&at("pytorch_model.bin.index.json"), &map);
    assert_eq!(names(), ["a", "b"]);
}

#[test]
fn broken_folders() {
    let bin = folder();
    let at = |name: &str| bin.path().join(name);
    fs::remove_file(at("unet/diffusion_pytorch_model.safetensors")).unwrap();
    fs::write(at("unet/diffusion_pytorch_model.bin"), b"PK").unwrap();
    refused(
        &bin,
        "diffusion_pytorch_model.bin: the file is 2 bytes, too small",
    );
    let json = folder();
    fs::write(json.path().join("unet/config.json"), "{").unwrap();
    refused(&json, "unet/config.json: this is not valid JSON");
    fs::write(json.path().join("unet/config.json"), "").unwrap();
    refused(&json, "unet/config.json: this is an empty file");
    let large = fs::File::create(json.path().join("unet/config.json")).unwrap();
    large.set_len(33 << 20).unwrap();
    refused(&json, "too large for a config");
    let missing = folder();
    fs::remove_dir_all(missing.path().join("vae")).unwrap();
    let found = detect(&Checkpoint::open(missing.path()).unwrap());
    assert!(found.refusal().unwrap().contains("its vae is missing"));
    let broken = folder();
    fs::write(
        broken
            .path()
            .join("vae/diffusion_pytorch_model.safetensors"),
        b"<html>",
    )
    .unwrap();
    refused(&broken, "an HTML page");
    // what no picture needs may be broken
    let extra = folder();
    write_json(
        &extra.path().join("model_index.json"),
        &json!({
            "_class_name": "StableDiffusionPipeline", "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "../outside": ["a", "b"],
        }),
    );
    fs::create_dir(extra.path().join("safety_checker")).unwrap();
    fs::write(extra.path().join("safety_checker/pytorch_model.bin"), b"PK").unwrap();
    let checkpoint = Checkpoint::open(extra.path()).unwrap();
    assert!(
        checkpoint.warnings()[0].contains("`safety_checker` is left out"),
        "{:?}",
        checkpoint.warnings()
    );
}

#[test]
fn folders_that_are_something_else() {
    let whole = folder();
    let sentence = |path: &Path| Checkpoint::open(path).unwrap_err().to_string();
    write_json(
        &whole.path().join("unet/config.json"),
        &json!({ "_class_name": "UNet2DConditionModel" }),
    );
    let unet = sentence(&whole.path().join("unet"));
    assert!(
        unet.contains("one component (UNet2DConditionModel) of a diffusers checkpoint"),
        "{unet}"
    );
    assert!(sentence(&whole.path().join("scheduler")).contains("one component (scheduler)"));
    let empty = tempfile::tempdir().unwrap();
    assert!(sentence(empty.path()).contains("neither model_index.json nor unet/"));
    unet_file(empty.path(), "a.safetensors");
    assert!(sentence(empty.path()).contains("give the file `a.safetensors` in it"));
    unet_file(empty.path(), "b.safetensors");
    assert!(sentence(empty.path()).contains("holds 2 model files"));
    write_json(
        &empty.path().join("config.json"),
        &json!({ "_class_name": "ControlNetModel" }),
    );
    assert!(sentence(empty.path()).contains("this is a ControlNet"));
}

fn unet_file(folder: &Path, name: &str) {
    unet().write(&folder.join(name));
}

#[test]
fn a_checkpoint_inside_the_program() {
    let folder = folder();
    let bytes = |path: &str| -> Option<&'static [u8]> {
        Some(Box::leak(
            fs::read(folder.path().join(path))
                .unwrap()
                .into_boxed_slice(),
        ))
    };
    let component = |name, config, tensors| EmbeddedComponent {
        name,
        config,
        tensors,
    };
    let components = vec![
        component(
            "unet",
            r#"{"in_channels":4,"out_channels":4}"#,
            bytes("unet/diffusion_pytorch_model.safetensors"),
        ),
        component(
            "vae",
            "{}",
            bytes("vae/diffusion_pytorch_model.safetensors"),
        ),
        component(
            "text_encoder",
            r#"{"hidden_act":"quick_gelu"}"#,
            bytes("text_encoder/model.safetensors"),
        ),
        component("scheduler", r#"{"prediction_type":"epsilon"}"#, None),
    ];
    let parts = EmbeddedCheckpoint {
        name: "demo",
        model_index: r#"{"_class_name":"StableDiffusionPipeline"}"#,
        defaults: Some(r#"{"steps":20}"#),
        components: Box::leak(components.into_boxed_slice()),
    };
    let checkpoint = Checkpoint::from_parts(&parts).unwrap();
    assert!(checkpoint.is_folder());
    assert_eq!(checkpoint.defaults().unwrap()["steps"], 20);
    let found = detect(&checkpoint);
    assert_eq!((found.family, found.refusal()), (Family::Sd1, None));
    let unet = checkpoint.require("unet").unwrap();
    assert_eq!(unet.bytes("conv_in.weight").unwrap().len(), 48 * 4 * 9 * 2);
    unet.release("conv_in.weight");
    let broken = EmbeddedCheckpoint {
        model_index: "{",
        ..parts
    };
    assert!(Checkpoint::from_parts(&broken).is_err());
}
