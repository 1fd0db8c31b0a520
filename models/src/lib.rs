//! The networks of Stable Diffusion, each once, for whoever computes them.
//!
//! A model file reads top-down: its `Config`, the model, `load`, `forward`, then the parts in order of use. Weights are asked for under
//! the names that diffusers and transformers give them; other spellings are translated before they come here. Every operation goes
//! through [`sd_kernels::ops`], so the same code computes and records.
//!
//! To add a network: write `Config → load(&Weights) → forward(&Tensor)` out of [`layers`], give each tensor its shape in a comment, and
//! compare it with its reference on a small random model.

pub mod clip;
pub mod config;
pub mod controlnet;
pub mod denoiser;
pub mod flux;
pub mod image_projection;
pub mod layers;
pub mod lllite;
pub mod mmdit;
pub mod t2i_adapter;
pub mod t5;
pub mod unet;
pub mod upscaler;
pub mod vae;
pub mod variant;

pub use sd_kernels::{Error, Result};
