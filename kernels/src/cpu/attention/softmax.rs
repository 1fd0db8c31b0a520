//! The softmax of a task's queries, taken online over their keys: a reference each, that weights are powers relative to, and the sum of weights.

use super::super::Level;
use super::super::micro::NR;
use super::exponentials::{self, Step};
use super::fused::Keys;
use super::{Element, product};

/// The softmax of one task's queries.
pub(super) struct Softmax {
    pub(super) lanes: usize,
    scale: f32,
    reference: [f32; NR],
    pub(super) sums: [f32; NR],
    /// Whether results hold anything yet.
    begun: bool,
}

impl Softmax {
    /// Of `lanes` queries, whose scores are yet to be scaled, before any key.
    pub(super) fn new(lanes: usize, scale: f64) -> Self {
        Self {
            lanes,
            scale: (std::f64::consts::LOG2_E * scale) as f32,
            reference: [f32::NEG_INFINITY; NR],
            sums: [0.0; NR],
            begun: false,
        }
    }

    /// Weights straight from keys; `false`, and nothing summed, where there is no such thing or a reference must be raised first.
    pub(super) fn weigh_at_once<T: Element>(
        &mut self,
        level: Level,
        (keys, len, count): (&[T], usize, usize),
        queries: &[T],
        weights: &mut [T],
    ) -> bool {
        let mut sums = [0.0; NR];
        self.lanes == NR
            && T::weigh(
                level,
                &Keys {
                    keys,
                    len,
                    count,
                    queries,
                    scale: self.scale,
                },
                &self.reference,
                weights,
                &mut sums,
            )
            && exponentials::commit(&mut self.sums, &sums)
    }

    /// Scores to weights; `false` where a reference must be raised first.
    pub(super) fn weigh<T: Element>(
        &mut self,
        level: Level,
        scores: &[f32],
        weights: &mut [T],
    ) -> bool {
        let Self {
            lanes,
            scale,
            ref reference,
            ref mut sums,
            ..
        } = *self;
        T::exponentials(
            level,
            &mut Step {
                scores,
                lanes,
                scale,
                reference,
                sums,
            },
            weights,
        )
    }

    /// Adds the values of `count` keys, times their weights, to the results.
    pub(super) fn gather<T: Element>(
        &mut self,
        level: Level,
        values: (&[T], usize),
        count: usize,
        (weights, results): (&[T], &mut [f32]),
    ) {
        if count > 0 {
            let width = results.len() / NR;
            product(
                level,
                values,
                (width, count.next_multiple_of(T::K_STEP)),
                weights,
                (results, self.lanes, self.begun),
            );
            self.begun = true;
        }
    }

    /// Raises references to the largest scores seen, and brings results and sums along.
    pub(super) fn raise(&mut self, level: Level, scores: &[f32], results: &mut [f32]) {
        let factors =
            exponentials::raise(level, scores, (self.lanes, self.scale), &mut self.reference);
        for (sum, factor) in self.sums.iter_mut().zip(&factors) {
            *sum *= factor;
        }
        if self.begun {
            for line in results.chunks_exact_mut(self.lanes) {
                for (result, factor) in line.iter_mut().zip(&factors) {
                    *result *= factor;
                }
            }
        }
    }
}
