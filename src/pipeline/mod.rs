//! From a request to pictures: texts are encoded, noise is drawn, denoised step by step, decoded.

mod adapted;
mod conditions;
mod control;
mod coverage;
mod decode;
mod denoise;
mod event;
mod guidance;
mod image_prompt;
mod memory;
mod networks;
mod plan;
mod relay;
mod request;
mod sizes;
mod tower;

pub use adapted::bind_adapters;
pub use conditions::Conditions;
pub use control::{ControlMode, ControlRequest};
pub use coverage::Coverage;
pub use event::{Control, Event, Listener};
pub use guidance::SkipLayers;
pub use image_prompt::ImageRequest;
pub use networks::{Configs, Need, Networks};
pub use plan::Plan;
pub use request::{Request, Rng};
pub use sizes::SizeConditioning;
pub use tower::LoadedTower;

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};

use crate::adapters::Adapters;
use crate::checkpoint::{self, Checkpoint};
use crate::error::{Error, Result};
use crate::output::Image;
use crate::sampling::{Call, Generator};
use crate::spec::{ControlSpec, ImagePromptSpec, ModelSpec, Others};
use crate::text::{
    self, Behind, Conditioning, LongSpeaker, LongTower, Readers, Speaker, Texts, Tokenizers,
};
use denoise::BatchNoise;
use image_prompt::ImageTokens;
use networks::Denoiser;
use relay::Relay;

/// A loaded model.
pub struct Engine {
    spec: ModelSpec,
    tokenizers: Tokenizers,
    networks: Networks,
    load_time: Duration,
    warnings: Vec<String>,
    refiner: Option<Refiner>,
}

/// A second model that takes over where little noise is left (Podell et al., "SDXL", arXiv 2307.01952, section 2.5; Balaji et al., eDiff-I,
/// arXiv 2211.01324).
struct Refiner {
    engine: Box<Engine>,
    /// The part of the noise levels that is the first model's, 0 to 1.
    switch: f64,
}

/// A finished picture.
#[derive(Debug, Clone)]
pub struct Picture {
    /// The pixels.
    pub image: Image,
    /// The seed that makes it again.
    pub seed: u64,
}

/// What a batch gave.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The pictures, in the order of their seeds.
    pub pictures: Vec<Picture>,
    /// The latents as the UNet left them, `[b, c, h, w]` in f32.
    pub latents: Tensor,
    /// Where the time went.
    pub timings: Timings,
}

/// Wall-clock times of a batch.
#[derive(Debug, Clone, Default)]
pub struct Timings {
    /// Making the plan of the UNet; the first of a model packs its weights.
    pub load: Duration,
    /// Encoding the texts; once a run, the same in every batch of it.
    pub text: Duration,
    /// All network calls and sampler arithmetic.
    pub denoise: Duration,
    /// Each network call with its sampler arithmetic.
    pub steps: Vec<Duration>,
    /// The autoencoder.
    pub decode: Duration,
}

impl Engine {
    /// Loads every network of a checkpoint.
    ///
    /// # Errors
    /// When the family is not supported, something is missing, or a file cannot be read.
    pub fn load(checkpoint: &Checkpoint, device: &Device, dtype: DType) -> Result<Self> {
        Self::load_with(checkpoint, Others::default(), device, dtype)
    }

    /// The same with parts of other files.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn load_with(
        checkpoint: &Checkpoint,
        others: Others<'_>,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        Self::load_adapted(checkpoint, others, &Adapters::default(), device, dtype)
    }

    /// The same with adapters on its networks.
    ///
    /// # Errors
    /// As [`Engine::load`]; [`Error::BadModel`] when an adapter does not fit the model.
    pub fn load_adapted(
        checkpoint: &Checkpoint,
        others: Others<'_>,
        adapters: &Adapters,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let start = Instant::now();
        let detection = checkpoint::detect(checkpoint);
        let spec = ModelSpec::read_with(checkpoint, &detection, others)?;
        let tokenizers = text::tokenizers_for(checkpoint, &spec)?;
        let (networks, coverage) =
            Networks::load_adapted(checkpoint, &spec, adapters, device, dtype)?;
        let mut warnings = checkpoint.warnings().to_vec();
        warnings.extend(coverage.warning(checkpoint));
        warnings.extend(networks.adapters().warnings().iter().cloned());
        Ok(Self {
            spec,
            tokenizers,
            networks,
            load_time: start.elapsed(),
            warnings,
            refiner: None,
        })
    }

    /// Lets another model finish pictures: it takes over when the part `switch` of the training's noise levels is behind, as diffusers' ensemble
    /// of experts and A1111's refiner do.
    ///
    /// # Errors
    /// [`Error::Usage`] when `switch` is out of range or the models do not share latents and prediction.
    pub fn with_refiner(mut self, refiner: Self, switch: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&switch) {
            return Err(Error::Usage(format!(
                "--refiner-switch is {switch}, expected 0 to 1"
            )));
        }
        let traits = |engine: &Self| {
            let spec = &engine.spec;
            let channels = (
                spec.vae.config.latent_channels,
                spec.unet.config.in_channels(),
            );
            (channels, spec.vae.config.scale(), spec.prediction)
        };
        if traits(&self) != traits(&refiner) {
            return Err(Error::Usage(
                "--refiner is a model of other latents or another kind of prediction than --model; give one that was made for it".to_owned(),
            ));
        }
        self.load_time += refiner.load_time;
        self.warnings.extend(refiner.warnings.iter().cloned());
        self.refiner = Some(Refiner {
            engine: Box::new(refiner),
            switch,
        });
        Ok(self)
    }

    /// Adds networks that steer this model's UNet by pictures, behind those that it has.
    ///
    /// # Errors
    /// When a file is none, or was made for another family.
    pub fn with_controls<'a>(
        mut self,
        controls: impl IntoIterator<Item = &'a Checkpoint>,
    ) -> Result<Self> {
        let start = Instant::now();
        let scale = self.spec.vae.config.scale();
        for checkpoint in controls {
            let unet = self.spec.unet.config.unet().ok_or_else(|| {
                Error::Unsupported(format!(
                    "--controlnet steers a UNet, and this is {}, which has a transformer; models of Stable Diffusion 1, 2 and XL take it",
                    self.spec.family.phrase()
                ))
            })?;
            let control = ControlSpec::read(checkpoint, unet)?;
            let added = self.networks.add_control(&control, scale);
            added.map_err(|e| match e {
                Error::Weights(reason) | Error::Usage(reason) => {
                    Error::bad_model(checkpoint.path(), reason)
                }
                other => other,
            })?;
            self.warnings.extend(checkpoint.warnings().iter().cloned());
        }
        self.load_time += start.elapsed();
        Ok(self)
    }

    /// Adds IP-Adapters, each with the picture tower that it reads, behind those that it has.
    ///
    /// # Errors
    /// When a file is none, or was made for another family.
    pub fn with_image_prompts<'a>(
        mut self,
        adapters: impl IntoIterator<Item = &'a [Checkpoint; 2]>,
    ) -> Result<Self> {
        let start = Instant::now();
        for [adapter, encoder] in adapters {
            let spec = ImagePromptSpec::read(adapter, encoder)?;
            let added = self.networks.add_image_prompt(&spec);
            added.map_err(|e| match e {
                Error::Weights(reason) | Error::Usage(reason) => {
                    Error::bad_model(adapter.path(), reason)
                }
                other => other,
            })?;
        }
        self.load_time += start.elapsed();
        Ok(self)
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The networks.
    pub fn networks(&self) -> &Networks {
        &self.networks
    }

    /// Its own and its refiner's.
    fn all_networks(&self) -> Vec<&Networks> {
        let refiner = self.refiner.iter().map(|refiner| &refiner.engine.networks);
        std::iter::once(&self.networks).chain(refiner).collect()
    }

    /// How long loading took.
    pub fn load_time(&self) -> Duration {
        self.load_time
    }

    /// Notices from loading.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Runs a plan; `finish` receives every batch as soon as it is done.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when the listener says so; [`Error::Numeric`] when the arithmetic leaves the numbers; whatever
    /// `finish` gives.
    pub fn generate(
        &self,
        request: &Request,
        plan: &Plan,
        listener: &mut Listener<'_>,
        finish: &mut dyn FnMut(Batch) -> Result<()>,
    ) -> Result<()> {
        for warning in self.warnings.iter().chain(&plan.warnings) {
            event::send(listener, Event::Warning(warning.clone()))?;
        }
        let start = Instant::now();
        let mut conditionings = vec![self.encode(request, plan)?];
        if let Some(refiner) = &self.refiner {
            conditionings.push(refiner.engine.encode(request, plan)?);
        }
        let images = self.networks.image_prompts().iter().zip(&request.images);
        let images = images
            .enumerate()
            .map(|(i, (adapter, wanted))| adapter.encode(i, wanted, self.networks.device()));
        let images: Vec<ImageTokens> = images.collect::<Result<_>>()?;
        let text_time = start.elapsed();
        let warnings = conditionings.first().map(|first| first.warnings.clone());
        for warning in warnings.unwrap_or_default() {
            event::send(listener, Event::Warning(warning))?;
        }
        event::send(listener, Event::Encoded)?;
        for index in 0..plan.count {
            let mut batch = self.batch((plan, index), (&conditionings, &images), listener)?;
            batch.timings.text = text_time;
            finish(batch)?;
        }
        Ok(())
    }

    /// Prompt and negative prompt as this model reads them.
    fn encode(&self, request: &Request, plan: &Plan) -> Result<Conditioning> {
        // T5 is the larger part of the work: nobody reads what it says of a negative prompt that has no say
        let unheard = self.networks.t5().is_some() && !plan.guided;
        text::encode(
            &self.readers(),
            Texts {
                prompt: &request.prompt,
                negative: match &request.negative_prompt {
                    _ if unheard => None,
                    Some(text) => Some(text),
                    None if self.spec.zero_negative => None,
                    None => Some(""),
                },
                syntax: request.prompt_syntax,
                clip_skip: plan.clip_skip,
            },
        )
    }

    /// Makes this model's network ready for a batch: with guidance as the plan says, or for the prompt alone without the layers `skipped`; with
    /// the pictures that act. Two networks, one for the negative prompt and one for the prompt, where a picture steers only one of them.
    fn denoisers(
        &self,
        plan: &Plan,
        size: [usize; 4],
        conditioning: &Conditioning,
        (skipped, acting, images): (Option<&[usize]>, &[bool], &[ImageTokens]),
    ) -> Result<Vec<Denoiser<'_>>> {
        let numbers = plan.numbers(&self.spec);
        let mut conditions = Conditions::new(
            &self.spec.unet.config,
            conditioning,
            (plan.batch_size, plan.guided && skipped.is_none()),
            (&numbers, plan.cfg_scale),
        )?;
        let calls = plan.trajectory.calls.iter();
        let timesteps: Vec<f64> = calls.map(|call| call.timestep).collect();
        let guided = plan.guided && skipped.is_none();
        let images = images
            .iter()
            .map(|image| image.for_batch(plan.batch_size, guided));
        conditions.images = images.collect::<Result<_>>()?;
        let skipped = skipped.unwrap_or_default();
        let ready = |conditions: &Conditions| {
            self.networks
                .denoiser(size, conditions, &timesteps, skipped)
        };
        let acting = plan.controls.iter().zip(acting).filter(|(_, acts)| **acts);
        let controls: Vec<_> = acting.map(|(planned, _)| planned.acting.clone()).collect();
        let n = plan.batch_size;
        if guided && controls.iter().any(|one| one.one_sided) {
            let both = controls.iter().filter(|one| !one.one_sided).cloned();
            let negative = conditions.rows((0, n), both.collect())?;
            let positive = conditions.rows((n, n), controls)?;
            return Ok(vec![ready(&negative)?, ready(&positive)?]);
        }
        let conditions = Conditions {
            controls,
            ..conditions
        };
        Ok(vec![ready(&conditions)?])
    }

    fn readers(&self) -> Readers<'_> {
        let towers = self.networks.towers().iter();
        let towers = towers.zip(&self.tokenizers.clip).zip(&self.spec.text).map(
            |((tower, tokenizer), spec)| Speaker {
                tower,
                tokenizer,
                role: spec.role,
            },
        );
        let t5 = self.networks.t5().zip(self.tokenizers.t5.as_ref());
        let behind = match (t5, &self.spec.t5, self.spec.without_t5) {
            (Some((tower, tokenizer)), Some(t5), _) => Behind::T5(LongSpeaker {
                tower: tower as &dyn LongTower,
                tokenizer,
                length: t5.role.length,
            }),
            (_, _, Some(length)) => Behind::Zeros(length, self.spec.unet.config.context_width()),
            _ => Behind::Nothing,
        };
        Readers {
            towers: towers.collect(),
            behind,
        }
    }

    fn batch(
        &self,
        (plan, index): (&Plan, usize),
        (conditionings, images): (&[Conditioning], &[ImageTokens]),
        listener: &mut Listener<'_>,
    ) -> Result<Batch> {
        let seeds: Vec<u64> = (0..plan.batch_size)
            .map(|i| plan.seed.wrapping_add((index * plan.batch_size + i) as u64))
            .collect();
        let scale = self.spec.vae.config.scale();
        let shape = [
            self.spec.vae.config.latent_channels,
            plan.height / scale,
            plan.width / scale,
        ];
        let generators = seeds.iter().map(|&seed| match plan.rng {
            Rng::Cpu => Generator::torch(seed),
            Rng::Nv => Generator::philox(seed),
        });
        let mut noise = BatchNoise::new(generators.collect(), shape, self.networks.device());
        let size = [seeds.len(), shape[0], shape[1], shape[2]];
        let mut relay = Relay::new(self, plan, size, (conditionings, images))?;
        let mut model = |sample: &Tensor, call: &Call| relay.predict(sample, call);
        let progress = (
            index * plan.trajectory.steps,
            plan.count * plan.trajectory.steps,
        );

        let start = Instant::now();
        let (latents, steps) =
            denoise::run(&plan.trajectory, &mut noise, &mut model, progress, listener)?;
        let denoise = start.elapsed().saturating_sub(relay.later_load_time());

        let load = relay.load_time();
        drop(relay); // its buffers make room for the decoder's
        event::send(listener, Event::Decoding)?;
        let start = Instant::now();
        let mut pictures = Vec::with_capacity(seeds.len());
        for (i, seed) in seeds.into_iter().enumerate() {
            let mut warnings = Vec::new();
            let image = decode::decode(&self.networks, &latents.narrow(0, i, 1)?, &mut warnings)?;
            for warning in warnings {
                event::send(listener, Event::Warning(warning))?;
            }
            pictures.push(Picture { image, seed });
        }
        Ok(Batch {
            pictures,
            latents,
            timings: Timings {
                load,
                text: Duration::ZERO,
                denoise,
                steps,
                decode: start.elapsed(),
            },
        })
    }
}
