//! Scores and their exponentials in one go: a tile of scores becomes weights while it is still in registers.
//!
//! There is no pass over scores in memory, whose stores cost as much as a tenth of the products at 40 numbers a head. Where a reference must
//! be raised, the scores are computed once more, and kept.

#[cfg(target_arch = "x86_64")]
use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::super::micro::NR;

/// Keys on their way to weights.
pub(crate) struct Keys<'a, T> {
    /// Keys one after the other, `len` numbers each; one more than counted where that is odd, no matter which.
    pub(super) keys: &'a [T],
    /// Numbers of a key; a multiple of [`super::Operand::K_STEP`].
    pub(super) len: usize,
    /// How many keys there are.
    pub(super) count: usize,
    /// Queries as a panel of 64 columns.
    pub(super) queries: &'a [T],
    /// log₂ e / √d.
    pub(super) scale: f32,
}

/// Weights of `keys` for 64 queries, `[count / 2][64][2]`, as of [`super::exponentials::paired`], and their sums, which are set.
///
/// # Safety
/// The processor has AVX-512 with BF16.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn weigh(
    keys: &Keys<'_, bf16>,
    reference: &[f32; NR],
    weights: &mut [bf16],
    sums: &mut [f32; NR],
) {
    const ROWS: usize = 6;
    let padded = keys.count.next_multiple_of(2);
    assert!(keys.keys.len() >= padded * keys.len && keys.len.is_multiple_of(2));
    assert!(keys.queries.len() >= keys.len * NR && weights.len() == padded * NR);
    sums.fill(0.0);
    for first in (0..padded).step_by(ROWS) {
        let (rows, weights) = (&keys.keys[first * keys.len..], &mut weights[first * NR..]);
        let odd = keys.count < first + ROWS && keys.count % 2 == 1;
        // SAFETY: as asserted there are `padded` keys, as many lines of weights and `len` lines of queries; the caller vouches for the rest
        unsafe {
            match padded - first {
                2 => x86::tile::<1>(keys, rows, (reference, odd), weights, sums),
                4 => x86::tile::<2>(keys, rows, (reference, odd), weights, sums),
                _ => x86::tile::<3>(keys, rows, (reference, odd), weights, sums),
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::super::super::micro::{LANES, NR};
    use super::super::exponentials::x86::{exp2, pair};
    use super::Keys;

    const VECTORS: usize = NR / LANES;

    /// `2 · PAIRS` keys; the last is left out where it is `odd`.
    ///
    /// # Safety
    /// `rows` holds that many keys, `weights` as many lines of 64, `keys.queries` `keys.len` lines of 64.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    pub(super) unsafe fn tile<const PAIRS: usize>(
        keys: &Keys<'_, bf16>,
        rows: &[bf16],
        (reference, odd): (&[f32; NR], bool),
        weights: &mut [bf16],
        sums: &mut [f32; NR],
    ) {
        let mut scores = [[[_mm512_setzero_ps(); VECTORS]; 2]; PAIRS];
        let mut queries = keys.queries.as_ptr().cast::<__m512i>();
        let row = |i: usize| rows.as_ptr().wrapping_add(i * keys.len).cast::<i32>();
        let rows: [[*const i32; 2]; PAIRS] = std::array::from_fn(|p| [row(2 * p), row(2 * p + 1)]);
        for k in 0..keys.len / 2 {
            // SAFETY: line `k` of pairs of the queries, 256 bytes
            let lines: [__m512bh; VECTORS] = std::array::from_fn(|v| unsafe {
                std::mem::transmute(_mm512_loadu_si512(queries.add(v)))
            });
            queries = queries.wrapping_add(VECTORS);
            for (rows, scores) in rows.iter().zip(&mut scores) {
                for (row, scores) in rows.iter().zip(scores) {
                    // SAFETY: pair `k` of a key
                    let x: __m512bh = unsafe {
                        std::mem::transmute(_mm512_set1_epi32(row.add(k).read_unaligned()))
                    };
                    for (score, line) in scores.iter_mut().zip(&lines) {
                        *score = _mm512_dpbf16_ps(*score, x, *line);
                    }
                }
            }
        }
        let scale = _mm512_set1_ps(keys.scale);
        for v in 0..VECTORS {
            // SAFETY: 16 of 64 lanes, in each of the `PAIRS` double lines of weights
            unsafe {
                let reference = _mm512_loadu_ps(reference.as_ptr().add(v * LANES));
                let mut sum = _mm512_loadu_ps(sums.as_ptr().add(v * LANES));
                for (p, scores) in scores.iter().enumerate() {
                    let [low, mut high] = [0, 1].map(|i| {
                        exp2::<false>(_mm512_mul_ps(_mm512_sub_ps(scores[i][v], reference), scale))
                    });
                    if odd && p == PAIRS - 1 {
                        high = _mm512_setzero_ps();
                    }
                    sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
                    _mm512_storeu_si512(
                        weights.as_mut_ptr().add((p * NR + v * LANES) * 2).cast(),
                        pair(low, high),
                    );
                }
                _mm512_storeu_ps(sums.as_mut_ptr().add(v * LANES), sum);
            }
        }
    }
}
