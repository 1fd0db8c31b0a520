//! Integer and bit operations.

use crate::lanes::{Func, compare, m, test};
use crate::syntax::{Class, Type};

fn s16(x: u32) -> i32 {
    i32::from(x as u16 as i16)
}

fn has(parts: &[&str], part: &str) -> bool {
    parts.contains(&part)
}

/// The operation of a name on integers of a type; `parts` are its modifiers.
pub(crate) fn integer(name: &str, parts: &[&str], kind: Type) -> Option<Func> {
    if name == "mul" || name == "mad" {
        return product(name, parts, kind);
    }
    if has(parts, "sat") {
        return match (name, kind.class, kind.bits) {
            ("add", Class::Signed, 32) => {
                Some(m!(A2: |a: u32, b: u32| -> u32 { (a as i32).saturating_add(b as i32) as u32 }))
            }
            ("sub", Class::Signed, 32) => {
                Some(m!(A2: |a: u32, b: u32| -> u32 { (a as i32).saturating_sub(b as i32) as u32 }))
            }
            _ => None,
        };
    }
    match kind.bits {
        16 => integer16(name, kind.is_signed()),
        32 => integer32(name, kind.is_signed()),
        64 => integer64(name, kind.is_signed()),
        _ => None,
    }
}

fn integer16(name: &str, signed: bool) -> Option<Func> {
    Some(match (name, signed) {
        ("add", _) => m!(A2: |a: u32, b: u32| -> u32 { a.wrapping_add(b) & 0xffff }),
        ("sub", _) => m!(A2: |a: u32, b: u32| -> u32 { a.wrapping_sub(b) & 0xffff }),
        ("div", true) => {
            m!(A2: |a: u32, b: u32| -> u32 { s16(a).checked_div(s16(b)).unwrap_or(-1) as u32 & 0xffff })
        }
        ("div", false) => m!(A2: |a: u32, b: u32| -> u32 { a.checked_div(b).unwrap_or(0xffff) }),
        ("rem", true) => {
            m!(A2: |a: u32, b: u32| -> u32 { s16(a).checked_rem(s16(b)).unwrap_or(s16(a)) as u32 & 0xffff })
        }
        ("rem", false) => m!(A2: |a: u32, b: u32| -> u32 { a.checked_rem(b).unwrap_or(a) }),
        ("min", true) => m!(A2: |a: u32, b: u32| -> u32 { s16(a).min(s16(b)) as u32 & 0xffff }),
        ("min", false) => m!(A2: |a: u32, b: u32| -> u32 { a.min(b) }),
        ("max", true) => m!(A2: |a: u32, b: u32| -> u32 { s16(a).max(s16(b)) as u32 & 0xffff }),
        ("max", false) => m!(A2: |a: u32, b: u32| -> u32 { a.max(b) }),
        ("abs", _) => m!(A1: |a: u32| -> u32 { s16(a).unsigned_abs() & 0xffff }),
        ("neg", _) => m!(A1: |a: u32| -> u32 { a.wrapping_neg() & 0xffff }),
        _ => return None,
    })
}

fn integer32(name: &str, signed: bool) -> Option<Func> {
    Some(match (name, signed) {
        ("add", _) => m!(A2: |a: u32, b: u32| -> u32 { a.wrapping_add(b) }),
        ("sub", _) => m!(A2: |a: u32, b: u32| -> u32 { a.wrapping_sub(b) }),
        // by zero: all ones, what the hardware's sequence leaves; the remainder is then the dividend
        ("div", true) => {
            m!(A2: |a: u32, b: u32| -> u32 { if b == 0 { u32::MAX } else { (a as i32).wrapping_div(b as i32) as u32 } })
        }
        ("div", false) => m!(A2: |a: u32, b: u32| -> u32 { a.checked_div(b).unwrap_or(u32::MAX) }),
        ("rem", true) => {
            m!(A2: |a: u32, b: u32| -> u32 { if b == 0 { a } else { (a as i32).wrapping_rem(b as i32) as u32 } })
        }
        ("rem", false) => m!(A2: |a: u32, b: u32| -> u32 { a.checked_rem(b).unwrap_or(a) }),
        ("min", true) => m!(A2: |a: u32, b: u32| -> u32 { (a as i32).min(b as i32) as u32 }),
        ("min", false) => m!(A2: |a: u32, b: u32| -> u32 { a.min(b) }),
        ("max", true) => m!(A2: |a: u32, b: u32| -> u32 { (a as i32).max(b as i32) as u32 }),
        ("max", false) => m!(A2: |a: u32, b: u32| -> u32 { a.max(b) }),
        ("abs", _) => m!(A1: |a: u32| -> u32 { (a as i32).unsigned_abs() }),
        ("neg", _) => m!(A1: |a: u32| -> u32 { a.wrapping_neg() }),
        ("sad", true) => {
            m!(A3: |a: u32, b: u32, c: u32| -> u32 { c.wrapping_add((a as i32).abs_diff(b as i32)) })
        }
        ("sad", false) => m!(A3: |a: u32, b: u32, c: u32| -> u32 { c.wrapping_add(a.abs_diff(b)) }),
        _ => return None,
    })
}

fn integer64(name: &str, signed: bool) -> Option<Func> {
    Some(match (name, signed) {
        ("add", _) => m!(B2: |a: u64, b: u64| -> u64 { a.wrapping_add(b) }),
        ("sub", _) => m!(B2: |a: u64, b: u64| -> u64 { a.wrapping_sub(b) }),
        ("div", true) => {
            m!(B2: |a: u64, b: u64| -> u64 { if b == 0 { u64::MAX } else { (a as i64).wrapping_div(b as i64) as u64 } })
        }
        ("div", false) => m!(B2: |a: u64, b: u64| -> u64 { a.checked_div(b).unwrap_or(u64::MAX) }),
        ("rem", true) => {
            m!(B2: |a: u64, b: u64| -> u64 { if b == 0 { a } else { (a as i64).wrapping_rem(b as i64) as u64 } })
        }
        ("rem", false) => m!(B2: |a: u64, b: u64| -> u64 { a.checked_rem(b).unwrap_or(a) }),
        ("min", true) => m!(B2: |a: u64, b: u64| -> u64 { (a as i64).min(b as i64) as u64 }),
        ("min", false) => m!(B2: |a: u64, b: u64| -> u64 { a.min(b) }),
        ("max", true) => m!(B2: |a: u64, b: u64| -> u64 { (a as i64).max(b as i64) as u64 }),
        ("max", false) => m!(B2: |a: u64, b: u64| -> u64 { a.max(b) }),
        ("abs", _) => m!(B1: |a: u64| -> u64 { (a as i64).unsigned_abs() }),
        ("neg", _) => m!(B1: |a: u64| -> u64 { a.wrapping_neg() }),
        _ => return None,
    })
}

fn signed_wide(a: u32, b: u32) -> u64 {
    (i64::from(a as i32) * i64::from(b as i32)) as u64
}

fn unsigned_wide(a: u32, b: u32) -> u64 {
    u64::from(a) * u64::from(b)
}

/// The upper half of a product of 64-bit integers.
pub(crate) fn high64(a: u64, b: u64, signed: bool) -> u64 {
    if signed {
        ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64
    } else {
        ((u128::from(a) * u128::from(b)) >> 64) as u64
    }
}

/// The upper half of a product of 32-bit integers.
pub(crate) fn high32(a: u32, b: u32, signed: bool) -> u32 {
    if signed {
        (signed_wide(a, b) >> 32) as u32
    } else {
        (unsigned_wide(a, b) >> 32) as u32
    }
}

fn product(name: &str, parts: &[&str], kind: Type) -> Option<Func> {
    let half = ["lo", "hi", "wide"].into_iter().find(|h| has(parts, h))?;
    let signed = kind.is_signed();
    Some(match (name, half, kind.bits, signed) {
        ("mul", "lo", 16, _) => m!(A2: |a: u32, b: u32| -> u32 { a.wrapping_mul(b) & 0xffff }),
        ("mul", "hi", 16, true) => {
            m!(A2: |a: u32, b: u32| -> u32 { (s16(a) * s16(b)) as u32 >> 16 })
        }
        ("mul", "hi", 16, false) => m!(A2: |a: u32, b: u32| -> u32 { a.wrapping_mul(b) >> 16 }),
        ("mul", "wide", 16, true) => m!(A2: |a: u32, b: u32| -> u32 { (s16(a) * s16(b)) as u32 }),
        ("mul", "wide", 16, false) => m!(A2: |a: u32, b: u32| -> u32 { a.wrapping_mul(b) }),
        ("mad", "lo", 16, _) => {
            m!(A3: |a: u32, b: u32, c: u32| -> u32 { a.wrapping_mul(b).wrapping_add(c) & 0xffff })
        }
        ("mad", "wide", 16, true) => {
            m!(A3: |a: u32, b: u32, c: u32| -> u32 { ((s16(a) * s16(b)) as u32).wrapping_add(c) })
        }
        ("mad", "wide", 16, false) => {
            m!(A3: |a: u32, b: u32, c: u32| -> u32 { a.wrapping_mul(b).wrapping_add(c) })
        }
        ("mul", "lo", 32, _) => m!(A2: |a: u32, b: u32| -> u32 { a.wrapping_mul(b) }),
        ("mul", "hi", 32, true) => m!(A2: |a: u32, b: u32| -> u32 { high32(a, b, true) }),
        ("mul", "hi", 32, false) => m!(A2: |a: u32, b: u32| -> u32 { high32(a, b, false) }),
        ("mul", "wide", 32, true) => m!(Wide2: |a: u32, b: u32| -> u64 { signed_wide(a, b) }),
        ("mul", "wide", 32, false) => m!(Wide2: |a: u32, b: u32| -> u64 { unsigned_wide(a, b) }),
        ("mad", "lo", 32, _) => {
            m!(A3: |a: u32, b: u32, c: u32| -> u32 { a.wrapping_mul(b).wrapping_add(c) })
        }
        ("mad", "hi", 32, true) => {
            m!(A3: |a: u32, b: u32, c: u32| -> u32 { high32(a, b, true).wrapping_add(c) })
        }
        ("mad", "hi", 32, false) => {
            m!(A3: |a: u32, b: u32, c: u32| -> u32 { high32(a, b, false).wrapping_add(c) })
        }
        ("mad", "wide", 32, true) => {
            m!(Wide3: |a: u32, b: u32, c: u64| -> u64 { signed_wide(a, b).wrapping_add(c) })
        }
        ("mad", "wide", 32, false) => {
            m!(Wide3: |a: u32, b: u32, c: u64| -> u64 { unsigned_wide(a, b).wrapping_add(c) })
        }
        ("mul", "lo", 64, _) => m!(B2: |a: u64, b: u64| -> u64 { a.wrapping_mul(b) }),
        ("mul", "hi", 64, true) => m!(B2: |a: u64, b: u64| -> u64 { high64(a, b, true) }),
        ("mul", "hi", 64, false) => m!(B2: |a: u64, b: u64| -> u64 { high64(a, b, false) }),
        ("mad", "lo", 64, _) => {
            m!(B3: |a: u64, b: u64, c: u64| -> u64 { a.wrapping_mul(b).wrapping_add(c) })
        }
        ("mad", "hi", 64, true) => {
            m!(B3: |a: u64, b: u64, c: u64| -> u64 { high64(a, b, true).wrapping_add(c) })
        }
        ("mad", "hi", 64, false) => {
            m!(B3: |a: u64, b: u64, c: u64| -> u64 { high64(a, b, false).wrapping_add(c) })
        }
        _ => return None,
    })
}

fn shift_right(a: i64, bits: u32, by: u32) -> i64 {
    a >> by.min(bits - 1)
}

fn extract(a: u64, at: u32, count: u32, bits: u32, signed: bool) -> u64 {
    let (at, count) = (at & 0xff, count & 0xff);
    if count == 0 {
        return 0;
    }
    let field = if at < bits { a >> at } else { 0 };
    let kept = count.min(64);
    let value = if kept < 64 {
        field & ((1 << kept) - 1)
    } else {
        field
    };
    // the sign is the field's top bit, or the operand's where the field reaches beyond it
    let sign = a >> (at + count - 1).min(bits - 1) & 1;
    let known = count.min(bits.saturating_sub(at));
    if signed && sign == 1 && known < 64 {
        value | u64::MAX << known
    } else {
        value
    }
}

fn insert(a: u64, b: u64, at: u32, count: u32, bits: u32) -> u64 {
    let (at, count) = (at & 0xff, count & 0xff);
    if at >= bits || count == 0 {
        return b;
    }
    let ones = if count >= 64 {
        u64::MAX
    } else {
        (1 << count) - 1
    };
    let mask = ones << at;
    (a << at) & mask | b & !mask
}

fn permute(a: u32, b: u32, selector: u32, mode: u32) -> u32 {
    let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
    let s = selector & 3;
    let at: [u32; 4] = match mode {
        1 => [s, s + 1, s + 2, s + 3],
        2 => [s, s + 7, s + 6, s + 5].map(|i| i & 7),
        3 => [s; 4],
        4 => [0, 1, 2, 3].map(|i: u32| i.max(s)),
        5 => [0, 1, 2, 3].map(|i: u32| i.min(s)),
        6 => [2 * (s & 1), 2 * (s & 1) + 1, 2 * (s & 1), 2 * (s & 1) + 1],
        _ => [0, 4, 8, 12].map(|shift| selector >> shift & 15),
    };
    u32::from_le_bytes(at.map(|i| {
        let byte = bytes[i as usize & 7];
        if i & 8 == 0 {
            byte
        } else {
            (byte as i8 >> 7) as u8
        }
    }))
}

/// The place of the highest bit that differs from the sign, or how far it is from the top; all ones where there is none.
fn highest(x: u64, bits: u32, shift: bool) -> u32 {
    match x.leading_zeros() {
        64 => u32::MAX,
        zeros if shift => zeros + bits - 64,
        zeros => 63 - zeros,
    }
}

fn unsign(a: u32) -> u64 {
    u64::from(a ^ (a as i32 >> 31) as u32)
}

fn find(signed: bool, shift: bool) -> Func {
    match (signed, shift) {
        (false, false) => m!(A1: |a: u32| -> u32 { highest(a.into(), 32, false) }),
        (false, true) => m!(A1: |a: u32| -> u32 { highest(a.into(), 32, true) }),
        (true, false) => m!(A1: |a: u32| -> u32 { highest(unsign(a), 32, false) }),
        (true, true) => m!(A1: |a: u32| -> u32 { highest(unsign(a), 32, true) }),
    }
}

fn find64(signed: bool, shift: bool) -> Func {
    match (signed, shift) {
        (false, false) => m!(Narrow: |a: u64| -> u32 { highest(a, 64, false) }),
        (false, true) => m!(Narrow: |a: u64| -> u32 { highest(a, 64, true) }),
        (true, false) => {
            m!(Narrow: |a: u64| -> u32 { highest(a ^ (a as i64 >> 63) as u64, 64, false) })
        }
        (true, true) => {
            m!(Narrow: |a: u64| -> u32 { highest(a ^ (a as i64 >> 63) as u64, 64, true) })
        }
    }
}

/// The operation of a name on bits of a type.
pub(crate) fn bits(name: &str, parts: &[&str], kind: Type) -> Option<Func> {
    let signed = kind.is_signed();
    Some(match (name, kind.bits) {
        ("and", 16 | 32) => m!(A2: |a: u32, b: u32| -> u32 { a & b }),
        ("or", 16 | 32) => m!(A2: |a: u32, b: u32| -> u32 { a | b }),
        ("xor", 16 | 32) => m!(A2: |a: u32, b: u32| -> u32 { a ^ b }),
        ("and", 64) => m!(B2: |a: u64, b: u64| -> u64 { a & b }),
        ("or", 64) => m!(B2: |a: u64, b: u64| -> u64 { a | b }),
        ("xor", 64) => m!(B2: |a: u64, b: u64| -> u64 { a ^ b }),
        ("not", 16) => m!(A1: |a: u32| -> u32 { !a & 0xffff }),
        ("not", 32) => m!(A1: |a: u32| -> u32 { !a }),
        ("not", 64) => m!(B1: |a: u64| -> u64 { !a }),
        ("cnot", 32) => m!(A1: |a: u32| -> u32 { u32::from(a == 0) }),
        ("shl", 16) => m!(A2: |a: u32, b: u32| -> u32 { if b > 15 { 0 } else { a << b & 0xffff } }),
        ("shl", 32) => m!(A2: |a: u32, b: u32| -> u32 { if b > 31 { 0 } else { a << b } }),
        ("shl", 64) => m!(Shift: |a: u64, b: u32| -> u64 { if b > 63 { 0 } else { a << b } }),
        ("shr", 16) if signed => {
            m!(A2: |a: u32, b: u32| -> u32 { shift_right(i64::from(s16(a)), 16, b) as u32 & 0xffff })
        }
        ("shr", 16) => m!(A2: |a: u32, b: u32| -> u32 { if b > 15 { 0 } else { a >> b } }),
        ("shr", 32) if signed => m!(A2: |a: u32, b: u32| -> u32 { (a as i32 >> b.min(31)) as u32 }),
        ("shr", 32) => m!(A2: |a: u32, b: u32| -> u32 { if b > 31 { 0 } else { a >> b } }),
        ("shr", 64) if signed => {
            m!(Shift: |a: u64, b: u32| -> u64 { shift_right(a as i64, 64, b) as u64 })
        }
        ("shr", 64) => m!(Shift: |a: u64, b: u32| -> u64 { if b > 63 { 0 } else { a >> b } }),
        ("bfe", 32) if signed => {
            m!(A3: |a: u32, b: u32, c: u32| -> u32 { extract(u64::from(a), b, c, 32, true) as u32 })
        }
        ("bfe", 32) => {
            m!(A3: |a: u32, b: u32, c: u32| -> u32 { extract(u64::from(a), b, c, 32, false) as u32 })
        }
        ("bfe", 64) if signed => {
            m!(Field: |a: u64, b: u32, c: u32| -> u64 { extract(a, b, c, 64, true) })
        }
        ("bfe", 64) => m!(Field: |a: u64, b: u32, c: u32| -> u64 { extract(a, b, c, 64, false) }),
        ("bfi", 32) => {
            m!(A4: |a: u32, b: u32, c: u32, d: u32| -> u32 { insert(u64::from(a), u64::from(b), c, d, 32) as u32 })
        }
        ("bfi", 64) => {
            m!(Insert: |a: u64, b: u64, c: u32, d: u32| -> u64 { insert(a, b, c, d, 64) })
        }
        ("popc", 32) => m!(A1: |a: u32| -> u32 { a.count_ones() }),
        ("popc", 64) => m!(Narrow: |a: u64| -> u32 { a.count_ones() }),
        ("clz", 32) => m!(A1: |a: u32| -> u32 { a.leading_zeros() }),
        ("clz", 64) => m!(Narrow: |a: u64| -> u32 { a.leading_zeros() }),
        ("brev", 32) => m!(A1: |a: u32| -> u32 { a.reverse_bits() }),
        ("brev", 64) => m!(B1: |a: u64| -> u64 { a.reverse_bits() }),
        ("bfind", 32) => find(signed, has(parts, "shiftamt")),
        ("bfind", 64) => find64(signed, has(parts, "shiftamt")),
        ("prmt", 32) => match parts.last().copied().unwrap_or_default() {
            "f4e" => m!(A3: |a: u32, b: u32, c: u32| -> u32 { permute(a, b, c, 1) }),
            "b4e" => m!(A3: |a: u32, b: u32, c: u32| -> u32 { permute(a, b, c, 2) }),
            "rc8" => m!(A3: |a: u32, b: u32, c: u32| -> u32 { permute(a, b, c, 3) }),
            "ecl" => m!(A3: |a: u32, b: u32, c: u32| -> u32 { permute(a, b, c, 4) }),
            "ecr" => m!(A3: |a: u32, b: u32, c: u32| -> u32 { permute(a, b, c, 5) }),
            "rc16" => m!(A3: |a: u32, b: u32, c: u32| -> u32 { permute(a, b, c, 6) }),
            _ => m!(A3: |a: u32, b: u32, c: u32| -> u32 { permute(a, b, c, 0) }),
        },
        ("shf", 32) => match (has(parts, "l"), has(parts, "wrap")) {
            (true, true) => {
                m!(A3: |a: u32, b: u32, c: u32| -> u32 { ((u64::from(b) << 32 | u64::from(a)) << (c & 31) >> 32) as u32 })
            }
            (true, false) => {
                m!(A3: |a: u32, b: u32, c: u32| -> u32 { ((u64::from(b) << 32 | u64::from(a)) << c.min(32) >> 32) as u32 })
            }
            (false, true) => {
                m!(A3: |a: u32, b: u32, c: u32| -> u32 { ((u64::from(b) << 32 | u64::from(a)) >> (c & 31)) as u32 })
            }
            (false, false) => {
                m!(A3: |a: u32, b: u32, c: u32| -> u32 { ((u64::from(b) << 32 | u64::from(a)) >> c.min(32)) as u32 })
            }
        },
        _ => return None,
    })
}

/// The comparison of a name on integers of a type.
pub(crate) fn test(name: &str, kind: Type) -> Option<Func> {
    match (kind.bits, kind.is_signed()) {
        (16, true) => compare!(name, Test32, u32, s16),
        (16 | 32, false) => compare!(name, Test32, u32, |x: u32| x),
        (32, true) => compare!(name, Test32, u32, |x: u32| x as i32),
        (64, true) => compare!(name, Test64, u64, |x: u64| x as i64),
        (64, false) => compare!(name, Test64, u64, |x: u64| x),
        _ => None,
    }
}
