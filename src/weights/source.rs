//! Tensors out of a checkpoint: found under any of their spellings, converted once while they are read.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::DType;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;
use sd_kernels::{Reader, Result, Source};

use super::layout::{Layout, Part};
use crate::checkpoint::TensorSet;

/// The tensors of one component under canonical names.
pub struct CheckpointSource {
    tensors: Arc<TensorSet>,
    layout: Layout,
    found: Mutex<BTreeSet<String>>,
}

impl CheckpointSource {
    /// `tensors` seen through `layout`.
    pub fn new(tensors: Arc<TensorSet>, layout: Layout) -> Self {
        Self {
            tensors,
            layout,
            found: Mutex::default(),
        }
    }

    /// The stored names that have been asked for, under any of their spellings.
    pub fn found(&self) -> BTreeSet<String> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.clone()
    }

    fn locate(&self, name: &str) -> Option<(Part, Vec<usize>)> {
        self.layout.places(name).into_iter().find_map(|part| {
            let mut shape = self.tensors.info(&part.stored)?.shape.clone();
            if let Some(rows) = part.rows {
                let first = shape.first_mut()?;
                if *first % rows.count != 0 {
                    return None;
                }
                *first /= rows.count;
            }
            if part.transposed {
                shape.reverse();
            }
            Some((part, shape))
        })
    }

    fn error(name: &str, reason: impl std::fmt::Display) -> sd_kernels::Error {
        sd_kernels::Error::Weights(format!("tensor `{name}` cannot be read: {reason}"))
    }
}

impl Source for CheckpointSource {
    fn shape(&self, name: &str, _wanted: &[usize]) -> Option<Vec<usize>> {
        let (part, shape) = self.locate(name)?;
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.insert(part.stored);
        Some(shape)
    }

    fn dtype(&self, name: &str) -> DType {
        let stored = self.locate(name).map(|(part, _)| part.stored);
        let info = stored.and_then(|stored| self.tensors.info(&stored));
        match info.map(|info| info.dtype) {
            // f16 holds all numbers of the 8-bit type
            Some(Dtype::F16 | Dtype::F8_E4M3) => DType::F16,
            Some(Dtype::BF16) => DType::BF16,
            _ => DType::F32,
        }
    }

    fn open(&self, name: &str, shape: &[usize]) -> Result<Box<dyn Reader + '_>> {
        let (part, _) = self
            .locate(name)
            .ok_or_else(|| Self::error(name, "it is not in the file"))?;
        let info = self
            .tensors
            .info(&part.stored)
            .ok_or_else(|| Self::error(&part.stored, "it is not in the file"))?;
        let bytes = self
            .tensors
            .bytes(&part.stored)
            .map_err(|e| Self::error(&part.stored, e))?;
        let width = width(info.dtype).ok_or_else(|| {
            let reason = format!("its type {:?} is not a float", info.dtype);
            Self::error(&part.stored, reason)
        })?;
        let range = match part.rows {
            Some(rows) => {
                let size = bytes.len() / rows.count;
                rows.index * size..(rows.index + 1) * size
            }
            None => 0..bytes.len(),
        };
        let wanted: usize = shape.iter().product();
        if range.len() != wanted * width {
            let reason = format!("it has {} numbers, expected {wanted}", range.len() / width);
            return Err(Self::error(&part.stored, reason));
        }
        let stored = StoredTensor {
            tensors: &self.tensors,
            dtype: info.dtype,
            width,
            name: part.stored,
            bytes,
            range,
        };
        Ok(match *shape {
            [rows, columns] if part.transposed => Box::new(Transposed {
                stored,
                rows,
                columns,
            }),
            _ => Box::new(stored),
        })
    }
}

/// A tensor, or some of its rows, where it lies.
struct StoredTensor<'a> {
    tensors: &'a TensorSet,
    name: String,
    dtype: Dtype,
    /// Bytes of a number.
    width: usize,
    bytes: Cow<'a, [u8]>,
    range: Range<usize>,
}

impl Reader for StoredTensor<'_> {
    fn read(&self, first: usize, out: &mut [f32]) {
        let bytes = &self.bytes[self.range.clone()];
        let bytes = &bytes[first * self.width..][..out.len() * self.width];
        to_f32(self.dtype, bytes, out);
    }
}

/// A matrix of which the file holds the transpose.
struct Transposed<'a> {
    stored: StoredTensor<'a>,
    rows: usize,
    columns: usize,
}

impl Reader for Transposed<'_> {
    fn read(&self, first: usize, out: &mut [f32]) {
        for (i, out) in (first..).zip(out) {
            let (row, column) = (i / self.columns, i % self.columns);
            self.stored
                .read(column * self.rows + row, std::slice::from_mut(out));
        }
    }
}

impl Drop for StoredTensor<'_> {
    fn drop(&mut self) {
        self.tensors.release(&self.name);
    }
}

/// Whether networks can be read from tensors of this type.
pub fn is_readable(dtype: Dtype) -> bool {
    width(dtype).is_some()
}

/// Bytes of a number of a float type; `None` for other types.
fn width(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F64 => Some(8),
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        Dtype::F8_E4M3 => Some(1),
        _ => None,
    }
}

/// Little-endian bytes of a float type as f32: as many as `out` has. Bytes need not be aligned; other types give no numbers.
fn to_f32(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => each(bytes, out, f32::from_le_bytes),
        Dtype::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        Dtype::BF16 => each(bytes, out, |b| {
            f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)
        }),
        Dtype::F8_E4M3 => each(bytes, out, |[b]| e4m3(b)),
        Dtype::F16 => {
            // through a small aligned buffer, so that the conversion is vectorised whatever the alignment
            let mut buffer = [half::f16::ZERO; 1024];
            let blocks = bytes.chunks(2 * buffer.len());
            for (out, bytes) in out.chunks_mut(buffer.len()).zip(blocks) {
                let buffer = &mut buffer[..out.len()];
                for (half, b) in buffer.iter_mut().zip(bytes.as_chunks().0) {
                    *half = half::f16::from_le_bytes(*b);
                }
                buffer.convert_to_f32_slice(out);
            }
        }
        _ => out.fill(f32::NAN),
    }
}

fn each<const N: usize>(bytes: &[u8], out: &mut [f32], number: impl Fn([u8; N]) -> f32) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *out = number(*bytes);
    }
}

/// One sign bit, four exponent bits (bias 7), three mantissa bits; no infinities (Micikevicius et al., arXiv 2209.05433).
fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if bits & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_float_type_reads_unaligned() {
        let mut bytes = vec![0u8];
        bytes.extend(half::f16::from_f32(-1.5).to_le_bytes());
        bytes.extend(half::bf16::from_f32(3.0).to_le_bytes());
        bytes.extend(0.1f32.to_le_bytes());
        bytes.extend(0.1f64.to_le_bytes());
        let one = |dtype, bytes: &[u8]| {
            let mut out = vec![0.0; bytes.len() / width(dtype).unwrap_or(8)];
            to_f32(dtype, bytes, &mut out);
            out
        };
        assert_eq!(one(Dtype::F16, &bytes[1..3]), [-1.5]);
        assert_eq!(one(Dtype::BF16, &bytes[3..5]), [3.0]);
        assert_eq!(one(Dtype::F32, &bytes[5..9]), [0.1]);
        assert_eq!(one(Dtype::F64, &bytes[9..17]), [0.1]);
        assert!(is_readable(Dtype::BF16) && !is_readable(Dtype::I64));
        // from the paper's table: largest 448, smallest normal 2⁻⁶, smallest 2⁻⁹
        assert_eq!(
            one(Dtype::F8_E4M3, &[0x7e, 0x08, 0x81]),
            [448.0, 0.015625, -0.001953125]
        );
    }
}
