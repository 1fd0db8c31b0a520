//! `cvt` and moves between packed registers, against values worked out by hand or by Rust's casts.

use half::{bf16, f16};

use crate::support::{bits, one};

#[test]
fn between_integers() {
    assert_eq!(
        one("cvt.s64.s32 %D, %a;", 0x8000_0000, 0, 0),
        0xffff_ffff_8000_0000
    );
    assert_eq!(one("cvt.u64.u32 %D, %a;", 0x8000_0000, 0, 0), 0x8000_0000);
    assert_eq!(one("cvt.s32.s16 %d, %ha;", 0x8001, 0, 0), 0xffff_8001);
    assert_eq!(one("cvt.u32.u16 %d, %ha;", 0x8001, 0, 0), 0x8001);
    assert_eq!(one("cvt.s32.s8 %d, %a;", 0x1234_5680, 0, 0), 0xffff_ff80);
    assert_eq!(one("cvt.u32.u8 %d, %a;", 0x1234_5680, 0, 0), 0x80);
    assert_eq!(one("cvt.u16.u8 %hd, %ha;", 0x12f0, 0, 0), 0xf0);
    assert_eq!(one("cvt.sat.s8.s32 %d, %a;", 1000, 0, 0), 127);
    assert_eq!(one("cvt.sat.u8.s32 %d, %a;", 0xffff_ff00, 0, 0), 0);
    assert_eq!(one("cvt.sat.u16.u32 %hd, %a;", 70000, 0, 0), 0xffff);
    assert_eq!(one("cvt.s64.s16 %D, %ha;", 0xffff, 0, 0), u64::MAX);
    assert_eq!(one("cvt.u32.u64 %d, %A;", 0x1_2345_6789, 0, 0), 0x2345_6789);
}

#[test]
fn floats_to_integers() {
    let to = |code: &str, x: f32| one(code, bits(x), 0, 0) as u32 as i32;
    for (x, nearest, zero, down, up) in [
        (2.5_f32, 2, 2, 2, 3),
        (-2.5, -2, -2, -3, -2),
        (3.5, 4, 3, 3, 4),
        (-0.4, 0, 0, -1, 0),
    ] {
        assert_eq!(to("cvt.rni.s32.f32 %d, %a;", x), nearest);
        assert_eq!(to("cvt.rzi.s32.f32 %d, %a;", x), zero);
        assert_eq!(to("cvt.rmi.s32.f32 %d, %a;", x), down);
        assert_eq!(to("cvt.rpi.s32.f32 %d, %a;", x), up);
        let float = |code: &str| f32::from_bits(one(code, bits(x), 0, 0) as u32);
        assert_eq!(float("cvt.rni.f32.f32 %d, %a;"), nearest as f32);
        assert_eq!(float("cvt.rmi.f32.f32 %d, %a;"), down as f32);
    }
    assert_eq!(to("cvt.rzi.s32.f32 %d, %a;", 3.0e9), i32::MAX);
    assert_eq!(to("cvt.rzi.s32.f32 %d, %a;", f32::NEG_INFINITY), i32::MIN);
    assert_eq!(to("cvt.rzi.s32.f32 %d, %a;", f32::NAN), 0);
    assert_eq!(to("cvt.rzi.u32.f32 %d, %a;", -5.0), 0);
    assert_eq!(to("cvt.rzi.u32.f32 %d, %a;", 4.0e9) as u32, 4_000_000_000);
    assert_eq!(
        one("cvt.rzi.s64.f32 %D, %a;", bits(-3.0e12), 0, 0) as i64,
        -3.0e12_f32 as i64
    );
    assert_eq!(
        one("cvt.rni.s32.f64 %d, %A;", (-7.5_f64).to_bits(), 0, 0) as i32,
        -8
    );
    assert_eq!(
        one(
            "cvt.rzi.u16.f16 %hd, %ha;",
            u64::from(f16::from_f32(300.7).to_bits()),
            0,
            0
        ),
        300
    );
}

#[test]
fn integers_to_floats() {
    for x in [
        0_u32,
        1,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        16_777_217,
        16_777_219,
    ] {
        assert_eq!(
            one("cvt.rn.f32.s32 %d, %a;", x.into(), 0, 0),
            bits(x as i32 as f32)
        );
        assert_eq!(
            one("cvt.rn.f32.u32 %d, %a;", x.into(), 0, 0),
            bits(x as f32)
        );
        assert_eq!(
            one("cvt.rn.f64.s32 %D, %a;", x.into(), 0, 0),
            f64::from(x as i32).to_bits()
        );
        assert_eq!(
            one("cvt.rn.f32.u64 %d, %A;", u64::from(x) << 20, 0, 0),
            bits((u64::from(x) << 20) as f32)
        );
    }
    assert_eq!(
        one("cvt.rz.f32.u32 %d, %a;", 16_777_219, 0, 0),
        bits(16_777_218.0)
    );
    assert_eq!(
        one(
            "cvt.rp.f32.s32 %d, %a;",
            u64::from(-16_777_219_i32 as u32),
            0,
            0
        ),
        bits(-16_777_218.0)
    );
    assert_eq!(
        one("cvt.rn.f16.s32 %hd, %a;", 2049, 0, 0),
        u64::from(f16::from_f32(2048.0).to_bits())
    );
}

#[test]
fn floats_to_floats() {
    assert_eq!(
        one("cvt.f64.f32 %D, %a;", bits(0.1), 0, 0),
        f64::from(0.1_f32).to_bits()
    );
    assert_eq!(
        one("cvt.rn.f32.f64 %d, %A;", 0.1_f64.to_bits(), 0, 0),
        bits(0.1_f64 as f32)
    );
    assert_eq!(
        one("cvt.rz.f32.f64 %d, %A;", 0.1_f64.to_bits(), 0, 0),
        bits(0.1_f64 as f32) - 1
    );
    assert_eq!(one("cvt.sat.f32.f32 %d, %a;", bits(1.5), 0, 0), bits(1.0));
    assert_eq!(one("cvt.ftz.f32.f32 %d, %a;", 5, 0, 0), 0);
    assert_eq!(
        one("cvt.f32.f16 %d, %ha;", 0x0001, 0, 0),
        bits(2.0_f32.powi(-24))
    );
    assert_eq!(one("cvt.f32.bf16 %d, %ha;", 0x3fc0, 0, 0), bits(1.5));
    // ties to even, and NaN
    assert_eq!(one("cvt.rn.bf16.f32 %hd, %a;", 0x3f80_8000, 0, 0), 0x3f80);
    assert_eq!(one("cvt.rn.bf16.f32 %hd, %a;", 0x3f81_8000, 0, 0), 0x3f82);
    assert_eq!(one("cvt.rn.bf16.f32 %hd, %a;", 0x3f80_8001, 0, 0), 0x3f81);
    assert_eq!(one("cvt.rz.bf16.f32 %hd, %a;", 0x3f80_ffff, 0, 0), 0x3f80);
    assert!(bf16::from_bits(one("cvt.rn.bf16.f32 %hd, %a;", 0x7f80_0001, 0, 0) as u16).is_nan());
    assert_eq!(one("cvt.rn.f16.f32 %hd, %a;", bits(65519.0), 0, 0), 0x7bff);
    assert_eq!(one("cvt.rn.f16.f32 %hd, %a;", bits(65520.0), 0, 0), 0x7c00);
    assert_eq!(one("cvt.rz.f16.f32 %hd, %a;", bits(65535.0), 0, 0), 0x7bff);
    // rounded to f32 first, this f64 would become a tie and go to even
    let above = f64::from(f16::from_bits(0x3c00)) + 2.0_f64.powi(-11) + 2.0_f64.powi(-40);
    assert_eq!(
        one("cvt.rn.f16.f64 %hd, %A;", above.to_bits(), 0, 0),
        0x3c01
    );
    // the first operand goes to the upper half
    assert_eq!(
        one("cvt.rn.bf16x2.f32 %d, %a, %b;", bits(1.0), bits(2.0), 0),
        0x3f80_4000
    );
    assert_eq!(
        one("cvt.rn.f16x2.f32 %d, %a, %b;", bits(1.0), bits(-2.0), 0),
        0x3c00_c000
    );
    assert_eq!(
        one(
            "cvt.rn.relu.bf16x2.f32 %d, %a, %b;",
            bits(-1.0),
            bits(2.0),
            0
        ),
        0x4000
    );
    assert_eq!(
        one("cvt.rna.tf32.f32 %d, %a;", 0x3f80_1000, 0, 0),
        0x3f80_2000
    );
}

#[test]
fn moves() {
    assert_eq!(
        one(
            "mov.b32 {%h1, %h2}, %a; mov.b32 %d, {%h2, %h1};",
            0x1234_5678,
            0,
            0
        ),
        0x5678_1234
    );
    assert_eq!(
        one(
            "mov.b64 {%r1, %r2}, %A; mov.b64 %D, {%r2, %r1};",
            0x1111_1111_2222_2222,
            0,
            0
        ),
        0x2222_2222_1111_1111
    );
    assert_eq!(
        one(
            "mov.b64 {%h1, %h2, %h3, %h4}, %A; mov.b64 %D, {%h4, %h3, %h2, %h1};",
            0x1111_2222_3333_4444,
            0,
            0
        ),
        0x4444_3333_2222_1111
    );
    assert_eq!(
        one(
            "mov.b32 {_, %h2}, %a; cvt.u32.u16 %d, %h2;",
            0x1234_5678,
            0,
            0
        ),
        0x1234
    );
    assert_eq!(
        one("mov.f32 %f1, 0f3F800000; mov.b32 %d, %f1;", 0, 0, 0),
        0x3f80_0000
    );
    assert_eq!(one("mov.u16 %hd, -1;", 0, 0, 0), 0xffff);
}
