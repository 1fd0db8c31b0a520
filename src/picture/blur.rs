//! Gaussian blurs on bytes, as Pillow and as OpenCV have them.

use rayon::prelude::*;

use super::MAX_SIDE;
use crate::error::{Error, Result};

/// Pillow's `GaussianBlur`: three blurs with a box that has fractions of pixels at its ends (Gwosdek et al., "Theoretical Foundations of
/// Gaussian Convolution by Extended Box Filtering", 2011), along rows and then along columns. `size` is width and height.
pub(super) fn gaussian(
    bytes: &[u8],
    channels: usize,
    (width, height): (usize, usize),
    radius: f32,
) -> Result<Vec<u8>> {
    if !(0.0..=MAX_SIDE as f32).contains(&radius) {
        return Err(Error::Usage(format!(
            "a blur's radius is {radius}, expected 0 to {MAX_SIDE} pixels"
        )));
    }
    if radius == 0.0 {
        return Ok(bytes.to_vec());
    }
    let half = Half::of(radius);
    let mut out = bytes.to_vec();
    box_rows(&mut out, channels, width, &half);
    let mut turned = transpose(&out, channels, width, height);
    box_rows(&mut turned, channels, height, &half);
    Ok(transpose(&turned, channels, height, width))
}

/// How often a box is laid over.
const PASSES: f64 = 3.0;

/// Half of a box: its middle and `reach` pixels at either side weigh `whole`, those at its ends `part`; 24 bits of fraction.
struct Half {
    reach: usize,
    whole: u32,
    part: u32,
}

impl Half {
    /// The box that, laid over three times, spreads as a Gaussian of this deviation. Mixed types as in Pillow's C.
    fn of(radius: f32) -> Self {
        const ONE: u32 = 1 << 24;
        let variance = radius * radius / PASSES as f32;
        let length = (12.0 * f64::from(variance) + 1.0).sqrt() as f32;
        let whole = ((f64::from(length) - 1.0) / 2.0).floor() as f32;
        let mut part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance);
        part /= 6.0 * (variance - (whole + 1.0) * (whole + 1.0));
        let radius = whole + part;
        let reach = radius as usize;
        let weight = (ONE as f32 / (radius * 2.0 + 1.0)) as u32;
        // the box is never wider than its weights sum up to one
        let rest = ONE.saturating_sub((2 * reach as u32 + 1).saturating_mul(weight));
        Self {
            reach,
            whole: weight,
            part: rest / 2,
        }
    }

    /// One pass over one channel of a row.
    fn run(&self, from: &[u8], to: &mut [u8]) {
        let last = from.len().saturating_sub(1).cast_signed();
        let at = |i: isize| u32::from(from[i.clamp(0, last).cast_unsigned()]);
        let reach = self.reach.cast_signed();
        let mut sum: u32 = (-reach - 1..reach).fold(0, |sum, i| sum.wrapping_add(at(i)));
        for (x, out) in (0isize..).zip(to) {
            let left = at(x - reach - 1);
            sum = sum.wrapping_add(at(x + reach)).wrapping_sub(left);
            let ends = left + at(x + reach + 1);
            let value = sum
                .wrapping_mul(self.whole)
                .wrapping_add(ends.wrapping_mul(self.part));
            *out = (value.wrapping_add(1 << 23) >> 24) as u8;
        }
    }
}

fn box_rows(bytes: &mut [u8], channels: usize, width: usize, half: &Half) {
    bytes.par_chunks_mut(width * channels).for_each_init(
        || (vec![0; width], vec![0; width]),
        |(line, next), row| {
            for c in 0..channels {
                for (to, from) in line.iter_mut().zip(row.iter().skip(c).step_by(channels)) {
                    *to = *from;
                }
                for _ in 0..PASSES as usize {
                    half.run(line, next);
                    std::mem::swap(line, next);
                }
                for (to, from) in row.iter_mut().skip(c).step_by(channels).zip(&*line) {
                    *to = *from;
                }
            }
        },
    );
}

/// `[height, width, channels]` → `[width, height, channels]`.
fn transpose(bytes: &[u8], channels: usize, width: usize, height: usize) -> Vec<u8> {
    let mut out = vec![0; bytes.len()];
    out.par_chunks_mut(height * channels)
        .enumerate()
        .for_each(|(x, column)| {
            for (y, pixel) in column.chunks_mut(channels).enumerate() {
                pixel.copy_from_slice(&bytes[(y * width + x) * channels..][..channels]);
            }
        });
    out
}

/// OpenCV's `GaussianBlur` of bytes: weights with 8 bits of fraction whose rounding errors are passed on, the borders mirrored
/// (OpenCV 4.11 `getGaussianKernelFixedPoint_ED`, `BORDER_REFLECT_101`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CvBlur {
    /// Pixels of the kernel along x and y, both odd.
    pub kernel: (usize, usize),
    /// Standard deviations along x and y, in pixels; of no meaning where the kernel is one pixel.
    pub sigma: (f64, f64),
}

impl CvBlur {
    /// What A1111 does to an inpainting mask: `int(2.5 · blur + 0.5)` pixels at either side, and sigma `blur`. It blurs x and y one after the
    /// other, with a rounding in between: call it with 0 for the other.
    pub fn a1111(x: f64, y: f64) -> Self {
        let size = |blur: f64| 2 * ((2.5 * blur + 0.5) as usize).min(MAX_SIDE as usize) + 1;
        Self {
            kernel: (size(x), size(y)),
            sigma: (x, y),
        }
    }

    pub(super) fn run(self, bytes: &[u8], (width, height): (usize, usize)) -> Result<Vec<u8>> {
        let across = weights(self.kernel.0, self.sigma.0)?;
        let down = weights(self.kernel.1, self.sigma.1)?;
        let mut sums = vec![0u16; bytes.len()]; // 8 bits of fraction
        sums.par_chunks_mut(width)
            .zip(bytes.par_chunks(width))
            .for_each(|(sums, row)| {
                for (x, sum) in sums.iter_mut().enumerate() {
                    let taps = mirrored(x, across.len(), width).zip(&across);
                    let exact: u32 = taps.map(|(i, w)| u32::from(row[i]) * w).sum();
                    // weights sum up to 256
                    *sum = exact as u16;
                }
            });
        let mut out = vec![0u8; bytes.len()];
        out.par_chunks_mut(width).enumerate().for_each(|(y, out)| {
            let rows: Vec<usize> = mirrored(y, down.len(), height).collect();
            for (x, out) in out.iter_mut().enumerate() {
                let taps = rows.iter().zip(&down);
                let exact: u32 = taps.map(|(i, w)| u32::from(sums[i * width + x]) * w).sum();
                *out = ((exact + (1 << 15)) >> 16) as u8;
            }
        });
        Ok(out)
    }
}

/// The places that a kernel of `size` pixels reads around `center`.
fn mirrored(center: usize, size: usize, length: usize) -> impl Iterator<Item = usize> {
    let last = length.saturating_sub(1).cast_signed();
    let first = center.cast_signed() - (size / 2).cast_signed();
    (0..size.cast_signed()).map(move |i| {
        if last == 0 {
            return 0;
        }
        let place = (first + i).rem_euclid(2 * last);
        place.min(2 * last - place).cast_unsigned()
    })
}

/// A Gaussian of `size` weights that sum up to 256.
fn weights(size: usize, sigma: f64) -> Result<Vec<u32>> {
    if size == 1 {
        return Ok(vec![256]);
    }
    if size.is_multiple_of(2) || sigma <= 0.0 || !sigma.is_finite() {
        return Err(Error::Usage(format!(
            "a blur has a kernel of {size} pixels and sigma {sigma}, expected an odd number and more than 0"
        )));
    }
    let half = size / 2;
    let scale = -0.5 * 0.25 / (sigma * sigma);
    let exact: Vec<f64> = (0..half)
        .map(|i| {
            let x = (2 * (half - i)) as f64;
            (x * x * scale).exp()
        })
        .collect();
    let sum = 2.0 * exact.iter().sum::<f64>() + 1.0;
    let mut weights = vec![0u32; size];
    let (mut error, mut used) = (0.0, 0);
    for (i, value) in exact.into_iter().enumerate() {
        let wanted = value * (1.0 / sum) * 256.0 + error;
        let rounded = wanted.round_ties_even().max(0.0);
        error = wanted - rounded;
        let weight = rounded as u32; // at most 256
        weights[i] = weight;
        weights[size - 1 - i] = weight;
        used += 2 * weight;
    }
    weights[half] = 256u32.saturating_sub(used);
    Ok(weights)
}
