//! Pictures as CLIP's tower reads them.

use crate::error::{Error, Result};
use crate::picture::{Filter, Picture, Rect};

/// Mean and standard deviation of the pictures that CLIP was trained on.
const MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const DEVIATION: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];

/// A picture as CLIP wants it (transformers 5.23 `CLIPImageProcessor`): its shorter side scaled to `size` by a cubic filter, the middle cut out,
/// normalised: `[3, size, size]`.
///
/// # Errors
/// [`Error::Usage`] when the picture is far longer than wide, or the other way round.
pub fn clip_pixels(picture: &Picture, size: usize) -> Result<Vec<f32>> {
    let side = u32::try_from(size)
        .map_err(|_| Error::Usage(format!("pictures of {size} pixels are too large")))?;
    let (w, h) = (picture.width(), picture.height());
    let long = |long: u32, short: u32| {
        (u64::from(side) * u64::from(long) / u64::from(short.max(1))).min(u64::from(u32::MAX))
            as u32
    };
    let (new_w, new_h) = if w <= h {
        (side, long(h, w))
    } else {
        (long(w, h), side)
    };
    // rows first, always: transformers' processor is not on Pillow any more, and does not turn the order round as that does
    let scaled = picture.resize(new_w, h, Filter::Bicubic)?;
    let scaled = scaled.resize(new_w, new_h, Filter::Bicubic)?;
    let cut = scaled.crop(Rect {
        left: (new_w - side) / 2,
        top: (new_h - side) / 2,
        width: side,
        height: side,
    })?;
    let pixels = size * size;
    let rgb = cut.rgb();
    Ok((0..3 * pixels)
        .map(|i| {
            let (c, pixel) = (i / pixels, i % pixels);
            let unit = f64::from(rgb[3 * pixel + c]) / 255.0;
            ((unit - MEAN[c]) / DEVIATION[c]) as f32
        })
        .collect())
}
