//! Device memory.
//!
//! Every allocation owns a window of 64 GiB of addresses, so that no access past its end reaches another one, and the window is never
//! used again, so that no access after `free` does either. Words are relaxed atomics: blocks run on several threads.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::Error;

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
