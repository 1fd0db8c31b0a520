//! The parts of A1111's prompt language that are recognised and not built: `AND`, prompt editing, alternation, extra networks.
//!
//! Recognition follows A1111 exactly, so that a text which only looks like one of them stays text. Editing and alternation
//! are, in its grammar (`modules/prompt_parser.py`):
//!
//! ```text
//! start:      (prompt | any of [ ] ( ) :)*
//! prompt:     (emphasized | scheduled | alternate | plain)*
//! emphasized: ( prompt )  or  ( prompt : prompt )  or  [ prompt ]
//! scheduled:  [ prompt : prompt : NUMBER ]  or  [ prompt : NUMBER ]
//! alternate:  [ prompt | prompt | … ]
//! plain:      anything but \ [ ] ( ) : |, or \ and any character
//! ```
//!
//! and a text that does not fit, such as one with a `|` elsewhere, has neither.

use super::prompt::Role;
use super::prompt::lexer::{is_space, is_word, quote, whole_words};
use crate::error::{Error, Result};

/// Refuses a text with any of them, naming it.
pub(super) fn check(text: &str, role: Role) -> Result<()> {
    // A1111 looks for extra networks and AND in the prompt alone.
    if role == Role::Prompt {
        if let Some(tag) = find_network(text) {
            if tag.starts_with("<hypernet:") {
                let found = quote(tag);
                return Err(Error::Unsupported(format!(
                    "{found} in the prompt names a hypernetwork, and hypernetworks are not supported; remove it, or use a LoRA that was trained for the same"
                )));
            }
            return Err(refusal("the extra network", tag, role));
        }
        if whole_words(text, "AND").next().is_some() {
            return Err(refusal("composition with", "AND", role));
        }
    }
    match find_schedule(text) {
        Some((what, group)) => Err(refusal(what, group, role)),
        None => Ok(()),
    }
}

fn refusal(what: &str, found: &str, role: Role) -> Error {
    let (found, name) = (quote(found), role.name());
    Error::Unsupported(format!(
        "{what} {found} in the {name} is not supported yet; remove it, or take the {name} as plain text with --prompt-syntax plain"
    ))
}

/// The first `<name:…>`.
pub(super) fn find_network(text: &str) -> Option<&str> {
    for (at, _) in text.match_indices('<') {
        let tag = text.get(at..)?;
        let name = tag.get(1..)?;
        let arguments = name.trim_start_matches(is_word);
        if arguments.len() == name.len() {
            continue;
        }
        let Some(arguments) = arguments.strip_prefix(':') else {
            continue;
        };
        // Without a closing bracket here there is none for any later tag either.
        let close = arguments.find('>')?;
        if close > 0 {
            return tag.get(..tag.len() - arguments.len() + close + 1);
        }
    }
    None
}

/// An open bracket and what was met directly within it.
struct Group {
    round: bool,
    /// Where it begins.
    begin: usize,
    colons: usize,
    bars: usize,
    /// Where the text after its last colon begins.
    tail: usize,
}

/// The first editing or alternation, if the whole text fits the grammar. One pass: a bracket, colon or bar that cannot belong
/// to the groups around it makes all of their brackets plain characters.
fn find_schedule(text: &str) -> Option<(&'static str, &str)> {
    let mut open: Vec<Group> = Vec::new();
    let mut found = None;
    let mut characters = text.char_indices();
    while let Some((at, c)) = characters.next() {
        let fits = match c {
            '\\' => {
                let (_, escaped) = characters.next()?;
                if escaped == '\n' {
                    return None;
                }
                true
            }
            '(' | '[' => {
                open.push(Group {
                    round: c == '(',
                    begin: at,
                    colons: 0,
                    bars: 0,
                    tail: at,
                });
                true
            }
            ':' => open.last_mut().is_none_or(|group| group.colon(at + 1)),
            '|' => {
                if !open.last_mut()?.bar() {
                    return None;
                }
                true
            }
            ')' | ']' => match open.pop() {
                Some(group) if group.round == (c == ')') => match group.close(text, at) {
                    Closed::Emphasis => true,
                    Closed::Plain => false,
                    Closed::Found(what) => {
                        found = found.or(Some((what, text.get(group.begin..=at)?)));
                        true
                    }
                },
                Some(group) => {
                    open.push(group);
                    false
                }
                None => true,
            },
            _ => true,
        };
        if !fits {
            drop_all(&mut open)?;
        }
    }
    drop_all(&mut open)?;
    found
}

/// Gives all open groups up; `None` where that leaves a bar outside any alternation.
fn drop_all(open: &mut Vec<Group>) -> Option<()> {
    let stray = open.iter().any(|group| group.bars > 0);
    open.clear();
    (!stray).then_some(())
}

/// What a closed group is.
enum Closed {
    Emphasis,
    Plain,
    Found(&'static str),
}

impl Group {
    /// Takes a colon; false where none can stand.
    fn colon(&mut self, tail: usize) -> bool {
        self.colons += 1;
        self.tail = tail;
        self.bars == 0 && self.colons <= if self.round { 1 } else { 2 }
    }

    /// Takes a bar; false where none can stand.
    fn bar(&mut self) -> bool {
        self.bars += 1;
        !self.round && self.colons == 0
    }

    /// What the group is, closed at byte `end`.
    fn close(&self, text: &str, end: usize) -> Closed {
        let tail = text.get(self.tail..end).unwrap_or_default();
        match (self.round, self.bars, self.colons) {
            (true, _, _) | (false, 0, 0) => Closed::Emphasis,
            (false, 0, _) if is_number(tail.trim_matches(is_space)) => {
                Closed::Found("prompt editing")
            }
            (false, 0, _) => Closed::Plain,
            (false, _, _) => Closed::Found("alternation"),
        }
    }
}

/// Whether the text is a number with an optional sign, fraction and exponent.
fn is_number(text: &str) -> bool {
    let digits =
        |text: &str| text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let text = text.strip_prefix(['+', '-']).unwrap_or(text);
    let whole = digits(text);
    let rest = text.get(whole..).unwrap_or_default();
    let (rest, fraction) = match rest.strip_prefix('.') {
        Some(rest) => (rest.get(digits(rest)..).unwrap_or_default(), digits(rest)),
        None => (rest, 0),
    };
    let exponent = match rest.strip_prefix(['e', 'E']) {
        Some(power) => {
            let power = power.strip_prefix(['+', '-']).unwrap_or(power);
            !power.is_empty() && digits(power) == power.len()
        }
        None => rest.is_empty(),
    };
    whole + fraction > 0 && exponent
}
