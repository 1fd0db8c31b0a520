//! Will it fit? An estimate from the recorded networks, and what the machine has.

use super::Networks;
use crate::error::{Error, Result};

/// What eager execution holds beside the tensors of the graph: pieces of score matrices, column tiles, code and vocabulary.
const WORKSPACE: u64 = 250 << 20;

/// Bytes resident at the peak of a run for latents of `size` (width, height).
///
/// # Errors
/// When the networks cannot take the size.
pub(super) fn estimate(
    networks: &Networks,
    size: (usize, usize),
    batch: usize,
    guided: bool,
) -> Result<u64> {
    let bytes = networks.dtype().size_in_bytes() as u64;
    let unet = networks
        .record_unet(size, if guided { 2 * batch } else { batch })?
        .peak_elements();
    let vae = networks.record_vae(size, 1)?.peak_elements();
    Ok(networks.weight_bytes() + unet.max(vae) * bytes + WORKSPACE)
}

/// Refuses when `needed` bytes are not to be had.
///
/// # Errors
/// [`Error::NoMemory`] with both figures.
pub(super) fn check(needed: u64) -> Result<()> {
    // what this process holds already (the weights) is part of the need, and not of what is free
    let free = available().map(|free| free + resident().unwrap_or(0));
    match free {
        Some(free) if needed > free => Err(Error::NoMemory(format!(
            "this needs about {:.1} GB of memory and {:.1} GB are free; make the picture or the batch smaller, or use --force",
            needed as f64 / 1e9,
            free as f64 / 1e9,
        ))),
        _ => Ok(()),
    }
}

/// Bytes that can be had without swapping, within the control group's limit; `None` where the system does not tell.
pub fn available() -> Option<u64> {
    let field = |text: &str, name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace()
            .next()?
            .parse::<u64>()
            .ok()?
            .checked_mul(1024)
    };
    let free = field(
        &std::fs::read_to_string("/proc/meminfo").ok()?,
        "MemAvailable:",
    )?;
    let number = |path: &str| {
        std::fs::read_to_string(path)
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    let group = number("/sys/fs/cgroup/memory.max")
        .zip(number("/sys/fs/cgroup/memory.current"))
        .map(|(limit, used)| limit.saturating_sub(used));
    Some(group.map_or(free, |group| group.min(free)))
}

fn status(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace()
        .next()?
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// Bytes resident now.
fn resident() -> Option<u64> {
    status("VmRSS:")
}

/// The most bytes that were ever resident in this process; `None` where the system does not tell.
pub fn peak_resident() -> Option<u64> {
    status("VmHWM:")
}
