//! Walks the folders: model files by their endings, diffusers folders by their index, each once however many links lead to it.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::places::{Kind, Place};

/// How deep folders are looked into, and how many files are listed at most.
const MAX_DEPTH: usize = 8;
const MAX_ENTRIES: usize = 100_000;
/// The endings of model files.
const ENDINGS: [&str; 6] = ["safetensors", "sft", "ckpt", "gguf", "pt", "pth"];

/// A model in the folders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The file's stem or the folder's name.
    pub name: String,
    /// What it is for, by the folder that it lies in.
    pub kind: Kind,
    /// The file or folder.
    pub path: PathBuf,
    /// Its bytes; a folder's files together.
    pub size: u64,
    /// The ending, or `diffusers`.
    pub format: String,
    /// The place that it was found in.
    pub place: PathBuf,
}

impl Entry {
    /// Whether `name` means this one, exactly or in any case of letters.
    pub(super) fn is_called(&self, name: &str, exact: bool) -> bool {
        let relative = self.path.strip_prefix(&self.place).unwrap_or(&self.path);
        let relative = relative.to_string_lossy().replace('\\', "/");
        let file = relative.rsplit('/').next().unwrap_or(&relative);
        let bare = match Some(&self.format).filter(|format| *format != "diffusers") {
            Some(ending) => relative
                .get(..relative.len() - ending.len() - 1)
                .unwrap_or(&relative),
            None => &relative,
        };
        let same = |other: &str| {
            if exact {
                other == name
            } else {
                other.to_lowercase() == name.to_lowercase()
            }
        };
        [self.name.as_str(), file, &relative, bare]
            .into_iter()
            .any(same)
    }
}

/// The ending of a model file's name.
pub(super) fn extension_of_model(path: &Path) -> Option<&'static str> {
    let extension = path.extension()?.to_str()?;
    ENDINGS
        .into_iter()
        .find(|ending| ending.eq_ignore_ascii_case(extension))
}

/// diffusers' embeddings may be called `learned_embeds.bin`; elsewhere the ending says nothing.
fn bin(path: &Path, kind: Option<Kind>) -> Option<&'static str> {
    let is_bin = path.extension()?.eq_ignore_ascii_case("bin");
    (is_bin && kind == Some(Kind::Embedding)).then_some("bin")
}

/// The models of these folders, by kind and name.
pub(super) fn scan(places: &[Place]) -> Vec<Entry> {
    let mut walk = Walk {
        seen: HashSet::new(),
        found: Vec::new(),
    };
    for place in places {
        walk.folder(place, &place.path, place.kind, 0);
    }
    let mut found = walk.found;
    found.sort_by(|a, b| {
        (a.kind, a.name.to_lowercase(), &a.path).cmp(&(b.kind, b.name.to_lowercase(), &b.path))
    });
    found
}

struct Walk {
    /// The real paths that were seen: against loops, and for files that two names lead to.
    seen: HashSet<PathBuf>,
    found: Vec<Entry>,
}

impl Walk {
    fn folder(&mut self, place: &Place, folder: &Path, kind: Option<Kind>, depth: usize) {
        let fresh = fs::canonicalize(folder).is_ok_and(|real| self.seen.insert(real));
        if !fresh || depth > MAX_DEPTH {
            return;
        }
        if depth > 0 && folder.join("model_index.json").is_file() {
            let name = folder
                .file_name()
                .map(|name| name.to_string_lossy().into_owned());
            self.add(place, folder, kind, (name, "diffusers", size_of(folder, 0)));
            return;
        }
        let mut paths: Vec<PathBuf> = fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        paths.sort();
        for path in paths {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let Ok(about) = fs::metadata(&path) else {
                continue; // a link into nothing
            };
            if name.starts_with('.') || self.found.len() >= MAX_ENTRIES {
                continue;
            }
            if about.is_dir() {
                self.folder(place, &path, kind.or(Kind::of_folder(&name)), depth + 1);
            } else if let Some(ending) = extension_of_model(&path).or_else(|| bin(&path, kind))
                && fs::canonicalize(&path).is_ok_and(|real| self.seen.insert(real))
            {
                let stem = path
                    .file_stem()
                    .map(|stem| stem.to_string_lossy().into_owned());
                self.add(place, &path, kind, (stem, ending, about.len()));
            }
        }
    }

    fn add(
        &mut self,
        place: &Place,
        path: &Path,
        kind: Option<Kind>,
        (name, format, size): (Option<String>, &str, u64),
    ) {
        self.found.push(Entry {
            name: name.unwrap_or_default(),
            kind: kind.unwrap_or(Kind::Checkpoint),
            path: path.to_owned(),
            size,
            format: format.to_owned(),
            place: place.path.clone(),
        });
    }
}

/// The bytes of all files of a folder.
fn size_of(folder: &Path, depth: usize) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let about = fs::metadata(entry.path()).ok()?;
            Some(if about.is_dir() && depth < MAX_DEPTH {
                size_of(&entry.path(), depth + 1)
            } else {
                about.len()
            })
        })
        .sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[cfg(unix)]
    #[test]
    fn loops_end_and_links_are_one_file() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir_all(root.join("loras")).unwrap();
        fs::write(root.join("loras/a.safetensors"), "abc").unwrap();
        symlink(root, root.join("loras/round")).unwrap();
        symlink(root.join("loras/a.safetensors"), root.join("z.safetensors")).unwrap();
        symlink(root.join("nowhere"), root.join("b.safetensors")).unwrap();
        fs::write(root.join("readme.txt"), "").unwrap();
        let places = [
            Place {
                path: root.to_owned(),
                kind: None,
            },
            Place {
                path: root.to_owned(),
                kind: Some(Kind::Vae),
            },
        ];
        let found = scan(&places);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(
            (found[0].name.as_str(), found[0].kind, found[0].size),
            ("a", Kind::Lora, 3)
        );
    }
}
