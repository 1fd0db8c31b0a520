//! Scale, shift and SiLU with results in bf16, where the processor rounds to it: what such results do not show is not computed.

use super::super::Level;
use super::super::simd::{self, Number};
use super::Place;
use crate::Activation;

/// What `apply_rows` does; `false`, and nothing done, where there is nothing to gain.
pub(super) fn apply_rows<I: Number, O: Number>(
    level: Level,
    x: &[I],
    factors: &[f64],
    activation: Option<Activation>,
    (out, place): (&mut [O], Place),
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if level.has_bf16() && O::COARSE {
        // SAFETY: a level is only in use where the processor has it
        unsafe {
            match activation {
                None => rows::<I, O, false>(x, factors, out, place),
                Some(Activation::Silu) => rows::<I, O, true>(x, factors, out, place),
                Some(_) => return false,
            }
        }
        return true;
    }
    let _ = (level, x, factors, activation, out, place);
    false
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
fn rows<I: Number, O: Number, const SILU: bool>(
    x: &[I],
    factors: &[f64],
    out: &mut [O],
    place: Place,
) {
    use super::super::micro::LANES;
    use super::unpair;

    let rows = x.chunks_exact(place.channels);
    for (x, out) in rows.zip(out.chunks_exact_mut(place.row)) {
        let out = &mut out[place.column..][..place.channels];
        let (x, x_rest) = x.as_chunks::<LANES>();
        let (out, out_rest) = out.as_chunks_mut::<LANES>();
        let (factors, factors_rest) = factors.as_chunks::<LANES>();
        for ((x, out), factors) in x.iter().zip(out).zip(factors) {
            let mut values = [0f32; LANES];
            for i in 0..LANES {
                let (scale, shift) = unpair(factors[i]);
                values[i] = x[i].f32() * scale + shift;
            }
            // SAFETY: this is compiled for the processors that have the instructions
            unsafe {
                if SILU {
                    simd::coarse_silu(&mut values);
                }
                O::store_native(&values, out);
            }
        }
        for ((x, out), factor) in x_rest.iter().zip(out_rest).zip(factors_rest) {
            let (scale, shift) = unpair(*factor);
            let value = x.f32() * scale + shift;
            *out = O::of(if SILU { simd::silu(value) } else { value });
        }
    }
}
