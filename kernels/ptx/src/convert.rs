//! `cvt`: between every two types, with every rounding.

use crate::floats::{Rounding, f, ftz, round};
use crate::halves::{self, Brain, Half, Ieee, odd32};
use crate::lanes::{Func, m};
use crate::syntax::{Class, Type};

/// A conversion of one lane.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conversion {
    pub(crate) to: Type,
    pub(crate) from: Type,
    /// Bits of the register that takes the result: narrower integers are extended to it.
    pub(crate) width: u32,
    pub(crate) rounding: Rounding,
    /// `.rni` and its like: to an integral value.
    pub(crate) integral: bool,
    pub(crate) saturate: bool,
    pub(crate) flush: bool,
    pub(crate) relu: bool,
}

enum Value {
    Integer(i128),
    Float(f64),
}

/// The conversions that are common, as functions of all lanes.
pub(crate) fn fast(c: &Conversion, parts: &[&str]) -> Option<Func> {
    if c.saturate {
        return None;
    }
    let (to, from) = (c.to, c.from);
    let integers = !to.is_float() && !from.is_float();
    Some(match (to.bits, from.bits) {
        (64, 32) if integers && from.is_signed() => {
            m!(Widen: |a: u32| -> u64 { i64::from(a as i32) as u64 })
        }
        (64, 32) if integers => m!(Widen: |a: u32| -> u64 { u64::from(a) }),
        (32, 64) if integers => m!(Narrow: |a: u64| -> u32 { a as u32 }),
        (32, 16) if integers && from.is_signed() && c.width == 32 => {
            m!(A1: |a: u32| -> u32 { i32::from(a as u16 as i16) as u32 })
        }
        (32, 16) if integers && c.width == 32 => m!(A1: |a: u32| -> u32 { a & 0xffff }),
        (16, 32) if integers && c.width == 16 => m!(A1: |a: u32| -> u32 { a & 0xffff }),
        (16, 32) if to.is_float() && from.is_float() && !c.integral => {
            halves::narrow(to.class, to.packed, parts)?
        }
        (32, 16) if to.class == Class::Float && from.is_float() && !c.integral && !c.flush => {
            halves::widen(from.class)?
        }
        (32, 32)
            if to.class == Class::Float && !from.is_float() && c.rounding == Rounding::Nearest =>
        {
            if from.is_signed() {
                m!(A1: |a: u32| -> u32 { (a as i32 as f32).to_bits() })
            } else {
                m!(A1: |a: u32| -> u32 { (a as f32).to_bits() })
            }
        }
        _ => return None,
    })
}

/// Converts the bits of one lane.
pub(crate) fn convert(c: &Conversion, bits: u64) -> u64 {
    let value = match read(c, bits) {
        Value::Float(x) if c.integral || !c.to.is_float() => Value::Float(match c.rounding {
            Rounding::Nearest => x.round_ties_even(),
            Rounding::Zero => x.trunc(),
            Rounding::Down => x.floor(),
            Rounding::Up => x.ceil(),
        }),
        other => other,
    };
    if c.to.is_float() {
        to_float(c, &value)
    } else {
        to_integer(c, &value)
    }
}

fn read(c: &Conversion, bits: u64) -> Value {
    let from = c.from;
    match (from.class, from.bits) {
        (Class::Brain, _) => Value::Float(f64::from(Brain::up(bits as u32))),
        (Class::Float, 16) => Value::Float(f64::from(Ieee::up(bits as u32))),
        (Class::Float | Class::Tensor, 32) => {
            let x = f(bits as u32);
            Value::Float(f64::from(if c.flush { ftz(x) } else { x }))
        }
        (Class::Float, _) => Value::Float(f64::from_bits(bits)),
        (Class::Signed, width) => {
            Value::Integer(i128::from((bits as i64) << (64 - width) >> (64 - width)))
        }
        (_, width) => Value::Integer(i128::from(bits << (64 - width) >> (64 - width))),
    }
}

fn to_integer(c: &Conversion, value: &Value) -> u64 {
    let bits = c.to.bits;
    let (low, high) = if c.to.is_signed() {
        (-(1_i128 << (bits - 1)), (1_i128 << (bits - 1)) - 1)
    } else {
        (0, (1_i128 << bits) - 1)
    };
    let wide = match value {
        // a float that does not fit becomes the nearest that does; NaN becomes 0
        Value::Float(x) => (*x as i128).clamp(low, high),
        Value::Integer(v) if c.saturate => (*v).clamp(low, high),
        Value::Integer(v) if c.to.is_signed() => {
            i128::from((*v as i64) << (64 - bits) >> (64 - bits))
        }
        Value::Integer(v) => v & high,
    };
    if c.width >= 64 {
        wide as u64
    } else {
        wide as u64 & ((1 << c.width) - 1)
    }
}

fn to_float(c: &Conversion, value: &Value) -> u64 {
    let exact = match value {
        Value::Integer(v) => return integer_to_float(c, *v),
        Value::Float(x) => *x,
    };
    let mut x = exact;
    if c.saturate {
        x = if x > 0.0 { x.min(1.0) } else { 0.0 };
    }
    if c.relu {
        x = if x > 0.0 || x.is_nan() { x } else { 0.0 };
    }
    match (c.to.class, c.to.bits) {
        (Class::Float, 64) => x.to_bits(),
        (Class::Tensor, _) => {
            // to the nearest of 10 bits, halves away from zero
            let bits = (x as f32).to_bits();
            u64::from(
                if x.is_nan() {
                    bits
                } else {
                    bits.wrapping_add(0x1000)
                } & !0x1fff,
            )
        }
        (Class::Float, 32) => {
            let y = round(x, 0.0, c.rounding);
            u64::from(if c.flush { ftz(y) } else { y }.to_bits())
        }
        (class, _) => {
            let (up, down) = halves::conversions(class);
            let near = down(odd32(x));
            let error = x
                .partial_cmp(&f64::from(up(near)))
                .unwrap_or(std::cmp::Ordering::Equal);
            step(u64::from(near), error, x < 0.0, c.rounding)
        }
    }
}

fn integer_to_float(c: &Conversion, v: i128) -> u64 {
    match (c.to.class, c.to.bits) {
        (Class::Float, 64) => {
            let near = v as f64;
            let error = v.cmp(&(near as i128));
            step(near.to_bits(), error, v < 0, c.rounding)
        }
        (Class::Float, 32) => {
            let near = v as f32;
            let error = v.cmp(&(near as i128));
            step(u64::from(near.to_bits()), error, v < 0, c.rounding)
        }
        (Class::Brain, _) => u64::from(Brain::down(odd32(v as f64))),
        _ => u64::from(Ieee::down(odd32(v as f64))),
    }
}

/// The bits of a number to the nearest, moved where another rounding is asked. `error` compares the exact value with it.
fn step(near: u64, error: std::cmp::Ordering, negative: bool, to: Rounding) -> u64 {
    let up = to == Rounding::Up || to == Rounding::Zero && negative;
    match error {
        std::cmp::Ordering::Greater if to != Rounding::Nearest && up => {
            near.wrapping_add_signed(if negative { -1 } else { 1 })
        }
        std::cmp::Ordering::Less if to != Rounding::Nearest && !up => {
            near.wrapping_add_signed(if negative { 1 } else { -1 })
        }
        _ => near,
    }
}
