//! Less work for nearly the same picture. All of it is approximate and off unless it is asked for.

use sd_models::variant::{Merging, Reuse};

use crate::error::{Error, Result};
use crate::sampling::Call;

/// What is left out.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Shortcuts {
    /// The inner features of a UNet are computed at every so many calls, and used again in between (Ma et al., "DeepCache", arXiv 2312.00858);
    /// 0 and 1 leave nothing out.
    pub deep_cache: usize,
    /// Below this noise level the negative prompt is not asked at every other call (A1111's "negative guidance minimum sigma"); 0 always asks.
    pub least_negative_sigma: f64,
    /// The same at every call below that level.
    pub at_all_calls: bool,
    /// Behind some steps the text is not read any more.
    pub gate: Option<Gate>,
    /// Self-attentions look at fewer tokens.
    pub merging: Option<Merging>,
}

/// T-GATE (Zhang et al., arXiv 2404.02747; the package tgate 1.0.0): behind some steps there is no guidance, and what cross-attentions see is
/// what they saw last, the mean of the prompt's and the negative prompt's. Self-attentions may be computed at some steps alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gate {
    /// Whole steps.
    pub step: usize,
    /// Of those, the first ones at which self-attentions are computed in any case.
    pub warm_up: usize,
    /// Then they are computed at steps that this divides; 1 is all.
    pub interval: usize,
    /// The same behind the whole steps.
    pub late_interval: usize,
}

impl Gate {
    /// Whole steps, and self-attention at all.
    pub fn at(step: usize) -> Self {
        Self {
            step,
            warm_up: 2,
            interval: 1,
            late_interval: 1,
        }
    }

    /// What becomes of what self-attentions see at a step.
    pub(super) fn own_at(&self, step: usize) -> Reuse {
        let last = self.step.saturating_sub(1);
        let interval = match step > last {
            true => self.late_interval,
            false => self.interval,
        };
        let computed = step == last || step.is_multiple_of(interval.max(1));
        if step < last && step < self.warm_up {
            Reuse::Nothing
        } else if computed || (step < last && step == self.warm_up) {
            Reuse::Keep
        } else {
            Reuse::Take
        }
    }

    fn check(&self) -> Result<()> {
        let numbers = [
            ("--tgate", self.step),
            ("--tgate-sp-interval", self.interval),
            ("--tgate-fi-interval", self.late_interval),
        ];
        match numbers.into_iter().find(|(_, number)| *number == 0) {
            Some((flag, _)) => Err(Error::Usage(format!(
                "{flag} is 0, expected a number of steps from 1 on"
            ))),
            None => Ok(()),
        }
    }
}

impl Shortcuts {
    /// Whether the values are possible.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the one that is not.
    pub(super) fn check(&self) -> Result<()> {
        if !(0.0..=1e6).contains(&self.least_negative_sigma) {
            return Err(Error::Usage(format!(
                "--ngms is {}, expected a noise level of 0 or more",
                self.least_negative_sigma
            )));
        }
        if let Some(gate) = &self.gate {
            gate.check()?;
        }
        if let Some(merging) = &self.merging {
            if !(0.0..0.75).contains(&merging.ratio) {
                return Err(Error::Usage(format!(
                    "--tome is {}, expected a part of the tokens from 0 to below 0.75: one of each four stays",
                    merging.ratio
                )));
            }
            if ![1, 2, 4, 8].contains(&merging.max_downsample) {
                return Err(Error::Usage(format!(
                    "--tome-max-downsample is {}, expected 1, 2, 4 or 8",
                    merging.max_downsample
                )));
            }
        }
        Ok(())
    }

    /// Whether call `index` of a run is behind the gate.
    pub(super) fn is_gated(&self, calls: &[Call], index: usize) -> bool {
        let (Some(gate), Some(first), Some(call)) = (self.gate, calls.first(), calls.get(index))
        else {
            return false;
        };
        call.step.saturating_sub(first.step) >= gate.step
    }

    /// Whether call `index` of a run does without the negative prompt.
    pub(super) fn skips_negative(&self, index: usize, call: &Call) -> bool {
        (self.at_all_calls || index % 2 == 1) && call.sigma < self.least_negative_sigma
    }

    /// Whether call `index` may use the features of the one before.
    pub(super) fn is_shallow(&self, index: usize) -> bool {
        self.deep_cache > 1 && !index.is_multiple_of(self.deep_cache)
    }
}
