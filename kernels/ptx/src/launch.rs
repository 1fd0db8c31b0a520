//! A grid's blocks, run on several threads.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use rayon::prelude::*;

use crate::block::{Failure, run};
use crate::error::{Error, Fault};
use crate::exec::Machine;
use crate::memory::Memory;
use crate::module::{Kernel, Module};
use crate::shared::Shared;
use crate::view::View;
use crate::warp::Warp;

/// The most shared memory that a block gets on any device, in bytes.
const MOST_SHARED: usize = 227 * 1024;

/// What is launched.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The kernel's name.
    pub kernel: &'a str,
    /// Blocks, along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block, along x, y and z.
    pub block: [u32; 3],
    /// Bytes of the dynamic array of shared memory.
    pub dynamic_shared: usize,
    /// The parameters, each at its [`offset`](crate::Param::offset).
    pub params: &'a [u8],
}

/// In which order blocks begin. A GPU promises none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// By their number.
    #[default]
    Forward,
    /// From the last.
    Reverse,
    /// Mixed by a seed.
    Shuffled(u64),
}

/// How a launch is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The order of blocks.
    pub order: Order,
    /// Look for races between warps in shared memory.
    pub races: bool,
    /// Look for lanes that use what other lanes of the same warp wrote to shared memory without `bar.warp.sync` in between. Hardware
    /// since Volta needs it; kernels that rely on lanes in step fail.
    pub lanes: bool,
    /// Look for blocks that use what other blocks of the same launch write to device memory, atomics aside. Slow.
    pub blocks: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            order: Order::Forward,
            races: true,
            lanes: false,
            blocks: false,
        }
    }
}

/// What a launch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Instructions of threads.
    pub instructions: u64,
}

impl Module {
    /// Runs a grid and waits for it.
    ///
    /// # Errors
    /// Where a driver would refuse the launch, or with the first fault that is met.
    pub fn launch(&self, memory: &Memory, launch: &Launch<'_>) -> Result<(), Error> {
        self.launch_with(memory, launch, &Options::default())
            .map(|_| ())
    }

    /// Runs a grid in a given way.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub fn launch_with(
        &self,
        memory: &Memory,
        launch: &Launch<'_>,
        options: &Options,
    ) -> Result<Counts, Error> {
        let fail = |reason: String| Error::Launch {
            kernel: launch.kernel.to_owned(),
            reason,
        };
        let kernel = self
            .kernel(launch.kernel)
            .ok_or_else(|| fail("no kernel of this name".to_owned()))?;
        check(kernel, launch).map_err(fail)?;
        let windows = memory.windows();
        let touched = options
            .blocks
            .then(|| windows.iter().map(|_| OnceLock::new()).collect());
        let view = View {
            windows,
            globals: &self.globals,
            consts: &self.consts,
            touched,
            wide: &memory.wide,
        };
        let grid = Grid {
            kernel,
            launch,
            options,
            view,
        };
        grid.run()
    }
}

fn check(kernel: &Kernel, launch: &Launch<'_>) -> Result<(), String> {
    let threads = launch.block.iter().map(|n| u64::from(*n)).product::<u64>();
    let most = u64::from(kernel.max_threads().unwrap_or(1024)).min(1024);
    if threads == 0 || threads > most || launch.block[2] > 64 {
        return Err(format!(
            "a block of {:?} threads, where 1 to {most} are possible",
            launch.block
        ));
    }
    let [x, y, z] = launch.grid;
    if x == 0 || y == 0 || z == 0 || x > 0x7fff_ffff || y > 65535 || z > 65535 {
        return Err(format!("a grid of {:?} blocks", launch.grid));
    }
    let shared = kernel
        .code
        .shared
        .next_multiple_of(kernel.code.dynamic_align)
        + launch.dynamic_shared;
    if shared > MOST_SHARED {
        return Err(format!(
            "{shared} bytes of shared memory, where {MOST_SHARED} are possible"
        ));
    }
    if launch.params.len() != kernel.param_bytes() {
        return Err(format!(
            "{} bytes of parameters, expected {}",
            launch.params.len(),
            kernel.param_bytes()
        ));
    }
    Ok(())
}

struct Grid<'a> {
    kernel: &'a Kernel,
    launch: &'a Launch<'a>,
    options: &'a Options,
    view: View<'a>,
}

impl Grid<'_> {
    fn run(&self) -> Result<Counts, Error> {
        let [x, y, z] = self.launch.grid.map(u64::from);
        let blocks = x * y * z;
        let workers = (rayon::current_num_threads() as u64).min(blocks);
        let (next, stop, count) = (AtomicU64::new(0), AtomicBool::new(false), AtomicU64::new(0));
        let work = |_| {
            let mut worker = self.worker();
            while !stop.load(Relaxed) {
                let turn = next.fetch_add(1, Relaxed);
                if turn >= blocks {
                    break;
                }
                let done = self.block(&mut worker, self.pick(turn, blocks));
                if done.is_err() {
                    stop.store(true, Relaxed);
                    return done;
                }
            }
            count.fetch_add(worker.1.iter().map(|w| w.count).sum::<u64>(), Relaxed);
            Ok(())
        };
        (0..workers as usize)
            .into_par_iter()
            .with_max_len(1)
            .try_for_each(work)?;
        Ok(Counts {
            instructions: count.load(Relaxed),
        })
    }

    /// The block whose turn it is.
    fn pick(&self, turn: u64, blocks: u64) -> u64 {
        match self.options.order {
            Order::Forward => turn,
            Order::Reverse => blocks - 1 - turn,
            Order::Shuffled(seed) => {
                // i ↦ (i · a + b) mod n is a permutation where a and n have no common divisor
                let gcd = |mut a: u64, mut b: u64| {
                    while b != 0 {
                        (a, b) = (b, a % b);
                    }
                    a
                };
                let mut step = (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % blocks + 1;
                while gcd(step, blocks) != 1 {
                    step += 1;
                }
                let place = u128::from(turn) * u128::from(step) + u128::from(seed % blocks);
                (place % u128::from(blocks)) as u64
            }
        }
    }

    /// A machine and its warps, used for one block after the other.
    fn worker(&self) -> (Machine<'_>, Vec<Warp>) {
        let code = &self.kernel.code;
        let threads: u32 = self.launch.block.iter().product();
        let warps = (0..threads.div_ceil(32) as usize)
            .map(|w| {
                Warp::new(
                    code,
                    w,
                    self.launch.block,
                    self.launch.grid,
                    self.launch.dynamic_shared as u32,
                )
            })
            .collect();
        let shared = Shared::new(self.options.races, self.options.lanes, code.piece);
        let machine = Machine {
            code,
            view: &self.view,
            shared,
            params: self.launch.params,
            block: 0,
            clock: 0,
        };
        (machine, warps)
    }

    fn block(
        &self,
        (machine, warps): &mut (Machine<'_>, Vec<Warp>),
        number: u64,
    ) -> Result<(), Error> {
        let [x, y, _] = self.launch.grid.map(u64::from);
        let block = [number % x, number / x % y, number / x / y].map(|n| n as u32);
        let code = &self.kernel.code;
        let dynamic = self.launch.dynamic_shared;
        machine.block = number as u32;
        machine.shared.reset(
            code.shared.next_multiple_of(code.dynamic_align) + dynamic,
            warps.len(),
        );
        for warp in warps.iter_mut() {
            warp.reset(code, block);
        }
        run(machine, warps).map_err(|failure| self.fault(failure, block))
    }

    fn fault(&self, failure: Failure, block: [u32; 3]) -> Error {
        let (kind, lane, reason) = *failure.trap.0;
        let place = &self.kernel.code.places[failure.pc as usize];
        let thread = failure.warp as u32 * 32 + lane;
        let [x, y, _] = self.launch.block;
        Error::Fault(Box::new(Fault {
            kind,
            kernel: self.kernel.name().to_owned(),
            line: place.line,
            text: place.text.to_string(),
            block,
            thread: [thread % x, thread / x % y, thread / x / y],
            reason,
        }))
    }
}
