//! From a request to pictures: texts are encoded, noise is drawn, denoised step by step, decoded.

mod conditions;
mod coverage;
mod decode;
mod denoise;
mod event;
mod memory;
mod networks;
mod plan;
mod request;
mod sizes;
mod tower;

pub use conditions::Conditions;
pub use coverage::Coverage;
pub use event::{Control, Event, Listener};
pub use networks::{Configs, Networks};
pub use plan::Plan;
pub use request::{Request, Rng};
pub use sizes::SizeConditioning;
pub use tower::LoadedTower;

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};

use crate::checkpoint::{self, Checkpoint};
use crate::error::{Error, Result};
use crate::output::Image;
use crate::sampling::Generator;
use crate::spec::ModelSpec;
use crate::text::{self, ClipTokenizer, Conditioning, Speaker, Texts};
use denoise::BatchNoise;

/// A loaded model.
pub struct Engine {
    spec: ModelSpec,
    tokenizers: Vec<ClipTokenizer>,
    networks: Networks,
    load_time: Duration,
    warnings: Vec<String>,
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
        let start = Instant::now();
        let detection = checkpoint::detect(checkpoint);
        let spec = ModelSpec::read(checkpoint, &detection)?;
        let tokenizers = text::tokenizers_for(checkpoint, &spec)?;
        let (networks, coverage) = Networks::load(checkpoint, &spec, device, dtype)?;
        let mut warnings = checkpoint.warnings().to_vec();
        warnings.extend(coverage.warning(checkpoint));
        Ok(Self {
            spec,
            tokenizers,
            networks,
            load_time: start.elapsed(),
            warnings,
        })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The networks.
    pub fn networks(&self) -> &Networks {
        &self.networks
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
        let conditioning = text::encode(
            &self.speakers(),
            Texts {
                prompt: &request.prompt,
                negative: match &request.negative_prompt {
                    Some(text) => Some(text),
                    None if self.spec.zero_negative => None,
                    None => Some(""),
                },
                syntax: request.prompt_syntax,
                clip_skip: plan.clip_skip,
            },
        )?;
        let text_time = start.elapsed();
        for warning in &conditioning.warnings {
            event::send(listener, Event::Warning(warning.clone()))?;
        }
        event::send(listener, Event::Encoded)?;
        for index in 0..plan.count {
            let mut batch = self.batch(plan, index, &conditioning, listener)?;
            batch.timings.text = text_time;
            finish(batch)?;
        }
        Ok(())
    }

    fn speakers(&self) -> Vec<Speaker<'_>> {
        let towers = self.networks.towers().iter();
        towers
            .zip(&self.tokenizers)
            .zip(&self.spec.text)
            .map(|((tower, tokenizer), spec)| Speaker {
                tower,
                tokenizer,
                role: spec.role,
            })
            .collect()
    }

    fn batch(
        &self,
        plan: &Plan,
        index: usize,
        conditioning: &Conditioning,
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
        let conditions = Conditions::new(
            &self.spec.unet.config,
            conditioning,
            (plan.batch_size, plan.guided),
            (&plan.numbers, plan.cfg_scale),
        )?;
        let timesteps: Vec<f64> = plan
            .trajectory
            .calls
            .iter()
            .map(|call| call.timestep)
            .collect();
        let size = [seeds.len(), shape[0], shape[1], shape[2]];
        let start = Instant::now();
        let mut denoiser = self.networks.denoiser(size, &conditions, &timesteps)?;
        let load = start.elapsed();
        let mut model =
            |sample: &Tensor, timestep: f64| guided(plan, denoiser.predict(sample, timestep)?);
        let progress = (
            index * plan.trajectory.steps,
            plan.count * plan.trajectory.steps,
        );

        let start = Instant::now();
        let (latents, steps) =
            denoise::run(&plan.trajectory, &mut noise, &mut model, progress, listener)?;
        let denoise = start.elapsed();

        drop(denoiser); // its buffers make room for the decoder's
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

/// Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): unconditional + scale · (conditional − unconditional), both in
/// one call of the network.
fn guided(plan: &Plan, predictions: Tensor) -> Result<Tensor> {
    if !plan.guided {
        return Ok(predictions);
    }
    let predictions = predictions.chunk(2, 0)?;
    let [unconditional, conditional] = predictions.as_slice() else {
        return Err(Error::Numeric("guidance needs two predictions".to_owned()));
    };
    Ok((unconditional + ((conditional - unconditional)? * plan.cfg_scale)?)?)
}
