//! Less work for nearly the same picture. All of it is approximate and off unless it is asked for.

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
        Ok(())
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
