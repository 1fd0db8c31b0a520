//! Where the time of eager execution goes, by layer class.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use crate::op::LayerClass;

thread_local! {
    static TIMES: RefCell<Option<BTreeMap<LayerClass, Duration>>> = const { RefCell::new(None) };
}

/// Runs `work` and gives its result with the time spent in each layer class by operations called on this thread.
///
/// Times are meaningful on devices that compute before a call returns (CPU), and where plans ask a GPU how long each launch took.
pub fn measure<T>(work: impl FnOnce() -> T) -> (T, BTreeMap<LayerClass, Duration>) {
    let outer = TIMES.replace(Some(BTreeMap::new()));
    let result = work();
    let times = TIMES.replace(outer).unwrap_or_default();
    (result, times)
}

/// Whether anyone is measuring on this thread.
pub(crate) fn is_measuring() -> bool {
    TIMES.with_borrow(Option::is_some)
}

/// Adds `time` to `class`, if anyone is measuring.
pub(crate) fn note(class: LayerClass, time: Duration) {
    TIMES.with_borrow_mut(|times| {
        if let Some(times) = times {
            *times.entry(class).or_default() += time;
        }
    });
}
