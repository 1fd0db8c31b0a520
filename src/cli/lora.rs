//! `--lora` and `<lora:…>`: which files are meant, how much of each, and what a picture's parameters say of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::args::{ConvertArgs, GenerateArgs, LibraryArgs, LoraArgs};
use super::fetch::{library, resolve};
use serde_json::json;

use crate::adapters::{Adapter, Adapters, BlockWeights, Fit, Mode, Strength};
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
    worn.adapters.set_mode(args.lora_mode);
    worn.adapters.set_strict(args.lora_options.strict);
    let mut hashes = Vec::new();
    for (typed, strength) in flags(&args.lora, &args.lora_options)? {
        let model = find(&args.library, &typed)?;
        let name = tag_name(&model.name);
        let tag = format!("<lora:{name}:{}>", strength.arguments());
        worn.add(args, &model, strength, (&name, &mut hashes))?;
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
            let arguments: Vec<&str> = tag.arguments.iter().map(String::as_str).collect();
            let strength = Strength::from_arguments(&arguments, &tag.tag)?;
            let model = library.find_lora(&tag.name)?;
            let name = tag_name(&tag.name);
            worn.add(args, &model, strength, (&name, &mut hashes))?;
        }
    }
    worn.hashes = (!hashes.is_empty()).then(|| hashes.join(", "));
    Ok(worn)
}

/// With `-v` and `-vv`, what of an adapter is used.
pub(super) fn tell(fit: &Fit) {
    tracing::info!(
        "{}: {} of {} modules are used and change {} tensors; {} names have no place in the model",
        fit.file,
        fit.used,
        fit.modules,
        fit.tensors,
        fit.unmatched.len()
    );
    for name in &fit.unmatched {
        tracing::debug!("{}: no place for `{name}`", fit.file);
    }
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
    adapters.set_mode(Mode::Merge);
    adapters.set_strict(args.lora_options.strict);
    let mut list = Vec::new();
    for ((typed, strength), flag) in flags(&args.lora, &args.lora_options)?
        .into_iter()
        .zip(&args.lora)
    {
        let constants = strength
            .text
            .as_constant()
            .zip(strength.denoiser.as_constant());
        let Some((text, denoiser)) = constants.filter(|_| strength.steps.is_none()) else {
            return Err(Error::Usage(format!(
                "--lora {flag}: a weight that changes over the steps cannot be baked in; give a number such as 0.8"
            )));
        };
        let model = find(&args.library, &typed)?;
        let adapter = Arc::new(Adapter::open(&model.path, &options)?);
        let mut note = json!({
            "name": model.name, "hash": short_hash(&adapter)?, "text_weight": text, "unet_weight": denoiser,
        });
        if let (Some(blocks), Some(note)) = (&strength.blocks, note.as_object_mut()) {
            note.insert("block_weights".to_owned(), json!(blocks.to_string()));
        }
        adapters.wear(&adapter, strength)?;
        list.push(note);
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
        strength: Strength,
        (name, hashes): (&str, &mut Vec<String>),
    ) -> Result<()> {
        let options = ReadOptions {
            no_mmap: args.no_mmap,
            ..ReadOptions::default()
        };
        let adapter = Arc::new(Adapter::open(&model.path, &options)?);
        self.adapters.wear(&adapter, strength)?;
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

/// What each `--lora` means, with its `--lora-block-weights`.
fn flags(list: &[String], options: &LoraArgs) -> Result<Vec<(PathBuf, Strength)>> {
    let blocks = &options.lora_block_weights;
    if blocks.len() > list.len() {
        return Err(Error::Usage(format!(
            "there are {} --lora-block-weights and {} --lora; give each --lora one at most, or write lbw= behind its name",
            blocks.len(),
            list.len()
        )));
    }
    let mut flags = list
        .iter()
        .map(|flag| split(flag))
        .collect::<Result<Vec<_>>>()?;
    for ((_, strength), blocks) in flags.iter_mut().zip(blocks) {
        strength.blocks = Some(BlockWeights::parse(blocks)?);
    }
    Ok(flags)
}

/// `FILE_OR_NAME`, and behind it what may stand behind a name in a tag: `…:WEIGHT`, `…:TEXT:UNET`, `…:lbw=OUTALL`. What exists under its whole name
/// has no weight in it.
fn split(flag: &str) -> Result<(PathBuf, Strength)> {
    let mut name = flag;
    let mut arguments = Vec::new();
    while !Path::new(name).exists()
        && let Some((rest, last)) = name.rsplit_once(':')
        && Strength::is_argument(last)
    {
        arguments.insert(0, last);
        name = rest;
    }
    if name.is_empty() {
        return Err(Error::Usage(format!(
            "--lora {flag}: expected FILE_OR_NAME[:WEIGHT], where the weight is a number such as 0.8"
        )));
    }
    let strength = Strength::from_arguments(&arguments, &format!("--lora {flag}"))?;
    Ok((PathBuf::from(name), strength))
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
            let expected = (PathBuf::from(name), Strength::constant(text, denoiser));
            assert_eq!(split(flag).unwrap(), expected, "{flag}");
        }
        let (name, strength) = split("C:\\a:0.5@0.2-0.7:lbw=MIDD").unwrap();
        assert_eq!(name, PathBuf::from("C:\\a"));
        assert_eq!(strength.arguments(), "0.5@0.2-0.7:lbw=MIDD");
        for wrong in ["a:nan", ":1", "a:inf"] {
            assert!(split(wrong).is_err(), "{wrong}");
        }
    }
}
