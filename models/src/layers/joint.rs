//! Blocks of diffusion transformers in which text and picture attend together (Esser et al., "Scaling Rectified Flow Transformers for
//! High-Resolution Image Synthesis", arXiv 2403.03206; diffusers 0.42.1 `JointTransformerBlock`, `FluxTransformerBlock`).
//!
//! Each of the two streams has its own weights; queries, keys and values of both stand behind each other for one attention. A vector made
//! of time and text shifts, scales and gates every part of a block; its places are counted in widths.

use sd_kernels::ops::{self, apply};
use sd_kernels::{Activation, Op, Param, Result, Tensor, Turns, Weights};

use super::Linear;

/// Of every norm of these blocks.
const EPS: f64 = 1e-6;

/// What the blocks of a network have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JointConfig {
    /// Numbers of a token.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Whether queries and keys are normalised head by head.
    pub qk_norm: bool,
}

/// The vector beside a block, made of time and text.
pub struct Modulation {
    linear: Linear,
}

impl Modulation {
    /// Reads `linear`, which makes `count` widths.
    pub fn load(weights: &Weights, width: usize, count: usize) -> Self {
        Self {
            linear: Linear::load(&weights.at("linear"), width, count * width),
        }
    }

    /// The activated embedding of time and text `[b, width]` → `[b, count · width]`.
    ///
    /// # Errors
    /// When the executor fails.
    pub fn forward(&self, temb: &Tensor) -> Result<Tensor> {
        self.linear.forward(temb)
    }
}

/// The norm without weights, shifted and scaled by places of `values`.
///
/// # Errors
/// When the shapes do not fit or the executor fails.
pub fn modulated(x: &Tensor, values: &Tensor, (shift, scale): (usize, usize)) -> Result<Tensor> {
    let eps = EPS;
    apply(Op::AdaptiveNorm { eps, shift, scale }, &[x, values])
}

/// Queries, keys and values of one stream.
pub struct Projections {
    q: Linear,
    k: Linear,
    v: Linear,
    /// Weights of the norms of queries and keys, as wide as a head.
    norms: Option<[Param; 2]>,
    heads: usize,
}

/// Queries, keys and values `[b, s, width]`.
pub struct Qkv {
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
}

impl Projections {
    /// `names` are those of the three layers and of the two norms.
    pub fn load(weights: &Weights, config: JointConfig, names: [&str; 5]) -> Self {
        let JointConfig { width, heads, .. } = config;
        let [q, k, v, norm_q, norm_k] = names;
        let linear = |name| Linear::load(&weights.at(name), width, width);
        let norm = |name| weights.at(name).param("weight", &[width / heads.max(1)]);
        Self {
            q: linear(q),
            k: linear(k),
            v: linear(v),
            norms: config.qk_norm.then(|| [norm(norm_q), norm(norm_k)]),
            heads,
        }
    }

    /// Of `x [b, s, width]`; queries and keys are turned where there are positions.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub fn forward(&self, x: &Tensor, turns: Option<&Turns>) -> Result<Qkv> {
        let finished = |x: Tensor, which: usize| -> Result<Tensor> {
            let x = match &self.norms {
                Some(norms) => {
                    let weight = norms[which].clone();
                    apply(Op::RmsNorm { weight, eps: EPS }, &[&x])?
                }
                None => x,
            };
            match turns {
                Some(turns) => {
                    let (heads, turns) = (self.heads, turns.clone());
                    apply(Op::Rotate { heads, turns }, &[&x])
                }
                None => Ok(x),
            }
        };
        Ok(Qkv {
            q: finished(self.q.forward(x)?, 0)?,
            k: finished(self.k.forward(x)?, 1)?,
            v: self.v.forward(x)?,
        })
    }
}

impl Qkv {
    /// This stream's tokens and then the other's.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub fn join(&self, behind: &Self) -> Result<Self> {
        Ok(Self {
            q: ops::join(&self.q, &behind.q)?,
            k: ops::join(&self.k, &behind.k)?,
            v: ops::join(&self.v, &behind.v)?,
        })
    }

    /// Every token looks at every other: `[b, s, width]`.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub fn attend(&self, heads: usize) -> Result<Tensor> {
        ops::attention(&self.q, &self.k, &self.v, heads, false)
    }
}

/// Linear to four widths, tanh-gelu, linear back (diffusers `FeedForward` with `gelu-approximate`).
struct Mlp {
    up: Linear,
    down: Linear,
}

impl Mlp {
    fn load(weights: &Weights, width: usize) -> Self {
        Self {
            up: Linear::load(&weights.at("net.0.proj"), width, 4 * width),
            down: Linear::load(&weights.at("net.2"), 4 * width, width),
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = ops::activate(&self.up.forward(x)?, Activation::GeluTanh)?;
        self.down.forward(&x)
    }
}

/// What follows the attention in a stream: projection, gate and residual, and the gated feed-forward.
struct Rest {
    out: Linear,
    mlp: Mlp,
}

impl Rest {
    fn load(weights: &Weights, width: usize, (out, mlp): (&str, &str)) -> Self {
        Self {
            out: Linear::load(&weights.at(out), width, width),
            mlp: Mlp::load(&weights.at(mlp), width),
        }
    }

    /// `x + gate · out(seen)`, and what a second attention adds, before the feed-forward.
    fn forward(
        &self,
        x: &Tensor,
        (seen, values): (&Tensor, &Tensor),
        second: Option<&Tensor>,
    ) -> Result<Tensor> {
        let mut x = ops::add(x, &ops::gate(&self.out.forward(seen)?, values, 2)?)?;
        if let Some(second) = second {
            x = ops::add(&x, second)?;
        }
        let y = self.mlp.forward(&modulated(&x, values, (3, 4))?)?;
        ops::add(&x, &ops::gate(&y, values, 5)?)
    }
}

/// The picture's own attention beside the joint one (Stable Diffusion 3.5 medium).
struct SelfAttention {
    projections: Projections,
    out: Linear,
}

/// How one block differs from the others of its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JointKind {
    /// Nothing reads the text's stream behind this block.
    pub last: bool,
    /// The picture attends to itself as well.
    pub dual: bool,
}

/// One joint block.
pub struct JointBlock {
    config: JointConfig,
    modulation: Modulation,
    context_modulation: Modulation,
    sample: Projections,
    context: Projections,
    rest: Rest,
    /// None in the last block.
    context_rest: Option<Rest>,
    second: Option<SelfAttention>,
}

/// Positions of the text's tokens and of the picture's.
pub struct JointTurns {
    /// The text's.
    pub context: Turns,
    /// The picture's.
    pub sample: Turns,
}

const SAMPLE: [&str; 5] = ["to_q", "to_k", "to_v", "norm_q", "norm_k"];
const CONTEXT: [&str; 5] = [
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "norm_added_q",
    "norm_added_k",
];

impl JointBlock {
    /// Asks for the weights of a block.
    pub fn load(weights: &Weights, config: JointConfig, kind: JointKind) -> Self {
        let width = config.width;
        let modulation = |name, count| Modulation::load(&weights.at(name), width, count);
        let attention = weights.at("attn");
        Self {
            config,
            modulation: modulation("norm1", if kind.dual { 9 } else { 6 }),
            context_modulation: modulation("norm1_context", if kind.last { 2 } else { 6 }),
            sample: Projections::load(&attention, config, SAMPLE),
            context: Projections::load(&attention, config, CONTEXT),
            rest: Rest::load(weights, width, ("attn.to_out.0", "ff")),
            context_rest: (!kind.last)
                .then(|| Rest::load(weights, width, ("attn.to_add_out", "ff_context"))),
            second: kind.dual.then(|| {
                let weights = weights.at("attn2");
                SelfAttention {
                    projections: Projections::load(&weights, config, SAMPLE),
                    out: Linear::load(&weights.at("to_out.0"), width, width),
                }
            }),
        }
    }

    /// Picture `[b, s, width]` and text `[b, t, width]`, by the activated embedding of time and text `[b, width]`; the text behind the last
    /// block is what it was.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub fn forward(
        &self,
        (x, context): (&Tensor, &Tensor),
        temb: &Tensor,
        turns: Option<&JointTurns>,
    ) -> Result<(Tensor, Tensor)> {
        let heads = self.config.heads;
        let values = self.modulation.forward(temb)?;
        let context_values = self.context_modulation.forward(temb)?;
        // the last block's norm of the text has scale and shift the other way round
        let places = match self.context_rest {
            Some(_) => (0, 1),
            None => (1, 0),
        };
        let normed = modulated(x, &values, (0, 1))?;
        let context_normed = modulated(context, &context_values, places)?;
        let own = self
            .context
            .forward(&context_normed, turns.map(|turns| &turns.context))?;
        let others = self
            .sample
            .forward(&normed, turns.map(|turns| &turns.sample))?;
        let seen = own.join(&others)?.attend(heads)?; // [b, t + s, width]
        let (t, s) = (context.shape()[1], x.shape()[1]);
        let second = match &self.second {
            Some(second) => {
                let normed = modulated(x, &values, (6, 7))?;
                let seen = second.projections.forward(&normed, None)?.attend(heads)?;
                Some(ops::gate(&second.out.forward(&seen)?, &values, 8)?)
            }
            None => None,
        };
        let of_sample = ops::tokens(&seen, t, s)?;
        let x = self
            .rest
            .forward(x, (&of_sample, &values), second.as_ref())?;
        let context = match &self.context_rest {
            Some(rest) => {
                let of_context = ops::tokens(&seen, 0, t)?;
                rest.forward(context, (&of_context, &context_values), None)?
            }
            None => context.clone(),
        };
        Ok((x, context))
    }
}

/// The last norm of a transformer, by scale and shift, and the layer to patches.
pub struct FinalLayer {
    modulation: Modulation,
    linear: Linear,
}

impl FinalLayer {
    /// Reads `norm_out` and `proj_out`.
    pub fn load(weights: &Weights, width: usize, output: usize) -> Self {
        Self {
            modulation: Modulation::load(&weights.at("norm_out"), width, 2),
            linear: Linear::load(&weights.at("proj_out"), width, output),
        }
    }

    /// `x [b, s, width]` → `[b, s, output]`.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub fn forward(&self, x: &Tensor, temb: &Tensor) -> Result<Tensor> {
        let values = self.modulation.forward(temb)?;
        self.linear.forward(&modulated(x, &values, (1, 0))?)
    }
}
