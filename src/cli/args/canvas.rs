//! Flags of large pictures and of textures.

use clap::Args;
use sd_kernels::Wrap;

use crate::pipeline::{Surface, TileNorm, Tiling, TilingMode};

/// How the autoencoder divides its work, and whether pictures have edges.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Large pictures and textures")]
pub struct CanvasArgs {
    /// Whether the autoencoder works on tiles
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    pub vae_tiling: TilingMode,
    /// Latents of a tile's side, a multiple of 4
    #[arg(long, value_name = "N", default_value_t = Tiling::TILE)]
    pub vae_tile: usize,
    /// Whose means and variances the norms of a tile go by
    #[arg(long, value_enum, default_value_t, value_name = "WHOSE")]
    pub vae_tile_norm: TileNorm,
    /// Make a texture without edges along these axes: it may be laid side by side
    #[arg(long, value_enum, value_name = "AXES")]
    pub tile: Option<Axes>,
}

/// Axes of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Axes {
    /// Left and right
    X,
    /// Top and bottom
    Y,
    /// Both
    Xy,
}

impl CanvasArgs {
    /// What the pipeline is told.
    pub fn surface(&self) -> Surface {
        Surface {
            wrap: Wrap {
                x: matches!(self.tile, Some(Axes::X | Axes::Xy)),
                y: matches!(self.tile, Some(Axes::Y | Axes::Xy)),
            },
            tiling: Tiling {
                mode: self.vae_tiling,
                tile: self.vae_tile,
                norm: self.vae_tile_norm,
            },
        }
    }
}
