//! The operations of transformers over sequences: adaptive and root-mean-square norms, turned pairs, patches, biased scores.

use candle_core::{D, DType, Tensor};

use crate::op::{PatchOrder, Relative};
use crate::{Error, Op, Result};

/// Computes one of these operations. Shapes have been checked by [`Op::shape`].
pub(super) fn run(op: &Op, inputs: &[&Tensor]) -> Result<Tensor> {
    let x = inputs[0];
    let dtype = x.dtype();
    Ok(match op {
        Op::AdaptiveNorm { eps, shift, scale } => {
            let x = x.to_dtype(DType::F32)?;
            let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
            let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
            let x = x.broadcast_div(&(variance + *eps)?.sqrt()?)?;
            let values = inputs[1].to_dtype(DType::F32)?;
            let scale = (slot(&values, *scale, &x)? + 1.0)?;
            x.broadcast_mul(&scale)?
                .broadcast_add(&slot(&values, *shift, &x)?)?
                .to_dtype(dtype)?
        }
        Op::Gate { slot: place } => x.broadcast_mul(&slot(inputs[1], *place, x)?)?,
        Op::RmsNorm { weight, eps } => {
            let weight = weight.value()?;
            let (shape, width) = (x.dims(), weight.dim(0)?);
            let x = x.to_dtype(DType::F32)?.reshape(((), width))?;
            let mean = x.sqr()?.mean_keepdim(1)?;
            x.broadcast_div(&(mean + *eps)?.sqrt()?)?
                .broadcast_mul(&weight.to_dtype(DType::F32)?)?
                .reshape(shape)?
                .to_dtype(dtype)?
        }
        Op::Rotate { heads, turns } => {
            let (b, s, c) = x.dims3()?;
            let half = c / heads / 2;
            let of = |i: usize| {
                let values: Vec<f32> = turns.iter().map(|turn| turn[i]).collect();
                Tensor::from_vec(values, (1, s, 1, half), x.device())
            };
            let (cos, sin) = (of(0)?, of(1)?);
            let pairs = x.to_dtype(DType::F32)?.reshape((b, s, *heads, half, 2))?;
            let (even, odd) = (
                pairs.narrow(4, 0, 1)?.squeeze(4)?,
                pairs.narrow(4, 1, 1)?.squeeze(4)?,
            );
            let first = (even.broadcast_mul(&cos)? - odd.broadcast_mul(&sin)?)?;
            let second = (odd.broadcast_mul(&cos)? + even.broadcast_mul(&sin)?)?;
            Tensor::stack(&[first, second], 4)?
                .reshape((b, s, c))?
                .to_dtype(dtype)?
        }
        Op::Patchify { patch: p } => {
            let (b, c, h, w) = x.dims4()?;
            x.reshape((b, c, h / p, *p, w / p, *p))?
                .permute((0, 2, 4, 1, 3, 5))?
                .contiguous()?
                .reshape((b, h / p * (w / p), c * p * p))?
        }
        Op::Unpatchify {
            h,
            w,
            patch: p,
            order,
        } => {
            let (b, _, c) = x.dims3()?;
            let c = c / (p * p);
            let x = match order {
                PatchOrder::ChannelsFirst => x
                    .reshape(&[b, *h, *w, c, *p, *p])?
                    .permute((0, 3, 1, 4, 2, 5))?,
                PatchOrder::ChannelsLast => x
                    .reshape(&[b, *h, *w, *p, *p, c])?
                    .permute((0, 5, 1, 3, 2, 4))?,
            };
            x.contiguous()?.reshape((b, c, h * p, w * p))?
        }
        Op::Attention {
            heads,
            relative: Some(relative),
            ..
        } => attention((x, inputs[1], inputs[2]), *heads, relative)?,
        other => return Err(Error::Mixed { op: other.name() }),
    })
}

/// Place `slot` of `values [b, n · c]` for `x [b, s, c]`: `[b, 1, c]`.
fn slot(values: &Tensor, slot: usize, x: &Tensor) -> Result<Tensor> {
    let c = x.dim(2)?;
    Ok(values.narrow(1, slot * c, c)?.unsqueeze(1)?)
}

/// `softmax(q kᵀ + bias) v`.
fn attention(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    heads: usize,
    relative: &Relative,
) -> Result<Tensor> {
    let ((b, s, c), t) = (q.dims3()?, k.dim(1)?);
    let split = |x: &Tensor, n: usize| -> candle_core::Result<Tensor> {
        x.reshape((b, n, heads, c / heads))?
            .transpose(1, 2)?
            .contiguous()
    };
    let (q, k, v) = (split(q, s)?, split(k, t)?, split(v, t)?);
    let buckets: Vec<u32> = (0..s)
        .flat_map(|i| (0..t).map(move |j| j.cast_signed() - i.cast_signed()))
        .map(|distance| relative.bucket(distance) as u32)
        .collect();
    let buckets = Tensor::new(buckets, q.device())?;
    let bias = relative
        .table
        .value()?
        .index_select(&buckets, 0)?
        .reshape((s, t, heads))?
        .permute((2, 0, 1))?
        .to_dtype(DType::F32)?;
    let scores = q.matmul(&k.t()?)?.to_dtype(DType::F32)?; // [b, heads, s, t]
    let scores = scores.broadcast_add(&bias)?;
    let weights = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(v.dtype())?;
    Ok(weights
        .matmul(&v)?
        .transpose(1, 2)?
        .contiguous()?
        .reshape((b, s, c))?)
}
