//! Control-LoRA: a ControlNet of which the file holds only what differs from the model's own UNet (Stability's `lora_controlnet` files).
//!
//! A tensor that the file has is taken from it; where it has `X.up` and `X.down`, the weight is the UNet's plus their product; all others
//! are the UNet's.

use std::sync::Arc;

use candle_core::DType;
use rayon::prelude::*;
use sd_kernels::{Error, LowRank, Reader, Result, Source};

use super::CheckpointSource;

/// How many numbers a thread reads at a time: whole blocks of every quantised type.
const PIECE: usize = 1 << 16;

/// Such a file over a UNet.
pub(crate) struct ControlLoraSource {
    /// The file's tensors.
    pub(crate) own: Arc<CheckpointSource>,
    /// The UNet's weights, adapters included.
    pub(crate) base: Arc<dyn Source>,
}

/// A matrix, as it is stored.
struct Factor {
    name: String,
    shape: Vec<usize>,
}

impl ControlLoraSource {
    /// `X.up [o, r]` and `X.down [r, i…]` of the weight `X.weight`.
    fn factors(&self, name: &str) -> Option<[Factor; 2]> {
        let stem = name.strip_suffix("weight")?;
        let factor = |end: &str| {
            let name = format!("{stem}{end}");
            let shape = self.own.shape(&name, &[])?;
            Some(Factor { name, shape })
        };
        Some([factor("up")?, factor("down")?])
    }

    fn merged(&self, name: &str, shape: &[usize], factors: &[Factor; 2]) -> Result<Vec<f32>> {
        let mut values = vec![0.0; shape.iter().product()];
        let base = self.base.open(name, shape)?;
        let pieces = values.par_chunks_mut(PIECE).enumerate();
        pieces.for_each(|(i, piece)| base.read(i * PIECE, piece));
        let [up, down] = factors;
        let rows = shape.first().copied().unwrap_or(0);
        let columns = values.len() / rows.max(1);
        let rank = down.shape.first().copied().unwrap_or(0);
        let count = |factor: &Factor| factor.shape.iter().product::<usize>();
        if count(up) != rows * rank || count(down) != rank * columns {
            return Err(Error::Weights(format!(
                "tensors `{}` {:?} and `{}` {:?} do not make a change of {shape:?}",
                up.name, up.shape, down.name, down.shape
            )));
        }
        let read = |factor: &Factor| -> Result<Vec<f32>> {
            let mut numbers = vec![0.0; count(factor)];
            self.own
                .open(&factor.name, &factor.shape)?
                .read(0, &mut numbers);
            Ok(numbers)
        };
        let (up, down) = (read(up)?, read(down)?);
        let lines = values.par_chunks_mut(columns.max(1)).enumerate();
        lines.for_each(|(row, line)| {
            let mut change = vec![0.0; line.len()];
            for (k, factor) in up[row * rank..][..rank].iter().enumerate() {
                for (sum, x) in change.iter_mut().zip(&down[k * columns..]) {
                    *sum += factor * x;
                }
            }
            for (value, change) in line.iter_mut().zip(change) {
                *value += change;
            }
        });
        Ok(values)
    }
}

impl Source for ControlLoraSource {
    fn shape(&self, name: &str, wanted: &[usize]) -> Option<Vec<usize>> {
        let own = self.own.shape(name, wanted);
        own.or_else(|| {
            // asked for, so that nobody calls them unused
            let _ = self.factors(name);
            self.base.shape(name, wanted)
        })
    }

    fn dtype(&self, name: &str) -> DType {
        if self.own.stored(name).is_some() {
            return self.own.dtype(name);
        }
        match self.factors(name) {
            Some(_) => DType::F32,
            None => self.base.dtype(name),
        }
    }

    fn is_compressed(&self, name: &str) -> bool {
        self.own.stored(name).is_none()
            && self.factors(name).is_none()
            && self.base.is_compressed(name)
    }

    fn beside(&self, name: &str) -> Vec<LowRank> {
        match self.own.stored(name) {
            Some(_) => Vec::new(),
            None => self.base.beside(name),
        }
    }

    fn open(&self, name: &str, shape: &[usize]) -> Result<Box<dyn Reader + '_>> {
        if self.own.stored(name).is_some() {
            return self.own.open(name, shape);
        }
        match self.factors(name) {
            Some(factors) => Ok(Box::new(Held(self.merged(name, shape, &factors)?))),
            None => self.base.open(name, shape),
        }
    }
}

/// A weight in memory.
struct Held(Vec<f32>);

impl Reader for Held {
    fn read(&self, first: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.0[first..][..out.len()]);
    }
}
