//! Attention within windows: a row of windows of one picture a task, a head of a window at a time. What a window reads is gathered from where it
//! lies in the picture, in f32, and small enough to stay in cache; no copy of the picture in windows is made.

use rayon::prelude::*;

use super::Level;
use super::simd::{self, Number, multiversion};
use super::view::{Numbers, NumbersMut};
use crate::windows::{APART, SHORTEST, Windows};

/// Numbers that are computed side by side.
const LANES: usize = 16;
/// Queries whose products share what is read of a key.
const ROWS: usize = 4;
/// Queries whose scores are held at a time.
const BLOCK: usize = 16;

/// Attention of pictures `[batch, h · w, c]`.
pub(crate) struct WindowAttention<'a> {
    pub(crate) batch: usize,
    pub(crate) channels: usize,
    pub(crate) windows: &'a Windows,
    /// Of [`Windows::tables`].
    pub(crate) tables: &'a [f32],
}

/// What one thread gathers and computes.
struct Scratch {
    /// Places of a window's queries and keys in the picture, and the parts that they lie in.
    queries: Vec<Place>,
    keys: Vec<Place>,
    /// `[queries, width]`, rows of zeros behind them.
    q: Vec<f32>,
    /// `[width, keys]`, keys padded.
    k: Vec<f32>,
    /// `[keys, width]`, width padded.
    v: Vec<f32>,
    /// `[BLOCK, keys]`, keys padded.
    scores: Vec<f32>,
    /// `[BLOCK, width]`, width padded.
    seen: Vec<f32>,
    /// `[keys]`, padded: squares of their lengths.
    squares: Vec<f32>,
}

/// A pixel that a window reads.
#[derive(Clone, Copy, Default, PartialEq)]
struct Place {
    /// None outside of the picture.
    pixel: Option<usize>,
    /// Only those of one part see each other.
    part: (usize, usize),
}

/// The sizes of a head's work.
#[derive(Clone, Copy)]
struct Sizes {
    width: usize,
    padded_width: usize,
    keys: usize,
    padded_keys: usize,
}

impl WindowAttention<'_> {
    /// `q`, `k` and `v` may be of fewer pictures, which then repeat.
    pub(crate) fn run(&self, level: Level, inputs: [Numbers<'_>; 3], out: NumbersMut<'_>) {
        match out {
            NumbersMut::F32(out) => self.pictures(level, inputs, out),
            NumbersMut::Bf16(out) => self.pictures(level, inputs, out),
        }
    }

    fn pictures<O: Number>(&self, level: Level, inputs: [Numbers<'_>; 3], out: &mut [O]) {
        let ((h, w), side, shift) = (self.windows.size, self.windows.side, self.windows.shift());
        let down = h / side.max(1);
        let count = self.batch * down;
        let mut tasks: Vec<Vec<&mut [O]>> = (0..count).map(|_| Vec::with_capacity(side)).collect();
        let rows = out.chunks_mut((w * self.channels).max(1));
        for (row, line) in rows.enumerate().take(self.batch * h) {
            let window = (row % h + h - shift) % h / side;
            tasks[row / h * down + window].push(line);
        }
        tasks.into_par_iter().enumerate().for_each_init(
            || Scratch::new(self.windows, self.channels),
            |scratch, (task, mut lines)| {
                if task % down + 1 == down {
                    // the first rows of the picture are the last ones of these windows
                    lines.rotate_left(shift);
                }
                for column in 0..w / side {
                    scratch.place(self.windows, (task % down, column));
                    for head in 0..self.windows.heads {
                        let how = (level, task / down, head);
                        self.head(how, inputs, scratch, (&mut lines, column));
                    }
                }
            },
        );
    }

    /// One head of one window.
    fn head<O: Number>(
        &self,
        (level, picture, head): (Level, usize, usize),
        [q, k, v]: [Numbers<'_>; 3],
        scratch: &mut Scratch,
        (lines, column): (&mut [&mut [O]], usize),
    ) {
        let windows = self.windows;
        let (side, w, n) = (windows.side, windows.size.1, windows.distances());
        let sizes = Sizes::new(windows, self.channels);
        let first = picture * windows.size.0 * w;
        let at = |pixel: usize| (first + pixel) * self.channels + head * sizes.width;
        let factor = self.tables[windows.heads * n * n + head];
        scratch.gather([q, k, v], &at, sizes);
        if windows.cosine.is_some() {
            scratch.normalise(sizes);
        }
        let scaled = scratch.q.iter_mut();
        scaled.for_each(|x| *x *= factor);
        let table = &self.tables[head * n * n..][..n * n];
        for block in (0..side * side).step_by(BLOCK) {
            let count = BLOCK.min(side * side - block);
            scratch.bias(windows, table, (block, count));
            scratch.block(level, sizes, (block, count));
            let results = scratch.seen.chunks(sizes.padded_width);
            for (query, seen) in (block..block + count).zip(results) {
                let x = (column * side + query % side + windows.shift()) % w;
                let line = &mut lines[query / side][x * self.channels + head * sizes.width..];
                let pairs = line.iter_mut().zip(&seen[..sizes.width]);
                pairs.for_each(|(out, &x)| *out = O::of(x));
            }
        }
    }
}

impl Sizes {
    fn new(windows: &Windows, channels: usize) -> Self {
        let width = channels / windows.heads.max(1);
        let keys = windows.key_side() * windows.key_side();
        Self {
            width,
            padded_width: width.next_multiple_of(LANES),
            keys,
            padded_keys: keys.next_multiple_of(LANES),
        }
    }
}

impl Scratch {
    fn new(windows: &Windows, channels: usize) -> Self {
        let sizes = Sizes::new(windows, channels);
        let queries = windows.side * windows.side;
        Self {
            queries: vec![Place::default(); queries],
            keys: vec![Place::default(); sizes.keys],
            q: vec![0.0; queries.next_multiple_of(ROWS) * sizes.width],
            k: vec![0.0; sizes.width * sizes.padded_keys],
            v: vec![0.0; sizes.keys * sizes.padded_width],
            scores: vec![0.0; BLOCK * sizes.padded_keys],
            seen: vec![0.0; BLOCK * sizes.padded_width],
            squares: vec![0.0; sizes.padded_keys],
        }
    }

    /// Finds what the window in that row and column of windows reads.
    fn place(&mut self, windows: &Windows, (row, column): (usize, usize)) {
        let ((h, w), side) = (windows.size, windows.side);
        let (shift, beyond, wide) = (windows.shift(), windows.beyond(), windows.key_side());
        let (top, left) = (row * side, column * side);
        let of = |y: usize, x: usize| Place {
            pixel: Some((y + shift) % h * w + (x + shift) % w),
            part: (windows.part(y, h), windows.part(x, w)),
        };
        for (i, place) in self.queries.iter_mut().enumerate() {
            *place = of(top + i / side, left + i % side);
        }
        for (i, place) in self.keys.iter_mut().enumerate() {
            let (y, x) = (top + i / wide, left + i % wide);
            let inside = (beyond..h + beyond).contains(&y) && (beyond..w + beyond).contains(&x);
            *place = match inside {
                true => of(y - beyond, x - beyond),
                // zeros are seen by all
                false => Place {
                    pixel: None,
                    part: (0, 0),
                },
            };
        }
    }

    /// Reads one head of the window.
    fn gather(&mut self, [q, k, v]: [Numbers<'_>; 3], at: &dyn Fn(usize) -> usize, sizes: Sizes) {
        let (width, keys) = (sizes.width, sizes.padded_keys);
        for (place, row) in self.queries.iter().zip(self.q.chunks_mut(width)) {
            load(q, place.pixel.map(at), |e, x| row[e] = x, width);
        }
        for (i, place) in self.keys.iter().enumerate() {
            let column = &mut self.k;
            load(
                k,
                place.pixel.map(at),
                |e, x| column[e * keys + i] = x,
                width,
            );
        }
        let rows = self.v.chunks_mut(sizes.padded_width);
        for (place, row) in self.keys.iter().zip(rows) {
            load(v, place.pixel.map(at), |e, x| row[e] = x, width);
        }
    }

    /// Queries and keys of length one.
    fn normalise(&mut self, sizes: Sizes) {
        let factor = |squares: f32| 1.0 / squares.sqrt().max(SHORTEST);
        for row in self.q.chunks_mut(sizes.width) {
            let by = factor(row.iter().map(|x| x * x).sum());
            row.iter_mut().for_each(|x| *x *= by);
        }
        self.squares.fill(0.0);
        for line in self.k.chunks(sizes.padded_keys) {
            let pairs = self.squares.iter_mut().zip(line);
            pairs.for_each(|(sum, x)| *sum += x * x);
        }
        for line in self.k.chunks_mut(sizes.padded_keys) {
            let pairs = line.iter_mut().zip(&self.squares);
            pairs.for_each(|(x, &squares)| *x *= factor(squares));
        }
    }

    /// Puts what is added to the scores of `count` queries in their place.
    fn bias(&mut self, windows: &Windows, table: &[f32], (first, count): (usize, usize)) {
        let (side, wide, n) = (windows.side, windows.key_side(), windows.distances());
        let padded = self.scores.len() / BLOCK;
        let rows = self.scores.chunks_mut(padded);
        for (query, row) in (first..first + count).zip(rows) {
            let (y, x) = (query / side, query % side);
            for (key, line) in row.chunks_mut(wide).take(wide).enumerate() {
                let from = (key + side - 1 - y) * n + side - 1 - x;
                line.copy_from_slice(&table[from..][..wide]);
            }
            if windows.shift() > 0 {
                let part = self.queries[query].part;
                for (score, key) in row.iter_mut().zip(&self.keys) {
                    *score += if key.part == part { 0.0 } else { APART };
                }
            }
            // those that are no keys count nothing
            row[wide * wide..].fill(f32::NEG_INFINITY);
        }
    }

    /// Scores, their softmax, and the sums of values, for `count` queries from `first` on.
    fn block(&mut self, level: Level, sizes: Sizes, (first, count): (usize, usize)) {
        let rows = count.next_multiple_of(ROWS);
        let Sizes {
            width,
            padded_width,
            keys,
            padded_keys,
        } = sizes;
        let q = &self.q[first * width..][..rows * width];
        let scores = &mut self.scores[..rows * padded_keys];
        product(level, (q, width), (&self.k, padded_keys), scores);
        let seen = &mut self.seen[..rows * padded_width];
        seen.fill(0.0);
        soften(level, scores, padded_keys);
        // the columns behind the last key would meet no values
        let (weights, values) = ((&*scores, padded_keys), (&self.v[..], padded_width));
        partial(level, weights, keys, values, seen);
        for (seen, row) in seen
            .chunks_mut(padded_width)
            .zip(scores.chunks(padded_keys))
        {
            let by = 1.0 / total(row);
            seen.iter_mut().for_each(|x| *x *= by);
        }
    }
}

/// Gives `put` the numbers from a place on, or zeros.
#[inline(always)]
fn load(from: Numbers<'_>, place: Option<usize>, mut put: impl FnMut(usize, f32), width: usize) {
    match (place, from) {
        (None, _) => (0..width).for_each(|e| put(e, 0.0)),
        (Some(place), Numbers::F32(x)) => {
            let row = &x[place % x.len()..][..width];
            row.iter().enumerate().for_each(|(e, &x)| put(e, x));
        }
        (Some(place), Numbers::Bf16(x)) => {
            let row = &x[place % x.len()..][..width];
            let row = row.iter().enumerate();
            row.for_each(|(e, x)| put(e, Number::f32(*x)));
        }
    }
}

/// The sum of a row of whole lanes.
fn total(row: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    for lanes in row.chunks_exact(LANES) {
        sums.iter_mut().zip(lanes).for_each(|(sum, x)| *sum += x);
    }
    sums.iter().sum()
}

multiversion! {
    /// `out += a · b`: `a [rows, k]`, `b [k, columns]`, rows whole groups of [`ROWS`] and columns whole [`LANES`].
    fn product(a: (&[f32], usize), b: (&[f32], usize), out: &mut [f32]) {
        let k = a.1;
        multiply(a, k, b, out);
    }
}

multiversion! {
    /// The same with the first `k` columns of `a` only.
    fn partial(a: (&[f32], usize), k: usize, b: (&[f32], usize), out: &mut [f32]) {
        multiply(a, k, b, out);
    }
}

#[inline(always)]
fn multiply(
    (a, stride): (&[f32], usize),
    k: usize,
    (b, columns): (&[f32], usize),
    out: &mut [f32],
) {
    let blocks = a.chunks_exact(stride * ROWS);
    for (a, out) in blocks.zip(out.chunks_exact_mut(columns * ROWS)) {
        let (a0, rest) = a.split_at(stride);
        let (a1, rest) = rest.split_at(stride);
        let (a2, a3) = rest.split_at(stride);
        for first in (0..columns).step_by(LANES) {
            let mut sums = [[0f32; LANES]; ROWS];
            let lines = b
                .chunks_exact(columns)
                .zip(a0.iter().zip(a1).zip(a2.iter().zip(a3)));
            for (line, ((x0, x1), (x2, x3))) in lines.take(k) {
                let Some(line) = line[first..].first_chunk::<LANES>() else {
                    continue;
                };
                let mut i = 0;
                while i < LANES {
                    sums[0][i] += x0 * line[i];
                    sums[1][i] += x1 * line[i];
                    sums[2][i] += x2 * line[i];
                    sums[3][i] += x3 * line[i];
                    i += 1;
                }
            }
            for (row, sums) in out.chunks_exact_mut(columns).zip(&sums) {
                let row = row[first..].iter_mut().zip(sums);
                row.for_each(|(out, sum)| *out += sum);
            }
        }
    }
}

multiversion! {
    /// e to each number less the largest of its row; rows are whole lanes.
    fn soften(scores: &mut [f32], columns: usize) {
        for row in scores.chunks_exact_mut(columns) {
            let mut most = [f32::NEG_INFINITY; LANES];
            for lanes in row.chunks_exact(LANES) {
                let pairs = most.iter_mut().zip(lanes);
                pairs.for_each(|(most, &x)| *most = if x > *most { x } else { *most });
            }
            let most = most.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter_mut().for_each(|x| *x = simd::exp(*x - most));
        }
    }
}
