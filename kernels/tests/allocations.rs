//! A plan's later calls find all their memory where the first left it.
#![allow(clippy::unwrap_used, unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device};
use sd_kernels::cpu::Level;
use sd_kernels::plan::{Feed, Options, Plan, Precision, Store};
use sd_kernels::{Activation, Graph, Op, Padding, Reader, Result, Source, Tensor, Weights, ops};

/// Counts what is asked for.
struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does the work
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: passed on
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: passed on
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Weights that are all alike.
struct Same;

impl Source for Same {
    fn shape(&self, _: &str, wanted: &[usize]) -> Option<Vec<usize>> {
        Some(wanted.to_vec())
    }

    fn dtype(&self, _: &str) -> DType {
        DType::F32
    }

    fn open(&self, _: &str, _: &[usize]) -> Result<Box<dyn Reader + '_>> {
        Ok(Box::new(Self))
    }
}

impl Reader for Same {
    fn read(&self, _: usize, out: &mut [f32]) {
        out.fill(0.01);
    }
}

/// A little of everything: convolutions in all forms, norms, attention, a join.
fn network(w: &Weights, x: &Tensor) -> Result<Tensor> {
    let conv = |name: &str, x: &Tensor, columns: usize, kernel: usize| {
        let op = Op::Conv2d {
            weight: w.param(name, &[columns, x.shape()[1], kernel, kernel]),
            bias: None,
            stride: 1,
            wrap: sd_kernels::Wrap::default(),
            padding: Padding::same(kernel / 2),
        };
        ops::apply(op, &[x])
    };
    let x = conv("a", x, 40, 3)?;
    let norm = Op::GroupNorm {
        weight: w.param("n", &[40]),
        bias: w.param("m", &[40]),
        groups: 8,
        eps: 1e-5,
        activation: Some(Activation::Silu),
    };
    let y = conv("b", &ops::apply(norm, &[&x])?, 40, 3)?;
    let tokens = ops::apply(Op::Flatten, &[&y])?;
    let attention = Op::Attention {
        heads: 2,
        causal: false,
        relative: None,
    };
    let seen = ops::apply(attention, &[&tokens, &tokens, &tokens])?;
    let seen = ops::apply(Op::Unflatten { h: 20, w: 18 }, &[&seen])?;
    conv("c", &ops::concat(&seen, &x)?, 5, 1)
}

#[test]
fn later_calls_ask_for_next_to_nothing() {
    let weights = Weights::new(Arc::new(Same), DType::F32, &Device::Cpu);
    let graph = Graph::new();
    let output = network(&weights, &graph.input("x", &[2, 4, 20, 18])).unwrap();
    let options = Options::new(Level::current(), Precision::F32);
    let mut plan = Plan::compile(&graph, &output, &options, &Store::default()).unwrap();
    let values = vec![0.5; 2 * 4 * 20 * 18];
    let feeds = [Feed {
        name: "x",
        values: &values,
    }];
    let mut out = Vec::new();
    for _ in 0..2 {
        plan.run(&feeds, &mut out).unwrap();
    }
    const CALLS: usize = 20;
    let before = BYTES.load(Ordering::Relaxed);
    for _ in 0..CALLS {
        plan.run(&feeds, &mut out).unwrap();
    }
    let bytes = (BYTES.load(Ordering::Relaxed) - before) / CALLS;
    eprintln!("{bytes} bytes a call");
    assert!(bytes < 4096, "{bytes} bytes a call");
}
