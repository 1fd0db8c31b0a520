//! LoRA and its relatives: files of changes to a model's weights, put on while the weights are read.
//!
//! ```text
//! Adapter::open(path) ──► modules: form, scale ─┐
//! names of the model's networks ──► Names ──────┴─► Adapters::bind ──► Bound ──► wrap(source): W + strength · ΔW
//! ```
//!
//! Facts from the sources of kohya's sd-scripts, LyCORIS, PEFT, diffusers, ComfyUI and A1111. What changes a weight is computed when that weight is
//! opened, whole and in f32, whatever the model's file keeps it as; a strength of 0 changes no bit.

mod about;
mod bind;
mod bound;
mod delta;
mod file;
mod form;
mod keys;
mod names;
mod settings;
mod source;
mod turn;

pub use about::About;
pub use bind::{Adapters, MOST, Network};
pub use bound::Bound;
pub use delta::DoraNorm;
pub use file::Adapter;
pub use keys::Owner;
