//! The structure of a FLUX.1 transformer, from diffusers' `config.json` (single files give it from their shapes).

use serde_json::Value;

use crate::config::{ConfigError, ConfigResult, Fields};
use crate::layers::JointConfig;

/// The structure of a FLUX.1 transformer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Numbers of a packed token: channels of the input × 4.
    pub in_width: usize,
    /// Numbers of a predicted token.
    pub out_width: usize,
    /// Joint blocks.
    pub layers: usize,
    /// Blocks over both streams in one.
    pub single_layers: usize,
    /// Heads and widths.
    pub joint: JointConfig,
    /// Width of the text states.
    pub context: usize,
    /// Width of the whole text's vector.
    pub pooled: usize,
    /// Whether the network is told its guidance.
    pub guidance: bool,
    /// Numbers of a head that each axis of a position turns.
    pub axes: Vec<usize>,
}

/// Latents of a side of a packed token.
pub(super) const PATCH: usize = 2;

impl Config {
    /// Reads diffusers' `transformer/config.json` with the defaults of `FluxTransformer2DModel` (diffusers 0.42.1).
    ///
    /// # Errors
    /// When a field has a wrong type or asks for something that is not built.
    pub fn from_json(value: &Value) -> ConfigResult<Self> {
        let fields = Fields(value);
        let heads = fields.positive("num_attention_heads", 24)?;
        let head = fields.positive("attention_head_dim", 128)?;
        let in_width = fields.positive("in_channels", 64)?;
        let config = Self {
            in_width,
            out_width: fields.positive("out_channels", in_width)?,
            layers: fields.size("num_layers", 19)?,
            single_layers: fields.size("num_single_layers", 38)?,
            joint: JointConfig {
                width: heads * head,
                heads,
                qk_norm: true,
            },
            context: fields.positive("joint_attention_dim", 4096)?,
            pooled: fields.positive("pooled_projection_dim", 768)?,
            guidance: fields.flag("guidance_embeds", false)?,
            axes: fields.sizes("axes_dims_rope", &[16, 56, 56])?,
        };
        fields.must_be_neutral("patch_size", &Value::from(1))?;
        config.check()?;
        Ok(config)
    }

    /// Whether the sizes fit each other.
    ///
    /// # Errors
    /// A sentence that names those that do not.
    pub fn check(&self) -> ConfigResult<()> {
        let head = self.joint.width / self.joint.heads.max(1);
        let all: usize = self.axes.iter().sum();
        if self.axes.len() != 3 || all != head || self.axes.iter().any(|n| n % 2 != 0) {
            return Err(ConfigError(format!(
                "config field `axes_dims_rope` is {:?}, expected three even numbers that make the width {head} of a head",
                self.axes
            )));
        }
        let packed = |width: usize| width.is_multiple_of(PATCH * PATCH);
        if !packed(self.in_width) || !packed(self.out_width) {
            return Err(ConfigError(format!(
                "config fields `in_channels` and `out_channels` are {} and {}, expected multiples of 4",
                self.in_width, self.out_width
            )));
        }
        Ok(())
    }

    /// Channels of the input.
    pub fn in_channels(&self) -> usize {
        self.in_width / (PATCH * PATCH)
    }

    /// Channels of the prediction.
    pub fn out_channels(&self) -> usize {
        self.out_width / (PATCH * PATCH)
    }
}
