//! A block's shared memory, and the order in which its warps touch it.
//!
//! For every piece of it (a word, or less in kernels that store less) the last write is remembered with its warp, and the warps that
//! read it since. Time is the number of barriers that the block has passed. A warp has synchronised with another one up to the time of
//! the last barrier that both took part in; what the other one did later is not ordered with what it does now, and is a race.

use crate::error::{Kind, Trap, trap};
use crate::lanes::{L32, L64, lanes};

/// A piece that an asynchronous copy will write.
const IN_FLIGHT: u32 = u32::MAX;

/// Shared memory of one block.
pub(crate) struct Shared {
    words: Vec<u32>,
    bytes: usize,
    /// Whether races are looked for; copies in flight always are.
    races: bool,
    /// Whether lanes of one warp are held to order among themselves, too.
    lanes: bool,
    /// log₂ of a piece's bytes.
    shift: u32,
    /// Last write of a piece: time · 32 + warp, [`IN_FLIGHT`], or 0.
    written: Vec<u32>,
    /// Time of the last read of a piece, and the warps that read it then.
    read: Vec<(u32, u32)>,
    /// Lane of the last write and its warp's count of synchronisations.
    wrote: Vec<(u8, u32)>,
    /// Barriers passed, from 1.
    time: u32,
    /// `synced[w][v]`: what warp v wrote before this time is visible to w.
    synced: Vec<[u32; 32]>,
    /// Per warp: the least of its row but for itself, times 32.
    floor: [u32; 32],
    /// Synchronisations of each warp's lanes.
    warp_time: [u32; 32],
}

impl Shared {
    pub(crate) fn new(races: bool, lanes: bool, piece: u32) -> Self {
        Self {
            words: Vec::new(),
            bytes: 0,
            races,
            lanes,
            shift: piece.trailing_zeros(),
            written: Vec::new(),
            read: Vec::new(),
            wrote: Vec::new(),
            time: 1,
            synced: Vec::new(),
            floor: [0; 32],
            warp_time: [1; 32],
        }
    }

    /// Makes it that of a new block: nothing is written, every byte 0xFF.
    pub(crate) fn reset(&mut self, bytes: usize, warps: usize) {
        fn again<T: Copy>(v: &mut Vec<T>, n: usize, value: T) {
            v.clear();
            v.resize(n, value);
        }
        let pieces = bytes.div_ceil(1 << self.shift);
        again(&mut self.words, bytes.div_ceil(4), u32::MAX);
        again(&mut self.written, pieces, 0);
        if self.races {
            again(&mut self.read, pieces, (0, 0));
        }
        if self.lanes {
            again(&mut self.wrote, pieces, (0, 0));
        }
        self.bytes = bytes;
        self.time = 1;
        again(&mut self.synced, warps, [1; 32]);
        self.floor = [32; 32];
        self.warp_time = [1; 32];
    }

    /// A warp comes to a barrier at which it does not wait: what it did until now is ordered before those who pass it.
    pub(crate) fn arrive(&mut self) -> u32 {
        self.time += 1;
        self.time
    }

    /// A barrier is passed by warps that waited (`None`) or came at a time and went on; those are no wiser for it.
    pub(crate) fn barrier(&mut self, warps: &[(usize, Option<u32>)]) {
        self.time += 1;
        let mut joined = [0; 32];
        for (w, time) in warps {
            for (j, s) in joined.iter_mut().zip(self.synced[*w]) {
                *j = s.max(*j);
            }
            joined[*w] = joined[*w].max(time.unwrap_or(self.time));
        }
        let all = self.synced.len();
        for (w, _) in warps.iter().filter(|(_, time)| time.is_none()) {
            self.synced[*w] = joined;
            let others = (0..all).filter(|v| v != w).map(|v| joined[v]);
            self.floor[*w] = others.min().unwrap_or(self.time) * 32;
            self.warp_time[*w] += 1;
        }
    }

    /// The lanes of a warp have synchronised.
    pub(crate) fn warp_barrier(&mut self, warp: usize) {
        self.warp_time[warp] += 1;
    }

    #[cold]
    fn bad(&self, lane: u32, address: u64, size: u32) -> Trap {
        if address >> 32 != 0 {
            return trap(
                Kind::Space,
                lane,
                format!("{address:#x} is no address of shared memory"),
            );
        }
        if address + u64::from(size) > self.bytes as u64 {
            let bytes = self.bytes;
            return trap(
                Kind::Bounds,
                lane,
                format!("{size} bytes at byte {address} of {bytes} bytes of shared memory"),
            );
        }
        trap(
            Kind::Alignment,
            lane,
            format!(
                "{size} bytes at byte {address} of shared memory, which is no multiple of {size}"
            ),
        )
    }

    #[inline]
    fn check(&self, lane: u32, address: u64, size: u32) -> Result<usize, Trap> {
        if address + u64::from(size) > self.bytes as u64
            || address & u64::from(size - 1) != 0
            || address >> 32 != 0
        {
            return Err(self.bad(lane, address, size));
        }
        Ok(address as usize)
    }

    #[inline]
    fn pieces(&self, at: usize, size: u32) -> std::ops::Range<usize> {
        at >> self.shift..((at + size as usize - 1) >> self.shift) + 1
    }

    /// Whether what stands in a piece's last write is ordered before what a warp does now.
    #[cold]
    fn unordered_write(
        &self,
        warp: usize,
        lane: u32,
        piece: usize,
        doing: &str,
    ) -> Result<(), Trap> {
        let written = self.written[piece];
        let byte = piece << self.shift;
        if written == IN_FLIGHT {
            let reason = format!(
                "{doing} byte {byte} of shared memory, which an asynchronous copy that was not waited for will write"
            );
            return Err(trap(Kind::InFlight, lane, reason));
        }
        let (time, other) = (written / 32, written as usize % 32);
        if !self.races || other == warp || time < self.synced[warp].get(other).copied().unwrap_or(0)
        {
            return Ok(());
        }
        let reason = format!(
            "{doing} byte {byte} of shared memory, which warp {other} wrote with no barrier in between"
        );
        Err(trap(Kind::Race, lane, reason))
    }

    /// Notes a read by a lane.
    #[inline]
    fn note_read(&mut self, warp: usize, lane: u32, at: usize, size: u32) -> Result<(), Trap> {
        let floor = self.floor[warp];
        let (time, bit) = (self.time, 1 << warp);
        if size == 1 << self.shift && self.races && !self.lanes {
            // the usual case
            let piece = at >> self.shift;
            if self.written[piece] >= floor {
                self.unordered_write(warp, lane, piece, "reads")?;
            }
            let (when, who) = &mut self.read[piece];
            *who = if *when == time { *who | bit } else { bit };
            *when = time;
            return Ok(());
        }
        let pieces = self.pieces(at, size);
        if self.written[pieces.clone()].iter().any(|w| *w >= floor) {
            for piece in pieces.clone() {
                self.unordered_write(warp, lane, piece, "reads")?;
            }
        }
        if self.races {
            for (when, who) in &mut self.read[pieces.clone()] {
                *who = if *when == time { *who | bit } else { bit };
                *when = time;
            }
        }
        if self.lanes {
            self.lane_order(warp, lane, pieces, "reads")
        } else {
            Ok(())
        }
    }

    /// Notes a write by a lane, and what the pieces hold then: this warp's write or one in flight.
    #[inline]
    fn note_write(
        &mut self,
        warp: usize,
        lane: u32,
        at: usize,
        size: u32,
        flight: bool,
    ) -> Result<(), Trap> {
        let pieces = self.pieces(at, size);
        let floor = self.floor[warp];
        if self.written[pieces.clone()].iter().any(|w| *w >= floor) {
            for piece in pieces.clone() {
                self.unordered_write(warp, lane, piece, "overwrites")?;
            }
        }
        if self.races {
            for piece in pieces.clone() {
                let (time, who) = self.read[piece];
                if who & !(1 << warp) != 0 && time * 32 >= floor {
                    self.unordered_read(warp, lane, piece)?;
                }
            }
        }
        let value = if flight {
            IN_FLIGHT
        } else {
            self.time * 32 + warp as u32
        };
        self.written[pieces.clone()].fill(value);
        if self.lanes && !flight {
            self.lane_order(warp, lane, pieces.clone(), "overwrites")?;
            let now = self.warp_time[warp];
            self.wrote[pieces].fill((lane as u8, now));
        }
        Ok(())
    }

    #[cold]
    fn unordered_read(&self, warp: usize, lane: u32, piece: usize) -> Result<(), Trap> {
        let (time, who) = self.read[piece];
        for other in lanes(who & !(1 << warp)) {
            if time >= self.synced[warp].get(other).copied().unwrap_or(0) {
                let byte = piece << self.shift;
                let reason = format!(
                    "overwrites byte {byte} of shared memory, which warp {other} read with no barrier in between"
                );
                return Err(trap(Kind::Race, lane, reason));
            }
        }
        Ok(())
    }

    /// What another lane of the same warp wrote since the warp's last synchronisation is not ordered on hardware since Volta.
    fn lane_order(
        &self,
        warp: usize,
        lane: u32,
        pieces: std::ops::Range<usize>,
        doing: &str,
    ) -> Result<(), Trap> {
        for piece in pieces {
            let (other, time) = self.wrote[piece];
            if u32::from(other) != lane
                && time == self.warp_time[warp]
                && self.written[piece] as usize % 32 == warp
            {
                let byte = piece << self.shift;
                let reason = format!(
                    "{doing} byte {byte} of shared memory, which lane {other} of the same warp wrote with no bar.warp.sync in between"
                );
                return Err(trap(Kind::Race, lane, reason));
            }
        }
        Ok(())
    }

    /// Loads `size` bytes in every lane of a mask: words, or a part of one.
    pub(crate) fn gather<const N: usize>(
        &mut self,
        warp: usize,
        mask: u32,
        addresses: &L64,
        size: u32,
        out: &mut [L32; N],
    ) -> Result<(), Trap> {
        let mut last = None;
        for lane in lanes(mask) {
            // lanes often read the same word
            if let Some(last) =
                last.filter(|last| addresses[*last] == addresses[lane] && !self.lanes)
            {
                out.iter_mut()
                    .for_each(|out: &mut L32| out[lane] = out[last]);
                continue;
            }
            last = Some(lane);
            let at = self.check(lane as u32, addresses[lane], size)?;
            self.note_read(warp, lane as u32, at, size)?;
            if size < 4 {
                out[0][lane] =
                    self.words[at / 4] >> (at % 4 * 8) & if size == 1 { 0xff } else { 0xffff };
                continue;
            }
            for (word, out) in self.words[at / 4..]
                .iter()
                .zip(out.iter_mut())
                .take(size as usize / 4)
            {
                out[lane] = *word;
            }
        }
        Ok(())
    }

    /// Stores `size` bytes in every lane of a mask.
    pub(crate) fn scatter<const N: usize>(
        &mut self,
        warp: usize,
        mask: u32,
        addresses: &L64,
        size: u32,
        values: &[L32; N],
    ) -> Result<(), Trap> {
        for lane in lanes(mask) {
            let at = self.check(lane as u32, addresses[lane], size)?;
            self.note_write(warp, lane as u32, at, size, false)?;
            self.put(at, size, values, lane);
        }
        Ok(())
    }

    /// Loads a row of 16 bytes.
    #[inline]
    pub(crate) fn row(
        &mut self,
        warp: usize,
        lane: u32,
        address: u64,
        out: &mut [u32; 4],
    ) -> Result<(), Trap> {
        let at = self.check(lane, address, 16)?;
        self.note_read(warp, lane, at, 16)?;
        out.copy_from_slice(&self.words[at / 4..at / 4 + 4]);
        Ok(())
    }

    fn put<const N: usize>(&mut self, at: usize, size: u32, values: &[L32; N], lane: usize) {
        let w = at / 4;
        if size >= 4 {
            for (word, values) in self.words[w..w + size as usize / 4].iter_mut().zip(values) {
                *word = values[lane];
            }
        } else {
            let shift = at % 4 * 8;
            let mask = (if size == 1 { 0xff } else { 0xffff }) << shift;
            self.words[w] = self.words[w] & !mask | values[0][lane] << shift & mask;
        }
    }

    /// Marks the destination of an asynchronous copy.
    pub(crate) fn begin_copy(
        &mut self,
        warp: usize,
        lane: u32,
        address: u64,
        size: u32,
    ) -> Result<(), Trap> {
        let at = self.check(lane, address, size)?;
        self.note_write(warp, lane, at, size, true)
    }

    /// Writes what an asynchronous copy brought, as its warp's write at the time of its wait.
    pub(crate) fn end_copy(
        &mut self,
        warp: usize,
        lane: usize,
        at: usize,
        size: u32,
        values: &[L32; 4],
    ) {
        let pieces = self.pieces(at, size);
        self.written[pieces.clone()].fill(self.time * 32 + warp as u32);
        if self.lanes {
            let now = self.warp_time[warp];
            self.wrote[pieces].fill((lane as u8, now));
        }
        self.put(at, size, values, lane);
    }

    /// An atomic operation's word, which any warp may change at any time: it is checked for bounds and copies in flight alone.
    pub(crate) fn atomic(
        &mut self,
        lane: u32,
        address: u64,
        size: u32,
    ) -> Result<&mut [u32], Trap> {
        let at = self.check(lane, address, size)?;
        let pieces = self.pieces(at, size);
        if let Some(piece) = pieces.into_iter().find(|p| self.written[*p] == IN_FLIGHT) {
            self.unordered_write(32, lane, piece, "changes")?;
        }
        Ok(&mut self.words[at / 4..at / 4 + size.div_ceil(4) as usize])
    }
}
