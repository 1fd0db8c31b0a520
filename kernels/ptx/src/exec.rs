//! What lanes do with memory and with each other.

use std::sync::PoisonError;

use crate::error::{Kind, Trap, trap};
use crate::lanes::{FULL, L64, lanes};
use crate::lower::Code;
use crate::memory::{LOCAL, SHARED, View, within};
use crate::op::{Access, Base, Copy, NONE, Op, Reduce, Reg, Shuffle, Vote};
use crate::shared::Shared;
use crate::syntax::Space;
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

    fn read_any(
        &mut self,
        lane: usize,
        space: Space,
        address: u64,
        size: u32,
        machine: &mut Machine<'_>,
    ) -> Result<[u32; 4], Trap> {
        match resolve(space, address) {
            (Space::Shared, address) => machine.shared.load(self.index, lane as u32, address, size),
            (Space::Local, address) => self.read_local(lane, address, size),
            (Space::Param, address) => read_param(machine.params, lane as u32, address, size),
            (_, address) => {
                machine
                    .view
                    .note(lane as u32, address, size, false, machine.block)?;
                machine.view.load(lane as u32, address, size)
            }
        }
    }

    fn local_at(&self, lane: usize, address: u64, size: u32) -> Result<usize, Trap> {
        if address + u64::from(size) > self.local_used as u64 || address >> 32 != 0 {
            let reason = format!(
                "{size} bytes at byte {address} of {} bytes of local memory",
                self.local_used
            );
            return Err(trap(Kind::Bounds, lane as u32, reason));
        }
        if address & u64::from(size - 1) != 0 {
            return Err(trap(
                Kind::Alignment,
                lane as u32,
                format!("{size} bytes at byte {address} of local memory"),
            ));
        }
        Ok(lane * self.local_bytes + address as usize)
    }

    fn read_local(&self, lane: usize, address: u64, size: u32) -> Result<[u32; 4], Trap> {
        let at = self.local_at(lane, address, size)?;
        let mut out = [0; 4];
        if size >= 4 {
            let n = size as usize / 4;
            out[..n].copy_from_slice(&self.local[at / 4..at / 4 + n]);
        } else {
            out[0] = self.local[at / 4] >> (at % 4 * 8) & if size == 1 { 0xff } else { 0xffff };
        }
        Ok(out)
    }

    fn write_local(
        &mut self,
        lane: usize,
        address: u64,
        size: u32,
        value: [u32; 4],
    ) -> Result<(), Trap> {
        let at = self.local_at(lane, address, size)?;
        if size >= 4 {
            let n = size as usize / 4;
            self.local[at / 4..at / 4 + n].copy_from_slice(&value[..n]);
        } else {
            let shift = at % 4 * 8;
            let mask = (if size == 1 { 0xff } else { 0xffff }) << shift;
            self.local[at / 4] = self.local[at / 4] & !mask | value[0] << shift & mask;
        }
        Ok(())
    }

    pub(crate) fn load(
        &mut self,
        access: &Access,
        mask: u32,
        machine: &mut Machine<'_>,
    ) -> Result<(), Trap> {
        let addresses = self.addresses(access.base, access.offset);
        let size = u32::from(access.size * access.count);
        match access.space {
            Space::Global if machine.view.touched.is_none() => {
                let view = machine.view;
                for lane in lanes(mask) {
                    let value = view.load(lane as u32, addresses[lane], size)?;
                    self.take(access, lane, value);
                }
            }
            Space::Shared => {
                for lane in lanes(mask) {
                    let value =
                        machine
                            .shared
                            .load(self.index, lane as u32, addresses[lane], size)?;
                    self.take(access, lane, value);
                }
            }
            space => {
                for lane in lanes(mask) {
                    let value = self.read_any(lane, space, addresses[lane], size, machine)?;
                    self.take(access, lane, value);
                }
            }
        }
        Ok(())
    }

    /// Puts loaded words into a lane of the registers.
    #[inline]
    fn take(&mut self, access: &Access, lane: usize, value: [u32; 4]) {
        let wide = access.width == 64;
        let regs = &access.regs[..usize::from(access.count)];
        match (access.size, wide) {
            (4, false) => {
                for (reg, value) in regs.iter().zip(value) {
                    self.r32[*reg as usize][lane] = value;
                }
            }
            (8, true) => {
                for (reg, pair) in regs.iter().zip(value.chunks(2)) {
                    self.r64[*reg as usize][lane] = u64::from(pair[1]) << 32 | u64::from(pair[0]);
                }
            }
            (size, _) => {
                let bits = u32::from(size) * 8;
                for (i, reg) in regs.iter().enumerate() {
                    let at = i as u32 * bits;
                    let raw = u64::from(value[(at / 32) as usize] >> (at % 32)) << (64 - bits);
                    let extended = if access.signed {
                        (raw as i64 >> (64 - bits)) as u64
                    } else {
                        raw >> (64 - bits)
                    };
                    match access.width {
                        64 => self.r64[*reg as usize][lane] = extended,
                        16 => self.r32[*reg as usize][lane] = extended as u32 & 0xffff,
                        _ => self.r32[*reg as usize][lane] = extended as u32,
                    }
                }
            }
        }
    }

    pub(crate) fn store(
        &mut self,
        access: &Access,
        mask: u32,
        machine: &mut Machine<'_>,
    ) -> Result<(), Trap> {
        let addresses = self.addresses(access.base, access.offset);
        let size = u32::from(access.size * access.count);
        for lane in lanes(mask) {
            let value = self.give(access, lane);
            let lane32 = lane as u32;
            match resolve(access.space, addresses[lane]) {
                (Space::Shared, address) => machine
                    .shared
                    .store(self.index, lane32, address, size, value)?,
                (Space::Local, address) => self.write_local(lane, address, size, value)?,
                (_, address) => {
                    if machine.view.touched.is_some() {
                        machine
                            .view
                            .note(lane32, address, size, true, machine.block)?;
                    }
                    machine.view.store(lane32, address, size, value)?;
                }
            }
        }
        Ok(())
    }

    /// The words that a lane stores.
    #[inline]
    fn give(&self, access: &Access, lane: usize) -> [u32; 4] {
        let wide = access.width == 64;
        let mut out = [0; 4];
        let regs = &access.regs[..usize::from(access.count)];
        match (access.size, wide) {
            (4, false) => {
                for (out, reg) in out.iter_mut().zip(regs) {
                    *out = self.r32[*reg as usize][lane];
                }
            }
            (8, true) => {
                for (i, reg) in regs.iter().enumerate() {
                    let value = self.r64[*reg as usize][lane];
                    (out[2 * i], out[2 * i + 1]) = (value as u32, (value >> 32) as u32);
                }
            }
            (size, _) => {
                let bits = u32::from(size) * 8;
                for (i, reg) in regs.iter().enumerate() {
                    let at = i as u32 * bits;
                    let value = if wide {
                        self.r64[*reg as usize][lane] as u32
                    } else {
                        self.r32[*reg as usize][lane]
                    };
                    let value = if bits < 32 {
                        value & ((1 << bits) - 1)
                    } else {
                        value
                    };
                    out[(at / 32) as usize] |= value << (at % 32);
                }
            }
        }
        out
    }

    pub(crate) fn load_matrix(
        &mut self,
        count: u8,
        transposed: bool,
        d: [u32; 4],
        (base, offset): (Base, i64),
        machine: &mut Machine<'_>,
    ) -> Result<(), Trap> {
        let addresses = self.addresses(base, offset);
        let mut matrices = [[0; 32]; 4];
        for (m, matrix) in matrices.iter_mut().enumerate().take(usize::from(count)) {
            let mut rows = [[0; 4]; 8];
            for (r, row) in rows.iter_mut().enumerate() {
                let lane = m * 8 + r;
                let address = match resolve(Space::Generic, addresses[lane]) {
                    (Space::Shared, address) => address,
                    _ => addresses[lane],
                };
                *row = machine.shared.load(self.index, lane as u32, address, 16)?;
            }
            *matrix = crate::tensor::matrix(&rows, transposed);
        }
        for (d, matrix) in d.iter().zip(&matrices).take(usize::from(count)) {
            self.r32[*d as usize] = *matrix;
        }
        Ok(())
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

    fn copy(&mut self, copy: &Copy, mask: u32, machine: &mut Machine<'_>) -> Result<(), Trap> {
        let to = self.addresses(copy.to.0, copy.to.1);
        let from = self.addresses(copy.from.0, copy.from.1);
        let size = u32::from(copy.size);
        let (mut at, mut values) = ([0; 32], [[0; 4]; 32]);
        for lane in lanes(mask) {
            let lane32 = lane as u32;
            let mut bytes = if copy.source == NONE {
                size
            } else {
                self.r32[copy.source as usize][lane]
            };
            if copy.ignore != NONE && self.preds[copy.ignore as usize] >> lane & 1 == 1 {
                bytes = 0;
            }
            if bytes > size {
                return Err(trap(
                    Kind::Bounds,
                    lane32,
                    format!("a copy of {size} bytes of which {bytes} are read"),
                ));
            }
            values[lane] = self.copied(lane, from[lane], size, bytes, machine)?;
            let to = match resolve(Space::Generic, to[lane]) {
                (Space::Shared, address) => address,
                _ => to[lane],
            };
            machine.shared.begin_copy(self.index, lane32, to, size)?;
            at[lane] = to as u32;
        }
        self.copies.begin(mask, size, at, values);
        Ok(())
    }

    /// What a copy reads: its first bytes, then zeros.
    fn copied(
        &mut self,
        lane: usize,
        from: u64,
        size: u32,
        bytes: u32,
        machine: &mut Machine<'_>,
    ) -> Result<[u32; 4], Trap> {
        if bytes == size {
            return self.read_any(lane, Space::Global, from, size, machine);
        }
        if from & u64::from(size - 1) != 0 {
            return Err(trap(
                Kind::Alignment,
                lane as u32,
                format!("a copy of {size} bytes from {from:#x}"),
            ));
        }
        let mut out = [0; 4];
        for i in 0..bytes {
            let byte = self.read_any(lane, Space::Global, from + u64::from(i), 1, machine)?[0];
            out[i as usize / 4] |= byte << (i % 4 * 8);
        }
        Ok(out)
    }
}

fn read_param(params: &[u8], lane: u32, address: u64, size: u32) -> Result<[u32; 4], Trap> {
    let end = address.saturating_add(u64::from(size));
    let Some(bytes) = params
        .get(address as usize..end as usize)
        .filter(|_| end <= params.len() as u64)
    else {
        return Err(trap(
            Kind::Bounds,
            lane,
            format!(
                "{size} bytes at byte {address} of {} bytes of parameters",
                params.len()
            ),
        ));
    };
    let mut out = [0; 4];
    for (i, byte) in bytes.iter().enumerate() {
        out[i / 4] |= u32::from(*byte) << (i % 4 * 8);
    }
    Ok(out)
}

/// One lane of a 64-bit or 32-bit register.
pub(crate) fn wide(reg: Reg) -> bool {
    matches!(reg, Reg::R64(_))
}

/// Locks whatever became of who held it before.
pub(crate) fn hold(lock: &std::sync::Mutex<()>) -> std::sync::MutexGuard<'_, ()> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}
