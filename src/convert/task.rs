//! One tensor on its way: read, mixed, changed, encoded and handed on a piece at a time, so that memory does not depend on the model's size.

use super::Change;
use super::encode::{Overflow, encode};
use super::item::{Item, refuse};
use super::merge::Mix;
use crate::checkpoint::TensorType;
use crate::error::Result;

/// Numbers that are converted at a time; a multiple of every block.
const PIECE: usize = 1 << 20;
/// Bytes that are copied at a time.
const COPY: usize = 4 << 20;

/// Takes bytes in order.
pub(super) type Sink<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// A tensor and what happens to it.
pub(super) struct Task {
    /// The tensor.
    pub(super) item: Item,
    /// Its type in the output.
    pub(super) target: TensorType,
    /// What is mixed into it.
    pub(super) mix: Option<Mix>,
    /// Its bytes are copied as they are.
    pub(super) copied: bool,
}

impl Task {
    /// Its bytes in the output.
    ///
    /// # Errors
    /// When it does not end on a whole byte or block.
    pub(super) fn size(&self) -> Result<usize> {
        self.target.bytes(self.item.elements()).ok_or_else(|| {
            let (shape, target) = (&self.item.shape, self.target);
            refuse(
                &self.item.name,
                format!("of shape {shape:?} does not end on a whole block of {target}"),
            )
        })
    }

    /// Hands its bytes to `sink`.
    ///
    /// # Errors
    /// When it cannot be read, the output's type cannot hold a number, or `sink` fails.
    pub(super) fn write(&self, change: Option<&dyn Change>, sink: &mut Sink<'_>) -> Result<()> {
        let changed = change.is_some_and(|change| {
            let weights = self
                .item
                .pieces
                .iter()
                .filter_map(|piece| piece.weight.as_ref());
            weights.into_iter().any(|weight| change.touches(weight))
        });
        let outcome = match self.copied && !changed && self.mix.is_none() {
            true => self.copy(sink),
            false => self.convert(change, sink),
        };
        for piece in &self.item.pieces {
            piece.source.release(&piece.name);
        }
        outcome
    }

    fn copy(&self, sink: &mut Sink<'_>) -> Result<()> {
        for piece in &self.item.pieces {
            for bytes in piece.bytes()?.chunks(COPY) {
                sink(bytes)?;
            }
        }
        Ok(())
    }

    fn convert(&self, change: Option<&dyn Change>, sink: &mut Sink<'_>) -> Result<()> {
        let numbers = self.item.open(change)?;
        let mix = match &self.mix {
            Some(mix) => Some(mix.open()?),
            None => None,
        };
        let count = self.item.elements();
        let mut buffer = vec![0.0; PIECE.min(count)];
        let mut first = 0;
        while first < count {
            let take = PIECE.min(count - first);
            let out = buffer.get_mut(..take).unwrap_or_default();
            numbers.read(first, out);
            if let Some(mix) = &mix {
                mix.apply(first, out);
            }
            let bytes = encode(self.target, out).map_err(|Overflow(number)| {
                let target = self.target;
                refuse(
                    &self.item.name,
                    format!("holds {number}, which {target} cannot; choose --dtype bf16 or f32"),
                )
            })?;
            sink(&bytes)?;
            first += take;
        }
        Ok(())
    }
}
