//! `sd-rs models`: what is there, fetched, checked and removed. Removing never leaves the models folder and the Hub's cache.

use std::fs;
use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;

use serde_json::{Value, json};

use super::args::{ListArgs, ModelsArgs, ModelsCommand, PullArgs, RmArgs};
use super::fetch::{attended, library};
use super::print_line;
use crate::checkpoint::{TensorFile, auto_v2, printable, sha256_file};
use crate::error::{Error, Result};
use crate::hub::{self, Cache, RepoName, Settings, human};
use crate::library::{Entry, Library, is_repository};

/// Runs the command.
///
/// # Errors
/// Whatever stops it; a damaged file that was found is an error, too.
pub(super) fn run(args: &ModelsArgs) -> Result<()> {
    match &args.command {
        ModelsCommand::List(list) => print_list(&library(&args.library)?, list),
        ModelsCommand::Pull(pull) => run_pull(pull),
        ModelsCommand::Verify { names, repair } => verify(&library(&args.library)?, names, *repair),
        ModelsCommand::Rm(rm) => remove(&library(&args.library)?, rm),
        ModelsCommand::Path { name } => print_path(&library(&args.library)?, name.as_deref()),
    }
}

/// A row of the table.
struct Row {
    name: String,
    kind: &'static str,
    format: String,
    size: u64,
    sha256: Option<String>,
    path: String,
}

impl Row {
    fn of_entry(entry: &Entry, sha256: Option<String>) -> Self {
        Self {
            name: printable(&entry.name),
            kind: entry.kind.name(),
            format: entry.format.clone(),
            size: entry.size,
            sha256,
            path: entry.path.display().to_string(),
        }
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name, "kind": self.kind, "format": self.format, "size_bytes": self.size,
            "sha256": self.sha256, "autov2": self.sha256.as_deref().map(auto_v2), "path": self.path,
        })
    }

    fn cells(&self) -> [String; 6] {
        let hash = self.sha256.as_deref().map_or("–", auto_v2);
        [
            self.name.clone(),
            self.kind.to_owned(),
            self.format.clone(),
            human(self.size),
            hash.to_owned(),
            printable(&self.path),
        ]
    }
}

fn print_list(library: &Library, args: &ListArgs) -> Result<()> {
    let rows = if args.hash {
        let library = library.clone();
        attended(move |listener| {
            let mut hashes = library.hashes();
            for entry in library
                .entries()
                .iter()
                .filter(|entry| entry.path.is_file())
            {
                if listener.stopped() {
                    return Err(Error::Interrupted);
                }
                hashes.learn(&entry.path)?;
            }
            Ok(rows(&library))
        })?
    } else {
        rows(library)
    };
    if args.json {
        return rows
            .iter()
            .try_for_each(|row| print_line(&row.json().to_string()));
    }
    if rows.is_empty() {
        tracing::warn!(
            "no models in {} or the Hub's cache; put files there, or fetch one with `sd-rs models pull owner/name`",
            library.root().display()
        );
        return Ok(());
    }
    table(&rows).iter().try_for_each(|line| print_line(line))
}

/// The models of the folders, then the repositories of the Hub's cache that can be used.
fn rows(library: &Library) -> Vec<Row> {
    let hashes = library.hashes();
    let entries = library.entries();
    let mut rows: Vec<Row> = entries
        .iter()
        .map(|entry| Row::of_entry(entry, hashes.known(&entry.path).map(str::to_owned)))
        .collect();
    // without a home there is no cache, and nothing in it
    let Ok(settings) = Settings::from_env() else {
        return rows;
    };
    for repo in Cache::new(&settings.cache).repos() {
        let usable = hub::cached(&settings, &repo.name, true);
        rows.extend(usable.map(|found| {
            Row {
                name: repo.name.id().to_owned(),
                kind: "repository",
                format: if found.path.is_dir() {
                    "diffusers"
                } else {
                    "safetensors"
                }
                .to_owned(),
                size: repo.size,
                sha256: None,
                path: found.path.display().to_string(),
            }
        }));
    }
    rows
}

fn table(rows: &[Row]) -> Vec<String> {
    let head = ["NAME", "KIND", "FORMAT", "SIZE", "HASH", "WHERE"].map(str::to_owned);
    let cells: Vec<[String; 6]> = std::iter::once(head)
        .chain(rows.iter().map(Row::cells))
        .collect();
    let mut widths = [0; 6];
    for row in &cells {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let line = |row: &[String; 6]| {
        let mut line = String::new();
        for (i, (cell, width)) in row.iter().zip(widths).enumerate() {
            // sizes stand right, so that they can be compared
            line.push_str(&if i == 3 {
                format!("{cell:>width$}  ")
            } else {
                format!("{cell:<width$}  ")
            });
        }
        line.trim_end().to_owned()
    };
    cells.iter().map(line).collect()
}

fn run_pull(args: &PullArgs) -> Result<()> {
    for text in &args.names {
        let name = RepoName::parse(text)?;
        let settings = Settings::from_env()?;
        let variant = args.variant.clone();
        if args.dry_run {
            let asked = name.clone();
            let plan = attended(move |listener| {
                hub::preview(&settings, &asked, variant.as_deref(), listener)
            })?;
            for file in &plan.files {
                print_line(&format!(
                    "{:>9}  {}",
                    file.size.map_or_else(|| "?".to_owned(), human),
                    printable(&file.path)
                ))?;
            }
            let bytes = plan.files.iter().filter_map(|file| file.size).sum();
            print_line(&format!(
                "{:>9}  in {} files",
                human(bytes),
                plan.files.len()
            ))?;
            continue;
        }
        let pulled =
            attended(move |listener| hub::pull(&settings, &name, variant.as_deref(), listener))?;
        print_line(&pulled.path.display().to_string())?;
    }
    Ok(())
}

/// What was named: a model of the folders, or a repository of the cache.
enum Named {
    Entry(Box<Entry>),
    Repo(RepoName),
}

fn named(library: &Library, text: &str) -> Result<Named> {
    if let Some(entry) = library.find(text)? {
        return Ok(Named::Entry(Box::new(entry)));
    }
    if !is_repository(text) {
        return Err(Error::NotFound {
            what: printable(text),
            hint: format!(
                "there is no model of that name in {} and it is no repository's; `sd-rs models list` shows those that are",
                library.root().display()
            ),
        });
    }
    let name = RepoName::parse(text)?;
    if name.to_string() != name.id() {
        return Err(Error::NotFound {
            what: printable(text),
            hint: format!("this works on whole repositories; give {}", name.id()),
        });
    }
    let cache = Settings::from_env()?.cache;
    if !Cache::new(&cache).repo(&name).is_dir() {
        return Err(Error::NotFound {
            what: name.id().to_owned(),
            hint: format!("it is not in the cache {}", cache.display()),
        });
    }
    Ok(Named::Repo(name))
}

fn verify(library: &Library, names: &[String], repair: bool) -> Result<()> {
    let found: Vec<Named> = if names.is_empty() {
        let cache = Settings::from_env()
            .map(|settings| Cache::new(settings.cache).repos())
            .unwrap_or_default();
        let repos = cache.into_iter().map(|repo| Named::Repo(repo.name));
        library
            .entries()
            .into_iter()
            .map(|entry| Named::Entry(Box::new(entry)))
            .chain(repos)
            .collect()
    } else {
        names
            .iter()
            .map(|name| named(library, name))
            .collect::<Result<_>>()?
    };
    let mut damaged = Vec::new();
    for one in found {
        match one {
            Named::Entry(entry) => damaged.extend(verify_entry(library, &entry)?),
            Named::Repo(name) => damaged.extend(verify_repo(&name, repair)?),
        }
    }
    match damaged.as_slice() {
        [] => Ok(()),
        [first, ..] => {
            let what = if repair {
                "removed; pull again to fetch them"
            } else {
                "pull again after `sd-rs models verify --repair`, or download them again"
            };
            Err(Error::bad_model(
                first,
                format!("{} damaged files, this the first; {what}", damaged.len()),
            ))
        }
    }
}

/// Reads a file of the folders again; gives it back when it is damaged.
fn verify_entry(library: &Library, entry: &Entry) -> Result<Option<String>> {
    let shown = entry.path.display().to_string();
    if entry.path.is_dir() {
        print_line(&format!(
            "unknown  {shown} (a folder, nothing to compare it with)"
        ))?;
        return Ok(None);
    }
    if matches!(entry.format.as_str(), "safetensors" | "gguf")
        && let Err(error) = TensorFile::open(&entry.path, true)
    {
        print_line(&format!("damaged  {error}"))?;
        return Ok(Some(shown));
    }
    let (path, known) = (
        entry.path.clone(),
        library.hashes().known(&entry.path).map(str::to_owned),
    );
    let sha256 = attended(move |_| sha256_file(&path))?;
    if known.as_ref().is_some_and(|known| *known != sha256) {
        print_line(&format!(
            "damaged  {shown} (its SHA-256 is {sha256}, and was {})",
            known.unwrap_or_default()
        ))?;
        return Ok(Some(shown));
    }
    library.hashes().learn(&entry.path)?;
    print_line(&format!("good     {shown} ({})", auto_v2(&sha256)))?;
    Ok(None)
}

/// Reads a repository's blobs again; gives those back that are damaged.
fn verify_repo(name: &RepoName, repair: bool) -> Result<Vec<String>> {
    let cache = Cache::new(Settings::from_env()?.cache);
    let asked = name.clone();
    let checks = attended(move |listener| {
        cache.verify(&asked, &mut |bytes| {
            listener.event(hub::Event::Bytes(bytes));
            !listener.stopped()
        })
    })?;
    let mut damaged = Vec::new();
    for check in checks.iter().filter(|check| !check.good) {
        print_line(&format!(
            "damaged  {}: {}",
            name.id(),
            printable(&check.file)
        ))?;
        damaged.push(check.path.display().to_string());
        if repair {
            fs::remove_file(&check.path).map_err(|e| Error::disk(&check.path, "remove", e))?;
        }
    }
    if damaged.is_empty() {
        let size = checks.iter().map(|check| check.size).sum();
        print_line(&format!(
            "good     {} ({} files, {})",
            name.id(),
            checks.len(),
            human(size)
        ))?;
    }
    Ok(damaged)
}

fn remove(library: &Library, args: &RmArgs) -> Result<()> {
    match named(library, &args.name)? {
        Named::Entry(entry) => {
            let path = &entry.path;
            check_inside(library.root(), &entry)?;
            if !confirmed(&path.display().to_string(), entry.size, args.yes)? {
                return Ok(());
            }
            // a link is removed, not what it leads to
            let is_folder = fs::symlink_metadata(path).is_ok_and(|about| about.is_dir());
            let removed = if is_folder {
                fs::remove_dir_all(path)
            } else {
                fs::remove_file(path)
            };
            removed.map_err(|e| Error::disk(path, "remove", e))
        }
        Named::Repo(name) => {
            let cache = Cache::new(Settings::from_env()?.cache);
            let repo = cache.repos().into_iter().find(|repo| repo.name == name);
            let what = format!("{} in {}", name.id(), cache.repo(&name).display());
            if !confirmed(&what, repo.map_or(0, |repo| repo.size), args.yes)? {
                return Ok(());
            }
            cache.remove(&name)
        }
    }
}

/// Refuses what lies in others' folders, and what a linked folder makes look as if it were in ours.
fn check_inside(root: &Path, entry: &Entry) -> Result<()> {
    let real = |path: &Path| fs::canonicalize(path).ok();
    let inside = match (real(root), entry.path.parent().and_then(real)) {
        (Some(root), Some(folder)) => {
            entry.path.starts_with(&entry.place) && folder.starts_with(root)
        }
        _ => false,
    };
    if inside {
        return Ok(());
    }
    let reason = format!(
        "it lies outside the models folder {}, where nothing is removed; delete it yourself",
        root.display()
    );
    Err(Error::disk(
        &entry.path,
        "remove",
        std::io::Error::new(std::io::ErrorKind::PermissionDenied, reason),
    ))
}

/// Asks on a terminal whether to remove it; elsewhere `--yes` must say so.
fn confirmed(what: &str, size: u64, yes: bool) -> Result<bool> {
    if yes {
        return Ok(true);
    }
    let (stdin, mut stderr) = (std::io::stdin(), std::io::stderr());
    if !stdin.is_terminal() || !stderr.is_terminal() {
        return Err(Error::NotFound {
            what: "a terminal to ask on".to_owned(),
            hint: format!("give --yes to remove {what} ({})", human(size)),
        });
    }
    let mut answer = String::new();
    let _ = write!(stderr, "remove {what} ({})? [y/N] ", human(size));
    let _ = stderr.flush();
    stdin
        .lock()
        .read_line(&mut answer)
        .map_err(|e| Error::disk("stdin", "read", e))?;
    Ok(["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()))
}

fn print_path(library: &Library, name: Option<&str>) -> Result<()> {
    let Some(name) = name else {
        return print_line(&library.root().display().to_string());
    };
    let path = match library.find(name)? {
        Some(entry) => entry.path,
        None if is_repository(name) => {
            let (settings, repo) = (Settings::from_env()?, RepoName::parse(name)?);
            let found = hub::cached(&settings, &repo, true).ok_or_else(|| Error::NotFound {
                what: repo.to_string(),
                hint: format!(
                    "it is not whole in the cache {}; `sd-rs models pull {repo}` fetches it",
                    settings.cache.display()
                ),
            })?;
            found.path
        }
        None => {
            let (library, name) = (library.clone(), name.to_owned());
            attended(move |listener| library.resolve(Path::new(&name), listener))?.path
        }
    };
    print_line(&path.display().to_string())
}
