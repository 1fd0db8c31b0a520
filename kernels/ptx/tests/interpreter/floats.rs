//! Float operations against Rust's own.

use half::{bf16, f16};

use crate::support::{bits, one, rows};

/// Floats that are special to some operation.
const FLOATS: [f32; 14] = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    3.0e-39,
    -1.0e-45,
    f32::MIN_POSITIVE,
    16_777_217.0,
    0.1,
    1.0e30,
    f32::MAX,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
];

fn floats(code: &str, expected: impl Fn(f32, f32) -> f32) {
    let all: Vec<[u64; 3]> = FLOATS
        .iter()
        .flat_map(|a| FLOATS.iter().map(move |b| [bits(*a), bits(*b), bits(0.75)]))
        .collect();
    for (got, [a, b, _]) in rows(code, &all).into_iter().zip(&all) {
        let (a, b, got) = (
            f32::from_bits(*a as u32),
            f32::from_bits(*b as u32),
            f32::from_bits(got as u32),
        );
        let want = expected(a, b);
        assert!(
            got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
            "{code}: {a:e}, {b:e}: got {got:e}, expected {want:e}"
        );
    }
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        0.0_f32.copysign(x)
    } else {
        x
    }
}

#[test]
fn singles() {
    floats("add.f32 %d, %a, %b;", |a, b| a + b);
    floats("sub.rn.f32 %d, %a, %b;", |a, b| a - b);
    floats("mul.f32 %d, %a, %b;", |a, b| a * b);
    floats("mul.ftz.f32 %d, %a, %b;", |a, b| flush(flush(a) * flush(b)));
    floats("add.ftz.f32 %d, %a, %b;", |a, b| flush(flush(a) + flush(b)));
    floats("fma.rn.f32 %d, %a, %b, %c;", |a, b| a.mul_add(b, 0.75));
    floats("div.rn.f32 %d, %a, %b;", |a, b| a / b);
    floats("add.sat.f32 %d, %a, %b;", |a, b| {
        if a + b > 0.0 { (a + b).min(1.0) } else { 0.0 }
    });
    floats("sqrt.rn.f32 %d, %a;", |a, _| a.sqrt());
    floats("rcp.rn.f32 %d, %a;", |a, _| 1.0 / a);
    floats("abs.f32 %d, %a;", |a, _| a.abs());
    floats("neg.f32 %d, %a;", |a, _| -a);
    floats("copysign.f32 %d, %a, %b;", |a, b| b.copysign(a));
    floats("min.f32 %d, %a, %b;", |a, b| {
        match (a.is_nan(), b.is_nan()) {
            (true, _) => b,
            (_, true) => a,
            _ if a == b => f32::from_bits(a.to_bits() | b.to_bits()),
            _ => {
                if a < b {
                    a
                } else {
                    b
                }
            }
        }
    });
    floats("max.NaN.f32 %d, %a, %b;", |a, b| {
        match (a.is_nan() || b.is_nan(), a == b) {
            (true, _) => f32::NAN,
            (_, true) => f32::from_bits(a.to_bits() & b.to_bits()),
            _ => {
                if a > b {
                    a
                } else {
                    b
                }
            }
        }
    });
}

#[test]
fn fused_products() {
    // random bits, and operands chosen so that sums lie at or near ties and among subnormal numbers
    let mut seed = 99_u64;
    let mut next = || {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 32) as u32
    };
    for kind in 0..11 {
        let operands: Vec<[u64; 3]> = (0..1024)
            .map(|_| {
                let (a, b, c) = (next(), next(), next());
                let few = |x: u32, exponent: u32| {
                    (x & 0x8000_0fff) << 11 & 0x807f_f800 | (exponent + x % 3) << 23
                };
                match kind {
                    0 => [a, b, c],
                    1 => [
                        a & 0x807f_ffff | 0x3f80_0000,
                        b & 0x807f_ffff | 0x3f80_0000,
                        c & 0x807f_ffff | 0x3f80_0000,
                    ],
                    2 => [few(a, 127), few(b, 103), few(c, 127)],
                    3 => [few(a, 60), few(b, 50), c & 0x807f_ffff],
                    4 => [few(a, 64), few(b, 50), c & 0x80ff_ffff],
                    5 => [few(a, 190), few(b, 190), few(c, 252)],
                    6 => [
                        a & 0x807f_ffff | 0x3f80_0000,
                        0x3f80_0000,
                        (a ^ 0x8000_0000) & 0x807f_ffff | 0x3f80_0000,
                    ],
                    // 2⁻²⁴ less or more than what f64 holds next to c: a tie only if rounded twice
                    7 => [0x3380_0001, 0x3f7f_fffe, c & 0x807f_ffff | 0x3f80_0000],
                    8 => [0x3380_0800, 0x3f7f_f001, c & 0x807f_ffff | 0x3f80_0000],
                    // the same at half of the smallest subnormal number
                    9 => [0x1a00_0001, 0x19ff_fffe, c & 0x807f_ffff],
                    _ => [0x1a00_0800, 0x19ff_f001, c & 0x807f_ffff],
                }
                .map(u64::from)
            })
            .collect();
        for flushed in [false, true] {
            let keep = |x: f32| if flushed { flush(x) } else { x };
            let code = if flushed {
                "fma.rn.ftz.f32 %d, %a, %b, %c;"
            } else {
                "fma.rn.f32 %d, %a, %b, %c;"
            };
            for (got, abc) in rows(code, &operands).into_iter().zip(&operands) {
                let [a, b, c] = abc.map(|x| keep(f32::from_bits(x as u32)));
                let (got, want) = (f32::from_bits(got as u32), keep(a.mul_add(b, c)));
                let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                assert!(
                    same,
                    "{kind}: {a:e} * {b:e} + {c:e}: got {got:e}, expected {want:e}"
                );
            }
        }
    }
}

#[test]
fn directed_rounding() {
    // 1 + 2⁻³⁰ lies just above 1
    let tiny = bits(2.0_f32.powi(-30));
    let one_bits = bits(1.0);
    assert_eq!(one("add.rn.f32 %d, %a, %b;", one_bits, tiny, 0), one_bits);
    assert_eq!(one("add.rz.f32 %d, %a, %b;", one_bits, tiny, 0), one_bits);
    assert_eq!(
        one("add.rp.f32 %d, %a, %b;", one_bits, tiny, 0),
        one_bits + 1
    );
    assert_eq!(
        one("sub.rm.f32 %d, %a, %b;", one_bits, tiny, 0),
        one_bits - 1
    );
    assert_eq!(
        one("sub.rz.f32 %d, %a, %b;", one_bits, tiny, 0),
        one_bits - 1
    );
    assert_eq!(one("sub.rn.f32 %d, %a, %b;", one_bits, tiny, 0), one_bits);
    // (1 + 2⁻²³)² = 1 + 2⁻²² + 2⁻⁴⁶
    let x = one_bits + 1;
    assert_eq!(one("mul.rp.f32 %d, %a, %b;", x, x, 0), one_bits + 3);
    assert_eq!(one("mul.rm.f32 %d, %a, %b;", x, x, 0), one_bits + 2);
    assert_eq!(
        one("fma.rp.f32 %d, %a, %b, %c;", x, x, bits(-1.0)),
        bits(2.0_f32.powi(-22)) + 1
    );
    assert_eq!(
        one("fma.rz.f32 %d, %a, %b, %c;", x, x, bits(-1.0)),
        bits(2.0_f32.powi(-22))
    );
    assert_eq!(
        one("fma.rm.f32 %d, %a, %b, %c;", x, x, bits(-4.0)),
        bits(-3.0 + 2.0_f32.powi(-21)) + 1
    );
    assert_eq!(
        one("div.rp.f32 %d, %a, %b;", one_bits, bits(3.0), 0),
        bits(1.0 / 3.0)
    );
    assert_eq!(
        one("div.rm.f32 %d, %a, %b;", one_bits, bits(3.0), 0),
        bits(1.0 / 3.0) - 1
    );
    // beyond the largest number
    let most = bits(f32::MAX);
    assert_eq!(one("mul.rz.f32 %d, %a, %b;", most, bits(2.0), 0), most);
    assert_eq!(
        one("mul.rn.f32 %d, %a, %b;", most, bits(2.0), 0),
        bits(f32::INFINITY)
    );
    // a tie that only a fused product sees: 2⁻²⁴ + 2⁻⁶⁰ above 1
    let half = bits(2.0_f32.powi(-24) * (1.0 + 2.0_f32.powi(-23)));
    assert_eq!(
        one("fma.rn.f32 %d, %a, %b, %c;", half, bits(1.0), one_bits),
        one_bits + 1
    );
}

#[test]
fn approximations() {
    let close = |code: &str, a: f32, expected: f64| {
        let got = f64::from(f32::from_bits(one(code, bits(a), 0, 0) as u32));
        assert!(
            (got - expected).abs() <= expected.abs() * 1.0e-7,
            "{code} {a}: {got}, expected {expected}"
        );
    };
    close("ex2.approx.ftz.f32 %d, %a;", 3.7, 3.7_f32.exp2().into());
    close("lg2.approx.f32 %d, %a;", 10.0, 10.0_f64.log2());
    close("sin.approx.f32 %d, %a;", 2.0, 2.0_f64.sin());
    close("cos.approx.ftz.f32 %d, %a;", 2.0, 2.0_f64.cos());
    close("tanh.approx.f32 %d, %a;", 0.5, 0.5_f64.tanh());
    close("rsqrt.approx.f32 %d, %a;", 7.0, 7.0_f64.sqrt().recip());
    close("rcp.approx.ftz.f32 %d, %a;", 7.0, 7.0_f64.recip());
    close("div.full.f32 %d, %a, 0f40400000;", 7.0, 7.0 / 3.0);
    assert_eq!(
        one("ex2.approx.f32 %d, %a;", bits(f32::NEG_INFINITY), 0, 0),
        0
    );
    assert_eq!(
        one("rcp.approx.ftz.f32 %d, %a;", bits(0.0), 0, 0),
        bits(f32::INFINITY)
    );
    assert_eq!(
        one(
            "div.approx.f32 %d, %a, %b;",
            bits(1.0),
            bits(2.0_f32.powi(127)),
            0
        ),
        0
    );
    assert_eq!(
        one("lg2.approx.f32 %d, %a;", bits(0.0), 0, 0),
        bits(f32::NEG_INFINITY)
    );
}

#[test]
fn doubles() {
    let (a, b, c) = (1.1_f64, -3.7_f64, 0.3_f64);
    let run = |code: &str| f64::from_bits(one(code, a.to_bits(), b.to_bits(), c.to_bits()));
    assert_eq!(run("add.f64 %D, %A, %B;"), a + b);
    assert_eq!(run("mul.rn.f64 %D, %A, %B;"), a * b);
    assert_eq!(run("fma.rn.f64 %D, %A, %B, %C;"), a.mul_add(b, c));
    assert_eq!(run("div.rn.f64 %D, %A, %B;"), a / b);
    assert_eq!(run("sqrt.rn.f64 %D, %A;"), a.sqrt());
    assert_eq!(run("min.f64 %D, %A, %B;"), b);
    assert_eq!(
        run("mov.f64 %F1, 0d3FF8000000000000; add.f64 %D, %A, %F1;"),
        a + 1.5
    );
}

#[test]
fn halves() {
    let (a, b) = (1.000_976_6_f32, -3.5_f32);
    let h = |x: f32| u64::from(f16::from_f32(x).to_bits());
    let g = |x: f32| u64::from(bf16::from_f32(x).to_bits());
    assert_eq!(
        one("add.f16 %hd, %ha, %hb;", h(1025.0), h(0.5), 0),
        h(1026.0)
    );
    assert_eq!(one("mul.f16 %hd, %ha, %hb;", h(a), h(b), 0), h(a * b));
    // 1.0009765625² · 1 + 2⁻²⁰… rounds by what lies below the tie
    assert_eq!(
        one("fma.rn.f16 %hd, %ha, %hb, %hc;", 0x3c01, 0x3c01, 0),
        0x3c02
    );
    // 1 + 2⁻¹¹ is a tie between 1 and the next number: a product just above it goes up
    assert_eq!(
        one("fma.rn.f16 %hd, %ha, %hb, %hc;", 0x1001, 0x3c00, 0x3c00),
        0x3c01
    );
    assert_eq!(
        one("fma.rn.f16 %hd, %ha, %hb, %hc;", 0x1000, 0x3c00, 0x3c00),
        0x3c00
    );
    assert_eq!(
        one("fma.rn.bf16 %hd, %ha, %hb, %hc;", 0x3b81, 0x3f80, 0x3f80),
        0x3f81
    );
    assert_eq!(
        one("fma.rn.bf16 %hd, %ha, %hb, %hc;", 0x3b80, 0x3f80, 0x3f80),
        0x3f80
    );
    assert_eq!(one("max.bf16 %hd, %ha, %hb;", g(a), g(b), 0), g(a));
    assert_eq!(
        one(
            "min.bf16x2 %d, %a, %b;",
            g(1.0) << 16 | g(2.0),
            g(3.0) << 16 | g(-4.0),
            0
        ),
        g(1.0) << 16 | g(-4.0)
    );
    assert_eq!(
        one(
            "add.f16x2 %d, %a, %b;",
            h(1.0) << 16 | h(2.0),
            h(3.0) << 16 | h(-4.0),
            0
        ),
        h(4.0) << 16 | h(-2.0)
    );
    assert_eq!(
        one(
            "mul.f16x2 %d, %a, %b;",
            h(60000.0) << 16 | h(2.0),
            h(3.0) << 16 | h(-4.0),
            0
        ),
        h(f32::INFINITY) << 16 | h(-8.0)
    );
    assert_eq!(
        one(
            "fma.rn.bf16x2 %d, %a, %b, %c;",
            g(2.0) << 16 | g(3.0),
            g(4.0) << 16 | g(5.0),
            g(1.0) << 16 | g(-1.0)
        ),
        g(9.0) << 16 | g(14.0)
    );
    assert_eq!(one("neg.bf16x2 %d, %a;", 0x3f80_bf80, 0, 0), 0xbf80_3f80);
    assert_eq!(one("max.f16 %hd, %ha, %hb;", 0x7e00, h(1.0), 0), h(1.0));
    assert_eq!(
        one("fma.rn.relu.f16 %hd, %ha, %hb, %hc;", h(1.0), h(-1.0), 0),
        0
    );
}
