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
    /// Mean and standard deviation of the encoder's latents, channel by channel, where the UNet's are normalised by them (Playground 2.5).
    pub spread: Option<Spread>,
    /// Attention between the middle's residual blocks.
    pub mid_attention: bool,
    /// A 1×1 convolution behind the encoder.
    pub quant_conv: bool,
    /// A 1×1 convolution before the decoder.
    pub post_quant_conv: bool,
}

/// What latents are normalised by.
#[derive(Debug, Clone, PartialEq)]
pub struct Spread {
    /// A number a channel.
    pub mean: Vec<f64>,
    /// A number a channel, none of them 0.
    pub deviation: Vec<f64>,
}

impl Config {
    /// Reads diffusers' `vae/config.json` with the defaults of `AutoencoderKL` (diffusers 0.42.1).
    ///
    /// # Errors
    /// When a field has a wrong type or asks for something that is not built.
    pub fn from_json(value: &Value) -> ConfigResult<Self> {
        let fields = Fields(value);
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
            spread: spread(&fields)?,
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

    /// Makes the encoder's latents `[b, c, h, w]` those that the UNet knows; `plane` is h · w.
    pub fn normalise(&self, latents: &mut [f32], plane: usize) {
        let factor = self.scaling_factor;
        let Some(Spread { mean, deviation }) = &self.spread else {
            for value in latents {
                *value = ((f64::from(*value) - self.shift_factor) * factor) as f32;
            }
            return;
        };
        let channels = mean.iter().zip(deviation).cycle();
        for (plane, (mean, deviation)) in latents.chunks_mut(plane.max(1)).zip(channels) {
            for value in plane {
                *value = ((f64::from(*value) - mean) * factor / deviation) as f32;
            }
        }
    }

    /// Gives the UNet's latents `[b, c, h, w]` the mean and deviation that the encoder's have, up to the scaling factor, which the decoder
    /// takes off.
    pub fn restore(&self, latents: &mut [f32], plane: usize) {
        let Some(Spread { mean, deviation }) = &self.spread else {
            return;
        };
        let channels = mean.iter().zip(deviation).cycle();
        for (plane, (mean, deviation)) in latents.chunks_mut(plane.max(1)).zip(channels) {
            for value in plane {
                let restored = f64::from(*value) * deviation + mean * self.scaling_factor;
                *value = restored as f32;
            }
        }
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

fn spread(fields: &Fields<'_>) -> ConfigResult<Option<Spread>> {
    // diffusers wants both
    let (Some(_), Some(_)) = (fields.get("latents_mean"), fields.get("latents_std")) else {
        return Ok(None);
    };
    let channels = fields.positive("latent_channels", 4)?;
    let numbers = |name: &str| {
        let list = fields.get(name).and_then(Value::as_array);
        let numbers: Option<Vec<f64>> =
            list.and_then(|list| list.iter().map(Value::as_f64).collect());
        numbers
            .filter(|numbers| numbers.len() == channels)
            .ok_or_else(|| {
                ConfigError(format!(
                    "config field `{name}` must list {channels} numbers, one a channel"
                ))
            })
    };
    let (mean, deviation) = (numbers("latents_mean")?, numbers("latents_std")?);
    if deviation.contains(&0.0) {
        return Err(ConfigError("config field `latents_std` holds 0".to_owned()));
    }
    Ok(Some(Spread { mean, deviation }))
}
