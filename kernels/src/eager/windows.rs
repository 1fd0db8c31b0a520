//! Attention within windows, as rows that are picked, matrix products and rows that are put back.

use std::sync::Arc;

use candle_core::{D, DType, Device, Tensor};

use crate::windows::{APART, SHORTEST, Windows};
use crate::{Param, Result};

/// `q, k, v [b, h · w, c]` → `[b, h · w, c]`.
pub(super) fn attention(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    windows: &Windows,
) -> Result<Tensor> {
    let ((b, s, c), heads) = (q.dims3()?, windows.heads);
    let (d, device) = (c / heads, q.device());
    let places = Places::new(windows);
    let (count, queries) = (places.count, windows.side * windows.side);
    let keys = windows.key_side() * windows.key_side();
    let pick = |x: &Tensor, rows: &[u32], each: usize| -> candle_core::Result<Tensor> {
        // behind the last pixel stands one of zeros
        let x = x.to_dtype(DType::F32)?.pad_with_zeros(1, 0, 1)?;
        let rows = Tensor::new(rows, device)?;
        x.contiguous()?
            .index_select(&rows, 1)?
            .reshape((b * count, each, heads, d))?
            .transpose(1, 2)?
            .contiguous()
    };
    let (mut q, mut k) = (
        pick(q, &places.queries, queries)?,
        pick(k, &places.keys, keys)?,
    );
    if windows.cosine.is_some() {
        (q, k) = (normalised(&q)?, normalised(&k)?);
    }
    let (bias, factors) = bias(windows, d, device)?;
    let scores = q.matmul(&k.t()?)?.broadcast_mul(&factors)?; // [b · windows, heads, queries, keys]
    let scores = scores.broadcast_add(&bias)?;
    let scores = match places.apart(windows) {
        Some(apart) => {
            let apart = Tensor::from_vec(apart, (1, count, 1, queries, keys), device)?;
            scores
                .reshape(&[b, count, heads, queries, keys])?
                .broadcast_add(&apart)?
                .reshape((b * count, heads, queries, keys))?
        }
        None => scores,
    };
    let seen = candle_nn::ops::softmax_last_dim(&scores)?;
    let seen = seen.matmul(&pick(v, &places.keys, keys)?)?;
    let mut back = vec![0u32; s];
    for (i, &place) in places.queries.iter().enumerate() {
        back[place as usize] = i as u32;
    }
    Ok(seen
        .transpose(1, 2)?
        .contiguous()?
        .reshape((b, s, c))?
        .index_select(&Tensor::new(back, device)?, 1)?
        .to_dtype(v.dtype())?)
}

/// Vectors of length one.
fn normalised(x: &Tensor) -> candle_core::Result<Tensor> {
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    x.broadcast_div(&length.maximum(f64::from(SHORTEST))?)
}

/// `[heads, queries, keys]` to add, `[heads, 1, 1]` to multiply with before.
fn bias(windows: &Windows, width: usize, device: &Device) -> Result<(Tensor, Tensor)> {
    let read = |param: &Param| Ok(Arc::new(param.numbers()?));
    let tables = windows.tables(width, &read)?;
    let (side, wide, n) = (windows.side, windows.key_side(), windows.distances());
    let (heads, queries, keys) = (windows.heads, side * side, wide * wide);
    let of = |i: usize| {
        let (head, query, key) = (i / (queries * keys), i / keys % queries, i % keys);
        let down = key / wide + side - 1 - query / side;
        let right = key % wide + side - 1 - query % side;
        tables[(head * n + down) * n + right]
    };
    let bias: Vec<f32> = (0..heads * queries * keys).map(of).collect();
    Ok((
        Tensor::from_vec(bias, (heads, queries, keys), device)?,
        Tensor::from_slice(&tables[heads * n * n..], (heads, 1, 1), device)?,
    ))
}

/// Where the queries and keys of each window lie.
struct Places {
    /// Windows of a picture.
    count: usize,
    /// A window's after the other's; the first number behind the picture stands for zeros.
    queries: Vec<u32>,
    keys: Vec<u32>,
    /// The place of each query in the picture that begins where windows do.
    shifted: Vec<(usize, usize)>,
}

impl Places {
    fn new(windows: &Windows) -> Self {
        let ((h, w), side) = (windows.size, windows.side);
        let (shift, beyond, wide) = (windows.shift(), windows.beyond(), windows.key_side());
        let (down, across) = (h / side, w / side);
        let (mut queries, mut keys, mut shifted) = (Vec::new(), Vec::new(), Vec::new());
        for window in 0..down * across {
            let (top, left) = (window / across * side, window % across * side);
            for i in 0..side * side {
                let (y, x) = (top + i / side, left + i % side);
                shifted.push((y, x));
                queries.push(((y + shift) % h * w + (x + shift) % w) as u32);
            }
            for i in 0..wide * wide {
                let (y, x) = (top + i / wide, left + i % wide);
                let inside = (beyond..h + beyond).contains(&y) && (beyond..w + beyond).contains(&x);
                keys.push(match inside {
                    true => ((y - beyond + shift) % h * w + (x - beyond + shift) % w) as u32,
                    false => (h * w) as u32,
                });
            }
        }
        Self {
            count: down * across,
            queries,
            keys,
            shifted,
        }
    }

    /// `[windows, queries, keys]` that is added to scores, where windows are shifted.
    fn apart(&self, windows: &Windows) -> Option<Vec<f32>> {
        if windows.shift() == 0 {
            return None;
        }
        let (h, w) = windows.size;
        let part = |(y, x): &(usize, usize)| (windows.part(*y, h), windows.part(*x, w));
        let each = windows.side * windows.side;
        let all = self.shifted.chunks(each).flat_map(|window| {
            window.iter().flat_map(move |query| {
                window
                    .iter()
                    .map(move |key| match part(query) == part(key) {
                        true => 0.0,
                        false => APART,
                    })
            })
        });
        Some(all.collect())
    }
}
