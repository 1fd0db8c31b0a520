//! Where a run begins: at pure noise, or part of the way down at a picture, and whose arithmetic says how far.

use crate::error::{Error, Result};

/// Where a run begins.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Start {
    /// Pure noise. diffusers' inpainting begins so too where the strength is 1: that is for the caller to say.
    #[default]
    Noise,
    /// A picture's latents with as much noise as the first level of the run has.
    Picture {
        /// How much of the way is gone, from 0 to 1.
        strength: f64,
        /// What that means in steps.
        count: StepCount,
    },
}

/// Which steps a strength leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StepCount {
    /// The last ⌊steps · strength⌋, as diffusers' pipelines; those of flow models round up instead.
    #[default]
    Diffusers,
    /// As many steps as asked for, over that share of the timesteps that a consistency model was distilled at
    /// (`LatentConsistencyModelImg2ImgPipeline`). Where there are none: as [`StepCount::Diffusers`].
    Distilled,
    /// The last ⌊steps · strength⌋ + 1, the strength being 0.999 at most; one or two fewer for samplers that go by timesteps.
    A1111,
    /// As many as asked for, of ⌊steps / strength⌋ (A1111's "do exactly the amount of steps the slider specifies").
    Exact,
    /// The same, by ComfyUI's rounding: all of them above a strength of 0.9999.
    ComfyUi,
}

/// The steps of a run within those that its levels are made for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Span {
    /// Steps that levels are made for.
    pub(super) steps: usize,
    /// The first of them that is made.
    pub(super) first: usize,
    /// Steps that are made, where they are counted from the end.
    pub(super) kept: Option<usize>,
    /// The share of distilled timesteps that levels are spread over.
    pub(super) share: f64,
}

/// More levels than anybody asks for.
const MANY_STEPS: f64 = 100_000.0;

impl Start {
    /// The steps that are made when `steps` are asked for. `flow`: the pipelines of flow models do the counting.
    ///
    /// # Errors
    /// [`Error::Usage`] for a strength out of range, and one that leaves no steps.
    pub(super) fn span(self, steps: usize, flow: bool) -> Result<Span> {
        let whole = Span {
            steps,
            first: 0,
            kept: None,
            share: 1.0,
        };
        let Self::Picture { strength, count } = self else {
            return Ok(whole);
        };
        if !(0.0..=1.0).contains(&strength) {
            return Err(Error::Usage(format!(
                "--strength is {strength}, expected 0 to 1"
            )));
        }
        let asked = steps as f64;
        let from = |first| Span { first, ..whole };
        let span = match count {
            StepCount::Diffusers if flow => from((asked - (asked * strength).min(asked)) as usize),
            StepCount::Diffusers => from(steps.saturating_sub((asked * strength) as usize)),
            StepCount::Distilled => Span {
                share: strength,
                ..whole
            },
            StepCount::A1111 => {
                let encoded = (asked * strength.min(MOST)) as usize;
                from(steps.saturating_sub(encoded + 1))
            }
            StepCount::Exact => scaled(steps, strength.min(MOST))?,
            StepCount::ComfyUi if strength > ALL => whole,
            StepCount::ComfyUi => Span {
                kept: Some(steps),
                ..scaled(steps, strength)?
            },
        };
        if span.first >= span.steps {
            return Err(nothing_left(steps, strength));
        }
        Ok(span)
    }

    /// By the count that pipelines with other schedulers than those of consistency models go by.
    pub(super) fn undistilled(self) -> Self {
        match self {
            Self::Picture {
                strength,
                count: StepCount::Distilled,
            } => Self::Picture {
                strength,
                count: StepCount::Diffusers,
            },
            other => other,
        }
    }

    /// Whether the run begins at a picture.
    pub(super) fn is_picture(self) -> bool {
        self != Self::Noise
    }
}

/// The largest strength that A1111 knows.
const MOST: f64 = 0.999;
/// The strength above which ComfyUI makes the whole run.
const ALL: f64 = 0.9999;

/// The last `steps` of as many more as the strength is less than 1.
fn scaled(steps: usize, strength: f64) -> Result<Span> {
    let total = steps as f64 / strength;
    // so is NaN, of no steps at no strength
    if !(total <= MANY_STEPS) {
        return Err(Error::Usage(format!(
            "--strength is {strength}, too little to make {steps} steps of; use more strength or fewer --steps"
        )));
    }
    let total = total as usize;
    Ok(Span {
        steps: total,
        first: total.saturating_sub(steps),
        kept: None,
        share: 1.0,
    })
}

/// The error for a run without steps.
pub(super) fn nothing_left(steps: usize, strength: f64) -> Error {
    Error::Usage(format!(
        "--strength {strength} leaves none of {steps} steps; use more strength or more --steps"
    ))
}

impl Span {
    /// How many of `levels` noise levels come before the first of the run.
    pub(super) fn skipped(&self, levels: usize) -> usize {
        match self.kept {
            Some(kept) => levels.saturating_sub(kept + 1),
            None => self.first,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn span(steps: usize, strength: f64, count: StepCount, flow: bool) -> (usize, usize) {
        let start = Start::Picture { strength, count };
        let span = start.span(steps, flow).unwrap();
        (span.steps, span.steps - span.first)
    }

    #[test]
    fn each_tool_counts_in_its_own_way() {
        // steps in all, steps made
        assert_eq!(span(10, 0.75, StepCount::Diffusers, false), (10, 7));
        assert_eq!(span(10, 0.75, StepCount::Diffusers, true), (10, 8));
        assert_eq!(span(10, 1.0, StepCount::Diffusers, false), (10, 10));
        assert_eq!(span(20, 0.75, StepCount::A1111, false), (20, 16));
        assert_eq!(span(20, 1.0, StepCount::A1111, false), (20, 20));
        assert_eq!(span(20, 0.0, StepCount::A1111, false), (20, 1));
        assert_eq!(span(20, 0.75, StepCount::Exact, false), (26, 20));
        assert_eq!(span(20, 1.0, StepCount::Exact, false), (20, 20));
        assert_eq!(span(20, 0.6, StepCount::ComfyUi, false), (33, 20));
        assert_eq!(span(20, 0.99995, StepCount::ComfyUi, false), (20, 20));
    }

    #[test]
    fn strengths_that_leave_nothing_are_refused() {
        let refused = |strength, count| {
            let start = Start::Picture { strength, count };
            assert!(matches!(start.span(20, false), Err(Error::Usage(_))));
        };
        for strength in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
            refused(strength, StepCount::A1111);
        }
        refused(0.04, StepCount::Diffusers);
        refused(0.0, StepCount::Exact);
        refused(1e-9, StepCount::ComfyUi);
    }
}
