//! The operations that are rare or small in the networks at hand: number by number, each read where it lies.

use half::bf16;
use rayon::prelude::*;

use super::ir::{ValueId, View, Work};
use super::memory::Memory;
use super::run::Prepared;
use crate::cpu::epilogue::Stored;
use crate::cpu::simd;
use crate::cpu::view::{Numbers, NumbersMut};
use crate::{Activation, Error, Result};

/// Numbers a task.
const CHUNK: usize = 1 << 12;

/// A number of a value; beyond its end the value repeats, as smaller batches do.
fn at(x: Numbers<'_>, i: usize) -> f32 {
    match x {
        Numbers::F32(x) => x[i % x.len()],
        Numbers::Bf16(x) => x[i % x.len()].to_f32(),
    }
}

/// Writes `f(row, channel)` everywhere.
fn fill(out: NumbersMut<'_>, channels: usize, f: impl Fn(usize, usize) -> f32 + Sync) {
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

fn activate(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Silu => simd::silu(x),
        Activation::Gelu => simd::gelu(x),
        Activation::QuickGelu => simd::quick_gelu(x),
        Activation::Mish => simd::mish(x),
        Activation::Relu => x.max(0.0),
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
            (Work::Add(a, b), _) => {
                let (a, b) = (self.read(*a), self.read(*b));
                fill(out, c, |row, j| at(a, row * c + j) + at(b, row * c + j));
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
            ) => {
                let x = self.read(*source);
                fill(out, c, |row, j| at(x, row * c + j) * scale + shift);
            }
            (Work::Concat(a, b), _) => {
                let (ca, cb) = (self.channels(*a), self.channels(*b));
                let (a, b) = (self.read(*a), self.read(*b));
                fill(out, c, |row, j| {
                    if j < ca {
                        at(a, row * ca + j)
                    } else {
                        at(b, row * cb + j - ca)
                    }
                });
            }
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
            (Work::AddPositions { source, .. }, Prepared::Table(table)) => {
                let x = self.read(*source);
                fill(out, c, |row, j| {
                    at(x, row * c + j) + table[row % pixels * c + j]
                });
            }
            _ => return Err(Error::Mixed { op: "plan" }),
        }
        Ok(())
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
