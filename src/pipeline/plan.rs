//! A request resolved against a model: sizes, seeds, coefficients. Every refusal happens here, before any work.

use super::control::{Planned, acting_calls};
use super::guidance::SkipLayers;
use super::request::{Request, Rng};
use super::sizes::{self, SizeConditioning};
use super::{Engine, memory};
use crate::error::{Error, Result};
use crate::sampling::{self, Trajectory};
use crate::spec::ModelSpec;

/// The widest picture in pixels that is taken on.
const MAX_SIZE: usize = 8192;
/// More steps than the training had make no sense.
const MAX_STEPS: usize = 1000;
/// Pictures in one run.
const MAX_PICTURES: usize = 10_000;

/// What will run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Steps as the user counts them.
    pub steps: usize,
    /// Guidance.
    pub cfg_scale: f64,
    /// The sampler's name as reports and picture files give it.
    pub sampler: String,
    /// The schedule's name.
    pub schedule: String,
    /// Every coefficient of the run.
    pub trajectory: Trajectory,
    /// The first seed.
    pub seed: u64,
    /// Pictures computed together.
    pub batch_size: usize,
    /// Batches.
    pub count: usize,
    /// A1111's numbering.
    pub clip_skip: usize,
    /// Which random numbers.
    pub rng: Rng,
    /// Whether the negative prompt has a say.
    pub guided: bool,
    /// Guidance away from a network that skips layers.
    pub skip_layers: Option<SkipLayers>,
    /// Pictures that steer, and when.
    pub(super) controls: Vec<Planned>,
    /// What SDXL is told of sizes, with the negative prompt and with the prompt.
    pub sizes: (SizeConditioning, SizeConditioning),
    /// Bytes at the peak, estimated.
    pub memory: u64,
    /// Notices for the user.
    pub warnings: Vec<String>,
}

impl Plan {
    /// Resolves `request` for the model of `engine`.
    ///
    /// # Errors
    /// [`Error::Usage`] for values out of range, [`Error::Unsupported`] for what is not built, [`Error::NoMemory`] when the estimate
    /// exceeds what is free.
    pub fn new(engine: &Engine, request: &Request) -> Result<Self> {
        let spec = engine.spec();
        let scale = spec.vae.config.scale();
        let side = |name: &str, wanted: Option<usize>| -> Result<usize> {
            let size = wanted.unwrap_or(spec.defaults.size);
            let multiple = match spec.unet.config.patch() {
                1 => scale.max(8),
                patch => scale.saturating_mul(patch),
            };
            if size == 0 || size > MAX_SIZE || !size.is_multiple_of(multiple) {
                return Err(Error::Usage(format!(
                    "--{name} is {size}, expected a multiple of {multiple} from {multiple} to {MAX_SIZE}"
                )));
            }
            Ok(size)
        };
        let (width, height) = (
            side("width", request.width)?,
            side("height", request.height)?,
        );
        if let Some(most) = spec.unet.config.most_latents()
            && width.max(height) / scale > most
        {
            return Err(Error::Usage(format!(
                "the picture is {width}x{height}, expected at most {0}x{0}: the model knows no more positions",
                most * scale
            )));
        }
        let steps = request.steps.unwrap_or(spec.defaults.steps);
        if !(1..=MAX_STEPS).contains(&steps) {
            return Err(Error::Usage(format!(
                "--steps is {steps}, expected 1 to {MAX_STEPS}"
            )));
        }
        let cfg_scale = request.cfg_scale.unwrap_or(spec.defaults.cfg_scale);
        if !(0.0..=1000.0).contains(&cfg_scale) {
            return Err(Error::Usage(format!(
                "--cfg-scale is {cfg_scale}, expected 0 to 1000"
            )));
        }
        let (batch_size, count) = (request.batch_size.max(1), request.count.max(1));
        if batch_size.saturating_mul(count) > MAX_PICTURES {
            return Err(Error::Usage(format!(
                "{count} batches of {batch_size} pictures are too many, expected at most {MAX_PICTURES} pictures"
            )));
        }
        let towers = spec.text.iter();
        let layers = towers.map(|tower| tower.component.config.layers);
        let layers = layers.min().unwrap_or(0);
        let clip_skip = request.clip_skip.unwrap_or(1);
        if !(1..=layers.max(1)).contains(&clip_skip) {
            return Err(Error::Usage(format!(
                "--clip-skip is {clip_skip}, expected 1 to {layers}, the layers of this model's text encoder"
            )));
        }
        let mut warnings = Vec::new();
        let guided = is_guided(engine, request, cfg_scale);
        if let Some(most) = spec
            .defaults
            .most_cfg_scale
            .filter(|&most| cfg_scale > most)
        {
            warnings.push(format!(
                "--cfg-scale is {cfg_scale}, and this model was distilled to need none: above {most} its pictures burn"
            ));
        }
        if !guided && spec.unet.config.guides_itself() && request.has_negative() {
            warnings.push(
                "the negative prompt has no say: this model was distilled to follow the prompt alone"
                    .to_owned(),
            );
        }
        if let Some(slg) = &request.skip_layers {
            slg.check(spec.unet.config.skippable())?;
            if !guided {
                warnings.push("skip-layer guidance has no say without --cfg-scale".to_owned());
            }
        }
        let latent = (width / scale, height / scale);
        let chosen = choose_sampling(engine, request, (steps, latent), &mut warnings)?;
        let controls = plan_controls(engine, request, &chosen.trajectory, (width, height))?;
        let memory = memory::estimate(&engine.all_networks(), latent, batch_size, guided)?;
        if !request.force {
            memory::check(memory)?;
        }
        Ok(Self {
            width,
            height,
            steps,
            cfg_scale,
            sampler: chosen.sampler,
            schedule: chosen.schedule,
            trajectory: chosen.trajectory,
            seed: request.seed.unwrap_or_else(random_seed),
            batch_size,
            count,
            clip_skip,
            rng: request.rng,
            guided,
            skip_layers: request.skip_layers.clone(),
            controls,
            sizes: (request.negative_sizes, request.sizes),
            memory,
            warnings,
        })
    }

    /// What a model of this structure is told beside the text, with the negative prompt and with the prompt.
    pub(super) fn numbers(&self, spec: &ModelSpec) -> [Vec<f64>; 2] {
        sizes::numbers(spec.numbers(), (self.width, self.height), self.sizes)
    }

    /// Pictures in the whole run.
    pub fn pictures(&self) -> usize {
        self.batch_size * self.count
    }
}

/// The request's pictures, each for the network in its place.
fn plan_controls(
    engine: &Engine,
    request: &Request,
    trajectory: &Trajectory,
    size: (usize, usize),
) -> Result<Vec<Planned>> {
    let adapters = engine.networks().image_prompts().len();
    if adapters != request.images.len() {
        return Err(Error::Usage(format!(
            "there are {adapters} of --ip-adapter and {} of --ip-image, expected one picture for each",
            request.images.len()
        )));
    }
    if let Some(image) = request.images.iter().find(|image| !image.scale.is_finite()) {
        return Err(Error::Usage(format!(
            "--ip-scale is {}, expected a number",
            image.scale
        )));
    }
    let loaded = engine.networks().controls();
    if loaded.len() != request.controls.len() {
        return Err(Error::Usage(format!(
            "there are {} of --controlnet and {} of --control-image, expected one picture for each",
            loaded.len(),
            request.controls.len()
        )));
    }
    let by_calls = has_own_sampler(engine, request);
    let pairs = loaded.iter().zip(&request.controls).enumerate();
    pairs
        .map(|(i, (control, wanted))| {
            Ok(Planned {
                acting: control.resolve(wanted, i, size)?,
                calls: acting_calls(trajectory, wanted.span, by_calls),
            })
        })
        .collect()
}

/// Whether a folder's own sampler runs, which has diffusers' reading throughout.
fn has_own_sampler(engine: &Engine, request: &Request) -> bool {
    request.sampler.is_none() && request.schedule.is_none() && engine.spec().scheduler.is_some()
}

/// Whether there are two predictions to choose between. A scale of 1 takes the prompt's alone, and so does 0, diffusers' word for it; a folder's
/// own sampler has diffusers' reading, by which none below 1 guides. A network that embeds the guidance needs but one call.
fn is_guided(engine: &Engine, request: &Request, cfg_scale: f64) -> bool {
    let spec = engine.spec();
    let own = has_own_sampler(engine, request);
    if spec.unet.config.guides_itself() || cfg_scale == 0.0 {
        return false;
    }
    if own {
        cfg_scale > 1.0
    } else {
        cfg_scale != 1.0
    }
}

struct Chosen {
    sampler: String,
    schedule: String,
    trajectory: Trajectory,
}

/// The folder's own sampler when none is named, A1111's reading of the name otherwise.
fn choose_sampling(
    engine: &Engine,
    request: &Request,
    (steps, latent): (usize, (usize, usize)),
    warnings: &mut Vec<String>,
) -> Result<Chosen> {
    let spec = engine.spec();
    let flow = spec.flow(latent);
    if let (None, None, Some(config)) = (&request.sampler, &request.schedule, &spec.scheduler) {
        let (trajectory, warning) = sampling::diffusers(config, steps, flow)?;
        warnings.extend(warning);
        return Ok(Chosen {
            sampler: config.names().0.to_owned(),
            schedule: config.names().1.to_owned(),
            trajectory,
        });
    }
    let wanted = request.schedule.as_deref();
    let flow = spec.levels.is_flow();
    let (sampler, schedule) = match &request.sampler {
        Some(sampler) => sampling::parse(sampler, wanted, flow)?,
        None => {
            let wanted = wanted.or(spec.defaults.schedule);
            sampling::parse(spec.defaults.sampler, wanted, flow)?
        }
    };
    let model = sampling::Model {
        levels: &spec.levels,
        prediction: spec.prediction,
        xl: spec
            .unet
            .config
            .unet()
            .is_some_and(|unet| unet.added.is_some()),
    };
    let trajectory = sampling::by_name(sampler, schedule, steps, &model)?;
    Ok(Chosen {
        sampler: sampler.name().to_owned(),
        schedule: schedule.name().to_owned(),
        trajectory,
    })
}

/// A seed as A1111 draws them: 32 bits, so that every tool can repeat it.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // the standard library seeds its hasher from the operating system
    let hash = std::collections::hash_map::RandomState::new()
        .build_hasher()
        .finish();
    hash & 0xffff_ffff
}
