//! GPUs: what a plan asks of one, and the driver that gives it.
//!
//! A plan needs little: memory, copies, kernels by name, and a list of launches made into one graph. That is [`Driver`]; NVIDIA's stands behind
//! [`cuda`], found when the program runs. Tests put an interpreter of the kernels' instructions in its place.

#[allow(unsafe_code)]
pub mod cuda;
#[cfg(test)]
#[path = "../../tests/support/interpreted.rs"]
#[allow(unreachable_pub, reason = "tests of other crates include it too")]
pub(crate) mod interpreted;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::{Error, Result};

/// The kernels, compiled from `kernels/cuda/*.cu` by `kernels/cuda/build.py`: PTX, which the driver makes into code for its card.
pub const MODULES: [&str; 4] = [
    include_str!("../../cuda/ptx/attention.ptx"),
    include_str!("../../cuda/ptx/norm.ptx"),
    include_str!("../../cuda/ptx/pointwise.ptx"),
    include_str!("../../cuda/ptx/product.ptx"),
];

/// Shared memory of a block that every card has without being asked.
pub const SHARED: usize = 48 << 10;

/// What a card is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// As the driver calls it.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub processors: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// The most shared memory of a block.
    pub shared: usize,
    /// The highest clock, in MHz; 0 where it is not known.
    pub clock: u32,
    /// The newest CUDA that the driver knows, times 1000, and ten times the minor version.
    pub driver: u32,
}

/// One launch of a kernel, which takes one struct by value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The kernel's name, in one of [`MODULES`].
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: usize,
    /// The struct.
    pub arguments: Vec<u8>,
}

/// A list of launches that the driver has made ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GraphId(pub usize);

/// One card, used by one stream: what is asked is done in order.
pub trait Driver: Send + Sync {
    /// What it is.
    fn info(&self) -> &Info;

    /// Bytes that could be allocated.
    ///
    /// # Errors
    /// When the driver does not tell.
    fn free_memory(&self) -> Result<u64>;

    /// Bytes that are allocated here now, and the most that ever were.
    fn held(&self) -> (u64, u64);

    /// Memory at an address that is a multiple of 256.
    ///
    /// # Errors
    /// [`Error::Memory`] when there is none.
    fn allocate(&self, bytes: usize) -> Result<u64>;

    /// Gives memory back, once what was asked before is done.
    fn release(&self, address: u64);

    /// Copies to the card. The bytes may change once the call has returned.
    ///
    /// # Errors
    /// When the driver fails.
    fn upload(&self, to: u64, bytes: &[u8]) -> Result<()>;

    /// Copies from the card, after everything that was asked before.
    ///
    /// # Errors
    /// When the driver fails; that may be the fault of an earlier launch.
    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()>;

    /// Copies within the card's memory.
    ///
    /// # Errors
    /// When the driver fails.
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()>;

    /// Runs a kernel.
    ///
    /// # Errors
    /// When the driver fails.
    fn launch(&self, launch: &Launch) -> Result<()>;

    /// Runs launches, and gives how long each took on the card.
    ///
    /// # Errors
    /// When the driver fails.
    fn time(&self, launches: &[Launch]) -> Result<Vec<Duration>>;

    /// Makes a graph that runs these launches one after another.
    ///
    /// # Errors
    /// When the driver fails.
    fn graph(&self, launches: &[Launch]) -> Result<GraphId>;

    /// Runs a graph.
    ///
    /// # Errors
    /// When the driver fails.
    fn replay(&self, graph: GraphId) -> Result<()>;

    /// Lets go of a graph.
    fn forget(&self, graph: GraphId);
}

/// A card that plans run on. Cloning gives another handle.
#[derive(Clone)]
pub struct Gpu(Arc<dyn Driver>);

impl Gpu {
    /// A card behind a driver.
    ///
    /// # Errors
    /// When the kernels are not for it.
    pub fn new(driver: Arc<dyn Driver>) -> Result<Self> {
        let info = driver.info();
        if info.capability < (8, 0) {
            let (major, minor) = info.capability;
            return Err(Error::Gpu(format!(
                "the {} has compute capability {major}.{minor}, and the kernels need 8.0 or more (Ampere, 2020): use --device cpu",
                info.name
            )));
        }
        Ok(Self(driver))
    }

    /// The driver.
    pub fn driver(&self) -> &dyn Driver {
        self.0.as_ref()
    }

    /// Some memory, given back when the result is dropped.
    pub(crate) fn buffer(&self, bytes: usize) -> Result<Buffer> {
        // a buffer of nothing has an address too
        let address = self.0.allocate(bytes.max(1))?;
        Ok(Buffer {
            gpu: self.clone(),
            address,
            bytes,
        })
    }

    /// Memory that holds these bytes.
    pub(crate) fn holding(&self, bytes: &[u8]) -> Result<Buffer> {
        let buffer = self.buffer(bytes.len())?;
        self.0.upload(buffer.address, bytes)?;
        Ok(buffer)
    }

    /// Whether both are one card.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu({})", self.0.info().name)
    }
}

/// Memory of a card.
pub(crate) struct Buffer {
    gpu: Gpu,
    address: u64,
    bytes: usize,
}

impl Buffer {
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    pub(crate) fn is_on(&self, gpu: &Gpu) -> bool {
        self.gpu.is(gpu)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.gpu.0.release(self.address);
    }
}

static CHOSEN: OnceLock<Gpu> = OnceLock::new();

/// Makes a card the one that plans of this process are made for from now on, unless there is one already.
pub fn choose(gpu: Gpu) {
    // whoever comes second keeps the first: plans of one process share weights
    let _ = CHOSEN.set(gpu);
}

/// The card that plans are made for; none: the processor.
pub fn chosen() -> Option<&'static Gpu> {
    CHOSEN.get()
}
