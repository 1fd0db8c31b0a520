//! The networks of a model, loaded and ready.

mod autoencoder;
mod calls;
mod tiled;

pub use autoencoder::Posterior;
use autoencoder::{EncoderParts, vae_options};
use calls::{Beside, Work};
pub(super) use calls::{Denoiser, Outside, Predicted};

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use sd_kernels::plan::{Plan, Precision, Store};
use sd_kernels::{Source, Weights};
use sd_models::clip::{self, TextEncoder};
use sd_models::denoiser::{self, Denoiser as Network};
use sd_models::t5::{self, T5Encoder};
use sd_models::vae::{self, AnyDecoder, TinyConfig};
use sd_models::variant::Variant;

use super::adapted::bind_adapters;
use super::control::LoadedControl;
use super::coverage::{Coverage, T5, TEXT, UNET, VAE, named, source};
use super::image_prompt::LoadedImagePrompt;
use super::tiling::Surface;
use super::tower::{LoadedT5, LoadedTower, Runner};
use crate::adapters::{Adapters, Bound, Changed, Owner, Strength};
use crate::checkpoint::Checkpoint;
use crate::device::is_eager;
use crate::error::{Error, Result};
use crate::spec::{ControlSpec, ImagePromptSpec, ModelSpec};
use crate::weights::RandomSource;

/// Text encoders, UNet and picture decoder on a device.
pub struct Networks {
    towers: Vec<LoadedTower>,
    t5: Option<LoadedT5>,
    tokens: usize,
    unet: Network,
    unet_source: Arc<dyn Source>,
    config: denoiser::Config,
    /// Where the denoising network's weights come from; the eager executor holds them.
    unet_weights: Weights,
    controls: Vec<LoadedControl>,
    image_prompts: Vec<LoadedImagePrompt>,
    vae: AnyDecoder,
    vae_source: Arc<dyn Source>,
    encoder: EncoderParts,
    device: Device,
    dtype: DType,
    weight_bytes: u64,
    adapters: Arc<Bound>,
    /// Where plans run networks: the packed weights. `None`: the eager executor holds weights as tensors.
    planned: Option<Planned>,
}

/// Packed weights of the networks that stay.
#[derive(Default)]
struct Planned {
    unet: Store,
    vae: Store,
}

/// The sources of the networks' weights.
struct Sources {
    towers: Vec<Arc<dyn Source>>,
    t5: Option<Arc<dyn Source>>,
    unet: Arc<dyn Source>,
    vae: Arc<dyn Source>,
    /// The whole autoencoder's, where a tiny decoder takes its decoder's place.
    encoder: Arc<dyn Source>,
}

/// Bytes that a run takes.
#[derive(Debug, Clone, Copy)]
pub struct Need {
    /// Weights, as long as the model is there.
    pub weights: u64,
    /// Everything between layers, at the peak.
    pub buffers: u64,
}

/// The structures of a model's networks.
#[derive(Clone, Copy)]
pub struct Configs<'a> {
    /// The text towers.
    pub towers: &'a [&'a clip::Config],
    /// T5.
    pub t5: Option<&'a t5::Config>,
    /// Tokens of a short text's states, of all towers behind each other.
    pub tokens: usize,
    /// The denoising network.
    pub unet: &'a denoiser::Config,
    /// The autoencoder.
    pub vae: &'a vae::Config,
    /// A tiny decoder in the place of the autoencoder's.
    pub tiny: Option<&'a TinyConfig>,
}

impl Networks {
    /// Reads the networks of a checkpoint, from which `spec` was read; with them comes what its other tensors are.
    ///
    /// # Errors
    /// [`Error::BadModel`] that names missing or misshapen tensors, before any is read; whatever reading one gives.
    pub fn load(
        checkpoint: &Checkpoint,
        spec: &ModelSpec,
        device: &Device,
        dtype: DType,
    ) -> Result<(Self, Coverage)> {
        Self::load_adapted(checkpoint, spec, &Adapters::default(), device, dtype)
    }

    /// The same with adapters on them.
    ///
    /// # Errors
    /// As [`Networks::load`], and when an adapter does not fit.
    pub fn load_adapted(
        checkpoint: &Checkpoint,
        spec: &ModelSpec,
        adapters: &Adapters,
        device: &Device,
        dtype: DType,
    ) -> Result<(Self, Coverage)> {
        let coverage = Coverage::of(checkpoint, spec);
        coverage.check(checkpoint)?;
        let adapters = bind_adapters(spec, adapters)?;
        let towers = spec.text.iter().map(|tower| &tower.component);
        let sources = Sources {
            towers: spec
                .text
                .iter()
                .map(|tower| {
                    let owner = Owner::Text(tower.role.component);
                    adapters.wrap(owner, source(&tower.component))
                })
                .collect(),
            t5: spec.t5.as_ref().map(|t5| {
                let owner = Owner::Text(t5.role.component);
                adapters.wrap(owner, source(&t5.component))
            }),
            unet: adapters.wrap(Owner::Denoiser, source(&spec.unet)),
            vae: match &spec.tiny {
                Some(tiny) => source(tiny),
                None => source(&spec.vae),
            },
            encoder: source(&spec.vae),
        };
        let towers: Vec<&clip::Config> = towers.map(|tower| &tower.config).collect();
        let configs = Configs {
            towers: &towers,
            t5: spec.t5.as_ref().map(|t5| &t5.component.config),
            tokens: spec.tokens(),
            unet: &spec.unet.config,
            vae: &spec.vae.config,
            tiny: spec.tiny.as_ref().map(|tiny| &tiny.config),
        };
        let mut networks = Self::build(configs, sources, device, dtype).map_err(|e| match e {
            Error::Weights(reason) => Error::bad_model(checkpoint.path(), reason),
            other => other,
        })?;
        networks.adapters = adapters;
        Ok((networks, coverage))
    }

    /// Networks of these structures with made-up weights.
    ///
    /// # Errors
    /// When the machine has no memory for them.
    pub fn random(configs: Configs<'_>, device: &Device, dtype: DType) -> Result<Self> {
        let source = || Arc::new(RandomSource) as Arc<dyn Source>;
        let sources = Sources {
            towers: configs.towers.iter().map(|_| source()).collect(),
            t5: configs.t5.map(|_| source()),
            unet: source(),
            vae: source(),
            encoder: source(),
        };
        Self::build(configs, sources, device, dtype)
    }

    fn build(
        configs: Configs<'_>,
        sources: Sources,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let planned = is_planned(device).then(Planned::default);
        let weights = |source: &Arc<dyn Source>| Weights::new(Arc::clone(source), dtype, device);
        // a plan packs weights when it is made; the eager executor reads them now
        let find = |name, weights: &Weights| {
            let found = if planned.is_some() {
                weights.check()
            } else {
                weights.finish()
            };
            named(name, found)
        };
        let eager = planned.is_none().then_some(dtype);
        let mut weight_bytes = 0;
        let mut towers = Vec::with_capacity(configs.towers.len());
        for (config, source) in configs.towers.iter().zip(&sources.towers) {
            let weights = weights(source);
            let encoder = TextEncoder::load(&weights, config);
            find(TEXT, &weights)?;
            weight_bytes += weights.bytes();
            towers.push(LoadedTower::new(
                encoder,
                Runner::new(weights, device, eager),
            ));
        }
        let t5 = match (configs.t5, &sources.t5) {
            (Some(config), Some(source)) => {
                let weights = weights(source);
                let encoder = T5Encoder::load(&weights, config);
                find(T5, &weights)?;
                weight_bytes += weights.bytes();
                Some(LoadedT5::new(encoder, Runner::new(weights, device, eager)))
            }
            _ => None,
        };
        let unet_weights = weights(&sources.unet);
        let unet = Network::load(&unet_weights, configs.unet);
        find(UNET, &unet_weights)?;
        let vae_weights = weights(&sources.vae);
        let vae = AnyDecoder::load(&vae_weights, configs.vae, configs.tiny);
        find(VAE, &vae_weights)?;
        weight_bytes += unet_weights.bytes() + vae_weights.bytes();
        Ok(Self {
            towers,
            t5,
            tokens: configs.tokens,
            unet,
            unet_weights,
            unet_source: sources.unet,
            config: configs.unet.clone(),
            controls: Vec::new(),
            image_prompts: Vec::new(),
            vae,
            vae_source: sources.vae,
            encoder: EncoderParts {
                config: configs.vae.clone(),
                source: sources.encoder,
            },
            device: device.clone(),
            dtype,
            weight_bytes,
            adapters: Arc::default(),
            planned,
        })
    }

    /// Adds a network that steers the UNet by a picture, of a model whose latents are `scale` pixels wide.
    ///
    /// # Errors
    /// [`Error::Weights`] that lists what is missing; [`Error::Usage`] when it was made for another family.
    pub(super) fn add_control(&mut self, control: &ControlSpec, scale: usize) -> Result<()> {
        let Some(unet) = self.config.unet() else {
            return Err(Error::Unsupported(format!(
                "a {} steers a UNet, and this model has a transformer; models of Stable Diffusion 1, 2 and XL take it",
                control.title()
            )));
        };
        let loaded = LoadedControl::load(
            control,
            self.controls.len(),
            (unet, scale),
            &self.unet_source,
            (self.dtype, &self.device),
        )?;
        if self.planned.is_none() {
            loaded.finish()?;
        }
        self.weight_bytes += loaded.bytes();
        self.controls.push(loaded);
        Ok(())
    }

    /// Adds an IP-Adapter.
    ///
    /// # Errors
    /// As [`Networks::add_control`].
    pub(super) fn add_image_prompt(&mut self, spec: &ImagePromptSpec) -> Result<()> {
        let Some(unet) = self.config.unet() else {
            return Err(Error::Unsupported(
                "an IP-Adapter is for a UNet, and this model has a transformer; models of Stable Diffusion 1, 2 and XL take it".to_owned(),
            ));
        };
        let eager = self.planned.is_none().then_some(self.dtype);
        let how = (&self.device, self.dtype, eager);
        let loaded = LoadedImagePrompt::load(spec, self.image_prompts.len(), unet, how)?;
        self.weight_bytes += loaded.bytes();
        self.image_prompts.push(loaded);
        Ok(())
    }

    /// IP-Adapters.
    pub(super) fn image_prompts(&self) -> &[LoadedImagePrompt] {
        &self.image_prompts
    }

    /// Networks that steer the UNet.
    pub(super) fn controls(&self) -> &[LoadedControl] {
        &self.controls
    }

    /// What adapters change in them.
    pub fn adapters(&self) -> &Bound {
        &self.adapters
    }

    /// Takes the strengths of adapters that hold at step `step` of `steps`; whether the denoising network is another one now. Then those of its
    /// weights that have changed are read anew when it is made ready.
    pub fn at_step(&self, step: usize, steps: usize) -> bool {
        self.forget(&self.adapters.at_step(step, steps))
    }

    /// Gives the adapter at `place` other strengths: 0 takes it off, and the weights are then the model's own to the bit. What was made ready before
    /// keeps the old ones.
    pub fn set_strength(&self, place: usize, strength: Strength) {
        self.forget(&self.adapters.set_strength(place, strength));
    }

    fn forget(&self, changed: &Changed) -> bool {
        let is_changed = |name: &str| changed.weights.contains(name);
        match &self.planned {
            _ if changed.weights.is_empty() => {}
            Some(planned) => planned.unet.forget(&is_changed),
            None => self.unet_weights.release_if(&is_changed),
        }
        !changed.is_empty()
    }

    /// The text encoders.
    pub fn towers(&self) -> &[LoadedTower] {
        &self.towers
    }

    /// The same, to be changed.
    pub(super) fn towers_mut(&mut self) -> &mut [LoadedTower] {
        &mut self.towers
    }

    /// T5.
    pub fn t5(&self) -> Option<&LoadedT5> {
        self.t5.as_ref()
    }

    /// The structure of the denoising network.
    pub fn config(&self) -> &denoiser::Config {
        &self.config
    }

    /// The row of a class in the denoising network's table, `[1, width]`; none where it has no such class.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn label(&self, class: usize) -> Result<Option<Tensor>> {
        Ok(match self.unet.label(class)? {
            Some(row) => Some(Tensor::new(row, &self.device)?.unsqueeze(0)?),
            None => None,
        })
    }

    /// Tokens of a short text's states.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Channels of the latents that the decoder takes.
    pub fn vae_latent_channels(&self) -> usize {
        self.vae.latent_channels()
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The compute type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of all weights as held.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// What a run for `batch` latents of `size` (width, height) holds at its peak where `free` bytes are to be had, with plans beside each other for
    /// so many `texts` each, and perhaps with a picture's latents of their own.
    ///
    /// # Errors
    /// When the networks cannot take the size.
    pub fn memory(
        &self,
        size: (usize, usize),
        (batch, texts): (usize, &[usize]),
        reference: Option<(usize, usize)>,
        (surface, free): (&Surface, Option<u64>),
    ) -> Result<Need> {
        let controls = self.stand_ins();
        let beside = Beside {
            controls: &controls,
            ..Beside::default()
        };
        let record = |texts: usize| {
            let work = Work {
                size,
                batch: texts * batch,
                tokens: self.tokens,
                reference,
            };
            self.record(&work, beside, &Variant::default())
        };
        let decoding = |weights: u64| -> Result<u64> {
            let free = free.map(|free| free.saturating_sub(weights));
            Ok(self.decoding(size, self.dtype, surface, free)?.1)
        };
        if self.planned.is_none() {
            // one plan after another
            let most = texts.iter().max().copied().unwrap_or(1);
            let (unet, _) = record(most)?;
            let denoising = unet.peak_elements() * self.dtype.size_in_bytes() as u64;
            return Ok(Need {
                weights: self.weight_bytes,
                buffers: denoising.max(decoding(self.weight_bytes)?),
            });
        }
        let (mut weights, mut buffers) = (0, 0);
        for &texts in texts {
            let (unet, outputs) = record(texts)?;
            let noise = outputs.prediction;
            let options = self.unet_options(texts, beside, (&unet, &noise))?;
            let unet = Plan::sizes(&unet, &noise, &options)?;
            weights = unet.weights.max(weights);
            buffers += unet.buffers + unet.transient;
        }
        let (weights, denoising) = (weights as u64, buffers as u64);
        Ok(Need {
            weights,
            buffers: denoising.max(decoding(weights)?),
        })
    }
}

/// The arithmetic of plans.
fn precision(dtype: DType) -> Precision {
    if dtype == DType::BF16 {
        Precision::Bf16
    } else {
        Precision::F32
    }
}

/// Whether plans run the networks: on the CPU or a card behind it, unless the environment asks for the reference executor.
fn is_planned(device: &Device) -> bool {
    device.is_cpu() && !is_eager()
}
