//! The `parameters` text that A1111 keeps in its pictures, printed and read.
//!
//! ```text
//! a red fox in snow
//! Negative prompt: blurry, text
//! Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1234567, Size: 512x768, RNG: CPU, Version: sd-rs 0.1.0
//! ```
//!
//! The rules are A1111's (`modules/infotext_utils.py`, `modules/processing.py`), including these: a line that begins `Negative prompt:`
//! turns to the negative prompt; the last line is parameters only when it holds at least three pairs; values with a comma, a colon or a
//! newline are JSON strings; lines of prompts lose the white space around them. What the format cannot carry (a prompt that itself has a
//! line `Negative prompt:`) is kept by the second text of our pictures, see [`super::png`].

use std::fmt::Display;
use std::str::FromStr;

/// A1111's keys in its own order. What is not listed follows, `Version` comes last.
const ORDER: [&str; 25] = [
    "Steps",
    "Sampler",
    "Schedule type",
    "CFG scale",
    "Image CFG scale",
    "Seed",
    "Face restoration",
    "Size",
    "Model hash",
    "Model",
    "VAE hash",
    "VAE",
    "Variation seed",
    "Variation seed strength",
    "Seed resize from",
    "Denoising strength",
    "Conditional mask weight",
    "Clip skip",
    "ENSD",
    "Token merging ratio",
    "Token merging ratio hr",
    "Init image hash",
    "RNG",
    "NGMS",
    "Tiling",
];

/// Pairs that a last line must hold to be parameters and not prompt.
const LEAST_PAIRS: usize = 3;

const NEGATIVE: &str = "Negative prompt:";

/// Where a picture's noise came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NoiseSource {
    /// A CUDA card's generator: what the absent key means.
    #[default]
    Gpu,
    /// PyTorch's CPU generator.
    Cpu,
    /// Philox, computed on the CPU to equal the card.
    Nv,
}

impl NoiseSource {
    /// A1111's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpu => "GPU",
            Self::Cpu => "CPU",
            Self::Nv => "NV",
        }
    }
}

impl FromStr for NoiseSource {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        [Self::Gpu, Self::Cpu, Self::Nv]
            .into_iter()
            .find(|source| source.name() == name)
            .ok_or(())
    }
}

/// How a picture was made, as A1111 says it.
///
/// An absent field is an absent key. `Default` is a picture of which nothing is known, with the meanings that absent keys have.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameters {
    /// What to show; may span lines.
    pub prompt: String,
    /// What not to show; may span lines.
    pub negative_prompt: String,
    /// `Steps`: sampling steps.
    pub steps: Option<u32>,
    /// `Sampler`: A1111's label. Old files fold the schedule in (`DPM++ 2M Karras`).
    pub sampler: Option<String>,
    /// `Schedule type`: A1111's label; absent means `Automatic`, which is never written.
    pub schedule_type: Option<String>,
    /// `CFG scale`: guidance.
    pub cfg_scale: Option<f64>,
    /// `Seed`: of this picture, not of its batch.
    pub seed: Option<u64>,
    /// `Size`: width and height in pixels.
    pub size: Option<(u32, u32)>,
    /// `Model hash`: first ten hex digits of the file's SHA-256.
    pub model_hash: Option<String>,
    /// `Model`: the file's stem.
    pub model: Option<String>,
    /// `Denoising strength`: 0 … 1, of pictures made from pictures.
    pub denoising_strength: Option<f64>,
    /// `Clip skip`: A1111's numbering from 1; 1 is not written.
    pub clip_skip: u32,
    /// `RNG`; `GPU` is not written.
    pub rng: NoiseSource,
    /// `Version`: the program that made it.
    pub version: Option<String>,
    /// All other pairs. A key is two or more letters, digits, `_`, spaces, `-` or `/`, beginning with a letter, digit or `_`.
    pub extras: Vec<(String, String)>,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            negative_prompt: String::new(),
            steps: None,
            sampler: None,
            schedule_type: None,
            cfg_scale: None,
            seed: None,
            size: None,
            model_hash: None,
            model: None,
            denoising_strength: None,
            clip_skip: 1,
            rng: NoiseSource::Gpu,
            version: None,
            extras: Vec::new(),
        }
    }
}

impl Parameters {
    /// This program's `Version` value.
    pub fn our_version() -> String {
        format!("sd-rs {}", env!("CARGO_PKG_VERSION"))
    }

    /// The text. Numbers are written as short as they read back: `7`, `7.5`.
    pub fn print(&self) -> String {
        let mut text = self.prompt.clone();
        if !self.negative_prompt.is_empty() {
            text.push('\n');
            text.push_str(NEGATIVE);
            text.push(' ');
            text.push_str(&self.negative_prompt);
        }
        let pairs: Vec<String> = self
            .pairs()
            .into_iter()
            .map(|(key, value)| format!("{key}: {}", quoted(value)))
            .collect();
        text.push('\n');
        text.push_str(&pairs.join(", "));
        strip(&text).to_owned()
    }

    /// Reads a text as A1111 does. Nothing is an error there: a text without parameters is all prompt, and a value that is not what its
    /// key holds (`Steps: many`) is kept in `extras`.
    pub fn parse(text: &str) -> Self {
        let (mut head, last) = strip(text).rsplit_once('\n').unwrap_or(("", strip(text)));
        let mut pairs = read_pairs(last);
        if pairs.len() < LEAST_PAIRS {
            pairs.clear();
            head = strip(text);
        }
        let mut parameters = Self::default();
        parameters.read_prompts(head);
        for (key, value) in pairs {
            let value = unquoted(value);
            // A1111 drops a pair without a value.
            if !value.1.is_empty() || value.0 {
                parameters.set(key, value.1);
            }
        }
        parameters
    }

    /// The value that a key has or, when absent, means; by A1111's name.
    pub fn get(&self, key: &str) -> Option<String> {
        let written = self
            .pairs()
            .into_iter()
            .find(|(k, _)| *k == key)
            .map(|(_, value)| value);
        written.or_else(|| match key {
            "Clip skip" => Some("1".to_owned()),
            "RNG" => Some(NoiseSource::Gpu.name().to_owned()),
            "Schedule type" => Some("Automatic".to_owned()),
            _ => None,
        })
    }

    /// The pairs that are written, in order.
    pub fn pairs(&self) -> Vec<(&str, String)> {
        fn text<T: Display>(value: Option<T>) -> Option<String> {
            value.map(|v| v.to_string())
        }
        let schedule = self
            .schedule_type
            .as_ref()
            .filter(|name| *name != "Automatic");
        let known = [
            ("Steps", text(self.steps)),
            ("Sampler", self.sampler.clone()),
            ("Schedule type", schedule.cloned()),
            ("CFG scale", text(self.cfg_scale)),
            ("Seed", text(self.seed)),
            (
                "Size",
                self.size.map(|(width, height)| format!("{width}x{height}")),
            ),
            ("Model hash", self.model_hash.clone()),
            ("Model", self.model.clone()),
            ("Denoising strength", text(self.denoising_strength)),
            (
                "Clip skip",
                (self.clip_skip > 1).then(|| self.clip_skip.to_string()),
            ),
            (
                "RNG",
                (self.rng != NoiseSource::Gpu).then(|| self.rng.name().to_owned()),
            ),
            ("Version", self.version.clone()),
        ];
        let known = known
            .into_iter()
            .filter_map(|(key, value)| Some((key, value?)));
        let extras = self
            .extras
            .iter()
            .map(|(key, value)| (key.as_str(), value.clone()));
        let mut pairs: Vec<(&str, String)> = known.chain(extras).collect();
        pairs.sort_by_key(|(key, _)| rank(key));
        pairs
    }

    /// Splits the lines before the parameters into the two prompts.
    fn read_prompts(&mut self, lines: &str) {
        let mut target = &mut self.prompt;
        for line in lines.split('\n') {
            let mut line = strip(line);
            if let Some(rest) = line.strip_prefix(NEGATIVE) {
                target = &mut self.negative_prompt;
                line = strip(rest);
            }
            if !target.is_empty() {
                target.push('\n');
            }
            target.push_str(line);
        }
    }

    /// Keeps one pair: in its field when it reads as one, else among the extras. The last of equal keys counts.
    fn set(&mut self, key: &str, value: String) {
        let known = match key {
            "Steps" => store(&mut self.steps, value.parse().ok()),
            "Sampler" => store(&mut self.sampler, Some(value.clone())),
            "Schedule type" => store(&mut self.schedule_type, Some(value.clone())),
            "CFG scale" => store(&mut self.cfg_scale, finite(&value)),
            "Seed" => store(&mut self.seed, value.parse().ok()),
            "Size" => store(&mut self.size, read_size(&value)),
            "Model hash" => store(&mut self.model_hash, Some(value.clone())),
            "Model" => store(&mut self.model, Some(value.clone())),
            "Denoising strength" => store(&mut self.denoising_strength, finite(&value)),
            "Version" => store(&mut self.version, Some(value.clone())),
            "Clip skip" => value
                .parse()
                .ok()
                .filter(|n| *n >= 1)
                .map(|n| self.clip_skip = n)
                .is_some(),
            "RNG" => value.parse().map(|source| self.rng = source).is_ok(),
            _ => false,
        };
        if self.schedule_type.as_deref() == Some("Automatic") {
            self.schedule_type = None;
        }
        if known {
            return;
        }
        match self.extras.iter_mut().find(|(k, _)| k == key) {
            Some(pair) => pair.1 = value,
            None => self.extras.push((key.to_owned(), value)),
        }
    }
}

/// Fills a field when there is something to fill it with, and says so.
fn store<T>(field: &mut Option<T>, value: Option<T>) -> bool {
    let some = value.is_some();
    if some {
        *field = value;
    }
    some
}

/// The place of a key in the line.
fn rank(key: &str) -> usize {
    match ORDER.iter().position(|known| *known == key) {
        Some(place) => place,
        None if key == "Version" => ORDER.len() + 1,
        None => ORDER.len(),
    }
}

fn finite(value: &str) -> Option<f64> {
    value.parse().ok().filter(|number: &f64| number.is_finite())
}

fn read_size(value: &str) -> Option<(u32, u32)> {
    let (width, height) = value.split_once('x')?;
    Some((width.parse().ok()?, height.parse().ok()?))
}

/// Python's `str.strip`: its white space has four separators more than Rust's.
fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn is_key(c: char) -> bool {
    is_word(c) || matches!(c, ' ' | '-' | '/')
}

/// A value as it is written: as a JSON string when it holds a comma, a colon or a newline, and when it would not read back as itself.
fn quoted(value: String) -> String {
    let ambiguous =
        value.is_empty() || value.starts_with('"') || strip(&value).len() != value.len();
    if ambiguous || value.contains([',', ':', '\n']) {
        serde_json::Value::String(value).to_string()
    } else {
        value
    }
}

/// A value as it is meant, and whether it stood in quotes.
fn unquoted(value: &str) -> (bool, String) {
    if value.starts_with('"')
        && value.ends_with('"')
        && let Ok(text) = serde_json::from_str(value)
    {
        return (true, text);
    }
    (false, value.to_owned())
}

/// All `key: value` pairs of a line, as A1111's expression finds them one after another:
/// `\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)`.
fn read_pairs(line: &str) -> Vec<(&str, &str)> {
    let mut pairs = Vec::new();
    let mut rest = line;
    while let Some((key, value, after)) = next_pair(rest) {
        pairs.push((key, value));
        rest = after;
    }
    pairs
}

/// The first pair in a text, and what follows it.
fn next_pair(text: &str) -> Option<(&str, &str, &str)> {
    let mut rest = text;
    loop {
        let run = rest.trim_start_matches(|c| !is_word(c));
        if run.is_empty() {
            return None;
        }
        let after_key = run.trim_start_matches(is_key);
        let key = run.strip_suffix(after_key).unwrap_or(run);
        if let Some(value) = after_key.strip_prefix(':')
            && key.chars().nth(1).is_some()
        {
            let (value, after) = read_value(value.trim_start_matches(is_space));
            return Some((key, value, after));
        }
        // Every shorter key ends at the same place, where there is no colon.
        rest = after_key;
    }
}

/// The value at the beginning of a text, and what follows its comma.
fn read_value(text: &str) -> (&str, &str) {
    if let Some(value) = quoted_prefix(text)
        && let Some(after) = text.strip_prefix(value)
        && (after.is_empty() || after.starts_with(','))
    {
        return (value, after.strip_prefix(',').unwrap_or(""));
    }
    text.split_once(',').unwrap_or((text, ""))
}

/// The JSON-like string that a text begins with, quotes included; the empty one does not count.
fn quoted_prefix(text: &str) -> Option<&str> {
    let mut escaped = false;
    for (at, c) in text.strip_prefix('"')?.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' if at == 0 => return None,
            // `at` counts from behind the first quote; two quotes of one byte each belong to it.
            '"' => return text.get(..at + 2),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;
    use proptest::prelude::*;

    /// Cases of `tests/fixtures/infotext/make.py`, a second implementation of A1111's rules.
    fn cases(part: &str) -> Vec<serde_json::Value> {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/fixtures/infotext/cases.json"
        );
        let all: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        all[part].as_array().unwrap().clone()
    }

    #[test]
    fn reads_as_the_second_implementation_reads() {
        let cases = cases("texts");
        assert!(cases.len() > 20);
        for case in cases {
            let text = case["text"].as_str().unwrap();
            let read = Parameters::parse(text);
            assert_eq!(read.prompt, case["prompt"].as_str().unwrap(), "{text:?}");
            assert_eq!(
                read.negative_prompt,
                case["negative_prompt"].as_str().unwrap(),
                "{text:?}"
            );
            let values = case["values"].as_object().unwrap();
            for (key, value) in values {
                assert_eq!(
                    read.get(key).as_deref(),
                    value.as_str(),
                    "{key} of {text:?}"
                );
            }
            assert_eq!(read.pairs().len(), values.len(), "{text:?}");
        }
    }

    #[test]
    fn prints_as_the_second_implementation_prints() {
        for case in cases("printed") {
            let mut parameters = Parameters {
                prompt: case["prompt"].as_str().unwrap().to_owned(),
                negative_prompt: case["negative_prompt"].as_str().unwrap().to_owned(),
                ..Parameters::default()
            };
            // Backwards: the order on the line must be the table's, not the caller's.
            for (key, value) in case["values"].as_object().unwrap().iter().rev() {
                let value = value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned);
                parameters.set(key, value);
            }
            assert_eq!(parameters.print(), case["text"].as_str().unwrap());
            assert_eq!(
                Parameters::parse(&parameters.print()).print(),
                parameters.print()
            );
        }
    }

    #[test]
    fn defaults_are_not_written_and_are_read() {
        let text = "fox\nSteps: 9, Sampler: Euler, Schedule type: Automatic, CFG scale: 7.0, Seed: 1, Clip skip: 1, RNG: GPU";
        let read = Parameters::parse(text);
        assert_eq!(
            read.print(),
            "fox\nSteps: 9, Sampler: Euler, CFG scale: 7, Seed: 1"
        );
        assert_eq!(read.get("RNG").as_deref(), Some("GPU"));
        assert_eq!(read.get("Schedule type").as_deref(), Some("Automatic"));
        assert_eq!(read.get("Clip skip").as_deref(), Some("1"));
        assert_eq!(read.get("Model"), None);
    }

    #[test]
    fn values_of_the_wrong_kind_are_kept() {
        let text = "Steps: many, Sampler: Euler, CFG scale: NaN, Seed: -1, Size: big, Clip skip: 0, RNG: dice";
        let read = Parameters::parse(text);
        assert_eq!(
            (read.steps, read.cfg_scale, read.seed, read.size),
            (None, None, None, None)
        );
        assert_eq!(read.print(), text);
    }

    /// Prompts that the format carries: each line without white space around it, none that turns to the negative prompt.
    fn prompt() -> impl Strategy<Value = String> {
        let line =
            r#"([^\s\x00-\x1f][^\n]{0,20})?[^\s\x00-\x1f]|[a-z:, ]{0,5}Steps: [0-9], [A-Z]x: "?,"#;
        prop::collection::vec(line, 0..4).prop_map(|lines| {
            let lines: Vec<&str> = lines.iter().map(|line| strip(line)).collect();
            lines.join("\n")
        })
    }

    /// Values as hostile as they come.
    fn value() -> impl Strategy<Value = String> {
        prop_oneof![
            any::<String>(),
            r#"[ ,:"\\\na-c\t]{0,8}"#,
            "[0-9]{1,3}x[0-9]{1,3}"
        ]
    }

    fn parameters() -> impl Strategy<Value = Parameters> {
        let prompts = (prompt(), prompt());
        let optional = || prop::option::of(value());
        let numbers = (
            any::<u32>(),
            prop::option::of(-1e3..1e3f64),
            any::<u64>(),
            any::<(u32, u32)>(),
        );
        let names = (value(), optional(), optional(), optional(), optional());
        let rest = (
            1..100u32,
            0..3usize,
            prop::collection::btree_map("[a-z_\u{72d0}][a-z0-9 _/-]{0,8}[a-z]", value(), 0..4),
        );
        (prompts, numbers, names, rest).prop_map(|(prompts, numbers, names, rest)| Parameters {
            prompt: prompts.0,
            negative_prompt: prompts.1,
            steps: Some(numbers.0),
            cfg_scale: numbers.1,
            seed: Some(numbers.2),
            size: Some(numbers.3),
            sampler: Some(names.0),
            schedule_type: names.1,
            model_hash: names.2,
            model: names.3,
            version: names.4,
            denoising_strength: numbers.1.map(f64::abs),
            clip_skip: rest.0,
            rng: [NoiseSource::Gpu, NoiseSource::Cpu, NoiseSource::Nv][rest.1],
            extras: rest.2.into_iter().collect(),
        })
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(parameters in parameters()) {
            prop_assert_eq!(Parameters::parse(&parameters.print()), parameters);
        }

        #[test]
        fn any_text_is_read(text in any::<String>(), line in r#"([a-z \-/:,"\\\n]|: |ab: "|, ){0,60}"#) {
            let _ = Parameters::parse(&text);
            let read = Parameters::parse(&line);
            prop_assert!(read.prompt.len() + read.negative_prompt.len() <= line.len());
        }
    }
}
