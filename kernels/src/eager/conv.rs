//! Convolution of f32 tensors on the CPU: patches of a band of output rows become the columns of a matrix that stays in cache, and one
//! product with the weights writes the band where it belongs. No buffer as large as a picture is made.

use candle_core::{Device, Tensor};
use gemm::Parallelism;
use rayon::prelude::*;

use super::cpu::with_f32;
use crate::{Padding, Result};

/// Elements of a band's column matrix (4 MiB): large enough that packing the weights for the product does not show.
const COLUMNS: usize = 1 << 20;

/// Sizes of one convolution.
#[derive(Clone, Copy)]
struct Shape {
    channels: usize,
    height: usize,
    width: usize,
    kernel: (usize, usize),
    out: (usize, usize),
    stride: usize,
    before: usize,
}

/// `x [b, i, h, w]`, `weight [o, i, kh, kw]`, `bias [o]` → `[b, o, h', w']`; `None` when a tensor is not f32 on the CPU.
pub(super) fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    (stride, padding): (usize, Padding),
) -> Result<Option<Tensor>> {
    let ((batch, channels, height, width), (output, _, kh, kw)) = (x.dims4()?, weight.dims4()?);
    let size = |n: usize, k: usize| (n + padding.before + padding.after - k) / stride + 1;
    let shape = Shape {
        channels,
        height,
        width,
        kernel: (kh, kw),
        out: (size(height, kh), size(width, kw)),
        stride,
        before: padding.before,
    };
    let bias = match bias {
        Some(bias) => with_f32(bias, <[f32]>::to_vec),
        None => Some(vec![0.0; output]),
    };
    let (Some(bias), x) = (bias, x.contiguous()?) else {
        return Ok(None);
    };
    let y = with_f32(&x, |x| {
        with_f32(weight, |weight| shape.run(batch, x, weight, &bias))
    });
    let (h, w) = shape.out;
    y.flatten()
        .map(|y| Ok(Tensor::from_vec(y, (batch, output, h, w), &Device::Cpu)?))
        .transpose()
}

impl Shape {
    /// Rows of the column matrix: one for each weight of an output channel.
    fn depth(&self) -> usize {
        self.channels * self.kernel.0 * self.kernel.1
    }

    fn run(&self, batch: usize, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
        let (oh, ow) = self.out;
        let (area, picture) = (oh * ow, self.channels * self.height * self.width);
        let mut y = vec![0f32; batch * bias.len() * area];
        if y.is_empty() || picture == 0 {
            return y;
        }
        for plane in y.chunks_mut(bias.len() * area) {
            plane
                .chunks_mut(area)
                .zip(bias)
                .for_each(|(plane, &bias)| plane.fill(bias));
        }
        let rows = (COLUMNS / (self.depth() * ow)).clamp(1, oh);
        let threads = rayon::current_num_threads();
        let bands = oh.div_ceil(rows) * batch;
        if bands < 2 * threads {
            // few and small: one product at a time, shared by all cores
            for (x, y) in x.chunks(picture).zip(y.chunks_mut(bias.len() * area)) {
                for first in (0..oh).step_by(rows) {
                    let band = Band {
                        first,
                        rows: rows.min(oh - first),
                    };
                    self.band(
                        x,
                        weight,
                        Output(y.as_mut_ptr(), y.len()),
                        band,
                        Parallelism::Rayon(0),
                    );
                }
            }
            return y;
        }
        let plane = bias.len() * area;
        let out = Output(y.as_mut_ptr(), y.len());
        (0..bands).into_par_iter().for_each(|task| {
            let (b, first) = (task / oh.div_ceil(rows), task % oh.div_ceil(rows) * rows);
            let band = Band {
                first,
                rows: rows.min(oh - first),
            };
            let x = &x[b * picture..(b + 1) * picture];
            self.band(
                x,
                weight,
                out.from(b * plane, plane),
                band,
                Parallelism::None,
            );
        });
        y
    }

    /// Adds the product for one band of rows of one picture to `y`, which holds the picture's `[o, h', w']`.
    fn band(&self, x: &[f32], weight: &[f32], y: Output, band: Band, parallelism: Parallelism) {
        let (oh, ow) = self.out;
        let (depth, n) = (self.depth(), band.rows * ow);
        let outputs = weight.len() / depth;
        let columns = self.columns(x, band);
        assert!(
            outputs * oh * ow <= y.1
                && (band.first + band.rows) <= oh
                && columns.len() == depth * n
        );
        // SAFETY: the product reads `outputs × depth` weights and `depth × n` columns, which are there (`outputs` is the quotient of the
        // weights' length, the columns were counted above). It reads and writes `outputs` rows of `n` elements that begin `area` apart
        // at `first · ow`: the last ends at `(outputs − 1) · area + (first + rows) · ow ≤ outputs · area ≤ y.1`. Bands of a picture cover
        // different rows and pictures different parts of the buffer, so that no two tasks touch the same element.
        unsafe {
            gemm::gemm(
                outputs,
                n,
                depth,
                y.0.add(band.first * ow),
                1,
                (oh * ow) as isize,
                true,
                weight.as_ptr(),
                1,
                depth as isize,
                columns.as_ptr(),
                1,
                n as isize,
                1f32,
                1f32,
                false,
                false,
                false,
                parallelism,
            );
        }
    }

    /// The patches under a band of output rows, `[i·kh·kw, rows·w']`.
    fn columns(&self, x: &[f32], band: Band) -> Vec<f32> {
        let ow = self.out.1;
        let n = band.rows * ow;
        let mut columns = vec![0f32; self.depth() * n];
        let (kh, kw) = self.kernel;
        for (index, line) in columns.chunks_mut(n).enumerate() {
            let (c, ky, kx) = (index / (kh * kw), index / kw % kh, index % kw);
            let plane = &x[c * self.height * self.width..(c + 1) * self.height * self.width];
            for (row, line) in line.chunks_mut(ow).enumerate() {
                let iy = ((band.first + row) * self.stride + ky).wrapping_sub(self.before);
                if iy >= self.height {
                    continue;
                }
                let source = &plane[iy * self.width..(iy + 1) * self.width];
                if self.stride == 1 {
                    // output column ox reads input column ox + kx − before
                    let skip = self.before.saturating_sub(kx).min(ow);
                    let from = kx.saturating_sub(self.before);
                    let count = (ow - skip).min(self.width.saturating_sub(from));
                    line[skip..skip + count].copy_from_slice(&source[from..from + count]);
                    continue;
                }
                for (ox, value) in line.iter_mut().enumerate() {
                    let ix = (ox * self.stride + kx).wrapping_sub(self.before);
                    if ix < self.width {
                        *value = source[ix];
                    }
                }
            }
        }
        columns
    }
}

/// Rows of the output.
#[derive(Clone, Copy)]
struct Band {
    first: usize,
    rows: usize,
}

/// Where a product is written: a pointer and how many elements it may touch.
#[derive(Clone, Copy)]
struct Output(*mut f32, usize);

// SAFETY: the pointer is only used by `Shape::band`, whose tasks write disjoint elements of a buffer that outlives them.
unsafe impl Send for Output {}
// SAFETY: as above; sharing the value shares nothing but the address.
unsafe impl Sync for Output {}

impl Output {
    /// The part of `count` elements from `offset`.
    fn from(self, offset: usize, count: usize) -> Self {
        assert!(offset + count <= self.1);
        // SAFETY: the assertion keeps the new pointer inside the buffer.
        Self(unsafe { self.0.add(offset) }, count)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The definition, in f64.
    fn reference(x: &Tensor, w: &Tensor, bias: &[f32], stride: usize, p: Padding) -> Vec<f64> {
        let ((b, c, h, wd), (o, _, kh, kw)) = (x.dims4().unwrap(), w.dims4().unwrap());
        let (xs, ws) = (
            x.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            w.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        );
        let size = |n: usize, k: usize| (n + p.before + p.after - k) / stride + 1;
        let mut out = Vec::new();
        for (bi, oi) in (0..b).flat_map(|bi| (0..o).map(move |oi| (bi, oi))) {
            for (oy, ox) in
                (0..size(h, kh)).flat_map(|oy| (0..size(wd, kw)).map(move |ox| (oy, ox)))
            {
                let mut sum = f64::from(bias[oi]);
                for (ci, ky, kx) in (0..c)
                    .flat_map(|ci| (0..kh).flat_map(move |ky| (0..kw).map(move |kx| (ci, ky, kx))))
                {
                    let (iy, ix) = (
                        (oy * stride + ky).wrapping_sub(p.before),
                        (ox * stride + kx).wrapping_sub(p.before),
                    );
                    if iy < h && ix < wd {
                        let a = xs[((bi * c + ci) * h + iy) * wd + ix];
                        sum += f64::from(a) * f64::from(ws[((oi * c + ci) * kh + ky) * kw + kx]);
                    }
                }
                out.push(sum);
            }
        }
        out
    }

    #[test]
    fn equals_the_definition_at_odd_shapes() {
        let pads = [
            Padding::same(0),
            Padding::same(1),
            Padding {
                before: 0,
                after: 1,
            },
            Padding::same(3),
        ];
        for (b, c, h, w, o) in [
            (1, 1, 3, 3, 1),
            (2, 3, 7, 5, 4),
            (3, 5, 1, 9, 2),
            (1, 17, 13, 11, 19),
            (2, 4, 40, 3, 5),
        ] {
            for (k, stride, &p) in [(1, 1), (3, 1), (3, 2), (5, 1)]
                .iter()
                .flat_map(|&(k, s)| pads.iter().map(move |p| (k, s, p)))
            {
                if h + p.before + p.after < k || w + p.before + p.after < k {
                    continue;
                }
                let x = Tensor::randn(0f32, 1.0, (b, c, h, w), &Device::Cpu).unwrap();
                let weight = Tensor::randn(0f32, 1.0, (o, c, k, k), &Device::Cpu).unwrap();
                let bias: Vec<f32> = (0..o).map(|i| i as f32 - 1.5).collect();
                let bias_tensor = Tensor::new(bias.as_slice(), &Device::Cpu).unwrap();
                let got = conv2d(&x, &weight, Some(&bias_tensor), (stride, p))
                    .unwrap()
                    .unwrap();
                let got = got.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                for (got, want) in got.iter().zip(reference(&x, &weight, &bias, stride, p)) {
                    assert!(
                        (f64::from(*got) - want).abs() < 1e-4,
                        "{b} {c} {h} {w} {o} k{k} s{stride} {p:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn many_bands_equal_one() {
        // wide enough that a band holds only a few rows
        let x = Tensor::randn(0f32, 1.0, (1, 64, 90, 70), &Device::Cpu).unwrap();
        let weight = Tensor::randn(0f32, 1.0, (8, 64, 3, 3), &Device::Cpu).unwrap();
        let got = conv2d(&x, &weight, None, (1, Padding::same(1)))
            .unwrap()
            .unwrap();
        let want = x.conv2d(&weight, 1, 1, 1, 1).unwrap();
        let difference = (got - want)
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        assert!(difference < 1e-3, "{difference}");
    }
}
