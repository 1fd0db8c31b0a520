//! Latents in another size, as PyTorch's `interpolate` makes them (2.15, `align_corners=False`).

use candle_core::Tensor;

use crate::error::Result;

/// How latents between latents are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    /// The one at the left and top.
    Nearest,
    /// The nearest.
    NearestExact,
    /// A line between two.
    Linear,
    /// A cubic through four.
    Cubic,
}

/// The weights of one result: where they begin, and each.
type Taps = Vec<(usize, f32)>;

/// `[b, c, h, w]` → `[b, c, size]`; with `smooth`, a smaller size takes all latents into account (PyTorch's `antialias`).
pub(super) fn resize(
    latents: &Tensor,
    size: (usize, usize),
    kernel: Kernel,
    smooth: bool,
) -> Result<Tensor> {
    let (b, c, h, w) = latents.dims4()?;
    if (h, w) == size {
        return Ok(latents.clone());
    }
    let values: Vec<f32> = latents.flatten_all()?.to_vec1()?;
    let columns = taps(w, size.1, kernel, smooth);
    let rows = taps(h, size.0, kernel, smooth);
    let mut out = Vec::with_capacity(b * c * size.0 * size.1);
    for plane in values.chunks_exact((h * w).max(1)) {
        let wide: Vec<f32> = plane
            .chunks_exact(w.max(1))
            .flat_map(|row| columns.iter().map(|taps| weighed(taps, |x| row[x])))
            .collect();
        for taps in &rows {
            out.extend((0..size.1).map(|x| weighed(taps, |y| wide[y * size.1 + x])));
        }
    }
    Ok(Tensor::from_vec(
        out,
        (b, c, size.0, size.1),
        latents.device(),
    )?)
}

/// Bilinear, without a filter against aliasing.
pub(super) fn bilinear(latents: &Tensor, size: (usize, usize)) -> Result<Tensor> {
    resize(latents, size, Kernel::Linear, false)
}

fn weighed(taps: &Taps, at: impl Fn(usize) -> f32) -> f32 {
    taps.iter().map(|&(i, weight)| at(i) * weight).sum()
}

/// Which of `from` values make each of `to`.
fn taps(from: usize, to: usize, kernel: Kernel, smooth: bool) -> Vec<Taps> {
    let scale = from as f64 / to.max(1) as f64;
    let last = from.saturating_sub(1);
    let inside = |place: f64| (place.max(0.0) as usize).min(last);
    (0..to)
        .map(|i| {
            let centre = (i as f64 + 0.5) * scale - 0.5;
            match kernel {
                Kernel::Nearest => vec![(inside((i as f64 * scale).floor()), 1.0)],
                Kernel::NearestExact => vec![(inside(((i as f64 + 0.5) * scale).floor()), 1.0)],
                _ if smooth => filtered(centre, scale, (from, kernel)),
                Kernel::Linear => {
                    let place = centre.max(0.0);
                    let (first, part) = (inside(place.floor()), place.fract() as f32);
                    vec![(first, 1.0 - part), ((first + 1).min(last), part)]
                }
                Kernel::Cubic => {
                    let first = centre.floor();
                    let weight = |j: i32| cubic(centre - first - f64::from(j), -0.75) as f32;
                    (-1..=2)
                        .map(|j| (inside(first + f64::from(j)), weight(j)))
                        .collect()
                }
            }
        })
        .collect()
}

/// The same with a kernel as wide as the scale asks for, and weights that sum up to 1.
fn filtered(centre: f64, scale: f64, (from, kernel): (usize, Kernel)) -> Taps {
    let wide = scale.max(1.0);
    let reach = if kernel == Kernel::Cubic { 2.0 } else { 1.0 } * wide;
    let centre = centre + 0.5;
    let first = (centre - reach + 0.5).max(0.0) as usize;
    let end = ((centre + reach + 0.5) as usize).min(from);
    let weights: Vec<(usize, f64)> = (first..end)
        .map(|i| {
            let place = (i as f64 - centre + 0.5) / wide;
            let weight = match kernel {
                Kernel::Cubic => cubic(place, -0.5),
                _ => (1.0 - place.abs()).max(0.0),
            };
            (i, weight)
        })
        .collect();
    let sum: f64 = weights.iter().map(|(_, weight)| weight).sum();
    let sum = if sum == 0.0 { 1.0 } else { sum };
    weights
        .into_iter()
        .map(|(i, weight)| (i, (weight / sum) as f32))
        .collect()
}

/// Keys's cubic with slope `a`.
fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x <= 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}
