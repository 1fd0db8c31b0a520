//! Every check goes red on a kernel that is wrong, and stays green on the same kernel put right.

use sd_ptx::{Error, Kind, Memory, Options};

use crate::support::{fault, kernel, run};

const WORDS: &str = ".shared .align 16 .b8 words[2048];";

/// `%r1`: the shared address of this thread's word; `%r2`: that of the thread's 32 further on in a block of 64.
const MINE: &str = "shl.b32 %r3, %tid, 2; mov.u32 %r4, words; add.u32 %r1, %r3, %r4; xor.b32 %r5, %r3, 128; add.u32 %r2, %r5, %r4;";

#[track_caller]
fn red(code: &str, block: u32, kind: Kind, instruction: &str) -> sd_ptx::Fault {
    fault(
        &kernel(WORDS, &format!("{MINE}\n{code}")),
        block,
        &Options::default(),
        kind,
        instruction,
    )
}

#[track_caller]
fn green(code: &str, block: u32) {
    run(
        &kernel(WORDS, &format!("{MINE}\n{code}")),
        2,
        block,
        256,
        &Options::default(),
    )
    .unwrap();
}

#[test]
fn bounds_of_device_memory() {
    let code = |offset: &str| {
        format!(
            "mul.wide.u32 %R1, %tid, 4; add.s64 %R2, %at, %R1;\n\nst.global.u32 [%R2+{offset}], %tid;"
        )
    };
    green(&code("768"), 64);
    let fault = red(
        &code("772"),
        64,
        Kind::Bounds,
        "st.global.u32 [%R2+772], %tid;",
    );
    assert_eq!(
        (fault.thread, fault.block[1], fault.kernel.as_str()),
        ([63, 0, 0], 0, "k")
    );
    let line = kernel(WORDS, &format!("{MINE}\n{}", code("772")))
        .lines()
        .position(|l| l.contains("772"))
        .unwrap() as u32
        + 1;
    assert_eq!(fault.line, line);
    red(&code("-4"), 64, Kind::Bounds, "st.global");
    red(
        "mov.u64 %R1, 0; ld.global.u32 %r9, [%R1];",
        1,
        Kind::Bounds,
        "ld.global",
    );
    red(
        "ld.global.v4.u32 {%r6, %r7, %r8, %r9}, [%at+1016];",
        1,
        Kind::Bounds,
        "ld.global.v4",
    );
    red(
        ".local .align 4 .b8 mine[8]; ld.local.u32 %r9, [mine+8];",
        1,
        Kind::Bounds,
        "ld.local",
    );
}

#[test]
fn alignment() {
    green("ld.global.v2.u32 {%r6, %r7}, [%at+8];", 1);
    red(
        "ld.global.v2.u32 {%r6, %r7}, [%at+4];",
        1,
        Kind::Alignment,
        "ld.global.v2",
    );
    red(
        "ld.global.u32 %r6, [%at+2];",
        1,
        Kind::Alignment,
        "ld.global",
    );
    red(
        "ld.shared.v4.u32 {%r6, %r7, %r8, %r9}, [words+8];",
        1,
        Kind::Alignment,
        "ld.shared.v4",
    );
    red(
        "cp.async.cg.shared.global [%r4], [%at+8], 16; cp.async.wait_all;",
        1,
        Kind::Alignment,
        "cp.async",
    );
}

#[test]
fn spaces() {
    // behind the dynamic array, which lies behind the static one
    red(
        "ld.shared.u32 %r6, [words+3072];",
        1,
        Kind::Bounds,
        "ld.shared",
    );
    red(
        "cvt.u64.u32 %R1, %r1; ld.global.u32 %r6, [%R1];",
        32,
        Kind::Bounds,
        "ld.global",
    );
    red("ld.shared.u32 %r6, [%at];", 1, Kind::Space, "ld.shared");
    red(
        "mov.u64 %R1, words; cvta.shared.u64 %R2, %R1; ld.global.u32 %r6, [%R2];",
        1,
        Kind::Space,
        "ld.global",
    );
    red("cvta.to.shared.u64 %R1, %at;", 1, Kind::Space, "cvta");
    green(
        "mov.u64 %R1, words; cvta.shared.u64 %R2, %R1; st.u32 [%R2], 1; ld.u32 %r6, [%R2];",
        1,
    );
}

#[test]
fn memory_of_the_host() {
    let memory = Memory::new();
    let address = memory.alloc(10).unwrap();
    assert_eq!(address % 256, 0);
    let mut out = [0; 10];
    memory.read(address, &mut out).unwrap();
    assert_eq!(out, [0xff; 10]);
    memory.write(address + 3, &[1, 2, 3, 4, 5]).unwrap();
    memory.copy(address, address + 4, 2).unwrap();
    memory.fill(address + 9, 7, 1).unwrap();
    memory.read(address, &mut out).unwrap();
    assert_eq!(out, [2, 3, 0xff, 1, 2, 3, 4, 5, 0xff, 7]);
    assert!(memory.write(address + 8, &[0; 3]).is_err());
    let other = memory.alloc(300).unwrap();
    assert_eq!((memory.allocated(), memory.peak()), (310, 310));
    memory.free(address).unwrap();
    assert!(
        memory.free(address).is_err()
            && memory.free(other + 256).is_err()
            && memory.read(address, &mut out).is_err()
    );
    assert_eq!((memory.allocated(), memory.peak()), (300, 310));
}

#[test]
fn missing_lanes() {
    let some = "setp.lt.u32 %p1, %tid, 31;";
    red(
        &format!("{some} @%p1 shfl.sync.bfly.b32 %r6, %tid, 1, 31, -1;"),
        32,
        Kind::Lanes,
        "shfl.sync",
    );
    red(
        &format!("{some} @!%p1 bra out; vote.sync.ballot.b32 %r6, %p1, -1; out:"),
        32,
        Kind::Lanes,
        "vote.sync",
    );
    red(
        &format!("{some} @%p1 bar.warp.sync -1;"),
        32,
        Kind::Lanes,
        "bar.warp.sync",
    );
    red(
        &format!("{some} @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r6}}, [words];"),
        32,
        Kind::Lanes,
        "ldmatrix",
    );
    red(
        "mov.u32 %r6, 0; mov.f32 %f1, 0f00000000; mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1,%f1,%f1,%f1}, {%r6,%r6}, {%r6}, {%f1,%f1,%f1,%f1};",
        31,
        Kind::Lanes,
        "mma",
    );
    red(
        &format!("{some} @%p1 bar.sync 0;"),
        32,
        Kind::Lanes,
        "bar.sync",
    );
    // a lane that the mask does not name
    red(
        "shfl.sync.bfly.b32 %r6, %tid, 1, 31, 0xffff;",
        32,
        Kind::Lanes,
        "shfl.sync",
    );
    green(
        &format!("{some} @%p1 bar.warp.sync 0x7fffffff; bar.warp.sync -1; bar.sync 0;"),
        32,
    );
}

#[test]
fn barriers_that_are_never_passed() {
    let first = "setp.lt.u32 %p1, %tid, 32;";
    let gone = red(
        &format!("{first} @%p1 ret; bar.sync 0;"),
        64,
        Kind::Barrier,
        "bar.sync",
    );
    assert!(gone.reason.contains("warps [0] have ended"), "{gone}");
    red(
        &format!("{first} @%p1 bra other; bar.sync 1; bra end; other: bar.sync 2; end:"),
        64,
        Kind::Barrier,
        "bar.sync",
    );
    red(
        &format!("{first} @%p1 bar.sync 1, 32; bar.sync 1, 96;"),
        64,
        Kind::Barrier,
        "bar.sync",
    );
    red(
        "setp.gt.u32 %p1, %tid, 40; @%p1 ret; bar.sync 0;",
        64,
        Kind::Barrier,
        "bar.sync",
    );
    // two different instructions of the same barrier are one barrier
    green(
        &format!("{first} @%p1 bra other; bar.sync 1; bra end; other: bar.sync 1; end:"),
        64,
    );
}

#[test]
fn races_in_shared_memory() {
    green(
        "st.shared.u32 [%r1], 1; bar.sync 0; ld.shared.u32 %r6, [%r2]; bar.sync 0; st.shared.u32 [%r1], %r6;",
        64,
    );
    let late = red(
        "st.shared.u32 [%r1], 1; ld.shared.u32 %r6, [%r2];",
        64,
        Kind::Race,
        "st.shared",
    );
    assert!(late.reason.contains("warp 0 read"), "{late}");
    let early =
        "setp.ge.u32 %p1, %tid, 32; @!%p1 st.shared.u32 [%r1], 1; @%p1 ld.shared.u32 %r6, [%r2];";
    let early = red(early, 64, Kind::Race, "ld.shared");
    assert!(early.reason.contains("warp 0 wrote"), "{early}");
    red(
        "st.shared.u32 [%r1], 1; bar.sync 0; ld.shared.u32 %r6, [%r2]; st.shared.u32 [%r1], %r6;",
        64,
        Kind::Race,
        "ld.shared",
    );
    red("st.shared.u32 [words], %tid;", 64, Kind::Race, "st.shared");
    // a warp alone may do as it likes
    green(
        "st.shared.u32 [%r1], 1; xor.b32 %r6, %r1, 4; ld.shared.u32 %r6, [%r6];",
        32,
    );
    // neighbouring halves of a word are different bytes
    green(
        "shl.b32 %r6, %tid, 1; shr.u32 %r7, %tid, 5; and.b32 %r8, %tid, 31; shl.b32 %r8, %r8, 2; shl.b32 %r7, %r7, 1; add.u32 %r6, %r7, %r8; add.u32 %r6, %r6, %r4; mov.u16 %h1, 3; st.shared.u16 [%r6], %h1;",
        64,
    );
    // a barrier of other warps orders nothing
    red(
        "setp.ge.u32 %p1, %tid, 64; @%p1 bra rest; st.shared.u32 [%r1], 1; bar.sync 1, 64; bra end; rest: sub.u32 %r7, %r1, 256; bar.sync 2, 64; ld.shared.u32 %r6, [%r7]; end:",
        128,
        Kind::Race,
        "ld.shared",
    );
    // without the check it goes through
    let text = kernel(WORDS, &format!("{MINE} st.shared.u32 [words], %tid;"));
    run(
        &text,
        2,
        64,
        256,
        &Options {
            races: false,
            ..Options::default()
        },
    )
    .unwrap();
}

#[test]
fn lanes_that_are_not_in_step() {
    let options = Options {
        lanes: true,
        ..Options::default()
    };
    let text = |sync: &str| {
        kernel(
            WORDS,
            &format!(
                "{MINE} st.shared.u32 [%r1], 1; {sync} xor.b32 %r6, %r1, 4; ld.shared.u32 %r6, [%r6];"
            ),
        )
    };
    fault(&text(""), 32, &options, Kind::Race, "ld.shared");
    run(&text("bar.warp.sync -1;"), 2, 32, 256, &options).unwrap();
    run(&text("bar.sync 0;"), 2, 32, 256, &options).unwrap();
}

#[test]
fn copies_in_flight() {
    let copy = "shl.b32 %r6, %tid, 4; and.b32 %r6, %r6, 511; cvt.u64.u32 %R1, %r6; add.s64 %R1, %at, %R1; add.u32 %r7, %r6, %r4; cp.async.cg.shared.global [%r7], [%R1], 16;";
    green(
        &format!("{copy} cp.async.commit_group; cp.async.wait_group 0; ld.shared.u32 %r8, [%r7];"),
        32,
    );
    green(
        &format!("{copy} cp.async.wait_all; bar.sync 0; ld.shared.u32 %r8, [words];"),
        32,
    );
    red(
        &format!("{copy} cp.async.commit_group; ld.shared.u32 %r8, [%r7]; cp.async.wait_group 0;"),
        32,
        Kind::InFlight,
        "ld.shared",
    );
    red(
        &format!("{copy} st.shared.u32 [%r7], 1; cp.async.wait_all;"),
        32,
        Kind::InFlight,
        "st.shared",
    );
    red(
        &format!(
            "{copy} cp.async.commit_group; cp.async.wait_group 1; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r8}}, [words]; cp.async.wait_all;"
        ),
        32,
        Kind::InFlight,
        "ldmatrix",
    );
    // what is not committed is not waited for
    red(
        &format!("{copy} cp.async.wait_group 0; ld.shared.u32 %r8, [%r7]; cp.async.wait_all;"),
        32,
        Kind::InFlight,
        "ld.shared",
    );
    red(
        &format!("{copy} cp.async.commit_group;"),
        32,
        Kind::Pending,
        "ret",
    );
    // the wait of the copying thread is not enough for another warp
    let other = "setp.ge.u32 %p1, %tid, 32; @%p1 bra read;";
    red(
        &format!(
            "{other} {copy} cp.async.wait_all; bra end; read: ld.shared.u32 %r8, [words]; end:"
        ),
        64,
        Kind::Race,
        "ld.shared",
    );
    // nor is a barrier before the wait
    red(
        &format!(
            "{other} {copy} bar.sync 0; cp.async.wait_all; bra end; read: bar.sync 0; ld.shared.u32 %r8, [words]; end:"
        ),
        64,
        Kind::InFlight,
        "ld.shared",
    );
    green(
        &format!(
            "{other} {copy} cp.async.wait_all; bar.sync 0; bra end; read: bar.sync 0; ld.shared.u32 %r8, [words]; end:"
        ),
        64,
    );
    // a copy over what another warp still reads
    red(
        &format!(
            "{other} st.shared.u32 [%r1], 1; bar.sync 0; {copy} cp.async.wait_all; bra end; read: bar.sync 0; ld.shared.u32 %r8, [words]; end:"
        ),
        64,
        Kind::Race,
        "",
    );
}

#[test]
fn copies_fill_with_zeros() {
    let code = "st.global.v4.u32 [%at], {1, 2, 3, 4}; mov.u32 %r6, 6; cp.async.ca.shared.global [words], [%at], 16, %r6; cp.async.ca.shared.global [words+16], [%at], 4;
        cp.async.wait_all; ld.shared.v4.u32 {%r7, %r8, %r9, %r10}, [words]; ld.shared.u32 %r11, [words+16]; st.global.v4.u32 [%at+16], {%r7, %r8, %r9, %r10}; st.global.u32 [%at+32], %r11;";
    let got = run(
        &kernel(WORDS, &format!("{MINE} {code}")),
        1,
        1,
        256,
        &Options::default(),
    )
    .unwrap();
    assert_eq!(got[4..9], [1, 2, 0, 0, 1]);
}

#[test]
fn blocks_that_disturb_each_other() {
    let options = Options {
        blocks: true,
        ..Options::default()
    };
    fault(
        &kernel(WORDS, "st.global.u32 [%at], %block;"),
        1,
        &options,
        Kind::Race,
        "st.global",
    );
    let handed =
        "setp.eq.u32 %p1, %block, 0; @%p1 st.global.u32 [%at], 5; @!%p1 ld.global.u32 %r1, [%at];";
    assert_eq!(
        run(&kernel(WORDS, handed), 2, 1, 256, &options)
            .unwrap_err()
            .kind(),
        Some(Kind::Race)
    );
    run(&kernel(WORDS, handed), 2, 1, 256, &Options::default()).unwrap();
    let own = "mul.wide.u32 %R1, %block, 2; add.s64 %R1, %at, %R1; mov.u16 %h1, 1; st.global.u16 [%R1], %h1; ld.global.u16 %h1, [%R1]; ld.global.u32 %r1, [%at+64]; red.global.add.u32 [%at+128], 1;";
    run(&kernel(WORDS, own), 2, 1, 256, &options).unwrap();
}

#[test]
fn what_was_never_written() {
    let error = run(
        &kernel(WORDS, "add.u32 %r1, %r2, 1;"),
        1,
        1,
        1,
        &Options::default(),
    )
    .unwrap_err();
    assert!(
        matches!(&error, Error::Parse { text, .. } if text == "add.u32 %r1, %r2, 1;"),
        "{error}"
    );
    // on one way only: what is there is poison
    let text = kernel(
        WORDS,
        "setp.eq.u32 %p1, %tid, 1; @%p1 mov.u32 %r1, 5; st.global.u32 [%at], %r1;",
    );
    assert_eq!(
        run(&text, 1, 1, 1, &Options::default()).unwrap(),
        [u32::MAX]
    );
    let text = kernel(
        WORDS,
        "ld.shared.u32 %r1, [words]; st.global.u32 [%at], %r1;",
    );
    assert_eq!(
        run(&text, 1, 1, 1, &Options::default()).unwrap(),
        [u32::MAX]
    );
    red("trap;", 1, Kind::Trap, "trap");
}
