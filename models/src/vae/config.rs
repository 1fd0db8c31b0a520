//! The structure of an autoencoder, from diffusers' `config.json` (single files give it from their shapes).

use sd_kernels::Activation;
use serde_json::{Value, json};

use crate::config::{ConfigError, ConfigResult, Fields};
use crate::layers::ResnetConfig;

/// Epsilon of every norm of the autoencoder.
pub(super) const EPS: f64 = 1e-6;

/// The structure of an autoencoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Channels of a picture.
    pub in_channels: usize,
    /// Channels of a decoded picture.
    pub out_channels: usize,
    /// Channels of latents.
    pub latent_channels: usize,
    /// Feature channels from full size to the smallest; never empty.
    pub channels: Vec<usize>,
    /// Residual blocks a level in the encoder; the decoder has one more.
    pub layers: usize,
    /// Groups of the norms.
    pub groups: usize,
    /// Activation of the residual blocks.
    pub activation: Activation,
    /// The UNet's latents are the encoder's times this.
    pub scaling_factor: f64,
    /// Taken off the encoder's latents before scaling.
    pub shift_factor: f64,
    /// Attention between the middle's residual blocks.
    pub mid_attention: bool,
    /// A 1×1 convolution behind the encoder.
    pub quant_conv: bool,
    /// A 1×1 convolution before the decoder.
    pub post_quant_conv: bool,
}

impl Config {
    /// Reads diffusers' `vae/config.json` with the defaults of `AutoencoderKL` (diffusers 0.42.1).
    ///
    /// # Errors
    /// When a field has a wrong type or asks for something that is not built.
    pub fn from_json(value: &Value) -> ConfigResult<Self> {
        let fields = Fields(value);
        for name in ["latents_mean", "latents_std"] {
            fields.must_be_neutral(name, &Value::Null)?;
        }
        let channels = fields.sizes("block_out_channels", &[64])?;
        if channels.is_empty() || channels.contains(&0) {
            return Err(ConfigError(
                "config field `block_out_channels` must list at least one level, all above 0"
                    .to_owned(),
            ));
        }
        for (name, block) in [
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ] {
            let types = fields.texts(name, &vec![block; channels.len()])?;
            if types.len() != channels.len() {
                return Err(ConfigError(format!(
                    "config field `{name}` has {} entries, expected {}, one a level",
                    types.len(),
                    channels.len()
                )));
            }
            if let Some(other) = types.iter().find(|t| *t != block) {
                return Err(ConfigError(format!(
                    "config field `{name}` holds {}, which is not supported yet",
                    json!(other)
                )));
            }
        }
        let scaling_factor = fields.number("scaling_factor", 0.18215)?;
        if scaling_factor == 0.0 {
            return Err(ConfigError("config field `scaling_factor` is 0".to_owned()));
        }
        Ok(Self {
            in_channels: fields.positive("in_channels", 3)?,
            out_channels: fields.positive("out_channels", 3)?,
            latent_channels: fields.positive("latent_channels", 4)?,
            layers: fields.positive("layers_per_block", 1)?,
            groups: fields.positive("norm_num_groups", 32)?,
            activation: crate::unet::activation(&fields, "act_fn", "silu")?,
            scaling_factor,
            shift_factor: fields.number("shift_factor", 0.0)?,
            mid_attention: fields.flag("mid_block_add_attention", true)?,
            quant_conv: fields.flag("use_quant_conv", true)?,
            post_quant_conv: fields.flag("use_post_quant_conv", true)?,
            channels,
        })
    }

    /// How many pixels one latent is wide.
    pub fn scale(&self) -> usize {
        1 << self.channels.len().saturating_sub(1).min(16)
    }

    pub(super) fn resnet(&self) -> ResnetConfig {
        ResnetConfig {
            groups: self.groups,
            eps: EPS,
            activation: self.activation,
            time_width: None,
            scale_shift: false,
            output_scale: 1.0,
        }
    }
}
