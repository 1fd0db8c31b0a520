//! What a plan is made of: values with their places, and the steps that make them.

use std::sync::Arc;

use crate::cpu::matching::Matching;
use crate::cpu::winograd;
use crate::op::{PatchOrder, Relative, Turns};
use crate::windows::Windows;
use crate::{Activation, Padding, Param, Window, Wrap};

/// The place of a value in [`Program::values`].
pub(super) type ValueId = usize;

/// How often a value has to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rate {
    /// Depends on nothing but the timestep: one row for each timestep of a run, all computed before it.
    Timestep,
    /// Depends on what stays the same during a run, such as the text.
    Run,
    /// Depends on what changes at every call.
    Call,
}

/// The type that a value is stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Type {
    F32,
    Bf16,
}

impl Type {
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// A channels-last value: `[batch, pixels, channels]`. A batch smaller than that of a value computed from it repeats.
#[derive(Debug, Clone)]
pub(super) struct Value {
    pub rate: Rate,
    pub batch: usize,
    pub pixels: usize,
    pub channels: usize,
    pub kind: Type,
}

impl Value {
    pub(super) fn len(&self) -> usize {
        self.batch * self.pixels * self.channels
    }
}

/// A picture-like view of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct View {
    pub value: ValueId,
    pub h: usize,
    pub w: usize,
}

/// A convolution or a linear layer with everything that happens to its sums.
#[derive(Debug, Clone)]
pub(super) struct Product {
    /// One or two inputs side by side, and the shortcut's if it was folded in.
    pub parts: Vec<Part>,
    /// Bias of each part that has one.
    pub biases: Vec<Param>,
    pub form: Form,
    /// Height and width of the result.
    pub size: (usize, usize),
    pub columns: usize,
    pub image: Option<ValueId>,
    pub activation: Option<Activation>,
    /// One slope a column for what is below 0, in an activation's place.
    pub slopes: Option<Param>,
    /// A factor for all, after the activation.
    pub scale: Option<f32>,
    /// A factor a column and sequence: a value, and the place in it counted in columns.
    pub gate: Option<(ValueId, usize)>,
    pub residual: Option<ValueId>,
}

impl Product {
    /// Whether nothing but biases and values of pictures was added to the sums so far.
    pub(super) fn is_linear(&self) -> bool {
        self.activation.is_none()
            && self.slopes.is_none()
            && self.scale.is_none()
            && self.gate.is_none()
            && self.residual.is_none()
    }
}

/// Inputs of one weight.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub weight: Param,
    /// Side by side along the channels.
    pub sources: Vec<View>,
    pub kernel: (usize, usize),
    pub stride: usize,
    pub padding: Padding,
    pub wrap: Wrap,
}

/// How a product is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Form {
    /// As an implicit product.
    Direct,
    /// A linear layer to values and gates, and value × gelu(gate).
    Gated,
    /// Enlarge twice, then 3×3: four 2×2 convolutions of the small picture.
    Upsample,
    /// A 3×3 convolution by Winograd's minimal filtering.
    Winograd(winograd::Form),
}

/// One step of a program.
#[derive(Debug, Clone)]
pub(super) struct Step {
    pub work: Work,
    pub out: ValueId,
    /// What the profile counts it as.
    pub class: crate::op::LayerClass,
}

/// What a step does.
#[derive(Debug, Clone)]
pub(super) enum Work {
    Product(Product),
    GroupNorm {
        sources: Vec<ValueId>,
        weight: Param,
        bias: Param,
        groups: usize,
        eps: f64,
        activation: Option<Activation>,
        /// Means and variances, where they are not those of the picture itself.
        given: Option<ValueId>,
    },
    Statistics {
        source: View,
        groups: usize,
        part: Window,
    },
    LayerNorm {
        source: ValueId,
        weight: Param,
        bias: Param,
        eps: f64,
    },
    AdaptiveNorm {
        source: ValueId,
        values: ValueId,
        eps: f64,
        /// Places in `values`, counted in widths.
        shift: usize,
        scale: usize,
    },
    RmsNorm {
        source: ValueId,
        weight: Param,
        eps: f64,
    },
    Attention {
        q: ValueId,
        k: ValueId,
        v: ValueId,
        heads: usize,
        causal: bool,
        relative: Option<Relative>,
    },
    WindowAttention {
        q: ValueId,
        k: ValueId,
        v: ValueId,
        windows: Box<Windows>,
    },
    Rotate {
        source: ValueId,
        heads: usize,
        turns: Turns,
    },
    Gate {
        source: ValueId,
        values: ValueId,
        slot: usize,
    },
    Multiply(ValueId, ValueId),
    Join(ValueId, ValueId),
    Tokens {
        source: ValueId,
        first: usize,
    },
    Patchify {
        source: View,
        patch: usize,
    },
    Unpatchify {
        source: View,
        patch: usize,
        order: PatchOrder,
    },
    AttentionMass {
        q: ValueId,
        k: ValueId,
        heads: usize,
    },
    LowFrequencies {
        source: View,
        scale: f64,
    },
    Amplify {
        source: ValueId,
        scale: f32,
        by_mean: bool,
    },
    /// Workspace of [`crate::cpu::matching`].
    Match {
        source: ValueId,
        choice: Option<ValueId>,
        sizes: Matching,
    },
    Merge {
        source: ValueId,
        places: ValueId,
    },
    Unmerge {
        source: ValueId,
        places: ValueId,
        residual: Option<ValueId>,
    },
    Geglu(ValueId),
    Activate(ValueId, Activation),
    Prelu {
        source: ValueId,
        slopes: Param,
    },
    Shift {
        source: ValueId,
        values: Arc<Vec<f32>>,
    },
    Add(ValueId, ValueId),
    AddChannels(ValueId, ValueId),
    ScaleShift(ValueId, ValueId),
    Affine {
        source: ValueId,
        scale: f32,
        shift: f32,
    },
    /// Side by side along the channels.
    Concat(Vec<ValueId>),
    Upsample {
        source: View,
        h: usize,
        w: usize,
    },
    AveragePool(View),
    Means(ValueId),
    Sinusoid {
        source: ValueId,
        flip_sin_to_cos: bool,
        freq_shift: f64,
    },
    Embed {
        ids: ValueId,
        table: Param,
    },
    AddPositions {
        source: ValueId,
        table: Param,
        rows: Option<Arc<Vec<usize>>>,
    },
}

impl Work {
    /// Every value that is read.
    pub(super) fn reads(&self) -> Vec<ValueId> {
        match self {
            Self::Product(product) => {
                let sources = product
                    .parts
                    .iter()
                    .flat_map(|p| p.sources.iter().map(|s| s.value));
                sources
                    .chain(product.image)
                    .chain(product.gate.map(|gate| gate.0))
                    .chain(product.residual)
                    .collect()
            }
            Self::GroupNorm { sources, given, .. } => {
                sources.iter().copied().chain(*given).collect()
            }
            Self::Attention { q, k, v, .. } | Self::WindowAttention { q, k, v, .. } => {
                vec![*q, *k, *v]
            }
            Self::AttentionMass { q, k, .. } => vec![*q, *k],
            Self::Match { source, choice, .. } => std::iter::once(*source).chain(*choice).collect(),
            Self::Merge { source, places } => vec![*source, *places],
            Self::Unmerge {
                source,
                places,
                residual,
            } => [*source, *places].into_iter().chain(*residual).collect(),
            Self::Add(a, b)
            | Self::AddChannels(a, b)
            | Self::ScaleShift(a, b)
            | Self::Multiply(a, b)
            | Self::Join(a, b) => vec![*a, *b],
            Self::Concat(pieces) => pieces.clone(),
            Self::AdaptiveNorm { source, values, .. } | Self::Gate { source, values, .. } => {
                vec![*source, *values]
            }
            Self::LayerNorm { source, .. }
            | Self::RmsNorm { source, .. }
            | Self::Rotate { source, .. }
            | Self::Prelu { source, .. }
            | Self::Shift { source, .. }
            | Self::Tokens { source, .. }
            | Self::Affine { source, .. }
            | Self::Sinusoid { source, .. }
            | Self::AddPositions { source, .. }
            | Self::Amplify { source, .. }
            | Self::Embed { ids: source, .. }
            | Self::Geglu(source)
            | Self::Means(source)
            | Self::Activate(source, _) => vec![*source],
            Self::Upsample { source, .. }
            | Self::LowFrequencies { source, .. }
            | Self::AveragePool(source)
            | Self::Statistics { source, .. }
            | Self::Patchify { source, .. }
            | Self::Unpatchify { source, .. } => vec![source.value],
        }
    }

    /// Every value that is an operand of a product, which decides the type it is stored as.
    pub(super) fn operands(&self) -> Vec<ValueId> {
        match self {
            Self::Product(product) => product
                .parts
                .iter()
                .flat_map(|p| p.sources.iter().map(|s| s.value))
                .collect(),
            Self::Attention { q, k, v, .. } | Self::WindowAttention { q, k, v, .. } => {
                vec![*q, *k, *v]
            }
            _ => Vec::new(),
        }
    }
}

/// A value given from outside.
#[derive(Debug, Clone)]
pub(super) struct Input {
    pub name: String,
    pub value: ValueId,
    /// `[b, c, h, w]`, `[b, s, c]`, `[b, s]` or `[b]`, as the network declared it.
    pub shape: Vec<usize>,
}

/// A value that is asked for.
#[derive(Debug, Clone, Default)]
pub(super) struct Output {
    pub value: ValueId,
    /// As the network recorded it.
    pub shape: Vec<usize>,
}

/// A network at one shape, fused.
#[derive(Debug, Clone, Default)]
pub(super) struct Program {
    pub values: Vec<Value>,
    pub inputs: Vec<Input>,
    /// In the order in which they can run; steps of rarer rates come first among equals.
    pub steps: Vec<Step>,
    pub output: Output,
    /// What else is kept until the next call.
    pub taps: Vec<Output>,
}

impl Program {
    /// The values that outlive a call.
    pub(super) fn outputs(&self) -> impl Iterator<Item = &Output> {
        std::iter::once(&self.output).chain(&self.taps)
    }

    /// The channels of every source of a product, by part, and the type that they are stored as.
    pub(super) fn sources(&self, product: &Product) -> (Vec<Vec<usize>>, Type) {
        let of = |part: &Part| -> Vec<usize> {
            let views = part.sources.iter();
            views.map(|view| self.values[view.value].channels).collect()
        };
        let first = product.parts.iter().flat_map(|part| &part.sources).next();
        let kind = first.map_or(Type::F32, |view| self.values[view.value].kind);
        (product.parts.iter().map(of).collect(), kind)
    }
}
