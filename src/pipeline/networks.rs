//! The networks of a model, loaded and ready.

mod tiled;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use sd_kernels::cpu::Level;
use sd_kernels::plan::{Feed, Options, Plan, Precision, Store};
use sd_kernels::{Graph, Source, Weights, Wrap, ops};
use sd_models::clip::{self, TextEncoder};
use sd_models::denoiser::{self, Denoiser as Network, Inputs, Steering};
use sd_models::t5::{self, T5Encoder};
use sd_models::vae::{self, AnyDecoder, Encoder, TinyConfig};
use sd_models::variant::{Outputs, Variant};

use super::adapted::bind_adapters;
use super::conditions::{ADDED, CONTEXT, Conditions, DEEP, EXTRA, GUIDANCE, LABEL, REFERENCE};
use super::control::{Acting, LoadedControl, input_names, steer, values};
use super::coverage::{Coverage, ENCODER, T5, TEXT, UNET, VAE, named, source};
use super::image_prompt::{ActingImage, LoadedImagePrompt, image_input, prompts};
use super::tiling::Surface;
use super::tower::{LoadedT5, LoadedTower, Runner};
use crate::adapters::{Adapters, Bound, Owner, Strength};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::memory::Memory;
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

/// What pictures are encoded with, which few runs need: its weights are asked for then.
struct EncoderParts {
    config: vae::Config,
    source: Arc<dyn Source>,
}

/// The distribution of a picture's latents, before they are scaled.
#[derive(Debug, Clone)]
pub struct Posterior {
    mean: Tensor,
    deviation: Tensor,
}

impl Posterior {
    /// Of `[b, 2 · c, h, w]`: means, and logarithms of variances.
    fn new(moments: &Tensor) -> Result<Self> {
        let half = moments.dim(1)? / 2;
        let logarithm = moments.narrow(1, half, half)?.clamp(-30f64, 20f64)?;
        Ok(Self {
            mean: moments.narrow(1, 0, half)?.contiguous()?,
            deviation: (logarithm * 0.5)?.exp()?,
        })
    }

    /// The most probable latents `[b, c, h, w]`.
    pub fn mode(&self) -> Tensor {
        self.mean.clone()
    }

    /// A sample for each of the draws `[n, c, h, w]` of standard normal numbers.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor> {
        let spread = noise.broadcast_mul(&self.deviation)?;
        Ok(spread.broadcast_add(&self.mean)?)
    }

    fn is_finite(&self) -> Result<bool> {
        let sum = |x: &Tensor| x.abs()?.sum_all()?.to_scalar::<f32>();
        Ok(sum(&self.mean)?.is_finite() && sum(&self.deviation)?.is_finite())
    }
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

/// What one call of the denoising network has to do.
struct Work {
    /// Width and height of the latents.
    size: (usize, usize),
    /// Latents in all.
    batch: usize,
    /// Tokens of the context.
    tokens: usize,
    /// Width and height of the latents that it looks at.
    reference: Option<(usize, usize)>,
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

    fn forget(&self, changed: &BTreeSet<String>) -> bool {
        let is_changed = |name: &str| changed.contains(name);
        match &self.planned {
            _ if changed.is_empty() => {}
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

    /// The names of a UNet's self-attentions.
    pub fn self_attentions(&self) -> Vec<&str> {
        self.unet.self_attentions()
    }

    /// The UNet for latents of one size under conditions of batch n or a multiple of it, changed as `variant` says. `timesteps` are those that
    /// will be asked for, and `wrap` the axes along which pictures have no edges.
    ///
    /// # Errors
    /// When a weight cannot be read or memory is short.
    pub fn denoiser(
        &self,
        [n, _, h, w]: [usize; 4],
        conditions: &Conditions,
        timesteps: &[f64],
        (variant, wrap): (&Variant, Wrap),
    ) -> Result<Denoiser<'_>> {
        let (batch, tokens, _) = conditions.context.dims3()?;
        let Some(planned) = &self.planned else {
            return Ok(Denoiser {
                networks: self,
                repeat: batch / n.max(1),
                wrap,
                how: How::Eager(conditions.to_dtype(self.dtype)?, variant.clone()),
            });
        };
        let beside = Beside {
            controls: &conditions.controls,
            images: &conditions.images,
        };
        let work = Work {
            size: (w, h),
            batch,
            tokens,
            reference: match &conditions.reference {
                Some(reference) => {
                    let (_, _, h, w) = reference.dims4()?;
                    Some((w, h))
                }
                None => None,
            },
        };
        let (graph, outputs) = ops::wrapped(wrap, || self.record(&work, beside, variant))?;
        let options = self.unet_options(batch / n.max(1), beside, (&graph, &outputs.prediction))?;
        let outputs = (&outputs.prediction, outputs.taps.as_slice());
        let mut plan = Plan::compile_tapped(&graph, outputs, &options, &planned.unet)?;
        let mut distinct: Vec<f32> = timesteps.iter().map(|&t| t as f32).collect();
        distinct.sort_by(f32::total_cmp);
        distinct.dedup();
        plan.prepare_timesteps(&distinct)?;
        Ok(Denoiser {
            networks: self,
            repeat: batch / n.max(1),
            wrap,
            how: How::Planned {
                plan: Box::new(plan),
                constants: self.constants(conditions, n)?,
                out: Vec::new(),
            },
        })
    }

    /// What stays the same during a run of `n` pictures, by the names of a plan's inputs.
    fn constants(
        &self,
        conditions: &Conditions,
        n: usize,
    ) -> Result<Vec<(Cow<'static, str>, Vec<f32>)>> {
        let own = conditions.named()?.into_iter();
        let own = own.map(|(name, values)| (Cow::from(name), values));
        let steering = values(&self.controls, &conditions.controls, n)?;
        let images = conditions.images.iter().map(|image| {
            let tokens = image.tokens.flatten_all()?.to_vec1()?;
            Ok((image_input(image.index), tokens))
        });
        let images = images.collect::<Result<Vec<_>>>()?;
        Ok(own.chain(steering).chain(images).collect())
    }

    /// Latents `[b, c, h, w]` → pictures `[b, 3, H, W]`, computed in `dtype`.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub fn decode(&self, latents: &Tensor, dtype: DType) -> Result<Tensor> {
        let (b, _, h, w) = latents.dims4()?;
        let shape = latents.shape();
        let latents = latents.to_dtype(DType::F32)?.flatten_all()?;
        let mut values = latents.to_vec1::<f32>()?;
        self.vae.prepare(&mut values, h * w);
        if let Some(planned) = &self.planned {
            let (graph, output) = self.record_vae((w, h), b)?;
            let options = vae_options(dtype);
            let mut plan = Plan::compile(&graph, &output, &options, &planned.vae)?;
            let mut picture = Vec::new();
            plan.run(
                &[Feed {
                    name: "latents",
                    values: &values,
                }],
                &mut picture,
            )?;
            return Ok(Tensor::from_vec(
                picture,
                plan.output_shape(),
                &self.device,
            )?);
        }
        let latents = Tensor::from_vec(values, shape, &self.device)?.to_dtype(dtype)?;
        if dtype == self.dtype {
            return Ok(self.vae.forward(&latents.into())?.into_data()?);
        }
        let weights = Weights::new(Arc::clone(&self.vae_source), dtype, &self.device);
        let decoder = self.vae.reload(&weights);
        Ok(decoder.forward(&latents.into())?.into_data()?)
    }

    /// What pictures `[b, 3, H, W]` in [−1, 1] are in the autoencoder's latents, before they are scaled; computed in `dtype`.
    ///
    /// # Errors
    /// [`Error::Weights`] when the encoder is not whole; when the shapes do not fit or the executor fails.
    pub fn encode(&self, pictures: &Tensor, dtype: DType) -> Result<Posterior> {
        Posterior::new(&self.moments(pictures, dtype)?)
    }

    /// Means of the latents, and logarithms of their variances.
    fn moments(&self, pictures: &Tensor, dtype: DType) -> Result<Tensor> {
        let EncoderParts { config, source } = &self.encoder;
        let weights = Weights::new(Arc::clone(source), dtype, &self.device);
        let encoder = Encoder::load(&weights, config);
        if self.planned.is_some() {
            named(ENCODER, weights.check())?;
            let graph = Graph::new();
            let output = encoder.moments(&graph.input("pictures", pictures.dims()))?;
            let mut plan = Plan::compile(&graph, &output, &vae_options(dtype), &Store::default())?;
            let values = pictures
                .to_dtype(DType::F32)?
                .flatten_all()?
                .to_vec1::<f32>()?;
            let feed = Feed {
                name: "pictures",
                values: &values,
            };
            let mut moments = Vec::new();
            plan.run(&[feed], &mut moments)?;
            Ok(Tensor::from_vec(
                moments,
                plan.output_shape(),
                &self.device,
            )?)
        } else {
            named(ENCODER, weights.finish())?;
            let pictures = pictures.to_dtype(dtype)?;
            let moments = encoder.moments(&pictures.into())?.into_data()?;
            Ok(moments.to_dtype(DType::F32)?)
        }
    }

    /// The same in the run's type, or in f32 where that leaves the numbers.
    ///
    /// # Errors
    /// As [`Networks::encode`], and [`Error::Numeric`] when the result is not finite even then.
    pub fn encode_safely(&self, pictures: &Tensor, surface: &Surface) -> Result<Posterior> {
        let posterior = self.encode_as(pictures, self.dtype, surface)?;
        if posterior.is_finite()? {
            return Ok(posterior);
        }
        let posterior = self.encode_as(pictures, DType::F32, surface)?;
        if posterior.is_finite()? {
            return Ok(posterior);
        }
        Err(Error::Numeric(
            "the picture's latents are not numbers, even in f32; the checkpoint's autoencoder may be damaged".to_owned(),
        ))
    }

    /// The UNet's latents for those of the encoder.
    ///
    /// # Errors
    /// When the device has no memory.
    pub fn scale_latents(&self, latents: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = latents.dims4()?;
        let mut values: Vec<f32> = latents.flatten_all()?.to_vec1()?;
        self.encoder.config.normalise(&mut values, h * w);
        Ok(Tensor::from_vec(values, latents.shape(), &self.device)?)
    }

    /// The autoencoder's structure, which has the scaling of latents.
    pub fn autoencoder(&self) -> &vae::Config {
        &self.encoder.config
    }

    /// One call of the UNet, recorded, for `batch` latents of `w × h` under contexts of `tokens`: what it costs and what it holds.
    ///
    /// # Errors
    /// When the network cannot take the size.
    pub fn record_unet(
        &self,
        (w, h): (usize, usize),
        (batch, tokens): (usize, usize),
    ) -> Result<(Graph, sd_kernels::Tensor)> {
        let work = Work {
            size: (w, h),
            batch,
            tokens,
            reference: None,
        };
        let controls = self.stand_ins();
        let beside = Beside {
            controls: &controls,
            ..Beside::default()
        };
        let (graph, outputs) = self.record(&work, beside, &Variant::default())?;
        Ok((graph, outputs.prediction))
    }

    /// All networks that steer, as far as sizes go.
    fn stand_ins(&self) -> Vec<Acting> {
        let controls = self.controls.iter().enumerate();
        controls.map(|(i, control)| control.stand_in(i)).collect()
    }

    fn record(
        &self,
        work: &Work,
        beside: Beside<'_>,
        variant: &Variant,
    ) -> Result<(Graph, Outputs)> {
        let Work {
            size: (w, h),
            batch,
            tokens,
            reference,
        } = *work;
        let graph = Graph::new();
        let config = &self.config;
        let latents = graph.input("sample", &[batch, config.latent_channels(), h, w]);
        let sample = match config.extra_channels() {
            0 => latents.clone(),
            more => ops::concat(&latents, &graph.input(EXTRA, &[batch, more, h, w]))?,
        };
        let timestep = graph.input("timestep", &[batch]);
        let context = graph.input(CONTEXT, &[batch, tokens, config.context_width()]);
        let vector = |name, width: Option<usize>| width.map(|w| graph.input(name, &[batch, w]));
        let added = vector(ADDED, config.added_width());
        let guidance = vector(GUIDANCE, config.guidance_width());
        let label = vector(LABEL, config.label_width());
        let channels = config.latent_channels();
        let reference = reference.map(|(w, h)| graph.input(REFERENCE, &[batch, channels, h, w]));
        let inputs = Inputs {
            sample: &sample,
            timestep: &timestep,
            context: &context,
            added: added.as_ref(),
            guidance: guidance.as_ref(),
            label: label.as_ref(),
            reference: reference.as_ref(),
            steering: Steering::default(),
        };
        // a ControlNet sees the latents alone
        let bare = Inputs {
            sample: &latents,
            ..inputs
        };
        let give = |name: &str, shape: &[usize]| Ok(graph.input(name, shape));
        let (residuals, features) = steer(&self.controls, beside.controls, &bare, &give)?;
        let images = beside.images.iter();
        let tokens = images.map(|one| graph.input(&image_input(one.index), one.tokens.dims()));
        let tokens: Vec<sd_kernels::Tensor> = tokens.collect();
        let inputs = Inputs {
            steering: Steering {
                residuals: residuals.as_ref(),
                features: &features,
                images: &prompts(&self.image_prompts, beside.images, &tokens),
            },
            ..inputs
        };
        let deep = match config.unet().and_then(|unet| unet.levels.first()) {
            Some(first) if variant.shallow => {
                Some(graph.input(DEEP, &[batch, first.channels, h, w]))
            }
            _ => None,
        };
        let outputs = self.unet.forward_as(&inputs, variant, deep.as_ref())?;
        Ok((graph, outputs))
    }

    /// Decoding `batch` pictures, recorded, for latents of `w × h`.
    ///
    /// # Errors
    /// When the network cannot take the size.
    pub fn record_vae(
        &self,
        (w, h): (usize, usize),
        batch: usize,
    ) -> Result<(Graph, sd_kernels::Tensor)> {
        let graph = Graph::new();
        let channels = self.vae.latent_channels();
        let output = self
            .vae
            .forward(&graph.input("latents", &[batch, channels, h, w]))?;
        Ok((graph, output))
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

    /// How plans of the denoising network are made. Where there is no room for all of its packed weights, some are packed at every call.
    fn unet_options(
        &self,
        texts: usize,
        beside: Beside<'_>,
        (graph, output): (&Graph, &sd_kernels::Tensor),
    ) -> Result<Options> {
        /// The part of what is free that weights may take.
        const SHARE: f64 = 0.8;
        let pictures = || {
            let controls = beside.controls.iter();
            controls.flat_map(|one| input_names(one.index))
        };
        let images = beside.images.iter().map(|one| image_input(one.index));
        let constant = [CONTEXT, ADDED, GUIDANCE, EXTRA, REFERENCE, LABEL]
            .map(Cow::from)
            .into_iter();
        let halved = std::iter::once(Cow::from("sample")).chain(pictures());
        let options = Options {
            timestep: Some("timestep"),
            constant: constant.chain(pictures()).chain(images).collect(),
            halved: halved.filter(|_| texts > 1).collect(),
            copies: texts,
            ..Options::new(Level::current(), precision(self.dtype))
        };
        let Some(free) = Memory::look().available else {
            return Ok(options);
        };
        let sizes = Plan::sizes(graph, output, &options)?;
        let held = self
            .planned
            .as_ref()
            .map_or(0, |planned| planned.unet.bytes());
        let free = (free as f64 * SHARE) as usize + held;
        let keep = free.saturating_sub(sizes.buffers);
        Ok(match sizes.weights > keep {
            true => Options { keep, ..options },
            false => options,
        })
    }
}

/// What a denoising network is run with or without, beside its inputs.
#[derive(Clone, Copy, Default)]
struct Beside<'a> {
    /// Pictures that steer.
    controls: &'a [Acting],
    /// Pictures beside the text.
    images: &'a [ActingImage],
}

/// How plans of the decoder are made: one picture after another reads every weight once each, and to pack them again costs less than the memory
/// to keep them.
fn vae_options(dtype: DType) -> Options {
    Options {
        transient: true,
        ..Options::new(Level::current(), precision(dtype))
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

/// Whether plans run the networks: on the CPU, unless the environment asks for the reference executor.
fn is_planned(device: &Device) -> bool {
    device.is_cpu() && std::env::var_os("SD_RS_EAGER").is_none()
}

/// The UNet at one size, ready to be called.
pub struct Denoiser<'a> {
    networks: &'a Networks,
    /// How often the sample is in a batch: once for each text.
    repeat: usize,
    wrap: Wrap,
    how: How,
}

enum How {
    /// And how the network is changed.
    Eager(Conditions, Variant),
    Planned {
        plan: Box<Plan>,
        /// What does not change from call to call; until the first one.
        constants: Vec<(Cow<'static, str>, Vec<f32>)>,
        out: Vec<f32>,
    },
}

impl Denoiser<'_> {
    /// The prediction in f32 for `sample [n, c, h, w]` in f32: `[texts · n, c, h, w]`, as the context has them.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub fn predict(&mut self, sample: &Tensor, timestep: f64) -> Result<Tensor> {
        Ok(self.predict_with(sample, timestep, None)?.0)
    }

    /// The same with the values that the variant taps; `deep` is what a shallow network takes from an earlier call.
    ///
    /// # Errors
    /// As [`Denoiser::predict`].
    pub fn predict_with(
        &mut self,
        sample: &Tensor,
        timestep: f64,
        deep: Option<&Tensor>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let Networks {
            unet,
            controls,
            image_prompts,
            device,
            dtype,
            ..
        } = self.networks;
        match &mut self.how {
            How::Eager(conditions, variant) => {
                let mut sample = Tensor::cat(&vec![sample; self.repeat], 0)?.to_dtype(*dtype)?;
                let latents = sd_kernels::Tensor::from(sample.clone());
                if let Some(extra) = &conditions.extra {
                    sample = Tensor::cat(&[&sample, extra], 1)?;
                }
                let timestep = Tensor::full(timestep as f32, sample.dim(0)?, device)?;
                let node = |x: &Tensor| sd_kernels::Tensor::from(x.clone());
                let node_of = |x: &Option<Tensor>| x.as_ref().map(node);
                let (added, guidance) = (node_of(&conditions.added), node_of(&conditions.guidance));
                let (label, reference) =
                    (node_of(&conditions.label), node_of(&conditions.reference));
                let (batch, sample) = (sample.dim(0)?, sample.into());
                let inputs = Inputs {
                    sample: &sample,
                    timestep: &timestep.into(),
                    context: &node(&conditions.context),
                    added: added.as_ref(),
                    guidance: guidance.as_ref(),
                    label: label.as_ref(),
                    reference: reference.as_ref(),
                    steering: Steering::default(),
                };
                let given = values(controls, &conditions.controls, batch)?;
                let give = |name: &str, shape: &[usize]| {
                    let found = given.iter().find(|(own, _)| own == name);
                    let values = found.map(|(_, values)| values.clone()).unwrap_or_default();
                    let values = Tensor::from_vec(values, shape, device)?;
                    Ok(values.to_dtype(*dtype)?.into())
                };
                let bare = Inputs {
                    sample: &latents,
                    ..inputs
                };
                let acting = &conditions.controls;
                let steered = || steer(controls, acting, &bare, &give);
                let (residuals, features) = ops::wrapped(self.wrap, steered)?;
                let images = &conditions.images;
                let tokens = images
                    .iter()
                    .map(|one| Ok(one.tokens.to_dtype(*dtype)?.into()));
                let tokens = tokens.collect::<Result<Vec<sd_kernels::Tensor>>>()?;
                let inputs = Inputs {
                    steering: Steering {
                        residuals: residuals.as_ref(),
                        features: &features,
                        images: &prompts(image_prompts, images, &tokens),
                    },
                    ..inputs
                };
                let deep = deep.map(|deep| deep.to_dtype(*dtype)).transpose()?;
                let deep = deep.as_ref().map(node);
                let network = || unet.forward_as(&inputs, variant, deep.as_ref());
                let out = ops::wrapped(self.wrap, network)?;
                let data = |x: sd_kernels::Tensor| -> Result<Tensor> {
                    Ok(x.into_data()?.to_dtype(DType::F32)?)
                };
                let taps = out.taps.into_iter().map(data).collect::<Result<_>>()?;
                Ok((data(out.prediction)?, taps))
            }
            How::Planned {
                plan,
                constants,
                out,
            } => {
                let sample = sample.flatten_all()?.to_vec1::<f32>()?;
                let timestep = [timestep as f32];
                let mut feeds = vec![
                    Feed {
                        name: "sample",
                        values: &sample,
                    },
                    Feed {
                        name: "timestep",
                        values: &timestep,
                    },
                ];
                for (name, values) in constants.iter() {
                    feeds.push(Feed { name, values });
                }
                let deep = deep.map(|deep| deep.flatten_all()?.to_vec1::<f32>());
                let deep = deep.transpose()?;
                feeds.extend(deep.iter().map(|values| Feed { name: DEEP, values }));
                plan.run(&feeds, out)?;
                constants.clear();
                let prediction = Tensor::from_slice(out, plan.output_shape(), device)?;
                let shapes: Vec<Vec<usize>> = plan.tap_shapes().map(<[_]>::to_vec).collect();
                let mut taps = Vec::with_capacity(shapes.len());
                for (i, shape) in shapes.into_iter().enumerate() {
                    let mut values = Vec::new();
                    plan.tap(i, &mut values)?;
                    taps.push(Tensor::from_vec(values, shape, device)?);
                }
                Ok((prediction, taps))
            }
        }
    }
}
