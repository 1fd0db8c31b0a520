//! Operations on f32 and f64.
//!
//! Add, multiply, fma, divide and square root are IEEE's, as the hardware's are. The approximate functions (`ex2.approx`, `sin.approx`,
//! `rsqrt.approx` …) are computed in f64 and rounded once: closer than the hardware, which is allowed a few units in the last place.

use crate::lanes::{Func, L32, compare, m, test};

/// How a result is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    Nearest,
    Zero,
    Down,
    Up,
}

impl Rounding {
    /// The rounding among the modifiers.
    pub(crate) fn among(parts: &[&str]) -> Self {
        for part in parts {
            match *part {
                "rz" | "rzi" => return Self::Zero,
                "rm" | "rmi" => return Self::Down,
                "rp" | "rpi" => return Self::Up,
                _ => {}
            }
        }
        Self::Nearest
    }
}

pub(crate) fn f(x: u32) -> f32 {
    f32::from_bits(x)
}

fn d(x: u64) -> f64 {
    f64::from_bits(x)
}

/// A subnormal number as a zero of its sign.
pub(crate) fn ftz(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE {
        f32::from_bits(x.to_bits() & 1 << 31)
    } else {
        x
    }
}

fn fz(x: u32) -> f32 {
    ftz(f(x))
}

/// `a + b` in f64 and what rounding lost, exactly (Knuth's two-sum).
pub(crate) fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let back = sum - a;
    (sum, (a - (sum - back)) + (b - back))
}

/// An exact `high + low` rounded to f32. `low` is less than half a unit in `high`'s last place.
pub(crate) fn round(high: f64, low: f64, to: Rounding) -> f32 {
    let odd = round_to_odd(high, low);
    let near = odd as f32;
    if !near.is_finite() && !odd.is_finite() || to == Rounding::Nearest {
        return near;
    }
    let (below, above) = (f64::from(near) < odd, f64::from(near) > odd);
    let up = to == Rounding::Up || to == Rounding::Zero && odd < 0.0;
    if up && below {
        near.next_up()
    } else if !up && above {
        near.next_down()
    } else {
        near
    }
}

/// `high + low` with the last bit set where it is not exact: rounding it again then rounds only once.
pub(crate) fn round_to_odd(high: f64, low: f64) -> f64 {
    if low == 0.0 || !low.is_finite() || high.to_bits() & 1 == 1 {
        return high;
    }
    let away = (low > 0.0) == (high > 0.0);
    f64::from_bits(if away {
        high.to_bits() + 1
    } else {
        high.to_bits() - 1
    })
}

/// `a · b + c`, rounded as asked. The product of two f32 is exact in f64.
pub(crate) fn fma(a: f32, b: f32, c: f32, to: Rounding) -> f32 {
    let (high, low) = two_sum(f64::from(a) * f64::from(b), f64::from(c));
    round(high, low, to)
}

/// `a · b + c` of all lanes, rounded once to the nearest.
///
/// The sum in f64 is rounded twice, which matters only where it is exactly between two f32, or the result is subnormal: then the
/// lanes are computed by themselves.
fn fma_lanes(a: &L32, b: &L32, c: &L32) -> L32 {
    let (mut sums, mut out) = ([0.0_f64; 32], [0; 32]);
    for lane in 0..32 {
        sums[lane] = f64::from(f(a[lane])) * f64::from(f(b[lane])) + f64::from(f(c[lane]));
    }
    let mut doubtful = false;
    for lane in 0..32 {
        out[lane] = (sums[lane] as f32).to_bits();
        doubtful |= sums[lane].to_bits() as u32 & 0x1fff_ffff == 0x1000_0000;
        doubtful |= (out[lane] << 1 <= f32::MIN_POSITIVE.to_bits() << 1) & (sums[lane] != 0.0);
    }
    if doubtful {
        for lane in 0..32 {
            out[lane] = f(a[lane]).mul_add(f(b[lane]), f(c[lane])).to_bits();
        }
    }
    out
}

/// The same with subnormal operands and results flushed.
fn fma_flushed(a: &L32, b: &L32, c: &L32) -> L32 {
    let flush = |x: &L32| x.map(|x| fz(x).to_bits());
    flush(&fma_lanes(&flush(a), &flush(b), &flush(c)))
}

/// PTX's minimum: a number where one operand is none, and −0 below +0.
pub(crate) fn min(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        if b.is_nan() {
            f32::from_bits(0x7fff_ffff)
        } else {
            b
        }
    } else if a < b || b.is_nan() || a == b && a.is_sign_negative() {
        a
    } else {
        b
    }
}

/// PTX's maximum.
pub(crate) fn max(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        if b.is_nan() {
            f32::from_bits(0x7fff_ffff)
        } else {
            b
        }
    } else if a > b || b.is_nan() || a == b && b.is_sign_negative() {
        a
    } else {
        b
    }
}

fn min_nan(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() {
        f32::from_bits(0x7fff_ffff)
    } else {
        min(a, b)
    }
}

fn max_nan(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() {
        f32::from_bits(0x7fff_ffff)
    } else {
        max(a, b)
    }
}

/// `div.approx`: a · (1 / b), whose reciprocal underflows to 0 above 2^126.
fn divide_approximately(a: f32, b: f32) -> f32 {
    let size = b.abs();
    if size > 8.507_059e37 && size < f32::INFINITY {
        if a.is_finite() {
            0.0 * a.signum() * b.signum()
        } else {
            f32::NAN
        }
    } else {
        a / b
    }
}

fn saturate(x: f32) -> f32 {
    // NaN becomes 0
    if x > 0.0 { x.min(1.0) } else { 0.0 }
}

/// `.sat`, applied to a result.
pub(crate) fn saturation() -> Func {
    m!(A1: |a: u32| -> u32 { saturate(f(a)).to_bits() })
}

/// One function of floats as a function of lanes, with and without subnormals flushed.
macro_rules! fm {
    ($ftz:expr, $kind:ident: |$($arg:ident),+| $body:expr) => {
        if $ftz {
            m!($kind: |$($arg: u32),+| -> u32 { $(let $arg = fz($arg);)+ ftz($body).to_bits() })
        } else {
            m!($kind: |$($arg: u32),+| -> u32 { $(let $arg = f($arg);)+ ($body).to_bits() })
        }
    };
}

/// The operation of a name on f32.
pub(crate) fn single(name: &str, parts: &[&str]) -> Option<Func> {
    let flush = parts.contains(&"ftz");
    let to = Rounding::among(parts);
    if to != Rounding::Nearest {
        return directed(name, flush, to);
    }
    let nan = parts.contains(&"NaN");
    let approx = parts.contains(&"approx");
    Some(match name {
        "add" => fm!(flush, A2: |a, b| a + b),
        "sub" => fm!(flush, A2: |a, b| a - b),
        "mul" => fm!(flush, A2: |a, b| a * b),
        "fma" | "mad" => Func::A3(if flush { fma_flushed } else { fma_lanes }),
        "div" if approx => fm!(flush, A2: |a, b| divide_approximately(a, b)),
        "div" => fm!(flush, A2: |a, b| a / b),
        "min" if nan => fm!(flush, A2: |a, b| min_nan(a, b)),
        "max" if nan => fm!(flush, A2: |a, b| max_nan(a, b)),
        "min" => fm!(flush, A2: |a, b| min(a, b)),
        "max" => fm!(flush, A2: |a, b| max(a, b)),
        "abs" => fm!(flush, A1: |a| a.abs()),
        "neg" => fm!(flush, A1: |a| -a),
        "copysign" => m!(A2: |a: u32, b: u32| -> u32 { a & 1 << 31 | b & !(1 << 31) }),
        "rcp" => fm!(flush, A1: |a| (1.0 / f64::from(a)) as f32),
        "sqrt" => fm!(flush, A1: |a| a.sqrt()),
        "rsqrt" => fm!(flush, A1: |a| (1.0 / f64::from(a).sqrt()) as f32),
        "ex2" => fm!(flush, A1: |a| f64::from(a).exp2() as f32),
        "lg2" => fm!(flush, A1: |a| f64::from(a).log2() as f32),
        "sin" => fm!(flush, A1: |a| f64::from(a).sin() as f32),
        "cos" => fm!(flush, A1: |a| f64::from(a).cos() as f32),
        "tanh" => fm!(flush, A1: |a| f64::from(a).tanh() as f32),
        _ => return None,
    })
}

/// The same where a result is rounded in a direction.
fn directed(name: &str, flush: bool, to: Rounding) -> Option<Func> {
    macro_rules! each {
        ($kind:ident: |$($arg:ident),+; $to:ident| $body:expr) => {
            match to {
                Rounding::Nearest => return None,
                Rounding::Zero => fm!(flush, $kind: |$($arg),+| { let $to = Rounding::Zero; $body }),
                Rounding::Down => fm!(flush, $kind: |$($arg),+| { let $to = Rounding::Down; $body }),
                Rounding::Up => fm!(flush, $kind: |$($arg),+| { let $to = Rounding::Up; $body }),
            }
        };
    }
    // quotients and roots: f64 has enough digits that no f32 boundary lies between it and the exact value, unless it is exact
    Some(match name {
        "add" => each!(A2: |a, b; to| fma(a, 1.0, b, to)),
        "sub" => each!(A2: |a, b; to| fma(b, -1.0, a, to)),
        "mul" => each!(A2: |a, b; to| round(f64::from(a) * f64::from(b), 0.0, to)),
        "fma" | "mad" => each!(A3: |a, b, c; to| fma(a, b, c, to)),
        "div" => each!(A2: |a, b; to| round(f64::from(a) / f64::from(b), 0.0, to)),
        "rcp" => each!(A1: |a; to| round(1.0 / f64::from(a), 0.0, to)),
        "sqrt" => each!(A1: |a; to| round(f64::from(a).sqrt(), 0.0, to)),
        _ => return None,
    })
}

fn min64(a: f64, b: f64) -> f64 {
    if a.is_nan() || b < a || a == b && b.is_sign_negative() {
        b
    } else {
        a
    }
}

fn max64(a: f64, b: f64) -> f64 {
    if a.is_nan() || b > a || a == b && a.is_sign_negative() {
        b
    } else {
        a
    }
}

/// `rcp.approx.ftz.f64` and its root: the low 32 bits of operand and result are not used.
fn coarse(x: f64) -> f64 {
    f64::from_bits(x.to_bits() & !0xffff_ffff)
}

/// The operation of a name on f64; only to the nearest.
pub(crate) fn double(name: &str, parts: &[&str]) -> Option<Func> {
    if Rounding::among(parts) != Rounding::Nearest {
        return None;
    }
    let approx = parts.contains(&"approx");
    Some(match name {
        "add" => m!(B2: |a: u64, b: u64| -> u64 { (d(a) + d(b)).to_bits() }),
        "sub" => m!(B2: |a: u64, b: u64| -> u64 { (d(a) - d(b)).to_bits() }),
        "mul" => m!(B2: |a: u64, b: u64| -> u64 { (d(a) * d(b)).to_bits() }),
        "fma" | "mad" => {
            m!(B3: |a: u64, b: u64, c: u64| -> u64 { d(a).mul_add(d(b), d(c)).to_bits() })
        }
        "div" => m!(B2: |a: u64, b: u64| -> u64 { (d(a) / d(b)).to_bits() }),
        "min" => m!(B2: |a: u64, b: u64| -> u64 { min64(d(a), d(b)).to_bits() }),
        "max" => m!(B2: |a: u64, b: u64| -> u64 { max64(d(a), d(b)).to_bits() }),
        "abs" => m!(B1: |a: u64| -> u64 { d(a).abs().to_bits() }),
        "neg" => m!(B1: |a: u64| -> u64 { (-d(a)).to_bits() }),
        "copysign" => m!(B2: |a: u64, b: u64| -> u64 { a & 1 << 63 | b & !(1 << 63) }),
        "rcp" if approx => m!(B1: |a: u64| -> u64 { coarse(1.0 / coarse(d(a))).to_bits() }),
        "rcp" => m!(B1: |a: u64| -> u64 { (1.0 / d(a)).to_bits() }),
        "sqrt" => m!(B1: |a: u64| -> u64 { d(a).sqrt().to_bits() }),
        "rsqrt" => m!(B1: |a: u64| -> u64 { coarse(1.0 / coarse(d(a)).sqrt()).to_bits() }),
        _ => return None,
    })
}

/// The comparison of a name on floats.
pub(crate) fn test(name: &str, flush: bool, width: u32) -> Option<Func> {
    match (width, flush) {
        (32, false) => compare!(name, Test32, u32, f),
        (32, true) => compare!(name, Test32, u32, fz),
        (64, _) => compare!(name, Test64, u64, d),
        _ => None,
    }
}

/// `testp`: what kind of number an operand is; the second operand is not looked at.
pub(crate) fn property(name: &str) -> Option<Func> {
    Some(match name {
        "finite" => test!(Test32, u32: |a, _b| f(a).is_finite()),
        "infinite" => test!(Test32, u32: |a, _b| f(a).is_infinite()),
        "number" => test!(Test32, u32: |a, _b| !f(a).is_nan()),
        "notanumber" => test!(Test32, u32: |a, _b| f(a).is_nan()),
        "normal" => test!(Test32, u32: |a, _b| f(a).is_normal()),
        "subnormal" => test!(Test32, u32: |a, _b| f(a).is_subnormal()),
        _ => return None,
    })
}
