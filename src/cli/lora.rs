//! `--lora` and `<lora:…>`: which files are meant, how much of each, and what a picture's parameters say of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::args::{ConvertArgs, GenerateArgs, LibraryArgs};
use super::fetch::{library, resolve};
use serde_json::json;

use crate::adapters::{Adapter, Adapters};
use crate::checkpoint::{ReadOptions, sha256_tensors};
use crate::error::{Error, Result};
use crate::library::Model;
use crate::text::{Syntax, take_loras};

/// How many digits of a hash A1111 gives.
const DIGITS: usize = 12;

/// What the command line and the prompt ask for.
pub(super) struct Worn {
    pub(super) adapters: Adapters,
    /// The prompt without tags, as the text encoders read it.
    pub(super) prompt: String,
    /// The prompt as a picture's parameters have it: a tag for each `--lora` is added, so that every reader can make the picture again.
    pub(super) shown_prompt: String,
    /// A1111's `Lora hashes`, if there are any.
    pub(super) hashes: Option<String>,
}

/// Opens every adapter that is asked for.
///
/// # Errors
/// When one is not found, is no adapter, or a weight is wrong.
pub(super) fn wear(args: &GenerateArgs) -> Result<Worn> {
    let (prompt, tags) = match args.prompt_syntax {
        Syntax::A1111 => take_loras(&args.prompt)?,
        Syntax::Plain => (args.prompt.clone(), Vec::new()),
    };
    let mut worn = Worn {
        adapters: Adapters::default(),
        prompt,
        shown_prompt: args.prompt.clone(),
        hashes: None,
    };
    worn.adapters.set_dora_norm(args.dora_norm);
    let mut hashes = Vec::new();
    for flag in &args.lora {
        let (typed, text, denoiser) = split(flag)?;
        let model = find(&args.library, &typed)?;
        let name = tag_name(&model.name);
        worn.add(args, &model, (text, denoiser), (&name, &mut hashes))?;
        let tag = if text == denoiser {
            format!("<lora:{name}:{text}>")
        } else {
            format!("<lora:{name}:{text}:{denoiser}>")
        };
        let space = if worn.shown_prompt.is_empty() {
            ""
        } else {
            " "
        };
        worn.shown_prompt = format!("{}{space}{tag}", worn.shown_prompt);
    }
    if !tags.is_empty() {
        let library = library(&args.library)?;
        for tag in &tags {
            let model = library.find_lora(&tag.name)?;
            let name = tag_name(&tag.name);
            worn.add(args, &model, (tag.text, tag.denoiser), (&name, &mut hashes))?;
        }
    }
    worn.hashes = (!hashes.is_empty()).then(|| hashes.join(", "));
    Ok(worn)
}

/// Adapters to be baked in, and a note of each for the output's metadata.
pub(super) struct Baked {
    pub(super) adapters: Adapters,
    pub(super) notes: Vec<(String, String)>,
}

/// Opens every adapter that `convert` is to bake in.
///
/// # Errors
/// As [`wear`].
pub(super) fn bake(args: &ConvertArgs) -> Result<Baked> {
    let options = ReadOptions {
        no_mmap: args.no_mmap,
        ..ReadOptions::default()
    };
    let mut adapters = Adapters::default();
    adapters.set_dora_norm(args.dora_norm);
    let mut list = Vec::new();
    for flag in &args.lora {
        let (typed, text, denoiser) = split(flag)?;
        let model = find(&args.library, &typed)?;
        let adapter = Arc::new(Adapter::open(&model.path, &options)?);
        adapters.add(&adapter, text, denoiser)?;
        list.push(json!({
            "name": model.name, "hash": short_hash(&adapter)?, "text_weight": text, "unet_weight": denoiser,
        }));
    }
    let notes = match list.as_slice() {
        [] => Vec::new(),
        list => vec![("sd_rs.loras".to_owned(), json!(list).to_string())],
    };
    Ok(Baked { adapters, notes })
}

impl Worn {
    fn add(
        &mut self,
        args: &GenerateArgs,
        model: &Model,
        (text, denoiser): (f64, f64),
        (name, hashes): (&str, &mut Vec<String>),
    ) -> Result<()> {
        let options = ReadOptions {
            no_mmap: args.no_mmap,
            ..ReadOptions::default()
        };
        let adapter = Arc::new(Adapter::open(&model.path, &options)?);
        self.adapters.add(&adapter, text, denoiser)?;
        let hash = format!("{name}: {}", short_hash(&adapter)?);
        if !hashes.contains(&hash) {
            hashes.push(hash);
        }
        Ok(())
    }
}

/// A1111's hash of an adapter: what its trainer wrote, or the same computed.
fn short_hash(adapter: &Adapter) -> Result<String> {
    let is_hash =
        |hash: &&String| hash.len() >= DIGITS && hash.chars().all(|c| c.is_ascii_hexdigit());
    let written = adapter.metadata().get("sshs_model_hash").filter(is_hash);
    let hash = match written {
        Some(hash) => hash.clone(),
        None => sha256_tensors(adapter.file())?,
    };
    Ok(hash.get(..DIGITS).unwrap_or(&hash).to_owned())
}

/// A name as it may stand in a tag and in a list of hashes.
fn tag_name(name: &str) -> String {
    name.replace([':', ',', '<', '>'], "")
}

/// `FILE_OR_NAME`, `…:WEIGHT` or `…:TEXT:UNET`. What exists under its whole name has no weight in it.
fn split(flag: &str) -> Result<(PathBuf, f64, f64)> {
    let number = |text: &str| text.trim().parse::<f64>().ok();
    let whole = (PathBuf::from(flag), 1.0, 1.0);
    if Path::new(flag).exists() {
        return Ok(whole);
    }
    let Some((rest, last)) = flag.rsplit_once(':') else {
        return Ok(whole);
    };
    let Some(denoiser) = number(last) else {
        return Ok(whole);
    };
    let before = rest.rsplit_once(':');
    let (name, text) = match before.and_then(|(name, text)| Some((name, number(text)?))) {
        Some((name, text)) if !Path::new(rest).exists() => (name, text),
        _ => (rest, denoiser),
    };
    if name.is_empty() || !text.is_finite() || !denoiser.is_finite() {
        return Err(Error::Usage(format!(
            "--lora {flag}: expected FILE_OR_NAME[:WEIGHT], where the weight is a number such as 0.8"
        )));
    }
    Ok((PathBuf::from(name), text, denoiser))
}

/// The file that a flag means: a path, a LoRA's name in the folders, or what any model's name may be.
fn find(folders: &LibraryArgs, typed: &Path) -> Result<Model> {
    if let Some(model) = Model::existing(typed) {
        return Ok(model);
    }
    let text = typed.to_str().unwrap_or_default();
    match library(folders)?.find_lora(text) {
        Ok(model) => Ok(model),
        // hashes, repositories, and models in folders that do not say what they are for
        Err(error) => match resolve(typed, folders) {
            Ok(model) => Ok(model),
            Err(Error::Interrupted) => Err(Error::Interrupted),
            Err(other) if text.contains(['/', '\\', ':', '@']) => Err(other),
            Err(_) => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_flag_is_a_name_and_weights() {
        for (flag, name, text, denoiser) in [
            ("a.safetensors", "a.safetensors", 1.0, 1.0),
            ("a:0.5", "a", 0.5, 0.5),
            ("a:-1", "a", -1.0, -1.0),
            ("a:0.5:2", "a", 0.5, 2.0),
            ("C:\\x\\a.safetensors", "C:\\x\\a.safetensors", 1.0, 1.0),
            ("C:\\x\\a.safetensors:.5", "C:\\x\\a.safetensors", 0.5, 0.5),
            ("o/r:f.safetensors", "o/r:f.safetensors", 1.0, 1.0),
        ] {
            assert_eq!(
                split(flag).unwrap(),
                (PathBuf::from(name), text, denoiser),
                "{flag}"
            );
        }
        for wrong in ["a:nan", ":1", "a:inf"] {
            assert!(split(wrong).is_err(), "{wrong}");
        }
    }
}
