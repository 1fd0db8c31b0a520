//! Files of models into other forms: single file ↔ folder, other types, quantised, merged, with another autoencoder.
//!
//! ```text
//! Checkpoint ─▶ view: items under the output's names ─▶ plan: each item's type and what is mixed into it ─▶ one task after the other ─▶ file
//! ```
//!
//! Everything is decided from headers before the first byte is written. Then each tensor is read, converted and written in turn, a piece at a
//! time. What is written takes its name when it is whole.

mod blocks;
mod configs;
mod encode;
mod folder;
mod gguf;
mod item;
mod merge;
mod names;
mod plan;
mod provenance;
mod safetensors;
mod target;
mod task;
mod view;

use std::path::{Path, PathBuf};

use self::provenance::About;
use self::target::Target;
use self::view::Model;
use crate::checkpoint::{BlockType, Checkpoint};
use crate::error::{Error, Result};
use crate::output::{NewFile, check_room};

pub use self::item::WeightName;
pub use self::merge::{Merge, Others};

/// What is to be converted, and into what.
pub struct Request<'a> {
    /// The model.
    pub input: &'a Checkpoint,
    /// Where it goes: `….safetensors`, `….gguf`, or a folder.
    pub output: PathBuf,
    /// The weights' type.
    pub dtype: Dtype,
    /// The type of quantised weights; for GGUF.
    pub quantise: Option<BlockType>,
    /// What is merged into it.
    pub merge: Option<Merge<'a>>,
    /// The autoencoder that takes its own's place.
    pub vae: Option<&'a Checkpoint>,
    /// Weights that are changed on the way: LoRAs.
    pub change: Option<&'a dyn Change>,
    /// What else the output's metadata says, such as which LoRAs are in it.
    pub notes: Vec<(String, String)>,
    /// What is there may be replaced.
    pub force: bool,
    /// For the metadata; the same input gives the same bytes without.
    pub date: Option<String>,
}

/// The type of the weights in the output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Dtype {
    /// As in the input.
    #[default]
    Keep,
    /// 32 bits.
    F32,
    /// 16 bits, eleven of them precise: up to 65504.
    F16,
    /// 16 bits, eight of them precise.
    Bf16,
}

/// Changes weights while they are converted, by diffusers' names: a LoRA adds its product.
pub trait Change: Sync {
    /// Whether this weight is changed.
    fn touches(&self, weight: &WeightName) -> bool;

    /// Changes the numbers of a weight of this shape, row-major as in a diffusers folder; called once for each weight that is touched.
    ///
    /// # Errors
    /// When the change does not fit the weight.
    fn apply(&self, weight: &WeightName, shape: &[usize], numbers: &mut [f32]) -> Result<()>;
}

/// Hears how it goes, and may stop it.
pub trait Watch {
    /// So many bytes will be written.
    fn planned(&self, bytes: u64);
    /// So many more are.
    fn written(&self, bytes: u64);
    /// Whether to stop.
    fn stopped(&self) -> bool;
    /// What the user should know.
    fn note(&self, text: &str);
}

/// Converts a model.
///
/// # Errors
/// Whatever stops it; then nothing is left behind, and what was there is as it was.
pub fn convert(request: &Request<'_>, watch: &dyn Watch) -> Result<()> {
    let target = Target::of(request)?;
    target.refuse_input(request)?;
    let mut model = Model::new(request.input, request.vae)?;
    match target {
        Target::Folder => folder::write(request, &mut model, watch),
        Target::SafeTensors | Target::Gguf => single(request, target, &mut model, watch),
    }
}

fn single(
    request: &Request<'_>,
    target: Target,
    model: &mut Model<'_>,
    watch: &dyn Watch,
) -> Result<()> {
    let items = model.single()?;
    let tasks = plan::tasks(request, target, items, watch)?;
    let about = About {
        title: title(&request.output),
        date: request.date.as_deref(),
        merge: request.merge.as_ref(),
        safetensors: target == Target::SafeTensors,
    };
    let mut metadata = provenance::metadata(model, &about);
    metadata.extend(request.notes.iter().cloned());
    let bytes = plan::bytes(&tasks)?;
    check_room(&request.output, bytes)?;
    watch.planned(bytes);
    let file = NewFile::create(&request.output, request.force)?;
    let with = (request.change, watch);
    match target {
        Target::Gguf => {
            let keys = gguf::Keys {
                architecture: gguf::architecture(model.detection.family),
                file_type: gguf::file_type(plan::most(&tasks)),
                texts: metadata,
            };
            gguf::write(file, tasks, &keys, with)
        }
        _ => safetensors::write(file, &request.output, tasks, &metadata, with),
    }
}

/// A file's name without its ending.
fn title(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default();
    stem.to_string_lossy().into_owned()
}

/// The refusal of a command line.
fn usage<T>(reason: &str) -> Result<T> {
    Err(Error::Usage(reason.to_owned()))
}
