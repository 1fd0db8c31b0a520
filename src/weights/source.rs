//! Tensors out of a checkpoint: found under any of their spellings, converted once while they are read.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::DType;
use safetensors::Dtype;
use sd_kernels::{Reader, Result, Source};

use super::layout::{Layout, Part};
use super::numbers::{self, is_eight_bits, is_readable};
use crate::checkpoint::{TensorInfo, TensorSet, TensorType};

/// What a scale beside an 8-bit `….weight` is called: by ComfyUI's and others' tools.
const SCALES: [&str; 2] = ["scale_weight", "weight_scale"];
/// What else may stand beside it: scales of what goes in, where that is 8 bits wide too, and notes of ComfyUI's.
const UNUSED: [&str; 3] = ["scale_input", "input_scale", "comfy_quant"];

/// Names beside the weight `name`, whose last part is replaced.
fn beside<const N: usize>(name: &str, last: [&'static str; N]) -> impl Iterator<Item = String> {
    let stem = name.strip_suffix("weight").map(str::to_owned);
    let stems = stem.into_iter();
    stems.flat_map(move |stem| last.map(|last| format!("{stem}{last}")))
}

/// Where a canonical tensor was found.
#[derive(Debug)]
pub struct StoredPart<'a> {
    /// The stored name, and which part of it.
    pub part: Part,
    /// All of the stored tensor.
    pub info: &'a TensorInfo,
    /// Its numbers are to be multiplied with a scale that stands beside it.
    pub scaled: bool,
}

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

    /// The tensor in the file that `name` is or is a part of.
    pub fn stored(&self, name: &str) -> Option<StoredPart<'_>> {
        let (part, _) = self.locate(name)?;
        let info = self.tensors.info(&part.stored)?;
        let scaled = self.scale(&part.stored, info.dtype).is_some();
        Some(StoredPart { part, info, scaled })
    }

    /// The bytes of `name` as the file has them, of one that is a part of a fused tensor only its own.
    ///
    /// # Errors
    /// When the tensor is not there, or cannot be read.
    pub fn bytes(&self, name: &str) -> crate::Result<Cow<'_, [u8]>> {
        let missing = || Self::error(name, "it is not in the file");
        let (part, _) = self.locate(name).ok_or_else(missing)?;
        let bytes = self.tensors.bytes(&part.stored)?;
        let Some(rows) = part.rows else {
            return Ok(bytes);
        };
        let size = bytes.len() / rows.count.max(1);
        let range = size * rows.index..size * (rows.index + 1);
        let own = match bytes {
            Cow::Borrowed(bytes) => bytes.get(range).map(Cow::Borrowed),
            Cow::Owned(bytes) => bytes.get(range).map(|own| Cow::Owned(own.to_vec())),
        };
        own.ok_or_else(|| missing().into())
    }

    /// The memory that the pages of `name` take is not needed any more.
    pub fn release(&self, name: &str) {
        if let Some((part, _)) = self.locate(name) {
            self.tensors.release(&part.stored);
        }
    }

    fn locate(&self, name: &str) -> Option<(Part, Vec<usize>)> {
        self.layout.places(name).into_iter().find_map(|part| {
            let mut shape = self.tensors.info(&part.stored)?.shape.clone();
            if let Some(rows) = part.rows {
                let first = shape.first_mut()?;
                if *first % rows.count != 0 {
                    return None;
                }
                *first = *first / rows.count * rows.span;
            }
            if part.swapped && shape.first().is_none_or(|rows| rows % 2 != 0) {
                return None;
            }
            if part.transposed {
                shape.reverse();
            }
            Some((part, shape))
        })
    }

    /// The scale of the 8-bit tensor `stored`, if the file has one beside it.
    fn scale(&self, stored: &str, dtype: TensorType) -> Option<(String, &TensorInfo)> {
        let names = is_eight_bits(dtype).then(|| beside(stored, SCALES));
        let mut names = names.into_iter().flatten();
        names.find_map(|name| {
            let info = self.tensors.info(&name)?;
            Some((name, info))
        })
    }

    /// One number for all of an 8-bit tensor, or one for each of its rows; none where it has no scale.
    fn scales(&self, stored: &str, info: &TensorInfo) -> Result<Vec<f32>> {
        let Some((name, scale)) = self.scale(stored, info.dtype) else {
            return Ok(Vec::new());
        };
        let count = scale.elements();
        let fits = count == 1 || (count > 0 && Some(&count) == info.shape.first());
        if !fits || !is_readable(scale.dtype) {
            let reason = format!(
                "it is of type {} and shape {:?}, expected one float or one for each of the {} rows that it scales",
                scale.dtype,
                scale.shape,
                info.shape.first().unwrap_or(&1)
            );
            return Err(Self::error(&name, reason));
        }
        let bytes = self.tensors.bytes(&name);
        let bytes = bytes.map_err(|e| Self::error(&name, e))?;
        let mut scales = vec![0.0; count];
        numbers::read(scale.dtype, &bytes, 0, &mut scales);
        Ok(scales)
    }

    fn error(name: &str, reason: impl std::fmt::Display) -> sd_kernels::Error {
        sd_kernels::Error::Weights(format!("tensor `{name}` cannot be read: {reason}"))
    }
}

impl Source for CheckpointSource {
    fn shape(&self, name: &str, _wanted: &[usize]) -> Option<Vec<usize>> {
        let (part, shape) = self.locate(name)?;
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let info = self.tensors.info(&part.stored);
        if info.is_some_and(|info| is_eight_bits(info.dtype)) {
            let helpers = beside(&part.stored, SCALES).chain(beside(&part.stored, UNUSED));
            found.extend(helpers.filter(|name| self.tensors.info(name).is_some()));
        }
        found.insert(part.stored);
        Some(shape)
    }

    fn dtype(&self, name: &str) -> DType {
        let stored = self.locate(name).map(|(part, _)| part.stored);
        let info = stored.and_then(|stored| Some((self.tensors.info(&stored)?.dtype, stored)));
        let Some((dtype, stored)) = info else {
            return DType::F32;
        };
        match dtype {
            // f16 holds all numbers of the 8-bit types
            TensorType::Plain(Dtype::F8_E4M3 | Dtype::F8_E5M2)
                if self.scale(&stored, dtype).is_none() =>
            {
                DType::F16
            }
            // a scale may be any number, so range comes first: rounding to bf16 is a sixteenth of what 8 bits have lost already
            TensorType::Plain(Dtype::BF16 | Dtype::F8_E4M3 | Dtype::F8_E5M2) => DType::BF16,
            // scales are f16 themselves; rounding to 11 bits is an eighth of the finest block type's steps, and half the room of f32
            TensorType::Plain(Dtype::F16) | TensorType::Block(_) => DType::F16,
            TensorType::Plain(_) => DType::F32,
        }
    }

    fn is_compressed(&self, name: &str) -> bool {
        let info = self
            .locate(name)
            .and_then(|(part, _)| self.tensors.info(&part.stored));
        info.is_some_and(|info| {
            is_eight_bits(info.dtype) || matches!(info.dtype, TensorType::Block(_))
        })
    }

    fn open(&self, name: &str, shape: &[usize]) -> Result<Box<dyn Reader + '_>> {
        let (part, _) = self
            .locate(name)
            .ok_or_else(|| Self::error(name, "it is not in the file"))?;
        let info = self
            .tensors
            .info(&part.stored)
            .ok_or_else(|| Self::error(&part.stored, "it is not in the file"))?;
        if !is_readable(info.dtype) {
            let reason = format!("its type {} is not a float", info.dtype);
            return Err(Self::error(&part.stored, reason));
        }
        let scales = self.scales(&part.stored, info)?;
        let bytes = self
            .tensors
            .bytes(&part.stored)
            .map_err(|e| Self::error(&part.stored, e))?;
        let all = info.elements();
        let (start, count) = match part.rows {
            Some(rows) => (all / rows.count * rows.index, all / rows.count * rows.span),
            None => (0, all),
        };
        let wanted: usize = shape.iter().product();
        if count != wanted {
            let reason = format!("it has {count} numbers, expected {wanted}");
            return Err(Self::error(&part.stored, reason));
        }
        let stored = StoredTensor {
            tensors: &self.tensors,
            dtype: info.dtype,
            scaled: all / scales.len().max(1),
            scales,
            name: part.stored,
            bytes,
            start,
        };
        Ok(match *shape {
            [rows, columns] if part.transposed => Box::new(Transposed {
                stored,
                rows,
                columns,
            }),
            _ if part.swapped => Box::new(Swapped {
                stored,
                half: wanted / 2,
            }),
            _ => Box::new(stored),
        })
    }
}

/// A tensor, or some of its rows, where it lies.
struct StoredTensor<'a> {
    tensors: &'a TensorSet,
    name: String,
    dtype: TensorType,
    bytes: Cow<'a, [u8]>,
    /// Its first number among those of the bytes.
    start: usize,
    /// What numbers are multiplied with; none if empty.
    scales: Vec<f32>,
    /// How many numbers share a scale.
    scaled: usize,
}

impl Reader for StoredTensor<'_> {
    fn read(&self, first: usize, out: &mut [f32]) {
        let first = self.start + first;
        numbers::read(self.dtype, &self.bytes, first, out);
        match self.scales.as_slice() {
            [] => {}
            [scale] => out.iter_mut().for_each(|out| *out *= scale),
            scales => {
                for (i, out) in (first..).zip(out) {
                    *out *= scales[i / self.scaled];
                }
            }
        }
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

/// A tensor of which the file holds the second half first.
struct Swapped<'a> {
    stored: StoredTensor<'a>,
    half: usize,
}

impl Reader for Swapped<'_> {
    fn read(&self, first: usize, out: &mut [f32]) {
        let before = self.half.saturating_sub(first).min(out.len());
        let (head, tail) = out.split_at_mut(before);
        if !head.is_empty() {
            self.stored.read(first + self.half, head);
        }
        if !tail.is_empty() {
            self.stored.read(first + before - self.half, tail);
        }
    }
}

impl Drop for StoredTensor<'_> {
    fn drop(&mut self) {
        self.tensors.release(&self.name);
    }
}
