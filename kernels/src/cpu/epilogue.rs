//! What happens to the sums of a product before they are stored: bias, time embedding, activation, residual.

use half::bf16;

use super::Level;
use super::micro::{MR, NR};
use super::simd;
use super::view::Numbers;
use crate::Activation;

/// `out = activation(sum + bias + image) + residual`, or a gated pair of columns.
#[derive(Debug, Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// One value a column.
    pub bias: Option<&'a [f32]>,
    /// One value a column and picture.
    pub image: Option<PerImage<'a>>,
    /// Applied to the sum so far.
    pub activation: Option<Activation>,
    /// Added at the end: rows as those of the result, read modulo its own length.
    pub residual: Option<Numbers<'a>>,
    /// The panel holds values and then as many gates: half as many results, value × gelu(gate). Packed by [`super::panels::geglu_column`].
    pub gated: bool,
}

/// Values for each picture of a batch, such as the projected time embedding.
#[derive(Debug, Clone, Copy)]
pub struct PerImage<'a> {
    /// `[pictures, columns]`; picture `i` reads entry `i` modulo their number.
    pub values: &'a [f32],
    /// Rows of the result that belong to one picture.
    pub rows: usize,
}

/// A type that results are stored as.
pub trait Stored: Copy + Send + Sync {
    /// Rounded to nearest even.
    fn of(value: f32) -> Self;
}

impl Stored for f32 {
    #[inline(always)]
    fn of(value: f32) -> Self {
        value
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn of(value: f32) -> Self {
        let bits = value.to_bits();
        let even = (bits >> 16) & 1;
        let rounded = (bits.wrapping_add(0x7fff + even) >> 16) as u16;
        // what is not a number stays so
        Self::from_bits(if value.is_nan() { 0x7fc0 } else { rounded })
    }
}

/// A result `[rows, columns]` that many tasks write into, each its own part.
#[derive(Clone, Copy)]
pub(super) struct Target<O> {
    /// The first number.
    pub out: *mut O,
    /// Numbers of a row.
    pub columns: usize,
}
// SAFETY: whoever writes through it promises that no two tasks write the same part
unsafe impl<O: Send> Send for Target<O> {}
// SAFETY: as above
unsafe impl<O: Sync> Sync for Target<O> {}

/// A tile of sums and where it belongs.
pub(super) struct Finish<'a, O> {
    /// `[rows][ldc]`.
    pub sums: &'a [f32],
    /// Numbers from one row of sums to the next.
    pub ldc: usize,
    /// The row of the result that each row of sums is.
    pub rows: &'a [usize],
    /// Columns of sums, without padding.
    pub width: usize,
    /// The first column of the layer that the tile holds.
    pub column: usize,
    /// All of the layer's columns.
    pub columns: usize,
    /// Where to.
    pub target: Target<O>,
}

/// Finishes a tile.
///
/// # Safety
/// Nobody else reads or writes columns `column .. column + width` (halved, if gated) of `rows` in the target, which has them.
pub(super) unsafe fn finish<O: Stored>(
    level: Level,
    epilogue: &Epilogue<'_>,
    tile: &Finish<'_, O>,
) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
        unsafe fn avx512<O: Stored>(epilogue: &Epilogue<'_>, tile: &Finish<'_, O>) {
            // SAFETY: passed on
            unsafe { body(epilogue, tile) }
        }
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2<O: Stored>(epilogue: &Epilogue<'_>, tile: &Finish<'_, O>) {
            // SAFETY: passed on
            unsafe { body(epilogue, tile) }
        }
        match level {
            // SAFETY: passed on; a level is only in use where the processor has it
            Level::Avx512 | Level::Avx512Bf16 => return unsafe { avx512(epilogue, tile) },
            // SAFETY: as above
            Level::Avx2 => return unsafe { avx2(epilogue, tile) },
            Level::Portable => {}
        }
    }
    let _ = level;
    // SAFETY: passed on
    unsafe { body(epilogue, tile) }
}

/// # Safety
/// As [`finish`].
#[inline(always)]
unsafe fn body<O: Stored>(epilogue: &Epilogue<'_>, tile: &Finish<'_, O>) {
    let Finish {
        ldc,
        width,
        column,
        columns,
        ..
    } = *tile;
    // a gated tile holds half as many results, which begin at half the column
    let (results, at) = if epilogue.gated {
        (width / 2, column / 2)
    } else {
        (width, column)
    };
    let bias = epilogue.bias.map(|bias| &bias[column..][..width]);
    let mut v = [0f32; NR];
    for (sums, &row) in tile.sums.chunks(ldc).zip(tile.rows) {
        let v = &mut v[..width];
        v.copy_from_slice(&sums[..width]);
        if let Some(bias) = bias {
            add(v, bias);
        }
        if let Some(PerImage { values, rows }) = epilogue.image {
            let picture = row / rows % (values.len() / columns);
            add(v, &values[picture * columns + column..][..width]);
        }
        if epilogue.gated {
            let (value, gate) = v.split_at_mut(results);
            for (value, gate) in value.iter_mut().zip(gate) {
                *value *= simd::gelu(*gate);
            }
        }
        let v = &mut v[..results];
        match epilogue.activation {
            None => {}
            Some(Activation::Silu) => v.iter_mut().for_each(|x| *x = simd::silu(*x)),
            Some(Activation::Gelu) => v.iter_mut().for_each(|x| *x = simd::gelu(*x)),
            Some(Activation::QuickGelu) => v.iter_mut().for_each(|x| *x = simd::quick_gelu(*x)),
            Some(Activation::Mish) => v.iter_mut().for_each(|x| *x = simd::mish(*x)),
            Some(Activation::Relu) => v.iter_mut().for_each(|x| *x = x.max(0.0)),
        }
        let place = row * tile.target.columns + at;
        match epilogue.residual {
            None => {}
            Some(Numbers::F32(more)) => add(v, &more[place % more.len()..][..results]),
            Some(Numbers::Bf16(more)) => {
                for (x, more) in v.iter_mut().zip(&more[place % more.len()..][..results]) {
                    *x += f32::from_bits(u32::from(more.to_bits()) << 16);
                }
            }
        }
        // SAFETY: `results` numbers of a row that the caller promises to be there and nobody else's
        let out = unsafe { std::slice::from_raw_parts_mut(tile.target.out.add(place), results) };
        for (out, x) in out.iter_mut().zip(v) {
            *out = O::of(*x);
        }
    }
}

#[inline(always)]
fn add(to: &mut [f32], more: &[f32]) {
    for (to, more) in to.iter_mut().zip(more) {
        *to += more;
    }
}

/// The most rows that a tile has.
pub(super) const ROWS: usize = MR;
