//! `sd-rs upscale`: pictures from files, larger ones into files.

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::args::UpscaleArgs;
use super::fetch::{Opened, open_part};
use super::{interrupt, print_line, set_threads};
use crate::device;
use crate::error::{Error, Result};
use crate::memory::peak_resident;
use crate::output::{self, png};
use crate::picture::Picture;
use crate::upscale::{Tiling, Upscaler};

/// What pictures' names end in.
const PICTURES: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

/// What does not change from picture to picture.
struct Job<'a> {
    args: &'a UpscaleArgs,
    upscaler: Upscaler,
    model: String,
    dtype: &'static str,
    threads: usize,
    bar: ProgressBar,
    load: Duration,
}

/// Runs the command.
///
/// # Errors
/// Whatever stops it; of several pictures those that can be made are.
pub(super) fn run(args: &UpscaleArgs, quiet: bool) -> Result<()> {
    let start = Instant::now();
    interrupt::listen();
    let threads = set_threads(args.threads)?;
    let device = device::open(args.device)?;
    let dtype = device::dtype(args.dtype, &device)?;
    let inputs = inputs(&args.inputs)?;
    if let Some(output) = &args.output {
        check_targets(&targets(&inputs, output)?, args.overwrite)?;
    }
    let Opened { checkpoint, name } =
        open_part(&args.model, "upscaler", &args.library, args.no_mmap)?;
    let upscaler = Upscaler::load(&checkpoint, &device, dtype)?;
    let targets = match &args.output {
        Some(output) => targets(&inputs, output)?,
        None => {
            let factor = args.scale.unwrap_or(upscaler.scale() as f64);
            let targets = beside(&inputs, factor);
            check_targets(&targets, args.overwrite)?;
            targets
        }
    };
    let job = Job {
        args,
        upscaler,
        model: name,
        dtype: device::dtype_name(dtype),
        threads,
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
        let tiling = self.args.tiling();
        let mut watch = |done: usize, all: usize| {
            self.bar.set_length(all as u64);
            self.bar.set_position(done as u64);
            !interrupt::stopped()
        };
        let larger = match self.args.scale {
            Some(factor) => {
                let upscaler = &self.upscaler;
                upscaler.enlarge_to(&picture, factor, tiling, &mut watch)?
            }
            None => self.upscaler.enlarge(&picture, tiling, &mut watch)?,
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
        let tiles = self.tiles(&picture, tiling);
        tracing::info!("{}: {:.2} s", input.display(), computed.as_secs_f64());
        self.bar.suspend(|| match self.args.json {
            true => print_line(&self.json((input, &picture), (target, &larger), tiles, computed)),
            false => print_line(&format!(
                "{} ({}x{})",
                target.display(),
                larger.width(),
                larger.height()
            )),
        })
    }

    fn tiles(&self, picture: &Picture, tiling: Tiling) -> Option<usize> {
        let size = (picture.width() as usize, picture.height() as usize);
        self.upscaler.tiles(size, tiling).ok()
    }

    fn json(
        &self,
        (input, from): (&Path, &Picture),
        (path, to): (&Path, &Picture),
        tiles: Option<usize>,
        computed: Duration,
    ) -> String {
        json!({
            "path": path.display().to_string(),
            "input": input.display().to_string(),
            "width": to.width(),
            "height": to.height(),
            "input_width": from.width(),
            "input_height": from.height(),
            "model": self.model,
            "network": self.upscaler.config().name(),
            "network_scale": self.upscaler.scale(),
            "tiles": tiles,
            "dtype": self.dtype,
            "device": "cpu",
            "threads": self.threads,
            "timings": {
                "load_s": self.load.as_secs_f64(),
                "upscale_s": computed.as_secs_f64(),
            },
            "peak_rss_bytes": peak_resident(),
        })
        .to_string()
    }
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
    let template = "upscaling {wide_bar} {pos}/{len} tiles  {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
