//! `sd-rs upscale`: pictures from files, larger ones into files.

mod redraw;

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::args::UpscaleArgs;
use super::fetch::{Opened, open_part};
use super::{interrupt, print_line, set_threads};
use crate::device::{self, DtypeChoice};
use crate::error::{Error, Result};
use crate::memory::peak_resident;
use crate::output::{self, png};
use crate::picture::{Filter, Picture};
use crate::pipeline::{Control, Event, Redrawn};
use crate::upscale::{MAX_FACTOR, Upscaler};
use redraw::Painter;

/// What pictures' names end in.
const PICTURES: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

/// How often a picture is enlarged where neither flags nor a network say: as A1111's script does.
const FACTOR: f64 = 2.0;

/// What does not change from picture to picture.
struct Job<'a> {
    args: &'a UpscaleArgs,
    network: Option<Network>,
    painter: Option<Painter>,
    threads: usize,
    device: &'static str,
    bar: ProgressBar,
    load: Duration,
}

/// What enlarges.
struct Network {
    upscaler: Upscaler,
    model: String,
    dtype: &'static str,
}

impl Network {
    fn open(args: &UpscaleArgs, device: &candle_core::Device) -> Result<Option<Self>> {
        let Some(model) = &args.model else {
            return Ok(None);
        };
        let dtype = device::dtype(args.dtype.unwrap_or(DtypeChoice::F32), device)?;
        let Opened { checkpoint, name } =
            open_part(model, "upscaler", &args.library, args.no_mmap)?;
        Ok(Some(Self {
            upscaler: Upscaler::load(&checkpoint, device, dtype)?,
            model: name,
            dtype: device::dtype_name(dtype),
        }))
    }
}

/// Runs the command.
///
/// # Errors
/// Whatever stops it; of several pictures those that can be made are.
pub(super) fn run(args: &UpscaleArgs, quiet: bool) -> Result<()> {
    let start = Instant::now();
    interrupt::listen();
    let threads = set_threads(args.threads)?;
    redraw::check(args)?;
    let device = device::open(args.device)?;
    device::warn_untried();
    let inputs = inputs(&args.inputs)?;
    if let Some(output) = &args.output {
        check_targets(&targets(&inputs, output)?, args.overwrite)?;
    }
    let network = Network::open(args, &device)?;
    let name = network.as_ref().map(|network| network.model.as_str());
    let painter = Painter::open(args, name, &device)?;
    let targets = match &args.output {
        Some(output) => targets(&inputs, output)?,
        None => {
            let own = network
                .as_ref()
                .map(|network| network.upscaler.scale() as f64);
            let factor = args.scale.or(own).unwrap_or(FACTOR);
            let targets = beside(&inputs, factor);
            check_targets(&targets, args.overwrite)?;
            targets
        }
    };
    let job = Job {
        args,
        network,
        painter,
        threads,
        device: device::name(&device),
        bar: progress_bar(quiet),
        load: start.elapsed(),
    };
    let mut first_error = None;
    for (input, target) in inputs.iter().zip(&targets) {
        match job.make(input, target) {
            Ok(()) => {}
            Err(Error::Interrupted) => {
                job.bar.finish_and_clear();
                return Err(Error::Interrupted);
            }
            Err(error) if first_error.is_none() => first_error = Some(error),
            Err(error) => job.bar.suspend(|| tracing::warn!("{error}")),
        }
    }
    job.bar.finish_and_clear();
    first_error.map_or(Ok(()), Err)
}

impl Job<'_> {
    /// One picture.
    fn make(&self, input: &Path, target: &Path) -> Result<()> {
        let start = Instant::now();
        let picture = Picture::open(input)?;
        // texts of files that have none, or that are damaged, are none
        let texts = png::read_text(input).unwrap_or_default().texts;
        let mut larger = self.enlarge(&picture)?;
        let mut texts = texts;
        let drawn = match &self.painter {
            Some(painter) => {
                let drawn = self.paint(painter, &larger)?;
                let told = painter.json(&drawn);
                texts = vec![
                    (
                        png::PARAMETERS.to_owned(),
                        painter.parameters(&drawn).print(),
                    ),
                    (png::REQUEST.to_owned(), told.to_string()),
                ];
                larger = drawn.picture;
                Some(told)
            }
            None => None,
        };
        let computed = start.elapsed();
        let alpha = larger.alpha();
        let bytes = png::encode_plain(
            (larger.width(), larger.height()),
            larger.rgb(),
            alpha.as_ref().map(|alpha| alpha.values()),
            &texts,
        )?;
        if !output::save_bytes(target, &bytes, self.args.overwrite)? {
            return Ok(()); // the picture itself went to the standard output
        }
        tracing::info!("{}: {:.2} s", input.display(), computed.as_secs_f64());
        self.bar.suspend(|| match self.args.json {
            true => print_line(&self.json((input, &picture), (target, &larger), drawn, computed)),
            false => print_line(&format!(
                "{} ({}x{})",
                target.display(),
                larger.width(),
                larger.height()
            )),
        })
    }

    /// The picture made larger, by the network or without one.
    fn enlarge(&self, picture: &Picture) -> Result<Picture> {
        let Some(network) = &self.network else {
            let factor = self.args.scale.unwrap_or(FACTOR);
            return resized(picture, factor, self.args.redraw.resampler.filter());
        };
        let (upscaler, tiling) = (&network.upscaler, self.args.tiling());
        self.bar.set_message("upscaling");
        let mut watch = |done: usize, all: usize| {
            self.bar.set_length(all as u64);
            self.bar.set_position(done as u64);
            !interrupt::stopped()
        };
        match self.args.scale {
            Some(factor) => upscaler.enlarge_to(picture, factor, tiling, &mut watch),
            None => upscaler.enlarge(picture, tiling, &mut watch),
        }
    }

    /// The larger picture drawn anew.
    fn paint(&self, painter: &Painter, picture: &Picture) -> Result<Redrawn> {
        self.bar.set_message("drawing");
        let size = (picture.width(), picture.height());
        self.bar.set_length(painter.tiles(size).unwrap_or(1) as u64);
        painter.paint(picture, &mut |tile, all, event| {
            self.bar.set_position(tile as u64);
            match event {
                Event::Warning(text) => self.bar.suspend(|| tracing::warn!("{text}")),
                Event::Step { done, total } => {
                    let tile = tile + 1;
                    let told = format!("tile {tile} of {all}, step {done} of {total}");
                    self.bar.suspend(|| tracing::debug!("{told}"));
                }
                _ => {}
            }
            match interrupt::stopped() {
                true => Control::Stop,
                false => Control::Continue,
            }
        })
    }

    /// The network's tiles.
    fn tiles(&self, (width, height): (u32, u32)) -> Option<usize> {
        let (size, tiling) = ((width as usize, height as usize), self.args.tiling());
        let network = self.network.as_ref()?;
        network.upscaler.tiles(size, tiling).ok()
    }

    fn json(
        &self,
        (input, from): (&Path, &Picture),
        (path, to): (&Path, &Picture),
        drawn: Option<Value>,
        computed: Duration,
    ) -> String {
        let upscaler = self.network.as_ref().map(|network| &network.upscaler);
        let mut object = json!({
            "path": path.display().to_string(),
            "input": input.display().to_string(),
            "width": to.width(),
            "height": to.height(),
            "input_width": from.width(),
            "input_height": from.height(),
            "model": self.network.as_ref().map(|network| &network.model),
            "network": upscaler.map(|upscaler| upscaler.config().name()),
            "network_scale": upscaler.map(Upscaler::scale),
            "network_reach": upscaler.and_then(|upscaler| upscaler.config().reach()),
            "tiles": self.tiles((from.width(), from.height())),
            "dtype": self.network.as_ref().map(|network| network.dtype),
            "device": self.device,
            "threads": self.threads,
            "timings": {
                "load_s": self.load.as_secs_f64(),
                "upscale_s": computed.as_secs_f64(),
            },
            "peak_rss_bytes": peak_resident(),
        });
        if let (Some(drawn), Some(fields)) = (drawn, object.as_object_mut()) {
            fields.insert("drawn".to_owned(), drawn);
        }
        object.to_string()
    }
}

/// The picture `factor` times as wide and high.
fn resized(picture: &Picture, factor: f64, filter: Filter) -> Result<Picture> {
    if !(factor.is_finite() && factor > 0.0 && factor <= MAX_FACTOR) {
        return Err(Error::Usage(format!(
            "the scale is {factor}, expected more than 0 and at most {MAX_FACTOR}"
        )));
    }
    // at most 64 times what a side may be, and sides are checked
    let side = |pixels: u32| (f64::from(pixels) * factor).round().max(1.0) as u32;
    picture.resize(side(picture.width()), side(picture.height()), filter)
}

/// The pictures that were named, those of folders in the order of their names.
fn inputs(named: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in named {
        if !path.is_dir() {
            std::fs::metadata(path).map_err(|source| Error::disk(path, "read", source))?;
            found.push(path.clone());
            continue;
        }
        let entries =
            std::fs::read_dir(path).map_err(|source| Error::disk(path, "read", source))?;
        let mut inside: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| is_picture(path))
            .collect();
        if inside.is_empty() {
            return Err(Error::NotFound {
                what: format!("a picture in {}", path.display()),
                hint: "expected files that end in .png, .jpg, .jpeg or .webp".to_owned(),
            });
        }
        inside.sort();
        found.extend(inside);
    }
    Ok(found)
}

fn is_picture(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    let hidden = path
        .file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    path.is_file() && !hidden && PICTURES.contains(&extension.to_lowercase().as_str())
}

/// Where each picture goes by `--output`; a folder that is not there is made.
fn targets(inputs: &[PathBuf], output: &Path) -> Result<Vec<PathBuf>> {
    let slash = output.as_os_str().as_encoded_bytes().ends_with(b"/");
    let one = inputs.len() == 1 && !slash && !output.is_dir();
    if one {
        return Ok(vec![output.to_owned()]);
    }
    if !output.is_dir() {
        let refused = inputs.len() > 1 && output.extension().is_some();
        if refused {
            return Err(Error::Usage(format!(
                "--output {} names a file for {} pictures, expected a folder; end it in / if it is one",
                output.display(),
                inputs.len()
            )));
        }
        std::fs::create_dir_all(output).map_err(|source| Error::disk(output, "create", source))?;
    }
    Ok(inputs
        .iter()
        .map(|input| output.join(input.with_extension("png").file_name().unwrap_or_default()))
        .collect())
}

/// Names without `--output`.
fn beside(inputs: &[PathBuf], factor: f64) -> Vec<PathBuf> {
    let name = |input: &PathBuf| {
        let stem = input.file_stem().unwrap_or_default().to_string_lossy();
        PathBuf::from(format!("{stem}-x{factor}.png"))
    };
    inputs.iter().map(name).collect()
}

/// Makes sure, before a model is opened, that all pictures can be written, each to a file of its own.
fn check_targets(targets: &[PathBuf], overwrite: bool) -> Result<()> {
    let mut seen = BTreeSet::new();
    for target in targets {
        if !seen.insert(target) {
            return Err(Error::Usage(format!(
                "two pictures would both become {}; upscale them one by one",
                target.display()
            )));
        }
        output::check_file(target, overwrite)?;
    }
    Ok(())
}

/// A bar on a terminal, nothing elsewhere.
fn progress_bar(quiet: bool) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    let template = "{msg:9} {wide_bar} {pos}/{len} tiles  {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message("upscaling");
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
