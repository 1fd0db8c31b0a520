//! The inspect command: the facts in a screenful and in JSON, nothing raw from the file on the terminal.

use std::path::Path;

use sd_rs::cli::args::{InspectArgs, LibraryArgs};
use sd_rs::cli::inspect::run;
use serde_json::Value;

use super::build::{Sizes, Tensors, file_of, sd1};

fn args(path: &Path, json: bool) -> InspectArgs {
    InspectArgs {
        file: path.to_owned(),
        library: LibraryArgs::default(),
        no_mmap: false,
        json,
    }
}

pub(super) fn output(path: &Path, json: bool) -> String {
    let mut out = Vec::new();
    run(&args(path, json), &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

/// Small, so that hashing is quick.
fn small() -> Tensors {
    sd1(&Sizes {
        channels: vec![8, 16],
        depths: vec![1, 0],
        context: 8,
        ..Sizes::sd1()
    })
}

#[test]
fn the_json_holds_the_facts() {
    let mut tensors = small();
    tensors.metadata("modelspec.title", "fox\u{1b}[2J");
    tensors.add("model_ema.decay", &[]);
    tensors.add("betas", &[10]);
    tensors.add("strange\u{7}", &[10]);
    let file = tensors.file();
    let text = output(&file.path, true);
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["family"], "sd1");
    assert_eq!(json["variant"], "text2image");
    assert_eq!(json["prediction"], "epsilon");
    assert_eq!(json["format"], "safetensors");
    assert_eq!(
        json["size_bytes"],
        std::fs::metadata(&file.path).unwrap().len()
    );
    // only what structures are read from is there: what it is shows all the same, and why it cannot be used
    let refusal = json["refusal"].as_str().unwrap();
    assert!(refusal.contains("has no blocks for level 0"), "{refusal}");
    assert_eq!(json["components"]["text_encoder"]["dtypes"]["I64"], 1);
    assert_eq!(json["components"]["text_encoder"]["tensors"], 15);
    assert_eq!(
        json["components"]["unet"]["prefix"],
        "model.diffusion_model."
    );
    assert_eq!(
        json["structure"]["unet"]["channels"],
        serde_json::json!([8, 16])
    );
    assert_eq!(json["metadata"]["modelspec.title"], "fox\\u{1b}[2J");
    assert_eq!(json["unused"], serde_json::json!(["strange\\u{7}"]));
    assert_eq!(
        json["ignored"]["tensors of an averaged copy (model_ema.*)"],
        1
    );
    assert_eq!(
        json["sha256"].as_str().unwrap()[..10],
        *json["autov2"].as_str().unwrap()
    );
}

#[test]
fn the_hash_is_of_the_whole_file() {
    // printf '\x35\0\0\0\0\0\0\0{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}1234' | sha256sum
    let header = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
    let file = file_of(&super::build::with_header(header, b"1234"));
    let json: Value = serde_json::from_str(&output(&file.path, true)).unwrap();
    assert_eq!(
        json["sha256"],
        "600bdb3971493543b530da1799764bb5b88392288723c2a199c60abfc82584cd"
    );
}

#[test]
fn the_text_fits_a_screen_and_is_clean() {
    let mut tensors = small();
    for i in 0..100 {
        tensors.add(format!("odd{i}\u{1b}"), &[1]);
        tensors.metadata(&format!("key{i}\n"), &"\u{1b}value".repeat(1000));
    }
    let file = tensors.file();
    let text = output(&file.path, false);
    assert!(text.lines().count() <= 40, "{text}");
    assert!(
        text.chars().all(|c| c == '\n' || !c.is_control()),
        "{text:?}"
    );
    assert!(text.lines().all(|line| line.len() < 700), "{text}");
    for part in [
        "a Stable Diffusion 1 checkpoint",
        "predicts    epsilon",
        "channels [8,16]",
        "(AutoV2)",
        "… and 92 more",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn other_files_are_refused_in_a_sentence() {
    let file = file_of(b"\x89HDF\r\n\x1a\n\0\0\0\0");
    let error = run(&args(&file.path, false), &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("an HDF5 file"));
}

#[test]
fn containers_and_quantised_types_are_told() {
    let json = |name: &str| -> Value {
        let text = output(&super::containers::fixture(name), true);
        serde_json::from_str(&text).unwrap()
    };
    let checkpoint = json("lightning.ckpt");
    assert_eq!(checkpoint["format"], "PyTorch checkpoint");
    assert_eq!(checkpoint["metadata"]["epoch"], "4");
    assert_eq!(checkpoint["components"]["tensors"]["dtypes"]["BF16"], 1);
    assert_eq!(checkpoint["sha256"].as_str().unwrap().len(), 64);
    let blocks = json("types.gguf");
    assert_eq!(blocks["format"], "GGUF");
    for (dtype, count) in [("Q8_0", 3), ("Q4_K", 1), ("F32", 1)] {
        assert_eq!(blocks["components"]["tensors"]["dtypes"][dtype], count);
    }
    let text = output(&super::containers::fixture("types.gguf"), false);
    assert!(
        text.contains("GGUF)") && text.contains("2 Q4_0, ") && !text.contains('\u{1b}'),
        "{text}"
    );
}
