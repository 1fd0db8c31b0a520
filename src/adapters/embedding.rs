//! Textual inversions (Gal et al., arXiv 2208.01618): vectors that a text tower reads in the place of a word's.
//!
//! | file | tensors |
//! |---|---|
//! | A1111 `.pt`, `.bin` | `string_to_param.*`, beside it `name`, `step` |
//! | A1111 `.safetensors`, kohya | `emb_params` |
//! | two towers and more | `clip_l`, `clip_g` (SDXL, Stable Diffusion 3) |
//! | diffusers | one named after its token; several tokens, several tensors |
//! | inside a LoRA | any of these below `bundle_emb.NAME.` |
//!
//! Each is `[width]` or `[vectors, width]`. Facts from A1111's `modules/textual_inversion`, ComfyUI's `comfy/sd1_clip.py`, diffusers'
//! `loaders/textual_inversion.py`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::checkpoint::{Checkpoint, Family, ReadOptions, TensorSet, detect, printable};
use crate::error::{Error, Result};
use crate::weights::{is_readable, values};

/// The most vectors of one: a chunk's tokens between its first and its last.
pub const MOST_VECTORS: usize = 75;
/// The most words that one file may hold, and the widest vector.
const MOST_WORDS: usize = 256;
const MOST_WIDTH: usize = 1 << 16;
/// What a LoRA's own embeddings lie below.
pub(super) const BUNDLE: &str = "bundle_emb.";

/// The names that files with several towers use, and the towers'.
const TOWERS: [(&str, &str); 4] = [
    ("clip_l", "text_encoder"),
    ("clip_h", "text_encoder"),
    ("clip_g", "text_encoder_2"),
    ("t5xxl", T5),
];
/// What stands for T5, which has no such vectors here.
const T5: &str = "text_encoder_3";

/// The vectors of one word.
#[derive(Debug, Clone)]
pub struct Embedding {
    path: PathBuf,
    name: String,
    token: Option<String>,
    /// Whether A1111's prompts may say the token: diffusers' files have no other name, A1111's have one that it does not look at.
    token_is_word: bool,
    renamed: bool,
    bundled: bool,
    spellings: Vec<String>,
    parts: Vec<Vectors>,
}

/// What one tower reads.
#[derive(Debug, Clone)]
pub struct Vectors {
    /// The tower's name in a folder; none where the file does not say.
    pub tower: Option<&'static str>,
    /// How many vectors.
    pub count: usize,
    /// Their width.
    pub width: usize,
    /// Row-major, f32.
    pub values: Arc<Vec<f32>>,
}

impl Embedding {
    /// Opens a file: one word, or as many as it holds.
    ///
    /// # Errors
    /// [`Error::BadModel`] with one sentence when it is no textual inversion or a broken one; those of [`Checkpoint::open`].
    pub fn open(path: &Path, options: &ReadOptions) -> Result<Vec<Self>> {
        let checkpoint = Checkpoint::open_with(path, options)?;
        let refused = |reason: String| Error::bad_model(path, reason);
        let Some(tensors) = checkpoint.single() else {
            let reason = "a folder is not a textual inversion; give its file, such as learned_embeds.safetensors, with --embedding";
            return Err(refused(reason.to_owned()));
        };
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let found = read(&tensors, path, &stem).map_err(refused)?;
        if found.is_empty() {
            let detection = detect(&checkpoint);
            let (is, hint) = (
                detection.title(),
                match detection.family {
                    Family::Lora => "give it with --lora",
                    _ => "give one with --embedding",
                },
            );
            return Err(refused(format!(
                "this is {is}, not a textual inversion; {hint}"
            )));
        }
        Ok(found)
    }

    /// The words that a LoRA's file brings along (A1111's `bundle_emb`).
    ///
    /// # Errors
    /// As [`Embedding::open`].
    pub fn bundled(path: &Path, options: &ReadOptions) -> Result<Vec<Self>> {
        let checkpoint = Checkpoint::open_with(path, options)?;
        let Some(tensors) = checkpoint.single() else {
            return Ok(Vec::new());
        };
        let below = tensors.names_below(BUNDLE);
        let names: BTreeSet<&str> = below
            .filter_map(|name| Some(name.strip_prefix(BUNDLE)?.split_once('.')?.0))
            .collect();
        let mut all = Vec::new();
        for name in names {
            let own = tensors.strip_prefix(&format!("{BUNDLE}{name}."));
            let found = read(&own, path, name).map_err(|reason| {
                let name = printable(name);
                Error::bad_model(path, format!("its embedding `{name}`: {reason}"))
            })?;
            all.extend(found.into_iter().map(|found| Self {
                bundled: true,
                token: None,
                ..found
            }));
        }
        Ok(all)
    }

    /// The same under another name, which the user gave.
    #[must_use]
    pub fn renamed(mut self, name: &str) -> Self {
        self.spellings = vec![name.to_owned()];
        name.clone_into(&mut self.name);
        self.renamed = true;
        self
    }

    /// Lets `embedding:` mean it by another spelling, too: with folders or an ending.
    pub fn also_called(&mut self, spelling: &str) {
        if !self.spellings.iter().any(|known| known == spelling) {
            self.spellings.push(spelling.to_owned());
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What prompts call it: the file's stem, as A1111 does, unless it was renamed.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the file calls it: diffusers' token, A1111's `name`.
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// Whether it came inside a LoRA.
    pub fn is_bundled(&self) -> bool {
        self.bundled
    }

    /// Names by which `embedding:` means it.
    pub fn spellings(&self) -> &[String] {
        &self.spellings
    }

    /// What is in A1111's prompts: its name and, for diffusers' files, their token.
    pub fn words(&self) -> Vec<String> {
        // what stands in angle brackets is no word of anybody's
        let bracketed =
            |token: &str| token.len() > 2 && token.starts_with('<') && token.ends_with('>');
        let said = |token: &String| self.token_is_word || bracketed(token);
        let token = self
            .token
            .iter()
            .filter(|token| !self.renamed && said(token));
        std::iter::once(&self.name).chain(token).cloned().collect()
    }

    /// What is in diffusers' prompts: the file's token, or the name that was given; the file's own name where it has no token.
    pub fn tokens(&self) -> Vec<String> {
        let token = self.token.clone().filter(|_| !self.renamed);
        vec![token.unwrap_or_else(|| self.name.clone())]
    }

    /// The vectors, tower by tower.
    pub fn parts(&self) -> &[Vectors] {
        &self.parts
    }

    /// How many vectors it has in each tower.
    pub fn count(&self) -> usize {
        self.parts.first().map_or(0, |part| part.count)
    }

    /// The models that it was made for, by the width of its vectors.
    pub fn made_for(&self) -> String {
        let has = |tower| self.parts.iter().any(|part| part.tower == Some(tower));
        let width = self.parts.first().map_or(0, |part| part.width);
        match width {
            _ if has(T5) => "Stable Diffusion 3".to_owned(),
            _ if has("text_encoder") && has("text_encoder_2") => "Stable Diffusion XL".to_owned(),
            _ if has("text_encoder_2") => "OpenCLIP-G, as in Stable Diffusion XL".to_owned(),
            768 => "Stable Diffusion 1".to_owned(),
            1024 => "Stable Diffusion 2".to_owned(),
            1280 => "OpenCLIP-G, as in the SDXL refiner".to_owned(),
            4096 => "T5".to_owned(),
            _ => "an unknown model".to_owned(),
        }
    }

    /// What each of a model's CLIP towers, given by name and width, reads in the word's place: nothing where the file holds none for it.
    /// `title` says what the model is: "a Stable Diffusion 1 checkpoint".
    ///
    /// # Errors
    /// [`Error::BadModel`] that says what it was made for.
    pub fn fit(&self, towers: &[(&str, usize)], title: &str) -> Result<Vec<Option<&Vectors>>> {
        let shape = |parts: &[Vectors]| {
            let widths: Vec<String> = parts.iter().map(|part| part.width.to_string()).collect();
            widths.join(" and ")
        };
        let refuse = || {
            let wanted: Vec<String> = towers.iter().map(|(_, width)| width.to_string()).collect();
            let (made, own) = (self.made_for(), shape(&self.parts));
            Error::bad_model(
                &self.path,
                format!(
                    "this embedding was made for {made} (vectors {own} wide), and the model is {title} (its text encoders read {}); give one that was made for such a model",
                    wanted.join(" and ")
                ),
            )
        };
        if let [only] = self.parts.as_slice()
            && only.tower.is_none()
        {
            return match towers {
                [(_, width)] if *width == only.width => Ok(vec![Some(only)]),
                _ => Err(refuse()),
            };
        }
        if self.parts.iter().any(|part| part.tower == Some(T5)) {
            return Err(Error::bad_model(
                &self.path,
                "this embedding has vectors for T5, which is not supported; give one for CLIP alone",
            ));
        }
        let known = |part: &Vectors| towers.iter().any(|(name, _)| part.tower == Some(name));
        // a refiner reads what was made for its base model
        let is_refiner = matches!(towers, [("text_encoder_2", _)]);
        if !self.parts.iter().any(known) || !(is_refiner || self.parts.iter().all(known)) {
            return Err(refuse());
        }
        towers
            .iter()
            .map(|(name, width)| {
                let part = self.parts.iter().find(|part| part.tower == Some(name));
                match part {
                    Some(part) if part.width != *width => Err(refuse()),
                    part => Ok(part),
                }
            })
            .collect()
    }
}

/// The words among `tensors`, called `stem` where the file does not say; none when these are something else.
fn read(
    tensors: &TensorSet,
    path: &Path,
    stem: &str,
) -> std::result::Result<Vec<Embedding>, String> {
    let make = |token: Option<&str>, parts: Vec<Vectors>| Embedding {
        path: path.to_owned(),
        name: stem.to_owned(),
        token: token.filter(|token| !token.is_empty()).map(str::to_owned),
        token_is_word: true,
        renamed: false,
        bundled: false,
        spellings: vec![stem.to_owned()],
        parts,
    };
    let by_tower: Vec<(&str, &'static str)> = TOWERS
        .into_iter()
        .filter(|(name, _)| tensors.info(name).is_some())
        .collect();
    if !by_tower.is_empty() {
        let parts = by_tower.into_iter().map(|(name, tower)| {
            let part = vectors(tensors, name)?;
            Ok(Vectors {
                tower: Some(tower),
                ..part
            })
        });
        let parts = parts.collect::<std::result::Result<Vec<_>, String>>()?;
        if parts
            .windows(2)
            .any(|two| two.first().map(|a| a.count) != two.last().map(|b| b.count))
        {
            let counts: Vec<String> = parts.iter().map(|part| part.count.to_string()).collect();
            return Err(format!(
                "it has {} vectors for its text encoders, expected as many for each; save it again",
                counts.join(" and ")
            ));
        }
        return Ok(vec![make(None, parts)]);
    }
    let mut params = tensors.names_below("string_to_param.");
    if let Some(name) = params.next() {
        if params.next().is_some() {
            return Err(
                "it holds several `string_to_param`, expected one; save them apart".to_owned(),
            );
        }
        let part = vectors(tensors, name)?;
        let mut texts = tensors.files().map(|file| file.metadata());
        let token = texts.find_map(|texts| texts.get("name"));
        return Ok(vec![Embedding {
            token_is_word: false,
            ..make(token.map(String::as_str), vec![part])
        }]);
    }
    if tensors.info("emb_params").is_some() {
        return Ok(vec![make(None, vec![vectors(tensors, "emb_params")?])]);
    }
    if !are_words(tensors) {
        return Ok(Vec::new());
    }
    let several = tensors.len() > 1;
    tensors
        .names()
        .map(|token| {
            let word = make(Some(token), vec![vectors(tensors, token)?]);
            // a file of many words cannot lend its own name to all of them
            Ok(if several { word.renamed(token) } else { word })
        })
        .collect()
}

/// Whether all tensors may be words' vectors, named after their tokens.
fn are_words(tensors: &TensorSet) -> bool {
    let width = |name: &str| match *tensors.shape(name).unwrap_or_default() {
        [width] => Some(width),
        [count, width] if count <= MOST_VECTORS.saturating_add(2) => Some(width),
        _ => None,
    };
    let Some(first) = tensors.names().next().and_then(width) else {
        return false;
    };
    let fits = |name: &str| {
        let named_so = name.ends_with(".weight") || name.ends_with(".bias");
        !named_so && width(name) == Some(first)
    };
    first >= 8 && tensors.len() <= MOST_WORDS && tensors.names().all(fits)
}

/// A tensor `[width]` or `[vectors, width]`.
fn vectors(tensors: &TensorSet, name: &str) -> std::result::Result<Vectors, String> {
    let shown = if name.is_empty() {
        "its tensor".to_owned()
    } else {
        format!("tensor `{}`", printable(name))
    };
    let info = tensors
        .info(name)
        .ok_or_else(|| format!("{shown} is missing"))?;
    let (count, width) = match *info.shape.as_slice() {
        [width] => (1, width),
        [count, width] => (count, width),
        _ => {
            return Err(format!(
                "{shown} has the shape {:?}, expected [vectors, width]",
                info.shape
            ));
        }
    };
    if !(1..=MOST_VECTORS).contains(&count) || !(1..=MOST_WIDTH).contains(&width) {
        return Err(format!(
            "{shown} has the shape {:?}, expected 1 to {MOST_VECTORS} vectors, as many as a chunk of a prompt has room for",
            info.shape
        ));
    }
    if !is_readable(info.dtype) {
        return Err(format!(
            "{shown} is of the type {}, expected floats",
            info.dtype
        ));
    }
    let values = values::all(tensors, name).map_err(|e| e.to_string())?;
    if let Some(i) = values.iter().position(|x| !x.is_finite()) {
        return Err(format!(
            "{shown} holds {} (vector {}), which is no number to compute with; the file is damaged: download it again",
            values.get(i).copied().unwrap_or_default(),
            i / width.max(1)
        ));
    }
    Ok(Vectors {
        tower: None,
        count,
        width,
        values: Arc::new(values),
    })
}
