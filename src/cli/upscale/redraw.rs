//! `upscale --with-model`: the enlarged picture drawn anew by a Stable Diffusion model, tile by tile.

use candle_core::Device;
use clap::Parser;
use serde_json::{Value, json};

use crate::cli::args::{Cli, Command, GenerateArgs, Resampler, UpscaleArgs, value_name};
use crate::cli::embedding::{Learned, Used};
use crate::cli::fetch::{open_model, open_part};
use crate::cli::generate;
use crate::cli::lora::{self, Worn};
use crate::device::{self, DtypeChoice};
use crate::error::{Error, Result};
use crate::output::{NoiseSource, Parameters};
use crate::picture::{Filter, Picture};
use crate::pipeline::{Engine, Plan, Redraw, Redrawn, Request, Rng, Source, TileListener};
use crate::spec::Others;

impl Resampler {
    /// The arithmetic.
    pub(super) fn filter(self) -> Filter {
        match self {
            Self::Lanczos => Filter::Lanczos,
            Self::Bicubic => Filter::Bicubic,
            Self::Bilinear => Filter::Bilinear,
            Self::Nearest => Filter::Nearest,
        }
    }
}

/// Refuses flags that say how a picture is drawn anew where none is.
///
/// # Errors
/// [`Error::Usage`] that names one.
pub(super) fn check(args: &UpscaleArgs) -> Result<()> {
    if args.redraw.with_model.is_some() {
        return Ok(());
    }
    let control = (!args.control.controlnet.is_empty()).then_some("--controlnet");
    match args.sampling.given().or(control) {
        Some(flag) => Err(Error::Usage(format!(
            "{flag} is for pictures that are drawn anew; give --with-model, too"
        ))),
        None => Ok(()),
    }
}

/// A Stable Diffusion model that is ready to draw.
pub(super) struct Painter {
    args: GenerateArgs,
    engine: Engine,
    request: Request,
    redraw: Redraw,
    model: String,
    vae: Option<String>,
    controls: Vec<String>,
    worn: Worn,
    embeddings: Used,
    /// How the picture is enlarged before.
    enlarged: String,
}

impl Painter {
    /// The model that `--with-model` names, if there is one; `network` is what enlarges before.
    ///
    /// # Errors
    /// Whatever opening it and its parts gives; [`Error::Usage`] for flags that cannot be.
    pub(super) fn open(
        args: &UpscaleArgs,
        network: Option<&str>,
        device: &Device,
    ) -> Result<Option<Self>> {
        let Some(typed) = &args.redraw.with_model else {
            return Ok(None);
        };
        let generate = as_generate(args)?;
        let worn = lora::wear(&generate)?;
        let mut request = Request {
            prompt: worn.prompt.clone(),
            ..generate::request(&generate)?
        };
        let pixel = Picture::from_rgb(1, 1, vec![0; 3])?;
        request.source = Some(Source {
            strength: Some(args.redraw.strength),
            ..Source::new(pixel.clone())
        });
        // those that cannot be are told before a model is opened
        let controls_of_pixel = args.control.requests_of(Some(&pixel))?;
        let dtype = device::dtype(args.dtype.unwrap_or(DtypeChoice::Auto), device)?;
        let mut learned = Learned::find(&generate, &request, &worn.adapters)?;
        let model = open_model(typed.as_deref(), &args.library, args.no_mmap)?;
        let vae = args.redraw.vae.as_deref();
        let vae = vae.map(|path| open_part(path, "vae", &args.library, args.no_mmap));
        let vae = vae.transpose()?;
        let others = Others {
            vae: vae.as_ref().map(|vae| &vae.checkpoint),
            ..Others::default()
        };
        let engine =
            Engine::load_adapted(&model.checkpoint, others, &worn.adapters, device, dtype)?;
        let engine = learned.teach(engine)?;
        for fit in engine.networks().adapters().fits() {
            lora::tell(fit);
        }
        let controls = args.control.open(&args.library, args.no_mmap)?;
        let engine = engine.with_controls(controls.iter().map(|control| &control.checkpoint))?;
        let redraw = Redraw {
            tile: args.redraw.tile_size,
            overlap: overlap(args, &engine),
        };
        let first = Request {
            controls: controls_of_pixel,
            ..request.clone()
        };
        engine.check_redraw(&first, redraw)?;
        Ok(Some(Self {
            embeddings: learned.used(&engine, &request)?,
            enlarged: match network {
                Some(name) => name.to_owned(),
                None => value_name(&args.redraw.resampler),
            },
            controls: controls.into_iter().map(|control| control.name).collect(),
            args: generate,
            engine,
            request,
            redraw,
            model: model.name,
            vae: vae.map(|vae| vae.name),
            worn,
        }))
    }

    /// Tiles of a picture of that width and height.
    pub(super) fn tiles(&self, size: (u32, u32)) -> Option<usize> {
        let grid = self.engine.tile_grid(size, self.redraw).ok()?;
        Some(grid.count())
    }

    /// Draws a picture anew.
    ///
    /// # Errors
    /// As [`Engine::redraw`].
    pub(super) fn paint(
        &self,
        picture: &Picture,
        listener: &mut TileListener<'_>,
    ) -> Result<Redrawn> {
        let request = Request {
            controls: self.args.control.requests_of(Some(picture))?,
            ..self.request.clone()
        };
        self.engine.redraw(picture, &request, self.redraw, listener)
    }

    /// What a picture's texts say of it, as A1111 says it.
    pub(super) fn parameters(&self, drawn: &Redrawn) -> Parameters {
        let (plan, picture) = (&drawn.plan, &drawn.picture);
        let mut extras = vec![
            (
                "SD upscale overlap".to_owned(),
                self.redraw.overlap.to_string(),
            ),
            ("SD upscale upscaler".to_owned(), self.enlarged.clone()),
        ];
        let mut more = |key: &str, value: &Option<String>| {
            extras.extend(value.iter().map(|value| (key.to_owned(), value.clone())));
        };
        more("VAE", &self.vae);
        more("Lora hashes", &self.worn.hashes);
        more("TI hashes", &self.embeddings.hashes);
        let steering = self.controls.iter().zip(self.control_scales());
        extras.extend(steering.enumerate().map(|(i, (name, scale))| {
            let text = format!("Model: {name}, Weight: {scale}");
            (format!("ControlNet {i}"), text)
        }));
        Parameters {
            prompt: self.worn.shown_prompt.clone(),
            negative_prompt: self.request.negative_prompt.clone().unwrap_or_default(),
            steps: u32::try_from(plan.steps).ok(),
            sampler: Some(plan.sampler.clone()),
            schedule_type: Some(plan.schedule.clone()),
            cfg_scale: Some(plan.cfg_scale),
            seed: Some(plan.seed),
            size: Some((picture.width(), picture.height())),
            denoising_strength: plan.strength,
            model: Some(self.model.clone()),
            clip_skip: u32::try_from(plan.clip_skip).unwrap_or(1),
            rng: match plan.rng {
                Rng::Cpu => NoiseSource::Cpu,
                Rng::Nv => NoiseSource::Nv,
            },
            version: Some(Parameters::our_version()),
            extras,
            ..Parameters::default()
        }
    }

    fn control_scales(&self) -> Vec<f64> {
        let scales = &self.args.control.control_scale;
        let scale = |i: usize| scales.get(i).copied().unwrap_or(1.0);
        (0..self.controls.len()).map(scale).collect()
    }

    /// The same for programs.
    pub(super) fn json(&self, drawn: &Redrawn) -> Value {
        let Plan {
            seed,
            steps,
            cfg_scale,
            sampler,
            schedule,
            strength,
            clip_skip,
            ..
        } = &drawn.plan;
        let (width, height) = drawn.grid.tile();
        json!({
            "model": self.model,
            "family": self.engine.spec().family.id(),
            "dtype": device::dtype_name(self.engine.networks().dtype()),
            "prompt": self.worn.shown_prompt,
            "negative_prompt": self.request.negative_prompt,
            "seed": seed,
            "steps": steps,
            "cfg_scale": cfg_scale,
            "sampler": sampler,
            "schedule": schedule,
            "strength": strength,
            "clip_skip": clip_skip,
            "vae": self.vae,
            "controls": self.controls,
            "upscaler": self.enlarged,
            "tiles": drawn.grid.count(),
            "tile_width": width,
            "tile_height": height,
            "tile_overlap": self.redraw.overlap,
        })
    }
}

/// The overlap that is asked for, or the usual one where tiles are large enough for it.
fn overlap(args: &UpscaleArgs, engine: &Engine) -> usize {
    let tile = args.redraw.tile_size.unwrap_or(engine.spec().defaults.size);
    // an eighth of a tile of 512, as in A1111, and of smaller ones as well
    let usual = Redraw::OVERLAP.min(tile / 8);
    args.tile_overlap.unwrap_or(usual)
}

/// The flags as `generate` would have them, with its own defaults for all that `upscale` does not ask.
fn as_generate(args: &UpscaleArgs) -> Result<GenerateArgs> {
    let prompt = args.redraw.prompt.clone().unwrap_or_default();
    let typed = ["sd-rs", "generate", "--prompt="].map(str::to_owned);
    let parsed = Cli::try_parse_from(typed).map_err(|e| Error::Usage(e.to_string()))?;
    let Command::Generate(generate) = parsed.command else {
        return Err(Error::Usage("--with-model cannot be used here".to_owned()));
    };
    Ok(GenerateArgs {
        prompt,
        sampling: args.sampling.clone(),
        control: args.control.clone(),
        lora: args.redraw.lora.clone(),
        library: args.library.clone(),
        no_mmap: args.no_mmap,
        dtype: args.dtype.unwrap_or(DtypeChoice::Auto),
        device: args.device,
        ..*generate
    })
}
