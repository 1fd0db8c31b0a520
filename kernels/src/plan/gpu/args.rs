//! What kernels take: structs of `kernels/cuda/*.cu`, written field by field as the C ABI lays them out.

use super::super::ir::Type;
use crate::{Activation, Error, Result};

/// Bytes of a struct, in the making.
#[derive(Default)]
pub(super) struct Args {
    bytes: Vec<u8>,
    too_large: bool,
}

/// Numbers of a value on the card: `View` of `common.cuh`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct View {
    pub address: u64,
    /// Numbers in all; readers go on from the beginning.
    pub len: usize,
    pub kind: Kind,
    /// Numbers of a row.
    pub channels: usize,
}

/// A type as kernels name it.
pub(super) type Kind = u8;

/// [`Kind`] of a type.
pub(super) fn kind(kind: Type) -> Kind {
    match kind {
        Type::F32 => 0,
        Type::Bf16 => 1,
    }
}

impl Args {
    fn put<const N: usize>(mut self, bytes: [u8; N]) -> Self {
        let end = self.bytes.len().next_multiple_of(N);
        self.bytes.resize(end, 0);
        self.bytes.extend(bytes);
        self
    }

    /// An address, or a count that may be large.
    pub(super) fn long(self, value: u64) -> Self {
        self.put(value.to_le_bytes())
    }

    pub(super) fn int(mut self, value: usize) -> Self {
        let value = i32::try_from(value).unwrap_or_else(|_| {
            self.too_large = true;
            0
        });
        self.put(value.to_le_bytes())
    }

    pub(super) fn flag(self, value: bool) -> Self {
        self.int(usize::from(value))
    }

    pub(super) fn float(self, value: f32) -> Self {
        self.put(value.to_le_bytes())
    }

    /// A small signed number.
    pub(super) fn short(mut self, value: isize) -> Self {
        let value = i16::try_from(value).unwrap_or_else(|_| {
            self.too_large = true;
            0
        });
        self.put(value.to_le_bytes())
    }

    pub(super) fn view(self, view: View) -> Self {
        let at = self.long(view.address).long(view.len as u64);
        at.int(view.kind.into()).int(view.channels)
    }

    /// An activation and the slope that it may have.
    pub(super) fn activation(self, activation: Option<Activation>) -> Self {
        let (which, slope) = match activation {
            None => (0, 0.0),
            Some(Activation::Silu) => (1, 0.0),
            Some(Activation::Gelu) => (2, 0.0),
            Some(Activation::GeluTanh) => (3, 0.0),
            Some(Activation::QuickGelu) => (4, 0.0),
            Some(Activation::Mish) => (5, 0.0),
            Some(Activation::Relu) => (6, 0.0),
            Some(Activation::LeakyRelu { percent }) => (7, Activation::slope(percent)),
            Some(Activation::Sigmoid) => (8, 0.0),
        };
        self.int(which).float(slope)
    }

    /// The struct; its alignment is that of an address.
    ///
    /// # Errors
    /// When a number does not fit into its field.
    pub(super) fn finish(mut self) -> Result<Vec<u8>> {
        if self.too_large {
            return Err(Error::Gpu(
                "the picture or the network is too large for the gpu's kernels: use --device cpu"
                    .to_owned(),
            ));
        }
        let end = self.bytes.len().next_multiple_of(8);
        self.bytes.resize(end, 0);
        Ok(self.bytes)
    }
}
