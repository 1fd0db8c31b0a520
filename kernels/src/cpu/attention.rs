//! Attention, `softmax(q kᵀ / √d) v` for each head, without the matrix of scores ever being stored.
//!
//! A task is up to 64 queries of a head, one a lane: scores are keys × queries, so that maxima and sums need no arithmetic across lanes,
//! and what is accumulated is the result transposed, number of a value × query. Keys and values, copied beforehand into contiguous rows
//! (values transposed), are the left operands of the two products, broadcast; queries and weights are their panels. No head width wastes
//! columns this way. The softmax is taken online over blocks of keys (Milakov & Gimelshein 2018, Dao et al. 2022).

mod exponentials;
mod fused;
mod pack;
mod softmax;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;
use rayon::prelude::*;

use super::Level;
use super::aligned::Plain;
use super::epilogue::{Stored, Target};
use super::micro::{LANES, MR, NR, Operand, Segments, Tile, evenly};
use exponentials::Step;
use fused::Keys;
use pack::Rows;
use softmax::Softmax;

/// The sizes of an attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Sequences.
    pub(crate) batch: usize,
    /// Queries of a sequence.
    pub(crate) queries: usize,
    /// Keys of a sequence.
    pub(crate) keys: usize,
    /// Heads.
    pub(crate) heads: usize,
    /// Numbers of a head's query, key or value.
    pub(crate) width: usize,
    /// Whether query `i` sees keys `0 ..= i` only.
    pub(crate) causal: bool,
    /// Sequences of keys and values: sequence `i` reads those of `i % kv_batch`.
    pub(crate) kv_batch: usize,
    /// Sequences of queries, likewise.
    pub(crate) q_batch: usize,
}

/// Vectors that may lie inside a wider buffer, such as the queries in a fused `[batch, length, 3 · channels]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a, T> {
    /// From the first number of the first vector.
    pub(crate) data: &'a [T],
    /// Numbers from one vector (all heads of a token) to the next.
    pub(crate) stride: usize,
}

/// What attention works on: f32 at every level, bf16 where its products are native.
pub(crate) trait Element: Operand + Stored + Plain {
    /// Weights of a block of scores; see [`exponentials`].
    #[doc(hidden)]
    fn exponentials(level: Level, step: &mut Step<'_>, weights: &mut [Self]) -> bool;
    /// Weights of keys for 64 queries and their sums, where scores need not be stored; see [`fused`]. `false` where this is not to be had.
    #[doc(hidden)]
    fn weigh(
        _: Level,
        _: &Keys<'_, Self>,
        _reference: &[f32; NR],
        _weights: &mut [Self],
        _sums: &mut [f32; NR],
    ) -> bool {
        false
    }
}

impl Element for f32 {
    fn exponentials(level: Level, step: &mut Step<'_>, weights: &mut [Self]) -> bool {
        exponentials::single(level, step, weights)
    }
}

impl Element for bf16 {
    fn exponentials(level: Level, step: &mut Step<'_>, weights: &mut [Self]) -> bool {
        exponentials::paired(level, step, weights)
    }

    #[cfg(target_arch = "x86_64")]
    fn weigh(
        level: Level,
        keys: &Keys<'_, Self>,
        reference: &[f32; NR],
        weights: &mut [Self],
        sums: &mut [f32; NR],
    ) -> bool {
        // products of tiles are faster than the detour by stored scores takes
        let fused = level == Level::Avx512Bf16;
        if fused {
            // SAFETY: a level is only in use where the processor has it
            unsafe { fused::weigh(keys, reference, weights, sums) };
        }
        fused
    }
}

/// The most keys whose weights are kept before they are multiplied by values: their panel stays in a core's caches.
const BLOCK: usize = 256;
/// Keys whose scores are kept, by products of vectors: 12 KiB, well inside the first-level cache.
const SCORES: usize = 8 * MR;
/// And by products of tiles, which lose less where they have more.
const MOST_SCORES: usize = 2 * SCORES;

/// Keys whose scores are kept at a level.
fn scores<T: Operand>(level: Level) -> usize {
    match T::rows(level).most {
        ..=MR => SCORES,
        _ => MOST_SCORES,
    }
}

impl Shape {
    /// Bytes of workspace that `attention` needs with that many threads.
    pub(crate) fn workspace_bytes<T: Element>(&self, threads: usize) -> usize {
        let plan = Plan::new::<T>(self);
        plan.packed_bytes::<T>() + threads * plan.scratch_bytes::<T>()
    }
}

/// `out[b, i, head] = Σ_j softmax_j(q[b, i, head] · k[b, j, head] / √width) v[b, j, head]`; `out` is `[batch, queries, heads · width]`.
///
/// With a bias there is no scale: the score of key `j` for query `i` of a head is `q · k + bias[head][keys − 1 + i − j]`, of
/// `queries + keys − 1` numbers a head.
///
/// Work goes to the threads of the current rayon pool; bits do not depend on how many they are. The workspace, of
/// [`Shape::workspace_bytes`] for [`rayon::current_num_threads`], begins at a multiple of 64 bytes. Without keys there is nothing to
/// attend to, and `out` is zeros.
///
/// # Panics
/// When sizes do not fit, or a level has no products of `T`: a planner's mistake, never a user's.
pub(crate) fn attention<T: Element>(
    level: Level,
    (shape, bias): (&Shape, Option<&[f32]>),
    (q, k, v): (View<'_, T>, View<'_, T>, View<'_, T>),
    out: &mut [T],
    workspace: &mut [u8],
) {
    let vector = shape.heads * shape.width;
    assert_eq!(
        out.len(),
        shape.batch * shape.queries * vector,
        "the result's size"
    );
    if out.is_empty() {
        return;
    }
    if shape.keys == 0 {
        out.fill(T::of(0.0));
        return;
    }
    assert!(
        T::kernel(level, MR, NR).is_some(),
        "no products of these numbers at level {}",
        level.name()
    );
    assert!(shape.kv_batch > 0 && shape.q_batch > 0);
    let fits = |x: &View<'_, T>, vectors: usize| {
        x.stride >= vector && x.data.len() >= (vectors - 1) * x.stride + vector
    };
    assert!(fits(&q, shape.q_batch * shape.queries), "queries");
    assert!(
        fits(&k, shape.kv_batch * shape.keys) && fits(&v, shape.kv_batch * shape.keys),
        "keys and values"
    );

    assert!(
        bias.is_none_or(|bias| bias.len() == shape.heads * (shape.queries + shape.keys - 1)),
        "biases"
    );
    let plan = Plan::new::<T>(shape);
    let (packed, scratch) = workspace.split_at_mut(plan.packed_bytes::<T>());
    let scratch = &mut scratch[..rayon::current_num_threads() * plan.scratch_bytes::<T>()];
    let (keys, values) = numbers::<T>(packed).split_at_mut(plan.heads * plan.key_numbers);
    plan.pack(level, (k, v), keys, values);

    let target = Target {
        out: out.as_mut_ptr(),
        columns: vector,
    };
    let job = Job {
        level,
        plan,
        q,
        bias,
        keys,
        values,
        target,
    };
    let next = AtomicUsize::new(0);
    // one chunk a thread; a thread that finds no other takes all tasks
    scratch
        .par_chunks_mut(plan.scratch_bytes::<T>())
        .for_each(|scratch| {
            let mut scratch = Scratch::new(&plan, scratch);
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= plan.tasks() {
                    return;
                }
                job.run(task, &mut scratch);
            }
        });
}

/// Memory as numbers.
fn numbers<T: Plain>(bytes: &mut [u8]) -> &mut [T] {
    // SAFETY: any bytes are numbers, and numbers are bytes
    let (before, numbers, _) = unsafe { bytes.align_to_mut::<T>() };
    assert!(
        before.is_empty() && (numbers.as_ptr() as usize).is_multiple_of(64),
        "a workspace begins at a multiple of 64 bytes"
    );
    numbers
}

/// How an attention is cut and laid out; sizes in numbers, where nothing else is said.
#[derive(Clone, Copy)]
struct Plan {
    shape: Shape,
    /// Heads of all sequences of keys.
    heads: usize,
    /// A key, padded to what products take at once.
    key: usize,
    /// Keys of a block.
    block: usize,
    /// Blocks of a sequence.
    blocks: usize,
    /// All keys of a head, and all values.
    key_numbers: usize,
    value_numbers: usize,
}

impl Plan {
    fn new<T: Operand>(shape: &Shape) -> Self {
        let blocks = shape.keys.div_ceil(BLOCK).max(1);
        // whole cache lines
        let block = shape.keys.div_ceil(blocks).next_multiple_of(2 * LANES);
        let blocks = shape.keys.div_ceil(block.max(1));
        let key = shape.width.next_multiple_of(T::K_STEP);
        Self {
            shape: *shape,
            heads: shape.kv_batch * shape.heads,
            key,
            block,
            blocks,
            key_numbers: blocks * block * key,
            value_numbers: blocks * block * shape.width,
        }
    }

    fn packed_bytes<T>(&self) -> usize {
        self.heads * (self.key_numbers + self.value_numbers) * size_of::<T>()
    }

    /// Bytes of [`Scratch`].
    fn scratch_bytes<T>(&self) -> usize {
        (MOST_SCORES + self.shape.width) * NR * size_of::<f32>()
            + (self.key + self.block) * NR * size_of::<T>()
    }

    /// Blocks of 64 queries of a sequence.
    fn query_blocks(&self) -> usize {
        self.shape.queries.div_ceil(NR)
    }

    fn tasks(&self) -> usize {
        self.shape.batch * self.shape.heads * self.query_blocks()
    }

    /// Sequence, head and queries of a task; neighbours share keys and values.
    fn task(&self, i: usize) -> (usize, usize, Range<usize>) {
        let (head, block) = (i / self.query_blocks(), i % self.query_blocks());
        let queries = block * NR..((block + 1) * NR).min(self.shape.queries);
        (head / self.shape.heads, head % self.shape.heads, queries)
    }

    /// Copies keys as `[sequence, head, key, key numbers]` and values as `[sequence, head, block, width, keys of the block]`.
    fn pack<T: Element>(
        &self,
        level: Level,
        (k, v): (View<'_, T>, View<'_, T>),
        keys: &mut [T],
        values: &mut [T],
    ) {
        let Shape {
            keys: count,
            heads,
            width,
            ..
        } = self.shape;
        let blocks = keys
            .par_chunks_mut(self.block * self.key)
            .zip(values.par_chunks_mut(self.block * width));
        blocks.enumerate().for_each(|(i, (keys, values))| {
            let (head, block) = (i / self.blocks, i % self.blocks);
            let own = block * self.block..((block + 1) * self.block).min(count);
            let [k, v] = [k, v].map(|x| Rows::of(&x, (head / heads * count, head % heads), width));
            pack::keys(k, own.clone(), self.key, keys);
            pack::values(level, v, own, (values, self.block));
        });
    }
}

/// What one thread works in.
struct Scratch<'a, T> {
    /// `[key number][lanes]`, as a panel.
    queries: &'a mut [T],
    /// `[keys of a block][lanes]`, as a panel.
    weights: &'a mut [T],
    /// `[MOST_SCORES][lanes]`.
    scores: &'a mut [f32],
    /// `[width][lanes]`: the results so far, transposed.
    results: &'a mut [f32],
}

impl<'a, T: Element> Scratch<'a, T> {
    fn new(plan: &Plan, bytes: &'a mut [u8]) -> Self {
        let (panels, sums) = bytes.split_at_mut((plan.key + plan.block) * NR * size_of::<T>());
        let (queries, weights) = numbers(panels).split_at_mut(plan.key * NR);
        let (scores, results) = numbers(sums).split_at_mut(MOST_SCORES * NR);
        Self {
            queries,
            weights,
            scores,
            results,
        }
    }
}

/// One attention, its keys and values packed.
struct Job<'a, T> {
    level: Level,
    plan: Plan,
    q: View<'a, T>,
    bias: Option<&'a [f32]>,
    keys: &'a [T],
    values: &'a [T],
    target: Target<T>,
}

impl<T: Element> Job<'_, T> {
    fn run(&self, task: usize, scratch: &mut Scratch<'_, T>) {
        let Plan {
            shape, key, block, ..
        } = self.plan;
        let (sequence, head, queries) = self.plan.task(task);
        let lanes = queries.len().next_multiple_of(LANES);
        let kv = sequence % shape.kv_batch * shape.heads + head;
        let keys = &self.keys[kv * self.plan.key_numbers..][..self.plan.key_numbers];
        let values = &self.values[kv * self.plan.value_numbers..][..self.plan.value_numbers];
        let q = Rows::of(
            &self.q,
            (sequence % shape.q_batch * shape.queries, head),
            shape.width,
        );
        pack::queries(self.level, q, queries.clone(), (scratch.queries, lanes));
        let bias = self.bias.map(|bias| {
            let each = shape.queries + shape.keys - 1;
            &bias[head * each..][..each]
        });
        let scale = match bias {
            None => 1.0 / (shape.width as f64).sqrt(),
            Some(_) => 1.0,
        };
        let mut softmax = Softmax::new(lanes, scale);
        let most = scores::<T>(self.level);
        let end = if shape.causal {
            queries.end.min(shape.keys)
        } else {
            shape.keys
        };
        for first in (0..end).step_by(block) {
            let values = &values[first * shape.width..];
            let count = (end - first).min(block);
            // keys of the block that results already hold
            let mut done = 0;
            for at in (0..count).step_by(most) {
                let n = (count - at).min(most);
                let keys = &keys[(first + at) * key..];
                let weights =
                    &mut scratch.weights[at * lanes..][..n.next_multiple_of(T::K_STEP) * lanes];
                let all_seen = !shape.causal || first + at + n <= queries.start + 1;
                if first + at > 0
                    && all_seen
                    && bias.is_none()
                    && softmax.weigh_at_once(self.level, (keys, key, n), scratch.queries, weights)
                {
                    continue;
                }
                let scores = &mut scratch.scores[..n * lanes];
                product(
                    self.level,
                    (keys, key),
                    (n, key),
                    scratch.queries,
                    (scores, lanes, false),
                );
                if let Some(bias) = bias {
                    let before = shape.keys - 1 + queries.start - (first + at);
                    add_bias(scores, (lanes, queries.len()), bias, before);
                }
                if !all_seen {
                    hide(scores, lanes, (first + at, queries.start));
                }
                if first + at > 0 && softmax.weigh(self.level, scores, weights) {
                    continue;
                }
                // the first keys, or much larger scores than all before: what was summed is brought to the new reference
                softmax.gather(
                    self.level,
                    (&values[done..], block),
                    at - done,
                    (&scratch.weights[done * lanes..], scratch.results),
                );
                done = at;
                softmax.raise(self.level, scores, scratch.results);
                let weights =
                    &mut scratch.weights[at * lanes..][..n.next_multiple_of(T::K_STEP) * lanes];
                softmax.weigh(self.level, scores, weights);
            }
            softmax.gather(
                self.level,
                (&values[done..], block),
                count - done,
                (&scratch.weights[done * lanes..], scratch.results),
            );
        }
        self.store(
            (sequence * shape.queries, head),
            queries,
            &softmax,
            scratch.results,
        );
    }

    /// Divides by the sums and stores.
    fn store(
        &self,
        place: (usize, usize),
        queries: Range<usize>,
        softmax: &Softmax,
        results: &[f32],
    ) {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
            fn avx512<T: Element>(
                job: &Job<'_, T>,
                place: (usize, usize),
                queries: Range<usize>,
                softmax: &Softmax,
                results: &[f32],
            ) {
                job.store_here(place, queries, softmax, results);
            }
            if self.level >= Level::Avx512 {
                // SAFETY: a level is only in use where the processor has it
                return unsafe { avx512(self, place, queries, softmax, results) };
            }
        }
        self.store_here(place, queries, softmax, results);
    }

    #[inline(always)]
    fn store_here(
        &self,
        (before, head): (usize, usize),
        queries: Range<usize>,
        softmax: &Softmax,
        results: &[f32],
    ) {
        let width = self.plan.shape.width;
        let factors = softmax.sums.map(|sum| 1.0 / sum);
        let results = &results[..width * softmax.lanes];
        pack::results(
            self.level,
            (results, softmax.lanes),
            &factors,
            queries.len(),
            |i, first, from| {
                let place =
                    (before + queries.start + i) * self.target.columns + head * width + first;
                let count = (width - first).min(LANES);
                // SAFETY: numbers of a head of a query, `attention` compared the size; they are this task's alone
                let out =
                    unsafe { std::slice::from_raw_parts_mut(self.target.out.add(place), count) };
                let from = from.map(T::of);
                if let Ok(out) = <&mut [T; LANES]>::try_from(&mut *out) {
                    *out = from;
                } else {
                    out.copy_from_slice(&from[..count]);
                }
            },
        );
    }
}

/// Adds the biases of `count` queries; that of the first query and key is number `before`.
fn add_bias(scores: &mut [f32], (lanes, count): (usize, usize), bias: &[f32], before: usize) {
    for (i, scores) in scores.chunks_exact_mut(lanes).enumerate() {
        for (score, bias) in scores[..count].iter_mut().zip(&bias[before - i..]) {
            *score += bias;
        }
    }
}

/// Keys that come after a query are not there for it. `scores[i]` are those of key `key + i`, lane `j` is query `query + j`.
fn hide(scores: &mut [f32], lanes: usize, (key, query): (usize, usize)) {
    for (i, scores) in scores.chunks_exact_mut(lanes).enumerate() {
        scores[..(key + i).saturating_sub(query).min(lanes)].fill(f32::NEG_INFINITY);
    }
}

/// `sums[i] = (or +=) left[i] · panel`, for `rows` rows of `k` numbers, `ld` apart; the panel has `lanes` columns, as have the sums.
fn product<T: Operand>(
    level: Level,
    (left, ld): (&[T], usize),
    (rows, k): (usize, usize),
    panel: &[T],
    (sums, lanes, add): (&mut [f32], usize, bool),
) {
    assert!(rows == 0 || left.len() >= (rows - 1) * ld + k);
    assert!(panel.len() >= k * lanes && sums.len() >= rows * lanes && k.is_multiple_of(T::K_STEP));
    let tile = Tile {
        a: std::ptr::null(),
        rows,
        segments: &Segments::one(k),
        panel: panel.as_ptr(),
        c: sums.as_mut_ptr(),
        ldc: lanes,
        add,
    };
    // SAFETY: `rows` rows of `k` numbers, a panel of `k × lanes` and `rows × lanes` sums, as asserted
    unsafe { evenly(level, (left.as_ptr(), ld), lanes, &tile) };
}
