//! T5's tokenizer: text to token ids, as transformers' `T5Tokenizer` does it.
//!
//! The vocabulary is embedded (`assets/t5`), so no tokenizer file is ever needed. A checkpoint folder may bring its own, as `tokenizer.json` or as
//! SentencePiece's `spiece.model`; what is done with it is the same: characters are normalised, words split at spaces, each begun with `▁` and
//! cut into the most likely pieces (Kudo, "Subword Regularization", arXiv 1804.10959).

mod charsmap;
mod spiece;
mod vocabulary;

use std::path::{Path, PathBuf};

use tokenizers::models::unigram::Unigram;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::{AddedToken, Tokenizer};

use super::chunks::Chunk;
use super::prompt::{Piece, Role, Syntax, check_length, parse};
use crate::error::{Error, Result};
use vocabulary::Vocabulary;

/// The token that ends a text.
const EOS: &str = "</s>";
/// The token that fills up a text.
const PAD: &str = "<pad>";

/// A T5 tokenizer. Reference: transformers 5.23, `models/t5/tokenization_t5.py`.
#[derive(Debug, Clone)]
pub struct T5Tokenizer {
    inner: Tokenizer,
    eos: u32,
    pad: u32,
    max_id: u32,
    /// The folder it was read from; none for the embedded one.
    folder: Option<PathBuf>,
}

/// A text as T5 reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct T5Text {
    /// Ids, filled up to the length that was asked for, and the weight of each.
    pub chunk: Chunk,
    /// What was cut.
    pub warning: Option<String>,
}

impl T5Tokenizer {
    /// The tokenizer with the embedded vocabulary of 32,100 tokens.
    ///
    /// # Errors
    /// Only if the program was built from a damaged asset.
    pub fn embedded() -> Result<Self> {
        let broken = |e: String| Error::bad_model("assets/t5", e);
        Self::build(Vocabulary::embedded().map_err(broken)?).map_err(broken)
    }

    /// The tokenizer of a folder: `tokenizer.json`, or `spiece.model`.
    ///
    /// # Errors
    /// [`Error::NotFound`] where the folder holds neither, [`Error::BadModel`] naming the file that cannot be used.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let (path, vocabulary) = Vocabulary::read(folder)?;
        let mut made = Self::build(vocabulary).map_err(|e| Error::bad_model(path, e))?;
        made.folder = Some(folder.to_owned());
        Ok(made)
    }

    fn build(from: Vocabulary) -> std::result::Result<Self, String> {
        let broken = |e: tokenizers::Error| format!("cannot build the tokenizer: {e}");
        let max_id = from.pieces.len().saturating_sub(1);
        let model = Unigram::from(from.pieces, Some(from.unknown), false).map_err(broken)?;
        let mut inner = Tokenizer::new(model);
        if let Some(charsmap) = from.charsmap {
            inner.with_normalizer(Some(charsmap)).map_err(broken)?;
        }
        let words = Metaspace::new('▁', PrependScheme::Always, true);
        let split = Sequence::new(vec![WhitespaceSplit.into(), words.clone().into()]);
        inner.with_pre_tokenizer(Some(split));
        inner.with_decoder(Some(words));
        let special = from.special.iter();
        let special = special.map(|token| AddedToken::from(token.clone(), true));
        inner.add_special_tokens(special).map_err(broken)?;
        let id = |token: &str| {
            inner.token_to_id(token).ok_or_else(|| {
                format!("the token {token} is not in the vocabulary; is this a T5 tokenizer?")
            })
        };
        Ok(Self {
            eos: id(EOS)?,
            pad: id(PAD)?,
            max_id: u32::try_from(max_id).map_err(|_| "too many tokens".to_owned())?,
            inner,
            folder: None,
        })
    }

    /// Refuses a tokenizer that can produce ids which a text model with `rows` token embeddings does not have.
    ///
    /// # Errors
    /// [`Error::BadModel`] about the tokenizer's folder, [`Error::Unsupported`] for the embedded one.
    pub fn check_vocab(&self, rows: usize) -> Result<()> {
        if usize::try_from(self.max_id).is_ok_and(|largest| largest < rows) {
            return Ok(());
        }
        let reason = format!(
            "has token ids up to {}, but the text model knows only 0 to {}",
            self.max_id,
            rows.saturating_sub(1)
        );
        Err(match &self.folder {
            Some(folder) => Error::bad_model(
                folder,
                format!("the tokenizer {reason}; they do not belong together"),
            ),
            None => Error::Unsupported(format!(
                "T5's vocabulary {reason}; such a model needs its own tokenizer folder"
            )),
        })
    }

    /// The ids of a text, without the token that ends it. Special tokens that are written out in the text become their ids, as in transformers.
    ///
    /// # Errors
    /// [`Error::Usage`] when the text cannot be cut.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let failed = |e| Error::Usage(format!("the text cannot be tokenized: {e}"));
        let encoding = self.inner.encode(text, false).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A prompt as T5 reads it: `length` tokens, cut or filled up. With A1111's syntax pieces are cut apart and carry their weights, as in Forge;
    /// a text without weights is what diffusers makes of it.
    ///
    /// # Errors
    /// Those of the syntax, and of [`T5Tokenizer::encode`].
    pub fn tokenize(
        &self,
        text: &str,
        (syntax, role): (Syntax, Role),
        length: usize,
    ) -> Result<T5Text> {
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        let mut push = |text: &str, weight: f64| -> Result<()> {
            ids.extend(self.encode(text)?);
            weights.resize(ids.len(), weight as f32);
            Ok(())
        };
        match syntax {
            Syntax::A1111 => {
                for piece in parse(text, syntax, role)? {
                    // a long text is not cut into chunks, so BREAK has nothing to end
                    if let Piece::Text { text, weight } = piece {
                        push(&text, weight)?;
                    }
                }
            }
            Syntax::Plain => {
                check_length(text, role)?;
                push(text, 1.0)?;
            }
        }
        let room = length.saturating_sub(1);
        let warning = (ids.len() > room).then(|| self.cut_warning(&ids, room, role));
        ids.truncate(room);
        weights.truncate(room);
        ids.push(self.eos);
        ids.resize(length.max(1), self.pad);
        weights.resize(length.max(1), 1.0);
        Ok(T5Text {
            chunk: Chunk { ids, weights },
            warning,
        })
    }

    fn cut_warning(&self, ids: &[u32], room: usize, role: Role) -> String {
        /// Characters of the lost text that are shown.
        const SHOWN: usize = 60;
        let lost = ids.get(room..).unwrap_or_default();
        let text = self.inner.decode(lost, true).unwrap_or_default();
        let mut shown: String = text.chars().take(SHOWN).collect();
        if shown.len() < text.len() {
            shown.push('…');
        }
        format!(
            "the {} has {} tokens for T5, which reads {room}; this is cut off: {shown:?}",
            role.name(),
            ids.len()
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_embedded_vocabulary_is_t5s() {
        let t5 = T5Tokenizer::embedded().unwrap();
        assert_eq!((t5.eos, t5.pad, t5.max_id), (1, 0, 32099));
        let fox = t5.encode("a fox in the snow").unwrap();
        assert_eq!(fox, [3, 9, 3, 20400, 16, 8, 2983]);
        t5.check_vocab(32128).unwrap();
        assert!(t5.check_vocab(32099).is_err());
    }

    #[test]
    fn texts_are_filled_up_cut_and_weighted() {
        let t5 = T5Tokenizer::embedded().unwrap();
        let read =
            |text, syntax, length| t5.tokenize(text, (syntax, Role::Prompt), length).unwrap();
        let plain = read("a fox", Syntax::Plain, 7);
        assert_eq!(plain.chunk.ids, [3, 9, 3, 20400, 1, 0, 0]);
        assert!(!plain.chunk.is_weighted() && plain.warning.is_none());
        let cut = read("a fox in the snow", Syntax::Plain, 5);
        assert_eq!(cut.chunk.ids, [3, 9, 3, 20400, 1]);
        assert!(cut.warning.unwrap().contains("in the snow"));
        let weighted = read("a (fox:1.5)", Syntax::A1111, 6);
        assert_eq!(weighted.chunk.weights, [1.0, 1.0, 1.5, 1.5, 1.0, 1.0]);
        assert_eq!(read("", Syntax::A1111, 3).chunk.ids, [1, 0, 0]);
    }
}
