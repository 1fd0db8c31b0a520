//! One-pass versions of norms and activations for f32 tensors on the CPU. `None` means: not such a tensor, use the plain way.

use candle_core::{CpuStorage, Device, Storage, Tensor};
use rayon::prelude::*;

use crate::{Activation, Result};

/// Elements a task: large enough to hide the cost of handing it out.
const CHUNK: usize = 1 << 14;

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2))
}

fn gelu_tanh(x: f32) -> f32 {
    0.5 * x * (1.0 + (0.797_884_6 * (x + 0.044_715 * x * x * x)).tanh())
}

fn quick_gelu(x: f32) -> f32 {
    x / (1.0 + (-1.702 * x).exp())
}

fn mish(x: f32) -> f32 {
    x * (x.max(0.0) + (-x.abs()).exp().ln_1p()).tanh()
}

fn pointwise(activation: Activation) -> Option<fn(f32) -> f32> {
    Some(match activation {
        Activation::Silu => silu,
        Activation::Gelu => gelu,
        Activation::GeluTanh => gelu_tanh,
        Activation::QuickGelu => quick_gelu,
        Activation::Mish => mish,
        Activation::Relu => |x| x.max(0.0),
        Activation::LeakyRelu { .. } | Activation::Sigmoid => return None,
    })
}

/// Gives `work` the elements of a contiguous f32 CPU tensor, or returns `None`.
pub(super) fn with_f32<T>(x: &Tensor, work: impl FnOnce(&[f32]) -> T) -> Option<T> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(data)) = &*storage else {
        return None;
    };
    let (start, end) = layout.contiguous_offsets()?;
    data.get(start..end).map(work)
}

pub(super) fn activate(x: &Tensor, activation: Activation) -> Result<Option<Tensor>> {
    let Some(f) = pointwise(activation) else {
        return Ok(None);
    };
    let out = with_f32(x, |x| {
        x.par_iter()
            .with_min_len(CHUNK)
            .map(|&x| f(x))
            .collect::<Vec<_>>()
    });
    out.map(|out| Ok(Tensor::from_vec(out, x.shape(), &Device::Cpu)?))
        .transpose()
}

pub(super) fn geglu(x: &Tensor) -> Result<Option<Tensor>> {
    let mut shape = x.dims().to_vec();
    let Some(last) = shape.last_mut() else {
        return Ok(None);
    };
    *last /= 2;
    let half = *last;
    if half == 0 {
        return Ok(None);
    }
    let out = with_f32(x, |x| {
        let mut out = vec![0f32; x.len() / 2];
        out.par_chunks_mut(half)
            .zip(x.par_chunks(2 * half))
            .with_min_len((CHUNK / half).max(1))
            .for_each(|(out, x)| {
                let (value, gate) = x.split_at(half);
                for ((out, &value), &gate) in out.iter_mut().zip(value).zip(gate) {
                    *out = value * gelu(gate);
                }
            });
        out
    });
    out.map(|out| Ok(Tensor::from_vec(out, shape, &Device::Cpu)?))
        .transpose()
}

pub(super) fn group_norm(
    x: &Tensor,
    (weight, bias): (&Tensor, &Tensor),
    groups: usize,
    eps: f64,
    activation: Option<Activation>,
) -> Result<Option<Tensor>> {
    let (_, c, h, w) = x.dims4()?;
    let (area, per_group) = (h * w, c / groups);
    if area == 0 || per_group == 0 {
        return Ok(None);
    }
    let out = with_f32(x, |x| {
        let (weight, bias) = (weight.to_vec1::<f32>().ok()?, bias.to_vec1::<f32>().ok()?);
        let f = match activation {
            Some(activation) => Some(pointwise(activation)?),
            None => None,
        };
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(per_group * area)
            .zip(x.par_chunks(per_group * area))
            .enumerate()
            .for_each(|(index, (out, x))| {
                let (mean, rstd) = moments(x, eps);
                let first = index % groups * per_group;
                for (k, (out, x)) in out.chunks_mut(area).zip(x.chunks(area)).enumerate() {
                    let scale = weight[first + k] * rstd;
                    let shift = bias[first + k] - mean * scale;
                    match f {
                        Some(f) => out
                            .iter_mut()
                            .zip(x)
                            .for_each(|(o, x)| *o = f(x * scale + shift)),
                        None => out
                            .iter_mut()
                            .zip(x)
                            .for_each(|(o, x)| *o = x * scale + shift),
                    }
                }
            });
        Some(out)
    });
    out.flatten()
        .map(|out| Ok(Tensor::from_vec(out, x.shape(), &Device::Cpu)?))
        .transpose()
}

/// Mean and reciprocal standard deviation, in two passes with f64 sums of short f32 sums.
fn moments(x: &[f32], eps: f64) -> (f32, f32) {
    let sum = |f: &dyn Fn(&[f32]) -> f32| x.chunks(256).map(|part| f64::from(f(part))).sum::<f64>();
    let n = x.len() as f64;
    let mean = (sum(&|part| part.iter().sum()) / n) as f32;
    let variance = sum(&|part| part.iter().map(|x| (x - mean) * (x - mean)).sum()) / n;
    (mean, (1.0 / (variance + eps).sqrt()) as f32)
}
