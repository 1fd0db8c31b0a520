//! A batch: what it begins with, its passes over the steps, and its pictures.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use candle_core::Tensor;

use super::begin::{Begin, Beginning, Role};
use super::conditions::Given;
use super::denoise::{BatchNoise, Run};
use super::event::{self, Event, Listener};
use super::image_prompt::ImageTokens;
use super::preview::Previewer;
use super::relay::Relay;
use super::{Encodings, Engine, Plan, Rng, Source, decode};
use crate::error::Result;
use crate::output::Image;
use crate::sampling::{Call, Generator};

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

/// One pass over the steps of a plan.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    pub(super) plan: &'a Plan,
    pub(super) encodings: &'a [Encodings],
    pub(super) images: &'a [ImageTokens],
    /// Steps before it, and of all passes of all batches.
    pub(super) progress: (usize, usize),
    pub(super) previewer: Option<&'a Previewer<'a>>,
}

impl Engine {
    /// Batch `index` of a run, from its first random number to its pictures.
    pub(super) fn batch(
        &self,
        (pass, source): (&Pass<'_>, Option<&Source>),
        index: usize,
        listener: &mut Listener<'_>,
    ) -> Result<Batch> {
        let plan = pass.plan;
        let seeds: Vec<u64> = (0..plan.batch_size)
            .map(|i| plan.seed.wrapping_add((index * plan.batch_size + i) as u64))
            .collect();
        let shape = self.latents_of(plan);
        let mut noise = self.noise(plan, &seeds, shape);
        let beginning = self.begin(pass, (source, shape), &mut noise, listener)?;
        let mut timings = Timings::default();
        let mut latents = self.pass(pass, beginning, &mut noise, (&mut timings, listener))?;
        if let Some(second) = &plan.hires {
            let pass = Pass {
                plan: &second.plan,
                progress: (pass.progress.0 + plan.trajectory.steps, pass.progress.1),
                ..*pass
            };
            let start = Instant::now();
            let networks = &self.networks;
            let with = (self.enlarger.as_ref(), &mut *listener);
            let enlarged = second.enlarge(networks, &latents, &plan.surface, with)?;
            timings.decode += start.elapsed();
            // A1111 begins the generators anew
            let mut noise = self.noise(plan, &seeds, self.latents_of(&second.plan));
            let trajectory = &second.plan.trajectory;
            let drawn = (noise.draw()? * trajectory.init_noise_sigma)?;
            let beginning = Beginning {
                sample: ((enlarged * trajectory.init_latents)? + drawn)?,
                known: None,
                given: Given::default(),
            };
            latents = self.pass(&pass, beginning, &mut noise, (&mut timings, listener))?;
        }
        event::send(listener, Event::Decoding)?;
        let start = Instant::now();
        let mut pictures = Vec::with_capacity(seeds.len());
        for (i, seed) in seeds.into_iter().enumerate() {
            let latents = latents.narrow(0, i, 1)?;
            let image = decode::decode(&self.networks, &latents, &plan.surface, listener)?;
            let image = match &plan.scene {
                Some(scene) => scene.finish(image)?,
                None => image,
            };
            pictures.push(Picture { image, seed });
        }
        timings.decode += start.elapsed();
        Ok(Batch {
            pictures,
            latents,
            timings,
        })
    }

    /// What a batch begins with.
    fn begin(
        &self,
        pass: &Pass<'_>,
        (source, shape): (Option<&Source>, [usize; 3]),
        noise: &mut BatchNoise,
        listener: &mut Listener<'_>,
    ) -> Result<Beginning> {
        let plan = pass.plan;
        let mut watch = event::tiles(listener);
        let begin = Begin {
            networks: &self.networks,
            role: Role::of(&self.spec),
            trajectory: &plan.trajectory,
            source,
            scene: plan.scene.as_ref(),
            whose: plan.whose,
            low_res: self.spec.low_res.as_ref(),
            scaled: self.spec.scales_instructions,
            shape,
            surface: plan.surface,
            watch: RefCell::new(&mut watch),
        };
        begin.run(noise)
    }

    /// `[c, h, w]` of a plan's latents.
    fn latents_of(&self, plan: &Plan) -> [usize; 3] {
        let config = &self.spec.vae.config;
        let scale = config.scale();
        [
            config.latent_channels,
            plan.height / scale,
            plan.width / scale,
        ]
    }

    /// Every image's generator, at its beginning.
    fn noise(&self, plan: &Plan, seeds: &[u64], shape: [usize; 3]) -> BatchNoise {
        let generators = seeds.iter().map(|&seed| match plan.rng {
            Rng::Cpu => Generator::torch(seed),
            Rng::Nv => Generator::philox(seed),
        });
        BatchNoise::new(generators.collect(), shape, self.networks.device())
    }

    /// All steps from a beginning, to latents.
    fn pass(
        &self,
        pass: &Pass<'_>,
        beginning: Beginning,
        noise: &mut BatchNoise,
        (timings, listener): (&mut Timings, &mut Listener<'_>),
    ) -> Result<Tensor> {
        let Pass {
            plan,
            encodings,
            images,
            progress,
            previewer,
        } = *pass;
        let Beginning {
            sample,
            known,
            given,
        } = beginning;
        let (b, c, h, w) = sample.dims4()?;
        // its buffers are let go of at the end, and make room for the decoder's
        let seeds = noise.seeds();
        let told = (given, images, seeds.as_slice());
        let mut relay = Relay::new((self, plan), [b, c, h, w], encodings, told)?;
        let mut model = |sample: &Tensor, call: &Call| relay.predict(sample, call);
        let start = Instant::now();
        let run = Run {
            trajectory: &plan.trajectory,
            known: known.as_ref(),
            progress,
            previewer,
        };
        let (latents, steps) = run.go(sample, noise, &mut model, listener)?;
        timings.denoise += start.elapsed().saturating_sub(relay.later_load_time());
        timings.steps.extend(steps);
        timings.load += relay.load_time();
        Ok(latents)
    }
}
