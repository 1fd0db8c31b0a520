//! CLIP's text tower: OpenAI's CLIP-L in Stable Diffusion 1, OpenCLIP-H in Stable Diffusion 2 (Radford et al., "Learning Transferable
//! Visual Models From Natural Language Supervision", arXiv 2103.00020; transformers 5.23 `CLIPTextModel`).
//!
//! In: token ids `[b, s]`. Out: text states `[b, s, width]`.

mod config;
mod vision;

pub use config::Config;
pub use vision::{VisionConfig, VisionEncoder};

use sd_kernels::{Activation, Result, Tensor, Weights, ops};

use crate::layers::{LayerNorm, Linear};

/// The text tower, without `text_model.` in front of its names.
pub struct TextEncoder {
    config: Config,
    tokens: sd_kernels::Param,
    positions: sd_kernels::Param,
    layers: Vec<Layer>,
    final_norm: LayerNorm,
    projection: Option<Linear>,
}

impl TextEncoder {
    /// Asks for every weight of the tower.
    pub fn load(weights: &Weights, config: &Config) -> Self {
        let table = |name, rows| {
            weights
                .at("embeddings")
                .at(name)
                .param("weight", &[rows, config.width])
        };
        Self {
            tokens: table("token_embedding", config.vocabulary),
            positions: table("position_embedding", config.positions),
            layers: (0..config.layers)
                .map(|i| Layer::load(&weights.at("encoder.layers").at(i), config, true))
                .collect(),
            final_norm: LayerNorm::load(&weights.at("final_layer_norm"), config.width, config.eps),
            projection: config.projection.map(|output| {
                Linear::load_no_bias(&weights.at("text_projection"), config.width, output)
            }),
            config: config.clone(),
        }
    }

    /// The tower's structure.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Text states of `ids [b, s]` behind all but the last `skip` layers, and the final norm: `[b, s, width]`.
    ///
    /// # Errors
    /// When an id or the length is out of range, or the executor fails.
    pub fn forward(&self, ids: &Tensor, skip: usize) -> Result<Tensor> {
        self.final_norm.forward(&self.hidden(ids, skip)?)
    }

    /// The same without the final norm, as Stable Diffusion XL reads them.
    ///
    /// # Errors
    /// As [`TextEncoder::forward`].
    pub fn hidden(&self, ids: &Tensor, skip: usize) -> Result<Tensor> {
        let x = ops::embed(ids, &self.tokens)?; // [b, s, width]
        let mut x = ops::add_positions(&x, &self.positions)?;
        for layer in &self.layers[..self.kept(skip)] {
            x = layer.forward(&x)?;
        }
        Ok(x)
    }

    /// What [`TextEncoder::hidden`] left out: the last `skip` layers of `states [b, s, width]`, and the final norm.
    ///
    /// # Errors
    /// When the executor fails.
    pub fn finish(&self, states: &Tensor, skip: usize) -> Result<Tensor> {
        let mut x = states.clone();
        for layer in &self.layers[self.kept(skip)..] {
            x = layer.forward(&x)?;
        }
        self.final_norm.forward(&x)
    }

    /// A whole text's vector, from the final state of its end token: `[b, 1, width]` → `[b, 1, projection]`. As it is for a tower
    /// without a projection.
    ///
    /// # Errors
    /// When the executor fails.
    pub fn project(&self, states: &Tensor) -> Result<Tensor> {
        match &self.projection {
            Some(projection) => projection.forward(states),
            None => Ok(states.clone()),
        }
    }

    fn kept(&self, skip: usize) -> usize {
        self.layers.len().saturating_sub(skip)
    }
}

/// Self-attention, causal in texts, and a plain feed-forward, each behind a norm and around a residual.
struct Layer {
    norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    heads: usize,
    causal: bool,
    norm2: LayerNorm,
    fc1: Linear,
    activation: Activation,
    fc2: Linear,
}

impl Layer {
    fn load(weights: &Weights, config: &Config, causal: bool) -> Self {
        let c = config.width;
        let norm = |name| LayerNorm::load(&weights.at(name), c, config.eps);
        let project = |name| Linear::load(&weights.at("self_attn").at(name), c, c);
        let mlp = weights.at("mlp");
        Self {
            norm1: norm("layer_norm1"),
            q_proj: project("q_proj"),
            k_proj: project("k_proj"),
            v_proj: project("v_proj"),
            out_proj: project("out_proj"),
            heads: config.heads,
            causal,
            norm2: norm("layer_norm2"),
            fc1: Linear::load(&mlp.at("fc1"), c, config.intermediate),
            activation: config.activation,
            fc2: Linear::load(&mlp.at("fc2"), config.intermediate, c),
        }
    }

    /// `x [b, s, width]` → same.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.norm1.forward(x)?;
        let (q, k, v) = (
            self.q_proj.forward(&h)?,
            self.k_proj.forward(&h)?,
            self.v_proj.forward(&h)?,
        );
        let h = ops::attention(&q, &k, &v, self.heads, self.causal)?;
        let x = ops::add(x, &self.out_proj.forward(&h)?)?;
        let h = self.fc1.forward(&self.norm2.forward(&x)?)?;
        let h = self.fc2.forward(&ops::activate(&h, self.activation)?)?;
        ops::add(&x, &h)
    }
}
