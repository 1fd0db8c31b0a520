//! Operations on f16, bf16 and pairs of them.
//!
//! A sum or product of two halves is computed in f32 and rounded: f32 has more than twice their digits, so that rounding twice gives
//! what rounding once would. A fused multiply and add is exact in two f64 before it is rounded once.

use half::{bf16, f16};

use crate::floats::{ftz, max, min, round_to_odd, two_sum};
use crate::lanes::{Func, compare, m, test};
use crate::syntax::{Class, Type};

/// A 16-bit format: to f32 and back, to the nearest.
pub(crate) trait Half {
    fn up(x: u32) -> f32;
    fn down(x: f32) -> u32;
}

/// The conversions of a format.
pub(crate) type Conversions = (fn(u32) -> f32, fn(f32) -> u32);

/// The conversions of `f16` and `bf16` by their class.
pub(crate) fn conversions(class: Class) -> Conversions {
    if class == Class::Brain {
        (Brain::up, Brain::down)
    } else {
        (Ieee::up, Ieee::down)
    }
}

pub(crate) struct Ieee;
pub(crate) struct Brain;

impl Half for Ieee {
    fn up(x: u32) -> f32 {
        f16::from_bits(x as u16).to_f32()
    }
    fn down(x: f32) -> u32 {
        if x.is_nan() {
            0x7fff
        } else {
            u32::from(f16::from_f32(x).to_bits())
        }
    }
}

impl Half for Brain {
    fn up(x: u32) -> f32 {
        f32::from_bits(x << 16)
    }
    fn down(x: f32) -> u32 {
        if x.is_nan() {
            0x7fff
        } else {
            u32::from(bf16::from_f32(x).to_bits())
        }
    }
}

/// An f64 as an f32 that rounds to any half as the f64 would.
pub(crate) fn odd32(x: f64) -> f32 {
    let near = x as f32;
    if !near.is_finite() || f64::from(near) == x || near.to_bits() & 1 == 1 {
        return near;
    }
    // the exact value lies between `near` and its neighbour, one of which has the last bit set
    if (f64::from(near) < x) == (near > 0.0 || near == 0.0 && x > 0.0) {
        f32::from_bits(near.to_bits() + 1)
    } else if near == 0.0 {
        -f32::from_bits(1)
    } else {
        f32::from_bits(near.to_bits() - 1)
    }
}

fn fused<H: Half>(a: u32, b: u32, c: u32) -> f32 {
    let (high, low) = two_sum(
        f64::from(H::up(a)) * f64::from(H::up(b)),
        f64::from(H::up(c)),
    );
    odd32(round_to_odd(high, low))
}

fn saturated(x: f32) -> f32 {
    if x > 0.0 { x.min(1.0) } else { 0.0 }
}

fn relu(x: f32) -> f32 {
    if x > 0.0 || x.is_nan() { x } else { 0.0 }
}

/// One function as that of a half or of both halves of a pair.
macro_rules! h {
    ($half:ty, $packed:expr, $kind:ident: |$($arg:ident),+| $body:expr) => {
        if $packed {
            m!($kind: |$($arg: u32),+| -> u32 {
                let low = { $(let $arg = $arg & 0xffff;)+ <$half>::down($body) };
                let high = { $(let $arg = $arg >> 16;)+ <$half>::down($body) };
                low | high << 16
            })
        } else {
            m!($kind: |$($arg: u32),+| -> u32 { <$half>::down($body) })
        }
    };
}

macro_rules! table {
    ($half:ty, $name:expr, $parts:expr, $packed:expr) => {{
        let packed = $packed;
        let has = |part: &str| $parts.contains(&part);
        match $name {
            "add" if has("sat") => h!($half, packed, A2: |a, b| saturated(<$half>::up(a) + <$half>::up(b))),
            "sub" if has("sat") => h!($half, packed, A2: |a, b| saturated(<$half>::up(a) - <$half>::up(b))),
            "mul" if has("sat") => h!($half, packed, A2: |a, b| saturated(<$half>::up(a) * <$half>::up(b))),
            "fma" if has("sat") => h!($half, packed, A3: |a, b, c| saturated(fused::<$half>(a, b, c))),
            "fma" if has("relu") => h!($half, packed, A3: |a, b, c| relu(fused::<$half>(a, b, c))),
            "add" => h!($half, packed, A2: |a, b| <$half>::up(a) + <$half>::up(b)),
            "sub" => h!($half, packed, A2: |a, b| <$half>::up(a) - <$half>::up(b)),
            "mul" => h!($half, packed, A2: |a, b| <$half>::up(a) * <$half>::up(b)),
            "fma" => h!($half, packed, A3: |a, b, c| fused::<$half>(a, b, c)),
            "min" if has("NaN") => h!($half, packed, A2: |a, b| { let s = <$half>::up(a) + <$half>::up(b); if s.is_nan() && (<$half>::up(a).is_nan() || <$half>::up(b).is_nan()) { s } else { min(<$half>::up(a), <$half>::up(b)) } }),
            "max" if has("NaN") => h!($half, packed, A2: |a, b| { let s = <$half>::up(a) + <$half>::up(b); if s.is_nan() && (<$half>::up(a).is_nan() || <$half>::up(b).is_nan()) { s } else { max(<$half>::up(a), <$half>::up(b)) } }),
            "min" => h!($half, packed, A2: |a, b| min(<$half>::up(a), <$half>::up(b))),
            "max" => h!($half, packed, A2: |a, b| max(<$half>::up(a), <$half>::up(b))),
            "ex2" => h!($half, packed, A1: |a| odd32(f64::from(<$half>::up(a)).exp2())),
            "tanh" => h!($half, packed, A1: |a| odd32(f64::from(<$half>::up(a)).tanh())),
            _ => return None,
        }
    }};
}

/// The operation of a name on halves of a type.
pub(crate) fn half(name: &str, parts: &[&str], kind: Type) -> Option<Func> {
    match (name, kind.packed) {
        ("abs", false) => return Some(m!(A1: |a: u32| -> u32 { a & 0x7fff })),
        ("abs", true) => return Some(m!(A1: |a: u32| -> u32 { a & 0x7fff_7fff })),
        ("neg", false) => return Some(m!(A1: |a: u32| -> u32 { a ^ 0x8000 })),
        ("neg", true) => return Some(m!(A1: |a: u32| -> u32 { a ^ 0x8000_8000 })),
        _ => {}
    }
    if parts.contains(&"ftz") && kind.class == Class::Float {
        return flushed(name, kind.packed);
    }
    Some(match kind.class {
        Class::Float => table!(Ieee, name, parts, kind.packed),
        Class::Brain => table!(Brain, name, parts, kind.packed),
        _ => return None,
    })
}

/// A subnormal f16 as a zero.
fn flush(x: f32) -> f32 {
    if x.abs() < 6.103_515_6e-5 {
        0.0 * x.signum()
    } else {
        x
    }
}

fn up(x: u32) -> f32 {
    flush(Ieee::up(x))
}

/// `.ftz` on f16.
fn flushed(name: &str, packed: bool) -> Option<Func> {
    Some(match name {
        "add" => h!(Ieee, packed, A2: |a, b| flush(up(a) + up(b))),
        "sub" => h!(Ieee, packed, A2: |a, b| flush(up(a) - up(b))),
        "mul" => h!(Ieee, packed, A2: |a, b| flush(up(a) * up(b))),
        "min" => h!(Ieee, packed, A2: |a, b| min(up(a), up(b))),
        "max" => h!(Ieee, packed, A2: |a, b| max(up(a), up(b))),
        "fma" => {
            h!(Ieee, packed, A3: |a, b, c| flush(fused::<Ieee>(Ieee::down(up(a)), Ieee::down(up(b)), Ieee::down(up(c)))))
        }
        _ => return None,
    })
}

/// The comparison of a name on single halves.
pub(crate) fn test(name: &str, class: Class) -> Option<Func> {
    match class {
        Class::Float => compare!(name, Test32, u32, Ieee::up),
        Class::Brain => compare!(name, Test32, u32, Brain::up),
        _ => None,
    }
}

/// `cvt` of f32 to a half or of two to a pair: the first operand goes to the upper half.
pub(crate) fn narrow(class: Class, packed: bool, parts: &[&str]) -> Option<Func> {
    let (rect, zero, flush) = (
        parts.contains(&"relu"),
        parts.contains(&"rz"),
        parts.contains(&"ftz"),
    );
    macro_rules! both {
        ($half:ty, |$x:ident| $value:expr) => {
            if packed {
                m!(A2: |a: u32, b: u32| -> u32 {
                    let high = { let $x = f32::from_bits(a); $value };
                    let low = { let $x = f32::from_bits(b); $value };
                    high << 16 | low
                })
            } else {
                m!(A1: |a: u32| -> u32 { let $x = f32::from_bits(a); $value })
            }
        };
    }
    Some(match (class, zero, rect, flush) {
        (Class::Brain, false, false, _) => both!(Brain, |x| Brain::down(x)),
        (Class::Brain, false, true, _) => both!(Brain, |x| Brain::down(relu(x))),
        (Class::Brain, true, false, _) => both!(Brain, |x| if x.is_nan() {
            0x7fff
        } else {
            x.to_bits() >> 16
        }),
        (Class::Brain, true, true, _) => both!(Brain, |x| if x.is_nan() {
            0x7fff
        } else {
            relu(x).to_bits() >> 16
        }),
        (Class::Float, false, false, false) => both!(Ieee, |x| Ieee::down(x)),
        (Class::Float, false, false, true) => both!(Ieee, |x| Ieee::down(ftz(x))),
        (Class::Float, false, true, _) => both!(Ieee, |x| Ieee::down(relu(x))),
        (Class::Float, true, false, _) => both!(Ieee, |x| toward_zero(x)),
        (Class::Float, true, true, _) => both!(Ieee, |x| toward_zero(relu(x))),
        _ => return None,
    })
}

fn toward_zero(x: f32) -> u32 {
    let near = Ieee::down(x);
    if Ieee::up(near).abs() > x.abs() {
        near - 1
    } else {
        near
    }
}

/// `cvt` of a half to f32.
pub(crate) fn widen(class: Class) -> Option<Func> {
    match class {
        Class::Float => Some(m!(A1: |a: u32| -> u32 { Ieee::up(a).to_bits() })),
        Class::Brain => Some(m!(A1: |a: u32| -> u32 { Brain::up(a).to_bits() })),
        _ => None,
    }
}

/// `set` of pairs: 1 or 0 in each half.
pub(crate) fn test_pairs(name: &str, class: Class) -> Option<Func> {
    macro_rules! pairs {
        ($half:ty, $one:expr) => {{
            macro_rules! each {
                (|$a:ident, $b:ident| $test:expr) => {
                    m!(A2: |a: u32, b: u32| -> u32 {
                        let low = { let ($a, $b) = (<$half>::up(a & 0xffff), <$half>::up(b & 0xffff)); $test };
                        let high = { let ($a, $b) = (<$half>::up(a >> 16), <$half>::up(b >> 16)); $test };
                        u32::from(low) * $one | (u32::from(high) * $one) << 16
                    })
                };
            }
            Some(match name {
                "eq" => each!(|x, y| x == y),
                "ne" => each!(|x, y| x.partial_cmp(&y).is_some_and(std::cmp::Ordering::is_ne)),
                "lt" => each!(|x, y| x < y),
                "le" => each!(|x, y| x <= y),
                "gt" => each!(|x, y| x > y),
                "ge" => each!(|x, y| x >= y),
                "neu" => each!(|x, y| x != y),
                "nan" => each!(|x, y| x.is_nan() || y.is_nan()),
                _ => return None,
            })
        }};
    }
    match class {
        Class::Float => pairs!(Ieee, 0x3c00),
        Class::Brain => pairs!(Brain, 0x3f80),
        _ => None,
    }
}
