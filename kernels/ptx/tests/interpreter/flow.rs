//! Branches, calls, collectives, atomics and addresses.

use sd_ptx::{Launch, Memory, Module, Options, Order};

use crate::support::{kernel, params, run, upload_u32};

/// Stores `%r0` of every thread at its number.
const STORE: &str = "mov.u32 %r90, %ntid.x; mad.lo.u32 %r91, %block, %r90, %tid; mul.wide.u32 %R8, %r91, 4; add.s64 %R8, %at, %R8; st.global.u32 [%R8], %r0;";

#[track_caller]
fn each(variables: &str, code: &str, block: u32, expected: impl Fn(u32) -> u32) {
    let got = run(
        &kernel(variables, &format!("{code}\n{STORE}")),
        1,
        block,
        block as usize,
        &Options::default(),
    )
    .unwrap();
    for (i, got) in got.into_iter().enumerate() {
        assert_eq!(got, expected(i as u32), "thread {i}");
    }
}

#[test]
fn lanes_part_and_meet() {
    // a loop whose length differs from lane to lane, with a branch inside; then all meet for a shuffle
    let code = "mov.u32 %r0, 0; mov.u32 %r1, %tid;
        loop: setp.eq.u32 %p1, %r1, 0; @%p1 bra out;
        and.b32 %r2, %r1, 1; setp.eq.u32 %p2, %r2, 0; @!%p2 bra odd;
        add.u32 %r0, %r0, 10; bra.uni next;
        odd: add.u32 %r0, %r0, 1;
        next: sub.u32 %r1, %r1, 1; bra loop;
        out: shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1; add.u32 %r0, %r0, %r3;";
    let walk = |n: u32| n / 2 * 10 + n.div_ceil(2);
    each("", code, 64, |t| walk(t) + walk(t ^ 1));
    // threads that leave early do not disturb those that stay
    each(
        "",
        "mov.u32 %r0, 7; setp.gt.u32 %p1, %tid, 40; @%p1 bra skip; mov.u32 %r0, 3; skip:",
        50,
        |t| if t > 40 { 7 } else { 3 },
    );
    each(
        "",
        "mov.u32 %r0, 5; setp.gt.u32 %p1, %tid, 40; @%p1 ret; add.u32 %r0, %r0, %tid;",
        50,
        |t| if t > 40 { 0 } else { 5 + t },
    );
    let table = "and.b32 %r1, %tid, 3; targets: .branchtargets a, b, c, b; brx.idx %r1, targets;
        a: mov.u32 %r0, 1; bra end; b: mov.u32 %r0, 2; bra end; c: mov.u32 %r0, 3; end:";
    each("", table, 40, |t| [1, 2, 3, 2][t as usize & 3]);
}

#[test]
fn functions() {
    let function = ".func (.param .b32 out) twice(.param .b32 x, .param .b64 y)
        { .reg .b32 %r<9>; .reg .pred %p<3>; ld.param.u32 %r1, [x]; ld.param.u32 %r2, [y+4]; setp.gt.u32 %p1, %r1, 10; add.u32 %r3, %r1, %r2;
        @%p1 bra big; st.param.b32 [out], %r3; ret; big: shl.b32 %r3, %r3, 1; st.param.b32 [out], %r3; ret; }";
    let code = "mov.b64 %R1, {%tid, %r9}; mov.u32 %r9, 100;  mov.b64 %R1, {%tid, %r9};
        { .param .b32 a; .param .b64 b; .param .b32 r; st.param.b32 [a+0], %tid; st.param.b64 [b+0], %R1; call.uni (r), twice, (a, b); ld.param.b32 %r0, [r+0]; }
        { .param .b32 a; .param .b64 b; .param .b32 r; st.param.b32 [a+0], %r0; st.param.b64 [b+0], %R1; call.uni (r), twice, (a, b); ld.param.b32 %r0, [r+0]; }";
    let code = code.trim_start_matches("mov.b64 %R1, {%tid, %r9};");
    let twice = |x: u32| if x > 10 { (x + 100) * 2 } else { x + 100 };
    each(function, code, 32, |t| twice(twice(t)));
}

#[test]
fn shuffles() {
    each(
        "",
        "shfl.sync.up.b32 %r0|%p1, %tid, 3, 0, -1; @!%p1 add.u32 %r0, %r0, 1000;",
        32,
        |t| if t < 3 { t + 1000 } else { t - 3 },
    );
    each(
        "",
        "shfl.sync.down.b32 %r0|%p1, %tid, 3, 31, -1; @!%p1 add.u32 %r0, %r0, 1000;",
        32,
        |t| if t > 28 { t + 1000 } else { t + 3 },
    );
    each("", "shfl.sync.idx.b32 %r0, %tid, 5, 31, -1;", 32, |_| 5);
    // segments of 8: the mask is 32 − 8 = 0b11000, above the clamp
    each("", "shfl.sync.idx.b32 %r0, %tid, 5, 0x181f, -1;", 32, |t| {
        t / 8 * 8 + 5
    });
    each(
        "",
        "shfl.sync.down.b32 %r0, %tid, 3, 0x181f, -1;",
        32,
        |t| if t % 8 + 3 > 7 { t } else { t + 3 },
    );
    each("", "shfl.sync.up.b32 %r0, %tid, 3, 0x1800, -1;", 32, |t| {
        if t % 8 < 3 { t } else { t - 3 }
    });
    each("", "shfl.sync.bfly.b32 %r0, %tid, 9, 31, -1;", 32, |t| {
        t ^ 9
    });
    // only some lanes, by a mask that names them
    let some = "mov.u32 %r0, 99; setp.lt.u32 %p1, %tid, 16; @%p1 shfl.sync.bfly.b32 %r0, %tid, 4, 31, 0xffff;";
    each("", some, 32, |t| if t < 16 { t ^ 4 } else { 99 });
}

#[test]
fn votes() {
    let odd = "and.b32 %r1, %tid, 1; setp.eq.u32 %p1, %r1, 1;";
    each(
        "",
        &format!("{odd} vote.sync.ballot.b32 %r0, %p1, -1;"),
        32,
        |_| 0xaaaa_aaaa,
    );
    each(
        "",
        &format!(
            "{odd} vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, !%p1, -1; selp.u32 %r0, 1, 0, %p2; @%p3 add.u32 %r0, %r0, 2;"
        ),
        32,
        |_| 1,
    );
    each(
        "",
        "activemask.b32 %r0; setp.lt.u32 %p1, %tid, 5; @%p1 activemask.b32 %r0;",
        32,
        |t| if t < 5 { 0x1f } else { u32::MAX },
    );
    each(
        "",
        "shr.u32 %r1, %tid, 3; match.any.sync.b32 %r0, %r1, -1;",
        32,
        |t| 0xff << (t / 8 * 8),
    );
    each("", "redux.sync.add.s32 %r0, %tid, -1;", 32, |_| 496);
    each("", "redux.sync.max.u32 %r0, %tid, -1;", 64, |t| {
        t / 32 * 32 + 31
    });
    each("", "mov.u32 %r0, %lanemask_lt;", 32, |t| (1 << t) - 1);
    // over a block: how many, all, any
    let code = "setp.lt.u32 %p1, %tid, 70; barrier.red.popc.u32 %r0, 0, %p1; bar.red.and.pred %p2, 0, %p1; bar.red.or.pred %p3, 0, %p1;
        @%p2 add.u32 %r0, %r0, 1000; @%p3 add.u32 %r0, %r0, 2000;";
    each("", code, 96, |_| 2070);
}

#[test]
fn barriers_of_some_warps() {
    // warps 0 and 1 hand over at barrier 1, while warps 2 and 3 do at barrier 2
    let code = "shr.u32 %r1, %tid, 6; add.u32 %r1, %r1, 1; shl.b32 %r2, %tid, 2; mov.u32 %r3, words; add.u32 %r4, %r3, %r2;
        st.shared.u32 [%r4], %tid; bar.sync %r1, 64; xor.b32 %r5, %r2, 128; add.u32 %r6, %r3, %r5; ld.shared.u32 %r0, [%r6];";
    each(".shared .align 4 .b8 words[512];", code, 128, |t| t ^ 32);
    // a producer that arrives and a consumer that waits
    let code = "setp.ge.u32 %p1, %tid, 32; mov.u32 %r0, 0; @%p1 bra consume;
        st.shared.u32 [words], 77; bar.arrive 3, 64; bra end; consume: bar.sync 3, 64; ld.shared.u32 %r0, [words]; end:";
    each(".shared .align 4 .b8 words[4];", code, 64, |t| {
        if t < 32 { 0 } else { 77 }
    });
}

#[test]
fn state_spaces() {
    // a generic address of shared and of local memory, of a constant, and of the dynamic array behind a static one
    let code = "cvta.shared.u64 %R1, %R7; ";
    let variables = ".shared .align 4 .b8 words[12]; .extern .shared .align 16 .b8 more[]; .const .align 4 .u32 table[3] = {5, 6, 0x70};
        .global .align 2 .b8 bytes[4] = {1, 2, 3, 4};";
    let code = format!(
        "mov.u64 %R7, words; {code} st.u32 [%R1+8], 11; ld.shared.u32 %r1, [words+8];
        .local .align 4 .b8 mine[16]; mov.u64 %R2, mine; cvta.local.u64 %R3, %R2; st.u32 [%R3+4], 13; ld.local.u32 %r2, [mine+4];
        ld.const.u32 %r3, [table+8]; mov.u32 %r4, more; st.shared.u8 [more+3], 9; ld.shared.u8 %r5, [%r4+3];
        ld.global.u8 %r6, [bytes+2]; ld.global.s8 %r8, [bytes+3]; cvta.to.shared.u64 %R4, %R1; cvt.u32.u64 %r7, %R4; isspacep.shared %p1, %R1;
        add.u32 %r0, %r1, %r2; add.u32 %r0, %r0, %r3; add.u32 %r0, %r0, %r4; add.u32 %r0, %r0, %r5; add.u32 %r0, %r0, %r6;
        add.u32 %r0, %r0, %r7; add.u32 %r0, %r0, %r8; @%p1 add.u32 %r0, %r0, 1000;"
    );
    each(variables, &code, 1, |_| {
        11 + 13 + 0x70 + 16 + 9 + 3 + 4 + 1000
    });
}

#[test]
fn atomics_and_the_order_of_blocks() {
    let code = "atom.global.add.u32 %r1, [%at], 1; red.global.max.u32 [%at+4], %tid; atom.global.cas.b32 %r2, [%at+8], 0, 5;
        atom.global.exch.b32 %r3, [%at+12], 8; red.global.add.f32 [%at+16], 0f3F000000; red.global.add.u64 [%at+24], 3; atom.global.inc.u32 %r4, [%at+32], 9;
        st.shared.u32 [word], 0; bar.sync 0; atom.shared.add.u32 %r5, [word], 2; bar.sync 0; ld.shared.u32 %r6, [word]; setp.eq.u32 %p1, %tid, 0;
        @%p1 red.global.add.u32 [%at+36], %r6;";
    let text = kernel(".shared .align 4 .b8 word[4];", code);
    for order in [Order::Forward, Order::Reverse, Order::Shuffled(7)] {
        let options = Options {
            order,
            blocks: true,
            ..Options::default()
        };
        // one warp a block: the stores of its lanes to one word are not a race of warps
        let got = run(&text, 10, 32, 16, &options).unwrap();
        assert_eq!(
            got[..10],
            [320, 31, 5, 8, 160.0_f32.to_bits(), 0, 960, 0, 0, 640]
        );
    }
}

#[test]
fn orders_reach_every_block() {
    let text = kernel("", &format!("mov.u32 %r0, %block; {STORE}"));
    for blocks in [1, 2, 97, 360] {
        for order in [
            Order::Reverse,
            Order::Shuffled(0),
            Order::Shuffled(123_456_789),
        ] {
            let got = run(
                &text,
                blocks,
                1,
                blocks as usize,
                &Options {
                    order,
                    ..Options::default()
                },
            )
            .unwrap();
            assert!(
                got.iter().enumerate().all(|(i, b)| *b == i as u32),
                "{order:?} {blocks}"
            );
        }
    }
}

#[test]
fn grids_and_parameters() {
    let text = ".version 8.4 .target sm_80 .address_size 64
        .visible .entry k(.param .u8 a, .param .u64 to, .param .align 4 .b8 s[12], .param .u16 c) .maxntid 64, 2, 1 {
        .reg .b32 %r<20>; .reg .b64 %R<9>;
        mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mov.u32 %r3, %ctaid.z; mov.u32 %r4, %nctaid.z; mov.u32 %r5, %ntid.x;
        mad.lo.u32 %r6, %r2, %r5, %r1; mov.u32 %r7, %ntid.y; mul.lo.u32 %r8, %r5, %r7; mad.lo.u32 %r6, %r3, %r8, %r6;
        ld.param.u8 %r9, [a]; mov.b64 %R3, s; ld.param.u32 %r10, [%R3+8]; ld.param.u16 %r11, [c];
        mul.lo.u32 %r12, %r9, %r10; add.u32 %r12, %r12, %r11; mad.lo.u32 %r12, %r4, 100, %r12; add.u32 %r12, %r12, %r6;
        ld.param.u64 %R1, [to]; mul.wide.u32 %R2, %r6, 4; add.u64 %R1, %R1, %R2; st.global.u32 [%R1], %r12; ret; }";
    let module = Module::parse(text).unwrap();
    let kernel = module.kernel("k").unwrap();
    let places: Vec<[usize; 3]> = kernel
        .params()
        .iter()
        .map(|p| [p.size, p.align, p.offset])
        .collect();
    assert_eq!(places, [[1, 1, 0], [8, 8, 8], [12, 4, 16], [2, 2, 28]]);
    assert_eq!(
        (
            kernel.param_bytes(),
            kernel.max_threads(),
            kernel.static_shared()
        ),
        (30, Some(128), 0)
    );
    let memory = Memory::new();
    let to = upload_u32(&memory, &[0; 30]);
    let mut params = vec![0; 30];
    params[0] = 3;
    params[8..16].copy_from_slice(&to.to_le_bytes());
    params[24..28].copy_from_slice(&50_u32.to_le_bytes());
    params[28..30].copy_from_slice(&7_u16.to_le_bytes());
    let launch = Launch {
        kernel: "k",
        grid: [1, 1, 3],
        block: [5, 2, 1],
        dynamic_shared: 0,
        params: &params,
    };
    module.launch(&memory, &launch).unwrap();
    let got = crate::support::download_u32(&memory, to, 30);
    assert!(
        got.iter()
            .enumerate()
            .all(|(i, v)| *v == 3 * 50 + 7 + 300 + i as u32),
        "{got:?}"
    );
}

#[test]
fn launches_that_a_driver_refuses() {
    let module = Module::parse(&kernel("", "")).unwrap();
    let memory = Memory::new();
    let good = Launch {
        kernel: "k",
        grid: [1; 3],
        block: [1; 3],
        dynamic_shared: 0,
        params: &params(&[0], &[]),
    };
    module.launch(&memory, &good).unwrap();
    for bad in [
        Launch {
            kernel: "other",
            ..good
        },
        Launch {
            grid: [1, 0, 1],
            ..good
        },
        Launch {
            block: [1025, 1, 1],
            ..good
        },
        Launch {
            dynamic_shared: 300_000,
            ..good
        },
        Launch {
            params: &[0; 7],
            ..good
        },
    ] {
        assert!(
            matches!(
                module.launch(&memory, &bad),
                Err(sd_ptx::Error::Launch { .. })
            ),
            "{bad:?}"
        );
    }
}
