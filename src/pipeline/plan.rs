//! A request resolved against a model: sizes, seeds, coefficients. Every refusal happens here, before any work.

use sd_models::unet::Mid;

use super::asks::Asks;
use super::begin::Role;
use super::control::{Planned, acting_calls};
use super::guidance::{Guidance, SkipLayers};
use super::hires::{self, Hires, SecondPass};
use super::request::{Request, Rng};
use super::scene::Scene;
use super::shortcuts::Shortcuts;
use super::sizes::{self, SizeConditioning};
use super::source::{Source, Whose};
use super::tiling::Surface;
use super::{Engine, memory};
use crate::error::{Error, Result};
use crate::sampling::{self, Start, StepCount, Trajectory};
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
    /// Guidance towards a picture beside the prompt's, of models that follow instructions.
    pub image_cfg_scale: Option<f64>,
    /// The picture and mask that the run begins at.
    pub scene: Option<Scene>,
    /// Whose meaning strength and masks have.
    pub whose: Whose,
    /// How much of the picture is given up, where the run begins at one.
    pub strength: Option<f64>,
    /// A second pass over the enlarged picture.
    pub hires: Option<Box<SecondPass>>,
    /// Guidance away from a network that skips layers.
    pub skip_layers: Option<SkipLayers>,
    /// Guidance beyond one scale.
    pub guidance: Guidance,
    /// Less work for nearly the same picture.
    pub shortcuts: Shortcuts,
    /// The weight of each prompt at each latent, that of the whole picture first; empty without regions.
    pub regions: Vec<Vec<f32>>,
    /// Pictures that steer, and when.
    pub(super) controls: Vec<Planned>,
    /// What SDXL is told of sizes, with the negative prompt and with the prompt.
    pub sizes: (SizeConditioning, SizeConditioning),
    /// What pictures are to convolutions, and how the autoencoder divides them.
    pub surface: Surface,
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
        let role = Role::of(spec);
        check_surface(&request.surface, spec)?;
        check_source(request.source.as_ref(), role, spec)?;
        let masked = request.source.as_ref().is_some_and(|s| s.masking.is_some());
        let patch = scale.saturating_mul(spec.unet.config.patch());
        let side = |name: &str, wanted: Option<usize>, picture: Option<usize>| -> Result<usize> {
            let multiple = match spec.unet.config.patch() {
                // a picture to be enlarged is cut to what its autoencoder divides by
                _ if role == Role::Enlarge => scale * scale,
                1 => scale.max(8),
                _ => patch,
            };
            let size = match (wanted, picture) {
                (Some(size), _) => size,
                // one with a mask is drawn out and not resized, so that what stays is what was there
                (None, Some(side)) if masked => side.div_ceil(multiple) * multiple,
                (None, Some(side)) => (side / multiple).max(1) * multiple,
                (None, None) => spec.defaults.size,
            };
            if size == 0 || size > MAX_SIZE || !size.is_multiple_of(multiple) {
                return Err(Error::Usage(format!(
                    "--{name} is {size}, expected a multiple of {multiple} from {multiple} to {MAX_SIZE}"
                )));
            }
            Ok(size)
        };
        let picture = own_size(request.source.as_ref(), role, (scale, patch));
        let (width, height) = (
            side("width", request.width, picture.map(|(width, _)| width))?,
            side("height", request.height, picture.map(|(_, height)| height))?,
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
        let whose = whose(engine, request)?;
        let start = start(request.source.as_ref(), (role, whose), spec);
        let chosen = choose_sampling(engine, request, (steps, latent), start, &mut warnings)?;
        let source = request.source.as_ref();
        let asked = request.width.is_some() || request.height.is_some();
        let scene = source.map(|source| match role {
            Role::Reference => Scene::looked_at(source, patch),
            Role::Enlarge => Scene::resized(source, latent),
            _ => Scene::new(source, (width, height), asked, whose),
        });
        let scene = scene.transpose()?;
        let reference = scene.as_ref().filter(|_| role == Role::Reference);
        let reference = reference.map(|scene| scene.size(scale));
        let image_cfg_scale = source
            .filter(|_| role == Role::Instruct && guided)
            .map(|source| source.image_cfg_scale);
        warnings.extend(check_guidance(engine, request, guided)?);
        let whole = chosen.trajectory.steps;
        // a second pass has steps of its own
        let gate = request.shortcuts.gate.filter(|_| request.hires.is_none());
        if gate.is_some_and(|gate| gate.step >= whole) {
            warnings.push(format!(
                "--tgate has no say: there are {whole} steps, and none behind it"
            ));
        }
        let regions = regions(request, latent, scale)?;
        let controls = plan_controls(engine, request, &chosen.trajectory, (width, height))?;
        let mut plan = Self {
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
            image_cfg_scale,
            scene,
            whose,
            strength: source
                .filter(|_| !role.begins_at_noise())
                .map(|source| source.strength.unwrap_or(spec.defaults.strength)),
            hires: None,
            skip_layers: request.skip_layers.clone(),
            guidance: request.guidance.clone(),
            shortcuts: request.shortcuts,
            regions,
            controls,
            sizes: (request.negative_sizes, request.sizes),
            surface: request.surface,
            memory: 0,
            warnings,
        };
        plan.take_memory(engine, request, reference)?;
        if let Some(hires) = &request.hires {
            hires::check(request, role != Role::Start)?;
            plan.hires = Some(Box::new(plan.second(engine, request, hires)?));
        }
        Ok(plan)
    }

    /// The pass that follows this one: from part of the way, at another size.
    fn second(&self, engine: &Engine, request: &Request, hires: &Hires) -> Result<SecondPass> {
        let spec = engine.spec();
        let scale = spec.vae.config.scale();
        let layout = hires.layout((self.width, self.height), scale)?;
        let (width, height) = (layout.size.0 * scale, layout.size.1 * scale);
        let multiple = scale.max(8).max(scale * spec.unet.config.patch());
        let most = spec
            .unet
            .config
            .most_latents()
            .map_or(MAX_SIZE, |most| most * scale);
        let fits = |side: usize| side.is_multiple_of(multiple) && side <= most.min(MAX_SIZE);
        if !fits(width) || !fits(height) {
            return Err(Error::Usage(format!(
                "the second picture is {width}x{height}, expected multiples of {multiple} up to {}; use another --hires-scale or --hires-size",
                most.min(MAX_SIZE)
            )));
        }
        let steps = hires.steps.unwrap_or(self.steps);
        if !(1..=MAX_STEPS).contains(&steps) {
            return Err(Error::Usage(format!(
                "--hires-steps is {steps}, expected 1 to {MAX_STEPS}"
            )));
        }
        let cfg_scale = hires.cfg_scale.unwrap_or(self.cfg_scale);
        if !(0.0..=1000.0).contains(&cfg_scale) {
            return Err(Error::Usage(format!(
                "--hires-cfg-scale is {cfg_scale}, expected 0 to 1000"
            )));
        }
        if !(0.0..=1.0).contains(&hires.strength) {
            return Err(Error::Usage(format!(
                "--hires-strength is {}, expected 0 to 1",
                hires.strength
            )));
        }
        let count = match is_own(engine, request) {
            true => StepCount::Diffusers,
            // A1111 hands the number of steps over, and makes so many
            false => StepCount::Exact,
        };
        let start = Start::Picture {
            strength: hires.strength,
            count,
        };
        let mut warnings = Vec::new();
        let chosen = choose_sampling(engine, request, (steps, layout.size), start, &mut warnings)?;
        let guided = is_guided(engine, request, cfg_scale);
        let controls = plan_controls(engine, request, &chosen.trajectory, (width, height))?;
        let mut plan = Self {
            controls,
            regions: regions(request, layout.size, scale)?,
            width,
            height,
            steps,
            cfg_scale,
            guided,
            trajectory: chosen.trajectory,
            strength: Some(hires.strength),
            ..self.clone()
        };
        plan.take_memory(engine, request, None)?;
        plan.memory = plan.memory.max(self.memory);
        Ok(SecondPass {
            hires: hires.clone(),
            plan,
            layout,
        })
    }

    /// The last pass.
    fn last(&self) -> &Self {
        self.hires.as_ref().map_or(self, |second| &second.plan)
    }

    /// Steps of all passes of a batch.
    pub fn all_steps(&self) -> usize {
        let second = self.hires.as_ref();
        self.trajectory.steps + second.map_or(0, |second| second.plan.trajectory.steps)
    }

    /// Estimates the memory, and refuses where there is not so much.
    fn take_memory(
        &mut self,
        engine: &Engine,
        request: &Request,
        reference: Option<(usize, usize)>,
    ) -> Result<()> {
        let scale = engine.spec().vae.config.scale();
        let texts = Asks::most_at_once(&Asks::of(engine, self)?);
        self.memory = memory::estimate(
            &engine.all_networks(),
            (self.width / scale, self.height / scale),
            (self.batch_size, &texts),
            reference,
            &self.surface,
        )?;
        if request.force {
            return Ok(());
        }
        memory::check(self.memory)
    }

    /// Whether the negative prompt has a say in any pass.
    pub(super) fn is_guided(&self) -> bool {
        self.guided || self.last().guided
    }

    /// What a model of this structure is told beside the text, with the negative prompt and with the prompt.
    pub(super) fn numbers(&self, spec: &ModelSpec) -> [Vec<f64>; 2] {
        sizes::numbers(spec.numbers(), (self.width, self.height), self.sizes)
    }

    /// The size of a finished picture, which is larger than what is computed where only a part is.
    pub fn picture_size(&self) -> (usize, usize) {
        let finished = self.scene.as_ref().and_then(Scene::finished_size);
        let last = self.last();
        finished.unwrap_or((last.width, last.height))
    }

    /// Pictures in the whole run.
    pub fn pictures(&self) -> usize {
        self.batch_size * self.count
    }
}

/// The weight of each prompt at each of the latents; nothing without regions.
fn regions(request: &Request, latent: (usize, usize), scale: usize) -> Result<Vec<Vec<f32>>> {
    match request.regions.list.is_empty() {
        true => Ok(Vec::new()),
        false => request.regions.weights(latent, scale),
    }
}

/// Whether what is asked for is possible with this model; with it comes what has no say.
fn check_guidance(engine: &Engine, request: &Request, guided: bool) -> Result<Vec<String>> {
    let (guidance, shortcuts) = (&request.guidance, &request.shortcuts);
    guidance.check()?;
    shortcuts.check()?;
    let unet = engine.spec().unet.config.unet();
    let attends =
        unet.is_some_and(|unet| matches!(unet.mid, Mid::Attention { depth } if depth > 0));
    let for_unets = [
        ("--freeu", guidance.free_u.is_some(), unet.is_some()),
        ("--deep-cache", shortcuts.deep_cache > 1, unet.is_some()),
        ("--tgate", shortcuts.gate.is_some(), unet.is_some()),
        ("--tome", shortcuts.merging.is_some(), unet.is_some()),
        ("--sag-scale", guidance.self_attention.is_some(), attends),
    ];
    if let Some((flag, ..)) = for_unets.iter().find(|(_, asked, can)| *asked && !can) {
        return Err(Error::Usage(format!(
            "{flag} is for UNets, such as those of Stable Diffusion 1, 2 and XL, with attention in the middle; leave it out"
        )));
    }
    if shortcuts.deep_cache > 1 && guidance.self_attention.is_some() {
        return Err(Error::Usage(
            "--sag-scale reads at every call what --deep-cache leaves out; use one of them"
                .to_owned(),
        ));
    }
    let steered = !request.controls.is_empty() || !request.images.is_empty();
    if shortcuts.deep_cache > 1 && steered {
        return Err(Error::Usage(
            "--deep-cache does not go with --controlnet and --ip-adapter; use one of them"
                .to_owned(),
        ));
    }
    if shortcuts.gate.is_some() {
        let others = [
            ("--deep-cache", shortcuts.deep_cache > 1),
            ("--pag-scale", guidance.perturbed.is_some()),
            ("--sag-scale", guidance.self_attention.is_some()),
            ("--controlnet", !request.controls.is_empty()),
            ("--ip-adapter", !request.images.is_empty()),
        ];
        if let Some((flag, _)) = others.into_iter().find(|(_, asked)| *asked) {
            return Err(Error::Usage(format!(
                "--tgate does not go with {flag}; use one of them"
            )));
        }
    }
    let mut notices = Vec::new();
    if let (Some(merging), Some(unet)) = (&shortcuts.merging, unet)
        && merging.ratio > 0.0
        && !unet.attends_within(merging.max_downsample)
    {
        notices.push(
            "--tome has no say: the model looks at nothing at so large a size; give a larger --tome-max-downsample (Stable Diffusion XL begins at 2)".to_owned(),
        );
    }
    let silent = guidance.needs_negative();
    if !guided && !silent.is_empty() {
        notices.push(format!(
            "{} {} no say without --cfg-scale",
            silent.join(", "),
            if silent.len() == 1 { "has" } else { "have" }
        ));
    }
    Ok(notices)
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
    let by_calls = is_own(engine, request);
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

/// Whether there are two predictions to choose between. A scale of 1 takes the prompt's alone, and so does 0, diffusers' word for it; a folder's
/// own sampler has diffusers' reading, by which none below 1 guides. A network that embeds the guidance needs but one call.
fn is_guided(engine: &Engine, request: &Request, cfg_scale: f64) -> bool {
    let spec = engine.spec();
    let own = is_own(engine, request);
    let instructed = Role::of(spec) == Role::Instruct;
    let source = request.source.as_ref().filter(|_| instructed && own);
    if source.is_some_and(|source| source.image_cfg_scale < 1.0) {
        return false; // diffusers' pipelines guide by neither then
    }
    if spec.unet.config.guides_itself() || cfg_scale == 0.0 {
        return false;
    }
    if own {
        cfg_scale > 1.0
    } else {
        cfg_scale != 1.0
    }
}

/// Whether a folder's own sampler runs it, as diffusers would.
fn is_own(engine: &Engine, request: &Request) -> bool {
    let unnamed = request.sampler.is_none() && request.schedule.is_none();
    unnamed && engine.spec().scheduler.is_some()
}

/// Whose meaning strength and masks have: that of whoever's sampler runs, unless a web UI's is asked for.
fn whose(engine: &Engine, request: &Request) -> Result<Whose> {
    let asked = request.source.as_ref().and_then(|source| source.whose);
    match (asked, is_own(engine, request)) {
        (None | Some(Whose::Diffusers), true) => Ok(Whose::Diffusers),
        (None, false) => Ok(Whose::A1111),
        (Some(Whose::Diffusers), false) => Err(Error::Usage(
            "--like diffusers is for a folder's own sampler; leave out --sampler and --schedule, or take a1111 or comfyui".to_owned(),
        )),
        (Some(other), true) => Err(Error::Usage(format!(
            "--like {} is for samplers by name, and the model's own runs as in diffusers; name a --sampler",
            other.id()
        ))),
        (Some(other), false) => Ok(other),
    }
}

/// Where a run begins.
fn start(source: Option<&Source>, (role, whose): (Role, Whose), spec: &ModelSpec) -> Start {
    let Some(source) = source.filter(|_| !role.begins_at_noise()) else {
        return Start::Noise;
    };
    let strength = source.strength.unwrap_or(spec.defaults.strength);
    // of a whole picture that is painted anew, the pipelines of UNets take nothing over
    let anew = source.masking.is_some() && strength == 1.0 && spec.unet.config.unet().is_some();
    let count = match whose {
        Whose::Diffusers if anew => return Start::Noise,
        // the pipelines of consistency models that embed the guidance
        Whose::Diffusers
            if spec.unet.config.unet().is_some() && spec.unet.config.guides_itself() =>
        {
            StepCount::Distilled
        }
        Whose::Diffusers => StepCount::Diffusers,
        Whose::A1111 => StepCount::A1111,
        Whose::A1111Exact => StepCount::Exact,
        Whose::ComfyUi => StepCount::ComfyUi,
    };
    Start::Picture { strength, count }
}

/// Whether the model can do with the picture, or without one.
fn check_source(source: Option<&Source>, role: Role, spec: &ModelSpec) -> Result<()> {
    let Some(source) = source else {
        let what = match role {
            Role::Instruct => "changes a picture by what it is told",
            Role::Enlarge => "enlarges a picture",
            Role::Start | Role::Inpaint | Role::Reference => return Ok(()),
        };
        return Err(Error::Usage(format!(
            "this is {} that {what}; give it one with --init-image",
            spec.family.phrase()
        )));
    };
    source.check()?;
    if role.begins_at_noise() && source.masking.is_some() {
        return Err(Error::Usage(
            "a mask has no say with a model that is only given the picture; leave out --mask, --mask-box and --extend"
                .to_owned(),
        ));
    }
    Ok(())
}

/// Whether the model can do with the surface.
fn check_surface(surface: &Surface, spec: &ModelSpec) -> Result<()> {
    surface.check()?;
    if surface.wrap.any() && spec.unet.config.unet().is_none() {
        return Err(Error::Unsupported(format!(
            "--tile is for networks of convolutions, and {} knows where each patch is; use a Stable Diffusion 1, 2 or XL",
            spec.family.phrase()
        )));
    }
    Ok(())
}

/// The size of the picture that is begun at; a part of it is computed at the model's own.
fn own_size(
    source: Option<&Source>,
    role: Role,
    (scale, patch): (usize, usize),
) -> Option<(usize, usize)> {
    let source = source?;
    if role == Role::Enlarge {
        let larger = |side: u32| (side as usize).saturating_mul(scale);
        let picture = &source.picture;
        return Some((larger(picture.width()), larger(picture.height())));
    }
    if role == Role::Reference {
        return Some(source.looked_at(patch));
    }
    let part = source
        .masking
        .as_ref()
        .is_some_and(|m| m.only_masked.is_some());
    let size = (
        source.picture.width() as usize,
        source.picture.height() as usize,
    );
    (!part).then_some(size)
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
    start: Start,
    warnings: &mut Vec<String>,
) -> Result<Chosen> {
    let spec = engine.spec();
    let flow = spec.flow(latent);
    if let (None, None, Some(config)) = (&request.sampler, &request.schedule, &spec.scheduler) {
        let (trajectory, warning) = sampling::diffusers(config, steps, flow, start)?;
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
    let trajectory = sampling::by_name(sampler, schedule, steps, &model, start)?;
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
