//! Numbers that are f32 or bf16, as the run decides.

use half::bf16;

/// Numbers to read.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Numbers<'a> {
    /// 32-bit.
    F32(&'a [f32]),
    /// 16-bit, the upper half of an f32.
    Bf16(&'a [bf16]),
}

/// Numbers to write.
#[derive(Debug)]
pub(crate) enum NumbersMut<'a> {
    /// 32-bit.
    F32(&'a mut [f32]),
    /// 16-bit, the upper half of an f32.
    Bf16(&'a mut [bf16]),
}
