//! Group and layer norms over channels-last values, with the activation behind them, in as few passes as can be.

use rayon::prelude::*;

use super::Level;
use super::simd::{self, Number, multiversion};
use super::view::{Numbers, NumbersMut};
use crate::{Activation, Window};

/// One of the values that stand side by side along the channels: `[pictures, pixels, channels]`; picture `i` of the result reads entry
/// `i % pictures`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Side<'a> {
    /// The numbers.
    pub(crate) data: Numbers<'a>,
    /// Numbers of a pixel.
    pub(crate) channels: usize,
    /// Pictures.
    pub(crate) pictures: usize,
}

/// A group norm: Wu & He, "Group Normalization", arXiv 1803.08494.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupNorm<'a> {
    /// Pictures of the result.
    pub(crate) batch: usize,
    /// Pixels of a picture.
    pub(crate) pixels: usize,
    /// Groups over all channels.
    pub(crate) groups: usize,
    /// Added to the variance.
    pub(crate) eps: f64,
    /// Of each channel.
    pub(crate) weight: &'a [f32],
    /// Of each channel.
    pub(crate) bias: &'a [f32],
    /// Applied at the end.
    pub(crate) activation: Option<Activation>,
    /// Means and variances in the place of the pictures' own, `[pictures, 2 · groups]`; picture `i` has entry `i` modulo their number.
    pub(crate) given: Option<&'a [f32]>,
}

/// Pixels whose sums are taken in f32 before they go to f64.
const RUN: usize = 64;
/// The most parts of a picture whose sums are taken apart.
const PARTS: usize = 64;

impl GroupNorm<'_> {
    fn channels(&self) -> usize {
        self.weight.len()
    }

    /// Pixels of a part, and how many parts a picture has.
    fn parts(&self) -> (usize, usize) {
        let len = self.pixels.div_ceil(PARTS).next_multiple_of(RUN).max(RUN);
        (len, self.pixels.div_ceil(len))
    }

    /// Numbers of workspace that the norm needs: sums of every part, then scale and shift of every channel.
    pub(crate) fn workspace_len(&self) -> usize {
        let c = self.channels();
        self.batch * (self.parts().1 * 2 + 1) * c
    }

    /// Normalises `sides` into `out [batch, pixels, channels]`.
    ///
    /// # Panics
    /// When sizes do not fit: a planner's mistake, never a user's.
    pub(crate) fn run(
        &self,
        level: Level,
        sides: &[Side<'_>],
        out: NumbersMut<'_>,
        workspace: &mut [f64],
    ) {
        let c = self.channels();
        assert_eq!(
            sides.iter().map(|s| s.channels).sum::<usize>(),
            c,
            "channels of the sources"
        );
        assert!(self.groups > 0 && c.is_multiple_of(self.groups) && self.bias.len() == c);
        let workspace = &mut workspace[..self.workspace_len()];
        let entry = 2 * self.groups;
        assert!(
            self.given
                .is_none_or(|g| !g.is_empty() && g.len().is_multiple_of(entry))
        );
        let (sums, factors) = workspace.split_at_mut(self.batch * self.parts().1 * 2 * c);
        // scale and shift fit into an f64's room, two f32 each
        let factors: &mut [f64] = factors;
        match self.given {
            Some(given) => self.given_factors(given, factors),
            None => {
                self.sums(level, sides, sums);
                self.factors(sides, sums, factors);
            }
        }
        match out {
            NumbersMut::F32(out) => self.apply(level, sides, factors, out),
            NumbersMut::Bf16(out) => self.apply(level, sides, factors, out),
        }
    }

    /// For each part of each picture: per channel the sum of the distance from the picture's first pixel, and of its square.
    fn sums(&self, level: Level, sides: &[Side<'_>], sums: &mut [f64]) {
        let (len, parts) = self.parts();
        let c = self.channels();
        sums.par_chunks_mut(2 * c)
            .enumerate()
            .for_each(|(i, sums)| {
                let (picture, part) = (i / parts, i % parts);
                let (mut sum, mut square) = sums.split_at_mut(c);
                let pixels = part * len..((part + 1) * len).min(self.pixels);
                for side in sides {
                    let (own_sum, rest_sum) = sum.split_at_mut(side.channels);
                    let (own_square, rest_square) = square.split_at_mut(side.channels);
                    let first = picture % side.pictures * self.pixels;
                    match side.data {
                        Numbers::F32(x) => part_sums(
                            level,
                            picture_of(x, first, self.pixels, side.channels),
                            pixels.clone(),
                            own_sum,
                            own_square,
                        ),
                        Numbers::Bf16(x) => part_sums(
                            level,
                            picture_of(x, first, self.pixels, side.channels),
                            pixels.clone(),
                            own_sum,
                            own_square,
                        ),
                    }
                    (sum, square) = (rest_sum, rest_square);
                }
            });
    }

    /// Mean and variance of each group, as scale and shift of each channel: `factors[picture][channel]` holds both.
    fn factors(&self, sides: &[Side<'_>], sums: &[f64], factors: &mut [f64]) {
        let c = self.channels();
        let per = c / self.groups;
        let (_, parts) = self.parts();
        let n = self.pixels as f64;
        for (picture, factors) in factors.chunks_mut(c).enumerate() {
            let sums = &sums[picture * parts * 2 * c..][..parts * 2 * c];
            let total = |at: usize| sums.chunks(2 * c).map(|part| part[at]).sum::<f64>();
            for group in 0..self.groups {
                let channels = group * per..(group + 1) * per;
                // of each channel: mean, and squares about it
                let channel = |j: usize| {
                    let (sum, square) = (total(j), total(c + j));
                    (
                        self.first(sides, picture, j) + sum / n,
                        square - sum * sum / n,
                    )
                };
                let (mean, variance) = pooled(channels.map(channel), n);
                self.factor(group, (mean, variance), factors);
            }
        }
    }

    /// The same by means and variances that are known.
    fn given_factors(&self, given: &[f32], factors: &mut [f64]) {
        let entry = 2 * self.groups;
        for (picture, factors) in factors.chunks_mut(self.channels()).enumerate() {
            let first = picture * entry % given.len();
            let (means, variances) = given[first..][..entry].split_at(self.groups);
            for (group, (&mean, &variance)) in means.iter().zip(variances).enumerate() {
                self.factor(group, (f64::from(mean), f64::from(variance)), factors);
            }
        }
    }

    /// Scale and shift of a group's channels.
    fn factor(&self, group: usize, (mean, variance): (f64, f64), factors: &mut [f64]) {
        let per = self.channels() / self.groups;
        let scale = 1.0 / (variance.max(0.0) + self.eps).sqrt();
        let affine = self.weight.iter().zip(self.bias);
        let channels = factors.iter_mut().zip(affine).skip(group * per);
        for (factor, (&weight, &bias)) in channels.take(per) {
            let scale = scale * f64::from(weight);
            let shift = f64::from(bias) - mean * scale;
            *factor = pair(scale as f32, shift as f32);
        }
    }

    /// The first pixel's number in a channel.
    fn first(&self, sides: &[Side<'_>], picture: usize, mut channel: usize) -> f64 {
        for side in sides {
            if channel < side.channels {
                let at = picture % side.pictures * self.pixels * side.channels + channel;
                return f64::from(match side.data {
                    Numbers::F32(x) => x[at],
                    Numbers::Bf16(x) => x[at].f32(),
                });
            }
            channel -= side.channels;
        }
        0.0
    }

    fn apply<O: Number>(&self, level: Level, sides: &[Side<'_>], factors: &[f64], out: &mut [O]) {
        let c = self.channels();
        assert_eq!(out.len(), self.batch * self.pixels * c, "the result's size");
        let rows = (CHUNK / c.max(1)).clamp(1, self.pixels.max(1));
        out.par_chunks_mut(self.pixels * c)
            .enumerate()
            .for_each(|(picture, out)| {
                let factors = &factors[picture * c..][..c];
                out.par_chunks_mut(rows * c)
                    .enumerate()
                    .for_each(|(i, out)| {
                        let mut column = 0;
                        for side in sides {
                            let first = picture % side.pictures * self.pixels + i * rows;
                            let count = out.len() / c;
                            let place = Place {
                                channels: side.channels,
                                column,
                                row: c,
                            };
                            let factors = &factors[column..][..side.channels];
                            match side.data {
                                Numbers::F32(x) => rows_of(
                                    level,
                                    picture_of(x, first, count, side.channels),
                                    factors,
                                    self.activation,
                                    (out, place),
                                ),
                                Numbers::Bf16(x) => rows_of(
                                    level,
                                    picture_of(x, first, count, side.channels),
                                    factors,
                                    self.activation,
                                    (out, place),
                                ),
                            }
                            column += side.channels;
                        }
                    });
            });
    }
}

/// Mean and variance over channels, of each of which the mean and the sum of squares about it are known for `n` pixels.
fn pooled(channels: impl Iterator<Item = (f64, f64)> + Clone, n: f64) -> (f64, f64) {
    let count = channels.clone().count() as f64;
    let mean = channels.clone().map(|(own, _)| own).sum::<f64>() / count;
    let squares: f64 = channels
        .map(|(own, squares)| squares + n * (own - mean).powi(2))
        .sum();
    (mean, squares.max(0.0) / (n * count))
}

/// Rows whose sums are taken together; bits do not depend on who takes them.
const ROWS: usize = 8;

/// Means and then variances of the channel groups within a part of pictures `h × w`, into `out [pictures, 2 · groups]`.
///
/// # Panics
/// When sizes do not fit: a planner's mistake, never a user's.
pub(crate) fn statistics(
    level: Level,
    side: &Side<'_>,
    ((h, w), part): ((usize, usize), &Window),
    groups: usize,
    out: &mut [f32],
) {
    let c = side.channels;
    assert!(
        part.fits((h, w)) && c.is_multiple_of(groups) && out.len() == side.pictures * 2 * groups
    );
    for (picture, out) in out.chunks_mut(2 * groups).enumerate() {
        let first = picture * h * w;
        let sums = match side.data {
            Numbers::F32(x) => window_sums(level, picture_of(x, first, h * w, c), (w, part), c),
            Numbers::Bf16(x) => window_sums(level, picture_of(x, first, h * w, c), (w, part), c),
        };
        let n = (part.height * part.width) as f64;
        let (means, variances) = out.split_at_mut(groups);
        let per = c / groups;
        for (group, (to_mean, to_variance)) in means.iter_mut().zip(variances).enumerate() {
            let channels = (group * per..(group + 1) * per).map(|j| {
                let (origin, sum, square) = sums[j];
                (origin + sum / n, square - sum * sum / n)
            });
            let (mean, variance) = pooled(channels, n);
            (*to_mean, *to_variance) = (mean as f32, variance as f32);
        }
    }
}

/// For each channel a number near its mean, the sum of distances from it, and that of their squares.
fn window_sums<T: Number>(
    level: Level,
    x: &[T],
    (w, part): (usize, &Window),
    c: usize,
) -> Vec<(f64, f64, f64)> {
    let sums: Vec<Vec<f64>> = (0..part.height.div_ceil(ROWS))
        .into_par_iter()
        .map(|block| {
            let (mut all, mut own) = (vec![0.0; 2 * c], vec![0.0; 2 * c]);
            for row in (block * ROWS..part.height).take(ROWS) {
                let start = (part.top + row) * w + part.left;
                let (sum, square) = own.split_at_mut(c);
                part_sums(level, x, start..start + part.width, sum, square);
                all.iter_mut().zip(&own).for_each(|(all, own)| *all += own);
            }
            all
        })
        .collect();
    let total = |at: usize| sums.iter().map(|block| block[at]).sum::<f64>();
    (0..c)
        .map(|j| (f64::from(x[j].f32()), total(j), total(c + j)))
        .collect()
}

/// Where a side's channels lie in a row of the result.
#[derive(Clone, Copy)]
struct Place {
    channels: usize,
    column: usize,
    row: usize,
}

/// Elements a task.
const CHUNK: usize = 1 << 14;

fn picture_of<T>(x: &[T], first: usize, pixels: usize, channels: usize) -> &[T] {
    &x[first * channels..][..pixels * channels]
}

/// Two f32 in the room of one f64.
fn pair(a: f32, b: f32) -> f64 {
    f64::from_bits(u64::from(a.to_bits()) | u64::from(b.to_bits()) << 32)
}

#[inline(always)]
fn unpair(x: f64) -> (f32, f32) {
    let bits = x.to_bits();
    (
        f32::from_bits(bits as u32),
        f32::from_bits((bits >> 32) as u32),
    )
}

multiversion! {
    fn part_sums<T: Number>(x: &[T], pixels: std::ops::Range<usize>, sum: &mut [f64], square: &mut [f64]) {
        const LANES: usize = 16;
        let c = sum.len();
        sum.fill(0.0);
        square.fill(0.0);
        let mut start = pixels.start;
        while start < pixels.end {
            let end = (start + RUN).min(pixels.end);
            let mut j = 0;
            while j + LANES <= c {
                let (mut s, mut q) = ([0f32; LANES], [0f32; LANES]);
                let mut origin = [0f32; LANES];
                for l in 0..LANES {
                    origin[l] = x[j + l].f32();
                }
                for pixel in start..end {
                    let row = &x[pixel * c + j..][..LANES];
                    for l in 0..LANES {
                        let d = row[l].f32() - origin[l];
                        s[l] += d;
                        q[l] += d * d;
                    }
                }
                for l in 0..LANES {
                    sum[j + l] += f64::from(s[l]);
                    square[j + l] += f64::from(q[l]);
                }
                j += LANES;
            }
            for j in j..c {
                let origin = x[j].f32();
                for pixel in start..end {
                    let d = f64::from(x[pixel * c + j].f32() - origin);
                    sum[j] += d;
                    square[j] += d * d;
                }
            }
            start = end;
        }
    }
}

/// The shorter way, if there is one.
fn rows_of<I: Number, O: Number>(
    level: Level,
    x: &[I],
    factors: &[f64],
    activation: Option<Activation>,
    (out, place): (&mut [O], Place),
) {
    if !coarse::apply_rows(level, x, factors, activation, (&mut *out, place)) {
        apply_rows(level, x, factors, activation, out, place);
    }
}

multiversion! {
    fn apply_rows<I: Number, O: Number>(x: &[I], factors: &[f64], activation: Option<Activation>, out: &mut [O], place: Place) {
        match activation {
            None => affine(x, factors, out, place, |x| x),
            Some(Activation::Silu) => affine(x, factors, out, place, simd::silu),
            Some(Activation::Gelu) => affine(x, factors, out, place, simd::gelu),
            Some(Activation::GeluTanh) => affine(x, factors, out, place, simd::gelu_tanh),
            Some(Activation::QuickGelu) => affine(x, factors, out, place, simd::quick_gelu),
            Some(Activation::Mish) => affine(x, factors, out, place, simd::mish),
            Some(Activation::Relu) => affine(x, factors, out, place, |x| x.max(0.0)),
            Some(Activation::LeakyRelu { percent }) => {
                let slope = Activation::slope(percent);
                affine(x, factors, out, place, |x| simd::leaky(x, slope));
            }
            Some(Activation::Sigmoid) => affine(x, factors, out, place, simd::sigmoid),
        }
    }
}

#[inline(always)]
fn affine<I: Number, O: Number>(
    x: &[I],
    factors: &[f64],
    out: &mut [O],
    place: Place,
    f: impl Fn(f32) -> f32,
) {
    for (x, out) in x
        .chunks_exact(place.channels)
        .zip(out.chunks_exact_mut(place.row))
    {
        let out = &mut out[place.column..][..place.channels];
        for ((x, out), factor) in x.iter().zip(out).zip(factors) {
            let (scale, shift) = unpair(*factor);
            *out = O::of(f(x.f32() * scale + shift));
        }
    }
}

/// Normalises each row of `x [rows, channels]` (Ba et al., "Layer Normalization", arXiv 1607.06450).
pub(crate) fn layer_norm(
    level: Level,
    x: Numbers<'_>,
    (weight, bias, eps): (&[f32], &[f32], f64),
    out: NumbersMut<'_>,
) {
    match (x, out) {
        (Numbers::F32(x), NumbersMut::F32(out)) => {
            layer_norm_of(level, x, (weight, bias, eps), out)
        }
        (Numbers::F32(x), NumbersMut::Bf16(out)) => {
            layer_norm_of(level, x, (weight, bias, eps), out)
        }
        (Numbers::Bf16(x), NumbersMut::F32(out)) => {
            layer_norm_of(level, x, (weight, bias, eps), out)
        }
        (Numbers::Bf16(x), NumbersMut::Bf16(out)) => {
            layer_norm_of(level, x, (weight, bias, eps), out)
        }
    }
}

fn layer_norm_of<I: Number, O: Number>(
    level: Level,
    x: &[I],
    (weight, bias, eps): (&[f32], &[f32], f64),
    out: &mut [O],
) {
    let c = weight.len();
    assert!(
        c > 0
            && bias.len() == c
            && !x.is_empty()
            && x.len().is_multiple_of(c)
            && out.len().is_multiple_of(x.len())
    );
    let rows = (CHUNK / c).max(1) * c;
    out.par_chunks_mut(x.len()).for_each(|out| {
        out.par_chunks_mut(rows)
            .zip(x.par_chunks(rows))
            .for_each(|(out, x)| layer_norm_rows(level, x, weight, bias, eps, out));
    });
}

multiversion! {
    fn layer_norm_rows<I: Number, O: Number>(x: &[I], weight: &[f32], bias: &[f32], eps: f64, out: &mut [O]) {
        let c = weight.len();
        for (x, out) in x.chunks_exact(c).zip(out.chunks_exact_mut(c)) {
            let origin = x[0].f32();
            let sum = lanes(x, |v| v - origin);
            let mean = origin + (sum / c as f64) as f32;
            let squares = lanes(x, |v| (v - mean) * (v - mean));
            let scale = (1.0 / (squares / c as f64 + eps).sqrt()) as f32;
            for (((x, out), weight), bias) in x.iter().zip(out).zip(weight).zip(bias) {
                *out = O::of((x.f32() - mean) * scale * weight + bias);
            }
        }
    }
}

/// Sum of `f` over a row, in sixteen interleaved f32 sums.
#[inline(always)]
fn lanes<I: Number>(x: &[I], f: impl Fn(f32) -> f32) -> f64 {
    const LANES: usize = 16;
    let mut sums = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += f(x.f32());
        }
    }
    let tail: f64 = rest.iter().map(|x| f64::from(f(x.f32()))).sum();
    sums.iter().map(|&s| f64::from(s)).sum::<f64>() + tail
}

mod adaptive;
mod coarse;
pub(crate) use adaptive::{AdaptiveNorm, rms_norm, rotate};

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn numbers(n: usize, seed: u32, mean: f32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(99);
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                mean + (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn group_norm_is_right(
        level: Level,
        (batch, pixels, sides, groups): (usize, usize, &[(usize, usize)], usize),
        mean: f32,
    ) {
        let data: Vec<Vec<f32>> = sides
            .iter()
            .enumerate()
            .map(|(i, &(c, pictures))| numbers(pictures * pixels * c, i as u32, mean))
            .collect();
        let c: usize = sides.iter().map(|s| s.0).sum();
        let (weight, bias) = (numbers(c, 7, 1.0), numbers(c, 8, 0.0));
        let norm = GroupNorm {
            batch,
            pixels,
            groups,
            eps: 1e-5,
            weight: &weight,
            bias: &bias,
            activation: Some(Activation::Silu),
            given: None,
        };
        let views: Vec<Side<'_>> = sides
            .iter()
            .zip(&data)
            .map(|(&(channels, pictures), d)| Side {
                data: Numbers::F32(d),
                channels,
                pictures,
            })
            .collect();
        let mut out = vec![0f32; batch * pixels * c];
        let mut workspace = vec![0f64; norm.workspace_len()];
        norm.run(level, &views, NumbersMut::F32(&mut out), &mut workspace);
        let get = |b: usize, p: usize, j: usize| {
            let (side, j) = if j < sides[0].0 {
                (0, j)
            } else {
                (1, j - sides[0].0)
            };
            f64::from(data[side][(b % sides[side].1 * pixels + p) * sides[side].0 + j])
        };
        let per = c / groups;
        for b in 0..batch {
            for g in 0..groups {
                let all: Vec<f64> = (0..pixels)
                    .flat_map(|p| (0..per).map(move |j| (p, j)))
                    .map(|(p, j)| get(b, p, g * per + j))
                    .collect();
                let m = all.iter().sum::<f64>() / all.len() as f64;
                let v = all.iter().map(|x| (x - m).powi(2)).sum::<f64>() / all.len() as f64;
                for p in 0..pixels {
                    for j in g * per..(g + 1) * per {
                        let y = (get(b, p, j) - m) / (v + 1e-5).sqrt() * f64::from(weight[j])
                            + f64::from(bias[j]);
                        let want = y / (1.0 + (-y).exp());
                        let got = f64::from(out[(b * pixels + p) * c + j]);
                        // x · scale + shift rounds in units of the mean
                        let tolerance = 3e-6 * f64::from(mean.abs().max(1.0));
                        assert!(
                            (got - want).abs() < tolerance,
                            "{} {b} {p} {j}: {got} {want}",
                            level.name()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn group_norms_equal_the_definition() {
        for level in Level::supported() {
            for shape in [
                (1, 1, &[(4, 1)][..], 2),
                (2, 63, &[(48, 1)], 3),
                (2, 700, &[(30, 2), (18, 1)], 4),
                (3, 129, &[(5, 3)], 5),
                (1, 5000, &[(16, 1)], 1),
            ] {
                group_norm_is_right(level, shape, 0.0);
                group_norm_is_right(level, shape, 100.0);
            }
        }
    }

    #[test]
    fn layer_norms_equal_the_definition() {
        for level in Level::supported() {
            for (rows, c) in [(1, 1), (3, 7), (50, 320), (2, 33)] {
                for mean in [0.0, 1000.0] {
                    let (x, weight, bias) = (
                        numbers(rows * c, 1, mean),
                        numbers(c, 2, 1.0),
                        numbers(c, 3, 0.0),
                    );
                    let mut out = vec![0f32; rows * c];
                    layer_norm(
                        level,
                        Numbers::F32(&x),
                        (&weight, &bias, 1e-5),
                        NumbersMut::F32(&mut out),
                    );
                    let mut short = vec![bf16::ZERO; rows * c];
                    layer_norm(
                        level,
                        Numbers::F32(&x),
                        (&weight, &bias, 1e-5),
                        NumbersMut::Bf16(&mut short),
                    );
                    for (i, got) in out.iter().enumerate() {
                        let row: Vec<f64> =
                            x[i / c * c..][..c].iter().map(|&v| f64::from(v)).collect();
                        let m = row.iter().sum::<f64>() / c as f64;
                        let v = row.iter().map(|x| (x - m).powi(2)).sum::<f64>() / c as f64;
                        let want = (row[i % c] - m) / (v + 1e-5).sqrt() * f64::from(weight[i % c])
                            + f64::from(bias[i % c]);
                        let tolerance = if mean == 0.0 { 2e-6 } else { 3e-4 };
                        assert!(
                            (f64::from(*got) - want).abs() < tolerance,
                            "{} {i}: {got} {want}",
                            level.name()
                        );
                        assert_eq!(short[i], bf16::from_f32(*got));
                    }
                }
            }
        }
    }
}
