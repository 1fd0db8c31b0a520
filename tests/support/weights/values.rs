//! Numbers: a tensor's values out of its name, and their bytes in a file.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use half::slice::HalfFloatSliceExt;
use half::vec::HalfFloatVecExt;
use half::{bf16, f16};
use safetensors::{Dtype, View};

/// Steps of splitmix64's counter: 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The bounds of uniformly distributed values: `offset ± scale`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Law {
    pub(crate) scale: f32,
    pub(crate) offset: f32,
}

/// The values of the tensor called `name`, row-major, not yet rounded to a stored type.
pub(crate) fn uniform(name: &str, shape: &[usize], law: Law) -> Vec<f32> {
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let count: usize = shape.iter().product();
    let mut state = seed;
    let mut values = Vec::with_capacity(count);
    for _ in 0..count {
        state = state.wrapping_add(GOLDEN);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let unit = (z >> 40) as f32 / (1 << 23) as f32 - 1.0;
        values.push(law.offset + law.scale * unit);
    }
    values
}

/// Little-endian bytes of `values`, rounded to `kept` and then stored as `stored`. The first is what the expected tensors were computed with.
pub(crate) fn encode(values: &[f32], kept: Dtype, stored: Dtype) -> Vec<u8> {
    let rounded: Cow<'_, [f32]> = match kept {
        Dtype::F16 if stored != kept => Cow::Owned(halves(values).to_f32_vec()),
        Dtype::BF16 if stored != kept => Cow::Owned(brains(values).to_f32_vec()),
        _ => Cow::Borrowed(values),
    };
    match stored {
        Dtype::F32 => bytes(&rounded, |v| v.to_le_bytes()),
        Dtype::F16 => bytes(&halves(&rounded), |v| v.to_le_bytes()),
        Dtype::BF16 => bytes(&brains(&rounded), |v| v.to_le_bytes()),
        Dtype::I64 => bytes(&rounded, |v| (v as i64).to_le_bytes()),
        Dtype::I32 => bytes(&rounded, |v| (v as i32).to_le_bytes()),
        other => panic!("fixtures are not stored as {other:?}"),
    }
}

fn halves(values: &[f32]) -> Vec<f16> {
    Vec::from_f32_slice(values)
}

fn brains(values: &[f32]) -> Vec<bf16> {
    Vec::from_f32_slice(values)
}

fn bytes<T: Copy, const N: usize>(values: &[T], encode: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    let parts: Vec<[u8; N]> = values.iter().map(|&value| encode(value)).collect();
    parts.into_flattened()
}

/// A tensor as it lies in a file.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: Dtype,
    pub(crate) bytes: Vec<u8>,
}

impl View for &Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// A tensor to compare with or to put in.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Values {
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<f32>,
}

/// Writes a safetensors file as PyTorch's users do.
pub(crate) fn save<'a>(tensors: impl Iterator<Item = &'a Stored>, path: &Path) {
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(
        tensors.map(|tensor| (&tensor.name, tensor)),
        Some(metadata),
        path,
    )
    .unwrap();
}

/// The tensors of the safetensors file at `path`.
pub(crate) fn read(path: &Path) -> Vec<Stored> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let stored = |(name, view): (String, safetensors::tensor::TensorView<'_>)| Stored {
        name,
        shape: view.shape().to_vec(),
        dtype: view.dtype(),
        bytes: view.data().to_vec(),
    };
    file.tensors().into_iter().map(stored).collect()
}

/// The tensors of a file of floats, by name.
pub(crate) fn floats(path: &Path) -> HashMap<String, Values> {
    let values = |stored: Stored| {
        let numbers = stored.bytes.as_chunks().0.iter();
        let data = numbers.map(|b| f32::from_le_bytes(*b)).collect();
        let shape = stored.shape;
        (stored.name, Values { shape, data })
    };
    read(path).into_iter().map(values).collect()
}

/// Reads the safetensors file at `path`, lets `change` change its tensors, and writes it anew.
pub(crate) fn edit(path: &Path, change: impl FnOnce(&mut Vec<Stored>)) {
    let mut tensors = read(path);
    change(&mut tensors);
    save(tensors.iter(), path);
}
