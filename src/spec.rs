//! What a checkpoint is to the pipeline: the structure of its networks, where their tensors lie, how it samples, and its defaults.
//! The one table of presets.

use std::sync::Arc;

use serde_json::Value;

use crate::checkpoint::{self, Checkpoint, Detection, Distilled, Family, Noise, TensorSet};
use crate::error::{Error, Result};
use crate::sampling::{Class, NoiseSchedule, Prediction, SchedulerConfig};
use crate::weights::Layout;
use crate::weights::text_tower::{self, OpenClip, POSITIONS, PROJECTION};
use sd_models::config::ConfigResult;
use sd_models::{clip, unet, vae};

/// Everything about a model that is known before a tensor is read.
pub struct ModelSpec {
    /// The family.
    pub family: Family,
    /// What the UNet predicts.
    pub prediction: Prediction,
    /// The denoising network.
    pub unet: Component<unet::Config>,
    /// The autoencoder.
    pub vae: Component<vae::Config>,
    /// The text towers, whose states stand side by side; at least one.
    pub text: Vec<TextTower>,
    /// The folder's own sampler; none for single files.
    pub scheduler: Option<SchedulerConfig>,
    /// The noise levels of runs by a sampler's name.
    pub levels: NoiseSchedule,
    /// Without a negative prompt the network is given zeros in its place, not the states of an empty text.
    pub zero_negative: bool,
    /// What is used when the user does not say.
    pub defaults: Defaults,
}

/// A text tower and how it is read.
pub struct TextTower {
    /// Structure and tensors.
    pub component: Component<clip::Config>,
    /// What the family does with it.
    pub role: TowerRole,
}

/// One network of a model: its structure, and its tensors under the names that the file gives them.
pub struct Component<C> {
    /// The structure.
    pub config: C,
    /// The file or files.
    pub tensors: Arc<TensorSet>,
    /// Canonical names → names in the file.
    pub layout: Layout,
}

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
    prefix: &'static str,
    /// How single files spell it.
    spelling: Spelling,
    /// The token that fills up a prompt to the tower's length.
    pub pad: Pad,
    /// Layers that are left out even when the user asks for none.
    pub skip: usize,
    /// Whether the states pass through the final norm.
    pub norm: bool,
}

/// The names of a text tower in single files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    Transformers,
    OpenClip(OpenClip),
}

/// What all models of a family have in common.
struct Row {
    defaults: Defaults,
    /// The size of models that predict v, which were trained at another.
    v_size: usize,
    /// The autoencoder's scaling factor where a file does not say.
    scaling_factor: f64,
    /// See [`ModelSpec::zero_negative`]; for files that do not say.
    zero_negative: bool,
    /// diffusers' pipelines of this family correct old scheduler configs.
    corrects_scheduler: bool,
    towers: &'static [TowerRole],
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
const NORMALISED_FACTOR: f64 = 0.5;

/// The preset table: one row a family; none for families that pictures are not made with.
fn row(family: Family) -> Option<&'static Row> {
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

impl ModelSpec {
    /// Reads structures and names of a checkpoint of a supported family.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other families, by name; [`Error::BadModel`] when a component or a config is broken.
    pub fn read(checkpoint: &Checkpoint, detection: &Detection) -> Result<Self> {
        if let Some(refusal) = detection.refusal() {
            return Err(Error::Unsupported(format!(
                "{}: {refusal}",
                checkpoint.path().display()
            )));
        }
        let Some(row) = row(detection.family) else {
            let reason = format!("no pictures are made with {}", detection.title());
            return Err(Error::bad_model(checkpoint.path(), reason));
        };
        if checkpoint.is_folder() {
            Self::from_folder(checkpoint, detection, row)
        } else {
            Self::from_single_file(checkpoint, detection, row)
        }
    }

    fn from_folder(checkpoint: &Checkpoint, detection: &Detection, row: &Row) -> Result<Self> {
        let scheduler = match checkpoint.config("scheduler") {
            Some(value) => {
                let config = SchedulerConfig::from_json(value).map_err(|e| {
                    Error::bad_model(checkpoint.path().join("scheduler"), e.to_string())
                })?;
                Some(match row.corrects_scheduler {
                    true => config.corrected_for_stable_diffusion(),
                    false => config,
                })
            }
            None => None,
        };
        let unet = folder_component(checkpoint, "unet", unet::Config::from_json)?;
        let mut vae = folder_component(checkpoint, "vae", vae::Config::from_json)?;
        // diffusers renamed the autoencoder's attention in 2023; older folders keep the old names
        for (name, old) in [
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ] {
            vae.layout.alias(&format!(".{name}."), &format!(".{old}."));
        }
        let text = row
            .towers
            .iter()
            .map(|role| folder_tower(checkpoint, *role))
            .collect::<Result<Vec<_>>>()?;
        let (prediction, levels) = trained(scheduler.as_ref());
        let mut defaults = row.defaults(prediction, detection.distilled);
        let zero_negative = checkpoint
            .model_index()
            .and_then(|index| index.get("force_zeros_for_empty_prompt")?.as_bool())
            .unwrap_or(row.zero_negative);
        let sample_size = checkpoint
            .config("unet")
            .and_then(|c| c.get("sample_size"))
            .and_then(Value::as_u64);
        if let Some(size) = sample_size
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| (1..=1024).contains(n))
        {
            defaults.size = size * vae.config.scale();
        }
        defaults.amend(checkpoint.defaults());
        Self {
            family: detection.family,
            prediction,
            unet,
            vae,
            text,
            scheduler,
            levels,
            zero_negative,
            defaults,
        }
        .check_vector(checkpoint)
    }

    fn from_single_file(checkpoint: &Checkpoint, detection: &Detection, row: &Row) -> Result<Self> {
        let tensors = checkpoint
            .single()
            .ok_or_else(|| Error::bad_model(checkpoint.path(), "the file holds no tensors"))?;
        let shapes = |name: &str| tensors.info(name).map(|info| info.shape.clone());
        let broken = |reason: String| Error::bad_model(checkpoint.path(), reason);
        let (unet, layout) =
            crate::weights::ldm_unet::read("model.diffusion_model", &shapes).map_err(&broken)?;
        let unet = Component::new(unet, &tensors, layout);
        let (vae, layout) =
            crate::weights::ldm_vae::read("first_stage_model", row.scaling_factor, &shapes)
                .map_err(&broken)?;
        let mut vae = Component::new(vae, &tensors, layout);
        let text = row
            .towers
            .iter()
            .map(|role| {
                let (config, layout) = match role.spelling {
                    Spelling::Transformers => text_tower::read_transformers(role.prefix, &shapes),
                    Spelling::OpenClip(used) => {
                        text_tower::read_open_clip(role.prefix, used, &shapes)
                    }
                }
                .map_err(&broken)?;
                Ok(TextTower {
                    component: Component::new(config, &tensors, layout),
                    role: *role,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let prediction = match detection.prediction {
            Some(checkpoint::Prediction::V) => Prediction::V,
            Some(checkpoint::Prediction::Sample) => Prediction::Sample,
            Some(checkpoint::Prediction::Edm) => Prediction::Edm,
            Some(checkpoint::Prediction::Epsilon) | None => Prediction::Epsilon,
        };
        let levels = match &detection.noise {
            Noise::Betas => NoiseSchedule::default(),
            Noise::ZeroSnr => NoiseSchedule::new(&SchedulerConfig {
                class_name: "EulerDiscreteScheduler".to_owned(),
                rescale_betas_zero_snr: true,
                ..SchedulerConfig::default()
            }),
            Noise::Continuous { range, data, .. } => {
                NoiseSchedule::continuous(range.0, range.1, *data)
            }
        };
        if let Noise::Continuous {
            spread: Some((mean, deviation)),
            ..
        } = &detection.noise
            && mean.len() == vae.config.latent_channels
        {
            vae.config.scaling_factor = NORMALISED_FACTOR;
            vae.config.spread = Some(vae::Spread {
                mean: mean.clone(),
                deviation: deviation.clone(),
            });
        }
        Self {
            family: detection.family,
            prediction,
            unet,
            vae,
            text,
            scheduler: None,
            levels,
            zero_negative: row.zero_negative,
            defaults: row.defaults(prediction, detection.distilled),
        }
        .check_vector(checkpoint)
    }

    /// Width of the whole text's vector that the UNet is given: the last tower's.
    pub fn pooled_width(&self) -> usize {
        let last = self.text.last().map(|tower| &tower.component.config);
        last.map_or(0, |config| config.projection.unwrap_or(config.width))
    }

    /// The numbers that follow the whole text's vector: six (original size, crop, target size) or five (an aesthetic score in the target's
    /// place); none where the UNet takes no vector.
    pub fn numbers(&self) -> usize {
        let Some(added) = self.unet.config.added else {
            return 0;
        };
        added.input.saturating_sub(self.pooled_width()) / added.number.max(1)
    }

    fn check_vector(mut self, checkpoint: &Checkpoint) -> Result<Self> {
        let pooled = self.pooled_width();
        let Some(added) = &mut self.unet.config.added else {
            return Ok(self);
        };
        let rest = added.input.saturating_sub(pooled);
        let wanted = if self.family == Family::SdxlRefiner {
            5
        } else {
            6
        };
        if rest == 0
            || rest % wanted != 0
            || (checkpoint.is_folder() && rest / wanted != added.number)
        {
            return Err(Error::bad_model(
                checkpoint.path(),
                format!(
                    "the UNet takes a vector of {} numbers beside the time, and a text's {pooled} with {wanted} sizes do not make that; UNet and text encoders are not of one model",
                    added.input
                ),
            ));
        }
        added.number = rest / wanted;
        Ok(self)
    }
}

impl Row {
    fn defaults(&self, prediction: Prediction, distilled: Option<Distilled>) -> Defaults {
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

/// What a folder's network predicts and the noise levels of runs by name. Where the betas are the usual ones, a folder and a single file of the
/// same model run alike, to the last bit.
fn trained(scheduler: Option<&SchedulerConfig>) -> (Prediction, NoiseSchedule) {
    let Some(config) = scheduler else {
        return (Prediction::Epsilon, NoiseSchedule::default());
    };
    if matches!(config.class(), Class::EdmEuler | Class::EdmDpmMultistep) {
        let (min, max) = config.edm_range();
        let prediction = match config.prediction {
            Prediction::Epsilon => Prediction::Edm,
            other => other,
        };
        let levels = NoiseSchedule::continuous(min, max, config.sigma_data);
        return (prediction, levels);
    }
    let levels = if config.has_standard_betas() {
        NoiseSchedule::default()
    } else {
        NoiseSchedule::new(config)
    };
    (config.prediction, levels)
}

/// A folder's text tower, in either of transformers' spellings.
fn folder_tower(checkpoint: &Checkpoint, role: TowerRole) -> Result<TextTower> {
    let mut component = folder_component(checkpoint, role.component, clip::Config::from_json)?;
    let layout = &mut component.layout;
    let nested = "text_model.embeddings.token_embedding.weight";
    if component.tensors.info(nested).is_some() {
        *layout = Layout::identity("text_model");
        layout.rename("text_projection", "text_projection", &[]);
    }
    for name in [
        "text_model.embeddings.position_ids",
        "embeddings.position_ids",
    ] {
        layout.ignore(name, POSITIONS);
    }
    for name in ["text_projection", "logit_scale"] {
        layout.ignore(name, PROJECTION);
    }
    // a config without a class: the layer itself tells
    if let Some(&[output, _]) = component.tensors.shape("text_projection.weight")
        && !role.norm
    {
        component.config.projection.get_or_insert(output);
    }
    Ok(TextTower { component, role })
}

impl<C> Component<C> {
    fn new(config: C, tensors: &Arc<TensorSet>, layout: Layout) -> Self {
        Self {
            config,
            tensors: Arc::clone(tensors),
            layout,
        }
    }
}

impl Defaults {
    /// Takes over what a folder's `sd-rs.json` says: `steps` and `cfg_scale`.
    fn amend(&mut self, file: Option<&Value>) {
        let Some(file) = file else { return };
        let steps = file
            .get("steps")
            .and_then(Value::as_u64)
            .and_then(|n| usize::try_from(n).ok());
        if let Some(steps) = steps.filter(|n| (1..=1000).contains(n)) {
            self.steps = steps;
        }
        if let Some(cfg_scale) = file.get("cfg_scale").and_then(Value::as_f64) {
            self.cfg_scale = cfg_scale;
        }
    }
}

fn folder_component<C>(
    checkpoint: &Checkpoint,
    name: &str,
    parse: impl Fn(&Value) -> ConfigResult<C>,
) -> Result<Component<C>> {
    let path = checkpoint.path().join(name);
    let tensors = checkpoint
        .tensors(name)
        .ok_or_else(|| Error::bad_model(&path, "the folder has no tensors of this component"))?;
    let config = checkpoint
        .config(name)
        .ok_or_else(|| Error::bad_model(path.join("config.json"), "the file is missing"))?;
    let config =
        parse(config).map_err(|e| Error::bad_model(path.join("config.json"), e.to_string()))?;
    Ok(Component::new(config, &tensors, Layout::identity("")))
}
