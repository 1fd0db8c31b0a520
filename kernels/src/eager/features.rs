//! The operations on whole pictures of features: how much a token is looked at, lowest frequencies, means.

use std::f64::consts::TAU;

use candle_core::{D, DType, Tensor};

use crate::{Error, Op, Result};

/// Computes one of these operations. Shapes have been checked by [`Op::shape`].
pub(super) fn run(op: &Op, inputs: &[&Tensor]) -> Result<Tensor> {
    let x = inputs[0];
    let dtype = x.dtype();
    let y = match op {
        Op::AttentionMass { heads } => {
            let ((b, s, c), t) = (x.dims3()?, inputs[1].dim(1)?);
            let split = |x: &Tensor, n: usize| -> candle_core::Result<Tensor> {
                x.to_dtype(DType::F32)?
                    .reshape((b, n, *heads, c / heads))?
                    .transpose(1, 2)?
                    .contiguous()
            };
            let scores = split(x, s)?.matmul(&split(inputs[1], t)?.t()?)?; // [b, heads, s, t]
            let scores = (scores / ((c / heads) as f64).sqrt())?;
            let weights = candle_nn::ops::softmax_last_dim(&scores)?;
            weights.mean(1)?.sum(1)?.unsqueeze(2)?
        }
        Op::LowFrequencies { scale } => low_frequencies(x, *scale)?,
        Op::Amplify { scale, by_mean } => {
            let x = x.to_dtype(DType::F32)?;
            let half = x.dim(1)? / 2;
            let first = x.narrow(1, 0, half)?;
            let first = match by_mean {
                false => (first * *scale)?,
                true => {
                    let mean = x.mean_keepdim(1)?; // [b, 1, h, w]
                    let flat = mean.flatten_from(1)?;
                    let bound = |x: Tensor| x.unsqueeze(2)?.unsqueeze(3);
                    let least = bound(flat.min_keepdim(D::Minus1)?)?;
                    let most = bound(flat.max_keepdim(D::Minus1)?)?;
                    let mean = mean
                        .broadcast_sub(&least)?
                        .broadcast_div(&most.broadcast_sub(&least)?)?;
                    first.broadcast_mul(&mean.affine(*scale - 1.0, 1.0)?)?
                }
            };
            Tensor::cat(&[&first, &x.narrow(1, half, x.dim(1)? - half)?], 1)?
        }
        other => return Err(Error::Mixed { op: other.name() }),
    };
    Ok(y.to_dtype(dtype)?)
}

/// The filter as a matrix over pixels: the identity and, for each of the frequencies, cosines of distances.
fn low_frequencies(x: &Tensor, scale: f64) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let n = h * w;
    let (rows, columns) = (h.min(2), w.min(2));
    let change = (scale - 1.0) / n as f64;
    let entry = |i: usize, j: usize| {
        let distance = |a: usize, b: usize, n: usize| (a as f64 - b as f64) / n as f64;
        let (y, x) = (distance(i / w, j / w, h), distance(i % w, j % w, w));
        let waves = (0..rows * columns)
            .map(|k| (TAU * ((k / columns) as f64 * y + (k % columns) as f64 * x)).cos());
        let identity = if i == j { 1.0 } else { 0.0 };
        (identity + change * waves.sum::<f64>()) as f32
    };
    let matrix: Vec<f32> = (0..n * n).map(|k| entry(k / n, k % n)).collect();
    let matrix = Tensor::from_vec(matrix, (n, n), x.device())?;
    let flat = x.to_dtype(DType::F32)?.reshape((b * c, n))?;
    Ok(flat.matmul(&matrix)?.reshape((b, c, h, w))?)
}
