//! Checkpoints as diffusers folders.

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};

use super::Case;
use super::json::text;
use super::values::{Stored, save};

/// Which diffusers folder to write; the default is what diffusers itself writes today.
#[derive(Debug, Clone, Default)]
pub(crate) struct FolderForm {
    /// Stored type; the case's own if none. A narrower one changes the weights, and so what they compute.
    pub(crate) dtype: Option<Dtype>,
    /// Part of the file names, such as `fp16`. Writing a folder twice, with and without, leaves both kinds of files.
    pub(crate) variant: Option<&'static str>,
    /// Files per component, with an index; one without index if none.
    pub(crate) shards: Option<usize>,
    /// Names as before 2023 (the autoencoder's `query`, `key` …) and before transformers 5.6 (`text_model.`).
    pub(crate) old_names: bool,
}

impl Case {
    /// Writes the model as a diffusers folder (without CLIP's vocabulary).
    pub(crate) fn write_folder(&self, folder: &Path, form: &FolderForm) {
        if let Some(files) = self.record["files"].as_object() {
            for (path, content) in files {
                write_json(&folder.join(path), content);
            }
        }
        for component in self.components() {
            let place = folder.join(component);
            write_json(&place.join("config.json"), self.config(component));
            let mut tensors = self.weights(component, form.dtype);
            if form.old_names {
                rename_to_old(component, &mut tensors);
            }
            let stem = text(&self.record["components"][component]["file"]);
            write_component(&place, &stem, &tensors, form);
        }
    }
}

/// The names that folders had before diffusers renamed the autoencoder's attention and transformers flattened the text tower.
fn rename_to_old(component: &str, tensors: &mut [Stored]) {
    for tensor in tensors {
        let name = &mut tensor.name;
        if component == "text_encoder" {
            name.insert_str(0, "text_model.");
        } else if component == "vae" && name.contains("mid_block.attentions.0.") {
            for (new, old) in [
                ("to_q", "query"),
                ("to_k", "key"),
                ("to_v", "value"),
                ("to_out.0", "proj_attn"),
            ] {
                *name = name.replace(&format!(".{new}."), &format!(".{old}."));
            }
        }
    }
}

/// Writes one component's tensors into one file, or several and an index, named as diffusers and transformers do.
fn write_component(folder: &Path, stem: &str, tensors: &[Stored], form: &FolderForm) {
    let variant = form
        .variant
        .map(|variant| format!(".{variant}"))
        .unwrap_or_default();
    let Some(count) = form.shards else {
        return save(
            tensors.iter(),
            &folder.join(format!("{stem}{variant}.safetensors")),
        );
    };
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(count)).enumerate() {
        let file = format!("{stem}{variant}-{:05}-of-{count:05}.safetensors", i + 1);
        save(part.iter(), &folder.join(&file));
        map.extend(part.iter().map(|tensor| (tensor.name.clone(), json!(file))));
    }
    let size: usize = tensors.iter().map(|tensor| tensor.bytes.len()).sum();
    let index = json!({ "metadata": { "total_size": size }, "weight_map": map });
    write_json(
        &folder.join(format!("{stem}.safetensors.index{variant}.json")),
        &index,
    );
}

fn write_json(path: &Path, content: &Value) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, serde_json::to_string_pretty(content).unwrap()).unwrap();
}
