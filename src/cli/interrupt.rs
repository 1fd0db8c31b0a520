//! Ctrl-C: the first asks the run to stop, the second ends the process at once.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

static STOP: AtomicBool = AtomicBool::new(false);

/// Begins to listen for SIGINT, SIGTERM and SIGHUP.
pub(super) fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(begin);
}

fn begin() {
    let handler = || {
        if STOP.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    };
    // a second listener in one process means someone else listens: then signals keep their default meaning
    if let Err(error) = ctrlc::set_handler(handler) {
        tracing::debug!("signals keep their default meaning: {error}");
    }
}

/// Whether the user has asked to stop.
pub(super) fn stopped() -> bool {
    STOP.load(Ordering::SeqCst)
}
