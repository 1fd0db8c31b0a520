//! Memory that begins at a multiple of 64 bytes: a cache line, and a 512-bit vector.

use std::marker::PhantomData;

use memmap2::MmapMut;

/// Types without padding and without invalid bit patterns, for which zero bytes are a value.
///
/// # Safety
/// As said.
pub(crate) unsafe trait Plain: Copy + Send + Sync + 'static {}
// SAFETY: numbers have neither padding nor invalid values
unsafe impl Plain for f32 {}
// SAFETY: as above
unsafe impl Plain for f64 {}
// SAFETY: as above
unsafe impl Plain for half::bf16 {}
// SAFETY: as above
unsafe impl Plain for half::f16 {}
// SAFETY: as above
unsafe impl Plain for u8 {}

/// A fixed number of values at an aligned place: whole pages of their own, large ones where the system has them.
pub(crate) struct Aligned<T> {
    pages: Option<MmapMut>,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Plain> Aligned<T> {
    /// `len` zeros. Memory is taken page by page, as they are written.
    ///
    /// # Errors
    /// When the system has no room for them.
    pub(crate) fn zeros(len: usize) -> std::io::Result<Self> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or(std::io::ErrorKind::OutOfMemory)?;
        let pages = (bytes > 0).then(|| MmapMut::map_anon(bytes)).transpose()?;
        #[cfg(target_os = "linux")]
        if let Some(pages) = &pages {
            // fewer misses of address translation; that it is refused changes nothing else
            pages.advise(memmap2::Advice::HugePage).ok();
        }
        Ok(Self {
            pages,
            len,
            of: PhantomData,
        })
    }

    /// The values.
    pub(crate) fn as_slice(&self) -> &[T] {
        match &self.pages {
            None => &[],
            // SAFETY: the pages hold `len` values of T, page-aligned, initialised (zero bytes are a T), borrowed as `self` is
            Some(pages) => unsafe { std::slice::from_raw_parts(pages.as_ptr().cast(), self.len) },
        }
    }

    /// The values, to write.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        match &mut self.pages {
            None => &mut [],
            // SAFETY: as above, and borrowed mutably
            Some(pages) => unsafe {
                std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), self.len)
            },
        }
    }

    /// How many values there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn begins_at_a_line_and_is_zero() {
        for len in [0, 1, 63, 1000] {
            let mut x = Aligned::<f32>::zeros(len).unwrap();
            assert!(len == 0 || (x.as_slice().as_ptr() as usize).is_multiple_of(64));
            assert!(x.as_slice().len() == len && x.as_slice().iter().all(|&v| v == 0.0));
            x.as_mut_slice().fill(1.0);
            assert_eq!(x.as_slice().iter().sum::<f32>(), len as f32);
        }
    }
}
