//! `mma` and `ldmatrix` against plain products, with fragments filled as the ISA's tables tell.

use half::{bf16, f16};
use sd_ptx::{Launch, Memory, Module};

use crate::support::{download_u32, kernel, params, upload_u32};

/// Small numbers that every 16-bit format holds, different everywhere.
fn number(row: usize, column: usize, salt: usize) -> f32 {
    ((row * 37 + column * 11 + salt * 5) % 29) as f32 - 14.0
}

fn run(text: &str, inputs: &[u32], words: usize) -> Vec<u32> {
    let module = Module::parse(text).unwrap();
    let memory = Memory::new();
    let to = upload_u32(&memory, &[inputs, &vec![0; words]].concat());
    let params = params(&[to], &[]);
    module
        .launch(
            &memory,
            &Launch {
                kernel: "k",
                grid: [1; 3],
                block: [32, 1, 1],
                dynamic_shared: 0,
                params: &params,
            },
        )
        .unwrap();
    download_u32(&memory, to + inputs.len() as u64 * 4, words)
}

/// One product: `depth` of k, `numbers` of them in a register, from 16-bit patterns or tf32.
fn product(shape: &str, kinds: &str, depth: usize, bits: fn(f32) -> u32, halves: bool) {
    let numbers = if depth == 4 || kinds.contains("tf32") {
        1
    } else {
        2
    };
    // registers of a along k, and their columns
    let along = depth / (4 * numbers);
    let (na, nb, nc) = (2 * along, along, if halves { 2 } else { 4 });
    let mut inputs = Vec::new();
    for lane in 0..32 {
        let (g, t) = (lane / 4, lane % 4);
        let pack = |low: f32, high: f32| {
            if numbers == 1 {
                bits(low)
            } else {
                bits(low) | bits(high) << 16
            }
        };
        for register in 0..na {
            let (row, column) = (
                g + register % 2 * 8,
                t * numbers + register / 2 * 4 * numbers,
            );
            inputs.push(pack(number(row, column, 0), number(row, column + 1, 0)));
        }
        for register in 0..nb {
            let row = t * numbers + register * 4 * numbers;
            inputs.push(pack(number(row, g, 1), number(row + 1, g, 1)));
        }
        for register in 0..nc {
            if halves {
                let row = g + register * 8;
                let half = |x: f32| u32::from(f16::from_f32(x).to_bits());
                inputs.push(half(number(row, t * 2, 2)) | half(number(row, t * 2 + 1, 2)) << 16);
            } else {
                inputs.push(number(g + register / 2 * 8, t * 2 + register % 2, 2).to_bits());
            }
        }
    }
    let count = na + nb + nc;
    let list = |first: usize, n: usize| {
        (first..first + n)
            .map(|i| format!("%r{i}"))
            .collect::<Vec<_>>()
            .join(",")
    };
    let loads: String = (0..count)
        .map(|i| format!("ld.global.u32 %r{i}, [%R2+{}];\n", i * 4))
        .collect();
    let stores: String = (0..nc)
        .map(|i| format!("st.global.u32 [%R4+{}], %r{};\n", i * 4, 50 + i))
        .collect();
    let code = format!(
        "mul.wide.u32 %R1, %lane, {}; add.s64 %R2, %at, %R1;
        {loads}
        mma.sync.aligned.{shape}.row.col.{kinds} {{{}}}, {{{}}}, {{{}}}, {{{}}};
        mul.wide.u32 %R3, %lane, {}; add.s64 %R4, %at, %R3; add.s64 %R4, %R4, {};
        {stores}",
        count * 4,
        list(50, nc),
        list(0, na),
        list(na, nb),
        list(na + nb, nc),
        nc * 4,
        count * 4 * 32,
    );
    let got = run(&kernel("", &code), &inputs, 32 * nc);
    for lane in 0..32 {
        let (g, t) = (lane / 4, lane % 4);
        for i in 0..4 {
            let (row, column) = (g + i / 2 * 8, t * 2 + i % 2);
            let exact = (0..depth)
                .map(|k| number(row, k, 0) * number(k, column, 1))
                .sum::<f32>()
                + number(row, column, 2);
            let value = if halves {
                f16::from_bits((got[lane * 2 + i / 2] >> (i % 2 * 16)) as u16).to_f32()
            } else {
                f32::from_bits(got[lane * 4 + i])
            };
            let expected = if halves {
                f16::from_f32(exact).to_f32()
            } else {
                exact
            };
            assert_eq!(value, expected, "{shape} {kinds} at {row}, {column}");
        }
    }
}

#[test]
fn products() {
    let brain = |x: f32| u32::from(bf16::from_f32(x).to_bits());
    let half = |x: f32| u32::from(f16::from_f32(x).to_bits());
    product("m16n8k16", "f32.bf16.bf16.f32", 16, brain, false);
    product("m16n8k16", "f32.f16.f16.f32", 16, half, false);
    product("m16n8k16", "f16.f16.f16.f16", 16, half, true);
    product("m16n8k8", "f32.bf16.bf16.f32", 8, brain, false);
    product("m16n8k8", "f32.f16.f16.f32", 8, half, false);
    product("m16n8k8", "f32.tf32.tf32.f32", 8, f32::to_bits, false);
    product("m16n8k4", "f32.tf32.tf32.f32", 4, f32::to_bits, false);
}

#[test]
fn matrices_of_shared_memory() {
    // row r of matrix m holds 16-bit numbers m · 64 + r · 8 + column, at a stride of 48 bytes
    for (count, transposed) in [
        (1, false),
        (2, false),
        (4, false),
        (1, true),
        (2, true),
        (4, true),
    ] {
        let fill = "mul.lo.u32 %r1, %lane, 48; mov.u32 %r2, tile; add.u32 %r1, %r1, %r2; shl.b32 %r3, %lane, 3; mov.u32 %r4, 0;
            again: add.u32 %r5, %r3, %r4; add.u32 %r6, %r5, 1; shl.b32 %r6, %r6, 16; or.b32 %r6, %r6, %r5;
            shl.b32 %r7, %r4, 1; add.u32 %r8, %r1, %r7; st.shared.u32 [%r8], %r6;
            add.u32 %r4, %r4, 2; setp.lt.u32 %p1, %r4, 8; @%p1 bra again; bar.warp.sync -1;";
        let registers = ["%r20", "%r21", "%r22", "%r23"];
        let stores: String = (0..count)
            .map(|i| format!("st.global.u32 [%R2+{}], {};\n", i * 4, registers[i]))
            .collect();
        let code = format!(
            "{fill}
            ldmatrix.sync.aligned.m8n8.x{count}{}.shared.b16 {{{}}}, [%r1];
            mul.wide.u32 %R1, %lane, {}; add.s64 %R2, %at, %R1;
            {stores}",
            if transposed { ".trans" } else { "" },
            registers[..count].join(","),
            count * 4,
        );
        let got = run(
            &kernel(".shared .align 16 .b8 tile[1536];", &code),
            &[],
            32 * count,
        );
        for lane in 0..32 {
            for matrix in 0..count {
                let (g, t) = (lane / 4, lane % 4);
                let at = |row: usize, column: usize| (matrix * 64 + row * 8 + column) as u32;
                let pair = if transposed {
                    [at(t * 2, g), at(t * 2 + 1, g)]
                } else {
                    [at(g, t * 2), at(g, t * 2 + 1)]
                };
                assert_eq!(
                    got[lane * count + matrix],
                    pair[0] | pair[1] << 16,
                    "x{count} {transposed} lane {lane} matrix {matrix}"
                );
            }
        }
    }
}
