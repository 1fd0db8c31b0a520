//! The denoising UNet of Stable Diffusion 1, 2 and XL (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
//! arXiv 2112.10752; diffusers 0.42.1 `UNet2DConditionModel`).
//!
//! In: latents `[b, in_channels, h, w]`, scaled as the sampler says; timestep `[b]`, 0 to 999; text states `[b, t, context]`; for XL a vector
//! beside the time, `[b, added]`.
//! Out: the model's prediction `[b, out_channels, h, w]`.

mod block;
mod config;
mod given;
mod image_prompt;
mod transformer;
mod trunk;

pub(crate) use config::activation;
pub use config::{Added, Config, Level, Mid};
pub use image_prompt::{ImageLayers, ImagePrompt};

pub(crate) use given::Given;
pub(crate) use transformer::Context;
pub(crate) use trunk::Trunk;

use block::UpBlock;
use given::Kind;
use sd_kernels::{Error, Padding, Result, Tensor, Weights, ops};

pub use crate::denoiser::{Inputs, Residuals, Steering};
use crate::layers::{Conv2d, GroupNorm};
use crate::variant::{Earlier, Outputs, Slot, Tap, Variant};

/// The network.
pub struct UNet {
    config: Config,
    trunk: Trunk,
    up: Vec<UpBlock>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl UNet {
    /// Asks for every weight of the network; [`Weights::finish`] tells whether all were there.
    pub fn load(weights: &Weights, config: &Config) -> Self {
        let first = config.levels[0].channels;
        let count = config.levels.len();
        Self {
            trunk: Trunk::load(weights, config),
            up: (0..count)
                .map(|i| UpBlock::load(&weights.at("up_blocks").at(i), config, count - 1 - i))
                .collect(),
            norm_out: GroupNorm::load(
                &weights.at("conv_norm_out"),
                first,
                config.groups,
                config.eps,
                Some(config.activation),
            ),
            conv_out: Conv2d::load(
                &weights.at("conv_out"),
                (first, config.out_channels),
                config.conv_out_kernel,
                1,
                Padding::same(config.conv_out_kernel.saturating_sub(1) / 2),
            ),
            config: config.clone(),
        }
    }

    /// The network's structure.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The row of a class, `[time width]`; none where the network has no classes, or not so many.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn label(&self, class: usize) -> Result<Option<Vec<f32>>> {
        self.trunk.label(class)
    }

    /// One prediction `[b, out_channels, h, w]`.
    ///
    /// # Errors
    /// When the shapes do not fit, an input is missing or the executor fails.
    pub fn forward(&self, inputs: &Inputs<'_>) -> Result<Tensor> {
        let outputs = self.forward_as(inputs, &Variant::default(), None)?;
        Ok(outputs.prediction)
    }

    /// The names of the self-attentions, as diffusers has them.
    pub fn self_attentions(&self) -> Vec<&str> {
        let before = self.trunk.transformers();
        let up = self.up.iter().flat_map(UpBlock::transformers);
        let all = before.chain(up);
        all.flat_map(|transformer| transformer.self_attentions())
            .collect()
    }

    /// One prediction of the network changed as `variant` says; `earlier` gives what it takes from outside.
    ///
    /// # Errors
    /// As [`UNet::forward`], and when a value that is asked for is not in this network.
    pub fn forward_as(
        &self,
        inputs: &Inputs<'_>,
        variant: &Variant,
        earlier: Option<&Earlier<'_>>,
    ) -> Result<Outputs> {
        let Steering {
            residuals,
            features,
            images,
            lites,
        } = inputs.steering;
        // 1. time, and what is embedded beside it
        let temb = self.trunk.embed(inputs, None)?; // [b, time width]
        let (_, _, h, w) = inputs.sample.dims4()?;
        let given = Given::new(&temb, Context::new(inputs.context, images), variant);
        let given = given.with((h, w), earlier, lites);

        // 2. in
        let mut x = self.trunk.enter(inputs.sample)?; // [b, c0, h, w]
        let mut mass = None;
        if let (true, Some(last)) = (variant.shallow, self.up.last()) {
            // 3. to 6. in an earlier call, but for the last layer
            let deep = given.outside(Slot::Deep, x.shape())?;
            x = last.last(&deep, &given, &mut vec![x])?;
        } else {
            // 3. down: every resnet and every downsampler leaves a skip
            let (below, mut skips) = self.trunk.descend(x, &given, features)?;

            // 4. middle
            if variant.taps.contains(&Tap::Mass) {
                mass = self.trunk.mass(&below, &given)?;
            }
            x = self.trunk.turn(below, &given)?;
            // an adapter has a feature more than there are levels where it has one for the middle, too
            if let Some(feature) = features.get(self.config.levels.len()) {
                x = ops::add(&x, feature)?;
            }

            // 5. what ControlNets add
            if let Some(residuals) = residuals {
                (skips, x) = residuals.add_to(&skips, &x)?;
            }

            // 6. up: every resnet takes a skip; each level ends at the size of the next skip
            for block in &self.up {
                x = block.forward(x, &given, &mut skips)?;
            }
            given.context.finish()?;
        }

        // 7. out
        let prediction = self.conv_out.forward(&self.norm_out.forward(&x)?)?;
        let taps = variant.taps.iter().map(|tap| {
            let value = match tap {
                Tap::Deep => given.deep.borrow().clone(),
                Tap::Mass => mass.clone(),
            };
            value.ok_or_else(|| Error::Shape {
                op: "unet",
                expected: format!("a network with {tap:?}"),
                got: "one without".to_owned(),
            })
        });
        Ok(Outputs {
            taps: taps.collect::<Result<_>>()?,
            cross: given.kept(Kind::Cross),
            own: given.kept(Kind::Own),
            prediction,
        })
    }
}

impl Residuals {
    /// The skips and the middle with these on them.
    fn add_to(&self, skips: &[Tensor], mid: &Tensor) -> Result<(Vec<Tensor>, Tensor)> {
        if self.down.len() != skips.len() {
            return Err(Error::Shape {
                op: "residuals",
                expected: format!("one for each of {} skips", skips.len()),
                got: self.down.len().to_string(),
            });
        }
        let sums = skips.iter().zip(&self.down);
        let sums = sums.map(|(skip, residual)| ops::add(skip, residual));
        Ok((sums.collect::<Result<_>>()?, ops::add(mid, &self.mid)?))
    }
}
