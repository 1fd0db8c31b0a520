//! A1111's prompt grammar: a text becomes pieces with weights, and breaks between chunks.
//!
//! `(x)` weighs 1.1 times as much, `[x]` 1/1.1, `(x:1.3)` 1.3 times; brackets nest and multiply; `\(` `\)` `\[` `\]` `\\` are the
//! characters themselves; a bracket that is never closed holds to the end; a bracket that was never opened is text. `BREAK` ends a
//! chunk. Neighbours of equal weight are joined, because words are tokenized piece by piece. What A1111 knows beyond that
//! (`AND`, `[from:to:when]`, `[a|b]`, `<lora:…>`) is refused by name.
//!
//! Reference: `modules/prompt_parser.py` of AUTOMATIC1111/stable-diffusion-webui, `parse_prompt_attention`, with its quirks: a
//! backslash before any other character vanishes, and a `BREAK` within brackets is a word, since its marker is multiplied as well.

use super::refusals;
use crate::error::{Error, Result};

pub(super) mod lexer;

use lexer::{Token, is_space, quote, whole_words};

/// The longest text that is parsed, in bytes.
pub const MAX_PROMPT_BYTES: usize = 64 << 10;
/// The most brackets that may be open at once. It bounds the work, and 1.1 to the power of it is beyond [`MAX_WEIGHT`].
pub const MAX_OPEN_BRACKETS: usize = 256;
/// The largest weight, of either sign. No picture survives a fraction of it; `(x:1400)` is a `(x:1.400)` mistyped.
pub const MAX_WEIGHT: f64 = 1000.0;

const ROUND: f64 = 1.1;
const SQUARE: f64 = 1.0 / 1.1;
const BREAK: &str = "BREAK";
/// The weight of a break's marker until the end of parsing.
const BREAK_WEIGHT: f64 = -1.0;

/// Which language a prompt is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Syntax {
    /// A1111's: weights in brackets, `BREAK`, any number of chunks.
    #[default]
    A1111,
    /// None: the text as it is, cut to one chunk as diffusers does.
    Plain,
}

/// What a text is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The prompt.
    Prompt,
    /// The negative prompt, where A1111 takes `AND` and `<lora:…>` for plain text.
    Negative,
}

impl Role {
    /// The role in words: `prompt` or `negative prompt`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prompt => "prompt",
            Self::Negative => "negative prompt",
        }
    }
}

/// A part of a parsed prompt.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    /// Text, tokenized by itself.
    Text {
        /// The text without brackets and escapes; never empty.
        text: String,
        /// Its weight; 1 is plain text.
        weight: f64,
    },
    /// The chunk ends here.
    Break,
}

/// Parses a text. The result is empty for an empty text.
///
/// Errors: [`Error::Usage`] for a text, nesting or weight beyond the limits above and for a number that is none;
/// [`Error::Unsupported`] for those parts of A1111's grammar that are not built.
pub fn parse(text: &str, syntax: Syntax, role: Role) -> Result<Vec<Piece>> {
    check_length(text, role)?;
    if syntax == Syntax::Plain {
        let piece = || Piece::Text {
            text: text.to_owned(),
            weight: 1.0,
        };
        return Ok((!text.is_empty()).then(piece).into_iter().collect());
    }
    refusals::check(text, role)?;
    let mut parser = Parser {
        role,
        pieces: Vec::new(),
        round: Vec::new(),
        square: Vec::new(),
    };
    let mut rest = text;
    while let Some((token, after)) = Token::next(rest) {
        let place = text.len() - rest.len();
        parser.take(token, place, text)?;
        rest = after;
    }
    parser.finish()
}

/// Refuses a text that is too long for any use.
pub(super) fn check_length(text: &str, role: Role) -> Result<()> {
    if text.len() <= MAX_PROMPT_BYTES {
        return Ok(());
    }
    let (name, length) = (role.name(), text.len());
    Err(Error::Usage(format!(
        "the {name} is {length} bytes long; the limit is {MAX_PROMPT_BYTES}"
    )))
}

/// A piece while weights are still being multiplied.
struct Raw {
    text: String,
    weight: f64,
}

/// An open bracket: the first piece within it, and its place in the text.
struct Open {
    piece: usize,
    place: usize,
}

/// The parser's state. Round and square brackets do not know of each other.
struct Parser {
    role: Role,
    pieces: Vec<Raw>,
    round: Vec<Open>,
    square: Vec<Open>,
}

impl Parser {
    /// Takes a token that begins at byte `place` of `whole`.
    fn take(&mut self, token: Token<'_>, place: usize, whole: &str) -> Result<()> {
        let open = Open {
            piece: self.pieces.len(),
            place,
        };
        match token {
            Token::Escaped(text) => self.push(text, 1.0),
            Token::OpenRound => self.round.push(open),
            Token::OpenSquare => self.square.push(open),
            Token::Weight(number, all) => match self.round.pop() {
                Some(open) => {
                    let group = whole.get(open.place..place + all.len()).unwrap_or(all);
                    self.multiply(open.piece, parse_weight(number, group)?);
                }
                None => self.text(all),
            },
            Token::CloseRound(all) => match self.round.pop() {
                Some(open) => self.multiply(open.piece, ROUND),
                None => self.text(all),
            },
            Token::CloseSquare(all) => match self.square.pop() {
                Some(open) => self.multiply(open.piece, SQUARE),
                None => self.text(all),
            },
            Token::Text(text) => self.text(text),
        }
        if self.round.len() + self.square.len() > MAX_OPEN_BRACKETS {
            return Err(Error::Usage(format!(
                "the {} has more than {MAX_OPEN_BRACKETS} open brackets at once; write a weight as (words:1.3)",
                self.role.name()
            )));
        }
        Ok(())
    }

    /// Adds text, with a marker for every `BREAK` in it; the space around a `BREAK` goes with it.
    fn text(&mut self, text: &str) {
        let mut begin = 0;
        let ends = whole_words(text, BREAK).map(|at| (at, at + BREAK.len()));
        for (at, end) in ends.chain([(text.len(), text.len())]) {
            let mut part = text.get(begin..at).unwrap_or_default();
            if begin > 0 {
                part = part.trim_start_matches(is_space);
                self.push(BREAK, BREAK_WEIGHT);
            }
            if at < text.len() {
                part = part.trim_end_matches(is_space);
            }
            self.push(part, 1.0);
            begin = end;
        }
    }

    fn push(&mut self, text: &str, weight: f64) {
        self.pieces.push(Raw {
            text: text.to_owned(),
            weight,
        });
    }

    fn multiply(&mut self, first: usize, by: f64) {
        for piece in self.pieces.iter_mut().skip(first) {
            piece.weight *= by;
        }
    }

    /// Closes what is open, joins neighbours of equal weight and checks the weights.
    fn finish(mut self) -> Result<Vec<Piece>> {
        for open in std::mem::take(&mut self.round) {
            self.multiply(open.piece, ROUND);
        }
        for open in std::mem::take(&mut self.square) {
            self.multiply(open.piece, SQUARE);
        }
        let mut joined: Vec<Raw> = Vec::new();
        for piece in self.pieces {
            match joined.last_mut() {
                Some(last) if last.weight == piece.weight => last.text.push_str(&piece.text),
                _ => joined.push(piece),
            }
        }
        joined.retain(|piece| !piece.text.is_empty());
        joined.into_iter().map(Raw::check).collect()
    }
}

impl Raw {
    /// The finished piece.
    fn check(self) -> Result<Piece> {
        let Self { text, weight } = self;
        if text == BREAK && weight == BREAK_WEIGHT {
            return Ok(Piece::Break);
        }
        if weight.abs() <= MAX_WEIGHT {
            return Ok(Piece::Text { text, weight });
        }
        let text = quote(&text);
        Err(Error::Usage(format!(
            "the brackets around {text} multiply to a weight of {weight:.3e}; weights go to {MAX_WEIGHT}"
        )))
    }
}

/// The number of a `(words:number)`; `group` is all of it.
fn parse_weight(number: &str, group: &str) -> Result<f64> {
    let group = quote(group);
    let wrong = match number.parse::<f64>() {
        Ok(weight) if weight.abs() > MAX_WEIGHT => "too large",
        Ok(weight) if !number.contains(['e', 'E']) => return Ok(weight),
        _ => "not a plain decimal number",
    };
    let number = quote(number);
    Err(Error::Usage(format!(
        "the weight {number} in {group} is {wrong}; weights are numbers like 1.3, where 1 is plain text"
    )))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The pieces in short: `text@weight`, `|` for a break.
    fn short(text: &str) -> Vec<String> {
        let pieces = parse(text, Syntax::A1111, Role::Prompt).unwrap();
        let show = |piece: &Piece| match piece {
            Piece::Text { text, weight } => format!("{text}@{weight}"),
            Piece::Break => "|".to_owned(),
        };
        pieces.iter().map(show).collect()
    }

    fn refused(text: &str) -> (&'static str, String) {
        let error = parse(text, Syntax::A1111, Role::Prompt).unwrap_err();
        (error.code(), error.to_string())
    }

    #[test]
    fn brackets_weigh() {
        assert_eq!(
            short("an (important) word"),
            ["an @1", "important@1.1", " word@1"]
        );
        assert_eq!(
            short("(x: +1.30 )[y](z:-.5)"),
            ["x@1.3", "y@0.9090909090909091", "z@-0.5"]
        );
        assert_eq!(
            short("((a:2)b) (c [d"),
            ["a@2.2", "b@1.1", " @1", "c @1.1", "d@1"]
        );
        assert_eq!(short(r"\(a\)\ b\n\\(c)"), ["(a) bn\\@1", "c@1.1"]);
        assert_eq!(short("a) b] c:1.2) d"), ["a) b] c:1.2) d@1"]);
        assert!(short("").is_empty() && short("()[]").is_empty());
    }

    #[test]
    fn breaks_stand_alone() {
        assert_eq!(short("a BREAK b"), ["a@1", "|", "b@1"]);
        assert_eq!(short("BREAK BREAK"), ["|", "|"]);
        assert_eq!(
            short("aBREAK BREAKFAST break"),
            ["aBREAK BREAKFAST break@1"]
        );
        // The marker's weight is multiplied with the rest, and then it is a word.
        assert_eq!(short("(a BREAK b)"), ["a@1.1", "BREAK@-1.1", "b@1.1"]);
    }

    #[test]
    fn absurd_weights_are_refused_by_name() {
        for (text, part) in [
            ("a (b:1e38)", "(b:1e38)"),
            ("(b:1e1)", "1e1"),
            ("(b:1.2.3)", "1.2.3"),
            ("(b:99999)", "too large"),
            ("((big:999):2)", "\"big\""),
            (&"(".repeat(100), "100"),
        ] {
            if text.starts_with("(((") {
                assert!(short(text).is_empty(), "no text, no weight");
                continue;
            }
            let (code, message) = refused(text);
            assert!(code == "usage" && message.contains(part), "{message}");
        }
        assert!(
            refused(&format!("{}x", "(".repeat(100)))
                .1
                .contains("1.378e4")
        );
    }

    #[test]
    fn size_is_bounded() {
        assert!(refused(&"x".repeat(1 << 20)).1.contains("65536"));
        let nested = format!("{}x{}", "(".repeat(10_000), ")".repeat(10_000));
        assert!(refused(&nested).1.contains("256 open brackets"));
        let worst = format!("{}{}", "[".repeat(256), r"\(".repeat(32_000));
        let begin = std::time::Instant::now();
        assert_eq!(parse(&worst, Syntax::A1111, Role::Prompt).unwrap().len(), 1);
        assert!(begin.elapsed().as_secs() < 5);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (text, part) in [
            ("a cat AND a dog", "\"AND\""),
            ("a [cat:dog:0.5]", "editing \"[cat:dog:0.5]\""),
            ("[in fog: 10 ]", "editing"),
            ("[(fog:1.2)::.5]", "editing"),
            ("a [red|green] car", "alternation \"[red|green]\""),
            ("[fe|]male", "alternation"),
            ("x <lora:film:0.6>", "\"<lora:film:0.6>\""),
            ("<hypernet:a>", "<hypernet:a>"),
            ("<lyco:a:1>", "<lyco:a:1>"),
        ] {
            let (code, message) = refused(text);
            assert!(code == "unsupported" && message.contains(part), "{message}");
        }
    }

    #[test]
    fn what_only_looks_like_it_stays_text() {
        for text in [
            "[x]",
            "[a:b]",
            "[a:b:c:1]",
            r"\[a:b:1\]",
            r"[a\|b]",
            "a | b",
            "[a:1.2",
            "sand ANDROID and",
            "<a>",
            "a < b: c",
            "[a|b:c]",
        ] {
            parse(text, Syntax::A1111, Role::Prompt).unwrap();
        }
        // One stray bar, and A1111 schedules nothing in the whole text.
        assert_eq!(short("a | [b:c:1]"), ["a | @1", "b:c:1@0.9090909090909091"]);
        parse("salt AND pepper <lora:x:1>", Syntax::A1111, Role::Negative).unwrap();
        let plain = parse("(a) AND [b|c]", Syntax::Plain, Role::Prompt).unwrap();
        assert_eq!(
            plain,
            [Piece::Text {
                text: "(a) AND [b|c]".into(),
                weight: 1.0
            }]
        );
    }
}
