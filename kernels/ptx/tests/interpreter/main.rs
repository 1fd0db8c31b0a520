//! The interpreter against arithmetic that is not its own, and its checks on kernels that are wrong.

#![allow(clippy::unwrap_used, clippy::panic)]

mod arithmetic;
mod compiled;
mod conversion;
mod faults;
mod floats;
mod flow;
mod refusals;
mod support;
mod tensor;
