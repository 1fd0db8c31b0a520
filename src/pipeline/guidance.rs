//! Predictions put together: away from the negative prompt (Ho & Salimans, arXiv 2207.12598), and away from a network that lacks some of its
//! layers (Hong et al., "Smoothed Energy Guidance", arXiv 2408.00760; diffusers 0.42.1 `StableDiffusion3Pipeline`).

use candle_core::Tensor;

use super::Plan;
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
    pub(super) fn acts_at(&self, step: usize, steps: usize) -> bool {
        let (step, steps) = (step as f64, steps as f64);
        step > steps * self.span.0 && step < steps * self.span.1
    }

    /// Whether the values are possible for a transformer of `layers` blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the one that is not.
    pub(super) fn check(&self, layers: Option<usize>) -> Result<()> {
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

/// One prediction of `predictions [n or 2n, c, h, w]`, of which the unconditional ones come first, and of the network without layers `[n, c, h, w]`.
pub(super) fn guide(plan: &Plan, predictions: &Tensor, skipped: Option<Tensor>) -> Result<Tensor> {
    if !plan.guided {
        return Ok(predictions.clone());
    }
    if let Some(image_cfg_scale) = plan.image_cfg_scale {
        return guide_towards_picture(predictions, plan.cfg_scale, image_cfg_scale);
    }
    let predictions = predictions.chunk(2, 0)?;
    let [unconditional, conditional] = predictions.as_slice() else {
        return Err(Error::Numeric("guidance needs two predictions".to_owned()));
    };
    let guided = (unconditional + ((conditional - unconditional)? * plan.cfg_scale)?)?;
    Ok(match (skipped, &plan.skip_layers) {
        (Some(skipped), Some(slg)) => (guided + ((conditional - skipped)? * slg.scale)?)?,
        _ => guided,
    })
}

/// Of predictions `[3n, c, h, w]` without picture and prompt, without prompt, and with both: towards the picture, and from there towards the
/// prompt (Brooks et al., "InstructPix2Pix", arXiv 2211.09800, equation 3).
fn guide_towards_picture(
    predictions: &Tensor,
    cfg_scale: f64,
    image_cfg_scale: f64,
) -> Result<Tensor> {
    let predictions = predictions.chunk(3, 0)?;
    let [unseen, negative, positive] = predictions.as_slice() else {
        return Err(Error::Numeric("guidance needs three predictions".to_owned()));
    };
    let towards_prompt = ((positive - negative)? * cfg_scale)?;
    let towards_picture = ((negative - unseen)? * image_cfg_scale)?;
    Ok(((unseen + towards_prompt)? + towards_picture)?)
}
