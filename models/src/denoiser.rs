//! Whatever predicts noise or velocity: the UNet, Stable Diffusion 3's transformer, or FLUX's, behind one face.

use sd_kernels::{Error, Result, Tensor, Weights, ops};

use crate::layers::{SINUSOIDS, sinusoids};
use crate::lllite;
use crate::variant::{Earlier, Outputs, Variant};
use crate::{flux, mmdit, unet};

/// What one call of the network takes.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Latents `[b, in_channels, h, w]`.
    pub sample: &'a Tensor,
    /// `[b]`, 0 to 999 (1000 for transformers), fractions allowed.
    pub timestep: &'a Tensor,
    /// Text states `[b, t, context]`.
    pub context: &'a Tensor,
    /// `[b, added_width]`, where the config has one.
    pub added: Option<&'a Tensor>,
    /// `[b, guidance_width]`, where the config has one.
    pub guidance: Option<&'a Tensor>,
    /// The row of each latents' class `[b, label_width]`, where the config has classes.
    pub label: Option<&'a Tensor>,
    /// Another picture's latents `[b, in_channels, h', w']`, for a FLUX.1 that was trained to look at one.
    pub reference: Option<&'a Tensor>,
    /// What else steers a UNet.
    pub steering: Steering<'a>,
}

/// What other networks give to a UNet.
#[derive(Clone, Copy, Default)]
pub struct Steering<'a> {
    /// Of ControlNets, their sum.
    pub residuals: Option<&'a Residuals>,
    /// Of a T2I-Adapter: `[b, c, h, w]` for each level, as its blocks leave it, and for the middle if there is one more.
    pub features: &'a [Tensor],
    /// Of IP-Adapters.
    pub images: &'a [unet::ImagePrompt<'a>],
    /// Of ControlNet-LLLites.
    pub lites: &'a [lllite::Looking<'a>],
}

/// What a ControlNet adds to the skips of a UNet, in the order in which they are made, and behind its middle.
#[derive(Clone)]
pub struct Residuals {
    /// `[b, c, h, w]` each.
    pub down: Vec<Tensor>,
    /// `[b, c, h, w]`.
    pub mid: Tensor,
}

impl Residuals {
    /// What two ControlNets add.
    ///
    /// # Errors
    /// When they are not of one size or the executor fails.
    pub fn plus(&self, other: &Self) -> Result<Self> {
        if self.down.len() != other.down.len() {
            return Err(Error::Shape {
                op: "residuals",
                expected: format!("{} of each ControlNet", self.down.len()),
                got: other.down.len().to_string(),
            });
        }
        let sums = self.down.iter().zip(&other.down);
        let sums = sums.map(|(a, b)| ops::add(a, b));
        Ok(Self {
            down: sums.collect::<Result<_>>()?,
            mid: ops::add(&self.mid, &other.mid)?,
        })
    }
}

/// The structure of a denoising network.
#[derive(Debug, Clone, PartialEq)]
pub enum Config {
    /// Stable Diffusion 1, 2, XL.
    UNet(unet::Config),
    /// Stable Diffusion 3 and 3.5.
    Mmdit(mmdit::Config),
    /// FLUX.1.
    Flux(flux::Config),
}

impl Config {
    /// The UNet's, if it is one.
    pub fn unet(&self) -> Option<&unet::Config> {
        match self {
            Self::UNet(config) => Some(config),
            _ => None,
        }
    }

    /// Channels of the input.
    pub fn in_channels(&self) -> usize {
        match self {
            Self::UNet(config) => config.in_channels,
            Self::Mmdit(config) => config.in_channels,
            Self::Flux(config) => config.in_channels(),
        }
    }

    /// Channels of the prediction.
    pub fn out_channels(&self) -> usize {
        match self {
            Self::UNet(config) => config.out_channels,
            Self::Mmdit(config) => config.out_channels,
            Self::Flux(config) => config.out_channels(),
        }
    }

    /// Channels of the latents that it denoises.
    pub fn latent_channels(&self) -> usize {
        self.out_channels().min(self.in_channels())
    }

    /// Channels of the input that stand behind the latents: a mask, another picture's latents.
    pub fn extra_channels(&self) -> usize {
        self.in_channels() - self.latent_channels()
    }

    /// Width of the text states.
    pub fn context_width(&self) -> usize {
        match self {
            Self::UNet(config) => config.context_width(),
            Self::Mmdit(config) => config.context,
            Self::Flux(config) => config.context,
        }
    }

    /// Width of the vector beside the time, if there is one.
    pub fn added_width(&self) -> Option<usize> {
        match self {
            Self::UNet(config) => config.added.map(|added| added.input),
            Self::Mmdit(config) => Some(config.pooled),
            Self::Flux(config) => Some(config.pooled),
        }
    }

    /// Width of the embedded guidance, if the network is told.
    pub fn guidance_width(&self) -> Option<usize> {
        match self {
            Self::UNet(config) => config.time.condition,
            Self::Mmdit(_) => None,
            Self::Flux(config) => config.guidance.then_some(SINUSOIDS),
        }
    }

    /// Width of a class's row, if the network has classes.
    pub fn label_width(&self) -> Option<usize> {
        let unet = self.unet()?;
        unet.classes.map(|_| unet.time.output)
    }

    /// Whether the network was distilled to follow the prompt without a second call: those that are told a guidance, and FLUX at all.
    pub fn guides_itself(&self) -> bool {
        self.guidance_width().is_some() || matches!(self, Self::Flux(_))
    }

    /// Guidance scales `[b]` as the network reads them, `[b, guidance_width]`.
    ///
    /// # Errors
    /// When the executor fails.
    pub fn embed_guidance(&self, scale: &Tensor) -> Result<Tensor> {
        match self {
            Self::UNet(config) => config.embed_guidance(scale),
            _ => sinusoids(&ops::affine(scale, 1000.0, 0.0)?),
        }
    }

    /// Latent height and width must be multiples of this: a UNet halves odd sizes too, a transformer cuts patches.
    pub fn patch(&self) -> usize {
        match self {
            Self::UNet(_) => 1,
            Self::Mmdit(config) => config.patch,
            Self::Flux(_) => 2,
        }
    }

    /// Blocks of a network that can do without some of them.
    pub fn skippable(&self) -> Option<usize> {
        match self {
            Self::Mmdit(config) => Some(config.layers),
            _ => None,
        }
    }

    /// The most latents that a side may have, where there is such a bound.
    pub fn most_latents(&self) -> Option<usize> {
        match self {
            Self::Mmdit(config) => Some(config.positions * config.patch),
            _ => None,
        }
    }
}

/// A denoising network.
pub enum Denoiser {
    /// Stable Diffusion 1, 2, XL.
    UNet(Box<unet::UNet>),
    /// Stable Diffusion 3 and 3.5.
    Mmdit(Box<mmdit::Mmdit>),
    /// FLUX.1.
    Flux(Box<flux::Flux>),
}

impl Denoiser {
    /// Asks for every weight of the network; [`Weights::finish`] tells whether all were there.
    pub fn load(weights: &Weights, config: &Config) -> Self {
        match config {
            Config::UNet(config) => Self::UNet(Box::new(unet::UNet::load(weights, config))),
            Config::Mmdit(config) => Self::Mmdit(Box::new(mmdit::Mmdit::load(weights, config))),
            Config::Flux(config) => Self::Flux(Box::new(flux::Flux::load(weights, config))),
        }
    }

    /// The row of a class; see [`unet::UNet::label`].
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn label(&self, class: usize) -> Result<Option<Vec<f32>>> {
        match self {
            Self::UNet(network) => network.label(class),
            Self::Mmdit(_) | Self::Flux(_) => Ok(None),
        }
    }

    /// One prediction `[b, out_channels, h, w]`.
    ///
    /// # Errors
    /// When the shapes do not fit, an input is missing or the executor fails.
    pub fn forward(&self, inputs: &Inputs<'_>) -> Result<Tensor> {
        let outputs = self.forward_as(inputs, &Variant::default(), None)?;
        Ok(outputs.prediction)
    }

    /// The same changed as `variant` says, as far as the network can be: only Stable Diffusion 3's transformer does without blocks, all else is
    /// for UNets. `earlier` gives what a changed one takes from outside.
    ///
    /// # Errors
    /// As [`Denoiser::forward`].
    pub fn forward_as(
        &self,
        inputs: &Inputs<'_>,
        variant: &Variant,
        earlier: Option<&Earlier<'_>>,
    ) -> Result<Outputs> {
        let prediction = match self {
            Self::UNet(network) => return network.forward_as(inputs, variant, earlier),
            Self::Mmdit(network) => network.forward(inputs, &variant.skipped)?,
            Self::Flux(network) => network.forward(inputs)?,
        };
        Ok(Outputs {
            prediction,
            taps: Vec::new(),
            cross: Vec::new(),
            own: Vec::new(),
        })
    }

    /// The names of a UNet's self-attentions, as diffusers has them.
    pub fn self_attentions(&self) -> Vec<&str> {
        match self {
            Self::UNet(network) => network.self_attentions(),
            _ => Vec::new(),
        }
    }
}
