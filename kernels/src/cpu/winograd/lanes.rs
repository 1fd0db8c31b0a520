//! Vectors of f32, as wide as a level has them, for arithmetic that is written once.

use half::bf16;

use crate::cpu::Level;
use crate::cpu::aligned::Plain;
use crate::cpu::epilogue::Stored;
use crate::cpu::micro::{LANES, Operand};

/// A few f32 that are computed with at once.
///
/// The methods are inlined into functions that are compiled for a level; elsewhere they must not be called.
pub(crate) trait Lanes: Copy {
    /// How many they are.
    const N: usize;
    /// # Safety
    /// `from` points to `N` readable numbers.
    unsafe fn load_f32(from: *const f32) -> Self;
    /// # Safety
    /// `from` points to `N` readable numbers.
    unsafe fn load_bf16(from: *const bf16) -> Self;
    /// # Safety
    /// `to` points to `N` writable numbers.
    unsafe fn store_f32(self, to: *mut f32);
    /// Rounds to nearest even.
    ///
    /// # Safety
    /// `to` points to `N` writable numbers; the processor has BF16 instructions, if it has AVX-512.
    unsafe fn store_bf16(self, to: *mut bf16);
    /// The same number everywhere.
    fn splat(value: f32) -> Self;
    /// `self + other`.
    fn add(self, other: Self) -> Self;
    /// `self − other`.
    fn sub(self, other: Self) -> Self;
    /// `self · other`.
    fn mul(self, other: Self) -> Self;
    /// `self · factor + other`.
    fn mul_add(self, factor: f32, other: Self) -> Self;
}

/// Numbers that sources, transformed sources and weights are kept as: f32 or bf16.
pub(crate) trait Kept: Operand + Plain + Stored {
    /// # Safety
    /// As [`Lanes::load_f32`].
    unsafe fn load<L: Lanes>(from: *const Self) -> L;
    /// # Safety
    /// As [`Lanes::store_bf16`].
    unsafe fn store<L: Lanes>(lanes: L, to: *mut Self);
    /// Rounds [`Operand::K_STEP`] rows of 16 columns, and keeps the numbers of a column together.
    fn interleave(rows: &[[f32; LANES]; 2], to: &mut [Self]);
}

impl Kept for f32 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        // SAFETY: passed on
        unsafe { L::load_f32(from) }
    }

    #[inline(always)]
    unsafe fn store<L: Lanes>(lanes: L, to: *mut Self) {
        // SAFETY: passed on
        unsafe { lanes.store_f32(to) }
    }

    #[inline(always)]
    fn interleave(rows: &[[f32; LANES]; 2], to: &mut [Self]) {
        to.copy_from_slice(&rows[0]);
    }
}

impl Kept for bf16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        // SAFETY: passed on
        unsafe { L::load_bf16(from) }
    }

    #[inline(always)]
    unsafe fn store<L: Lanes>(lanes: L, to: *mut Self) {
        // SAFETY: passed on
        unsafe { lanes.store_bf16(to) }
    }

    #[inline(always)]
    fn interleave(rows: &[[f32; LANES]; 2], to: &mut [Self]) {
        let [first, second] = rows;
        for ((to, first), second) in to.chunks_exact_mut(2).zip(first).zip(second) {
            to[0] = Self::of(*first);
            to[1] = Self::of(*second);
        }
    }
}

impl Lanes for f32 {
    const N: usize = 1;

    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> Self {
        // SAFETY: the caller's promise
        unsafe { *from }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: the caller's promise
        unsafe { (*from).to_f32() }
    }

    #[inline(always)]
    unsafe fn store_f32(self, to: *mut f32) {
        // SAFETY: the caller's promise
        unsafe { *to = self }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16) {
        // SAFETY: the caller's promise
        unsafe { *to = bf16::of(self) }
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self + other
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self - other
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self * other
    }

    #[inline(always)]
    fn mul_add(self, factor: f32, other: Self) -> Self {
        self * factor + other
    }
}

/// Four numbers, which any compiler keeps in a vector.
#[derive(Clone, Copy)]
struct Four([f32; 4]);

impl Four {
    #[inline(always)]
    fn each(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Lanes for Four {
    const N: usize = 4;

    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> Self {
        // SAFETY: the caller's promise
        Self(unsafe { from.cast::<[f32; 4]>().read() })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: the caller's promise
        Self(unsafe { from.cast::<[bf16; 4]>().read() }.map(bf16::to_f32))
    }

    #[inline(always)]
    unsafe fn store_f32(self, to: *mut f32) {
        // SAFETY: the caller's promise
        unsafe { to.cast::<[f32; 4]>().write(self.0) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16) {
        // SAFETY: the caller's promise
        unsafe { to.cast::<[bf16; 4]>().write(self.0.map(bf16::of)) }
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 4])
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.each(other, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.each(other, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.each(other, |a, b| a * b)
    }

    #[inline(always)]
    fn mul_add(self, factor: f32, other: Self) -> Self {
        self.each(other, |a, b| a * factor + b)
    }
}

/// Work to be done with vectors of any width; `run` must be `#[inline(always)]`.
pub(super) trait Work {
    /// # Safety
    /// What the maker of the work says; and the processor has what `L` takes.
    unsafe fn run<L: Lanes>(self);
}

/// Does the work with the vectors of a level.
///
/// # Safety
/// What the maker of the work says.
pub(super) unsafe fn vectorised<W: Work>(level: Level, work: W) {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: passed on; a level is only in use where the processor has it
        Level::Avx512Bf16 | Level::Amx => unsafe { x86::avx512_bf16(work) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above
        Level::Avx512 => unsafe { x86::avx512(work) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above
        Level::Avx2 => unsafe { x86::avx2(work) },
        // SAFETY: passed on
        _ => unsafe { work.run::<Four>() },
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::{Lanes, Stored, Work};

    /// # Safety
    /// As [`super::vectorised`], on a processor with these features.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
    pub(super) unsafe fn avx512_bf16<W: Work>(work: W) {
        // SAFETY: passed on
        unsafe { work.run::<Sixteen>() }
    }

    /// # Safety
    /// As [`super::vectorised`], on a processor with these features.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    pub(super) unsafe fn avx512<W: Work>(work: W) {
        // SAFETY: passed on
        unsafe { work.run::<Sixteen>() }
    }

    /// # Safety
    /// As [`super::vectorised`], on a processor with these features.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn avx2<W: Work>(work: W) {
        // SAFETY: passed on
        unsafe { work.run::<Eight>() }
    }

    /// A 512-bit vector.
    #[derive(Clone, Copy)]
    struct Sixteen(__m512);
    /// A 256-bit vector.
    #[derive(Clone, Copy)]
    struct Eight(__m256);

    /// Arithmetic by one instruction each.
    macro_rules! arithmetic {
        ($splat:ident, $add:ident, $sub:ident, $mul:ident, $fma:ident) => {
            #[inline(always)]
            fn splat(value: f32) -> Self {
                // SAFETY: only called where the instruction is there
                Self(unsafe { $splat(value) })
            }

            #[inline(always)]
            fn add(self, other: Self) -> Self {
                // SAFETY: as above
                Self(unsafe { $add(self.0, other.0) })
            }

            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                // SAFETY: as above
                Self(unsafe { $sub(self.0, other.0) })
            }

            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                // SAFETY: as above
                Self(unsafe { $mul(self.0, other.0) })
            }

            #[inline(always)]
            fn mul_add(self, factor: f32, other: Self) -> Self {
                // SAFETY: as above
                Self(unsafe { $fma(self.0, $splat(factor), other.0) })
            }
        };
    }

    impl Lanes for Sixteen {
        const N: usize = 16;

        #[inline(always)]
        unsafe fn load_f32(from: *const f32) -> Self {
            // SAFETY: the caller's promise
            Self(unsafe { _mm512_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            // SAFETY: the caller's promise
            Self(unsafe {
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
                    _mm256_loadu_si256(from.cast()),
                )))
            })
        }

        #[inline(always)]
        unsafe fn store_f32(self, to: *mut f32) {
            // SAFETY: the caller's promise
            unsafe { _mm512_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        unsafe fn store_bf16(self, to: *mut bf16) {
            // SAFETY: the caller's promise; both types are 256 bits without invalid values
            unsafe {
                _mm256_storeu_si256(
                    to.cast(),
                    std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self.0)),
                )
            }
        }

        arithmetic!(
            _mm512_set1_ps,
            _mm512_add_ps,
            _mm512_sub_ps,
            _mm512_mul_ps,
            _mm512_fmadd_ps
        );
    }

    impl Lanes for Eight {
        const N: usize = 8;

        #[inline(always)]
        unsafe fn load_f32(from: *const f32) -> Self {
            // SAFETY: the caller's promise
            Self(unsafe { _mm256_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            // SAFETY: the caller's promise
            Self(unsafe {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(
                    _mm_loadu_si128(from.cast()),
                )))
            })
        }

        #[inline(always)]
        unsafe fn store_f32(self, to: *mut f32) {
            // SAFETY: the caller's promise
            unsafe { _mm256_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        unsafe fn store_bf16(self, to: *mut bf16) {
            let mut values = [0f32; Self::N];
            // SAFETY: eight numbers are there, and the caller's promise
            unsafe {
                _mm256_storeu_ps(values.as_mut_ptr(), self.0);
                to.cast::<[bf16; Self::N]>().write(values.map(bf16::of));
            }
        }

        arithmetic!(
            _mm256_set1_ps,
            _mm256_add_ps,
            _mm256_sub_ps,
            _mm256_mul_ps,
            _mm256_fmadd_ps
        );
    }
}
