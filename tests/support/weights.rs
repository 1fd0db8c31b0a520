//! Model fixtures: reads the cases of `tests/fixtures/models`, makes their weights from tensor names alone, and writes them to disk in every form
//! that real checkpoints have. The formats are in that folder's README.md; its `weights.py` makes the same bits with numpy.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod check;
mod folder;
mod json;
mod single;
mod values;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::Value;

use json::{dtype_named, law, rows, sizes, text};

pub(crate) use folder::FolderForm;
pub(crate) use single::{SingleForm, linear_projection};
pub(crate) use values::{Law, Stored, Values, edit, encode, floats, read, save, uniform};

/// One model with what diffusers computes with it.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// case.json.
    pub(crate) record: Value,
    folder: PathBuf,
}

impl Case {
    /// The names of all cases.
    pub(crate) fn names() -> Vec<String> {
        let entries = fs::read_dir(fixtures())
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let cases = entries.filter(|path| path.join("case.json").is_file());
        let mut names: Vec<String> = cases
            .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
            .collect();
        names.sort();
        names
    }

    /// Reads the case `name`.
    pub(crate) fn load(name: &str) -> Self {
        super::card::choose();
        let folder = fixtures().join(name);
        let text = fs::read_to_string(folder.join("case.json"))
            .unwrap_or_else(|e| panic!("case {name}: {e}"));
        Self {
            record: serde_json::from_str(&text).unwrap(),
            folder,
        }
    }

    /// The components that the case has: `unet` or `transformer`, and `vae` and text towers if it is a whole model.
    pub(crate) fn components(&self) -> Vec<&str> {
        let components = self.record["components"].as_object().unwrap();
        components.keys().map(String::as_str).collect()
    }

    /// Whether the UNet is of the Stable Diffusion XL family: it is given a pooled text vector and sizes beside the time.
    pub(crate) fn is_sdxl(&self) -> bool {
        self.config("unet")["addition_embed_type"] == "text_time"
    }

    /// Whether a transformer stands in the UNet's place: Stable Diffusion 3 or FLUX.
    pub(crate) fn is_dit(&self) -> bool {
        self.components().contains(&"transformer")
    }

    /// Whether the UNet is given anything besides latents, timestep and text.
    pub(crate) fn has_needs(&self) -> bool {
        !rows(&self.record["needs"]).is_empty()
    }

    /// A component's config.
    pub(crate) fn config(&self, component: &str) -> &Value {
        &self.record["components"][component]["config"]
    }

    /// A component's weights under diffusers' names, as transformers 5 spells the text towers' (only `text_encoder` is without `text_model.`).
    pub(crate) fn weights(&self, component: &str, dtype: Option<Dtype>) -> Vec<Stored> {
        let record = &self.record["components"][component];
        let kept = dtype_named(&record["dtype"]);
        let make = |row: &Value| {
            let (name, shape) = (text(&row[0]), sizes(&row[1]));
            let values = match row[2].as_str() {
                Some("eye") => identity(shape[0]),
                _ => uniform(
                    &format!("{component}/{name}"),
                    &shape,
                    law(&row[2], &row[3]),
                ),
            };
            Stored {
                bytes: encode(&values, kept, dtype.unwrap_or(kept)),
                dtype: dtype.unwrap_or(kept),
                name,
                shape,
            }
        };
        rows(&record["tensors"]).iter().map(make).collect()
    }

    /// A tensor that is given to the model, such as `input/latents`.
    pub(crate) fn input(&self, name: &str) -> Values {
        let row = rows(&self.record["inputs"]["tensors"])
            .iter()
            .find(|row| row[0] == name);
        let row = row.unwrap_or_else(|| panic!("no input {name}"));
        let shape = sizes(&row[1]);
        let data = uniform(name, &shape, law(&row[2], &row[3]));
        Values { shape, data }
    }

    /// All tensors that diffusers computed.
    pub(crate) fn expected(&self) -> HashMap<String, Values> {
        floats(&self.folder.join("expected.safetensors"))
    }

    /// How far float32 is from float64 arithmetic in an expected tensor, as relative L2; none where the two cannot be compared.
    pub(crate) fn noise(&self, expected: &str) -> Option<f64> {
        self.record["noise"][expected].as_f64()
    }
}

/// A matrix that changes nothing.
fn identity(size: usize) -> Vec<f32> {
    let places = 0..size * size;
    places.map(|i| f32::from(i % (size + 1) == 0)).collect()
}

/// The folder of the cases, from any package of the workspace.
fn fixtures() -> PathBuf {
    let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    above
        .map(|folder| folder.join("tests/fixtures/models"))
        .find(|folder| folder.is_dir())
        .expect("tests/fixtures/models")
}
