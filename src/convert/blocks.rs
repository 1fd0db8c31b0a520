//! Numbers to ggml's quantised blocks, bit for bit as ggml's reference (`quantize_row_…_ref` in `ggml-quants.c`) and the Python package `gguf`
//! make them; the K types as candle does. The other direction, with the layouts, is `weights/quantised.rs`.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::f16;

use super::encode::Overflow;
use crate::checkpoint::BlockType;

/// Whether blocks of this type are made.
pub(super) fn can_encode(block: BlockType) -> bool {
    match block {
        BlockType::Q4_0 | BlockType::Q4_1 | BlockType::Q5_0 | BlockType::Q5_1 | BlockType::Q8_0 => {
            true
        }
        other => k_type(other).is_some(),
    }
}

/// The K types, whose scales are searched for: candle's port of ggml's search.
fn k_type(block: BlockType) -> Option<GgmlDType> {
    match block {
        BlockType::Q4K => Some(GgmlDType::Q4K),
        BlockType::Q5K => Some(GgmlDType::Q5K),
        BlockType::Q6K => Some(GgmlDType::Q6K),
        _ => None,
    }
}

/// Blocks of a K type.
fn search(dtype: GgmlDType, numbers: &[f32]) -> Result<Vec<u8>, Overflow> {
    let most = largest(numbers);
    // the largest scale of a block is at most its largest number
    if f16::from_f32(most).is_infinite() {
        return Err(Overflow(most));
    }
    let blocks = || -> candle_core::Result<Vec<u8>> {
        let tensor = Tensor::from_slice(numbers, numbers.len(), &Device::Cpu)?;
        Ok(QTensor::quantize(&tensor, dtype)?.data()?.into_owned())
    };
    blocks().map_err(|_| Overflow(most))
}

/// Whole blocks of `numbers`.
///
/// # Errors
/// The largest number of a block whose scale is beyond f16.
pub(super) fn encode(block: BlockType, numbers: &[f32]) -> Result<Vec<u8>, Overflow> {
    if let Some(dtype) = k_type(block) {
        return search(dtype, numbers);
    }
    let blocks = numbers.chunks_exact(block.elements());
    let mut out = Vec::with_capacity(blocks.len() * block.bytes());
    for numbers in blocks {
        match block {
            BlockType::Q4_0 => signed(numbers, 4, &mut out)?,
            BlockType::Q5_0 => signed(numbers, 5, &mut out)?,
            BlockType::Q4_1 => ranged(numbers, 4, &mut out)?,
            BlockType::Q5_1 => ranged(numbers, 5, &mut out)?,
            _ => bytes(numbers, &mut out)?,
        }
    }
    Ok(out)
}

/// A scale or offset as f16, which must hold it.
fn half(x: f32, largest: f32, out: &mut Vec<u8>) -> Result<(), Overflow> {
    let half = f16::from_f32(x);
    if !half.is_finite() {
        return Err(Overflow(largest));
    }
    out.extend(half.to_le_bytes());
    Ok(())
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The number of the largest magnitude, the first of several, with its sign.
fn largest(numbers: &[f32]) -> f32 {
    let pick = |most: f32, &x: &f32| if x.abs() > most.abs() { x } else { most };
    numbers.iter().fold(0.0, pick)
}

/// Eight bits a number: `d = max |x| / 127`.
fn bytes(numbers: &[f32], out: &mut Vec<u8>) -> Result<(), Overflow> {
    let most = largest(numbers).abs();
    let d = most / 127.0;
    let id = inverse(d);
    half(d, most, out)?;
    out.extend(numbers.iter().map(|x| (x * id).round() as i8 as u8));
    Ok(())
}

/// Four or five bits a number around zero: the number of the largest magnitude becomes the lowest level.
fn signed(numbers: &[f32], bits: u32, out: &mut Vec<u8>) -> Result<(), Overflow> {
    let middle = f64::from(1u32 << (bits - 1));
    let most = largest(numbers);
    let d = most / -(middle as f32);
    let id = f64::from(inverse(d));
    half(d, most, out)?;
    // in f64: the reference's compilers fuse the product and the sum
    let level = |x: &f32| (f64::from(*x) * id + (middle + 0.5)) as f32 as u8;
    pack(numbers.iter().map(level), bits, out);
    Ok(())
}

/// Four or five bits a number from the least to the most.
fn ranged(numbers: &[f32], bits: u32, out: &mut Vec<u8>) -> Result<(), Overflow> {
    let least = numbers.iter().copied().fold(f32::INFINITY, f32::min);
    let most = numbers.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let d = (most - least) / ((1u32 << bits) - 1) as f32;
    let id = inverse(d);
    half(d, most, out)?;
    half(least, least, out)?;
    pack(
        numbers.iter().map(|x| ((x - least) * id + 0.5) as u8),
        bits,
        out,
    );
    Ok(())
}

/// Levels in ggml's order: fifth bits in four bytes, then a byte of two nibbles, the first half's low, the second half's high.
fn pack(levels: impl Iterator<Item = u8>, bits: u32, out: &mut Vec<u8>) {
    let top = ((1u16 << bits) - 1) as u8;
    let levels: Vec<u8> = levels.map(|q| q.min(top)).collect();
    if bits == 5 {
        let fifth = levels.iter().enumerate();
        let fifth = fifth.fold(0u32, |sum, (i, q)| sum | u32::from(q >> 4) << i);
        out.extend(fifth.to_le_bytes());
    }
    let (low, high) = levels.split_at(levels.len() / 2);
    out.extend(
        low.iter()
            .zip(high)
            .map(|(low, high)| low & 15 | (high & 15) << 4),
    );
}
