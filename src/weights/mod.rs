//! Canonical (diffusers) names over whatever a file holds: networks ask for `down_blocks.0.resnets.0.conv1.weight`, the file may keep
//! it as `model.diffusion_model.input_blocks.1.0.in_layers.2.weight`, in another type, or as one part of a fused tensor.

mod below;
mod control_lora;
pub(crate) mod controlnet;
pub(crate) mod diffusers_vae;
pub(crate) mod flux;
pub(crate) mod image_prompt;
pub mod layout;
pub(crate) mod ldm_unet;
pub(crate) mod ldm_vae;
pub(crate) mod lllite;
pub(crate) mod mmdit;
mod numbers;
mod quantised;
mod random;
mod source;
pub(crate) mod swin;
pub(crate) mod t2i_adapter;
pub(crate) mod t5;
pub(crate) mod taesd;
pub(crate) mod text_tower;
pub(crate) mod upscaler;
pub(crate) mod values;

pub(crate) use below::below;
pub(crate) use control_lora::ControlLoraSource;
pub use layout::{Layout, Part, Rename};
pub use numbers::is_readable;
pub use random::RandomSource;
pub use source::{CheckpointSource, StoredPart};
