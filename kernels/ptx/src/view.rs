//! Device memory as a launch sees it: accesses of lanes, checked.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::error::{Kind, Trap, trap};
use crate::lanes::{BIT, L32, L64, lanes};
use crate::memory::{Allocation, CONSTS, GLOBALS, LOCAL, SHARED, WINDOW, Windows, within};

/// Who touched the pieces of 2 bytes of an allocation during a launch: a block's number plus 1, or [`MANY`].
pub(crate) struct Touched {
    pub(crate) written: Box<[AtomicU32]>,
    pub(crate) read: Box<[AtomicU32]>,
}

/// Several blocks.
const MANY: u32 = u32::MAX;

/// What a launch sees of device memory.
pub(crate) struct View<'a> {
    pub(crate) windows: Windows,
    pub(crate) globals: &'a [Allocation],
    pub(crate) consts: &'a [Allocation],
    /// By window, where blocks are checked against each other.
    pub(crate) touched: Option<Vec<std::sync::OnceLock<Touched>>>,
    pub(crate) wide: &'a Mutex<()>,
}

impl View<'_> {
    /// The allocation of an access and where in it, checked.
    #[inline]
    pub(crate) fn find(
        &self,
        lane: u32,
        address: u64,
        size: u32,
        write: bool,
    ) -> Result<(&Allocation, usize), Trap> {
        let number = address >> WINDOW;
        let at = address & ((1 << WINDOW) - 1);
        if let Some(Some(allocation)) = self.windows.get(number as usize)
            && at + u64::from(size) <= allocation.bytes as u64
            && at & u64::from(size - 1) == 0
        {
            return Ok((allocation, at as usize));
        }
        self.find_rare(lane, address, size, write)
    }

    #[cold]
    fn find_rare(
        &self,
        lane: u32,
        address: u64,
        size: u32,
        write: bool,
    ) -> Result<(&Allocation, usize), Trap> {
        let number = address >> WINDOW;
        let at = address & ((1 << WINDOW) - 1);
        let what = if write { "store" } else { "load" };
        let found = if number >= CONSTS {
            self.consts.get((number - CONSTS) as usize)
        } else if number >= GLOBALS {
            self.globals.get((number - GLOBALS) as usize)
        } else {
            self.windows.get(number as usize).and_then(|w| w.as_deref())
        };
        let Some(allocation) = found else {
            return Err(if within(SHARED, address) || within(LOCAL, address) {
                trap(
                    Kind::Space,
                    lane,
                    format!(
                        "{what} at {address:#x}, which is a generic address of shared or local memory"
                    ),
                )
            } else if address < 1 << WINDOW {
                trap(
                    Kind::Bounds,
                    lane,
                    format!(
                        "{what} at {address:#x}, which is no device address (null, or one of shared memory)"
                    ),
                )
            } else {
                trap(
                    Kind::Bounds,
                    lane,
                    format!("{what} at {address:#x}, where nothing is allocated"),
                )
            });
        };
        if write && number >= CONSTS {
            return Err(trap(
                Kind::Space,
                lane,
                format!("{what} at {address:#x}, which is constant"),
            ));
        }
        if at + u64::from(size) > allocation.bytes as u64 {
            let (number, bytes) = (number << WINDOW, allocation.bytes);
            return Err(trap(
                Kind::Bounds,
                lane,
                format!(
                    "{what} of {size} bytes at byte {at} of the allocation {number:#x} of {bytes} bytes"
                ),
            ));
        }
        if at & u64::from(size - 1) != 0 {
            return Err(trap(
                Kind::Alignment,
                lane,
                format!("{what} of {size} bytes at {address:#x}, which is no multiple of {size}"),
            ));
        }
        Ok((allocation, at as usize))
    }

    /// Notes an access of a block and fails where another block has written there, or read what this one writes.
    pub(crate) fn note(
        &self,
        lane: u32,
        address: u64,
        size: u32,
        write: bool,
        block: u32,
    ) -> Result<(), Trap> {
        let Some(touched) = self
            .touched
            .as_ref()
            .and_then(|t| t.get((address >> WINDOW) as usize))
        else {
            return Ok(());
        };
        let (allocation, at) = self.find(lane, address, size, write)?;
        let touched = touched.get_or_init(|| {
            let none = || {
                (0..allocation.bytes.div_ceil(2))
                    .map(|_| AtomicU32::new(0))
                    .collect()
            };
            Touched {
                written: none(),
                read: none(),
            }
        });
        let me = block + 1;
        for piece in at / 2..(at + size as usize).div_ceil(2) {
            let other = if write {
                touched.written[piece].swap(me, Relaxed)
            } else {
                touched.written[piece].load(Relaxed)
            };
            if other != 0 && other != me {
                let what = if write { "writes" } else { "reads" };
                return Err(trap(
                    Kind::Race,
                    lane,
                    format!(
                        "{what} at {address:#x} what block number {} wrote in the same launch",
                        other - 1
                    ),
                ));
            }
            if write {
                let reader = touched.read[piece].load(Relaxed);
                if reader != 0 && reader != me {
                    return Err(trap(
                        Kind::Race,
                        lane,
                        format!(
                            "writes at {address:#x} what another block read in the same launch"
                        ),
                    ));
                }
            } else {
                let reader = touched.read[piece].load(Relaxed);
                if reader != me && reader != MANY {
                    let swapped =
                        touched.read[piece].swap(if reader == 0 { me } else { MANY }, Relaxed);
                    if swapped != reader && swapped != me {
                        touched.read[piece].store(MANY, Relaxed);
                    }
                }
            }
        }
        Ok(())
    }

    /// The one allocation that all lanes access, and where each does, 0 for those that do not; `None` where there is no such or
    /// some lane's access is wrong.
    #[inline]
    fn together(
        &self,
        mask: u32,
        addresses: &L64,
        size: u32,
    ) -> Option<(&Allocation, [usize; 32])> {
        if self.touched.is_some() {
            return None;
        }
        let number = addresses[mask.trailing_zeros() as usize & 31] >> WINDOW;
        let allocation = self.windows.get(number as usize)?.as_deref()?;
        let last = (allocation.bytes as u64).checked_sub(u64::from(size))?;
        let (mut offsets, mut bad) = ([0; 32], false);
        for lane in 0..32 {
            let offset = addresses[lane].wrapping_sub(number << WINDOW);
            let active = mask & BIT[lane] != 0;
            bad |= active & ((offset > last) | (offset & u64::from(size - 1) != 0));
            offsets[lane] = if active { offset as usize } else { 0 };
        }
        (!bad).then_some((allocation, offsets))
    }

    /// Loads `size` bytes in every lane of a mask: words, or a part of one. Other lanes get any value.
    pub(crate) fn gather<const N: usize>(
        &self,
        mask: u32,
        addresses: &L64,
        size: u32,
        block: u32,
        out: &mut [L32; N],
    ) -> Result<(), Trap> {
        let part = if size == 1 { 0xff } else { 0xffff };
        if let Some((allocation, offsets)) = self.together(mask, addresses, size) {
            let words = &allocation.words;
            if size < 4 {
                for (out, at) in out[0].iter_mut().zip(offsets) {
                    *out = words[at / 4].load(Relaxed) >> (at % 4 * 8) & part;
                }
                return Ok(());
            }
            for (j, out) in out.iter_mut().enumerate().take(size as usize / 4) {
                for (out, at) in out.iter_mut().zip(offsets) {
                    *out = words[at / 4 + j].load(Relaxed);
                }
            }
            return Ok(());
        }
        for lane in lanes(mask) {
            self.note(lane as u32, addresses[lane], size, false, block)?;
            let (allocation, at) = self.find(lane as u32, addresses[lane], size, false)?;
            if size < 4 {
                out[0][lane] = allocation.words[at / 4].load(Relaxed) >> (at % 4 * 8) & part;
            } else {
                for (j, out) in out.iter_mut().enumerate().take(size as usize / 4) {
                    out[lane] = allocation.words[at / 4 + j].load(Relaxed);
                }
            }
        }
        Ok(())
    }

    /// Stores `size` bytes in every lane of a mask.
    pub(crate) fn scatter<const N: usize>(
        &self,
        mask: u32,
        addresses: &L64,
        size: u32,
        block: u32,
        values: &[L32; N],
    ) -> Result<(), Trap> {
        let together = self.together(mask, addresses, size);
        for lane in lanes(mask) {
            let (allocation, at) = match &together {
                Some((allocation, offsets)) => (*allocation, offsets[lane]),
                None => {
                    self.note(lane as u32, addresses[lane], size, true, block)?;
                    self.find(lane as u32, addresses[lane], size, true)?
                }
            };
            if size < 4 {
                allocation.put(at, size as usize, values[0][lane]);
                continue;
            }
            for (word, values) in allocation.words[at / 4..].iter().zip(values) {
                word.store(values[lane], Relaxed);
            }
        }
        Ok(())
    }
}
