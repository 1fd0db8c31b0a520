//! Launches of `pointwise.cu`.

use super::super::ir::{Step, ValueId, Work};
use super::args::{Args, View};
use super::lower::{THREADS, across, floats, launch};
use super::{Places, Pool};
use crate::gpu::Launch;
use crate::op::PatchOrder;
use crate::{Activation, Error, Result};

/// What a number of the result is, in the order of `What` in `pointwise.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Activate,
    Prelu,
    Shift,
    Add,
    Multiply,
    Geglu,
    AddChannels,
    ScaleShift,
    Affine,
    Gate,
    Join,
    Tokens,
    Patchify,
    UnpatchifyChannelsFirst,
    UnpatchifyChannelsLast,
    Upsample,
    AveragePool,
    Sinusoid,
    Embed,
    AddPositions,
    Rotate,
    Place,
}

/// The kernel's struct, as far as an operation uses it.
struct Pointwise {
    what: What,
    a: View,
    b: View,
    table: u64,
    places: u64,
    activation: Option<Activation>,
    scale: f32,
    shift: f32,
    numbers: [usize; 6],
}

impl Pointwise {
    fn new(what: What, a: View) -> Self {
        Self {
            what,
            a,
            b: View::default(),
            table: 0,
            places: 0,
            activation: None,
            scale: 0.0,
            shift: 0.0,
            numbers: [0; 6],
        }
    }

    fn with(self, b: View) -> Self {
        Self { b, ..self }
    }

    fn table(self, table: u64) -> Self {
        Self { table, ..self }
    }

    fn numbers<const N: usize>(mut self, numbers: [usize; N]) -> Self {
        for (to, from) in self.numbers.iter_mut().zip(numbers) {
            *to = from;
        }
        self
    }

    /// Writes `channels` numbers of each row of `out`.
    fn launch(self, places: &Places<'_>, out: ValueId, channels: usize) -> Result<Launch> {
        let (to, rows, across) = (places.view(out), places.rows(out), across(channels));
        let arguments = Args::default()
            .view(self.a)
            .view(self.b)
            .long(self.table)
            .long(self.places)
            .long(to.address)
            .int(self.what as usize)
            .int(to.kind.into())
            .int(rows)
            .int(channels)
            .int(places.pixels(out).max(1))
            .int(across)
            .activation(self.activation)
            .float(self.scale)
            .float(self.shift);
        let arguments = self.numbers.into_iter().fold(arguments, Args::int);
        let blocks = rows.div_ceil(THREADS / across);
        launch("pointwise", (blocks, 1, 1), THREADS, arguments)
    }
}

/// Launches of a pointwise step, whose table is at `held`.
pub(super) fn lower(
    places: &Places<'_>,
    step: &Step,
    held: u64,
    pool: &mut Pool,
) -> Result<Vec<Launch>> {
    let view = |value: &ValueId| places.view(*value);
    let new = |what, value: &ValueId| Pointwise::new(what, places.view(*value));
    let work = match &step.work {
        Work::Activate(x, activation) => Pointwise {
            activation: Some(*activation),
            ..new(What::Activate, x)
        },
        Work::Prelu { source, .. } => new(What::Prelu, source).table(held),
        Work::Shift { source, values } => {
            new(What::Shift, source).table(pool.put(&floats(values)?)?)
        }
        Work::Add(a, b) => new(What::Add, a).with(view(b)),
        Work::Multiply(a, b) => new(What::Multiply, a).with(view(b)),
        Work::Geglu(x) => new(What::Geglu, x),
        Work::AddChannels(a, b) => new(What::AddChannels, a).with(view(b)),
        Work::ScaleShift(a, b) => new(What::ScaleShift, a).with(view(b)),
        Work::Affine {
            source,
            scale,
            shift,
        } => Pointwise {
            scale: *scale,
            shift: *shift,
            ..new(What::Affine, source)
        },
        Work::Gate {
            source,
            values,
            slot,
        } => new(What::Gate, source).with(view(values)).numbers([*slot]),
        Work::Join(a, b) => {
            let lengths = [places.pixels(*a), places.pixels(*b)];
            new(What::Join, a).with(view(b)).numbers(lengths)
        }
        Work::Tokens { source, first } => {
            new(What::Tokens, source).numbers([places.pixels(*source), *first])
        }
        Work::Patchify { source, patch } => {
            new(What::Patchify, &source.value).numbers([source.h, source.w, *patch])
        }
        Work::Unpatchify {
            source,
            patch,
            order,
        } => {
            let what = match order {
                PatchOrder::ChannelsFirst => What::UnpatchifyChannelsFirst,
                PatchOrder::ChannelsLast => What::UnpatchifyChannelsLast,
            };
            new(what, &source.value).numbers([source.h, source.w, *patch])
        }
        Work::Upsample { source, h, w } => {
            new(What::Upsample, &source.value).numbers([source.h, source.w, *h, *w])
        }
        Work::AveragePool(source) => {
            new(What::AveragePool, &source.value).numbers([source.h, source.w])
        }
        Work::Sinusoid {
            source,
            flip_sin_to_cos,
            freq_shift,
        } => {
            let half = places.channels(step.out) / 2;
            Pointwise {
                scale: -10_000f32.ln(),
                shift: (half as f64 - freq_shift) as f32,
                ..new(What::Sinusoid, source).numbers([usize::from(*flip_sin_to_cos)])
            }
        }
        Work::Embed { ids, table } => {
            let rows = table.shape().first().copied().unwrap_or(0);
            new(What::Embed, ids).table(held).numbers([rows])
        }
        Work::AddPositions { source, rows, .. } => Pointwise {
            places: match rows {
                Some(rows) => pool.put(&words(rows))?,
                None => 0,
            },
            ..new(What::AddPositions, source).table(held)
        },
        Work::Rotate {
            source,
            heads,
            turns,
        } => {
            let turns: Vec<f32> = turns.iter().flatten().copied().collect();
            let table = pool.put(&floats(&turns)?)?;
            new(What::Rotate, source).table(table).numbers([*heads])
        }
        Work::Concat(pieces) => {
            let mut first = 0;
            let whole = places.channels(step.out);
            return pieces
                .iter()
                .map(|piece| {
                    let channels = places.channels(*piece);
                    let piece = new(What::Place, piece).numbers([whole, first]);
                    first += channels;
                    piece.launch(places, step.out, channels)
                })
                .collect();
        }
        Work::Means(source) => {
            let (pixels, channels) = (places.pixels(*source), places.channels(*source));
            let arguments = Args::default()
                .view(places.view(*source))
                .long(places.view(step.out).address)
                .int(pixels)
                .int(channels);
            let blocks = (channels.div_ceil(8), places.batch(step.out), 1);
            return Ok(vec![launch("means", blocks, THREADS, arguments)?]);
        }
        other => return Err(not_built(other)),
    };
    Ok(vec![work.launch(
        places,
        step.out,
        places.channels(step.out),
    )?])
}

/// Rows as the kernel reads them.
fn words(rows: &[usize]) -> Vec<u8> {
    let rows = rows
        .iter()
        .map(|&row| u32::try_from(row).unwrap_or(u32::MAX));
    rows.flat_map(u32::to_le_bytes).collect()
}

fn not_built(work: &Work) -> Error {
    let name = match work {
        Work::WindowAttention { .. } => "attention in windows (SwinIR and its kin)",
        Work::AttentionMass { .. } => "the mass of attention (self-attention guidance)",
        Work::LowFrequencies { .. } | Work::Amplify { .. } => "FreeU",
        Work::Match { .. } | Work::Merge { .. } | Work::Unmerge { .. } => "token merging",
        _ => "an operation of this network",
    };
    Error::Gpu(format!("{name} is not built for the gpu: use --device cpu"))
}
