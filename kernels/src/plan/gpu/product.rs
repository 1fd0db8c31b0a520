//! Products as launches of `product.cu`.

use super::super::ir::{Form, Part, Product, Program, Step, Type, View as Picture};
use super::args::{Args, kind};
use super::weights::Depth;
use super::{Places, Pool};
use crate::gpu::{Gpu, Launch};
use crate::{Error, Result};

/// Shared memory of `product_128`: its sums, 128 rows of 136 numbers, are more than four stages of 16 KB.
const SHARED_128: usize = 128 * (128 + 8) * 4;
/// Of `product_64`: four stages of 8 KB are more than its sums.
const SHARED_64: usize = 4 * 2 * 64 * 64;
/// Chunks that a split has at least: fewer would see the sums cost more than the products.
const LEAST: usize = 8;
/// The most splits.
const MOST: usize = 16;

/// How a product is spread over a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spread {
    kernel: &'static str,
    shared: usize,
    threads: u32,
    /// Rows and columns of a tile.
    tile: usize,
    pub(super) splits: usize,
}

impl Spread {
    /// For `rows × columns` results of each of `phases` phases, `depth` chunks deep, on so many processors.
    pub(super) fn of(
        kind: Type,
        (rows, columns, phases): (usize, usize, usize),
        depth: usize,
        processors: usize,
    ) -> Self {
        let tiles = |tile: usize| {
            let across = rows.div_ceil(tile).saturating_mul(columns.div_ceil(tile));
            across.saturating_mul(phases)
        };
        let (kernel, shared, threads, tile) = match kind {
            Type::F32 => ("product_f32", 0, 256, 64),
            // large tiles read least, as long as there are enough of them
            Type::Bf16 if tiles(128) >= processors => ("product_128", SHARED_128, 256, 128),
            Type::Bf16 => ("product_64", SHARED_64, 128, 64),
        };
        // two small tiles keep a processor busy
        let wanted = (2 * processors).div_ceil(tiles(tile).max(1));
        let splits = match tile {
            128 => 1,
            _ => wanted.min(depth / LEAST).clamp(1, MOST),
        };
        Self {
            kernel,
            shared,
            threads,
            tile,
            splits,
        }
    }
}

/// Numbers of a product's result before they are finished, and how it is spread.
fn shape(program: &Program, product: &Product, batch: usize) -> (usize, Depth) {
    let (h, w) = product.size;
    let depth = Depth::of(program, product);
    (batch * h * w / depth.phases().max(1), depth)
}

/// Bytes of sums between splits, for so many entries along the batch.
pub(super) fn workspace(program: &Program, product: &Product, batch: usize, gpu: &Gpu) -> usize {
    let (rows, depth) = shape(program, product, batch);
    let (_, kind) = program.sources(product);
    let size = (rows, product.columns, depth.phases());
    let processors = gpu.driver().info().processors;
    match Spread::of(kind, size, depth.chunks(), processors).splits {
        1 => 0,
        splits => [rows, product.columns, depth.phases(), splits, 4]
            .into_iter()
            .fold(1, usize::saturating_mul),
    }
}

/// A product whose weights are at `weights`, its biases and slopes beside them.
pub(super) fn lower(
    places: &Places<'_>,
    (step, product): (&Step, &Product),
    [weights, bias, slopes]: [u64; 3],
    pool: &mut Pool,
) -> Result<Vec<Launch>> {
    let program = places.program;
    let batch = places.batch(step.out);
    let (rows, depth) = shape(program, product, batch);
    let (_, operand) = program.sources(product);
    let phases = depth.phases();
    if product.form == Form::Gated && (product.image.is_some() || product.slopes.is_some()) {
        return Err(Error::Gpu(
            "a gated layer with slopes, or values of the picture, is not built for the gpu: use --device cpu".to_owned(),
        ));
    }
    let parts = product.parts.iter();
    let views = parts.flat_map(|part| part.sources.iter().map(move |view| (*view, part)));
    let sources = views.fold(Args::default(), |list, (view, part)| {
        source(list, places, view, part)
    });
    let sources = pool.put(&sources.finish()?)?;
    let chunks = pool.put(&depth.table()?)?;
    let (h, w) = match product.form {
        Form::Upsample => (product.size.0 / 2, product.size.1 / 2),
        _ => product.size,
    };
    let processors = pool.gpu().driver().info().processors;
    let size = (rows, product.columns, phases);
    let spread = Spread::of(operand, size, depth.chunks(), processors);
    let out = places.view(step.out);
    let arguments = Args::default()
        .long(sources)
        .long(chunks)
        .long(weights)
        .long(out.address)
        .long(places.workspace)
        .int(depth.chunks())
        .int(spread.splits)
        .int(phases)
        .int(rows)
        .int(h)
        .int(w)
        .int(product.columns)
        .int(out.kind.into());
    let arguments = epilogue(arguments, places, product, (bias, slopes)).finish()?;
    let across = |count: usize, tile: usize| -> Result<u32> {
        let fits = u32::try_from(count.div_ceil(tile)).ok();
        fits.ok_or_else(|| Error::Gpu("a layer is too large for the gpu's kernels".to_owned()))
    };
    let product_of = |kernel, (tile_rows, tile_columns), z, (threads, shared)| -> Result<Launch> {
        Ok(Launch {
            kernel,
            grid: [
                across(rows, tile_rows)?,
                across(product.columns, tile_columns)?,
                across(z, 1)?,
            ],
            threads,
            shared,
            arguments: arguments.clone(),
        })
    };
    let tile = (spread.tile, spread.tile);
    let room = (spread.threads, spread.shared);
    let mut launches = vec![product_of(
        spread.kernel,
        tile,
        phases * spread.splits,
        room,
    )?];
    if spread.splits > 1 {
        launches.push(product_of("product_finish", (8, 64), phases, (256, 0))?);
    }
    Ok(launches)
}

/// One of the kernel's `Source`s.
fn source(list: Args, places: &Places<'_>, picture: Picture, part: &Part) -> Args {
    let view = places.view(picture.value);
    // 16 bytes at a time, where rows begin at such
    let at_once = match places.program.values[picture.value].kind {
        Type::F32 => 4,
        Type::Bf16 => 8,
    };
    list.long(view.address)
        .int(view.channels)
        .int(places.batch(picture.value))
        .int(picture.h)
        .int(picture.w)
        .int(part.stride)
        .int(usize::from(part.wrap.x) + 2 * usize::from(part.wrap.y))
        .flag(view.channels.is_multiple_of(at_once))
        .int(0)
}

/// The kernel's `Epilogue`.
fn epilogue(
    arguments: Args,
    places: &Places<'_>,
    product: &Product,
    (bias, slopes): (u64, u64),
) -> Args {
    let columns = product.columns.max(1);
    let image = product.image.map(|image| places.view(image));
    let gate = product.gate.map(|(gate, slot)| (places.view(gate), slot));
    let residual = product.residual.map(|residual| places.view(residual));
    let wide = gate.map_or(1, |(gate, _)| gate.channels / columns);
    arguments
        .long(bias)
        .long(image.map_or(0, |image| image.address))
        .long(slopes)
        .long(gate.map_or(0, |(gate, _)| gate.address))
        .long(residual.map_or(0, |residual| residual.address))
        .long(residual.map_or(0, |residual| residual.len) as u64)
        .int(
            residual
                .map_or(kind(Type::F32), |residual| residual.kind)
                .into(),
        )
        .int(image.map_or(1, |image| image.len / columns))
        .int(gate.map_or(1, |(gate, _)| gate.len / columns / wide.max(1)))
        .int(wide)
        .int(gate.map_or(0, |(_, slot)| slot))
        .activation(product.activation)
        .float(product.scale.unwrap_or(1.0))
        .flag(product.form == Form::Gated)
        .int(product.size.0 * product.size.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enough_tiles_are_large_and_few_are_split() {
        let of = |rows, columns, phases, depth| {
            let spread = Spread::of(Type::Bf16, (rows, columns, phases), depth, 132);
            (spread.tile, spread.splits)
        };
        // 64 × 64 latents with guidance, 320 channels: 192 tiles of 128
        assert_eq!(of(8192, 320, 1, 90), (128, 1));
        // 8 × 8: 40 tiles of 64, for 264 places
        assert_eq!(of(128, 1280, 1, 360), (64, 7));
        // nothing to split
        assert_eq!(of(128, 1280, 1, 10), (64, 1));
        // four phases are as many tiles
        assert_eq!(of(2048, 640, 4, 80), (128, 1));
        assert_eq!(of(1, 4, 1, 100_000), (64, MOST));
    }
}
