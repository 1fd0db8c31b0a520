//! `--embedding`, and embeddings that prompts name: which files are meant, and what a picture's parameters say of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::args::GenerateArgs;
use super::fetch::{library, resolve};
use crate::adapters::{Adapters, Embedding};
use crate::checkpoint::{ReadOptions, printable, sha256_file};
use crate::error::{Error, Result};
use crate::library::{Entry, Model};
use crate::pipeline::{Engine, Request};
use crate::text::{Syntax, begins_with_name, first_name, named_embeddings};

/// How many digits of a hash A1111 gives.
const DIGITS: usize = 12;

/// The embeddings that may take part in a run.
#[derive(Default)]
pub(super) struct Learned {
    list: Vec<Arc<Embedding>>,
    /// How many of them, from the first on, were asked for by name; the others are there because a word in the prompt is called like them.
    wanted: usize,
}

impl Learned {
    /// Opens what flags and prompts ask for, and what the LoRAs bring along.
    ///
    /// # Errors
    /// When one that was asked for is not found or is none.
    pub(super) fn find(
        args: &GenerateArgs,
        request: &Request,
        adapters: &Adapters,
    ) -> Result<Self> {
        let options = ReadOptions {
            no_mmap: args.no_mmap,
            ..ReadOptions::default()
        };
        let mut learned = Self::default();
        for flag in &args.embedding.embedding {
            let (typed, name) = split(flag);
            let model = find(args, &typed)?;
            let found = Embedding::open(&model.path, &options)?;
            learned.add_flag(found, name, flag)?;
        }
        for adapter in adapters.iter().filter(|adapter| adapter.has_embeddings()) {
            let bundled = Embedding::bundled(adapter.file(), &options)?;
            learned.list.extend(bundled.into_iter().map(Arc::new));
        }
        learned.wanted = learned.list.len();
        learned.add_from_folders(args, request, &options)?;
        Ok(learned)
    }

    /// The words of a file that `--embedding` names.
    fn add_flag(&mut self, found: Vec<Embedding>, name: Option<&str>, flag: &str) -> Result<()> {
        let several = found.len() > 1;
        if name.is_some() && several {
            return Err(Error::Usage(format!(
                "--embedding {flag}: the file holds {} words, which one name cannot mean; leave out the name",
                found.len()
            )));
        }
        for embedding in found {
            let embedding = match name {
                Some(name) => embedding.renamed(name),
                None => embedding,
            };
            let taken = |other: &Arc<Embedding>| other.name() == embedding.name();
            if self.list.iter().any(taken) {
                return Err(Error::Usage(format!(
                    "two embeddings are called `{}`; give one of them another name with --embedding FILE:NAME",
                    printable(embedding.name())
                )));
            }
            self.list.push(Arc::new(embedding));
        }
        Ok(())
    }

    /// Those in the folders that the prompts name: with `embedding:`, or by a word that is called like a file.
    fn add_from_folders(
        &mut self,
        args: &GenerateArgs,
        request: &Request,
        options: &ReadOptions,
    ) -> Result<()> {
        let negative = request.negative_prompt.as_deref().unwrap_or_default();
        let texts = [request.prompt.as_str(), negative];
        let library = match library(&args.library) {
            Ok(library) => library,
            // folders that are not there do not matter where nothing is to be looked up
            Err(_) if texts.iter().all(|text| named_embeddings(text).is_empty()) => return Ok(()),
            Err(error) => return Err(error),
        };
        let entries = library.embeddings();
        let mut wanted: Vec<(Entry, Option<String>)> = Vec::new();
        for rest in texts.into_iter().flat_map(named_embeddings) {
            let known =
                |e: &Arc<Embedding>| e.spellings().iter().any(|s| begins_with_name(rest, s));
            if self.list.iter().any(known) {
                continue;
            }
            let longest = entries
                .iter()
                .map(|entry| entry.name.as_str())
                .filter(|name| begins_with_name(rest, name))
                .max_by_key(|name| name.len());
            let name = longest.unwrap_or_else(|| first_name(rest));
            if name.is_empty() {
                continue;
            }
            let entry = match library.find_embedding(name) {
                Ok(entry) => entry,
                // there it may be a text like any other
                Err(_) if request.prompt_syntax == Syntax::Plain => continue,
                Err(error) => return Err(error),
            };
            if !wanted.iter().any(|(other, _)| other.path == entry.path) {
                wanted.push((entry, Some(name.to_owned())));
            }
        }
        let packed: Vec<String> = texts.iter().map(|text| packed(text)).collect();
        let bracketed = texts.iter().any(|text| text.contains('<'));
        for entry in entries {
            let name = self::packed(&entry.name);
            let said = !name.is_empty() && packed.iter().any(|text| text.contains(&name));
            let taken = wanted.iter().any(|(other, _)| other.path == entry.path);
            if (said || bracketed) && !taken {
                wanted.push((entry, None));
            }
        }
        for (entry, spelling) in wanted {
            self.add_entry(&entry, spelling.as_deref(), options)?;
        }
        Ok(())
    }

    /// A file of the folders; one that cannot be used is passed over unless it was asked for.
    fn add_entry(
        &mut self,
        entry: &Entry,
        spelling: Option<&str>,
        options: &ReadOptions,
    ) -> Result<()> {
        let found = match (Embedding::open(&entry.path, options), spelling) {
            (Ok(found), _) => found,
            (Err(error), Some(_)) => return Err(error),
            (Err(error), None) => {
                tracing::debug!("passed over: {error}");
                return Ok(());
            }
        };
        for mut embedding in found {
            if self
                .list
                .iter()
                .any(|other| other.name() == embedding.name())
            {
                continue;
            }
            embedding.also_called(&entry.name);
            if let Some(spelling) = spelling {
                embedding.also_called(spelling);
                self.list.insert(self.wanted, Arc::new(embedding));
                self.wanted += 1;
            } else {
                self.list.push(Arc::new(embedding));
            }
        }
        Ok(())
    }

    /// Gives a model the embeddings; those that were not asked for by name and do not fit it are left out.
    ///
    /// # Errors
    /// When one that was asked for was made for another kind of model.
    pub(super) fn teach(&mut self, engine: Engine) -> Result<Engine> {
        let mut place = 0;
        let wanted = self.wanted;
        self.list.retain(|embedding| {
            place += 1;
            let fits = engine.check_embedding(embedding);
            if let (Err(error), true) = (&fits, place > wanted) {
                tracing::debug!("passed over: {error}");
            }
            place <= wanted || fits.is_ok()
        });
        engine.with_embeddings(&self.list)
    }

    /// Gives a refiner those that it can read.
    ///
    /// # Errors
    /// As [`Engine::with_embeddings`].
    pub(super) fn teach_refiner(&self, engine: Engine) -> Result<Engine> {
        let fits = self
            .list
            .iter()
            .filter(|e| engine.check_embedding(e).is_ok());
        let fits: Vec<_> = fits.cloned().collect();
        engine.with_embeddings(&fits)
    }

    /// The names of those that the prompts say, and A1111's `TI hashes` of them.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub(super) fn used(&self, engine: &Engine, request: &Request) -> Result<Used> {
        let mut used = Used::default();
        let mut hashes = Vec::new();
        if self.list.is_empty() {
            return Ok(used);
        }
        for index in engine.embeddings_in(request)? {
            let Some(embedding) = self.list.get(index) else {
                continue;
            };
            used.names.push(embedding.name().to_owned());
            if !embedding.is_bundled() {
                let hash = sha256_file(embedding.path())?;
                let name = embedding.name().replace([':', ','], "");
                hashes.push(format!("{name}: {}", hash.get(..DIGITS).unwrap_or(&hash)));
            }
        }
        used.hashes = (!hashes.is_empty()).then(|| hashes.join(", "));
        Ok(used)
    }

    /// Those that a flag named and no prompt says.
    pub(super) fn unsaid(&self, args: &GenerateArgs, used: &Used) -> Option<String> {
        let flags = args.embedding.embedding.len();
        let mut unsaid = self.list.iter().take(self.wanted.min(flags));
        let unsaid = unsaid.find(|e| !used.names.iter().any(|name| name == e.name()))?;
        let mut words = unsaid.words();
        words.dedup();
        let words: Vec<String> = words
            .iter()
            .map(|w| format!("`{}`", printable(w)))
            .collect();
        Some(format!(
            "{}: no prompt names this embedding, so it changes nothing; it is called {}",
            unsaid.path().display(),
            words.join(" or ")
        ))
    }
}

/// The embeddings that the prompts say.
#[derive(Default)]
pub(super) struct Used {
    pub(super) names: Vec<String>,
    /// A1111's `TI hashes`, if there are any.
    pub(super) hashes: Option<String>,
}

/// A text in which a word may be looked for whatever its spaces and its letters' case.
fn packed(text: &str) -> String {
    let kept = text.chars().filter(|c| !c.is_whitespace() && *c != '\\');
    kept.flat_map(char::to_lowercase).collect()
}

/// `FILE_OR_NAME` or `…:NAME`. What exists under its whole name has no name in it.
fn split(flag: &str) -> (PathBuf, Option<&str>) {
    let whole = (PathBuf::from(flag), None);
    if Path::new(flag).exists() {
        return whole;
    }
    match flag.rsplit_once(':') {
        // else a drive's letter, or a file in a repository
        Some((file, name)) if !name.is_empty() && !name.contains(['/', '\\']) => {
            match Path::new(name).extension() {
                Some(_) if !Path::new(file).exists() => whole,
                _ => (PathBuf::from(file), Some(name)),
            }
        }
        _ => whole,
    }
}

/// The file that a flag means: a path, an embedding's name in the folders, or what any model's name may be.
fn find(args: &GenerateArgs, typed: &Path) -> Result<Model> {
    if let Some(model) = Model::existing(typed) {
        return Ok(model);
    }
    let text = typed.to_str().unwrap_or_default();
    match library(&args.library)?.find_embedding(text) {
        Ok(entry) => Ok(Model {
            path: entry.path,
            name: entry.name,
        }),
        Err(error) => match resolve(typed, &args.library) {
            Ok(model) => Ok(model),
            Err(Error::Interrupted) => Err(Error::Interrupted),
            Err(other) if text.contains(['/', '\\', ':', '@']) => Err(other),
            Err(_) => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_is_a_file_and_a_name() {
        for (flag, file, name) in [
            ("a.pt", "a.pt", None),
            ("a.pt:<cat>", "a.pt", Some("<cat>")),
            ("a:ink", "a", Some("ink")),
            ("C:\\x\\a.pt", "C:\\x\\a.pt", None),
            ("o/r:f.safetensors", "o/r:f.safetensors", None),
        ] {
            assert_eq!(split(flag), (PathBuf::from(file), name), "{flag}");
        }
    }
}
