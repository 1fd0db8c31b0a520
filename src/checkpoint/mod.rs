//! What is on disk: a checkpoint as named components, each a config and tensors. Headers only; no tensor is read here but one bias that
//! tells what a Stable Diffusion 2 predicts.
//!
//! ```text
//! Checkpoint::open(path) ──► single file  ──► TensorFile ──┐
//!                       └──► diffusers folder ─► components ┴─► TensorSet: names, shapes, bytes
//! family::detect(&checkpoint) ──► Detection: which model, and why
//! ```

mod component;
mod family;
mod folder;
mod gguf;
mod hash;
mod header;
mod input;
mod leftover;
mod markers;
mod pickle;
mod prediction;
mod printable;
mod refusal;
mod sniff;
mod structure;
mod tensor_file;
mod tensor_info;
mod tensor_set;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

pub use self::family::{Detection, Distilled, Family, Noise, Prediction, Variant, detect};
pub use self::hash::{auto_v2, sha256_file, sha256_tensors};
pub use self::leftover::leftover;
pub use self::printable::{printable, printable_to};
pub(crate) use self::structure::NETWORK_PREFIXES;
pub use self::structure::{Place, Structure, TextStructure, UnetStructure, VaeStructure};
pub use self::tensor_file::{Container, TensorFile};
pub use self::tensor_info::{BlockType, TensorInfo, TensorType};
pub use self::tensor_set::TensorSet;

use self::component::{Component, parse_json, read_json};
use self::tensor_set::file_name;
use crate::error::{Error, Result};

/// The components that a picture cannot be made without: where one of these is broken, the folder is refused.
const NEEDED: [&str; 5] = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"];
/// Folders beside them that a `model_index.json` need not name.
const KNOWN: [&str; 9] = [
    "unet",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "transformer",
    "prior",
    "tokenizer",
    "scheduler",
];

/// How a checkpoint is read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// The variant of a folder's files that is preferred, such as `fp16`. Without one the plain files are, then `fp16`, then `bf16`.
    pub variant: Option<String>,
    /// Read tensors with plain reads instead of mapping the files. Where mapping fails this happens by itself.
    pub no_mmap: bool,
}

/// A file or folder that was opened: its components by name, their tensors not yet read.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    single: Option<Arc<TensorSet>>,
    components: BTreeMap<String, Component>,
    model_index: Option<Value>,
    defaults: Option<Value>,
    warnings: Vec<String>,
}

/// A checkpoint inside the program, in the form of a diffusers folder.
#[derive(Debug, Clone, Copy)]
pub struct EmbeddedCheckpoint {
    /// What stands for its path in messages.
    pub name: &'static str,
    /// `model_index.json`.
    pub model_index: &'static str,
    /// `sd-rs.json`: see [`Checkpoint::defaults`].
    pub defaults: Option<&'static str>,
    /// The components.
    pub components: &'static [EmbeddedComponent],
}

/// A component of an [`EmbeddedCheckpoint`].
#[derive(Debug, Clone, Copy)]
pub struct EmbeddedComponent {
    /// Its folder's name, such as `unet`.
    pub name: &'static str,
    /// Its config as JSON.
    pub config: &'static str,
    /// Its safetensors file, if it has tensors.
    pub tensors: Option<&'static [u8]>,
}

impl Checkpoint {
    /// Opens a file of tensors (safetensors, a PyTorch checkpoint or GGUF, whatever its name) or a diffusers folder.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is nothing at `path`; [`Error::BadModel`] with one sentence when it is not a checkpoint, or a broken
    /// one; [`Error::Disk`] when it cannot be read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, &ReadOptions::default())
    }

    /// [`Checkpoint::open`] with options.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_with(path: impl AsRef<Path>, options: &ReadOptions) -> Result<Self> {
        let path = path.as_ref();
        if tensor_file::look_at(path)?.is_dir() {
            return Self::open_folder(path, options);
        }
        let file = TensorFile::open(path, !options.no_mmap)?;
        let tensors = TensorSet::new(vec![file])?;
        let mut checkpoint = Self::empty(path);
        checkpoint.warnings = mapping_warnings(&tensors);
        checkpoint.single = Some(Arc::new(tensors));
        Ok(checkpoint)
    }

    /// [`Checkpoint::open_with`], which also takes the folder of one component and gives it this name.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_part(path: impl AsRef<Path>, name: &str, options: &ReadOptions) -> Result<Self> {
        let path = path.as_ref();
        if path.join("model_index.json").is_file() || !path.join("config.json").is_file() {
            return Self::open_with(path, options);
        }
        let mut checkpoint = Self::empty(path);
        let component = Component::open(path, options)?;
        checkpoint.components.insert(name.to_owned(), component);
        Ok(checkpoint)
    }

    /// A checkpoint whose files are inside the program.
    ///
    /// # Errors
    /// [`Error::BadModel`] when a config is not JSON or tensors are not a good safetensors file.
    pub fn from_parts(parts: &EmbeddedCheckpoint) -> Result<Self> {
        let root = PathBuf::from(parts.name);
        let mut checkpoint = Self::empty(&root);
        let json = |name: &str, text: &str| parse_json(&root.join(name), text.as_bytes());
        checkpoint.model_index = Some(json("model_index.json", parts.model_index)?);
        checkpoint.defaults = match parts.defaults {
            Some(text) => Some(json("sd-rs.json", text)?),
            None => None,
        };
        for part in parts.components {
            let folder = root.join(part.name);
            let tensors = match part.tensors {
                Some(bytes) => Some(TensorSet::from_static(
                    folder.join("model.safetensors"),
                    bytes,
                )?),
                None => None,
            };
            let component = Component {
                config: Some(parse_json(
                    &folder.join("config.json"),
                    part.config.as_bytes(),
                )?),
                tensors: tensors.map(Arc::new),
                folder,
            };
            checkpoint
                .components
                .insert(part.name.to_owned(), component);
        }
        Ok(checkpoint)
    }

    fn empty(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            single: None,
            components: BTreeMap::new(),
            model_index: None,
            defaults: None,
            warnings: Vec::new(),
        }
    }

    fn open_folder(path: &Path, options: &ReadOptions) -> Result<Self> {
        let index = path.join("model_index.json");
        let has_index = index.is_file();
        let has_network = ["unet", "transformer"]
            .iter()
            .any(|name| path.join(name).is_dir());
        if !has_index && !has_network {
            return Err(Error::bad_model(path, what_folder(path)));
        }
        let mut checkpoint = Self::empty(path);
        if has_index {
            checkpoint.model_index = Some(read_json(&index)?);
        }
        let defaults = path.join("sd-rs.json");
        if defaults.is_file() {
            checkpoint.defaults = Some(read_json(&defaults)?);
        }
        let named = checkpoint.named().into_iter().map(|(name, _)| name);
        let names: Vec<String> = named.chain(KNOWN.map(str::to_owned)).collect();
        for name in names {
            checkpoint.add_component(&name, options)?;
        }
        Ok(checkpoint)
    }

    fn add_component(&mut self, name: &str, options: &ReadOptions) -> Result<()> {
        let folder = self.path.join(name);
        if self.components.contains_key(name) || !folder.is_dir() {
            return Ok(());
        }
        match Component::open(&folder, options) {
            Ok(component) => {
                if let Some(tensors) = &component.tensors {
                    self.warnings.extend(mapping_warnings(tensors));
                }
                self.components.insert(name.to_owned(), component);
                Ok(())
            }
            Err(error) if NEEDED.contains(&name) => Err(error),
            Err(error) => {
                self.warnings
                    .push(format!("component `{name}` is left out: {error}"));
                Ok(())
            }
        }
    }

    /// The components that `model_index.json` names and that are not null, with their classes.
    pub(crate) fn named(&self) -> Vec<(String, String)> {
        let Some(Value::Object(index)) = &self.model_index else {
            return Vec::new();
        };
        let class = |value: &Value| value.get(1).and_then(Value::as_str).map(str::to_owned);
        let is_folder_name = |name: &str| {
            name.chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
        };
        index
            .iter()
            .filter(|(name, _)| !name.starts_with('_') && is_folder_name(name))
            .filter_map(|(name, value)| Some((name.clone(), class(value)?)))
            .collect()
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether this has the form of a diffusers folder: components with configs. Else it is a single file.
    pub fn is_folder(&self) -> bool {
        self.single.is_none()
    }

    /// The tensors of a single file.
    pub fn single(&self) -> Option<Arc<TensorSet>> {
        self.single.clone()
    }

    /// A folder's components, sorted.
    pub fn component_names(&self) -> impl Iterator<Item = &str> {
        self.components.keys().map(String::as_str)
    }

    /// The tensors of a folder's component.
    pub fn tensors(&self, component: &str) -> Option<Arc<TensorSet>> {
        self.components.get(component)?.tensors.clone()
    }

    /// The config of a folder's component (`scheduler_config.json` and `tokenizer_config.json` for those two).
    pub fn config(&self, component: &str) -> Option<&Value> {
        self.components.get(component)?.config.as_ref()
    }

    /// The folder of a component, for its other files (a tokenizer's vocabulary). Does not exist on disk for embedded checkpoints.
    pub fn component_path(&self, component: &str) -> Option<&Path> {
        Some(&self.components.get(component)?.folder)
    }

    /// [`Checkpoint::tensors`], or a sentence that names what is missing.
    ///
    /// # Errors
    /// [`Error::BadModel`] when the folder has no such component, or the component has no tensors.
    pub fn require(&self, component: &str) -> Result<Arc<TensorSet>> {
        self.tensors(component)
            .ok_or_else(|| Error::bad_model(&self.path, self.missing(component)))
    }

    /// [`Checkpoint::config`], or a sentence that names what is missing.
    ///
    /// # Errors
    /// [`Error::BadModel`] when the folder has no such component, or the component has no config.
    pub fn require_config(&self, component: &str) -> Result<&Value> {
        let reason = || match self.components.contains_key(component) {
            true => {
                format!("the component `{component}` has no config.json; download the folder again")
            }
            false => self.missing(component),
        };
        self.config(component)
            .ok_or_else(|| Error::bad_model(&self.path, reason()))
    }

    fn missing(&self, component: &str) -> String {
        if self.components.contains_key(component) {
            format!(
                "the component `{component}` has no .safetensors or .bin file; download the folder again"
            )
        } else {
            format!("the folder has no component `{component}`; download the whole checkpoint")
        }
    }

    /// `model_index.json` of a folder.
    pub fn model_index(&self) -> Option<&Value> {
        self.model_index.as_ref()
    }

    /// `sd-rs.json` of a folder: what its maker recommends (`steps`, `cfg_scale`).
    pub fn defaults(&self) -> Option<&Value> {
        self.defaults.as_ref()
    }

    /// What was noticed while opening: components left out, files that could not be mapped.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// All tensor files, in the order of their components.
    pub fn files(&self) -> impl Iterator<Item = &TensorFile> {
        let sets = self.components.values().filter_map(|c| c.tensors.as_ref());
        self.single
            .iter()
            .chain(sets)
            .flat_map(|tensors| tensors.files())
    }
}

fn mapping_warnings(tensors: &TensorSet) -> Vec<String> {
    let warning =
        |file: &TensorFile| Some(format!("{}: {}", file.path().display(), file.unmapped()?));
    tensors.files().filter_map(warning).collect()
}

/// What single files of models end in.
const FILES: [&str; 3] = [".safetensors", ".ckpt", ".gguf"];

/// What a folder is that is not a diffusers checkpoint, and what to give instead.
fn what_folder(path: &Path) -> String {
    let mut names: Vec<String> = std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(file_name(&entry.ok()?.path())))
        .collect();
    names.sort();
    let config = path.join("config.json");
    let class = read_json(&config).ok().and_then(|config| {
        let class = config
            .get("_class_name")
            .or_else(|| config.get("architectures")?.get(0));
        class.and_then(Value::as_str).map(printable)
    });
    let scheduler = names.iter().any(|name| name == "scheduler_config.json");
    if let Some(class) = class.or_else(|| scheduler.then(|| "scheduler".to_owned())) {
        if class.contains("ControlNet") {
            return format!(
                "this is a ControlNet ({class}), which is not a base model; give a base model with --model, and this with --controlnet"
            );
        }
        return format!(
            "this is one component ({class}) of a diffusers checkpoint; give the folder that holds model_index.json, perhaps the one above it"
        );
    }
    if names
        .iter()
        .any(|name| name == "adapter_config.json" || name.contains("lora"))
    {
        return "this is a LoRA's folder, not a base model; give a base model with --model, and this with --lora"
            .to_owned();
    }
    let files: Vec<String> = names
        .iter()
        .filter(|name| FILES.iter().any(|ending| name.ends_with(ending)))
        .map(|name| printable(name))
        .collect();
    match files.split_first() {
        Some((only, [])) => format!("this folder is not a diffusers checkpoint; give the file `{only}` in it"),
        Some((first, rest)) => format!(
            "this folder is not a diffusers checkpoint but holds {} model files; give one of them, such as `{first}`",
            rest.len() + 1
        ),
        None => "this folder is not a diffusers checkpoint: it has neither model_index.json nor unet/; give a model file or such a folder"
            .to_owned(),
    }
}
