//! Will it fit? An estimate from the recorded networks, beside what the machine has.

use super::Networks;
use super::tiling::Surface;
use crate::error::{Error, Result};
use crate::memory::{Memory, held_by_networks};

/// What is there beside weights and the values between layers: code, vocabulary, what a picture becomes on its way to the file.
const REST: u64 = 250 << 20;

/// Bytes resident at the peak of a run for latents of `size` (width, height), with plans beside each other for so many `texts` each, and those of
/// a picture that the network looks at.
///
/// # Errors
/// When the networks cannot take the size.
pub(super) fn estimate(
    networks: &[&Networks],
    size: (usize, usize),
    (batch, texts): (usize, &[usize]),
    reference: Option<(usize, usize)>,
    surface: &Surface,
) -> Result<u64> {
    let free = free().map(|free| free.saturating_sub(REST));
    // models of a relay keep their weights, and use their buffers in turn
    let mut weights = 0;
    let mut buffers = 0;
    for networks in networks {
        let need = networks.memory(size, (batch, texts), reference, (surface, free))?;
        weights += need.weights;
        buffers = buffers.max(need.buffers);
    }
    Ok(weights + buffers + REST)
}

/// What is free, and what this process holds already (the weights): that is part of the need.
fn free() -> Option<u64> {
    let free = Memory::of_networks().available;
    free.map(|free| free.saturating_add(held_by_networks().unwrap_or(0)))
}

/// Refuses when `needed` bytes are not to be had.
///
/// # Errors
/// [`Error::NoMemory`] with both figures.
pub(super) fn check(needed: u64) -> Result<()> {
    match free() {
        Some(free) if needed > free => Err(Error::NoMemory(format!(
            "this needs about {:.1} GB of memory and {:.1} GB are free; make the picture or the batch smaller, or use --force",
            needed as f64 / 1e9,
            free as f64 / 1e9,
        ))),
        _ => Ok(()),
    }
}
