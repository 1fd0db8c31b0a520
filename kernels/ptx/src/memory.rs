//! Device memory.
//!
//! Every allocation owns a window of 64 GiB of addresses, so that no access past its end reaches another one, and the window is never
//! used again, so that no access after `free` does either. Words are relaxed atomics: blocks run on several threads.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::Error;
use crate::error::{Kind, Trap, trap};

/// Bits of an address below the number of its window.
pub(crate) const WINDOW: u32 = 36;
/// Number of the first window of a module's `.global` variables.
pub(crate) const GLOBALS: u64 = 1 << 22;
/// Number of the first window of a module's `.const` variables.
pub(crate) const CONSTS: u64 = 1 << 23;
/// The generic addresses of shared memory, 4 GiB from here.
pub(crate) const SHARED: u64 = 1 << 61;
/// The generic addresses of local memory.
pub(crate) const LOCAL: u64 = 1 << 62;

/// Whether a generic address lies in a window of 4 GiB.
pub(crate) fn within(window: u64, address: u64) -> bool {
    address >> 32 == window >> 32
}

/// One allocation.
pub(crate) struct Allocation {
    pub(crate) bytes: usize,
    pub(crate) words: Box<[AtomicU32]>,
}

impl Allocation {
    pub(crate) fn new(bytes: usize) -> Self {
        let words = (0..bytes.div_ceil(4))
            .map(|_| AtomicU32::new(u32::MAX))
            .collect();
        Self { bytes, words }
    }

    pub(crate) fn write(&self, mut at: usize, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if at.is_multiple_of(4) && bytes.len() >= 4 {
                let whole = bytes.len() / 4;
                for (word, chunk) in self.words[at / 4..].iter().zip(bytes.chunks_exact(4)) {
                    word.store(
                        u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]),
                        Relaxed,
                    );
                }
                at += whole * 4;
                bytes = &bytes[whole * 4..];
                continue;
            }
            self.put(at, 1, u32::from(bytes[0]));
            at += 1;
            bytes = &bytes[1..];
        }
    }

    fn read(&self, at: usize, out: &mut [u8]) {
        let mut done = 0;
        while done < out.len() {
            let word = self.words[(at + done) / 4].load(Relaxed).to_le_bytes();
            let skip = (at + done) % 4;
            let n = (4 - skip).min(out.len() - done);
            out[done..done + n].copy_from_slice(&word[skip..skip + n]);
            done += n;
        }
    }

    /// Replaces 1 or 2 bytes within a word.
    pub(crate) fn put(&self, at: usize, size: usize, value: u32) {
        let shift = at % 4 * 8;
        let mask = (if size == 1 { 0xff } else { 0xffff }) << shift;
        let word = &self.words[at / 4];
        let mut old = word.load(Relaxed);
        while let Err(now) =
            word.compare_exchange_weak(old, old & !mask | value << shift & mask, Relaxed, Relaxed)
        {
            old = now;
        }
    }
}

/// The allocations by the number of their window.
pub(crate) type Windows = Arc<Vec<Option<Arc<Allocation>>>>;

/// A device's memory. Fresh memory holds 0xFF bytes, which are NaN in every float type, so that what was never written shows.
pub struct Memory {
    windows: RwLock<Windows>,
    /// Bytes in use, and the most there have been.
    used: Mutex<(usize, usize)>,
    /// Held for atomics wider than a word.
    pub(crate) wide: Mutex<()>,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl Memory {
    /// Memory without allocations.
    #[must_use]
    pub fn new() -> Self {
        // window 0 holds the null pointer
        Self {
            windows: RwLock::new(Arc::new(vec![None])),
            used: Mutex::new((0, 0)),
            wide: Mutex::new(()),
        }
    }

    /// A new allocation, aligned to 256 bytes at least.
    ///
    /// # Errors
    /// Where it has no bytes or more than a window.
    pub fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        if bytes == 0 || bytes >= 1 << (WINDOW - 1) {
            return Err(Error::Memory {
                address: 0,
                reason: format!("{bytes} bytes cannot be allocated"),
            });
        }
        let allocation = Arc::new(Allocation::new(bytes));
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        let number = windows.len() as u64;
        if number >= GLOBALS {
            return Err(Error::Memory {
                address: 0,
                reason: "too many allocations in the life of a device".to_owned(),
            });
        }
        Arc::make_mut(&mut windows).push(Some(allocation));
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.0 += bytes;
        used.1 = used.1.max(used.0);
        Ok(number << WINDOW)
    }

    /// Gives an allocation back; its addresses are not used again.
    ///
    /// # Errors
    /// Where the address is not the start of an allocation.
    pub fn free(&self, address: u64) -> Result<(), Error> {
        let allocation = self.find(address, 0)?.0;
        if address & ((1 << WINDOW) - 1) != 0 {
            return Err(Error::Memory {
                address,
                reason: "not the start of an allocation".to_owned(),
            });
        }
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut windows)[(address >> WINDOW) as usize] = None;
        self.used.lock().unwrap_or_else(PoisonError::into_inner).0 -= allocation.bytes;
        Ok(())
    }

    /// Writes bytes from the host.
    ///
    /// # Errors
    /// Where they do not lie within an allocation.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Error> {
        let (allocation, at) = self.find(address, bytes.len())?;
        allocation.write(at, bytes);
        Ok(())
    }

    /// Reads bytes to the host.
    ///
    /// # Errors
    /// Where they do not lie within an allocation.
    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<(), Error> {
        let (allocation, at) = self.find(address, out.len())?;
        allocation.read(at, out);
        Ok(())
    }

    /// Copies bytes within the device.
    ///
    /// # Errors
    /// Where source or destination do not lie within an allocation.
    pub fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        let mut buffer = vec![0; bytes.min(1 << 20)];
        let mut done = 0;
        self.find(to, bytes)?;
        self.find(from, bytes)?;
        while done < bytes {
            let n = buffer.len().min(bytes - done);
            self.read(from + done as u64, &mut buffer[..n])?;
            self.write(to + done as u64, &buffer[..n])?;
            done += n;
        }
        Ok(())
    }

    /// Sets bytes to a value.
    ///
    /// # Errors
    /// Where they do not lie within an allocation.
    pub fn fill(&self, address: u64, value: u8, bytes: usize) -> Result<(), Error> {
        let (allocation, at) = self.find(address, bytes)?;
        let buffer = vec![value; bytes.min(1 << 16)];
        for start in (0..bytes).step_by(buffer.len().max(1)) {
            allocation.write(at + start, &buffer[..buffer.len().min(bytes - start)]);
        }
        Ok(())
    }

    /// Bytes in use.
    pub fn allocated(&self) -> usize {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// The most bytes that have been in use at once.
    pub fn peak(&self) -> usize {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    /// The windows as they are now.
    pub(crate) fn windows(&self) -> Windows {
        Arc::clone(&self.windows.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn find(&self, address: u64, bytes: usize) -> Result<(Arc<Allocation>, usize), Error> {
        let windows = self.windows.read().unwrap_or_else(PoisonError::into_inner);
        let fail = |reason: String| Error::Memory { address, reason };
        let Some(allocation) = windows
            .get((address >> WINDOW) as usize)
            .and_then(Option::as_ref)
        else {
            return Err(fail("not allocated".to_owned()));
        };
        let at = (address & ((1 << WINDOW) - 1)) as usize;
        if at + bytes > allocation.bytes {
            return Err(fail(format!(
                "{bytes} bytes from {at} of an allocation of {}",
                allocation.bytes
            )));
        }
        Ok((Arc::clone(allocation), at))
    }
}

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

    /// Loads 1, 2, 4, 8 or 16 bytes as words.
    #[inline]
    pub(crate) fn load(&self, lane: u32, address: u64, size: u32) -> Result<[u32; 4], Trap> {
        let (allocation, at) = self.find(lane, address, size, false)?;
        let words = &allocation.words;
        let w = at / 4;
        Ok(match size {
            4 => [words[w].load(Relaxed), 0, 0, 0],
            8 => [words[w].load(Relaxed), words[w + 1].load(Relaxed), 0, 0],
            16 => {
                let words = &words[w..w + 4];
                [
                    words[0].load(Relaxed),
                    words[1].load(Relaxed),
                    words[2].load(Relaxed),
                    words[3].load(Relaxed),
                ]
            }
            2 => [words[w].load(Relaxed) >> (at % 4 * 8) & 0xffff, 0, 0, 0],
            _ => [words[w].load(Relaxed) >> (at % 4 * 8) & 0xff, 0, 0, 0],
        })
    }

    /// Stores 1, 2, 4, 8 or 16 bytes.
    #[inline]
    pub(crate) fn store(
        &self,
        lane: u32,
        address: u64,
        size: u32,
        value: [u32; 4],
    ) -> Result<(), Trap> {
        let (allocation, at) = self.find(lane, address, size, true)?;
        if size < 4 {
            allocation.put(at, size as usize, value[0]);
            return Ok(());
        }
        let w = at / 4;
        for (word, v) in allocation.words[w..w + size as usize / 4].iter().zip(value) {
            word.store(v, Relaxed);
        }
        Ok(())
    }
}
