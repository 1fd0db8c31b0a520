//! Flags of a second pass over the enlarged picture.

use std::path::Path;

use clap::{ArgGroup, Args};

use crate::error::Error;
use crate::pipeline::{Hires, HiresSize, Plan, Upscaler};

/// Enlarge the picture and denoise it once more.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Second pass")]
#[command(group = ArgGroup::new("second").args(["hires_scale", "hires_size"]))]
pub struct HiresArgs {
    /// Make the picture, enlarge it so many times, and denoise it once more from part of the way (A1111's hires fix)
    #[arg(long, value_name = "F")]
    pub hires_scale: Option<f64>,
    /// The same to this size
    #[arg(long, value_name = "WxH", value_parser = super::size)]
    pub hires_size: Option<(usize, usize)>,
    /// How it is enlarged: latent, latent-antialiased, latent-bicubic, latent-bicubic-antialiased, latent-nearest, latent-nearest-exact,
    /// lanczos, nearest, or a network as `upscale --model` takes: a file, or a name in the models folders
    #[arg(
        long,
        value_name = "HOW",
        default_value = "latent",
        requires = "second"
    )]
    pub hires_upscaler: String,
    /// Steps of the second pass [default: as many as the first]
    #[arg(long, value_name = "N", requires = "second")]
    pub hires_steps: Option<usize>,
    /// How much of the enlarged picture is given up, 0 to 1
    #[arg(long, value_name = "F", default_value_t = Hires::STRENGTH, requires = "second")]
    pub hires_strength: f64,
    /// Guidance of the second pass [default: as the first]
    #[arg(long, value_name = "F", requires = "second")]
    pub hires_cfg_scale: Option<f64>,
}

impl HiresArgs {
    /// What the pipeline is told.
    pub fn hires(&self) -> Option<Hires> {
        let size = match (self.hires_scale, self.hires_size) {
            (Some(scale), _) => HiresSize::Scale(scale),
            (None, Some((width, height))) => HiresSize::Pixels(width, height),
            (None, None) => return None,
        };
        Some(Hires {
            size,
            upscaler: self.hires_upscaler.parse().unwrap_or(Upscaler::Network),
            // 0 is A1111's word for as many
            steps: self.hires_steps.filter(|&steps| steps > 0),
            strength: self.hires_strength,
            cfg_scale: self.hires_cfg_scale,
        })
    }

    /// The network that enlarges, where one is asked for.
    pub fn network(&self) -> Option<&Path> {
        let known: Result<Upscaler, _> = self.hires_upscaler.parse();
        known.is_err().then(|| Path::new(&self.hires_upscaler))
    }

    /// What is neither a way of enlarging nor a file is told what the ways are.
    pub fn explain(&self, error: Error) -> Error {
        match (error, self.hires_upscaler.parse::<Upscaler>()) {
            (Error::NotFound { what, hint }, Err(ways)) => Error::NotFound {
                what: format!("--hires-upscaler {what}"),
                hint: format!("{ways} or a network's file; as a file: {hint}"),
            },
            (error, _) => error,
        }
    }

    /// How the picture is enlarged, by A1111's name.
    pub fn upscaler(&self) -> String {
        match self.hires_upscaler.parse::<Upscaler>() {
            Ok(upscaler) => upscaler.name().to_owned(),
            Err(_) => {
                let stem = Path::new(&self.hires_upscaler).file_stem();
                stem.unwrap_or_default().to_string_lossy().into_owned()
            }
        }
    }
}

/// A1111's keys of what a plan does beside the first pass.
pub fn pairs(args: &HiresArgs, plan: &Plan) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut add = |key: &str, value: String| pairs.push((key.to_owned(), value));
    if let Some(second) = &plan.hires {
        let hires = &second.hires;
        match hires.size {
            HiresSize::Scale(scale) => add("Hires upscale", scale.to_string()),
            HiresSize::Pixels(w, h) => add("Hires resize", format!("{w}x{h}")),
        }
        if let Some(steps) = hires.steps {
            add("Hires steps", steps.to_string());
        }
        add("Hires upscaler", args.upscaler());
        if let Some(scale) = hires.cfg_scale {
            add("Hires CFG Scale", scale.to_string());
        }
    }
    if plan.surface.wrap.any() {
        add("Tiling", "True".to_owned());
    }
    pairs
}
