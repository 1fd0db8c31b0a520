//! The demonstration checkpoint: a small trained Stable Diffusion inside the binary, so that the first command needs no download.
//! It is a diffusers folder like any other; nothing depends on its sizes.

use crate::checkpoint::{Checkpoint, EmbeddedCheckpoint, EmbeddedComponent};
use crate::error::Result;

/// One network of the folder in `assets/demo`.
macro_rules! network {
    ($name:literal, $weights:literal) => {
        EmbeddedComponent {
            name: $name,
            config: include_str!(concat!("../assets/demo/", $name, "/config.json")),
            tensors: Some(include_bytes!(concat!(
                "../assets/demo/",
                $name,
                "/",
                $weights
            ))),
        }
    };
}

const COMPONENTS: &[EmbeddedComponent] = &[
    network!("unet", "diffusion_pytorch_model.safetensors"),
    network!("vae", "diffusion_pytorch_model.safetensors"),
    network!("text_encoder", "model.safetensors"),
    EmbeddedComponent {
        name: "scheduler",
        config: include_str!("../assets/demo/scheduler/scheduler_config.json"),
        tensors: None,
    },
];

/// Opens it.
///
/// # Errors
/// Never for a binary that was built whole.
pub fn checkpoint() -> Result<Checkpoint> {
    Checkpoint::from_parts(&EmbeddedCheckpoint {
        name: "demonstration checkpoint",
        model_index: include_str!("../assets/demo/model_index.json"),
        defaults: Some(include_str!("../assets/demo/sd-rs.json")),
        components: COMPONENTS,
    })
}
