//! The norms of diffusion transformers: without weights and modulated by a vector a sequence, or by the root mean square of each head; and the
//! turning of pairs that follows the latter. One pass over the data each.

use rayon::prelude::*;

use super::{CHUNK, lanes};
use crate::cpu::Level;
use crate::cpu::simd::{Number, multiversion};
use crate::cpu::view::{Numbers, NumbersMut};

/// `(x − mean) / √(variance + eps) · (1 + scale) + shift` for rows of `channels`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdaptiveNorm<'a> {
    /// Numbers of a row.
    pub(crate) channels: usize,
    /// Rows of a sequence.
    pub(crate) rows: usize,
    /// `[sequences, n · channels]`; sequence `i` reads entry `i` modulo their number.
    pub(crate) values: &'a [f32],
    /// `n`, the place of the shift and that of the scale.
    pub(crate) place: (usize, usize, usize),
    /// Added to the variance.
    pub(crate) eps: f64,
}

/// Calls `$f` with the slices behind numbers to read and numbers to write.
macro_rules! by_types {
    ($x:expr, $out:expr, |$a:ident, $b:ident| $f:expr) => {
        match ($x, $out) {
            (Numbers::F32($a), NumbersMut::F32($b)) => $f,
            (Numbers::F32($a), NumbersMut::Bf16($b)) => $f,
            (Numbers::Bf16($a), NumbersMut::F32($b)) => $f,
            (Numbers::Bf16($a), NumbersMut::Bf16($b)) => $f,
        }
    };
}

/// Rows of `out`, some at a time, with those of `x`, which repeats where it is shorter: `f(first row, x, out)`.
fn by_rows<I: Number, O: Number>(
    (x, out): (&[I], &mut [O]),
    channels: usize,
    f: impl Fn(usize, &[I], &mut [O]) + Sync,
) {
    assert!(channels > 0 && x.len().is_multiple_of(channels) && !x.is_empty());
    assert!(out.len().is_multiple_of(x.len()));
    let rows = (CHUNK / channels).max(1);
    let whole = x.len() / channels;
    out.par_chunks_mut(x.len())
        .enumerate()
        .for_each(|(i, out)| {
            out.par_chunks_mut(rows * channels)
                .zip(x.par_chunks(rows * channels))
                .enumerate()
                .for_each(|(j, (out, x))| f(i * whole + j * rows, x, out));
        });
}

impl AdaptiveNorm<'_> {
    /// Normalises `x` into `out`.
    ///
    /// # Panics
    /// When sizes do not fit: a planner's mistake, never a user's.
    pub(crate) fn run(&self, level: Level, x: Numbers<'_>, out: NumbersMut<'_>) {
        let (entry, shift, scale) = self.place;
        let wide = entry * self.channels;
        assert!(shift.max(scale) < entry && self.rows > 0);
        assert!(!self.values.is_empty() && self.values.len().is_multiple_of(wide.max(1)));
        by_types!(x, out, |x, out| by_rows(
            (x, out),
            self.channels,
            |row, x, out| {
                let lines = x.chunks(self.channels).zip(out.chunks_mut(self.channels));
                for (i, (x, out)) in lines.enumerate() {
                    let sequence = (row + i) / self.rows % (self.values.len() / wide);
                    let values = &self.values[sequence * wide..][..wide];
                    let of = |slot: usize| &values[slot * self.channels..][..self.channels];
                    adaptive_row(level, x, of(shift), of(scale), self.eps, out);
                }
            }
        ));
    }
}

multiversion! {
    fn adaptive_row<I: Number, O: Number>(x: &[I], shift: &[f32], scale: &[f32], eps: f64, out: &mut [O]) {
        let c = x.len();
        let origin = x[0].f32();
        let mean = origin + (lanes(x, |v| v - origin) / c as f64) as f32;
        let squares = lanes(x, |v| (v - mean) * (v - mean));
        let norm = (1.0 / (squares / c as f64 + eps).sqrt()) as f32;
        for (((x, out), shift), scale) in x.iter().zip(out).zip(shift).zip(scale) {
            *out = O::of((x.f32() - mean) * norm * (1.0 + scale) + shift);
        }
    }
}

/// `x / √(mean x² + eps) · weight` for each run of as many numbers as the weight has (Zhang & Sennrich, "Root Mean Square Layer
/// Normalization", arXiv 1910.07467).
pub(crate) fn rms_norm(
    level: Level,
    x: Numbers<'_>,
    (weight, eps): (&[f32], f64),
    out: NumbersMut<'_>,
) {
    by_types!(x, out, |x, out| by_rows(
        (x, out),
        weight.len(),
        |_, x, out| rms_rows(level, x, weight, eps, out)
    ));
}

multiversion! {
    fn rms_rows<I: Number, O: Number>(x: &[I], weight: &[f32], eps: f64, out: &mut [O]) {
        let c = weight.len();
        for (x, out) in x.chunks_exact(c).zip(out.chunks_exact_mut(c)) {
            let squares = lanes(x, |v| v * v);
            let norm = (1.0 / (squares / c as f64 + eps).sqrt()) as f32;
            for ((x, out), weight) in x.iter().zip(out).zip(weight) {
                *out = O::of(x.f32() * norm * weight);
            }
        }
    }
}

/// Turns pairs of neighbours in each head of `x [.., tokens, heads · width]` by `turns [tokens, width / 2]`, cosines and sines.
pub(crate) fn rotate(
    level: Level,
    x: Numbers<'_>,
    (turns, heads, channels): (&[[f32; 2]], usize, usize),
    out: NumbersMut<'_>,
) {
    let half = channels / heads.max(1) / 2;
    assert!(half > 0 && turns.len().is_multiple_of(half) && !turns.is_empty());
    by_types!(x, out, |x, out| by_rows(
        (x, out),
        channels,
        |row, x, out| {
            let lines = x.chunks(channels).zip(out.chunks_mut(channels));
            for (i, (x, out)) in lines.enumerate() {
                let token = (row + i) % (turns.len() / half);
                rotate_row(level, x, &turns[token * half..][..half], out);
            }
        }
    ));
}

multiversion! {
    fn rotate_row<I: Number, O: Number>(x: &[I], turns: &[[f32; 2]], out: &mut [O]) {
        let width = 2 * turns.len();
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            for ((x, out), [cos, sin]) in x.chunks_exact(2).zip(out.chunks_exact_mut(2)).zip(turns) {
                let (a, b) = (x[0].f32(), x[1].f32());
                out[0] = O::of(a * cos - b * sin);
                out[1] = O::of(b * cos + a * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(99);
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn close(got: &[f32], want: impl Fn(usize) -> f64, what: &str) {
        for (i, got) in got.iter().enumerate() {
            let want = want(i);
            assert!(
                (f64::from(*got) - want).abs() < 3e-6,
                "{what} {i}: {got} {want}"
            );
        }
    }

    #[test]
    fn norms_and_turns_equal_their_definitions() {
        for level in Level::supported() {
            // two sequences of 5 rows of 2 heads; x holds one sequence, which both read
            let (rows, heads, width) = (5, 2, 22);
            let c = heads * width;
            let x = numbers(rows * c, 1);
            let values = numbers(2 * 3 * c, 2);
            let mut out = vec![0f32; 2 * rows * c];
            let norm = AdaptiveNorm {
                channels: c,
                rows,
                values: &values,
                place: (3, 2, 1),
                eps: 1e-6,
            };
            norm.run(level, Numbers::F32(&x), NumbersMut::F32(&mut out));
            let row = |i: usize| x[i / c % rows * c..][..c].iter().map(|&v| f64::from(v));
            let at = |i: usize| f64::from(x[i % x.len()]);
            let adaptive = |i: usize| {
                let mean = row(i).sum::<f64>() / c as f64;
                let variance = row(i).map(|v| (v - mean).powi(2)).sum::<f64>() / c as f64;
                let slot = |s: usize| f64::from(values[(i / x.len() * 3 + s) * c + i % c]);
                (at(i) - mean) / (variance + 1e-6).sqrt() * (1.0 + slot(1)) + slot(2)
            };
            close(&out, adaptive, level.name());

            let weight = numbers(width, 3);
            rms_norm(
                level,
                Numbers::F32(&x),
                (&weight, 1e-6),
                NumbersMut::F32(&mut out),
            );
            let rms = |i: usize| {
                let head = &x[i % x.len() / width * width..][..width];
                let mean = head.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / width as f64;
                at(i) / (mean + 1e-6).sqrt() * f64::from(weight[i % width])
            };
            close(&out, rms, level.name());

            let half = width / 2;
            let turns: Vec<[f32; 2]> = numbers(rows * half, 4)
                .iter()
                .map(|a| [a.cos(), a.sin()])
                .collect();
            rotate(
                level,
                Numbers::F32(&x),
                (&turns, heads, c),
                NumbersMut::F32(&mut out),
            );
            let turned = |i: usize| {
                let [cos, sin] = turns[i / c % rows * half + i % width / 2].map(f64::from);
                if i.is_multiple_of(2) {
                    at(i) * cos - at(i + 1) * sin
                } else {
                    at(i) * cos + at(i - 1) * sin
                }
            };
            close(&out, turned, level.name());
        }
    }
}
