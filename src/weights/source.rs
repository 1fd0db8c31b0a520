//! Tensors out of a checkpoint: found under any of their spellings, converted once while they are read.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;
use sd_kernels::{Result, Source};

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

    fn read(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
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
        let bytes = match part.rows {
            Some(rows) => {
                let size = bytes.len() / rows.count;
                Cow::Borrowed(&bytes[rows.index * size..(rows.index + 1) * size])
            }
            None => Cow::Borrowed(&*bytes),
        };
        let values = to_f32(info.dtype, &bytes).ok_or_else(|| {
            Self::error(
                &part.stored,
                format!("its type {:?} is not a float", info.dtype),
            )
        })?;
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu)
            .map_err(|e| Self::error(&part.stored, e))?;
        self.tensors.release(&part.stored);
        Ok(tensor.to_dtype(dtype)?.to_device(device)?)
    }
}

/// Whether networks can be read from tensors of this type.
pub fn is_readable(dtype: Dtype) -> bool {
    to_f32(dtype, &[]).is_some()
}

/// Little-endian bytes of a float type as f32; `None` for other types. Bytes need not be aligned.
pub(crate) fn to_f32(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    /// Elements converted at a time: through a small aligned buffer, so that the conversion is vectorised whatever the alignment.
    const BLOCK: usize = 1024;
    Some(match dtype {
        Dtype::F32 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
        Dtype::F64 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f64::from_le_bytes(*b) as f32)
            .collect(),
        Dtype::BF16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16))
            .collect(),
        Dtype::F16 => {
            let mut out = vec![0f32; bytes.len() / 2];
            let mut buffer = [half::f16::ZERO; BLOCK];
            for (out, bytes) in out.chunks_mut(BLOCK).zip(bytes.chunks(2 * BLOCK)) {
                let buffer = &mut buffer[..out.len()];
                for (half, b) in buffer.iter_mut().zip(bytes.as_chunks().0) {
                    *half = half::f16::from_le_bytes(*b);
                }
                buffer.convert_to_f32_slice(out);
            }
            out
        }
        Dtype::F8_E4M3 => bytes.iter().map(|&b| e4m3(b)).collect(),
        _ => return None,
    })
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
        assert_eq!(to_f32(Dtype::F16, &bytes[1..3]), Some(vec![-1.5]));
        assert_eq!(to_f32(Dtype::BF16, &bytes[3..5]), Some(vec![3.0]));
        assert_eq!(to_f32(Dtype::F32, &bytes[5..9]), Some(vec![0.1]));
        assert_eq!(to_f32(Dtype::F64, &bytes[9..17]), Some(vec![0.1]));
        assert_eq!(to_f32(Dtype::I64, &bytes[9..17]), None);
        assert!(is_readable(Dtype::BF16) && !is_readable(Dtype::I64));
        // from the paper's table: largest 448, smallest normal 2⁻⁶, smallest 2⁻⁹
        assert_eq!(
            to_f32(Dtype::F8_E4M3, &[0x7e, 0x08, 0x81]),
            Some(vec![448.0, 0.015625, -0.001953125])
        );
    }
}
