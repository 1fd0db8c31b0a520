//! `sd-rs generate`: text, and pictures, to pictures.

mod record;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use indicatif::{ProgressBar, ProgressStyle};

use super::args::GenerateArgs;
use super::embedding::{Learned, Used};
use super::fetch::{open_model, open_part};
use super::lora::{self, Worn};
use super::picture;
use super::preview::{self, Screen};
use super::{interrupt, print_line, set_threads};
use crate::device;
use crate::error::{Error, Result};
use crate::output::{self, Target};
use crate::picture::Picture;
use crate::pipeline::{
    Batch, Control, Engine, Event, Place, Plan, Request, SizeConditioning, SkipLayers,
};
use crate::spec::Others;
use crate::upscale::Upscaler;

/// Runs the command.
///
/// # Errors
/// Whatever stops it.
pub(super) fn run(args: &GenerateArgs, quiet: bool) -> Result<()> {
    let start = Instant::now();
    interrupt::listen();
    let threads = set_threads(args.threads)?;
    let files = picture::files(&args.image)?;
    let worn = lora::wear(args)?;
    let request = Request {
        prompt: worn.prompt.clone(),
        controls: args.control.requests()?,
        images: args.image_prompt.requests()?,
        ..request(args)?
    };
    let device = device::open(args.device)?;
    let dtype = device::dtype(args.dtype, &device)?;
    output::check_target(&args.output, args.save_latents.as_deref(), args.overwrite)?;
    let mut learned = Learned::find(args, &request, &worn.adapters)?;
    let model = open_model(args.model.as_deref(), &args.library, args.no_mmap)?;
    let vae = match &args.vae {
        Some(path) => Some(open_part(path, "vae", &args.library, args.no_mmap)?),
        None => None,
    };
    let mut text = Vec::new();
    let mut text_names = Vec::new();
    for path in &args.text_encoder {
        let part = open_part(path, "text_encoder", &args.library, args.no_mmap)?;
        text.push(part.checkpoint);
        text_names.push(part.name);
    }
    let others = Others {
        vae: vae.as_ref().map(|vae| &vae.checkpoint),
        text: &text,
        t5_length: args.t5_length,
    };
    device::warn_untried();
    let mut engine =
        Engine::load_adapted(&model.checkpoint, others, &worn.adapters, &device, dtype)?;
    engine = learned.teach(engine)?;
    let embeddings = learned.used(&engine, &request)?;
    if let Some(warning) = learned.unsaid(args, &embeddings) {
        tracing::warn!("{warning}");
    }
    for fit in engine.networks().adapters().fits() {
        lora::tell(fit);
    }
    let mut refiner_name = None;
    if let Some(refiner) = &args.refiner {
        let refiner = open_model(Some(refiner), &args.library, args.no_mmap)?;
        refiner_name = Some(refiner.name);
        let refiner = Engine::load(&refiner.checkpoint, &device, dtype)?;
        let refiner = learned.teach_refiner(refiner)?;
        engine = engine.with_refiner(refiner, args.refiner_switch)?;
    }
    let controls = args.control.open(&args.library, args.no_mmap)?;
    engine = engine.with_controls(controls.iter().map(|control| &control.checkpoint))?;
    let adapters = args.image_prompt.open(&args.library, args.no_mmap)?;
    engine = engine.with_image_prompts(adapters.iter().map(|(_, files)| files))?;
    if let Some(path) = args.hires.network() {
        let opened = open_part(path, "upscaler", &args.library, args.no_mmap)
            .map_err(|e| args.hires.explain(e))?;
        // as `upscale` does: 16 bits of arithmetic show in flat colours
        let upscaler = Upscaler::load(&opened.checkpoint, &device, DType::F32)?;
        engine = engine.with_upscaler(upscaler);
    }
    engine = preview::equip(engine, &args.preview, &args.library, args.no_mmap)?;
    let mut session = Session {
        screen: Screen::new(&args.preview, quiet),
        args,
        model: &model.name,
        vae: vae.as_ref().map(|vae| vae.name.as_str()),
        text: text_names.iter().map(String::as_str).collect(),
        refiner: refiner_name.as_deref(),
        controls: controls
            .iter()
            .map(|control| control.name.as_str())
            .collect(),
        ip_adapters: adapters.iter().map(|(name, _)| name.as_str()).collect(),
        engine: &engine,
        worn: &worn,
        embeddings: &embeddings,
        threads,
        start,
        made: 0,
        latents: Vec::new(),
    };
    let bar = progress_bar(quiet);
    if files.is_empty() {
        session.run(&request, &args.output, &bar)?;
    }
    for file in &files {
        session.run_file(&request, file, &bar)?;
    }
    bar.finish_and_clear();
    session.save_latents()
}

/// What does not change from run to run, and what has been made.
struct Session<'a> {
    args: &'a GenerateArgs,
    model: &'a str,
    vae: Option<&'a str>,
    text: Vec<&'a str>,
    refiner: Option<&'a str>,
    controls: Vec<&'a str>,
    ip_adapters: Vec<&'a str>,
    engine: &'a Engine,
    worn: &'a Worn,
    embeddings: &'a Used,
    threads: usize,
    start: Instant,
    /// Pictures made so far.
    made: usize,
    /// Their latents, where they are to be saved.
    latents: Vec<Tensor>,
    /// Where previews go.
    screen: Screen,
}

impl Session<'_> {
    /// Begins at a picture, and at what became of it as often as `--loopback` says.
    fn run_file(&mut self, request: &Request, file: &Path, bar: &ProgressBar) -> Result<()> {
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        let template = self.args.output.replace("{name}", &stem);
        if template != self.args.output {
            self.made = 0; // numbered within its name
        }
        let mut source = picture::source(&self.args.image, file)?;
        let mut seed = request.seed;
        for _ in 0..self.args.image.loopback {
            let request = Request {
                source: Some(source),
                seed,
                ..request.clone()
            };
            let Some((picture, used)) = self.run(&request, &template, bar)? else {
                return Ok(()); // a dry run
            };
            seed = Some(used.wrapping_add(1));
            source = picture::with_picture(&self.args.image, picture)?;
        }
        Ok(())
    }

    /// One request; gives its last picture and that one's seed, or nothing where only the plan was asked for.
    fn run(
        &mut self,
        request: &Request,
        template: &str,
        bar: &ProgressBar,
    ) -> Result<Option<(Picture, u64)>> {
        let plan = Plan::new(self.engine, request)?;
        let first = self.made;
        let job = Job {
            session: self,
            plan: &plan,
            request,
            template,
        };
        if self.args.dry_run {
            print_line(&job.describe())?;
            return Ok(None);
        }
        for index in 0..plan.pictures() {
            job.target(first + index, plan.seed.wrapping_add(index as u64))
                .check()?;
        }
        let mut screen = Screen::clone(&self.screen);
        let mut listener = |event: Event| {
            match event {
                Event::Preview(image) => bar.suspend(|| screen.show(&image)),
                event => show(bar, event),
            }
            if interrupt::stopped() {
                Control::Stop
            } else {
                Control::Continue
            }
        };
        let (mut index, mut last, mut latents) = (first, None, Vec::new());
        self.engine
            .generate(request, &plan, &mut listener, &mut |batch| {
                bar.suspend(|| job.save(&batch, index))?;
                index += batch.pictures.len();
                last = batch.pictures.last().map(|p| (p.image.clone(), p.seed));
                latents.push(batch.latents);
                Ok(())
            })?;
        self.made = index;
        if self.args.save_latents.is_some() {
            self.latents.extend(latents);
        }
        match last {
            Some((image, seed)) => Ok(Some((Picture::try_from(image)?, seed))),
            None => Ok(None),
        }
    }

    fn save_latents(&self) -> Result<()> {
        let (Some(path), Some(first)) = (&self.args.save_latents, self.latents.first()) else {
            return Ok(());
        };
        let size = first.dims()[1..].to_vec();
        if self
            .latents
            .iter()
            .any(|latents| latents.dims()[1..] != size)
        {
            return Err(Error::Usage(
                "--save-latents takes latents of one size, and the pictures have several; give --width and --height".to_owned(),
            ));
        }
        let all = Tensor::cat(&self.latents, 0)?;
        let values: Vec<f32> = all.flatten_all()?.to_vec1()?;
        output::save_latents(path, &values, all.dims(), self.args.overwrite)
    }
}

/// One request of a session.
struct Job<'a> {
    session: &'a Session<'a>,
    plan: &'a Plan,
    request: &'a Request,
    /// `--output`, with the name of the picture that is begun at.
    template: &'a str,
}

/// What the flags ask for, but for pictures.
///
/// # Errors
/// [`Error::Usage`] for what cannot be; whatever reading a mask gives.
pub(super) fn request(args: &GenerateArgs) -> Result<Request> {
    let sampling = &args.sampling;
    Ok(Request {
        prompt: args.prompt.clone(),
        negative_prompt: sampling.negative_prompt.clone(),
        prompt_syntax: args.prompt_syntax,
        width: args.width,
        height: args.height,
        steps: sampling.steps,
        cfg_scale: sampling.cfg_scale,
        sampler: sampling.sampler.clone(),
        schedule: sampling.schedule.clone(),
        seed: sampling.seed()?,
        batch_size: usize::from(args.batch_size),
        count: usize::from(args.count),
        clip_skip: sampling.clip_skip,
        rng: args.rng,
        source: None,
        hires: args.hires.hires(),
        preview: preview::wanted(&args.preview),
        surface: args.canvas.surface(),
        skip_layers: args
            .slg_scale
            .filter(|scale| *scale != 0.0)
            .map(|scale| SkipLayers {
                scale,
                layers: args.skip_layers.clone(),
                span: (args.skip_layer_start, args.skip_layer_end),
            }),
        guidance: args.guidance.guidance()?,
        shortcuts: args.shortcuts.shortcuts(),
        regions: args.regions.regions(&read_mask)?,
        sizes: SizeConditioning {
            original: args.original_size,
            crop: args.crop,
            target: args.target_size,
            aesthetic_score: args.aesthetic_score,
        },
        negative_sizes: SizeConditioning {
            original: args.negative_original_size,
            crop: args.negative_crop,
            target: args.negative_target_size,
            aesthetic_score: args.negative_aesthetic_score,
        },
        controls: Vec::new(),
        images: Vec::new(),
        dtype: args.dtype,
        force: args.force || args.dry_run,
    })
}

/// A mask from a picture file, by its brightness.
fn read_mask(path: &Path) -> Result<Place> {
    let grey = Picture::open(path)?.to_luma();
    let values = grey.values().iter().map(|&value| f32::from(value) / 255.0);
    Ok(Place::Mask {
        width: grey.width() as usize,
        height: grey.height() as usize,
        values: values.collect(),
    })
}

/// A bar on a terminal, nothing elsewhere.
fn progress_bar(quiet: bool) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    let template = "{msg:9} {wide_bar} {pos}/{len}  {per_sec}  {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message("encoding");
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Moves the bar; with `-v` and `-vv` lines tell the same.
fn show(bar: &ProgressBar, event: Event) {
    match event {
        Event::Warning(text) => bar.suspend(|| tracing::warn!("{text}")),
        Event::Encoded => {
            bar.set_message("denoising");
            bar.suspend(|| tracing::info!("the prompt is encoded, denoising begins"));
        }
        Event::Step { done, total } => {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            bar.suspend(|| tracing::debug!("step {done} of {total}"));
        }
        Event::Enlarging { done, total } => {
            bar.set_message(match done == total {
                true => "denoising".to_owned(),
                false => format!("enlarging, tile {done} of {total}"),
            });
        }
        Event::Tile { done, total } => bar.set_message(match done == total {
            true if bar.length() == Some(bar.position()) => "decoding".to_owned(),
            true => "denoising".to_owned(),
            false => format!("autoencoder, tile {done} of {total}"),
        }),
        Event::Preview(_) => {}
        Event::Decoding => {
            bar.set_message("decoding");
            bar.suspend(|| tracing::info!("decoding"));
        }
    }
}

impl Job<'_> {
    fn save(&self, batch: &Batch, first: usize) -> Result<()> {
        for (i, picture) in batch.pictures.iter().enumerate() {
            let target = self.target(first + i, picture.seed);
            let parameters = self.parameters(picture.seed);
            let path = output::save(
                &picture.image,
                &target,
                &parameters,
                &self.request_json(picture.seed),
            )?;
            self.report(path, picture.seed, batch)?;
        }
        Ok(())
    }

    fn target(&self, index: usize, seed: u64) -> Target<'_> {
        Target {
            template: self.template,
            seed,
            index,
            count: self.plan.pictures(),
            overwrite: self.session.args.overwrite,
        }
    }

    fn report(&self, path: Option<PathBuf>, seed: u64, batch: &Batch) -> Result<()> {
        let Some(path) = path else {
            return Ok(()); // the picture itself went to the standard output
        };
        if self.session.args.json {
            return print_line(
                &self
                    .json(&path.display().to_string(), seed, batch)
                    .to_string(),
            );
        }
        tracing::info!(
            "seed {seed}: {:.2} s",
            self.session.start.elapsed().as_secs_f64()
        );
        print_line(&format!("{} (seed {seed})", path.display()))
    }
}
