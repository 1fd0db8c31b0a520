//! Flags of pictures that steer.

use std::path::PathBuf;

use clap::Args;

use super::LibraryArgs;
use crate::checkpoint::Checkpoint;
use crate::cli::fetch::open_part;
use crate::control::{Preprocessor, Resize};
use crate::error::{Error, Result};
use crate::picture::Picture;
use crate::pipeline::{ControlMode, ControlRequest};
use crate::spec::CONTROL;

/// Networks that steer, and a picture for each. Every flag may be repeated; the n-th of each belongs to the n-th network.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Pictures that steer")]
pub struct ControlArgs {
    /// A ControlNet, Control-LoRA, ControlNet-LLLite or T2I-Adapter: a file, a folder, or a name as --model takes; may be repeated, as all of these
    #[arg(long, value_name = "MODEL", visible_alias = "t2i-adapter")]
    pub controlnet: Vec<PathBuf>,
    /// The picture that it looks at
    #[arg(long, value_name = "FILE")]
    pub control_image: Vec<PathBuf>,
    /// What is made of the picture first; `sd-rs control` shows it [default: none, the picture is a map already]
    #[arg(long, value_name = "NAME", value_enum)]
    pub control_preprocessor: Vec<Preprocessor>,
    /// What is hidden of the picture, for ControlNets that fill in: white is hidden
    #[arg(long, value_name = "FILE")]
    pub control_mask: Vec<PathBuf>,
    /// How the picture gets the result's size [default: stretch]
    #[arg(long, value_name = "HOW", value_enum)]
    pub control_resize: Vec<Resize>,
    /// How much it has to say [default: 1]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub control_scale: Vec<f64>,
    /// The part of the steps at which it begins to act [default: 0]
    #[arg(long, value_name = "F")]
    pub control_start: Vec<f64>,
    /// The part of the steps at which it ceases to act [default: 1]
    #[arg(long, value_name = "F")]
    pub control_end: Vec<f64>,
    /// Whether picture or prompt matters more; not for ControlNet-LLLites [default: balanced]
    #[arg(long, value_name = "MODE", value_enum)]
    pub control_mode: Vec<ControlMode>,
    /// What the picture is, for a ControlNet of several kinds (union), by its number
    #[arg(long, value_name = "N")]
    pub control_type: Vec<usize>,
}

/// Arguments of `control`.
#[derive(Debug, Args)]
pub struct ControlMapArgs {
    /// A picture: PNG, JPEG or WebP
    pub picture: PathBuf,
    /// Where the map goes, a PNG
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// What is made of it
    #[arg(long, value_name = "NAME", value_enum)]
    pub preprocessor: Preprocessor,
    /// Replace what is there
    #[arg(long)]
    pub overwrite: bool,
}

/// A choice as it is typed.
pub(in crate::cli) fn value_name(value: &impl clap::ValueEnum) -> String {
    let name = value.to_possible_value();
    let name = name.map(|value| value.get_name().to_owned());
    name.unwrap_or_default()
}

/// A network that steers, opened.
pub(in crate::cli) struct OpenedControl {
    pub(in crate::cli) checkpoint: Checkpoint,
    pub(in crate::cli) name: String,
}

impl ControlArgs {
    /// Opens the networks.
    ///
    /// # Errors
    /// When one is not there, or no file of tensors.
    pub(in crate::cli) fn open(
        &self,
        library: &LibraryArgs,
        no_mmap: bool,
    ) -> Result<Vec<OpenedControl>> {
        self.controlnet
            .iter()
            .map(|path| {
                let opened = open_part(path, CONTROL, library, no_mmap)?;
                Ok(OpenedControl {
                    checkpoint: opened.checkpoint,
                    name: opened.name,
                })
            })
            .collect()
    }

    /// What is asked of each.
    ///
    /// # Errors
    /// [`Error::Usage`] when the flags' numbers do not fit; when a picture cannot be read.
    pub(in crate::cli) fn requests(&self) -> Result<Vec<ControlRequest>> {
        self.requests_of(None)
    }

    /// The same where all look at one picture if none is given.
    ///
    /// # Errors
    /// As [`ControlArgs::requests`].
    pub(in crate::cli) fn requests_of(&self, own: Option<&Picture>) -> Result<Vec<ControlRequest>> {
        let count = self.controlnet.len();
        let own = own.filter(|_| self.control_image.is_empty());
        if self.control_image.len() != count && own.is_none() {
            return Err(Error::Usage(format!(
                "there are {count} of --controlnet and {} of --control-image, expected one picture for each",
                self.control_image.len()
            )));
        }
        let given = [
            ("preprocessor", self.control_preprocessor.len()),
            ("mask", self.control_mask.len()),
            ("resize", self.control_resize.len()),
            ("scale", self.control_scale.len()),
            ("start", self.control_start.len()),
            ("end", self.control_end.len()),
            ("mode", self.control_mode.len()),
            ("type", self.control_type.len()),
        ];
        if let Some((name, more)) = given.iter().find(|(_, given)| *given > count) {
            return Err(Error::Usage(format!(
                "there are {more} of --control-{name} and {count} of --controlnet, expected at most one for each"
            )));
        }
        (0..count).map(|i| self.request(i, own)).collect()
    }

    fn request(&self, i: usize, own: Option<&Picture>) -> Result<ControlRequest> {
        let picture = match (self.control_image.get(i), own) {
            (Some(path), _) => Picture::open(path)?,
            (None, Some(own)) => own.clone(),
            (None, None) => return Err(Error::Usage("a --control-image is missing".to_owned())),
        };
        let mask = match self.control_mask.get(i) {
            Some(path) => Some(Picture::open(path)?.to_luma()),
            None => None,
        };
        Ok(ControlRequest {
            mask,
            preprocessor: nth(&self.control_preprocessor, i).unwrap_or_default(),
            resize: nth(&self.control_resize, i).unwrap_or_default(),
            scale: nth(&self.control_scale, i).unwrap_or(1.0),
            span: (
                nth(&self.control_start, i).unwrap_or(0.0),
                nth(&self.control_end, i).unwrap_or(1.0),
            ),
            mode: nth(&self.control_mode, i).unwrap_or_default(),
            kind: nth(&self.control_type, i),
            ..ControlRequest::new(picture)
        })
    }
}

fn nth<T: Copy>(list: &[T], i: usize) -> Option<T> {
    list.get(i).copied()
}
