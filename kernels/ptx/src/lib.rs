//! An interpreter of NVIDIA PTX, strict enough to prove kernels correct on a machine without a GPU.
//!
//! A [`Module`] is the text that a program hands to the driver: parsed, decoded, and refused in words where it says what is not
//! interpreted. A [`Memory`] is a device's memory. [`Module::launch`] runs a grid, block by block, warp by warp, and fails with the
//! exact place ([`Fault`]) where a kernel
//!
//! * touches memory that is not its own: out of bounds, misaligned, freed, or through an address of another state space;
//! * executes a collective (`mma`, `ldmatrix`, `shfl.sync`, `vote.sync`, `bar.warp.sync` …) without some of its lanes;
//! * lets two warps touch the same bytes of shared memory with no barrier between them, where one of them writes;
//! * uses or overwrites what `cp.async` will write before the copying thread has waited for it and the block has met at a barrier, or
//!   ends with copies in flight;
//! * waits at a barrier that is never passed.
//!
//! Fresh memory of all kinds is filled with NaN. A register that no way to an instruction writes is refused when the text is read.
//!
//! Lanes of a warp run together; where they take different ways, the group that is furthest behind in the text runs first. What a
//! kernel may not rely on is therefore not all found: [`Options`] turns the order of blocks round and adds checks that cost more.

mod accesses;
mod assign;
mod atomics;
mod block;
mod collectives;
mod convert;
mod copies;
mod error;
mod exec;
mod floats;
mod halves;
mod instructions;
mod integers;
mod lanes;
mod launch;
mod lex;
mod lower;
mod memory;
mod module;
mod op;
mod parse;
mod shared;
mod syntax;
mod tensor;
mod transfers;
mod view;
mod warp;

pub use error::{Error, Fault, Kind};
pub use launch::{Counts, Launch, Options, Order};
pub use memory::Memory;
pub use module::{Kernel, Module, Param};
