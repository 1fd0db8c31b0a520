//! Plans: a network recorded at one shape, made into steps over known buffers, and run on the CPU or a card.
//!
//! [`Plan::compile`] takes the recorded graph through four passes: what can be fused is (`fuse`), every value gets a type (`types`), a rate (once a timestep,
//! once a run, or at every call) and a place in one arena (`place`), and weights are packed into the layout of the kernels that read them (`store`).
//! [`Plan::run`] then only calls kernels: nothing is allocated, nothing is decided.
//!
//! Exact savings that fall out of the rates and batches: what depends on the text alone is computed once a run; what depends on the timestep
//! alone once for all timesteps, as one product; and what comes before the text is known (both halves of guidance see the same picture) at half
//! the batch.

#[allow(unsafe_code)]
mod exec;
mod features;
mod feed;
mod fuse;
mod gpu;
mod ir;
#[allow(unsafe_code)]
mod memory;
mod merging;
mod place;
mod pointwise;
#[allow(unsafe_code)]
mod run;
mod store;
#[cfg(test)]
mod tests;
mod types;

use std::borrow::Cow;

pub use gpu::KERNELS;
use ir::{Form, Part, Program, Rate};
pub use store::Store;

use crate::cpu::{Level, winograd};
use crate::gpu::Gpu;
use crate::graph::Graph;
use crate::{Error, Padding, Result, Tensor};

/// The arithmetic of products. Norms, softmax and sums are f32 in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Precision {
    /// 32-bit throughout.
    F32,
    /// Operands of products in bf16, sums in f32. Needs [`Level::Avx512Bf16`] or more.
    Bf16,
}

impl Precision {
    fn is_bf16(self) -> bool {
        self == Self::Bf16
    }
}

/// How a plan is to be made.
#[derive(Debug, Clone)]
pub struct Options {
    /// The instruction set, on the processor.
    pub level: Level,
    /// The card that runs the plan, in the processor's place.
    pub gpu: Option<Gpu>,
    /// The arithmetic.
    pub precision: Precision,
    /// The input that is the same for the whole batch and known before a run: the timestep.
    pub timestep: Option<&'static str>,
    /// Inputs that stay the same during a run: the text.
    pub constant: Vec<Cow<'static, str>>,
    /// Whether weights are packed each time they are needed, and let go of: for a network that runs seldom.
    pub transient: bool,
    /// The most bytes of packed weights that are kept; the others are packed each time, as all are that the file keeps compressed.
    pub keep: usize,
    /// Inputs whose second half equals the first, as guidance has it; they are given by half. With more [`Options::copies`] a smaller part.
    pub halved: Vec<Cow<'static, str>>,
    /// How often what those inputs hold is in a batch.
    pub copies: usize,
}

impl Options {
    /// For a network all of whose inputs change at every call, on the card that was chosen for this process, if one was.
    pub fn new(level: Level, precision: Precision) -> Self {
        Self {
            level,
            gpu: crate::gpu::chosen().cloned(),
            precision,
            timestep: None,
            transient: false,
            keep: usize::MAX,
            constant: Vec::new(),
            halved: Vec::new(),
            copies: 2,
        }
    }

    /// Rate and batch of an input.
    fn input(&self, name: &str, shape: &[usize]) -> (Rate, usize) {
        let batch = shape.first().copied().unwrap_or(1);
        if self.timestep == Some(name) {
            return (Rate::Timestep, 1);
        }
        let rate = if self.constant.iter().any(|constant| constant == name) {
            Rate::Run
        } else {
            Rate::Call
        };
        let copies = match self.halved.iter().any(|halved| halved == name)
            && batch.is_multiple_of(self.copies)
        {
            true => self.copies.max(1),
            false => 1,
        };
        (rate, batch / copies)
    }

    /// The form in which a convolution of `columns` results a pixel, `size` pixels high and wide, is computed.
    ///
    /// `most` is how many pixels the largest picture of the network has.
    ///
    /// Winograd's forms take 2.25 and 4 times fewer products, and 1.8 and 4 times the memory for weights. F(4×4) in bf16 rounds too much, and
    /// where products are of tiles the transforms alone would take longer than all products of the definition.
    fn form(&self, part: &Part, columns: usize, (size, most): ((usize, usize), usize)) -> Form {
        let channels = part.weight.shape().get(1).copied().unwrap_or(0);
        let is_3x3 = part.kernel == (3, 3) && part.stride == 1 && part.padding == Padding::same(1);
        // few channels or pixels: transforms cost more than they save. The lowest level has most weights and least work
        let pixels = size.0 * size.1;
        let worth = pixels >= 16 * 16 || (pixels >= 8 * 8 && 16 * pixels >= most);
        let by_tiles = self.precision.is_bf16() && self.level == Level::Amx;
        if self.gpu.is_some() || !is_3x3 || channels.min(columns) < 32 || !worth || by_tiles {
            return Form::Direct;
        }
        if self.precision.is_bf16() {
            return Form::Winograd(winograd::Form::F2);
        }
        let weights = channels.saturating_mul(columns);
        let tiles = size.0.div_ceil(4) * size.1.div_ceil(4);
        if tiles >= 64 && (self.transient || weights <= SMALL) {
            Form::Winograd(winograd::Form::F4)
        } else if self.transient || weights <= 4 * SMALL {
            Form::Winograd(winograd::Form::F2)
        } else {
            Form::Direct
        }
    }
}

/// Weights whose fourfold size in f32 does not matter: those of the levels with most pixels.
const SMALL: usize = 320 * 960;

/// A network at one shape, ready to run.
pub struct Plan {
    program: Program,
    machine: Machine,
}

/// What runs it.
enum Machine {
    Cpu(run::Machine),
    Gpu(Box<gpu::Machine>),
}

/// Bytes that a plan takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Values between steps, and what steps need while they run.
    pub buffers: usize,
    /// Packed weights that are kept.
    pub weights: usize,
    /// The most that are packed for one step and let go of.
    pub transient: usize,
}

/// One input of a call.
#[derive(Debug, Clone, Copy)]
pub struct Feed<'a> {
    /// As the network declared it.
    pub name: &'a str,
    /// Its numbers in the declared order (`[b, c, h, w]` and so on; ids as numbers), by half where [`Options::halved`] says so.
    pub values: &'a [f32],
}

impl Plan {
    /// Makes a plan of what `output`, a node of `graph`, needs.
    ///
    /// # Errors
    /// When a weight cannot be read or memory is short.
    pub fn compile(
        graph: &Graph,
        output: &Tensor,
        options: &Options,
        store: &Store,
    ) -> Result<Self> {
        Self::compile_tapped(graph, (output, &[]), options, store)
    }

    /// The same, keeping values inside the network beside its result: [`Plan::tap`] gives them after a call.
    ///
    /// # Errors
    /// As [`Plan::compile`].
    pub fn compile_tapped(
        graph: &Graph,
        (output, taps): (&Tensor, &[Tensor]),
        options: &Options,
        store: &Store,
    ) -> Result<Self> {
        let program = program(graph, (output, taps), options)?;
        let machine = match &options.gpu {
            None => Machine::Cpu(run::Machine::new(&program, options, store)?),
            Some(gpu) => {
                let machine = gpu::Machine::new(&program, options, (store, gpu))?;
                Machine::Gpu(Box::new(machine))
            }
        };
        Ok(Self { program, machine })
    }

    /// What [`Plan::compile`] would take, without taking it.
    ///
    /// # Errors
    /// When the graph cannot be planned.
    pub fn sizes(graph: &Graph, output: &Tensor, options: &Options) -> Result<Sizes> {
        let program = program(graph, (output, &[]), options)?;
        match &options.gpu {
            None => Ok(run::sizes(&program, options)),
            Some(gpu) => gpu::sizes(&program, options, gpu),
        }
    }

    /// The names of the inputs.
    pub fn inputs(&self) -> impl Iterator<Item = &str> {
        self.program.inputs.iter().map(|input| input.name.as_str())
    }

    /// The shape of the result.
    pub fn output_shape(&self) -> &[usize] {
        &self.program.output.shape
    }

    /// The shapes of what is kept beside it.
    pub fn tap_shapes(&self) -> impl Iterator<Item = &[usize]> {
        self.program.taps.iter().map(|tap| tap.shape.as_slice())
    }

    /// What the last call left at tap `index`, in the recorded order of axes.
    ///
    /// # Errors
    /// When there is no such tap.
    pub fn tap(&mut self, index: usize, out: &mut Vec<f32>) -> Result<()> {
        let tap = self.program.taps.get(index);
        let tap = tap.ok_or(Error::Mixed { op: "tap" })?;
        match &mut self.machine {
            Machine::Cpu(machine) => machine.export(&self.program, tap, out),
            Machine::Gpu(machine) => machine.export(&self.program, tap, out),
        }
    }

    /// Bytes of buffers, weights not counted.
    pub fn arena_bytes(&self) -> usize {
        match &self.machine {
            Machine::Cpu(machine) => machine.arena_bytes(),
            Machine::Gpu(machine) => machine.arena_bytes(),
        }
    }

    /// Computes for these timesteps all that depends on nothing else.
    ///
    /// # Errors
    /// When memory is short.
    pub fn prepare_timesteps(&mut self, timesteps: &[f32]) -> Result<()> {
        match &mut self.machine {
            Machine::Cpu(machine) => machine.prepare_timesteps(&self.program, timesteps),
            Machine::Gpu(machine) => machine.prepare_timesteps(&self.program, timesteps),
        }
    }

    /// One call: the result in the recorded order of axes. Inputs that are constant during a run may be left out after the first call.
    ///
    /// # Errors
    /// When an input is missing or has the wrong size.
    pub fn run(&mut self, feeds: &[Feed<'_>], out: &mut Vec<f32>) -> Result<()> {
        match &mut self.machine {
            Machine::Cpu(machine) => machine.run(&self.program, feeds, out),
            Machine::Gpu(machine) => machine.run(&self.program, feeds, out),
        }
    }
}

/// What `output` and `taps`, nodes of `graph`, need, fused.
fn program(
    graph: &Graph,
    (output, taps): (&Tensor, &[Tensor]),
    options: &Options,
) -> Result<Program> {
    let node = |tensor: &Tensor| tensor.node(graph).ok_or(Error::Mixed { op: "plan" });
    let output = node(output)?;
    let taps = taps.iter().map(node).collect::<Result<Vec<_>>>()?;
    fuse::fuse(&graph.nodes(), (output, &taps), options)
}
