//! Weights block by block, as the extension sd-webui-lora-block-weight has them: lists of numbers whose length says which blocks they are of.
//! What a list does not name has the weight 0, and what lies in no block (the time's embedding, the last layers) has 1.
//!
//! Blocks are those of CompVis' UNet: `IN00` to `IN11` (`input_blocks`), `M00`, `OUT00` to `OUT11`; of FLUX `D00` to `D18` and `S00` to `S37`.

use std::fmt;

use crate::checkpoint::printable_to;
use crate::error::{Error, Result};

/// A block of a denoising network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Block {
    In(usize),
    Middle,
    Out(usize),
    /// What comes before FLUX's blocks.
    First,
    Double(usize),
    Single(usize),
    /// What comes after them.
    Last,
}

/// Weights of blocks, and of the text towers.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockWeights {
    /// As they were given.
    text: String,
    numbers: Vec<f32>,
}

/// Lists that have names.
const PRESETS: [(&str, &str); 11] = [
    ("NONE", "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0"),
    ("ALL", "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1"),
    ("INS", "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0"),
    ("IND", "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0"),
    ("INALL", "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0"),
    ("MIDD", "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0"),
    ("OUTD", "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0"),
    ("OUTS", "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1"),
    ("OUTALL", "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1"),
    (
        "ALL0.5",
        "0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5",
    ),
    ("FLUXALL", FLUX_ALL),
];
const FLUX_ALL: &str = "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1";

/// Which blocks the numbers of a list are of, behind the one for the text towers.
const ATTENDING: [Block; 16] = [
    Block::In(1),
    Block::In(2),
    Block::In(4),
    Block::In(5),
    Block::In(7),
    Block::In(8),
    Block::Middle,
    Block::Out(3),
    Block::Out(4),
    Block::Out(5),
    Block::Out(6),
    Block::Out(7),
    Block::Out(8),
    Block::Out(9),
    Block::Out(10),
    Block::Out(11),
];
const ATTENDING_XL: [Block; 11] = [
    Block::In(4),
    Block::In(5),
    Block::In(7),
    Block::In(8),
    Block::Middle,
    Block::Out(0),
    Block::Out(1),
    Block::Out(2),
    Block::Out(3),
    Block::Out(4),
    Block::Out(5),
];
/// Blocks of FLUX: what comes first, 19 and 38, and what comes last, behind numbers for CLIP and T5.
const FLUX: usize = 61;
const DOUBLE: usize = 19;

impl BlockWeights {
    /// Whether this is the name of a list.
    pub fn is_preset(text: &str) -> bool {
        PRESETS.iter().any(|(name, _)| *name == text)
    }

    /// A list's name, or its numbers.
    ///
    /// # Errors
    /// [`Error::Usage`] for other names and lengths.
    pub fn parse(text: &str) -> Result<Self> {
        let shown = || printable_to(text, 60);
        let list = PRESETS.iter().find(|(name, _)| *name == text);
        let list = list.map_or(text, |(_, list)| list);
        let numbers: Option<Vec<f32>> = list
            .split(',')
            .map(|number| number.trim().parse().ok().filter(|n: &f32| n.is_finite()))
            .collect();
        match numbers {
            Some(numbers) if matches!(numbers.len(), 12 | 17 | 20 | 26 | FLUX) => Ok(Self {
                text: text.to_owned(),
                numbers,
            }),
            Some(numbers) => Err(Error::Usage(format!(
                "the block weights \"{}\" are {} numbers, expected 12 or 20 (SDXL), 17 or 26 (Stable Diffusion 1 and 2), {FLUX} (FLUX), or a name such as \
                 OUTALL",
                shown(),
                numbers.len()
            ))),
            None => {
                let names: Vec<&str> = PRESETS.iter().map(|(name, _)| *name).collect();
                Err(Error::Usage(format!(
                    "the block weights \"{}\" are neither numbers nor one of {}",
                    shown(),
                    names.join(", ")
                )))
            }
        }
    }

    /// The weight in a text tower.
    pub(super) fn of_text(&self, is_t5: bool) -> f32 {
        let place = usize::from(is_t5 && self.numbers.len() == FLUX);
        self.numbers.get(place).copied().unwrap_or(1.0)
    }

    /// The weight in a block; in none of them if none.
    pub(super) fn of(&self, block: Option<Block>) -> f32 {
        let Some(block) = block else { return 1.0 };
        let place = |blocks: &[Block]| Some(1 + blocks.iter().position(|b| *b == block)?);
        let row = |ins: usize| match block {
            Block::In(n) => (n < ins).then_some(1 + n),
            Block::Middle => Some(1 + ins),
            Block::Out(n) => (n < ins).then_some(2 + ins + n),
            _ => None,
        };
        let place = match self.numbers.len() {
            12 => place(&ATTENDING_XL),
            17 => place(&ATTENDING),
            20 => row(9),
            26 => row(12),
            _ => match block {
                Block::First => Some(2),
                Block::Double(n) => (n < DOUBLE).then_some(3 + n),
                Block::Single(n) => (n < FLUX - 4 - DOUBLE).then_some(3 + DOUBLE + n),
                Block::Last => Some(FLUX - 1),
                _ => None,
            },
        };
        // all of a list being one number, blocks that it does not know are no exception
        match (place, self.numbers.split_first()) {
            (Some(place), _) => self.numbers.get(place).copied().unwrap_or(0.0),
            (None, Some((first, rest)))
                if BlockWeights::is_preset(&self.text) && rest.iter().all(|n| n == first) =>
            {
                *first
            }
            _ => 0.0,
        }
    }
}

impl fmt::Display for BlockWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The blocks of a weight that is not zero, by the extension's names.
    fn named(text: &str, blocks: &[Block]) -> Vec<usize> {
        let weights = BlockWeights::parse(text).unwrap();
        let places = blocks.iter().enumerate();
        places
            .filter(|(_, block)| weights.of(Some(**block)) != 0.0)
            .map(|(i, _)| i)
            .collect()
    }

    #[test]
    fn lists_are_of_the_blocks_that_their_length_says() {
        let mut all: Vec<Block> = (0..12).map(Block::In).collect();
        all.push(Block::Middle);
        all.extend((0..12).map(Block::Out));
        // IN01 IN02 IN04, M00 at 12, OUT03 at 16
        assert_eq!(named("INS", &all), [1, 2, 4]);
        assert_eq!(named("IND", &all), [5, 7, 8]);
        assert_eq!(named("MIDD", &all), [5, 7, 8, 12, 16, 17, 18, 19]);
        assert_eq!(named("OUTD", &all), [16, 17, 18, 19]);
        assert_eq!(named("OUTS", &all), [20, 21, 22, 23, 24]);
        assert_eq!(named("ALL", &all).len(), 25);
        assert_eq!(named("NONE", &all), [0; 0]);
        let one = |length: usize, place: usize| {
            let numbers: Vec<&str> = (0..length)
                .map(|i| if i == place { "1" } else { "0" })
                .collect();
            named(&numbers.join(","), &all)
        };
        assert_eq!(one(26, 1), [0]);
        assert_eq!(one(26, 13), [12]);
        assert_eq!(one(26, 25), [24]);
        assert_eq!(one(20, 10), [12]);
        assert_eq!(one(20, 11), [13]);
        assert_eq!(one(12, 5), [12]);
        assert_eq!(one(12, 1), [4]);
        assert_eq!(one(12, 6), [13]);
        let flux = [
            Block::First,
            Block::Double(0),
            Block::Double(18),
            Block::Single(0),
            Block::Single(37),
            Block::Last,
        ];
        let at = |place: usize| {
            let numbers: Vec<&str> = (0..61)
                .map(|i| if i == place { "1" } else { "0" })
                .collect();
            named(&numbers.join(","), &flux)
        };
        assert_eq!(
            [at(2), at(3), at(21), at(22), at(59), at(60)].concat(),
            [0, 1, 2, 3, 4, 5]
        );
        assert_eq!(BlockWeights::parse("OUTALL").unwrap().of(None), 1.0);
        for wrong in ["", "1,2", "OUT", "1,1,1,1,1,1,1,1,1,1,1,x"] {
            assert!(BlockWeights::parse(wrong).is_err(), "{wrong}");
        }
    }
}
