//! The one error type: what went wrong, where, what was expected and got, and what to do next.
//!
//! Messages are lower case and whole sentences without a final full stop, so that they read well behind `error: `.

use std::path::PathBuf;

/// Everything that can go wrong in `sd-rs`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request itself is wrong: a flag, a field, a value out of range.
    #[error("{0}")]
    Usage(String),
    /// A model file or folder cannot be used.
    #[error("{}: {reason}", path.display())]
    BadModel {
        /// The file or folder at fault.
        path: PathBuf,
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// Something that was named does not exist.
    #[error("{what} not found: {hint}")]
    NotFound {
        /// What was looked for, as the user named it.
        what: String,
        /// Where it was looked for, or what to do.
        hint: String,
    },
    /// The work would not fit in memory, and was not begun.
    #[error("{0}")]
    NoMemory(String),
    /// Reading or writing failed.
    #[error("{}: cannot {action}: {source}", path.display())]
    Disk {
        /// The file or folder.
        path: PathBuf,
        /// What was tried: "read", "write", "create" …
        action: &'static str,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// The arithmetic left the numbers: NaN or infinity where a picture should be.
    #[error("{0}")]
    Numeric(String),
    /// Known, named, and not built.
    #[error("{0}")]
    Unsupported(String),
    /// A server could not be reached, refuses, or sent something else than was asked for.
    #[error("{0}")]
    Network(String),
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// Tensors of a model are missing or misshapen.
    #[error("{0}")]
    Weights(String),
    /// A tensor operation failed.
    #[error(transparent)]
    Kernel(#[from] sd_kernels::Error),
    /// candle failed.
    #[error("tensor operation failed: {0}")]
    Candle(#[from] candle_core::Error),
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A [`Error::BadModel`] about `path`.
    pub fn bad_model(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::BadModel {
            path: path.into(),
            reason: reason.into(),
        }
    }

    /// A [`Error::Disk`]: `action` on `path` failed with `source`.
    pub fn disk(path: impl Into<PathBuf>, action: &'static str, source: std::io::Error) -> Self {
        Self::Disk {
            path: path.into(),
            action,
            source,
        }
    }

    /// A short machine-readable name of the failure class.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Usage(_) => "usage",
            Self::BadModel { .. } | Self::Weights(_) => "bad-model",
            Self::NotFound { .. } => "not-found",
            Self::NoMemory(_) => "no-memory",
            Self::Disk { .. } => "disk",
            Self::Numeric(_) => "numeric",
            Self::Unsupported(_) => "unsupported",
            Self::Network(_) => "network",
            Self::Interrupted => "interrupted",
            Self::Kernel(_) | Self::Candle(_) => "other",
        }
    }

    /// The process's exit status: 2 for a wrong command line, 130 when interrupted, 1 for everything else.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Interrupted => 130,
            _ => 1,
        }
    }
}
