//! The transformer of FLUX.1 (Black Forest Labs, "FLUX.1 Kontext", arXiv 2506.15742; diffusers 0.42.1 `FluxTransformer2DModel`).
//!
//! In: latents `[b, in_channels, h, w]`; timestep `[b]`, 0 to 1000; text states `[b, t, context]`; whole texts' vectors `[b, pooled]`; for dev the
//! sinusoids of its guidance `[b, 256]`; for Kontext another picture's latents `[b, in_channels, h', w']`.
//! Out: the velocity, noise − picture, `[b, out_channels, h, w]`.

mod config;
mod positions;

pub use config::Config;

use sd_kernels::ops::{self, apply};
use sd_kernels::{Activation, Error, Op, PatchOrder, Result, Tensor, Turns, Weights};

use crate::denoiser::Inputs;
use crate::layers::{
    FinalLayer, JointBlock, JointConfig, JointKind, Linear, Modulation, Projections,
    TimeTextEmbedding, modulated,
};
use config::PATCH;

/// The network.
pub struct Flux {
    config: Config,
    embedder: Linear,
    time_text: TimeTextEmbedding,
    context_embedder: Linear,
    blocks: Vec<JointBlock>,
    single_blocks: Vec<SingleBlock>,
    last: FinalLayer,
}

impl Flux {
    /// Asks for every weight of the network; [`Weights::finish`] tells whether all were there.
    pub fn load(weights: &Weights, config: &Config) -> Self {
        let width = config.joint.width;
        let blocks = weights.at("transformer_blocks");
        let single = weights.at("single_transformer_blocks");
        Self {
            embedder: Linear::load(&weights.at("x_embedder"), config.in_width, width),
            time_text: TimeTextEmbedding::load(
                &weights.at("time_text_embed"),
                (config.pooled, width),
                config.guidance,
            ),
            context_embedder: Linear::load(&weights.at("context_embedder"), config.context, width),
            blocks: (0..config.layers)
                .map(|i| JointBlock::load(&blocks.at(i), config.joint, JointKind::default()))
                .collect(),
            single_blocks: (0..config.single_layers)
                .map(|i| SingleBlock::load(&single.at(i), config.joint))
                .collect(),
            last: FinalLayer::load(weights, width, config.out_width),
            config: config.clone(),
        }
    }

    /// The network's structure.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// One prediction `[b, out_channels, h, w]`.
    ///
    /// # Errors
    /// When the shapes do not fit, an input is missing or the executor fails.
    pub fn forward(&self, inputs: &Inputs<'_>) -> Result<Tensor> {
        // 1. tokens of 2×2 latents, and their places
        let [_, _, h, w] = *inputs.sample.shape() else {
            return Err(Error::Shape {
                op: "x_embedder",
                expected: "latents [b, c, h, w]".to_owned(),
                got: format!("{:?}", inputs.sample.shape()),
            });
        };
        let (h, w) = (h / PATCH, w / PATCH);
        let packed = apply(Op::Patchify { patch: PATCH }, &[inputs.sample])?;
        let mut x = self.embedder.forward(&packed)?; // [b, s, width]
        let mut behind = (0, 0);
        if let Some(reference) = inputs.reference {
            // another picture's tokens stand behind (FLUX.1 Kontext)
            let packed = apply(Op::Patchify { patch: PATCH }, &[reference])?;
            x = ops::join(&x, &self.embedder.forward(&packed)?)?; // [b, s + r, width]
            let (_, _, h, w) = reference.dims4()?;
            behind = (h / PATCH, w / PATCH);
        }
        let length = inputs.context.shape().get(1).copied().unwrap_or(0);
        let turns = positions::turns(&self.config.axes, length, (h, w), behind);

        // 2. time, guidance and text
        let temb = self
            .time_text
            .forward(inputs.timestep, inputs.added, inputs.guidance)?;
        let mut context = self.context_embedder.forward(inputs.context)?; // [b, t, width]

        // 3. blocks of two streams, then of one
        for block in &self.blocks {
            (x, context) = block.forward((&x, &context), &temb, Some(&turns))?;
        }
        let mut x = ops::join(&context, &x)?; // [b, t + s, width]
        let turns = positions::joined(&turns);
        for block in &self.single_blocks {
            x = block.forward(&x, &temb, &turns)?;
        }

        // 4. out
        let x = ops::tokens(&x, length, h * w)?;
        let unpatchify = Op::Unpatchify {
            h,
            w,
            patch: PATCH,
            order: PatchOrder::ChannelsFirst,
        };
        apply(unpatchify, &[&self.last.forward(&x, &temb)?])
    }
}

/// Attention and feed-forward side by side over both streams in one.
struct SingleBlock {
    config: JointConfig,
    modulation: Modulation,
    projections: Projections,
    up: Linear,
    out: Linear,
}

impl SingleBlock {
    fn load(weights: &Weights, config: JointConfig) -> Self {
        let width = config.width;
        let names = ["to_q", "to_k", "to_v", "norm_q", "norm_k"];
        Self {
            config,
            modulation: Modulation::load(&weights.at("norm"), width, 3),
            projections: Projections::load(&weights.at("attn"), config, names),
            up: Linear::load(&weights.at("proj_mlp"), width, 4 * width),
            out: Linear::load(&weights.at("proj_out"), 5 * width, width),
        }
    }

    fn forward(&self, x: &Tensor, temb: &Tensor, turns: &Turns) -> Result<Tensor> {
        let values = self.modulation.forward(temb)?;
        let normed = modulated(x, &values, (0, 1))?;
        let qkv = self.projections.forward(&normed, Some(turns))?;
        let seen = qkv.attend(self.config.heads)?;
        let up = ops::activate(&self.up.forward(&normed)?, Activation::GeluTanh)?;
        let out = self.out.forward(&ops::concat(&seen, &up)?)?;
        ops::add(x, &ops::gate(&out, &values, 2)?)
    }
}
