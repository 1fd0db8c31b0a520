//! What a run is asked to begin at: a picture, what of it is painted anew, and whose arithmetic that follows.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::picture::{Grey, Picture};

/// How a picture of other sides is made to fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Fit {
    /// Resized, its proportions lost.
    #[default]
    Stretch,
    /// Resized until it covers, the rest cut off.
    Crop,
    /// Resized until it is covered, its edges drawn out over the rest.
    Pad,
    /// Resized as latents.
    Latent,
}

/// What stands where the picture is painted anew, before it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Fill {
    /// What was there.
    #[default]
    Original,
    /// The colours around it.
    Fill,
    /// Latent noise.
    Noise,
    /// Latents of zero.
    Nothing,
}

/// What the values of a mask between black and white mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Edges {
    /// Latents are painted or they are not.
    #[default]
    Hard,
    /// Latents are mixed.
    Soft,
    /// Latents are painted from the step on at which so much noise is left (Levin & Fried, "Differential Diffusion", arXiv 2306.00950).
    Differential,
}

/// Whose meaning strength and masks have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Whose {
    /// diffusers' pipelines.
    Diffusers,
    /// Stable Diffusion web UI's: a strength of s makes a little more than s of the steps.
    #[value(name = "a1111")]
    A1111,
    /// The same, but all steps are made within the noise that is left ("do exactly the amount of steps").
    #[value(name = "a1111-exact")]
    A1111Exact,
    /// ComfyUI's: all steps are made within the noise that is left.
    #[value(name = "comfyui")]
    ComfyUi,
}

/// What of a picture is painted anew.
#[derive(Debug, Clone)]
pub struct Masking {
    /// White is painted; of any size.
    pub mask: Grey,
    /// Standard deviation by which it is blurred, in pixels; 4 by A1111's reading and none by others where absent.
    pub blur: Option<f64>,
    /// What stands there before.
    pub fill: Fill,
    /// Only what lies around the mask, with so many pixels about it, is computed, at the size that is asked for, and put back.
    pub only_masked: Option<usize>,
    /// What greys mean.
    pub edges: Edges,
}

/// A picture that a run begins at, or that the network is told of.
#[derive(Debug, Clone)]
pub struct Source {
    /// The picture.
    pub picture: Arc<Picture>,
    /// How much of it is given up, 0 to 1; the family's own where absent.
    pub strength: Option<f64>,
    /// How it is made to fit.
    pub fit: Fit,
    /// What of it is painted anew; all of it where absent.
    pub masking: Option<Masking>,
    /// Whose arithmetic; that of the sampler where absent.
    pub whose: Option<Whose>,
    /// Guidance towards the picture, of models that follow instructions.
    pub image_cfg_scale: f64,
    /// The network looks at the picture in its own size, and not in one that it was trained at (FLUX.1 Kontext).
    pub own_size: bool,
    /// How much noise a picture is given before it is enlarged, in timesteps.
    pub noise_level: usize,
}

/// Guidance towards the picture when nobody says (Brooks et al., "InstructPix2Pix", arXiv 2211.09800).
pub const IMAGE_CFG_SCALE: f64 = 1.5;

/// [`Source::noise_level`] when nobody says, as in diffusers.
pub const NOISE_LEVEL: usize = 20;

/// Widths and heights that FLUX.1 Kontext was trained at (diffusers 0.42.1 `PREFERRED_KONTEXT_RESOLUTIONS`).
const TRAINED_SIZES: [(usize, usize); 17] = [
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
];

impl Source {
    /// A run that begins at `picture`, and nothing else said.
    pub fn new(picture: Picture) -> Self {
        Self {
            picture: Arc::new(picture),
            strength: None,
            fit: Fit::default(),
            masking: None,
            whose: None,
            image_cfg_scale: IMAGE_CFG_SCALE,
            own_size: false,
            noise_level: NOISE_LEVEL,
        }
    }

    /// The size, in pixels, in which a network looks at the picture: that of its training whose proportions are nearest, or the picture's own, cut
    /// to whole patches of so many pixels.
    pub(super) fn looked_at(&self, patch: usize) -> (usize, usize) {
        let own = (
            self.picture.width() as usize,
            self.picture.height() as usize,
        );
        if self.own_size {
            let cut = |side: usize| (side / patch.max(1)).max(1) * patch;
            return (cut(own.0), cut(own.1));
        }
        let wanted = own.0 as f64 / own.1 as f64;
        let distance = |(w, h): (usize, usize)| (wanted - w as f64 / h as f64).abs();
        let sizes = TRAINED_SIZES.iter().copied();
        sizes
            .min_by(|a, b| distance(*a).total_cmp(&distance(*b)))
            .unwrap_or(own)
    }

    /// Whether the values are possible.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the one that is not.
    pub(super) fn check(&self) -> Result<()> {
        if let Some(strength) = self.strength.filter(|s| !(0.0..=1.0).contains(s)) {
            return Err(Error::Usage(format!(
                "--strength is {strength}, expected 0 to 1"
            )));
        }
        if !(0.0..=1000.0).contains(&self.image_cfg_scale) {
            return Err(Error::Usage(format!(
                "--image-cfg-scale is {}, expected 0 to 1000",
                self.image_cfg_scale
            )));
        }
        let blur = self.masking.as_ref().and_then(|masking| masking.blur);
        if let Some(blur) = blur.filter(|blur| !(0.0..=256.0).contains(blur)) {
            return Err(Error::Usage(format!(
                "--mask-blur is {blur}, expected 0 to 256 pixels"
            )));
        }
        Ok(())
    }
}

impl Whose {
    /// The word for it.
    pub fn id(self) -> &'static str {
        match self {
            Self::Diffusers => "diffusers",
            Self::A1111 => "a1111",
            Self::A1111Exact => "a1111-exact",
            Self::ComfyUi => "comfyui",
        }
    }
}
