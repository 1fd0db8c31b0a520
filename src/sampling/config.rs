//! diffusers' `scheduler_config.json`.

use serde_json::Value;

use super::prediction::Prediction;
use crate::error::{Error, Result};

/// How noise grows over the training timesteps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BetaSchedule {
    /// β linear in t.
    Linear,
    /// √β linear in t.
    ScaledLinear,
    /// Nichol & Dhariwal's cosine, `squaredcos_cap_v2`.
    SquaredCosine,
}

/// How a run's timesteps are spread over the training ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spacing {
    /// Evenly from the first to the last.
    Linspace,
    /// Multiples of a whole step from 0, plus `steps_offset`.
    Leading,
    /// Backwards from the last.
    Trailing,
}

/// A remapping of a run's noise levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SigmaMap {
    /// As the timesteps say.
    None,
    /// Karras et al., arXiv 2206.00364, equation 5.
    Karras,
    /// Even in log σ.
    Exponential,
    /// Even in log σ between the extremes (`use_lu_lambdas`).
    Lu,
}

/// The fields of a scheduler config that are understood, with diffusers' defaults for Stable Diffusion.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // named as in diffusers
pub struct SchedulerConfig {
    pub class_name: String,
    pub num_train_timesteps: usize,
    pub beta_start: f64,
    pub beta_end: f64,
    pub beta_schedule: BetaSchedule,
    pub trained_betas: Option<Vec<f64>>,
    pub prediction: Prediction,
    pub spacing: Spacing,
    pub steps_offset: usize,
    pub sigma_map: SigmaMap,
    pub final_sigma_zero: bool,
    pub rescale_betas_zero_snr: bool,
    pub set_alpha_to_one: bool,
    pub clip_sample: bool,
    pub clip_sample_range: f64,
    pub skip_prk_steps: bool,
    pub log_linear: bool,
    pub continuous: bool,
    pub solver_order: usize,
    pub algorithm_type: String,
    pub solver_type: String,
    pub lower_order_final: bool,
    pub euler_at_final: bool,
    pub predict_x0: bool,
    pub disable_corrector: Vec<usize>,
    pub lambda_min_clipped: f64,
    pub sigma_min: Option<f64>,
    pub sigma_max: Option<f64>,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            class_name: "PNDMScheduler".to_owned(),
            num_train_timesteps: 1000,
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            trained_betas: None,
            prediction: Prediction::Epsilon,
            spacing: Spacing::Leading,
            steps_offset: 1,
            sigma_map: SigmaMap::None,
            final_sigma_zero: true,
            rescale_betas_zero_snr: false,
            set_alpha_to_one: false,
            clip_sample: false,
            clip_sample_range: 1.0,
            skip_prk_steps: true,
            log_linear: false,
            continuous: false,
            solver_order: 2,
            algorithm_type: "dpmsolver++".to_owned(),
            solver_type: String::new(),
            lower_order_final: true,
            euler_at_final: false,
            predict_x0: true,
            disable_corrector: Vec::new(),
            lambda_min_clipped: f64::NEG_INFINITY,
            sigma_min: None,
            sigma_max: None,
        }
    }
}

fn wrong(field: &str, value: &Value, expected: &str) -> Error {
    Error::Usage(format!(
        "scheduler config field `{field}` is {value}, expected {expected}"
    ))
}

/// Typed access with diffusers' defaults.
struct Reader<'a>(&'a Value);

impl Reader<'_> {
    fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|v| !v.is_null())
    }

    fn number(&self, field: &str, default: f64) -> Result<f64> {
        self.get(field).map_or(Ok(default), |v| match v {
            // Python writes infinities as text that JSON readers refuse, or as strings
            Value::String(s) if s.eq_ignore_ascii_case("-inf") || s == "-Infinity" => {
                Ok(f64::NEG_INFINITY)
            }
            v => v
                .as_f64()
                .filter(|n| n.is_finite())
                .ok_or_else(|| wrong(field, v, "a number")),
        })
    }

    fn size(&self, field: &str, default: usize) -> Result<usize> {
        self.get(field).map_or(Ok(default), |v| {
            v.as_u64()
                .filter(|&n| n <= 100_000)
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(|| wrong(field, v, "a whole number up to 100000"))
        })
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool> {
        self.get(field).map_or(Ok(default), |v| {
            v.as_bool().ok_or_else(|| wrong(field, v, "true or false"))
        })
    }

    fn text(&self, field: &str, default: &str) -> Result<String> {
        self.get(field).map_or_else(
            || Ok(default.to_owned()),
            |v| {
                v.as_str()
                    .map(str::to_owned)
                    .ok_or_else(|| wrong(field, v, "a text"))
            },
        )
    }
}

impl SchedulerConfig {
    /// Reads `scheduler_config.json` with the defaults of the class it names (diffusers 0.42.1).
    ///
    /// # Errors
    /// When a field has a wrong type or a value that is not built.
    pub fn from_json(value: &Value) -> Result<Self> {
        let r = Reader(value);
        let class_name = r.text("_class_name", "PNDMScheduler")?;
        let class = class_name.as_str();
        let leading = matches!(class, "PNDMScheduler" | "DDIMScheduler");
        let spacing = match r
            .text(
                "timestep_spacing",
                if leading { "leading" } else { "linspace" },
            )?
            .as_str()
        {
            "linspace" => Spacing::Linspace,
            "leading" => Spacing::Leading,
            "trailing" => Spacing::Trailing,
            other => {
                return Err(wrong(
                    "timestep_spacing",
                    &other.into(),
                    "linspace, leading or trailing",
                ));
            }
        };
        // Heun and LMS were written with other betas in mind
        let heun_or_lms = matches!(class, "HeunDiscreteScheduler");
        let (start, end) = if heun_or_lms {
            (0.00085, 0.012)
        } else {
            (0.0001, 0.02)
        };
        let beta_schedule = match r.text("beta_schedule", "linear")?.as_str() {
            "linear" => BetaSchedule::Linear,
            "scaled_linear" => BetaSchedule::ScaledLinear,
            "squaredcos_cap_v2" => BetaSchedule::SquaredCosine,
            other => {
                return Err(wrong(
                    "beta_schedule",
                    &other.into(),
                    "linear, scaled_linear or squaredcos_cap_v2",
                ));
            }
        };
        let prediction = match r.text("prediction_type", "epsilon")?.as_str() {
            "epsilon" => Prediction::Epsilon,
            "v_prediction" => Prediction::V,
            "sample" | "original_sample" => Prediction::Sample,
            other => {
                return Err(wrong(
                    "prediction_type",
                    &other.into(),
                    "epsilon, v_prediction or sample",
                ));
            }
        };
        for field in [
            "thresholding",
            "use_beta_sigmas",
            "use_flow_sigmas",
            "use_dynamic_shifting",
        ] {
            if r.flag(field, false)? {
                return Err(Error::Unsupported(format!(
                    "scheduler config field `{field}` is not supported yet"
                )));
            }
        }
        let maps = [
            ("use_karras_sigmas", SigmaMap::Karras),
            ("use_lu_lambdas", SigmaMap::Lu),
            ("use_exponential_sigmas", SigmaMap::Exponential),
        ];
        let mut sigma_map = SigmaMap::None;
        for (field, map) in maps {
            if r.flag(field, false)? && sigma_map == SigmaMap::None {
                sigma_map = map;
            }
        }
        let train = r.size("num_train_timesteps", 1000)?;
        let trained_betas = match r.get("trained_betas") {
            Some(list) => Some(
                list.as_array()
                    .and_then(|l| l.iter().map(Value::as_f64).collect::<Option<Vec<_>>>())
                    .filter(|l| l.len() == train && l.iter().all(|b| (0.0..=1.0).contains(b)))
                    .ok_or_else(|| {
                        wrong(
                            "trained_betas",
                            &"…".into(),
                            &format!("{train} numbers from 0 to 1"),
                        )
                    })?,
            ),
            None => None,
        };
        if train < 2 {
            return Err(wrong("num_train_timesteps", &train.into(), "at least 2"));
        }
        let disable_corrector = r.get("disable_corrector").and_then(Value::as_array);
        let solver_type = if class == "UniPCMultistepScheduler" {
            "bh2"
        } else {
            "midpoint"
        };
        Ok(Self {
            num_train_timesteps: train,
            beta_start: r.number("beta_start", start)?,
            beta_end: r.number("beta_end", end)?,
            beta_schedule,
            trained_betas,
            prediction,
            spacing,
            steps_offset: r.size("steps_offset", 0)?,
            sigma_map,
            final_sigma_zero: match r.text("final_sigmas_type", "zero")?.as_str() {
                "zero" => true,
                "sigma_min" => false,
                other => {
                    return Err(wrong(
                        "final_sigmas_type",
                        &other.into(),
                        "zero or sigma_min",
                    ));
                }
            },
            rescale_betas_zero_snr: r.flag("rescale_betas_zero_snr", false)?,
            set_alpha_to_one: r.flag("set_alpha_to_one", class == "DDIMScheduler")?,
            clip_sample: r.flag("clip_sample", class == "DDIMScheduler")?,
            clip_sample_range: r.number("clip_sample_range", 1.0)?,
            skip_prk_steps: r.flag("skip_prk_steps", false)?,
            log_linear: r.text("interpolation_type", "linear")? == "log_linear",
            continuous: r.text("timestep_type", "discrete")? == "continuous",
            solver_order: r.size("solver_order", 2)?.clamp(1, 8),
            algorithm_type: r.text("algorithm_type", "dpmsolver++")?,
            solver_type: r.text("solver_type", solver_type)?,
            lower_order_final: r.flag("lower_order_final", true)?,
            euler_at_final: r.flag("euler_at_final", false)?,
            predict_x0: r.flag("predict_x0", true)?,
            disable_corrector: disable_corrector
                .map(|l| {
                    l.iter()
                        .filter_map(Value::as_u64)
                        .filter_map(|n| usize::try_from(n).ok())
                        .collect()
                })
                .unwrap_or_default(),
            lambda_min_clipped: r.number("lambda_min_clipped", f64::NEG_INFINITY)?,
            sigma_min: r.get("sigma_min").and_then(Value::as_f64),
            sigma_max: r.get("sigma_max").and_then(Value::as_f64),
            class_name,
        })
    }

    /// diffusers' Stable Diffusion pipelines force `steps_offset` to 1 and `clip_sample` off, whatever the file says.
    #[must_use]
    pub fn corrected_for_stable_diffusion(self) -> Self {
        Self {
            steps_offset: 1,
            clip_sample: false,
            ..self
        }
    }

    /// The sampler's and the schedule's names in A1111's words, for reports and picture files.
    pub fn names(&self) -> (&str, &'static str) {
        let class = self.class_name.trim_end_matches("Scheduler");
        let sampler = match class {
            "PNDM" => "PLMS",
            "EulerDiscrete" => "Euler",
            "EulerAncestralDiscrete" => "Euler a",
            "HeunDiscrete" => "Heun",
            "LMSDiscrete" => "LMS",
            "DPMSolverMultistep" => "DPM++ 2M",
            "UniPCMultistep" => "UniPC",
            other => other,
        };
        let schedule = match self.sigma_map {
            SigmaMap::Karras => "Karras",
            SigmaMap::Exponential | SigmaMap::Lu => "Exponential",
            SigmaMap::None => "Automatic",
        };
        (sampler, schedule)
    }

    /// DDIM and PNDM follow the rescaled schedule to its end; the others keep away from the division by zero.
    pub(super) fn keeps_last_alpha_above_zero(&self) -> bool {
        !matches!(self.class_name.as_str(), "DDIMScheduler" | "PNDMScheduler")
    }
}
