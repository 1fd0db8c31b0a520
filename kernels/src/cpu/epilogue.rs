//! What happens to the sums of a product before they are stored: bias, time embedding, activation, residual.

use half::bf16;

use super::Level;
use super::micro::LANES;
use super::simd;
use super::view::Numbers;
use crate::Activation;

/// `out = activation(sum + bias + image) · scale · gate + residual`, or a gated pair of columns.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Epilogue<'a> {
    /// One value a column.
    pub(crate) bias: Option<&'a [f32]>,
    /// One value a column and picture.
    pub(crate) image: Option<PerImage<'a>>,
    /// Applied to the sum so far.
    pub(crate) activation: Option<Activation>,
    /// One slope a column for what is below 0, in an activation's place.
    pub(crate) slopes: Option<&'a [f32]>,
    /// One factor for all, after the activation.
    pub(crate) scale: Option<f32>,
    /// One factor a column and picture, after the activation.
    pub(crate) gate: Option<PerImage<'a>>,
    /// Added at the end: rows as those of the result, read modulo its own length.
    pub(crate) residual: Option<Numbers<'a>>,
    /// The panel holds values and then as many gates: half as many results, value × gelu(gate). Packed by [`super::panels::geglu_column`].
    pub(crate) gated: bool,
}

/// Values for each picture of a batch, such as the projected time embedding.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PerImage<'a> {
    /// `[pictures, n · columns]`; picture `i` reads entry `i` modulo their number.
    pub(crate) values: &'a [f32],
    /// How many times as wide as the columns an entry is, and the place in it.
    pub(crate) place: (usize, usize),
    /// Rows of the result that belong to one picture.
    pub(crate) rows: usize,
}

impl<'a> PerImage<'a> {
    /// Entries of exactly the columns.
    pub(crate) fn plain(values: &'a [f32], rows: usize) -> Self {
        Self {
            values,
            place: (1, 0),
            rows,
        }
    }

    /// Whether the sizes fit a result of that many columns.
    pub(crate) fn fits(&self, columns: usize) -> bool {
        let (entry, slot) = self.place;
        self.rows > 0
            && slot < entry
            && columns > 0
            && !self.values.is_empty()
            && self.values.len().is_multiple_of(entry * columns)
    }

    /// What belongs to columns `column ..` of a row.
    #[inline(always)]
    fn of(&self, row: usize, columns: usize, (column, width): (usize, usize)) -> &'a [f32] {
        let (entry, slot) = self.place;
        let wide = entry * columns;
        let picture = row / self.rows % (self.values.len() / wide);
        &self.values[picture * wide + slot * columns + column..][..width]
    }
}

/// A type that results are stored as.
pub(crate) trait Stored: Copy + Send + Sync {
    /// Whether so few bits are kept that an error of 10⁻⁴ does not show.
    const COARSE: bool;
    /// Rounded to nearest even.
    fn of(value: f32) -> Self;

    /// Rounds a vector by the processor's own instruction.
    ///
    /// # Safety
    /// For functions that are compiled for [`Level::Avx512Bf16`], and processors that have it.
    #[cfg(target_arch = "x86_64")]
    unsafe fn store_native(values: &[f32; LANES], out: &mut [Self; LANES]);
}

impl Stored for f32 {
    const COARSE: bool = false;

    #[inline(always)]
    fn of(value: f32) -> Self {
        value
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn store_native(values: &[f32; LANES], out: &mut [Self; LANES]) {
        *out = *values;
    }
}

impl Stored for bf16 {
    const COARSE: bool = true;

    #[inline(always)]
    fn of(value: f32) -> Self {
        let bits = value.to_bits();
        let even = (bits >> 16) & 1;
        let rounded = (bits.wrapping_add(0x7fff + even) >> 16) as u16;
        // what is not a number stays so
        Self::from_bits(if value.is_nan() { 0x7fc0 } else { rounded })
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn store_native(values: &[f32; LANES], out: &mut [Self; LANES]) {
        use std::arch::x86_64::{__m256bh, _mm512_cvtneps_pbh, _mm512_loadu_ps};
        // SAFETY: the processor has the instructions; 16 numbers are read, and 16 of half the size written
        unsafe {
            let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(values.as_ptr()));
            out.as_mut_ptr().cast::<__m256bh>().write_unaligned(rounded);
        }
    }
}

/// A result `[rows, columns]` that many tasks write into, each its own part.
#[derive(Clone, Copy)]
pub(super) struct Target<O> {
    /// The first number.
    pub(crate) out: *mut O,
    /// Numbers of a row.
    pub(crate) columns: usize,
}
// SAFETY: whoever writes through it promises that no two tasks write the same part
unsafe impl<O: Send> Send for Target<O> {}
// SAFETY: as above
unsafe impl<O: Sync> Sync for Target<O> {}

/// A tile of sums and where it belongs.
pub(super) struct Finish<'a, O> {
    /// `[rows][ldc]`.
    pub(crate) sums: &'a [f32],
    /// Numbers from one row of sums to the next.
    pub(crate) ldc: usize,
    /// The row of the result that each row of sums is.
    pub(crate) rows: &'a [usize],
    /// Columns of sums, without padding.
    pub(crate) width: usize,
    /// The first column of the layer that the tile holds.
    pub(crate) column: usize,
    /// All of the layer's columns.
    pub(crate) columns: usize,
    /// Where to.
    pub(crate) target: Target<O>,
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
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
        unsafe fn avx512_bf16<O: Stored>(epilogue: &Epilogue<'_>, tile: &Finish<'_, O>) {
            // SAFETY: passed on
            unsafe { body::<O, true>(epilogue, tile) }
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
        unsafe fn avx512<O: Stored>(epilogue: &Epilogue<'_>, tile: &Finish<'_, O>) {
            // SAFETY: passed on
            unsafe { body::<O, false>(epilogue, tile) }
        }
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2<O: Stored>(epilogue: &Epilogue<'_>, tile: &Finish<'_, O>) {
            // SAFETY: passed on
            unsafe { body::<O, false>(epilogue, tile) }
        }
        match level {
            // SAFETY: passed on; a level is only in use where the processor has it
            Level::Avx512Bf16 | Level::Amx => return unsafe { avx512_bf16(epilogue, tile) },
            // SAFETY: as above
            Level::Avx512 => return unsafe { avx512(epilogue, tile) },
            // SAFETY: as above
            Level::Avx2 => return unsafe { avx2(epilogue, tile) },
            Level::Portable => {}
        }
    }
    let _ = level;
    // SAFETY: passed on
    unsafe { body::<O, false>(epilogue, tile) }
}

/// # Safety
/// As [`finish`]; `NATIVE` as [`Stored::store_native`].
#[inline(always)]
unsafe fn body<O: Stored, const NATIVE: bool>(epilogue: &Epilogue<'_>, tile: &Finish<'_, O>) {
    let Finish { width, column, .. } = *tile;
    // a gated tile holds half as many results, which begin at half the column
    let (results, at) = if epilogue.gated {
        (width / 2, column / 2)
    } else {
        (width, column)
    };
    for (sums, &row) in tile.sums.chunks(tile.ldc).zip(tile.rows) {
        let place = row * tile.target.columns + at;
        let line = Line {
            sums,
            bias: epilogue.bias.map(|bias| &bias[column..][..width]),
            image: epilogue
                .image
                .map(|image| image.of(row, tile.columns, (column, width))),
            gate: epilogue
                .gate
                .map(|gate| gate.of(row, tile.columns, (column, width))),
            residual: epilogue.residual.map(|more| match more {
                Numbers::F32(more) => Numbers::F32(&more[within(place, more.len())..][..results]),
                Numbers::Bf16(more) => Numbers::Bf16(&more[within(place, more.len())..][..results]),
            }),
            activation: epilogue.activation,
            slopes: epilogue.slopes.map(|slopes| &slopes[column..][..width]),
            scale: epilogue.scale,
            gates: epilogue.gated.then_some(results),
            coarse: NATIVE && O::COARSE,
        };
        // SAFETY: `results` numbers of a row that the caller promises to be there and nobody else's
        let out = unsafe { std::slice::from_raw_parts_mut(tile.target.out.add(place), results) };
        let mut chunks = out.chunks_exact_mut(LANES);
        let mut first = 0;
        for out in &mut chunks {
            let values = line.finished::<LANES>(first);
            first += LANES;
            match <&mut [O; LANES]>::try_from(out) {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the caller's promise
                Ok(out) if NATIVE => unsafe { O::store_native(&values, out) },
                Ok(out) => *out = values.map(O::of),
                Err(_) => {}
            }
        }
        for out in chunks.into_remainder() {
            let [value] = line.finished::<1>(first);
            *out = O::of(value);
            first += 1;
        }
    }
}

/// `place` modulo `len`, without a division where it is inside.
#[inline(always)]
fn within(place: usize, len: usize) -> usize {
    if place < len { place } else { place % len }
}

/// One row of a tile, and what is done to it.
struct Line<'a> {
    sums: &'a [f32],
    bias: Option<&'a [f32]>,
    image: Option<&'a [f32]>,
    gate: Option<&'a [f32]>,
    residual: Option<Numbers<'a>>,
    activation: Option<Activation>,
    slopes: Option<&'a [f32]>,
    scale: Option<f32>,
    /// How far behind its value a gate is.
    gates: Option<usize>,
    /// Whether the processor is that of [`Stored::store_native`] and results are [`Stored::COARSE`].
    coarse: bool,
}

impl Line<'_> {
    /// Finishes `N` results; with `N` a vector's length they stay in one register.
    #[inline(always)]
    fn finished<const N: usize>(&self, first: usize) -> [f32; N] {
        let mut x = self.biased::<N>(first);
        if let Some(behind) = self.gates {
            let mut gate = self.biased::<N>(first + behind);
            self.gelu(&mut gate);
            each(&mut x, |i, x| *x *= gate[i]);
        }
        match self.activation {
            None => {}
            Some(Activation::Silu) => each(&mut x, |_, x| *x = simd::silu(*x)),
            Some(Activation::Gelu) => self.gelu(&mut x),
            Some(Activation::GeluTanh) => each(&mut x, |_, x| *x = simd::gelu_tanh(*x)),
            Some(Activation::QuickGelu) => each(&mut x, |_, x| *x = simd::quick_gelu(*x)),
            Some(Activation::Mish) => each(&mut x, |_, x| *x = simd::mish(*x)),
            Some(Activation::Relu) => each(&mut x, |_, x| *x = x.max(0.0)),
            Some(Activation::LeakyRelu { percent }) => {
                let slope = Activation::slope(percent);
                each(&mut x, |_, x| *x = simd::leaky(*x, slope));
            }
            Some(Activation::Sigmoid) => each(&mut x, |_, x| *x = simd::sigmoid(*x)),
        }
        if let Some(slopes) = self.slopes {
            let slopes = &slopes[first..][..N];
            each(&mut x, |i, x| *x = simd::leaky(*x, slopes[i]));
        }
        if let Some(scale) = self.scale {
            each(&mut x, |_, x| *x *= scale);
        }
        if let Some(gate) = self.gate {
            let gate = &gate[first..][..N];
            each(&mut x, |i, x| *x *= gate[i]);
        }
        match self.residual {
            None => {}
            Some(Numbers::F32(more)) => {
                let more = &more[first..][..N];
                each(&mut x, |i, x| *x += more[i]);
            }
            Some(Numbers::Bf16(more)) => {
                let more = &more[first..][..N];
                each(&mut x, |i, x| *x += simd::Number::f32(more[i]));
            }
        }
        x
    }

    #[inline(always)]
    fn gelu<const N: usize>(&self, x: &mut [f32; N]) {
        #[cfg(target_arch = "x86_64")]
        if self.coarse
            && let Ok(x) = <&mut [f32; LANES]>::try_from(&mut x[..])
        {
            // SAFETY: such a processor has the instructions
            return unsafe { simd::coarse_gelu(x) };
        }
        each(x, |_, x| *x = simd::gelu(*x));
    }

    #[inline(always)]
    fn biased<const N: usize>(&self, first: usize) -> [f32; N] {
        let mut x = [0f32; N];
        x.copy_from_slice(&self.sums[first..][..N]);
        if let Some(bias) = self.bias {
            let bias = &bias[first..][..N];
            each(&mut x, |i, x| *x += bias[i]);
        }
        if let Some(image) = self.image {
            let image = &image[first..][..N];
            each(&mut x, |i, x| *x += image[i]);
        }
        x
    }
}

#[inline(always)]
fn each<const N: usize>(x: &mut [f32; N], mut f: impl FnMut(usize, &mut f32)) {
    let mut i = 0;
    while i < N {
        f(i, &mut x[i]);
        i += 1;
    }
}
