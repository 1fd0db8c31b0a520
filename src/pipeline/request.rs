//! What was asked for: plain data, nothing resolved. The command line and every other door end here.

use super::control::ControlRequest;
use super::guidance::{Guidance, SkipLayers};
use super::hires::Hires;
use super::image_prompt::ImageRequest;
use super::preview::Preview;
use super::regions::Regions;
use super::shortcuts::Shortcuts;
use super::sizes::SizeConditioning;
use super::source::Source;
use super::tiling::Surface;
use crate::device::DtypeChoice;
use crate::text::Syntax;

/// Which random numbers a seed means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Rng {
    /// PyTorch's CPU generator, float32.
    #[default]
    Cpu,
    /// Philox, as A1111's `NV`.
    Nv,
}

/// A request for pictures.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// What to show.
    pub prompt: String,
    /// What not to show; a model that was trained so is given zeros where there is none.
    pub negative_prompt: Option<String>,
    /// The prompts' language.
    pub prompt_syntax: Syntax,
    /// Pixels, a multiple of 8; the picture's that is begun at, or else the model's own size when absent.
    pub width: Option<usize>,
    /// The same.
    pub height: Option<usize>,
    /// Sampling steps.
    pub steps: Option<usize>,
    /// Guidance; 1 is none.
    pub cfg_scale: Option<f64>,
    /// A sampler by any tool's name; the model's own when absent.
    pub sampler: Option<String>,
    /// A schedule by any tool's name.
    pub schedule: Option<String>,
    /// The first picture's seed; random when absent.
    pub seed: Option<u64>,
    /// Pictures computed together; 0 counts as 1.
    pub batch_size: usize,
    /// Batches one after another; 0 counts as 1.
    pub count: usize,
    /// A1111's numbering: 1 is the family's own layer.
    pub clip_skip: Option<usize>,
    /// Which random numbers.
    pub rng: Rng,
    /// The picture that is begun at.
    pub source: Option<Source>,
    /// A second pass over the enlarged picture.
    pub hires: Option<Hires>,
    /// Pictures that are wanted while the run goes.
    pub preview: Option<Preview>,
    /// Guidance away from a network that skips layers.
    pub skip_layers: Option<SkipLayers>,
    /// Guidance beyond one scale.
    pub guidance: Guidance,
    /// Less work for nearly the same picture.
    pub shortcuts: Shortcuts,
    /// Prompts for parts of the picture.
    pub regions: Regions,
    /// The sizes that SDXL is told.
    pub sizes: SizeConditioning,
    /// What it is told with the negative prompt; those of the prompt where absent.
    pub negative_sizes: SizeConditioning,
    /// Pictures that steer, one for each network of [`super::Engine::with_controls`].
    pub controls: Vec<ControlRequest>,
    /// Pictures beside the prompt, one for each IP-Adapter of [`super::Engine::with_image_prompts`].
    pub images: Vec<ImageRequest>,
    /// What pictures are to convolutions, and how the autoencoder divides them.
    pub surface: Surface,
    /// The compute type.
    pub dtype: DtypeChoice,
    /// Begin even when the memory estimate says that it will not fit.
    pub force: bool,
}

impl Request {
    /// Whether there is a negative prompt that says something.
    pub(super) fn has_negative(&self) -> bool {
        let negative = self.negative_prompt.as_deref();
        negative.is_some_and(|text| !text.trim().is_empty())
    }
}
