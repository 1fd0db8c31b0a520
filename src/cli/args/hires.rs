//! Flags of a second pass over the enlarged picture.

use clap::Args;

use crate::pipeline::{Hires, HiresSize, Plan, Upscaler};

/// Enlarge the picture and denoise it once more.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Second pass")]
pub struct HiresArgs {
    /// Make the picture, enlarge it so many times, and denoise it once more from part of the way (A1111's hires fix)
    #[arg(long, value_name = "F", conflicts_with = "hires_size")]
    pub hires_scale: Option<f64>,
    /// The same to this size
    #[arg(long, value_name = "WxH", value_parser = super::size)]
    pub hires_size: Option<(usize, usize)>,
    /// How it is enlarged: latent, latent-antialiased, latent-bicubic, latent-bicubic-antialiased, latent-nearest, latent-nearest-exact,
    /// lanczos or nearest
    #[arg(long, value_name = "HOW", default_value = "latent")]
    pub hires_upscaler: Upscaler,
    /// Steps of the second pass [default: as many as the first]
    #[arg(long, value_name = "N")]
    pub hires_steps: Option<usize>,
    /// How much of the enlarged picture is given up, 0 to 1
    #[arg(long, value_name = "F", default_value_t = Hires::STRENGTH)]
    pub hires_strength: f64,
    /// Guidance of the second pass [default: as the first]
    #[arg(long, value_name = "F")]
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
            upscaler: self.hires_upscaler,
            // 0 is A1111's word for as many
            steps: self.hires_steps.filter(|&steps| steps > 0),
            strength: self.hires_strength,
            cfg_scale: self.hires_cfg_scale,
        })
    }
}

/// A1111's keys of what a plan does beside the first pass.
pub fn pairs(plan: &Plan) -> Vec<(String, String)> {
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
        add("Hires upscaler", hires.upscaler.name().to_owned());
        if let Some(scale) = hires.cfg_scale {
            add("Hires CFG Scale", scale.to_string());
        }
    }
    if plan.surface.wrap.any() {
        add("Tiling", "True".to_owned());
    }
    pairs
}
