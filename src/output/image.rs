//! A finished picture: what the autoencoder decoded, as the bytes that go into a file.

use crate::error::{Error, Result};

/// An RGB picture with 8 bits a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Pixels a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `[height, width, 3]`, rows from the top, no padding.
    pub rgb: Vec<u8>,
}

impl Image {
    /// Converts one decoded picture: `planar` is `[3, height, width]`, row-major, nominally in -1 … 1 (values outside are clipped).
    ///
    /// The arithmetic is that of diffusers' `VaeImageProcessor` (`denormalize`, then `numpy_to_pil`), all in f32: halve, add one half,
    /// clip to 0 … 1, times 255, round half to even as numpy does. So the bytes are those that diffusers would save.
    ///
    /// # Errors
    /// [`Error::Usage`] when the length does not fit the size; [`Error::Numeric`] when a value is not finite, so that an overflow in
    /// the decoder never becomes a black picture.
    pub fn from_planar(planar: &[f32], width: usize, height: usize) -> Result<Self> {
        let pixels = width.checked_mul(height);
        if pixels.and_then(|n| n.checked_mul(3)) != Some(planar.len()) {
            return Err(Error::Usage(format!(
                "a decoded picture of {width}x{height} holds {} values, expected [3, {height}, {width}]",
                planar.len()
            )));
        }
        let broken = planar.iter().filter(|value| !value.is_finite()).count();
        if broken > 0 {
            return Err(Error::Numeric(format!(
                "{broken} of {} decoded values are not finite numbers; decode in f32 (--dtype f32) or use another VAE",
                planar.len()
            )));
        }
        let (red, rest) = planar.split_at(planar.len() / 3);
        let (green, blue) = rest.split_at(planar.len() / 3);
        let mut rgb = Vec::with_capacity(planar.len());
        for ((&r, &g), &b) in red.iter().zip(green).zip(blue) {
            rgb.extend([to_byte(r), to_byte(g), to_byte(b)]);
        }
        Ok(Self {
            width: side(width)?,
            height: side(height)?,
            rgb,
        })
    }
}

/// A side as PNG counts it.
fn side(pixels: usize) -> Result<u32> {
    u32::try_from(pixels)
        .map_err(|_| Error::Usage(format!("a picture side of {pixels} pixels is too large")))
}

/// One finite channel value in -1 … 1 as a byte.
fn to_byte(value: f32) -> u8 {
    let unit = (value * 0.5 + 0.5).clamp(0.0, 1.0);
    // 0 … 255 after the clamp, so the cast neither wraps nor saturates.
    (unit * 255.0).round_ties_even() as u8
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    /// Every rounding boundary and its neighbours, converted by diffusers (`tests/fixtures/image/make.py`).
    #[test]
    fn bytes_equal_diffusers() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/fixtures/image/bytes.json"
        );
        let fixture: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let number = |v: &serde_json::Value| u32::try_from(v.as_u64().unwrap()).unwrap();
        let bits: Vec<u32> = fixture["f32_bits"]
            .as_array()
            .unwrap()
            .iter()
            .map(number)
            .collect();
        let expected: Vec<u8> = fixture["bytes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| u8::try_from(number(v)).unwrap())
            .collect();
        assert!(bits.len() > 1000);
        let values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let planar: Vec<f32> = values.repeat(3);
        let image = Image::from_planar(&planar, values.len(), 1).unwrap();
        for (i, (pixel, &byte)) in image.rgb.chunks(3).zip(&expected).enumerate() {
            assert_eq!(
                pixel,
                [byte; 3],
                "value {} ({:#010x})",
                values[i],
                values[i].to_bits()
            );
        }
    }

    #[test]
    fn channels_interleave() {
        let planar = [
            -1.0, -1.0, -1.0, -1.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0,
            1.0, -1.0,
        ];
        let image = Image::from_planar(&planar, 3, 2).unwrap();
        assert_eq!((image.width, image.height), (3, 2));
        // 127.5 rounds to the even 128.
        assert_eq!(image.rgb[..3], [0, 128, 255]);
        assert_eq!(image.rgb[15..], [255, 128, 0]);
    }

    #[test]
    fn refuses_what_is_not_a_picture() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = Image::from_planar(&[0.0, value, 0.0], 1, 1).unwrap_err();
            assert!(
                matches!(&error, Error::Numeric(m) if m.starts_with("1 of 3 ")),
                "{error}"
            );
        }
        assert!(matches!(
            Image::from_planar(&[0.0; 4], 1, 1),
            Err(Error::Usage(_))
        ));
        assert!(matches!(
            Image::from_planar(&[0.0; 3], usize::MAX, usize::MAX),
            Err(Error::Usage(_))
        ));
    }
}
