//! LoRA and its relatives: files of changes to a model's weights, put on while the weights are read.
//!
//! ```text
//! Adapter::open(path) ──► modules: form, scale ─┐
//! names of the model's networks ──► Names ──────┴─► Adapters::bind ──► Bound ──► wrap(source): W + strength · ΔW
//! ```
//!
//! Facts from the sources of kohya's sd-scripts, LyCORIS, PEFT, diffusers, ComfyUI and A1111. What changes a weight is computed when that weight is
//! opened, whole and in f32, whatever the model's file keeps it as; a strength of 0 changes no bit. Strengths may change from step to step; then
//! the weights that are others are made anew, and no others. What is a product of two thin matrices may be computed beside the weight
//! instead ([`Mode`]), which then stays as it is.
//!
//! Textual inversions are adapters of a text tower's table of tokens: [`Embedding`] reads them, [`enlarge`] puts them behind the table's rows.

mod about;
mod bind;
mod blocks;
mod bound;
mod delta;
mod embedding;
mod file;
mod form;
mod keys;
mod names;
mod rows;
mod settings;
mod source;
mod strength;
mod turn;

pub use about::About;
pub use bind::{Adapters, MOST, Network};
pub use blocks::BlockWeights;
pub use bound::{Bound, Changed, Fit, Mode};
pub use delta::DoraNorm;
pub use embedding::{Embedding, MOST_VECTORS, Vectors};
pub use file::Adapter;
pub use keys::Owner;
pub use rows::enlarge;
pub use strength::{Curve, Strength};
