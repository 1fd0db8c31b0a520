//! Which device computes, and in which type.

use candle_core::{DType, Device};
use sd_kernels::cpu::Level;

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

/// Opens the device.
///
/// # Errors
/// [`Error::Unsupported`] when this build cannot use it, with what to do instead.
pub fn open(choice: DeviceChoice) -> Result<Device> {
    match choice {
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Cuda(_) => Err(Error::Unsupported(
            "this version computes on the cpu only: cuda is not built yet; use --device cpu"
                .to_owned(),
        )),
        DeviceChoice::Metal => Err(Error::Unsupported(
            "this version computes on the cpu only: metal is not built yet; use --device cpu"
                .to_owned(),
        )),
    }
}

/// The type that networks compute in on `device`.
///
/// # Errors
/// [`Error::Unsupported`] for 16-bit arithmetic that the processor does not have.
pub fn dtype(choice: DtypeChoice, device: &Device) -> Result<DType> {
    let bf16 = Level::current().has_bf16();
    match choice {
        DtypeChoice::Auto if device.is_cpu() && bf16 => Ok(DType::BF16),
        DtypeChoice::Auto | DtypeChoice::F32 => Ok(DType::F32),
        DtypeChoice::Bf16 if device.is_cpu() && !bf16 => Err(Error::Unsupported(format!(
            "--dtype bf16 needs a processor with AVX512-BF16, this one is used at level {}; use --dtype f32 (16-bit checkpoints load either way)",
            Level::current().name()
        ))),
        DtypeChoice::F16 if device.is_cpu() => Err(Error::Unsupported(
            "--dtype f16 is not built for the cpu; use --dtype bf16 or f32 (16-bit checkpoints load either way)".to_owned(),
        )),
        DtypeChoice::Bf16 => Ok(DType::BF16),
        DtypeChoice::F16 => Ok(DType::F16),
    }
}

/// The name of a type in reports.
pub fn dtype_name(dtype: DType) -> &'static str {
    dtype.as_str()
}
