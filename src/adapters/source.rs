//! Weights with adapters on them, read as any others: networks are none the wiser.

use std::sync::Arc;

use candle_core::DType;
use rayon::prelude::*;
use sd_kernels::{LowRank, Reader, Result, Source};

use super::bound::Bound;
use super::keys::Owner;

/// How many numbers a thread reads at a time: whole blocks of every quantised type.
const PIECE: usize = 1 << 16;

/// Another source's weights, of which some are changed. A changed weight is merged when it is opened, in f32, and stays f32: a file's 16 bits would
/// not hold it.
pub(super) struct AdaptedSource {
    pub(super) inner: Arc<dyn Source>,
    pub(super) bound: Arc<Bound>,
    pub(super) owner: Owner,
}

impl Bound {
    /// A network's weights as they become; those of a network that nothing changes are given back as they are.
    pub fn wrap(self: &Arc<Self>, owner: Owner, inner: Arc<dyn Source>) -> Arc<dyn Source> {
        if !self.has(owner) {
            return inner;
        }
        Arc::new(AdaptedSource {
            inner,
            bound: Arc::clone(self),
            owner,
        })
    }
}

impl Source for AdaptedSource {
    fn shape(&self, name: &str, wanted: &[usize]) -> Option<Vec<usize>> {
        self.inner.shape(name, wanted)
    }

    fn dtype(&self, name: &str) -> DType {
        if self.bound.merges(self.owner, name) {
            return DType::F32;
        }
        let factor = self.bound.factor_type(self.owner, name);
        factor.unwrap_or_else(|| self.inner.dtype(name))
    }

    fn is_compressed(&self, name: &str) -> bool {
        !self.bound.merges(self.owner, name) && self.inner.is_compressed(name)
    }

    fn beside(&self, name: &str) -> Vec<LowRank> {
        self.bound.beside(self.owner, name)
    }

    fn open(&self, name: &str, shape: &[usize]) -> Result<Box<dyn Reader + '_>> {
        let length = shape.iter().product();
        let factor = self.bound.factor_numbers(self.owner, name, length);
        if let Some(factor) = factor.map_err(|e| failed(&e))? {
            return Ok(Box::new(Merged(factor)));
        }
        let reader = self.inner.open(name, shape)?;
        if !self.bound.merges(self.owner, name) {
            return Ok(reader);
        }
        let mut values = vec![0.0; length];
        let pieces = values.par_chunks_mut(PIECE).enumerate();
        pieces.for_each(|(i, piece)| reader.read(i * PIECE, piece));
        let merged = self.bound.apply(self.owner, name, shape, &mut values);
        merged.map_err(|e| failed(&e))?;
        Ok(Box::new(Merged(values)))
    }
}

fn failed(error: &crate::error::Error) -> sd_kernels::Error {
    sd_kernels::Error::Weights(error.to_string())
}

/// A weight in memory.
struct Merged(Vec<f32>);

impl Reader for Merged {
    fn read(&self, first: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.0[first..][..out.len()]);
    }
}
