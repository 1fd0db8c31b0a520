//! What a T5 tokenizer is made of, embedded or read from a folder. The files are untrusted: capped in size, and looked through before the tokenizers
//! crate sees them. Of `tokenizer.json` only pieces, scores, the table of normalised characters and the special tokens are taken.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::normalizers::precompiled::Precompiled;

use super::{EOS, PAD, charsmap, spiece};
use crate::error::{Error, Result};

/// Pieces and scores from id 3 on (`assets/t5/README.md`).
const PIECES: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/t5/pieces.tsv"));
/// The table of normalised characters.
pub(super) const CHARSMAP: &[u8] = include_bytes!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/assets/t5/charsmap.bin"
));

/// What is unknown.
const UNKNOWN: &str = "<unk>";
/// Tokens that stand for gaps, behind the pieces and counted downwards.
const EXTRA: usize = 100;
/// No T5 tokenizer file is larger than 5 MB.
const MAX_FILE_BYTES: u64 = 32 << 20;
/// More pieces than any vocabulary has.
const MAX_PIECES: usize = 1 << 20;

/// A vocabulary with its special tokens.
pub(super) struct Vocabulary {
    /// Pieces and scores, in the order of their ids.
    pub(super) pieces: Vec<(String, f64)>,
    /// The id of what is unknown.
    pub(super) unknown: usize,
    /// How characters are normalised first.
    pub(super) charsmap: Option<Precompiled>,
    /// Tokens found in the text before anything else.
    pub(super) special: Vec<String>,
}

type Found<T> = std::result::Result<T, String>;

impl Vocabulary {
    /// Google's vocabulary.
    pub(super) fn embedded() -> Found<Self> {
        let mut pieces: Vec<(String, f64)> =
            [PAD, EOS, UNKNOWN].map(|t| (t.to_owned(), 0.0)).into();
        for line in PIECES.lines() {
            let (piece, score) = line
                .split_once('\t')
                .ok_or("pieces.tsv: a line has no score")?;
            let score: f32 = score
                .parse()
                .map_err(|_| "pieces.tsv: a score is no number")?;
            pieces.push((piece.to_owned(), f64::from(score)));
        }
        pieces.extend(extra());
        Self::checked(pieces, 2, Some(CHARSMAP), Vec::new())
    }

    /// The vocabulary of a folder and the file it was read from.
    pub(super) fn read(folder: &Path) -> Result<(PathBuf, Self)> {
        let path = folder.join("tokenizer.json");
        if let Some(bytes) = read_file(&path)? {
            let made = Self::from_json(&bytes).map_err(|e| Error::bad_model(&path, e))?;
            return Ok((path, made));
        }
        let path = folder.join("spiece.model");
        let Some(bytes) = read_file(&path)? else {
            return Err(Error::NotFound {
                what: format!("a T5 tokenizer in {}", folder.display()),
                hint: "expected tokenizer.json or spiece.model".to_owned(),
            });
        };
        let made = Self::from_spiece(&bytes).map_err(|e| Error::bad_model(&path, e))?;
        Ok((path, made))
    }

    fn from_json(bytes: &[u8]) -> Found<Self> {
        let file: TokenizerFile =
            serde_json::from_slice(bytes).map_err(|e| format!("this is no tokenizer: {e}"))?;
        if file.model.kind.as_deref() != Some("Unigram") {
            return Err(format!(
                "the model is {}, expected Unigram; is this a T5 tokenizer?",
                file.model.kind.as_deref().unwrap_or("of no kind")
            ));
        }
        let charsmap = match file.normalizer.as_ref().and_then(find_charsmap) {
            Some(text) => Some(
                decode_base64(text).ok_or("its table of normalised characters is not base64")?,
            ),
            None => None,
        };
        let special = file.added_tokens.into_iter().map(|token| token.content);
        let unknown = file.model.unk_id.ok_or("the model has no `unk_id`")?;
        Self::checked(
            file.model.vocab,
            unknown,
            charsmap.as_deref(),
            special.collect(),
        )
    }

    fn from_spiece(bytes: &[u8]) -> Found<Self> {
        let model = spiece::read(bytes)?;
        let unknown = model.unknown.ok_or("it has no piece for what is unknown")?;
        let mut pieces = model.pieces;
        if !pieces.iter().any(|(piece, _)| piece == "<extra_id_0>") {
            pieces.extend(extra());
        }
        Self::checked(pieces, unknown, model.charsmap, Vec::new())
    }

    fn checked(
        pieces: Vec<(String, f64)>,
        unknown: usize,
        charsmap: Option<&[u8]>,
        special: Vec<String>,
    ) -> Found<Self> {
        if pieces.len() > MAX_PIECES || unknown >= pieces.len() {
            return Err(format!(
                "{} pieces with {unknown} for what is unknown cannot be a vocabulary",
                pieces.len()
            ));
        }
        if let Some((i, _)) = pieces
            .iter()
            .enumerate()
            .find(|(_, (piece, score))| piece.is_empty() || !score.is_finite())
        {
            return Err(format!("piece {i} is empty or has no score"));
        }
        let mut special = special;
        let known = |token: &str| pieces.iter().any(|(piece, _)| piece == token);
        special.extend(
            [PAD, EOS, UNKNOWN]
                .map(str::to_owned)
                .into_iter()
                .filter(|t| known(t)),
        );
        special.extend(extra().map(|(token, _)| token).filter(|t| known(t)));
        special.retain(|token| !token.is_empty() && known(token));
        special.sort_unstable();
        special.dedup();
        let charsmap = charsmap.map(charsmap::read).transpose()?;
        Ok(Self {
            pieces,
            unknown,
            charsmap,
            special,
        })
    }
}

/// `<extra_id_99>` to `<extra_id_0>`.
fn extra() -> impl Iterator<Item = (String, f64)> {
    (0..EXTRA).rev().map(|i| (format!("<extra_id_{i}>"), 0.0))
}

fn read_file(path: &Path) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::disk(path, "read", e)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::disk(path, "read", e))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let reason =
            format!("the file is larger than {MAX_FILE_BYTES} bytes, too large for a tokenizer");
        return Err(Error::bad_model(path, reason));
    }
    Ok(Some(bytes))
}

#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<Value>,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    content: String,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    unk_id: Option<usize>,
    vocab: Vec<(String, f64)>,
}

/// The table in a normaliser, which may be one of several in a row.
fn find_charsmap(normalizer: &Value) -> Option<&str> {
    if let Some(text) = normalizer.get("precompiled_charsmap") {
        return text.as_str().filter(|text| !text.is_empty());
    }
    let list = normalizer.get("normalizers")?.as_array()?;
    let mut own = list
        .iter()
        .filter_map(|one| one.get("precompiled_charsmap")?.as_str());
    own.find(|text| !text.is_empty())
}

/// RFC 4648 with padding.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=');
    let mut out = Vec::with_capacity(text.len() / 4 * 3 + 2);
    let (mut bits, mut count) = (0u32, 0);
    for byte in text.bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(out)
}
