//! Dynamic thresholding with a mimicked scale: the estimate of x₀ under a high scale is brought into the range that a low one has (the extension
//! sd-dynamic-thresholding, MIT; its parameters under its names).

use candle_core::Tensor;

use super::rules::{by_picture, deviation};
use crate::error::Result;
use crate::sampling::quantile;

/// What is mimicked, and how ranges are measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mimic {
    /// The scale whose range is kept.
    pub scale: f64,
    /// The part of the values, 0 to 100, that the range of the high scale holds.
    pub percentile: f64,
    /// How much of the result counts; the rest is as without.
    pub phi: f64,
    /// What a range is.
    pub measure: Measure,
    /// Values are scaled around 0, not around their mean.
    pub from_zero: bool,
    /// Channels share one range.
    pub together: bool,
}

/// What the range of values is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Measure {
    /// The largest absolute value
    #[default]
    Ad,
    /// The standard deviation
    Std,
}

impl Mimic {
    /// The estimate of x₀ from those of both prompts, `[n, c, h, w]`.
    pub(super) fn denoised(
        &self,
        scale: f64,
        (negative, prompt): (&Tensor, &Tensor),
    ) -> Result<Tensor> {
        let pixels = negative.dims().iter().skip(2).product::<usize>().max(1);
        by_picture(&[negative, prompt], |slices, out| {
            let &[negative, prompt] = slices else { return };
            let guided = |scale: f64| -> Vec<f32> {
                let pairs = negative.iter().zip(prompt);
                pairs.map(|(n, p)| n + (p - n) * scale as f32).collect()
            };
            let (low, high) = (guided(self.scale), guided(scale));
            let span = if self.together { low.len() } else { pixels };
            let means = means(&high, pixels);
            let (low, centred) = (centred(&low, pixels), centred(&high, pixels));
            for (i, out) in out.chunks_mut(span).enumerate() {
                let at = i * span..i * span + out.len();
                let ranges = self.ranges(&low[at.clone()], &centred[at.clone()]);
                for (out, i) in out.iter_mut().zip(at) {
                    let mean = means[i / pixels];
                    let brought = self.brought((high[i], mean), ranges);
                    *out = brought * self.phi as f32 + high[i] * (1.0 - self.phi as f32);
                }
            }
        })
    }

    /// The ranges of what the low and the high scale give, both around their means.
    fn ranges(&self, low: &[f32], high: &[f32]) -> (f32, f32) {
        match self.measure {
            Measure::Std => (deviation(low) as f32, deviation(high) as f32),
            Measure::Ad => (
                sizes(low).into_iter().fold(0.0, f64::max) as f32,
                quantile(sizes(high), self.percentile / 100.0) as f32,
            ),
        }
    }

    /// A value in the range of the low scale.
    fn brought(&self, (value, mean): (f32, f32), (low, high): (f32, f32)) -> f32 {
        if self.from_zero {
            return value * (low / high);
        }
        let centred = value - mean;
        match self.measure {
            Measure::Std => centred / high * low + mean,
            Measure::Ad => {
                let most = low.max(high);
                centred.clamp(-most, most) / most * low + mean
            }
        }
    }
}

fn sizes(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.abs())).collect()
}

/// The mean of every channel.
fn means(x: &[f32], pixels: usize) -> Vec<f32> {
    let mean = |x: &[f32]| x.iter().map(|&x| f64::from(x)).sum::<f64>() / x.len() as f64;
    x.chunks(pixels).map(|x| mean(x) as f32).collect()
}

/// Every channel around its mean.
fn centred(x: &[f32], pixels: usize) -> Vec<f32> {
    let channels = x.chunks(pixels).zip(means(x, pixels));
    channels
        .flat_map(|(channel, mean)| channel.iter().map(move |x| x - mean))
        .collect()
}
