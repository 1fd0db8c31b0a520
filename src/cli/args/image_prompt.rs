//! Flags of pictures beside the prompt.

use std::path::PathBuf;

use clap::Args;

use super::LibraryArgs;
use crate::checkpoint::Checkpoint;
use crate::cli::fetch::open_part;
use crate::error::{Error, Result};
use crate::picture::Picture;
use crate::pipeline::ImageRequest;
use crate::spec::IMAGE_ENCODER;

/// IP-Adapters and a picture for each. The n-th of each flag belongs to the n-th adapter.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Pictures beside the prompt")]
pub struct ImagePromptArgs {
    /// An IP-Adapter, plain or plus: a file or a name as --model takes; may be repeated, as all of these
    #[arg(long, value_name = "FILE", requires = "image_encoder")]
    pub ip_adapter: Vec<PathBuf>,
    /// The picture that it looks at
    #[arg(long, value_name = "FILE")]
    pub ip_image: Vec<PathBuf>,
    /// How much the picture has to say [default: 1]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub ip_scale: Vec<f64>,
    /// CLIP's picture tower that the adapters read, a file or folder; one for all of them, or one for each
    #[arg(long, value_name = "FILE_OR_FOLDER", requires = "ip_adapter")]
    pub image_encoder: Vec<PathBuf>,
}

impl ImagePromptArgs {
    /// Opens the adapters with their towers, and tells what reports call them.
    ///
    /// # Errors
    /// When one is not there, or no file of tensors.
    pub(in crate::cli) fn open(
        &self,
        library: &LibraryArgs,
        no_mmap: bool,
    ) -> Result<Vec<(String, [Checkpoint; 2])>> {
        let adapters = self.ip_adapter.iter().enumerate();
        adapters
            .map(|(i, path)| {
                let encoder = self.image_encoder.get(i).or(self.image_encoder.last());
                let encoder = encoder.ok_or_else(|| {
                    Error::Usage("an IP-Adapter needs the picture tower that it reads; give it with --image-encoder".to_owned())
                })?;
                let adapter = open_part(path, "ip_adapter", library, no_mmap)?;
                let encoder = open_part(encoder, IMAGE_ENCODER, library, no_mmap)?;
                Ok((adapter.name, [adapter.checkpoint, encoder.checkpoint]))
            })
            .collect()
    }

    /// What is asked of each.
    ///
    /// # Errors
    /// [`Error::Usage`] when the flags' numbers do not fit; when a picture cannot be read.
    pub(in crate::cli) fn requests(&self) -> Result<Vec<ImageRequest>> {
        let count = self.ip_adapter.len();
        let more = [
            ("ip-image", self.ip_image.len()),
            ("ip-scale", self.ip_scale.len()),
            ("image-encoder", self.image_encoder.len()),
        ];
        if let Some((name, more)) = more.iter().find(|(_, given)| *given > count) {
            return Err(Error::Usage(format!(
                "there are {more} of --{name} and {count} of --ip-adapter, expected at most one for each"
            )));
        }
        if self.ip_image.len() != count {
            return Err(Error::Usage(format!(
                "there are {count} of --ip-adapter and {} of --ip-image, expected one picture for each",
                self.ip_image.len()
            )));
        }
        let images = self.ip_image.iter().enumerate();
        images
            .map(|(i, path)| {
                Ok(ImageRequest {
                    picture: Picture::open(path)?,
                    scale: self.ip_scale.get(i).copied().unwrap_or(1.0),
                })
            })
            .collect()
    }
}
