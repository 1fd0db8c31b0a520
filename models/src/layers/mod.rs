//! The shared vocabulary of the networks: small layers that own their weights.

mod attention;
mod joint;
mod resnet;
mod time_text;

pub use attention::{Attention, FeedForward};
pub use joint::{
    FinalLayer, JointBlock, JointConfig, JointKind, JointTurns, Modulation, Projections, Qkv,
    modulated,
};
pub use resnet::{Downsample, ResnetBlock, ResnetConfig, Upsample};
pub use time_text::{SINUSOIDS, TimeTextEmbedding, sinusoids};

use sd_kernels::ops::{self, apply};
use sd_kernels::{Activation, Error, Op, Padding, Param, Result, Tensor, Weights, Wrap};

/// `torch.nn.Conv2d`: `[b, i, h, w]` → `[b, o, h', w']`.
pub struct Conv2d {
    op: Op,
}

impl Conv2d {
    /// A convolution with a bias; `kernel` pixels wide and high.
    pub fn load(
        weights: &Weights,
        (input, output): (usize, usize),
        kernel: usize,
        stride: usize,
        padding: Padding,
    ) -> Self {
        Self {
            op: Op::Conv2d {
                weight: weights.param("weight", &[output, input, kernel, kernel]),
                bias: Some(weights.param("bias", &[output])),
                stride,
                padding,
                wrap: Wrap::default(),
            },
        }
    }

    /// A 3×3 convolution that keeps the size.
    pub fn load3x3(weights: &Weights, channels: (usize, usize)) -> Self {
        Self::load(weights, channels, 3, 1, Padding::same(1))
    }

    /// A 1×1 convolution.
    pub fn load1x1(weights: &Weights, channels: (usize, usize)) -> Self {
        Self::load(weights, channels, 1, 1, Padding::same(0))
    }

    /// Convolves `x [b, i, h, w]`.
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        apply(self.op.clone(), &[x])
    }
}

/// `torch.nn.Linear`: `[.., i]` → `[.., o]`.
pub struct Linear {
    weight: Param,
    bias: Option<Param>,
}

impl Linear {
    /// A linear layer with a bias.
    pub fn load(weights: &Weights, input: usize, output: usize) -> Self {
        Self {
            bias: Some(weights.param("bias", &[output])),
            ..Self::load_no_bias(weights, input, output)
        }
    }

    /// A linear layer without a bias.
    pub fn load_no_bias(weights: &Weights, input: usize, output: usize) -> Self {
        Self {
            weight: weights.param("weight", &[output, input]),
            bias: None,
        }
    }

    /// Multiplies `x [.., i]`.
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let op = Op::Linear {
            weight: self.weight.clone(),
            bias: self.bias.clone(),
        };
        apply(op, &[x])
    }
}

/// `torch.nn.GroupNorm`, with the activation that follows it.
pub struct GroupNorm {
    op: Op,
}

impl GroupNorm {
    /// Normalises `channels` in `groups`, then applies `activation`.
    pub fn load(
        weights: &Weights,
        channels: usize,
        groups: usize,
        eps: f64,
        activation: Option<Activation>,
    ) -> Self {
        Self {
            op: Op::GroupNorm {
                weight: weights.param("weight", &[channels]),
                bias: weights.param("bias", &[channels]),
                groups,
                eps,
                activation,
            },
        }
    }

    /// Normalises `x [b, c, h, w]`.
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        apply(self.op.clone(), &[x])
    }
}

/// `torch.nn.LayerNorm` over the last axis.
pub struct LayerNorm {
    op: Op,
}

impl LayerNorm {
    /// Normalises vectors of `width` elements.
    pub fn load(weights: &Weights, width: usize, eps: f64) -> Self {
        Self {
            op: Op::LayerNorm {
                weight: weights.param("weight", &[width]),
                bias: weights.param("bias", &[width]),
                eps,
            },
        }
    }

    /// Normalises `x [.., width]`.
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        apply(self.op.clone(), &[x])
    }
}

/// The timestep as sinusoids and two linear layers (diffusers `Timesteps` + `TimestepEmbedding`).
pub struct TimeEmbedding {
    sinusoid: Op,
    /// Of what is known beside the time: a distilled guidance.
    condition: Option<Linear>,
    embedding: Embedding,
}

/// Two linear layers with an activation between them (diffusers `TimestepEmbedding`, Flux's `MLPEmbedder`).
pub struct Embedding {
    linear_1: Linear,
    linear_2: Linear,
    activation: Activation,
}

impl Embedding {
    /// Reads `linear_1` and `linear_2`.
    pub fn load(
        weights: &Weights,
        (input, output): (usize, usize),
        activation: Activation,
    ) -> Self {
        Self {
            linear_1: Linear::load(&weights.at("linear_1"), input, output),
            linear_2: Linear::load(&weights.at("linear_2"), output, output),
            activation,
        }
    }

    /// `x [b, input]` → `[b, output]`.
    ///
    /// # Errors
    /// When the executor fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.linear_1.forward(x)?; // [b, output]
        self.linear_2.forward(&ops::activate(&x, self.activation)?)
    }
}

/// What a [`TimeEmbedding`] needs to know.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TimeConfig {
    /// Width of the sinusoids.
    pub input: usize,
    /// Width of the embedding.
    pub output: usize,
    /// Cosines first, as in every Stable Diffusion.
    pub flip_sin_to_cos: bool,
    /// Shift in the frequencies' denominator; 0 in every Stable Diffusion.
    pub freq_shift: f64,
    /// Between the two linear layers.
    pub activation: Activation,
    /// Width of a vector that is added to the sinusoids (`time_cond_proj_dim`: the guidance of a latent consistency model).
    pub condition: Option<usize>,
}

impl TimeEmbedding {
    /// Reads `linear_1`, `linear_2` and, where the config has a condition, `cond_proj`.
    pub fn load(weights: &Weights, config: &TimeConfig) -> Self {
        Self {
            sinusoid: Op::Sinusoid {
                width: config.input,
                flip_sin_to_cos: config.flip_sin_to_cos,
                freq_shift: config.freq_shift,
            },
            condition: config
                .condition
                .map(|width| Linear::load_no_bias(&weights.at("cond_proj"), width, config.input)),
            embedding: Embedding::load(weights, (config.input, config.output), config.activation),
        }
    }

    /// Embeds timesteps `[b]` (0 to 999, fractions allowed) as `[b, output]`; `condition` is `[b, width]`.
    ///
    /// # Errors
    /// When there is a condition and the network takes none, or the other way round; when the executor fails.
    pub fn forward(&self, timestep: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        let x = apply(self.sinusoid.clone(), &[timestep])?; // [b, input]
        let x = match (&self.condition, condition) {
            (None, None) => x,
            (Some(project), Some(condition)) => ops::add(&x, &project.forward(condition)?)?,
            (project, _) => {
                return Err(Error::Shape {
                    op: "time_embedding",
                    expected: given(project.is_some()).to_owned(),
                    got: given(project.is_none()).to_owned(),
                });
            }
        };
        self.embedding.forward(&x)
    }
}

/// Every channel's mean over `x [b, c, h, w]`: `[b, 1, c]`.
///
/// # Errors
/// When the executor fails.
pub fn mean(x: &Tensor) -> Result<Tensor> {
    /// Channels of a head; any will do that kernels are good at.
    const WIDTH: usize = 64;
    let x = ops::flatten(x)?; // [b, h · w, c]
    let channels = x.shape().last().copied().unwrap_or(1);
    let heads = (1..=channels.div_ceil(WIDTH))
        .rev()
        .find(|n| channels.is_multiple_of(*n));
    // a query of zeros finds all pixels equally good
    let query = ops::affine(&ops::tokens(&x, 0, 1)?, 0.0, 0.0)?;
    ops::attention(&query, &x, &x, heads.unwrap_or(1), false)
}

/// The words for a missing or superfluous input.
pub(crate) fn given(there: bool) -> &'static str {
    if there {
        "a condition beside the timestep"
    } else {
        "none beside the timestep"
    }
}
