//! The models that this machine has, and what a name means: a path, a name in the models folder, a hash, a repository of the Hub.
//!
//! ```text
//! --model NAME ──► a path that exists ──► a name in the folders ──► a hash ──► the Hub's cache ──► the Hub
//! ```

mod extra;
mod hashes;
mod places;
mod scan;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

pub use self::hashes::Hashes;
pub use self::places::{Kind, Options, Place};
pub use self::scan::Entry;

use self::scan::extension_of_model;
use crate::checkpoint::{TensorFile, printable};
use crate::error::{Error, Result};
use crate::hub::{self, Event, Listener, RepoName, Settings};

/// How many names a sentence lists.
const SHOWN: usize = 8;

/// The folders that models are looked for in.
#[derive(Debug, Clone)]
pub struct Library {
    root: PathBuf,
    places: Vec<Place>,
    hashes: Option<PathBuf>,
}

/// A model that was found: where it is, and what reports call it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// The file or folder.
    pub path: PathBuf,
    /// The file's stem, the folder's or the repository's name.
    pub name: String,
}

impl Library {
    /// The folders that these options and the environment name.
    ///
    /// # Errors
    /// [`Error::NotFound`] when a folder or file that was named is not there; [`Error::BadModel`] when ComfyUI's file cannot be understood.
    pub fn new(options: &Options) -> Result<Self> {
        places::library(options, &|name| std::env::var_os(name))
    }

    /// The models folder, which need not exist.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folders, the models folder first.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// Every model in them, each file once, by kind and name.
    pub fn entries(&self) -> Vec<Entry> {
        scan::scan(&self.places)
    }

    /// The hashes that are known.
    pub fn hashes(&self) -> Hashes {
        Hashes::open(self.hashes.as_deref())
    }

    /// What `typed` means, fetched from the Hub where need be.
    ///
    /// # Errors
    /// [`Error::NotFound`] with a sentence that says where was looked, or which models could be meant; what [`hub::pull`] says.
    pub fn resolve(&self, typed: &Path, listener: &dyn Listener) -> Result<Model> {
        if let Some(model) = Model::existing(typed) {
            return Ok(model);
        }
        let Some(text) = typed.to_str() else {
            return Err(self.no_file(typed));
        };
        if let Some(entry) = self.find(text)? {
            return Ok(Model {
                name: entry.name,
                path: entry.path,
            });
        }
        if is_hash(text)
            && let Some(entry) = self.find_hash(text, listener)?
        {
            return Ok(Model {
                name: entry.name,
                path: entry.path,
            });
        }
        if !is_repository(text) {
            return Err(self.no_file(typed));
        }
        from_hub(text, listener)
    }

    /// The model of that name in the folders: a file's stem or name, with or without the folders above it, in any case of letters.
    ///
    /// # Errors
    /// [`Error::NotFound`] with a list when there are several.
    pub fn find(&self, name: &str) -> Result<Option<Entry>> {
        let mut found: Vec<Entry> = self
            .entries()
            .into_iter()
            .filter(|entry| entry.is_called(name, false))
            .collect();
        if found.iter().any(|entry| entry.kind == Kind::Checkpoint) {
            found.retain(|entry| entry.kind == Kind::Checkpoint);
        }
        if found.iter().any(|entry| entry.is_called(name, true)) {
            found.retain(|entry| entry.is_called(name, true));
        }
        if found.len() > 1 {
            return Err(ambiguous(name, &found));
        }
        Ok(found.pop())
    }

    /// The adapter of that name in the folders for them: by its file's name as [`Library::find`], else by what a file calls itself
    /// (`ss_output_name`), as A1111 does.
    ///
    /// # Errors
    /// As [`Library::find`]; [`Error::NotFound`] with where was looked when there is none.
    pub fn find_lora(&self, name: &str) -> Result<Model> {
        let loras: Vec<Entry> = self
            .entries()
            .into_iter()
            .filter(|entry| entry.kind == Kind::Lora)
            .collect();
        let called = |exact| {
            let found = loras.iter().filter(|entry| entry.is_called(name, exact));
            found.cloned().collect::<Vec<_>>()
        };
        let mut found = called(true);
        if found.is_empty() {
            found = called(false);
        }
        if found.is_empty() && name.contains('/') {
            // some of the folders above it, as ComfyUI writes names
            let below = |entry: &&Entry| entry.path.with_extension("").ends_with(name);
            found = loras.iter().filter(below).cloned().collect();
        }
        if found.is_empty() {
            let own = |entry: &&Entry| {
                let file = TensorFile::open(&entry.path, true).ok();
                file.is_some_and(|f| {
                    f.metadata()
                        .get("ss_output_name")
                        .is_some_and(|n| n == name)
                })
            };
            found = loras.iter().filter(own).cloned().collect();
        }
        match found.as_slice() {
            [entry] => Ok(Model {
                path: entry.path.clone(),
                name: entry.name.clone(),
            }),
            [] => Err(self.absent((Kind::Lora, "lora"), name, &loras)),
            several => Err(ambiguous(name, several)),
        }
    }

    /// The textual inversions in the folders for them. Only these are looked into: it is done for every prompt.
    pub fn embeddings(&self) -> Vec<Entry> {
        let places = self.places.iter().filter_map(|place| match place.kind {
            None => Some(place.path.join("embeddings")),
            Some(Kind::Embedding) => Some(place.path.clone()),
            Some(_) => None,
        });
        let places: Vec<Place> = places
            .map(|path| Place {
                path,
                kind: Some(Kind::Embedding),
            })
            .collect();
        scan::scan(&places)
    }

    /// The textual inversion of that name in the folders for them: a file's stem or name, with or without the folders above it.
    ///
    /// # Errors
    /// As [`Library::find_lora`].
    pub fn find_embedding(&self, name: &str) -> Result<Entry> {
        let all = self.embeddings();
        let called = |exact| {
            let found = all.iter().filter(|entry| entry.is_called(name, exact));
            found.cloned().collect::<Vec<_>>()
        };
        let mut found = called(true);
        if found.is_empty() {
            found = called(false);
        }
        match found.as_slice() {
            [entry] => Ok(entry.clone()),
            [] => Err(self.absent((Kind::Embedding, "embedding"), name, &all)),
            several => Err(ambiguous(name, several)),
        }
    }

    /// Nothing of a kind has that name among `all`, the files of that kind.
    fn absent(&self, (kind, flag): (Kind, &str), name: &str, all: &[Entry]) -> Error {
        let word = match kind {
            Kind::Lora => "LoRA",
            other => other.name(),
        };
        let folders = self.places.iter().filter_map(|place| match place.kind {
            None => Some(place.path.join(format!("{flag}s"))),
            Some(known) if known == kind => Some(place.path.clone()),
            Some(_) => None,
        });
        let folders: Vec<String> = folders.map(|path| path.display().to_string()).collect();
        let wanted = name.to_lowercase();
        let near = all.iter().map(|entry| entry.name.as_str());
        let near: Vec<&str> = near
            .filter(|other| other.to_lowercase().contains(&wanted))
            .take(3)
            .collect();
        let near = match near.as_slice() {
            [] => String::new(),
            some => format!(" (near it: {})", some.join(", ")),
        };
        Error::NotFound {
            what: format!("the {word} `{}`", printable(name)),
            hint: format!(
                "no file of that name lies in {}{near}; put it there, or give its path with --{flag}",
                folders.join(" or in ")
            ),
        }
    }

    /// The file with that beginning of a SHA-256. Files whose hash is not known are read, those of the models' kind first.
    ///
    /// # Errors
    /// [`Error::Disk`] when one cannot be read, [`Error::Interrupted`].
    pub fn find_hash(&self, hash: &str, listener: &dyn Listener) -> Result<Option<Entry>> {
        let hash = hash.to_ascii_lowercase();
        let mut hashes = self.hashes();
        let (known, unknown): (Vec<Entry>, Vec<Entry>) = self
            .entries()
            .into_iter()
            .filter(|entry| entry.path.is_file())
            .partition(|entry| hashes.known(&entry.path).is_some());
        let fits = |sha256: Option<&str>| sha256.is_some_and(|sha256| sha256.starts_with(&hash));
        if let Some(entry) = known
            .into_iter()
            .find(|entry| fits(hashes.known(&entry.path)))
        {
            return Ok(Some(entry));
        }
        if !unknown.is_empty() {
            listener.event(Event::Note(&format!(
                "reading {} files to learn their hashes",
                unknown.len()
            )));
        }
        for entry in unknown {
            if listener.stopped() {
                return Err(Error::Interrupted);
            }
            if fits(Some(&hashes.learn(&entry.path)?)) {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    fn no_file(&self, typed: &Path) -> Error {
        let text = typed.to_string_lossy();
        let hint = if text.contains(['/', '\\']) {
            "there is no such file or folder; check the path".to_owned()
        } else {
            let wanted = text.to_lowercase();
            let near: Vec<String> = self
                .entries()
                .into_iter()
                .map(|entry| entry.name)
                .filter(|name| name.to_lowercase().contains(&wanted))
                .take(3)
                .collect();
            let near = if near.is_empty() {
                String::new()
            } else {
                format!(" (near it: {})", near.join(", "))
            };
            format!(
                "there is no such file or folder, and no model of that name in {}{near}; `sd-rs models list` shows those that are",
                self.root.display()
            )
        };
        Error::NotFound {
            what: printable(&text),
            hint,
        }
    }
}

/// Several models have one name.
fn ambiguous(name: &str, found: &[Entry]) -> Error {
    let shown: Vec<String> = found
        .iter()
        .take(SHOWN)
        .map(|entry| entry.path.display().to_string())
        .collect();
    Error::NotFound {
        what: format!("one model `{}`", printable(name)),
        hint: format!(
            "{} have that name: {}; give the path of one, or more of its folders",
            found.len(),
            shown.join(", ")
        ),
    }
}

impl Model {
    /// The model at a path that is there, or that cannot be looked at: whoever opens it has a sentence for that, and for a link into
    /// nothing.
    pub fn existing(path: &Path) -> Option<Self> {
        let absent = path
            .symlink_metadata()
            .is_err_and(|e| matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory));
        (!absent).then(|| Self::at(path))
    }

    /// The model at a path, as it is.
    fn at(path: &Path) -> Self {
        let stem = if path.is_dir() {
            path.file_name()
        } else {
            path.file_stem()
        };
        let name = stem.map_or_else(
            || path.display().to_string(),
            |stem| stem.to_string_lossy().into_owned(),
        );
        Self {
            path: path.to_owned(),
            name,
        }
    }

    /// A repository's, which is known by the repository's name, or a file of it.
    fn of_hub(name: &RepoName, path: PathBuf) -> Self {
        if path.is_dir() {
            Self {
                name: name.short().to_owned(),
                path,
            }
        } else {
            Self::at(&path)
        }
    }
}

/// A repository: from the cache when it is whole there, else from the Hub.
fn from_hub(text: &str, listener: &dyn Listener) -> Result<Model> {
    let name = RepoName::parse(text)?;
    let settings = Settings::from_env()?;
    if let Some(found) = hub::cached(&settings, &name, settings.offline) {
        return Ok(Model::of_hub(&name, found.path));
    }
    let error = match hub::pull(&settings, &name, None, listener) {
        Ok(pulled) => return Ok(Model::of_hub(&name, pulled.path)),
        Err(error) => error,
    };
    // a Hub that does not answer, or that has lost the repository, does not take away what is here
    let gone = match &error {
        Error::Network(_) => true,
        Error::NotFound { what, .. } => what == name.id(),
        _ => false,
    };
    match hub::cached(&settings, &name, true).filter(|_| gone) {
        Some(found) => {
            let text = format!("{error}; the copy of {name} in the cache is used");
            listener.event(Event::Note(&text));
            Ok(Model::of_hub(&name, found.path))
        }
        None => Err(error),
    }
}

/// The beginning of a SHA-256: AutoV2's ten digits or more.
pub fn is_hash(text: &str) -> bool {
    (10..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether a name that no file has may be a repository's. A path to a model file never is.
pub fn is_repository(text: &str) -> bool {
    let id = text.split(['@', ':']).next().unwrap_or(text);
    id.matches('/').count() == 1
        && !text.starts_with(['.', '/', '~'])
        && !text.contains('\\')
        && extension_of_model(Path::new(id)).is_none()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::hub::Silent;
    use std::fs;

    fn library(root: &Path) -> Library {
        let lookup =
            |name: &str| (name == "XDG_CACHE_HOME").then(|| root.join("cache").into_os_string());
        places::library(
            &Options {
                models: Some(root.join("models")),
                ..Options::default()
            },
            &lookup,
        )
        .unwrap()
    }

    fn put(root: &Path, name: &str, text: &str) -> PathBuf {
        let path = root.join("models").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn names_mean_files_of_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let dream = put(root, "checkpoints/Dream.v2.safetensors", "a");
        put(root, "loras/dream.v2.safetensors", "b");
        let lora = put(root, "loras/ink.safetensors", "c");
        put(root, "a/twin.safetensors", "d");
        put(root, "b/twin.safetensors", "e");
        put(root, "whole/model_index.json", "{}");
        put(root, "whole/unet/x.safetensors", "f");
        let library = library(root);
        let found = |name: &str| library.resolve(Path::new(name), &Silent);
        for name in [
            "Dream.v2",
            "dream.v2.safetensors",
            "DREAM.V2",
            "checkpoints/dream.v2",
        ] {
            assert_eq!(
                found(name).unwrap(),
                Model {
                    path: dream.clone(),
                    name: "Dream.v2".to_owned()
                },
                "{name}"
            );
        }
        assert_eq!(found("ink").unwrap().path, lora);
        assert_eq!(found("whole").unwrap().path, root.join("models/whole"));
        let several = found("twin").unwrap_err().to_string();
        assert!(
            several.contains("a/twin.safetensors") && several.contains("b/twin.safetensors"),
            "{several}"
        );
        assert!(
            found("b/twin")
                .unwrap()
                .path
                .ends_with("b/twin.safetensors")
        );
        let near = found("drea").unwrap_err().to_string();
        assert!(
            near.contains("near it: Dream.v2") && near.contains("models list"),
            "{near}"
        );
        for path in [
            "no/such.safetensors",
            "./a/b",
            "../a/b",
            "/a/b",
            "a/b/c",
            "x",
        ] {
            let error = found(path).unwrap_err().to_string();
            assert!(error.contains("no such file or folder"), "{path}: {error}");
        }
        // a path that is there is left alone
        let other = root.join("twin");
        fs::write(&other, "g").unwrap();
        assert_eq!(found(other.to_str().unwrap()).unwrap().path, other);
    }

    #[test]
    fn a_hash_means_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let path = put(root, "a.safetensors", "abc");
        put(root, "b.safetensors", "abd");
        let library = library(root);
        let hash = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        for text in [hash, &hash[..10], &hash[..12].to_uppercase()] {
            assert_eq!(
                library.resolve(Path::new(text), &Silent).unwrap().path,
                path,
                "{text}"
            );
        }
        assert!(library.hashes().known(&path).is_some());
        // another content is another hash, whatever is remembered
        fs::write(&path, "abcd").unwrap();
        assert!(library.hashes().known(&path).is_none());
        assert!(library.resolve(Path::new(&hash[..10]), &Silent).is_err());
        assert!(!is_hash("ba7816bf8") && !is_hash("ba7816bf8g"));
    }

    #[test]
    fn repositories_are_told_from_paths() {
        for yes in [
            "a/b",
            "a/b@main",
            "a/b:c/d.safetensors",
            "a/b.v1@x:y",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ] {
            assert!(is_repository(yes), "{yes}");
        }
        for no in [
            "a",
            "a/b.safetensors",
            "a/b.ckpt",
            "./a/b",
            "/a/b",
            "a/b/c",
            "~/a",
            "a\\b/c",
            "a/b.GGUF",
        ] {
            assert!(!is_repository(no), "{no}");
        }
    }
}
