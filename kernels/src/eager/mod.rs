//! The eager executor: every operation as candle arithmetic, on any candle device. Slow and obvious; the reference for the others.
//!
//! Norms, softmax and sinusoids are computed in f32 whatever the type of the tensors. On the CPU in f32, convolutions go band by band (`conv`),
//! attention block by block (`attention`), norms and activations in one pass over the data (`cpu`) in place of candle's dozen.

#[allow(unsafe_code)]
mod attention;
#[allow(unsafe_code)]
mod conv;
mod cpu;
mod features;
mod merging;
mod sequence;
mod windows;

use candle_core::{D, DType, Device, Tensor};

use crate::{Activation, Op, Padding, Result, Window, Wrap};

/// The most elements that a score matrix may have before attention goes piece by piece (64 MiB in f32).
const MAX_SCORES: usize = 1 << 24;

/// Computes one operation. Shapes have been checked by [`Op::shape`].
///
/// # Errors
/// When candle fails or a weight cannot be read.
pub fn run(op: &Op, inputs: &[&Tensor]) -> Result<Tensor> {
    let x = inputs[0];
    Ok(match op {
        Op::Conv2d {
            weight,
            bias,
            stride,
            padding,
            wrap,
        } => {
            let bias = bias.as_ref().map(|bias| bias.value()).transpose()?;
            let weight = weight.value()?;
            let (x, padding) = (&wrapped(x, *padding, *wrap)?, &wrap_rest(*padding, *wrap));
            match conv::conv2d(x, &weight, bias.as_ref(), (*stride, *padding))? {
                Some(y) => y,
                None => conv2d(x, &weight, bias.as_ref(), (*stride, *padding))?,
            }
        }
        Op::Linear { weight, bias } => {
            let y = linear(x, &weight.value()?)?;
            match bias {
                Some(bias) => y.broadcast_add(&bias.value()?)?,
                None => y,
            }
        }
        Op::GroupNorm {
            weight,
            bias,
            groups,
            eps,
            activation,
        } => {
            let affine = (&weight.value()?, &bias.value()?);
            match inputs.get(1) {
                Some(given) => {
                    let y = given_norm(x, given, affine, (*groups, *eps))?;
                    match activation {
                        Some(activation) => activate(&y, *activation)?,
                        None => y,
                    }
                }
                None => group_norm(x, affine, *groups, *eps, *activation)?,
            }
        }
        Op::Statistics { groups, part } => statistics(x, *groups, part)?,
        Op::LayerNorm { weight, bias, eps } => {
            let x = x.contiguous()?;
            candle_nn::ops::layer_norm(&x, &weight.value()?, &bias.value()?, *eps as f32)?
        }
        Op::Attention {
            heads,
            causal,
            relative: None,
        } => match attention::attention((x, inputs[1], inputs[2]), *heads, *causal)? {
            Some(y) => y,
            None => attention(x, inputs[1], inputs[2], *heads, *causal)?,
        },
        Op::WindowAttention(how) => windows::attention((x, inputs[1], inputs[2]), how)?,
        Op::Geglu => {
            if let Some(y) = cpu::geglu(x)? {
                y
            } else {
                let half = x.dim(D::Minus1)? / 2;
                let gate = x.narrow(D::Minus1, half, half)?.gelu_erf()?;
                (x.narrow(D::Minus1, 0, half)? * gate)?
            }
        }
        Op::Activate(activation) => activate(x, *activation)?,
        Op::Prelu { slopes } => {
            let slopes = slopes.value()?.reshape((1, (), 1, 1))?;
            (x.relu()? - x.neg()?.relu()?.broadcast_mul(&slopes)?)?
        }
        Op::Shift { values } => {
            let values = Tensor::new(values.as_slice(), x.device())?;
            x.broadcast_add(&values.to_dtype(x.dtype())?.reshape((1, (), 1, 1))?)?
        }
        Op::Means => x.to_dtype(DType::F32)?.mean((2, 3))?.to_dtype(x.dtype())?,
        Op::Add => (x + inputs[1])?,
        Op::AddChannels => {
            let (b, c) = inputs[1].dims2()?;
            x.broadcast_add(&inputs[1].reshape((b, c, 1, 1))?)?
        }
        Op::ScaleShift => {
            let (b, c2) = inputs[1].dims2()?;
            let scale_shift = inputs[1].reshape((b, 2, c2 / 2, 1, 1))?;
            let scale = (scale_shift.narrow(1, 0, 1)?.squeeze(1)? + 1.0)?;
            x.broadcast_mul(&scale)?
                .broadcast_add(&scale_shift.narrow(1, 1, 1)?.squeeze(1)?)?
        }
        Op::Affine { scale, shift } => x.affine(*scale, *shift)?,
        Op::Concat if x.rank() == 3 => Tensor::cat(inputs, 2)?,
        Op::Concat | Op::Join => Tensor::cat(inputs, 1)?,
        Op::Multiply => (x * inputs[1])?,
        Op::Tokens { first, count } => x.narrow(1, *first, *count)?.contiguous()?,
        Op::Upsample { h, w } => x.contiguous()?.upsample_nearest2d(*h, *w)?,
        Op::AveragePool => {
            let (_, _, h, w) = x.dims4()?;
            // the mean of a pixel and its copy is the pixel
            let x = x.pad_with_same(2, 0, h % 2)?.pad_with_same(3, 0, w % 2)?;
            x.contiguous()?.avg_pool2d(2)?
        }
        Op::Flatten => x.flatten_from(2)?.transpose(1, 2)?.contiguous()?,
        Op::Unflatten { h, w } => {
            let (b, _, c) = x.dims3()?;
            x.transpose(1, 2)?.contiguous()?.reshape((b, c, *h, *w))?
        }
        Op::Sinusoid {
            width,
            flip_sin_to_cos,
            freq_shift,
        } => sinusoid(x, *width, *flip_sin_to_cos, *freq_shift)?,
        Op::Embed { table } => {
            let (b, s) = x.dims2()?;
            table
                .value()?
                .embedding(&x.flatten_all()?)?
                .reshape((b, s, ()))?
        }
        Op::AddPositions { table, rows: None } => {
            let s = x.dim(1)?;
            x.broadcast_add(&table.value()?.narrow(0, 0, s)?)?
        }
        Op::AddPositions {
            table,
            rows: Some(rows),
        } => {
            let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
            let rows = Tensor::new(rows, x.device())?;
            x.broadcast_add(&table.value()?.index_select(&rows, 0)?)?
        }
        Op::AttentionMass { .. } | Op::LowFrequencies { .. } | Op::Amplify { .. } => {
            features::run(op, inputs)?
        }
        Op::Match { .. } | Op::Merge { .. } | Op::Unmerge => merging::run(op, inputs)?,
        _ => sequence::run(op, inputs)?,
    })
}

/// The picture with its own other side around it, along all axes if along any; zeros where it does not go on.
fn wrapped(x: &Tensor, padding: Padding, wrap: Wrap) -> Result<Tensor> {
    let mut x = x.clone();
    if !wrap.any() || padding == Padding::same(0) {
        return Ok(x);
    }
    for (axis, wraps) in [(2, wrap.y), (3, wrap.x)] {
        let (before, after) = (padding.before, padding.after);
        x = if wraps {
            let size = x.dim(axis)?;
            let places = (0..before + size + after)
                .map(|i| (i + before * (size - 1)) % size)
                .map(|i| i as u32);
            let places = Tensor::new(places.collect::<Vec<_>>(), x.device())?;
            x.contiguous()?.index_select(&places, axis)?
        } else {
            x.pad_with_zeros(axis, before, after)?
        };
    }
    Ok(x)
}

/// The padding that is left behind [`wrapped`].
fn wrap_rest(padding: Padding, wrap: Wrap) -> Padding {
    if wrap.any() {
        Padding::same(0)
    } else {
        padding
    }
}

/// Means of groups within a part of each picture, then variances.
fn statistics(x: &Tensor, groups: usize, part: &Window) -> Result<Tensor> {
    let x = x
        .narrow(2, part.top, part.height)?
        .narrow(3, part.left, part.width)?
        .to_dtype(DType::F32)?;
    let (b, c, h, w) = x.dims4()?;
    let x = x.contiguous()?.reshape((b, groups, c / groups * h * w))?;
    let mean = x.mean_keepdim(2)?;
    let variance = x.broadcast_sub(&mean)?.sqr()?.mean(2)?;
    Ok(Tensor::cat(&[&mean.squeeze(2)?, &variance], 1)?)
}

/// A group norm by means and variances that are given.
fn given_norm(
    x: &Tensor,
    given: &Tensor,
    (weight, bias): (&Tensor, &Tensor),
    (groups, eps): (usize, f64),
) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let dtype = x.dtype();
    let x = x
        .to_dtype(DType::F32)?
        .reshape((b, groups, c / groups * h * w))?;
    let given = given.to_dtype(DType::F32)?;
    let of = |first: usize| given.narrow(1, first, groups)?.unsqueeze(2);
    let x = x
        .broadcast_sub(&of(0)?)?
        .broadcast_div(&(of(groups)? + eps)?.sqrt()?)?;
    let per_channel = |t: &Tensor| t.to_dtype(DType::F32)?.reshape((1, c, 1, 1));
    let y = x
        .reshape((b, c, h, w))?
        .broadcast_mul(&per_channel(weight)?)?
        .broadcast_add(&per_channel(bias)?)?;
    Ok(y.to_dtype(dtype)?)
}

fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    (stride, padding): (usize, Padding),
) -> Result<Tensor> {
    let Padding { before, after } = padding;
    let common = before.min(after);
    let mut x = x.clone();
    if before != after {
        for axis in [2, 3] {
            x = x.pad_with_zeros(axis, before - common, after - common)?;
        }
    }
    let y = x.contiguous()?.conv2d(weight, common, stride, 1, 1)?;
    Ok(match bias {
        Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?)?,
        None => y,
    })
}

fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let dims = x.dims();
    let (width, rows) = (
        dims[dims.len() - 1],
        x.elem_count() / dims[dims.len() - 1].max(1),
    );
    let mut shape = dims.to_vec();
    if let Some(last) = shape.last_mut() {
        *last = weight.dim(0)?;
    }
    let y = x.reshape((rows, width))?.matmul(&weight.t()?)?;
    Ok(y.reshape(shape)?)
}

fn group_norm(
    x: &Tensor,
    (weight, bias): (&Tensor, &Tensor),
    groups: usize,
    eps: f64,
    activation: Option<Activation>,
) -> Result<Tensor> {
    if let Some(y) = cpu::group_norm(x, (weight, bias), groups, eps, activation)? {
        return Ok(y);
    }
    let (b, c, h, w) = x.dims4()?;
    let dtype = x.dtype();
    let x = x
        .to_dtype(DType::F32)?
        .reshape((b, groups, c / groups * h * w))?;
    let x = x.broadcast_sub(&x.mean_keepdim(2)?)?;
    let variance = x.sqr()?.mean_keepdim(2)?;
    let x = x.broadcast_div(&(variance + eps)?.sqrt()?)?;
    let per_channel = |t: &Tensor| t.to_dtype(DType::F32)?.reshape((1, c, 1, 1));
    let y = x
        .reshape((b, c, h, w))?
        .broadcast_mul(&per_channel(weight)?)?
        .broadcast_add(&per_channel(bias)?)?;
    let y = match activation {
        Some(activation) => activate(&y, activation)?,
        None => y,
    };
    Ok(y.to_dtype(dtype)?)
}

fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    if let Some(y) = cpu::activate(x, activation)? {
        return Ok(y);
    }
    Ok(match activation {
        Activation::Silu => x.silu()?,
        Activation::Gelu => x.gelu_erf()?,
        Activation::GeluTanh => x.gelu()?,
        Activation::QuickGelu => (x * candle_nn::ops::sigmoid(&(x * 1.702)?)?)?,
        // softplus(x) = max(x, 0) + ln(1 + e^−|x|) does not overflow
        Activation::Mish => {
            let softplus = (x.relu()? + ((x.abs()?.neg()?.exp()? + 1.0)?.log()?))?;
            (x * softplus.tanh()?)?
        }
        Activation::Relu => x.relu()?,
        Activation::LeakyRelu { percent } => {
            let slope = f64::from(Activation::slope(percent));
            (x.relu()? - (x.neg()?.relu()? * slope)?)?
        }
        Activation::Sigmoid => candle_nn::ops::sigmoid(x)?,
    })
}

/// Softmax attention, one batch entry and head at a time where the scores of all would be large, and by rows of queries where even
/// those of one head would be.
fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let (b, s, c) = q.dims3()?;
    let t = k.dim(1)?;
    let width = c / heads;
    let split = |x: &Tensor, n: usize| -> candle_core::Result<Tensor> {
        x.reshape((b, n, heads, width))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((b * heads, n, width))
    };
    let (q, k, v) = (
        (split(q, s)? * (1.0 / (width as f64).sqrt()))?,
        split(k, t)?.transpose(1, 2)?.contiguous()?,
        split(v, t)?,
    );
    let mask = if causal {
        Some(causal_mask(s, t, q.device())?)
    } else {
        None
    };
    let slices = (MAX_SCORES / (s * t).max(1)).clamp(1, b * heads);
    let rows = (MAX_SCORES / t.max(1)).clamp(1, s.max(1));
    let mut out = Vec::new();
    for first in (0..b * heads).step_by(slices) {
        let n = slices.min(b * heads - first);
        let (q, k, v) = (
            q.narrow(0, first, n)?,
            k.narrow(0, first, n)?,
            v.narrow(0, first, n)?,
        );
        let mut parts = Vec::new();
        for row in (0..s).step_by(rows) {
            let m = rows.min(s - row);
            let scores = q
                .narrow(1, row, m)?
                .contiguous()?
                .matmul(&k)?
                .to_dtype(DType::F32)?;
            let scores = match &mask {
                Some(mask) => scores.broadcast_add(&mask.narrow(0, row, m)?)?,
                None => scores,
            };
            let weights = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(v.dtype())?;
            parts.push(weights.matmul(&v)?);
        }
        out.push(Tensor::cat(&parts, 1)?);
    }
    let out = Tensor::cat(&out, 0)?.reshape((b, heads, s, width))?;
    Ok(out.transpose(1, 2)?.contiguous()?.reshape((b, s, c))?)
}

/// `[s, t]`: zero where a query may look, −∞ above the diagonal.
fn causal_mask(s: usize, t: usize, device: &Device) -> Result<Tensor> {
    let mask: Vec<f32> = (0..s)
        .flat_map(|i| (0..t).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 }))
        .collect();
    Ok(Tensor::from_vec(mask, (s, t), device)?)
}

/// Follows diffusers' `get_timestep_embedding`: frequencies in f32, product with the timestep in f32.
fn sinusoid(t: &Tensor, width: usize, flip_sin_to_cos: bool, freq_shift: f64) -> Result<Tensor> {
    let half = width / 2;
    let step = -(10000f64.ln()) as f32;
    let scale = (half as f64 - freq_shift) as f32;
    let frequencies: Vec<f32> = (0..half).map(|i| (step * i as f32 / scale).exp()).collect();
    let frequencies = Tensor::from_vec(frequencies, (1, half), t.device())?;
    let angles = t
        .to_dtype(DType::F32)?
        .unsqueeze(1)?
        .broadcast_mul(&frequencies)?;
    let (sin, cos) = (angles.sin()?, angles.cos()?);
    let parts = if flip_sin_to_cos {
        [cos, sin]
    } else {
        [sin, cos]
    };
    let out = Tensor::cat(&parts, 1)?;
    // an odd width is filled up with one zero at the end
    Ok(out.pad_with_zeros(1, 0, width - 2 * half)?)
}
