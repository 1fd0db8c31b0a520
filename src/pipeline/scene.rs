//! A run's picture and mask in the size that is computed, and how what was computed comes back into the picture. Bytes only; latents are
//! `begin`'s.

mod fill;
mod fit;

pub(super) use fill::around as surroundings;

use super::source::{Edges, Fill, Fit, Masking, Source, Whose};
use crate::error::{Error, Result};
use crate::output::Image;
use crate::picture::{CvBlur, Filter, Grey, Picture, Rect};

/// A1111's blur of masks where nobody says another.
const A1111_BLUR: f64 = 4.0;

/// What a run begins at, in pixels.
#[derive(Debug, Clone)]
pub struct Scene {
    /// The picture as it is encoded: of the size that is computed, or of its own where latents are resized.
    pub(super) picture: Picture,
    /// White is painted anew; of the size that is computed.
    pub(super) mask: Option<Grey>,
    /// How the result comes back.
    finish: Option<Finish>,
}

/// How what was painted comes back into the picture.
#[derive(Debug, Clone)]
struct Finish {
    /// The whole picture.
    base: Picture,
    /// White is taken from the result; of the picture's size.
    overlay: Grey,
    /// The part that was computed; all of it where absent.
    part: Option<Rect>,
    /// The size of the picture before it was drawn out to one that can be computed.
    own: (u32, u32),
}

impl Scene {
    /// The scene for a run of `width × height` pixels. Where nobody `asked` for that size, a picture with a mask is not resized but drawn out
    /// to it.
    ///
    /// # Errors
    /// [`Error::Usage`] when a mask has nothing white, or sizes are impossible.
    pub(super) fn new(
        source: &Source,
        size: (usize, usize),
        asked: bool,
        whose: Whose,
    ) -> Result<Self> {
        let side = |pixels: usize| u32::try_from(pixels).unwrap_or(u32::MAX);
        let size = (side(size.0), side(size.1));
        let picture = source.picture.as_ref().clone().with_alpha(None)?;
        let Some(masking) = &source.masking else {
            return Ok(Self {
                picture: match source.fit {
                    Fit::Latent => picture,
                    fit => fit::picture(&picture, size, fit)?,
                },
                mask: None,
                finish: None,
            });
        };
        let own = (picture.width(), picture.height());
        let mask = masking.mask.resize(own.0, own.1, Filter::Lanczos)?;
        if mask.bounds().is_none() {
            return Err(Error::Usage(
                "the mask is black all over: nothing is to be painted; white is painted anew"
                    .to_owned(),
            ));
        }
        let mask = prepared(mask, masking, whose)?;
        let scene = match masking.only_masked {
            Some(around) => Self::part(picture, mask, around, size)?,
            None if asked => Self::whole((picture, mask), source.fit, size, whose)?,
            None => Self::drawn_out((picture, mask), size, whose)?,
        };
        scene.filled(masking.fill)
    }

    /// The picture as a network looks at it, in patches of so many pixels.
    ///
    /// # Errors
    /// [`Error::Usage`] for impossible sizes.
    pub(super) fn looked_at(source: &Source, patch: usize) -> Result<Self> {
        let side = |pixels: usize| u32::try_from(pixels).unwrap_or(u32::MAX);
        let (width, height) = source.looked_at(patch);
        let picture = source.picture.as_ref().clone().with_alpha(None)?;
        Ok(Self {
            picture: picture.resize(side(width), side(height), Filter::Lanczos)?,
            mask: None,
            finish: None,
        })
    }

    /// The picture in another size, by a cubic as diffusers' upscaling pipeline has it.
    ///
    /// # Errors
    /// [`Error::Usage`] for impossible sizes.
    pub(super) fn resized(source: &Source, (width, height): (usize, usize)) -> Result<Self> {
        let side = |pixels: usize| u32::try_from(pixels).unwrap_or(u32::MAX);
        let picture = source.picture.as_ref().clone().with_alpha(None)?;
        Ok(Self {
            picture: picture.resize(side(width), side(height), Filter::Bicubic)?,
            mask: None,
            finish: None,
        })
    }

    /// Width and height of the picture's latents, each so many pixels wide.
    pub(super) fn size(&self, scale: usize) -> (usize, usize) {
        let side = |pixels: u32| (pixels as usize / scale.max(1)).max(1);
        (side(self.picture.width()), side(self.picture.height()))
    }

    /// All of the picture is computed.
    fn whole(
        (picture, mask): (Picture, Grey),
        fit: Fit,
        size: (u32, u32),
        whose: Whose,
    ) -> Result<Self> {
        let fit = match fit {
            // a mask keeps what is outside in pixels, which latents of another size have not
            Fit::Latent => Fit::Stretch,
            fit => fit,
        };
        let picture = fit::picture(&picture, size, fit)?;
        let mask = fit::grey(&mask, size, fit)?;
        let overlay = match whose {
            // half of a blurred mask's edge is painted wholly
            Whose::A1111 | Whose::A1111Exact => mask.clone().map(|value| value.saturating_mul(2)),
            Whose::Diffusers | Whose::ComfyUi => mask.clone(),
        };
        Ok(Self {
            finish: Some(Finish {
                base: picture.clone(),
                overlay,
                part: None,
                own: size,
            }),
            picture,
            mask: Some(mask),
        })
    }

    /// All of a picture of any size is computed, with some more pixels at the right and below, which are cut off in the end.
    fn drawn_out((picture, mask): (Picture, Grey), size: (u32, u32), whose: Whose) -> Result<Self> {
        let own = (picture.width(), picture.height());
        let picture = fit::drawn_out(&picture, size)?;
        let mask = fit::drawn_out(&mask.to_picture(), size)?.to_luma();
        let mut scene = Self::whole((picture, mask), Fit::Stretch, size, whose)?;
        if let Some(finish) = &mut scene.finish {
            finish.own = own;
        }
        Ok(scene)
    }

    /// What lies around the mask is computed, larger or smaller than it is.
    fn part(picture: Picture, mask: Grey, around: usize, size: (u32, u32)) -> Result<Self> {
        let own = (picture.width(), picture.height());
        let part = fit::around(&mask, around, size);
        Ok(Self {
            picture: fit::picture(&picture.crop(part)?, size, Fit::Pad)?,
            mask: Some(fit::grey(&mask.crop(part)?, size, Fit::Pad)?),
            finish: Some(Finish {
                base: picture,
                overlay: mask,
                part: Some(part),
                own,
            }),
        })
    }

    /// The same with other colours where it is painted anew.
    fn filled(mut self, fill: Fill) -> Result<Self> {
        if let (Fill::Fill, Some(mask)) = (fill, &self.mask) {
            self.picture = fill::around(&self.picture, mask)?;
        }
        Ok(self)
    }

    /// Puts a result back into the picture: outside of the mask every pixel is the picture's.
    ///
    /// # Errors
    /// [`Error::Usage`] when the result has another size than was asked for.
    pub(super) fn finish(&self, image: Image) -> Result<Image> {
        let Some(finish) = &self.finish else {
            return Ok(image);
        };
        let mut result = Picture::try_from(image)?;
        if let Some(part) = finish.part {
            let inside = fit::picture(&result, (part.width, part.height), Fit::Crop)?;
            result = finish.base.clone();
            result.paste(&inside, i64::from(part.left), i64::from(part.top));
        }
        let finished = finish.base.blend(&result, &finish.overlay)?;
        let own = Rect {
            left: 0,
            top: 0,
            width: finish.own.0,
            height: finish.own.1,
        };
        Ok(finished.crop(own)?.into_image())
    }

    /// The size of the finished picture, if it is not the one that is computed.
    pub(super) fn finished_size(&self) -> Option<(usize, usize)> {
        let finish = self.finish.as_ref()?;
        Some((finish.own.0 as usize, finish.own.1 as usize))
    }
}

/// The mask blurred and, unless its greys mean something, made black and white.
fn prepared(mask: Grey, masking: &Masking, whose: Whose) -> Result<Grey> {
    let is_a1111 = matches!(whose, Whose::A1111 | Whose::A1111Exact);
    let hard = masking.edges == Edges::Hard;
    let mask = match (is_a1111, hard) {
        (true, true) => mask.map(|value| if value > 128 { 255 } else { 0 }),
        _ => mask,
    };
    let blur = masking
        .blur
        .unwrap_or(if is_a1111 { A1111_BLUR } else { 0.0 });
    if blur == 0.0 {
        return Ok(mask);
    }
    let blurred = mask.cv_blur(CvBlur::a1111(blur, 0.0))?;
    blurred.cv_blur(CvBlur::a1111(0.0, blur))
}
