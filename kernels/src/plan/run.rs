//! The machine that runs a program on the CPU: one arena, packed weights, and a loop over steps.

use std::sync::Arc;
use std::time::Instant;

use half::bf16;
use rayon::prelude::*;

use super::exec::{Taps, taps};
use super::feed::{Fed, feed, input_order, one_timestep, output_order};
use super::ir::{Form, Input, Output, Product, Program, Rate, Step, Type, Work};
use super::memory::{BEHIND, Memory};
use super::place::{Places, check_places, place};
use super::store::{Packed, Store, packed_bytes};
use super::{Feed, Options, Sizes};
use crate::cpu::Level;
use crate::cpu::aligned::Aligned;
use crate::cpu::attention::Shape;
use crate::cpu::epilogue::Stored;
use crate::cpu::norm::GroupNorm;
use crate::cpu::view::{Numbers, NumbersMut};
use crate::cpu::winograd;
use crate::op::Relative;
use crate::{Error, Result, profile};

/// Everything that running a program needs.
pub(super) struct Machine {
    level: Level,
    /// Values by `places`, and behind them what attention and the like need while they run.
    arena: Aligned<u8>,
    places: Places,
    /// Values of the timestep's rate, a row each timestep, by `tables`.
    rows: Aligned<f32>,
    tables: Tables,
    prepared: Vec<Prepared>,
    /// Whether what is computed once a run is there.
    constants: bool,
}

/// What depends on the timestep alone, for all timesteps of a run.
#[derive(Default)]
pub(super) struct Tables {
    /// Where the table `[timesteps, channels]` of each value begins.
    pub offsets: Vec<usize>,
    pub timesteps: Vec<f32>,
    /// The row of the current call.
    pub row: usize,
}

/// What a step reads beside values.
pub(super) enum Prepared {
    Product {
        /// None: to be packed when they are needed.
        weights: Option<Packed>,
        bias: Option<Arc<Vec<f32>>>,
        slopes: Option<Arc<Vec<f32>>>,
        /// Of each group, for each phase.
        taps: Vec<Vec<Taps>>,
    },
    Affine {
        weight: Arc<Vec<f32>>,
        bias: Arc<Vec<f32>>,
    },
    Table(Arc<Vec<f32>>),
    Nothing,
}

impl Machine {
    pub(super) fn new(program: &Program, options: &Options, store: &Store) -> Result<Self> {
        let places = place(program);
        check_places(program, &places)?;
        let bytes = places.bytes + most_workspace(program);
        let later = transient(program, options);
        let prepared = program.steps.par_iter().zip(later);
        let prepared =
            prepared.map(|(step, later)| prepare(program, step, (store, options.level, later)));
        let prepared = prepared.collect::<Result<Vec<_>>>()?;
        Ok(Self {
            level: options.level,
            arena: Aligned::zeros(bytes).map_err(|e| no_memory(bytes, &e))?,
            places,
            rows: Aligned::zeros(0).map_err(|e| no_memory(0, &e))?,
            tables: Tables {
                offsets: vec![0; program.values.len()],
                ..Tables::default()
            },
            prepared,
            constants: false,
        })
    }

    pub(super) fn arena_bytes(&self) -> usize {
        self.arena.len()
    }

    pub(super) fn prepare_timesteps(&mut self, program: &Program, timesteps: &[f32]) -> Result<()> {
        if self.tables.timesteps == timesteps {
            return Ok(());
        }
        let mut len = 0;
        for (value, offset) in program.values.iter().zip(&mut self.tables.offsets) {
            if value.rate == Rate::Timestep {
                *offset = len;
                len += (timesteps.len() * value.channels + BEHIND).next_multiple_of(16);
            }
        }
        if len > self.rows.len() {
            self.rows = Aligned::zeros(len).map_err(|e| no_memory(4 * len, &e))?;
        }
        self.tables.timesteps = timesteps.to_vec();
        for input in program
            .inputs
            .iter()
            .filter(|i| program.values[i.value].rate == Rate::Timestep)
        {
            let offset = self.tables.offsets[input.value];
            self.rows.as_mut_slice()[offset..offset + timesteps.len()].copy_from_slice(timesteps);
        }
        self.steps(program, Rate::Timestep)
    }

    pub(super) fn run(
        &mut self,
        program: &Program,
        feeds: &[Feed<'_>],
        out: &mut Vec<f32>,
    ) -> Result<()> {
        feed(self, program, feeds)?;
        if !self.constants {
            self.steps(program, Rate::Run)?;
            self.constants = true;
        }
        self.steps(program, Rate::Call)?;
        self.export(program, &program.output, out)
    }

    fn steps(&mut self, program: &Program, rate: Rate) -> Result<()> {
        let (level, workspace) = (self.level, self.places.bytes);
        let arena = self.arena.as_mut_slice();
        let (values, workspace) = arena.split_at_mut(workspace);
        let pointers = (values.as_mut_ptr(), self.rows.as_mut_slice().as_mut_ptr());
        // SAFETY: both are borrowed mutably until the steps are done, and have the sizes that `places` and `tables` say
        let memory = unsafe {
            Memory::new(
                pointers,
                &self.places,
                &self.tables,
                program,
                rate == Rate::Timestep,
            )
        };
        for (step, prepared) in program.steps.iter().zip(&self.prepared) {
            if program.values[step.out].rate == rate {
                let start = Instant::now();
                memory.step(level, step, prepared, workspace)?;
                profile::note(step.class, start.elapsed());
            }
        }
        Ok(())
    }

    /// A result of the last call in the recorded order of axes.
    pub(super) fn export(
        &mut self,
        program: &Program,
        output: &Output,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let value = &program.values[output.value];
        let pointers = (
            self.arena.as_mut_slice().as_mut_ptr(),
            self.rows.as_mut_slice().as_mut_ptr(),
        );
        // SAFETY: as in `steps`
        let memory = unsafe { Memory::new(pointers, &self.places, &self.tables, program, false) };
        let total: usize = output.shape.iter().product();
        out.clear();
        out.resize(total, 0.0);
        let at = output_order(value, output);
        match memory.read(output.value) {
            Numbers::F32(x) => out
                .par_iter_mut()
                .enumerate()
                .with_min_len(CHUNK)
                .for_each(|(i, out)| *out = x[at(i)]),
            Numbers::Bf16(x) => out
                .par_iter_mut()
                .enumerate()
                .with_min_len(CHUNK)
                .for_each(|(i, out)| *out = x[at(i)].to_f32()),
        }
        Ok(())
    }
}

impl Fed for Machine {
    fn constants(&mut self) -> &mut bool {
        &mut self.constants
    }

    fn seek(&mut self, program: &Program, timestep: &[f32]) -> Result<()> {
        let first = one_timestep(timestep)?;
        let row = self.tables.timesteps.iter().position(|&t| t == first);
        if row.is_none() {
            self.prepare_timesteps(program, &[first])?;
        }
        self.tables.row = row.unwrap_or(0);
        Ok(())
    }

    fn import(&mut self, program: &Program, input: &Input, values: &[f32]) -> Result<()> {
        let value = &program.values[input.value];
        let pointers = (
            self.arena.as_mut_slice().as_mut_ptr(),
            self.rows.as_mut_slice().as_mut_ptr(),
        );
        // SAFETY: as in `steps`
        let memory = unsafe { Memory::new(pointers, &self.places, &self.tables, program, false) };
        let at = input_order(value, input);
        // SAFETY: the only slice of the arena in use
        match unsafe { memory.write(input.value) } {
            NumbersMut::F32(out) => out
                .par_iter_mut()
                .enumerate()
                .with_min_len(CHUNK)
                .for_each(|(i, out)| *out = values[at(i)]),
            NumbersMut::Bf16(out) => out
                .par_iter_mut()
                .enumerate()
                .with_min_len(CHUNK)
                .for_each(|(i, out)| *out = Stored::of(values[at(i)])),
        }
        Ok(())
    }
}

/// Elements a task of import and export.
const CHUNK: usize = 1 << 14;

fn no_memory(bytes: usize, error: &std::io::Error) -> Error {
    Error::Memory(format!("no memory for {bytes} bytes of buffers: {error}"))
}

/// Packs the weights that a step reads, unless those of products are to be packed when they are needed.
fn prepare(
    program: &Program,
    step: &Step,
    (store, level, later): (&Store, Level, bool),
) -> Result<Prepared> {
    Ok(match &step.work {
        Work::Product(product) => {
            let (channels, kind) = program.sources(product);
            Prepared::Product {
                weights: match later {
                    false => Some(store.weights(product, &channels, (kind, level))?),
                    true => None,
                },
                bias: store.bias(product)?,
                slopes: match &product.slopes {
                    Some(slopes) => Some(store.vector(slopes)?),
                    None => None,
                },
                taps: taps(product),
            }
        }
        Work::GroupNorm { weight, bias, .. } | Work::LayerNorm { weight, bias, .. } => {
            Prepared::Affine {
                weight: store.vector(weight)?,
                bias: store.vector(bias)?,
            }
        }
        Work::Embed { table, .. }
        | Work::AddPositions { table, .. }
        | Work::Prelu { slopes: table, .. }
        | Work::RmsNorm { weight: table, .. } => Prepared::Table(store.vector(table)?),
        Work::Attention {
            q,
            k,
            heads,
            relative: Some(relative),
            ..
        } => {
            let table = store.vector(&relative.table)?;
            let lengths = (program.values[*q].pixels, program.values[*k].pixels);
            Prepared::Table(Arc::new(biases(relative, &table, *heads, lengths)))
        }
        Work::WindowAttention { q, windows, .. } => {
            let width = program.values[*q].channels / windows.heads.max(1);
            let tables = windows.tables(width, &|param| store.vector(param))?;
            Prepared::Table(Arc::new(tables))
        }
        _ => Prepared::Nothing,
    })
}

/// For each head the bias of every distance of a query from a key, from `1 − keys` on.
pub(super) fn biases(
    relative: &Relative,
    table: &[f32],
    heads: usize,
    (queries, keys): (usize, usize),
) -> Vec<f32> {
    let count = (queries + keys).saturating_sub(1);
    let of = |head: usize, i: usize| {
        let bucket = relative.bucket(keys.cast_signed() - 1 - i.cast_signed());
        table[bucket * heads + head]
    };
    (0..heads)
        .flat_map(|head| (0..count).map(move |i| of(head, i)))
        .collect()
}

/// For each step whether its weights are packed when they are needed: what is computed once a run or less reads them as seldom; what the file keeps
/// compressed would be more than it keeps; and there may be no room for all.
fn transient(program: &Program, options: &Options) -> Vec<bool> {
    let mut kept = 0usize;
    let steps = program.steps.iter();
    steps
        .map(|step| {
            let Work::Product(product) = &step.work else {
                return false;
            };
            let rare = options.transient || program.values[step.out].rate != Rate::Call;
            let plain = matches!(product.form, Form::Direct | Form::Gated);
            if rare || (plain && is_mostly_compressed(product)) {
                return true;
            }
            let (_, kind) = program.sources(product);
            let bytes = packed_bytes(product, (kind, options.level));
            let fits = kept.checked_add(bytes).filter(|&all| all <= options.keep);
            kept = fits.unwrap_or(kept);
            fits.is_none()
        })
        .collect()
}

/// Whether the file keeps most of a product's weights compressed. What stands beside them, such as a LoRA's, is little.
fn is_mostly_compressed(product: &Product) -> bool {
    let count = |compressed: bool| -> usize {
        let parts = product.parts.iter().map(|part| &part.weight);
        let of = parts.filter(|weight| weight.is_compressed() == compressed);
        of.map(|weight| weight.shape().iter().product::<usize>())
            .sum()
    };
    count(true) > count(false)
}

/// What a machine for `program` would take.
pub(super) fn sizes(program: &Program, options: &Options) -> Sizes {
    let mut sizes = Sizes {
        buffers: place(program).bytes + most_workspace(program),
        weights: 0,
        transient: 0,
    };
    for (step, later) in program.steps.iter().zip(transient(program, options)) {
        if let Work::Product(product) = &step.work {
            let (_, kind) = program.sources(product);
            let bytes = packed_bytes(product, (kind, options.level));
            if later {
                sizes.transient = sizes.transient.max(bytes);
            } else {
                sizes.weights += bytes;
            }
        }
    }
    sizes
}

/// The most that any step needs beside its values.
fn most_workspace(program: &Program) -> usize {
    let steps = program.steps.iter();
    steps
        .map(|step| workspace(program, step))
        .max()
        .unwrap_or(0)
}

/// Bytes that a step needs beside its values.
fn workspace(program: &Program, step: &Step) -> usize {
    let threads = rayon::current_num_threads();
    match &step.work {
        Work::Product(product) => {
            let Form::Winograd(form) = product.form else {
                return 0;
            };
            let views = product.parts.iter().flat_map(|part| &part.sources);
            let channels: Vec<usize> = views
                .clone()
                .map(|view| program.values[view.value].channels)
                .collect();
            let shape = winograd::Shape {
                form,
                pictures: (
                    program.values[step.out].batch,
                    product.size.0,
                    product.size.1,
                ),
                channels: &channels,
                columns: product.columns,
            };
            match program.values[product.parts[0].sources[0].value].kind {
                Type::F32 => shape.workspace_bytes::<f32>(threads),
                Type::Bf16 => shape.workspace_bytes::<bf16>(threads),
            }
        }
        Work::Attention {
            q,
            k,
            heads,
            causal,
            ..
        } => {
            let (q, k, out) = (
                &program.values[*q],
                &program.values[*k],
                &program.values[step.out],
            );
            let shape = Shape {
                batch: out.batch,
                queries: q.pixels,
                keys: k.pixels,
                heads: *heads,
                width: q.channels / heads,
                causal: *causal,
                kv_batch: k.batch,
                q_batch: q.batch,
            };
            match out.kind {
                Type::F32 => shape.workspace_bytes::<f32>(threads),
                Type::Bf16 => shape.workspace_bytes::<bf16>(threads),
            }
        }
        Work::GroupNorm { groups, .. } => {
            let out = &program.values[step.out];
            let ones = vec![0.0; out.channels];
            let norm = GroupNorm {
                batch: out.batch,
                pixels: out.pixels,
                groups: *groups,
                eps: 0.0,
                weight: &ones,
                bias: &ones,
                activation: None,
                given: None,
            };
            8 * norm.workspace_len()
        }
        Work::Match { source, sizes, .. } => {
            sizes.workspace_bytes(program.values[*source].channels)
        }
        _ => 0,
    }
}
