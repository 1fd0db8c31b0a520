//! Latents to pictures, one at a time, and never a silent black one.

use candle_core::{DType, Tensor};

use super::Networks;
use crate::error::{Error, Result};
use crate::output::Image;

/// Decodes one picture `[1, c, h, w]`. A result that is not finite is decoded again in f32, with a notice.
pub(super) fn decode(
    networks: &Networks,
    latents: &Tensor,
    warnings: &mut Vec<String>,
) -> Result<Image> {
    let picture = networks.decode(latents, networks.dtype())?;
    if let Some(image) = to_image(&picture)? {
        return Ok(image);
    }
    if networks.dtype() != DType::F32 {
        warnings.push(format!(
            "the autoencoder left the range of {}; the picture was decoded again in f32",
            networks.dtype().as_str()
        ));
        if let Some(image) = to_image(&networks.decode(latents, DType::F32)?)? {
            return Ok(image);
        }
    }
    Err(Error::Numeric(
        "the autoencoder's picture is not made of numbers, even in f32; the checkpoint's autoencoder may be damaged".to_owned(),
    ))
}

/// `[1, 3, h, w]` in [−1, 1] as 8-bit RGB; `None` when it is not finite.
fn to_image(picture: &Tensor) -> Result<Option<Image>> {
    let (_, channels, h, w) = picture.dims4()?;
    if channels != 3 {
        return Err(Error::Unsupported(format!(
            "the autoencoder gives {channels} channels, expected 3"
        )));
    }
    let values: Vec<f32> = picture.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    if values.iter().any(|v| !v.is_finite()) {
        return Ok(None);
    }
    Image::from_planar(&values, w, h).map(Some)
}
