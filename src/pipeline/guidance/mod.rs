//! How predictions are put together: away from the negative prompt (Ho & Salimans, arXiv 2207.12598), by which rule and how much at which step,
//! and away from a network that is worse in one way or another.

mod away;
mod combine;
mod mimic;
mod rules;
mod scale;
mod skip_layers;

pub use away::Perturbed;
pub use mimic::{Measure, Mimic};
pub use rules::{Projected, Rule};
pub use scale::{ScaleSchedule, ScaleShape};
pub use sd_models::variant::{FreeU, FreeUVersion};
pub use skip_layers::SkipLayers;

pub(super) use away::{blurred, resolve};
pub(super) use combine::{Guide, Predictions};

use crate::error::{Error, Result};

/// Guidance beyond one scale for all steps. The default is nothing beyond it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Guidance {
    /// Between which parts of the steps, 0 to 1, the negative prompt has a say. Outside of them the prompt alone is asked.
    pub span: Option<(f64, f64)>,
    /// How the scale changes from step to step.
    pub schedule: ScaleSchedule,
    /// How much of the prediction is brought back to the deviation of the prompt's, 0 to 1 (Lin et al., arXiv 2305.08891, section 3.4).
    pub rescale: f64,
    /// How the predictions of the two prompts become one.
    pub rule: Rule,
    /// Away from a network whose self-attention sees nothing.
    pub perturbed: Option<Perturbed>,
    /// Away from latents that are blurred where the network looks: the scale (Hong et al., arXiv 2210.00939).
    pub self_attention: Option<f64>,
    /// Other weights of features and skips.
    pub free_u: Option<FreeU>,
}

impl Guidance {
    /// Whether the negative prompt has a say in step `step` of `steps`, as diffusers' guiders count.
    pub(super) fn acts_at(&self, step: usize, steps: usize) -> bool {
        let Some((start, end)) = self.span else {
            return true;
        };
        let place = |part: f64| (part * steps as f64) as usize;
        (place(start)..place(end)).contains(&step)
    }

    /// Whether the values are possible.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the one that is not.
    pub(super) fn check(&self) -> Result<()> {
        if let Some((start, end)) = self.span
            && !(0.0 <= start && start <= end && end <= 1.0)
        {
            return Err(Error::Usage(format!(
                "--cfg-start is {start} and --cfg-end {end}, expected parts of the steps from 0 to 1, in this order"
            )));
        }
        if !(0.0..=1.0).contains(&self.rescale) {
            return Err(Error::Usage(format!(
                "--cfg-rescale is {}, expected 0 to 1",
                self.rescale
            )));
        }
        let named = [
            ("--cfg-min", Some(self.schedule.least)),
            ("--sag-scale", self.self_attention),
            ("--pag-scale", self.perturbed.as_ref().map(|pag| pag.scale)),
            (
                "--pag-adaptive-scale",
                self.perturbed.as_ref().map(|pag| pag.adaptive),
            ),
        ];
        let free_u = self.free_u.iter();
        let free_u = free_u.flat_map(|free_u| [free_u.features, free_u.skips].concat());
        let named = named
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)))
            .chain(free_u.map(|value| ("--freeu", value)));
        for (name, value) in named.chain(self.rule.numbers()) {
            if !(-1000.0..=1000.0).contains(&value) {
                return Err(Error::Usage(format!(
                    "{name} is {value}, expected a number from -1000 to 1000"
                )));
            }
        }
        self.rule.check()
    }

    /// The flags of what has no say where no negative prompt has one.
    pub(super) fn needs_negative(&self) -> Vec<&'static str> {
        let flags = [
            ("--cfg-start and --cfg-end", self.span.is_some()),
            ("--cfg-schedule", self.schedule != ScaleSchedule::default()),
            ("--cfg-rescale", self.rescale != 0.0),
            (self.rule.flag(), self.rule != Rule::Plain),
        ];
        let set = flags.into_iter().filter(|(_, set)| *set);
        set.map(|(flag, _)| flag).collect()
    }
}
