//! What an adapter makes of a weight: the change, computed whole in f32 from the tensors of its form, and the decomposition of weights into
//! directions and lengths (DoRA) on top.

use candle_core::{Device, Tensor};

use super::form::{Extent, Factor, Form, Stored, is_old, kronecker};
use super::turn::Turns;
use crate::error::Result;

/// Which lengths DoRA divides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum DoraNorm {
    /// Those of the changed weight, as in the paper (arXiv 2402.09353), PEFT, LyCORIS and A1111.
    #[default]
    Merged,
    /// Those of the weight before the change, as ComfyUI and Forge do for lengths of rows.
    Original,
}

/// Gives the numbers of a tensor of the file.
pub(super) type Read<'a> = dyn Fn(&Stored) -> Result<Vec<f32>> + 'a;

/// A tensor as a matrix.
fn matrix(read: &Read<'_>, stored: &Stored) -> Result<Tensor> {
    let shape = (stored.rows(), stored.columns());
    Ok(Tensor::from_vec(read(stored)?, shape, &Device::Cpu)?)
}

/// The rows `first .. first + count` of up · down, not scaled.
///
/// # Errors
/// When a tensor cannot be read.
pub(super) fn low_rank(
    read: &Read<'_>,
    (up, down): (&Stored, &Stored),
    (first, count): (usize, usize),
) -> Result<Vec<f32>> {
    let up = matrix(read, up)?.narrow(0, first, count)?;
    Ok(up.matmul(&matrix(read, down)?)?.flatten_all()?.to_vec1()?)
}

/// The change of a weight `[rows, inputs · taps]` by `form`, not scaled; `base` is the weight, and `limit` the bound that a rotation's alpha is,
/// for each row.
///
/// # Errors
/// When a tensor cannot be read.
pub(super) fn change(
    form: &Form,
    read: &Read<'_>,
    base: &[f32],
    of: Extent,
    limit: Option<f32>,
) -> Result<Vec<f32>> {
    let weight = || Tensor::from_slice(base, (of.rows, of.columns()), &Device::Cpu);
    let whole = match form {
        Form::LowRank {
            up,
            down,
            mid: None,
        } => matrix(read, up)?.matmul(&matrix(read, down)?)?,
        Form::LowRank {
            up,
            down,
            mid: Some(mid),
        } => chain(
            &matrix(read, up)?,
            &matrix(read, mid)?,
            &matrix(read, down)?,
            of.taps,
        )?,
        Form::Hadamard {
            first,
            second,
            cores,
        } => {
            let factor = |(a, b): &(Stored, Stored), core: Option<&Stored>| -> Result<Tensor> {
                let (a, b) = (matrix(read, a)?, matrix(read, b)?);
                match core {
                    None => Ok(a.matmul(&b)?),
                    Some(core) => chain(&a.t()?, &matrix(read, core)?, &b, of.taps),
                }
            };
            let (one, two) = match cores {
                Some((one, two)) => (Some(one), Some(two)),
                None => (None, None),
            };
            (factor(first, one)? * factor(second, two)?)?
        }
        Form::Kronecker { first, second } => product(first, second, read, of)?,
        Form::Generalised { a, b, mid } => {
            let ((a1, a2), (b1, b2)) = if is_old(a, b) {
                ((&a.1, &a.0), (&b.1, &b.0))
            } else {
                ((&a.0, &a.1), (&b.0, &b.1))
            };
            let own = match mid {
                None => matrix(read, b1)?.matmul(&matrix(read, b2)?)?,
                Some(mid) => {
                    let (b1, mid) = (matrix(read, b1)?, matrix(read, mid)?);
                    chain(&b1, &mid, &matrix(read, b2)?, of.taps)?
                }
            };
            // inputs last, so that they can be multiplied with
            let by_tap = weight()?.reshape((of.rows, of.inputs, of.taps))?;
            let by_tap = by_tap.transpose(1, 2)?.contiguous()?;
            let flat = by_tap.reshape((of.rows * of.taps, of.inputs))?;
            let turned = flat
                .matmul(&matrix(read, a1)?)?
                .matmul(&matrix(read, a2)?)?;
            let turned = turned.reshape((of.rows, of.taps, of.inputs))?;
            let turned = turned.transpose(1, 2)?.contiguous()?;
            (turned.reshape((of.rows, of.columns()))? + own)?
        }
        Form::Full(difference) => return read(difference),
        Form::Rotation { blocks, rescale } => {
            let rescale = rescale.as_ref().map(read).transpose()?;
            let size = blocks.shape.get(1).copied().unwrap_or(0);
            let turns = Turns {
                blocks: read(blocks)?,
                size,
                most: limit.map(|limit| limit * of.rows as f32),
            };
            return Ok(turns.change(base, of, rescale.as_deref()));
        }
        Form::Scaling { weight, on_input } => {
            let scales = read(weight)?;
            let row = of.columns().max(1);
            let scale = |i: usize| {
                let channel = if *on_input {
                    i % row / of.taps.max(1)
                } else {
                    i / row
                };
                scales.get(channel).copied().unwrap_or(0.0)
            };
            return Ok(base.iter().enumerate().map(|(i, w)| w * scale(i)).collect());
        }
    };
    Ok(whole.flatten_all()?.to_vec1()?)
}

/// up `[rows, m]`, core `[m, n · taps]`, down `[n, inputs]` → `[rows, inputs · taps]`.
fn chain(up: &Tensor, core: &Tensor, down: &Tensor, taps: usize) -> Result<Tensor> {
    let (n, inputs) = down.dims2()?;
    let rows = up.dim(0)?;
    let half = up.contiguous()?.matmul(core)?.reshape((rows, n, taps))?;
    let half = half.transpose(1, 2)?.contiguous()?;
    let whole = half.reshape((rows * taps, n))?.matmul(down)?;
    let whole = whole.reshape((rows, taps, inputs))?.transpose(1, 2)?;
    Ok(whole.contiguous()?.reshape((rows, inputs * taps))?)
}

/// The Kronecker product of two factors, the second with the kernel's positions.
fn product(first: &Factor, second: &Factor, read: &Read<'_>, of: Extent) -> Result<Tensor> {
    let ((a, c), (b, d)) = kronecker(first, second, of).unwrap_or_default();
    let whole = |factor: &Factor| match factor {
        Factor::Whole(stored) => matrix(read, stored),
        Factor::Product(a, b, None) => Ok(matrix(read, a)?.matmul(&matrix(read, b)?)?),
        Factor::Product(a, b, Some(core)) => {
            let a = matrix(read, a)?.t()?;
            chain(&a, &matrix(read, core)?, &matrix(read, b)?, of.taps)
        }
    };
    let first = whole(first)?.reshape((a, 1, c, 1))?;
    let second = whole(second)?.reshape((1, b, 1, d * of.taps))?;
    Ok(first
        .broadcast_mul(&second)?
        .reshape((of.rows, of.columns()))?)
}

/// A weight with directions from `merged` and lengths from `magnitude`: one for each row, or for each input where its first axis is 1 (LyCORIS
/// of before `wd_on_out`). Lengths are divided out of `merged`, or of `base` for rows if `norm` says so.
pub(super) fn decompose(
    merged: &mut [f32],
    base: &[f32],
    of: Extent,
    (magnitude, per_input): (&[f32], bool),
    norm: DoraNorm,
) {
    let row = of.columns().max(1);
    let taps = of.taps.max(1);
    let channel = |i: usize| if per_input { i % row / taps } else { i / row };
    let measured: &[f32] = match norm {
        DoraNorm::Original if !per_input => base,
        _ => merged,
    };
    let mut squares = vec![0.0f64; magnitude.len()];
    for (i, &w) in measured.iter().enumerate() {
        if let Some(sum) = squares.get_mut(channel(i)) {
            *sum += f64::from(w) * f64::from(w);
        }
    }
    let scales: Vec<f32> = squares
        .iter()
        .zip(magnitude)
        .map(|(sum, m)| (f64::from(*m) / (sum.sqrt() + f64::from(f32::EPSILON))) as f32)
        .collect();
    for (i, w) in merged.iter_mut().enumerate() {
        *w *= scales.get(channel(i)).copied().unwrap_or(1.0);
    }
}
