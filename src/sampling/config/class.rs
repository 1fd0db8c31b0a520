//! diffusers' scheduler classes: the fields that each one has, and the defaults in which they differ (0.42.1).

/// A scheduler class of diffusers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // named as in diffusers
pub enum Class {
    Pndm,
    Ddim,
    Ddpm,
    Euler,
    EulerAncestral,
    Heun,
    Lms,
    Kdpm2,
    Kdpm2Ancestral,
    DpmMultistep,
    DpmSinglestep,
    DpmSde,
    UniPc,
    Deis,
    Lcm,
    Tcd,
    EdmEuler,
    EdmDpmMultistep,
    FlowMatchEuler,
    FlowMatchHeun,
    FlowMatchLcm,
    /// None of these.
    Unknown,
}

/// Defaults that are not the same for all classes.
pub(super) struct Defaults {
    pub(super) betas: (f64, f64),
    pub(super) beta_schedule: &'static str,
    pub(super) spacing: &'static str,
    pub(super) clip_sample: bool,
    pub(super) algorithm_type: &'static str,
    pub(super) solver_type: &'static str,
}

const NAMES: &[(&str, Class)] = &[
    ("PNDMScheduler", Class::Pndm),
    ("DDIMScheduler", Class::Ddim),
    ("DDPMScheduler", Class::Ddpm),
    ("EulerDiscreteScheduler", Class::Euler),
    ("EulerAncestralDiscreteScheduler", Class::EulerAncestral),
    ("HeunDiscreteScheduler", Class::Heun),
    ("LMSDiscreteScheduler", Class::Lms),
    ("KDPM2DiscreteScheduler", Class::Kdpm2),
    ("KDPM2AncestralDiscreteScheduler", Class::Kdpm2Ancestral),
    ("DPMSolverMultistepScheduler", Class::DpmMultistep),
    ("DPMSolverSinglestepScheduler", Class::DpmSinglestep),
    ("DPMSolverSDEScheduler", Class::DpmSde),
    ("UniPCMultistepScheduler", Class::UniPc),
    ("DEISMultistepScheduler", Class::Deis),
    ("LCMScheduler", Class::Lcm),
    ("TCDScheduler", Class::Tcd),
    ("EDMEulerScheduler", Class::EdmEuler),
    ("EDMDPMSolverMultistepScheduler", Class::EdmDpmMultistep),
    ("FlowMatchEulerDiscreteScheduler", Class::FlowMatchEuler),
    ("FlowMatchHeunDiscreteScheduler", Class::FlowMatchHeun),
    ("FlowMatchLCMScheduler", Class::FlowMatchLcm),
];

const EVERY_CLASS: &[&str] = &[
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
];
const MAPS: &[&str] = &[
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "sigma_min",
    "sigma_max",
];
const ORDERS: &[&str] = &[
    "solver_order",
    "solver_type",
    "algorithm_type",
    "lower_order_final",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
];
const DYNAMIC: &[&str] = &[
    "use_dynamic_shifting",
    "time_shift_type",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
];
const FLOW: &[&str] = &["shift", "shift_terminal", "invert_sigmas"];
const FLOW_SIGMAS: &[&str] = &["use_flow_sigmas", "flow_shift"];
const CONTINUOUS: &[&str] = &[
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "sigma_schedule",
    "rho",
    "final_sigmas_type",
];
const CLIPPING: &[&str] = &[
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
];

impl Class {
    /// The class of a `_class_name`.
    pub(super) fn named(name: &str) -> Self {
        let found = NAMES.iter().find(|(known, _)| *known == name);
        found.map_or(Self::Unknown, |(_, class)| *class)
    }

    /// Whether the class reads `field`. (Several read `sigma_min` and `sigma_max` that are not in their signatures.)
    pub(super) fn has(self, field: &str) -> bool {
        let lists: &[&[&str]] = match self {
            Self::EdmEuler => &[CONTINUOUS],
            Self::EdmDpmMultistep => &[CONTINUOUS, ORDERS, &["euler_at_final"]],
            Self::Pndm => &[&["skip_prk_steps", "set_alpha_to_one"]],
            // either of the two that may take its place
            Self::Unknown => &[&["skip_prk_steps", "set_alpha_to_one"], FLOW, DYNAMIC],
            Self::FlowMatchEuler => &[MAPS, FLOW, DYNAMIC, &["stochastic_sampling"]],
            Self::FlowMatchLcm => &[MAPS, FLOW, DYNAMIC, &["scale_factors"]],
            Self::FlowMatchHeun => &[&["shift"]],
            Self::Ddim => &[CLIPPING, &["set_alpha_to_one", "rescale_betas_zero_snr"]],
            Self::Ddpm => &[CLIPPING, &["variance_type", "rescale_betas_zero_snr"]],
            Self::Euler => &[
                MAPS,
                &[
                    "interpolation_type",
                    "timestep_type",
                    "rescale_betas_zero_snr",
                    "final_sigmas_type",
                ],
            ],
            Self::EulerAncestral => &[&["rescale_betas_zero_snr"]],
            Self::Heun => &[MAPS, &["clip_sample", "clip_sample_range"]],
            Self::Lms | Self::Kdpm2 | Self::Kdpm2Ancestral => &[MAPS],
            Self::DpmSde => &[&[
                "use_karras_sigmas",
                "use_exponential_sigmas",
                "use_beta_sigmas",
                "noise_sampler_seed",
            ]],
            Self::DpmMultistep => &[
                MAPS,
                ORDERS,
                FLOW_SIGMAS,
                DYNAMIC,
                &[
                    "use_lu_lambdas",
                    "euler_at_final",
                    "final_sigmas_type",
                    "lambda_min_clipped",
                    "rescale_betas_zero_snr",
                ],
            ],
            Self::DpmSinglestep => &[
                MAPS,
                ORDERS,
                FLOW_SIGMAS,
                DYNAMIC,
                &["final_sigmas_type", "lambda_min_clipped"],
            ],
            Self::UniPc => &[
                MAPS,
                ORDERS,
                FLOW_SIGMAS,
                DYNAMIC,
                &[
                    "shift_terminal",
                    "predict_x0",
                    "disable_corrector",
                    "final_sigmas_type",
                    "rescale_betas_zero_snr",
                ],
            ],
            Self::Deis => &[MAPS, ORDERS, FLOW_SIGMAS, DYNAMIC],
            Self::Lcm | Self::Tcd => &[
                CLIPPING,
                &[
                    "set_alpha_to_one",
                    "rescale_betas_zero_snr",
                    "original_inference_steps",
                    "timestep_scaling",
                ],
            ],
        };
        EVERY_CLASS.contains(&field) || lists.iter().any(|list| list.contains(&field))
    }

    /// Whether the class is for flow models alone.
    pub fn is_flow_match(self) -> bool {
        matches!(
            self,
            Self::FlowMatchEuler | Self::FlowMatchHeun | Self::FlowMatchLcm
        )
    }

    pub(super) fn defaults(self) -> Defaults {
        let leading = matches!(self, Self::Pndm | Self::Ddim | Self::Ddpm | Self::Unknown);
        let few_step = matches!(self, Self::Lcm | Self::Tcd);
        let sensible = few_step
            || matches!(
                self,
                Self::Heun | Self::Kdpm2 | Self::Kdpm2Ancestral | Self::DpmSde
            );
        Defaults {
            betas: if sensible {
                (0.00085, 0.012)
            } else {
                (0.0001, 0.02)
            },
            beta_schedule: if few_step { "scaled_linear" } else { "linear" },
            spacing: if leading { "leading" } else { "linspace" },
            clip_sample: matches!(self, Self::Ddim | Self::Ddpm),
            algorithm_type: if self == Self::Deis {
                "deis"
            } else {
                "dpmsolver++"
            },
            solver_type: match self {
                Self::UniPc => "bh2",
                Self::Deis => "logrho",
                _ => "midpoint",
            },
        }
    }

    /// Whether a schedule rescaled to zero SNR is followed to its end; the others keep away from the division by zero.
    pub(in super::super) fn reaches_zero_snr(self) -> bool {
        matches!(self, Self::Ddim | Self::Ddpm | Self::Lcm | Self::Tcd)
    }
}
