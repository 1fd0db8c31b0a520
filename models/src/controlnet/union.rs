//! How one ControlNet serves hints of several kinds: it is told the kind beside the time, and a small transformer looks at what the hint is like
//! as a whole.

use sd_kernels::ops::{self, apply};
use sd_kernels::{Activation, Op, Param, Result, Tensor, Weights};

use super::{ControlNet, Union};
use crate::layers::{Embedding, LayerNorm, Linear, mean};

/// Epsilon of the layer norms.
const EPS: f64 = 1e-5;

/// What a union has beside an ordinary ControlNet.
pub(super) struct Kinds {
    add_embedding: Embedding,
    /// `[kinds, width]`.
    tasks: Param,
    layers: Vec<Layer>,
    project: Linear,
}

impl Kinds {
    pub(super) fn load(weights: &Weights, union: Union, (first, time): (usize, usize)) -> Self {
        let input = union.kinds.saturating_mul(union.number);
        Self {
            // diffusers gives this embedding SiLU, whatever the config's activation
            add_embedding: Embedding::load(
                &weights.at("control_add_embedding"),
                (input, time),
                Activation::Silu,
            ),
            tasks: weights.param("task_embedding", &[union.kinds, union.width]),
            // the name is theirs
            layers: (0..union.layers)
                .map(|i| Layer::load(&weights.at("transformer_layes").at(i), union))
                .collect(),
            project: Linear::load(&weights.at("spatial_ch_projs"), union.width, first),
        }
    }

    /// The kinds' sinusoids `[b, kinds · number]` → `[b, time]`.
    pub(super) fn embed(&self, sinusoids: &Tensor) -> Result<Tensor> {
        self.add_embedding.forward(sinusoids)
    }

    /// The embedded hint `[b, c, h, w]` of `kind`, and a value a channel on top of it that follows from what it is like as a whole.
    pub(super) fn fuse(&self, hint: &Tensor, kind: usize) -> Result<Tensor> {
        let (_, _, h, w) = hint.dims4()?;
        let task = Op::AddPositions {
            table: self.tasks.clone(),
            rows: Some(vec![kind].into()),
        };
        let mut token = apply(task, &[&mean(hint)?])?; // [b, 1, c]
        for layer in &self.layers {
            token = layer.forward(&token)?;
        }
        let alpha = self.project.forward(&token)?; // [b, 1, c]
        let alpha = ops::upsample(&ops::unflatten(&alpha, 1, 1)?, h, w)?;
        ops::add(hint, &alpha)
    }
}

impl ControlNet {
    /// The sinusoids of a hint of `kind`, `[1, kinds · number]`: ones and zeros, embedded as numbers are.
    ///
    /// # Errors
    /// When the executor fails.
    pub fn embed_kind(&self, kind: usize) -> Result<Option<Tensor>> {
        let Some(union) = self.config.union else {
            return Ok(None);
        };
        let ones = (0..union.kinds).map(|i| f32::from(u8::from(i == kind)));
        let ones: Vec<f32> = ones.collect();
        let device = candle_core::Device::Cpu;
        let ones = candle_core::Tensor::new(ones, &device)?;
        let time = &self.config.trunk.time;
        let sinusoid = Op::Sinusoid {
            width: union.number,
            flip_sin_to_cos: time.flip_sin_to_cos,
            freq_shift: time.freq_shift,
        };
        let embedded = apply(sinusoid, &[&ones.into()])?.into_data()?;
        Ok(Some(embedded.flatten_all()?.unsqueeze(0)?.into()))
    }
}

/// A block of OpenAI's CLIP.
///
/// Its attention was meant to let the hint's token and the latents' look at each other. The code that the networks were trained with, and diffusers,
/// give it the axes the other way round: a token looks at the same token of the other pictures of a batch. So a picture alone sees itself, with all
/// of the weight: what is seen are the values, and neither queries nor keys nor the latents' token make a difference.
struct Layer {
    norm1: LayerNorm,
    value: Linear,
    out: Linear,
    norm2: LayerNorm,
    up: Linear,
    down: Linear,
}

impl Layer {
    fn load(weights: &Weights, union: Union) -> Self {
        let c = union.width;
        let norm = |name| LayerNorm::load(&weights.at(name), c, EPS);
        let attention = weights.at("attn");
        let linear = |name| Linear::load(&attention.at(name), c, c);
        Self {
            norm1: norm("ln_1"),
            value: linear("to_v"),
            out: linear("out_proj"),
            norm2: norm("ln_2"),
            up: Linear::load(&weights.at("mlp.c_fc"), c, 4 * c),
            down: Linear::load(&weights.at("mlp.c_proj"), 4 * c, c),
        }
    }

    /// `x [b, 1, c]` → same.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let seen = self.value.forward(&self.norm1.forward(x)?)?;
        let x = ops::add(x, &self.out.forward(&seen)?)?;
        let h = self.up.forward(&self.norm2.forward(&x)?)?;
        let h = self
            .down
            .forward(&ops::activate(&h, Activation::QuickGelu)?)?;
        ops::add(&x, &h)
    }
}
