//! The blocks of one level: down, middle, up.

use sd_kernels::{Result, Tensor, Weights, ops};

use super::Given;
use super::config::{Config, Level, Mid};
use super::transformer::Transformer;
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

    fn forward(&self, x: &Tensor, given: &Given<'_>) -> Result<Tensor> {
        let x = self.resnet.forward(x, Some(given.temb))?;
        match &self.transformer {
            Some(transformer) => transformer.forward(&x, given),
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
        (given, feature): (&Given<'_>, Option<&Tensor>),
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        let attends = self.layers.iter().any(|layer| layer.transformer.is_some());
        let inside = feature.filter(|_| attends || self.downsample.is_none());
        let behind = feature.filter(|_| inside.is_none());
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, given)?;
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

    pub(super) fn transformers(&self) -> impl Iterator<Item = &Transformer> {
        let layers = self.layers.iter();
        layers.filter_map(|layer| layer.transformer.as_ref())
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

    pub(super) fn forward(&self, x: &Tensor, given: &Given<'_>) -> Result<Tensor> {
        let x = self.first.forward(x, given)?;
        match &self.second {
            Some(resnet) => resnet.forward(&x, Some(given.temb)),
            None => Ok(x),
        }
    }

    /// How much its pixels are looked at by each other, `[b, 1, h, w]`, when `x` enters it; nothing without a transformer.
    pub(super) fn mass(&self, x: &Tensor, given: &Given<'_>) -> Result<Option<Tensor>> {
        match &self.first.transformer {
            Some(transformer) => {
                let x = self.first.resnet.forward(x, Some(given.temb))?;
                transformer.mass(&x, given)
            }
            None => Ok(None),
        }
    }

    pub(super) fn transformers(&self) -> impl Iterator<Item = &Transformer> {
        self.first.transformer.iter()
    }
}

/// One level on the way up.
pub(super) struct UpBlock {
    /// Its place on the way, 0 at the smallest pictures.
    index: usize,
    /// Channels of the network's first level.
    first: usize,
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
            index: config.levels.len() - 1 - index,
            first: config.levels[0].channels,
            layers: layers.collect(),
            upsample: (index > 0)
                .then(|| Upsample::load(&weights.at("upsamplers.0"), level.channels)),
        }
    }

    pub(super) fn forward(
        &self,
        mut x: Tensor,
        given: &Given<'_>,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        if let Some((last, before)) = self.layers.split_last() {
            for layer in before {
                x = self.joined(layer, &x, (given, skips))?;
            }
            given.note_deep(&x);
            x = self.joined(last, &x, (given, skips))?;
        }
        match (&self.upsample, skips.last()) {
            (Some(upsample), Some(next)) => {
                let (_, _, h, w) = next.dims4()?;
                upsample.forward(&x, h, w)
            }
            _ => Ok(x),
        }
    }

    /// The last layer alone, on what entered it in an earlier call.
    pub(super) fn last(
        &self,
        deep: &Tensor,
        given: &Given<'_>,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        match self.layers.last() {
            Some(layer) => self.joined(layer, deep, (given, skips)),
            None => Ok(deep.clone()),
        }
    }

    /// A layer on `x` beside the next skip.
    fn joined(
        &self,
        layer: &Layer,
        x: &Tensor,
        (given, skips): (&Given<'_>, &mut Vec<Tensor>),
    ) -> Result<Tensor> {
        let Some(skip) = skips.pop() else {
            return layer.forward(x, given);
        };
        let joined = match &given.variant.free_u {
            Some(free_u) => {
                let (x, skip) = free_u.apply((x, &skip), self.index, self.first)?;
                ops::concat(&x, &skip)?
            }
            None => ops::concat(x, &skip)?,
        };
        layer.forward(&joined, given)
    }

    pub(super) fn transformers(&self) -> impl Iterator<Item = &Transformer> {
        let layers = self.layers.iter();
        layers.filter_map(|layer| layer.transformer.as_ref())
    }
}
