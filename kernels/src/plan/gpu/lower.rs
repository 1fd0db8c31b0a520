//! Steps as launches: norms and attention here, products and what is pointwise in modules of their own.

use std::sync::Arc;

use super::super::ir::{Product, Program, Step, Type, ValueId, Work};
use super::super::run::biases;
use super::super::store::Store;
use super::args::{Args, View};
use super::weights::{self, Depth, file_column};
use super::{Held, Places, Pool, pointwise, product};
use crate::gpu::{Buffer, Gpu, Launch};
use crate::{Error, Param, Result, Window};

/// Threads of a block of the norms' and pointwise kernels.
pub(super) const THREADS: usize = 256;
/// Parts of a picture whose sums are taken apart, over all lines of threads.
const PARTS: usize = 512;
/// Values side by side that a norm's kernels take.
const SIDES: usize = 4;

/// Reads what a step needs beside values, and puts it on the card.
pub(super) fn hold(
    program: &Program,
    step: &Step,
    (store, gpu): (&Store, &Gpu),
    visits: bool,
) -> Result<Held> {
    let vector = |param: &Param| -> Result<Option<Arc<Buffer>>> {
        let key = param.name().to_owned();
        Ok(Some(
            store.on_card(gpu, key, || floats(&store.vector(param)?))?,
        ))
    };
    let mut held = Held {
        weights: None,
        vectors: [None, None],
    };
    match &step.work {
        Work::Product(product) => {
            if !visits {
                let depth = Depth::of(program, product);
                let make = || depth.pack(program, product);
                held.weights = Some(store.weights_on_card((program, product), gpu, make)?);
            }
            if let Some(bias) = bias(product, store)? {
                held.vectors[0] = Some(Arc::new(gpu.holding(&floats(&bias)?)?));
            }
            if let Some(slopes) = &product.slopes {
                held.vectors[1] = vector(slopes)?;
            }
        }
        Work::GroupNorm { weight, bias, .. } | Work::LayerNorm { weight, bias, .. } => {
            held.vectors = [vector(weight)?, vector(bias)?];
        }
        Work::Embed { table, .. }
        | Work::AddPositions { table, .. }
        | Work::Prelu { slopes: table, .. }
        | Work::RmsNorm { weight: table, .. } => held.vectors[0] = vector(table)?,
        Work::Attention {
            q,
            k,
            heads,
            relative: Some(relative),
            ..
        } => {
            let table = store.vector(&relative.table)?;
            let lengths = (program.values[*q].pixels, program.values[*k].pixels);
            let biases = biases(relative, &table, *heads, lengths);
            held.vectors[0] = Some(Arc::new(gpu.holding(&floats(&biases)?)?));
        }
        _ => {}
    }
    Ok(held)
}

/// The sum of a product's biases, in the order of its columns on the card.
fn bias(product: &Product, store: &Store) -> Result<Option<Vec<f32>>> {
    let sum = store.sum_of_biases(product)?;
    Ok(sum.map(|bias| {
        let columns = 0..bias.len();
        columns
            .map(|column| bias[file_column(product, column)])
            .collect()
    }))
}

/// Numbers as bytes.
pub(super) fn floats(numbers: &[f32]) -> Result<Vec<u8>> {
    let mut bytes = vec![0; numbers.len() * 4];
    weights::write(Type::F32, numbers.iter().copied(), &mut bytes);
    Ok(bytes)
}

/// Bytes that a step needs beside its values, for so many entries along the batch: a group norm's sums of parts, then factors.
pub(super) fn workspace(program: &Program, step: &Step, batch: usize) -> usize {
    let channels = match &step.work {
        Work::GroupNorm { .. } => program.values[step.out].channels,
        Work::Statistics { source, .. } => program.values[source.value].channels,
        _ => return 0,
    };
    [batch, PARTS + 1, channels, 8]
        .into_iter()
        .fold(1, usize::saturating_mul)
}

/// Launches of a step whose weights, and other vectors, are at the given addresses.
pub(super) fn lower(
    places: &Places<'_>,
    step: &Step,
    held: [u64; 3],
    pool: &mut Pool,
) -> Result<Vec<Launch>> {
    let [_, first, second] = held;
    match &step.work {
        Work::Product(work) => product::lower(places, (step, work), held, pool),
        Work::GroupNorm { .. } | Work::Statistics { .. } => {
            group_norm(places, step, (first, second))
        }
        Work::LayerNorm { source, eps, .. } => {
            let norm = RowNorm::new(places.channels(step.out), *eps, LAYER);
            let vectors = RowNorm {
                weight: first,
                bias: second,
                ..norm
            };
            vectors.lower(places, *source, step.out)
        }
        Work::RmsNorm {
            source,
            eps,
            weight,
        } => {
            let width = weight.shape().first().copied().unwrap_or(1);
            let norm = RowNorm {
                weight: first,
                ..RowNorm::new(width, *eps, RMS)
            };
            norm.lower(places, *source, step.out)
        }
        Work::AdaptiveNorm {
            source,
            values,
            eps,
            shift,
            scale,
        } => {
            let norm = RowNorm {
                values: Some((places.view(*values), *shift, *scale)),
                ..RowNorm::new(places.channels(step.out), *eps, ADAPTIVE)
            };
            norm.lower(places, *source, step.out)
        }
        Work::Attention {
            q,
            k,
            v,
            heads,
            causal,
            ..
        } => attention(places, ([*q, *k, *v], step.out), (*heads, *causal), first),
        _ => pointwise::lower(places, step, first, pool),
    }
}

impl Places<'_> {
    pub(super) fn channels(&self, value: ValueId) -> usize {
        self.program.values[value].channels
    }

    pub(super) fn pixels(&self, value: ValueId) -> usize {
        self.program.values[value].pixels
    }

    /// Pixels of all pictures.
    pub(super) fn rows(&self, value: ValueId) -> usize {
        self.batch(value) * self.pixels(value)
    }
}

/// Threads side by side along so many channels.
pub(super) fn across(channels: usize) -> usize {
    channels.next_power_of_two().clamp(1, THREADS)
}

/// A launch of so many blocks, by pictures or the like.
pub(super) fn launch(
    kernel: &'static str,
    (x, y, z): (usize, usize, usize),
    threads: usize,
    arguments: Args,
) -> Result<Launch> {
    let large =
        || Error::Gpu("a layer is too large for the gpu's kernels: use --device cpu".to_owned());
    let count = |n: usize, most: usize| match u32::try_from(n) {
        Ok(count) if n <= most => Ok(count),
        _ => Err(large()),
    };
    Ok(Launch {
        kernel,
        // what the hardware takes
        grid: [
            count(x, (1 << 31) - 1)?,
            count(y, 65_535)?,
            count(z, 65_535)?,
        ],
        threads: count(threads, 1024)?,
        shared: 0,
        arguments: arguments.finish()?,
    })
}

fn sides(places: &Places<'_>, sources: &[ValueId], pixels: usize) -> Result<Args> {
    if sources.len() > SIDES {
        return Err(Error::Gpu(format!(
            "a norm over {} values side by side is not built for the gpu: use --device cpu",
            sources.len()
        )));
    }
    let mut list = Args::default();
    for i in 0..SIDES {
        let view = sources.get(i).map(|&source| places.view(source));
        list = list.view(view.unwrap_or_default());
    }
    Ok(list.int(sources.len()).int(pixels))
}

fn group_norm(places: &Places<'_>, step: &Step, (weight, bias): (u64, u64)) -> Result<Vec<Launch>> {
    let (sources, groups, eps, part, given) = match &step.work {
        Work::GroupNorm {
            sources,
            groups,
            eps,
            given,
            ..
        } => {
            let whole = Window {
                top: 0,
                left: 0,
                height: 1,
                width: places.pixels(step.out),
            };
            (sources.clone(), *groups, *eps, (whole, whole.width), *given)
        }
        Work::Statistics {
            source,
            groups,
            part,
        } => (vec![source.value], *groups, 0.0, (*part, source.w), None),
        _ => return Err(Error::Mixed { op: "group norm" }),
    };
    let first = sources.first().copied().unwrap_or(step.out);
    let pixels = places.pixels(first);
    let channels: usize = sources.iter().map(|&s| places.channels(s)).sum();
    let is_norm = matches!(step.work, Work::GroupNorm { .. });
    let batch = places.batch(step.out);
    let sides = || sides(places, &sources, pixels);
    let (window, width) = part;
    let across = across(channels);
    let lines = THREADS / across;
    let count = window.height * window.width;
    // a part of less than 32 pixels is not worth a line of threads
    let parts = count
        .div_ceil(32)
        .clamp(1, PARTS)
        .next_multiple_of(lines)
        .min(PARTS);
    let factors = places.workspace + (batch * PARTS * channels * 8) as u64;
    let mut launches = Vec::with_capacity(3);
    if given.is_none() {
        let sums = sides()?
            .long(places.workspace)
            .int(channels)
            .int(parts)
            .int(width)
            .int(window.top)
            .int(window.left)
            .int(window.height)
            .int(window.width)
            .int(across);
        launches.push(launch(
            "group_sums",
            (parts / lines, batch, 1),
            THREADS,
            sums,
        )?);
    }
    let given = given.map(|given| places.view(given));
    let out = places.view(step.out);
    let of_groups = sides()?
        .long(places.workspace)
        .long(given.map_or(0, |given| given.address))
        .long(weight)
        .long(bias)
        .long(factors)
        .long(if is_norm { 0 } else { out.address })
        .int(given.map_or(1, |given| given.len / (2 * groups)))
        .int(channels)
        .int(groups)
        .int(parts)
        .int(count)
        .float(eps as f32);
    launches.push(launch("group_factors", (groups, batch, 1), 128, of_groups)?);
    if let Work::GroupNorm { activation, .. } = &step.work {
        let rows = places.rows(step.out);
        let apply = sides()?
            .long(factors)
            .long(out.address)
            .int(out.kind.into())
            .int(channels)
            .int(rows)
            .int(across)
            .activation(*activation);
        launches.push(launch(
            "group_apply",
            (rows.div_ceil(lines), 1, 1),
            THREADS,
            apply,
        )?);
    }
    Ok(launches)
}

const LAYER: usize = 0;
const ADAPTIVE: usize = 1;
const RMS: usize = 2;

/// A norm of rows.
struct RowNorm {
    width: usize,
    eps: f64,
    mode: usize,
    weight: u64,
    bias: u64,
    /// The sequences' own vectors, and the places of shift and scale in them.
    values: Option<(View, usize, usize)>,
}

impl RowNorm {
    fn new(width: usize, eps: f64, mode: usize) -> Self {
        Self {
            width: width.max(1),
            eps,
            mode,
            weight: 0,
            bias: 0,
            values: None,
        }
    }

    fn lower(&self, places: &Places<'_>, source: ValueId, out: ValueId) -> Result<Vec<Launch>> {
        let to = places.view(out);
        let rows = to.len / self.width;
        let (values, shift, scale) = self.values.unwrap_or_default();
        let arguments = Args::default()
            .view(places.view(source))
            .long(self.weight)
            .long(self.bias)
            .long(values.address)
            .long(to.address)
            .int((values.len / values.channels.max(1)).max(1))
            .int(values.channels / self.width)
            .int(shift)
            .int(scale)
            .int(places.pixels(out).max(1))
            .int(to.kind.into())
            .int(self.width)
            .int(rows)
            .int(self.mode)
            .float(self.eps as f32);
        Ok(vec![launch(
            "row_norm",
            (rows.div_ceil(8), 1, 1),
            THREADS,
            arguments,
        )?])
    }
}

/// Queries of a block of the kernels `flash_*`.
const QUERIES: usize = 64;
/// Their kernels: the widest head of each, keys at a time.
const FLASH: [(usize, &str, usize); 6] = [
    (32, "flash_32", 64),
    (48, "flash_48", 64),
    (64, "flash_64", 64),
    (80, "flash_80", 64),
    (128, "flash_128", 32),
    (160, "flash_160", 32),
];
/// Columns of a block of `flash_wide`, which takes heads of any width.
const SLICE: usize = 128;
/// Its shared memory: two parts of 64 columns of queries and keys, and 64 values.
const SHARED_WIDE: usize = 2 * 2 * 64 * (64 + 8) * 2 + 64 * (SLICE + 8) * 2;
/// Those that take anything, by the widest head.
const PLAIN: [(usize, &str); 3] = [(64, "plain_64"), (160, "plain_160"), (512, "plain_512")];

fn attention(
    places: &Places<'_>,
    ([q, k, v], out): ([ValueId; 3], ValueId),
    (heads, causal): (usize, bool),
    bias: u64,
) -> Result<Vec<Launch>> {
    let (queries, keys) = (places.pixels(q), places.pixels(k));
    let width = places.channels(q) / heads.max(1);
    let to = places.view(out);
    let scale = match bias {
        0 => 1.0 / (width as f32).sqrt(),
        _ => 1.0,
    };
    let arguments = Args::default()
        .long(places.view(q).address)
        .long(places.view(k).address)
        .long(places.view(v).address)
        .long(to.address)
        .long(bias)
        .int(places.batch(q))
        .int(places.batch(k))
        .int(queries)
        .int(keys)
        .int(heads)
        .int(width)
        .int(to.kind.into())
        .flag(causal)
        .float(scale)
        .int(0);
    let batch = places.batch(out);
    let is_plain = causal || bias != 0 || to.kind == 0 || !width.is_multiple_of(8) || keys == 0;
    let flash = FLASH.iter().find(|(most, ..)| width <= *most);
    if let (false, Some((wide, kernel, at_once))) = (is_plain, flash) {
        let grid = (queries.div_ceil(QUERIES), heads, batch);
        let launch = launch(kernel, grid, 128, arguments)?;
        // queries, and keys and values twice
        let rows = QUERIES + 4 * at_once;
        return Ok(vec![Launch {
            shared: rows * (wide + 8) * 2,
            ..launch
        }]);
    }
    if !is_plain {
        let grid = (
            queries.div_ceil(QUERIES),
            heads * width.div_ceil(SLICE),
            batch,
        );
        return Ok(vec![Launch {
            shared: SHARED_WIDE,
            ..launch("flash_wide", grid, 128, arguments)?
        }]);
    }
    let Some((_, kernel)) = PLAIN.iter().find(|(most, _)| width <= *most) else {
        return Err(Error::Gpu(format!(
            "attention heads {width} wide are not built for the gpu: use --device cpu"
        )));
    };
    let grid = (queries.div_ceil(4), heads, batch);
    Ok(vec![launch(kernel, grid, 128, arguments)?])
}
