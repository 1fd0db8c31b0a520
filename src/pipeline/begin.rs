//! What a batch begins with: latents of a picture and noise, in the order in which the tool that is followed draws random numbers; what of the
//! picture stays; and what the network is given beside the latents.

use std::cell::RefCell;

use candle_core::{DType, Device, Tensor};

use super::conditions::Given;
use super::denoise::BatchNoise;
use super::known::{Blend, Known};
use super::networks::{Networks, Posterior};
use super::scene::Scene;
use super::source::{Edges, Fill, Source, Whose};
use super::tiling::{Surface, Watch};
use crate::error::{Error, Result};
use crate::picture::{Filter, Grey};
use crate::sampling::{NoiseSchedule, Trajectory};
use crate::spec::ModelSpec;

/// The beginning of a batch of b pictures.
pub(super) struct Beginning {
    /// The first latents, `[b, c, h, w]`.
    pub(super) sample: Tensor,
    /// What stays of the picture.
    pub(super) known: Option<Known>,
    /// What of the picture the network is given.
    pub(super) given: Given,
}

/// Channels beside the latents, and nothing else.
fn beside(extra: Option<Tensor>) -> Given {
    Given {
        extra,
        ..Given::default()
    }
}

/// What a picture is to the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The run begins at it.
    Start,
    /// The run begins at it, and the network is given it and a mask.
    Inpaint,
    /// The network is given it in channels of its own, and begins at noise.
    Instruct,
    /// The network looks at it, and begins at noise.
    Reference,
    /// The network is given it with some noise, and makes it larger from noise.
    Enlarge,
}

impl Role {
    /// What a model's network does with a picture.
    pub(super) fn of(spec: &ModelSpec) -> Self {
        let config = &spec.unet.config;
        if spec.looks_at_pictures {
            return Self::Reference;
        }
        if spec.low_res.is_some() {
            return Self::Enlarge;
        }
        let (latents, extra) = (config.latent_channels(), config.extra_channels());
        if extra == 0 {
            Self::Start
        } else if extra == latents {
            Self::Instruct
        } else {
            Self::Inpaint
        }
    }

    /// Whether runs begin at noise, whatever the picture.
    pub(super) fn begins_at_noise(self) -> bool {
        matches!(self, Self::Instruct | Self::Reference | Self::Enlarge)
    }
}

/// How a batch begins.
pub(super) struct Begin<'a> {
    pub(super) networks: &'a Networks,
    pub(super) role: Role,
    pub(super) trajectory: &'a Trajectory,
    pub(super) source: Option<&'a Source>,
    pub(super) scene: Option<&'a Scene>,
    pub(super) whose: Whose,
    /// The noise that a picture to be enlarged is given.
    pub(super) low_res: Option<&'a NoiseSchedule>,
    /// The picture's latents that an instruction changes are scaled (CosXL).
    pub(super) scaled: bool,
    /// `[c, h, w]` of the latents.
    pub(super) shape: [usize; 3],
    /// What pictures are to the encoder.
    pub(super) surface: Surface,
    /// Told of the encoder's tiles.
    pub(super) watch: RefCell<&'a mut Watch<'a>>,
}

impl Begin<'_> {
    fn watch(&self) -> impl FnMut(usize, usize) -> Result<()> + '_ {
        |done, total| (self.watch.borrow_mut())(done, total)
    }

    /// Encodes and draws.
    ///
    /// # Errors
    /// When the encoder is not whole or its result is not finite; those of the watch.
    pub(super) fn run(&self, noise: &mut BatchNoise) -> Result<Beginning> {
        let role = self.role;
        let (Some(source), Some(scene)) = (self.source, self.scene) else {
            let drawn = noise.draw()?;
            return Ok(Beginning {
                given: match role {
                    Role::Inpaint => beside(Some(self.all_masked(drawn.dim(0)?)?)),
                    _ => Given::default(),
                },
                sample: (drawn * self.trajectory.init_noise_sigma)?,
                known: None,
            });
        };
        match role {
            Role::Instruct => return self.instructed(scene, noise),
            Role::Reference => return self.referred(scene, noise),
            Role::Enlarge => return self.enlarged((source, scene), noise),
            Role::Start | Role::Inpaint => {}
        }
        if self.whose == Whose::Diffusers {
            self.as_diffusers(scene, role, noise)
        } else {
            self.as_web_ui(source, scene, role, noise)
        }
    }

    /// The network is given the picture. Transformers that edges or depths steer are given a sample of it, drawn before the noise.
    fn instructed(&self, scene: &Scene, noise: &mut BatchNoise) -> Result<Beginning> {
        let posterior = self.encode(scene, None)?;
        let is_unet = self.networks.config().unet().is_some();
        let latents = if is_unet {
            posterior.mode().repeat((noise.pictures(), 1, 1, 1))?
        } else {
            posterior.sample(&noise.draw()?)?
        };
        let drawn = noise.draw()?;
        Ok(Beginning {
            given: beside(Some(if self.scaled || !is_unet {
                self.networks.scale_latents(&latents)?
            } else {
                latents
            })),
            sample: (drawn * self.trajectory.init_noise_sigma)?,
            known: None,
        })
    }

    /// The network looks at the picture.
    fn referred(&self, scene: &Scene, noise: &mut BatchNoise) -> Result<Beginning> {
        let mode = self.encode(scene, None)?.mode();
        let latents = self.networks.scale_latents(&mode)?;
        let drawn = noise.draw()?;
        Ok(Beginning {
            given: Given {
                reference: Some(latents.repeat((drawn.dim(0)?, 1, 1, 1))?),
                ..Given::default()
            },
            sample: (drawn * self.trajectory.init_noise_sigma)?,
            known: None,
        })
    }

    /// The network is given the picture itself, with noise that is drawn before the latents', and is told how much that is.
    fn enlarged(
        &self,
        (source, scene): (&Source, &Scene),
        noise: &mut BatchNoise,
    ) -> Result<Beginning> {
        let picture = &scene.picture;
        let (w, h) = (picture.width() as usize, picture.height() as usize);
        let level = source.noise_level;
        let bar = self
            .low_res
            .and_then(|schedule| schedule.alphas_cumprod.get(level));
        let (Some(bar), Some(label)) = (bar, self.networks.label(level)?) else {
            return Err(Error::Usage(format!(
                "--noise-level is {level}, and the model knows fewer levels; 20 is usual"
            )));
        };
        let device = self.networks.device();
        let values: Vec<f32> = picture.to_planar().iter().map(|v| v * 2.0 - 1.0).collect();
        let pixels = Tensor::from_vec(values, (1, 3, h, w), device)?;
        let fresh = (noise.draw_of([3, h, w])? * (1.0 - bar).sqrt())?;
        let noised = fresh.broadcast_add(&(pixels * bar.sqrt())?)?;
        let drawn = noise.draw()?;
        Ok(Beginning {
            given: Given {
                extra: Some(noised),
                label: Some(label.repeat((drawn.dim(0)?, 1))?),
                reference: None,
            },
            sample: (drawn * self.trajectory.init_noise_sigma)?,
            known: None,
        })
    }

    /// diffusers draws the sample of the picture's distribution, then the noise, then the sample of what is left by the mask, which it draws
    /// even where nobody is given it.
    fn as_diffusers(&self, scene: &Scene, role: Role, noise: &mut BatchNoise) -> Result<Beginning> {
        let masked = scene.mask.is_some();
        // pipelines of transformers encode the picture even where nothing of it is left
        let begins_at_picture =
            self.trajectory.init_latents != 0.0 || self.networks.config().unet().is_none();
        let latents = if begins_at_picture || (masked && role == Role::Start) {
            let sampled = self.encode(scene, None)?.sample(&noise.draw()?)?;
            Some(self.networks.scale_latents(&sampled)?)
        } else {
            None
        };
        let drawn = noise.draw()?;
        let sample = self.mixed(latents.as_ref(), &drawn)?;
        let mut extra = None;
        let mask = self.latent_mask(scene, Resample::Nearest)?;
        if let (Some(mask), true) = (&mask, masked) {
            let fresh = noise.draw()?;
            if role == Role::Inpaint {
                let rest = self.encode(scene, Some(Threshold::Half))?.sample(&fresh)?;
                let rest = self.networks.scale_latents(&rest)?;
                extra = Some(self.inpainting(scene.mask.as_ref(), mask, &rest)?);
            }
        } else if role == Role::Inpaint {
            extra = Some(self.all_masked(drawn.dim(0)?)?);
        }
        let known = match (latents, mask, role) {
            (Some(latents), Some(mask), Role::Start) => Some(Known {
                latents,
                noise: drawn,
                mask,
                blend: Blend::AfterStep,
                differential: false,
            }),
            _ => None,
        };
        Ok(Beginning {
            sample,
            known,
            given: beside(extra),
        })
    }

    /// A1111 and ComfyUI: noise is what a run from text begins with, and the picture's latents are the middle of its distribution.
    fn as_web_ui(
        &self,
        source: &Source,
        scene: &Scene,
        role: Role,
        noise: &mut BatchNoise,
    ) -> Result<Beginning> {
        let drawn = noise.draw()?;
        let b = drawn.dim(0)?;
        let mode = self
            .networks
            .scale_latents(&self.encode(scene, None)?.mode())?;
        let mut latents = self.resized(&mode)?.repeat((b, 1, 1, 1))?;
        let edges = source.masking.as_ref().map_or(Edges::Hard, |m| m.edges);
        // latents of unit variance are those of samplers that go by timesteps
        let first = self.trajectory.calls.first();
        let by_timesteps =
            self.networks.config().unet().is_some() && first.is_some_and(|call| call.now.0 != 1.0);
        let denoised = if by_timesteps {
            Blend::Seen
        } else {
            Blend::Denoised
        };
        let (how, blend) = match self.whose {
            Whose::ComfyUi => (Resample::Bilinear, Blend::BeforeAndDenoised),
            _ if edges == Edges::Hard => (Resample::RoundedBicubic, denoised),
            _ => (Resample::Bicubic, denoised),
        };
        let Some(mask) = self.latent_mask(scene, how)? else {
            let extra = match role {
                Role::Inpaint => Some(self.all_masked(b)?),
                _ => None,
            };
            return Ok(Beginning {
                sample: self.mixed(Some(&latents), &drawn)?,
                known: None,
                given: beside(extra),
            });
        };
        let kept = mask.affine(-1.0, 1.0)?;
        match source.masking.as_ref().map(|m| m.fill) {
            Some(Fill::Noise) => {
                let painted = drawn.broadcast_mul(&mask)?;
                latents = (latents.broadcast_mul(&kept)? + painted)?;
            }
            Some(Fill::Nothing) => latents = latents.broadcast_mul(&kept)?,
            _ => {}
        }
        let extra = if role == Role::Inpaint {
            let rest = self.encode(scene, Some(Threshold::Rounded))?.mode();
            let rest = self.networks.scale_latents(&rest)?.repeat((b, 1, 1, 1))?;
            let mask = self.rounded_mask(scene)?;
            Some(self.inpainting(scene.mask.as_ref(), &mask, &rest)?)
        } else {
            None
        };
        Ok(Beginning {
            sample: self.mixed(Some(&latents), &drawn)?,
            known: Some(Known {
                latents,
                noise: drawn,
                mask,
                blend,
                differential: edges == Edges::Differential,
            }),
            given: beside(extra),
        })
    }

    /// The first latents, of the picture's and noise.
    fn mixed(&self, latents: Option<&Tensor>, noise: &Tensor) -> Result<Tensor> {
        let Trajectory {
            init_latents,
            init_noise_sigma,
            ..
        } = *self.trajectory;
        let noise = (noise * init_noise_sigma)?;
        match latents {
            Some(latents) if init_latents != 0.0 => Ok(((latents * init_latents)? + noise)?),
            _ => Ok(noise),
        }
    }

    /// The scene's picture, or what a mask leaves of it, as the encoder sees it.
    fn encode(&self, scene: &Scene, masked: Option<Threshold>) -> Result<Posterior> {
        let picture = &scene.picture;
        let (w, h) = (picture.width() as usize, picture.height() as usize);
        let mut values: Vec<f32> = picture.to_planar().iter().map(|v| v * 2.0 - 1.0).collect();
        if let (Some(threshold), Some(mask)) = (masked, &scene.mask) {
            for plane in values.chunks_exact_mut(w * h) {
                for (value, &mask) in plane.iter_mut().zip(mask.values()) {
                    if threshold.hides(mask) {
                        *value = 0.0;
                    }
                }
            }
        }
        let scale = self.networks.autoencoder().scale();
        let pixels = Tensor::from_vec(values, (1, 3, h, w), self.networks.device())?;
        // a picture that is resized as latents is of any size
        let pixels = pixels.narrow(2, 0, (h / scale * scale).max(1))?;
        let pixels = pixels.narrow(3, 0, (w / scale * scale).max(1))?;
        self.networks
            .encode_safely(&pixels.contiguous()?, &self.surface, &mut self.watch())
    }

    /// Latents in the size that is computed.
    fn resized(&self, latents: &Tensor) -> Result<Tensor> {
        let [_, h, w] = self.shape;
        let (_, _, from_h, from_w) = latents.dims4()?;
        if (from_h, from_w) == (h, w) {
            return Ok(latents.clone());
        }
        super::resize::bilinear(latents, (h, w))
    }

    /// The mask in the size of latents, `[1, 1, h, w]`, 1 where they are painted anew.
    fn latent_mask(&self, scene: &Scene, how: Resample) -> Result<Option<Tensor>> {
        let Some(mask) = &scene.mask else {
            return Ok(None);
        };
        let [_, h, w] = self.shape;
        let device = self.networks.device();
        let unit = |value: u8| f32::from(value) / 255.0;
        let values: Vec<f32> = match how {
            Resample::Nearest => return self.nearest_mask(scene, Threshold::Half).map(Some),
            Resample::Bilinear => {
                let (wide, high) = (mask.width() as usize, mask.height() as usize);
                let values: Vec<f32> = mask.values().iter().map(|&v| unit(v)).collect();
                let full = Tensor::from_vec(values, (1, 1, high, wide), device)?;
                return super::resize::bilinear(&full, (h, w)).map(Some);
            }
            Resample::Bicubic | Resample::RoundedBicubic => {
                let (w, h) = (u32::try_from(w), u32::try_from(h));
                let (Ok(w), Ok(h)) = (w, h) else {
                    return Err(Error::Usage("the mask's latents are too large".to_owned()));
                };
                let small = mask.resize(w, h, Filter::Bicubic)?;
                let rounded = how == Resample::RoundedBicubic;
                let value = |v: &u8| {
                    if rounded {
                        unit(*v).round_ties_even()
                    } else {
                        unit(*v)
                    }
                };
                small.values().iter().map(value).collect()
            }
        };
        Ok(Some(Tensor::from_vec(values, (1, 1, h, w), device)?))
    }

    /// The mask as A1111 gives it to networks for inpainting.
    fn rounded_mask(&self, scene: &Scene) -> Result<Tensor> {
        self.nearest_mask(scene, Threshold::Rounded)
    }

    /// Of every latent's pixels the first at the top and left.
    fn nearest_mask(&self, scene: &Scene, threshold: Threshold) -> Result<Tensor> {
        let [_, h, w] = self.shape;
        let mut values = Vec::with_capacity(h * w);
        if let Some(mask) = &scene.mask {
            let (wide, high) = (mask.width() as usize, mask.height() as usize);
            for y in 0..h {
                for x in 0..w {
                    let at = (y * high / h) * wide + x * wide / w;
                    let hidden = mask.values().get(at).is_some_and(|&v| threshold.hides(v));
                    values.push(f32::from(u8::from(hidden)));
                }
            }
        }
        Ok(Tensor::from_vec(
            values,
            (1, 1, h, w),
            self.networks.device(),
        )?)
    }

    /// What a network for inpainting is given: the mask and the latents of what is left, `[b, extra, h, w]`. A transformer is given every pixel
    /// of the mask, and last.
    fn inpainting(&self, pixels: Option<&Grey>, mask: &Tensor, rest: &Tensor) -> Result<Tensor> {
        let [c, h, w] = self.shape;
        let b = rest.dim(0)?;
        let extra = self.networks.config().extra_channels();
        if extra == c + 1 {
            let mask = mask.repeat((b, 1, 1, 1))?;
            return Ok(Tensor::cat(&[&mask, rest], 1)?);
        }
        let scale = self.networks.autoencoder().scale();
        if extra != c + scale * scale {
            return Err(Error::Unsupported(format!(
                "the network takes {extra} channels beside {c} of latents, expected {} for inpainting",
                c + 1
            )));
        }
        let pixels = match pixels {
            Some(mask) => mask
                .values()
                .iter()
                .map(|&v| f32::from(u8::from(Threshold::Half.hides(v))))
                .collect(),
            None => vec![1.0; h * w * scale * scale],
        };
        let device: &Device = self.networks.device();
        let pixels = Tensor::from_vec(pixels, (h, scale, w, scale), device)?;
        let pixels = pixels.permute((1, 3, 0, 2))?.contiguous()?;
        let pixels = pixels
            .reshape((1, scale * scale, h, w))?
            .repeat((b, 1, 1, 1))?;
        Ok(Tensor::cat(&[rest, &pixels], 1)?)
    }

    /// The same where all is painted: what is left is grey, as in A1111.
    fn all_masked(&self, b: usize) -> Result<Tensor> {
        let [_, h, w] = self.shape;
        let scale = self.networks.autoencoder().scale();
        let device = self.networks.device();
        let grey = Tensor::zeros((1, 3, h * scale, w * scale), DType::F32, device)?;
        let rest = self
            .networks
            .encode_safely(&grey, &self.surface, &mut self.watch())?
            .mode();
        let rest = self.networks.scale_latents(&rest)?.repeat((b, 1, 1, 1))?;
        let mask = Tensor::ones((1, 1, h, w), DType::F32, device)?;
        self.inpainting(None, &mask, &rest)
    }
}

/// How a mask is made as small as latents.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Resample {
    /// diffusers, of the mask made black and white.
    Nearest,
    /// ComfyUI.
    Bilinear,
    /// A1111 with soft edges.
    Bicubic,
    /// A1111.
    RoundedBicubic,
}

/// From which grey on a mask hides what is below.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Threshold {
    /// diffusers: half.
    Half,
    /// A1111: rounded to black or white.
    Rounded,
}

impl Threshold {
    fn hides(self, value: u8) -> bool {
        let unit = f32::from(value) / 255.0;
        match self {
            Self::Half => unit >= 0.5,
            Self::Rounded => unit.round_ties_even() > 0.0,
        }
    }
}
