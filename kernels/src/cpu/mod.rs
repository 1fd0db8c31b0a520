//! Kernels for the CPU: products of rows with packed weights, and what stands between them.

#[allow(unsafe_code)]
pub(crate) mod aligned;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod amx;
#[allow(unsafe_code)]
pub(crate) mod attention;
#[allow(unsafe_code)]
pub(crate) mod epilogue;
#[allow(unsafe_code)]
mod level;
pub(crate) mod matching;
#[allow(unsafe_code)]
pub(crate) mod micro;
#[allow(unsafe_code)]
pub(crate) mod norm;
pub(crate) mod panels;
#[allow(unsafe_code)]
mod peak;
#[allow(unsafe_code)]
pub(crate) mod product;
#[allow(unsafe_code)]
pub(crate) mod simd;
pub(crate) mod view;
#[allow(unsafe_code)]
pub(crate) mod windows;
#[allow(unsafe_code)]
pub(crate) mod winograd;

pub use level::Level;
pub use peak::peak_gflops;
