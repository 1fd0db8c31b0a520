//! A file or folder that steers a UNet by a picture: a ControlNet, a Control-LoRA, a ControlNet-LLLite or a T2I-Adapter.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::Value;

use super::Component;
use crate::checkpoint::{self, Checkpoint, Family, TensorSet};
use crate::error::{Error, Result};
use crate::weights::{controlnet as names, lllite as lite_names, t2i_adapter as adapter_names};
use sd_models::{controlnet, lllite, t2i_adapter, unet};

/// What such a model is called where a folder of it is opened.
pub const CONTROL: &str = "controlnet";

/// An empty tensor by which Control-LoRAs are known.
const LORA_MARK: &str = "lora_controlnet";

/// Which kind, with its structure and tensors.
pub enum ControlSpec {
    /// A ControlNet.
    Net(Component<controlnet::Config>),
    /// A ControlNet that is a UNet's and a difference.
    Lora(Component<controlnet::Config>),
    /// A ControlNet-LLLite.
    Lite(Component<lllite::Config>),
    /// A T2I-Adapter.
    Adapter(Component<t2i_adapter::Config>),
}

impl ControlSpec {
    /// Reads the structure of what is in `checkpoint`, for a model with this UNet.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for relatives that are not built, by name; [`Error::BadModel`] when it is something else, or broken.
    pub fn read(checkpoint: &Checkpoint, unet: &unet::Config) -> Result<Self> {
        match checkpoint.single() {
            Some(tensors) => Self::of_single(checkpoint, &tensors, unet),
            None => Self::of_folder(checkpoint),
        }
    }

    fn of_folder(checkpoint: &Checkpoint) -> Result<Self> {
        let tensors = checkpoint.require(CONTROL)?;
        let value = checkpoint.require_config(CONTROL)?;
        let path = checkpoint.path().join("config.json");
        let bad = |e: sd_models::config::ConfigError| Error::bad_model(&path, e.to_string());
        let class = value.get("_class_name").and_then(Value::as_str);
        if class == Some("T2IAdapter") {
            let config = t2i_adapter::Config::from_json(value).map_err(bad)?;
            let shapes = |name: &str| tensors.info(name).map(|info| info.shape.clone());
            let (_, layout) = adapter_names::read(&shapes)
                .map_err(|reason| Error::bad_model(checkpoint.path(), reason))?;
            return Ok(Self::Adapter(Component::new(config, &tensors, layout)));
        }
        let config = controlnet::Config::from_json(value).map_err(bad)?;
        let layout = names::diffusers_layout(&config);
        Ok(Self::Net(Component::new(config, &tensors, layout)))
    }

    fn of_single(
        checkpoint: &Checkpoint,
        tensors: &Arc<TensorSet>,
        unet: &unet::Config,
    ) -> Result<Self> {
        let path = checkpoint.path();
        if let Some(refusal) = refusal(tensors) {
            return Err(Error::Unsupported(format!("{}: {refusal}", path.display())));
        }
        let bad = |reason| Error::bad_model(path, reason);
        let shapes = |name: &str| tensors.info(name).map(|info| info.shape.clone());
        if tensors.names().any(lite_names::is_lllite) {
            let (config, layout) = lite_names::read(unet, tensors.names(), &shapes).map_err(bad)?;
            return Ok(Self::Lite(Component::new(config, tensors, layout)));
        }
        if tensors.info(LORA_MARK).is_some() {
            let (config, layout) = names::read_lora(unet, &shapes).map_err(bad)?;
            return Ok(Self::Lora(Component::new(config, tensors, layout)));
        }
        match checkpoint::detect(checkpoint).family {
            Family::ControlNet => {
                let (mut config, layout) = names::read(&shapes).map_err(bad)?;
                config.pools = is_shuffle(checkpoint);
                Ok(Self::Net(Component::new(config, tensors, layout)))
            }
            Family::T2iAdapter => {
                let (config, layout) = adapter_names::read(&shapes).map_err(bad)?;
                Ok(Self::Adapter(Component::new(config, tensors, layout)))
            }
            family => Err(bad(format!(
                "this is {}, expected a ControlNet or a T2I-Adapter",
                family.phrase()
            ))),
        }
    }

    /// Tensors of its file that are of no use, beside those that were `found`; fit to be printed.
    pub fn left(&self, found: &BTreeSet<String>) -> Vec<String> {
        let tensors = match self {
            Self::Net(component) | Self::Lora(component) => &component.tensors,
            Self::Lite(component) => &component.tensors,
            Self::Adapter(component) => &component.tensors,
        };
        let left = tensors.names().filter(|name| {
            !found.contains(*name) && *name != LORA_MARK && checkpoint::leftover(name).is_none()
        });
        left.map(checkpoint::printable).collect()
    }

    /// What it is called in messages.
    pub fn title(&self) -> &'static str {
        match self {
            Self::Net(net) if net.config.union.is_some() => "ControlNet (union)",
            Self::Net(_) => "ControlNet",
            Self::Lora(_) => "Control-LoRA",
            Self::Lite(_) => "ControlNet-LLLite",
            Self::Adapter(_) => "T2I-Adapter",
        }
    }
}

/// Shuffled pictures have no place that means anything: of what that ControlNet adds, only the mean counts. Files do not say so; as A1111's
/// extension does, the name is believed.
fn is_shuffle(checkpoint: &Checkpoint) -> bool {
    let name = checkpoint.path().file_stem().unwrap_or_default();
    name.to_string_lossy()
        .to_ascii_lowercase()
        .contains("shuffle")
}

/// Why a relative of theirs cannot be used.
fn refusal(tensors: &TensorSet) -> Option<&'static str> {
    let any = |part: &str| tensors.names().any(|name| name.contains(part));
    if tensors.info("difference").is_some() {
        return Some(
            "this is a ControlNet kept as the difference from its base model (key `difference`), which is not supported; give the full ControlNet",
        );
    }
    if any("controlnet_blocks.") || any("controlnet_x_embedder.") {
        return Some(
            "this is a ControlNet for Stable Diffusion 3 or FLUX, which is not supported yet; give one for Stable Diffusion 1, 2 or XL",
        );
    }
    if any("ctrl_") && any("base_to_ctrl") {
        return Some("this is a ControlNet-XS, which is not supported yet; give a ControlNet");
    }
    if any("zero_convs_decoder.") || any("controlnext") {
        return Some("this is a ControlNeXt, which is not supported yet; give a ControlNet");
    }
    if any("transformer_layes.") && any("ln_post") && tensors.info("style_embedding").is_some() {
        return Some(
            "this is a style adapter (T2I-Adapter), which is not supported yet; give another adapter",
        );
    }
    None
}
