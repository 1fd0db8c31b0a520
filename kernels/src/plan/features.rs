//! Operations on whole pictures of features, which guidance of special kinds asks for: how much a token is looked at, lowest frequencies, means.

use std::f64::consts::TAU;

use rayon::prelude::*;

use super::ir::{ValueId, View, Work};
use super::memory::Memory;
use super::pointwise::{at, fill};
use crate::cpu::view::NumbersMut;
use crate::{Error, Result};

/// Channels a task.
const CHANNELS: usize = 32;

impl Memory<'_> {
    /// Computes such a step into `out`, the place of value `id`.
    pub(super) fn feature(&self, work: &Work, id: ValueId, out: NumbersMut<'_>) -> Result<()> {
        match work {
            Work::AttentionMass { q, k, heads } => self.attention_mass((*q, *k), *heads, id, out),
            Work::LowFrequencies { source, scale } => self.low_frequencies(*source, *scale, out),
            Work::Amplify {
                source,
                scale,
                by_mean,
            } => self.amplify(*source, (*scale, *by_mean), out),
            Work::Means(source) => self.means(*source, out),
            Work::Merge { source, places } => self.merged((*source, *places), id, out)?,
            Work::Unmerge {
                source,
                places,
                residual,
            } => self.unmerged((*source, *places), *residual, (id, out))?,
            _ => return Err(Error::Mixed { op: "plan" }),
        }
        Ok(())
    }

    /// Sums of as many rows a task, whatever the number of threads, and then of tasks.
    fn means(&self, source: ValueId, out: NumbersMut<'_>) {
        const ROWS: usize = 1024;
        let (c, pixels) = (self.channels(source), self.pixels(source));
        let x = self.read(source);
        let pieces = pixels.div_ceil(ROWS);
        let tasks = (0..self.batch(source) * pieces).into_par_iter();
        let sums: Vec<Vec<f64>> = tasks
            .map(|task| {
                let (picture, first) = (task / pieces, task % pieces * ROWS);
                let mut sums = vec![0f64; c];
                for row in first..(first + ROWS).min(pixels) {
                    let row = (picture * pixels + row) * c;
                    let columns = sums.iter_mut().enumerate();
                    columns.for_each(|(j, sum)| *sum += f64::from(at(x, row + j)));
                }
                sums
            })
            .collect();
        fill(out, c, |picture, j| {
            let of = sums[picture * pieces..][..pieces].iter();
            (of.map(|sums| sums[j]).sum::<f64>() / pixels as f64) as f32
        });
    }

    /// One head of one sequence a task, its queries in order.
    fn attention_mass(
        &self,
        (q, k): (ValueId, ValueId),
        heads: usize,
        id: ValueId,
        out: NumbersMut<'_>,
    ) {
        let (queries, keys, c) = (self.pixels(q), self.pixels(k), self.channels(q));
        let (width, batch) = (c / heads, self.batch(id));
        let (q, k) = (self.read(q), self.read(k));
        let scale = 1.0 / (width as f32).sqrt();
        let tasks = (0..batch * heads).into_par_iter().map(|task| {
            let (sequence, first) = (task / heads, task % heads * width);
            let number = |x, token: usize, i| at(x, token * c + first + i);
            let mut mass = vec![0f64; keys];
            let mut scores = vec![0f32; keys];
            for query in 0..queries {
                for (key, score) in scores.iter_mut().enumerate() {
                    let pairs = (0..width).map(|i| {
                        number(q, sequence * queries + query, i)
                            * number(k, sequence * keys + key, i)
                    });
                    *score = scale * pairs.sum::<f32>();
                }
                let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                scores.iter_mut().for_each(|s| *s = (*s - most).exp());
                let sum: f32 = scores.iter().sum();
                for (mass, score) in mass.iter_mut().zip(&scores) {
                    *mass += f64::from(score / sum);
                }
            }
            mass
        });
        let tasks: Vec<Vec<f64>> = tasks.collect();
        fill(out, 1, |row, _| {
            let (sequence, key) = (row / keys, row % keys);
            let of = tasks[sequence * heads..][..heads].iter();
            (of.map(|mass| mass[key]).sum::<f64>() / heads as f64) as f32
        });
    }

    /// `x + (scale − 1) / n · Σ waves · (waves · x)`: four frequencies, of which the real part is taken, are seven waves.
    fn low_frequencies(&self, source: View, scale: f64, out: NumbersMut<'_>) {
        let c = self.channels(source.value);
        let pixels = source.h * source.w;
        let waves = waves(source.h, source.w);
        let x = self.read(source.value);
        let blocks = c.div_ceil(CHANNELS);
        let tasks = (0..self.batch(source.value) * blocks).into_par_iter();
        // of every picture and channel the factors of all waves
        let factors: Vec<Vec<f64>> = tasks
            .map(|task| {
                let (picture, first) = (task / blocks, task % blocks * CHANNELS);
                let count = CHANNELS.min(c - first);
                let mut sums = vec![0f64; waves.len() * CHANNELS];
                for pixel in 0..pixels {
                    let row = (picture * pixels + pixel) * c + first;
                    for (wave, sums) in waves.iter().zip(sums.chunks_mut(CHANNELS)) {
                        for (i, sum) in sums[..count].iter_mut().enumerate() {
                            *sum += wave[pixel] * f64::from(at(x, row + i));
                        }
                    }
                }
                sums
            })
            .collect();
        let change = (scale - 1.0) / pixels as f64;
        fill(out, c, |row, channel| {
            let sums = &factors[row / pixels * blocks + channel / CHANNELS];
            let waves = waves.iter().zip(sums.chunks(CHANNELS));
            let low: f64 = waves
                .map(|(wave, sums)| wave[row % pixels] * sums[channel % CHANNELS])
                .sum();
            (f64::from(at(x, row * c + channel)) + change * low) as f32
        });
    }

    fn amplify(&self, source: ValueId, (scale, by_mean): (f32, bool), out: NumbersMut<'_>) {
        let (c, pixels) = (self.channels(source), self.pixels(source));
        let x = self.read(source);
        let means: Vec<f32> = match by_mean {
            false => Vec::new(),
            true => {
                let rows = (0..self.batch(source) * pixels).into_par_iter();
                let mean = |row| (0..c).map(|j| f64::from(at(x, row * c + j))).sum::<f64>();
                let mut means: Vec<f32> = rows.map(|row| (mean(row) / c as f64) as f32).collect();
                for picture in means.chunks_mut(pixels.max(1)) {
                    let least = picture.iter().copied().fold(f32::INFINITY, f32::min);
                    let most = picture.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let m = picture.iter_mut();
                    m.for_each(|m| *m = (*m - least) / (most - least));
                }
                means
            }
        };
        fill(out, c, |row, j| {
            let x = at(x, row * c + j);
            match means.get(row) {
                _ if j >= c / 2 => x,
                Some(mean) => x * ((scale - 1.0) * mean + 1.0),
                None => x * scale,
            }
        });
    }
}

/// The waves of the frequencies 0 and −1 along both axes over `h × w` pixels: the real part of what four such frequencies carry is a sum over
/// them. An axis of one pixel has but the frequency 0.
fn waves(h: usize, w: usize) -> Vec<Vec<f64>> {
    let along = |n: usize| if n > 1 { vec![0.0, 1.0] } else { vec![0.0] };
    let mut waves = Vec::new();
    for fy in along(h) {
        for fx in along(w) {
            let angle = |pixel: usize| {
                let (y, x) = ((pixel / w) as f64, (pixel % w) as f64);
                TAU * (fy * y / h as f64 + fx * x / w as f64)
            };
            waves.push((0..h * w).map(|pixel| angle(pixel).cos()).collect());
            if fy + fx > 0.0 {
                waves.push((0..h * w).map(|pixel| angle(pixel).sin()).collect());
            }
        }
    }
    waves
}
