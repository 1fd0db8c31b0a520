//! The machine that runs a program on a GPU: one arena, weights on the card, and launches made once and replayed as one graph.
//!
//! A step becomes one to three launches whose arguments never change: the current timestep's row is copied to a place of its own before a call, so
//! that nothing in the graph depends on it. Weights that are read seldom, or for which there is no room, come to the card when their step is
//! reached.

mod args;
mod lower;
mod pointwise;
mod product;
mod weights;

use std::sync::Arc;

use half::bf16;
use rayon::prelude::*;

use super::feed::{Fed, feed, input_order, one_timestep, output_order};
use super::ir::{Input, Output, Program, Rate, Type, ValueId, Work};
use super::place::{check_places, place};
use super::store::Store;
use super::{Feed, Options, Sizes};
use crate::gpu::{Buffer, Gpu, GraphId, Launch};
use crate::{Result, profile};
use args::{View, kind};
use weights::Depth;

/// The kernels that plans launch.
pub const KERNELS: &[&str] = &[
    "flash_32",
    "flash_48",
    "flash_64",
    "flash_80",
    "flash_128",
    "flash_160",
    "flash_wide",
    "group_apply",
    "group_factors",
    "group_sums",
    "means",
    "plain_64",
    "plain_160",
    "plain_512",
    "pointwise",
    "product_64",
    "product_128",
    "product_f32",
    "product_finish",
    "row_norm",
];

/// What values and workspaces begin at multiples of.
const LINE: usize = 256;

/// Everything that running a program on a card needs.
pub(super) struct Machine {
    gpu: Gpu,
    arena: Buffer,
    /// Of each value in the arena; for those of the timestep's rate, of the current row.
    offsets: Vec<usize>,
    workspace: usize,
    /// For every step what it reads beside values.
    held: Vec<Held>,
    /// Launches of the steps that are no timestep's.
    steps: Vec<Vec<Launch>>,
    /// Small tables that launches read.
    pool: Pool,
    /// Where weights that come when they are needed are put.
    visiting: Option<Buffer>,
    timesteps: Timesteps,
    /// The steps of a call, all of which have their weights on the card.
    graph: Option<GraphId>,
    /// Whether what is computed once a run is there.
    constants: bool,
}

/// What depends on the timestep alone, for all timesteps of a run.
#[derive(Default)]
struct Timesteps {
    values: Vec<f32>,
    /// A row a timestep, each as the arena has the current one.
    rows: Option<Buffer>,
    /// The row that is in the arena.
    current: Option<usize>,
}

/// What a step reads beside values.
struct Held {
    /// A product's weights; none: they come when they are needed.
    weights: Option<Arc<Buffer>>,
    /// Biases, slopes, the weights of norms, tables.
    vectors: [Option<Arc<Buffer>>; 2],
}

impl Held {
    fn vectors(&self) -> [u64; 2] {
        let of = |buffer: &Option<Arc<Buffer>>| buffer.as_ref().map_or(0, |b| b.address());
        [of(&self.vectors[0]), of(&self.vectors[1])]
    }
}

/// Small tables on the card, many to a buffer.
struct Pool {
    gpu: Gpu,
    buffers: Vec<Buffer>,
    used: usize,
}

/// Bytes of a buffer of [`Pool`].
const POOL: usize = 1 << 20;

impl Pool {
    fn new(gpu: &Gpu) -> Self {
        Self {
            gpu: gpu.clone(),
            buffers: Vec::new(),
            used: POOL,
        }
    }

    fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Puts a table on the card; gives its address.
    fn put(&mut self, bytes: &[u8]) -> Result<u64> {
        if self.used + bytes.len() > self.buffers.last().map_or(0, Buffer::len) {
            self.buffers.push(self.gpu.buffer(bytes.len().max(POOL))?);
            self.used = 0;
        }
        let base = self.buffers.last().map_or(0, Buffer::address);
        let address = base + self.used as u64;
        self.gpu.driver().upload(address, bytes)?;
        self.used += bytes.len().next_multiple_of(LINE);
        Ok(address)
    }
}

/// Where values are, while launches are made.
struct Places<'a> {
    program: &'a Program,
    base: u64,
    offsets: &'a [usize],
    workspace: u64,
    /// While steps of the timestep's rate are made.
    whole: Option<Whole<'a>>,
}

/// Tables of the timestep's values, while they are made.
#[derive(Clone, Copy)]
struct Whole<'a> {
    base: u64,
    /// Where the table of each value begins.
    offsets: &'a [usize],
    timesteps: usize,
    /// What these steps need beside values: more than a call does, as there may be many timesteps.
    workspace: u64,
}

impl Places<'_> {
    /// Entries along the batch.
    fn batch(&self, value: ValueId) -> usize {
        let of = &self.program.values[value];
        match self.whole {
            Some(whole) if of.rate == Rate::Timestep => whole.timesteps,
            _ => of.batch,
        }
    }

    fn view(&self, value: ValueId) -> View {
        let of = &self.program.values[value];
        let address = match self.whole {
            Some(whole) if of.rate == Rate::Timestep => whole.base + whole.offsets[value] as u64,
            _ => self.base + self.offsets[value] as u64,
        };
        View {
            address,
            len: self.batch(value) * of.pixels * of.channels,
            kind: kind(of.kind),
            channels: of.channels,
        }
    }
}

/// Places of all values, those of the timestep's current row behind the others, and the bytes of all.
fn offsets(program: &Program) -> Result<(Vec<usize>, usize, usize)> {
    let places = place(program);
    check_places(program, &places)?;
    let (mut offsets, first) = (places.offsets, places.bytes.next_multiple_of(LINE));
    let mut end = first;
    for (value, offset) in program.values.iter().zip(&mut offsets) {
        if value.rate == Rate::Timestep {
            *offset = end;
            end += (value.channels * value.kind.bytes()).next_multiple_of(LINE);
        }
    }
    Ok((offsets, first, end))
}

/// The most that any step of a call or a run needs beside its values, or of those of the timestep for so many timesteps.
fn most_workspace(program: &Program, timesteps: Option<usize>, gpu: &Gpu) -> usize {
    let of = program.steps.iter().map(|step| {
        let out = &program.values[step.out];
        if (out.rate == Rate::Timestep) != timesteps.is_some() {
            return 0;
        }
        let batch = timesteps.unwrap_or(out.batch);
        match &step.work {
            Work::Product(product) => product::workspace(program, product, batch, gpu),
            _ => lower::workspace(program, step, batch),
        }
    });
    of.max().unwrap_or(0)
}

/// For each step whether its weights come when they are needed: those of networks that run seldom, and those for which no room is left.
fn visiting(program: &Program, options: &Options) -> Result<Vec<Option<usize>>> {
    let mut kept = 0usize;
    let steps = program.steps.iter();
    steps
        .map(|step| {
            let Work::Product(product) = &step.work else {
                return Ok(None);
            };
            let (_, kind) = program.sources(product);
            let bytes = Depth::of(program, product).bytes(product.columns, kind)?;
            let rare = options.transient || program.values[step.out].rate != Rate::Call;
            let fits = kept.checked_add(bytes).filter(|&all| all <= options.keep);
            match fits {
                Some(all) if !rare => {
                    kept = all;
                    Ok(None)
                }
                _ => Ok(Some(bytes)),
            }
        })
        .collect()
}

/// What a machine for `program` would take of the card's memory.
pub(super) fn sizes(program: &Program, options: &Options, gpu: &Gpu) -> Result<Sizes> {
    let (_, _, end) = offsets(program)?;
    let mut sizes = Sizes {
        buffers: end + most_workspace(program, None, gpu),
        weights: 0,
        transient: 0,
    };
    for (step, visits) in program.steps.iter().zip(visiting(program, options)?) {
        if let Work::Product(product) = &step.work {
            match visits {
                Some(bytes) => sizes.transient = sizes.transient.max(bytes),
                None => {
                    let (_, kind) = program.sources(product);
                    sizes.weights += Depth::of(program, product).bytes(product.columns, kind)?;
                }
            }
        }
    }
    Ok(sizes)
}

impl Machine {
    pub(super) fn new(
        program: &Program,
        options: &Options,
        (store, gpu): (&Store, &Gpu),
    ) -> Result<Self> {
        let (offsets, _, end) = offsets(program)?;
        let visits = visiting(program, options)?;
        let most = visits.iter().flatten().max();
        let visiting = most.map(|&bytes| gpu.buffer(bytes)).transpose()?;
        let arena = gpu.buffer(end + most_workspace(program, None, gpu))?;
        let mut held = Vec::with_capacity(program.steps.len());
        for (step, visits) in program.steps.iter().zip(&visits) {
            held.push(lower::hold(program, step, (store, gpu), visits.is_some())?);
        }
        let mut machine = Self {
            gpu: gpu.clone(),
            arena,
            offsets,
            workspace: end,
            held,
            steps: Vec::new(),
            pool: Pool::new(gpu),
            visiting,
            timesteps: Timesteps::default(),
            graph: None,
            constants: false,
        };
        for (i, step) in program.steps.iter().enumerate() {
            let launches = match program.values[step.out].rate {
                // made when the timesteps are known
                Rate::Timestep => Vec::new(),
                _ => machine.lower(program, i, None)?,
            };
            machine.steps.push(launches);
        }
        Ok(machine)
    }

    /// Launches of a step.
    fn lower(
        &mut self,
        program: &Program,
        step: usize,
        whole: Option<Whole<'_>>,
    ) -> Result<Vec<Launch>> {
        let places = Places {
            program,
            base: self.arena.address(),
            offsets: &self.offsets,
            workspace: match whole {
                Some(whole) => whole.workspace,
                None => self.arena.address() + self.workspace as u64,
            },
            whole,
        };
        let held = &self.held[step];
        let weights = match &held.weights {
            Some(weights) => weights.address(),
            None => self.visiting.as_ref().map_or(0, Buffer::address),
        };
        let [first, second] = held.vectors();
        let step = &program.steps[step];
        lower::lower(&places, step, [weights, first, second], &mut self.pool)
    }

    pub(super) fn arena_bytes(&self) -> usize {
        self.arena.len()
    }

    /// Brings a product's weights to the card, if they are to come now.
    fn bring(&self, program: &Program, step: usize) -> Result<()> {
        let (Work::Product(product), None, Some(visiting)) = (
            &program.steps[step].work,
            &self.held[step].weights,
            &self.visiting,
        ) else {
            return Ok(());
        };
        let weights = Depth::of(program, product).pack(program, product)?;
        self.gpu.driver().upload(visiting.address(), &weights)
    }

    pub(super) fn prepare_timesteps(&mut self, program: &Program, timesteps: &[f32]) -> Result<()> {
        if self.timesteps.values == timesteps {
            return Ok(());
        }
        let count = timesteps.len();
        // tables [timesteps, channels] of every value, while they are made
        let (mut tables, mut bytes) = (vec![0; program.values.len()], 0usize);
        for (value, offset) in program.values.iter().zip(&mut tables) {
            if value.rate == Rate::Timestep {
                *offset = bytes;
                let table = value.channels * value.kind.bytes() * count;
                bytes += table.next_multiple_of(LINE);
            }
        }
        self.timesteps = Timesteps::default();
        let made = self.gpu.buffer(bytes)?;
        for input in &program.inputs {
            if program.values[input.value].rate == Rate::Timestep {
                let numbers: Vec<u8> = timesteps.iter().flat_map(|t| t.to_le_bytes()).collect();
                let at = made.address() + tables[input.value] as u64;
                self.gpu.driver().upload(at, &numbers)?;
            }
        }
        let room = most_workspace(program, Some(count), &self.gpu);
        let room = self.gpu.buffer(room)?;
        // what launches of these steps read is not needed any longer afterwards
        let pool = std::mem::replace(&mut self.pool, Pool::new(&self.gpu));
        let whole = Whole {
            base: made.address(),
            offsets: &tables,
            timesteps: count,
            workspace: room.address(),
        };
        let done = self.timestep_steps(program, whole);
        self.pool = pool;
        done?;
        // then by rows, so that one copy makes one the current
        let first = self.first_row(program);
        let row = self.workspace - first;
        let rows = self.gpu.buffer(row * count)?;
        for (value, (offset, table)) in program.values.iter().zip(self.offsets.iter().zip(&tables))
        {
            let len = value.channels * value.kind.bytes();
            for i in 0..count * usize::from(value.rate == Rate::Timestep) {
                let from = made.address() + (table + i * len) as u64;
                let to = rows.address() + (i * row + offset - first) as u64;
                self.gpu.driver().copy(from, to, len)?;
            }
        }
        self.timesteps = Timesteps {
            values: timesteps.to_vec(),
            rows: Some(rows),
            current: None,
        };
        Ok(())
    }

    fn timestep_steps(&mut self, program: &Program, whole: Whole<'_>) -> Result<()> {
        for (i, step) in program.steps.iter().enumerate() {
            if program.values[step.out].rate == Rate::Timestep {
                let launches = self.lower(program, i, Some(whole))?;
                self.bring(program, i)?;
                for launch in &launches {
                    self.gpu.driver().launch(launch)?;
                }
            }
        }
        Ok(())
    }

    /// Where the current row begins in the arena.
    fn first_row(&self, program: &Program) -> usize {
        let values = program.values.iter().zip(&self.offsets);
        let rows = values.filter(|(value, _)| value.rate == Rate::Timestep);
        rows.map(|(_, &offset)| offset)
            .min()
            .unwrap_or(self.workspace)
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
        let visits = |i: usize| {
            let step = &program.steps[i];
            program.values[step.out].rate == Rate::Call
                && matches!(step.work, Work::Product(_))
                && self.held[i].weights.is_none()
        };
        if profile::is_measuring() || (0..program.steps.len()).any(visits) {
            self.steps(program, Rate::Call)?;
        } else {
            let graph = match self.graph {
                Some(graph) => graph,
                None => {
                    let all = self.launches(program, Rate::Call);
                    let graph = self.gpu.driver().graph(&all)?;
                    *self.graph.insert(graph)
                }
            };
            self.gpu.driver().replay(graph)?;
        }
        self.export(program, &program.output, out)
    }

    fn launches(&self, program: &Program, rate: Rate) -> Vec<Launch> {
        let steps = program.steps.iter().zip(&self.steps);
        let of = steps.filter(|(step, _)| program.values[step.out].rate == rate);
        of.flat_map(|(_, launches)| launches.iter().cloned())
            .collect()
    }

    /// Steps one by one.
    fn steps(&self, program: &Program, rate: Rate) -> Result<()> {
        for (i, step) in program.steps.iter().enumerate() {
            if program.values[step.out].rate != rate {
                continue;
            }
            self.bring(program, i)?;
            if profile::is_measuring() {
                let times = self.gpu.driver().time(&self.steps[i])?;
                profile::note(step.class, times.into_iter().sum());
                continue;
            }
            for launch in &self.steps[i] {
                self.gpu.driver().launch(launch)?;
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
        let size = value.kind.bytes();
        let mut bytes = vec![0; value.len() * size];
        let from = self.arena.address() + self.offsets[output.value] as u64;
        self.gpu.driver().download(from, &mut bytes)?;
        out.clear();
        out.resize(output.shape.iter().product(), 0.0);
        let at = output_order(value, output);
        out.par_iter_mut().enumerate().for_each(|(i, out)| {
            let from = &bytes[at(i) * size..][..size];
            *out = match *from {
                [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
                [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
                _ => f32::NAN,
            };
        });
        Ok(())
    }
}

impl Fed for Machine {
    fn constants(&mut self) -> &mut bool {
        &mut self.constants
    }

    fn seek(&mut self, program: &Program, timestep: &[f32]) -> Result<()> {
        let first = one_timestep(timestep)?;
        let row = match self.timesteps.values.iter().position(|&t| t == first) {
            Some(row) => row,
            None => {
                self.prepare_timesteps(program, &[first])?;
                0
            }
        };
        let Some(rows) = &self.timesteps.rows else {
            return Ok(());
        };
        if self.timesteps.current != Some(row) {
            let first = self.first_row(program);
            let bytes = self.workspace - first;
            let from = rows.address() + (row * bytes) as u64;
            let to = self.arena.address() + first as u64;
            self.gpu.driver().copy(from, to, bytes)?;
            self.timesteps.current = Some(row);
        }
        Ok(())
    }

    fn import(&mut self, program: &Program, input: &Input, values: &[f32]) -> Result<()> {
        let value = &program.values[input.value];
        let at = input_order(value, input);
        let len = value.kind.bytes();
        let mut bytes = vec![0; values.len() * len];
        let places = bytes.par_chunks_exact_mut(len).enumerate();
        match value.kind {
            Type::F32 => {
                places.for_each(|(i, to)| to.copy_from_slice(&values[at(i)].to_le_bytes()));
            }
            Type::Bf16 => places.for_each(|(i, to)| {
                to.copy_from_slice(&bf16::from_f32(values[at(i)]).to_le_bytes());
            }),
        }
        let to = self.arena.address() + self.offsets[input.value] as u64;
        self.gpu.driver().upload(to, &bytes)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(graph) = self.graph {
            self.gpu.driver().forget(graph);
        }
    }
}
