//! What plans are tested on: every level of this processor, and cards that an interpreter plays.

use std::sync::{Arc, LazyLock};

use crate::cpu::Level;
use crate::gpu::Gpu;
use crate::gpu::interpreted::Interpreted;
use crate::plan::{Options, Precision};

/// A machine.
pub(crate) struct Machine {
    pub(crate) name: String,
    /// Options for 32-bit arithmetic on it.
    pub(crate) options: Options,
}

impl Machine {
    fn new(level: Level, gpu: Option<&Gpu>) -> Self {
        Self {
            name: match gpu {
                Some(gpu) => gpu.driver().info().name.clone(),
                None => level.name().to_owned(),
            },
            options: Options {
                gpu: gpu.cloned(),
                ..Options::new(level, Precision::F32)
            },
        }
    }

    /// Options for 16-bit arithmetic, where it has that.
    pub(crate) fn bf16(&self) -> Option<Options> {
        let has = self.options.gpu.is_some() || self.options.level.has_bf16();
        has.then(|| Options {
            precision: Precision::Bf16,
            ..self.options.clone()
        })
    }
}

/// A card on which every layer is large, and one on which every layer is small and split.
static CARDS: LazyLock<[Gpu; 2]> = LazyLock::new(|| {
    [1, 48].map(|processors| {
        let card = Interpreted::new(processors).unwrap();
        Gpu::new(Arc::new(card)).unwrap()
    })
});

/// The cards.
pub(crate) fn cards() -> Vec<Machine> {
    let cards = CARDS.iter();
    cards
        .map(|card| Machine::new(Level::Portable, Some(card)))
        .collect()
}

/// The levels of this processor.
pub(crate) fn levels() -> Vec<Machine> {
    let levels = Level::supported().into_iter();
    levels.map(|level| Machine::new(level, None)).collect()
}

/// The levels, then the cards.
pub(crate) fn machines() -> Vec<Machine> {
    levels().into_iter().chain(cards()).collect()
}
