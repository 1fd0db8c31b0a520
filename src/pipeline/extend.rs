//! A picture on a larger canvas, with a mask over what is new: what is painted then extends it past its edges.

use super::scene::surroundings;
use crate::error::Result;
use crate::picture::{Grey, Picture};

/// Pixels to add at each side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Margins {
    /// At the left.
    pub left: u32,
    /// Above.
    pub top: u32,
    /// At the right.
    pub right: u32,
    /// Below.
    pub bottom: u32,
}

impl Margins {
    /// The most at one side.
    pub const MOST: u32 = 8192;

    /// The same at every side.
    pub fn all(pixels: u32) -> Self {
        Self {
            left: pixels,
            top: pixels,
            right: pixels,
            bottom: pixels,
        }
    }
}

/// What stands beyond the edges, before it is painted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum ExtendFill {
    /// The pixels of the edge, drawn out.
    #[default]
    Edge,
    /// The picture mirrored.
    Mirror,
    /// The colours near the edge, blurred.
    Blur,
    /// Pixels from near the edge, at random.
    Noise,
}

/// How a picture is extended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extend {
    /// How far.
    pub margins: Margins,
    /// Pixels inside the old edges over which the mask fades.
    pub feather: u32,
    /// What stands there before.
    pub fill: ExtendFill,
}

impl Extend {
    /// Pixels of [`Extend::feather`] when nobody says.
    pub const FEATHER: u32 = 40;

    /// The picture on its canvas and the mask over what is new; `mask` is what of the old picture is painted anew besides.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] when the canvas would be too large.
    pub fn apply(&self, picture: &Picture, mask: Option<&Grey>) -> Result<(Picture, Grey)> {
        let Margins {
            left,
            top,
            right,
            bottom,
        } = self.margins;
        let wide = |side: u32, before: u32, after: u32| side.saturating_add(before + after);
        let (width, height) = (
            wide(picture.width(), left, right),
            wide(picture.height(), top, bottom),
        );
        let inner = (picture.width() as usize, picture.height() as usize);
        let at = |x: u32, y: u32| {
            self.source(
                (
                    i64::from(x) - i64::from(left),
                    i64::from(y) - i64::from(top),
                ),
                inner,
            )
        };
        // a canvas that is too large is refused before it is filled
        Grey::new(width, 1, vec![0; width as usize])?;
        Grey::new(1, height, vec![0; height as usize])?;
        let mut rgb = Vec::with_capacity(3 * width as usize * height as usize);
        let mut covered = Vec::with_capacity(width as usize * height as usize);
        let mut outside = Vec::with_capacity(covered.capacity());
        for y in 0..height {
            for x in 0..width {
                let (px, py) = at(x, y);
                let pixel = 3 * (py * inner.0 + px);
                rgb.extend_from_slice(&picture.rgb()[pixel..pixel + 3]);
                let place = (
                    i64::from(x) - i64::from(left),
                    i64::from(y) - i64::from(top),
                );
                let old = mask.map_or(0, |mask| mask.values()[py * inner.0 + px]);
                let cover = self.cover(place, inner);
                outside.push(if cover.is_none() { 255 } else { 0 });
                covered.push(cover.unwrap_or(255).max(old));
            }
        }
        let canvas = Picture::from_rgb(width, height, rgb)?;
        let covered = Grey::new(width, height, covered)?;
        if self.fill == ExtendFill::Blur {
            let outside = Grey::new(width, height, outside)?;
            return Ok((surroundings(&canvas, &outside)?, covered));
        }
        Ok((canvas, covered))
    }

    /// The pixel of the old picture that stands at a place, counted from its corner.
    fn source(&self, (x, y): (i64, i64), (width, height): (usize, usize)) -> (usize, usize) {
        let clamped =
            |place: i64, side: usize| usize::try_from(place.clamp(0, side as i64 - 1)).unwrap_or(0);
        let near = (clamped(x, width), clamped(y, height));
        let inside = near
            == (
                usize::try_from(x).unwrap_or(usize::MAX),
                usize::try_from(y).unwrap_or(usize::MAX),
            );
        match self.fill {
            _ if inside => near,
            ExtendFill::Edge | ExtendFill::Blur => near,
            ExtendFill::Mirror => (mirrored(x, width), mirrored(y, height)),
            ExtendFill::Noise => {
                /// How far from the edge pixels are taken.
                const BAND: u64 = 64;
                let random = scattered(x, y);
                let shift = |place: usize, side: usize, random: u64| {
                    let offset = (random % (2 * BAND + 1)) as i64 - BAND as i64;
                    mirrored(place as i64 + offset, side)
                };
                (
                    shift(near.0, width, random),
                    shift(near.1, height, random >> 32),
                )
            }
        }
    }

    /// How much of an old pixel is painted anew: all of it at the edge, less and less inside (as ComfyUI pads for outpainting). None outside.
    fn cover(&self, (x, y): (i64, i64), (width, height): (usize, usize)) -> Option<u8> {
        let (width, height) = (width as i64, height as i64);
        if x < 0 || y < 0 || x >= width || y >= height {
            return None;
        }
        let feather = i64::from(self.feather).min(width.min(height) / 2);
        let sides = [
            (self.margins.left, x),
            (self.margins.top, y),
            (self.margins.right, width - 1 - x),
            (self.margins.bottom, height - 1 - y),
        ];
        let distance = sides
            .iter()
            .filter(|(margin, _)| *margin > 0)
            .map(|(_, distance)| *distance)
            .min()?;
        if distance >= feather {
            return Some(0);
        }
        let part = (feather - distance) as f64 / feather as f64;
        Some((part * part * 255.0).round() as u8)
    }
}

/// A place reflected into a side, as often as it takes.
fn mirrored(place: i64, side: usize) -> usize {
    let period = 2 * side as i64;
    let place = place.rem_euclid(period);
    usize::try_from(place.min(period - 1 - place)).unwrap_or(0)
}

/// Bits that depend on a place and nothing else (splitmix64's finaliser).
fn scattered(x: i64, y: i64) -> u64 {
    let seed = (x as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (y as u64).rotate_left(32);
    let bits = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn picture() -> Picture {
        let rgb = (0..20 * 12).flat_map(|i| [i as u8, 7, 255 - i as u8]);
        Picture::from_rgb(20, 12, rgb.collect()).unwrap()
    }

    #[test]
    fn the_old_picture_stays_where_it_is() {
        for fill in [
            ExtendFill::Edge,
            ExtendFill::Mirror,
            ExtendFill::Blur,
            ExtendFill::Noise,
        ] {
            let extend = Extend {
                margins: Margins {
                    left: 5,
                    bottom: 30,
                    ..Margins::default()
                },
                feather: 4,
                fill,
            };
            let (canvas, mask) = extend.apply(&picture(), None).unwrap();
            assert_eq!((canvas.width(), canvas.height()), (25, 42));
            let inner = crate::picture::Rect {
                left: 5,
                top: 0,
                width: 20,
                height: 12,
            };
            assert_eq!(canvas.crop(inner).unwrap(), picture(), "{fill:?}");
            let at = |x: usize, y: usize| mask.values()[y * 25 + x];
            assert_eq!((at(0, 0), at(10, 20)), (255, 255));
            // full at the seam, fading inside, nothing at the sides that stay
            assert_eq!((at(5, 0), at(6, 0), at(9, 0), at(24, 0)), (255, 143, 0, 0));
        }
    }

    #[test]
    fn mirrors_repeat() {
        let places: Vec<usize> = (-4..8).map(|place| mirrored(place, 3)).collect();
        assert_eq!(places, [2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0, 1]);
    }
}
