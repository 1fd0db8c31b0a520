//! Kernels for the CPU: products of rows with packed weights, and what stands between them.

#[allow(unsafe_code)]
pub mod aligned;
#[allow(unsafe_code)]
pub mod attention;
#[allow(unsafe_code)]
pub mod epilogue;
#[allow(unsafe_code)]
mod level;
#[allow(unsafe_code)]
pub mod micro;
#[allow(unsafe_code)]
pub mod norm;
pub mod panels;
#[allow(unsafe_code)]
mod peak;
#[allow(unsafe_code)]
pub mod product;
#[allow(unsafe_code)]
pub(crate) mod simd;
pub mod view;
#[allow(unsafe_code)]
pub mod winograd;

pub use level::Level;
pub use peak::peak_gflops;
