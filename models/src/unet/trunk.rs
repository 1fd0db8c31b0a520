//! The half of a UNet that a ControlNet has a copy of: what is embedded, the way down and the middle.

use sd_kernels::{Activation, Error, Padding, Param, Result, Tensor, Weights, ops};

use super::Given;
use super::block::{DownBlock, MidBlock};
use super::config::Config;
use super::transformer::Transformer;
use crate::denoiser::Inputs;
use crate::layers::{Conv2d, Embedding, TimeEmbedding, given};

/// Everything before the way up.
pub(crate) struct Trunk {
    time_embedding: TimeEmbedding,
    add_embedding: Option<Embedding>,
    class_embedding: Option<Param>,
    time_width: usize,
    time_activation: Option<Activation>,
    center_input: bool,
    conv_in: Conv2d,
    down: Vec<DownBlock>,
    mid: Option<MidBlock>,
}

impl Trunk {
    pub(crate) fn load(weights: &Weights, config: &Config) -> Self {
        let first = config.levels[0].channels;
        let padding = Padding::same(config.conv_in_kernel.saturating_sub(1) / 2);
        Self {
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
            time_width: config.time.output,
            time_activation: config.time_activation,
            center_input: config.center_input,
            conv_in: Conv2d::load(
                &weights.at("conv_in"),
                (config.in_channels, first),
                config.conv_in_kernel,
                1,
                padding,
            ),
            down: (0..config.levels.len())
                .map(|i| DownBlock::load(&weights.at("down_blocks").at(i), config, i))
                .collect(),
            mid: MidBlock::load(&weights.at("mid_block"), config),
        }
    }

    /// Time, and what is embedded beside it: `[b, time width]`; `more` is added to it, if given.
    ///
    /// # Errors
    /// When an input is missing or the executor fails.
    pub(crate) fn embed(&self, inputs: &Inputs<'_>, more: Option<&Tensor>) -> Result<Tensor> {
        let temb = self
            .time_embedding
            .forward(inputs.timestep, inputs.guidance)?;
        let temb = match (&self.class_embedding, inputs.label) {
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
        let temb = match (&self.add_embedding, inputs.added) {
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
        let temb = match more {
            Some(more) => ops::add(&temb, more)?,
            None => temb,
        };
        match self.time_activation {
            Some(activation) => ops::activate(&temb, activation),
            None => Ok(temb),
        }
    }

    /// The first convolution of the latents: `[b, first channels, h, w]`.
    ///
    /// # Errors
    /// When the executor fails.
    pub(crate) fn enter(&self, sample: &Tensor) -> Result<Tensor> {
        if self.center_input {
            return self.conv_in.forward(&ops::affine(sample, 2.0, -1.0)?);
        }
        self.conv_in.forward(sample)
    }

    /// Down from `x`; every resnet and every downsampler leaves a skip, and `x` is the first. `features` are added where a level's blocks end.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub(crate) fn descend(
        &self,
        mut x: Tensor,
        given: &Given<'_>,
        features: &[Tensor],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let mut skips = vec![x.clone()];
        for (i, block) in self.down.iter().enumerate() {
            x = block.forward(x, (given, features.get(i)), &mut skips)?;
        }
        Ok((x, skips))
    }

    /// The middle.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub(crate) fn turn(&self, x: Tensor, given: &Given<'_>) -> Result<Tensor> {
        match &self.mid {
            Some(mid) => mid.forward(&x, given),
            None => Ok(x),
        }
    }
    /// How much the middle's pixels are looked at by each other when `x` enters it, `[b, 1, h, w]`; nothing without a transformer.
    ///
    /// # Errors
    /// When the executor fails.
    pub(super) fn mass(&self, x: &Tensor, given: &Given<'_>) -> Result<Option<Tensor>> {
        match &self.mid {
            Some(mid) => mid.mass(x, given),
            None => Ok(None),
        }
    }

    /// The row of a class, `[time width]`; none where there are no classes, or not so many.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub(super) fn label(&self, class: usize) -> Result<Option<Vec<f32>>> {
        let Some(table) = &self.class_embedding else {
            return Ok(None);
        };
        let rows = table.numbers()?;
        let row = rows.chunks_exact(self.time_width.max(1)).nth(class);
        Ok(row.map(<[f32]>::to_vec))
    }

    pub(super) fn transformers(&self) -> impl Iterator<Item = &Transformer> {
        let down = self.down.iter().flat_map(DownBlock::transformers);
        down.chain(self.mid.iter().flat_map(MidBlock::transformers))
    }
}
