//! `sd-rs bench --kernels`: each distinct layer of Stable Diffusion 1.5 and XL by itself, beside what the processor can do at most.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use candle_core::{DType, Device};
use sd_kernels::cpu::{Level, peak_gflops};
use sd_kernels::graph::{Node, NodeKind};
use sd_kernels::op::LayerClass;
use sd_kernels::plan::{Feed, Options, Plan, Precision, Store};
use sd_kernels::{Graph, Op, Weights, ops, profile};
use sd_models::unet::{self, UNet};
use serde_json::{Value, json};

use super::full_size;
use super::{interrupt, print_line};
use crate::device;
use crate::error::{Error, Result};
use crate::weights::RandomSource;

/// A layer, and how often the networks have it.
struct Layer {
    op: Op,
    inputs: Vec<Vec<usize>>,
    output: Vec<usize>,
    counts: BTreeMap<&'static str, usize>,
}

/// Runs the command.
///
/// # Errors
/// Whatever stops it.
pub(super) fn run(dtype: DType, as_json: bool) -> Result<()> {
    let bf16 = dtype == DType::BF16;
    let peak = peak_gflops(Level::current(), bf16);
    let precision = if bf16 {
        Precision::Bf16
    } else {
        Precision::F32
    };
    let mut rows = Vec::new();
    if !as_json {
        print_line(&format!(
            "cpu ({}), {}, peak {peak:.0} GFLOP/s in products that never leave the cache",
            Level::current().name(),
            device::dtype_name(dtype)
        ))?;
    }
    for (name, layer) in layers()? {
        if interrupt::stopped() {
            return Err(Error::Interrupted);
        }
        let seconds = measure(&layer, precision)?.as_secs_f64();
        let shapes: Vec<&[usize]> = layer.inputs.iter().map(Vec::as_slice).collect();
        let gflop = layer.op.flop(&shapes, &layer.output) as f64 / 1e9;
        let (rate, share) = (gflop / seconds, 100.0 * gflop / seconds / peak);
        let counts: Vec<String> = layer
            .counts
            .iter()
            .map(|(network, count)| format!("{count} in {network}"))
            .collect();
        if as_json {
            rows.push(json!({
                "layer": name, "counts": layer.counts, "gflop": gflop, "seconds": seconds, "gflops": rate, "share_of_peak": share / 100.0,
            }));
        } else {
            let milliseconds = 1e3 * seconds;
            print_line(&format!(
                "{name:44} {milliseconds:9.3} ms {gflop:8.2} GFLOP {rate:7.1} GFLOP/s {share:6.1} %   {}",
                counts.join(", ")
            ))?;
        }
    }
    if as_json {
        let report: Value = json!({
            "cpu_level": Level::current().name(), "dtype": device::dtype_name(dtype), "threads": rayon::current_num_threads(),
            "peak_gflops": peak, "layers": rows,
        });
        print_line(&report.to_string())?;
    }
    Ok(())
}

/// The layers that do arithmetic, by name, in the order of names.
fn layers() -> Result<BTreeMap<String, Layer>> {
    let mut layers: BTreeMap<String, Layer> = BTreeMap::new();
    for (network, graph) in [("SD 1.5", sd15()?), ("SDXL", sdxl()?)] {
        let nodes = graph.nodes();
        for node in &nodes {
            let NodeKind::Compute { op, inputs } = &node.kind else {
                continue;
            };
            if op.class() == LayerClass::Other {
                continue;
            }
            let inputs: Vec<Vec<usize>> = inputs.iter().map(|&i| nodes[i].shape.clone()).collect();
            let layer = layers
                .entry(name(op, &inputs, node))
                .or_insert_with(|| Layer {
                    op: op.clone(),
                    inputs,
                    output: node.shape.clone(),
                    counts: BTreeMap::new(),
                });
            *layer.counts.entry(network).or_default() += 1;
        }
    }
    Ok(layers)
}

/// What tells layers apart.
fn name(op: &Op, inputs: &[Vec<usize>], node: &Node) -> String {
    let by = |shape: &[usize]| {
        let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
        sizes.join("×")
    };
    match op {
        Op::Conv2d { weight, stride, .. } => {
            let [columns, channels, kh, kw] = *weight.shape() else {
                return op.name().to_owned();
            };
            let size = by(&node.shape[2..]);
            format!("conv {kh}×{kw}/{stride} {channels} → {columns} to {size}")
        }
        Op::Linear { weight, .. } => {
            let rows: usize = node.shape.iter().rev().skip(1).product();
            format!(
                "linear {} → {} of {rows}",
                weight.shape()[1],
                weight.shape()[0]
            )
        }
        Op::Attention { heads, .. } => {
            let (q, k) = (&inputs[0], &inputs[1]);
            format!(
                "attention {heads} × {} of {} by {}",
                q[2] / heads,
                q[1],
                k[1]
            )
        }
        Op::GroupNorm { .. } | Op::LayerNorm { .. } => {
            format!("{} {}", op.name(), by(&node.shape[1..]))
        }
        _ => op.name().to_owned(),
    }
}

/// The best of a few runs, inputs and outputs not counted.
fn measure(layer: &Layer, precision: Precision) -> Result<Duration> {
    let graph = Graph::new();
    let names: Vec<String> = (0..layer.inputs.len())
        .map(|i| format!("input {i}"))
        .collect();
    let inputs = names.iter().zip(&layer.inputs);
    let inputs: Vec<_> = inputs
        .map(|(name, shape)| graph.input(name, shape))
        .collect();
    let output = ops::apply(layer.op.clone(), &inputs.iter().collect::<Vec<_>>())?;
    let options = Options::new(Level::current(), precision);
    let mut plan = Plan::compile(&graph, &output, &options, &Store::default())?;
    let values: Vec<Vec<f32>> = layer
        .inputs
        .iter()
        .map(|shape| {
            let count: usize = shape.iter().product();
            (0..count)
                .map(|i| (i * 7919 % 1013) as f32 / 506.0 - 1.0)
                .collect()
        })
        .collect();
    let feeds: Vec<Feed<'_>> = names
        .iter()
        .zip(&values)
        .map(|(name, values)| Feed { name, values })
        .collect();
    let (mut out, mut best) = (Vec::new(), Duration::MAX);
    for _ in 0..4 {
        let (done, classes) = profile::measure(|| plan.run(&feeds, &mut out));
        done?;
        best = best.min(classes.into_values().sum());
    }
    Ok(best)
}

/// One call with guidance for a picture of 512×512.
fn sd15() -> Result<Graph> {
    record(&full_size::sd15_unet(), 64)
}

/// One call with guidance for a picture of 1024×1024, without the embedding of sizes, which is two small layers.
fn sdxl() -> Result<Graph> {
    let mut config = full_size::sdxl_unet();
    config["addition_embed_type"] = Value::Null;
    record(&config, 128)
}

fn record(config: &Value, latent: usize) -> Result<Graph> {
    let config = unet::Config::from_json(config).map_err(|e| Error::Usage(e.to_string()))?;
    let weights = Weights::new(Arc::new(RandomSource), DType::F32, &Device::Cpu);
    let unet = UNet::load(&weights, &config);
    let graph = Graph::new();
    let sample = graph.input("sample", &[2, config.in_channels, latent, latent]);
    let timestep = graph.input("timestep", &[2]);
    let context = graph.input("context", &[2, 77, config.context_width()]);
    unet.forward(&unet::Inputs {
        sample: &sample,
        timestep: &timestep,
        context: &context,
        added: None,
        guidance: None,
        label: None,
        reference: None,
        steering: unet::Steering::default(),
    })?;
    Ok(graph)
}
