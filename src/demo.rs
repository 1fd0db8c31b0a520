//! The demonstration checkpoint: a small trained Stable Diffusion inside the binary, so that the first command needs no download.
//! It is a diffusers folder like any other; nothing depends on its sizes.

use crate::checkpoint::{Checkpoint, Embedded};
use crate::error::Result;

/// One component of the folder in `assets/demo`.
macro_rules! component {
    ($name:literal, $weights:literal) => {
        Embedded {
            name: $name,
            config: include_str!(concat!("../assets/demo/", $name, "/config.json")),
            weights: include_bytes!(concat!("../assets/demo/", $name, "/", $weights)),
        }
    };
}

/// Opens it.
///
/// # Errors
/// Never for a binary that was built whole.
pub fn checkpoint() -> Result<Checkpoint> {
    Checkpoint::embedded(
        "demonstration checkpoint",
        &[
            component!("unet", "diffusion_pytorch_model.safetensors"),
            component!("vae", "diffusion_pytorch_model.safetensors"),
            component!("text_encoder", "model.safetensors"),
        ],
        include_str!("../assets/demo/scheduler/scheduler_config.json"),
        include_str!("../assets/demo/sd-rs.json"),
    )
}
