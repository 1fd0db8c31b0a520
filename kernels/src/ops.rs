//! The operations that networks call. Each checks its shapes, then computes or records; see [`crate::op::Op`] for their meaning.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Instant;

use crate::param::Beside;
use crate::tensor::{Tensor, Value};
use crate::{
    Activation, Error, Op, Padding, Param, PatchOrder, Result, Windows, Wrap, eager, profile,
};

thread_local! {
    /// How convolutions of this thread's networks pad.
    static WRAP: Cell<Wrap> = const { Cell::new(Wrap { x: false, y: false }) };
}

/// Lets every convolution that `network` calls pad by wrapping around, as `padding_mode="circular"` of PyTorch's layers does. One whose padding
/// is not the same on both sides stays: there it is a step of its own in PyTorch, and no layer's.
pub fn wrapped<T>(wrap: Wrap, network: impl FnOnce() -> T) -> T {
    /// Puts back what was before, whatever happens in between.
    struct Restore(Wrap);
    impl Drop for Restore {
        fn drop(&mut self) {
            WRAP.set(self.0);
        }
    }
    let _restore = Restore(WRAP.replace(wrap));
    network()
}

/// The operation as this thread's networks are to call it.
fn as_wanted(mut op: Op) -> Op {
    if let Op::Conv2d { padding, wrap, .. } = &mut op
        && *padding == Padding::same(padding.before)
    {
        let wanted = WRAP.get();
        *wrap = Wrap {
            x: wrap.x || wanted.x,
            y: wrap.y || wanted.y,
        };
    }
    op
}

/// Computes `op` when the inputs hold data, notes it when they are nodes of a graph.
///
/// # Errors
/// [`Error::Shape`] when the inputs do not fit, [`Error::Mixed`] when they do not belong together, or the executor's error.
pub fn apply(op: Op, inputs: &[&Tensor]) -> Result<Tensor> {
    let op = as_wanted(op);
    let layers = beside(&op);
    let mut sum = call(op, inputs)?;
    for (down, up, scale) in layers {
        let few = affine(&call(down, inputs)?, scale, 0.0)?;
        sum = add(&sum, &call(up, &[&few])?)?;
    }
    Ok(sum)
}

/// The layers beside a layer, in pairs, and the factors between them.
fn beside(op: &Op) -> Vec<(Op, Op, f64)> {
    let (Op::Conv2d { weight, .. } | Op::Linear { weight, .. }) = op else {
        return Vec::new();
    };
    let changes = weight.beside().into_iter();
    let layers = |Beside { down, up, scale }| {
        let (down, up) = match op {
            Op::Conv2d {
                stride,
                padding,
                wrap,
                ..
            } => {
                let layer = |weight, stride, padding, wrap| Op::Conv2d {
                    weight,
                    bias: None,
                    stride,
                    padding,
                    wrap,
                };
                let up = layer(up, 1, Padding::same(0), Wrap::default());
                (layer(down, *stride, *padding, *wrap), up)
            }
            _ => {
                let layer = |weight| Op::Linear { weight, bias: None };
                (layer(down), layer(up))
            }
        };
        (down, up, f64::from(scale))
    };
    changes.map(layers).collect()
}

/// [`apply`] for what is as wanted and has nothing beside it.
fn call(op: Op, inputs: &[&Tensor]) -> Result<Tensor> {
    let shapes: Vec<&[usize]> = inputs.iter().map(|t| t.shape()).collect();
    let shape = op.shape(&shapes)?;
    let graph = inputs.iter().find_map(|t| match &t.0 {
        Value::Node { graph, .. } => Some(graph),
        Value::Data(_) => None,
    });
    if let Some(graph) = graph {
        return graph.record(op, inputs, shape);
    }
    let data = inputs
        .iter()
        .map(|t| match &t.0 {
            Value::Data(tensor) => Ok(tensor),
            Value::Node { .. } => Err(Error::Mixed { op: op.name() }),
        })
        .collect::<Result<Vec<_>>>()?;
    let start = Instant::now();
    let out = eager::run(&op, &data)?;
    profile::note(op.class(), start.elapsed());
    Ok(out.into())
}

/// Joins two pictures, or two sequences of one length, along their channels.
///
/// # Errors
/// As [`apply`].
pub fn concat(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    apply(Op::Concat, &[x, y])
}

/// Sum of two tensors of one shape.
///
/// # Errors
/// As [`apply`].
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    apply(Op::Add, &[x, y])
}

/// Adds one value a channel: `x [b, c, h, w] + values [b, c]`.
///
/// # Errors
/// As [`apply`].
pub fn add_channels(x: &Tensor, values: &Tensor) -> Result<Tensor> {
    apply(Op::AddChannels, &[x, values])
}

/// `x · (1 + scale) + shift` a channel, `[b, 2c] = scale ‖ shift`.
///
/// # Errors
/// As [`apply`].
pub fn scale_shift(x: &Tensor, values: &Tensor) -> Result<Tensor> {
    apply(Op::ScaleShift, &[x, values])
}

/// `x · scale + shift`; nothing at all for `1` and `0`.
///
/// # Errors
/// As [`apply`].
pub fn affine(x: &Tensor, scale: f64, shift: f64) -> Result<Tensor> {
    if scale == 1.0 && shift == 0.0 {
        return Ok(x.clone());
    }
    apply(Op::Affine { scale, shift }, &[x])
}

/// A pointwise non-linearity.
///
/// # Errors
/// As [`apply`].
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    apply(Op::Activate(activation), &[x])
}

/// `x [b, c, h, w]`, and below 0 `x` times its channel's slope `[c]`.
///
/// # Errors
/// As [`apply`].
pub fn prelu(x: &Tensor, slopes: &Param) -> Result<Tensor> {
    let slopes = slopes.clone();
    apply(Op::Prelu { slopes }, &[x])
}

/// Adds a number a channel to `x [b, c, h, w]`.
///
/// # Errors
/// As [`apply`].
pub fn shift(x: &Tensor, values: &Arc<Vec<f32>>) -> Result<Tensor> {
    let values = Arc::clone(values);
    apply(Op::Shift { values }, &[x])
}

/// Each channel's mean: `[b, c, h, w]` → `[b, c]`.
///
/// # Errors
/// As [`apply`].
pub fn means(x: &Tensor) -> Result<Tensor> {
    apply(Op::Means, &[x])
}

/// `torch.pixel_shuffle`: `[b, c · r², h, w]` → `[b, c, h · r, w · r]`.
///
/// # Errors
/// As [`apply`].
pub fn pixel_shuffle(x: &Tensor, r: usize) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let op = Op::Unpatchify {
        h,
        w,
        patch: r,
        order: PatchOrder::ChannelsFirst,
    };
    apply(op, &[&flatten(x)?])
}

/// `torch.pixel_unshuffle`: `[b, c, h · r, w · r]` → `[b, c · r², h, w]`.
///
/// # Errors
/// As [`apply`].
pub fn pixel_unshuffle(x: &Tensor, r: usize) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let patches = apply(Op::Patchify { patch: r }, &[x])?; // [b, h · w, c · r²]
    unflatten(&patches, h / r.max(1), w / r.max(1))
}

/// First half of the last axis × gelu(second half).
///
/// # Errors
/// As [`apply`].
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    apply(Op::Geglu, &[x])
}

/// Attention of `q [b, s, c]` over `k, v [b, t, c]` in `heads` slices.
///
/// # Errors
/// As [`apply`].
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let op = Op::Attention {
        heads,
        causal,
        relative: None,
    };
    apply(op, &[q, k, v])
}

/// Attention of `q, k, v [b, h · w, c]` within the windows of a picture.
///
/// # Errors
/// As [`apply`].
pub fn window_attention(q: &Tensor, k: &Tensor, v: &Tensor, windows: Windows) -> Result<Tensor> {
    apply(Op::WindowAttention(Box::new(windows)), &[q, k, v])
}

/// Product of two tensors of one shape, number by number.
///
/// # Errors
/// As [`apply`].
pub fn multiply(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    apply(Op::Multiply, &[x, y])
}

/// Two sequences one behind the other: `[b, s, c]`, `[b, t, c]` → `[b, s + t, c]`.
///
/// # Errors
/// As [`apply`].
pub fn join(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    apply(Op::Join, &[x, y])
}

/// `count` tokens of `x [b, s, c]`, from `first` on.
///
/// # Errors
/// As [`apply`].
pub fn tokens(x: &Tensor, first: usize, count: usize) -> Result<Tensor> {
    apply(Op::Tokens { first, count }, &[x])
}

/// `x [b, s, c]` times place `slot`, counted in widths, of `values [b, n · c]`.
///
/// # Errors
/// As [`apply`].
pub fn gate(x: &Tensor, values: &Tensor, slot: usize) -> Result<Tensor> {
    apply(Op::Gate { slot }, &[x, values])
}

/// Nearest-neighbour resampling to `h × w`.
///
/// # Errors
/// As [`apply`].
pub fn upsample(x: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    apply(Op::Upsample { h, w }, &[x])
}

/// Means of 2×2 pixels: `[b, c, h, w]` → `[b, c, ⌈h/2⌉, ⌈w/2⌉]`.
///
/// # Errors
/// As [`apply`].
pub fn average_pool(x: &Tensor) -> Result<Tensor> {
    apply(Op::AveragePool, &[x])
}

/// `[b, c, h, w]` → `[b, h·w, c]`.
///
/// # Errors
/// As [`apply`].
pub fn flatten(x: &Tensor) -> Result<Tensor> {
    apply(Op::Flatten, &[x])
}

/// `[b, h·w, c]` → `[b, c, h, w]`.
///
/// # Errors
/// As [`apply`].
pub fn unflatten(x: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    apply(Op::Unflatten { h, w }, &[x])
}

/// Rows of `table` for ids `[b, s]` (u32).
///
/// # Errors
/// As [`apply`]; an id outside the table.
pub fn embed(ids: &Tensor, table: &Param) -> Result<Tensor> {
    apply(
        Op::Embed {
            table: table.clone(),
        },
        &[ids],
    )
}

/// Adds the first rows of `table` to a sequence.
///
/// # Errors
/// As [`apply`].
pub fn add_positions(x: &Tensor, table: &Param) -> Result<Tensor> {
    apply(
        Op::AddPositions {
            table: table.clone(),
            rows: None,
        },
        &[x],
    )
}
