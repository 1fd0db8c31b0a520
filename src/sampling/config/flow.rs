//! The fields of scheduler configs that speak of flow matching: how the levels of a run are shifted towards noise, by a fixed factor or by
//! one that grows with the picture (diffusers 0.42.1).

use super::{Class, Reader, wrong};
use crate::error::{Error, Result};

/// How a picture's size moves its noise levels: μ is linear in the number of patches (diffusers `calculate_shift`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DynamicShift {
    /// μ at `base_patches` (`base_shift`).
    pub base: f64,
    /// μ at `max_patches` (`max_shift`).
    pub max: f64,
    /// Patches of a small picture (`base_image_seq_len`).
    pub base_patches: usize,
    /// Patches of a large picture (`max_image_seq_len`).
    pub max_patches: usize,
    /// The factor is μ itself, not e^μ (`time_shift_type` linear).
    pub linear: bool,
}

impl DynamicShift {
    /// The factor for a picture of so many patches.
    pub fn factor(&self, patches: usize) -> f64 {
        let slope = (self.max - self.base) / (self.max_patches as f64 - self.base_patches as f64);
        let mu = patches as f64 * slope + (self.base - slope * self.base_patches as f64);
        self.factor_of(mu)
    }

    /// The factor for the largest picture, which programs that know of no sizes take for all.
    pub fn largest(&self) -> f64 {
        self.factor_of(self.max)
    }

    fn factor_of(&self, mu: f64) -> f64 {
        if self.linear { mu } else { mu.exp() }
    }
}

/// A scheduler's fields for flow models, named as in diffusers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FlowConfig {
    /// The factor s of `s·t/(1 + (s − 1)·t)`: `shift` or `flow_shift`, or what a dynamic shift came to.
    pub shift: f64,
    /// `use_dynamic_shifting` and its fields.
    pub dynamic: Option<DynamicShift>,
    /// The level that the shifted ones are stretched to end at, before the step to 0.
    pub shift_terminal: Option<f64>,
    /// Levels count up from 0 to 1.
    pub invert_sigmas: bool,
    /// Every step begins with fresh noise.
    pub stochastic_sampling: bool,
}

impl FlowConfig {
    /// A level on the shifted scale, in the order of operations of the reference.
    pub(in super::super) fn shifted(&self, t: f64) -> f64 {
        if self.dynamic.is_some() {
            self.shift / (self.shift + (1.0 / t - 1.0))
        } else {
            shifted(self.shift, t)
        }
    }

    /// With the shift that a picture of so many patches has.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the shift is dynamic and nobody says how large the picture is, [`Error::Usage`] when it comes to nothing.
    pub(in super::super) fn resolved(self, patches: Option<usize>) -> Result<Self> {
        let (Some(dynamic), Some(patches)) = (self.dynamic, patches) else {
            return match self.dynamic {
                None => Ok(self),
                Some(_) => Err(Error::Unsupported(
                    "scheduler config field `use_dynamic_shifting` is for models of flow matching, which this one is not; name a --sampler".to_owned(),
                )),
            };
        };
        let shift = dynamic.factor(patches);
        if shift > 0.0 && shift.is_finite() {
            return Ok(Self { shift, ..self });
        }
        Err(Error::Usage(format!(
            "scheduler config fields `base_shift` and `max_shift` shift a picture of {patches} patches by {shift}, expected a number above 0"
        )))
    }
}

/// `s·t/(1 + (s − 1)·t)`: more steps where there is more noise (Esser et al., "Scaling Rectified Flow Transformers", arXiv 2403.03206,
/// equation 23).
pub(in super::super) fn shifted(shift: f64, t: f64) -> f64 {
    shift * t / (1.0 + (shift - 1.0) * t)
}

const SHIFTS: &[(&str, bool)] = &[("exponential", false), ("linear", true)];

/// The flow fields of a class that has them and, for solvers that have two forms, is told to use them.
pub(super) fn read(r: &Reader<'_>) -> Result<Option<FlowConfig>> {
    let solver = r.class.has("use_flow_sigmas");
    if !(r.class.is_flow_match()
        || r.class == Class::Unknown
        || r.flag("use_flow_sigmas", false)?)
    {
        return Ok(None);
    }
    if let Some(scales) = r.get("scale_factors")
        && scales.as_array().is_none_or(|list| !list.is_empty())
    {
        return Err(Error::Unsupported(
            "scheduler config field `scale_factors` is not supported".to_owned(),
        ));
    }
    let linear = r.choice("time_shift_type", "exponential", SHIFTS)?;
    let dynamic = r.flag("use_dynamic_shifting", false)?;
    let dynamic = DynamicShift {
        base: r.number("base_shift", 0.5)?,
        max: r.number("max_shift", 1.15)?,
        base_patches: r.size("base_image_seq_len", 256)?,
        max_patches: r.size("max_image_seq_len", 4096)?,
        linear,
    }
    .checked(dynamic)?;
    let terminal = r.number("shift_terminal", 0.0)?;
    if !(0.0..1.0).contains(&terminal) {
        return Err(wrong("shift_terminal", &terminal.into(), "0 to below 1"));
    }
    Ok(Some(FlowConfig {
        shift: r
            .level(if solver { "flow_shift" } else { "shift" })?
            .unwrap_or(1.0),
        dynamic,
        shift_terminal: (terminal > 0.0).then_some(terminal),
        invert_sigmas: r.flag("invert_sigmas", false)?,
        stochastic_sampling: r.flag("stochastic_sampling", false)?,
    }))
}

impl DynamicShift {
    /// Nothing unless it is `used`.
    fn checked(self, used: bool) -> Result<Option<Self>> {
        if used && self.base_patches == self.max_patches {
            return Err(wrong(
                "max_image_seq_len",
                &self.max_patches.into(),
                "more than `base_image_seq_len`",
            ));
        }
        Ok(used.then_some(self))
    }
}
