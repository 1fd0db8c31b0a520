//! What is not interpreted is refused when it is read, with its place.

use sd_ptx::{Error, Module};

use crate::support::kernel;

#[track_caller]
fn refused(variables: &str, code: &str, reason: &str) {
    match Module::parse(&kernel(variables, code)) {
        Err(Error::Parse {
            line,
            text,
            reason: got,
        }) => {
            assert!(got.contains(reason), "{got}: {text}");
            let given = kernel(variables, code);
            let there = given.lines().nth(line as usize - 1).unwrap_or_default();
            assert!(
                there.contains(text.split_whitespace().next().unwrap()),
                "line {line} is {there:?}, not {text:?}"
            );
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("{code} is accepted"),
    }
}

#[test]
fn instructions() {
    refused("", "wgmma.fence.sync.aligned;", "not interpreted");
    refused(
        "",
        "tex.2d.v4.f32.f32 {%f1, %f2, %f3, %f4}, [%at, {%f5, %f6}];",
        "expected ']'",
    );
    refused(
        "",
        "min.xorsign.abs.f32 %f1, 0f00000000, 0f00000000;",
        "xorsign",
    );
    refused(
        "",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r1,%r2,%r3,%r4};",
        "shape",
    );
    refused("", "cp.async.bulk.commit_group;", "not interpreted");
    refused("", "add.f64 %R1, %R1;", "too few operands");
    refused("", "add.u32 %r1, %R1, 1;", "32 bits");
    refused("", "add.u32 %r1, %unknown, 1;", "not known");
    refused("", "bra nowhere;", "no label");
    refused("", "mov.u32 %r1, %clusterid.x;", "not known");
    refused("", "mov.u32 %tid.x, 1;", "no register");
    refused("", "st.const.u32 [%at], 1;", "constant");
    refused(
        "",
        "st.global.v4.u64 [%at], {%R1, %R1, %R1, %R1};",
        "vector",
    );
    refused(".func f() { call f; ret; }", "call f;", "recursion");
    refused(".extern .func g();", "call g;", "no function g");
    refused("", "setp.lt.f32 %p1, %r1", "expected");
    refused(".texref t;", "", "directive");
}
