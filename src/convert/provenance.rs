//! What a converted file says of itself: ModelSpec's fields, how it was merged, and what its input said.
//!
//! <https://github.com/Stability-AI/ModelSpec>; the recipe's fields are A1111's (`modules/extras.py`).

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::merge::{Merge, Others};
use super::safetensors::HASH;
use super::view::Model;
use crate::checkpoint::{Checkpoint, Family, Variant};
use crate::sampling;
use crate::spec::native_size;

/// What programs call this one.
const PROGRAM: &str = "sd-rs";
/// Keys of the input that are not true of the output: hashes of its bytes, and a GGUF's words on its own form.
const OF_THE_INPUT: [&str; 9] = [
    "modelspec.hash_sha256",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.alignment",
    "modelspec.merged_from",
    "format",
];

/// What the output should say.
pub(super) struct About<'a> {
    /// Its title: the file's name without ending.
    pub(super) title: String,
    /// The date that the user gave.
    pub(super) date: Option<&'a str>,
    /// What was merged.
    pub(super) merge: Option<&'a Merge<'a>>,
    /// The output is of safetensors, which can hold a hash of its tensors.
    pub(super) safetensors: bool,
}

/// The metadata of the output.
pub(super) fn metadata(model: &Model<'_>, about: &About<'_>) -> BTreeMap<String, String> {
    let mut texts = BTreeMap::new();
    for file in model.checkpoint.files() {
        for (key, text) in file.metadata() {
            texts.entry(key.clone()).or_insert_with(|| text.clone());
        }
    }
    texts.retain(|key, _| !OF_THE_INPUT.contains(&key.as_str()) && !key.starts_with("GGUF."));
    if about.safetensors {
        texts.insert("format".to_owned(), "pt".to_owned());
    }
    if let Some(architecture) = architecture(model) {
        let mut set = |key: &str, text: String| {
            texts.entry(format!("modelspec.{key}")).or_insert(text);
        };
        set("sai_model_spec", "1.0.0".to_owned());
        set("architecture", architecture);
        set(
            "implementation",
            "https://github.com/Stability-AI/generative-models".to_owned(),
        );
        set("title", about.title.clone());
        let prediction = model.known().map(|spec| spec.prediction);
        let prediction = prediction.unwrap_or(sampling::Prediction::Epsilon);
        let size = native_size(model.detection.family, prediction);
        if size > 0 {
            set("resolution", format!("{size}x{size}"));
        }
        let word = match prediction {
            sampling::Prediction::V => Some("v"),
            sampling::Prediction::Epsilon => Some("epsilon"),
            _ => None,
        };
        if let Some(word) = word {
            set("prediction_type", word.to_owned());
        }
        if let Some(date) = about.date {
            texts.insert("modelspec.date".to_owned(), date.to_owned());
        }
        if about.safetensors {
            texts.insert(HASH.to_owned(), String::new());
        }
    }
    if let Some(merge) = about.merge {
        let (recipe, models) = recipe(model.checkpoint, merge);
        texts.insert("modelspec.merged_from".to_owned(), models.join(", "));
        texts.insert("sd_merge_recipe".to_owned(), recipe.to_string());
        texts.insert("sd_merge_models".to_owned(), json!(models).to_string());
    }
    texts
}

/// ModelSpec's name of what the model is.
fn architecture(model: &Model<'_>) -> Option<String> {
    let detection = &model.detection;
    let base = match detection.family {
        Family::Sd1 => "stable-diffusion-v1",
        Family::Sd2 => match model.known().map(|spec| spec.prediction) {
            Some(sampling::Prediction::V) => "stable-diffusion-v2-768-v",
            _ => "stable-diffusion-v2-512",
        },
        Family::Sdxl => "stable-diffusion-xl-v1-base",
        Family::SdxlRefiner => "stable-diffusion-xl-v1-refiner",
        Family::Ssd1b => "segmind-ssd-1b",
        Family::Vega => "segmind-vega",
        Family::Koala => "koala",
        Family::Sd3 => "stable-diffusion-3",
        Family::Sd35 => "stable-diffusion-3.5",
        Family::Flux1 => "flux-1",
        _ => return None,
    };
    let kind = match detection.variant {
        Variant::Inpainting => "-inpainting",
        Variant::Pix2Pix => "-edit",
        _ => "",
    };
    Some(format!("{base}{kind}"))
}

fn recipe(input: &Checkpoint, merge: &Merge<'_>) -> (Value, Vec<String>) {
    let name = |checkpoint: &Checkpoint| {
        let stem = checkpoint.path().file_name();
        stem.map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    };
    let (method, others) = match merge.others {
        Others::Sum(b) => ("Weighted sum", vec![name(b)]),
        Others::Difference(b, c) => ("Add difference", vec![name(b), name(c)]),
    };
    let recipe = json!({
        "type": PROGRAM,
        "primary_model": name(input),
        "secondary_model": others.first(),
        "tertiary_model": others.get(1),
        "interp_method": method,
        "multiplier": merge.alpha,
        "block_weights": merge.blocks,
    });
    let models = std::iter::once(name(input)).chain(others).collect();
    (recipe, models)
}
