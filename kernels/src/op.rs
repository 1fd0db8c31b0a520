//! The operations as values: what they are called, what shapes they take and give, and what they cost.

use crate::{Error, Param, Result};

/// A pointwise non-linearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`, also called swish.
    Silu,
    /// Exact: `x/2 · (1 + erf(x/√2))`.
    Gelu,
    /// `x · sigmoid(1.702 x)`, as OpenAI's CLIP uses.
    QuickGelu,
    /// `x · tanh(softplus(x))`.
    Mish,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// Reads the names that diffusers and transformers configs use.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "silu" | "swish" => Self::Silu,
            "gelu" => Self::Gelu,
            "quick_gelu" => Self::QuickGelu,
            "mish" => Self::Mish,
            "relu" => Self::Relu,
            _ => return None,
        })
    }
}

/// Zeros around a picture before a convolution, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Padding {
    /// Left of and above the picture.
    pub before: usize,
    /// Right of and below the picture.
    pub after: usize,
}

impl Padding {
    /// The same on every side.
    pub const fn same(pixels: usize) -> Self {
        Self {
            before: pixels,
            after: pixels,
        }
    }
}

/// One operation with its weights and constants; its tensor inputs come beside it.
#[derive(Debug, Clone)]
#[allow(missing_docs)] // the fields are named as in the module table of `lib.rs`
pub enum Op {
    /// Cross-correlation as `torch.nn.Conv2d`; weight `[o, i, k, k]`, bias `[o]`.
    Conv2d {
        weight: Param,
        bias: Option<Param>,
        stride: usize,
        padding: Padding,
    },
    /// `x · Wᵀ + bias`; weight `[o, i]`, bias `[o]`.
    Linear { weight: Param, bias: Option<Param> },
    /// Normalises each of `groups` channel groups of each picture, then scales, shifts and activates.
    GroupNorm {
        weight: Param,
        bias: Param,
        groups: usize,
        eps: f64,
        activation: Option<Activation>,
    },
    /// Normalises the last axis, then scales and shifts.
    LayerNorm {
        weight: Param,
        bias: Param,
        eps: f64,
    },
    /// `softmax(q kᵀ / √d) v` in each of `heads` slices of the last axis; `causal`: a position sees itself and what is before it.
    Attention { heads: usize, causal: bool },
    /// First half × gelu(second half), exact gelu (Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202).
    Geglu,
    /// A pointwise non-linearity.
    Activate(Activation),
    /// Sum of two tensors of one shape.
    Add,
    /// Adds a value a channel: `[b, c, h, w] + [b, c]`.
    AddChannels,
    /// `x · (1 + scale) + shift` with `[b, 2c] = scale ‖ shift`.
    ScaleShift,
    /// `x · scale + shift`.
    Affine { scale: f64, shift: f64 },
    /// Joins along the channels.
    Concat,
    /// Nearest-neighbour resampling to `h × w`: pixel `(y, x)` reads `(⌊y·H/h⌋, ⌊x·W/w⌋)`.
    Upsample { h: usize, w: usize },
    /// `[b, c, h, w]` → `[b, h·w, c]`.
    Flatten,
    /// `[b, h·w, c]` → `[b, c, h, w]`.
    Unflatten { h: usize, w: usize },
    /// The timestep's sinusoids, computed in f32 (Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239).
    Sinusoid {
        width: usize,
        flip_sin_to_cos: bool,
        freq_shift: f64,
    },
    /// Rows of a table `[vocabulary, c]`.
    Embed { table: Param },
    /// Adds the first `s` rows of a table `[positions, c]`.
    AddPositions { table: Param },
}

/// The kinds of layers that a cost report tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerClass {
    /// Convolutions with a kernel larger than one pixel.
    Conv3x3,
    /// Linear layers and 1×1 convolutions.
    Linear,
    /// The two products of attention.
    Attention,
    /// Group and layer norms with their activations.
    Norm,
    /// Everything else: additions, joins, activations, embeddings.
    Other,
}

impl LayerClass {
    /// All classes, in the order of reports.
    pub const ALL: [Self; 5] = [
        Self::Conv3x3,
        Self::Linear,
        Self::Attention,
        Self::Norm,
        Self::Other,
    ];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Conv3x3 => "conv3x3",
            Self::Linear => "linear",
            Self::Attention => "attention",
            Self::Norm => "norm",
            Self::Other => "other",
        }
    }
}

impl Op {
    /// The operation's name in messages and plans.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Conv2d { .. } => "conv2d",
            Self::Linear { .. } => "linear",
            Self::GroupNorm { .. } => "group_norm",
            Self::LayerNorm { .. } => "layer_norm",
            Self::Attention { .. } => "attention",
            Self::Geglu => "geglu",
            Self::Activate(_) => "activate",
            Self::Add => "add",
            Self::AddChannels => "add_channels",
            Self::ScaleShift => "scale_shift",
            Self::Affine { .. } => "affine",
            Self::Concat => "concat",
            Self::Upsample { .. } => "upsample",
            Self::Flatten => "flatten",
            Self::Unflatten { .. } => "unflatten",
            Self::Sinusoid { .. } => "sinusoid",
            Self::Embed { .. } => "embed",
            Self::AddPositions { .. } => "add_positions",
        }
    }

    /// The class under which the operation's time and work are counted.
    pub fn class(&self) -> LayerClass {
        match self {
            Self::Conv2d { weight, .. } if weight.shape()[2..] != [1, 1] => LayerClass::Conv3x3,
            Self::Conv2d { .. } | Self::Linear { .. } => LayerClass::Linear,
            Self::Attention { .. } => LayerClass::Attention,
            Self::GroupNorm { .. } | Self::LayerNorm { .. } => LayerClass::Norm,
            _ => LayerClass::Other,
        }
    }

    /// Every weight that the operation reads.
    pub fn params(&self) -> Vec<&Param> {
        match self {
            Self::Conv2d { weight, bias, .. } | Self::Linear { weight, bias } => {
                std::iter::once(weight).chain(bias).collect()
            }
            Self::GroupNorm { weight, bias, .. } | Self::LayerNorm { weight, bias, .. } => {
                vec![weight, bias]
            }
            Self::Embed { table } | Self::AddPositions { table } => vec![table],
            _ => Vec::new(),
        }
    }

    /// The shape of the result for inputs of these shapes.
    ///
    /// # Errors
    /// [`Error::Shape`] when the inputs do not fit the operation.
    pub fn shape(&self, inputs: &[&[usize]]) -> Result<Vec<usize>> {
        let wrong = |expected: String| Error::Shape {
            op: self.name(),
            expected,
            got: inputs
                .iter()
                .map(|s| format!("{s:?}"))
                .collect::<Vec<_>>()
                .join(", "),
        };
        match (self, inputs) {
            (
                Self::Conv2d {
                    weight,
                    stride,
                    padding,
                    ..
                },
                [[b, c, h, w]],
            ) => {
                let [o, i, kh, kw] = *weight.shape() else {
                    return Err(wrong(format!("a weight of rank 4, not {weight}")));
                };
                let out = |size: usize, kernel: usize| {
                    (size + padding.before + padding.after)
                        .checked_sub(kernel)
                        .map(|n| n / stride + 1)
                };
                match (out(*h, kh), out(*w, kw)) {
                    (Some(oh), Some(ow)) if i == *c => Ok(vec![*b, o, oh, ow]),
                    _ => Err(wrong(format!("[b, {i}, ≥ {kh}, ≥ {kw}] for {weight}"))),
                }
            }
            (Self::Linear { weight, .. }, [x]) => match (weight.shape(), x.split_last()) {
                ([o, i], Some((last, rest))) if i == last => {
                    Ok(rest.iter().chain([o]).copied().collect())
                }
                ([_, i], _) => Err(wrong(format!("[.., {i}] for {weight}"))),
                _ => Err(wrong(format!("a weight of rank 2, not {weight}"))),
            },
            (Self::GroupNorm { groups, weight, .. }, [x @ [_, c, _, _]])
                if *groups > 0 && c % groups == 0 && weight.shape() == [*c] =>
            {
                Ok(x.to_vec())
            }
            (Self::GroupNorm { groups, weight, .. }, _) => Err(wrong(format!(
                "[b, c, h, w] with c = {:?} divisible by {groups} groups",
                weight.shape()
            ))),
            (Self::LayerNorm { weight, .. }, [x]) if x.last() == weight.shape().first() => {
                Ok(x.to_vec())
            }
            (Self::Attention { heads, .. }, [[b, s, c], [bk, t, ck], v])
                if b == bk && c == ck && *v == [*bk, *t, *ck] && *heads > 0 && c % heads == 0 =>
            {
                Ok(vec![*b, *s, *c])
            }
            (Self::Attention { heads, .. }, _) => Err(wrong(format!(
                "q [b, s, c], k and v [b, t, c] with c divisible by {heads} heads"
            ))),
            (Self::Geglu, [x]) if x.last().is_some_and(|c| c % 2 == 0) => {
                let mut shape = x.to_vec();
                if let Some(c) = shape.last_mut() {
                    *c /= 2;
                }
                Ok(shape)
            }
            (Self::Activate(_) | Self::Affine { .. }, [x]) => Ok(x.to_vec()),
            (Self::Add, [x, y]) if x == y => Ok(x.to_vec()),
            (Self::AddChannels, [x @ [b, c, _, _], [tb, tc]]) if b == tb && c == tc => {
                Ok(x.to_vec())
            }
            (Self::ScaleShift, [x @ [b, c, _, _], [tb, tc]]) if b == tb && 2 * c == *tc => {
                Ok(x.to_vec())
            }
            (Self::Concat, [[b, c, h, w], [b2, d, h2, w2]]) if (b, h, w) == (b2, h2, w2) => {
                Ok(vec![*b, c + d, *h, *w])
            }
            (Self::Upsample { h, w }, [[b, c, _, _]]) => Ok(vec![*b, *c, *h, *w]),
            (Self::Flatten, [[b, c, h, w]]) => Ok(vec![*b, h * w, *c]),
            (Self::Unflatten { h, w }, [[b, s, c]]) if *s == h * w => Ok(vec![*b, *c, *h, *w]),
            (Self::Sinusoid { width, .. }, [[b]]) => Ok(vec![*b, *width]),
            (Self::Embed { table }, [[b, s]]) if table.shape().len() == 2 => {
                Ok(vec![*b, *s, table.shape()[1]])
            }
            (Self::AddPositions { table }, [x @ [_, s, c]])
                if table.shape().len() == 2 && *s <= table.shape()[0] && *c == table.shape()[1] =>
            {
                Ok(x.to_vec())
            }
            _ => Err(wrong(
                "inputs of the shapes in the table of operations".to_owned(),
            )),
        }
    }

    /// Floating-point operations for inputs of these shapes: two a multiply-add of products, a handful an element elsewhere.
    pub fn flop(&self, inputs: &[&[usize]], output: &[usize]) -> u64 {
        let count = |shape: &[usize]| shape.iter().map(|&n| n as u64).product::<u64>();
        let elements = count(output);
        match self {
            Self::Conv2d { weight, .. } => 2 * elements * count(&weight.shape()[1..]),
            Self::Linear { weight, .. } => 2 * elements * weight.shape()[1] as u64,
            Self::Attention { .. } => 4 * elements * inputs[1][1] as u64,
            Self::GroupNorm { .. } | Self::LayerNorm { .. } => 8 * elements,
            Self::Flatten | Self::Unflatten { .. } | Self::Concat | Self::Upsample { .. } => 0,
            _ => elements,
        }
    }
}
