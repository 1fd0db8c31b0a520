//! The blocks of one level: down, middle, up.

use sd_kernels::{Result, Tensor, Weights, ops};

use super::config::{Config, Level, Mid};
use super::transformer::{Context, Transformer};
use crate::layers::{Downsample, ResnetBlock, ResnetConfig, Upsample};

/// A residual block and the transformer behind it, if any.
struct Layer {
    resnet: ResnetBlock,
    transformer: Option<Transformer>,
}

impl Layer {
    /// Reads layer `index` of a block; `depth` transformer blocks, none for 0.
    fn load(
        weights: &Weights,
        index: usize,
        channels: (usize, usize),
        depth: usize,
        (config, level): (&Config, &Level),
    ) -> Self {
        Self {
            resnet: ResnetBlock::load(
                &weights.at("resnets").at(index),
                channels,
                &resnet_config(config, 1.0),
            ),
            transformer: (depth > 0).then(|| {
                Transformer::load(
                    &weights.at("attentions").at(index),
                    config.groups,
                    depth,
                    level,
                )
            }),
        }
    }

    fn forward(&self, x: &Tensor, temb: &Tensor, context: &Context<'_>) -> Result<Tensor> {
        let x = self.resnet.forward(x, Some(temb))?;
        match &self.transformer {
            Some(transformer) => transformer.forward(&x, context),
            None => Ok(x),
        }
    }
}

fn resnet_config(config: &Config, output_scale: f64) -> ResnetConfig {
    ResnetConfig {
        groups: config.groups,
        eps: config.eps,
        activation: config.activation,
        time_width: Some(config.time.output),
        scale_shift: config.scale_shift,
        output_scale,
    }
}

/// One level on the way down.
pub(super) struct DownBlock {
    layers: Vec<Layer>,
    downsample: Option<Downsample>,
}

impl DownBlock {
    pub(super) fn load(weights: &Weights, config: &Config, index: usize) -> Self {
        let level = &config.levels[index];
        let from = config.levels[index.saturating_sub(1)].channels;
        let layers = level.down.iter().enumerate().map(|(i, &depth)| {
            let input = if i == 0 { from } else { level.channels };
            Layer::load(weights, i, (input, level.channels), depth, (config, level))
        });
        Self {
            layers: layers.collect(),
            downsample: (index + 1 < config.levels.len()).then(|| {
                let weights = weights.at("downsamplers.0");
                Downsample::load(&weights, level.channels, config.downsample_padding)
            }),
        }
    }

    /// `feature` is a T2I-Adapter's. diffusers adds it to the last layer's result where the block attends, else to what leaves the block; the
    /// skip there has it as well.
    pub(super) fn forward(
        &self,
        mut x: Tensor,
        temb: &Tensor,
        (context, feature): (&Context<'_>, Option<&Tensor>),
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        let attends = self.layers.iter().any(|layer| layer.transformer.is_some());
        let inside = feature.filter(|_| attends || self.downsample.is_none());
        let behind = feature.filter(|_| inside.is_none());
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, temb, context)?;
            if let Some(feature) = inside.filter(|_| i + 1 == self.layers.len()) {
                x = ops::add(&x, feature)?;
            }
            skips.push(x.clone());
        }
        if let Some(downsample) = &self.downsample {
            x = downsample.forward(&x)?;
            if let Some(feature) = behind {
                x = ops::add(&x, feature)?;
            }
            skips.push(x.clone());
        }
        Ok(x)
    }
}

/// The middle: one residual block, or two around a transformer.
pub(super) struct MidBlock {
    first: Layer,
    second: Option<ResnetBlock>,
}

impl MidBlock {
    pub(super) fn load(weights: &Weights, config: &Config) -> Option<Self> {
        let level = config.levels.last()?;
        let depth = match config.mid {
            Mid::None => return None,
            Mid::Resnet => 0,
            Mid::Attention { depth } => depth,
        };
        let resnet = |index| {
            ResnetBlock::load(
                &weights.at("resnets").at(index),
                (level.channels, level.channels),
                &resnet_config(config, config.mid_scale),
            )
        };
        // the middle always looks at itself first, whatever `only_cross_attention` says of the levels
        let level = Level {
            only_cross_attention: false,
            ..level.clone()
        };
        let attends = matches!(config.mid, Mid::Attention { .. });
        Some(Self {
            first: Layer {
                resnet: resnet(0),
                transformer: attends.then(|| {
                    Transformer::load(&weights.at("attentions.0"), config.groups, depth, &level)
                }),
            },
            second: attends.then(|| resnet(1)),
        })
    }

    pub(super) fn forward(
        &self,
        x: &Tensor,
        temb: &Tensor,
        context: &Context<'_>,
    ) -> Result<Tensor> {
        let x = self.first.forward(x, temb, context)?;
        match &self.second {
            Some(resnet) => resnet.forward(&x, Some(temb)),
            None => Ok(x),
        }
    }
}

/// One level on the way up.
pub(super) struct UpBlock {
    layers: Vec<Layer>,
    upsample: Option<Upsample>,
}

impl UpBlock {
    /// Reads the way up through level `index` (0 is the level of full size).
    pub(super) fn load(weights: &Weights, config: &Config, index: usize) -> Self {
        let level = &config.levels[index];
        let below = config.levels[(index + 1).min(config.levels.len() - 1)].channels;
        let above = config.levels[index.saturating_sub(1)].channels;
        let last = level.up.len().saturating_sub(1);
        let layers = level.up.iter().enumerate().map(|(i, &depth)| {
            let input = if i == 0 { below } else { level.channels };
            // the last skip of a level comes from the downsampler of the level above it (or from `conv_in`)
            let skip = if i == last { above } else { level.channels };
            Layer::load(
                weights,
                i,
                (input + skip, level.channels),
                depth,
                (config, level),
            )
        });
        Self {
            layers: layers.collect(),
            upsample: (index > 0)
                .then(|| Upsample::load(&weights.at("upsamplers.0"), level.channels)),
        }
    }

    pub(super) fn forward(
        &self,
        mut x: Tensor,
        temb: &Tensor,
        context: &Context<'_>,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        for layer in &self.layers {
            if let Some(skip) = skips.pop() {
                x = ops::concat(&x, &skip)?;
            }
            x = layer.forward(&x, temb, context)?;
        }
        match (&self.upsample, skips.last()) {
            (Some(upsample), Some(next)) => {
                let (_, _, h, w) = next.dims4()?;
                upsample.forward(&x, h, w)
            }
            _ => Ok(x),
        }
    }
}
