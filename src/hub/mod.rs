//! The Hugging Face Hub: `owner/name[@revision][:file]` becomes files on disk, in the cache that Python's `huggingface_hub` shares.
//!
//! ```text
//! Settings (environment) ──► Client: listing ──► plan: which files ──► download: blobs/ ──► cache: snapshots/, refs/
//! ```
//!
//! Nothing that a server says becomes part of a path before it was looked at: commits and etags are hexadecimal, file names go nowhere
//! but down. A blob gets its name when its length and its hash are right; a snapshot appears when all its blobs are there.

mod agent;
mod cache;
mod client;
mod download;
mod listing;
mod name;
mod plan;
mod pull;
mod refusal;
mod settings;
mod url;

pub use self::cache::{BlobCheck, Cache, CachedRepo};
pub use self::name::RepoName;
pub use self::plan::{Plan, Remote, plan};
pub use self::pull::{Pulled, cached, preview, pull};
pub(crate) use self::settings::expand_home;
pub use self::settings::{Settings, Token};

use std::time::Duration;

/// What happens while a repository is fetched.
#[derive(Debug)]
pub enum Event<'a> {
    /// What will be fetched, and how much of it is here already.
    Planned {
        /// How many files are needed.
        files: usize,
        /// Their bytes.
        bytes: u64,
    },
    /// So many bytes more are here.
    Bytes(u64),
    /// So many bytes were of no use and are fetched again.
    Lost(u64),
    /// Another process fetches this file; this one waits for it.
    Waiting(&'a str),
    /// Something failed that may pass; it is tried again after the time.
    Retrying(&'a str, Duration),
    /// A sentence for the user.
    Note(&'a str),
}

/// Who is told, and who may stop it.
pub trait Listener: Sync {
    /// Whether the user has asked to stop. What was fetched so far stays for another time.
    fn stopped(&self) -> bool {
        false
    }

    /// Is told what happens.
    fn event(&self, _event: Event<'_>) {}
}

/// A listener that says nothing and never stops.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Listener for Silent {}

/// Bytes for people: `4.3 GB`.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}
