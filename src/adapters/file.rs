//! An adapter's file: its tensors grouped by module and form, its alphas, and what it says of itself. Headers only; the tensors stay where they
//! are until a weight is made.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::embedding::BUNDLE;
use super::form::{Form, Parts, Stored};
use super::keys::{Role, split};
use super::settings::Settings;
use crate::checkpoint::{Checkpoint, Family, ReadOptions, TensorSet, printable};
use crate::error::{Error, Result};
use crate::weights::{is_readable, values};

/// What files of a LoRA's folder are called, by diffusers and by PEFT.
const FILES: [&str; 4] = [
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
];

/// One adapter, opened.
#[derive(Debug)]
pub struct Adapter {
    path: PathBuf,
    file: PathBuf,
    pub(super) tensors: Arc<TensorSet>,
    pub(super) modules: Vec<Module>,
    metadata: BTreeMap<String, String>,
    /// Tensors that are no part of a change.
    pub(super) strange: Vec<String>,
}

/// The change of one module.
#[derive(Debug)]
pub(super) struct Module {
    /// Its name in the file.
    pub(super) name: String,
    pub(super) form: Option<Form>,
    /// alpha / rank, or what else the file says; 1 where it says nothing.
    pub(super) scale: f32,
    pub(super) alpha: Option<f32>,
    /// DoRA's lengths.
    pub(super) magnitude: Option<Stored>,
    /// A change of the bias, and whether the scale holds for it.
    pub(super) bias: Option<(Stored, bool)>,
}

impl Adapter {
    /// Opens a file, or the folder that diffusers or PEFT saves one in.
    ///
    /// # Errors
    /// [`Error::BadModel`] with one sentence when it is not an adapter, a broken one, or of a form that is not built; those of
    /// [`Checkpoint::open`].
    pub fn open(path: &Path, options: &ReadOptions) -> Result<Self> {
        let file = inside(path);
        let checkpoint = Checkpoint::open_with(&file, options)?;
        let refused = |reason: String| Error::bad_model(path, reason);
        let tensors = checkpoint.single();
        let tensors = tensors.ok_or_else(|| {
            refused("a model's folder is not a LoRA; give a LoRA's file with --lora".to_owned())
        })?;
        let texts = tensors.files().flat_map(|file| file.metadata());
        let metadata: BTreeMap<String, String> = texts
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let settings = Settings::read(&metadata, &file);
        let (groups, strange) = group(&tensors);
        if groups.is_empty() {
            let is = crate::checkpoint::detect(&checkpoint).title();
            let what = match crate::checkpoint::detect(&checkpoint).family {
                Family::Embedding => "; give it with --embedding",
                Family::Hypernetwork => {
                    ", and hypernetworks are not supported; give a LoRA with --lora"
                }
                _ => "; give one with --lora",
            };
            return Err(refused(format!(
                "this is {is}, not a LoRA or another adapter{what}"
            )));
        }
        let mut modules = Vec::with_capacity(groups.len());
        for (name, parts) in groups {
            let module = Module::new(name, &parts, &tensors, &settings);
            modules.push(module.map_err(|(name, reason)| {
                refused(format!(
                    "module `{}` cannot be used: {reason}",
                    printable(&name)
                ))
            })?);
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            tensors,
            modules,
            metadata,
            strange,
        })
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file, which lies in [`Adapter::path`] where that is a folder.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Whether the file brings textual inversions along.
    pub fn has_embeddings(&self) -> bool {
        self.tensors.names_below(BUNDLE).next().is_some()
    }

    /// What the file's header says.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

/// The file that is meant by a folder.
fn inside(path: &Path) -> PathBuf {
    let candidates = FILES.iter().map(|name| path.join(name));
    let mut there = candidates.filter(|_| path.is_dir()).filter(|p| p.is_file());
    there.next().unwrap_or_else(|| path.to_owned())
}

/// The tensors by module, and the names of those that are none's.
fn group(tensors: &TensorSet) -> (BTreeMap<String, Parts>, Vec<String>) {
    let mut groups: BTreeMap<String, Parts> = BTreeMap::new();
    let mut strange = Vec::new();
    for name in tensors.names().filter(|name| !name.starts_with(BUNDLE)) {
        let shape = tensors.shape(name).unwrap_or_default().to_vec();
        let found = split(name).filter(|(module, role)| {
            *role != Role::Ia3Weight || tensors.info(&format!("{module}.on_input")).is_some()
        });
        match found {
            Some((module, role)) => {
                let stored = Stored {
                    name: name.to_owned(),
                    shape,
                };
                let parts = groups.entry(module.to_owned()).or_default();
                parts.insert(role, stored);
            }
            None => strange.push(name.to_owned()),
        }
    }
    (groups, strange)
}

impl Module {
    /// `up [rows, rank]` and `down [rank, ..]` of a change that is their product and nothing else.
    pub(super) fn factors(&self) -> Option<(&Stored, &Stored)> {
        match (&self.form, &self.magnitude) {
            (
                Some(Form::LowRank {
                    up,
                    down,
                    mid: None,
                }),
                None,
            ) => Some((up, down)),
            _ => None,
        }
    }

    fn new(
        name: String,
        parts: &Parts,
        tensors: &TensorSet,
        settings: &Settings,
    ) -> std::result::Result<Self, (String, String)> {
        let failed = |reason: String| (name.clone(), reason);
        let scalar = |role: Role| -> std::result::Result<Option<f64>, (String, String)> {
            let Some(stored) = parts.get(&role) else {
                return Ok(None);
            };
            let value = values::scalar(tensors, &stored.name).map_err(|e| failed(e.to_string()))?;
            let shown = printable(&stored.name);
            match value.filter(|value| value.is_finite()) {
                Some(value) => Ok(Some(value)),
                None => Err(failed(format!("`{shown}` is not a number"))),
            }
        };
        let on_input = scalar(Role::Ia3OnInput)? != Some(0.0);
        let alpha = scalar(Role::Alpha)?.map(|alpha| alpha as f32);
        let alpha = alpha.or_else(|| settings.alpha(&name));
        for stored in parts.values() {
            if stored.shape.contains(&0) {
                let (shown, shape) = (printable(&stored.name), &stored.shape);
                return Err(failed(format!(
                    "`{shown}` has the shape {shape:?}, which holds no numbers; download the file again"
                )));
            }
            let info = tensors.info(&stored.name);
            if let Some(info) = info.filter(|info| !is_readable(info.dtype))
                && !matches!(info.elements(), 1)
            {
                let shown = printable(&stored.name);
                return Err(failed(format!("`{shown}` is of the type {}", info.dtype)));
            }
        }
        let form = Form::of(parts, on_input).map_err(&failed)?;
        let rank = form.as_ref().and_then(Form::rank);
        // a rotation's alpha is a bound, not a scale
        let scale = match (alpha, rank) {
            (Some(alpha), Some(rank)) if alpha != 0.0 => alpha / rank as f32,
            (None, Some(rank)) => settings.scale(&name, rank),
            _ => 1.0,
        };
        let bias = parts.get(&Role::DiffBias).map(|diff| (diff.clone(), false));
        let bias = bias.or_else(|| Some((parts.get(&Role::UpBias)?.clone(), true)));
        Ok(Self {
            form,
            scale,
            alpha,
            magnitude: parts.get(&Role::Magnitude).cloned(),
            bias,
            name,
        })
    }
}
