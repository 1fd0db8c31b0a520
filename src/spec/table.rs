//! The one table of presets: what all models of a family have in common.

use crate::checkpoint::{Distilled, Family};
use crate::sampling::Prediction;
use crate::weights::text_tower::OpenClip;

/// What a family does when nothing else is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Defaults {
    /// Pixels of the shorter and longer side.
    pub size: usize,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance.
    pub cfg_scale: f64,
    /// The sampler, by A1111's name.
    pub sampler: &'static str,
    /// The schedule, by A1111's name; the sampler's own where there is none.
    pub schedule: Option<&'static str>,
    /// The most guidance that does no harm.
    pub most_cfg_scale: Option<f64>,
}

/// How a prompt is filled up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pad {
    /// With the end token, as OpenAI's CLIP in Stable Diffusion 1.
    End,
    /// With token 0, as OpenCLIP in Stable Diffusion 2.
    Zero,
}

/// A text tower's part in a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TowerRole {
    /// Its name in folders.
    pub component: &'static str,
    /// The folder of its tokenizer.
    pub tokenizer: &'static str,
    /// Where it lies in single files.
    pub(super) prefix: &'static str,
    /// How single files spell it.
    pub(super) spelling: Spelling,
    /// The token that fills up a prompt to the tower's length.
    pub pad: Pad,
    /// Layers that are left out even when the user asks for none.
    pub skip: usize,
    /// Whether the states pass through the final norm.
    pub norm: bool,
}

/// The names of a text tower in single files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    Transformers,
    OpenClip(OpenClip),
}

/// What all models of a family have in common.
pub(super) struct Row {
    pub(super) defaults: Defaults,
    /// The size of models that predict v, which were trained at another.
    pub(super) v_size: usize,
    /// The autoencoder's scaling factor where a file does not say.
    pub(super) scaling_factor: f64,
    /// See [`ModelSpec::zero_negative`]; for files that do not say.
    pub(super) zero_negative: bool,
    /// diffusers' pipelines of this family correct old scheduler configs.
    pub(super) corrects_scheduler: bool,
    pub(super) towers: &'static [TowerRole],
}

const CLIP_L: TowerRole = TowerRole {
    component: "text_encoder",
    tokenizer: "tokenizer",
    prefix: "cond_stage_model.transformer",
    spelling: Spelling::Transformers,
    pad: Pad::End,
    skip: 0,
    norm: true,
};
const OPEN_CLIP_H: TowerRole = TowerRole {
    prefix: "cond_stage_model.model",
    spelling: Spelling::OpenClip(OpenClip::AllButLast),
    pad: Pad::Zero,
    ..CLIP_L
};
const XL_CLIP_L: TowerRole = TowerRole {
    prefix: "conditioner.embedders.0.transformer",
    skip: 1,
    norm: false,
    ..CLIP_L
};
const XL_OPEN_CLIP_G: TowerRole = TowerRole {
    component: "text_encoder_2",
    tokenizer: "tokenizer_2",
    prefix: "conditioner.embedders.1.model",
    spelling: Spelling::OpenClip(OpenClip::Whole),
    pad: Pad::Zero,
    skip: 1,
    norm: false,
};
const REFINER_OPEN_CLIP_G: TowerRole = TowerRole {
    prefix: "conditioner.embedders.0.model",
    ..XL_OPEN_CLIP_G
};

const SD1: Row = Row {
    defaults: Defaults {
        size: 512,
        steps: 20,
        cfg_scale: 7.5,
        sampler: "DPM++ 2M",
        schedule: None,
        most_cfg_scale: None,
    },
    v_size: 512,
    scaling_factor: 0.18215,
    zero_negative: false,
    corrects_scheduler: true,
    towers: &[CLIP_L],
};
const SD2: Row = Row {
    v_size: 768,
    towers: &[OPEN_CLIP_H],
    ..SD1
};
const SDXL: Row = Row {
    defaults: Defaults {
        size: 1024,
        steps: 25,
        cfg_scale: 5.0,
        ..SD1.defaults
    },
    v_size: 1024,
    scaling_factor: 0.13025,
    zero_negative: true,
    corrects_scheduler: false,
    towers: &[XL_CLIP_L, XL_OPEN_CLIP_G],
};
const SDXL_REFINER: Row = Row {
    zero_negative: false,
    towers: &[REFINER_OPEN_CLIP_G],
    ..SDXL
};

/// The scaling factor of latents that are normalised channel by channel (Playground 2.5).
pub(super) const NORMALISED_FACTOR: f64 = 0.5;

/// The preset table: one row a family; none for families that pictures are not made with.
pub(super) fn row(family: Family) -> Option<&'static Row> {
    match family {
        Family::Sd1 => Some(&SD1),
        Family::Sd2 => Some(&SD2),
        Family::Sdxl | Family::Ssd1b | Family::Vega | Family::Koala => Some(&SDXL),
        Family::SdxlRefiner => Some(&SDXL_REFINER),
        _ => None,
    }
}

/// A family's text towers; none for families that pictures are not made with.
pub fn towers(family: Family) -> &'static [TowerRole] {
    row(family).map_or(&[], |row| row.towers)
}

/// Pixels of each side of a family's pictures where nothing else is said.
pub fn native_size(family: Family, prediction: Prediction) -> usize {
    row(family).map_or(0, |row| row.defaults(prediction, None).size)
}

impl Row {
    pub(super) fn defaults(
        &self,
        prediction: Prediction,
        distilled: Option<Distilled>,
    ) -> Defaults {
        let mut defaults = self.defaults;
        if prediction == Prediction::V {
            defaults.size = self.v_size;
        }
        if let Some(distilled) = distilled {
            defaults.steps = match distilled {
                Distilled::Turbo => 4,
                Distilled::Lightning(steps) | Distilled::Hyper(steps) => steps,
            };
            defaults.sampler = match distilled {
                Distilled::Turbo => "Euler a",
                Distilled::Lightning(_) | Distilled::Hyper(_) => "Euler",
            };
            defaults.schedule = Some("SGM Uniform");
            defaults.cfg_scale = 1.0;
            defaults.most_cfg_scale = Some(2.5);
        }
        defaults
    }
}
