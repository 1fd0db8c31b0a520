//! The seam between networks and the machines that compute them.
//!
//! A network is written once, against the functions of [`ops`] on opaque [`Tensor`]s. What stands behind a tensor decides what a call
//! does:
//!
//! * a tensor that holds **data** is computed at once by the eager executor ([`eager`]): plain candle arithmetic on any candle
//!   device, the reference for everything faster;
//! * a tensor that stands for a **node** of a [`graph::Graph`] only notes the call. After one pass over a network at one shape the
//!   graph holds every operation with every size known: what it costs, what it reads, and in what order. A plan (fused, placed,
//!   packed) is made from that, and run by an executor. The network's code does not know the difference.
//!
//! Weights are [`Param`]s: a name, a shape and a [`Source`] that can read them. The eager executor reads each one once, as a candle
//! tensor; a packing executor reads each one once into its own layout. Nothing is held twice.
//!
//! | operation ([`op::Op`]) | inputs → output |
//! |---|---|
//! | `Conv2d` | `[b, c, h, w]` → `[b, o, h', w']` |
//! | `Linear` | `[.., i]` → `[.., o]` |
//! | `GroupNorm` (+ activation) | `[b, c, h, w]` → same |
//! | `GroupNorm` with given statistics | `[b, c, h, w]`, `[1 or b, 2 · groups]` → `[b, c, h, w]` |
//! | `Statistics` | `[b, c, h, w]` → `[b, 2 · groups]` |
//! | `LayerNorm` | `[.., c]` → same |
//! | `AdaptiveNorm` | `[b, s, c]`, `[b, n · c]` → `[b, s, c]` |
//! | `RmsNorm` | `[.., c]` → same |
//! | `Attention` | `q [b, s, c]`, `k, v [b, t, c]` → `[b, s, c]` |
//! | `WindowAttention` | `q, k, v [b, h · w, c]` → `[b, h · w, c]` |
//! | `Rotate` | `[b, s, c]` → same |
//! | `Gate` | `[b, s, c]`, `[b, n · c]` → `[b, s, c]` |
//! | `Join` | `[b, s, c]`, `[b, t, c]` → `[b, s + t, c]` |
//! | `Tokens` | `[b, s, c]` → `[b, count, c]` |
//! | `Patchify`, `Unpatchify` | `[b, c, h · p, w · p]` ↔ `[b, h · w, c · p · p]` |
//! | `AttentionMass` | `q [b, s, c]`, `k [b, t, c]` → `[b, t, 1]` |
//! | `LowFrequencies`, `Amplify` | `[b, c, h, w]` → same |
//! | `Match` | `[b, s, c]` → `[b, s, 1]` |
//! | `Merge`, `Unmerge` | `[b, s, c]`, `[b, s, 1]` ↔ `[b, count, c]`, `[b, s, 1]` |
//! | `Geglu` | `[.., 2c]` → `[.., c]` |
//! | `Activate` | any → same |
//! | `Prelu`, `Shift` | `[b, c, h, w]` → same |
//! | `Add`, `Multiply` | two of the same shape → same |
//! | `AddChannels`, `ScaleShift` | `[b, c, h, w]`, `[b, c]` or `[b, 2c]` → `[b, c, h, w]` |
//! | `Affine` | any → same (`x · scale + shift`) |
//! | `Concat` | `[b, c, h, w]`, `[b, d, h, w]` → `[b, c + d, h, w]`; `[b, s, c]`, `[b, s, d]` → `[b, s, c + d]` |
//! | `Upsample` | `[b, c, h, w]` → `[b, c, H, W]`, nearest |
//! | `AveragePool` | `[b, c, h, w]` → `[b, c, ⌈h/2⌉, ⌈w/2⌉]` |
//! | `Means` | `[b, c, h, w]` → `[b, c]` |
//! | `Flatten`, `Unflatten` | `[b, c, h, w]` ↔ `[b, h·w, c]` |
//! | `Sinusoid` | `[b]` → `[b, width]` |
//! | `Embed` | ids `[b, s]` → `[b, s, c]` |
//! | `AddPositions` | `[b, s, c]` → same |

#[cfg(test)]
extern crate self as sd_kernels;

pub mod cpu;
pub mod eager;
pub mod gpu;
pub mod graph;
pub mod op;
pub mod ops;
pub mod param;
pub mod plan;
pub mod profile;
mod tensor;
pub mod windows;

pub use graph::Graph;
pub use op::{Activation, Op, Padding, PatchOrder, Relative, Turns, Window, Wrap};
pub use param::{LowRank, Param, Reader, Source, Weights};
pub use tensor::Tensor;
pub use windows::{Keys, WindowBias, Windows};

/// What can go wrong in an operation or while weights are asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation was given shapes that do not fit together.
    #[error("{op}: expected {expected}, got {got}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// What it takes.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// A weight is missing or has another shape than the network asks for.
    #[error("{0}")]
    Weights(String),
    /// Two tensors of one operation live in different worlds: data and graph, or two graphs.
    #[error("{op}: inputs come from different graphs")]
    Mixed {
        /// The operation.
        op: &'static str,
    },
    /// There is no room for buffers.
    #[error("{0}")]
    Memory(String),
    /// A GPU failed, or cannot do what is asked.
    #[error("{0}")]
    Gpu(String),
    /// candle failed.
    #[error("tensor operation failed: {0}")]
    Candle(#[from] candle_core::Error),
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
