//! Attention of f32 tensors on the CPU: a block of queries of one head at a time, its scores small enough to stay in cache. Heads are
//! read and written where they lie, inside `[b, s, c]`.

use candle_core::{Device, Tensor};
use gemm::Parallelism;
use rayon::prelude::*;

use super::cpu::with_f32;
use crate::Result;

/// Elements of a block of scores (1 MiB).
const SCORES: usize = 1 << 18;

/// `q [b, s, c]`, `k, v [b, t, c]` → `[b, s, c]`; `None` when a tensor is not f32 on the CPU.
pub(super) fn attention(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    heads: usize,
    causal: bool,
) -> Result<Option<Tensor>> {
    let ((b, s, c), t) = (q.dims3()?, k.dim(1)?);
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    if s == 0 || t == 0 || c == 0 {
        return Ok(None);
    }
    let out = with_f32(&q, |q| {
        with_f32(&k, |k| {
            with_f32(&v, |v| {
                let sizes = Sizes {
                    s,
                    t,
                    c,
                    heads,
                    causal,
                };
                let mut out = vec![0f32; b * s * c];
                let rows = (SCORES / t).clamp(1, s);
                // block by block of queries: all heads of a block lie in the same rows of the result
                out.par_chunks_mut(s * c)
                    .enumerate()
                    .flat_map(|(i, out)| {
                        out.par_chunks_mut(rows * c)
                            .enumerate()
                            .map(move |(j, out)| (i, j, out))
                    })
                    .for_each(|(i, j, out)| {
                        let (k, v) = (
                            &k[i * t * c..(i + 1) * t * c],
                            &v[i * t * c..(i + 1) * t * c],
                        );
                        let first = j * rows;
                        let q = &q[(i * s + first) * c..][..out.len()];
                        sizes.block(q, (k, v), first, out);
                    });
                out
            })
        })
    });
    out.flatten()
        .flatten()
        .map(|out| Ok(Tensor::from_vec(out, (b, s, c), &Device::Cpu)?))
        .transpose()
}

#[derive(Clone, Copy)]
struct Sizes {
    s: usize,
    t: usize,
    c: usize,
    heads: usize,
    causal: bool,
}

impl Sizes {
    /// All heads of the queries `q [rows, c]`, the first of which is query `first`, into `out [rows, c]`.
    fn block(self, q: &[f32], (k, v): (&[f32], &[f32]), first: usize, out: &mut [f32]) {
        let Self { t, c, heads, .. } = self;
        let (rows, d) = (q.len() / c, c / heads);
        let scale = 1.0 / (d as f32).sqrt();
        let mut scores = vec![0f32; rows * t];
        assert!(
            q.len() == rows * c
                && out.len() == rows * c
                && k.len() == t * c
                && v.len() == t * c
                && d * heads == c
        );
        for head in 0..heads {
            let offset = head * d;
            // SAFETY: reads columns `offset .. offset + d ≤ c` of `rows` rows of q and `t` rows of k, both `c` wide, and writes all of
            // `scores [rows, t]`; the assertion above gives the lengths.
            unsafe {
                gemm::gemm(
                    rows,
                    t,
                    d,
                    scores.as_mut_ptr(),
                    1,
                    t as isize,
                    false,
                    q.as_ptr().add(offset),
                    1,
                    c as isize,
                    k.as_ptr().add(offset),
                    c as isize,
                    1,
                    0f32,
                    scale,
                    false,
                    false,
                    false,
                    Parallelism::None,
                );
            }
            for (row, scores) in scores.chunks_mut(t).enumerate() {
                let seen = if self.causal {
                    (first + row + 1).min(t)
                } else {
                    t
                };
                softmax(scores, seen);
            }
            // SAFETY: reads `scores [rows, t]` and columns `offset .. offset + d` of `t` rows of v, and writes the same columns of `rows`
            // rows of `out`; lengths as above.
            unsafe {
                gemm::gemm(
                    rows,
                    d,
                    t,
                    out.as_mut_ptr().add(offset),
                    1,
                    c as isize,
                    false,
                    scores.as_ptr(),
                    1,
                    t as isize,
                    v.as_ptr().add(offset),
                    1,
                    c as isize,
                    0f32,
                    1f32,
                    false,
                    false,
                    false,
                    Parallelism::None,
                );
            }
        }
        debug_assert!(first + rows <= self.s);
    }
}

/// Softmax of the first `seen` scores; the rest become zero.
fn softmax(scores: &mut [f32], seen: usize) {
    let (scores, hidden) = scores.split_at_mut(seen);
    hidden.fill(0.0);
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0f32;
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += *score;
    }
    let scale = 1.0 / sum;
    scores.iter_mut().for_each(|score| *score *= scale);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The definition, in f64.
    fn reference(
        q: &[f32],
        k: &[f32],
        v: &[f32],
        (b, s, t, c, heads): (usize, usize, usize, usize, usize),
        causal: bool,
    ) -> Vec<f64> {
        let d = c / heads;
        let mut out = vec![0f64; b * s * c];
        for (bi, h, i) in
            (0..b).flat_map(|bi| (0..heads).flat_map(move |h| (0..s).map(move |i| (bi, h, i))))
        {
            let seen = if causal { (i + 1).min(t) } else { t };
            let at = |x: &[f32], n: usize, row: usize, e: usize| {
                f64::from(x[(bi * n + row) * c + h * d + e])
            };
            let scores: Vec<f64> = (0..seen)
                .map(|j| {
                    (0..d).map(|e| at(q, s, i, e) * at(k, t, j, e)).sum::<f64>() / (d as f64).sqrt()
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|x| (x - max).exp()).sum();
            for e in 0..d {
                let value = scores
                    .iter()
                    .enumerate()
                    .map(|(j, x)| (x - max).exp() / sum * at(v, t, j, e))
                    .sum();
                out[(bi * s + i) * c + h * d + e] = value;
            }
        }
        out
    }

    #[test]
    fn equals_the_definition_at_odd_shapes() {
        for (b, s, t, c, heads) in [
            (1, 1, 1, 1, 1),
            (2, 7, 77, 24, 3),
            (3, 13, 5, 40, 1),
            (1, 300, 1000, 10, 2),
        ] {
            for causal in [false, true] {
                // the same numbers on every run, about as wide as a unit normal times three
                let numbers = |n: usize, seed: u64| {
                    let mut state = seed;
                    let values = (0..b * n * c).map(|_| {
                        state = state
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1_442_695_040_888_963_407);
                        ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 10.0
                    });
                    Tensor::from_vec(values.collect::<Vec<f32>>(), (b, n, c), &Device::Cpu).unwrap()
                };
                let (q, k, v) = (numbers(s, 1), numbers(t, 2), numbers(t, 3));
                let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let got = attention((&q, &k, &v), heads, causal).unwrap().unwrap();
                let want = reference(&flat(&q), &flat(&k), &flat(&v), (b, s, t, c, heads), causal);
                for (got, want) in flat(&got).iter().zip(want) {
                    assert!(
                        // scores of up to 40 carry 2e-6 of rounding each before the exponential
                        (f64::from(*got) - want).abs() < 2e-5 * want.abs().max(1.0),
                        "{b} {s} {t} {c} {heads} {causal}: {got} {want}"
                    );
                }
            }
        }
    }
}
