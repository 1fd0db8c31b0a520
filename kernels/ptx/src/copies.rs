//! Asynchronous copies from global to shared memory.
//!
//! The source is read when the copy is issued, and written when its thread waits for it: any use in between would see what was there
//! before, and is an error.

use crate::error::{Kind, Trap, trap};
use crate::lanes::lanes;
use crate::shared::Shared;

/// What an instruction of a warp copies.
struct Pending {
    mask: u32,
    /// Number of the group among those of its threads.
    group: u32,
    size: u32,
    at: [u32; 32],
    value: [[u32; 4]; 32],
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

    /// Copies of threads; they belong to the group that each thread commits next.
    pub(crate) fn begin(&mut self, mut mask: u32, size: u32, at: [u32; 32], value: [[u32; 4]; 32]) {
        while mask != 0 {
            let group = self.groups[mask.trailing_zeros() as usize];
            let same = lanes(mask)
                .filter(|lane| self.groups[*lane] == group)
                .fold(0, |m, lane| m | 1 << lane);
            self.pending.push(Pending {
                mask: same,
                group,
                size,
                at,
                value,
            });
            mask &= !same;
        }
    }

    pub(crate) fn commit(&mut self, mask: u32) {
        for lane in lanes(mask) {
            self.groups[lane] += 1;
        }
    }

    /// Finishes all but the latest `allowed` groups of each thread.
    pub(crate) fn wait(&mut self, mask: u32, allowed: u32, warp: usize, shared: &mut Shared) {
        let groups = self.groups;
        self.pending.retain_mut(|copy| {
            let done = |lane: &usize| copy.group.saturating_add(allowed) < groups[*lane];
            let ready = lanes(copy.mask & mask)
                .filter(done)
                .fold(0, |m, lane| m | 1 << lane);
            for lane in lanes(ready) {
                shared.end_copy(
                    warp,
                    lane as u32,
                    copy.at[lane] as usize,
                    copy.size,
                    copy.value[lane],
                );
            }
            copy.mask &= !ready;
            copy.mask != 0
        });
    }

    /// A thread does not end with copies in flight.
    pub(crate) fn none_pending(&self, mask: u32) -> Result<(), Trap> {
        let Some(copy) = self.pending.iter().find(|copy| mask & copy.mask != 0) else {
            return Ok(());
        };
        let lane = (mask & copy.mask).trailing_zeros();
        let at = copy.at[lane as usize];
        Err(trap(
            Kind::Pending,
            lane,
            format!("the thread ends before it waited for its copy to byte {at} of shared memory"),
        ))
    }
}
