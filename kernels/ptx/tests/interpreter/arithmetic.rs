//! Integer and bit operations and comparisons against Rust's own.

use crate::support::{bits, one, rows};

/// Words that are special to some operation, and others.
fn words() -> Vec<u64> {
    let mut out: Vec<u64> = vec![
        0,
        1,
        2,
        3,
        5,
        7,
        31,
        32,
        33,
        63,
        64,
        255,
        0x7fff,
        0x8000,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        1 << 33,
        u64::MAX,
        1 << 63,
    ];
    let mut seed = 12345_u64;
    for _ in 0..11 {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        out.push(seed ^ seed >> 29);
    }
    out
}

/// Checks a snippet on all pairs of words, in launches of up to 1024 threads.
fn pairs(code: &str, expected: impl Fn(u64, u64) -> u64) {
    let words = words();
    let all: Vec<[u64; 3]> = words
        .iter()
        .flat_map(|a| words.iter().map(move |b| [*a, *b, a ^ b]))
        .collect();
    for chunk in all.chunks(1000) {
        for (got, [a, b, _]) in rows(code, chunk).into_iter().zip(chunk) {
            assert_eq!(
                got,
                expected(*a, *b),
                "{code}: {a:#x}, {b:#x}: got {got:#x}"
            );
        }
    }
}

fn s(x: u64) -> i32 {
    x as u32 as i32
}

fn u(x: i32) -> u64 {
    u64::from(x as u32)
}

#[test]
fn integers() {
    pairs("add.s32 %d, %a, %b;", |a, b| u(s(a).wrapping_add(s(b))));
    pairs("sub.u32 %d, %a, %b;", |a, b| u(s(a).wrapping_sub(s(b))));
    pairs("mul.lo.s32 %d, %a, %b;", |a, b| u(s(a).wrapping_mul(s(b))));
    pairs("mul.hi.s32 %d, %a, %b;", |a, b| {
        u(((i64::from(s(a)) * i64::from(s(b))) >> 32) as i32)
    });
    pairs("mul.hi.u32 %d, %a, %b;", |a, b| {
        ((a & 0xffff_ffff) * (b & 0xffff_ffff)) >> 32
    });
    pairs("mul.wide.s32 %D, %a, %b;", |a, b| {
        (i64::from(s(a)) * i64::from(s(b))) as u64
    });
    pairs("mul.wide.u32 %D, %a, %b;", |a, b| {
        (a & 0xffff_ffff) * (b & 0xffff_ffff)
    });
    pairs("mad.lo.s32 %d, %a, %b, %c;", |a, b| {
        u(s(a).wrapping_mul(s(b)).wrapping_add(s(a ^ b)))
    });
    pairs("mad.wide.s32 %D, %a, %b, %C;", |a, b| {
        ((i64::from(s(a)) * i64::from(s(b))) as u64).wrapping_add(a ^ b)
    });
    pairs("mul.lo.s64 %D, %A, %B;", u64::wrapping_mul);
    pairs("mul.hi.u64 %D, %A, %B;", |a, b| {
        ((u128::from(a) * u128::from(b)) >> 64) as u64
    });
    pairs("mul.hi.s64 %D, %A, %B;", |a, b| {
        ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64
    });
    pairs("or.b32 %r1, %b, 1; div.s32 %d, %a, %r1;", |a, b| {
        u(s(a).wrapping_div(s(b) | 1))
    });
    pairs("or.b32 %r1, %b, 1; rem.u32 %d, %a, %r1;", |a, b| {
        (a & 0xffff_ffff) % (b & 0xffff_ffff | 1)
    });
    pairs("or.b64 %R1, %B, 1; div.u64 %D, %A, %R1;", |a, b| {
        a / (b | 1)
    });
    pairs("or.b64 %R1, %B, 1; rem.s64 %D, %A, %R1;", |a, b| {
        (a as i64).wrapping_rem(b as i64 | 1) as u64
    });
    pairs("min.s32 %d, %a, %b;", |a, b| u(s(a).min(s(b))));
    pairs("max.u32 %d, %a, %b;", |a, b| {
        (a & 0xffff_ffff).max(b & 0xffff_ffff)
    });
    pairs("min.s64 %D, %A, %B;", |a, b| {
        (a as i64).min(b as i64) as u64
    });
    pairs("abs.s32 %d, %a;", |a, _| u(s(a).wrapping_abs()));
    pairs("neg.s64 %D, %A;", |a, _| a.wrapping_neg());
    pairs("add.s16 %hd, %ha, %hb;", |a, b| a.wrapping_add(b) & 0xffff);
    pairs("max.s16 %hd, %ha, %hb;", |a, b| {
        u64::from((a as i16).max(b as i16) as u16)
    });
    pairs("mul.wide.s16 %d, %ha, %hb;", |a, b| {
        u(i32::from(a as i16) * i32::from(b as i16))
    });
    pairs("add.sat.s32 %d, %a, %b;", |a, b| {
        u(s(a).saturating_add(s(b)))
    });
    pairs("sad.s32 %d, %a, %b, 3;", |a, b| {
        u64::from(s(a).abs_diff(s(b)).wrapping_add(3))
    });
}

#[test]
fn carries() {
    let add = "add.cc.u32 %r1, %a, %b; cvt.u32.u64 %r5, %D; shr.u64 %R1, %A, 32; shr.u64 %R2, %B, 32;
        cvt.u32.u64 %r2, %R1; cvt.u32.u64 %r3, %R2; addc.u32 %r4, %r2, %r3; mov.b64 %D, {%r1, %r4};";
    pairs(add, u64::wrapping_add);
    pairs(
        &add.replace("add.cc", "sub.cc").replace("addc", "subc"),
        u64::wrapping_sub,
    );
    // the low 64 bits of a square of 64 bits, from words
    let square = "mul.lo.u32 %r1, %a, %b; mad.lo.cc.u32 %r2, %a, %b, %c; madc.hi.u32 %r3, %a, %b, 0; mov.b64 %D, {%r2, %r3};";
    pairs(square, |a, b| {
        (a & 0xffff_ffff) * (b & 0xffff_ffff) + ((a ^ b) & 0xffff_ffff)
    });
}

#[test]
fn bit_operations() {
    pairs(
        "and.b32 %r1, %a, %b; xor.b32 %r2, %r1, %c; not.b32 %d, %r2;",
        |a, b| !((a & b) ^ (a ^ b)) & 0xffff_ffff,
    );
    pairs("shl.b32 %d, %a, %b;", |a, b| {
        if b as u32 > 31 {
            0
        } else {
            a << (b as u32) & 0xffff_ffff
        }
    });
    pairs("shr.u32 %d, %a, %b;", |a, b| {
        if b as u32 > 31 {
            0
        } else {
            (a & 0xffff_ffff) >> (b as u32)
        }
    });
    pairs("shr.s32 %d, %a, %b;", |a, b| u(s(a) >> (b as u32).min(31)));
    pairs("shl.b64 %D, %A, %b;", |a, b| {
        if b as u32 > 63 { 0 } else { a << (b as u32) }
    });
    pairs("shr.s64 %D, %A, %b;", |a, b| {
        (a as i64 >> (b as u32).min(63)) as u64
    });
    pairs("popc.b64 %d, %A;", |a, _| u64::from(a.count_ones()));
    pairs("clz.b32 %d, %a;", |a, _| {
        u64::from((a as u32).leading_zeros())
    });
    pairs("brev.b32 %d, %a;", |a, _| {
        u64::from((a as u32).reverse_bits())
    });
    pairs("bfind.u32 %d, %a;", |a, _| {
        u64::from(31_u32.wrapping_sub((a as u32).leading_zeros()))
    });
    pairs("bfind.shiftamt.u32 %d, %a;", |a, _| {
        match (a as u32).leading_zeros() {
            32 => 0xffff_ffff,
            zeros => zeros.into(),
        }
    });
    pairs("bfind.s64 %d, %A;", |a, _| {
        match (a ^ (a as i64 >> 63) as u64).leading_zeros() {
            64 => 0xffff_ffff,
            zeros => u64::from(63 - zeros),
        }
    });
    // every table of three inputs, on inputs that hold all eight combinations
    for table in 0..256_u64 {
        let got = one(
            &format!("lop3.b32 %d, %a, %b, %c, {table};"),
            0xf0,
            0xcc,
            0xaa,
        );
        assert_eq!(got & 0xff, table);
    }
    assert_eq!(one("bfe.u32 %d, %a, 8, 12;", 0xabcd_ef12, 0, 0), 0xdef);
    assert_eq!(
        one("bfe.s32 %d, %a, 8, 12;", 0xabcd_ef12, 0, 0),
        0xffff_fdef
    );
    assert_eq!(
        one("bfe.s32 %d, %a, 24, 16;", 0xabcd_ef12, 0, 0),
        0xffff_ffab
    );
    assert_eq!(one("bfe.u64 %D, %A, 60, 32;", 0xabcd << 48, 0, 0), 0xa);
    assert_eq!(
        one("bfi.b32 %d, %a, %b, 4, 8;", 0x123, 0xffff_ffff, 0),
        0xffff_f23f
    );
    assert_eq!(one("bfi.b64 %D, %A, %B, 40, 8;", 0x5a, 0, 0), 0x5a << 40);
    assert_eq!(
        one("prmt.b32 %d, %a, %b, 0x3650;", 0x3322_1100, 0x7766_5544, 0),
        0x3366_5500
    );
    assert_eq!(
        one("prmt.b32 %d, %a, %b, 0x8c40;", 0x3322_1180, 0x7766_55c4, 0),
        0xffff_c480
    );
    assert_eq!(
        one("shf.l.wrap.b32 %d, %a, %b, 8;", 0x1122_3344, 0x5566_7788, 0),
        0x6677_8811
    );
    assert_eq!(
        one(
            "shf.r.clamp.b32 %d, %a, %b, 40;",
            0x1122_3344,
            0x5566_7788,
            0
        ),
        0x5566_7788
    );
}

#[test]
fn comparisons() {
    for (name, expected) in [
        ("eq", false),
        ("ne", true),
        ("lt", true),
        ("le", true),
        ("gt", false),
        ("ge", false),
    ] {
        let code = |kind: &str| format!("setp.{name}.{kind} %p1, %a, %b; selp.u32 %d, 1, 0, %p1;");
        assert_eq!(
            one(&code("s32"), 0xffff_ffff, 5, 0),
            u64::from(expected),
            "{name}"
        );
        assert_eq!(
            one(&code("u32"), 5, 0xffff_ffff, 0),
            u64::from(expected),
            "{name}"
        );
        assert_eq!(
            one(&code("f32"), bits(-1.0), bits(2.0), 0),
            u64::from(expected),
            "{name}"
        );
        // an ordered comparison with NaN is false, an unordered one true
        assert_eq!(one(&code("f32"), bits(f32::NAN), bits(2.0), 0), 0, "{name}");
        let unordered = format!("setp.{name}u.f32 %p1, %a, %b; selp.u32 %d, 1, 0, %p1;");
        assert_eq!(one(&unordered, bits(f32::NAN), bits(2.0), 0), 1, "{name}");
        assert_eq!(
            one(&unordered, bits(-1.0), bits(2.0), 0),
            u64::from(expected),
            "{name}"
        );
    }
    assert_eq!(
        one(
            "setp.nan.f32 %p1, %a, %b; selp.u32 %d, 1, 0, %p1;",
            bits(1.0),
            bits(f32::NAN),
            0
        ),
        1
    );
    assert_eq!(
        one(
            "setp.num.f32 %p1, %a, %b; selp.u32 %d, 1, 0, %p1;",
            bits(1.0),
            bits(f32::NAN),
            0
        ),
        0
    );
    let both = "setp.ne.u32 %p3, %c, 0; setp.lt.and.s32 %p1|%p2, %a, %b, %p3; selp.u32 %r1, 1, 0, %p1; selp.u32 %r2, 2, 0, %p2; or.b32 %d, %r1, %r2;";
    assert_eq!(
        [
            one(both, 1, 2, 1),
            one(both, 2, 1, 1),
            one(both, 1, 2, 0),
            one(both, 2, 1, 0)
        ],
        [1, 2, 0, 0]
    );
    let negated =
        "setp.ne.u32 %p3, %c, 0; setp.lt.or.s32 %p1, %a, %b, !%p3; selp.u32 %d, 1, 0, %p1;";
    assert_eq!(
        [
            one(negated, 2, 1, 1),
            one(negated, 2, 1, 0),
            one(negated, 1, 2, 1)
        ],
        [0, 1, 1]
    );
    assert_eq!(
        one("set.gt.u32.f32 %d, %a, %b;", bits(2.0), bits(1.0), 0),
        0xffff_ffff
    );
    assert_eq!(one("set.eq.f16.f16 %hd, %ha, %hb;", 0x8000, 0, 0), 0x3c00);
    assert_eq!(
        one(
            "set.gt.f16x2.f16x2 %d, %a, %b;",
            0x3c00_4000,
            0x3c00_3c00,
            0
        ),
        0x3c00
    );
    assert_eq!(one("slct.u32.s32 %d, 7, 9, %a;", 0x8000_0000, 0, 0), 9);
}
