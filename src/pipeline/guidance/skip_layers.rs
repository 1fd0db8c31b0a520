//! Away from a network that lacks some of its layers (Hong et al., "Smoothed Energy Guidance", arXiv 2408.00760; diffusers 0.42.1
//! `StableDiffusion3Pipeline`).

use crate::error::{Error, Result};

/// Guidance away from a network that skips layers, for transformers.
#[derive(Debug, Clone, PartialEq)]
pub struct SkipLayers {
    /// How much of the difference is added.
    pub scale: f64,
    /// The blocks that are skipped.
    pub layers: Vec<usize>,
    /// Between which parts of the steps, 0 to 1.
    pub span: (f64, f64),
}

impl SkipLayers {
    /// Whether step `step` of `steps` lies inside.
    pub(in super::super) fn acts_at(&self, step: usize, steps: usize) -> bool {
        let (step, steps) = (step as f64, steps as f64);
        step > steps * self.span.0 && step < steps * self.span.1
    }

    /// Whether the values are possible for a transformer of `layers` blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the one that is not.
    pub(in super::super) fn check(&self, layers: Option<usize>) -> Result<()> {
        let Some(count) = layers else {
            return Err(Error::Usage(
                "--slg-scale is for Stable Diffusion 3 and 3.5; leave it out".to_owned(),
            ));
        };
        if let Some(layer) = self.layers.iter().find(|layer| **layer >= count) {
            return Err(Error::Usage(format!(
                "--skip-layers names layer {layer}, expected 0 to {}, the layers of this model",
                count.saturating_sub(1)
            )));
        }
        let parts = [self.span.0, self.span.1];
        if !self.scale.is_finite() || parts.iter().any(|part| !(0.0..=1.0).contains(part)) {
            return Err(Error::Usage(format!(
                "skip-layer guidance of scale {} from {} to {} of the steps, expected a number and parts from 0 to 1",
                self.scale, self.span.0, self.span.1
            )));
        }
        Ok(())
    }
}
