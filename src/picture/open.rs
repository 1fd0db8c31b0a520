//! Pictures from files: PNG, JPEG and WebP, told by their first bytes. What a file claims is checked before room is made for it.

use std::io::{self, Cursor, Read};
use std::path::Path;

use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};

use super::{MAX_SIDE, Picture};
use crate::error::{Error, Result};

/// The most bytes of a file.
const MAX_FILE: u64 = 1 << 30;

/// The most bytes that decoding may take: the largest picture with 16 bits a channel, and what a decoder needs beside it.
const MAX_DECODED: u64 = (MAX_SIDE as u64) * (MAX_SIDE as u64) * 8 + (64 << 20);

impl Picture {
    /// Reads a PNG, JPEG or WebP file: upright by its EXIF orientation, 16 bits rounded to 8, palettes and greys as RGB, the first picture of an
    /// animation.
    ///
    /// # Errors
    /// [`Error::Disk`] when the file cannot be read, is none of these, is damaged, or is larger than [`MAX_SIDE`] a side.
    pub fn open(path: &Path) -> Result<Self> {
        let read = || -> io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            let file = std::fs::File::open(path)?;
            if file.metadata()?.is_dir() {
                return Err(bad("it is a folder, expected a picture"));
            }
            file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
            if bytes.len() as u64 > MAX_FILE {
                return Err(bad("it is larger than 1 GiB, too much for a picture"));
            }
            Ok(bytes)
        };
        let bytes = read().map_err(|source| Error::disk(path, "read", source))?;
        Self::decode(&bytes, path)
    }

    /// [`Picture::open`] of bytes in memory; `name` stands for them in messages.
    ///
    /// # Errors
    /// As [`Picture::open`].
    pub fn decode(bytes: &[u8], name: &Path) -> Result<Self> {
        decode(bytes).map_err(|source| Error::disk(name, "read", source))
    }
}

fn bad(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

fn decode(bytes: &[u8]) -> io::Result<Picture> {
    let format = image::guess_format(bytes).ok();
    let Some(format @ (ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP)) = format else {
        return Err(bad("it is not a PNG, JPEG or WebP picture"));
    };
    let damaged = |source: ImageError| match source {
        // what a decoder was given is in memory: whatever fails there is the file's fault
        ImageError::Limits(_) => {
            bad("decoding it would take more memory than the largest picture does")
        }
        other => bad(format!("the picture is damaged ({other})")),
    };
    if format == ImageFormat::Jpeg {
        check_jpeg(bytes)?;
    }
    let reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut decoder = reader.into_decoder().map_err(damaged)?;
    let (width, height) = decoder.dimensions();
    let side = 1..=MAX_SIDE;
    if !side.contains(&width) || !side.contains(&height) {
        return Err(bad(format!(
            "it claims {width}x{height} pixels, expected 1 to {MAX_SIDE} a side"
        )));
    }
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_DECODED);
    decoder.set_limits(limits).map_err(damaged)?;
    // a damaged note about the orientation is none
    let orientation = decoder.orientation().ok();
    let mut decoded = DynamicImage::from_decoder(decoder).map_err(damaged)?;
    if let Some(orientation) = orientation {
        decoded.apply_orientation(orientation);
    }
    planes(decoded)
}

/// Splits what was decoded into colours and alpha.
fn planes(decoded: DynamicImage) -> io::Result<Picture> {
    let (width, height) = (decoded.width(), decoded.height());
    // the nearest of 0 … 255 for 0 … 65535
    let byte = |value: &u16| ((u32::from(*value) + 128) / 257) as u8;
    let bytes = |values: &[u16]| values.iter().map(byte).collect::<Vec<u8>>();
    let grey = |values: &[u8]| {
        values
            .iter()
            .flat_map(|&value| [value; 3])
            .collect::<Vec<u8>>()
    };
    let (rgb, alpha) = match decoded {
        DynamicImage::ImageRgb8(image) => (image.into_raw(), None),
        DynamicImage::ImageLuma8(image) => (grey(&image), None),
        DynamicImage::ImageRgb16(image) => (bytes(&image), None),
        DynamicImage::ImageLuma16(image) => (grey(&bytes(&image)), None),
        DynamicImage::ImageRgba8(image) => split(&image, 4),
        DynamicImage::ImageRgba16(image) => split(&bytes(&image), 4),
        DynamicImage::ImageLumaA8(image) => split(&image, 2),
        DynamicImage::ImageLumaA16(image) => split(&bytes(&image), 2),
        _ => return Err(bad("its numbers are no integers of 8 or 16 bits")),
    };
    Ok(Picture {
        width,
        height,
        rgb,
        alpha,
    })
}

/// `channels`: 4 for red, green, blue and alpha; 2 for grey and alpha.
fn split(pixels: &[u8], channels: usize) -> (Vec<u8>, Option<Vec<u8>>) {
    let colours = |pixel: &[u8]| match *pixel {
        [r, g, b, _] => [r, g, b],
        _ => [pixel[0]; 3],
    };
    let pixels = || pixels.chunks_exact(channels);
    let rgb = pixels().flat_map(colours).collect();
    let alpha = pixels().map(|pixel| pixel[channels - 1]).collect();
    (rgb, Some(alpha))
}

/// Refuses what the decoder would let pass: four colours of ink, and files that end in the middle.
fn check_jpeg(bytes: &[u8]) -> io::Result<()> {
    let mut rest = bytes.get(2..).unwrap_or_default();
    loop {
        let [0xff, kind, after @ ..] = rest else {
            return Err(bad("the JPEG picture is damaged or ends too early"));
        };
        match *kind {
            // filling, and marks without a length
            0xff => rest = &rest[1..],
            0x01 | 0xd0..=0xd8 => rest = after,
            0xda => break rest = after,
            _ => {
                let length = match *after {
                    [a, b, ..] => usize::from(u16::from_be_bytes([a, b])),
                    _ => 0,
                };
                let frame = matches!(kind, 0xc0..=0xcf) && !matches!(kind, 0xc4 | 0xc8 | 0xcc);
                if frame && after.get(7) == Some(&4) {
                    return Err(bad(
                        "it is a JPEG picture in CMYK; convert it to RGB with a program that knows its inks",
                    ));
                }
                if length < 2 {
                    return Err(bad("the JPEG picture is damaged or ends too early"));
                }
                rest = after.get(length..).unwrap_or_default();
            }
        }
    }
    if rest.windows(2).any(|mark| mark == [0xff, 0xd9]) {
        return Ok(());
    }
    Err(bad("the JPEG picture ends too early"))
}
