//! The structure of a ControlNet, from diffusers' `config.json` (single files give it from their shapes).

use serde_json::{Value, json};

use crate::config::{ConfigError, ConfigResult, Fields};
use crate::unet;

/// The structure of a ControlNet.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The half of a UNet that it has; its levels have no way up.
    pub trunk: unet::Config,
    /// Channels of the hint.
    pub hint_channels: usize,
    /// Channels of the hint's embedding, from full size down; each but the first halves the size.
    pub hint_widths: Vec<usize>,
    /// The hint is wanted as blue, green, red.
    pub bgr: bool,
    /// Of each residual only the mean over the picture counts.
    pub pools: bool,
    /// Where one network is for hints of several kinds.
    pub union: Option<Union>,
}

/// What a network for hints of several kinds has beside (xinsir's ControlNet++; diffusers 0.42.1 `ControlNetUnionModel`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Union {
    /// Kinds of hints.
    pub kinds: usize,
    /// Width of the transformer that looks at the hint as a whole.
    pub width: usize,
    /// Its layers.
    pub layers: usize,
    /// Width of one kind's sinusoids.
    pub number: usize,
}

impl Config {
    /// Reads diffusers' `config.json` with the defaults of `ControlNetModel` or `ControlNetUnionModel` (diffusers 0.42.1).
    ///
    /// # Errors
    /// When a field has a wrong type or length, or asks for something that is not built.
    pub fn from_json(value: &Value) -> ConfigResult<Self> {
        let fields = Fields(value);
        let union = union(&fields)?;
        let widths: &[usize] = match union {
            Some(_) => &[48, 96, 192, 384],
            None => &[16, 32, 96, 256],
        };
        let hint_widths = fields.sizes("conditioning_embedding_out_channels", widths)?;
        if hint_widths.is_empty() || hint_widths.len() > 16 || hint_widths.contains(&0) {
            return Err(ConfigError(
                "config field `conditioning_embedding_out_channels` must list 1 to 16 numbers, all above 0".to_owned(),
            ));
        }
        Ok(Self {
            trunk: trunk(value)?,
            hint_channels: fields.positive("conditioning_channels", 3)?,
            hint_widths,
            bgr: match fields.text("controlnet_conditioning_channel_order", "rgb")? {
                "rgb" => false,
                "bgr" => true,
                other => {
                    return Err(ConfigError(format!(
                        "config field `controlnet_conditioning_channel_order` is \"{other}\", expected rgb or bgr"
                    )));
                }
            },
            pools: fields.flag("global_pool_conditions", false)?,
            union,
        })
    }

    /// How much larger than the latents the hint is.
    pub fn hint_scale(&self) -> usize {
        1 << self.hint_widths.len().saturating_sub(1)
    }

    /// Channels of what is added to each skip, and of the middle.
    pub fn residual_channels(&self) -> (Vec<usize>, usize) {
        let levels = &self.trunk.levels;
        let mut down = vec![levels[0].channels];
        for (i, level) in levels.iter().enumerate() {
            down.extend(level.down.iter().map(|_| level.channels));
            if i + 1 < levels.len() {
                down.push(level.channels);
            }
        }
        (down, levels[levels.len() - 1].channels)
    }
}

/// The fields of a UNet's half are a UNet's; what that has beside is filled up, and its way up taken away again.
fn trunk(value: &Value) -> ConfigResult<unet::Config> {
    let mut amended = value.clone();
    let levels = Fields(value).sizes("block_out_channels", &[320, 640, 1280, 1280])?;
    if let Some(fields) = amended.as_object_mut() {
        fields.remove("conditioning_embedding_out_channels");
        fields.insert(
            "up_block_types".to_owned(),
            json!(vec!["UpBlock2D"; levels.len()]),
        );
        // its embedding of the time has no size of its own
        fields.remove("time_embedding_dim");
        fields.remove("conv_in_kernel");
    }
    let mut config = unet::Config::from_json(&amended)?;
    config.out_channels = config.in_channels;
    for level in &mut config.levels {
        level.up.clear();
    }
    Ok(config)
}

fn union(fields: &Fields<'_>) -> ConfigResult<Option<Union>> {
    let class = fields.text("_class_name", "ControlNetModel")?;
    match class {
        "ControlNetModel" => return Ok(None),
        "ControlNetUnionModel" => {}
        other => {
            return Err(ConfigError(format!(
                "this is a {other}, expected a ControlNetModel or a ControlNetUnionModel"
            )));
        }
    }
    let union = Union {
        kinds: fields.positive("num_control_type", 6)?,
        width: fields.positive("num_trans_channel", 320)?,
        layers: fields.size("num_trans_layer", 1)?,
        number: fields.positive("addition_time_embed_dim", 256)?,
    };
    if union.layers > 64 {
        return Err(ConfigError(format!(
            "config field `num_trans_layer` is {}, expected at most 64",
            union.layers
        )));
    }
    Ok(Some(union))
}
