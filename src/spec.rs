//! What a checkpoint is to the pipeline: the structure of its networks, where their tensors lie, how it samples, and its defaults.
//! The one table of presets.

use std::sync::Arc;

use serde_json::Value;

use crate::checkpoint::{self, Checkpoint, Detection, Family, TensorSet};
use crate::error::{Error, Result};
use crate::sampling::{Prediction, SchedulerConfig};
use crate::weights::Layout;
use crate::weights::text_tower::{POSITIONS, PROJECTION};
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
    /// The text tower.
    pub text: Component<clip::Config>,
    /// The folder's own sampler; none for single files.
    pub scheduler: Option<SchedulerConfig>,
    /// What is used when the user does not say.
    pub defaults: Defaults,
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
    /// The token that fills up a prompt to the tower's length.
    pub pad: Pad,
}

/// How a prompt is filled up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pad {
    /// With the end token, as OpenAI's CLIP in Stable Diffusion 1.
    End,
    /// With token 0, as OpenCLIP in Stable Diffusion 2.
    Zero,
}

/// The preset table: one row a family.
pub fn defaults(family: Family, prediction: Prediction) -> Defaults {
    let size = match (family, prediction) {
        // the v-predicting Stable Diffusion 2 models were trained at 768 pixels
        (Family::Sd2, Prediction::V) => 768,
        _ => 512,
    };
    Defaults {
        size,
        steps: 20,
        cfg_scale: 7.5,
        sampler: "DPM++ 2M",
        pad: if family == Family::Sd2 {
            Pad::Zero
        } else {
            Pad::End
        },
    }
}

/// The autoencoder's scaling factor where a file does not say: the same in every Stable Diffusion 1 and 2.
const SCALING_FACTOR: f64 = 0.18215;

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
        if checkpoint.is_folder() {
            Self::from_folder(checkpoint, detection)
        } else {
            Self::from_single_file(checkpoint, detection)
        }
    }

    fn from_folder(checkpoint: &Checkpoint, detection: &Detection) -> Result<Self> {
        let scheduler = match checkpoint.config("scheduler") {
            Some(value) => Some(
                SchedulerConfig::from_json(value)
                    .map_err(|e| {
                        Error::bad_model(checkpoint.path().join("scheduler"), e.to_string())
                    })?
                    .corrected_for_stable_diffusion(),
            ),
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
        let mut text = folder_component(checkpoint, "text_encoder", clip::Config::from_json)?;
        if text
            .tensors
            .info("text_model.embeddings.token_embedding.weight")
            .is_some()
        {
            text.layout = Layout::identity("text_model");
        }
        for (name, what) in [
            ("text_model.embeddings.position_ids", POSITIONS),
            ("embeddings.position_ids", POSITIONS),
            ("text_projection", PROJECTION),
            ("logit_scale", PROJECTION),
        ] {
            text.layout.ignore(name, what);
        }
        let prediction = scheduler
            .as_ref()
            .map_or(Prediction::Epsilon, |config| config.prediction);
        let mut defaults = defaults(detection.family, prediction);
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
        Ok(Self {
            family: detection.family,
            prediction,
            unet,
            vae,
            text,
            scheduler,
            defaults,
        })
    }

    fn from_single_file(checkpoint: &Checkpoint, detection: &Detection) -> Result<Self> {
        let tensors = checkpoint
            .single()
            .ok_or_else(|| Error::bad_model(checkpoint.path(), "the file holds no tensors"))?;
        let shapes = |name: &str| tensors.info(name).map(|info| info.shape.clone());
        let broken = |reason: String| Error::bad_model(checkpoint.path(), reason);
        let (unet, layout) =
            crate::weights::ldm_unet::read("model.diffusion_model", &shapes).map_err(broken)?;
        let unet = Component::new(unet, &tensors, layout);
        let (vae, layout) =
            crate::weights::ldm_vae::read("first_stage_model", SCALING_FACTOR, &shapes)
                .map_err(broken)?;
        let vae = Component::new(vae, &tensors, layout);
        let (text, layout) = match detection.family {
            Family::Sd2 => {
                crate::weights::text_tower::read_open_clip("cond_stage_model.model", &shapes)
            }
            _ => crate::weights::text_tower::read_transformers(
                "cond_stage_model.transformer",
                &shapes,
            ),
        }
        .map_err(broken)?;
        let text = Component::new(text, &tensors, layout);
        let prediction = match detection.prediction {
            Some(checkpoint::Prediction::V) => Prediction::V,
            Some(checkpoint::Prediction::Sample) => Prediction::Sample,
            Some(checkpoint::Prediction::Epsilon) | None => Prediction::Epsilon,
        };
        Ok(Self {
            family: detection.family,
            prediction,
            unet,
            vae,
            text,
            scheduler: None,
            defaults: defaults(detection.family, prediction),
        })
    }
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
