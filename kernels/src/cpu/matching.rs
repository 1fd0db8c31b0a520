//! Which tokens of a picture are so alike that one may stand for both: bipartite soft matching (Bolya & Hoffman, "Token Merging for Fast Stable
//! Diffusion", arXiv 2303.17604), with the order of tomesd 0.1.3 and torch where numbers are equal: the first of the largest.
//!
//! Cosines of all pairs are a product like those of weights: tokens that may go are its rows, tokens that stay its columns. A block of rows at a
//! time, so that no matrix of all scores is there.

use std::cmp::Ordering;

use rayon::prelude::*;

use super::Level;
use super::epilogue::Epilogue;
use super::panels::{self, Group, Panels};
use super::product::{Grid, Source, product};
use crate::{Error, Result, Wrap};

/// Rows of a block of scores.
const BLOCK: usize = 384;
/// Numbers behind the rows that the product may read.
const BEHIND: usize = 16;

/// The tokens of one picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Matching {
    /// Tokens of a column.
    pub(crate) h: usize,
    /// Tokens of a row.
    pub(crate) w: usize,
    /// How many join another.
    pub(crate) merged: usize,
}

impl Matching {
    /// Tokens that stay.
    fn staying(&self) -> usize {
        (self.h / 2) * (self.w / 2)
    }

    /// Tokens that may go.
    fn going(&self) -> usize {
        self.h * self.w - self.staying()
    }

    /// Numbers that [`Matching::run`] needs beside its result, with as many channels.
    fn workspace_len(&self, channels: usize) -> usize {
        self.going() * channels + BEHIND + BLOCK.min(self.going()) * self.staying()
    }

    /// Bytes of them.
    pub(crate) fn workspace_bytes(&self, channels: usize) -> usize {
        4 * self.workspace_len(channels)
    }

    /// The tokens that stay and the others, each in their own order; `choice` says which of each four.
    fn split(&self, choice: impl Fn(usize) -> usize) -> (Vec<usize>, Vec<usize>) {
        let across = self.w / 2;
        let mut stays = vec![false; self.h * self.w];
        for cell in 0..self.staying() {
            let (y, x, of_four) = (cell / across * 2, cell % across * 2, choice(cell) % 4);
            stays[(y + of_four / 2) * self.w + x + of_four % 2] = true;
        }
        (0..stays.len()).partition(|&token| stays[token])
    }

    /// The place of each token of `x [h · w, channels]`; `read` gives a token's numbers.
    ///
    /// # Errors
    /// When there is no memory.
    pub(crate) fn run(
        &self,
        level: Level,
        (read, channels): (impl Fn(usize, &mut [f32]) + Sync, usize),
        choice: impl Fn(usize) -> usize,
        (workspace, out): (&mut [f32], &mut [f32]),
    ) -> Result<()> {
        let (stay, go) = self.split(choice);
        let unit = |token: usize, row: &mut [f32]| {
            read(token, row);
            let squares: f64 = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            let length = squares.sqrt() as f32;
            row.iter_mut().for_each(|v| *v /= length);
        };
        let group = Group { taps: 1, channels };
        let columns = Panels::<f32>::pack(stay.len(), &[group], |column, _, out| {
            unit(stay[column], out);
        })
        .map_err(|e| Error::Memory(format!("no memory to match {} tokens: {e}", stay.len())))?;
        let (rows, scores) = workspace.split_at_mut(go.len() * channels + BEHIND);
        rows.par_chunks_mut(channels)
            .zip(&go)
            .with_min_len(64)
            .for_each(|(row, &token)| unit(token, row));
        let mut best = vec![(0f32, 0usize); go.len()];
        for (i, best) in best.chunks_mut(BLOCK).enumerate() {
            let scores = &mut scores[..best.len() * stay.len()];
            let source = Source {
                data: &rows[i * BLOCK * channels..],
                pictures: 1,
                h: 1,
                w: best.len(),
                channels,
                pixel_stride: channels,
                stride: 1,
                taps: &[(0, 0)],
                wrap: Wrap::default(),
            };
            let grid = Grid::plain(1, 1, best.len());
            let weights = panels::Source::Packed(&columns);
            product(
                level,
                &weights,
                (grid, &[source]),
                &Epilogue::default(),
                scores,
            );
            best.par_iter_mut()
                .zip(scores.par_chunks(stay.len()))
                .with_min_len(16)
                .for_each(|(best, scores)| *best = largest(scores));
        }
        self.place((&stay, &go), &best, out);
        Ok(())
    }

    /// Puts down the places, where the best partner of each token that may go is known, with its cosine.
    fn place(&self, (stay, go): (&[usize], &[usize]), best: &[(f32, usize)], out: &mut [f32]) {
        let mut order: Vec<usize> = (0..go.len()).collect();
        // stable, as torch's is
        order.sort_by(|&a, &b| falling(best[a].0, best[b].0));
        let (merged, kept) = order.split_at(self.merged.min(order.len()));
        for (place, &i) in kept.iter().enumerate() {
            out[go[i]] = place as f32;
        }
        for (i, &token) in stay.iter().enumerate() {
            out[token] = (kept.len() + i) as f32;
        }
        for &i in merged {
            out[go[i]] = (kept.len() + best[i].1) as f32;
        }
    }
}

/// The largest number and its first place; what is not a number is larger than all, as torch has it.
fn largest(scores: &[f32]) -> (f32, usize) {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let mut strange = false;
    for scores in scores.chunks(lanes.len()) {
        for (lane, &score) in lanes.iter_mut().zip(scores) {
            *lane = if score > *lane { score } else { *lane };
            strange |= score.is_nan();
        }
    }
    let most = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let is_it = |score: &f32| {
        if strange {
            score.is_nan()
        } else {
            *score == most
        }
    };
    let first = scores.iter().position(is_it).unwrap_or(0);
    (if strange { f32::NAN } else { most }, first)
}

/// Larger numbers first, and what is not a number before them.
fn falling(a: f32, b: f32) -> Ordering {
    match (a.is_nan(), b.is_nan()) {
        (false, false) => b.partial_cmp(&a).unwrap_or(Ordering::Equal),
        (a, b) => b.cmp(&a),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(4321);
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn places(level: Level, sizes: Matching, x: &[f32], choice: &[usize]) -> Vec<usize> {
        let channels = x.len() / (sizes.h * sizes.w);
        let mut workspace = vec![f32::NAN; sizes.workspace_len(channels)];
        let mut out = vec![-1.0; sizes.h * sizes.w];
        let read = |token: usize, row: &mut [f32]| {
            row.copy_from_slice(&x[token * channels..][..channels]);
        };
        let choice = |cell: usize| choice[cell % choice.len()];
        sizes
            .run(level, (read, channels), choice, (&mut workspace, &mut out))
            .unwrap();
        out.into_iter().map(|place| place as usize).collect()
    }

    /// By the definition: each token's place, from cosines in f64.
    fn plainly(sizes: Matching, x: &[f32], choice: &[usize]) -> Vec<usize> {
        let Matching { h, w, merged } = sizes;
        let channels = x.len() / (h * w);
        let token = |i: usize| x[i * channels..][..channels].iter().map(|&v| f64::from(v));
        let length = |i: usize| token(i).map(|v| v * v).sum::<f64>().sqrt();
        let cosine =
            |i, j| token(i).zip(token(j)).map(|(a, b)| a * b).sum::<f64>() / length(i) / length(j);
        let stays: Vec<usize> = (0..h * w)
            .filter(|i| {
                let (y, x) = (i / w, i % w);
                let cell = y / 2 * (w / 2) + x / 2;
                y / 2 < h / 2 && x / 2 < w / 2 && choice[cell % choice.len()] == y % 2 * 2 + x % 2
            })
            .collect();
        let mut edges = Vec::new();
        for i in (0..h * w).filter(|i| !stays.contains(i)) {
            let mut best = (f64::NEG_INFINITY, 0);
            for (j, &other) in stays.iter().enumerate() {
                if cosine(i, other) > best.0 {
                    best = (cosine(i, other), j);
                }
            }
            edges.push((i, best));
        }
        edges.sort_by(|a, b| b.1.0.partial_cmp(&a.1.0).unwrap());
        let kept = edges.len() - merged;
        let mut out = vec![usize::MAX; h * w];
        for (n, &(i, (_, j))) in edges.iter().enumerate() {
            out[i] = if n < merged { kept + j } else { n - merged };
        }
        for (j, &i) in stays.iter().enumerate() {
            out[i] = kept + j;
        }
        out
    }

    #[test]
    fn places_are_those_of_the_definition() {
        for level in Level::supported() {
            for (h, w, channels, merged) in [
                (6, 8, 40, 24),
                (7, 5, 33, 10),
                (2, 2, 3, 3),
                (3, 2, 1, 1),
                (26, 41, 20, 500),
            ] {
                let sizes = Matching { h, w, merged };
                let x = numbers(h * w * channels, (h * w) as u32);
                for choice in [&[0][..], &[3, 1, 0, 2, 2, 1, 3]] {
                    let got = places(level, sizes, &x, choice);
                    let left = h * w - merged;
                    let mut lone: Vec<usize> = got.clone();
                    lone.sort_unstable();
                    lone.dedup();
                    assert!(lone.into_iter().eq(0..left), "each place is somebody's");
                    // in which order those come that were not merged hangs on their last bits
                    let kept = left - (h / 2) * (w / 2);
                    let joined = |places: Vec<usize>| -> Vec<usize> {
                        let join = |place| if place < kept { usize::MAX } else { place };
                        places.into_iter().map(join).collect()
                    };
                    let want = joined(plainly(sizes, &x, choice));
                    assert_eq!(joined(got), want, "{} {h} {w}", level.name());
                }
            }
        }
    }

    #[test]
    fn of_equals_the_first_counts_and_what_is_no_number_is_largest() {
        assert_eq!(largest(&[1.0, 3.0, 2.0, 3.0]), (3.0, 1));
        let mut many = vec![0.5; 40];
        many[37] = f32::NAN;
        many[39] = f32::NAN;
        many[2] = 7.0;
        let (value, place) = largest(&many);
        assert!(value.is_nan() && place == 37);
        let mut order = [0.5, f32::NAN, 1.0, f32::NEG_INFINITY];
        order.sort_by(|a, b| falling(*a, *b));
        assert!(order[0].is_nan() && order[1..] == [1.0, 0.5, f32::NEG_INFINITY]);
        // all alike: those of the lowest number go, to the first that stays
        let sizes = Matching {
            h: 4,
            w: 4,
            merged: 2,
        };
        let got = places(Level::current(), sizes, &[1.0; 16], &[0]);
        assert_eq!(got, [10, 10, 11, 10, 0, 1, 2, 3, 12, 4, 13, 5, 6, 7, 8, 9]);
    }
}
