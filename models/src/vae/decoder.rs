//! Latents to pictures.

use sd_kernels::{Result, Tensor, Weights, ops};

use super::block::MidBlock;
use super::config::{Config, EPS};
use crate::layers::{Conv2d, GroupNorm, ResnetBlock, Upsample};

/// One level: residual blocks, then twice the size on all but the last.
struct UpBlock {
    resnets: Vec<ResnetBlock>,
    upsample: Option<Upsample>,
}

impl UpBlock {
    /// All but the enlargement.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for resnet in &self.resnets {
            x = resnet.forward(&x, None)?;
        }
        Ok(x)
    }
}

/// The decoder with `post_quant_conv` and the scaling in front.
pub struct Decoder {
    config: Config,
    post_quant_conv: Option<Conv2d>,
    conv_in: Conv2d,
    mid: MidBlock,
    up: Vec<UpBlock>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    /// Asks for `post_quant_conv` and `decoder`.
    pub fn load(weights: &Weights, config: &Config) -> Self {
        let latent = config.latent_channels;
        let post_quant = weights.at("post_quant_conv");
        let weights = weights.at("decoder");
        let (first, last) = (
            config.channels[0],
            config.channels[config.channels.len() - 1],
        );
        let count = config.channels.len();
        let block = |i: usize| {
            let weights = weights.at("up_blocks").at(i);
            let output = config.channels[count - 1 - i];
            let input = config.channels[count - i.max(1)];
            UpBlock {
                resnets: (0..=config.layers)
                    .map(|j| {
                        let input = if j == 0 { input } else { output };
                        let weights = weights.at("resnets").at(j);
                        ResnetBlock::load(&weights, (input, output), &config.resnet())
                    })
                    .collect(),
                upsample: (i + 1 < count)
                    .then(|| Upsample::load(&weights.at("upsamplers.0"), output)),
            }
        };
        let activation = Some(sd_kernels::Activation::Silu);
        Self {
            post_quant_conv: config
                .post_quant_conv
                .then(|| Conv2d::load1x1(&post_quant, (latent, latent))),
            conv_in: Conv2d::load3x3(&weights.at("conv_in"), (latent, last)),
            mid: MidBlock::load(&weights.at("mid_block"), config, last),
            up: (0..count).map(block).collect(),
            norm_out: GroupNorm::load(
                &weights.at("conv_norm_out"),
                first,
                config.groups,
                EPS,
                activation,
            ),
            conv_out: Conv2d::load3x3(&weights.at("conv_out"), (first, config.out_channels)),
            config: config.clone(),
        }
    }

    /// The autoencoder's structure.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Latents `[b, latent, h, w]` as the UNet left them → pictures `[b, 3, scale·h, scale·w]`, mostly within [−1, 1].
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let Some(last) = self.up.len().checked_sub(1) else {
            return self.finish(&self.begin(latents)?);
        };
        self.tail(&self.head(latents, last)?, last)
    }

    /// The part whose attention and norms see the whole of it: latents to the features of level `depth`, `[b, c, 2^depth · h, 2^depth · w]`.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn head(&self, latents: &Tensor, depth: usize) -> Result<Tensor> {
        let mut x = self.begin(latents)?;
        for (i, block) in self.up.iter().take(depth + 1).enumerate() {
            if i > 0 {
                x = self.enlarge(&x, i - 1)?;
            }
            x = block.forward(&x)?;
        }
        Ok(x)
    }

    /// The rest, which sees no further than [`Decoder::reach`] but for its norms.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn tail(&self, features: &Tensor, depth: usize) -> Result<Tensor> {
        let mut x = features.clone();
        for (i, block) in self.up.iter().enumerate().skip(depth + 1) {
            x = block.forward(&self.enlarge(&x, i - 1)?)?;
        }
        self.finish(&x)
    }

    /// Channels of the features of a level.
    pub fn features(&self, depth: usize) -> usize {
        let count = self.config.channels.len();
        self.config.channels[count.saturating_sub(depth + 1)]
    }

    /// How far a pixel's value depends on the features of a level around it.
    pub fn reach(&self, depth: usize) -> usize {
        let below = self.config.channels.len().saturating_sub(depth + 1);
        let convolutions = 1 + 2 * (self.config.layers + 1);
        (0..below).fold(1, |reach: usize, _| (reach + convolutions).div_ceil(2))
    }

    /// Twice the size, behind level `i`.
    fn enlarge(&self, x: &Tensor, i: usize) -> Result<Tensor> {
        match &self.up[i].upsample {
            Some(upsample) => {
                let (_, _, h, w) = x.dims4()?;
                upsample.forward(x, 2 * h, 2 * w)
            }
            None => Ok(x.clone()),
        }
    }

    fn begin(&self, latents: &Tensor) -> Result<Tensor> {
        let z = ops::affine(
            latents,
            1.0 / self.config.scaling_factor,
            self.config.shift_factor,
        )?;
        let z = match &self.post_quant_conv {
            Some(conv) => conv.forward(&z)?,
            None => z,
        };
        self.mid.forward(&self.conv_in.forward(&z)?)
    }

    fn finish(&self, x: &Tensor) -> Result<Tensor> {
        self.conv_out.forward(&self.norm_out.forward(x)?)
    }
}
