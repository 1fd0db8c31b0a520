//! Latents to pictures, one at a time, and never a silent black one.

use candle_core::{DType, Tensor};

use super::Networks;
use super::event::{Event, Listener, send, tiles};
use super::tiling::Surface;
use crate::error::{Error, Result};
use crate::output::Image;

/// One picture as planes `[3, h, w]`, mostly in [−1, 1], all of them numbers.
pub(super) struct Decoded {
    pub(super) values: Vec<f32>,
    pub(super) w: usize,
    pub(super) h: usize,
}

/// Decodes one picture `[1, c, h, w]`.
pub(super) fn decode(
    networks: &Networks,
    latents: &Tensor,
    surface: &Surface,
    listener: &mut Listener<'_>,
) -> Result<Image> {
    let decoded = values(networks, latents, surface, listener)?;
    Image::from_planar(&decoded.values, decoded.w, decoded.h)
}

/// The same as numbers. A result that is not finite is decoded again in f32, with a notice.
pub(super) fn values(
    networks: &Networks,
    latents: &Tensor,
    surface: &Surface,
    listener: &mut Listener<'_>,
) -> Result<Decoded> {
    let picture = networks.decode_as(latents, networks.dtype(), surface, &mut tiles(listener))?;
    if let Some(decoded) = finite(&picture)? {
        return Ok(decoded);
    }
    if networks.dtype() != DType::F32 {
        let picture = networks.decode_as(latents, DType::F32, surface, &mut tiles(listener))?;
        if let Some(decoded) = finite(&picture)? {
            let warning = format!(
                "the autoencoder left the range of {}; the picture was decoded again in f32",
                networks.dtype().as_str()
            );
            send(listener, Event::Warning(warning))?;
            return Ok(decoded);
        }
    }
    Err(Error::Numeric(
        "the autoencoder's picture is not made of numbers, even in f32; the checkpoint's autoencoder may be damaged".to_owned(),
    ))
}

/// `[1, 3, h, w]` as planes; `None` when it is not finite.
fn finite(picture: &Tensor) -> Result<Option<Decoded>> {
    let (_, channels, h, w) = picture.dims4()?;
    if channels != 3 {
        return Err(Error::Unsupported(format!(
            "the autoencoder gives {channels} channels, expected 3"
        )));
    }
    let values: Vec<f32> = picture.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    let finite = values.iter().all(|v| v.is_finite());
    Ok(finite.then_some(Decoded { values, w, h }))
}
