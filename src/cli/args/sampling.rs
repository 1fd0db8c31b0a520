//! Flags of how a picture is made, which `generate` and `upscale` share.

use clap::Args;

use crate::error::{Error, Result};

/// How a picture is made.
#[derive(Debug, Clone, Default, Args)]
pub struct SamplingArgs {
    /// What not to show
    #[arg(short, long, allow_hyphen_values = true)]
    pub negative_prompt: Option<String>,
    /// Sampling steps [default: the model family's own]
    #[arg(long)]
    pub steps: Option<usize>,
    /// Guidance; 1 is none [default: the model family's own]
    #[arg(long, allow_negative_numbers = true)]
    pub cfg_scale: Option<f64>,
    /// A sampler by A1111's, ComfyUI's, diffusers' or stable-diffusion.cpp's name [default: the model's own]
    #[arg(long)]
    pub sampler: Option<String>,
    /// A schedule by any of these tools' names
    #[arg(long)]
    pub schedule: Option<String>,
    /// Image i uses seed + i [default: random, printed]
    #[arg(short, long, allow_negative_numbers = true)]
    pub seed: Option<i128>,
    /// Leave out the text encoder's last layers, in A1111's numbering; 1 leaves none
    #[arg(long)]
    pub clip_skip: Option<usize>,
}

impl SamplingArgs {
    /// The seed; none for a random one.
    ///
    /// # Errors
    /// [`Error::Usage`] when it is out of range.
    pub fn seed(&self) -> Result<Option<u64>> {
        match self.seed {
            // -1 means random in every tool
            None | Some(-1) => Ok(None),
            Some(seed) => u64::try_from(seed).map(Some).map_err(|_| {
                Error::Usage(format!(
                    "--seed is {seed}, expected 0 to {} (or -1 for a random one)",
                    u64::MAX
                ))
            }),
        }
    }

    /// The first flag that is given.
    pub fn given(&self) -> Option<&'static str> {
        let flags = [
            ("--negative-prompt", self.negative_prompt.is_some()),
            ("--steps", self.steps.is_some()),
            ("--cfg-scale", self.cfg_scale.is_some()),
            ("--sampler", self.sampler.is_some()),
            ("--schedule", self.schedule.is_some()),
            ("--seed", self.seed.is_some()),
            ("--clip-skip", self.clip_skip.is_some()),
        ];
        flags
            .iter()
            .find(|(_, given)| *given)
            .map(|(name, _)| *name)
    }
}
