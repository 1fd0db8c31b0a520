//! Weights under a name of their own: networks that share a plan's store must not share names.

use std::sync::Arc;

use candle_core::{DType, Device};
use sd_kernels::{LowRank, Reader, Result, Source, Weights};

/// Another source's weights, all with `prefix` and a dot in front.
struct Below {
    prefix: String,
    inner: Arc<dyn Source>,
}

/// The weights of `source`, which are called `prefix.…` from now on; networks ask for them under their own names.
pub(crate) fn below(
    prefix: &str,
    source: Arc<dyn Source>,
    dtype: DType,
    device: &Device,
) -> Weights {
    let below = Below {
        prefix: format!("{prefix}."),
        inner: source,
    };
    Weights::new(Arc::new(below), dtype, device).at(prefix)
}

impl Below {
    fn own<'a>(&self, name: &'a str) -> &'a str {
        name.strip_prefix(&self.prefix).unwrap_or(name)
    }
}

impl Source for Below {
    fn shape(&self, name: &str, wanted: &[usize]) -> Option<Vec<usize>> {
        self.inner.shape(self.own(name), wanted)
    }

    fn dtype(&self, name: &str) -> DType {
        self.inner.dtype(self.own(name))
    }

    fn is_compressed(&self, name: &str) -> bool {
        self.inner.is_compressed(self.own(name))
    }

    fn beside(&self, name: &str) -> Vec<LowRank> {
        let changes = self.inner.beside(self.own(name)).into_iter();
        let below = |name: String| format!("{}{name}", self.prefix);
        let of = |change: LowRank| LowRank {
            down: below(change.down),
            up: below(change.up),
            ..change
        };
        changes.map(of).collect()
    }

    fn open(&self, name: &str, shape: &[usize]) -> Result<Box<dyn Reader + '_>> {
        self.inner.open(self.own(name), shape)
    }
}
