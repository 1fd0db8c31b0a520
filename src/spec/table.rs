//! The one table of presets: what all models of a family have in common.

use sd_models::config::ConfigResult;
use sd_models::{denoiser, flux, mmdit, unet};
use serde_json::{Value, json};

use crate::checkpoint::{Distilled, Family};
use crate::sampling::Prediction;
use crate::weights::ldm_unet::{self, Shapes};
use crate::weights::text_tower::{Activation, OpenClip};
use crate::weights::{self, Layout};

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
    /// How much of a picture is given up that a run begins at.
    pub strength: f64,
}

/// What latents look like: red, green and blue in [−1, 1] are sums of a latent's channels times their factors, and the bias. Fitted by the authors
/// of ComfyUI (`comfy/latent_formats.py` at 040a324).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rgb {
    /// Of each channel.
    pub factors: &'static [[f32; 3]],
    /// Of each colour.
    pub bias: [f32; 3],
}

const SD1_RGB: Rgb = Rgb {
    factors: &[
        [0.3512, 0.2297, 0.3227],
        [0.3250, 0.4974, 0.2350],
        [-0.2829, 0.1762, 0.2721],
        [-0.2120, -0.2616, -0.7177],
    ],
    bias: [0.0; 3],
};
const SDXL_RGB: Rgb = Rgb {
    factors: &[
        [0.3651, 0.4232, 0.4341],
        [-0.2533, -0.0042, 0.1068],
        [0.1076, 0.1111, -0.0362],
        [-0.3165, -0.2492, -0.2188],
    ],
    bias: [0.1084, -0.0175, -0.0011],
};
/// Of latents that are normalised channel by channel (Playground 2.5).
pub(super) const NORMALISED_RGB: Rgb = Rgb {
    factors: &[
        [0.3920, 0.4054, 0.4549],
        [-0.2634, -0.0196, 0.0653],
        [0.0568, 0.1687, -0.0755],
        [-0.3112, -0.2359, -0.2076],
    ],
    bias: [0.0; 3],
};
const SD3_RGB: Rgb = Rgb {
    factors: &[
        [-0.0922, -0.0175, 0.0749],
        [0.0311, 0.0633, 0.0954],
        [0.1994, 0.0927, 0.0458],
        [0.0856, 0.0339, 0.0902],
        [0.0587, 0.0272, -0.0496],
        [-0.0006, 0.1104, 0.0309],
        [0.0978, 0.0306, 0.0427],
        [-0.0042, 0.1038, 0.1358],
        [-0.0194, 0.0020, 0.0669],
        [-0.0488, 0.0130, -0.0268],
        [0.0922, 0.0988, 0.0951],
        [-0.0278, 0.0524, -0.0542],
        [0.0332, 0.0456, 0.0895],
        [-0.0069, -0.0030, -0.0810],
        [-0.0596, -0.0465, -0.0293],
        [-0.1448, -0.1463, -0.1189],
    ],
    bias: [0.2394, 0.2135, 0.1925],
};
const FLUX_RGB: Rgb = Rgb {
    factors: &[
        [-0.0346, 0.0244, 0.0681],
        [0.0034, 0.0210, 0.0687],
        [0.0275, -0.0668, -0.0433],
        [-0.0174, 0.0160, 0.0617],
        [0.0859, 0.0721, 0.0329],
        [0.0004, 0.0383, 0.0115],
        [0.0405, 0.0861, 0.0915],
        [-0.0236, -0.0185, -0.0259],
        [-0.0245, 0.0250, 0.1180],
        [0.1008, 0.0755, -0.0421],
        [-0.0515, 0.0201, 0.0011],
        [0.0428, -0.0012, -0.0036],
        [0.0817, 0.0765, 0.0749],
        [-0.1264, -0.0522, -0.1103],
        [-0.0280, -0.0881, -0.0499],
        [-0.1262, -0.0982, -0.0778],
    ],
    bias: [-0.0329, -0.0718, -0.0851],
};

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
    /// Whether the network reads the states of the tokens.
    pub states: bool,
    /// Whether the network reads the whole text's vector.
    pub pooled: bool,
    /// Whether single files' vector goes through the projection; folders say so themselves.
    pub(super) projects: bool,
}

/// T5's part in a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct T5Role {
    /// Its name in folders.
    pub component: &'static str,
    /// The folder of its tokenizer.
    pub tokenizer: &'static str,
    /// Where it lies in single files.
    pub(super) prefix: &'static str,
    /// Tokens that a text is filled up to, and cut at.
    pub length: usize,
    /// Whether pictures are made without it, its states being zeros.
    pub optional: bool,
}

/// The kind of a denoising network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Network {
    /// Stable Diffusion 1, 2, XL.
    UNet,
    /// Stable Diffusion 3.
    Mmdit,
    /// FLUX.1.
    Flux,
}

impl Network {
    /// Its name in folders.
    pub(super) fn component(self) -> &'static str {
        match self {
            Self::UNet => "unet",
            Self::Mmdit | Self::Flux => "transformer",
        }
    }

    /// Its structure, from a folder's config.
    pub(super) fn config(self, value: &Value) -> ConfigResult<denoiser::Config> {
        Ok(match self {
            Self::UNet => denoiser::Config::UNet(unet::Config::from_json(value)?),
            Self::Mmdit => denoiser::Config::Mmdit(mmdit::Config::from_json(value)?),
            Self::Flux => denoiser::Config::Flux(flux::Config::from_json(value)?),
        })
    }

    /// Its structure and names below `prefix` of a single file.
    pub(super) fn read(
        self,
        prefix: &str,
        shapes: &Shapes<'_>,
    ) -> std::result::Result<(denoiser::Config, Layout), String> {
        Ok(match self {
            Self::UNet => {
                let (config, layout) = ldm_unet::read(prefix, shapes)?;
                (denoiser::Config::UNet(config), layout)
            }
            Self::Mmdit => {
                let (config, layout) = weights::mmdit::read(prefix, shapes)?;
                (denoiser::Config::Mmdit(config), layout)
            }
            Self::Flux => {
                let (config, layout) = weights::flux::read(prefix, shapes)?;
                (denoiser::Config::Flux(config), layout)
            }
        })
    }
}

/// The names of a text tower in single files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// transformers', with the activation that its shapes do not tell.
    Transformers(Activation),
    OpenClip(OpenClip),
}

/// The noise levels of a family of flow models, by ComfyUI's reading.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct FlowLevels {
    /// By which times are shifted towards noise.
    pub(super) shift: f64,
    /// How many levels a schedule chooses from.
    pub(super) levels: usize,
}

/// What all models of a family have in common.
pub(super) struct Row {
    pub(super) network: Network,
    pub(super) defaults: Defaults,
    /// The size of models that predict v, which were trained at another.
    pub(super) v_size: usize,
    /// The autoencoder's scaling factor where a file does not say.
    pub(super) scaling_factor: f64,
    /// What is taken off the autoencoder's latents before that, where a file does not say.
    pub(super) shift_factor: f64,
    /// See [`ModelSpec::zero_negative`]; for files that do not say.
    pub(super) zero_negative: bool,
    /// diffusers' pipelines of this family correct old scheduler configs.
    pub(super) corrects_scheduler: bool,
    pub(super) towers: &'static [TowerRole],
    pub(super) t5: Option<T5Role>,
    /// The levels of flow models; none for models with betas.
    pub(super) flow: Option<FlowLevels>,
    /// The first and last beta of training.
    pub(super) betas: (f64, f64),
    /// The network is given a picture and makes it larger.
    pub(super) enlarges: bool,
    /// What its latents look like, and what TAESD of them is called in models folders.
    pub(super) rgb: (Rgb, &'static str),
}

const CLIP_L: TowerRole = TowerRole {
    component: "text_encoder",
    tokenizer: "tokenizer",
    prefix: "cond_stage_model.transformer",
    spelling: Spelling::Transformers(Activation::QuickGelu),
    pad: Pad::End,
    skip: 0,
    norm: true,
    states: true,
    pooled: false,
    projects: false,
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
    states: true,
    pooled: true,
    projects: true,
};
const REFINER_OPEN_CLIP_G: TowerRole = TowerRole {
    prefix: "conditioner.embedders.0.model",
    ..XL_OPEN_CLIP_G
};

/// Its vector is taken as it is (diffusers puts the identity in the projection's place), whatever a file has of that name.
const SD3_CLIP_L: TowerRole = TowerRole {
    prefix: "text_encoders.clip_l.transformer",
    pooled: true,
    ..XL_CLIP_L
};
const SD3_CLIP_G: TowerRole = TowerRole {
    prefix: "text_encoders.clip_g.transformer",
    spelling: Spelling::Transformers(Activation::Gelu),
    ..XL_OPEN_CLIP_G
};
const SD3_T5: T5Role = T5Role {
    component: "text_encoder_3",
    tokenizer: "tokenizer_3",
    prefix: "text_encoders.t5xxl.transformer",
    length: 256,
    optional: true,
};
/// Of CLIP, FLUX reads the vector alone, without the projection that CLIP itself has behind it.
const FLUX_CLIP_L: TowerRole = TowerRole {
    skip: 0,
    states: false,
    ..SD3_CLIP_L
};
const FLUX_T5: T5Role = T5Role {
    component: "text_encoder_2",
    tokenizer: "tokenizer_2",
    length: 512,
    optional: false,
    ..SD3_T5
};

const SD1: Row = Row {
    network: Network::UNet,
    defaults: Defaults {
        size: 512,
        steps: 20,
        cfg_scale: 7.5,
        sampler: "DPM++ 2M",
        schedule: None,
        most_cfg_scale: None,
        strength: 0.75,
    },
    v_size: 512,
    scaling_factor: 0.18215,
    shift_factor: 0.0,
    zero_negative: false,
    corrects_scheduler: true,
    towers: &[CLIP_L],
    t5: None,
    flow: None,
    betas: (0.00085, 0.012),
    enlarges: false,
    rgb: (SD1_RGB, "taesd_decoder"),
};
const SD2: Row = Row {
    v_size: 768,
    towers: &[OPEN_CLIP_H],
    ..SD1
};
/// Stable Diffusion x4 upscaler.
const X4: Row = Row {
    defaults: Defaults {
        cfg_scale: 9.0,
        ..SD1.defaults
    },
    scaling_factor: 0.08333,
    corrects_scheduler: false,
    betas: (0.0001, 0.02),
    enlarges: true,
    ..SD2
};
const SDXL: Row = Row {
    network: Network::UNet,
    defaults: Defaults {
        size: 1024,
        steps: 25,
        cfg_scale: 5.0,
        ..SD1.defaults
    },
    v_size: 1024,
    scaling_factor: 0.13025,
    shift_factor: 0.0,
    zero_negative: true,
    corrects_scheduler: false,
    towers: &[XL_CLIP_L, XL_OPEN_CLIP_G],
    rgb: (SDXL_RGB, "taesdxl_decoder"),
    ..SD1
};
const SDXL_REFINER: Row = Row {
    zero_negative: false,
    towers: &[REFINER_OPEN_CLIP_G],
    ..SDXL
};

const SD3: Row = Row {
    network: Network::Mmdit,
    defaults: Defaults {
        size: 1024,
        steps: 28,
        cfg_scale: 7.0,
        sampler: "Euler",
        schedule: Some("Simple"),
        most_cfg_scale: None,
        strength: 0.75,
    },
    v_size: 1024,
    scaling_factor: 1.5305,
    shift_factor: 0.0609,
    zero_negative: false,
    corrects_scheduler: false,
    towers: &[SD3_CLIP_L, SD3_CLIP_G],
    t5: Some(SD3_T5),
    flow: Some(FlowLevels {
        shift: 3.0,
        levels: 1000,
    }),
    betas: SD1.betas,
    enlarges: false,
    rgb: (SD3_RGB, "taesd3_decoder"),
};
const SD35: Row = Row {
    defaults: Defaults {
        cfg_scale: 4.5,
        ..SD3.defaults
    },
    ..SD3
};
const FLUX: Row = Row {
    network: Network::Flux,
    defaults: Defaults {
        cfg_scale: 3.5,
        ..SD3.defaults
    },
    scaling_factor: 0.3611,
    shift_factor: 0.1159,
    towers: &[FLUX_CLIP_L],
    t5: Some(FLUX_T5),
    // e^1.15, whatever the picture's size
    flow: Some(FlowLevels {
        shift: 3.158_192_909_689_767,
        levels: 10_000,
    }),
    rgb: (FLUX_RGB, "taef1_decoder"),
    ..SD3
};

/// The scaling factor of latents that are normalised channel by channel (Playground 2.5).
pub(super) const NORMALISED_FACTOR: f64 = 0.5;

/// The preset table: one row a family; none for families that pictures are not made with.
pub(super) fn row(family: Family) -> Option<&'static Row> {
    match family {
        Family::Sd1 => Some(&SD1),
        Family::Sd2 => Some(&SD2),
        Family::X4Upscaler => Some(&X4),
        Family::Sdxl | Family::Ssd1b | Family::Vega | Family::Koala => Some(&SDXL),
        Family::SdxlRefiner => Some(&SDXL_REFINER),
        Family::Sd3 => Some(&SD3),
        Family::Sd35 => Some(&SD35),
        Family::Flux1 => Some(&FLUX),
        _ => None,
    }
}

/// The first and last beta that a family was trained with.
pub(crate) fn betas(family: Family) -> (f64, f64) {
    row(family).map_or(SD1.betas, |row| row.betas)
}

/// A family's text towers; none for families that pictures are not made with.
pub fn towers(family: Family) -> &'static [TowerRole] {
    row(family).map_or(&[], |row| row.towers)
}

/// Tokens of T5's texts, for families that have T5.
pub fn t5_length(family: Family) -> Option<usize> {
    row(family).and_then(|row| row.t5).map(|t5| t5.length)
}

/// Pixels of each side of a family's pictures where nothing else is said.
pub fn native_size(family: Family, prediction: Prediction) -> usize {
    row(family).map_or(0, |row| row.defaults(prediction, None).size)
}

impl Row {
    /// Whether the network is FLUX's transformer.
    pub(super) fn is_flux(&self) -> bool {
        self.network == Network::Flux
    }

    /// The noise levels of a flow model of this network; none for models with betas.
    pub(super) fn flow_of(&self, network: &denoiser::Config) -> Option<FlowLevels> {
        match network {
            // schnell was distilled without a shift
            denoiser::Config::Flux(flux) if !flux.guidance => Some(FlowLevels {
                shift: 1.0,
                levels: 1000,
            }),
            _ => self.flow,
        }
    }

    /// The scheduler that diffusers gives a flow model of this network, as its folders describe it: a single file runs as its folder does.
    pub(super) fn scheduler_of(&self, network: &denoiser::Config) -> Option<Value> {
        let class = "FlowMatchEulerDiscreteScheduler";
        match network {
            denoiser::Config::UNet(_) => None,
            denoiser::Config::Mmdit(_) => Some(json!({ "_class_name": class, "shift": 3.0 })),
            denoiser::Config::Flux(flux) if !flux.guidance => {
                Some(json!({ "_class_name": class, "shift": 1.0 }))
            }
            denoiser::Config::Flux(_) => Some(json!({
                "_class_name": class, "shift": 3.0, "use_dynamic_shifting": true, "base_shift": 0.5, "max_shift": 1.15,
                "base_image_seq_len": 256, "max_image_seq_len": 4096,
            })),
        }
    }

    /// The defaults of a model of this network, where the family's models differ by it.
    pub(super) fn defaults_of(
        &self,
        network: &denoiser::Config,
        prediction: Prediction,
        distilled: Option<Distilled>,
    ) -> Defaults {
        let mut defaults = self.defaults(prediction, distilled);
        if let denoiser::Config::Flux(flux) = network {
            if !flux.guidance {
                // schnell was distilled to follow the prompt alone, in few steps
                (defaults.steps, defaults.cfg_scale) = (4, 1.0);
                defaults.most_cfg_scale = Some(1.0);
            } else if flux.in_width > flux.out_width {
                (defaults.steps, defaults.cfg_scale) = (50, 30.0);
                // fill is given what stays, and paints the rest from nothing
                defaults.strength = 1.0;
            }
        }
        defaults
    }

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
                Distilled::Lcm | Distilled::Tcd => 6,
            };
            if self.network == Network::UNet {
                defaults.sampler = match distilled {
                    Distilled::Turbo => "Euler a",
                    Distilled::Lightning(_) | Distilled::Hyper(_) => "Euler",
                    Distilled::Lcm => "LCM",
                    Distilled::Tcd => "TCD",
                };
                // a consistency sampler has its own levels
                defaults.schedule = match distilled {
                    Distilled::Lcm | Distilled::Tcd => None,
                    _ => Some("SGM Uniform"),
                };
            }
            defaults.cfg_scale = 1.0;
            defaults.most_cfg_scale = Some(2.5);
        }
        defaults
    }
}
