//! Weights of products as `product.cu` reads them: `[phase][column][chunk][32]`.

use half::bf16;
use rayon::prelude::*;

use super::super::exec::taps;
use super::super::ir::{Form, Product, Program, Type};
use super::super::store::{Stored, sub_pixel};
use super::args::Args;
use crate::{Error, Result};

/// Channels of a chunk.
pub(super) const CHUNK: usize = 32;

/// How the inner dimension of a product is cut: chunks of a tap of a source, in the order in which they are summed.
pub(super) struct Depth {
    /// The channels of each source.
    sources: Vec<usize>,
    /// For each phase the pixels that the taps of each source read.
    taps: Vec<Vec<super::super::exec::Taps>>,
}

impl Depth {
    pub(super) fn of(program: &Program, product: &Product) -> Self {
        Self {
            sources: program.sources(product).0.concat(),
            taps: taps(product),
        }
    }

    pub(super) fn phases(&self) -> usize {
        self.taps.len()
    }

    /// Chunks of a phase.
    pub(super) fn chunks(&self) -> usize {
        let Some(first) = self.taps.first() else {
            return 0;
        };
        let of = self.sources.iter().zip(first);
        of.map(|(channels, taps)| taps.len() * channels.div_ceil(CHUNK))
            .sum()
    }

    /// The kernel's list of chunks.
    ///
    /// # Errors
    /// When there are too many.
    pub(super) fn table(&self) -> Result<Vec<u8>> {
        let mut list = Args::default();
        for phase in &self.taps {
            for (source, (&channels, taps)) in self.sources.iter().zip(phase).enumerate() {
                for &(dy, dx) in taps {
                    for first in (0..channels).step_by(CHUNK) {
                        let count = CHUNK.min(channels - first);
                        let pixel = list.short(source.cast_signed()).short(dy).short(dx);
                        list = pixel.short(count.cast_signed()).int(first).int(0);
                    }
                }
            }
        }
        list.finish()
    }

    /// Bytes of the weights of `columns` columns.
    ///
    /// # Errors
    /// When there are more than memory can have.
    pub(super) fn bytes(&self, columns: usize, kind: Type) -> Result<usize> {
        let row = self.chunks() * CHUNK * kind.bytes();
        let all = self.phases().checked_mul(columns);
        all.and_then(|n| n.checked_mul(row)).ok_or_else(|| {
            Error::Memory("a layer has more weights than memory can hold".to_owned())
        })
    }

    /// Reads the weights of a product.
    ///
    /// # Errors
    /// When one cannot be read.
    pub(super) fn pack(&self, program: &Program, product: &Product) -> Result<Vec<u8>> {
        let (channels, kind) = program.sources(product);
        let stored = Stored::open(product, &channels)?;
        let mut bytes = vec![0; self.bytes(product.columns, kind)?];
        let row = self.chunks() * CHUNK * kind.bytes();
        let rows = bytes.par_chunks_mut(row.max(1)).enumerate();
        rows.for_each(|(i, out)| {
            let (phase, column) = (i / product.columns, i % product.columns);
            self.row(&stored, (phase, file_column(product, column)), kind, out);
        });
        Ok(bytes)
    }

    /// A column's weights of one phase.
    fn row(
        &self,
        stored: &Stored<'_>,
        (phase, column): (usize, usize),
        kind: Type,
        out: &mut [u8],
    ) {
        let mut chunks = out.chunks_exact_mut(CHUNK * kind.bytes());
        let sources = self.sources.iter().zip(&self.taps[phase]).enumerate();
        for (source, (&channels, taps)) in sources {
            // [input][tap], as the file has them
            let weights = match stored.enlarges() {
                false => {
                    let mut weights = vec![0.0; channels * taps.len()];
                    stored.row(column, source, &mut weights);
                    weights
                }
                true => {
                    let mut all = vec![0.0; channels * 9];
                    stored.row(column, source, &mut all);
                    let mut weights = vec![0.0; channels * 4];
                    for (taps, out) in all.chunks_exact(9).zip(weights.chunks_exact_mut(4)) {
                        sub_pixel(taps, (phase / 2, phase % 2), out);
                    }
                    weights
                }
            };
            for tap in 0..taps.len() {
                for first in (0..channels).step_by(CHUNK) {
                    let Some(out) = chunks.next() else { return };
                    let inputs = first..(first + CHUNK).min(channels);
                    let numbers = inputs.map(|input| weights[input * taps.len() + tap]);
                    write(kind, numbers, out);
                }
            }
        }
    }
}

/// The column of the file that a column on the card is: where a layer is gated, a value is followed by its gate.
pub(super) fn file_column(product: &Product, column: usize) -> usize {
    match product.form {
        Form::Gated => column % 2 * (product.columns / 2) + column / 2,
        _ => column,
    }
}

/// Writes numbers one behind the other.
pub(super) fn write(kind: Type, numbers: impl Iterator<Item = f32>, out: &mut [u8]) {
    let places = out.chunks_exact_mut(kind.bytes());
    match kind {
        Type::F32 => places
            .zip(numbers)
            .for_each(|(place, x)| place.copy_from_slice(&x.to_le_bytes())),
        Type::Bf16 => places
            .zip(numbers)
            .for_each(|(place, x)| place.copy_from_slice(&bf16::from_f32(x).to_le_bytes())),
    }
}
