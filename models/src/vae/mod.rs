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

    /// How many levels it can be divided behind: what comes before one is computed of the whole, what comes behind it of parts.
    pub fn depths(&self) -> usize {
        match self {
            Self::Full(decoder) => decoder.config().channels.len().saturating_sub(1),
            Self::Tiny(_) => 1,
        }
    }

    /// What comes before the division: latents to features `[b, c, scale · h, scale · w]`, channels and scale as
    /// [`AnyDecoder::features`] says; none where it is nothing.
    ///
    /// # Errors
    /// As [`AnyDecoder::forward`].
    pub fn head(&self, latents: &Tensor, depth: usize) -> Result<Option<Tensor>> {
        match self {
            Self::Full(decoder) => decoder.head(latents, depth).map(Some),
            Self::Tiny(_) => Ok(None),
        }
    }

    /// What comes behind it.
    ///
    /// # Errors
    /// As [`AnyDecoder::forward`].
    pub fn tail(&self, features: &Tensor, depth: usize) -> Result<Tensor> {
        match self {
            Self::Full(decoder) => decoder.tail(features, depth),
            Self::Tiny(decoder) => decoder.forward(features),
        }
    }

    /// Channels of the features between, and how many of them a latent is wide.
    pub fn features(&self, depth: usize) -> (usize, usize) {
        match self {
            Self::Full(decoder) => (decoder.features(depth), 1 << depth),
            Self::Tiny(decoder) => (decoder.config().latent_channels, 1),
        }
    }

    /// How far a pixel depends on the features around it.
    pub fn reach(&self, depth: usize) -> usize {
        match self {
            Self::Full(decoder) => decoder.reach(depth),
            Self::Tiny(decoder) => decoder.config().reach(),
        }
    }

    /// How many pixels one latent is wide.
    pub fn scale(&self) -> usize {
        match self {
            Self::Full(decoder) => decoder.config().scale(),
            Self::Tiny(decoder) => decoder.config().scale(),
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
