//! The operations as values: what they are called, what shapes they take and give, and what they cost.

use std::sync::Arc;

use crate::windows::Windows;
use crate::{Error, Param, Result};

/// A pointwise non-linearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`, also called swish.
    Silu,
    /// Exact: `x/2 · (1 + erf(x/√2))`.
    Gelu,
    /// The approximation `x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`.
    GeluTanh,
    /// `x · sigmoid(1.702 x)`, as OpenAI's CLIP uses.
    QuickGelu,
    /// `x · tanh(softplus(x))`.
    Mish,
    /// `max(x, 0)`.
    Relu,
    /// `x`, and below 0 a part of it.
    LeakyRelu {
        /// The part, in hundredths.
        percent: u8,
    },
    /// `1 / (1 + e⁻ˣ)`.
    Sigmoid,
}

impl Activation {
    /// Reads the names that diffusers and transformers configs use.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "silu" | "swish" => Self::Silu,
            "gelu" => Self::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu-approximate" => Self::GeluTanh,
            "quick_gelu" => Self::QuickGelu,
            "mish" => Self::Mish,
            "relu" => Self::Relu,
            _ => return None,
        })
    }

    /// Of [`Activation::LeakyRelu`]: what is below 0 is multiplied with it.
    pub(crate) fn slope(percent: u8) -> f32 {
        f32::from(percent) / 100.0
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

/// Along which axes pictures have no edges: what lies beyond one is what lies at the other, in the place of zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wrap {
    /// Left and right.
    pub x: bool,
    /// Top and bottom.
    pub y: bool,
}

impl Wrap {
    /// Whether there is such an axis.
    pub const fn any(self) -> bool {
        self.x || self.y
    }

    /// The place in `size` of one that may lie outside, and of which it is known that only `wraps` brings it back.
    #[inline(always)]
    pub(crate) fn place(wraps: bool, at: isize, size: usize) -> Option<usize> {
        match usize::try_from(at) {
            Ok(at) if at < size => Some(at),
            _ if wraps => usize::try_from(at.rem_euclid(size.cast_signed().max(1))).ok(),
            _ => None,
        }
    }
}

/// A part of a picture, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Window {
    /// Rows above it.
    pub top: usize,
    /// Columns left of it.
    pub left: usize,
    /// Its rows.
    pub height: usize,
    /// Its columns.
    pub width: usize,
}

impl Window {
    /// Whether it holds something and lies within a picture.
    pub(crate) fn fits(&self, (h, w): (usize, usize)) -> bool {
        let within = |first: usize, count: usize, size: usize| {
            count > 0 && first.checked_add(count).is_some_and(|end| end <= size)
        };
        within(self.top, self.height, h) && within(self.left, self.width, w)
    }
}

/// T5's bias of scores by the distance of key and query, instead of a scale (Raffel et al., "Exploring the Limits of Transfer Learning with a
/// Unified Text-to-Text Transformer", arXiv 1910.10683; transformers 5.23 `T5Attention`).
#[derive(Debug, Clone)]
pub struct Relative {
    /// `[buckets, heads]`: half of the buckets are for keys up to the query, half for those behind it.
    pub table: Param,
    /// The distance from which on all share the last bucket.
    pub max_distance: usize,
}

impl Relative {
    /// The bucket of a key `distance` places behind the query.
    pub(crate) fn bucket(&self, distance: isize) -> usize {
        let half = self.table.shape().first().map_or(0, |n| n / 2);
        let side = if distance > 0 { half } else { 0 };
        let (n, exact) = (distance.unsigned_abs(), half / 2);
        if n < exact {
            return side + n;
        }
        // in f32, as the reference computes it
        let far = (n as f32 / exact as f32).ln() / (self.max_distance as f32 / exact as f32).ln();
        let bucket = exact + (far * (half - exact) as f32) as usize;
        side + bucket.min(half.saturating_sub(1))
    }
}

/// Cosines and sines by which pairs of numbers are turned (Su et al., "RoFormer", arXiv 2104.09864): `[s, width / 2]` of both, for one head.
pub type Turns = Arc<Vec<[f32; 2]>>;

/// How the numbers of a patch follow each other in a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchOrder {
    /// `[c, y, x]`, as FLUX packs latents.
    ChannelsFirst,
    /// `[y, x, c]`, as diffusion transformers put them out.
    ChannelsLast,
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
        /// What the padding is; zeros where it does not wrap.
        wrap: Wrap,
    },
    /// `x · Wᵀ + bias`; weight `[o, i]`, bias `[o]`.
    Linear { weight: Param, bias: Option<Param> },
    /// Normalises each of `groups` channel groups of each picture, then scales, shifts and activates. A second input `[1 or b, 2 · groups]` is
    /// taken for means and variances, as [`Op::Statistics`] gives them.
    GroupNorm {
        weight: Param,
        bias: Param,
        groups: usize,
        eps: f64,
        activation: Option<Activation>,
    },
    /// Means of the channel groups within a part of each picture, then variances: `[b, c, h, w]` → `[b, 2 · groups]`.
    Statistics { groups: usize, part: Window },
    /// Normalises the last axis, then scales and shifts.
    LayerNorm {
        weight: Param,
        bias: Param,
        eps: f64,
    },
    /// The same without weights, then `· (1 + scale) + shift` by the sequence's own vector `[b, n · c]`: `shift` and `scale` are places
    /// in it, counted in widths (Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748).
    AdaptiveNorm {
        eps: f64,
        shift: usize,
        scale: usize,
    },
    /// `x / √(mean x² + eps) · weight` in each slice of the last axis that is as wide as the weight.
    RmsNorm { weight: Param, eps: f64 },
    /// `softmax(q kᵀ / √d) v` in each of `heads` slices of the last axis; `causal`: a position sees itself and what is before it.
    /// `relative`: `softmax(q kᵀ + bias) v` instead.
    Attention {
        heads: usize,
        causal: bool,
        relative: Option<Relative>,
    },
    /// Attention within the windows of the picture that a sequence is.
    WindowAttention(Box<Windows>),
    /// Turns pairs of neighbouring numbers in each of `heads` slices of the last axis.
    Rotate { heads: usize, turns: Turns },
    /// `x · values`, `x [b, s, c]`, by the sequence's own vector `[b, n · c]`, of which `slot` is the place counted in widths.
    Gate { slot: usize },
    /// Product of two tensors of one shape, number by number.
    Multiply,
    /// Two sequences one behind the other.
    Join,
    /// `count` tokens of a sequence, from `first` on.
    Tokens { first: usize, count: usize },
    /// `[b, c, h · p, w · p]` → `[b, h · w, c · p · p]`, channels first.
    Patchify { patch: usize },
    /// `[b, h · w, c · p · p]` → `[b, c, h · p, w · p]`.
    Unpatchify {
        h: usize,
        w: usize,
        patch: usize,
        order: PatchOrder,
    },
    /// What each token is looked at altogether: `softmax(q kᵀ / √d)` summed over the queries, the mean of `heads`; `q [b, s, c]`, `k [b, t, c]` →
    /// `[b, t, 1]` (Hong et al., "Improving Sample Quality of Diffusion Models Using Self-Attention Guidance", arXiv 2210.00939).
    AttentionMass { heads: usize },
    /// Multiplies the lowest frequencies of each channel, 0 and −1 along both axes, by `scale` and takes the real part (Si et al., "FreeU",
    /// arXiv 2309.11497, as its code has it with a threshold of 1).
    LowFrequencies { scale: f64 },
    /// Multiplies the first half of the channels by `scale`, or, `by_mean`, by `1 + (scale − 1) · m`, where m is the mean of all channels at
    /// the pixel, brought to 0 … 1 by its least and largest of the picture (FreeU, second version).
    Amplify { scale: f64, by_mean: bool },
    /// Which of `h × w` tokens may become one with another (Bolya & Hoffman, "Token Merging for Fast Stable Diffusion", arXiv 2303.17604; tomesd 0.1.3).
    /// One token of every whole 2×2 stays: the first, or the one that a second input `[b, ⌊h/2⌋ · ⌊w/2⌋]` names, 0 to 3, row by row. Of the
    /// others the `merged` whose largest cosine with one that stays is largest join that one. The result is each token's place in what is
    /// left, as a number: others that were not merged come first, those that stay behind them.
    Match { h: usize, w: usize, merged: usize },
    /// Means of the tokens of each of `count` places: `x [b, s, c]`, places `[b, s, 1]` → `[b, count, c]`.
    Merge { count: usize },
    /// What lies at each token's place, on top of a third input if there is one: `y [b, count, c]`, places `[b, s, 1]`, `x [b, s, c]` → `[b, s, c]`.
    Unmerge,
    /// First half × gelu(second half), exact gelu (Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202).
    Geglu,
    /// A pointwise non-linearity.
    Activate(Activation),
    /// `x`, and below 0 `x` times its channel's slope `[c]` (He et al., "Delving Deep into Rectifiers", arXiv 1502.01852).
    Prelu { slopes: Param },
    /// Adds a number a channel, the same ones to every picture: `[b, c, h, w] + [c]`.
    Shift { values: Arc<Vec<f32>> },
    /// Sum of two tensors of one shape.
    Add,
    /// Adds a value a channel: `[b, c, h, w] + [b, c]`.
    AddChannels,
    /// `x · (1 + scale) + shift` with `[b, 2c] = scale ‖ shift`.
    ScaleShift,
    /// `x · scale + shift`.
    Affine { scale: f64, shift: f64 },
    /// Joins along the channels, those of pictures or of tokens.
    Concat,
    /// Nearest-neighbour resampling to `h × w`: pixel `(y, x)` reads `(⌊y·H/h⌋, ⌊x·W/w⌋)`.
    Upsample { h: usize, w: usize },
    /// Means of 2×2 pixels; an odd last row or column counts alone, as `torch.nn.AvgPool2d(2, ceil_mode=True)`.
    AveragePool,
    /// Each channel's mean over the picture.
    Means,
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
    /// Adds rows of a table `[positions, c]`: the first `s`, or those named.
    AddPositions {
        table: Param,
        rows: Option<Arc<Vec<usize>>>,
    },
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
            Self::Statistics { .. } => "statistics",
            Self::LayerNorm { .. } => "layer_norm",
            Self::AdaptiveNorm { .. } => "adaptive_norm",
            Self::RmsNorm { .. } => "rms_norm",
            Self::Attention { .. } => "attention",
            Self::WindowAttention(_) => "window_attention",
            Self::Rotate { .. } => "rotate",
            Self::Gate { .. } => "gate",
            Self::Multiply => "multiply",
            Self::Join => "join",
            Self::Tokens { .. } => "tokens",
            Self::Patchify { .. } => "patchify",
            Self::Unpatchify { .. } => "unpatchify",
            Self::AttentionMass { .. } => "attention_mass",
            Self::LowFrequencies { .. } => "low_frequencies",
            Self::Amplify { .. } => "amplify",
            Self::Match { .. } => "match",
            Self::Merge { .. } => "merge",
            Self::Unmerge => "unmerge",
            Self::Geglu => "geglu",
            Self::Activate(_) => "activate",
            Self::Prelu { .. } => "prelu",
            Self::Shift { .. } => "shift",
            Self::Add => "add",
            Self::AddChannels => "add_channels",
            Self::ScaleShift => "scale_shift",
            Self::Affine { .. } => "affine",
            Self::Concat => "concat",
            Self::Upsample { .. } => "upsample",
            Self::AveragePool => "average_pool",
            Self::Means => "means",
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
            Self::Attention { .. }
            | Self::WindowAttention(_)
            | Self::AttentionMass { .. }
            | Self::Match { .. } => LayerClass::Attention,
            Self::GroupNorm { .. }
            | Self::Statistics { .. }
            | Self::LayerNorm { .. }
            | Self::AdaptiveNorm { .. }
            | Self::RmsNorm { .. } => LayerClass::Norm,
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
            Self::RmsNorm { weight, .. } | Self::Prelu { slopes: weight } => vec![weight],
            Self::Embed { table } | Self::AddPositions { table, .. } => vec![table],
            Self::Attention {
                relative: Some(relative),
                ..
            } => vec![&relative.table],
            Self::WindowAttention(windows) => {
                let bias = windows.bias.params().into_iter();
                bias.chain(&windows.cosine).collect()
            }
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
            (Self::GroupNorm { groups, weight, .. }, [x @ [b, c, _, _], [sb, s]])
                if *groups > 0
                    && c % groups == 0
                    && weight.shape() == [*c]
                    && (sb == b || *sb == 1)
                    && *s == 2 * groups =>
            {
                Ok(x.to_vec())
            }
            (Self::Statistics { groups, part }, [[b, c, h, w]])
                if *groups > 0 && c % groups == 0 && part.fits((*h, *w)) =>
            {
                Ok(vec![*b, 2 * groups])
            }
            (Self::GroupNorm { groups, weight, .. }, _) => Err(wrong(format!(
                "[b, c, h, w] with c = {:?} divisible by {groups} groups",
                weight.shape()
            ))),
            (Self::LayerNorm { weight, .. }, [x]) if x.last() == weight.shape().first() => {
                Ok(x.to_vec())
            }
            (Self::AdaptiveNorm { shift, scale, .. }, [x @ [b, _, c], values])
                if fits_slots(values, (*b, *c), (*shift).max(*scale)) =>
            {
                Ok(x.to_vec())
            }
            (Self::Gate { slot }, [x @ [b, _, c], values])
                if fits_slots(values, (*b, *c), *slot) =>
            {
                Ok(x.to_vec())
            }
            (Self::RmsNorm { weight, .. }, [x]) if matches!((weight.shape(), x.last()), ([n], Some(c)) if *n > 0 && c % n == 0) => {
                Ok(x.to_vec())
            }
            (Self::Rotate { heads, turns }, [x @ [_, s, c]])
                if *heads > 0 && c % (2 * heads) == 0 && turns.len() == s * (c / heads / 2) =>
            {
                Ok(x.to_vec())
            }
            (Self::Join, [[b, s, c], [b2, t, c2]]) if (b, c) == (b2, c2) => Ok(vec![*b, s + t, *c]),
            (Self::Tokens { first, count }, [[b, s, c]])
                if first.checked_add(*count).is_some_and(|end| end <= *s) =>
            {
                Ok(vec![*b, *count, *c])
            }
            (Self::Patchify { patch }, [[b, c, h, w]])
                if *patch > 0 && h % patch == 0 && w % patch == 0 =>
            {
                Ok(vec![*b, h / patch * (w / patch), c * patch * patch])
            }
            (Self::Unpatchify { h, w, patch, .. }, [[b, s, c]])
                if *s == h * w && *patch > 0 && c % (patch * patch) == 0 =>
            {
                Ok(vec![*b, c / (patch * patch), h * patch, w * patch])
            }
            (
                Self::Attention {
                    heads,
                    relative: Some(relative),
                    ..
                },
                _,
            ) if !matches!(relative.table.shape(), [n, h] if n % 4 == 0 && *n > 0 && h == heads) => {
                Err(wrong(format!(
                    "a table of 4n buckets for {heads} heads, not {}",
                    relative.table
                )))
            }
            (Self::Attention { heads, .. }, [[b, s, c], [bk, t, ck], v])
                if b == bk && c == ck && *v == [*bk, *t, *ck] && *heads > 0 && c % heads == 0 =>
            {
                Ok(vec![*b, *s, *c])
            }
            (Self::Attention { heads, .. }, _) => Err(wrong(format!(
                "q [b, s, c], k and v [b, t, c] with c divisible by {heads} heads"
            ))),
            (Self::WindowAttention(windows), [q @ [_, s, c], k, v])
                if k == q && v == q && windows.fits(*s, *c) =>
            {
                Ok(q.to_vec())
            }
            (Self::WindowAttention(windows), _) => Err(wrong(format!(
                "q, k and v of a picture of {:?} pixels in windows of {}, with tables for {} heads",
                windows.size, windows.side, windows.heads
            ))),
            (Self::AttentionMass { heads }, [[b, _, c], [bk, t, ck]])
                if (b, c) == (bk, ck) && *heads > 0 && c % heads == 0 =>
            {
                Ok(vec![*b, *t, 1])
            }
            (Self::LowFrequencies { .. } | Self::Amplify { .. }, [x @ [_, _, _, _]]) => {
                Ok(x.to_vec())
            }
            (Self::Match { h, w, merged }, [[b, s, _], choice @ ..])
                if *s == h * w
                    && (1..=s - h / 2 * (w / 2)).contains(merged)
                    && h / 2 * (w / 2) > 0
                    && (choice.is_empty() || choice == [&[*b, h / 2 * (w / 2)][..]]) =>
            {
                Ok(vec![*b, *s, 1])
            }
            (Self::Merge { count }, [[b, s, c], places])
                if **places == [*b, *s, 1] && *count > 0 =>
            {
                Ok(vec![*b, *count, *c])
            }
            (Self::Unmerge, [[b, _, c], [pb, s, 1], more @ ..])
                if b == pb && (more.is_empty() || more == [&[*b, *s, *c][..]]) =>
            {
                Ok(vec![*b, *s, *c])
            }
            (Self::Geglu, [x]) if x.last().is_some_and(|c| c % 2 == 0) => {
                let mut shape = x.to_vec();
                if let Some(c) = shape.last_mut() {
                    *c /= 2;
                }
                Ok(shape)
            }
            (Self::Activate(_) | Self::Affine { .. }, [x]) => Ok(x.to_vec()),
            (Self::Prelu { slopes }, [x @ [_, c, _, _]]) if slopes.shape() == [*c] => {
                Ok(x.to_vec())
            }
            (Self::Shift { values }, [x @ [_, c, _, _]]) if values.len() == *c => Ok(x.to_vec()),
            (Self::Add | Self::Multiply, [x, y]) if x == y => Ok(x.to_vec()),
            (Self::AddChannels, [x @ [b, c, _, _], [tb, tc]]) if b == tb && c == tc => {
                Ok(x.to_vec())
            }
            (Self::ScaleShift, [x @ [b, c, _, _], [tb, tc]]) if b == tb && 2 * c == *tc => {
                Ok(x.to_vec())
            }
            (Self::Concat, [[b, c, h, w], [b2, d, h2, w2]]) if (b, h, w) == (b2, h2, w2) => {
                Ok(vec![*b, c + d, *h, *w])
            }
            (Self::Concat, [[b, s, c], [b2, s2, d]]) if (b, s) == (b2, s2) => {
                Ok(vec![*b, *s, c + d])
            }
            (Self::Upsample { h, w }, [[b, c, _, _]]) => Ok(vec![*b, *c, *h, *w]),
            (Self::AveragePool, [[b, c, h, w]]) => Ok(vec![*b, *c, h.div_ceil(2), w.div_ceil(2)]),
            (Self::Means, [[b, c, h, w]]) if *h > 0 && *w > 0 => Ok(vec![*b, *c]),
            (Self::Flatten, [[b, c, h, w]]) => Ok(vec![*b, h * w, *c]),
            (Self::Unflatten { h, w }, [[b, s, c]]) if *s == h * w => Ok(vec![*b, *c, *h, *w]),
            (Self::Sinusoid { width, .. }, [[b]]) => Ok(vec![*b, *width]),
            (Self::Embed { table }, [[b, s]]) if table.shape().len() == 2 => {
                Ok(vec![*b, *s, table.shape()[1]])
            }
            (Self::AddPositions { table, rows }, [x @ [_, s, c]])
                if table.shape().len() == 2
                    && *c == table.shape()[1]
                    && match rows {
                        None => *s <= table.shape()[0],
                        Some(rows) => {
                            rows.len() == *s && rows.iter().all(|row| *row < table.shape()[0])
                        }
                    } =>
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
            Self::WindowAttention(windows) => {
                4 * elements * (windows.key_side() * windows.key_side()) as u64
            }
            Self::Means => count(inputs[0]),
            Self::AttentionMass { .. } => 2 * count(inputs[0]) * inputs[1][1] as u64,
            Self::LowFrequencies { .. } => 28 * elements,
            Self::Match { h, w, .. } => {
                let stay = (h / 2 * (w / 2)) as u64;
                let all = stay * inputs[0].first().copied().unwrap_or(1) as u64;
                2 * count(inputs[0]) / elements.max(1) * elements.saturating_sub(all) * stay
            }
            Self::GroupNorm { .. }
            | Self::LayerNorm { .. }
            | Self::AdaptiveNorm { .. }
            | Self::RmsNorm { .. } => 8 * elements,
            Self::Flatten
            | Self::Unflatten { .. }
            | Self::Concat
            | Self::Join
            | Self::Tokens { .. }
            | Self::Patchify { .. }
            | Self::Unpatchify { .. }
            | Self::Upsample { .. } => 0,
            _ => elements,
        }
    }
}

/// Whether `values [b, n · c]` has a place `slot` for sequences `[b, _, c]`.
fn fits_slots(values: &[usize], (b, c): (usize, usize), slot: usize) -> bool {
    matches!(values, [vb, vc] if *vb == b && c > 0 && vc % c == 0 && slot < vc / c)
}
