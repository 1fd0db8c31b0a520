//! Asynchronous copies from global to shared memory.
//!
//! The source is read when the copy is issued, and written when its thread waits for it: any use in between would see what was there
//! before, and is an error.

use crate::error::{Kind, Trap, trap};
use crate::lanes::lanes;
use crate::shared::Shared;

/// A copy in flight.
struct Pending {
    lane: u32,
    /// Number of its group among those of its thread.
    group: u32,
    at: usize,
    size: u32,
    value: [u32; 4],
}

/// The copies in flight of a warp, in the order of their issue.
#[derive(Default)]
pub(crate) struct Copies {
    pending: Vec<Pending>,
    /// Groups that each thread has committed.
    groups: [u32; 32],
}

impl Copies {
    pub(crate) fn clear(&mut self) {
        self.pending.clear();
        self.groups = [0; 32];
    }

    /// A copy of a thread; it belongs to the group that the thread commits next.
    pub(crate) fn begin(&mut self, lane: u32, at: usize, size: u32, value: [u32; 4]) {
        self.pending.push(Pending {
            lane,
            group: self.groups[lane as usize],
            at,
            size,
            value,
        });
    }

    pub(crate) fn commit(&mut self, mask: u32) {
        for lane in lanes(mask) {
            self.groups[lane] += 1;
        }
    }

    /// Finishes all but the latest `allowed` groups of each thread.
    pub(crate) fn wait(&mut self, mask: u32, allowed: u32, warp: usize, shared: &mut Shared) {
        let groups = self.groups;
        self.pending.retain(|copy| {
            let lane = copy.lane as usize;
            if mask >> lane & 1 == 0 || copy.group.saturating_add(allowed) >= groups[lane] {
                return true;
            }
            shared.end_copy(warp, copy.lane, copy.at, copy.size, copy.value);
            false
        });
    }

    /// A thread does not end with copies in flight.
    pub(crate) fn none_pending(&self, mask: u32) -> Result<(), Trap> {
        match self.pending.iter().find(|copy| mask >> copy.lane & 1 == 1) {
            Some(copy) => Err(trap(
                Kind::Pending,
                copy.lane,
                format!(
                    "the thread ends before it waited for its copy to byte {} of shared memory",
                    copy.at
                ),
            )),
            None => Ok(()),
        }
    }
}
