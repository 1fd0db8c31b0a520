//! Arguments of `upscale`.

use std::path::PathBuf;

use clap::Args;

use super::{ControlArgs, LibraryArgs, RedrawArgs, SamplingArgs};
use crate::device::{DeviceChoice, DtypeChoice};
use crate::upscale::Tiling;

/// Arguments of `upscale`.
#[derive(Debug, Args)]
pub struct UpscaleArgs {
    /// Pictures (PNG, JPEG, WebP), or folders of them
    #[arg(required = true, value_name = "IMAGE")]
    pub inputs: Vec<PathBuf>,
    /// A network of the ESRGAN family, SwinIR, Swin2SR or HAT: a .pth or .safetensors file, or a name in the models folders
    #[arg(short, long, required_unless_present = "with_model")]
    pub model: Option<PathBuf>,
    /// Where names are looked up
    #[command(flatten)]
    pub library: LibraryArgs,
    /// Read model files instead of mapping them into memory: for network file systems, and files that others write to
    #[arg(long)]
    pub no_mmap: bool,
    /// Where the picture goes, a PNG; a folder for several, in which they keep their names; - is the standard output [default: NAME-xSCALE.png in this folder]
    #[arg(short, long, value_name = "FILE_OR_FOLDER")]
    pub output: Option<PathBuf>,
    /// Replace files that are there
    #[arg(long)]
    pub overwrite: bool,
    /// How many times as wide and high: the network is applied until that is reached, three times at most, and the result resized (Lanczos)
    /// [default: the network's own; 2 without one]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub scale: Option<f64>,
    /// Pixels of a tile's side; 0: the picture in one piece [default: as large as memory allows]
    #[arg(long, value_name = "N")]
    pub tile: Option<usize>,
    /// Pixels by which tiles overlap, over which they fade into each other [default: what the network looks at, or 48 if that is very far; of
    /// the tiles of --with-model 64, or an eighth of smaller ones]
    #[arg(long, value_name = "N")]
    pub tile_overlap: Option<usize>,
    /// The compute type [default: f32 of the network, auto of --with-model]
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeChoice>,
    /// auto, cpu, cuda, cuda:N or metal
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// Threads to compute with [default: one a core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// One JSON object a picture on the standard output
    #[arg(long)]
    pub json: bool,
    // behind all others, which would come under their headings
    /// A Stable Diffusion model that draws the enlarged picture anew
    #[command(flatten)]
    pub redraw: RedrawArgs,
    /// How it is drawn
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Pictures that steer
    #[command(flatten)]
    pub control: ControlArgs,
}

impl UpscaleArgs {
    /// How pictures are cut.
    pub(in crate::cli) fn tiling(&self) -> Tiling {
        Tiling {
            side: self.tile,
            // else it is that of the tiles that are drawn
            overlap: self
                .tile_overlap
                .filter(|_| self.redraw.with_model.is_none()),
        }
    }
}
