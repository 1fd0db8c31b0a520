//! Multi-head attention and the gated feed-forward of transformer blocks, under diffusers' names.

use sd_kernels::{Op, Result, Tensor, Weights, ops};

use super::Linear;

/// Self- or cross-attention with projections `to_q`, `to_k`, `to_v`, `to_out.0`.
pub struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    /// `width`: of the queries' sequence; `context`: of the keys' and values'; `bias`: whether q, k and v have one.
    pub fn load(weights: &Weights, width: usize, context: usize, heads: usize, bias: bool) -> Self {
        let project = |name: &str, input| {
            let weights = weights.at(name);
            if bias {
                Linear::load(&weights, input, width)
            } else {
                Linear::load_no_bias(&weights, input, width)
            }
        };
        Self {
            to_q: project("to_q", width),
            to_k: project("to_k", context),
            to_v: project("to_v", context),
            to_out: Linear::load(&weights.at("to_out.0"), width, width),
            heads,
        }
    }

    /// `x [b, s, width]` looks at `context [b, t, context width]`.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        self.forward_also([x, context, context], &|_, seen, _| Ok(seen))
    }

    /// The same, where queries `[b, s, width]`, keys and values `[b, t, context width]` are made of what is not the same, and `also` adds to what
    /// was seen, by the queries and the number of heads, before the last projection.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub fn forward_also(
        &self,
        [x, keys, values]: [&Tensor; 3],
        also: &dyn Fn(&Tensor, Tensor, usize) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let q = self.to_q.forward(x)?; // [b, s, width]
        let k = self.to_k.forward(keys)?; // [b, t, width]
        let v = self.to_v.forward(values)?; // [b, t, width]
        let y = ops::attention(&q, &k, &v, self.heads, false)?;
        self.to_out.forward(&also(&q, y, self.heads)?)
    }

    /// The same when every place sees itself alone.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub fn identity(&self, x: &Tensor) -> Result<Tensor> {
        self.to_out.forward(&self.to_v.forward(x)?)
    }

    /// How much each place of `keys [b, s, width]` is looked at by all of `x`: `[b, s, 1]`.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub fn mass(&self, x: &Tensor, keys: &Tensor) -> Result<Tensor> {
        let op = Op::AttentionMass { heads: self.heads };
        ops::apply(op, &[&self.to_q.forward(x)?, &self.to_k.forward(keys)?])
    }
}

/// Linear to twice four widths, GEGLU, linear back (diffusers `FeedForward`).
pub struct FeedForward {
    up: Linear,
    down: Linear,
}

impl FeedForward {
    /// Reads `net.0.proj` and `net.2`.
    pub fn load(weights: &Weights, width: usize) -> Self {
        Self {
            up: Linear::load(&weights.at("net.0.proj"), width, 8 * width),
            down: Linear::load(&weights.at("net.2"), 4 * width, width),
        }
    }

    /// `x [b, s, width]` → same.
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gated = ops::geglu(&self.up.forward(x)?)?; // [b, s, 4 · width]
        self.down.forward(&gated)
    }
}
