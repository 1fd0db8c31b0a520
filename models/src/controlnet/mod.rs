//! ControlNet: a copy of half a UNet that looks at a picture, and adds to the UNet's skips what follows from it (Zhang et al., "Adding
//! Conditional Control to Text-to-Image Diffusion Models", arXiv 2302.05543; diffusers 0.42.1 `ControlNetModel`, `ControlNetUnionModel`).
//!
//! In: what the UNet takes, and the hint `[b, 3, 8h, 8w]`, 0 to 1.
//! Out: a residual for every skip of the UNet and one for its middle.

mod config;
mod union;

pub use config::{Config, Union};

use sd_kernels::{Activation, Padding, Result, Tensor, Weights, ops};

use crate::denoiser::{Inputs, Residuals};
use crate::layers::{Conv2d, mean};
use crate::unet::{Context, Given, Trunk};
use crate::variant::Variant;
use union::Kinds;

/// What a ControlNet is given beside the UNet's inputs.
#[derive(Clone, Copy)]
pub struct Hint<'a> {
    /// `[b, hint_channels, h · scale, w · scale]`, 0 to 1.
    pub picture: &'a Tensor,
    /// For a union: which kind the hint is of, and the sinusoids of all kinds `[b, kinds · number]`, by [`ControlNet::embed_kind`].
    pub kind: Option<(usize, &'a Tensor)>,
}

/// How residuals are scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Strength {
    /// Of all of them.
    pub scale: f64,
    /// How they grow towards the middle.
    pub ramp: Ramp,
}

/// How residuals grow from the first skip to the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ramp {
    /// They do not.
    #[default]
    Flat,
    /// A1111's soft weights: 0.825 to the power of 12 at the first, 11 at the second and so on.
    Soft,
    /// diffusers' guess mode: from 0.1 to 1 in equal ratios.
    Guess,
}

impl Strength {
    /// The factor of residual `index` of `count`, of which the middle's is the last.
    fn factor(self, index: usize, count: usize) -> f64 {
        let index = index as f64;
        let ramp = match self.ramp {
            Ramp::Flat => 1.0,
            // a Stable Diffusion XL has 10 residuals, which get the first ten of these factors
            Ramp::Soft => 0.825_f64.powf((12.0 - index).max(0.0)),
            Ramp::Guess => {
                let last = count.saturating_sub(1).max(1) as f64;
                10_f64.powf(index / last - 1.0)
            }
        };
        self.scale * ramp
    }
}

/// The network.
pub struct ControlNet {
    config: Config,
    trunk: Trunk,
    hint: HintEmbedding,
    kinds: Option<Kinds>,
    down: Vec<Conv2d>,
    mid: Conv2d,
}

impl ControlNet {
    /// Asks for every weight of the network.
    pub fn load(weights: &Weights, config: &Config) -> Self {
        let first = config.trunk.levels[0].channels;
        let (down, mid) = config.residual_channels();
        let zero = |weights: &Weights, channels| Conv2d::load1x1(weights, (channels, channels));
        let blocks = weights.at("controlnet_down_blocks");
        Self {
            trunk: Trunk::load(weights, &config.trunk),
            hint: HintEmbedding::load(&weights.at("controlnet_cond_embedding"), config, first),
            kinds: config
                .union
                .map(|union| Kinds::load(weights, union, (first, config.trunk.time.output))),
            down: down
                .into_iter()
                .enumerate()
                .map(|(i, channels)| zero(&blocks.at(i), channels))
                .collect(),
            mid: zero(&weights.at("controlnet_mid_block"), mid),
            config: config.clone(),
        }
    }

    /// The network's structure.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What is added to the UNet that takes the same `inputs`.
    ///
    /// # Errors
    /// When the shapes do not fit, an input is missing or the executor fails.
    pub fn forward(
        &self,
        inputs: &Inputs<'_>,
        hint: Hint<'_>,
        strength: Strength,
    ) -> Result<Residuals> {
        let kind = match (&self.kinds, hint.kind) {
            (Some(kinds), Some((_, sinusoids))) => Some(kinds.embed(sinusoids)?),
            _ => None,
        };
        // 1. time
        let temb = self.trunk.embed(inputs, kind.as_ref())?;

        let whole = Variant::default();
        let given = Given::new(&temb, Context::new(inputs.context, &[]), &whole);

        // 2. latents and hint
        let x = self.trunk.enter(inputs.sample)?; // [b, c0, h, w]
        let seen = self.hint.forward(hint.picture)?; // [b, c0, h, w]
        let seen = match (&self.kinds, hint.kind) {
            (Some(kinds), Some((kind, _))) => kinds.fuse(&seen, kind)?,
            _ => seen,
        };
        let x = ops::add(&x, &seen)?;

        // 3. down and middle
        let (x, skips) = self.trunk.descend(x, &given, &[])?;
        let x = self.trunk.turn(x, &given)?;

        // 4. what is made of each
        let strength = match strength.ramp {
            // diffusers has no such ramp where only means count
            Ramp::Guess if self.config.pools => Strength {
                ramp: Ramp::Flat,
                ..strength
            },
            _ => strength,
        };
        let count = skips.len() + 1;
        let finish = |conv: &Conv2d, x: &Tensor, index: usize| {
            let x = ops::affine(&conv.forward(x)?, strength.factor(index, count), 0.0)?;
            if self.config.pools { spread(&x) } else { Ok(x) }
        };
        let down = skips.iter().zip(&self.down).enumerate();
        let down = down.map(|(i, (skip, conv))| finish(conv, skip, i));
        Ok(Residuals {
            down: down.collect::<Result<_>>()?,
            mid: finish(&self.mid, &x, count - 1)?,
        })
    }
}

/// Every channel's mean in the place of all its pixels.
fn spread(x: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    ops::upsample(&ops::unflatten(&mean(x)?, 1, 1)?, h, w)
}

/// Convolutions that bring the hint to the size of the latents.
struct HintEmbedding {
    conv_in: Conv2d,
    blocks: Vec<Conv2d>,
    conv_out: Conv2d,
}

impl HintEmbedding {
    fn load(weights: &Weights, config: &Config, output: usize) -> Self {
        let widths = &config.hint_widths;
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let blocks = weights.at("blocks");
        let pairs = widths.windows(2).enumerate().flat_map(|(i, pair)| {
            let (keep, halve) = (blocks.at(2 * i), blocks.at(2 * i + 1));
            [
                Conv2d::load3x3(&keep, (pair[0], pair[0])),
                Conv2d::load(&halve, (pair[0], pair[1]), 3, 2, Padding::same(1)),
            ]
        });
        Self {
            conv_in: Conv2d::load3x3(&weights.at("conv_in"), (config.hint_channels, first)),
            blocks: pairs.collect(),
            conv_out: Conv2d::load3x3(&weights.at("conv_out"), (last, output)),
        }
    }

    /// `[b, hint_channels, h · scale, w · scale]` → `[b, c0, h, w]`.
    fn forward(&self, hint: &Tensor) -> Result<Tensor> {
        let silu = |x: Tensor| ops::activate(&x, Activation::Silu);
        let mut x = silu(self.conv_in.forward(hint)?)?;
        for block in &self.blocks {
            x = silu(block.forward(&x)?)?;
        }
        self.conv_out.forward(&x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn residuals_grow_towards_the_middle() {
        let strength = |ramp| Strength { scale: 0.5, ramp };
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        near(strength(Ramp::Flat).factor(3, 13), 0.5);
        near(strength(Ramp::Soft).factor(12, 13), 0.5);
        near(strength(Ramp::Soft).factor(0, 13), 0.5 * 0.825_f64.powi(12));
        near(strength(Ramp::Soft).factor(9, 10), 0.5 * 0.825_f64.powi(3));
        near(strength(Ramp::Guess).factor(0, 13), 0.05);
        near(strength(Ramp::Guess).factor(12, 13), 0.5);
        near(strength(Ramp::Guess).factor(6, 13), 0.5 * 0.1_f64.sqrt());
    }
}
