//! diffusers' `scheduler_config.json`: which fields a scheduler class has, their defaults, what they mean.

mod class;
pub(super) mod flow;
mod reader;

use serde_json::Value;

use super::prediction::Prediction;
use super::threshold::Threshold;
use crate::error::Result;
pub use class::Class;
pub use flow::{DynamicShift, FlowConfig};
use reader::{Reader, wrong};

/// How noise grows over the training timesteps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BetaSchedule {
    /// β linear in t.
    Linear,
    /// √β linear in t.
    ScaledLinear,
    /// Nichol & Dhariwal's cosine, `squaredcos_cap_v2`.
    SquaredCosine,
    /// ᾱ = e^(−12 t).
    Exponential,
    /// ᾱ from a Laplace distribution of log-SNR.
    Laplace,
    /// β a logistic curve of t.
    Sigmoid,
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
    /// Quantiles of the beta distribution, Lee et al., arXiv 2407.12173.
    Beta,
    /// Even in log σ between the extremes (`use_lu_lambdas`).
    Lu,
}

/// The fields of a scheduler config that are understood. Fields that its class does not have keep their defaults, as diffusers ignores
/// them.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // named as in diffusers
pub struct SchedulerConfig {
    /// The class as the file names it.
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
    /// `thresholding` with its two numbers.
    pub thresholding: Option<Threshold>,
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
    pub variance_type: String,
    pub original_inference_steps: usize,
    pub timestep_scaling: f64,
    pub sigma_data: f64,
    pub rho: f64,
    pub noise_sampler_seed: Option<u64>,
    /// `sigma_schedule` exponential instead of karras.
    pub exponential: bool,
    /// The form for flow models; none where the config is for models with betas.
    pub flow: Option<FlowConfig>,
}

impl Default for SchedulerConfig {
    /// Stable Diffusion 1.x as it was released.
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
            thresholding: None,
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
            variance_type: "fixed_small".to_owned(),
            original_inference_steps: 50,
            timestep_scaling: 10.0,
            sigma_data: 0.5,
            rho: 7.0,
            noise_sampler_seed: None,
            exponential: false,
            flow: None,
        }
    }
}

impl SchedulerConfig {
    /// Reads `scheduler_config.json` with the defaults of the class it names (diffusers 0.42.1).
    ///
    /// # Errors
    /// When a field that the class has holds a wrong type or a value that is not built.
    pub fn from_json(value: &Value) -> Result<Self> {
        let name = value.get("_class_name").and_then(Value::as_str);
        let class_name = name.unwrap_or("PNDMScheduler").to_owned();
        let class = Class::named(&class_name);
        let r = Reader { value, class };
        let train = r.size("num_train_timesteps", 1000)?;
        if train < 2 {
            return Err(wrong("num_train_timesteps", &train.into(), "at least 2"));
        }
        let of_class = class.defaults();
        let (start, end) = of_class.betas;
        Ok(Self {
            num_train_timesteps: train,
            beta_start: r.number("beta_start", start)?,
            beta_end: r.number("beta_end", end)?,
            beta_schedule: r.choice("beta_schedule", of_class.beta_schedule, BETA_SCHEDULES)?,
            trained_betas: r.trained_betas()?,
            prediction: r.prediction()?,
            spacing: r.choice("timestep_spacing", of_class.spacing, SPACINGS)?,
            steps_offset: r.size("steps_offset", 0)?,
            sigma_map: r.sigma_map()?,
            final_sigma_zero: r.choice("final_sigmas_type", "zero", FINAL_SIGMAS)?,
            rescale_betas_zero_snr: r.flag("rescale_betas_zero_snr", false)?,
            set_alpha_to_one: r.flag("set_alpha_to_one", class != Class::Pndm)?,
            clip_sample: r.flag("clip_sample", of_class.clip_sample)?,
            clip_sample_range: r.number("clip_sample_range", 1.0)?,
            thresholding: threshold(&r)?,
            skip_prk_steps: r.flag("skip_prk_steps", false)?,
            log_linear: r.choice("interpolation_type", "linear", INTERPOLATIONS)?,
            continuous: r.choice("timestep_type", "discrete", TIMESTEP_TYPES)?,
            solver_order: r.size("solver_order", 2)?.clamp(1, 8),
            algorithm_type: r.text("algorithm_type", of_class.algorithm_type)?,
            solver_type: r.text("solver_type", of_class.solver_type)?,
            lower_order_final: r.flag("lower_order_final", class != Class::DpmSinglestep)?,
            euler_at_final: r.flag("euler_at_final", false)?,
            predict_x0: r.flag("predict_x0", true)?,
            disable_corrector: r.disable_corrector()?,
            lambda_min_clipped: r.number("lambda_min_clipped", f64::NEG_INFINITY)?,
            sigma_min: r.level("sigma_min")?,
            sigma_max: r.level("sigma_max")?,
            variance_type: r.text("variance_type", "fixed_small")?,
            original_inference_steps: r.size("original_inference_steps", 50)?.max(1),
            timestep_scaling: r.number("timestep_scaling", 10.0)?,
            sigma_data: r.level("sigma_data")?.unwrap_or(0.5),
            rho: r.level("rho")?.unwrap_or(7.0),
            noise_sampler_seed: r.seed("noise_sampler_seed")?,
            exponential: r.choice("sigma_schedule", "karras", SIGMA_SCHEDULES)?,
            flow: flow::read(&r)?,
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

    /// The least and the most noise of a model of continuous levels.
    pub fn edm_range(&self) -> (f64, f64) {
        (
            self.sigma_min.unwrap_or(0.002),
            self.sigma_max.unwrap_or(80.0),
        )
    }

    /// Whether the class itself speaks of a flow model (one that is not known may take either side).
    pub fn is_flow(&self) -> bool {
        self.flow.is_some() && self.class() != Class::Unknown
    }

    /// Whether the noise levels are those of every Stable Diffusion 1 and 2, whatever else the file says.
    pub fn has_standard_betas(&self) -> bool {
        let standard = Self::default();
        let betas = |c: &Self| (c.num_train_timesteps, c.beta_start, c.beta_end);
        !self.is_flow()
            && betas(self) == betas(&standard)
            && self.beta_schedule == standard.beta_schedule
            && self.trained_betas.is_none()
            && !self.rescale_betas_zero_snr
    }

    /// The sampler's and the schedule's names in A1111's words, for reports and picture files.
    pub fn names(&self) -> (&str, &'static str) {
        let class = self.class_name.trim_end_matches("Scheduler");
        let sampler = match self.class() {
            Class::Pndm => "PLMS",
            Class::Euler | Class::EdmEuler | Class::FlowMatchEuler => "Euler",
            Class::EulerAncestral => "Euler a",
            Class::Heun | Class::FlowMatchHeun => "Heun",
            Class::FlowMatchLcm => "LCM",
            Class::Lms => "LMS",
            Class::Kdpm2 => "DPM2",
            Class::Kdpm2Ancestral => "DPM2 a",
            Class::DpmMultistep | Class::EdmDpmMultistep => "DPM++ 2M",
            Class::UniPc => "UniPC",
            Class::DpmSde => "DPM++ SDE",
            _ => class,
        };
        if matches!(self.class(), Class::EdmEuler | Class::EdmDpmMultistep) {
            return (
                sampler,
                if self.exponential {
                    "Exponential"
                } else {
                    "Karras"
                },
            );
        }
        let schedule = match self.sigma_map {
            SigmaMap::Karras => "Karras",
            SigmaMap::Exponential | SigmaMap::Lu => "Exponential",
            SigmaMap::Beta => "Beta",
            SigmaMap::None => "Automatic",
        };
        (sampler, schedule)
    }

    /// The class, `Unknown` when it is not built.
    pub fn class(&self) -> Class {
        Class::named(&self.class_name)
    }
}

const BETA_SCHEDULES: &[(&str, BetaSchedule)] = &[
    ("linear", BetaSchedule::Linear),
    ("scaled_linear", BetaSchedule::ScaledLinear),
    ("squaredcos_cap_v2", BetaSchedule::SquaredCosine),
    ("exp", BetaSchedule::Exponential),
    ("laplace", BetaSchedule::Laplace),
    ("sigmoid", BetaSchedule::Sigmoid),
];
const SPACINGS: &[(&str, Spacing)] = &[
    ("linspace", Spacing::Linspace),
    ("leading", Spacing::Leading),
    ("trailing", Spacing::Trailing),
];
const FINAL_SIGMAS: &[(&str, bool)] = &[("zero", true), ("sigma_min", false)];
const INTERPOLATIONS: &[(&str, bool)] = &[("linear", false), ("log_linear", true)];
const SIGMA_SCHEDULES: &[(&str, bool)] = &[("karras", false), ("exponential", true)];
const TIMESTEP_TYPES: &[(&str, bool)] = &[("discrete", false), ("continuous", true)];

/// Dynamic thresholding, which diffusers itself calls unsuitable for latents.
fn threshold(r: &Reader<'_>) -> Result<Option<Threshold>> {
    if !r.flag("thresholding", false)? {
        return Ok(None);
    }
    let ratio = r.number("dynamic_thresholding_ratio", 0.995)?;
    let most = r.number("sample_max_value", 1.0)?;
    if !(0.0..=1.0).contains(&ratio) {
        let expected = "a part from 0 to 1";
        return Err(wrong("dynamic_thresholding_ratio", &ratio.into(), expected));
    }
    if most.is_nan() || most <= 0.0 {
        return Err(wrong("sample_max_value", &most.into(), "above 0"));
    }
    Ok(Some(Threshold { ratio, most }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::error::Error;

    fn read(text: &str) -> Result<SchedulerConfig> {
        SchedulerConfig::from_json(&serde_json::from_str(text).unwrap())
    }

    #[test]
    fn fields_of_other_classes_are_ignored() {
        let text = r#"{"_class_name": "HeunDiscreteScheduler", "final_sigmas_type": "sigma_min", "rescale_betas_zero_snr": true,
            "use_lu_lambdas": true, "thresholding": true, "unheard_of": {}}"#;
        let config = read(text).unwrap();
        assert!(config.final_sigma_zero && !config.rescale_betas_zero_snr);
        assert_eq!(config.sigma_map, SigmaMap::None);
        assert_eq!((config.beta_start, config.beta_end), (0.00085, 0.012));
    }

    #[test]
    fn defaults_are_those_of_the_class() {
        let ddim = read(r#"{"_class_name": "DDIMScheduler"}"#).unwrap();
        assert!(ddim.clip_sample && ddim.set_alpha_to_one && ddim.spacing == Spacing::Leading);
        let corrected = ddim.corrected_for_stable_diffusion();
        assert!(!corrected.clip_sample && corrected.steps_offset == 1);
        let unchosen = r#"{"_class_name": "EulerDiscreteScheduler", "steps_offset": 7, "_use_default_values": ["steps_offset"]}"#;
        assert_eq!(read(unchosen).unwrap().steps_offset, 0);
    }

    #[test]
    fn wrong_values_name_the_field() {
        for (text, field) in [
            (r#"{"beta_schedule": "wavy"}"#, "beta_schedule"),
            (r#"{"steps_offset": -1}"#, "steps_offset"),
            (r#"{"num_train_timesteps": 1}"#, "num_train_timesteps"),
            (r#"{"trained_betas": [0.1, "x"]}"#, "trained_betas"),
            (
                r#"{"prediction_type": "flow_prediction"}"#,
                "prediction_type",
            ),
        ] {
            assert!(
                read(text).unwrap_err().to_string().contains(field),
                "{text}"
            );
        }
        let flow = r#"{"_class_name": "FlowMatchLCMScheduler", "scale_factors": [0.5]}"#;
        assert!(matches!(read(flow), Err(Error::Unsupported(_))));
        let flow = r#"{"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": true, "prediction_type": "flow_prediction"}"#;
        assert_eq!(read(flow).unwrap().prediction, Prediction::Flow);
    }
}
