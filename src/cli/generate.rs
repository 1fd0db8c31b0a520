//! `sd-rs generate`: text, and pictures, to pictures.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::args::guidance::{infotext, record};
use super::args::{GenerateArgs, hires_pairs, value_name};
use super::embedding::{Learned, Used};
use super::fetch::{open_model, open_part};
use super::lora::{self, Worn};
use super::picture;
use super::preview::{self, Screen};
use super::{interrupt, print_line, set_threads};
use crate::adapters::DoraNorm;
use crate::control::Resize;
use crate::device;
use crate::error::{Error, Result};
use crate::memory::peak_resident;
use crate::output::{self, NoiseSource, Parameters, Target};
use crate::picture::Picture;
use crate::pipeline::{
    Batch, Control, ControlMode, ControlRequest, Engine, Event, Place, Plan, Request, Rng,
    SizeConditioning, SkipLayers,
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

fn request(args: &GenerateArgs) -> Result<Request> {
    let seed = match args.seed {
        // -1 means random in every tool
        None | Some(-1) => None,
        Some(seed) => Some(u64::try_from(seed).map_err(|_| {
            Error::Usage(format!(
                "--seed is {seed}, expected 0 to {} (or -1 for a random one)",
                u64::MAX
            ))
        })?),
    };
    Ok(Request {
        prompt: args.prompt.clone(),
        negative_prompt: args.negative_prompt.clone(),
        prompt_syntax: args.prompt_syntax,
        width: args.width,
        height: args.height,
        steps: args.steps,
        cfg_scale: args.cfg_scale,
        sampler: args.sampler.clone(),
        schedule: args.schedule.clone(),
        seed,
        batch_size: usize::from(args.batch_size),
        count: usize::from(args.count),
        clip_skip: args.clip_skip,
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
        shortcuts: args.shortcuts.shortcuts()?,
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
        Event::Preview(_) => {}
        Event::Decoding => {
            bar.set_message("decoding");
            bar.suspend(|| tracing::info!("decoding"));
        }
    }
}

/// What a picture's second text chunk says of a network that steered it.
fn control_json(name: &str, control: &ControlRequest) -> Value {
    json!({
        "model": name,
        "preprocessor": value_name(&control.preprocessor),
        "resize": value_name(&control.resize),
        "mode": value_name(&control.mode),
        "scale": control.scale,
        "start": control.span.0,
        "end": control.span.1,
        "type": control.kind,
    })
}

/// A1111's words for what steered a picture.
fn control_infotext(name: &str, control: &ControlRequest) -> String {
    let mode = match control.mode {
        ControlMode::Balanced => "Balanced",
        ControlMode::Prompt => "My prompt is more important",
        ControlMode::Control | ControlMode::Guess => "ControlNet is more important",
    };
    let resize = match control.resize {
        Resize::Stretch => "Just Resize",
        Resize::Crop => "Crop and Resize",
        Resize::Fill => "Resize and Fill",
    };
    format!(
        "Module: {}, Model: {name}, Weight: {}, Resize Mode: {resize}, Guidance Start: {}, Guidance End: {}, Control Mode: {mode}",
        value_name(&control.preprocessor),
        control.scale,
        control.span.0,
        control.span.1
    )
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

    fn json(&self, path: &str, seed: u64, batch: &Batch) -> Value {
        let seconds = |d: Duration| d.as_secs_f64();
        let timings = &batch.timings;
        let mut object = self.common_json(seed);
        if let Some(fields) = object.as_object_mut() {
            fields.insert("path".to_owned(), json!(path));
            fields.insert(
                "timings".to_owned(),
                json!({
                    "load_s": seconds(self.session.engine.load_time() + timings.load),
                    "text_s": seconds(timings.text),
                    "denoise_s": seconds(timings.denoise),
                    "step_s": timings.steps.iter().copied().map(seconds).collect::<Vec<_>>(),
                    "decode_s": seconds(timings.decode),
                    "total_s": seconds(self.session.start.elapsed()),
                }),
            );
            fields.insert("peak_rss_bytes".to_owned(), json!(peak_resident()));
        }
        object
    }

    fn common_json(&self, seed: u64) -> Value {
        let mut object = self.own_json(seed);
        let loras: Vec<_> = self.session.engine.networks().adapters().fits().collect();
        if let Some(fields) = object.as_object_mut().filter(|_| !loras.is_empty()) {
            fields.insert("loras".to_owned(), json!(loras));
        }
        object
    }

    fn own_json(&self, seed: u64) -> Value {
        json!({
            "path": Value::Null,
            "seed": seed,
            "width": self.plan.picture_size().0,
            "height": self.plan.picture_size().1,
            "steps": self.plan.steps,
            "cfg_scale": self.plan.cfg_scale,
            "sampler": self.plan.sampler,
            "schedule": self.plan.schedule,
            "model": self.session.model,
            "family": self.session.engine.spec().family.id(),
            "dtype": device::dtype_name(self.session.engine.networks().dtype()),
            "device": "cpu",
            "threads": self.session.threads,
        })
    }

    /// Our exact request, for the picture's second text chunk.
    fn request_json(&self, seed: u64) -> Value {
        let mut object = self.own_json(seed);
        if let Some(fields) = object.as_object_mut() {
            for key in ["path", "threads", "device"] {
                fields.shift_remove(key);
            }
            fields.insert("prompt".to_owned(), json!(self.session.worn.shown_prompt));
            fields.insert(
                "negative_prompt".to_owned(),
                json!(self.request.negative_prompt),
            );
            if let Some(vae) = self.session.vae {
                fields.insert("vae".to_owned(), json!(vae));
            }
            if !self.session.text.is_empty() {
                fields.insert("text_encoders".to_owned(), json!(self.session.text));
            }
            if let Some(length) = self.session.args.t5_length {
                fields.insert("t5_length".to_owned(), json!(length));
            }
            if let Some(refiner) = self.session.refiner {
                fields.insert("refiner".to_owned(), json!(refiner));
                let switch = json!(self.session.args.refiner_switch);
                fields.insert("refiner_switch".to_owned(), switch);
            }
            if !self.session.controls.is_empty() {
                let controls = self.session.controls.iter().zip(&self.request.controls);
                let controls = controls.map(|(name, control)| control_json(name, control));
                fields.insert("controls".to_owned(), controls.collect());
            }
            if !self.session.ip_adapters.is_empty() {
                let adapters = self.session.ip_adapters.iter().zip(&self.request.images);
                let adapters =
                    adapters.map(|(name, image)| json!({ "model": name, "scale": image.scale }));
                fields.insert("ip_adapters".to_owned(), adapters.collect());
            }
            if let Some(slg) = &self.plan.skip_layers {
                fields.insert(
                    "skip_layer_guidance".to_owned(),
                    json!({ "scale": slg.scale, "layers": slg.layers, "start": slg.span.0, "end": slg.span.1 }),
                );
            }
            if let Some(source) = &self.request.source {
                let from = picture::request_json(&self.session.args.image, source, self.plan);
                fields.insert("from_picture".to_owned(), from);
            }
            if let Some(second) = &self.plan.hires {
                let hires = &second.hires;
                fields.insert(
                    "hires".to_owned(),
                    json!({
                        "first_width": self.plan.width, "first_height": self.plan.height, "upscaler": self.session.args.hires.upscaler(),
                        "steps": second.plan.steps, "strength": hires.strength, "cfg_scale": second.plan.cfg_scale,
                    }),
                );
            }
            let wrap = self.plan.surface.wrap;
            if wrap.any() {
                fields.insert("tile".to_owned(), json!({ "x": wrap.x, "y": wrap.y }));
            }
            if !self.session.embeddings.names.is_empty() {
                fields.insert(
                    "embeddings".to_owned(),
                    json!(self.session.embeddings.names),
                );
            }
            let (guidance, shortcuts) = (&self.plan.guidance, &self.plan.shortcuts);
            fields.extend(record(guidance, shortcuts, &self.request.regions));
            if self.session.args.dora_norm != DoraNorm::default() {
                fields.insert("dora_norm".to_owned(), json!("original"));
            }
            fields.insert("clip_skip".to_owned(), json!(self.plan.clip_skip));
            fields.insert(
                "rng".to_owned(),
                json!(format!("{:?}", self.plan.rng).to_lowercase()),
            );
            let syntax = format!("{:?}", self.request.prompt_syntax).to_lowercase();
            fields.insert("prompt_syntax".to_owned(), json!(syntax));
            fields.insert("batch_size".to_owned(), json!(self.plan.batch_size));
        }
        object
    }

    fn parameters(&self, seed: u64) -> Parameters {
        Parameters {
            prompt: self.session.worn.shown_prompt.clone(),
            negative_prompt: self.request.negative_prompt.clone().unwrap_or_default(),
            steps: u32::try_from(self.plan.steps).ok(),
            sampler: Some(self.plan.sampler.clone()),
            schedule_type: Some(self.plan.schedule.clone()),
            cfg_scale: Some(self.plan.cfg_scale),
            seed: Some(seed),
            size: self.first_size(),
            denoising_strength: match &self.plan.hires {
                Some(second) => Some(second.hires.strength),
                None => self.plan.strength,
            },
            model: Some(self.session.model.to_owned()),
            clip_skip: u32::try_from(self.plan.clip_skip).unwrap_or(1),
            rng: match self.plan.rng {
                Rng::Cpu => NoiseSource::Cpu,
                Rng::Nv => NoiseSource::Nv,
            },
            version: Some(Parameters::our_version()),
            extras: [
                self.other_models(),
                infotext(&self.plan.guidance, &self.plan.shortcuts),
            ]
            .concat(),
            ..Parameters::default()
        }
    }

    /// A1111 tells the first pass's size where there are two.
    fn first_size(&self) -> Option<(u32, u32)> {
        let (width, height) = match self.plan.hires {
            Some(_) => (self.plan.width, self.plan.height),
            None => self.plan.picture_size(),
        };
        u32::try_from(width).ok().zip(u32::try_from(height).ok())
    }

    /// A1111's keys of what else takes part.
    fn other_models(&self) -> Vec<(String, String)> {
        let mut pairs = Vec::new();
        if let Some(vae) = self.session.vae {
            pairs.push(("VAE".to_owned(), vae.to_owned()));
        }
        // Forge's words
        for (name, i) in self.session.text.iter().zip(1..) {
            pairs.push((format!("Module {i}"), (*name).to_owned()));
        }
        if let Some(refiner) = self.session.refiner {
            let switch = self.session.args.refiner_switch.to_string();
            pairs.push(("Refiner".to_owned(), refiner.to_owned()));
            pairs.push(("Refiner switch at".to_owned(), switch));
        }
        pairs.extend(picture::pairs(self.request, self.plan));
        let controls = self.session.controls.iter().zip(&self.request.controls);
        for (i, (name, control)) in controls.enumerate() {
            let text = control_infotext(name, control);
            pairs.push((format!("ControlNet {i}"), text));
        }
        pairs.extend(hires_pairs(&self.session.args.hires, self.plan));
        if let Some(hashes) = &self.session.worn.hashes {
            pairs.push(("Lora hashes".to_owned(), hashes.clone()));
        }
        if let Some(hashes) = &self.session.embeddings.hashes {
            pairs.push(("TI hashes".to_owned(), hashes.clone()));
        }
        pairs
    }

    /// Network calls of a batch, in all passes.
    fn calls(&self) -> usize {
        let second = self.plan.hires.as_ref();
        let of = |plan: &Plan| plan.trajectory.calls.len();
        of(self.plan) + second.map_or(0, |second| of(&second.plan))
    }

    fn describe(&self) -> String {
        let mut object = self.common_json(self.plan.seed);
        if let Some(fields) = object.as_object_mut() {
            fields.shift_remove("path");
            fields.insert("pictures".to_owned(), json!(self.plan.pictures()));
            fields.insert("network_calls".to_owned(), json!(self.calls()));
            let second = self.plan.hires.as_ref();
            let memory = second.map_or(self.plan.memory, |second| second.plan.memory);
            fields.insert("memory_bytes".to_owned(), json!(memory));
        }
        if self.session.args.json {
            return object.to_string();
        }
        let lines = object.as_object().map(|fields| {
            fields
                .iter()
                .map(|(key, value)| match value {
                    Value::String(text) => format!("{key:14} {text}"),
                    other => format!("{key:14} {other}"),
                })
                .collect::<Vec<_>>()
        });
        lines.unwrap_or_default().join("\n")
    }
}
