//! The lexical parts of A1111's prompt grammar: marks, weights, words and spaces as its regular expressions take them.
//!
//! Reference: `modules/prompt_parser.py` of AUTOMATIC1111/stable-diffusion-webui, `re_attention` and `re_break`. Characters are
//! classified as Python's `re` does.

/// A lexical part of the grammar.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Token<'a> {
    /// An escaped character; nothing for a backslash that escapes nothing.
    Escaped(&'a str),
    /// `(`
    OpenRound,
    /// `[`
    OpenSquare,
    /// `)`, as text.
    CloseRound(&'a str),
    /// `]`, as text.
    CloseSquare(&'a str),
    /// `:number)`, the number and the whole.
    Weight(&'a str, &'a str),
    /// Anything else up to the next mark.
    Text(&'a str),
}

impl<'a> Token<'a> {
    /// The first token of `rest` and what follows it.
    pub(in super::super) fn next(rest: &'a str) -> Option<(Self, &'a str)> {
        let first = rest.chars().next()?;
        let length = match first {
            '\\' => 1 + usize::from(rest.chars().nth(1).is_some_and(|c| "()[]\\".contains(c))),
            '(' | ')' | '[' | ']' => 1,
            ':' => weight_length(rest).unwrap_or(1),
            _ => rest
                .find(['\\', '(', ')', '[', ']', ':'])
                .unwrap_or(rest.len()),
        };
        let (token, after) = rest.split_at_checked(length)?;
        let token = match first {
            '\\' => Self::Escaped(token.get(1..)?),
            '(' => Self::OpenRound,
            '[' => Self::OpenSquare,
            ')' => Self::CloseRound(token),
            ']' => Self::CloseSquare(token),
            ':' if length > 1 => Self::Weight(
                token.trim_matches(|c| is_space(c) || c == ':' || c == ')'),
                token,
            ),
            _ => Self::Text(token),
        };
        Some((token, after))
    }
}

/// The length of `: number )` at the beginning of `text`. A number here is any run of digits and dots with a sign. It may have an
/// exponent, only to be refused later: A1111 takes `(x:1e3)` for text, which nobody means.
fn weight_length(text: &str) -> Option<usize> {
    let body = text.strip_prefix(':')?.trim_start_matches(is_space);
    let body = body.strip_prefix(['+', '-']).unwrap_or(body);
    let tail = body.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    if tail.len() == body.len() {
        return None;
    }
    let tail = exponent(tail).unwrap_or(tail).trim_start_matches(is_space);
    Some(text.len() - tail.strip_prefix(')')?.len())
}

/// What follows an exponent (`e5`, `E-5`).
fn exponent(text: &str) -> Option<&str> {
    let digits = text.strip_prefix(['e', 'E'])?;
    let digits = digits.strip_prefix(['+', '-']).unwrap_or(digits);
    let after = digits.trim_start_matches(|c: char| c.is_ascii_digit());
    (after.len() < digits.len()).then_some(after)
}

/// Python's idea of a space.
pub(in super::super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Python's idea of a character of a word.
pub(in super::super) fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Where `word` stands in `text` with no word character before or after it.
pub(in super::super) fn whole_words<'a>(
    text: &'a str,
    word: &'a str,
) -> impl Iterator<Item = usize> + 'a {
    text.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |&at| {
            let before = text.get(..at).and_then(|t| t.chars().next_back());
            let after = text.get(at + word.len()..).and_then(|t| t.chars().next());
            !before.is_some_and(is_word) && !after.is_some_and(is_word)
        })
}

/// A part of the user's text for a message: quoted, control characters made visible, not too long.
pub(in super::super) fn quote(text: &str) -> String {
    const LONGEST: usize = 60;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{:?}…", text.get(..end).unwrap_or_default()),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn weights_are_one_token() {
        let token = |text| Token::next(text).unwrap();
        assert_eq!(token(": +1.3 )x"), (Token::Weight("+1.3", ": +1.3 )"), "x"));
        assert_eq!(token(":1e5)"), (Token::Weight("1e5", ":1e5)"), ""));
        for text in [":)", ":x)", ":+)", ":1", ":1 2)", ":1e)", ": 1.x)"] {
            assert_eq!(token(text), (Token::Text(":"), &text[1..]));
        }
        assert_eq!(Token::next(""), None);
    }

    #[test]
    fn a_backslash_escapes_brackets_and_itself() {
        let token = |text| Token::next(text).unwrap();
        assert_eq!(token(r"\(a"), (Token::Escaped("("), "a"));
        assert_eq!(token(r"\\"), (Token::Escaped("\\"), ""));
        assert_eq!(token(r"\é"), (Token::Escaped(""), "é"));
        assert_eq!(token("\\"), (Token::Escaped(""), ""));
    }

    #[test]
    fn quotes_are_short_and_visible() {
        assert_eq!(quote("a\n\u{1b}"), "\"a\\n\\u{1b}\"");
        assert_eq!(quote(&"é".repeat(61)), format!("\"{}\"…", "é".repeat(60)));
    }
}
