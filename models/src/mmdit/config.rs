//! The structure of a Stable Diffusion 3 transformer, from diffusers' `config.json` (single files give it from their shapes).

use serde_json::Value;

use crate::config::{ConfigError, ConfigResult, Fields};
use crate::layers::JointConfig;

/// The structure of a Stable Diffusion 3 transformer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Latents of a side of a patch.
    pub patch: usize,
    /// Joint blocks.
    pub layers: usize,
    /// Heads and widths.
    pub joint: JointConfig,
    /// Width of the text states.
    pub context: usize,
    /// Width of the whole text's vector.
    pub pooled: usize,
    /// Patches of a side of the table of positions.
    pub positions: usize,
    /// Blocks in which the picture attends to itself as well.
    pub dual: Vec<usize>,
}

impl Config {
    /// Reads diffusers' `transformer/config.json` with the defaults of `SD3Transformer2DModel` (diffusers 0.42.1).
    ///
    /// # Errors
    /// When a field has a wrong type or asks for something that is not built.
    pub fn from_json(value: &Value) -> ConfigResult<Self> {
        let fields = Fields(value);
        let heads = fields.positive("num_attention_heads", 18)?;
        let width = heads * fields.positive("attention_head_dim", 64)?;
        let in_channels = fields.positive("in_channels", 16)?;
        let projection = fields.positive("caption_projection_dim", 1152)?;
        if projection != width {
            return Err(ConfigError(format!(
                "config field `caption_projection_dim` is {projection}, expected the transformer's width {width}"
            )));
        }
        let qk_norm = match fields.get("qk_norm") {
            None => false,
            Some(Value::String(name)) if name == "rms_norm" => true,
            Some(other) => {
                return Err(ConfigError(format!(
                    "config field `qk_norm` is {other}, which is not supported yet"
                )));
            }
        };
        Ok(Self {
            in_channels,
            out_channels: match fields.get("out_channels") {
                Some(_) => fields.positive("out_channels", 16)?,
                None if value.get("out_channels").is_some() => in_channels,
                None => 16,
            },
            patch: fields.positive("patch_size", 2)?,
            layers: fields.positive("num_layers", 18)?,
            joint: JointConfig {
                width,
                heads,
                qk_norm,
            },
            context: fields.positive("joint_attention_dim", 4096)?,
            pooled: fields.positive("pooled_projection_dim", 2048)?,
            positions: fields.positive("pos_embed_max_size", 96)?,
            dual: fields.sizes("dual_attention_layers", &[])?,
        })
    }
}
