//! Scores to weights: 2^(scale · (score − reference)), their sums, and references that rarely move.
//!
//! Scores come transposed, `[keys][lanes]`, one query a lane, so that nothing is summed across lanes. A softmax is the same whatever its
//! reference; only overflow forbids most. The maximum of a query's first keys therefore stays its reference until a weight sum passes
//! [`LIMIT`], which shows in the sums themselves: no pass looks for maxima, and what was accumulated is hardly ever rescaled.

use half::bf16;

use super::super::Level;
use super::super::epilogue::Stored;
use super::super::micro::{LANES, NR};

/// A sum of weights of one block of keys above which the reference is raised. Far from overflow: values of 10¹⁰ still may be summed.
const LIMIT: f32 = (1u64 << 40) as f32;

/// One block of keys on its way through the softmax.
pub(crate) struct Step<'a> {
    /// `[keys][lanes]`.
    pub(super) scores: &'a [f32],
    /// Queries side by side; a multiple of 16, at most 64.
    pub(super) lanes: usize,
    /// log₂ e / √d.
    pub(super) scale: f32,
    /// What is subtracted from each query's scores: exactly, where they are close.
    pub(super) reference: &'a [f32; NR],
    /// Each query's sum of weights so far.
    pub(super) sums: &'a mut [f32; NR],
}

/// Adds a block's sums, unless one asks for a higher reference.
#[inline(always)]
pub(super) fn commit(sums: &mut [f32; NR], block: &[f32; NR]) -> bool {
    // what is not a number passes, and stays so
    if block.iter().any(|&sum| sum > LIMIT) {
        return false;
    }
    for (sum, block) in sums.iter_mut().zip(block) {
        *sum += block;
    }
    true
}

/// Raises the references to the largest scores of a block, `scores[keys][lanes]`; returns what earlier sums are to be multiplied by.
pub(super) fn raise(
    level: Level,
    scores: &[f32],
    (lanes, scale): (usize, f32),
    reference: &mut [f32; NR],
) -> [f32; NR] {
    let old = *reference;
    largest(level, scores, lanes, reference);
    std::array::from_fn(|i| match reference[i] - old[i] {
        // there were no sums before
        f32::INFINITY => 0.0,
        by if by > 0.0 => (-scale * by).exp2(),
        _ => 1.0,
    })
}

super::super::simd::multiversion! {
    fn largest(scores: &[f32], lanes: usize, to: &mut [f32; NR]) {
        for scores in scores.chunks_exact(lanes) {
            for (to, score) in to.iter_mut().zip(scores) {
                // what is not a number is passed over
                *to = if *score > *to { *score } else { *to };
            }
        }
    }
}

/// Weights in f32, `[keys][lanes]`; `false`, and nothing summed, where a reference must be raised first.
pub(super) fn single(level: Level, step: &mut Step<'_>, weights: &mut [f32]) -> bool {
    assert!(step.scores.len() == weights.len() && weights.len().is_multiple_of(step.lanes));
    assert!(step.lanes.is_multiple_of(LANES) && step.lanes <= NR);
    let mut block = [0f32; NR];
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a level is only in use where the processor has it; sizes as asserted
        Level::Avx512 | Level::Avx512Bf16 | Level::Amx => unsafe {
            x86::single(step, weights, &mut block)
        },
        _ => plain(
            level,
            step.scores,
            (step.lanes, step.scale, step.reference),
            weights,
            &mut block,
        ),
    }
    commit(step.sums, &block)
}

/// Weights in bf16, `[keys / 2][lanes][2]`; of an odd number of keys the last is paired with zeros.
pub(super) fn paired(level: Level, step: &mut Step<'_>, weights: &mut [bf16]) -> bool {
    assert!(step.scores.len().is_multiple_of(step.lanes));
    assert!(step.scores.len().next_multiple_of(2 * step.lanes) == weights.len());
    assert!(step.lanes.is_multiple_of(LANES) && step.lanes <= NR);
    let mut block = [0f32; NR];
    #[cfg(target_arch = "x86_64")]
    if level.has_bf16() {
        // SAFETY: a level is only in use where the processor has it; sizes as asserted
        unsafe { x86::paired(step, weights, &mut block) };
        return commit(step.sums, &block);
    }
    let mut line = [[0f32; NR]; 2];
    for (scores, weights) in step
        .scores
        .chunks(2 * step.lanes)
        .zip(weights.chunks_exact_mut(2 * step.lanes))
    {
        line[1].fill(0.0);
        for (scores, line) in scores.chunks_exact(step.lanes).zip(&mut line) {
            plain(
                level,
                scores,
                (step.lanes, step.scale, step.reference),
                &mut line[..step.lanes],
                &mut block,
            );
        }
        for (i, pair) in weights.chunks_exact_mut(2).enumerate() {
            pair.copy_from_slice(&[bf16::of(line[0][i]), bf16::of(line[1][i])]);
        }
    }
    commit(step.sums, &block)
}

super::super::simd::multiversion! {
    fn plain(scores: &[f32], query: (usize, f32, &[f32; NR]), weights: &mut [f32], sums: &mut [f32; NR]) {
        let (lanes, scale, reference) = query;
        for (scores, weights) in scores.chunks_exact(lanes).zip(weights.chunks_exact_mut(lanes)) {
            for (((score, weight), reference), sum) in scores.iter().zip(weights).zip(reference).zip(sums.iter_mut()) {
                *weight = exp2((score - reference) * scale);
                *sum += *weight;
            }
        }
    }
}

/// 2ˣ within 2 units in the last place for −126 ≤ x < 128; 0 below, +∞ above.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    // adding 1.5·2²³ rounds to the nearest whole number without a branch
    const ROUND: f32 = 12_582_912.0;
    let near = x.clamp(-126.0, 127.0);
    let shifted = near + ROUND;
    let f = near - (shifted - ROUND);
    // Taylor's series of e^(f ln 2), |f| ≤ ½
    let p = f * 1.540_353e-4 + 1.333_355_8e-3;
    let p = f * p + 9.618_129e-3;
    let p = f * p + 5.550_411e-2;
    let p = f * p + 2.402_265e-1;
    let p = f * p + std::f32::consts::LN_2;
    let p = f * p + 1.0;
    // the low bits of `shifted` are the whole number
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    let inside = if x < -126.0 { 0.0 } else { p * power };
    if x > 127.5 { f32::INFINITY } else { inside }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::{LANES, NR, Step};

    /// 2ˣ = 2^⌊x⌋ · 2ᶠ, 0 ≤ f < 1, by the polynomial of least relative error: of degree 3, 7.5·10⁻⁵, a twentieth of half a unit of bf16; of
    /// degree 5, 7.5·10⁻⁸. Any x is right: 0 from −150, +∞ from 128.
    #[target_feature(enable = "avx512f,avx512dq")]
    #[inline]
    pub(in super::super) fn exp2<const PRECISE: bool>(x: __m512) -> __m512 {
        // the part above the next whole number below
        let f = _mm512_reduce_ps::<0b1001>(x);
        let mut p;
        let coefficients: &[f32] = if PRECISE {
            p = _mm512_set1_ps(0.001_877_576_6);
            &[
                0.008_989_34,
                0.055_826_317,
                0.240_153_62,
                0.693_153_1,
                0.999_999_93,
            ]
        } else {
            p = _mm512_set1_ps(0.078_024_52);
            &[0.226_067_18, 0.695_833_5, 0.999_925_2]
        };
        for &c in coefficients {
            p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
        }
        _mm512_scalef_ps(p, x)
    }

    /// Numbers of `low` and `high` in turns, rounded to bf16.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    #[inline]
    pub(in super::super) fn pair(low: __m512, high: __m512) -> __m512i {
        const ORDER: [u16; 32] = {
            let mut order = [0; 32];
            let mut i = 0;
            while i < 32 {
                order[i] = (i / 2 + i % 2 * 16) as u16;
                i += 1;
            }
            order
        };
        // SAFETY: 64 bytes; vectors have no invalid values
        let (order, both) = unsafe {
            (
                _mm512_loadu_si512(ORDER.as_ptr().cast()),
                std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)),
            )
        };
        _mm512_permutexvar_epi16(order, both)
    }

    /// # Safety
    /// `step.scores` and `weights` are equally long, a multiple of `step.lanes`, itself a multiple of 16 and at most 64.
    #[target_feature(enable = "avx512f,avx512dq")]
    pub(super) unsafe fn single(step: &Step<'_>, weights: &mut [f32], sums: &mut [f32; NR]) {
        let scale = _mm512_set1_ps(step.scale);
        for lane in (0..step.lanes).step_by(LANES) {
            // SAFETY: 16 lanes of each key, of references and sums lie inside, as the caller promises
            unsafe {
                let reference = _mm512_loadu_ps(step.reference.as_ptr().add(lane));
                let mut sum = _mm512_setzero_ps();
                for at in (lane..step.scores.len()).step_by(step.lanes) {
                    let score = _mm512_loadu_ps(step.scores.as_ptr().add(at));
                    let weight =
                        exp2::<true>(_mm512_mul_ps(_mm512_sub_ps(score, reference), scale));
                    sum = _mm512_add_ps(sum, weight);
                    _mm512_storeu_ps(weights.as_mut_ptr().add(at), weight);
                }
                _mm512_storeu_ps(sums.as_mut_ptr().add(lane), sum);
            }
        }
    }

    /// # Safety
    /// `step.lanes` is a multiple of 16 and at most 64, the length of `step.scores` a multiple of it, that of `weights` the next multiple
    /// of two lines.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    pub(super) unsafe fn paired(step: &Step<'_>, weights: &mut [bf16], sums: &mut [f32; NR]) {
        let scale = _mm512_set1_ps(step.scale);
        for lane in (0..step.lanes).step_by(LANES) {
            // SAFETY: 16 lanes of each key, of references and sums lie inside, as the caller promises; vectors have no invalid values
            unsafe {
                let reference = _mm512_loadu_ps(step.reference.as_ptr().add(lane));
                let mut sum = _mm512_setzero_ps();
                let mut out = weights.as_mut_ptr().add(2 * lane);
                for at in (lane..step.scores.len()).step_by(2 * step.lanes) {
                    let score = step.scores.as_ptr().add(at);
                    let low = exp2::<false>(_mm512_mul_ps(
                        _mm512_sub_ps(_mm512_loadu_ps(score), reference),
                        scale,
                    ));
                    let mut high = _mm512_setzero_ps();
                    if at + step.lanes < step.scores.len() {
                        let score = _mm512_loadu_ps(score.add(step.lanes));
                        high = exp2::<false>(_mm512_mul_ps(_mm512_sub_ps(score, reference), scale));
                    }
                    sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
                    _mm512_storeu_si512(out.cast(), pair(low, high));
                    out = out.wrapping_add(2 * step.lanes);
                }
                _mm512_storeu_ps(sums.as_mut_ptr().add(lane), sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_powers_of_two_at_every_level() {
        for level in Level::supported() {
            for (keys, lanes) in [(1, 16), (7, 64), (6, 48)] {
                let scores: Vec<f32> = (0..keys * lanes)
                    .map(|i| (i * 37 % 301) as f32 * -0.37)
                    .collect();
                let reference: [f32; NR] = std::array::from_fn(|i| i as f32 * -0.01);
                let scale = 1.25;
                let want = |i: usize| {
                    (f64::from(scale) * (f64::from(scores[i]) - f64::from(reference[i % lanes])))
                        .exp2()
                };
                let mut sums = [1f32; NR];
                let mut weights = vec![f32::NAN; keys * lanes];
                let mut step = Step {
                    scores: &scores,
                    lanes,
                    scale,
                    reference: &reference,
                    sums: &mut sums,
                };
                assert!(single(level, &mut step, &mut weights));
                for (i, &weight) in weights.iter().enumerate() {
                    // the argument itself is rounded to 2⁻¹⁷ at the far end
                    assert!(
                        (f64::from(weight) / want(i) - 1.0).abs() < 1e-5 || want(i) < 1e-37,
                        "{i}: {weight} {}",
                        want(i)
                    );
                }
                for (lane, &sum) in sums.iter().enumerate().take(lanes) {
                    let want = 1.0 + (0..keys).map(|key| want(key * lanes + lane)).sum::<f64>();
                    assert!((f64::from(sum) / want - 1.0).abs() < 1e-6);
                }
                let mut pairs = vec![bf16::NAN; keys.next_multiple_of(2) * lanes];
                let mut step = Step {
                    scores: &scores,
                    lanes,
                    scale,
                    reference: &reference,
                    sums: &mut sums,
                };
                assert!(paired(level, &mut step, &mut pairs));
                for (i, &weight) in pairs.iter().enumerate() {
                    let (key, lane) = (i / (2 * lanes) * 2 + i % 2, i / 2 % lanes);
                    let want = if key < keys {
                        want(key * lanes + lane)
                    } else {
                        0.0
                    };
                    assert!(
                        (weight.to_f64() - want).abs() <= want * 0.0042 + 1e-37,
                        "{i}: {weight} {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn far_scores_vanish_or_raise_the_reference() {
        let near = |x: f32, want: f32| (x - want).abs() < 3e-7;
        for level in Level::supported() {
            let mut scores = [0f32; 32];
            (scores[3], scores[4]) = (f32::NEG_INFINITY, -1e30);
            let mut reference = [0f32; NR];
            let mut sums = [0f32; NR];
            let mut weights = [f32::NAN; 32];
            let mut step = Step {
                scores: &scores,
                lanes: 16,
                scale: 1.0,
                reference: &reference,
                sums: &mut sums,
            };
            assert!(single(level, &mut step, &mut weights));
            assert!(
                weights[3] == 0.0 && weights[4] == 0.0 && near(sums[3], 1.0) && near(sums[5], 2.0),
                "{}",
                level.name()
            );
            for large in [50.0, 1e4, 1e30] {
                scores[20] = large;
                let mut step = Step {
                    scores: &scores,
                    lanes: 16,
                    scale: 1.0,
                    reference: &reference,
                    sums: &mut sums,
                };
                assert!(!single(level, &mut step, &mut weights));
                assert!(near(sums[5], 2.0) && near(sums[4], 1.0), "summed twice");
                let factors = raise(level, &scores, (16, 1.0), &mut reference.clone());
                assert!(factors[3] == 1.0 && factors[4] == (-large).exp2());
            }
            raise(level, &scores, (16, 1.0), &mut reference);
            let mut step = Step {
                scores: &scores,
                lanes: 16,
                scale: 1.0,
                reference: &reference,
                sums: &mut sums,
            };
            assert!(single(level, &mut step, &mut weights) && near(weights[20], 1.0));
        }
    }
}
