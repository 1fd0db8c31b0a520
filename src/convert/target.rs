//! What form the output has, and that it is none of the inputs.

use std::path::{Path, PathBuf};

use super::{Dtype, Others, Request, usage};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};

/// The form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// One file of safetensors.
    SafeTensors,
    /// One GGUF file.
    Gguf,
    /// A diffusers folder.
    Folder,
}

impl Target {
    /// By the output's ending.
    ///
    /// # Errors
    /// [`Error::Usage`] when the form is not written, or does not go with what was asked for.
    pub(super) fn of(request: &Request<'_>) -> Result<Self> {
        let ending = request
            .output
            .extension()
            .map(|e| e.to_string_lossy().to_ascii_lowercase());
        let target = match ending.as_deref() {
            Some("safetensors" | "sft") => Self::SafeTensors,
            Some("gguf") => Self::Gguf,
            Some(other @ ("ckpt" | "pt" | "pth" | "bin")) => {
                return usage(&format!(
                    "files of the kind .{other} are programs and are not written; end the output in .safetensors"
                ));
            }
            _ => Self::Folder,
        };
        if request.quantise.is_some() && target != Self::Gguf {
            return usage(
                "quantised weights are written to GGUF files alone; end the output in .gguf",
            );
        }
        if request.quantise.is_some() && request.dtype == Dtype::Bf16 {
            tracing::debug!("what is not quantised becomes bf16");
        }
        Ok(target)
    }

    /// Fails when what would be written is, holds or lies in a file that is read.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub(super) fn refuse_input(self, request: &Request<'_>) -> Result<()> {
        let output = real(&request.output);
        let others = request.merge.iter().flat_map(|merge| match merge.others {
            Others::Sum(b) => vec![b],
            Others::Difference(b, c) => vec![b, c],
        });
        let checkpoints = std::iter::once(request.input)
            .chain(others)
            .chain(request.vae);
        for checkpoint in checkpoints {
            let paths = checkpoint
                .files()
                .map(|file| file.path())
                .chain([checkpoint.path()]);
            for path in paths {
                if overlaps(self, &output, &real(path), checkpoint) {
                    return Err(Error::Usage(format!(
                        "{} is read and would be written over; choose another name",
                        path.display()
                    )));
                }
            }
        }
        Ok(())
    }
}

fn overlaps(target: Target, output: &Path, input: &Path, checkpoint: &Checkpoint) -> bool {
    let inside = target == Target::Folder && input.starts_with(output);
    let into =
        checkpoint.is_folder() && target == Target::Folder && output.starts_with(checkpoint.path());
    output == input || inside || into
}

/// A path without links and dots, also of what is not there yet.
fn real(path: &Path) -> PathBuf {
    if let Ok(real) = path.canonicalize() {
        return real;
    }
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => {
            let parent = if parent.as_os_str().is_empty() {
                Path::new(".")
            } else {
                parent
            };
            parent
                .canonicalize()
                .unwrap_or_else(|_| parent.to_owned())
                .join(name)
        }
        _ => path.to_owned(),
    }
}
