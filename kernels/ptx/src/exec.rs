//! What lanes do with memory and with each other.

use std::sync::PoisonError;

use crate::error::{Kind, Trap, trap};
use crate::lanes::{FULL, L64, lanes};
use crate::lower::Code;
use crate::memory::{LOCAL, SHARED, within};
use crate::op::{NONE, Op, Reduce, Reg, Shuffle, Vote};
use crate::shared::Shared;
use crate::syntax::Space;
use crate::view::View;
use crate::warp::{Warp, put};

/// What the warps of a block share.
pub(crate) struct Machine<'a> {
    pub(crate) code: &'a Code,
    pub(crate) view: &'a View<'a>,
    pub(crate) shared: Shared,
    pub(crate) params: &'a [u8],
    /// The block's number in the grid.
    pub(crate) block: u32,
    pub(crate) clock: u64,
}

/// `cvta.to`: addresses of a space.
pub(crate) fn to_space(space: Space, addresses: &L64, mask: u32) -> Result<L64, Trap> {
    let window = match space {
        Space::Shared => SHARED,
        Space::Local => LOCAL,
        _ => return Ok(*addresses),
    };
    let mut out = [0; 32];
    for lane in lanes(mask) {
        if !within(window, addresses[lane]) {
            return Err(trap(
                Kind::Space,
                lane as u32,
                format!("{:#x} is no generic address of this space", addresses[lane]),
            ));
        }
        out[lane] = addresses[lane] - window;
    }
    Ok(out)
}

/// `cvta`: generic addresses.
pub(crate) fn from_space(space: Space, addresses: &L64) -> L64 {
    let window = match space {
        Space::Shared => SHARED,
        Space::Local => LOCAL,
        _ => 0,
    };
    addresses.map(|a| a.wrapping_add(window))
}

/// A generic address's space and its address there.
pub(crate) fn resolve(space: Space, address: u64) -> (Space, u64) {
    match space {
        Space::Generic if within(SHARED, address) => (Space::Shared, address - SHARED),
        Space::Generic if within(LOCAL, address) => (Space::Local, address - LOCAL),
        Space::Generic => (Space::Global, address),
        space => (space, address),
    }
}

impl Warp {
    /// A collective instruction's lanes.
    pub(crate) fn together(&self, mask: u32, members: u32, what: &str) -> Result<(), Trap> {
        if mask == members {
            return Ok(());
        }
        let lane = mask.trailing_zeros();
        let (missing, strange) = (members & !mask, mask & !members);
        Err(trap(
            Kind::Lanes,
            lane,
            if missing != 0 {
                format!(
                    "{what} of the lanes {members:#010x}, of which {missing:#010x} do not execute it"
                )
            } else {
                format!("{what} of the lanes {members:#010x} is executed by {strange:#010x}, too")
            },
        ))
    }

    /// The member mask in a register, which must be that of the executing lanes.
    pub(crate) fn members(&self, mask: u32, register: u32, what: &str) -> Result<(), Trap> {
        let masks = &self.r32[register as usize];
        let first = masks[mask.trailing_zeros() as usize];
        if let Some(lane) = lanes(mask).find(|l| masks[*l] != first) {
            return Err(trap(
                Kind::Lanes,
                lane as u32,
                format!("{what} with different member masks"),
            ));
        }
        self.together(mask, first, what)
    }

    /// `shfl.sync`, after the ISA's pseudocode; registers d, p, a, b, c.
    pub(crate) fn shuffle(&mut self, how: Shuffle, [d, p, a, b, c]: [u32; 5], mask: u32) {
        let (a, b, c) = (
            &self.r32[a as usize],
            &self.r32[b as usize],
            &self.r32[c as usize],
        );
        let (mut out, mut inside) = ([0; 32], 0);
        for lane in 0..32 {
            let (by, clamp, segment) = (
                b[lane] as usize & 31,
                c[lane] as usize & 31,
                (c[lane] >> 8) as usize & 31,
            );
            let highest = lane & segment | clamp & !segment & 31;
            let (from, ok) = match how {
                Shuffle::Up => (
                    lane.wrapping_sub(by),
                    lane as isize - by as isize >= highest as isize,
                ),
                Shuffle::Down => (lane + by, lane + by <= highest),
                Shuffle::Butterfly => (lane ^ by, lane ^ by <= highest),
                Shuffle::Index => {
                    let from = lane & segment | by & !segment & 31;
                    (from, from <= highest)
                }
            };
            let from = if ok { from & 31 } else { lane };
            inside |= u32::from(ok) << lane;
            out[lane] = a[from];
        }
        put(&mut self.r32[d as usize], &out, mask);
        if p != NONE {
            self.set(p, inside, mask);
        }
    }

    /// The operations that are rare.
    pub(crate) fn rare(
        &mut self,
        op: &Op,
        mask: u32,
        machine: &mut Machine<'_>,
    ) -> Result<(), Trap> {
        let first = mask.trailing_zeros();
        match op {
            Op::Carry(carry) => self.carry(carry, mask),
            Op::Clock32(_) | Op::Clock64(_) => {
                machine.clock += 16;
                for lane in lanes(mask) {
                    match op {
                        Op::Clock32(d) => self.r32[*d as usize][lane] = machine.clock as u32,
                        Op::Clock64(d) => self.r64[*d as usize][lane] = machine.clock,
                        _ => {}
                    }
                }
            }
            Op::IsSpace(space, p, a) => {
                let mut value = 0;
                for lane in lanes(mask) {
                    let address = self.r64[*a as usize][lane];
                    value |= u32::from(resolve(Space::Generic, address).0 == *space) << lane;
                }
                self.set(*p, value, mask);
            }
            Op::Atom(atom) => self.atom(atom, mask, machine)?,
            Op::Vote {
                how,
                d,
                p,
                negated,
                mask: members,
            } => {
                self.members(mask, *members, "vote.sync")?;
                let p = self.preds[*p as usize];
                let votes = if *negated { !p } else { p } & mask;
                let value = match how {
                    Vote::Ballot => u64::from(votes),
                    Vote::All => u64::from(votes == mask),
                    Vote::Any => u64::from(votes != 0),
                    Vote::Uniform => u64::from(votes == mask || votes == 0),
                };
                lanes(mask).for_each(|lane| self.put(*d, lane, value));
            }
            Op::ActiveMask(d) => put(&mut self.r32[*d as usize], &[mask; 32], mask),
            Op::Match {
                all,
                d,
                p,
                a,
                mask: members,
            } => {
                self.members(mask, *members, "match.sync")?;
                let equal = |lane: usize| {
                    lanes(mask)
                        .filter(|l| self.get(*a, *l) == self.get(*a, lane))
                        .fold(0, |m, l| m | 1_u32 << l)
                };
                let same: Vec<u32> = (0..32).map(equal).collect();
                for lane in lanes(mask) {
                    self.r32[*d as usize][lane] = if *all && same[lane] != mask {
                        0
                    } else {
                        same[lane]
                    };
                }
                if *p != NONE {
                    self.set(
                        *p,
                        if same[first as usize] == mask {
                            FULL
                        } else {
                            0
                        },
                        mask,
                    );
                }
            }
            Op::Redux {
                how,
                d,
                a,
                mask: members,
            } => {
                self.members(mask, *members, "redux.sync")?;
                let a = &self.r32[*a as usize];
                let value = lanes(mask).map(|l| a[l]).reduce(|x, y| match how {
                    Reduce::Add => x.wrapping_add(y),
                    Reduce::Min(true) => (x as i32).min(y as i32) as u32,
                    Reduce::Min(false) => x.min(y),
                    Reduce::Max(true) => (x as i32).max(y as i32) as u32,
                    Reduce::Max(false) => x.max(y),
                    Reduce::And => x & y,
                    Reduce::Or => x | y,
                    Reduce::Xor => x ^ y,
                });
                put(&mut self.r32[*d as usize], &[value.unwrap_or(0); 32], mask);
            }
            Op::WarpSync(members) => {
                self.members(mask, *members, "bar.warp.sync")?;
                machine.shared.warp_barrier(self.index);
            }
            Op::CopyAsync(copy) => self.copy(copy, mask, machine)?,
            Op::Commit => self.copies.commit(mask),
            Op::Wait(allowed) => self
                .copies
                .wait(mask, *allowed, self.index, &mut machine.shared),
            Op::WaitAll => {
                self.copies.commit(mask);
                self.copies.wait(mask, 0, self.index, &mut machine.shared);
            }
            Op::Trap => return Err(trap(Kind::Trap, first, "the kernel asked for it")),
            _ => {}
        }
        Ok(())
    }
}

/// One lane of a 64-bit or 32-bit register.
pub(crate) fn wide(reg: Reg) -> bool {
    matches!(reg, Reg::R64(_))
}

/// Locks whatever became of who held it before.
pub(crate) fn hold(lock: &std::sync::Mutex<()>) -> std::sync::MutexGuard<'_, ()> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}
