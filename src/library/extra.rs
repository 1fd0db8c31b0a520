//! ComfyUI's `extra_model_paths.yaml`: sections of `category: path` lines below a `base_path`.
//!
//! The file is read as far as ComfyUI itself uses YAML in it: two levels, plain or quoted values, blocks of lines (`|`), lists, comments.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::places::{Kind, Place};
use crate::checkpoint::printable;
use crate::error::{Error, Result};
use crate::hub::expand_home;

/// The largest file that is read, in bytes.
const MAX_SIZE: u64 = 1 << 20;

/// A section: its lines by category.
#[derive(Debug, Default, PartialEq, Eq)]
struct Section {
    base: Option<String>,
    paths: Vec<(String, String)>,
}

/// The folders that a file names.
pub(super) fn places(file: &Path, lookup: &dyn Fn(&str) -> Option<OsString>) -> Result<Vec<Place>> {
    let about = std::fs::metadata(file).map_err(|e| Error::disk(file, "read", e))?;
    if about.len() > MAX_SIZE {
        return Err(Error::bad_model(
            file,
            format!(
                "the file has {} bytes, expected a list of folders of at most {MAX_SIZE}",
                about.len()
            ),
        ));
    }
    let text = std::fs::read_to_string(file).map_err(|e| Error::disk(file, "read", e))?;
    let sections = parse(&text).map_err(|reason| Error::bad_model(file, reason))?;
    let folder = file.parent().unwrap_or(Path::new("."));
    let mut places = Vec::new();
    for section in sections {
        let base = section.base.map_or_else(
            || folder.to_owned(),
            |base| folder.join(expand(&base, lookup)),
        );
        for (category, path) in section.paths {
            if let Some(kind) = Kind::of_folder(&category) {
                places.push(Place {
                    path: base.join(expand(&path, lookup)),
                    kind: Some(kind),
                });
            }
        }
    }
    Ok(places)
}

/// `~` and `$NAME` as ComfyUI replaces them.
fn expand(path: &str, lookup: &dyn Fn(&str) -> Option<OsString>) -> PathBuf {
    let mut out = String::new();
    let mut rest = path;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let (braced, inner) = match after.strip_prefix('{') {
            Some(inner) => (true, inner),
            None => (false, after),
        };
        let end = inner
            .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .unwrap_or(inner.len());
        let (name, tail) = inner.split_at(end);
        match lookup(name).filter(|_| !braced || tail.starts_with('}')) {
            Some(value) => {
                out.push_str(&value.to_string_lossy());
                rest = if braced {
                    tail.get(1..).unwrap_or("")
                } else {
                    tail
                };
            }
            None => {
                out.push('$');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    expand_home(&out, lookup)
}

fn parse(text: &str) -> std::result::Result<Vec<Section>, String> {
    let mut sections: Vec<Section> = Vec::new();
    // the category whose block of lines or list is going on, and how far its own line was indented
    let mut block: Option<(String, usize)> = None;
    for (number, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let bare = without_comment(line);
        let trimmed = bare.trim();
        if trimmed.is_empty() || trimmed == "---" {
            continue;
        }
        let bad = |what: &str| {
            Err(format!(
                "line {}: `{}`: {what}",
                number + 1,
                printable(trimmed)
            ))
        };
        let before = bare.len() - bare.trim_start().len();
        if bare
            .get(..before)
            .is_some_and(|indent| indent.contains('\t'))
        {
            return bad("a tab begins the line; use spaces");
        }
        if let Some((category, indent)) = &block {
            let item = trimmed.strip_prefix("- ");
            if before > *indent || (before == *indent && item.is_some()) {
                add(&mut sections, category, unquote(item.unwrap_or(trimmed)));
                continue;
            }
            block = None;
        }
        let Some((key, value)) = split(trimmed) else {
            return bad("expected `category: path`");
        };
        match (before, value) {
            (0, "") => sections.push(Section::default()),
            (0, _) => return bad("expected the name of a section and a colon"),
            _ if sections.is_empty() => return bad("it belongs to no section"),
            (_, "" | "|" | "|-" | "|+" | ">" | ">-") => block = Some((key.to_owned(), before)),
            (_, value) => add(&mut sections, key, unquote(value)),
        }
    }
    Ok(sections)
}

fn add(sections: &mut [Section], key: &str, value: &str) {
    let Some(section) = sections.last_mut() else {
        return;
    };
    match key {
        "base_path" => section.base = Some(value.to_owned()),
        _ => section.paths.push((key.to_owned(), value.to_owned())),
    }
}

/// `key: value`; a colon within a value (`C:\models`) has no space behind it.
fn split(line: &str) -> Option<(&str, &str)> {
    let (key, value) = match line.split_once(": ") {
        Some(found) => found,
        None => (line.strip_suffix(':')?, ""),
    };
    let key = unquote(key.trim());
    (!key.is_empty()).then_some((key, value.trim()))
}

fn unquote(value: &str) -> &str {
    let value = value.trim();
    let inside = |quote: char| value.strip_prefix(quote)?.strip_suffix(quote);
    inside('"').or_else(|| inside('\'')).unwrap_or(value)
}

/// A comment begins the line or stands behind a space.
fn without_comment(line: &str) -> &str {
    if line.trim_start().starts_with('#') {
        return "";
    }
    line.split_once(" #").map_or(line, |(before, _)| before)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// As ComfyUI's own example has it, with what people add.
    const EXAMPLE: &str = "#Rename this to extra_model_paths.yaml
a111:
    base_path: path/to/webui/   # where it is

    checkpoints: models/Stable-diffusion
    configs: models/Stable-diffusion
    vae: 'models/VAE'
    loras: |
         models/Lora
         models/LyCORIS
    upscale_models: |
                  models/ESRGAN
                  models/RealESRGAN
    embeddings: embeddings

comfyui:
    base_path: $BASE/${SUB}
    is_default: true
    checkpoints:
      - \"one\"
      - /two
    custom_nodes: path/custom_nodes
";

    #[test]
    fn comfyuis_own_example_is_understood() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("extra_model_paths.yaml");
        std::fs::write(&file, EXAMPLE.replace('\n', "\r\n")).unwrap();
        let lookup = |name: &str| match name {
            "BASE" => Some(OsString::from("/b")),
            "SUB" => Some(OsString::from("s")),
            _ => None,
        };
        let web = folder.path().join("path/to/webui");
        let place = |path: PathBuf, kind: Kind| Place {
            path,
            kind: Some(kind),
        };
        assert_eq!(
            places(&file, &lookup).unwrap(),
            [
                place(web.join("models/Stable-diffusion"), Kind::Checkpoint),
                place(web.join("models/VAE"), Kind::Vae),
                place(web.join("models/Lora"), Kind::Lora),
                place(web.join("models/LyCORIS"), Kind::Lora),
                place(web.join("models/ESRGAN"), Kind::Upscaler),
                place(web.join("models/RealESRGAN"), Kind::Upscaler),
                place(web.join("embeddings"), Kind::Embedding),
                place(PathBuf::from("/b/s/one"), Kind::Checkpoint),
                place(PathBuf::from("/two"), Kind::Checkpoint),
            ]
        );
        assert_eq!(expand("$NO/x$", &lookup), Path::new("$NO/x$"));
    }

    #[test]
    fn what_is_not_understood_is_told_by_line() {
        for (text, line, words) in [
            ("a:\n  vae\n", "line 2", "category: path"),
            ("vae: x\n", "line 1", "section"),
            ("  vae: x\n", "line 1", "no section"),
            ("a:\n\tvae: x\n", "line 2", "tab"),
            ("a: b: c\n", "line 1", "section"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(
                error.contains(line) && error.contains(words),
                "{text}: {error}"
            );
        }
        let windows = parse("a:\n  base_path: C:\\x\n  vae: D:\\vae\n").unwrap();
        assert_eq!(
            windows[0],
            Section {
                base: Some("C:\\x".to_owned()),
                paths: vec![("vae".to_owned(), "D:\\vae".to_owned())]
            }
        );
        assert!(parse("").unwrap().is_empty());
    }
}
