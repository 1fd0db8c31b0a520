//! The transformer of Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206; diffusers 0.42.1 `SD3Transformer2DModel`).
//!
//! In: latents `[b, in_channels, h, w]`; timestep `[b]`, 0 to 1000; text states `[b, t, context]`; whole texts' vectors `[b, pooled]`.
//! Out: the velocity, noise − picture, `[b, out_channels, h, w]`.

mod config;

pub use config::Config;

use std::sync::Arc;

use sd_kernels::ops::{self, apply};
use sd_kernels::{Error, Op, Padding, Param, PatchOrder, Result, Tensor, Weights};

use crate::denoiser::Inputs;
use crate::layers::{Conv2d, FinalLayer, JointBlock, JointKind, Linear, TimeTextEmbedding};

/// The network.
pub struct Mmdit {
    config: Config,
    embedder: Conv2d,
    positions: Param,
    time_text: TimeTextEmbedding,
    context_embedder: Linear,
    blocks: Vec<JointBlock>,
    last: FinalLayer,
}

impl Mmdit {
    /// Asks for every weight of the network; [`Weights::finish`] tells whether all were there.
    pub fn load(weights: &Weights, config: &Config) -> Self {
        let width = config.joint.width;
        let place = weights.at("pos_embed");
        let kind = |i: usize| JointKind {
            last: i + 1 == config.layers,
            dual: config.dual.contains(&i),
        };
        Self {
            embedder: Conv2d::load(
                &place.at("proj"),
                (config.in_channels, width),
                config.patch,
                config.patch,
                Padding::same(0),
            ),
            positions: place.param("pos_embed", &[config.positions * config.positions, width]),
            time_text: TimeTextEmbedding::load(
                &weights.at("time_text_embed"),
                (config.pooled, width),
                false,
            ),
            context_embedder: Linear::load(&weights.at("context_embedder"), config.context, width),
            blocks: (0..config.layers)
                .map(|i| {
                    JointBlock::load(
                        &weights.at("transformer_blocks").at(i),
                        config.joint,
                        kind(i),
                    )
                })
                .collect(),
            last: FinalLayer::load(
                weights,
                width,
                config.patch * config.patch * config.out_channels,
            ),
            config: config.clone(),
        }
    }

    /// The network's structure.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// One prediction `[b, out_channels, h, w]`, without the blocks `skipped`.
    ///
    /// # Errors
    /// When the shapes do not fit, the picture is larger than the table of positions, an input is missing or the executor fails.
    pub fn forward(&self, inputs: &Inputs<'_>, skipped: &[usize]) -> Result<Tensor> {
        // 1. patches, with their places in the middle of the table
        let mut x = self.embedder.forward(inputs.sample)?; // [b, width, h / p, w / p]
        let [_, _, h, w] = *x.shape() else {
            return Err(self.too_large(x.shape()));
        };
        x = apply(Op::Flatten, &[&x])?; // [b, s, width]
        let positions = Op::AddPositions {
            table: self.positions.clone(),
            rows: Some(Arc::new(self.rows(h, w)?)),
        };
        x = apply(positions, &[&x])?;

        // 2. time and text
        let temb = self
            .time_text
            .forward(inputs.timestep, inputs.added, inputs.guidance)?;
        let mut context = self.context_embedder.forward(inputs.context)?; // [b, t, width]

        // 3. blocks
        for (i, block) in self.blocks.iter().enumerate() {
            if !skipped.contains(&i) {
                (x, context) = block.forward((&x, &context), &temb, None)?;
            }
        }

        // 4. out
        let unpatchify = Op::Unpatchify {
            h,
            w,
            patch: self.config.patch,
            order: PatchOrder::ChannelsLast,
        };
        ops::apply(unpatchify, &[&self.last.forward(&x, &temb)?])
    }

    /// The rows of the table that `h × w` patches take: its middle.
    fn rows(&self, h: usize, w: usize) -> Result<Vec<usize>> {
        let side = self.config.positions;
        if h > side || w > side {
            return Err(self.too_large(&[h, w]));
        }
        let (top, left) = ((side - h) / 2, (side - w) / 2);
        Ok((0..h)
            .flat_map(|y| (0..w).map(move |x| (top + y) * side + left + x))
            .collect())
    }

    fn too_large(&self, got: &[usize]) -> Error {
        Error::Shape {
            op: "pos_embed",
            expected: format!("at most {0} × {0} patches", self.config.positions),
            got: format!("{got:?}"),
        }
    }
}
