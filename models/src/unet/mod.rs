//! The denoising UNet of Stable Diffusion 1, 2 and XL (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
//! arXiv 2112.10752; diffusers 0.42.1 `UNet2DConditionModel`).
//!
//! In: latents `[b, in_channels, h, w]`, scaled as the sampler says; timestep `[b]`, 0 to 999; text states `[b, t, context]`; for XL a vector
//! beside the time, `[b, added]`.
//! Out: the model's prediction `[b, out_channels, h, w]`.

mod block;
mod config;
mod transformer;

pub(crate) use config::activation;
pub use config::{Added, Config, Level, Mid};

use std::cell::RefCell;

use block::{DownBlock, MidBlock, UpBlock};
use sd_kernels::{Activation, Error, Padding, Param, Result, Tensor, Weights, ops};

pub use crate::denoiser::Inputs;
use crate::layers::{Conv2d, Embedding, GroupNorm, TimeEmbedding, given};
use crate::variant::{Outputs, Tap, Variant};

/// What every block is given beside its input.
struct Given<'a> {
    /// The embedded timestep.
    temb: &'a Tensor,
    /// Text states `[b, t, context]`.
    context: &'a Tensor,
    variant: &'a Variant,
    /// What entered the last layer of the block on the way up that was computed last.
    deep: RefCell<Option<Tensor>>,
}

impl Given<'_> {
    fn note_deep(&self, x: &Tensor) {
        *self.deep.borrow_mut() = Some(x.clone());
    }
}

/// The network.
pub struct UNet {
    config: Config,
    conv_in: Conv2d,
    time_embedding: TimeEmbedding,
    add_embedding: Option<Embedding>,
    class_embedding: Option<Param>,
    down: Vec<DownBlock>,
    mid: Option<MidBlock>,
    up: Vec<UpBlock>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl UNet {
    /// Asks for every weight of the network; [`Weights::finish`] tells whether all were there.
    pub fn load(weights: &Weights, config: &Config) -> Self {
        let first = config.levels[0].channels;
        let conv = |name: &str, channels, kernel: usize| {
            let padding = Padding::same(kernel.saturating_sub(1) / 2);
            Conv2d::load(&weights.at(name), channels, kernel, 1, padding)
        };
        let count = config.levels.len();
        Self {
            conv_in: conv(
                "conv_in",
                (config.in_channels, first),
                config.conv_in_kernel,
            ),
            time_embedding: TimeEmbedding::load(&weights.at("time_embedding"), &config.time),
            // diffusers gives this embedding SiLU, whatever the config's activation
            add_embedding: config.added.map(|added| {
                Embedding::load(
                    &weights.at("add_embedding"),
                    (added.input, config.time.output),
                    Activation::Silu,
                )
            }),
            class_embedding: config.classes.map(|classes| {
                let weights = weights.at("class_embedding");
                weights.param("weight", &[classes, config.time.output])
            }),
            down: (0..count)
                .map(|i| DownBlock::load(&weights.at("down_blocks").at(i), config, i))
                .collect(),
            mid: MidBlock::load(&weights.at("mid_block"), config),
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
            conv_out: conv(
                "conv_out",
                (first, config.out_channels),
                config.conv_out_kernel,
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
        let Some(table) = &self.class_embedding else {
            return Ok(None);
        };
        let width = self.config.time.output;
        let rows = table.numbers()?;
        Ok(rows.chunks_exact(width.max(1)).nth(class).map(<[f32]>::to_vec))
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
        let down = self.down.iter().flat_map(DownBlock::transformers);
        let mid = self.mid.iter().flat_map(MidBlock::transformers);
        let up = self.up.iter().flat_map(UpBlock::transformers);
        let all = down.chain(mid).chain(up);
        all.flat_map(|transformer| transformer.self_attentions())
            .collect()
    }

    /// One prediction of the network changed as `variant` says; `deep` are the features that a shallow one takes from an earlier call.
    ///
    /// # Errors
    /// As [`UNet::forward`], and when a value that is asked for is not in this network.
    pub fn forward_as(
        &self,
        inputs: &Inputs<'_>,
        variant: &Variant,
        deep: Option<&Tensor>,
    ) -> Result<Outputs> {
        let Inputs {
            sample,
            timestep,
            context,
            added,
            guidance,
            label,
            reference: _,
        } = *inputs;
        // 1. time, and what is embedded beside it
        let temb = self.time_embedding.forward(timestep, guidance)?; // [b, time width]
        let temb = match (&self.class_embedding, label) {
            (None, None) => temb,
            (Some(_), Some(label)) => ops::add(&temb, label)?,
            (table, _) => {
                return Err(Error::Shape {
                    op: "class_embedding",
                    expected: given(table.is_some()).to_owned(),
                    got: given(table.is_none()).to_owned(),
                });
            }
        };
        let temb = match (&self.add_embedding, added) {
            (None, None) => temb,
            (Some(embedding), Some(added)) => ops::add(&temb, &embedding.forward(added)?)?,
            (embedding, _) => {
                return Err(Error::Shape {
                    op: "add_embedding",
                    expected: given(embedding.is_some()).to_owned(),
                    got: given(embedding.is_none()).to_owned(),
                });
            }
        };
        let temb = match self.config.time_activation {
            Some(activation) => ops::activate(&temb, activation)?,
            None => temb,
        };

        // 2. in
        let sample = if self.config.center_input {
            ops::affine(sample, 2.0, -1.0)?
        } else {
            sample.clone()
        };
        let mut x = self.conv_in.forward(&sample)?; // [b, c0, h, w]

        let given = Given {
            temb: &temb,
            context,
            variant,
            deep: RefCell::default(),
        };
        let mut skips = vec![x.clone()];
        let mut mass = None;
        if let (true, Some(deep), Some(last)) = (variant.shallow, deep, self.up.last()) {
            // 3. to 5. in an earlier call, but for the last layer
            x = last.last(deep, &given, &mut skips)?;
        } else {
            // 3. down: every resnet and every downsampler leaves a skip
            for block in &self.down {
                x = block.forward(x, &given, &mut skips)?;
            }

            // 4. middle
            if let Some(mid) = &self.mid {
                if variant.taps.contains(&Tap::Mass) {
                    mass = mid.mass(&x, &given)?;
                }
                x = mid.forward(&x, &given)?;
            }

            // 5. up: every resnet takes a skip; each level ends at the size of the next skip
            for block in &self.up {
                x = block.forward(x, &given, &mut skips)?;
            }
        }

        // 6. out
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
            prediction,
        })
    }
}
