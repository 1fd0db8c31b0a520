//! IP-Adapters, and the picture tower that they read.

use crate::checkpoint::{Checkpoint, Family};
use crate::error::{Error, Result};
use crate::weights::image_prompt as names;
use crate::weights::layout::Layout;
use sd_models::clip::VisionConfig;
use sd_models::image_projection;

use super::Component;

/// What a picture tower is called where a folder of it is opened.
pub const IMAGE_ENCODER: &str = "image_encoder";

/// An IP-Adapter with the picture tower that it reads.
pub struct ImagePromptSpec {
    /// What makes tokens of the tower's states.
    pub projection: Component<image_projection::Config>,
    /// Names of keys and values.
    pub layers: Layout,
    /// The picture tower.
    pub encoder: Component<VisionConfig>,
}

impl ImagePromptSpec {
    /// Reads the structures of an adapter's file and of a tower's file or folder.
    ///
    /// # Errors
    /// [`Error::BadModel`] when one of them is something else, or they do not go together.
    pub fn read(adapter: &Checkpoint, encoder: &Checkpoint) -> Result<Self> {
        let Some(tensors) = adapter.single() else {
            return Err(Error::bad_model(
                adapter.path(),
                "this is a folder, expected an IP-Adapter's file",
            ));
        };
        let family = crate::checkpoint::detect(adapter).family;
        if family != Family::IpAdapter {
            let reason = format!("this is {}, expected an IP-Adapter", family.phrase());
            return Err(Error::bad_model(adapter.path(), reason));
        }
        let shapes = |name: &str| tensors.info(name).map(|info| info.shape.clone());
        let (config, layout) = names::read_projection(&shapes)
            .map_err(|reason| Error::bad_model(adapter.path(), reason))?;
        let projection = Component::new(config, &tensors, layout);
        let encoder = tower(encoder)?;
        let spec = Self {
            projection,
            layers: Layout::identity(names::LAYERS),
            encoder: encoder.0,
        };
        let inner = &spec.encoder.config.tower;
        let (what, got) = match spec.projection.config.reads_vector() {
            true => ("a vector", inner.projection.unwrap_or(0)),
            false => ("states", inner.width),
        };
        let wanted = spec.projection.config.input();
        if got != wanted {
            return Err(Error::bad_model(
                &encoder.1,
                format!(
                    "the image encoder gives {what} of {got} numbers, and the IP-Adapter reads {wanted}; give the encoder that it was made for"
                ),
            ));
        }
        Ok(spec)
    }
}

/// The picture tower in a file or folder, and where that is.
fn tower(checkpoint: &Checkpoint) -> Result<(Component<VisionConfig>, std::path::PathBuf)> {
    let path = checkpoint.path().to_owned();
    let tensors = match checkpoint.single() {
        Some(tensors) => tensors,
        None => checkpoint.require(IMAGE_ENCODER)?,
    };
    let shapes = |name: &str| tensors.info(name).map(|info| info.shape.clone());
    let (mut config, layout) =
        names::read_vision(&shapes).map_err(|reason| Error::bad_model(&path, reason))?;
    if let Some(value) = checkpoint.config(IMAGE_ENCODER) {
        let projection = config.tower.projection;
        config = VisionConfig::from_json(value)
            .map_err(|e| Error::bad_model(path.join("config.json"), e.to_string()))?;
        config.tower.projection = projection.and(config.tower.projection);
    }
    Ok((Component::new(config, &tensors, layout), path))
}
