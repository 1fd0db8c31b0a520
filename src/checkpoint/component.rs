//! One component of a diffusers folder: its config and its tensor files, in one piece or in shards, in a variant or not.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Component as PathPart, Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::ReadOptions;
use super::printable::{printable, printable_to};
use super::tensor_file::{TensorFile, open_plain_file};
use super::tensor_set::{TensorSet, file_name};
use crate::error::{Error, Result};

/// The largest JSON file that is read, in bytes.
const MAX_JSON: u64 = 32 << 20;
/// What diffusers and transformers call a component's weights: stems and ending; pickles only where there is nothing else.
const FORMS: [([&str; 2], &str); 2] = [
    (["diffusion_pytorch_model", "model"], "safetensors"),
    (["diffusion_pytorch_model", "pytorch_model"], "bin"),
];
/// What they call its config.
const CONFIGS: [&str; 4] = [
    "config.json",
    "scheduler_config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
];
/// The variants that stand in for a plain file that is not there, best first.
const STAND_INS: [&str; 2] = ["fp16", "bf16"];

/// One component: a folder of its own, or bytes in the program.
#[derive(Debug)]
pub(super) struct Component {
    pub(super) folder: PathBuf,
    pub(super) config: Option<Value>,
    pub(super) tensors: Option<Arc<TensorSet>>,
}

impl Component {
    /// Reads the component at `folder`, which exists.
    pub(super) fn open(folder: &Path, options: &ReadOptions) -> Result<Self> {
        let mut config = None;
        for name in CONFIGS {
            let path = folder.join(name);
            if path.is_file() {
                config = Some(read_json(&path)?);
                break;
            }
        }
        let tensors = open_tensors(folder, options)?.map(Arc::new);
        Ok(Self {
            folder: folder.to_owned(),
            config,
            tensors,
        })
    }
}

/// Reads a JSON file of at most 32 MB.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    let file = open_plain_file(path)?;
    let mut text = Vec::new();
    file.take(MAX_JSON + 1)
        .read_to_end(&mut text)
        .map_err(|e| Error::disk(path, "read", e))?;
    if text.len() as u64 > MAX_JSON {
        let reason = format!("the file is larger than {MAX_JSON} bytes, too large for a config");
        return Err(Error::bad_model(path, reason));
    }
    parse_json(path, &text)
}

/// Parses JSON that stands at `path`.
pub(super) fn parse_json(path: &Path, text: &[u8]) -> Result<Value> {
    if text.is_empty() {
        return Err(Error::bad_model(
            path,
            "this is an empty file; download it again",
        ));
    }
    let first = serde_json::from_slice(text);
    let parsed = match first {
        Ok(value) => Ok(value),
        // Python's json module writes numbers that JSON does not have; diffusers saves every DPM-Solver config with one
        Err(error) => serde_json::from_slice(&quote_non_finite(text)).map_err(|_| error),
    };
    parsed.map_err(|e: serde_json::Error| {
        let reason = format!(
            "this is not valid JSON: {}; download the file again",
            printable_to(&e.to_string(), 300)
        );
        Error::bad_model(path, reason)
    })
}

/// The text with Python's bare `NaN`, `Infinity` and `-Infinity` as JSON texts; what stands inside texts is left alone.
fn quote_non_finite(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let (mut rest, mut inside, mut escaped) = (text, false, false);
    while let Some((&byte, tail)) = rest.split_first() {
        let word = [&b"-Infinity"[..], b"Infinity", b"NaN"]
            .into_iter()
            .find(|word| !inside && rest.starts_with(word));
        if let Some(word) = word {
            out.push(b'"');
            out.extend_from_slice(word);
            out.push(b'"');
            rest = &rest[word.len()..];
            continue;
        }
        if byte == b'"' && !escaped {
            inside = !inside;
        }
        escaped = inside && byte == b'\\' && !escaped;
        out.push(byte);
        rest = tail;
    }
    out
}

/// Opens the component's weights; `None` when it has none (a tokenizer, a scheduler).
fn open_tensors(folder: &Path, options: &ReadOptions) -> Result<Option<TensorSet>> {
    for (stems, ending) in FORMS {
        let variants = variants(options).into_iter();
        for (variant, stem) in variants.flat_map(|v| stems.map(|stem| (v, stem))) {
            let [whole, index] = names(stem, ending, variant);
            let (whole, index) = (folder.join(whole), folder.join(index));
            // a link into nothing counts as there: its own sentence says more than "no weights"
            if whole.symlink_metadata().is_ok() {
                let file = TensorFile::open(&whole, !options.no_mmap)?;
                return TensorSet::new(vec![file]).map(Some);
            }
            if index.symlink_metadata().is_ok() {
                return open_shards(folder, &index, options).map(Some);
            }
        }
    }
    refuse_others(folder)?;
    Ok(None)
}

/// The variants to try: the one that was asked for, the plain files, the stand-ins.
fn variants(options: &ReadOptions) -> Vec<Option<&str>> {
    let mut variants: Vec<Option<&str>> = Vec::new();
    variants.extend(options.variant.as_deref().map(Some));
    variants.push(None);
    variants.extend(STAND_INS.map(Some));
    variants
}

/// The file names of weights in one piece, and of the index of weights in shards.
fn names(stem: &str, ending: &str, variant: Option<&str>) -> [String; 2] {
    match variant {
        None => [
            format!("{stem}.{ending}"),
            format!("{stem}.{ending}.index.json"),
        ],
        Some(variant) => [
            format!("{stem}.{variant}.{ending}"),
            format!("{stem}.{ending}.index.{variant}.json"),
        ],
    }
}

/// Opens the shards that an index names, and checks that each tensor lies where the index says.
fn open_shards(folder: &Path, index: &Path, options: &ReadOptions) -> Result<TensorSet> {
    let bad = |reason: String| Error::bad_model(index, reason);
    let json = read_json(index)?;
    let map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| bad("the index has no object `weight_map`; download it again".to_owned()))?;
    let mut shards = BTreeSet::new();
    for (tensor, shard) in map {
        let shard = shard.as_str().ok_or_else(|| {
            bad(format!(
                "the index gives no file name for tensor `{}`",
                printable(tensor)
            ))
        })?;
        if !is_plain_relative(shard) {
            let shard = printable(shard);
            return Err(bad(format!(
                "the index names the file `{shard}`, which lies outside the folder; it is not opened"
            )));
        }
        shards.insert(shard);
    }
    let mut files = Vec::new();
    for &shard in &shards {
        let path = folder.join(shard);
        if path.symlink_metadata().is_err() {
            let shard = printable(shard);
            return Err(bad(format!(
                "the index names the file `{shard}`, which is not in the folder; download it"
            )));
        }
        let file = TensorFile::open(&path, !options.no_mmap)?;
        let absent = map
            .iter()
            .find(|(name, place)| place.as_str() == Some(shard) && file.get(name).is_none());
        if let Some((name, _)) = absent {
            let (name, shard) = (printable(name), printable(shard));
            return Err(bad(format!(
                "the index says that tensor `{name}` is in `{shard}`, and it is not; download both again"
            )));
        }
        files.push(file);
    }
    if files.is_empty() {
        return Err(bad("the index names no files; download it again".to_owned()));
    }
    TensorSet::new(files)
}

/// A relative path that goes nowhere but down.
fn is_plain_relative(path: &str) -> bool {
    let down = Path::new(path)
        .components()
        .all(|part| matches!(part, PathPart::Normal(_)));
    // what is absolute on one system must not be a file name on another
    down && !path.is_empty() && !path.contains(['\\', ':', '\0'])
}

/// Refuses a folder whose weights are there in a form that is not read.
fn refuse_others(folder: &Path) -> Result<()> {
    let names: BTreeSet<String> = std::fs::read_dir(folder)
        .map_err(|e| Error::disk(folder, "read", e))?
        .filter_map(|entry| Some(file_name(&entry.ok()?.path())))
        .collect();
    let ending = |endings: &[&str]| {
        names
            .iter()
            .find(|name| endings.iter().any(|ending| name.ends_with(ending)))
    };
    if let Some(name) = ending(&[".safetensors", ".bin", ".ckpt", ".pt", ".pth"]) {
        let reason = format!(
            "the weights are only there as `{}`, a variant that was not asked for, or under a name of its own; rename the file to \
             `diffusion_pytorch_model` or `model` (`pytorch_model` if it ends in .bin), with its ending",
            printable(name)
        );
        return Err(Error::bad_model(folder, reason));
    }
    if let Some(name) = ending(&[".msgpack", ".h5", ".onnx", ".gguf", ".xml"]) {
        let reason = format!(
            "the weights are only there as `{}`, which is not read; download the folder's .safetensors",
            printable(name)
        );
        return Err(Error::bad_model(folder, reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn pythons_numbers_are_read() {
        let text =
            br#"{"lambda_min_clipped": -Infinity, "a": [NaN, Infinity], "b": "NaN \" Infinity"}"#;
        let value = parse_json(Path::new("x"), text).unwrap();
        assert_eq!(value["lambda_min_clipped"], "-Infinity");
        assert_eq!(value["a"][1], "Infinity");
        assert_eq!(value["b"], "NaN \" Infinity");
        assert!(parse_json(Path::new("x"), b"{Infinity").is_err());
    }
}
