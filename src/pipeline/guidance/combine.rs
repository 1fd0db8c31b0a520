//! One prediction out of many.

use candle_core::Tensor;

use super::Rule;
use super::rules::{perpendicular, projected, rescaled, tangential, zero_star};
use crate::error::{Error, Result};
use crate::pipeline::Plan;
use crate::sampling::Call;

/// What the networks predict at one call, each `[n, c, h, w]`; what is not there has no say.
#[derive(Default)]
pub(in super::super) struct Predictions {
    /// Of the negative prompt without the picture that the others see.
    pub(in super::super) unseen: Option<Tensor>,
    pub(in super::super) negative: Option<Tensor>,
    pub(in super::super) prompt: Option<Tensor>,
    /// Of the empty text, where the rule wants it.
    pub(in super::super) empty: Option<Tensor>,
    /// Of the network without some layers.
    pub(in super::super) lacking: Option<Tensor>,
    /// Of the network with perturbed attention, and the scale.
    pub(in super::super) perturbed: Option<(Tensor, f64)>,
    /// From blurred latents.
    pub(in super::super) degraded: Option<Tensor>,
}

/// Puts predictions together; remembers what a rule remembers from step to step.
pub(in super::super) struct Guide<'a> {
    plan: &'a Plan,
    momentum: Option<Tensor>,
}

impl<'a> Guide<'a> {
    pub(in super::super) fn new(plan: &'a Plan) -> Self {
        Self {
            plan,
            momentum: None,
        }
    }

    /// The prediction that the sampler sees.
    pub(in super::super) fn guide(
        &mut self,
        (sample, call): (&Tensor, &Call),
        predictions: &Predictions,
    ) -> Result<Tensor> {
        let guidance = &self.plan.guidance;
        let Some(prompt) = &predictions.prompt else {
            return Err(Error::Numeric("guidance needs a prediction".to_owned()));
        };
        if let Rule::ZeroStar { zero_steps } = guidance.rule
            && call.step < zero_steps
        {
            return Ok(prompt.zeros_like()?);
        }
        let mut guided = match &predictions.negative {
            Some(negative) => self.away_from(negative, prompt, (sample, call), predictions)?,
            None => prompt.clone(),
        };
        if let (Some(unseen), Some(negative), Some(scale)) = (
            &predictions.unseen,
            &predictions.negative,
            self.plan.image_cfg_scale,
        ) {
            // from no picture to the picture, and from there to the prompt (Brooks et al., arXiv 2211.09800, equation 3)
            guided = (guided + ((negative - unseen)? * (scale - 1.0))?)?;
        }
        if let (Some(lacking), Some(slg)) = (&predictions.lacking, &self.plan.skip_layers) {
            guided = (guided + ((prompt - lacking)? * slg.scale)?)?;
        }
        if let Some((perturbed, scale)) = &predictions.perturbed {
            guided = (guided + ((prompt - perturbed)? * *scale)?)?;
        }
        if let (Some(degraded), Some(scale)) = (&predictions.degraded, guidance.self_attention) {
            let from = predictions.negative.as_ref().unwrap_or(prompt);
            guided = (guided + ((from - degraded)? * scale)?)?;
        }
        if guidance.rescale > 0.0 && predictions.negative.is_some() {
            guided = rescaled(guidance.rescale, &guided, prompt)?;
        }
        Ok(guided)
    }

    /// By the rule.
    fn away_from(
        &mut self,
        negative: &Tensor,
        prompt: &Tensor,
        (sample, call): (&Tensor, &Call),
        predictions: &Predictions,
    ) -> Result<Tensor> {
        let plan = self.plan;
        let steps = plan.trajectory.steps;
        let schedule = &plan.guidance.schedule;
        let scale = schedule.at(plan.cfg_scale, call.step, steps);
        match &plan.guidance.rule {
            Rule::Plain => Ok((negative + ((prompt - negative)? * scale)?)?),
            Rule::Projected(apg) => {
                let mut difference = (prompt - negative)?;
                if let Some(momentum) = apg.momentum {
                    if let Some(last) = &self.momentum {
                        difference = (difference + (last * momentum)?)?;
                    }
                    self.momentum = Some(difference.clone());
                }
                projected(apg, scale, (negative, prompt, &difference))
            }
            Rule::ZeroStar { .. } => zero_star(scale, (negative, prompt)),
            Rule::Perpendicular { scale: weight } => match &predictions.empty {
                Some(empty) => perpendicular((scale, *weight), (negative, prompt, empty)),
                None => Err(Error::Numeric("the empty text was not encoded".to_owned())),
            },
            Rule::Tangential => tangential(scale, (negative, prompt)),
            Rule::Mimic(mimic) => {
                // x₀ = a · latents + b · prediction, and back
                let (a, b) = call.denoised;
                let clean = |x: &Tensor| -> Result<Tensor> { Ok(((sample * a)? + (x * b)?)?) };
                let clean = mimic.denoised(scale, (&clean(negative)?, &clean(prompt)?))?;
                Ok(((clean - (sample * a)?)? * (1.0 / b))?)
            }
        }
    }
}
