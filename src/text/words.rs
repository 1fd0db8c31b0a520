//! Learned words in a prompt: which places of a text are read as vectors of a textual inversion, whose ids stand behind the vocabulary's.
//!
//! A1111 finds a word where the tokens of its name stand, the longest name first, so that letters' cases and spaces do not matter
//! (`modules/textual_inversion`, `find_embedding_at_position`). ComfyUI writes `embedding:name`; diffusers adds tokens such as `<cat-toy>` to the
//! vocabulary, found wherever they stand, and `<cat-toy>_1` is its second vector alone.

use std::ops::Range;

use super::ClipTokenizer;
use super::prompt::Syntax;
use super::tokenizer::Located;
use crate::error::Result;

/// What stands before a name in ComfyUI's prompts.
const NAMED: &str = "embedding:";

/// A learned word as a tower reads it.
#[derive(Debug, Clone, Default)]
pub struct Word {
    /// Its number among all words.
    pub index: usize,
    /// What A1111's prompts call it.
    pub words: Vec<String>,
    /// What diffusers' prompts call it.
    pub tokens: Vec<String>,
    /// Names that stand behind `embedding:`.
    pub spellings: Vec<String>,
    /// The ids of its vectors; none where this tower has no vectors for it and reads its name.
    pub ids: Option<Range<u32>>,
}

/// All learned words of a tokenizer.
#[derive(Debug, Clone, Default)]
pub(super) struct Words {
    /// Lower case, the longest first.
    spelled: Vec<(String, Target)>,
    /// Tokens in angle brackets, in lower case, the longest first.
    bracketed: Vec<(String, Target)>,
    /// All tokens, in lower case, the longest first.
    tokens: Vec<(String, Target)>,
    /// Tokens that mean all of their vectors only where they stand in lower case, as diffusers replaces them before it reads; the longest first.
    exact: Vec<(String, Target)>,
    /// Names as ids, the longest first.
    sequences: Vec<(Vec<u32>, Target)>,
}

/// A word, and its ids unless the word vanishes.
#[derive(Debug, Clone)]
struct Target {
    index: usize,
    ids: Option<Range<u32>>,
}

/// What a text is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unit {
    /// A token of the vocabulary.
    Token(Located),
    /// A learned word: its ids, its number, and where it begins in the text, in bytes.
    Word(Range<u32>, usize, usize),
}

/// A part of a text.
enum Segment<'a> {
    Text(&'a str),
    Word(&'a Target),
}

impl Words {
    /// Finds how `tokenizer` reads the names.
    pub(super) fn new(tokenizer: &ClipTokenizer, words: &[Word]) -> Result<Self> {
        let mut all = Self::default();
        for word in words {
            let target = |ids| Target {
                index: word.index,
                ids,
            };
            let named = word.spellings.iter().map(|name| name.to_lowercase());
            all.spelled
                .extend(named.map(|name| (name, target(word.ids.clone()))));
            let Some(ids) = &word.ids else { continue };
            let numbered = |token: &String| -> Vec<(String, Target)> {
                let token = token.to_lowercase();
                let single = ids.clone().enumerate().skip(1);
                let single = single.map(|(k, id)| {
                    (
                        format!("{token}_{k}"),
                        target(Some(id..id.saturating_add(1))),
                    )
                });
                let whole = (token.clone(), target(Some(ids.clone())));
                single.chain([whole]).collect()
            };
            for token in word.tokens.iter().filter(|token| !token.is_empty()) {
                all.tokens
                    .extend(numbered(token).into_iter().map(|(token, target)| {
                        let ids = target.ids.map(|ids| ids.start..ids.start.saturating_add(1));
                        (token, Target { ids, ..target })
                    }));
                if *token == token.to_lowercase() {
                    all.exact.push((token.clone(), target(Some(ids.clone()))));
                }
            }
            for name in word.words.iter().filter(|name| !name.is_empty()) {
                if is_bracketed(name) {
                    all.bracketed.extend(numbered(name));
                    continue;
                }
                let sequence = tokenizer.encode(name)?;
                if !sequence.is_empty() {
                    all.sequences.push((sequence, target(Some(ids.clone()))));
                }
            }
        }
        let all_literals = [
            &mut all.spelled,
            &mut all.bracketed,
            &mut all.tokens,
            &mut all.exact,
        ];
        for literals in all_literals {
            literals.retain(|(literal, _)| !literal.is_empty());
            // of two with one name the first counts
            literals.sort_by_key(|(literal, _)| std::cmp::Reverse(literal.len()));
        }
        all.sequences
            .sort_by_key(|(sequence, _)| std::cmp::Reverse(sequence.len()));
        Ok(all)
    }

    fn is_empty(&self) -> bool {
        self.spelled.is_empty() && self.tokens.is_empty() && self.sequences.is_empty()
    }

    /// What a text is made of, in the order of reading.
    pub(super) fn units(
        &self,
        tokenizer: &ClipTokenizer,
        text: &str,
        syntax: Syntax,
    ) -> Result<Vec<Unit>> {
        if self.is_empty() {
            let tokens = tokenizer.encode_located(text)?;
            return Ok(tokens.into_iter().map(Unit::Token).collect());
        }
        let mut units = Vec::new();
        for (start, segment) in self.segments(text, syntax) {
            match segment {
                Segment::Word(target) => units.extend(target.unit(start)),
                Segment::Text(part) => {
                    let mut tokens = tokenizer.encode_located(part)?;
                    tokens.iter_mut().for_each(|token| token.start += start);
                    match syntax {
                        Syntax::A1111 => self.sequences(&tokens, &mut units),
                        Syntax::Plain => units.extend(tokens.into_iter().map(Unit::Token)),
                    }
                }
            }
        }
        Ok(units)
    }

    /// The text without its `embedding:…`, as a tower reads it that knows no learned words.
    pub(super) fn without_named(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = 0;
        for (at, _) in text.match_indices(NAMED) {
            if let Some((_, length)) = self.named(text, at)
                && at >= rest
            {
                out.push_str(text.get(rest..at).unwrap_or_default());
                rest = at + length;
            }
        }
        out.push_str(text.get(rest..).unwrap_or_default());
        out
    }

    /// Learned words whose names are found by their letters, and the text between them.
    fn segments<'a>(&'a self, text: &'a str, syntax: Syntax) -> Vec<(usize, Segment<'a>)> {
        let (exact, literals): (&[_], _) = match syntax {
            Syntax::A1111 => (&[], &self.bracketed),
            Syntax::Plain => (&self.exact, &self.tokens),
        };
        let mut segments = Vec::new();
        let (mut begin, mut at) = (0, 0);
        while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
            let literal = || {
                let mut found = literals.iter();
                let found = found
                    .find_map(|(token, target)| Some((target, prefix_length(rest, token)?)))?;
                let mut exact = exact.iter();
                let exact =
                    exact.find(|(token, _)| rest.starts_with(token) && token.len() >= found.1);
                Some(exact.map_or(found, |(token, target)| (target, token.len())))
            };
            let Some((target, length)) = self.named(text, at).or_else(literal) else {
                at += rest.chars().next().map_or(1, char::len_utf8);
                continue;
            };
            if begin < at {
                segments.push((
                    begin,
                    Segment::Text(text.get(begin..at).unwrap_or_default()),
                ));
            }
            segments.push((at, Segment::Word(target)));
            at += length;
            begin = at;
        }
        if begin < text.len() {
            segments.push((begin, Segment::Text(text.get(begin..).unwrap_or_default())));
        }
        segments
    }

    /// The word that an `embedding:name` at byte `at` means, and how many bytes it takes.
    fn named(&self, text: &str, at: usize) -> Option<(&Target, usize)> {
        let name = name_at(text, at)?;
        self.spelled.iter().find_map(|(spelling, target)| {
            let length = prefix_length(name, spelling)?;
            ends_there(name.get(length..)?).then_some((target, NAMED.len() + length))
        })
    }

    /// Tokens, with names that are sequences of tokens taken for words.
    fn sequences(&self, tokens: &[Located], units: &mut Vec<Unit>) {
        let mut rest = tokens;
        while let Some((first, others)) = rest.split_first() {
            let mut found = self.sequences.iter().filter_map(|(sequence, target)| {
                let there = rest.get(..sequence.len())?;
                let same = there
                    .iter()
                    .map(|token| token.id)
                    .eq(sequence.iter().copied());
                same.then_some((sequence.len(), target))
            });
            match found.next() {
                Some((length, target)) => {
                    units.extend(target.unit(first.start));
                    rest = rest.get(length..).unwrap_or_default();
                }
                None => {
                    units.push(Unit::Token(*first));
                    rest = others;
                }
            }
        }
    }
}

impl Target {
    fn unit(&self, start: usize) -> Option<Unit> {
        let ids = self.ids.clone()?;
        Some(Unit::Word(ids, self.index, start))
    }
}

/// What follows every `embedding:` of a text, up to its end.
pub fn named_embeddings(text: &str) -> Vec<&str> {
    let places = text.match_indices(NAMED);
    places.filter_map(|(at, _)| name_at(text, at)).collect()
}

/// Whether a text that follows an `embedding:` begins with this name.
pub fn begins_with_name(text: &str, name: &str) -> bool {
    let end = prefix_length(text, &name.to_lowercase());
    end.and_then(|end| text.get(end..)).is_some_and(ends_there)
}

/// The name at the beginning of a text that follows an `embedding:`, as far as a name without spaces may reach.
pub fn first_name(text: &str) -> &str {
    let end = text.find(|c: char| c.is_whitespace() || ",()[]<>|:".contains(c));
    let name = text.get(..end.unwrap_or(text.len())).unwrap_or_default();
    name.trim_end_matches(['.', ';', '!', '?', '\\'])
}

/// What follows an `embedding:` that begins a word at byte `at`.
fn name_at(text: &str, at: usize) -> Option<&str> {
    let name = text.get(at..)?.strip_prefix(NAMED)?;
    let before = text.get(..at)?.chars().next_back();
    before.is_none_or(|c| !is_part(c)).then_some(name)
}

/// Whether a name may end before `rest`.
fn ends_there(rest: &str) -> bool {
    let mut next = rest.chars();
    match next.next() {
        None => true,
        Some('.') => !next.next().is_some_and(is_part),
        Some(c) => !is_part(c) && c != '-' && c != '/',
    }
}

fn is_part(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// How many bytes of `text` are `lower` in any case of letters, from the beginning.
fn prefix_length(text: &str, lower: &str) -> Option<usize> {
    let mut wanted = lower.chars();
    let mut length = 0;
    let mut characters = text.chars();
    while !wanted.as_str().is_empty() {
        let c = characters.next()?;
        for low in c.to_lowercase() {
            if wanted.next()? != low {
                return None;
            }
        }
        length += c.len_utf8();
    }
    Some(length)
}

/// `<token>`, which no words are confused with.
fn is_bracketed(name: &str) -> bool {
    name.len() > 2 && name.starts_with('<') && name.ends_with('>')
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn word(index: usize, name: &str, ids: Range<u32>) -> Word {
        let names = vec![name.to_owned()];
        Word {
            index,
            words: names.clone(),
            tokens: names.clone(),
            spellings: names,
            ids: Some(ids),
        }
    }

    /// Ids of words above 50000, `·` for each run of other tokens.
    fn short(words: &[Word], text: &str, syntax: Syntax) -> String {
        let clip = ClipTokenizer::embedded().unwrap();
        let words = Words::new(&clip, words).unwrap();
        let mut out = Vec::new();
        for unit in words.units(&clip, text, syntax).unwrap() {
            match unit {
                Unit::Word(ids, ..) => {
                    out.push(format!("{}-{}", ids.start - 50000, ids.end - 50000))
                }
                Unit::Token(_) if out.last().is_some_and(|last| last == "·") => {}
                Unit::Token(_) => out.push("·".to_owned()),
            }
        }
        out.join(" ")
    }

    #[test]
    fn names_are_found_as_each_tool_finds_them() {
        let words = [
            word(0, "bad hands", 50000..50002),
            word(1, "bad", 50002..50003),
            word(2, "<Cat-Toy>", 50003..50006),
            word(3, "easy_negative.v2", 50006..50007),
        ];
        for (text, a1111) in [
            ("a bad hands, BAD  Hands", "· 0-2 · 0-2"),
            ("bad, badly, a bad hand", "2-3 · 2-3 ·"),
            ("a<cat-toy>b <cat-toy>_2 <cat-toy", "· 3-6 · 5-6 ·"),
            ("Easy_Negative.V2 easy_negative.v", "6-7 ·"),
            ("embedding:bad embedding:bad hands, x", "2-3 0-2 ·"),
            ("an embedding:easy_negative.v2. b", "· 6-7 ·"),
            ("embedding:bad-x embedding:badly", "· 2-3 ·"),
        ] {
            assert_eq!(short(&words, text, Syntax::A1111), a1111, "{text}");
        }
        // diffusers' tokens are found inside words, too; all vectors are meant where the token stands in lower case, and has none in upper case
        let plain = short(&words, "a Badly<cat-toy>bad handsBad Hands", Syntax::Plain);
        assert_eq!(plain, "· 2-3 · 3-4 0-2 0-1");
    }

    #[test]
    fn a_tower_without_vectors_reads_names_and_not_their_marks() {
        let word = Word {
            ids: None,
            ..word(0, "ink", 0..0)
        };
        let words = [word];
        assert_eq!(short(&words, "ink embedding:ink", Syntax::A1111), "·");
        let clip = ClipTokenizer::embedded().unwrap();
        let words = Words::new(&clip, &words).unwrap();
        assert_eq!(words.without_named("a embedding:ink, é"), "a , é");
        let named = named_embeddings("(embedding:a.b:1.2) embedding:c.");
        let names: Vec<&str> = named.iter().map(|rest| first_name(rest)).collect();
        assert_eq!(names, ["a.b", "c"]);
        assert!(
            begins_with_name("Bad Ink, x", "bad ink") && !begins_with_name("bad inks", "bad ink")
        );
    }
}
