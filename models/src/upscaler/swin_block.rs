//! A block of attention within windows, of each of the three kinds.

use sd_kernels::ops::{self, activate, affine};
use sd_kernels::{Activation, Keys, Result, Tensor, Weights, WindowBias, Windows};

use super::swin::{EPS, SwinConfig, SwinKind};
use crate::layers::{Conv2d, LayerNorm, Linear};

/// How much of the convolutions' result HAT adds.
const SHARE: f64 = 0.01;

/// Attention within windows, and two linear layers.
pub(super) struct Block {
    norm1: LayerNorm,
    attention: Attention,
    norm2: LayerNorm,
    mlp: Mlp,
    /// Norms stand behind what they are for.
    behind: bool,
    /// Of HAT.
    beside: Option<Beside>,
}

impl Block {
    /// Block `i` of a group: odd ones have shifted windows.
    pub(super) fn load(weights: &Weights, config: &SwinConfig, (i, heads): (usize, usize)) -> Self {
        let (c, window) = (config.width, config.window);
        let shift = if i % 2 == 0 { 0 } else { window / 2 };
        let inside = weights.at("attn");
        let distances = 2 * window - 1;
        let (bias, cosine) = match config.kind {
            SwinKind::Second { positions } => {
                let mlp = inside.at("cpb_mlp");
                let bias = WindowBias::Learned {
                    distances: inside.param("relative_coords_table", &[distances, distances, 2]),
                    hidden: mlp.param("0.weight", &[positions, 2]),
                    shift: mlp.param("0.bias", &[positions]),
                    output: mlp.param("2.weight", &[heads, positions]),
                };
                (bias, Some(inside.param("logit_scale", &[heads])))
            }
            _ => (table(&inside, distances, heads), None),
        };
        let windows = Windows {
            heads,
            size: (0, 0),
            side: window,
            keys: Keys::Same { shift },
            bias,
            cosine,
        };
        Self {
            norm1: LayerNorm::load(&weights.at("norm1"), c, EPS),
            attention: Attention::load(&inside, config, windows),
            norm2: LayerNorm::load(&weights.at("norm2"), c, EPS),
            mlp: Mlp::load(&weights.at("mlp"), (c, config.hidden)),
            behind: matches!(config.kind, SwinKind::Second { .. }),
            beside: Beside::load(&weights.at("conv_block.cab"), config),
        }
    }

    /// `x [b, h · w, width]` → same.
    pub(super) fn forward(&self, x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
        if self.behind {
            let y = self.norm1.forward(&self.attention.forward(x, size)?)?;
            let x = ops::add(x, &y)?;
            let y = self.norm2.forward(&self.mlp.forward(&x)?)?;
            return ops::add(&x, &y);
        }
        let y = self.norm1.forward(x)?;
        let mut x = ops::add(x, &self.attention.forward(&y, size)?)?;
        if let Some(beside) = &self.beside {
            x = ops::add(&x, &beside.forward(&y, size)?)?;
        }
        let y = self.mlp.forward(&self.norm2.forward(&x)?)?;
        ops::add(&x, &y)
    }
}

/// HAT's look around at the end of a group.
pub(super) struct Overlap {
    norm1: LayerNorm,
    attention: Attention,
    norm2: LayerNorm,
    mlp: Mlp,
}

impl Overlap {
    /// None where the network has none.
    pub(super) fn load(weights: &Weights, config: &SwinConfig, heads: usize) -> Option<Self> {
        let SwinKind::Hybrid { beyond, .. } = config.kind else {
            return None;
        };
        let (c, window) = (config.width, config.window);
        let windows = Windows {
            heads,
            size: (0, 0),
            side: window,
            keys: Keys::Around { beyond },
            bias: table(weights, 2 * (window + beyond) - 1, heads),
            cosine: None,
        };
        Some(Self {
            norm1: LayerNorm::load(&weights.at("norm1"), c, EPS),
            attention: Attention::load(weights, config, windows),
            norm2: LayerNorm::load(&weights.at("norm2"), c, EPS),
            mlp: Mlp::load(&weights.at("mlp"), (c, config.hidden)),
        })
    }

    /// `x [b, h · w, width]` → same.
    pub(super) fn forward(&self, x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
        let y = self.attention.forward(&self.norm1.forward(x)?, size)?;
        let x = ops::add(x, &y)?;
        let y = self.mlp.forward(&self.norm2.forward(&x)?)?;
        ops::add(&x, &y)
    }
}

/// A row of biases for each distance of key and query.
fn table(weights: &Weights, distances: usize, heads: usize) -> WindowBias {
    let shape = [distances * distances, heads];
    WindowBias::Table(weights.param("relative_position_bias_table", &shape))
}

/// Projections and what is between them.
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    /// Of a picture whose size is not known yet.
    windows: Windows,
}

impl Attention {
    fn load(weights: &Weights, config: &SwinConfig, windows: Windows) -> Self {
        let c = config.width;
        let project = |name: &str, bias: bool| match bias {
            true => Linear::load(&weights.at(name), c, c),
            false => Linear::load_no_bias(&weights.at(name), c, c),
        };
        let second = matches!(config.kind, SwinKind::Second { .. });
        Self {
            q: project("q", config.bias),
            k: project("k", config.bias && !second),
            v: project("v", config.bias),
            out: Linear::load(&weights.at("proj"), c, c),
            windows,
        }
    }

    /// `x [b, h · w, width]` → same.
    fn forward(&self, x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
        let windows = Windows {
            size,
            ..self.windows.clone()
        };
        let (q, k, v) = (self.q.forward(x)?, self.k.forward(x)?, self.v.forward(x)?);
        self.out
            .forward(&ops::window_attention(&q, &k, &v, windows)?)
    }
}

/// Two linear layers.
struct Mlp {
    up: Linear,
    down: Linear,
}

impl Mlp {
    fn load(weights: &Weights, (c, hidden): (usize, usize)) -> Self {
        Self {
            up: Linear::load(&weights.at("fc1"), c, hidden),
            down: Linear::load(&weights.at("fc2"), hidden, c),
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = activate(&self.up.forward(x)?, Activation::Gelu)?; // [b, h · w, hidden]
        self.down.forward(&x)
    }
}

/// HAT's convolutions beside the attention, whose channels are weighed by their means (Zhang et al., arXiv 1807.02758).
struct Beside {
    narrow: Conv2d,
    wide: Conv2d,
    down: Linear,
    up: Linear,
}

impl Beside {
    fn load(weights: &Weights, config: &SwinConfig) -> Option<Self> {
        let SwinKind::Hybrid {
            squeezed, weighed, ..
        } = config.kind
        else {
            return None;
        };
        let c = config.width;
        Some(Self {
            narrow: Conv2d::load3x3(&weights.at(0), (c, squeezed)),
            wide: Conv2d::load3x3(&weights.at(2), (squeezed, c)),
            down: Linear::load(&weights.at("3.attention.1"), c, weighed),
            up: Linear::load(&weights.at("3.attention.3"), weighed, c),
        })
    }

    /// `x [b, h · w, width]` → same.
    fn forward(&self, x: &Tensor, (h, w): (usize, usize)) -> Result<Tensor> {
        let x = self.narrow.forward(&ops::unflatten(x, h, w)?)?; // [b, squeezed, h, w]
        let x = self.wide.forward(&activate(&x, Activation::Gelu)?)?; // [b, width, h, w]
        let factors = activate(&self.down.forward(&ops::means(&x)?)?, Activation::Relu)?;
        let factors = activate(&self.up.forward(&factors)?, Activation::Sigmoid)?; // [b, width]
        affine(&ops::gate(&ops::flatten(&x)?, &factors, 0)?, SHARE, 0.0)
    }
}
