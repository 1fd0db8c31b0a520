//! Operands of attention in the order in which its products read them: copies, and transpositions 16 × 16 numbers at a time.
//!
//! A cell of a transposition has 32 bits: one f32, or two bf16 that stay together.

use std::ops::Range;

use super::super::Level;
use super::super::micro::LANES;
use super::{Element, View};

/// Vectors of one head among those of all: vector `i` is `data[i · stride ..][.. width]`.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, T> {
    pub(super) data: &'a [T],
    pub(super) stride: usize,
    pub(super) width: usize,
}

impl<'a, T> Rows<'a, T> {
    /// Those of a head of `view`; vector 0 is the one after `before` others.
    pub(super) fn of(view: &View<'a, T>, (before, head): (usize, usize), width: usize) -> Self {
        Self {
            data: &view.data[before * view.stride + head * width..],
            stride: view.stride,
            width,
        }
    }

    fn row(&self, i: usize) -> &'a [T] {
        &self.data[i * self.stride..][..self.width]
    }
}

/// 16 × 16 numbers of 32 bits.
#[repr(align(64))]
struct Square([[u32; LANES]; LANES]);

/// Keys `first ..` one after the other, each padded with zeros to `padded` numbers.
pub(super) fn keys<T: Element>(k: Rows<'_, T>, keys: Range<usize>, padded: usize, out: &mut [T]) {
    for (i, out) in keys.zip(out.chunks_exact_mut(padded)) {
        let (own, rest) = out.split_at_mut(k.width);
        own.copy_from_slice(k.row(i));
        rest.fill(T::of(0.0));
    }
}

/// Values transposed: for each of their numbers, that number of all `keys`, padded with zeros to whole cells; rows `ld` apart.
pub(super) fn values<T: Element>(
    level: Level,
    v: Rows<'_, T>,
    keys: Range<usize>,
    (out, ld): (&mut [T], usize),
) {
    let step = T::K_STEP;
    let mut square = Square([[0; LANES]; LANES]);
    for first in keys.clone().step_by(LANES * step) {
        let left = (keys.end - first).min(LANES * step);
        for column in (0..v.width).step_by(LANES) {
            let columns = (v.width - column).min(LANES);
            for (i, line) in square.0.iter_mut().enumerate().take(left.div_ceil(step)) {
                let part = |key: usize| &v.row(first + key)[column..][..columns];
                if step == 1 {
                    load(line, part(i));
                } else if 2 * i + 1 < left {
                    interleave(line, part(2 * i), part(2 * i + 1));
                } else {
                    interleave(line, part(2 * i), &[T::of(0.0); LANES][..columns]);
                }
            }
            transpose(level, &mut square);
            let (at, count) = (first - keys.start, left.next_multiple_of(step));
            for (j, line) in square.0.iter().enumerate().take(columns) {
                store(line, &mut out[(column + j) * ld + at..][..count]);
            }
        }
    }
}

/// Queries as a panel of `lanes` columns, one a query: what products by keys read. Lanes without a query are zeros.
pub(super) fn queries<T: Element>(
    level: Level,
    q: Rows<'_, T>,
    queries: Range<usize>,
    (panel, lanes): (&mut [T], usize),
) {
    let step = T::K_STEP;
    let cells = q.width.div_ceil(step);
    let mut square = Square([[0; LANES]; LANES]);
    for lane in (0..lanes).step_by(LANES) {
        for column in (0..cells).step_by(LANES) {
            for (i, line) in square.0.iter_mut().enumerate() {
                let query = queries.start + lane + i;
                let row = if query < queries.end {
                    &q.row(query)[column * step..]
                } else {
                    &[]
                };
                load(line, &row[..row.len().min(LANES * step)]);
            }
            transpose(level, &mut square);
            for (line, out) in square
                .0
                .iter()
                .zip(panel[column * lanes * step..].chunks_exact_mut(lanes * step))
                .take(cells - column)
            {
                store(line, &mut out[lane * step..][..LANES * step]);
            }
        }
    }
}

/// Numbers as cells, with zeros after them.
#[inline(always)]
fn load<T: Element>(line: &mut [u32; LANES], numbers: &[T]) {
    let bytes = size_of_val(numbers);
    if bytes == size_of_val(line) {
        // SAFETY: 64 bytes of plain numbers, which make cells whatever they are
        unsafe {
            std::ptr::copy_nonoverlapping(
                numbers.as_ptr().cast::<[u8; 4 * LANES]>(),
                line.as_mut_ptr().cast(),
                1,
            )
        };
    } else {
        assert!(bytes < size_of_val(line));
        line.fill(0);
        // SAFETY: as above, and fewer
        unsafe {
            std::ptr::copy_nonoverlapping(
                numbers.as_ptr().cast::<u8>(),
                line.as_mut_ptr().cast(),
                bytes,
            )
        };
    }
}

/// The first cells as numbers.
#[inline(always)]
fn store<T: Element>(line: &[u32; LANES], numbers: &mut [T]) {
    let bytes = size_of_val(numbers);
    if bytes == size_of_val(line) {
        // SAFETY: cells are plain numbers, 64 bytes of them
        unsafe {
            std::ptr::copy_nonoverlapping(
                line.as_ptr().cast::<[u8; 4 * LANES]>(),
                numbers.as_mut_ptr().cast(),
                1,
            )
        };
    } else {
        assert!(bytes < size_of_val(line));
        // SAFETY: as above, and fewer
        unsafe {
            std::ptr::copy_nonoverlapping(
                line.as_ptr().cast::<u8>(),
                numbers.as_mut_ptr().cast(),
                bytes,
            )
        };
    }
}

/// Pairs of 16-bit numbers of two vectors as cells, with zeros after them.
#[inline(always)]
fn interleave<T: Element>(line: &mut [u32; LANES], low: &[T], high: &[T]) {
    assert!(size_of::<T>() == 2 && low.len() == high.len() && low.len() <= LANES);
    let mut halves = [[0u16; LANES]; 2];
    for (halves, from) in halves.iter_mut().zip([low, high]) {
        if from.len() == LANES {
            // SAFETY: 16 plain numbers of 16 bits
            *halves = unsafe { from.as_ptr().cast::<[u16; LANES]>().read_unaligned() };
        } else {
            // SAFETY: as above, and fewer
            unsafe {
                std::ptr::copy_nonoverlapping(
                    from.as_ptr().cast::<u16>(),
                    halves.as_mut_ptr(),
                    from.len(),
                )
            };
        }
    }
    for (i, cell) in line.iter_mut().enumerate() {
        *cell = u32::from(halves[0][i]) | u32::from(halves[1][i]) << 16;
    }
}

/// Hands out results: `sums[j · lanes + i] · factor[i]` as number `j` of result `i`, for the first `count` results.
///
/// `each(i, first, numbers)` takes 16 numbers of result `i`, from number `first`; past the result's last they mean nothing.
#[inline(always)]
pub(super) fn results(
    level: Level,
    (sums, lanes): (&[f32], usize),
    factors: &[f32],
    count: usize,
    mut each: impl FnMut(usize, usize, &[f32; LANES]),
) {
    let mut square = Square([[0; LANES]; LANES]);
    for lane in (0..count).step_by(LANES) {
        for (i, block) in sums.chunks(LANES * lanes).enumerate() {
            for (line, sums) in square.0.iter_mut().zip(block.chunks_exact(lanes)) {
                for ((cell, sum), factor) in line
                    .iter_mut()
                    .zip(&sums[lane..][..LANES])
                    .zip(&factors[lane..][..LANES])
                {
                    *cell = (sum * factor).to_bits();
                }
            }
            transpose(level, &mut square);
            for (line, result) in square.0.iter().zip(lane..count) {
                each(result, i * LANES, &line.map(f32::from_bits));
            }
        }
    }
}

fn transpose(level: Level, square: &mut Square) {
    #[cfg(target_arch = "x86_64")]
    if level >= Level::Avx512 {
        // SAFETY: a level is only in use where the processor has it
        return unsafe { transpose_avx512(square) };
    }
    let _ = level;
    for i in 1..LANES {
        for j in 0..i {
            (square.0[i][j], square.0[j][i]) = (square.0[j][i], square.0[i][j]);
        }
    }
}

/// Four rounds of exchanges: single numbers, pairs, quarters, halves.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn transpose_avx512(square: &mut Square) {
    use std::arch::x86_64::*;
    let at = square.0.as_mut_ptr().cast::<__m512i>();
    let mut a = [_mm512_setzero_si512(); LANES];
    let mut b = a;
    for (i, a) in a.iter_mut().enumerate() {
        // SAFETY: line `i` of 16, 64 bytes each, aligned as a whole
        *a = unsafe { _mm512_load_si512(at.add(i)) };
    }
    for i in 0..8 {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for i in 0..4 {
        for j in 0..2 {
            a[4 * i + 2 * j] = _mm512_unpacklo_epi64(b[4 * i + j], b[4 * i + j + 2]);
            a[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(b[4 * i + j], b[4 * i + j + 2]);
        }
    }
    // a[4 i + j]: in its quarter `q`, column 4 q + j of rows 4 i .. 4 i + 4
    for j in 0..4 {
        b[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(a[j], a[4 + j]);
        b[4 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(a[j], a[4 + j]);
        b[8 + j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(a[8 + j], a[12 + j]);
        b[12 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(a[8 + j], a[12 + j]);
    }
    for j in 0..4 {
        a[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(b[j], b[8 + j]);
        a[8 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(b[j], b[8 + j]);
        a[4 + j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(b[4 + j], b[12 + j]);
        a[12 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(b[4 + j], b[12 + j]);
    }
    for (i, a) in a.iter().enumerate() {
        // SAFETY: as above
        unsafe { _mm512_store_si512(at.add(i), *a) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposes_at_every_level() {
        for level in Level::supported() {
            let mut square = Square(std::array::from_fn(|i| {
                std::array::from_fn(|j| (i * LANES + j) as u32)
            }));
            transpose(level, &mut square);
            for (i, line) in square.0.iter().enumerate() {
                for (j, &cell) in line.iter().enumerate() {
                    assert_eq!(cell as usize, j * LANES + i, "{}", level.name());
                }
            }
        }
    }
}
