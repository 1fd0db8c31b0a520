//! A table with rows behind its own: the vectors of learned words at the end of a text tower's table of tokens.

use std::sync::Arc;

use candle_core::DType;
use sd_kernels::{Reader, Result, Source};

/// Another source's weights, of which one table has more rows.
struct Enlarged {
    inner: Arc<dyn Source>,
    table: &'static str,
    /// Whole rows, row-major.
    more: Arc<Vec<f32>>,
    width: usize,
}

/// `inner` with the rows `more`, `width` wide, behind those of `table`.
pub fn enlarge(
    inner: Arc<dyn Source>,
    table: &'static str,
    (more, width): (Arc<Vec<f32>>, usize),
) -> Arc<dyn Source> {
    Arc::new(Enlarged {
        inner,
        table,
        more,
        width: width.max(1),
    })
}

impl Enlarged {
    fn rows(&self) -> usize {
        self.more.len() / self.width
    }
}

impl Source for Enlarged {
    fn shape(&self, name: &str, wanted: &[usize]) -> Option<Vec<usize>> {
        if name != self.table {
            return self.inner.shape(name, wanted);
        }
        let own = self.own(wanted);
        let mut shape = self.inner.shape(name, &own)?;
        if let Some(rows) = shape.first_mut() {
            *rows = rows.saturating_add(self.rows());
        }
        Some(shape)
    }

    fn dtype(&self, name: &str) -> DType {
        if name == self.table {
            DType::F32
        } else {
            self.inner.dtype(name)
        }
    }

    fn is_compressed(&self, name: &str) -> bool {
        name != self.table && self.inner.is_compressed(name)
    }

    fn open(&self, name: &str, shape: &[usize]) -> Result<Box<dyn Reader + '_>> {
        if name != self.table {
            return self.inner.open(name, shape);
        }
        let own = self.own(shape);
        Ok(Box::new(Both {
            first: own.iter().product(),
            own: self.inner.open(name, &own)?,
            more: &self.more,
        }))
    }
}

impl Enlarged {
    /// The table's shape without the rows behind it.
    fn own(&self, shape: &[usize]) -> Vec<usize> {
        let mut own = shape.to_vec();
        if let Some(rows) = own.first_mut() {
            *rows = rows.saturating_sub(self.rows());
        }
        own
    }
}

/// One behind the other.
struct Both<'a> {
    own: Box<dyn Reader + 'a>,
    /// How many numbers of its own the table has.
    first: usize,
    more: &'a [f32],
}

impl Reader for Both<'_> {
    fn read(&self, first: usize, out: &mut [f32]) {
        let own = self.first.saturating_sub(first).min(out.len());
        let (head, tail) = out.split_at_mut(own);
        if !head.is_empty() {
            self.own.read(first, head);
        }
        if !tail.is_empty() {
            let start = (first + own) - self.first;
            tail.copy_from_slice(&self.more[start..][..tail.len()]);
        }
    }
}
