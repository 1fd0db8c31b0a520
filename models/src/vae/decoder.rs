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
        let z = ops::affine(
            latents,
            1.0 / self.config.scaling_factor,
            self.config.shift_factor,
        )?;
        let z = match &self.post_quant_conv {
            Some(conv) => conv.forward(&z)?,
            None => z,
        };
        let mut x = self.mid.forward(&self.conv_in.forward(&z)?)?;
        for block in &self.up {
            for resnet in &block.resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(upsample) = &block.upsample {
                let (_, _, h, w) = x.dims4()?;
                x = upsample.forward(&x, 2 * h, 2 * w)?;
            }
        }
        self.conv_out.forward(&self.norm_out.forward(&x)?)
    }
}
