//! The autoencoder between pictures and latents (Kingma & Welling, arXiv 1312.6114; diffusers 0.42.1 `AutoencoderKL`).
//!
//! Pictures are `[b, 3, H, W]` in [−1, 1]; latents `[b, 4, H/8, W/8]` as the UNet knows them: scaling and shift are applied here and
//! nowhere else.

mod block;
mod config;
mod decoder;
mod encoder;
mod tiny;

pub use config::{Config, Spread};
pub use decoder::Decoder;
pub use encoder::Encoder;
pub use tiny::{TinyConfig, TinyDecoder, TinyLayer};

use sd_kernels::{Result, Tensor, Weights};

/// Whatever turns latents into pictures.
pub enum AnyDecoder {
    /// The autoencoder's own.
    Full(Box<Decoder>),
    /// A small one in its place.
    Tiny(TinyDecoder),
}

impl AnyDecoder {
    /// Asks for the weights of the tiny decoder where there is one, and else of the full one.
    pub fn load(weights: &Weights, full: &Config, tiny: Option<&TinyConfig>) -> Self {
        match tiny {
            Some(tiny) => Self::Tiny(TinyDecoder::load(weights, tiny)),
            None => Self::Full(Box::new(Decoder::load(weights, full))),
        }
    }

    /// The same decoder with other weights.
    #[must_use]
    pub fn reload(&self, weights: &Weights) -> Self {
        match self {
            Self::Full(decoder) => Self::Full(Box::new(Decoder::load(weights, decoder.config()))),
            Self::Tiny(decoder) => Self::Tiny(TinyDecoder::load(weights, decoder.config())),
        }
    }

    /// Channels of latents.
    pub fn latent_channels(&self) -> usize {
        match self {
            Self::Full(decoder) => decoder.config().latent_channels,
            Self::Tiny(decoder) => decoder.config().latent_channels,
        }
    }

    /// What is done to the UNet's latents `[b, c, h, w]` before [`AnyDecoder::forward`]; `plane` is h · w.
    pub fn prepare(&self, latents: &mut [f32], plane: usize) {
        match self {
            Self::Full(decoder) => decoder.config().restore(latents, plane),
            Self::Tiny(decoder) => decoder.config().limit(latents),
        }
    }

    /// Latents `[b, latent, h, w]` → pictures `[b, 3, scale·h, scale·w]`, mostly within [−1, 1].
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        match self {
            Self::Full(decoder) => decoder.forward(latents),
            Self::Tiny(decoder) => decoder.forward(latents),
        }
    }
}
