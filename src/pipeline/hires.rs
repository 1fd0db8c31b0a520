//! A picture made twice: small, then enlarged and denoised once more from part of the way (A1111's "hires fix",
//! `StableDiffusionProcessingTxt2Img.sample_hr_pass` at version 1.10).

use std::str::FromStr;

use candle_core::Tensor;

use super::decode::{self, Decoded};
use super::event::{Event, Listener, send, tiles};
use super::networks::Networks;
use super::resize::{Kernel, resize};
use super::tiling::{Surface, Watch};
use super::{Plan, Request};
use crate::error::{Error, Result};
use crate::picture::{Filter, Picture};
use crate::upscale::{Tiling, Upscaler as Enlarger};

/// How a picture is enlarged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Upscaler {
    /// Latents, a line between two.
    #[default]
    Latent,
    /// The same, with a filter against aliasing.
    LatentAntialiased,
    /// Latents, a cubic through four.
    LatentBicubic,
    /// The same, with a filter against aliasing.
    LatentBicubicAntialiased,
    /// Latents, that at the left and top.
    LatentNearest,
    /// Latents, the nearest.
    LatentNearestExact,
    /// Pixels.
    Lanczos,
    /// Pixels.
    Nearest,
    /// Pixels, by a network that enlarges pictures: [`super::Engine::with_upscaler`].
    Network,
}

/// Ours and A1111's names.
const NAMES: [(Upscaler, &str, &str); 8] = [
    (Upscaler::Latent, "latent", "Latent"),
    (
        Upscaler::LatentAntialiased,
        "latent-antialiased",
        "Latent (antialiased)",
    ),
    (
        Upscaler::LatentBicubic,
        "latent-bicubic",
        "Latent (bicubic)",
    ),
    (
        Upscaler::LatentBicubicAntialiased,
        "latent-bicubic-antialiased",
        "Latent (bicubic antialiased)",
    ),
    (
        Upscaler::LatentNearest,
        "latent-nearest",
        "Latent (nearest)",
    ),
    (
        Upscaler::LatentNearestExact,
        "latent-nearest-exact",
        "Latent (nearest-exact)",
    ),
    (Upscaler::Lanczos, "lanczos", "Lanczos"),
    (Upscaler::Nearest, "nearest", "Nearest"),
];

impl Upscaler {
    /// A1111's name.
    pub fn name(self) -> &'static str {
        let found = NAMES.iter().find(|(upscaler, ..)| *upscaler == self);
        found.map_or("", |(_, _, name)| name)
    }

    /// How latents are enlarged; none for ways of pixels.
    fn kernel(self) -> Option<(Kernel, bool)> {
        match self {
            Self::Latent => Some((Kernel::Linear, false)),
            Self::LatentAntialiased => Some((Kernel::Linear, true)),
            Self::LatentBicubic => Some((Kernel::Cubic, false)),
            Self::LatentBicubicAntialiased => Some((Kernel::Cubic, true)),
            Self::LatentNearest => Some((Kernel::Nearest, false)),
            Self::LatentNearestExact => Some((Kernel::NearestExact, false)),
            Self::Lanczos | Self::Nearest | Self::Network => None,
        }
    }
}

impl FromStr for Upscaler {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let known = NAMES.iter().find(|(_, ours, theirs)| {
            text.eq_ignore_ascii_case(ours) || text.eq_ignore_ascii_case(theirs)
        });
        known.map(|(upscaler, ..)| *upscaler).ok_or_else(|| {
            let names: Vec<&str> = NAMES.iter().map(|(_, ours, _)| *ours).collect();
            format!("expected one of {}", names.join(", "))
        })
    }
}

/// The size of the second picture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum HiresSize {
    /// So many times as wide and high.
    Scale(f64),
    /// In pixels; what has other proportions is cut at its edges.
    Pixels(usize, usize),
}

/// A second pass.
#[derive(Debug, Clone, PartialEq)]
pub struct Hires {
    /// Its size.
    pub size: HiresSize,
    /// How the first picture is enlarged.
    pub upscaler: Upscaler,
    /// Its steps; as many as the first's when absent.
    pub steps: Option<usize>,
    /// How much of the enlarged picture is given up.
    pub strength: f64,
    /// Its guidance; the first's when absent.
    pub cfg_scale: Option<f64>,
}

impl Hires {
    /// A1111's.
    pub const STRENGTH: f64 = 0.7;

    /// Width and height of the enlarged picture, and of what is kept of it, before either is made of whole latents.
    ///
    /// # Errors
    /// [`Error::Usage`] for impossible sizes.
    fn sizes(&self, (width, height): (usize, usize)) -> Result<[(usize, usize); 2]> {
        match self.size {
            HiresSize::Scale(scale) => {
                if !(0.1..=16.0).contains(&scale) {
                    return Err(Error::Usage(format!(
                        "--hires-scale is {scale}, expected 0.1 to 16"
                    )));
                }
                let scaled = |side: usize| (side as f64 * scale) as usize;
                let size = (scaled(width), scaled(height));
                Ok([size, size])
            }
            HiresSize::Pixels(wide, high) => {
                /// More pixels than any side has.
                const MOST: usize = 1 << 16;
                if wide.max(high) > MOST {
                    return Err(Error::Usage(format!(
                        "--hires-size is {wide}x{high}, expected sides of at most {MOST}"
                    )));
                }
                // as wide or as high as asked for, whichever leaves more to cut
                let wider = width * high < wide * height;
                let enlarged = if wider {
                    (wide, wide * height / width.max(1))
                } else {
                    (high * width / height.max(1), high)
                };
                Ok([enlarged, (wide, high)])
            }
        }
    }

    /// The enlarged latents' width and height, and how many are cut off: left and top, and what is left of them.
    ///
    /// # Errors
    /// [`Error::Usage`] for impossible sizes.
    pub(super) fn layout(&self, first: (usize, usize), scale: usize) -> Result<Layout> {
        let [pixels, kept] = self.sizes(first)?;
        let cut = |enlarged: usize, kept: usize| enlarged.saturating_sub(kept) / scale;
        let (cut_x, cut_y) = (cut(pixels.0, kept.0), cut(pixels.1, kept.1));
        let (wide, high) = (pixels.0 / scale, pixels.1 / scale);
        let size = (wide.saturating_sub(cut_x), high.saturating_sub(cut_y));
        if size.0 == 0 || size.1 == 0 {
            return Err(Error::Usage(
                "the second picture has no pixels; use a larger --hires-scale or --hires-size"
                    .to_owned(),
            ));
        }
        Ok(Layout {
            pixels,
            latents: (wide, high),
            corner: (cut_x / 2, cut_y / 2),
            size,
        })
    }
}

/// Sizes of the second pass, width first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// The enlarged picture.
    pixels: (usize, usize),
    /// Its latents.
    latents: (usize, usize),
    /// The first latents that are kept.
    corner: (usize, usize),
    /// How many.
    pub(super) size: (usize, usize),
}

/// The second pass of a plan.
#[derive(Debug, Clone)]
pub struct SecondPass {
    /// What was asked for.
    pub hires: Hires,
    /// What will run.
    pub plan: Plan,
    pub(super) layout: Layout,
}

impl SecondPass {
    /// The first pass's latents `[b, c, h, w]` enlarged.
    ///
    /// # Errors
    /// Whatever decoding and encoding give; [`Error::Interrupted`] when the listener says so.
    pub(super) fn enlarge(
        &self,
        networks: &Networks,
        latents: &Tensor,
        surface: &Surface,
        (enlarger, listener): (Option<&Enlarger>, &mut Listener<'_>),
    ) -> Result<Tensor> {
        let Layout {
            latents: (w, h),
            corner,
            size,
            ..
        } = self.layout;
        let enlarged = match self.hires.upscaler.kernel() {
            Some((kernel, smooth)) => resize(latents, (h, w), kernel, smooth)?,
            None => {
                let mut all = Vec::with_capacity(latents.dim(0)?);
                for i in 0..latents.dim(0)? {
                    let one = latents.narrow(0, i, 1)?;
                    let decoded = decode::values(networks, &one, surface, listener)?;
                    let picture = self.enlarge_picture(&decoded, enlarger, listener)?;
                    let watch = &mut tiles(listener);
                    all.push(encode(networks, &picture, (surface, (w, h)), watch)?);
                }
                Tensor::cat(&all, 0)?
            }
        };
        let kept = enlarged.narrow(2, corner.1, size.1)?;
        Ok(kept.narrow(3, corner.0, size.0)?.contiguous()?)
    }

    /// The picture in the size of the second pass, as A1111's `resize_image` and its upscalers make it.
    fn enlarge_picture(
        &self,
        decoded: &Decoded,
        enlarger: Option<&Enlarger>,
        listener: &mut Listener<'_>,
    ) -> Result<Picture> {
        // numpy's conversion, which cuts off
        let byte = |value: f32| (255.0 * ((value + 1.0) / 2.0).clamp(0.0, 1.0)) as u8;
        let plane = decoded.w * decoded.h;
        let rgb = (0..plane).flat_map(|at| (0..3).map(move |c| c * plane + at));
        let rgb = rgb
            .filter_map(|at| decoded.values.get(at).copied())
            .map(byte);
        let side = |pixels: usize| {
            u32::try_from(pixels)
                .map_err(|_| Error::Usage(format!("a side of {pixels} pixels is too large")))
        };
        let picture = Picture::from_rgb(side(decoded.w)?, side(decoded.h)?, rgb.collect())?;
        let (wide, high) = self.layout.pixels;
        let (w, h) = (decoded.w as f64, decoded.h as f64);
        let scale = (wide as f64 / w).max(high as f64 / h);
        let mut picture = picture;
        if scale > 1.0 {
            let wanted = (side((w * scale) as usize)?, side((h * scale) as usize)?);
            picture = match self.hires.upscaler {
                Upscaler::Nearest => picture.resize(wanted.0, wanted.1, Filter::Nearest)?,
                Upscaler::Network => by_network(&picture, wanted, enlarger, listener)?,
                _ => picture.resize(wanted.0, wanted.1, Filter::Lanczos)?,
            };
            let whole = |pixels: f64| (pixels * scale) as usize / 8 * 8;
            let (w, h) = (whole(w).max(1), whole(h).max(1));
            picture = picture.resize(side(w)?, side(h)?, Filter::Lanczos)?;
        }
        picture.resize(side(wide)?, side(high)?, Filter::Lanczos)
    }
}

/// What the network makes of a picture, at least as large as wanted.
fn by_network(
    picture: &Picture,
    wanted: (u32, u32),
    enlarger: Option<&Enlarger>,
    listener: &mut Listener<'_>,
) -> Result<Picture> {
    let Some(enlarger) = enlarger else {
        return Err(Error::Usage(
            "the second pass needs a network that enlarges pictures; give one with --hires-upscaler"
                .to_owned(),
        ));
    };
    let mut watch = |done, total| send(listener, Event::Enlarging { done, total }).is_ok();
    enlarger.enlarge_past(picture, wanted, Tiling::default(), &mut watch)
}

/// The middle of a picture's distribution, scaled; `size` is that of its latents.
fn encode(
    networks: &Networks,
    picture: &Picture,
    (surface, (w, h)): (&Surface, (usize, usize)),
    watch: &mut Watch<'_>,
) -> Result<Tensor> {
    let values: Vec<f32> = picture.to_planar().iter().map(|v| v * 2.0 - 1.0).collect();
    let size = (1, 3, picture.height() as usize, picture.width() as usize);
    let scale = networks.autoencoder().scale();
    let pixels = Tensor::from_vec(values, size, networks.device())?;
    // what is not a whole latent is not seen
    let pixels = pixels.narrow(2, 0, h * scale)?.narrow(3, 0, w * scale)?;
    let mode = networks
        .encode_safely(&pixels.contiguous()?, surface, watch)?
        .mode();
    networks.scale_latents(&mode)
}

/// Refuses what a second pass does not go together with.
///
/// # Errors
/// [`Error::Unsupported`].
pub(super) fn check(request: &Request, given: bool) -> Result<()> {
    if request.source.is_some() {
        return Err(Error::Unsupported(
            "--hires-scale is for pictures from text, and this run begins at one; enlarge that first".to_owned(),
        ));
    }
    if given {
        return Err(Error::Unsupported(
            "--hires-scale is not built for models that are given a picture or a mask; use an ordinary one".to_owned(),
        ));
    }
    Ok(())
}
