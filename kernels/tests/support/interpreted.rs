//! A card that is none: the kernels' own PTX, executed by an interpreter that checks every access, every barrier and every copy. For tests.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use sd_kernels::gpu::{Driver, GraphId, Info, Launch, MODULES};
use sd_kernels::{Error, Result};
use sd_ptx::{Memory, Module};

/// The card.
pub struct Interpreted {
    info: Info,
    memory: Memory,
    modules: Vec<Module>,
    graphs: Mutex<BTreeMap<usize, Vec<Launch>>>,
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Gpu(error.to_string())
}

impl Interpreted {
    /// A card of so many processors: what is few for one is much for another, and goes to other kernels.
    ///
    /// # Errors
    /// When the interpreter does not know an instruction of the kernels.
    pub fn new(processors: usize) -> Result<Self> {
        let modules = MODULES.iter().map(|text| Module::parse(text));
        Ok(Self {
            info: Info {
                name: format!("interpreter of {processors} processors"),
                capability: (8, 0),
                processors,
                memory: 1 << 34,
                // what cards of compute capability 8.6 and 8.9 have
                shared: 99 << 10,
                clock: 0,
                driver: 12_040,
            },
            memory: Memory::new(),
            modules: modules
                .collect::<std::result::Result<_, _>>()
                .map_err(failed)?,
            graphs: Mutex::default(),
        })
    }

    /// Bytes that are allocated now.
    pub fn allocated(&self) -> usize {
        self.memory.allocated()
    }

    /// Graphs that are ready now.
    pub fn graphs(&self) -> usize {
        self.graphs.lock().map_or(0, |graphs| graphs.len())
    }

    fn module(&self, launch: &Launch) -> Result<&Module> {
        let mut modules = self.modules.iter();
        let found = modules.find(|module| module.kernel(launch.kernel).is_some());
        found.ok_or_else(|| Error::Gpu(format!("there is no kernel `{}`", launch.kernel)))
    }
}

impl Driver for Interpreted {
    fn info(&self) -> &Info {
        &self.info
    }

    fn free_memory(&self) -> Result<u64> {
        Ok(self.info.memory - self.memory.allocated() as u64)
    }

    fn held(&self) -> (u64, u64) {
        (self.memory.allocated() as u64, self.memory.peak() as u64)
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.memory.alloc(bytes).map_err(failed)
    }

    fn release(&self, address: u64) {
        let freed = self.memory.free(address);
        assert!(freed.is_ok(), "{freed:?}");
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.memory.write(to, bytes).map_err(failed)
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.memory.read(from, bytes).map_err(failed)
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        let mut between = vec![0; bytes];
        self.download(from, &mut between)?;
        self.upload(to, &between)
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        let module = self.module(launch)?;
        let kernel = module.kernel(launch.kernel);
        let kernel = kernel.ok_or_else(|| failed("no kernel"))?;
        if kernel.param_bytes() != launch.arguments.len() {
            return Err(failed(format!(
                "`{}` takes {} bytes, not {}",
                launch.kernel,
                kernel.param_bytes(),
                launch.arguments.len()
            )));
        }
        let shared = kernel.static_shared() + launch.shared;
        if kernel.max_threads() != Some(launch.threads) || shared > self.info.shared {
            return Err(failed(format!(
                "`{}` is launched with {} threads, and {shared} bytes of shared memory",
                launch.kernel, launch.threads
            )));
        }
        let launch = sd_ptx::Launch {
            kernel: launch.kernel,
            grid: launch.grid,
            block: [launch.threads, 1, 1],
            dynamic_shared: launch.shared,
            params: &launch.arguments,
        };
        // a card promises no order of blocks, nor that lanes of a warp keep step
        let options = sd_ptx::Options {
            order: sd_ptx::Order::Shuffled(u64::from(launch.grid[0])),
            lanes: true,
            blocks: true,
            ..sd_ptx::Options::default()
        };
        let done = module.launch_with(&self.memory, &launch, &options);
        done.map(|_| ()).map_err(failed)
    }

    fn time(&self, launches: &[Launch]) -> Result<Vec<Duration>> {
        let mut times = Vec::with_capacity(launches.len());
        for launch in launches {
            self.launch(launch)?;
            times.push(Duration::from_micros(1));
        }
        Ok(times)
    }

    fn graph(&self, launches: &[Launch]) -> Result<GraphId> {
        let mut graphs = self.graphs.lock().map_err(failed)?;
        let id = graphs.last_key_value().map_or(0, |(id, _)| id + 1);
        graphs.insert(id, launches.to_vec());
        Ok(GraphId(id))
    }

    fn replay(&self, graph: GraphId) -> Result<()> {
        let launches = self.graphs.lock().map_err(failed)?.get(&graph.0).cloned();
        let launches = launches.ok_or_else(|| failed("no such graph"))?;
        launches.iter().try_for_each(|launch| self.launch(launch))
    }

    fn forget(&self, graph: GraphId) {
        if let Ok(mut graphs) = self.graphs.lock() {
            graphs.remove(&graph.0);
        }
    }
}
