//! The operations that are rare or small in the networks at hand: number by number, each read where it lies.

use half::bf16;
use rayon::prelude::*;

use super::ir::{ValueId, View, Work};
use super::memory::Memory;
use super::run::Prepared;
use crate::cpu::epilogue::Stored;
use crate::cpu::simd::{self, Number};
use crate::cpu::view::{Numbers, NumbersMut};
use crate::op::PatchOrder;
use crate::{Activation, Result};

/// Numbers a task.
const CHUNK: usize = 1 << 12;

/// A number of a value; beyond its end the value repeats, as smaller batches do.
pub(super) fn at(x: Numbers<'_>, i: usize) -> f32 {
    match x {
        Numbers::F32(x) => x[i % x.len()],
        Numbers::Bf16(x) => x[i % x.len()].to_f32(),
    }
}

/// Writes `f(row, channel)` everywhere.
pub(super) fn fill(out: NumbersMut<'_>, channels: usize, f: impl Fn(usize, usize) -> f32 + Sync) {
    match out {
        NumbersMut::F32(out) => {
            let each = out.par_iter_mut().enumerate().with_min_len(CHUNK);
            each.for_each(|(i, out)| *out = f(i / channels, i % channels));
        }
        NumbersMut::Bf16(out) => {
            let each = out.par_iter_mut().enumerate().with_min_len(CHUNK);
            each.for_each(|(i, out)| *out = <bf16 as Stored>::of(f(i / channels, i % channels)));
        }
    }
}

/// Gives `write` pieces of a result and where they begin, where what is read lies as what is written.
fn in_chunks(out: &mut [f32], write: impl Fn(usize, &mut [f32]) + Sync) {
    out.par_chunks_mut(CHUNK)
        .enumerate()
        .for_each(|(i, out)| write(i * CHUNK, out));
}

/// Writes rows that lie elsewhere: `from(row)` says where, modulo the length.
fn copy_rows<'a>(
    out: NumbersMut<'_>,
    channels: usize,
    from: impl Fn(usize) -> (Numbers<'a>, usize) + Sync,
) {
    fn into<'a, O: Number>(
        out: &mut [O],
        channels: usize,
        from: impl Fn(usize) -> (Numbers<'a>, usize) + Sync,
    ) {
        let rows = out.par_chunks_mut(channels.max(1)).enumerate();
        rows.with_min_len((CHUNK / channels.max(1)).max(1))
            .for_each(|(row, out)| match from(row) {
                (Numbers::F32(x), row) => {
                    let x = &x[row * channels % x.len()..][..channels];
                    out.iter_mut().zip(x).for_each(|(out, &x)| *out = O::of(x));
                }
                (Numbers::Bf16(x), row) => {
                    let x = &x[row * channels % x.len()..][..channels];
                    out.iter_mut()
                        .zip(x)
                        .for_each(|(out, x)| *out = O::of(Number::f32(*x)));
                }
            });
    }
    match out {
        NumbersMut::F32(out) => into(out, channels, from),
        NumbersMut::Bf16(out) => into(out, channels, from),
    }
}

fn activate(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Silu => simd::silu(x),
        Activation::Gelu => simd::gelu(x),
        Activation::GeluTanh => simd::gelu_tanh(x),
        Activation::QuickGelu => simd::quick_gelu(x),
        Activation::Mish => simd::mish(x),
        Activation::Relu => x.max(0.0),
        Activation::LeakyRelu { percent } => simd::leaky(x, Activation::slope(percent)),
        Activation::Sigmoid => simd::sigmoid(x),
    }
}

impl Memory<'_> {
    /// Computes a pointwise step into `out`, the place of value `id`.
    pub(super) fn pointwise(
        &self,
        work: &Work,
        prepared: &Prepared,
        id: ValueId,
        out: NumbersMut<'_>,
    ) -> Result<()> {
        let (c, pixels) = (self.channels(id), self.pixels(id));
        match (work, prepared) {
            (Work::Activate(x, activation), _) => {
                let x = self.read(*x);
                fill(out, c, |row, j| activate(*activation, at(x, row * c + j)));
            }
            (Work::Prelu { source, .. }, Prepared::Table(slopes)) => {
                let x = self.read(*source);
                fill(out, c, |row, j| simd::leaky(at(x, row * c + j), slopes[j]));
            }
            (Work::Shift { source, values }, _) => {
                let x = self.read(*source);
                fill(out, c, |row, j| at(x, row * c + j) + values[j]);
            }
            (Work::Add(a, b), _) => {
                let (a, b) = (self.read(*a), self.read(*b));
                match (out, a, b) {
                    (NumbersMut::F32(out), Numbers::F32(a), Numbers::F32(b))
                        if a.len() == out.len() && b.len() == out.len() =>
                    {
                        in_chunks(out, |first, out| {
                            let pairs = a[first..].iter().zip(&b[first..]);
                            out.iter_mut()
                                .zip(pairs)
                                .for_each(|(out, (a, b))| *out = a + b);
                        });
                    }
                    (out, a, b) => {
                        fill(out, c, |row, j| at(a, row * c + j) + at(b, row * c + j));
                    }
                }
            }
            (Work::Geglu(x), _) => {
                let x = self.read(*x);
                fill(out, c, |row, j| {
                    at(x, row * 2 * c + j) * simd::gelu(at(x, (row * 2 + 1) * c + j))
                });
            }
            (Work::AddChannels(x, more), _) => {
                let (x, more) = (self.read(*x), self.read(*more));
                fill(out, c, |row, j| {
                    at(x, row * c + j) + at(more, row / pixels * c + j)
                });
            }
            (Work::ScaleShift(x, factors), _) => {
                let (x, factors) = (self.read(*x), self.read(*factors));
                let factor = |row: usize, j: usize| at(factors, row / pixels * 2 * c + j);
                fill(out, c, |row, j| {
                    at(x, row * c + j) * (1.0 + factor(row, j)) + factor(row, c + j)
                });
            }
            (
                Work::Affine {
                    source,
                    scale,
                    shift,
                },
                _,
            ) => match (out, self.read(*source)) {
                (NumbersMut::F32(out), Numbers::F32(x)) if x.len() == out.len() => {
                    in_chunks(out, |first, out| {
                        let all = out.iter_mut().zip(&x[first..]);
                        all.for_each(|(out, x)| *out = x * scale + shift);
                    });
                }
                (out, x) => fill(out, c, |row, j| at(x, row * c + j) * scale + shift),
            },
            (Work::Concat(pieces), _) => {
                // for each channel: the piece, its width, and the place in it
                let places: Vec<(Numbers<'_>, usize, usize)> = pieces
                    .iter()
                    .flat_map(|&piece| {
                        let (x, wide) = (self.read(piece), self.channels(piece));
                        (0..wide).map(move |j| (x, wide, j))
                    })
                    .collect();
                fill(out, c, |row, j| {
                    let (x, wide, place) = places[j];
                    at(x, row * wide + place)
                });
            }
            (Work::AveragePool(source), _) => self.average_pool(*source, c, out),
            (Work::Upsample { source, h, w }, _) => self.upsample(*source, (*h, *w), c, out),
            (
                Work::Sinusoid {
                    source,
                    flip_sin_to_cos,
                    freq_shift,
                    ..
                },
                _,
            ) => {
                let t = self.read(*source);
                fill(out, c, |row, j| {
                    sinusoid(at(t, row), j, c / 2, (*flip_sin_to_cos, *freq_shift))
                });
            }
            (Work::Embed { ids, .. }, Prepared::Table(table)) => {
                let ids = self.read(*ids);
                fill(out, c, |row, j| {
                    table
                        .get(at(ids, row) as usize * c + j)
                        .copied()
                        .unwrap_or(f32::NAN)
                });
            }
            (Work::AddPositions { source, rows, .. }, Prepared::Table(table)) => {
                let x = self.read(*source);
                let place = |pixel: usize| rows.as_ref().map_or(pixel, |rows| rows[pixel]);
                fill(out, c, |row, j| {
                    at(x, row * c + j) + table[place(row % pixels) * c + j]
                });
            }
            (Work::Multiply(a, b), _) => {
                let (a, b) = (self.read(*a), self.read(*b));
                fill(out, c, |row, j| at(a, row * c + j) * at(b, row * c + j));
            }
            (
                Work::Gate {
                    source,
                    values,
                    slot,
                },
                _,
            ) => {
                let (x, wide) = (self.read(*source), self.channels(*values));
                let values = self.read(*values);
                fill(out, c, |row, j| {
                    at(x, row * c + j) * at(values, row / pixels * wide + slot * c + j)
                });
            }
            (Work::Join(a, b), _) => {
                let (first, second) = (self.pixels(*a), self.pixels(*b));
                let (a, b) = (self.read(*a), self.read(*b));
                let from = |row: usize| match (row / pixels, row % pixels) {
                    (sequence, token) if token < first => (a, sequence * first + token),
                    (sequence, token) => (b, sequence * second + token - first),
                };
                copy_rows(out, c, from);
            }
            (Work::Tokens { source, first }, _) => {
                let all = self.pixels(*source);
                let x = self.read(*source);
                copy_rows(out, c, |row| (x, row / pixels * all + first + row % pixels));
            }
            (Work::Patchify { source, patch }, _) => {
                let x = self.read(source.value);
                let (w, channels) = (source.w, self.channels(source.value));
                let across = w / patch;
                fill(out, c, |row, j| {
                    let (picture, token) = (row / pixels, row % pixels);
                    let (channel, dy, dx) = (j / (patch * patch), j / patch % patch, j % patch);
                    let y = picture * source.h + token / across * patch + dy;
                    at(
                        x,
                        (y * w + token % across * patch + dx) * channels + channel,
                    )
                });
            }
            (
                Work::Unpatchify {
                    source,
                    patch,
                    order,
                },
                _,
            ) => {
                let x = self.read(source.value);
                let (h, w) = (source.h, source.w);
                fill(out, c, |row, j| {
                    let (picture, pixel) = (row / pixels, row % pixels);
                    let (y, column) = (pixel / (w * patch), pixel % (w * patch));
                    let token = (picture * h + y / patch) * w + column / patch;
                    let (dy, dx) = (y % patch, column % patch);
                    let place = match order {
                        PatchOrder::ChannelsFirst => (j * patch + dy) * patch + dx,
                        PatchOrder::ChannelsLast => (dy * patch + dx) * c + j,
                    };
                    at(x, token * c * patch * patch + place)
                });
            }
            _ => return self.feature(work, id, out),
        }
        Ok(())
    }

    fn average_pool(&self, source: View, c: usize, out: NumbersMut<'_>) {
        let x = self.read(source.value);
        let (h, w) = (source.h.div_ceil(2), source.w.div_ceil(2));
        fill(out, c, |row, j| {
            let (picture, y, column) = (row / (h * w), 2 * (row % (h * w) / w), 2 * (row % w));
            let (rows, columns) = ((source.h - y).min(2), (source.w - column).min(2));
            let pixels =
                (y..y + rows).flat_map(|y| (column..column + columns).map(move |x| (y, x)));
            let sum: f32 = pixels
                .map(|(y, column)| at(x, ((picture * source.h + y) * source.w + column) * c + j))
                .sum();
            sum / (rows * columns) as f32
        });
    }

    fn upsample(&self, source: View, (h, w): (usize, usize), c: usize, out: NumbersMut<'_>) {
        let x = self.read(source.value);
        fill(out, c, |row, j| {
            let (picture, y, column) = (row / (h * w), row % (h * w) / w, row % w);
            let pixel = (picture * source.h + y * source.h / h) * source.w + column * source.w / w;
            at(x, pixel * c + j)
        });
    }
}

/// Number `j` of a timestep's sinusoids, in f32 as the reference computes them; an odd width ends in a zero.
fn sinusoid(
    timestep: f32,
    j: usize,
    half: usize,
    (flip_sin_to_cos, freq_shift): (bool, f64),
) -> f32 {
    if j >= 2 * half {
        return 0.0;
    }
    let exponent = -10_000f32.ln() * (j % half) as f32 / (half as f64 - freq_shift) as f32;
    let angle = timestep * exponent.exp();
    if (j < half) == flip_sin_to_cos {
        angle.cos()
    } else {
        angle.sin()
    }
}
