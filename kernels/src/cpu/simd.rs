//! Arithmetic written once in plain Rust and compiled for every level: loops without branches, which the compiler vectorises.

use std::f32::consts::LOG2_E;

use half::bf16;

use super::epilogue::Stored;

/// Defines a function that runs its body, compiled for the level given as its first argument.
///
/// `multiversion!(fn scale(x: &mut [f32], by: f32) { … })` defines `fn scale(level: Level, x: &mut [f32], by: f32)`; type parameters with one
/// bound each may stand behind the name. What the body calls must be `#[inline(always)]` to be compiled along.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($t:ident : $bound:ident),+>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name $(<$($t: $bound),+>)? (level: $crate::cpu::Level, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body $(<$($t: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
                fn avx512 $(<$($t: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2 $(<$($t: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                match level {
                    // SAFETY: a level is only in use where the processor has it
                    $crate::cpu::Level::Avx512 | $crate::cpu::Level::Avx512Bf16 | $crate::cpu::Level::Amx => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above
                    $crate::cpu::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::cpu::Level::Portable => {}
                }
            }
            let _ = level;
            body($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// `a · b + c` in two roundings, the same at every level.
#[inline(always)]
pub(crate) fn fma(a: f32, b: f32, c: f32) -> f32 {
    a * b + c
}

/// eˣ within 2 units in the last place; 0 far below, +∞ is not reached before 88.7 (larger arguments give eˣ of 88.3).
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; eʳ by its Taylor polynomial of degree 6 (Cody & Waite's reduction).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.3, 88.3);
    // adding 1.5·2²³ rounds to the nearest whole number without a branch
    const ROUND: f32 = 12_582_912.0;
    let shifted = fma(x, LOG2_E, ROUND);
    let n = shifted - ROUND;
    const HIGH: f32 = 355.0 / 512.0; // ln 2 to 9 bits: n · HIGH is exact
    let r = fma(n, -HIGH, x);
    let r = fma(n, (HIGH as f64 - std::f64::consts::LN_2) as f32, r);
    let p = fma(r, 1.0 / 720.0, 1.0 / 120.0);
    let p = fma(r, p, 1.0 / 24.0);
    let p = fma(r, p, 1.0 / 6.0);
    let p = fma(r, p, 0.5);
    let p = fma(r * r, p, r) + 1.0;
    // the low bits of `shifted` are n; a cast would check for overflow, number by number
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    p * power
}

/// A number as stored: f32 or bf16.
pub(crate) trait Number: Copy + Send + Sync + Stored {
    /// Exact.
    fn f32(self) -> f32;
}

impl Number for f32 {
    #[inline(always)]
    fn f32(self) -> f32 {
        self
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// `x · sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x`, and below 0 `x · slope`; what is not a number stays so.
#[inline(always)]
pub(crate) fn leaky(x: f32, slope: f32) -> f32 {
    if x < 0.0 { x * slope } else { x }
}

/// `x · sigmoid(1.702 x)`.
#[inline(always)]
pub(crate) fn quick_gelu(x: f32) -> f32 {
    x / (1.0 + exp(-1.702 * x))
}

/// `x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`: (1 + tanh y) / 2 is sigmoid(2y).
#[inline(always)]
pub(crate) fn gelu_tanh(x: f32) -> f32 {
    const SCALE: f32 = -2.0 * 0.797_884_6;
    x / (1.0 + exp(SCALE * (x + 0.044_715 * x * x * x)))
}

/// `x · tanh(ln(1 + eˣ))`: with n = eˣ the tanh is (n² + 2n) / (n² + 2n + 2).
#[inline(always)]
pub(crate) fn mish(x: f32) -> f32 {
    // beyond 20 the tanh is 1 to the last bit, and n² would leave the range
    let n = exp(x.min(20.0));
    let m = n * (n + 2.0);
    x * (m / (m + 2.0))
}

/// The polynomial q of [`gelu`].
const Q: [f32; 8] = [
    0.797_887_5,
    0.318_281_92,
    0.036_435_854,
    -0.004_962_659,
    1.442_931_4e-4,
    1.091_052e-4,
    -2.317_422_7e-5,
    1.625_924_9e-6,
];

/// `x/2 · (1 + erf(x/√2))`, absolute error below 1e-7 · max(1, |x|).
///
/// 1 − erf(t/√2) = e^(−t·q(t)), where q is a polynomial fitted to 0 < t ≤ 5.8 by least squares, weighted so that the error of the result is
/// even; at 5.8 the left side is 7e-9, and what lies beyond is taken for it.
#[inline(always)]
pub(crate) fn gelu(x: f32) -> f32 {
    let t = x.abs().min(5.8);
    let mut q = Q[7];
    let mut i = 7;
    while i > 0 {
        i -= 1;
        q = fma(q, t, Q[i]);
    }
    let half = 0.5 * exp(-t * q);
    x * if x < 0.0 { half } else { 1.0 - half }
}

/// 2ˣ within 7.5·10⁻⁵ of itself: that of the whole part below, which is exact, times that of the rest by the polynomial of degree 3 of least
/// relative error. 0 far below, +∞ from 128.
///
/// # Safety
/// For functions compiled with AVX-512 F and DQ, and processors that have it.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn coarse_exp2(x: std::arch::x86_64::__m512) -> std::arch::x86_64::__m512 {
    use std::arch::x86_64::*;
    // SAFETY: the processor has the instructions
    unsafe {
        let f = _mm512_reduce_ps::<0b1001>(x);
        let mut p = _mm512_set1_ps(0.078_024_52);
        for c in [0.226_067_18, 0.695_833_5, 0.999_925_2] {
            p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
        }
        _mm512_scalef_ps(p, x)
    }
}

/// [`silu`] within 2·10⁻⁴ of itself, without a division, for results that are rounded to bf16.
///
/// # Safety
/// As [`coarse_exp2`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn coarse_silu(x: &mut [f32; 16]) {
    use std::arch::x86_64::*;
    // SAFETY: the processor has the instructions; 16 numbers are read and written
    unsafe {
        let value = _mm512_loadu_ps(x.as_ptr());
        let power = coarse_exp2(_mm512_mul_ps(value, _mm512_set1_ps(-LOG2_E)));
        let share = _mm512_rcp14_ps(_mm512_add_ps(power, _mm512_set1_ps(1.0)));
        _mm512_storeu_ps(x.as_mut_ptr(), _mm512_mul_ps(value, share));
    }
}

/// [`gelu`] within 10⁻⁴ of itself in a third of the instructions, for results that are rounded to bf16.
///
/// # Safety
/// For functions compiled with AVX-512 F and DQ, and processors that have it.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn coarse_gelu(x: &mut [f32; 16]) {
    use std::arch::x86_64::*;
    // SAFETY: the processor has the instructions; 16 numbers are read and written
    unsafe {
        let value = _mm512_loadu_ps(x.as_ptr());
        // the second operand where one is not a number
        let t = _mm512_min_ps(_mm512_set1_ps(5.8), _mm512_abs_ps(value));
        let mut q = _mm512_set1_ps(Q[7] * -LOG2_E);
        for i in (0..7).rev() {
            q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(Q[i] * -LOG2_E));
        }
        let half = coarse_exp2(_mm512_fmadd_ps(q, t, _mm512_set1_ps(-1.0)));
        let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(value, _mm512_setzero_ps());
        let rest = _mm512_sub_ps(_mm512_set1_ps(1.0), half);
        let share = _mm512_mask_blend_ps(below, rest, half);
        _mm512_storeu_ps(x.as_mut_ptr(), _mm512_mul_ps(value, share));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Level;

    multiversion! {
        fn exps(x: &mut [f32]) { for x in x { *x = exp(*x); } }
    }

    #[test]
    fn exp_is_close_at_every_level() {
        for level in Level::supported() {
            let x: Vec<f32> = (-87_000..88_000).map(|i| i as f32 / 1000.0).collect();
            let mut y = x.clone();
            exps(level, &mut y);
            for (x, y) in x.iter().zip(&y) {
                let want = f64::from(*x).exp();
                assert!((f64::from(*y) / want - 1.0).abs() < 4e-7, "{x}: {y} {want}");
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn coarse_activations_are_close() {
        if !Level::Avx512.is_supported() {
            return;
        }
        #[target_feature(enable = "avx512f,avx512dq")]
        fn gelus(x: &mut [f32; 16]) {
            // SAFETY: compiled with what it takes
            unsafe { coarse_gelu(x) }
        }
        #[target_feature(enable = "avx512f,avx512dq")]
        fn silus(x: &mut [f32; 16]) {
            // SAFETY: as above
            unsafe { coarse_silu(x) }
        }
        for i in -12_000..12_000 {
            let x = std::array::from_fn(|lane| (16 * i + lane as i32) as f32 / 16_000.0);
            let (mut gelu_of, mut silu_of) = (x, x.map(|x: f32| 10.0 * x));
            // SAFETY: the processor has been asked
            unsafe {
                gelus(&mut gelu_of);
                silus(&mut silu_of);
            }
            for (lane, x) in x.into_iter().enumerate() {
                let (got, want) = (gelu_of[lane], gelu(x));
                let off = (got - want).abs();
                assert!(off <= 1e-4 * want.abs() + 1e-7, "{x}: {got} {want}");
                let (got, want) = (silu_of[lane], silu(10.0 * x));
                let off = (got - want).abs();
                assert!(off <= 2e-4 * want.abs() + 1e-30, "{x}: {got} {want}");
            }
        }
        let mut odd = [0f32; 16];
        odd[..3].copy_from_slice(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
        // SAFETY: as above
        unsafe { gelus(&mut odd) };
        assert!(odd[0].is_nan() && odd[1] > f32::MAX && odd[2] <= 0.0 && odd[3] == 0.0);
    }

    #[test]
    fn activations_are_close() {
        let f64s = |x: f64| {
            let e = libm::erf(x / std::f64::consts::SQRT_2);
            [
                x / (1.0 + (-x).exp()),
                0.5 * x * (1.0 + e),
                x / (1.0 + (-1.702 * x).exp()),
                x * x.exp().ln_1p().tanh(),
                0.5 * x
                    * (1.0
                        + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3)))
                            .tanh()),
            ]
        };
        for i in -60_000..60_000 {
            let x = i as f32 / 2000.0;
            for (got, want) in [silu(x), gelu(x), quick_gelu(x), mish(x), gelu_tanh(x)]
                .into_iter()
                .zip(f64s(f64::from(x)))
            {
                assert!(
                    (f64::from(got) - want).abs() < 3e-7 * f64::from(x.abs()).max(1.0),
                    "{x}: {got} {want}"
                );
            }
        }
        assert!(silu(f32::NAN).is_nan() && gelu(f32::NAN).is_nan());
        assert!(gelu(f32::INFINITY) > f32::MAX);
    }
}
