//! T5's encoder, the long text tower of Stable Diffusion 3 and FLUX (Raffel et al., "Exploring the Limits of Transfer Learning with a Unified
//! Text-to-Text Transformer", arXiv 1910.10683; transformers 5.23 `T5EncoderModel`).
//!
//! In: token ids `[b, s]`, of which all are seen, those that fill up too. Out: states `[b, s, width]`.

mod config;

pub use config::Config;

use sd_kernels::ops::{self, apply};
use sd_kernels::{Op, Param, Relative, Result, Tensor, Weights};

use crate::layers::Linear;

/// The encoder.
pub struct T5Encoder {
    config: Config,
    tokens: Param,
    layers: Vec<Layer>,
    final_norm: RmsNorm,
}

impl T5Encoder {
    /// Asks for every weight of the encoder.
    pub fn load(weights: &Weights, config: &Config) -> Self {
        let encoder = weights.at("encoder");
        // the first layer has the table of distances for all
        let relative = Relative {
            table: encoder
                .at("block.0.layer.0.SelfAttention.relative_attention_bias")
                .param("weight", &[config.buckets, config.heads]),
            max_distance: config.max_distance,
        };
        Self {
            tokens: weights
                .at("shared")
                .param("weight", &[config.vocabulary, config.width]),
            layers: (0..config.layers)
                .map(|i| Layer::load(&encoder.at("block").at(i), config, &relative))
                .collect(),
            final_norm: RmsNorm::load(&encoder.at("final_layer_norm"), config),
            config: config.clone(),
        }
    }

    /// The encoder's structure.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// States of `ids [b, s]`: `[b, s, width]`.
    ///
    /// # Errors
    /// When an id is out of range or the executor fails.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let mut x = ops::embed(ids, &self.tokens)?; // [b, s, width]
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        self.final_norm.forward(&x)
    }
}

struct RmsNorm {
    weight: Param,
    eps: f64,
}

impl RmsNorm {
    fn load(weights: &Weights, config: &Config) -> Self {
        Self {
            weight: weights.param("weight", &[config.width]),
            eps: config.eps,
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, eps) = (self.weight.clone(), self.eps);
        apply(Op::RmsNorm { weight, eps }, &[x])
    }
}

/// Self-attention and feed-forward, each behind a norm and around a residual.
struct Layer {
    norm1: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    attention: Op,
    norm2: RmsNorm,
    up: Linear,
    /// What the activated numbers are multiplied with.
    other: Option<Linear>,
    down: Linear,
    config: Config,
}

impl Layer {
    fn load(weights: &Weights, config: &Config, relative: &Relative) -> Self {
        let attention = weights.at("layer.0");
        let inner = config.heads * config.head;
        let project = |name| {
            Linear::load_no_bias(&attention.at("SelfAttention").at(name), config.width, inner)
        };
        let mlp = weights.at("layer.1");
        let dense = |name, input, output| {
            Linear::load_no_bias(&mlp.at("DenseReluDense").at(name), input, output)
        };
        let (width, wide) = (config.width, config.intermediate);
        let first = if config.gated { "wi_0" } else { "wi" };
        Self {
            norm1: RmsNorm::load(&attention.at("layer_norm"), config),
            q: project("q"),
            k: project("k"),
            v: project("v"),
            o: Linear::load_no_bias(&attention.at("SelfAttention.o"), inner, width),
            attention: Op::Attention {
                heads: config.heads,
                causal: false,
                relative: Some(relative.clone()),
            },
            norm2: RmsNorm::load(&mlp.at("layer_norm"), config),
            up: dense(first, width, wide),
            other: config.gated.then(|| dense("wi_1", width, wide)),
            down: dense("wo", wide, width),
            config: config.clone(),
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.norm1.forward(x)?;
        let (q, k, v) = (
            self.q.forward(&h)?,
            self.k.forward(&h)?,
            self.v.forward(&h)?,
        );
        let h = apply(self.attention.clone(), &[&q, &k, &v])?; // [b, s, inner]
        let x = ops::add(x, &self.o.forward(&h)?)?;
        let h = self.norm2.forward(&x)?;
        let up = ops::activate(&self.up.forward(&h)?, self.config.activation)?;
        let up = match &self.other {
            Some(other) => ops::multiply(&up, &other.forward(&h)?)?,
            None => up,
        };
        ops::add(&x, &self.down.forward(&up)?)
    }
}
