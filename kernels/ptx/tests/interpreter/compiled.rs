//! What the compiler makes of whole kernels, run and compared with f64.

use half::bf16;
use sd_ptx::{Error, Kind, Launch, Memory, Module, Options, Order};

use crate::support::{
    download, download_f32, download_u32, params, upload, upload_f32, upload_u32,
};

const GEMM: &str = include_str!("kernels/gemm.ptx");
const ATTENTION: &str = include_str!("kernels/attention.ptx");
const PLAIN: &str = include_str!("kernels/plain.ptx");
const FAST: &str = include_str!("kernels/plain_fast.ptx");

/// Numbers in −1 … 1, the same on every machine.
fn numbers(count: usize, mut seed: u32) -> Vec<f32> {
    let mut next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn brains(count: usize, seed: u32) -> Vec<bf16> {
    numbers(count, seed)
        .into_iter()
        .map(bf16::from_f32)
        .collect()
}

fn upload_brains(memory: &Memory, values: &[bf16]) -> u64 {
    upload(
        memory,
        &values
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect::<Vec<_>>(),
    )
}

/// All checks, and the blocks mixed.
fn strict() -> Options {
    Options {
        order: Order::Shuffled(5),
        races: true,
        lanes: true,
        blocks: true,
    }
}

/// The product of two random matrices of these sizes; the worst difference from f64.
fn gemm(text: &str, [m, n, k]: [usize; 3], options: &Options) -> Result<f64, Error> {
    let (a, b, memory) = (brains(m * k, 1), brains(n * k, 2), Memory::new());
    let pointers = [
        upload_brains(&memory, &a),
        upload_brains(&memory, &b),
        memory.alloc(m * n * 4).unwrap(),
    ];
    let params = params(&pointers, &[m as u32, n as u32, k as u32]);
    let grid = [n.div_ceil(64) as u32, m.div_ceil(64) as u32, 1];
    let launch = Launch {
        kernel: "gemm",
        grid,
        block: [128, 1, 1],
        dynamic_shared: 3 * 2 * 64 * 32 * 2,
        params: &params,
    };
    Module::parse(text)?.launch_with(&memory, &launch, options)?;
    let mut worst = 0.0_f64;
    for (i, got) in download_f32(&memory, pointers[2], m * n)
        .into_iter()
        .enumerate()
    {
        let (row, column) = (&a[i / n * k..][..k], &b[i % n * k..][..k]);
        let exact: f64 = row
            .iter()
            .zip(column)
            .map(|(x, y)| x.to_f64() * y.to_f64())
            .sum();
        worst = worst.max((f64::from(got) - exact).abs());
        assert!(!got.is_nan(), "at {i}");
    }
    Ok(worst)
}

#[test]
fn a_product_of_matrices() {
    for sizes in [[64, 64, 32], [100, 72, 136], [1, 8, 200], [130, 66, 8]] {
        let worst = gemm(GEMM, sizes, &strict()).unwrap();
        assert!(worst < 2.0e-5, "{sizes:?}: {worst:e}");
        assert_eq!(gemm(GEMM, sizes, &Options::default()).unwrap(), worst);
    }
}

#[test]
fn a_product_with_an_instruction_missing() {
    let kind = |from: &str, to: &str| {
        assert!(GEMM.contains(from));
        gemm(&GEMM.replace(from, to), [100, 72, 136], &Options::default()).map_err(|e| e.kind())
    };
    assert_eq!(kind("bar.sync 0;", ""), Err(Some(Kind::Race)));
    assert_eq!(
        kind("cp.async.wait_group 1;", ""),
        Err(Some(Kind::InFlight))
    );
    assert_eq!(
        kind("cp.async.wait_group 1;", "cp.async.wait_group 2;"),
        Err(Some(Kind::InFlight))
    );
    assert_eq!(
        kind("cp.async.commit_group;", ""),
        Err(Some(Kind::InFlight))
    );
    // rows beyond the end that are not filled with zeros
    assert!(kind(", 16, %", ", 16; // %").unwrap() > 1.0e-3);
}

#[test]
fn attention() {
    let (s, heads, d, scale) = (53, 2, 16, 0.7_f32);
    let [q, k, v] = [1, 2, 3].map(|seed| brains(s * heads * d, seed));
    let memory = Memory::new();
    let pointers = [
        upload_brains(&memory, &q),
        upload_brains(&memory, &k),
        upload_brains(&memory, &v),
        memory.alloc(s * heads * d * 2).unwrap(),
    ];
    let params = params(&pointers, &[s as u32, scale.to_bits()]);
    let grid = [s.div_ceil(32) as u32, heads as u32, 1];
    let launch = Launch {
        kernel: "attention",
        grid,
        block: [64, 1, 1],
        dynamic_shared: 0,
        params: &params,
    };
    Module::parse(ATTENTION)
        .unwrap()
        .launch_with(&memory, &launch, &strict())
        .unwrap();
    let got = download(&memory, pointers[3], s * heads * d * 2);
    for head in 0..heads {
        for i in 0..s {
            let at =
                |x: &[bf16], row: usize, column: usize| x[(head * s + row) * d + column].to_f64();
            let score = |j: usize| {
                (0..d).map(|c| at(&q, i, c) * at(&k, j, c)).sum::<f64>() * f64::from(scale)
            };
            let weights: Vec<f64> = (0..s).map(|j| score(j).exp()).collect();
            for c in 0..d {
                let exact = (0..s).map(|j| weights[j] * at(&v, j, c)).sum::<f64>()
                    / weights.iter().sum::<f64>();
                let index = ((head * s + i) * d + c) * 2;
                let value = bf16::from_le_bytes([got[index], got[index + 1]]).to_f64();
                // weights and results are rounded to bf16
                assert!(
                    (value - exact).abs() < 4.0e-3,
                    "head {head}, {i}, {c}: {value}, expected {exact}"
                );
            }
        }
    }
}

/// The error function by its series, which converges everywhere.
fn erf(x: f64) -> f64 {
    let (mut sum, mut term) = (0.0, x);
    for n in 0..200 {
        sum += term / f64::from(2 * n + 1);
        term *= -x * x / f64::from(n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

#[test]
fn functions_of_one_number() {
    type Function = fn(f64) -> f64;
    let functions: [(&str, Function); 10] = [
        ("erf", erf),
        ("exp", f64::exp),
        ("sin", f64::sin),
        ("cos", f64::cos),
        ("log", f64::ln),
        ("tanh", f64::tanh),
        ("sqrt", f64::sqrt),
        ("rsqrt", |x| x.sqrt().recip()),
        ("quotient", |x| x / f64::from(1.3_f32)),
        ("rounded", |x| x.round_ties_even() + x.floor() + x.ceil()),
    ];
    let mut x: Vec<f32> = (0..300).map(|i| i as f32 * 0.025 - 3.74).collect();
    let small = x.len();
    // sines of large numbers take a way of their own, with a local array
    x.extend([1.0e5, -3.3e6, 7.0e20, 105_615.0]);
    for (text, fast) in [(PLAIN, false), (FAST, true)] {
        let (module, memory) = (Module::parse(text).unwrap(), Memory::new());
        let (from, to) = (upload_f32(&memory, &x), memory.alloc(x.len() * 4).unwrap());
        for (what, (name, function)) in functions.iter().enumerate() {
            let params = params(&[from, to], &[x.len() as u32, what as u32]);
            let launch = Launch {
                kernel: "unary",
                grid: [4, 1, 1],
                block: [96, 1, 1],
                dynamic_shared: 0,
                params: &params,
            };
            module.launch_with(&memory, &launch, &strict()).unwrap();
            let count = if *name == "erf" || fast {
                small
            } else {
                x.len()
            };
            for (x, got) in x.iter().zip(download_f32(&memory, to, count)) {
                let exact = function(f64::from(*x));
                let bound = if fast { 2.0e-6 } else { 4.0e-7 };
                let close = (f64::from(got) - exact).abs() <= bound * exact.abs().max(0.1);
                assert!(
                    close
                        || got.is_nan() && exact.is_nan()
                        || f64::from(got) == f64::from(exact as f32),
                    "{name} of {x}: {got}, expected {exact}"
                );
            }
        }
    }
}

#[test]
fn divisions() {
    let a: Vec<u32> = (0..400_u32)
        .map(|i| i.wrapping_mul(2_654_435_769))
        .collect();
    let b: Vec<u32> = (0..400_i32)
        .map(|i| (i.wrapping_mul(3_118_732) >> (i % 20)).max(i % 3 * 5 - 12) as u32 | 1)
        .collect();
    let memory = Memory::new();
    let pointers = [
        upload_u32(&memory, &a),
        upload_u32(&memory, &b),
        memory.alloc(400 * 32).unwrap(),
    ];
    let params = params(&pointers, &[400]);
    let launch = Launch {
        kernel: "divisions",
        grid: [4, 1, 1],
        block: [128, 1, 1],
        dynamic_shared: 0,
        params: &params,
    };
    Module::parse(PLAIN)
        .unwrap()
        .launch_with(&memory, &launch, &strict())
        .unwrap();
    let got = download_u32(&memory, pointers[2], 400 * 8);
    for i in 0..400 {
        let (p, q) = (a[i] as i32, b[i] as i32);
        let wide = i64::from(p) * 1_000_003 + i64::from(q);
        let expected = [
            p.wrapping_div(q) as u32,
            p.wrapping_rem(q) as u32,
            a[i] / b[i],
            a[i] % b[i],
            (wide / i64::from(q)) as u32,
            (wide % i64::from(q)) as u32,
            (p / 7) as u32,
            a[i] % 10,
        ];
        assert_eq!(got[i * 8..i * 8 + 8], expected, "{p} and {q}");
    }
}

#[test]
fn local_arrays_and_calls() {
    let (module, memory) = (Module::parse(PLAIN).unwrap(), Memory::new());
    let x = numbers(333, 9);
    let pointers = [upload_f32(&memory, &x), memory.alloc(333 * 4).unwrap()];
    let launch = Launch {
        kernel: "walk",
        grid: [3, 1, 1],
        block: [128, 1, 1],
        dynamic_shared: 0,
        params: &params(&pointers, &[333]),
    };
    module.launch_with(&memory, &launch, &strict()).unwrap();
    for (i, got) in download_f32(&memory, pointers[1], 333)
        .into_iter()
        .enumerate()
    {
        let mut a: Vec<f32> = (0..16).map(|j| x[(i * 16 + j) % 333]).collect();
        let mut c = 0;
        for _ in 0..100 {
            let k = a[c].to_bits() as usize % 16;
            let sum = a[k] + a[c];
            a[c] = sum * 0.5;
            c = (k + 1) % 16;
            if sum > 1.5 {
                break;
            }
        }
        assert_eq!(got, a.iter().fold(0.0, |s, a| s + a), "thread {i}");
    }
    // a variable of the module keeps its value from launch to launch
    let to = memory.alloc(33 * 4).unwrap();
    let launch = Launch {
        kernel: "call",
        grid: [1; 3],
        block: [32, 1, 1],
        dynamic_shared: 0,
        params: &params(&[to], &[7]),
    };
    for launches in 1..3 {
        module.launch(&memory, &launch).unwrap();
        let got = download_f32(&memory, to, 33);
        assert_eq!(got[32], 5.0 + 32.0 * launches as f32);
        for (i, got) in got[..32].iter().enumerate() {
            let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.5][i % 8] * 0.125;
            let exact = (0..7).fold(x, |s, _| s * x + 1.0);
            assert!((f64::from(*got) - exact).abs() < 1.0e-5);
        }
    }
}

#[test]
fn a_norm_and_counts() {
    let (module, memory) = (Module::parse(PLAIN).unwrap(), Memory::new());
    let (rows, c) = (3, 333);
    let [x, g, b] = [numbers(rows * c, 1), numbers(c, 2), numbers(c, 3)];
    let pointers = [
        upload_f32(&memory, &x),
        upload_f32(&memory, &g),
        upload_f32(&memory, &b),
        memory.alloc(rows * c * 4).unwrap(),
    ];
    let launch = Launch {
        kernel: "layer_norm",
        grid: [rows as u32, 1, 1],
        block: [128, 1, 1],
        dynamic_shared: 0,
        params: &params(&pointers, &[c as u32, 1.0e-5_f32.to_bits()]),
    };
    module.launch_with(&memory, &launch, &strict()).unwrap();
    for (i, got) in download_f32(&memory, pointers[3], rows * c)
        .into_iter()
        .enumerate()
    {
        let row: Vec<f64> = x[i / c * c..][..c].iter().map(|x| f64::from(*x)).collect();
        let mean = row.iter().sum::<f64>() / c as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / c as f64;
        let exact = (row[i % c] - mean) / (variance + 1.0e-5).sqrt() * f64::from(g[i % c])
            + f64::from(b[i % c]);
        assert!(
            (f64::from(got) - exact).abs() < 2.0e-6,
            "{i}: {got}, expected {exact}"
        );
    }
    let words: Vec<u32> = (0..300_u32)
        .map(|i| i.wrapping_mul(2_654_435_761) >> 7)
        .collect();
    let pointers = [
        upload_u32(&memory, &[0; 18]),
        upload_u32(&memory, &[0]),
        upload_u32(&memory, &words),
    ];
    let launch = Launch {
        kernel: "count",
        grid: [3, 1, 1],
        block: [128, 1, 1],
        dynamic_shared: 0,
        params: &params(&pointers, &[300]),
    };
    module.launch_with(&memory, &launch, &strict()).unwrap();
    let mut expected = [0; 18];
    words.iter().for_each(|w| expected[*w as usize & 15] += 1);
    expected[16] = *words.iter().max().unwrap();
    expected[17] = words.iter().filter(|w| *w & 1 == 1).count() as u32;
    assert_eq!(download_u32(&memory, pointers[0], 18), expected);
    assert_eq!(
        download_f32(&memory, pointers[1], 1)[0],
        words.iter().map(|w| w & 255).sum::<u32>() as f32
    );
}
