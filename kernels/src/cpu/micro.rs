//! The innermost products: a few rows, gathered by pointers, times one panel of packed weights, summed in f32.
//!
//! A row of the left operand is a chain of *segments*, each a run of numbers that lie together: one for a linear layer, one a tap (and
//! source) for a convolution over channels-last pictures. Those of one source are equally long. No operand is copied. A panel holds `width` columns
//! (a multiple of 16, at most [`NR`]) of all segments, `k` after `k`: `panel[k][column]` in f32, `panel[k / 2][column][k % 2]` in bf16. Sums stay in
//! registers from the first segment to the last.
//!
//! The largest tile of vectors is 6 rows by 64 columns: 24 accumulators of 512 bits, four registers of weights, one broadcast. Measured on a
//! Zen 4 core: 95 % of the instruction peak in bf16 and in f32. Where the processor multiplies whole tiles ([`super::amx`]), a kernel takes more
//! rows at once, and loops over tiles itself.

use half::{bf16, f16};

use super::Level;
use super::aligned::Plain;
#[cfg(target_arch = "x86_64")]
use super::amx::bf16_tiles;

/// Columns of a full panel.
pub(crate) const NR: usize = 64;
/// Panels' widths are multiples of this.
pub(crate) const LANES: usize = 16;
/// The most rows of a tile that is computed with vectors.
pub(crate) const MR: usize = 6;
/// The most rows that a kernel takes, at any level.
pub(crate) const MOST_ROWS: usize = 128;

/// How many rows kernels of a level take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rows {
    /// At most.
    pub(crate) most: usize,
    /// A multiple of this many, if none are to be wasted.
    pub(crate) even: usize,
}

impl Rows {
    /// Of kernels that compute with vectors.
    const VECTORS: Self = Self { most: MR, even: MR };
    /// Of kernels that compute with tiles: weights are read once for so many rows, whose sums stay in a core's second-level cache.
    const TILES: Self = Self {
        most: MOST_ROWS,
        even: 32,
    };
}

/// What a product reads: rows of f32 or bf16 numbers.
pub(crate) trait Operand: Copy + Send + Sync + 'static {
    /// Consecutive `k` that a panel keeps together.
    const K_STEP: usize;
    /// How many rows a kernel takes at a level.
    fn rows(level: Level) -> Rows;
    /// The kernel for [`Operand::rows`] and `width ≤ NR` at a level; `None` where there is none for this type.
    fn kernel(level: Level, rows: usize, width: usize) -> Option<Kernel<Self>>;
    /// As f32.
    #[cfg(test)]
    fn to_f32(self) -> f32;
    /// From f32, rounded to nearest even.
    fn from_f32(value: f32) -> Self;
}

/// One tile: `c[r][j] = Σ_s Σ_k a[s][r][k] · panel[start(s) + k][j]`, or `+=` where `add` is set; `start(s)` is the length of all segments before.
///
/// # Safety
/// For the `rows` and `width` that the kernel was asked for: `a` points to `rows` pointers for every segment, each to as many readable numbers as it
/// is long (a multiple of [`Operand::K_STEP`]); `panel` to `width` numbers for each `k` of all segments; `c` to `rows` rows of at least `width`
/// writable numbers, `ldc` apart. The processor has the level that the kernel was asked for.
pub(crate) type Kernel<T, W = T> = unsafe fn(tile: &Tile<'_, T, W>);

/// Segments of one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segments {
    /// How many.
    pub(crate) count: usize,
    /// Numbers of each.
    pub(crate) k_len: usize,
}

impl Segments {
    /// A single one.
    pub(crate) fn one(k_len: usize) -> [Self; 1] {
        [Self { count: 1, k_len }]
    }
}

/// The operands of one tile.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a, T, W = T> {
    /// `[segments][rows]` pointers to numbers.
    pub(crate) a: *const *const T,
    /// As many rows as the kernel was asked for.
    pub(crate) rows: usize,
    /// The segments of a row.
    pub(crate) segments: &'a [Segments],
    /// The packed weights.
    pub(crate) panel: *const W,
    /// The sums.
    pub(crate) c: *mut f32,
    /// Numbers from one row of sums to the next.
    pub(crate) ldc: usize,
    /// Whether the sums are added to what is there.
    pub(crate) add: bool,
}

/// The product of `tile.rows` rows, however many, the first at `first` and each `apart` numbers behind the one before; `tile.a` is not read.
///
/// # Safety
/// As [`Kernel`] for one segment and a panel of `width` columns; the level has products of `T`.
pub(crate) unsafe fn evenly<T: Operand>(
    level: Level,
    (first, apart): (*const T, usize),
    width: usize,
    tile: &Tile<'_, T>,
) {
    // SAFETY: passed on
    unsafe {
        match T::rows(level).most {
            ..=MR => by::<T, MR>(level, (first, apart), width, tile),
            _ => by::<T, MOST_ROWS>(level, (first, apart), width, tile),
        }
    }
}

/// # Safety
/// As [`evenly`]; kernels take up to `MOST` rows.
unsafe fn by<T: Operand, const MOST: usize>(
    level: Level,
    (first, apart): (*const T, usize),
    width: usize,
    tile: &Tile<'_, T>,
) {
    for done in (0..tile.rows).step_by(MOST) {
        let rows = (tile.rows - done).min(MOST);
        let Some(kernel) = T::kernel(level, rows, width) else {
            return;
        };
        let a: [*const T; MOST] = std::array::from_fn(|r| first.wrapping_add((done + r) * apart));
        // SAFETY: the caller's promise, for some of the rows
        unsafe {
            kernel(&Tile {
                a: a.as_ptr(),
                rows,
                c: tile.c.add(done * tile.ldc),
                ..*tile
            });
        }
    }
}

/// `[rows − 1][width / 16 − 1]` of the kernels made by a generic function.
macro_rules! table {
    ($f:ident $(, $w:ty)?) => {
        &[
            [$f::<$($w,)? 1, 1>, $f::<$($w,)? 1, 2>, $f::<$($w,)? 1, 3>, $f::<$($w,)? 1, 4>],
            [$f::<$($w,)? 2, 1>, $f::<$($w,)? 2, 2>, $f::<$($w,)? 2, 3>, $f::<$($w,)? 2, 4>],
            [$f::<$($w,)? 3, 1>, $f::<$($w,)? 3, 2>, $f::<$($w,)? 3, 3>, $f::<$($w,)? 3, 4>],
            [$f::<$($w,)? 4, 1>, $f::<$($w,)? 4, 2>, $f::<$($w,)? 4, 3>, $f::<$($w,)? 4, 4>],
            [$f::<$($w,)? 5, 1>, $f::<$($w,)? 5, 2>, $f::<$($w,)? 5, 3>, $f::<$($w,)? 5, 4>],
            [$f::<$($w,)? 6, 1>, $f::<$($w,)? 6, 2>, $f::<$($w,)? 6, 3>, $f::<$($w,)? 6, 4>],
        ]
    };
}

/// What weights are kept as: the type of the rows, or half as wide.
pub(crate) trait Weight: Plain {
    /// What they are multiplied with.
    type Row: Operand + Plain;
    /// As [`Operand::kernel`].
    fn kernel(level: Level, rows: usize, width: usize) -> Option<Kernel<Self::Row, Self>>;
    /// From f32, rounded to nearest even.
    fn from_f32(value: f32) -> Self;
}

impl Weight for f32 {
    type Row = Self;

    fn kernel(level: Level, rows: usize, width: usize) -> Option<Kernel<Self>> {
        wide(level, rows, width)
    }

    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Weight for bf16 {
    type Row = Self;

    fn kernel(level: Level, rows: usize, width: usize) -> Option<Kernel<Self>> {
        <Self as Operand>::kernel(level, rows, width)
    }

    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// A weight kept as f16 and multiplied as f32, which it becomes exactly.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Half(pub f16);

/// A weight kept as bf16 and multiplied as f32, which it becomes exactly.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Brain(pub bf16);

// SAFETY: a number of 16 bits, all of which are valid
unsafe impl Plain for Half {}
// SAFETY: as above
unsafe impl Plain for Brain {}

impl Weight for Half {
    type Row = f32;

    fn kernel(level: Level, rows: usize, width: usize) -> Option<Kernel<f32, Self>> {
        wide(level, rows, width)
    }

    fn from_f32(value: f32) -> Self {
        Self(f16::from_f32(value))
    }
}

impl Weight for Brain {
    type Row = f32;

    fn kernel(level: Level, rows: usize, width: usize) -> Option<Kernel<f32, Self>> {
        wide(level, rows, width)
    }

    fn from_f32(value: f32) -> Self {
        Self(bf16::from_f32(value))
    }
}

/// Weights that become f32 as they are read.
trait Widens: Copy {
    /// # Safety
    /// For functions compiled with AVX-512; `from` points to 16 readable weights.
    #[cfg(target_arch = "x86_64")]
    unsafe fn sixteen(from: *const Self) -> std::arch::x86_64::__m512;
    /// # Safety
    /// For functions compiled with AVX2 and F16C; `from` points to 8 readable weights.
    #[cfg(target_arch = "x86_64")]
    unsafe fn eight(from: *const Self) -> std::arch::x86_64::__m256;
    fn one(self) -> f32;
}

/// The kernels of f32 rows.
fn wide<W: Widens>(level: Level, rows: usize, width: usize) -> Option<Kernel<f32, W>> {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 | Level::Amx => pick(table!(avx512_f32, W), rows, width),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => pick(table!(avx2_f32, W), rows, width),
        _ => pick(table!(portable_f32, W), rows, width),
    }
}

fn pick<T, W>(table: &[[Kernel<T, W>; 4]; MR], rows: usize, width: usize) -> Option<Kernel<T, W>> {
    let columns = width.checked_div(LANES)?.checked_sub(1)?;
    table.get(rows.checked_sub(1)?)?.get(columns).copied()
}

impl Operand for f32 {
    const K_STEP: usize = 1;

    fn rows(_: Level) -> Rows {
        Rows::VECTORS
    }

    fn kernel(level: Level, rows: usize, width: usize) -> Option<Kernel<Self>> {
        wide(level, rows, width)
    }

    #[cfg(test)]
    fn to_f32(self) -> f32 {
        self
    }

    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Operand for bf16 {
    const K_STEP: usize = 2;

    fn rows(level: Level) -> Rows {
        match level {
            Level::Amx => Rows::TILES,
            _ => Rows::VECTORS,
        }
    }

    fn kernel(level: Level, rows: usize, width: usize) -> Option<Kernel<Self>> {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => pick(table!(avx512_bf16), rows, width),
            #[cfg(target_arch = "x86_64")]
            Level::Amx if (1..=MOST_ROWS).contains(&rows) => match width / LANES {
                1 => Some(bf16_tiles::<1>),
                2 => Some(bf16_tiles::<2>),
                3 => Some(bf16_tiles::<3>),
                4 => Some(bf16_tiles::<4>),
                _ => None,
            },
            _ => None,
        }
    }

    #[cfg(test)]
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }

    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// Plain Rust; its inner loop is wide enough for any compiler to vectorise.
///
/// # Safety
/// As [`Kernel`].
unsafe fn portable_f32<W: Widens, const ROWS: usize, const VECTORS: usize>(
    tile: &Tile<'_, f32, W>,
) {
    let width = VECTORS * LANES;
    let (mut a, mut panel) = (tile.a, tile.panel);
    let mut sums = [[[0f32; LANES]; VECTORS]; ROWS];
    for of in tile.segments {
        for _ in 0..of.count {
            for k in 0..of.k_len {
                // SAFETY: the caller gives a panel of `width` numbers for each `k`, of which as many rows as `k` so far have been passed
                let weights = unsafe { std::slice::from_raw_parts(panel, width) };
                for (r, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: `rows` pointers for every segment, to `k_len` numbers each
                    let x = unsafe { *(*a.add(r)).add(k) };
                    for (sums, weights) in sums.iter_mut().zip(weights.chunks_exact(LANES)) {
                        for (sum, weight) in sums.iter_mut().zip(weights) {
                            *sum += x * weight.one();
                        }
                    }
                }
                // SAFETY: at most one past the end
                panel = unsafe { panel.add(width) };
            }
            a = a.wrapping_add(ROWS);
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        // SAFETY: `rows` rows of `width` numbers, `ldc` apart
        let out = unsafe { std::slice::from_raw_parts_mut(tile.c.add(r * tile.ldc), width) };
        for (out, sum) in out.iter_mut().zip(sums.as_flattened()) {
            *out = if tile.add { *out + sum } else { *sum };
        }
    }
}

impl Widens for f32 {
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn sixteen(from: *const Self) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's promise
        unsafe { std::arch::x86_64::_mm512_loadu_ps(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(from: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: the caller's promise
        unsafe { std::arch::x86_64::_mm256_loadu_ps(from) }
    }

    #[inline(always)]
    fn one(self) -> f32 {
        self
    }
}

impl Widens for Half {
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn sixteen(from: *const Self) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::{_mm256_loadu_si256, _mm512_cvtph_ps};
        // SAFETY: the caller's promise; 16 weights are 256 bits
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(from: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps};
        // SAFETY: the caller's promise; 8 weights are 128 bits
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    fn one(self) -> f32 {
        self.0.to_f32()
    }
}

impl Widens for Brain {
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn sixteen(from: *const Self) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise; 16 weights are 256 bits, each the upper half of an f32
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(from: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise; 8 weights are 128 bits, each the upper half of an f32
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    fn one(self) -> f32 {
        self.0.to_f32()
    }
}

#[cfg(target_arch = "x86_64")]
use x86::{avx2_f32, avx512_bf16, avx512_f32};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::{LANES, Tile, Widens};

    /// # Safety
    /// As [`super::Kernel`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn avx512_bf16<const ROWS: usize, const VECTORS: usize>(
        tile: &Tile<'_, bf16>,
    ) {
        let mut acc = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        let (mut a, mut panel) = (tile.a, tile.panel.cast::<__m512i>());
        for of in tile.segments {
            for _ in 0..of.count {
                let mut rows = [std::ptr::null::<i32>(); ROWS];
                for (r, row) in rows.iter_mut().enumerate() {
                    // SAFETY: `rows` pointers for every segment
                    *row = unsafe { *a.add(r) }.cast();
                }
                for pair in 0..of.k_len / 2 {
                    let mut weights = [_mm512_setzero_si512(); VECTORS];
                    for (j, w) in weights.iter_mut().enumerate() {
                        // SAFETY: the panel has `width` pairs for each pair of `k`, 16 of them a vector
                        *w = unsafe { _mm512_loadu_si512(panel.add(j)) };
                    }
                    // SAFETY: at most one past the end
                    panel = unsafe { panel.add(VECTORS) };
                    for r in 0..ROWS {
                        // SAFETY: a segment has `k_len` numbers, a pair is 4 bytes; x86 reads them at any address
                        let x = _mm512_set1_epi32(unsafe { rows[r].add(pair).read_unaligned() });
                        for j in 0..VECTORS {
                            // SAFETY: both are 512 bits without invalid values
                            let (x, w) = unsafe {
                                (
                                    std::mem::transmute::<__m512i, __m512bh>(x),
                                    std::mem::transmute::<__m512i, __m512bh>(weights[j]),
                                )
                            };
                            acc[r][j] = _mm512_dpbf16_ps(acc[r][j], x, w);
                        }
                    }
                }
                a = a.wrapping_add(ROWS);
            }
        }
        // SAFETY: the caller's promise about `c`
        unsafe { store512(&acc, tile.c, tile.ldc, tile.add) };
    }

    /// # Safety
    /// As [`super::Kernel`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn avx512_f32<W: Widens, const ROWS: usize, const VECTORS: usize>(
        tile: &Tile<'_, f32, W>,
    ) {
        let mut acc = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        let (mut a, mut panel) = (tile.a, tile.panel);
        for of in tile.segments {
            for _ in 0..of.count {
                let mut rows = [std::ptr::null::<f32>(); ROWS];
                for (r, row) in rows.iter_mut().enumerate() {
                    // SAFETY: `rows` pointers for every segment
                    *row = unsafe { *a.add(r) };
                }
                for k in 0..of.k_len {
                    let mut weights = [_mm512_setzero_ps(); VECTORS];
                    for (j, w) in weights.iter_mut().enumerate() {
                        // SAFETY: the panel has `width` numbers for each `k`
                        *w = unsafe { W::sixteen(panel.add(j * LANES)) };
                    }
                    // SAFETY: at most one past the end
                    panel = unsafe { panel.add(VECTORS * LANES) };
                    for r in 0..ROWS {
                        // SAFETY: a segment has `k_len` numbers
                        let x = _mm512_set1_ps(unsafe { *rows[r].add(k) });
                        for j in 0..VECTORS {
                            acc[r][j] = _mm512_fmadd_ps(x, weights[j], acc[r][j]);
                        }
                    }
                }
                a = a.wrapping_add(ROWS);
            }
        }
        // SAFETY: the caller's promise about `c`
        unsafe { store512(&acc, tile.c, tile.ldc, tile.add) };
    }

    /// # Safety
    /// `c` points to `ROWS` rows of `16 × VECTORS` writable numbers, `ldc` apart.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn store512<const ROWS: usize, const VECTORS: usize>(
        acc: &[[__m512; VECTORS]; ROWS],
        c: *mut f32,
        ldc: usize,
        add: bool,
    ) {
        for (r, row) in acc.iter().enumerate() {
            for (j, sums) in row.iter().enumerate() {
                // SAFETY: inside the rows that the caller promises
                unsafe {
                    let at = c.add(r * ldc + j * LANES);
                    let sums = if add {
                        _mm512_add_ps(*sums, _mm512_loadu_ps(at))
                    } else {
                        *sums
                    };
                    _mm512_storeu_ps(at, sums);
                }
            }
        }
    }

    /// 16 columns at a time: 6 rows of two 256-bit accumulators are what 16 registers allow.
    ///
    /// # Safety
    /// As [`super::Kernel`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn avx2_f32<W: Widens, const ROWS: usize, const VECTORS: usize>(
        tile: &Tile<'_, f32, W>,
    ) {
        let width = VECTORS * LANES;
        for j in 0..VECTORS {
            let mut acc = [[_mm256_setzero_ps(); 2]; ROWS];
            // SAFETY: columns `16 j ..` of a panel at least that wide
            let (mut a, mut panel) = (tile.a, unsafe { tile.panel.add(j * LANES) });
            for of in tile.segments {
                for _ in 0..of.count {
                    let mut rows = [std::ptr::null::<f32>(); ROWS];
                    for (r, row) in rows.iter_mut().enumerate() {
                        // SAFETY: `rows` pointers for every segment
                        *row = unsafe { *a.add(r) };
                    }
                    for k in 0..of.k_len {
                        // SAFETY: 16 columns of a row of the panel, one for each `k`
                        let (low, high) = unsafe { (W::eight(panel), W::eight(panel.add(8))) };
                        panel = panel.wrapping_add(width);
                        for r in 0..ROWS {
                            // SAFETY: a segment has `k_len` numbers
                            let x = _mm256_set1_ps(unsafe { *rows[r].add(k) });
                            acc[r][0] = _mm256_fmadd_ps(x, low, acc[r][0]);
                            acc[r][1] = _mm256_fmadd_ps(x, high, acc[r][1]);
                        }
                    }
                    a = a.wrapping_add(ROWS);
                }
            }
            for (r, row) in acc.iter().enumerate() {
                for (half, sums) in row.iter().enumerate() {
                    // SAFETY: inside the rows that the caller promises
                    unsafe {
                        let at = tile.c.add(r * tile.ldc + j * LANES + half * 8);
                        let sums = if tile.add {
                            _mm256_add_ps(*sums, _mm256_loadu_ps(at))
                        } else {
                            *sums
                        };
                        _mm256_storeu_ps(at, sums);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    /// Numbers from −1 to 1 that bf16 holds exactly.
    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0).to_f32()
            })
            .collect()
    }

    fn check<T: Operand, W: Weight<Row = T>>(level: Level, value: fn(W) -> f32) {
        let most = T::rows(level).most;
        let large = [15, 16, 17, 31, 32, 33, 50, 64, 100, MOST_ROWS];
        for rows in (1..=MR).chain(large).filter(|rows| *rows <= most) {
            for width in [16, 32, 48, 64] {
                let Some(kernel) = W::kernel(level, rows, width) else {
                    panic!("no kernel for {rows} × {width} at {}", level.name());
                };
                let cases: [&[(usize, usize)]; 9] = [
                    &[(1, T::K_STEP)],
                    &[(3, 6)],
                    &[(9, 34)],
                    &[(2, 40)],
                    &[(1, 64)],
                    &[(2, 1056)],
                    // several sources: some as long, some not, some of nothing
                    &[(1, 320), (1, 32)],
                    &[(9, 40), (2, 6), (0, 8), (1, 66)],
                    &[(1, 4), (3, 64), (1, 0), (1, 8)],
                ];
                for case in cases {
                    if case.iter().any(|(_, k_len)| *k_len > 100) && (rows * width > 33 * 48) {
                        continue;
                    }
                    let of = |&(count, k_len): &(usize, usize)| Segments { count, k_len };
                    let segments: Vec<_> = case.iter().map(of).collect();
                    // the length of each segment, and where each `k` lies: its segment, and the place there
                    let lengths = case.iter().flat_map(|&(count, k_len)| vec![k_len; count]);
                    let lengths: Vec<usize> = lengths.collect();
                    let ks = lengths.iter().enumerate();
                    let ks = ks.flat_map(|(s, len)| (0..*len).map(move |i| (s, i)));
                    let ks: Vec<(usize, usize)> = ks.collect();
                    let longest = lengths.iter().max().map_or(0, |len| *len);
                    let x: Vec<T> = numbers(lengths.len() * rows * longest, 1)
                        .into_iter()
                        .map(T::from_f32)
                        .collect();
                    let w: Vec<W> = numbers(ks.len() * width, 2)
                        .into_iter()
                        .map(W::from_f32)
                        .collect();
                    let pointers: Vec<*const T> = (0..lengths.len() * rows)
                        .map(|i| x[i * longest..].as_ptr())
                        .collect();
                    let ldc = width + 3;
                    let mut c = vec![7f32; rows * ldc];
                    for add in [false, true] {
                        let tile = Tile {
                            a: pointers.as_ptr(),
                            rows,
                            segments: &segments,
                            panel: w.as_ptr(),
                            c: c.as_mut_ptr(),
                            ldc,
                            add,
                        };
                        // SAFETY: sizes as above; `supported` levels only
                        unsafe { kernel(&tile) };
                    }
                    for r in 0..rows {
                        for j in 0..width {
                            let places = ks.iter().enumerate();
                            let want: f64 = places
                                .map(|(k, &(s, i))| {
                                    let at = k / T::K_STEP * width * T::K_STEP
                                        + j * T::K_STEP
                                        + k % T::K_STEP;
                                    f64::from(x[(s * rows + r) * longest + i].to_f32())
                                        * f64::from(value(w[at]))
                                })
                                .sum();
                            // the second call added the same again
                            let got = f64::from(c[r * ldc + j]) / 2.0;
                            assert!(
                                (got - want).abs() < 1e-4,
                                "{} {rows} {width} {case:?}: {got} {want}",
                                level.name()
                            );
                        }
                        assert!(
                            r + 1 == rows || c[r * ldc + width] == 7.0,
                            "wrote past a row"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn tiles_equal_the_definition_at_every_level() {
        for level in Level::supported() {
            check::<f32, f32>(level, |w| w);
            check::<f32, Half>(level, |w| w.0.to_f32());
            check::<f32, Brain>(level, |w| w.0.to_f32());
            if level.has_bf16() {
                check::<bf16, bf16>(level, bf16::to_f32);
            }
        }
    }
}
