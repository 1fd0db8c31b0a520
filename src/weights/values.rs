//! Whole tensors, read into memory: for what is not a network's weight but makes one.

use safetensors::Dtype;

use super::numbers;
use crate::checkpoint::{TensorSet, TensorType};
use crate::error::Result;

/// All numbers of a tensor of a float type in f32, row-major.
///
/// # Errors
/// When it is not there or cannot be read.
pub(crate) fn all(tensors: &TensorSet, name: &str) -> Result<Vec<f32>> {
    let bytes = tensors.bytes(name)?;
    let info = tensors.info(name);
    let mut out = vec![0.0; info.map_or(0, |info| info.elements())];
    if let Some(info) = info {
        numbers::read(info.dtype, &bytes, 0, &mut out);
    }
    drop(bytes);
    tensors.release(name);
    Ok(out)
}

/// The only number of a tensor of any plain type; none where it holds more, or none at all.
///
/// # Errors
/// As [`all`].
pub(crate) fn scalar(tensors: &TensorSet, name: &str) -> Result<Option<f64>> {
    let Some(info) = tensors.info(name).filter(|info| info.elements() == 1) else {
        return Ok(None);
    };
    let bytes = tensors.bytes(name)?;
    let bytes: &[u8] = &bytes;
    let whole = match info.dtype {
        TensorType::Plain(Dtype::BOOL | Dtype::U8) => bytes.first().map(|b| f64::from(*b)),
        TensorType::Plain(Dtype::I16) => bytes
            .first_chunk()
            .map(|b| f64::from(i16::from_le_bytes(*b))),
        TensorType::Plain(Dtype::I32) => bytes
            .first_chunk()
            .map(|b| f64::from(i32::from_le_bytes(*b))),
        TensorType::Plain(Dtype::I64) => bytes.first_chunk().map(|b| i64::from_le_bytes(*b) as f64),
        dtype if numbers::is_readable(dtype) => {
            let mut out = [0.0];
            numbers::read(dtype, bytes, 0, &mut out);
            out.first().map(|x| f64::from(*x))
        }
        _ => None,
    };
    Ok(whole)
}
