//! Pictures that steer, before a network sees them: brought to the result's size, reduced to what the network was trained on, made into numbers.

mod clip;
mod fit;
pub mod preprocess;

pub use clip::clip_pixels;
pub use fit::Resize;
pub(crate) use fit::fit;
pub use preprocess::Preprocessor;

use crate::error::{Error, Result};
use crate::picture::{Grey, Picture};

/// From this value on a mask hides a pixel.
const HIDDEN: u8 = 128;

/// `[channels, height, width]` of a picture for a network: 0 to 1, and −1 where the mask hides it.
///
/// # Errors
/// [`Error::Usage`] when there is no mask and the preprocessor needs one; [`Error::Unsupported`] for other numbers of channels than 1 and 3.
pub fn hint(
    (picture, mask): (&Picture, Option<&Grey>),
    (preprocessor, resize): (Preprocessor, Resize),
    (width, height): (usize, usize),
    (channels, bgr): (usize, bool),
) -> Result<Vec<f32>> {
    if channels != 3 && channels != 1 {
        return Err(Error::Unsupported(format!(
            "the control network takes pictures of {channels} channels, expected 3 or 1"
        )));
    }
    if preprocessor == Preprocessor::Inpaint && mask.is_none() {
        return Err(Error::Usage(
            "the preprocessor `inpaint` needs a mask of what is to be filled in; give one with --control-mask".to_owned(),
        ));
    }
    let fitted = fit::fit(picture, (width, height), resize)?;
    let map = preprocessor.apply(&fitted)?;
    let mut planar = if channels == 1 {
        let grey = map.to_luma();
        grey.values()
            .iter()
            .map(|v| f32::from(*v) / 255.0)
            .collect()
    } else {
        map.to_planar()
    };
    let pixels = width * height;
    if bgr && channels == 3 {
        let (red, rest) = planar.split_at_mut(pixels);
        red.swap_with_slice(&mut rest[pixels..]);
    }
    if let Some(mask) = mask {
        let mask = fit::fit_mask(mask, (width, height), resize)?;
        for plane in planar.chunks_exact_mut(pixels) {
            for (value, hidden) in plane.iter_mut().zip(mask.values()) {
                if *hidden >= HIDDEN {
                    *value = -1.0;
                }
            }
        }
    }
    Ok(planar)
}
