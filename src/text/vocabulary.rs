//! What a CLIP tokenizer is made of, embedded or read from a checkpoint's `tokenizer` folder.
//!
//! The files are untrusted: they are capped in size, and every merge is checked before the tokenizers crate sees it, which would
//! otherwise panic on some. Only vocabulary, merges and added tokens are taken from `tokenizer.json`, never its regular expressions;
//! transformers 5 rebuilds a CLIP tokenizer from the same parts.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokenizers::AddedToken;
use tokenizers::models::bpe::Vocab;

use super::tokenizer::special_tokens;
use crate::error::{Error, Result};

/// The token that begins a sequence.
pub(super) const BOS: &str = "<|startoftext|>";
/// The token that ends a sequence, pads it in Stable Diffusion 1, and stands for the unknown.
pub(super) const EOS: &str = "<|endoftext|>";

/// CLIP's merges, one a line, best first (`assets/clip/README.md`).
const MERGES: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/assets/clip/merges.txt"
));

/// No tokenizer file of any Stable Diffusion is larger than 4 MB.
const MAX_FILE_BYTES: u64 = 32 << 20;

/// A vocabulary with its special tokens.
#[derive(Debug)]
pub(super) struct Vocabulary {
    /// Token to id.
    pub(super) ids: Vocab,
    /// Pairs of tokens that are joined, best first.
    pub(super) merges: Vec<(String, String)>,
    /// Tokens found in the text before anything else; of two with the same text the last counts.
    pub(super) added: Vec<AddedToken>,
    /// Added tokens with the ids that the files give them.
    pub(super) declared: Vec<(String, u32)>,
    /// The token that begins a sequence.
    pub(super) bos: String,
    /// The token that ends a sequence.
    pub(super) eos: String,
    /// The token that fills a sequence.
    pub(super) pad: String,
}

impl Vocabulary {
    /// OpenAI's vocabulary, from the merges alone.
    pub(super) fn embedded() -> Result<Self> {
        let merges =
            parse_merges(MERGES).map_err(|e| Error::bad_model("assets/clip/merges.txt", e))?;
        let bytes = || byte_characters().into_iter();
        let words = bytes()
            .map(String::from)
            .chain(bytes().map(|c| format!("{c}</w>")))
            .chain(merges.iter().map(|(a, b)| format!("{a}{b}")))
            .chain([BOS.to_owned(), EOS.to_owned()]);
        Ok(Self {
            ids: words.zip(0u32..).collect(),
            merges,
            added: special_tokens(),
            declared: Vec::new(),
            bos: BOS.to_owned(),
            eos: EOS.to_owned(),
            pad: EOS.to_owned(),
        })
    }

    /// The vocabulary of a `tokenizer` folder.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let (ids, merges, mut listed) = read_model(folder)?;
        let mut config: Config =
            read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        // transformers reads the two older files only where the newer list is absent; then they win.
        match config.added_tokens_decoder.take() {
            Some(decoder) => listed = listed_by_id(folder, decoder)?,
            None => {
                if let Some(map) =
                    read_json::<SpecialNames>(&folder.join("special_tokens_map.json"))?
                {
                    config.names.replace_by(map);
                }
                listed.extend(read_added(folder, &config.names)?);
            }
        }
        listed.sort_by_key(|(id, _)| *id);
        let named = config.names.resolve(&listed);
        for AddedToken { content, .. } in &named {
            let known = listed.iter().any(|(_, token)| token.content == *content);
            if !known && !ids.contains_key(content) {
                let reason = format!("the special token {content:?} is not in the vocabulary");
                return Err(Error::bad_model(
                    folder,
                    reason + "; is this a CLIP tokenizer?",
                ));
            }
        }
        let [bos, eos, _, pad] = named.each_ref().map(|token| token.content.clone());
        let declared = listed
            .iter()
            .map(|(id, token)| (token.content.clone(), *id));
        Ok(Self {
            ids,
            merges,
            declared: declared.collect(),
            added: listed
                .into_iter()
                .map(|(_, token)| token)
                .chain(named)
                .collect(),
            bos,
            eos,
            pad,
        })
    }
}

/// The characters that stand for the 256 bytes, in CLIP's order: printable Latin-1 as itself, the rest from U+0100 on.
fn byte_characters() -> Vec<char> {
    let printable = ('!'..='~').chain('¡'..='¬').chain('®'..='ÿ');
    let rest = '\u{100}'..='\u{143}';
    printable.chain(rest).collect()
}

/// The lines of a merges file as pairs; a `#version` line and empty lines are passed over.
fn parse_merges(text: &str) -> std::result::Result<Vec<(String, String)>, String> {
    let lines = text
        .lines()
        .zip(1..)
        .filter(|(line, _)| !line.is_empty() && !line.starts_with("#version"));
    lines
        .map(|(line, number)| {
            split_merge(line)
                .ok_or_else(|| format!("line {number}: expected two tokens, got {line:?}"))
        })
        .collect()
}

/// The two tokens of a merge.
fn split_merge(line: &str) -> Option<(String, String)> {
    let (a, b) = line.split_once(' ')?;
    let whole = !a.is_empty() && !b.is_empty() && !b.contains(' ');
    whole.then(|| (a.to_owned(), b.to_owned()))
}

/// What a tokenizer's main files hold.
type Model = (Vocab, Vec<(String, String)>, Vec<(u32, AddedToken)>);

/// Reads `tokenizer.json`, or `vocab.json` with `merges.txt`.
fn read_model(folder: &Path) -> Result<Model> {
    let whole = folder.join("tokenizer.json");
    if let Some(file) = read_json::<TokenizerFile>(&whole)? {
        return file.into_model().map_err(|e| Error::bad_model(whole, e));
    }
    let (vocab, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
    let (Some(ids), Some(text)) = (
        read_json::<BTreeMap<String, u32>>(&vocab)?,
        read_text(&merges)?,
    ) else {
        return Err(Error::NotFound {
            what: format!("a tokenizer in {}", folder.display()),
            hint: "expected tokenizer.json, or vocab.json and merges.txt".to_owned(),
        });
    };
    let ids: Vocab = ids.into_iter().collect();
    check_ids(&ids).map_err(|e| Error::bad_model(vocab, e))?;
    let pairs = parse_merges(&text).and_then(|pairs| check_merges(&ids, pairs));
    let pairs = pairs.map_err(|e| Error::bad_model(merges, e))?;
    Ok((ids, pairs, Vec::new()))
}

/// Two tokens must not share an id.
fn check_ids(ids: &Vocab) -> std::result::Result<(), String> {
    let mut seen: Vec<u32> = ids.values().copied().collect();
    seen.sort_unstable();
    match seen.windows(2).find(|pair| pair.first() == pair.last()) {
        Some(pair) => Err(format!(
            "two tokens have the id {}",
            pair.first().copied().unwrap_or_default()
        )),
        None => Ok(()),
    }
}

/// Both halves of a merge and what they make must be in the vocabulary.
fn check_merges(
    ids: &Vocab,
    pairs: Vec<(String, String)>,
) -> std::result::Result<Vec<(String, String)>, String> {
    for (a, b) in &pairs {
        let joined = format!("{a}{b}");
        if let Some(missing) = [a, b, &joined]
            .into_iter()
            .find(|token| !ids.contains_key(token.as_str()))
        {
            return Err(format!(
                "the merge of {a:?} and {b:?} needs the token {missing:?}, which the vocabulary lacks"
            ));
        }
    }
    Ok(pairs)
}

/// The tokens of `added_tokens_decoder`, whose keys are ids.
fn listed_by_id(
    folder: &Path,
    decoder: BTreeMap<String, TokenEntry>,
) -> Result<Vec<(u32, AddedToken)>> {
    let bad = |key: &str| {
        let reason = format!("added_tokens_decoder: expected a token id as key, got {key:?}");
        Error::bad_model(folder.join("tokenizer_config.json"), reason)
    };
    decoder
        .into_iter()
        .map(|(key, entry)| Ok((key.parse().map_err(|_| bad(&key))?, entry.token())))
        .collect()
}

/// The tokens of `added_tokens.json`, which gives only ids.
fn read_added(folder: &Path, names: &SpecialNames) -> Result<Vec<(u32, AddedToken)>> {
    let added: BTreeMap<String, u32> =
        read_json(&folder.join("added_tokens.json"))?.unwrap_or_default();
    let special = |text: &str| names.all().any(|named| named.content() == text);
    Ok(added
        .into_iter()
        .map(|(text, id)| (id, AddedToken::from(text.as_str(), special(&text))))
        .collect())
}

/// A file's text; `None` where there is no such file.
fn read_text(path: &Path) -> Result<Option<String>> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::disk(path, "read", e)),
    };
    let mut text = String::new();
    let read = file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text);
    match read {
        Ok(length) if length as u64 > MAX_FILE_BYTES => {
            let limit = MAX_FILE_BYTES >> 20;
            Err(Error::bad_model(
                path,
                format!("the file is larger than {limit} MB; no CLIP tokenizer is"),
            ))
        }
        Ok(_) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::InvalidData => {
            Err(Error::bad_model(path, "the file is not UTF-8 text"))
        }
        Err(e) => Err(Error::disk(path, "read", e)),
    }
}

/// A JSON file; `None` where there is no such file.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let Some(text) = read_text(path)? else {
        return Ok(None);
    };
    let bad = |e| {
        Error::bad_model(
            PathBuf::from(path),
            format!("cannot be read as tokenizer JSON: {e}"),
        )
    };
    serde_json::from_str(&text).map(Some).map_err(bad)
}

/// `tokenizer.json`, the parts that are used.
#[derive(Deserialize)]
struct TokenizerFile {
    model: ModelEntry,
    #[serde(default)]
    added_tokens: Vec<ListedToken>,
}

/// The `model` of `tokenizer.json`.
#[derive(Deserialize)]
struct ModelEntry {
    #[serde(rename = "type")]
    kind: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    vocab: serde_json::Value,
    #[serde(default)]
    merges: Vec<Merge>,
}

/// A merge in either spelling.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Line(String),
    Pair(String, String),
}

/// An added token with its id.
#[derive(Deserialize)]
struct ListedToken {
    id: u32,
    #[serde(flatten)]
    entry: TokenEntry,
}

/// An added token as transformers writes it.
#[derive(Deserialize, Clone, Debug)]
struct TokenEntry {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

/// A special token's name: its text, or all about it.
#[derive(Deserialize, Clone, Debug)]
#[serde(untagged)]
enum Named {
    Text(String),
    Entry(TokenEntry),
}

/// The special tokens by role.
#[derive(Deserialize, Default, Debug)]
struct SpecialNames {
    bos_token: Option<Named>,
    eos_token: Option<Named>,
    unk_token: Option<Named>,
    pad_token: Option<Named>,
}

/// `tokenizer_config.json`, the parts that are used.
#[derive(Deserialize, Default)]
struct Config {
    #[serde(flatten)]
    names: SpecialNames,
    added_tokens_decoder: Option<BTreeMap<String, TokenEntry>>,
}

impl TokenizerFile {
    /// The checked parts, or what is wrong.
    fn into_model(self) -> std::result::Result<Model, String> {
        let kind = self.model.kind.as_deref().unwrap_or("BPE");
        let suffix = self.model.end_of_word_suffix.as_deref().unwrap_or_default();
        if kind != "BPE" || suffix != "</w>" {
            return Err(format!(
                "expected CLIP's byte-pair model with the word end \"</w>\", got {kind:?} with {suffix:?}"
            ));
        }
        let ids: BTreeMap<String, u32> =
            serde_json::from_value(self.model.vocab).map_err(|e| format!("model.vocab: {e}"))?;
        let ids: Vocab = ids.into_iter().collect();
        check_ids(&ids)?;
        let pairs = self.model.merges.into_iter().map(|merge| match merge {
            Merge::Line(line) => split_merge(&line)
                .ok_or_else(|| format!("model.merges: expected two tokens, got {line:?}")),
            Merge::Pair(a, b) => Ok((a, b)),
        });
        let pairs = check_merges(&ids, pairs.collect::<std::result::Result<_, _>>()?)?;
        let added = self
            .added_tokens
            .into_iter()
            .map(|t| (t.id, t.entry.token()))
            .collect();
        Ok((ids, pairs, added))
    }
}

impl TokenEntry {
    fn token(self) -> AddedToken {
        AddedToken::from(self.content, self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized.unwrap_or(!self.special))
    }
}

impl Named {
    fn content(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Entry(entry) => &entry.content,
        }
    }

    fn token(&self) -> AddedToken {
        match self {
            Self::Text(text) => AddedToken::from(text.as_str(), true),
            Self::Entry(entry) => TokenEntry {
                special: true,
                ..entry.clone()
            }
            .token(),
        }
    }
}

impl SpecialNames {
    fn all(&self) -> impl Iterator<Item = &Named> {
        [
            &self.bos_token,
            &self.eos_token,
            &self.unk_token,
            &self.pad_token,
        ]
        .into_iter()
        .flatten()
    }

    /// The tokens for beginning, end, unknown and padding, in transformers' order; what the list says of one of them holds.
    fn resolve(self, listed: &[(u32, AddedToken)]) -> [AddedToken; 4] {
        let resolve = |named: Option<Named>, default: &str| {
            let named = named.unwrap_or_else(|| Named::Text(default.to_owned()));
            let same = listed
                .iter()
                .find(|(_, token)| token.content == named.content());
            same.map_or_else(|| named.token(), |(_, token)| token.clone().special(true))
        };
        [
            resolve(self.bos_token, BOS),
            resolve(self.eos_token, EOS),
            resolve(self.unk_token, EOS),
            resolve(self.pad_token, EOS),
        ]
    }

    fn replace_by(&mut self, other: Self) {
        let put = |to: &mut Option<Named>, from: Option<Named>| {
            if from.is_some() {
                *to = from;
            }
        };
        put(&mut self.bos_token, other.bos_token);
        put(&mut self.eos_token, other.eos_token);
        put(&mut self.unk_token, other.unk_token);
        put(&mut self.pad_token, other.pad_token);
    }
}
