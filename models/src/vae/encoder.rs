//! Pictures to the distribution of their latents.

use sd_kernels::{Result, Tensor, Weights};

use super::block::MidBlock;
use super::config::{Config, EPS};
use crate::layers::{Conv2d, Downsample, GroupNorm, ResnetBlock};

/// One level: residual blocks, then half the size on all but the last.
struct DownBlock {
    resnets: Vec<ResnetBlock>,
    downsample: Option<Downsample>,
}

impl DownBlock {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for resnet in &self.resnets {
            x = resnet.forward(&x, None)?;
        }
        match &self.downsample {
            Some(downsample) => downsample.forward(&x),
            None => Ok(x),
        }
    }
}

/// The encoder with `quant_conv` behind.
pub struct Encoder {
    config: Config,
    conv_in: Conv2d,
    down: Vec<DownBlock>,
    mid: MidBlock,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    quant_conv: Option<Conv2d>,
}

impl Encoder {
    /// Asks for `encoder` and `quant_conv`.
    pub fn load(weights: &Weights, config: &Config) -> Self {
        let moments = 2 * config.latent_channels;
        let quant = weights.at("quant_conv");
        let weights = weights.at("encoder");
        let (first, last) = (
            config.channels[0],
            config.channels[config.channels.len() - 1],
        );
        let count = config.channels.len();
        let block = |i: usize| {
            let weights = weights.at("down_blocks").at(i);
            let (input, output) = (config.channels[i.saturating_sub(1)], config.channels[i]);
            DownBlock {
                resnets: (0..config.layers)
                    .map(|j| {
                        let input = if j == 0 { input } else { output };
                        let weights = weights.at("resnets").at(j);
                        ResnetBlock::load(&weights, (input, output), &config.resnet())
                    })
                    .collect(),
                downsample: (i + 1 < count)
                    .then(|| Downsample::load(&weights.at("downsamplers.0"), output, 0)),
            }
        };
        let activation = Some(sd_kernels::Activation::Silu);
        Self {
            conv_in: Conv2d::load3x3(&weights.at("conv_in"), (config.in_channels, first)),
            down: (0..count).map(block).collect(),
            mid: MidBlock::load(&weights.at("mid_block"), config, last),
            norm_out: GroupNorm::load(
                &weights.at("conv_norm_out"),
                last,
                config.groups,
                EPS,
                activation,
            ),
            conv_out: Conv2d::load3x3(&weights.at("conv_out"), (last, moments)),
            quant_conv: config
                .quant_conv
                .then(|| Conv2d::load1x1(&quant, (moments, moments))),
            config: config.clone(),
        }
    }

    /// Pictures `[b, 3, H, W]` in [−1, 1] → mean and logarithm of the variance, side by side, `[b, 2 · latent, H/scale, W/scale]`,
    /// before scaling. The logarithm is not clamped yet.
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn moments(&self, pictures: &Tensor) -> Result<Tensor> {
        let depth = self.down.len().saturating_sub(1);
        self.tail(&self.head(pictures, depth)?, depth)
    }

    /// The part that sees no further than [`Encoder::reach`] but for its norms: pictures to the features of level `depth`,
    /// `[b, c, H / 2^depth, W / 2^depth]`.
    ///
    /// # Errors
    /// As [`Encoder::moments`].
    pub fn head(&self, pictures: &Tensor, depth: usize) -> Result<Tensor> {
        let mut x = self.conv_in.forward(pictures)?;
        for block in self.down.iter().take(depth) {
            x = block.forward(&x)?;
        }
        Ok(x)
    }

    /// Channels of the features of a level, as they come from the one above.
    pub fn features(&self, depth: usize) -> usize {
        self.config.channels[depth.saturating_sub(1).min(self.config.channels.len() - 1)]
    }

    /// How far the features of a level depend on the pixels around them.
    pub fn reach(&self, depth: usize) -> usize {
        (0..depth).fold(0, |reach: usize, _| 2 * reach + 2 + 2 * self.config.layers) + 1
    }

    /// The rest.
    ///
    /// # Errors
    /// As [`Encoder::moments`].
    pub fn tail(&self, features: &Tensor, depth: usize) -> Result<Tensor> {
        let mut x = features.clone();
        for block in self.down.iter().skip(depth) {
            x = block.forward(&x)?;
        }
        let x = self.norm_out.forward(&self.mid.forward(&x)?)?;
        let x = self.conv_out.forward(&x)?;
        match &self.quant_conv {
            Some(conv) => conv.forward(&x),
            None => Ok(x),
        }
    }
}
