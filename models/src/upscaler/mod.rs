//! Networks that make finished pictures larger: those of the ESRGAN family, and those of attention within windows. Pictures are `[b, c, h, w]` in 0 … 1 on both sides, red first.

mod compact;
mod rrdb;
mod swin;
mod swin_block;

pub use compact::{Compact, CompactConfig};
pub use rrdb::{Rrdb, RrdbConfig};
pub use swin::{Link, Swin, SwinConfig, SwinGroup, SwinKind, Tail};

use sd_kernels::{Result, Tensor, Weights};

/// The structure of an upscaler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Config {
    /// ESRGAN, Real-ESRGAN.
    Rrdb(RrdbConfig),
    /// The compact networks of Real-ESRGAN.
    Compact(CompactConfig),
    /// SwinIR, Swin2SR, HAT.
    Swin(SwinConfig),
}

impl Config {
    /// The network's name in reports.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Rrdb(config) if config.plus => "ESRGAN+",
            Self::Rrdb(config) if config.unshuffle > 1 => "Real-ESRGAN",
            Self::Rrdb(_) => "ESRGAN",
            Self::Compact(_) => "compact",
            Self::Swin(config) => match config.kind {
                SwinKind::First => "SwinIR",
                SwinKind::Second { .. } => "Swin2SR",
                SwinKind::Hybrid { .. } => "HAT",
            },
        }
    }

    /// How many pixels wide one pixel becomes.
    pub fn scale(&self) -> usize {
        match self {
            Self::Rrdb(config) => config.scale(),
            Self::Compact(config) => config.scale,
            Self::Swin(config) => config.scale(),
        }
    }

    /// Channels of pictures that come in.
    pub fn input(&self) -> usize {
        match self {
            Self::Rrdb(config) => config.input,
            Self::Compact(config) => config.input,
            Self::Swin(config) => config.input,
        }
    }

    /// Channels of pictures that go out.
    pub fn output(&self) -> usize {
        match self {
            Self::Rrdb(config) => config.output,
            Self::Compact(config) => config.output,
            Self::Swin(config) => config.output,
        }
    }

    /// What both sides of a picture that comes in are a multiple of.
    pub fn multiple(&self) -> usize {
        match self {
            Self::Rrdb(config) => config.unshuffle,
            Self::Compact(_) => 1,
            Self::Swin(config) => config.multiple(),
        }
    }

    /// How far a pixel that goes out looks, in pixels of the picture that comes in: what lies farther away has no influence on it. None: at all.
    pub fn reach(&self) -> Option<usize> {
        match self {
            Self::Rrdb(config) => Some(config.reach()),
            Self::Compact(config) => Some(config.convs),
            Self::Swin(config) => config.reach(),
        }
    }
}

/// An upscaler.
pub enum Upscaler {
    /// ESRGAN, Real-ESRGAN.
    Rrdb(Box<Rrdb>),
    /// The compact networks of Real-ESRGAN.
    Compact(Compact),
    /// SwinIR, Swin2SR, HAT.
    Swin(Box<Swin>),
}

impl Upscaler {
    /// Asks for every weight.
    pub fn load(weights: &Weights, config: &Config) -> Self {
        match config {
            Config::Rrdb(config) => Self::Rrdb(Box::new(Rrdb::load(weights, config))),
            Config::Compact(config) => Self::Compact(Compact::load(weights, config)),
            Config::Swin(config) => Self::Swin(Box::new(Swin::load(weights, config))),
        }
    }

    /// `x [b, input, h, w]` → `[b, output, scale · h, scale · w]`.
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Rrdb(network) => network.forward(x),
            Self::Compact(network) => network.forward(x),
            Self::Swin(network) => network.forward(x),
        }
    }
}
