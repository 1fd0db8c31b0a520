//! Merging of tokens, step by step as tomesd writes it down in torch.

use candle_core::{D, DType, Tensor};

use crate::{Error, Op, Result};

/// Computes one of these operations. Shapes have been checked by [`Op::shape`].
pub(super) fn run(op: &Op, inputs: &[&Tensor]) -> Result<Tensor> {
    let x = inputs[0];
    Ok(match op {
        Op::Match { h, w, merged } => {
            let pictures = (0..x.dim(0)?).map(|i| {
                let choice = inputs.get(1).map(|choice| choice.get(i)).transpose()?;
                matched(&x.get(i)?, choice.as_ref(), (*h, *w), *merged)
            });
            let pictures = pictures.collect::<Result<Vec<_>>>()?;
            Tensor::stack(&pictures, 0)?.unsqueeze(2)?
        }
        Op::Merge { count } => {
            let pictures = (0..x.dim(0)?).map(|i| {
                // one row for each place, a part in each of its tokens' columns
                let places = whole(&inputs[1].get(i)?)?;
                let mut parts = vec![0f32; count * places.len()];
                for (token, &place) in places.iter().enumerate() {
                    let of = places.iter().filter(|other| **other == place).count();
                    parts[place as usize * places.len() + token] = 1.0 / of as f32;
                }
                let parts = Tensor::from_vec(parts, (*count, places.len()), x.device())?;
                let merged = parts.matmul(&x.get(i)?.to_dtype(DType::F32)?)?;
                Ok(merged.to_dtype(x.dtype())?)
            });
            Tensor::stack(&pictures.collect::<Result<Vec<_>>>()?, 0)?
        }
        Op::Unmerge => {
            let pictures = (0..x.dim(0)?).map(|i| {
                let places = Tensor::new(whole(&inputs[1].get(i)?)?, x.device())?;
                Ok(x.get(i)?.contiguous()?.index_select(&places, 0)?)
            });
            let y = Tensor::stack(&pictures.collect::<Result<Vec<_>>>()?, 0)?;
            match inputs.get(2) {
                Some(more) => (*more + y)?,
                None => y,
            }
        }
        other => return Err(Error::Mixed { op: other.name() }),
    })
}

/// Places are whole numbers.
fn whole(places: &Tensor) -> Result<Vec<u32>> {
    let places: Vec<f32> = places.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?;
    Ok(places.into_iter().map(|place| place as u32).collect())
}

/// Places of the tokens of `x [s, c]`, in f32.
fn matched(
    x: &Tensor,
    choice: Option<&Tensor>,
    (h, w): (usize, usize),
    merged: usize,
) -> Result<Tensor> {
    let device = x.device();
    let choice = match choice {
        Some(choice) => whole(choice)?,
        None => vec![0; (h / 2) * (w / 2)],
    };
    let stays = choice.iter().enumerate().map(|(cell, &of_four)| {
        let (y, x) = (2 * (cell / (w / 2)), 2 * (cell % (w / 2)));
        ((y + of_four as usize / 2 % 2) * w + x + of_four as usize % 2) as u32
    });
    let mut stays: Vec<u32> = stays.collect();
    stays.sort_unstable();
    let goes: Vec<u32> = (0..(h * w) as u32)
        .filter(|token| stays.binary_search(token).is_err())
        .collect();
    let metric = x.to_dtype(DType::F32)?.contiguous()?;
    let length = metric.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    let metric = metric.broadcast_div(&length)?;
    let a = metric.index_select(&Tensor::new(goes.as_slice(), device)?, 0)?;
    let b = metric.index_select(&Tensor::new(stays.as_slice(), device)?, 0)?;
    let scores = a.matmul(&b.t()?.contiguous()?)?; // [goes, stays]
    let node_max: Vec<f32> = scores.max(D::Minus1)?.to_vec1()?;
    let node_idx: Vec<u32> = scores.argmax(D::Minus1)?.to_vec1()?;
    let mut edges: Vec<usize> = (0..goes.len()).collect();
    edges.sort_by(|&a, &b| node_max[b].total_cmp(&node_max[a]));
    let left = goes.len() - merged;
    let mut places = vec![0f32; h * w];
    for (i, &token) in stays.iter().enumerate() {
        places[token as usize] = (left + i) as f32;
    }
    for (rank, &edge) in edges.iter().enumerate() {
        places[goes[edge] as usize] = match rank.checked_sub(merged) {
            Some(rank) => rank as f32,
            None => (left + node_idx[edge] as usize) as f32,
        };
    }
    Ok(Tensor::new(places, device)?)
}
