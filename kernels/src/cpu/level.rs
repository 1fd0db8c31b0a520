//! What this processor can do, found out when the program runs.

use std::sync::OnceLock;

/// An instruction set that kernels are written for, from the plainest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Nothing is assumed; products go to the `gemm` crate, which knows the Arm processors too.
    Portable,
    /// AVX2 and FMA: 256-bit f32.
    Avx2,
    /// AVX-512 F, BW, VL and DQ: 512-bit f32.
    Avx512,
    /// AVX-512 with BF16: products of pairs of bf16, summed in f32.
    Avx512Bf16,
    /// The same and AMX: products of tiles of bf16, summed in f32.
    Amx,
}

impl Level {
    /// All levels, the plainest first.
    pub const ALL: [Self; 5] = [
        Self::Portable,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::Amx,
    ];

    /// The name that `SD_RS_CPU` takes and reports give.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
        }
    }

    /// The level of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        let name = name.trim().to_ascii_lowercase();
        Self::ALL.into_iter().find(|level| level.name() == name)
    }

    /// Whether this processor has it, and the system lets this process use it.
    pub fn is_supported(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_supported()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                Self::Avx512.is_supported() && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Bf16.is_supported() && super::amx::is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The levels that this processor has, the plainest first.
    pub fn supported() -> Vec<Self> {
        Self::ALL
            .into_iter()
            .filter(|level| level.is_supported())
            .collect()
    }

    /// The level in use: the best one, or what the environment variable `SD_RS_CPU` names, if this processor has it.
    pub fn current() -> Self {
        static CURRENT: OnceLock<Level> = OnceLock::new();
        *CURRENT.get_or_init(|| {
            let best = Self::supported().pop().unwrap_or(Self::Portable);
            std::env::var("SD_RS_CPU")
                .ok()
                .and_then(|name| Self::from_name(&name))
                .map_or(best, |asked| asked.min(best))
        })
    }

    /// Whether products of bf16 numbers are native here.
    pub fn has_bf16(self) -> bool {
        self >= Self::Avx512Bf16
    }
}
