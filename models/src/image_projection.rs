//! What an IP-Adapter makes of CLIP's picture states: a few tokens that cross-attention reads as if they were words (Ye et al., arXiv
//! 2308.06721; diffusers 0.42.1 `ImageProjection`, `IPAdapterPlusImageProjection`, `IPAdapterFullImageProjection`), under the files' names.

use sd_kernels::{Activation, Param, Result, Tensor, Weights, ops};

use crate::layers::{LayerNorm, Linear};

/// Width of an attention head of the resampler.
const HEAD: usize = 64;
/// Epsilon of the layer norms.
const EPS: f64 = 1e-5;

/// The structure of a projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Config {
    /// One linear layer from the picture's vector to all tokens.
    Plain {
        /// Width of the vector.
        input: usize,
        /// Tokens.
        tokens: usize,
        /// Width of a token.
        output: usize,
    },
    /// Two linear layers, state by state.
    Full {
        /// Width of the states.
        input: usize,
        /// Width between the layers.
        inner: usize,
        /// Width of a token.
        output: usize,
    },
    /// Learned queries that look at the states (Alayrac et al., "Flamingo", arXiv 2204.14198).
    Resampler {
        /// Width of the states.
        input: usize,
        /// Width inside.
        width: usize,
        /// Width of all heads' queries together.
        attention: usize,
        /// Width inside the feed-forward.
        intermediate: usize,
        /// Layers.
        layers: usize,
        /// Tokens.
        tokens: usize,
        /// Width of a token.
        output: usize,
    },
}

impl Config {
    /// Whether it reads the picture's vector, not the states.
    pub fn reads_vector(&self) -> bool {
        matches!(self, Self::Plain { .. })
    }

    /// Width of what it reads.
    pub fn input(&self) -> usize {
        match self {
            Self::Plain { input, .. }
            | Self::Full { input, .. }
            | Self::Resampler { input, .. } => *input,
        }
    }

    /// Width of a token.
    pub fn output(&self) -> usize {
        match self {
            Self::Plain { output, .. }
            | Self::Full { output, .. }
            | Self::Resampler { output, .. } => *output,
        }
    }
}

/// A projection.
pub enum ImageProjection {
    /// One linear layer a token, and the norm of all.
    Plain(Vec<Linear>, LayerNorm),
    /// Two linear layers and a norm.
    Full(Linear, Linear, LayerNorm),
    /// Queries, what goes in, layers, what comes out.
    Resampler(Box<Resampler>),
}

/// The parts of a resampler.
pub struct Resampler {
    queries: Param,
    tokens: usize,
    proj_in: Linear,
    layers: Vec<Layer>,
    proj_out: Linear,
    norm_out: LayerNorm,
}

struct Layer {
    norm_states: LayerNorm,
    norm_queries: LayerNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
    norm: LayerNorm,
    up: Linear,
    down: Linear,
}

impl ImageProjection {
    /// Asks for the weights of a projection.
    pub fn load(weights: &Weights, config: &Config) -> Self {
        let norm = |name: &str, width| LayerNorm::load(&weights.at(name), width, EPS);
        match *config {
            Config::Plain {
                input,
                tokens,
                output,
            } => {
                let linear = |i| Linear::load(&weights.at("proj").at(i), input, output);
                Self::Plain((0..tokens).map(linear).collect(), norm("norm", output))
            }
            Config::Full {
                input,
                inner,
                output,
            } => Self::Full(
                Linear::load(&weights.at("proj.0"), input, inner),
                Linear::load(&weights.at("proj.2"), inner, output),
                norm("proj.3", output),
            ),
            Config::Resampler {
                input,
                width,
                attention,
                intermediate,
                layers,
                tokens,
                output,
            } => Self::Resampler(Box::new(Resampler {
                queries: weights.param("latents", &[tokens, width]),
                tokens,
                proj_in: Linear::load(&weights.at("proj_in"), input, width),
                layers: (0..layers)
                    .map(|i| {
                        let weights = weights.at("layers").at(i);
                        Layer::load(&weights, (width, attention, intermediate))
                    })
                    .collect(),
                proj_out: Linear::load(&weights.at("proj_out"), width, output),
                norm_out: norm("norm_out", output),
            })),
        }
    }

    /// The picture's vector `[b, 1, input]` or states `[b, s, input]` → tokens `[b, t, output]`.
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain(linears, norm) => {
                let mut all: Option<Tensor> = None;
                for linear in linears {
                    let token = linear.forward(x)?; // [b, 1, output]
                    all = Some(match all {
                        Some(all) => ops::join(&all, &token)?,
                        None => token,
                    });
                }
                norm.forward(&all.unwrap_or_else(|| x.clone()))
            }
            Self::Full(up, down, norm) => {
                let h = ops::activate(&up.forward(x)?, Activation::Gelu)?;
                norm.forward(&down.forward(&h)?)
            }
            Self::Resampler(resampler) => resampler.forward(x),
        }
    }
}

impl Resampler {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let states = self.proj_in.forward(x)?; // [b, s, width]
        // as many zeros as there are queries, for each picture
        let nothing = ops::affine(&ops::tokens(&states, 0, 1)?, 0.0, 0.0)?;
        let nothing = ops::upsample(&ops::unflatten(&nothing, 1, 1)?, self.tokens, 1)?;
        let mut queries = ops::add_positions(&ops::flatten(&nothing)?, &self.queries)?;
        for layer in &self.layers {
            queries = layer.forward(&states, &queries)?;
        }
        self.norm_out.forward(&self.proj_out.forward(&queries)?)
    }
}

impl Layer {
    fn load(weights: &Weights, (width, attention, intermediate): (usize, usize, usize)) -> Self {
        let norm = |name: &str| LayerNorm::load(&weights.at(name), width, EPS);
        let linear = |name: &str, from, to| Linear::load_no_bias(&weights.at(name), from, to);
        Self {
            norm_states: norm("0.norm1"),
            norm_queries: norm("0.norm2"),
            to_q: linear("0.to_q", width, attention),
            to_k: linear("0.to_k", width, attention),
            to_v: linear("0.to_v", width, attention),
            to_out: linear("0.to_out", attention, width),
            heads: (attention / HEAD).max(1),
            norm: norm("1.0"),
            up: linear("1.1", width, intermediate),
            down: linear("1.3", intermediate, width),
        }
    }

    /// `states [b, s, width]`, `queries [b, t, width]` → `[b, t, width]`.
    fn forward(&self, states: &Tensor, queries: &Tensor) -> Result<Tensor> {
        let own = self.norm_queries.forward(queries)?;
        let seen = ops::join(&self.norm_states.forward(states)?, &own)?;
        let (q, k, v) = (
            self.to_q.forward(&own)?,
            self.to_k.forward(&seen)?,
            self.to_v.forward(&seen)?,
        );
        let y = ops::attention(&q, &k, &v, self.heads, false)?;
        let x = ops::add(&self.to_out.forward(&y)?, queries)?;
        let h = ops::activate(&self.up.forward(&self.norm.forward(&x)?)?, Activation::Gelu)?;
        ops::add(&self.down.forward(&h)?, &x)
    }
}
