//! Pictures that come in: read from files, cut, resized and blurred, with the arithmetic of Pillow (and of OpenCV where a function says so),
//! byte for byte.
//!
//! [`Picture`] is RGB with 8 bits a channel and perhaps a plane of alpha; [`Grey`] is one plane, such as a mask.

mod blur;
mod open;
mod resample;

pub use self::blur::CvBlur;
pub use self::resample::Filter;

use crate::error::{Error, Result};
use crate::output::Image;

/// The longest side of a picture, in pixels.
pub const MAX_SIDE: u32 = 16_384;

/// A picture with 8 bits a channel. Its sides are 1 to [`MAX_SIDE`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    width: u32,
    height: u32,
    /// `[height, width, 3]`, rows from the top.
    rgb: Vec<u8>,
    /// `[height, width]`, 255 is opaque.
    alpha: Option<Vec<u8>>,
}

/// One plane with 8 bits a pixel. Its sides are 1 to [`MAX_SIDE`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grey {
    width: u32,
    height: u32,
    /// `[height, width]`, rows from the top.
    values: Vec<u8>,
}

/// Part of a picture, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rect {
    /// Pixels left of it.
    pub left: u32,
    /// Pixels above it.
    pub top: u32,
    /// Pixels of a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

impl Picture {
    /// A picture of bytes `[height, width, 3]`.
    ///
    /// # Errors
    /// [`Error::Usage`] when a side is 0 or above [`MAX_SIDE`], or the bytes do not fit.
    pub fn from_rgb(width: u32, height: u32, rgb: Vec<u8>) -> Result<Self> {
        check(width, height, 3, rgb.len())?;
        Ok(Self {
            width,
            height,
            rgb,
            alpha: None,
        })
    }

    /// The same picture with another plane of alpha, or none.
    ///
    /// # Errors
    /// [`Error::Usage`] when the plane has another size.
    pub fn with_alpha(mut self, alpha: Option<Grey>) -> Result<Self> {
        if let Some(alpha) = &alpha {
            same((self.width, self.height), (alpha.width, alpha.height))?;
        }
        self.alpha = alpha.map(|plane| plane.values);
        Ok(self)
    }

    /// Pixels a row.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// `[height, width, 3]`, rows from the top.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// The plane of alpha, if there is one; 255 is opaque.
    pub fn alpha(&self) -> Option<Grey> {
        self.alpha.clone().map(|values| Grey {
            width: self.width,
            height: self.height,
            values,
        })
    }

    /// Luma as Pillow's `convert("L")` has it (ITU-R 601-2, 16 bits of fraction); alpha does not count.
    pub fn to_luma(&self) -> Grey {
        let luma = |p: &[u8]| {
            let sum = 19_595 * u32::from(p[0]) + 38_470 * u32::from(p[1]) + 7_471 * u32::from(p[2]);
            // at most 255
            ((sum + 0x8000) >> 16) as u8
        };
        Grey {
            width: self.width,
            height: self.height,
            values: self.rgb.chunks_exact(3).map(luma).collect(),
        }
    }

    /// The channels as planes `[3, height, width]`, 0 to 1.
    pub fn to_planar(&self) -> Vec<f32> {
        (0..3)
            .flat_map(|c| self.rgb.iter().skip(c).step_by(3))
            .map(|&value| f32::from(value) / 255.0)
            .collect()
    }

    /// The picture of planes `[3, height, width]`, 0 to 1: clipped, times 255, rounded half to even.
    ///
    /// # Errors
    /// [`Error::Usage`] when the values do not fit the size; [`Error::Numeric`] when one is not finite.
    pub fn from_planar(width: u32, height: u32, planes: &[f32]) -> Result<Self> {
        check(width, height, 3, planes.len())?;
        let broken = planes.iter().filter(|value| !value.is_finite()).count();
        if broken > 0 {
            return Err(Error::Numeric(format!(
                "{broken} of a picture's {} values are not finite numbers; compute in f32 (--dtype f32)",
                planes.len()
            )));
        }
        let (red, rest) = planes.split_at(planes.len() / 3);
        let (green, blue) = rest.split_at(planes.len() / 3);
        // 0 … 255 after the clamp
        let byte = |value: f32| (value.clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
        let mut rgb = Vec::with_capacity(planes.len());
        for ((&r, &g), &b) in red.iter().zip(green).zip(blue) {
            rgb.extend([byte(r), byte(g), byte(b)]);
        }
        Self::from_rgb(width, height, rgb)
    }

    /// The picture in another size, as Pillow's `resize`: alpha weighs the colours, except with [`Filter::Nearest`].
    ///
    /// # Errors
    /// [`Error::Usage`] when a side is 0 or above [`MAX_SIDE`].
    pub fn resize(&self, width: u32, height: u32, filter: Filter) -> Result<Self> {
        check_sides(width, height)?;
        if (width, height) == (self.width, self.height) {
            return Ok(self.clone());
        }
        let sizes = (
            (self.width as usize, self.height as usize),
            (width as usize, height as usize),
        );
        let weighed = filter != Filter::Nearest;
        let alpha = self.alpha.as_ref();
        let mut rgb = match alpha {
            Some(alpha) if weighed => {
                resample::resample(&multiplied(&self.rgb, alpha), 3, sizes, filter)
            }
            _ => resample::resample(&self.rgb, 3, sizes, filter),
        };
        let alpha = alpha.map(|alpha| resample::resample(alpha, 1, sizes, filter));
        if let (Some(alpha), true) = (&alpha, weighed) {
            divide(&mut rgb, alpha);
        }
        Ok(Self {
            width,
            height,
            rgb,
            alpha,
        })
    }

    /// A part of the picture.
    ///
    /// # Errors
    /// [`Error::Usage`] when it is empty or reaches over an edge.
    pub fn crop(&self, part: Rect) -> Result<Self> {
        let size = (self.width, self.height);
        let rgb = cut(&self.rgb, 3, size, part)?;
        let alpha = match &self.alpha {
            Some(alpha) => Some(cut(alpha, 1, size, part)?),
            None => None,
        };
        Ok(Self {
            width: part.width,
            height: part.height,
            rgb,
            alpha,
        })
    }

    /// Puts the colours of `other` over this picture, its corner at `left`, `top`; what lies outside is left out, alpha stays.
    pub fn paste(&mut self, other: &Self, left: i64, top: i64) {
        let (Some((from, to, columns)), Some((above, below, rows))) = (
            overlap(other.width, self.width, left),
            overlap(other.height, self.height, top),
        ) else {
            return;
        };
        let (wide, wide_other) = (self.width as usize * 3, other.width as usize * 3);
        for row in 0..rows {
            let source = &other.rgb[(above + row) * wide_other + from * 3..][..columns * 3];
            self.rgb[(below + row) * wide + to * 3..][..columns * 3].copy_from_slice(source);
        }
    }

    /// This picture where `mask` is black, `other` where it is white, and between by its grey, as Pillow's `Image.composite` mixes. Alpha stays.
    ///
    /// # Errors
    /// [`Error::Usage`] when sizes differ.
    pub fn blend(&self, other: &Self, mask: &Grey) -> Result<Self> {
        let size = (self.width, self.height);
        same(size, (other.width, other.height))?;
        same(size, (mask.width, mask.height))?;
        let mut mixed = self.clone();
        let pixels = mixed.rgb.chunks_exact_mut(3).zip(other.rgb.chunks_exact(3));
        for ((own, other), &mask) in pixels.zip(&mask.values) {
            for (own, &other) in own.iter_mut().zip(other) {
                let sum =
                    u32::from(*own) * u32::from(255 - mask) + u32::from(other) * u32::from(mask);
                *own = divide_by_255(sum);
            }
        }
        Ok(mixed)
    }

    /// Pillow's `GaussianBlur(radius)` of the colours; alpha stays.
    ///
    /// # Errors
    /// [`Error::Usage`] when the radius is negative, above [`MAX_SIDE`] or no number.
    pub fn gaussian_blur(&self, radius: f32) -> Result<Self> {
        let size = (self.width as usize, self.height as usize);
        Ok(Self {
            rgb: blur::gaussian(&self.rgb, 3, size, radius)?,
            ..self.clone()
        })
    }

    /// Without alpha, as files are written.
    pub fn into_image(self) -> Image {
        Image {
            width: self.width,
            height: self.height,
            rgb: self.rgb,
        }
    }
}

impl TryFrom<Image> for Picture {
    type Error = Error;

    fn try_from(image: Image) -> Result<Self> {
        Self::from_rgb(image.width, image.height, image.rgb)
    }
}

impl Grey {
    /// A plane of bytes `[height, width]`.
    ///
    /// # Errors
    /// [`Error::Usage`] when a side is 0 or above [`MAX_SIDE`], or the bytes do not fit.
    pub fn new(width: u32, height: u32, values: Vec<u8>) -> Result<Self> {
        check(width, height, 1, values.len())?;
        Ok(Self {
            width,
            height,
            values,
        })
    }

    /// Pixels a row.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// `[height, width]`, rows from the top.
    pub fn values(&self) -> &[u8] {
        &self.values
    }

    /// The plane with every value changed.
    #[must_use]
    pub fn map(mut self, change: impl Fn(u8) -> u8) -> Self {
        self.values
            .iter_mut()
            .for_each(|value| *value = change(*value));
        self
    }

    /// White where this is black.
    #[must_use]
    pub fn invert(self) -> Self {
        self.map(|value| 255 - value)
    }

    /// A grey picture.
    pub fn to_picture(&self) -> Picture {
        Picture {
            width: self.width,
            height: self.height,
            rgb: self.values.iter().flat_map(|&value| [value; 3]).collect(),
            alpha: None,
        }
    }

    /// The plane in another size, as Pillow's `resize` of mode `L`.
    ///
    /// # Errors
    /// [`Error::Usage`] when a side is 0 or above [`MAX_SIDE`].
    pub fn resize(&self, width: u32, height: u32, filter: Filter) -> Result<Self> {
        check_sides(width, height)?;
        if (width, height) == (self.width, self.height) {
            return Ok(self.clone());
        }
        let sizes = (
            (self.width as usize, self.height as usize),
            (width as usize, height as usize),
        );
        Self::new(
            width,
            height,
            resample::resample(&self.values, 1, sizes, filter),
        )
    }

    /// A part of the plane.
    ///
    /// # Errors
    /// [`Error::Usage`] when it is empty or reaches over an edge.
    pub fn crop(&self, part: Rect) -> Result<Self> {
        let values = cut(&self.values, 1, (self.width, self.height), part)?;
        Self::new(part.width, part.height, values)
    }

    /// The smallest part that holds all that is not 0, as Pillow's `getbbox`; none when there is nothing.
    pub fn bounds(&self) -> Option<Rect> {
        let wide = self.width as usize;
        let filled = |row: &[u8]| row.iter().any(|&value| value > 0);
        let rows = || self.values.chunks_exact(wide);
        let (top, bottom) = (rows().position(filled)?, rows().rposition(filled)?);
        let column = |x: &usize| rows().any(|row| row[*x] > 0);
        let (left, right) = ((0..wide).find(column)?, (0..wide).rev().find(column)?);
        // all below MAX_SIDE
        Some(Rect {
            left: left as u32,
            top: top as u32,
            width: (right + 1 - left) as u32,
            height: (bottom + 1 - top) as u32,
        })
    }

    /// Pillow's `GaussianBlur(radius)`.
    ///
    /// # Errors
    /// [`Error::Usage`] when the radius is negative, above [`MAX_SIDE`] or no number.
    pub fn gaussian_blur(&self, radius: f32) -> Result<Self> {
        let size = (self.width as usize, self.height as usize);
        Self::new(
            self.width,
            self.height,
            blur::gaussian(&self.values, 1, size, radius)?,
        )
    }

    /// OpenCV's `GaussianBlur` on bytes; see [`CvBlur::a1111`] for what A1111 does to masks.
    ///
    /// # Errors
    /// [`Error::Usage`] when a kernel's size is even or a sigma not above 0.
    pub fn cv_blur(&self, blur: CvBlur) -> Result<Self> {
        let size = (self.width as usize, self.height as usize);
        Self::new(self.width, self.height, blur.run(&self.values, size)?)
    }
}

/// `sum / 255`, rounded, as Pillow computes it; for sums up to 255².
fn divide_by_255(sum: u32) -> u8 {
    let sum = sum + 128;
    // at most 255
    (((sum >> 8) + sum) >> 8) as u8
}

/// Colours times alpha (Pillow's mode `RGBa`).
fn multiplied(rgb: &[u8], alpha: &[u8]) -> Vec<u8> {
    let weigh = |(pixel, &alpha): (&[u8], &u8)| {
        [0, 1, 2].map(|c: usize| divide_by_255(u32::from(pixel[c]) * u32::from(alpha)))
    };
    rgb.chunks_exact(3).zip(alpha).flat_map(weigh).collect()
}

/// Takes back [`multiplied`].
fn divide(rgb: &mut [u8], alpha: &[u8]) {
    for (pixel, &alpha) in rgb.chunks_exact_mut(3).zip(alpha) {
        if alpha > 0 && alpha < 255 {
            for value in pixel {
                *value = (255 * u32::from(*value) / u32::from(alpha)).min(255) as u8;
            }
        }
    }
}

/// Copies a part out of bytes.
fn cut(bytes: &[u8], channels: usize, size: (u32, u32), part: Rect) -> Result<Vec<u8>> {
    let inside = |first: u32, count: u32, all: u32| {
        count > 0 && first.checked_add(count).is_some_and(|end| end <= all)
    };
    if !inside(part.left, part.width, size.0) || !inside(part.top, part.height, size.1) {
        return Err(Error::Usage(format!(
            "a part of {}x{} pixels at {},{} does not lie inside a picture of {}x{}",
            part.width, part.height, part.left, part.top, size.0, size.1
        )));
    }
    let wide = size.0 as usize * channels;
    let (first, count) = (
        part.left as usize * channels,
        part.width as usize * channels,
    );
    Ok(bytes
        .chunks_exact(wide)
        .skip(part.top as usize)
        .take(part.height as usize)
        .flat_map(|row| &row[first..first + count])
        .copied()
        .collect())
}

/// Of a side laid over another one at `offset`: where what is seen begins in it and in the other, and how much that is.
fn overlap(side: u32, other: u32, offset: i64) -> Option<(usize, usize, usize)> {
    let (from, to) = (offset.min(0).unsigned_abs(), offset.max(0).unsigned_abs());
    let count = u64::from(side)
        .saturating_sub(from)
        .min(u64::from(other).saturating_sub(to));
    // all below MAX_SIDE where anything is seen
    (count > 0).then_some((from as usize, to as usize, count as usize))
}

fn same(size: (u32, u32), other: (u32, u32)) -> Result<()> {
    if size == other {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "two pictures have {}x{} and {}x{} pixels, expected one size",
        size.0, size.1, other.0, other.1
    )))
}

fn check_sides(width: u32, height: u32) -> Result<()> {
    if (1..=MAX_SIDE).contains(&width) && (1..=MAX_SIDE).contains(&height) {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "a picture of {width}x{height} pixels is not possible, expected 1 to {MAX_SIDE} a side"
    )))
}

fn check(width: u32, height: u32, channels: usize, count: usize) -> Result<()> {
    check_sides(width, height)?;
    if width as usize * height as usize * channels == count {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "a picture of {width}x{height} pixels holds {count} values, expected {channels} a pixel"
    )))
}
