//! Orthogonal fine-tuning (OFT, arXiv 2306.07280): blocks of a weight's rows, each turned by a matrix that Cayley's transform makes of a
//! skew-symmetric one. Small systems of equations, solved in f64.

use super::form::Extent;

/// The turns of all blocks.
pub(super) struct Turns {
    /// `[blocks, size, size]`; Q is the difference from the transpose.
    pub(super) blocks: Vec<f32>,
    pub(super) size: usize,
    /// The largest norm of all Q together; none where there is no bound.
    pub(super) most: Option<f32>,
}

impl Turns {
    /// What the turns, and then a factor for each row, change of a weight: Rᵀ·W − W in each block, where R = (I + Q)(I − Q)⁻¹.
    pub(super) fn change(&self, base: &[f32], of: Extent, rescale: Option<&[f32]>) -> Vec<f32> {
        let (n, columns) = (self.size, of.columns());
        let shrink = self.shrink();
        let mut out = Vec::with_capacity(base.len());
        let blocks = self.blocks.chunks_exact((n * n).max(1));
        let weights = base.chunks_exact((n * columns).max(1));
        for (b, (block, weight)) in blocks.zip(weights).enumerate() {
            let turn = cayley(block, n, shrink);
            for (m, turn) in turn.chunks_exact(n).enumerate() {
                let row = b * n + m;
                let factor = rescale.and_then(|r| r.get(row)).copied().unwrap_or(1.0);
                let mut sum = vec![0.0f64; columns];
                for (t, w) in turn.iter().zip(weight.chunks_exact(columns.max(1))) {
                    for (sum, w) in sum.iter_mut().zip(w) {
                        *sum += t * f64::from(*w);
                    }
                }
                let own = weight.iter().skip(m * columns).take(columns);
                let changed = sum.iter().zip(own);
                out.extend(changed.map(|(s, w)| (s * f64::from(factor) - f64::from(*w)) as f32));
            }
        }
        out
    }

    /// What Q is multiplied with so that its norm keeps the bound.
    fn shrink(&self) -> f64 {
        let Some(most) = self.most.filter(|most| *most > 0.0) else {
            return 1.0;
        };
        let blocks = self.blocks.chunks_exact((self.size * self.size).max(1));
        let squares: f64 = blocks
            .map(|block| {
                skew(block, self.size, 1.0)
                    .iter()
                    .map(|q| q * q)
                    .sum::<f64>()
            })
            .sum();
        let norm = squares.sqrt() + 1e-8;
        (f64::from(most) / norm).min(1.0)
    }
}

/// The skew-symmetric part, twice, scaled.
fn skew(block: &[f32], n: usize, scale: f64) -> Vec<f64> {
    let at = |i: usize| f64::from(block.get(i).copied().unwrap_or(0.0));
    (0..n * n)
        .map(|i| (at(i) - at(i % n * n + i / n)) * scale)
        .collect()
}

/// Rᵀ = (I + Q)⁻¹(I − Q), row-major. I + Q always has an inverse: the eigenvalues of Q are imaginary.
fn cayley(block: &[f32], n: usize, scale: f64) -> Vec<f64> {
    let q = skew(block, n, scale);
    // [I + Q | I − Q], eliminated to [I | Rᵀ]
    let width = 2 * n;
    let mut system = vec![0.0f64; n * width];
    for (r, row) in system.chunks_exact_mut(width.max(1)).enumerate() {
        let (left, right) = row.split_at_mut(n);
        for (c, (left, right)) in left.iter_mut().zip(right).enumerate() {
            let unit = f64::from(u8::from(r == c));
            let q = q.get(r * n + c).copied().unwrap_or(0.0);
            (*left, *right) = (unit + q, unit - q);
        }
    }
    let mut rows: Vec<Vec<f64>> = system
        .chunks_exact(width.max(1))
        .map(<[f64]>::to_vec)
        .collect();
    for k in 0..n {
        let size = |row: &Vec<f64>| row.get(k).copied().unwrap_or(0.0).abs();
        let best = (k..n).max_by(|a, b| {
            let of = |i: &usize| rows.get(*i).map_or(0.0, size);
            of(a).total_cmp(&of(b))
        });
        rows.swap(k, best.unwrap_or(k));
        let Some(pivot) = rows.get(k).cloned() else {
            continue;
        };
        let first = pivot.get(k).copied().unwrap_or(1.0);
        for (r, row) in rows.iter_mut().enumerate() {
            let factor = if r == k {
                0.0
            } else {
                row.get(k).copied().unwrap_or(0.0) / first
            };
            for (x, p) in row.iter_mut().zip(&pivot) {
                *x = if r == k { p / first } else { *x - factor * p };
            }
        }
    }
    rows.into_iter()
        .flat_map(|row| row.into_iter().skip(n))
        .collect()
}
