//! The autoencoder between pictures and latents (Kingma & Welling, arXiv 1312.6114; diffusers 0.42.1 `AutoencoderKL`).
//!
//! Pictures are `[b, 3, H, W]` in [−1, 1]; latents `[b, 4, H/8, W/8]` as the UNet knows them: scaling and shift are applied here and
//! nowhere else.

mod block;
mod config;
mod decoder;
mod encoder;

pub use config::{Config, Spread};
pub use decoder::Decoder;
pub use encoder::Encoder;
