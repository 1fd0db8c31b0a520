//! The autoencoder of a model: its own, or another file's.

use serde_json::Value;

use super::{Component, folder_component};
use std::sync::Arc;

use crate::checkpoint::{Checkpoint, TensorSet};
use crate::error::{Error, Result};
use crate::weights::text_tower::at;
use crate::weights::{diffusers_vae, ldm_vae, taesd};
use sd_models::vae::{Config, TinyConfig};

/// Where a single file keeps it.
pub(crate) const SINGLE_VAE: &str = "first_stage_model";
/// Where files that are nothing else may keep it.
const PREFIXES: [&str; 3] = [SINGLE_VAE, "vae", ""];

/// What another file holds.
pub(super) enum Autoencoder {
    /// An autoencoder.
    Full(Component<Config>),
    /// A tiny decoder.
    Tiny(Component<TinyConfig>),
}

/// A folder's own.
pub(super) fn of_folder(checkpoint: &Checkpoint) -> Result<Component<Config>> {
    let mut vae = folder_component(checkpoint, "vae", Config::from_json)?;
    for (name, old) in diffusers_vae::OLD_NAMES {
        vae.layout.alias(name, old);
    }
    Ok(vae)
}

/// That of a file or folder which may hold nothing else; the scaling and shift factors are for files that do not say.
pub(super) fn of_another(checkpoint: &Checkpoint, factors: (f64, f64)) -> Result<Autoencoder> {
    let class = checkpoint.config("vae").and_then(|c| c.get("_class_name"));
    let is_tiny = class.and_then(Value::as_str) == Some("AutoencoderTiny");
    if checkpoint.is_folder() && !is_tiny {
        return of_folder(checkpoint).map(Autoencoder::Full);
    }
    let tensors = match checkpoint.single() {
        Some(tensors) => tensors,
        None => checkpoint.require("vae")?,
    };
    if let Some(full) = find(checkpoint, &tensors, factors)? {
        return Ok(Autoencoder::Full(full));
    }
    let shapes = |name: &str| tensors.info(name).map(|info| info.shape.clone());
    match taesd::read(&shapes) {
        Ok((config, layout)) => Ok(Autoencoder::Tiny(Component::new(config, &tensors, layout))),
        Err(_) => Err(Error::bad_model(
            checkpoint.path(),
            "the file holds no autoencoder that is known; give a VAE, a TAESD or a whole checkpoint with --vae",
        )),
    }
}

/// A single file's own, with the factors of its family.
pub(super) fn of_single(
    checkpoint: &Checkpoint,
    tensors: &Arc<TensorSet>,
    factors: (f64, f64),
) -> Result<Component<Config>> {
    match find(checkpoint, tensors, factors)? {
        Some(found) => Ok(found),
        None => {
            let shapes = |name: &str| tensors.info(name).map(|info| info.shape.clone());
            let reason = ldm_vae::read(SINGLE_VAE, factors.0, &shapes).err();
            Err(Error::bad_model(
                checkpoint.path(),
                reason.unwrap_or_default(),
            ))
        }
    }
}

/// An autoencoder in either spelling, wherever it lies.
fn find(
    checkpoint: &Checkpoint,
    tensors: &Arc<TensorSet>,
    (scaling_factor, shift_factor): (f64, f64),
) -> Result<Option<Component<Config>>> {
    let shapes = |name: &str| tensors.info(name).map(|info| info.shape.clone());
    let has = |prefix: &str, name: &str| shapes(&at(prefix, name)).is_some();
    for prefix in PREFIXES {
        let found = if has(prefix, "decoder.up.0.block.0.conv1.weight") {
            ldm_vae::read(prefix, scaling_factor, &shapes)
        } else if has(prefix, "decoder.up_blocks.0.resnets.0.conv1.weight") {
            diffusers_vae::read(prefix, scaling_factor, &shapes)
        } else {
            continue;
        };
        let (mut config, layout) =
            found.map_err(|reason| Error::bad_model(checkpoint.path(), reason))?;
        config.shift_factor = shift_factor;
        return Ok(Some(Component::new(config, tensors, layout)));
    }
    Ok(None)
}
