//! Which device computes, and in which type.

use std::sync::Arc;

use candle_core::{DType, Device};
use sd_kernels::cpu::Level;
use sd_kernels::gpu::cuda::Cuda;
use sd_kernels::gpu::{self, Gpu};
use sd_kernels::plan::KERNELS;

use crate::error::{Error, Result};

/// A device as users name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The best that is there.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU by its number.
    Cuda(usize),
    /// Apple's GPU.
    Metal,
}

impl std::str::FromStr for DeviceChoice {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let lower = name.to_ascii_lowercase();
        match lower.as_str() {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            "cuda" => return Ok(Self::Cuda(0)),
            "metal" => return Ok(Self::Metal),
            _ => {}
        }
        lower
            .strip_prefix("cuda:")
            .and_then(|index| index.parse().ok())
            .map(Self::Cuda)
            .ok_or_else(|| {
                format!("unknown device \"{name}\"; expected auto, cpu, cuda, cuda:N or metal")
            })
    }
}

/// A compute type as users name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum DtypeChoice {
    /// The fastest that is faithful on the device.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// 16-bit floats with the range of 32-bit ones.
    Bf16,
}

/// Devices of candle's that this binary was built with, by their names; the reference executor runs networks on them operation by operation.
pub const BUILT: &[&str] = &[
    #[cfg(feature = "cuda")]
    "cuda",
    #[cfg(feature = "metal")]
    "metal",
];

/// Said whenever a card computes.
const UNTRIED: &str = "the gpu's kernels have been run by an interpreter of their instructions, and never on a card: compare a picture with the one of --device cpu before you believe it";

/// Opens the device: where candle's tensors are. A card that runs plans becomes the one that plans of this process are made for, and what lies between
/// networks stays with the processor. What nobody has tried yet is only taken when it is asked for: [`DeviceChoice::Auto`] is the processor.
///
/// # Errors
/// [`Error::Unsupported`] when this build cannot use it, or the machine does not have it, with what to do instead.
pub fn open(choice: DeviceChoice) -> Result<Device> {
    let (name, opened) = match choice {
        DeviceChoice::Auto | DeviceChoice::Cpu => return Ok(Device::Cpu),
        DeviceChoice::Cuda(index) if !is_eager() => {
            card(index)?;
            return Ok(Device::Cpu);
        }
        DeviceChoice::Cuda(index) if is_built("cuda") => ("cuda", Device::new_cuda(index)),
        DeviceChoice::Metal if is_built("metal") => ("metal", Device::new_metal(0)),
        DeviceChoice::Cuda(_) => return Err(not_built("cuda")),
        DeviceChoice::Metal => return Err(not_built("metal")),
    };
    opened.map_err(|e| {
        let reason = e.to_string();
        let reason = reason.lines().next().unwrap_or("unknown").trim();
        Error::Unsupported(format!(
            "the device {name} cannot be opened ({reason}): use --device cpu, and see sd-rs doctor"
        ))
    })
}

/// Whether the environment asks for the reference executor, which knows no plans.
pub fn is_eager() -> bool {
    std::env::var_os("SD_RS_EAGER").is_some()
}

/// Makes an NVIDIA card the one that plans are made for.
fn card(index: usize) -> Result<()> {
    if gpu::chosen().is_some() {
        return Ok(());
    }
    let opened = Cuda::open(index, KERNELS).and_then(|cuda| Gpu::new(Arc::new(cuda)));
    let card = opened.map_err(|e| {
        Error::Unsupported(format!(
            "--device cuda cannot be used: {e}; use --device cpu, and see sd-rs doctor"
        ))
    })?;
    gpu::choose(card);
    Ok(())
}

/// Says what is to be known of a card that computes.
pub fn warn_untried() {
    if gpu::chosen().is_some() {
        tracing::warn!("{UNTRIED}");
    }
}

/// Where networks are computed whose tensors are on `device`, as reports name it.
pub fn name(device: &Device) -> &'static str {
    match device {
        Device::Cpu if gpu::chosen().is_some() => "cuda",
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
        Device::Metal(_) => "metal",
    }
}

/// Whether this binary was built with a device of candle's.
pub fn is_built(name: &str) -> bool {
    BUILT.contains(&name)
}

fn not_built(name: &str) -> Error {
    let how = match name {
        "cuda" => "this binary has no reference executor for cuda (SD_RS_EAGER is set)",
        _ => "this binary does not know metal",
    };
    Error::Unsupported(format!(
        "{how}: use --device cpu, or build one with --features {name} (README, \"GPUs\")"
    ))
}

/// The type that networks compute in on `device`.
///
/// # Errors
/// [`Error::Unsupported`] for 16-bit arithmetic that the processor does not have.
pub fn dtype(choice: DtypeChoice, device: &Device) -> Result<DType> {
    let bf16 = Level::current().has_bf16() || gpu::chosen().is_some();
    match choice {
        DtypeChoice::Auto if device.is_cpu() && bf16 => Ok(DType::BF16),
        DtypeChoice::Auto | DtypeChoice::F32 => Ok(DType::F32),
        DtypeChoice::Bf16 if device.is_cpu() && !bf16 => Err(Error::Unsupported(format!(
            "--dtype bf16 needs a processor with AVX512-BF16, this one is used at level {}; use --dtype f32 (16-bit checkpoints load either way)",
            Level::current().name()
        ))),
        DtypeChoice::F16 if device.is_cpu() => Err(Error::Unsupported(
            "--dtype f16 is not built; use --dtype bf16 or f32 (16-bit checkpoints load either way)".to_owned(),
        )),
        DtypeChoice::Bf16 => Ok(DType::BF16),
        DtypeChoice::F16 => Ok(DType::F16),
    }
}

/// The name of a type in reports.
pub fn dtype_name(dtype: DType) -> &'static str {
    dtype.as_str()
}
