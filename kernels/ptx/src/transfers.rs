//! Loads, stores and copies of all lanes of a warp.

use crate::error::{Kind, Trap, trap};
use crate::exec::{Machine, resolve};
use crate::lanes::{L32, L64, lanes};
use crate::op::{Access, Base, Copy, NONE};
use crate::syntax::Space;
use crate::warp::{Warp, put};

impl Warp {
    pub(crate) fn load(
        &mut self,
        access: &Access,
        mask: u32,
        machine: &mut Machine<'_>,
    ) -> Result<(), Trap> {
        match access.size * access.count {
            16 => self.load_words::<4>(access, mask, machine),
            8 => self.load_words::<2>(access, mask, machine),
            _ => self.load_words::<1>(access, mask, machine),
        }
    }

    /// Loads `N` words, or a part of one.
    fn load_words<const N: usize>(
        &mut self,
        access: &Access,
        mask: u32,
        machine: &mut Machine<'_>,
    ) -> Result<(), Trap> {
        let addresses = self.addresses(access.base, access.offset);
        let size = u32::from(access.size * access.count);
        let mut words = [[0; 32]; N];
        match access.space {
            Space::Global => {
                machine
                    .view
                    .gather(mask, &addresses, size, machine.block, &mut words)?
            }
            Space::Shared => machine
                .shared
                .gather(self.index, mask, &addresses, size, &mut words)?,
            Space::Param if matches!(access.base, Base::None) => {
                let value = read_param(machine.params, mask.trailing_zeros(), addresses[0], size)?;
                words = std::array::from_fn(|j| [value[j]; 32]);
            }
            Space::Param => {
                // lanes mostly read the same parameter
                let (mut last, mut value) = (None, [0; 4]);
                for lane in lanes(mask) {
                    if last != Some(addresses[lane]) {
                        value = read_param(machine.params, lane as u32, addresses[lane], size)?;
                        last = Some(addresses[lane]);
                    }
                    for (words, value) in words.iter_mut().zip(value) {
                        words[lane] = value;
                    }
                }
            }
            Space::Local => {
                for lane in lanes(mask) {
                    let value = self.read_local(lane, addresses[lane], size)?;
                    for (words, value) in words.iter_mut().zip(value) {
                        words[lane] = value;
                    }
                }
            }
            space => {
                for lane in lanes(mask) {
                    let value = self.read(lane, space, addresses[lane], size, machine)?;
                    for (words, value) in words.iter_mut().zip(value) {
                        words[lane] = value;
                    }
                }
            }
        }
        self.take(access, mask, &words);
        Ok(())
    }

    /// Puts loaded words into registers.
    #[inline]
    fn take<const N: usize>(&mut self, access: &Access, mask: u32, words: &[L32; N]) {
        let regs = access.regs.iter().take(usize::from(access.count));
        match (access.size, access.width) {
            (4, 16 | 32) => {
                for (reg, words) in regs.zip(words) {
                    put(&mut self.r32[*reg as usize], words, mask);
                }
            }
            (8, 64) => {
                for (reg, pair) in regs.zip(words.chunks_exact(2)) {
                    let mut value = [0; 32];
                    for lane in 0..32 {
                        value[lane] = u64::from(pair[1][lane]) << 32 | u64::from(pair[0][lane]);
                    }
                    put(&mut self.r64[*reg as usize], &value, mask);
                }
            }
            (size, width) => {
                let bits = u32::from(size) * 8;
                for (i, reg) in regs.enumerate() {
                    let at = i as u32 * bits;
                    let words = &words[(at / 32) as usize];
                    let value = words.map(|word| {
                        let raw = u64::from(word >> (at % 32)) << (64 - bits);
                        let signed = raw as i64 >> (64 - bits);
                        if access.signed {
                            signed as u64
                        } else {
                            raw >> (64 - bits)
                        }
                    });
                    match width {
                        64 => put(&mut self.r64[*reg as usize], &value, mask),
                        16 => put(
                            &mut self.r32[*reg as usize],
                            &value.map(|v| v as u32 & 0xffff),
                            mask,
                        ),
                        _ => put(&mut self.r32[*reg as usize], &value.map(|v| v as u32), mask),
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
        match access.size * access.count {
            16 => self.store_words::<4>(access, mask, machine),
            8 => self.store_words::<2>(access, mask, machine),
            _ => self.store_words::<1>(access, mask, machine),
        }
    }

    fn store_words<const N: usize>(
        &mut self,
        access: &Access,
        mask: u32,
        machine: &mut Machine<'_>,
    ) -> Result<(), Trap> {
        let addresses = self.addresses(access.base, access.offset);
        let size = u32::from(access.size * access.count);
        let mut words = [[0; 32]; N];
        self.give(access, &mut words);
        match access.space {
            Space::Global => machine
                .view
                .scatter(mask, &addresses, size, machine.block, &words),
            Space::Shared => machine
                .shared
                .scatter(self.index, mask, &addresses, size, &words),
            Space::Local => {
                for lane in lanes(mask) {
                    self.write_local(lane, addresses[lane], size, &words)?;
                }
                Ok(())
            }
            space => {
                for lane in lanes(mask) {
                    let one = 1 << lane;
                    let (space, address) = resolve(space, addresses[lane]);
                    let mut there = [0; 32];
                    there[lane] = address;
                    match space {
                        Space::Local => self.write_local(lane, address, size, &words)?,
                        Space::Shared => machine
                            .shared
                            .scatter(self.index, one, &there, size, &words)?,
                        _ => machine
                            .view
                            .scatter(one, &there, size, machine.block, &words)?,
                    }
                }
                Ok(())
            }
        }
    }

    /// The words that all lanes store.
    #[inline]
    fn give<const N: usize>(&self, access: &Access, words: &mut [L32; N]) {
        let regs = access.regs.iter().take(usize::from(access.count));
        match (access.size, access.width) {
            (4, 16 | 32) => {
                for (reg, words) in regs.zip(words) {
                    *words = self.r32[*reg as usize];
                }
            }
            (8, 64) => {
                for (reg, pair) in regs.zip(words.chunks_exact_mut(2)) {
                    let value = &self.r64[*reg as usize];
                    pair[0] = value.map(|v| v as u32);
                    pair[1] = value.map(|v| (v >> 32) as u32);
                }
            }
            (size, width) => {
                let bits = u32::from(size) * 8;
                let ones = if bits < 32 { (1 << bits) - 1 } else { u32::MAX };
                for (i, reg) in regs.enumerate() {
                    let at = i as u32 * bits;
                    let value = if width == 64 {
                        self.r64[*reg as usize].map(|v| v as u32)
                    } else {
                        self.r32[*reg as usize]
                    };
                    for (word, value) in words[(at / 32) as usize].iter_mut().zip(value) {
                        *word |= (value & ones) << (at % 32);
                    }
                }
            }
        }
    }

    /// Reads 1 to 16 bytes of a lane in any state space.
    fn read(
        &mut self,
        lane: usize,
        space: Space,
        address: u64,
        size: u32,
        machine: &mut Machine<'_>,
    ) -> Result<[u32; 4], Trap> {
        let (space, address) = resolve(space, address);
        let mut words = [[0; 32]; 4];
        let mut there = [0; 32];
        there[lane] = address;
        let one = 1 << lane;
        match space {
            Space::Shared => machine
                .shared
                .gather(self.index, one, &there, size, &mut words)?,
            Space::Local => return self.read_local(lane, address, size),
            Space::Param => return read_param(machine.params, lane as u32, address, size),
            _ => machine
                .view
                .gather(one, &there, size, machine.block, &mut words)?,
        }
        Ok(words.map(|words| words[lane]))
    }

    fn local_at(&self, lane: usize, address: u64, size: u32) -> Result<usize, Trap> {
        if address + u64::from(size) > self.local_used as u64 || address >> 32 != 0 {
            let used = self.local_used;
            let reason = format!("{size} bytes at byte {address} of {used} bytes of local memory");
            return Err(trap(Kind::Bounds, lane as u32, reason));
        }
        if address & u64::from(size - 1) != 0 {
            let reason = format!("{size} bytes at byte {address} of local memory");
            return Err(trap(Kind::Alignment, lane as u32, reason));
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

    fn write_local<const N: usize>(
        &mut self,
        lane: usize,
        address: u64,
        size: u32,
        words: &[L32; N],
    ) -> Result<(), Trap> {
        let at = self.local_at(lane, address, size)?;
        if size >= 4 {
            for (local, words) in self.local[at / 4..].iter_mut().zip(words) {
                *local = words[lane];
            }
        } else {
            let shift = at % 4 * 8;
            let mask = (if size == 1 { 0xff } else { 0xffff }) << shift;
            self.local[at / 4] = self.local[at / 4] & !mask | words[0][lane] << shift & mask;
        }
        Ok(())
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
                machine
                    .shared
                    .row(self.index, lane as u32, addresses[lane], row)?;
            }
            *matrix = crate::tensor::matrix(&rows, transposed);
        }
        for (d, matrix) in d.iter().zip(&matrices).take(usize::from(count)) {
            self.r32[*d as usize] = *matrix;
        }
        Ok(())
    }

    /// `cp.async`: what the source holds now is kept until the lane waits.
    pub(crate) fn copy(
        &mut self,
        copy: &Copy,
        mask: u32,
        machine: &mut Machine<'_>,
    ) -> Result<(), Trap> {
        let to = self.addresses(copy.to.0, copy.to.1);
        let from = self.addresses(copy.from.0, copy.from.1);
        let size = u32::from(copy.size);
        let mut bytes = if copy.source == NONE {
            [size; 32]
        } else {
            self.r32[copy.source as usize]
        };
        let mut whole = 0;
        for lane in lanes(mask) {
            if copy.ignore != NONE && self.preds[copy.ignore as usize] >> lane & 1 == 1 {
                bytes[lane] = 0;
            }
            if bytes[lane] > size {
                let reason = format!("a copy of {size} bytes of which {} are read", bytes[lane]);
                return Err(trap(Kind::Bounds, lane as u32, reason));
            }
            if bytes[lane] == size {
                whole |= 1 << lane;
            } else if from[lane] & u64::from(size - 1) != 0 {
                let reason = format!("a copy of {size} bytes from {:#x}", from[lane]);
                return Err(trap(Kind::Alignment, lane as u32, reason));
            }
        }
        let mut words = [[0; 32]; 4];
        machine
            .view
            .gather(whole, &from, size, machine.block, &mut words)?;
        for lane in lanes(mask & !whole) {
            words.iter_mut().for_each(|words| words[lane] = 0);
            for i in 0..bytes[lane] {
                let byte =
                    self.read(lane, Space::Global, from[lane] + u64::from(i), 1, machine)?[0];
                words[i as usize / 4][lane] |= byte << (i % 4 * 8);
            }
        }
        for lane in lanes(mask) {
            machine
                .shared
                .begin_copy(self.index, lane as u32, to[lane], size)?;
        }
        self.copies.begin(mask, size, &low(&to), &words);
        Ok(())
    }
}

fn low(x: &L64) -> L32 {
    x.map(|x| x as u32)
}

fn read_param(params: &[u8], lane: u32, address: u64, size: u32) -> Result<[u32; 4], Trap> {
    let end = address.saturating_add(u64::from(size));
    let inside = end <= params.len() as u64;
    let Some(bytes) = params
        .get(address as usize..end as usize)
        .filter(|_| inside)
    else {
        let all = params.len();
        let reason = format!("{size} bytes at byte {address} of {all} bytes of parameters");
        return Err(trap(Kind::Bounds, lane, reason));
    };
    let mut out = [0; 4];
    for (i, byte) in bytes.iter().enumerate() {
        out[i / 4] |= u32::from(*byte) << (i % 4 * 8);
    }
    Ok(out)
}
