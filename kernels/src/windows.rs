//! Attention within the windows of a picture (Liu et al., "Swin Transformer", arXiv 2103.14030): what it is made of, and the tables that both
//! executors add to scores.

use std::sync::Arc;

use crate::{Param, Result};

/// What is added to scores where query and key lie in different parts of a window that the picture's edges cut.
pub(crate) const APART: f32 = -100.0;
/// Below this the length of a vector counts as this, as in `torch.nn.functional.normalize`.
pub(crate) const SHORTEST: f32 = 1e-12;
/// Cosines are multiplied by e to a learned power, and by no more than this.
const MOST_COSINE: f32 = 100.0;

/// `softmax(q kᵀ / √d + bias) v` in each of `heads` slices of the last axis, for the queries of each window over its keys.
#[derive(Debug, Clone)]
pub struct Windows {
    /// Slices of the last axis.
    pub heads: usize,
    /// Rows and columns of the picture whose pixels the sequence is.
    pub size: (usize, usize),
    /// Side of a window in pixels; both sides of the picture are multiples of it.
    pub side: usize,
    /// Where a window's keys lie.
    pub keys: Keys,
    /// What is added to scores by the places of query and key to each other.
    pub bias: WindowBias,
    /// `[heads]`: scores are cosines of query and key times e to this, at most 100, in the place of `q kᵀ / √d` (Liu et al., "Swin Transformer
    /// V2", arXiv 2111.09883).
    pub cosine: Option<Param>,
}

/// Where the keys of a window lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keys {
    /// In the window itself. All windows lie this many pixels farther down and to the right: those that the last rows or columns cut go on
    /// with the first ones, which see each other and not the last.
    Same {
        /// Less than a window's side.
        shift: usize,
    },
    /// In the window and this many pixels around it, of which those outside of the picture are zeros (Chen et al., "Activating More Pixels in
    /// Image Super-Resolution Transformer", arXiv 2205.04437).
    Around {
        /// On every side.
        beyond: usize,
    },
}

/// What is added to a score, by how far the key lies from the query.
#[derive(Debug, Clone)]
pub enum WindowBias {
    /// `[n², heads]`: a row for each distance, n of them along either axis.
    Table(Param),
    /// 16 · sigmoid of two linear layers with a ReLU between them, of distances as the file has them.
    Learned {
        /// `[n, n, 2]`.
        distances: Param,
        /// `[f, 2]`.
        hidden: Param,
        /// `[f]`.
        shift: Param,
        /// `[heads, f]`.
        output: Param,
    },
}

impl WindowBias {
    pub(crate) fn params(&self) -> Vec<&Param> {
        match self {
            Self::Table(table) => vec![table],
            Self::Learned {
                distances,
                hidden,
                shift,
                output,
            } => vec![distances, hidden, shift, output],
        }
    }
}

impl Windows {
    /// Pixels that keys lie farther up and to the left than the window.
    pub(crate) fn beyond(&self) -> usize {
        match self.keys {
            Keys::Same { .. } => 0,
            Keys::Around { beyond } => beyond,
        }
    }

    /// Pixels by which windows are shifted.
    pub(crate) fn shift(&self) -> usize {
        match self.keys {
            Keys::Same { shift } => shift,
            Keys::Around { .. } => 0,
        }
    }

    /// Side of the square in which a window's keys lie.
    pub(crate) fn key_side(&self) -> usize {
        self.side + 2 * self.beyond()
    }

    /// Distances along one axis of a key from a query.
    pub(crate) fn distances(&self) -> usize {
        self.side + self.key_side() - 1
    }

    /// Whether it takes a sequence of `tokens` with `channels`.
    pub(crate) fn fits(&self, tokens: usize, channels: usize) -> bool {
        let ((h, w), side, n) = (self.size, self.side, self.distances());
        let bias = match &self.bias {
            WindowBias::Table(table) => table.shape() == [n * n, self.heads],
            WindowBias::Learned {
                distances,
                hidden,
                shift,
                output,
            } => matches!((distances.shape(), hidden.shape(), shift.shape(), output.shape()),
                ([a, b, 2], [f, 2], [g], [heads, e])
                    if (*a, *b, *heads) == (n, n, self.heads) && f == g && f == e && self.beyond() == 0),
        };
        let cosine = self.cosine.as_ref();
        side > 0
            && self.shift() < side
            && h.is_multiple_of(side)
            && w.is_multiple_of(side)
            && tokens == h * w
            && self.heads > 0
            && channels.is_multiple_of(self.heads)
            && bias
            && cosine.is_none_or(|cosine| cosine.shape() == [self.heads])
    }

    /// The part, of the three along an axis of `length` pixels, that a place lies in, counted from where windows begin. Only those of one part see
    /// each other.
    pub(crate) fn part(&self, place: usize, length: usize) -> usize {
        let shift = self.shift();
        match () {
            () if shift == 0 || place + self.side < length => 0,
            () if place + shift < length => 1,
            () => 2,
        }
    }

    /// `[heads, n, n]`: what is added to scores, by how far the key lies below and to the right of the query, from `1 − side` on; and behind
    /// it what each head's products are multiplied with. `width`: channels of a head.
    pub(crate) fn tables(
        &self,
        width: usize,
        read: &dyn Fn(&Param) -> Result<Arc<Vec<f32>>>,
    ) -> Result<Vec<f32>> {
        let n = self.distances();
        let table = match &self.bias {
            WindowBias::Table(table) => read(table)?.to_vec(),
            WindowBias::Learned {
                distances,
                hidden,
                shift,
                output,
            } => learned(
                &read(distances)?,
                (&read(hidden)?, &read(shift)?),
                &read(output)?,
            ),
        };
        let row = |down: usize, right: usize| match self.keys {
            // rows go by how far the query lies below the key
            Keys::Same { .. } => (n - 1 - down) * n + (n - 1 - right),
            // rows go by how far the key lies below the query, and those that would come before the first are the last ones
            Keys::Around { beyond } => {
                let first = (self.side + 2 * beyond).saturating_sub(2);
                (n * n + down * n + right - (n + 1) * first) % (n * n)
            }
        };
        let all = (0..self.heads)
            .flat_map(|head| (0..n * n).map(move |place| (head, place / n, place % n)));
        let mut tables: Vec<f32> = all
            .map(|(head, down, right)| table[row(down, right) * self.heads + head])
            .collect();
        match &self.cosine {
            None => tables.extend(vec![1.0 / (width as f32).sqrt(); self.heads]),
            Some(cosine) => {
                let powers = read(cosine)?;
                tables.extend(powers.iter().map(|p| p.min(MOST_COSINE.ln()).exp()));
            }
        }
        Ok(tables)
    }
}

/// `[n², heads]` of [`WindowBias::Learned`].
fn learned(distances: &[f32], (hidden, shift): (&[f32], &[f32]), output: &[f32]) -> Vec<f32> {
    let f = shift.len().max(1);
    let of = |pair: &[f32]| -> Vec<f32> {
        let layer = hidden.chunks(2).zip(shift);
        let layer: Vec<f32> = layer
            .map(|(w, b)| (w[0] * pair[0] + w[1] * pair[1] + b).max(0.0))
            .collect();
        let heads = output.chunks(f).map(|row| {
            let sum: f32 = row.iter().zip(&layer).map(|(w, x)| w * x).sum();
            16.0 / (1.0 + (-sum).exp())
        });
        heads.collect()
    };
    distances.chunks(2).flat_map(of).collect()
}
