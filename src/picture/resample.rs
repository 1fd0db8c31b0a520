//! Resampling as Pillow 13 does it (`ImagingResample`, `ImagingScaleAffine`): a filter as wide as the pixels of the smaller picture, in fixed
//! point with 22 bits of fraction, along rows and along columns, rounded to bytes in between.

use rayon::prelude::*;

/// How pixels between pixels are found. Only [`Filter::Nearest`] does not average when a picture becomes smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Filter {
    /// The pixel that lies there.
    Nearest,
    /// The mean of what a pixel covers.
    Box,
    /// A triangle.
    Bilinear,
    /// Two pieces of a cubic, a = −1/2 (Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981).
    Bicubic,
    /// Sinc, windowed by its own middle three times as wide.
    #[default]
    Lanczos,
}

/// Bits behind the point of a weight.
const FRACTION: u32 = 22;

impl Filter {
    /// How far it reaches, in pixels of the smaller picture.
    fn support(self) -> f64 {
        match self {
            Self::Nearest => 0.0,
            Self::Box => 0.5,
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn at(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let sinc = |x: f64| {
            let x = x * std::f64::consts::PI;
            if x == 0.0 { 1.0 } else { x.sin() / x }
        };
        let away = x.abs();
        match self {
            Self::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Self::Bilinear => (1.0 - away).max(0.0),
            Self::Bicubic if away < 1.0 => ((A + 2.0) * away - (A + 3.0)) * away * away + 1.0,
            Self::Bicubic if away < 2.0 => (((away - 5.0) * away + 8.0) * away - 4.0) * A,
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Nearest | Self::Bicubic | Self::Lanczos => 0.0,
        }
    }
}

/// What one pixel of a new row is made of: where it begins, and the weights.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// Resizes bytes `[h, w, channels]`; `sizes` are width and height, old and new, all above 0.
pub(super) fn resample(
    bytes: &[u8],
    channels: usize,
    ((w, h), (new_w, new_h)): ((usize, usize), (usize, usize)),
    filter: Filter,
) -> Vec<u8> {
    if filter == Filter::Nearest {
        return nearest(bytes, channels, ((w, h), (new_w, new_h)));
    }
    let across = |bytes: &[u8]| match w == new_w {
        true => bytes.to_vec(),
        false => along_rows(bytes, channels, w, &taps(w, new_w, filter)),
    };
    let down = |bytes: &[u8], row: usize| match h == new_h {
        true => bytes.to_vec(),
        false => along_columns(bytes, row * channels, &taps(h, new_h, filter)),
    };
    match columns_first((w, h), (new_w, new_h)) {
        true => across(&down(bytes, w)),
        false => down(&across(bytes), new_w),
    }
}

/// Whether columns come before rows, which rounding shows: Pillow does so from version 13 on, where a picture loses more than twice as many rows as
/// columns.
fn columns_first((w, h): (usize, usize), (new_w, new_h): (usize, usize)) -> bool {
    new_h < h && 2 * w < 2 * new_w + (h - new_h)
}

/// The weights of every new pixel of a row.
fn taps(old: usize, new: usize, filter: Filter) -> Vec<Taps> {
    let scale = old as f64 / new as f64;
    let wide = scale.max(1.0);
    let (support, narrow) = (filter.support() * wide, 1.0 / wide);
    let one = f64::from(1u32 << FRACTION);
    (0..new)
        .map(|x| {
            let center = (x as f64 + 0.5) * scale;
            // the casts cut towards zero, and negative ones to zero
            let first = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(old);
            let mut weights: Vec<f64> = (first..end)
                .map(|i| filter.at((i as f64 - center + 0.5) * narrow))
                .collect();
            let sum: f64 = weights.iter().sum();
            if sum != 0.0 {
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
            let fixed = |weight: f64| (weight * one + 0.5f64.copysign(weight)) as i32;
            Taps {
                first,
                weights: weights.into_iter().map(fixed).collect(),
            }
        })
        .collect()
}

/// A sum of weighted bytes, rounded.
fn byte(sum: i32) -> u8 {
    (sum >> FRACTION).clamp(0, 255) as u8
}

/// One half.
const HALF: i32 = 1 << (FRACTION - 1);

fn along_rows(bytes: &[u8], channels: usize, width: usize, taps: &[Taps]) -> Vec<u8> {
    let rows = bytes.len() / (width * channels);
    let mut out = vec![0; rows * taps.len() * channels];
    out.par_chunks_mut(taps.len() * channels)
        .zip(bytes.par_chunks(width * channels))
        .for_each(|(out, row)| {
            for (pixel, taps) in out.chunks_mut(channels).zip(taps) {
                for (c, value) in pixel.iter_mut().enumerate() {
                    let from = row[taps.first * channels + c..].iter().step_by(channels);
                    let products = from.zip(&taps.weights);
                    *value = byte(products.fold(HALF, |sum, (&x, w)| sum + i32::from(x) * w));
                }
            }
        });
    out
}

/// `row`: bytes of a row.
fn along_columns(bytes: &[u8], row: usize, taps: &[Taps]) -> Vec<u8> {
    let mut out = vec![0; taps.len() * row];
    out.par_chunks_mut(row).zip(taps).for_each_init(
        Vec::new,
        |sums: &mut Vec<i32>, (out, taps)| {
            sums.clear();
            sums.resize(row, HALF);
            let rows = bytes[taps.first * row..].chunks_exact(row);
            for (from, weight) in rows.zip(&taps.weights) {
                for (sum, &x) in sums.iter_mut().zip(from) {
                    *sum += i32::from(x) * weight;
                }
            }
            for (out, &sum) in out.iter_mut().zip(&*sums) {
                *out = byte(sum);
            }
        },
    );
    out
}

fn nearest(
    bytes: &[u8],
    channels: usize,
    ((w, h), (new_w, new_h)): ((usize, usize), (usize, usize)),
) -> Vec<u8> {
    // places are summed up as Pillow sums them up: multiplied they would round otherwise
    let places = |old: usize, new: usize| -> Vec<usize> {
        let step = old as f64 / new as f64;
        let mut at = step * 0.5;
        (0..new)
            .map(|_| {
                let place = (at as usize).min(old - 1);
                at += step;
                place
            })
            .collect()
    };
    let (columns, rows) = (places(w, new_w), places(h, new_h));
    let mut out = Vec::with_capacity(new_w * new_h * channels);
    for y in rows {
        let row = &bytes[y * w * channels..][..w * channels];
        for &x in &columns {
            out.extend_from_slice(&row[x * channels..][..channels]);
        }
    }
    out
}
