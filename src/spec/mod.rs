//! What a checkpoint is to the pipeline: the structure of its networks, where their tensors lie, how it samples, and its defaults.
//! Presets are in `table.rs`.

mod autoencoder;
mod single;
mod table;

use std::sync::Arc;

use serde_json::Value;

use crate::checkpoint::{self, Checkpoint, Detection, Family, Noise, TensorSet};
use crate::error::{Error, Result};
use crate::sampling::{Class, NoiseSchedule, Prediction, SchedulerConfig};
use crate::weights::text_tower::{self, POSITIONS, PROJECTION};
use crate::weights::{Layout, ldm_vae};
use autoencoder::Autoencoder;
pub(crate) use autoencoder::SINGLE_VAE;
use sd_models::config::ConfigResult;
use sd_models::vae::TinyConfig;
use sd_models::{clip, unet, vae};
pub(crate) use single::{SINGLE_UNET, difference, layouts, unet_difference};
pub use table::{Defaults, Pad, TowerRole, native_size, towers};
use table::{NORMALISED_FACTOR, Row, row};

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
    /// A tiny decoder that takes its decoder's place.
    pub tiny: Option<Component<TinyConfig>>,
    /// The autoencoder or decoder is not the checkpoint's own.
    pub other_vae: bool,
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

impl ModelSpec {
    /// Reads structures and names of a checkpoint of a supported family.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other families, by name; [`Error::BadModel`] when a component or a config is broken.
    pub fn read(checkpoint: &Checkpoint, detection: &Detection) -> Result<Self> {
        Self::read_with(checkpoint, detection, None)
    }

    /// The same with another file's autoencoder, if one is given.
    ///
    /// # Errors
    /// As [`ModelSpec::read`].
    pub fn read_with(
        checkpoint: &Checkpoint,
        detection: &Detection,
        vae: Option<&Checkpoint>,
    ) -> Result<Self> {
        let mut detection = detection.clone();
        if vae.is_some() {
            detection.missing.retain(|name| *name != "vae");
        }
        if let Some(refusal) = detection.refusal() {
            return Err(Error::Unsupported(format!(
                "{}: {refusal}",
                checkpoint.path().display()
            )));
        }
        Self::read_any(checkpoint, &detection, vae)
    }

    /// The same of models that need more than a text, such as those for inpainting: nothing is refused but what is not there.
    ///
    /// # Errors
    /// [`Error::BadModel`] when a component is missing or broken, or the family has no components that are known.
    pub fn read_any(
        checkpoint: &Checkpoint,
        detection: &Detection,
        vae: Option<&Checkpoint>,
    ) -> Result<Self> {
        let Some(row) = row(detection.family) else {
            let reason = format!("this is {}, whose parts are not known", detection.title());
            return Err(Error::bad_model(checkpoint.path(), reason));
        };
        let other = match vae {
            Some(vae) => Some(autoencoder::of_another(vae, row.scaling_factor)?),
            None => None,
        };
        let (full, tiny) = match other {
            Some(Autoencoder::Full(vae)) => (Some(vae), None),
            Some(Autoencoder::Tiny(tiny)) => (None, Some(tiny)),
            None => (None, None),
        };
        let mut spec = if checkpoint.is_folder() {
            Self::from_folder(checkpoint, detection, row, full)?
        } else {
            Self::from_single_file(checkpoint, detection, row, full)?
        };
        spec.other_vae = vae.is_some();
        spec.tiny = tiny;
        spec.check_latents(checkpoint)?;
        Ok(spec)
    }

    /// The UNet's latents are the autoencoder's.
    fn check_latents(&self, checkpoint: &Checkpoint) -> Result<()> {
        let wanted = self.unet.config.out_channels;
        let got = match &self.tiny {
            Some(tiny) => tiny.config.latent_channels,
            None => self.vae.config.latent_channels,
        };
        if got == wanted {
            return Ok(());
        }
        let owner = if self.other_vae {
            "--vae"
        } else {
            "its autoencoder"
        };
        Err(Error::bad_model(
            checkpoint.path(),
            format!(
                "the UNet makes latents of {wanted} channels, and {owner} decodes {got}; they are not of one kind"
            ),
        ))
    }

    fn from_folder(
        checkpoint: &Checkpoint,
        detection: &Detection,
        row: &Row,
        vae: Option<Component<vae::Config>>,
    ) -> Result<Self> {
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
        let vae = match vae {
            Some(vae) => vae,
            None => autoencoder::of_folder(checkpoint)?,
        };
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
            tiny: None,
            other_vae: false,
            text,
            scheduler,
            levels,
            zero_negative,
            defaults,
        }
        .check_vector(checkpoint)
    }

    fn from_single_file(
        checkpoint: &Checkpoint,
        detection: &Detection,
        row: &Row,
        vae: Option<Component<vae::Config>>,
    ) -> Result<Self> {
        let tensors = checkpoint
            .single()
            .ok_or_else(|| Error::bad_model(checkpoint.path(), "the file holds no tensors"))?;
        let shapes = |name: &str| tensors.info(name).map(|info| info.shape.clone());
        let broken = |reason: String| Error::bad_model(checkpoint.path(), reason);
        let (unet, layout) =
            crate::weights::ldm_unet::read(SINGLE_UNET, &shapes).map_err(&broken)?;
        let unet = Component::new(unet, &tensors, layout);
        let mut vae = match vae {
            Some(vae) => vae,
            None => {
                let (vae, layout) =
                    ldm_vae::read(SINGLE_VAE, row.scaling_factor, &shapes).map_err(&broken)?;
                Component::new(vae, &tensors, layout)
            }
        };
        let text = row
            .towers
            .iter()
            .map(|role| {
                let (config, layout) = single::read_tower(role, &shapes).map_err(&broken)?;
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
            tiny: None,
            other_vae: false,
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
        *layout = text_tower::transformers_layout("");
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
