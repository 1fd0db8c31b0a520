//! Fixtures on a card that an interpreter of the kernels' PTX plays: `SD_RS_CARD=N` in the environment, for one of N processors.

#[path = "../../kernels/tests/support/interpreted.rs"]
mod interpreted;

use std::sync::{Arc, Once};

use sd_kernels::gpu::{self, Gpu};

/// The variable.
pub(crate) const VARIABLE: &str = "SD_RS_CARD";

static ONCE: Once = Once::new();

/// Makes the card the one that plans of this process are made for, where the environment asks for it.
pub(crate) fn choose() {
    let Ok(processors) = std::env::var(VARIABLE) else {
        return;
    };
    ONCE.call_once(|| {
        let card = interpreted::Interpreted::new(processors.parse().unwrap()).unwrap();
        gpu::choose(Gpu::new(Arc::new(card)).unwrap());
    });
}
