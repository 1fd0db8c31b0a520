//! CLIP's byte-pair tokenizer: text to token ids, as transformers' `CLIPTokenizer` does it.
//!
//! The vocabulary is embedded (`assets/clip`), so no tokenizer file is ever needed. A checkpoint folder may bring its own, and
//! then its vocabulary, added tokens and padding token hold; normalisation and pre-tokenisation are CLIP's in either case.

use std::path::{Path, PathBuf};

use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as Splits;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::prompt::Syntax;
use super::vocabulary::{BOS, EOS, Vocabulary};
use super::words::{Unit, Word, Words};
use crate::error::{Error, Result};

/// The suffix of the last token of a word.
const END_OF_WORD: &str = "</w>";

/// CLIP's words: contractions, runs of letters, single digits, runs of anything else that is not space.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// A result of the tokenizers crate.
type Built<T> = std::result::Result<T, tokenizers::Error>;

/// A CLIP tokenizer. Reference: transformers 5, `models/clip/tokenization_clip.py`.
#[derive(Debug, Clone)]
pub struct ClipTokenizer {
    inner: Tokenizer,
    bos: u32,
    eos: u32,
    pad: u32,
    comma: Option<u32>,
    max_id: u32,
    /// The folder it was read from; none for the embedded one.
    folder: Option<PathBuf>,
    /// What it has learned beside its vocabulary.
    words: Words,
    ends_at_largest: bool,
}

/// A token and the bytes of the text it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Located {
    /// The token's id.
    pub(crate) id: u32,
    /// Where it begins in the text that was given, in bytes; may lie within a character.
    pub(crate) start: usize,
}

impl ClipTokenizer {
    /// The tokenizer with the embedded vocabulary of 49,408 tokens, padding with `<|endoftext|>` (49407) as Stable Diffusion 1 does;
    /// see [`Self::with_pad`] for the others. Building it takes some 30 ms: keep it.
    pub fn embedded() -> Result<Self> {
        // The vocabulary is part of the program, so this fails only if the program was built from a damaged asset.
        let broken = |e: String| Error::bad_model("assets/clip/merges.txt", e);
        Self::build(Vocabulary::embedded()?, broken)
    }

    /// The tokenizer of a checkpoint's `tokenizer` folder: `tokenizer.json`, or `vocab.json` with `merges.txt`, and beside either of
    /// them `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.
    ///
    /// Errors: [`Error::NotFound`] where the folder holds no vocabulary, [`Error::BadModel`] naming the file that cannot be used.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let mut made = Self::build(Vocabulary::read(folder)?, |e| Error::bad_model(folder, e))?;
        made.folder = Some(folder.to_owned());
        Ok(made)
    }

    /// Puts a vocabulary under CLIP's rules. `blame` says whose fault a failure is.
    fn build(from: Vocabulary, blame: impl Fn(String) -> Error) -> Result<Self> {
        let (bos, eos, pad) = (from.bos.clone(), from.eos.clone(), from.pad.clone());
        let declared = from.declared.clone();
        let largest = from.ids.values().copied().max().unwrap_or(0);
        let inner =
            assemble(from).map_err(|e| blame(format!("cannot build the tokenizer: {e}")))?;
        let id = |token: &str, role: &str| {
            inner.token_to_id(token).ok_or_else(|| {
                blame(format!(
                    "the {role} token {token:?} is not in the vocabulary; is this a CLIP tokenizer?"
                ))
            })
        };
        for (token, wanted) in declared {
            let got = id(&token, "added")?;
            if got != wanted {
                return Err(blame(format!(
                    "the added token {token:?} is declared with id {wanted}, but its place in the vocabulary is {got}"
                )));
            }
        }
        Ok(Self {
            bos: id(&bos, "beginning")?,
            eos: id(&eos, "end")?,
            pad: id(&pad, "padding")?,
            comma: inner.token_to_id(",</w>"),
            max_id: inner
                .get_added_tokens_decoder()
                .into_keys()
                .fold(largest, u32::max),
            inner,
            folder: None,
            words: Words::default(),
            ends_at_largest: false,
        })
    }

    /// The same tokenizer with learned words, whose ids the tower knows.
    ///
    /// # Errors
    /// When a name cannot be tokenized.
    pub fn with_words(mut self, words: &[Word]) -> Result<Self> {
        self.words = Words::new(&self, words)?;
        Ok(self)
    }

    /// The same tokenizer padding with `id`: 0 for the OpenCLIP towers of Stable Diffusion 2 and XL, where the checkpoint's own
    /// tokenizer does not say.
    #[must_use]
    pub fn with_pad(mut self, id: u32) -> Self {
        self.pad = id;
        self
    }

    /// The same tokenizer for a tower whose config says that texts end with token 2, as those of Stable Diffusion XL do: transformers then
    /// takes a text's vector at the largest id, which with learned words is one of theirs (`CLIPTextTransformer.forward`).
    #[must_use]
    pub fn with_end_at_largest(mut self, largest: bool) -> Self {
        self.ends_at_largest = largest;
        self
    }

    /// Whether transformers takes a text's vector at its largest id.
    pub(super) fn ends_at_largest(&self) -> bool {
        self.ends_at_largest
    }

    /// The id that begins every sequence.
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// The id that ends every sequence.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// The id that fills a sequence up to its length.
    pub fn pad(&self) -> u32 {
        self.pad
    }

    /// The id of a comma that ends a word, where the vocabulary has one.
    pub fn comma(&self) -> Option<u32> {
        self.comma
    }

    /// Refuses a tokenizer that can produce ids which a text model with `rows` token embeddings does not have.
    ///
    /// Errors: [`Error::BadModel`] about the tokenizer's folder, [`Error::Unsupported`] for the embedded one.
    pub fn check_vocab(&self, rows: usize) -> Result<()> {
        let largest = self.max_id.max(self.pad);
        if usize::try_from(largest).is_ok_and(|largest| largest < rows) {
            return Ok(());
        }
        let last = rows.saturating_sub(1);
        let reason =
            format!("has token ids up to {largest}, but the text model knows only 0 to {last}");
        Err(match &self.folder {
            Some(folder) => Error::bad_model(
                folder,
                format!("the tokenizer {reason}; they do not belong together"),
            ),
            None => Error::Unsupported(format!(
                "CLIP's vocabulary {reason}; such a model needs its own tokenizer folder"
            )),
        })
    }

    /// The ids of a text, without [`Self::bos`] and [`Self::eos`] around them. Special tokens that are written out in the text, such
    /// as `<|endoftext|>`, become their ids, as in transformers.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encode_located(text)?.iter().map(|t| t.id).collect())
    }

    /// Tokens and learned words of a text.
    pub(super) fn units(&self, text: &str, syntax: Syntax) -> Result<Vec<Unit>> {
        self.words.units(self, text, syntax)
    }

    /// A text without its `embedding:…`, for a tower that knows no learned words.
    pub(super) fn without_named(&self, text: &str) -> String {
        self.words.without_named(text)
    }

    /// [`Self::encode`], with the place of every token.
    pub(crate) fn encode_located(&self, text: &str) -> Result<Vec<Located>> {
        let failed = |e| Error::Usage(format!("the text cannot be tokenized: {e}"));
        let encoding = self.inner.encode(text, false).map_err(failed)?;
        let places = encoding.get_ids().iter().zip(encoding.get_offsets());
        Ok(places
            .map(|(&id, &(start, _))| Located { id, start })
            .collect())
    }
}

/// The tokenizers crate's pipeline: NFC, runs of space to one, lower case; CLIP's words; bytes as characters; byte pairs.
fn assemble(from: Vocabulary) -> Built<Tokenizer> {
    let model = BPE::builder()
        .vocab_and_merges(from.ids, from.merges)
        .unk_token(EOS.to_owned())
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix(END_OF_WORD.to_owned())
        .build()?;
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".to_owned()), " ")?;
    let words = Split::new(
        SplitPattern::Regex(WORDS.to_owned()),
        SplitDelimiterBehavior::Removed,
        true,
    )?;
    let bytes = ByteLevel::default().add_prefix_space(false);

    let mut tokenizer = Tokenizer::new(model);
    let normalizers = vec![NFC.into(), spaces.into(), Lowercase.into()];
    tokenizer.with_normalizer(Some(Sequence::new(normalizers)))?;
    tokenizer.with_pre_tokenizer(Some(Splits::new(vec![words.into(), bytes.into()])));
    tokenizer.add_tokens(from.added)?;
    Ok(tokenizer)
}

/// CLIP's two special tokens as transformers adds them.
pub(super) fn special_tokens() -> Vec<AddedToken> {
    vec![AddedToken::from(BOS, true), AddedToken::from(EOS, true)]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_embedded_vocabulary_is_clips() {
        let clip = ClipTokenizer::embedded().unwrap();
        assert_eq!((clip.bos(), clip.eos(), clip.pad()), (49406, 49407, 49407));
        assert_eq!((clip.comma(), clip.max_id), (Some(267), 49407));
        assert_eq!(
            clip.encode("a photo of a cat").unwrap(),
            [320, 1125, 539, 320, 2368]
        );
        assert_eq!(clip.encode(" \t\n").unwrap(), Vec::<u32>::new());
        assert_eq!(clip.with_pad(0).pad(), 0);
    }

    #[test]
    fn a_text_model_must_know_every_token() {
        let clip = ClipTokenizer::embedded().unwrap();
        clip.check_vocab(49408).unwrap();
        let message = clip.check_vocab(49407).unwrap_err().to_string();
        assert!(
            message.contains("49407") && message.contains("0 to 49406"),
            "{message}"
        );
        assert!(clip.check_vocab(0).is_err());
        assert!(clip.with_pad(60_000).check_vocab(49408).is_err());
    }

    #[test]
    fn tokens_know_their_place() {
        let clip = ClipTokenizer::embedded().unwrap();
        let starts: Vec<usize> = clip
            .encode_located("Été,  a cat")
            .unwrap()
            .iter()
            .map(|t| t.start)
            .collect();
        assert_eq!(starts.last(), Some(&10));
    }
}
