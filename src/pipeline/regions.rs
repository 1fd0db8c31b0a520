//! Prompts for parts of a picture: where several have a say, predictions are averaged by their weights (ComfyUI's rule for masked conditionings).

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};

/// A prompt for a part of the picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Region {
    /// What to show there.
    pub prompt: String,
    /// Where.
    pub place: Place,
    /// How much it counts; the prompt of the whole picture counts 1.
    pub weight: f64,
}

/// A part of a picture.
#[derive(Debug, Clone, PartialEq)]
pub enum Place {
    /// Left, top, width and height: parts of the picture if none is above 1, else pixels.
    Box([f64; 4]),
    /// Values from 0 to 1, row by row, of any size: stretched to the picture's.
    Mask {
        /// Pixels of a row.
        width: usize,
        /// Rows.
        height: usize,
        /// `width · height` of them.
        values: Vec<f32>,
    },
}

/// Prompts for parts of the picture beside that of the whole.
#[derive(Debug, Clone, PartialEq)]
pub struct Regions {
    /// The parts.
    pub list: Vec<Region>,
    /// How much the prompt of the whole picture counts.
    pub base: f64,
}

impl Default for Regions {
    fn default() -> Self {
        Self {
            list: Vec::new(),
            base: 1.0,
        }
    }
}

impl Regions {
    /// The weight of each prompt at each latent, `[1, 1, h, w]`, that of the whole picture first; together they are 1 everywhere. `scale` is how
    /// many pixels a latent has.
    ///
    /// # Errors
    /// [`Error::Usage`] for a place outside the picture, a weight that is none, or a latent at which no prompt counts.
    pub(super) fn weights(&self, (w, h): (usize, usize), scale: usize) -> Result<Vec<Vec<f32>>> {
        if !(0.0..=1000.0).contains(&self.base) {
            return Err(Error::Usage(format!(
                "--region-base is {}, expected 0 to 1000",
                self.base
            )));
        }
        let mut all = vec![vec![self.base as f32; w * h]];
        for region in &self.list {
            if !(0.0..=1000.0).contains(&region.weight) {
                return Err(Error::Usage(format!(
                    "the weight of --region {:?} is {}, expected 0 to 1000",
                    region.prompt, region.weight
                )));
            }
            let mut mask = region.place.at((w, h), scale)?;
            mask.iter_mut().for_each(|m| *m *= region.weight as f32);
            all.push(mask);
        }
        for at in 0..w * h {
            let sum: f32 = all.iter().map(|mask| mask[at]).sum();
            if sum <= 0.0 {
                return Err(Error::Usage(format!(
                    "no prompt counts at pixel {},{}; give --region-base above 0, or regions that cover the picture",
                    at % w * scale,
                    at / w * scale
                )));
            }
            all.iter_mut().for_each(|mask| mask[at] /= sum);
        }
        Ok(all)
    }
}

impl Place {
    /// 0 to 1 at each latent of a picture of `w × h`.
    fn at(&self, (w, h): (usize, usize), scale: usize) -> Result<Vec<f32>> {
        match self {
            Self::Box(sides) => boxed(*sides, (w, h), scale),
            Self::Mask {
                width,
                height,
                values,
            } => {
                if values.len() != width * height || values.is_empty() {
                    return Err(Error::Usage(format!(
                        "a mask of {width}x{height} pixels has {} values",
                        values.len()
                    )));
                }
                if !values.iter().all(|v| (0.0..=1.0).contains(v)) {
                    return Err(Error::Usage(
                        "a mask has values outside of 0 to 1".to_owned(),
                    ));
                }
                Ok(stretched(values, (*width, *height), (w, h)))
            }
        }
    }
}

/// Whole latents: of pixels those that lie inside, of parts the nearest.
fn boxed(sides: [f64; 4], (w, h): (usize, usize), scale: usize) -> Result<Vec<f32>> {
    let [x, y, width, height] = sides;
    let possible = sides.iter().all(|side| (0.0..=65_536.0).contains(side));
    let parts = sides.iter().all(|side| *side <= 1.0);
    let (left, top, across, down) = match parts {
        true => (
            (x * w as f64).round_ties_even(),
            (y * h as f64).round_ties_even(),
            (width * w as f64).round_ties_even().max(1.0),
            (height * h as f64).round_ties_even().max(1.0),
        ),
        false => {
            let latents = |pixels: f64| (pixels / scale as f64).floor();
            (latents(x), latents(y), latents(width), latents(height))
        }
    };
    if !possible || across < 1.0 || down < 1.0 || left >= w as f64 || top >= h as f64 {
        return Err(Error::Usage(format!(
            "--region {x},{y},{width},{height} is no part of a picture of {}x{} pixels, expected LEFT,TOP,WIDTH,HEIGHT inside it, at least {scale} pixels wide and high",
            w * scale,
            h * scale
        )));
    }
    let inside = |at: usize, from: f64, count: f64| {
        (from as usize..from as usize + count as usize).contains(&at)
    };
    Ok((0..w * h)
        .map(|i| inside(i % w, left, across) && inside(i / w, top, down))
        .map(|inside| if inside { 1.0 } else { 0.0 })
        .collect())
}

/// Bilinear between pixels' middles, as `torch.nn.functional.interpolate` with `align_corners=False` has it.
fn stretched(values: &[f32], (sw, sh): (usize, usize), (w, h): (usize, usize)) -> Vec<f32> {
    let along = |i: usize, n: usize, source: usize| {
        let ratio = source as f32 / n as f32;
        let at = ((i as f32 + 0.5) * ratio - 0.5).max(0.0);
        let low = (at as usize).min(source - 1);
        (low, (low + 1).min(source - 1), at - low as f32)
    };
    (0..w * h)
        .map(|i| {
            let (top, bottom, dy) = along(i / w, h, sh);
            let (left, right, dx) = along(i % w, w, sw);
            let row = |y: usize| values[y * sw + left] * (1.0 - dx) + values[y * sw + right] * dx;
            row(top) * (1.0 - dy) + row(bottom) * dy
        })
        .collect()
}

/// The mean of predictions `[n, c, h, w]` by their weights, one set for each.
pub(super) fn averaged(predictions: &[Tensor], weights: &[Vec<f32>]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (prediction, weights) in predictions.iter().zip(weights) {
        let (_, _, h, w) = prediction.dims4()?;
        let weights = Tensor::from_slice(weights, (1, 1, h, w), &Device::Cpu)?;
        let part = prediction.broadcast_mul(&weights.to_device(prediction.device())?)?;
        sum = Some(match sum {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    sum.ok_or_else(|| Error::Numeric("regions need predictions".to_owned()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn weights(sides: [f64; 4], base: f64) -> Result<Vec<Vec<f32>>> {
        let region = Region {
            prompt: "a fox".to_owned(),
            place: Place::Box(sides),
            weight: 3.0,
        };
        let list = vec![region];
        Regions { list, base }.weights((4, 3), 8)
    }

    #[test]
    fn boxes_are_pixels_or_parts() {
        let pixels = weights([8.0, 0.0, 17.0, 16.0], 1.0).unwrap();
        let parts = weights([0.25, 0.0, 0.5, 0.6], 1.0).unwrap();
        assert_eq!(pixels, parts);
        let inside = [1, 2, 5, 6];
        for (i, (base, region)) in pixels[0].iter().zip(&pixels[1]).enumerate() {
            let want = if inside.contains(&i) { 0.75 } else { 0.0 };
            assert_eq!((*region, *base), (want, 1.0 - want), "{i}");
        }
        // what no prompt covers, and what is no part of the picture
        assert!(weights([8.0, 0.0, 17.0, 16.0], 0.0).is_err());
        assert!(weights([0.0, 0.0, 1.0, 1.0], 0.0).is_ok());
        for wrong in [[32.0, 0.0, 8.0, 8.0], [0.0, 0.0, 7.0, 8.0], [f64::NAN; 4]] {
            assert!(weights(wrong, 1.0).is_err(), "{wrong:?}");
        }
    }
}
