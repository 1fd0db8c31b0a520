//! How much of an adapter: in the text towers, in the denoising network, block by block, and over the steps of a run.
//!
//! | argument | meaning |
//! |---|---|
//! | `0.8` | the strength; a second one is the denoising network's alone, as in A1111 |
//! | `0@0,1@0.5` | strengths at parts of the run (up to 1) or at steps (beyond), straight lines between (sd-webui-loractl) |
//! | `0.8@0.2-0.7` | a strength from one part of the run to another, or from one step to another |
//! | `te=`, `unet=` | either of them |
//! | `lbw=` | block by block (sd-webui-lora-block-weight), see [`BlockWeights`] |
//! | `start=`, `stop=`, `step=A-B` | the steps in front of the first and from the last on are without it (the same) |

use super::blocks::BlockWeights;
use crate::checkpoint::printable_to;
use crate::error::{Error, Result};

/// The longest part of an argument that messages quote, in characters.
const QUOTED: usize = 60;

/// How much of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Strength {
    /// In the text towers, which read the prompt once: of a curve, its beginning.
    pub text: Curve,
    /// In the denoising network.
    pub denoiser: Curve,
    /// Block by block.
    pub blocks: Option<BlockWeights>,
    /// The steps of the denoising network from the first up to the second; at all others it is 0 there.
    pub steps: Option<(f64, f64)>,
}

/// A number that may change over the steps of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// Numbers and their places, in the order of the places; one at least.
    points: Vec<(f64, f64)>,
    /// Where it counts; elsewhere it is 0.
    span: Option<Span>,
}

/// From one place of a run up to another.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Span {
    start: f64,
    stop: f64,
    /// Places are steps, not parts of the run.
    steps: bool,
}

impl Curve {
    /// A number that does not change.
    pub fn constant(number: f64) -> Self {
        Self {
            points: vec![(number, 0.0)],
            span: None,
        }
    }

    /// The number, if it does not change.
    pub fn as_constant(&self) -> Option<f64> {
        match self.points.as_slice() {
            [(number, _)] if self.span.is_none() => Some(*number),
            _ => None,
        }
    }

    /// The number at step `step` of `steps`, the first being 0. Curves count parts from the first step (0) to the last (1); a span counts the steps
    /// that are done.
    pub fn at(&self, step: usize, steps: usize) -> f64 {
        if let Some(span) = self.span {
            let whole = if span.steps { 1.0 } else { steps.max(1) as f64 };
            // a hair's breadth beyond: 3 of 10 steps are 0.3 of them
            let place = step as f64 / whole + 1e-9;
            if place < span.start || place >= span.stop {
                return 0.0;
            }
        }
        let last = self.points.last().map_or(0.0, |(_, place)| *place);
        let whole = if last <= 1.0 {
            steps.saturating_sub(1).max(1) as f64
        } else {
            1.0
        };
        self.number_at(step as f64 / whole)
    }

    /// The number before anything changes.
    pub fn beginning(&self) -> f64 {
        self.number_at(0.0)
    }

    fn number_at(&self, place: f64) -> f64 {
        let behind = self.points.iter().position(|(_, at)| *at > place);
        let before = match behind {
            Some(0) => None,
            Some(i) => self.points.get(i - 1),
            None => self.points.last(),
        };
        let behind = behind.and_then(|i| self.points.get(i));
        match (before, behind) {
            (Some((a, from)), Some((b, to))) => a + (b - a) * ((place - from) / (to - from)),
            (Some((number, _)), None) | (None, Some((number, _))) => *number,
            (None, None) => 0.0,
        }
    }

    /// All numbers that it may take lie between its points'.
    pub(super) fn largest(&self) -> f64 {
        let numbers = self.points.iter().map(|(number, _)| number.abs());
        numbers.fold(0.0, f64::max)
    }

    /// A number, `0@0,1@0.5` or `0.8@0.2-0.7`; none where it is none of them.
    pub fn parse(text: &str) -> Option<Self> {
        let number = |text: &str| {
            let number: f64 = text.trim().parse().ok()?;
            number.is_finite().then_some(number)
        };
        if let Some((strength, span)) = text.split_once('@')
            && let Some((start, stop)) = span.split_once('-')
            && !span.contains('@')
        {
            let (start, stop) = (number(start)?, number(stop)?);
            let span = Span {
                start,
                stop,
                steps: stop > 1.0,
            };
            let ordered = start >= 0.0 && start <= stop;
            return ordered.then_some(Self {
                span: Some(span),
                ..Self::constant(number(strength)?)
            });
        }
        if !text.contains(['@', '~']) {
            return number(text).map(Self::constant);
        }
        let point = |point: &str| match point.split_once(['@', '~']) {
            Some((strength, place)) => {
                Some((number(strength)?, number(place).filter(|p| *p >= 0.0)?))
            }
            None => Some((number(point)?, 1.0)),
        };
        let points: Option<Vec<_>> = text.split([',', ';']).map(point).collect();
        let mut points = points?;
        points.sort_by(|a, b| a.1.total_cmp(&b.1));
        Some(Self { points, span: None })
    }
}

impl std::fmt::Display for Curve {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.points.as_slice(), self.span) {
            ([(number, _)], Some(span)) if span.stop.is_finite() => {
                write!(f, "{number}@{}-{}", span.start, span.stop)
            }
            ([(number, _)], _) => write!(f, "{number}"),
            (points, _) => {
                let points: Vec<String> = points
                    .iter()
                    .map(|(number, place)| format!("{number}@{place}"))
                    .collect();
                f.write_str(&points.join(","))
            }
        }
    }
}

impl Default for Strength {
    fn default() -> Self {
        Self::constant(1.0, 1.0)
    }
}

impl Strength {
    /// Strengths that do not change.
    pub fn constant(text: f64, denoiser: f64) -> Self {
        Self {
            text: Curve::constant(text),
            denoiser: Curve::constant(denoiser),
            blocks: None,
            steps: None,
        }
    }

    /// Whether the denoising network's is not the same at all steps.
    pub fn changes_over_steps(&self) -> bool {
        self.denoiser.as_constant().is_none() || self.steps.is_some()
    }

    /// The strengths in the text towers, and in the denoising network at step `step` of `steps`.
    pub fn at(&self, step: usize, steps: usize) -> (f64, f64) {
        let acts = |(start, stop): (f64, f64)| (start..stop).contains(&(step as f64));
        let denoiser = match self.steps.is_none_or(acts) {
            true => self.denoiser.at(step, steps),
            false => 0.0,
        };
        (self.text.beginning(), denoiser)
    }

    /// Both strengths, if neither changes and all blocks have the same.
    pub(super) fn as_constant(&self) -> Option<(f64, f64)> {
        let plain = self.blocks.is_none() && self.steps.is_none();
        let both = self.text.as_constant().zip(self.denoiser.as_constant());
        both.filter(|_| plain)
    }

    /// Whether a text may be an argument behind an adapter's name.
    pub fn is_argument(text: &str) -> bool {
        let key = text.split_once('=').map(|(key, _)| key);
        let known =
            key.is_some_and(|key| KEYS.contains(&key) || REFUSED.iter().any(|r| r.0 == key));
        known || text.trim().parse::<f64>().is_ok() || Curve::parse(text).is_some()
    }

    /// What the arguments behind an adapter's name say; `whole` is all of it, for messages.
    ///
    /// # Errors
    /// [`Error::Usage`] for what cannot be understood, [`Error::Unsupported`] for what is known and not built.
    pub fn from_arguments(arguments: &[&str], whole: &str) -> Result<Self> {
        let whole = printable_to(whole, QUOTED);
        let mut read = Arguments::default();
        for argument in arguments {
            read.take(argument, &whole)?;
        }
        read.finish(&whole)
    }

    /// The arguments that mean this: what stands behind the name in a tag.
    pub fn arguments(&self) -> String {
        let mut text = if self.text == self.denoiser {
            self.text.to_string()
        } else {
            format!("{}:{}", self.text, self.denoiser)
        };
        if let Some(blocks) = &self.blocks {
            text = format!("{text}:lbw={blocks}");
        }
        if let Some((start, stop)) = self.steps {
            text = format!("{text}:start={start}");
            if stop.is_finite() {
                text = format!("{text}:stop={stop}");
            }
        }
        text
    }
}

/// The arguments that have names.
const KEYS: [&str; 6] = ["te", "unet", "lbw", "start", "stop", "step"];
/// Those that are not built.
const REFUSED: [(&str, &str); 7] = [
    ("dyn", "a dynamic rank"),
    ("hr", "another strength in a second pass"),
    ("hrte", "another strength in a second pass"),
    ("hrunet", "another strength in a second pass"),
    ("lbwe", "strengths by element"),
    ("x", "a weight put in the place of X"),
    ("w", "a weight by that name"),
];

/// Arguments while they are read.
#[derive(Default)]
struct Arguments {
    plain: Vec<Curve>,
    text: Option<Curve>,
    denoiser: Option<Curve>,
    blocks: Option<BlockWeights>,
    start: Option<f64>,
    stop: Option<f64>,
}

impl Arguments {
    fn take(&mut self, argument: &str, whole: &str) -> Result<()> {
        let wrong = |text: &str| {
            Error::Usage(format!(
                "the weight \"{}\" in \"{whole}\" is not a number; write <lora:name:0.8>",
                printable_to(text, QUOTED)
            ))
        };
        let curve = |text: &str| Curve::parse(text).ok_or_else(|| wrong(text));
        let number = |text: &str| {
            let number = text.trim().parse::<f64>().ok();
            number
                .filter(|n| n.is_finite() && *n >= 0.0)
                .ok_or_else(|| wrong(text))
        };
        match argument.split_once('=') {
            None if BlockWeights::is_preset(argument) || is_list(argument) => {
                self.blocks = Some(BlockWeights::parse(argument)?);
            }
            None => self.plain.push(curve(argument)?),
            Some(("te", value)) => self.text = Some(curve(value)?),
            Some(("unet", value)) => self.denoiser = Some(curve(value)?),
            Some(("lbw", value)) => self.blocks = Some(BlockWeights::parse(value)?),
            Some(("start", value)) => self.start = Some(number(value)?),
            Some(("stop", value)) => self.stop = Some(number(value)?),
            Some(("step", value)) => {
                let (start, stop) = value.split_once('-').ok_or_else(|| wrong(value))?;
                (self.start, self.stop) = (Some(number(start)?), Some(number(stop)?));
            }
            Some((key, _)) => {
                let what = REFUSED.iter().find(|(name, _)| *name == key);
                let what = what.map_or(String::new(), |(_, what)| format!(", {what},"));
                return Err(Error::Unsupported(format!(
                    "\"{}\" in \"{whole}\"{what} is not supported; {}= are",
                    printable_to(key, QUOTED),
                    KEYS.join("=, ")
                )));
            }
        }
        Ok(())
    }

    fn finish(self, whole: &str) -> Result<Strength> {
        let mut plain = self.plain.into_iter();
        let (first, second) = (plain.next(), plain.next());
        if plain.next().is_some() {
            return Err(Error::Unsupported(format!(
                "\"{whole}\" has a third number, a dynamic rank, which is not supported; write <lora:name:0.8> or <lora:name:0.5:0.8>"
            )));
        }
        let text = self.text.or(first).unwrap_or_else(|| Curve::constant(1.0));
        let denoiser = self.denoiser.or(second).unwrap_or_else(|| text.clone());
        let steps = (self.start.is_some() || self.stop.is_some()).then(|| {
            let stop = self.stop.unwrap_or(f64::INFINITY);
            (self.start.unwrap_or(0.0), stop)
        });
        Ok(Strength {
            text,
            denoiser,
            blocks: self.blocks,
            steps,
        })
    }
}

/// Whether an argument without a name is a list of block weights, as the extension first had them.
fn is_list(argument: &str) -> bool {
    let numbers = argument.split(',');
    argument.matches(',').count() >= 11
        && numbers.into_iter().all(|n| n.trim().parse::<f64>().is_ok())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The numbers at all steps.
    fn run(text: &str, steps: usize) -> Vec<f64> {
        let curve = Curve::parse(text).unwrap();
        (0..steps).map(|step| curve.at(step, steps)).collect()
    }

    #[test]
    fn numbers_change_over_a_run() {
        assert_eq!(run("0.8", 3), [0.8; 3]);
        assert_eq!(run("0@0,1@1", 5), [0.0, 0.25, 0.5, 0.75, 1.0]);
        assert_eq!(run("1@0.5;0@0", 5), [0.0, 0.5, 1.0, 1.0, 1.0]);
        // beyond 1 places are steps
        assert_eq!(
            run("0.75@0,0.5@3,1@6", 9),
            [
                0.75,
                0.75 - 0.25 / 3.0,
                0.75 - 0.5 / 3.0,
                0.5,
                0.5 + 0.5 / 3.0,
                0.5 + 1.0 / 3.0,
                1.0,
                1.0,
                1.0
            ]
        );
        assert_eq!(run("0.5@1,1@2", 4), [0.5, 0.5, 1.0, 1.0]);
        assert_eq!(
            run("2@0.3-0.6", 10),
            [0., 0., 0., 2., 2., 2., 0., 0., 0., 0.]
        );
        assert_eq!(run("2@0-1", 3), [2.0; 3]);
        assert_eq!(run("-1@2-4", 6), [0.0, 0.0, -1.0, -1.0, 0.0, 0.0]);
        assert_eq!(run("1@0,0@1", 1), [1.0]);
        for wrong in [
            "",
            "x",
            "1@x",
            "nan",
            "1@-1-2",
            "1@0.7-0.2",
            "1,2",
            "inf@0,1@1",
        ] {
            assert_eq!(Curve::parse(wrong), None, "{wrong}");
        }
        for text in ["0.8", "0@0,1@0.5", "0.8@0.2-0.7", "-1@2-4"] {
            assert_eq!(Curve::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn arguments_are_understood() {
        let read = |arguments: &[&str]| Strength::from_arguments(arguments, "<lora:x>");
        let both = |text, denoiser| Strength::constant(text, denoiser);
        for (arguments, strength) in [
            (&[][..], both(1.0, 1.0)),
            (&["0.6"], both(0.6, 0.6)),
            (&[".5", "-1"], both(0.5, -1.0)),
            (&["unet=2"], both(1.0, 2.0)),
            (&["te=2"], both(2.0, 2.0)),
            (&["0.5", "te=2"], both(2.0, 2.0)),
        ] {
            assert_eq!(read(arguments).unwrap(), strength, "{arguments:?}");
        }
        let span = |arguments: &[&str]| -> Vec<f64> {
            let strength = read(arguments).unwrap();
            assert_eq!(strength.text.beginning(), 0.5);
            (0..5).map(|step| strength.at(step, 5).1).collect()
        };
        assert_eq!(span(&["0.5", "start=2"]), [0.0, 0.0, 0.5, 0.5, 0.5]);
        assert_eq!(span(&["0.5", "stop=1"]), [0.5, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(span(&["0.5", "step=1-3"]), [0.0, 0.5, 0.5, 0.0, 0.0]);
        for (arguments, words) in [
            (&["high"][..], "\"high\""),
            (&["nan"], "not a number"),
            (&["1", "1", "8"], "dynamic rank"),
            (&["dyn=8"], "\"dyn\""),
            (&["1", "lbw=OUTAL"], "OUTAL"),
            (&["hr=1"], "second pass"),
        ] {
            let error = read(arguments).unwrap_err().to_string();
            assert!(error.contains(words), "{arguments:?}: {error}");
        }
        let written = read(&["0.5", "0@0,1@1", "lbw=OUTALL", "start=3"]).unwrap();
        assert_eq!(written.arguments(), "0.5:0@0,1@1:lbw=OUTALL:start=3");
    }
}
