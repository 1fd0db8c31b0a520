//! Numbers to bytes of the output's types. What would become infinite is an error, never a silent infinity.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

use super::blocks;
use crate::checkpoint::TensorType;

/// Numbers that one thread encodes at a time; a multiple of every block.
const PART: usize = 1 << 14;

/// A number that the type cannot hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Overflow(pub(super) f32);

/// Whether numbers can be written as `dtype`.
pub(super) fn can_encode(dtype: TensorType) -> bool {
    match dtype {
        TensorType::Plain(dtype) => {
            matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
        }
        TensorType::Block(block) => blocks::can_encode(block),
    }
}

/// `numbers`, whole blocks of them, as `dtype`.
///
/// # Errors
/// The first number that is finite and would not be.
pub(super) fn encode(dtype: TensorType, numbers: &[f32]) -> Result<Vec<u8>, Overflow> {
    let parts = numbers.par_chunks(PART).map(|numbers| part(dtype, numbers));
    let parts: Vec<Vec<u8>> = parts.collect::<Result<_, _>>()?;
    Ok(parts.concat())
}

fn part(dtype: TensorType, numbers: &[f32]) -> Result<Vec<u8>, Overflow> {
    let fits = |held: &dyn Fn(usize) -> bool| {
        let lost = numbers
            .iter()
            .enumerate()
            .find(|(i, x)| x.is_finite() && !held(*i));
        lost.map_or(Ok(()), |(_, x)| Err(Overflow(*x)))
    };
    match dtype {
        TensorType::Block(block) => blocks::encode(block, numbers),
        TensorType::Plain(Dtype::F64) => Ok(numbers
            .iter()
            .flat_map(|x| f64::from(*x).to_le_bytes())
            .collect()),
        TensorType::Plain(Dtype::F16) => {
            let mut halves = vec![f16::ZERO; numbers.len()];
            halves.convert_from_f32_slice(numbers);
            fits(&|i| halves.get(i).is_some_and(|half| half.is_finite()))?;
            Ok(halves.iter().flat_map(|half| half.to_le_bytes()).collect())
        }
        TensorType::Plain(Dtype::BF16) => {
            let halves: Vec<bf16> = numbers.iter().map(|x| bf16::from_f32(*x)).collect();
            fits(&|i| halves.get(i).is_some_and(|half| half.is_finite()))?;
            Ok(halves.iter().flat_map(|half| half.to_le_bytes()).collect())
        }
        TensorType::Plain(_) => Ok(numbers.iter().flat_map(|x| x.to_le_bytes()).collect()),
    }
}
