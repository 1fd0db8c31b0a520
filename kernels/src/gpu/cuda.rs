//! NVIDIA's driver, found when the program runs: nothing of CUDA is needed to build, and nothing but the driver to run.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute, CUresult};

use super::{Driver, GraphId, Info, Launch, MODULES, SHARED};
use crate::{Error, Result};

/// Names of the driver's library.
#[cfg(windows)]
const LIBRARIES: [&str; 1] = ["nvcuda.dll"];
#[cfg(not(windows))]
const LIBRARIES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// The CUDA whose PTX [`MODULES`] are, as [`Info::driver`] counts.
const OLDEST: u32 = 12_040;

/// Why no card can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Absent {
    /// There is no driver's library on the machine.
    Driver,
    /// There is one, and it says no.
    Refused(String),
}

impl std::fmt::Display for Absent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Driver => write!(
                f,
                "no NVIDIA driver was found ({} is not on this machine)",
                LIBRARIES[0]
            ),
            Self::Refused(reason) => write!(f, "the NVIDIA driver refuses: {reason}"),
        }
    }
}

/// Calls the driver, and makes what it says an error.
macro_rules! ask {
    ($what:literal, $call:expr) => {
        // SAFETY: each call is given pointers to places that live until it returns, handles that the driver itself gave and that are not
        // destroyed yet, and sizes of what they point to
        match unsafe { $call } {
            CUresult::CUDA_SUCCESS => Ok(()),
            status => Err(failed($what, status)),
        }
    };
}

/// The first cards that the driver has, at most `most` of them.
///
/// # Errors
/// When there is no driver, or it has no card.
pub fn list() -> std::result::Result<Vec<Info>, Absent> {
    let count = count()?;
    (0..count)
        .map(|index| info(index).map_err(|e| Absent::Refused(e.to_string())))
        .collect()
}

fn count() -> std::result::Result<i32, Absent> {
    let found = LIBRARIES.iter().any(|name| {
        // SAFETY: the driver's library may be loaded by anyone; it starts nothing until `cuInit`
        unsafe { libloading::Library::new(*name) }.is_ok()
    });
    if !found {
        return Err(Absent::Driver);
    }
    let refused = |e: Error| Absent::Refused(e.to_string());
    ask!("cuInit", sys::cuInit(0)).map_err(refused)?;
    let mut count = 0;
    ask!("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count)).map_err(refused)?;
    if count < 1 {
        return Err(Absent::Refused("it has no card".to_owned()));
    }
    Ok(count)
}

fn info(index: i32) -> Result<Info> {
    let mut device = 0;
    ask!("cuDeviceGet", sys::cuDeviceGet(&mut device, index))?;
    let mut name = [0 as c_char; 128];
    ask!(
        "cuDeviceGetName",
        sys::cuDeviceGetName(name.as_mut_ptr(), 127, device)
    )?;
    // SAFETY: the driver wrote at most 127 characters and a zero; the last is a zero whatever it did
    let name = unsafe { CStr::from_ptr(name.as_ptr()) };
    let attribute = |which: Attribute| -> Result<usize> {
        let mut value = 0;
        ask!(
            "cuDeviceGetAttribute",
            sys::cuDeviceGetAttribute(&mut value, which, device)
        )?;
        Ok(usize::try_from(value).unwrap_or(0))
    };
    let small = |n: usize| u32::try_from(n).unwrap_or(0);
    let mut memory = 0;
    ask!(
        "cuDeviceTotalMem",
        sys::cuDeviceTotalMem_v2(&mut memory, device)
    )?;
    let mut driver = 0;
    ask!("cuDriverGetVersion", sys::cuDriverGetVersion(&mut driver))?;
    Ok(Info {
        name: name.to_string_lossy().into_owned(),
        capability: (
            small(attribute(
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            )?),
            small(attribute(
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )?),
        ),
        processors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory: memory as u64,
        shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
            .max(SHARED),
        clock: small(attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)? / 1000),
        driver: u32::try_from(driver).unwrap_or(0),
    })
}

/// What the driver says of a failure.
fn failed(what: &str, status: CUresult) -> Error {
    let mut text = std::ptr::null();
    // SAFETY: the driver writes the address of a text of its own
    let known = unsafe { sys::cuGetErrorString(status, &mut text) } == CUresult::CUDA_SUCCESS;
    let reason = if known && !text.is_null() {
        // SAFETY: a text that lives as long as the driver
        unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned()
    } else {
        format!("{status:?}")
    };
    match status {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            Error::Memory("the gpu has no memory left".to_owned())
        }
        _ => Error::Gpu(format!("{what} failed on the gpu: {reason}")),
    }
}

/// A card in use: its primary context, one stream, the kernels.
pub struct Cuda {
    info: Info,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    functions: BTreeMap<&'static str, Function>,
    graphs: Mutex<Graphs>,
    held: Mutex<Held>,
}

/// What is allocated: the bytes at each address, all of them, and the most that they ever were.
#[derive(Default)]
struct Held {
    sizes: BTreeMap<u64, u64>,
    now: u64,
    most: u64,
}

struct Function(sys::CUfunction);

#[derive(Default)]
struct Graphs {
    next: usize,
    made: BTreeMap<usize, sys::CUgraphExec>,
}

// SAFETY: the driver's handles may be used from any thread; every call makes the context the thread's own first (`enter`)
unsafe impl Send for Cuda {}
// SAFETY: as above; what is changed lies behind a mutex
unsafe impl Sync for Cuda {}

impl Cuda {
    /// Opens card `index`, and gives the driver the kernels whose names follow each other in `kernels`.
    ///
    /// # Errors
    /// When there is no such card, or the driver does not take the kernels.
    pub fn open(index: usize, kernels: &[&'static str]) -> Result<Self> {
        let count = count().map_err(|e| Error::Gpu(e.to_string()))?;
        let index = i32::try_from(index)
            .ok()
            .filter(|&i| i < count)
            .ok_or_else(|| {
                Error::Gpu(format!(
                    "there is no gpu {index}: the driver has {count}, counted from 0"
                ))
            })?;
        let info = info(index)?;
        if info.driver < OLDEST {
            return Err(Error::Gpu(format!(
                "the NVIDIA driver knows CUDA {}.{} at most, and the kernels need 12.4: update it to version 550 or newer, or use --device cpu",
                info.driver / 1000,
                info.driver % 1000 / 10
            )));
        }
        let mut device = 0;
        ask!("cuDeviceGet", sys::cuDeviceGet(&mut device, index))?;
        let mut context = null_mut();
        ask!(
            "cuDevicePrimaryCtxRetain",
            sys::cuDevicePrimaryCtxRetain(&mut context, device)
        )?;
        // from here on `drop` gives back what was taken
        let mut cuda = Self {
            info,
            device,
            context,
            stream: null_mut(),
            modules: Vec::new(),
            functions: BTreeMap::new(),
            graphs: Mutex::default(),
            held: Mutex::default(),
        };
        cuda.enter()?;
        ask!(
            "cuStreamCreate",
            sys::cuStreamCreate(
                &mut cuda.stream,
                sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32
            )
        )?;
        for text in MODULES {
            let text = CString::new(text)
                .map_err(|_| Error::Gpu("the kernels' text holds a zero".to_owned()))?;
            let mut module = null_mut();
            ask!(
                "cuModuleLoadData",
                sys::cuModuleLoadData(&mut module, text.as_ptr().cast())
            )?;
            cuda.modules.push(module);
        }
        for &name in kernels {
            let function = cuda.find(name)?;
            cuda.functions.insert(name, function);
        }
        Ok(cuda)
    }

    fn find(&self, name: &str) -> Result<Function> {
        let symbol = CString::new(name)
            .map_err(|_| Error::Gpu(format!("kernel {name:?} has a zero in its name")))?;
        for &module in &self.modules {
            let mut function = null_mut();
            // SAFETY: the module is loaded and the name ends in a zero
            let status =
                unsafe { sys::cuModuleGetFunction(&mut function, module, symbol.as_ptr()) };
            if status != CUresult::CUDA_SUCCESS {
                continue;
            }
            let most = i32::try_from(self.info.shared).unwrap_or(i32::MAX);
            let mut own = 0;
            ask!(
                "cuFuncGetAttribute",
                sys::cuFuncGetAttribute(
                    &mut own,
                    sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
                    function
                )
            )?;
            ask!(
                "cuFuncSetAttribute",
                sys::cuFuncSetAttribute(
                    function,
                    sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    most.saturating_sub(own)
                )
            )?;
            return Ok(Function(function));
        }
        Err(Error::Gpu(format!("there is no kernel `{name}`")))
    }

    /// Makes the card the one that this thread's calls mean.
    fn enter(&self) -> Result<()> {
        ask!("cuCtxSetCurrent", sys::cuCtxSetCurrent(self.context))
    }

    fn wait(&self) -> Result<()> {
        ask!("cuStreamSynchronize", sys::cuStreamSynchronize(self.stream))
    }

    fn function(&self, launch: &Launch) -> Result<sys::CUfunction> {
        let found = self.functions.get(launch.kernel);
        let found =
            found.ok_or_else(|| Error::Gpu(format!("kernel `{}` is not loaded", launch.kernel)))?;
        Ok(found.0)
    }

    fn graphs(&self) -> MutexGuard<'_, Graphs> {
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held_mut(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn event(&self) -> Result<Event> {
        let mut event = null_mut();
        ask!("cuEventCreate", sys::cuEventCreate(&mut event, 0))?;
        Ok(Event(event))
    }

    fn record(&self, event: &Event) -> Result<()> {
        ask!("cuEventRecord", sys::cuEventRecord(event.0, self.stream))
    }
}

struct Event(sys::CUevent);

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `event`, and not used again
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

impl Driver for Cuda {
    fn info(&self) -> &Info {
        &self.info
    }

    fn free_memory(&self) -> Result<u64> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        ask!("cuMemGetInfo", sys::cuMemGetInfo_v2(&mut free, &mut total))?;
        Ok(free as u64)
    }

    fn held(&self) -> (u64, u64) {
        let held = self.held_mut();
        (held.now, held.most)
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        let mut address = 0;
        ask!("cuMemAlloc", sys::cuMemAlloc_v2(&mut address, bytes)).map_err(|e| match e {
            Error::Memory(_) => Error::Memory(format!(
                "the gpu has no memory for {} MB more",
                bytes.div_ceil(1_000_000)
            )),
            other => other,
        })?;
        let mut held = self.held_mut();
        held.sizes.insert(address, bytes as u64);
        held.now += bytes as u64;
        held.most = held.most.max(held.now);
        Ok(address)
    }

    fn release(&self, address: u64) {
        let mut held = self.held_mut();
        held.now -= held.sizes.remove(&address).unwrap_or(0);
        drop(held);
        // nothing can be done about a failure here; the next call tells of it
        if self.enter().is_ok() && self.wait().is_ok() {
            // SAFETY: the address came from `allocate`, and nothing that was asked before uses it any more
            let _ = unsafe { sys::cuMemFree_v2(address) };
        }
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.enter()?;
        let (from, len) = (bytes.as_ptr().cast::<c_void>(), bytes.len());
        ask!(
            "cuMemcpyHtoD",
            sys::cuMemcpyHtoDAsync_v2(to, from, len, self.stream)
        )?;
        // pageable memory is read before the call returns in most cases, not in all
        self.wait()
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.enter()?;
        let (to, len) = (bytes.as_mut_ptr().cast::<c_void>(), bytes.len());
        ask!(
            "cuMemcpyDtoH",
            sys::cuMemcpyDtoHAsync_v2(to, from, len, self.stream)
        )?;
        self.wait()
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        ask!(
            "cuMemcpyDtoD",
            sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream)
        )
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        self.enter()?;
        let function = self.function(launch)?;
        let [x, y, z] = launch.grid;
        // the driver reads as many bytes as the kernel's struct has: `arguments` are exactly that (a test compares)
        let mut arguments = [launch.arguments.as_ptr().cast_mut().cast::<c_void>()];
        ask!(
            "cuLaunchKernel",
            sys::cuLaunchKernel(
                function,
                x,
                y,
                z,
                launch.threads,
                1,
                1,
                u32::try_from(launch.shared).unwrap_or(u32::MAX),
                self.stream,
                arguments.as_mut_ptr(),
                null_mut()
            )
        )
    }

    fn time(&self, launches: &[Launch]) -> Result<Vec<Duration>> {
        self.enter()?;
        let mut marks = vec![self.event()?];
        self.record(&marks[0])?;
        for launch in launches {
            self.launch(launch)?;
            let mark = self.event()?;
            self.record(&mark)?;
            marks.push(mark);
        }
        self.wait()?;
        let between = marks.windows(2).map(|pair| {
            let mut milliseconds = 0f32;
            ask!(
                "cuEventElapsedTime",
                sys::cuEventElapsedTime(&mut milliseconds, pair[0].0, pair[1].0)
            )?;
            Ok(Duration::from_secs_f64(
                f64::from(milliseconds.max(0.0)) / 1000.0,
            ))
        });
        between.collect()
    }

    fn graph(&self, launches: &[Launch]) -> Result<GraphId> {
        self.enter()?;
        let mut graph = null_mut();
        ask!("cuGraphCreate", sys::cuGraphCreate(&mut graph, 0))?;
        let made = self.instantiate(graph, launches);
        // SAFETY: what was made of it does not need it any more
        let _ = unsafe { sys::cuGraphDestroy(graph) };
        let made = made?;
        let mut graphs = self.graphs();
        graphs.next += 1;
        let id = graphs.next;
        graphs.made.insert(id, made);
        Ok(GraphId(id))
    }

    fn replay(&self, graph: GraphId) -> Result<()> {
        self.enter()?;
        let made = self.graphs().made.get(&graph.0).copied();
        let made = made.ok_or_else(|| Error::Gpu("a graph was let go of".to_owned()))?;
        ask!("cuGraphLaunch", sys::cuGraphLaunch(made, self.stream))
    }

    fn forget(&self, graph: GraphId) {
        let made = self.graphs().made.remove(&graph.0);
        if let (Some(made), Ok(())) = (made, self.enter()) {
            // SAFETY: made by `graph`, and not in the list any more
            let _ = unsafe { sys::cuGraphExecDestroy(made) };
        }
    }
}

impl Cuda {
    /// The launches, each behind the one before, made ready.
    fn instantiate(&self, graph: sys::CUgraph, launches: &[Launch]) -> Result<sys::CUgraphExec> {
        let mut last: Option<sys::CUgraphNode> = None;
        for launch in launches {
            let mut arguments = [launch.arguments.as_ptr().cast_mut().cast::<c_void>()];
            // SAFETY: a struct of numbers and pointers, for which zeros mean nothing
            let mut node: sys::CUDA_KERNEL_NODE_PARAMS =
                unsafe { MaybeUninit::zeroed().assume_init() };
            node.func = self.function(launch)?;
            [node.gridDimX, node.gridDimY, node.gridDimZ] = launch.grid;
            (node.blockDimX, node.blockDimY, node.blockDimZ) = (launch.threads, 1, 1);
            node.sharedMemBytes = u32::try_from(launch.shared).unwrap_or(u32::MAX);
            node.kernelParams = arguments.as_mut_ptr();
            let before = last.as_slice();
            let mut made = null_mut();
            ask!(
                "cuGraphAddKernelNode",
                sys::cuGraphAddKernelNode_v2(
                    &mut made,
                    graph,
                    before.as_ptr(),
                    before.len(),
                    &node
                )
            )?;
            last = Some(made);
        }
        let mut made = null_mut();
        ask!(
            "cuGraphInstantiate",
            sys::cuGraphInstantiateWithFlags(&mut made, graph, 0)
        )?;
        Ok(made)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        let graphs = std::mem::take(&mut self.graphs().made);
        // SAFETY: each was made by this card, is destroyed once, and nobody can use it any more
        unsafe {
            for graph in graphs.into_values() {
                let _ = sys::cuGraphExecDestroy(graph);
            }
            for &module in &self.modules {
                let _ = sys::cuModuleUnload(module);
            }
            if !self.stream.is_null() {
                let _ = sys::cuStreamDestroy_v2(self.stream);
            }
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}
