//! A tensor that will be written: its name and shape there, and which tensors of the input it is made of. Nothing is read before it is written.

use std::borrow::Cow;
use std::sync::Arc;

use safetensors::Dtype;
use sd_kernels::{Reader, Source};

use super::Change;
use crate::checkpoint::{TensorType, leftover, printable};
use crate::error::{Error, Result};
use crate::weights::{CheckpointSource, is_readable};

/// A weight by the names of diffusers' folders, whatever it is called where it comes from and where it goes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct WeightName {
    /// The component: `unet`, `vae`, `text_encoder`, `text_encoder_2`.
    pub component: &'static str,
    /// The name in it, such as `down_blocks.0.resnets.0.conv1.weight`; those of text encoders without `text_model.`.
    pub name: String,
}

/// What a tensor is to the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// A weight.
    Weight,
    /// Weights that nothing computes with: averaged copies, parts that are left out.
    Spare,
    /// No weight: positions, tables of the schedule, marks.
    Aside,
}

/// A tensor that will be written.
pub(super) struct Item {
    /// Its name in the output.
    pub(super) name: String,
    /// Its shape in the output.
    pub(super) shape: Vec<usize>,
    /// What it is made of, below each other along the first axis.
    pub(super) pieces: Vec<Piece>,
    /// Its numbers, where it is made of nothing in the input.
    pub(super) constant: Option<Vec<f32>>,
    /// What it is to the model.
    pub(super) role: Role,
    /// Its name in a single file, by which its block is told.
    pub(super) block: String,
}

/// A tensor of the input, or a part of one.
pub(super) struct Piece {
    /// Where it lies.
    pub(super) source: Arc<CheckpointSource>,
    /// Its name there.
    pub(super) name: String,
    /// Its shape there.
    pub(super) shape: Vec<usize>,
    /// The output has it with rows and columns exchanged.
    pub(super) flipped: bool,
    /// Which weight it is, where that is known.
    pub(super) weight: Option<WeightName>,
}

impl Item {
    /// A tensor as it is in the input.
    pub(super) fn as_it_is(
        source: &Arc<CheckpointSource>,
        name: &str,
        shape: &[usize],
        role: Role,
    ) -> Self {
        Self {
            name: name.to_owned(),
            shape: shape.to_vec(),
            pieces: vec![Piece {
                source: Arc::clone(source),
                name: name.to_owned(),
                shape: shape.to_vec(),
                flipped: false,
                weight: None,
            }],
            constant: None,
            role,
            block: name.to_owned(),
        }
    }

    /// A tensor that is not in the input.
    pub(super) fn constant(name: &str, shape: &[usize], numbers: Vec<f32>) -> Self {
        Self {
            name: name.to_owned(),
            shape: shape.to_vec(),
            pieces: Vec::new(),
            constant: Some(numbers),
            role: Role::Aside,
            block: name.to_owned(),
        }
    }

    /// How many numbers it has.
    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The type of the input, where all pieces have one that the output can have as it is: whole numbers by themselves, no scale beside them.
    pub(super) fn plain_type(&self) -> Option<Dtype> {
        let mut types = self.pieces.iter().map(Piece::plain_type);
        let first = types.next()??;
        types.all(|dtype| dtype == Some(first)).then_some(first)
    }

    /// The type of the input's first piece.
    pub(super) fn stored_type(&self) -> Option<TensorType> {
        let piece = self.pieces.first()?;
        Some(piece.source.stored(&piece.name)?.info.dtype)
    }

    /// Whether its numbers can be read.
    pub(super) fn is_float(&self) -> bool {
        let readable = |piece: &Piece| {
            let stored = piece.source.stored(&piece.name);
            stored.is_some_and(|stored| is_readable(stored.info.dtype))
        };
        self.pieces.iter().all(readable)
    }

    /// A type that holds what the input's compressed numbers hold.
    pub(super) fn natural_type(&self) -> Dtype {
        let wider = |a: Dtype, b: Dtype| match (a, b) {
            _ if a == b => a,
            _ => Dtype::F32,
        };
        let types = self
            .pieces
            .iter()
            .map(|piece| match piece.source.dtype(&piece.name) {
                candle_core::DType::F16 => Dtype::F16,
                candle_core::DType::BF16 => Dtype::BF16,
                _ => Dtype::F32,
            });
        types.reduce(wider).unwrap_or(Dtype::F32)
    }

    /// Opens its numbers, with `change` applied to the weights that it touches.
    pub(super) fn open(&self, change: Option<&dyn Change>) -> Result<Numbers<'_>> {
        let constant = self.constant.iter();
        let constant = constant.map(|held| Ok((held.len(), PieceNumbers::Held(held.clone()))));
        let pieces = self.pieces.iter().map(|piece| {
            let numbers = piece.open(change)?;
            Ok((piece.shape.iter().product(), numbers))
        });
        Ok(Numbers {
            pieces: constant.chain(pieces).collect::<Result<_>>()?,
        })
    }
}

impl Piece {
    fn plain_type(&self) -> Option<Dtype> {
        let stored = self.source.stored(&self.name)?;
        match stored.info.dtype {
            TensorType::Plain(dtype) if !stored.scaled => Some(dtype),
            _ => None,
        }
    }

    /// The bytes as the input has them, in the order of the output; for plain types.
    pub(super) fn bytes(&self) -> Result<Cow<'_, [u8]>> {
        let bytes = self.source.bytes(&self.name)?;
        let turned_there = self
            .source
            .stored(&self.name)
            .is_some_and(|stored| stored.part.transposed);
        let [rows, columns] = *self.shape.as_slice() else {
            return Ok(bytes);
        };
        Ok(match (turned_there, self.flipped) {
            (false, true) => Cow::Owned(exchange(&bytes, rows, columns)),
            (true, false) => Cow::Owned(exchange(&bytes, columns, rows)),
            _ => bytes,
        })
    }

    fn open(&self, change: Option<&dyn Change>) -> Result<PieceNumbers<'_>> {
        let change = self
            .weight
            .as_ref()
            .and_then(|weight| Some((weight, change.filter(|change| change.touches(weight))?)));
        let reader = self.source.open(&self.name, &self.shape)?;
        if change.is_none() && !self.flipped {
            return Ok(PieceNumbers::Read(reader));
        }
        let mut numbers = vec![0.0; self.shape.iter().product()];
        reader.read(0, &mut numbers);
        if let Some((weight, change)) = change {
            change.apply(weight, &self.shape, &mut numbers)?;
        }
        if let ([rows, columns], true) = (self.shape.as_slice(), self.flipped) {
            let mut turned = vec![0.0; numbers.len()];
            for (i, out) in turned.iter_mut().enumerate() {
                let at = i % rows * columns + i / rows;
                *out = numbers.get(at).copied().unwrap_or_default();
            }
            numbers = turned;
        }
        Ok(PieceNumbers::Held(numbers))
    }
}

/// A matrix of `rows` and `columns` with both exchanged; elements are as wide as the bytes say.
fn exchange(bytes: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let width = bytes.len() / (rows * columns).max(1);
    let mut out = Vec::with_capacity(bytes.len());
    for column in 0..columns {
        for row in 0..rows {
            let at = (row * columns + column) * width;
            out.extend_from_slice(bytes.get(at..at + width).unwrap_or_default());
        }
    }
    out
}

/// The numbers of an item, read piece by piece.
pub(super) struct Numbers<'a> {
    pieces: Vec<(usize, PieceNumbers<'a>)>,
}

enum PieceNumbers<'a> {
    Read(Box<dyn Reader + 'a>),
    Held(Vec<f32>),
}

impl Numbers<'_> {
    /// The numbers from `first` on: as many as `out` has.
    pub(super) fn read(&self, mut first: usize, mut out: &mut [f32]) {
        for (count, piece) in &self.pieces {
            if first >= *count {
                first -= count;
                continue;
            }
            let take = out.len().min(count - first);
            let (now, later) = std::mem::take(&mut out).split_at_mut(take);
            match piece {
                PieceNumbers::Read(reader) => reader.read(first, now),
                PieceNumbers::Held(numbers) => {
                    let held = numbers.get(first..).unwrap_or_default();
                    now.iter_mut().zip(held).for_each(|(out, x)| *out = *x);
                }
            }
            (out, first) = (later, 0);
            if out.is_empty() {
                return;
            }
        }
    }
}

/// What a tensor of a single file is to the model, by its name and type alone.
pub(super) fn role(name: &str, dtype: TensorType) -> Role {
    if !is_readable(dtype) || name.ends_with("position_ids") {
        return Role::Aside;
    }
    match leftover(name) {
        None => Role::Weight,
        Some(_) if name.contains("model_ema.") && !name.ends_with("model_ema.decay") => Role::Spare,
        Some(_) if name.starts_with("cond_stage_model.") => Role::Spare,
        Some(_) => Role::Aside,
    }
}

/// The refusal of a tensor by name.
pub(super) fn refuse(name: &str, reason: impl std::fmt::Display) -> Error {
    Error::Weights(format!("tensor `{}` {reason}", printable(name)))
}
