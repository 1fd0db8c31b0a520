//! Token ids in chunks as long as the text model's context, with a weight for every token.
//!
//! A text of any length is encoded in chunks of 75 tokens, each between BOS and EOS. A chunk that is full before its sentence part
//! ends gives the tokens after its last comma to the next chunk, if they are few; `BREAK` ends a chunk at once. What is left of
//! a chunk is filled with the padding token. Reference: `modules/sd_hijack_clip.py` of AUTOMATIC1111/stable-diffusion-webui,
//! `tokenize_line`, `next_chunk` and `process_tokens`. In plain syntax the text is one chunk, cut and padded as diffusers does.
//!
//! The weights multiply the text model's hidden states token by token. A1111's emphasis "Original" then scales the chunk as a
//! whole by [`emphasis_scale`], so that its mean is what it was (`modules/sd_emphasis.py`).

use std::collections::BTreeSet;
use std::ops::Range;

use super::prompt::{Piece, Role, Syntax, check_length, parse};
use super::tokenizer::ClipTokenizer;
use super::words::Unit;
use crate::error::{Error, Result};

/// The context of every CLIP text model: 75 tokens between BOS and EOS.
pub const CLIP_LENGTH: usize = 77;

/// A chunk takes its tokens back to the last comma if at most this many tokens lie behind it (A1111's `comma_padding_backtrack`).
const COMMA_BACKTRACK: usize = 20;

/// The longest context accepted from a model's configuration.
const MAX_LENGTH: usize = 1 << 14;

/// One input of the text model.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// Token ids, from BOS to the padding; as many as the text model's context.
    pub ids: Vec<u32>,
    /// The weight of each token; 1 for BOS, EOS and padding.
    pub weights: Vec<f32>,
}

impl Chunk {
    /// Whether any token has a weight other than 1; otherwise the hidden states stay as they are.
    pub fn is_weighted(&self) -> bool {
        self.weights.iter().any(|&weight| weight != 1.0)
    }

    /// Where the text ends: the place of the first `eos`, or the last one.
    pub fn end(&self, eos: u32) -> usize {
        let end = self.ids.iter().position(|&id| id == eos);
        end.unwrap_or(self.ids.len().saturating_sub(1))
    }

    /// Where the largest id stands, the first of several.
    pub fn largest(&self) -> usize {
        let ids = self.ids.iter().enumerate();
        let largest = ids.max_by_key(|(place, id)| (**id, std::cmp::Reverse(*place)));
        largest.map_or(0, |(place, _)| place)
    }
}

/// A tokenized text.
#[derive(Debug, Clone, PartialEq)]
pub struct Tokenized {
    /// At least one chunk.
    pub chunks: Vec<Chunk>,
    /// What the user should know: text that was cut.
    pub warnings: Vec<String>,
}

/// How texts become chunks.
#[derive(Debug, Clone, Copy)]
pub struct Chunking {
    /// The language of the text.
    pub syntax: Syntax,
    /// The tokens in a chunk, BOS and EOS included: the text model's `max_position_embeddings`, at least 3.
    pub length: usize,
}

impl Default for Chunking {
    fn default() -> Self {
        Self {
            syntax: Syntax::default(),
            length: CLIP_LENGTH,
        }
    }
}

impl Chunking {
    /// Parses and tokenizes `text`.
    ///
    /// Errors: those of [`parse`], and [`Error::Usage`] for a length out of range.
    pub fn tokenize(self, tokenizer: &ClipTokenizer, text: &str, role: Role) -> Result<Tokenized> {
        if !(3..=MAX_LENGTH).contains(&self.length) {
            let length = self.length;
            return Err(Error::Usage(format!(
                "the text model reads {length} tokens at once; expected 3 to {MAX_LENGTH}"
            )));
        }
        match self.syntax {
            Syntax::A1111 => self.weighted(tokenizer, &parse(text, self.syntax, role)?),
            Syntax::Plain => self.cut(tokenizer, text, role),
        }
    }

    /// The numbers of the learned words in a text.
    ///
    /// Errors: as [`Self::tokenize`].
    pub fn words(
        self,
        tokenizer: &ClipTokenizer,
        text: &str,
        role: Role,
    ) -> Result<BTreeSet<usize>> {
        let mut found = BTreeSet::new();
        for piece in parse(text, self.syntax, role)? {
            if let Piece::Text { text, .. } = piece {
                for unit in tokenizer.units(&text, self.syntax)? {
                    if let Unit::Word(_, index, _) = unit {
                        found.insert(index);
                    }
                }
            }
        }
        Ok(found)
    }

    /// A prompt and its negative prompt, filled up to the same number of chunks with empty chunks.
    pub fn tokenize_pair(
        self,
        tokenizer: &ClipTokenizer,
        prompt: &str,
        negative: &str,
    ) -> Result<[Tokenized; 2]> {
        let mut prompt = self.tokenize(tokenizer, prompt, Role::Prompt)?;
        let mut negative = self.tokenize(tokenizer, negative, Role::Negative)?;
        let count = prompt.chunks.len().max(negative.chunks.len());
        for text in [&mut prompt, &mut negative] {
            let empty = || Builder::new(tokenizer, self.length).finished_chunk();
            text.chunks.resize_with(count, empty);
        }
        Ok([prompt, negative])
    }

    /// A1111's way.
    fn weighted(self, tokenizer: &ClipTokenizer, pieces: &[Piece]) -> Result<Tokenized> {
        let mut builder = Builder::new(tokenizer, self.length);
        for piece in pieces {
            match piece {
                Piece::Break => builder.end_chunk(),
                Piece::Text { text, weight } => {
                    for unit in tokenizer.units(text, self.syntax)? {
                        match unit {
                            Unit::Token(token) => builder.push(token.id, *weight as f32),
                            Unit::Word(ids, ..) => builder.push_word(ids, *weight as f32)?,
                        }
                    }
                }
            }
        }
        Ok(Tokenized {
            chunks: builder.finish(),
            warnings: Vec::new(),
        })
    }

    /// diffusers' way: one chunk; what does not fit is cut off and quoted in a warning.
    fn cut(self, tokenizer: &ClipTokenizer, text: &str, role: Role) -> Result<Tokenized> {
        check_length(text, role)?;
        let units = tokenizer.units(text, self.syntax)?;
        let tokens = units.into_iter().flat_map(|unit| match unit {
            Unit::Token(token) => vec![(token.id, token.start)],
            Unit::Word(ids, _, start) => ids.map(|id| (id, start)).collect(),
        });
        let tokens: Vec<(u32, usize)> = tokens.collect();
        let room = self.length.saturating_sub(2);
        let mut ids = vec![tokenizer.bos()];
        ids.extend(tokens.iter().take(room).map(|(id, _)| id));
        ids.push(tokenizer.eos());
        ids.resize(self.length, tokenizer.pad());
        let warning = tokens.get(room).map(|(_, start)| {
            let (name, count, lost) = (role.name(), tokens.len(), from_byte(text, *start));
            format!("the {name} has {count} tokens and the text model reads {room}; this part was cut off: {lost:?}")
        });
        let weights = vec![1.0; ids.len()];
        Ok(Tokenized {
            chunks: vec![Chunk { ids, weights }],
            warnings: warning.into_iter().collect(),
        })
    }
}

/// The factor that gives an emphasised chunk its mean back: `mean_before / mean_after`, of all hidden states of the chunk before
/// and after they were multiplied by the weights.
///
/// Errors: [`Error::Numeric`] where the weights left a mean of zero.
pub fn emphasis_scale(mean_before: f64, mean_after: f64) -> Result<f64> {
    let scale = mean_before / mean_after;
    if scale.is_finite() {
        return Ok(scale);
    }
    Err(Error::Numeric(format!(
        "the prompt's weights turn the mean of its embedding from {mean_before:.3e} to {mean_after:.3e}; choose weights nearer to 1"
    )))
}

/// The text from byte `start` on, or from the beginning of the character that holds it.
fn from_byte(text: &str, start: usize) -> &str {
    let start = text.floor_char_boundary(start);
    text.get(start..).unwrap_or_default()
}

/// Chunks in the making.
struct Builder<'a> {
    tokenizer: &'a ClipTokenizer,
    /// The tokens between BOS and EOS.
    room: usize,
    chunks: Vec<Chunk>,
    ids: Vec<u32>,
    weights: Vec<f32>,
    /// Where in the chunk the last comma stands.
    last_comma: Option<usize>,
}

impl<'a> Builder<'a> {
    fn new(tokenizer: &'a ClipTokenizer, length: usize) -> Self {
        let room = length.saturating_sub(2);
        Self {
            tokenizer,
            room,
            chunks: Vec::new(),
            ids: Vec::new(),
            weights: Vec::new(),
            last_comma: None,
        }
    }

    /// Adds a token, to a new chunk where this one is full.
    fn push(&mut self, id: u32, weight: f32) {
        if self.tokenizer.comma() == Some(id) {
            // A comma that no longer fits is forgotten with the chunk, as A1111 does.
            self.last_comma = Some(self.ids.len());
        } else {
            self.step_back();
        }
        self.add(id..id.saturating_add(1), weight);
    }

    /// Adds the vectors of a learned word, to a new chunk where there is no room for all of them.
    fn push_word(&mut self, ids: Range<u32>, weight: f32) -> Result<()> {
        if ids.len() > self.room {
            return Err(Error::Usage(format!(
                "an embedding in the prompt has {} vectors, and the text model reads {} tokens at once",
                ids.len(),
                self.room
            )));
        }
        self.step_back();
        self.add(ids, weight);
        Ok(())
    }

    /// Where the chunk is full, gives the tokens behind its last comma to the next one if they are few.
    fn step_back(&mut self) {
        let near = |comma: &usize| self.room - comma <= COMMA_BACKTRACK;
        if self.ids.len() == self.room
            && let Some(comma) = self.last_comma.filter(near)
        {
            let ids = self.ids.split_off(comma + 1);
            let weights = self.weights.split_off(comma + 1);
            self.end_chunk();
            (self.ids, self.weights) = (ids, weights);
        }
    }

    fn add(&mut self, ids: Range<u32>, weight: f32) {
        if self.ids.len() + ids.len() > self.room {
            self.end_chunk();
        }
        self.ids.extend(ids);
        self.weights.resize(self.ids.len(), weight);
    }

    /// Puts the chunk with the finished ones, however full it is.
    fn end_chunk(&mut self) {
        let chunk = self.finished_chunk();
        self.chunks.push(chunk);
    }

    /// Takes the chunk, with BOS, EOS and padding.
    fn finished_chunk(&mut self) -> Chunk {
        let (bos, eos, pad) = (
            self.tokenizer.bos(),
            self.tokenizer.eos(),
            self.tokenizer.pad(),
        );
        let length = self.room + 2;
        self.last_comma = None;
        let mut ids = vec![bos];
        ids.append(&mut self.ids);
        ids.resize(length, eos);
        let mut weights = vec![1.0];
        weights.append(&mut self.weights);
        weights.resize(length, 1.0);
        // Everything behind the first EOS is padding, also behind one that the user wrote; but only where padding has its own token.
        if pad != eos
            && let Some(end) = ids.iter().position(|&id| id == eos)
        {
            ids.iter_mut().skip(end + 1).for_each(|id| *id = pad);
        }
        Chunk { ids, weights }
    }

    fn finish(mut self) -> Vec<Chunk> {
        if !self.ids.is_empty() || self.chunks.is_empty() {
            self.end_chunk();
        }
        self.chunks
    }
}
