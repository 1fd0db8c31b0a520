//! Flags of a picture that is drawn anew, tile by tile.

use std::path::PathBuf;

use clap::Args;

use crate::pipeline::Redraw;

/// Draw the enlarged picture anew with a Stable Diffusion model.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Drawing anew")]
pub struct RedrawArgs {
    /// Draw the enlarged picture anew, tile by tile, each as `generate --init-image` does it: a model as `generate --model` takes; without a value
    /// (then behind the pictures) the demonstration checkpoint in this binary. Tile n, from 0, row after row, has the seed plus n
    #[arg(long, value_name = "MODEL", num_args = 0..=1)]
    pub with_model: Option<Option<PathBuf>>,
    /// What the picture shows [default: nothing is said]
    #[arg(short, long, allow_hyphen_values = true, requires = "with_model")]
    pub prompt: Option<String>,
    /// How much of each tile is given up, 0 to 1
    #[arg(long, value_name = "F", default_value_t = Redraw::STRENGTH, requires = "with_model")]
    pub strength: f64,
    /// Pixels of a side of the tiles that are drawn, a multiple of 8; --tile-overlap is then theirs [default: the model's own size]
    #[arg(long, value_name = "N", requires = "with_model")]
    pub tile_size: Option<usize>,
    /// How the picture is enlarged before, where no --model does: twice, if --scale does not say otherwise
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "HOW",
        requires = "with_model",
        conflicts_with = "model"
    )]
    pub resampler: Resampler,
    /// Another autoencoder, as `generate --vae` takes
    #[arg(long, value_name = "FILE", requires = "with_model")]
    pub vae: Option<PathBuf>,
    /// A LoRA or LyCORIS and its weight, as `generate --lora` takes; may be repeated
    #[arg(long, value_name = "FILE_OR_NAME[:WEIGHT]", requires = "with_model")]
    pub lora: Vec<String>,
}

/// How pixels between pixels are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Resampler {
    /// A windowed sinc
    #[default]
    Lanczos,
    /// A cubic
    Bicubic,
    /// A triangle
    Bilinear,
    /// The pixel that lies there
    Nearest,
}
