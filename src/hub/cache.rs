//! The cache on disk, laid out as Python's `huggingface_hub` has it, so that nothing is downloaded twice.
//!
//! ```text
//! models--owner--name/blobs/<etag>                     the content, once
//! models--owner--name/refs/<revision>                  the commit that a branch or tag stands for
//! models--owner--name/snapshots/<commit>/<file>        a relative link to a blob
//! .locks/models--owner--name/<etag>.lock               held while a blob is fetched
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use sha1::Digest;

use super::name::{RepoName, is_commit, is_etag, is_file_name};
use crate::checkpoint::printable;
use crate::error::{Error, Result};

/// How deep folders of a snapshot are looked into.
const MAX_DEPTH: usize = 8;

/// The cache's folder.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// A repository that is in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedRepo {
    /// Its name.
    pub name: RepoName,
    /// The branches and tags whose commit is here.
    pub revisions: Vec<String>,
    /// Bytes of all its blobs.
    pub size: u64,
    /// Its folder.
    pub path: PathBuf,
}

/// What was found when a blob was read again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobCheck {
    /// The blob.
    pub path: PathBuf,
    /// A file of a snapshot that leads to it.
    pub file: String,
    /// Its bytes.
    pub size: u64,
    /// Whether its content is what its name says.
    pub good: bool,
}

impl Cache {
    /// The cache at `root`, which need not exist.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// A repository's folder, whether or not it is there.
    pub fn repo(&self, name: &RepoName) -> PathBuf {
        self.root.join(name.folder())
    }

    pub(super) fn blob(&self, name: &RepoName, etag: &str) -> PathBuf {
        self.repo(name).join("blobs").join(etag)
    }

    pub(super) fn snapshot(&self, name: &RepoName, commit: &str) -> PathBuf {
        self.repo(name).join("snapshots").join(commit)
    }

    fn reference(&self, name: &RepoName) -> PathBuf {
        self.repo(name).join("refs").join(name.revision())
    }

    fn locks(&self, name: &RepoName) -> PathBuf {
        self.root.join(".locks").join(name.folder())
    }

    /// The commit that the name's revision stands for, as far as is known here.
    pub fn commit(&self, name: &RepoName) -> Option<String> {
        if is_commit(name.revision()) {
            return Some(name.revision().to_owned());
        }
        let text = read_short(&self.reference(name))?;
        let commit = text.trim();
        is_commit(commit).then(|| commit.to_owned())
    }

    /// Notes which commit the name's revision stands for.
    pub(super) fn set_commit(&self, name: &RepoName, commit: &str) -> Result<()> {
        // a cache that is already right may be one that cannot be written to
        if self.commit(name).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.reference(name);
        let folder = path.parent().unwrap_or(&self.root);
        create_folder(folder)?;
        let failed = |e| Error::disk(&path, "write", e);
        let mut part = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        part.write_all(commit.as_bytes()).map_err(failed)?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // readable by whom the cache is shared with
            let _ = part
                .as_file()
                .set_permissions(fs::Permissions::from_mode(0o644));
        }
        part.persist(&path)
            .map_err(|e| Error::disk(&path, "write", e.error))?;
        Ok(())
    }

    /// The files of a snapshot that are there, by path within it; links that lead nowhere are not.
    pub fn files(&self, name: &RepoName, commit: &str) -> BTreeMap<String, u64> {
        let mut found = BTreeMap::new();
        walk(&self.snapshot(name, commit), "", 0, &mut found);
        found
    }

    /// Makes a snapshot's file lead to a blob. One that is there already and is right stays.
    pub(super) fn link(&self, name: &RepoName, commit: &str, file: &str, etag: &str) -> Result<()> {
        let (pointer, blob) = (
            self.snapshot(name, commit).join(file),
            self.blob(name, etag),
        );
        let there = fs::metadata(&pointer).ok();
        let is_link = fs::symlink_metadata(&pointer).is_ok_and(|about| about.is_symlink());
        if let (Some(there), Ok(wanted)) = (there, fs::metadata(&blob)) {
            let same = fs::canonicalize(&pointer).ok() == fs::canonicalize(&blob).ok();
            // where links cannot be made, Python keeps the file itself here
            if same || (!is_link && there.len() == wanted.len()) {
                return Ok(());
            }
        }
        let folder = pointer.parent().unwrap_or(&self.root);
        create_folder(folder)?;
        let up = "../".repeat(file.matches('/').count() + 2);
        let target = format!("{up}blobs/{etag}");
        // a new link under another name, then renamed: nobody sees the file missing
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let part = folder.join(format!(".sd-rs-{}-{number}.part", std::process::id()));
        let made =
            make_link(Path::new(&target), &part, &blob).and_then(|()| fs::rename(&part, &pointer));
        made.map_err(|e| {
            let _ = fs::remove_file(&part);
            Error::disk(&pointer, "create", e)
        })
    }

    /// The lock of a blob, if nobody has it.
    pub(super) fn try_lock(&self, name: &RepoName, etag: &str) -> Result<Option<File>> {
        let folder = self.locks(name);
        create_folder(&folder)?;
        let path = folder.join(format!("{etag}.lock"));
        let file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .open(&path);
        let file = file.map_err(|e| Error::disk(&path, "create", e))?;
        match file.try_lock() {
            // who let go of it may have removed its file; a lock on a file without a name locks nobody out
            Ok(()) if is_at(&file, &path) => Ok(Some(file)),
            Ok(()) | Err(TryLockError::WouldBlock) => Ok(None),
            // a file system without locks: blobs are verified and renamed whole, so the worst is work done twice
            Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => Ok(Some(file)),
            Err(TryLockError::Error(e)) => Err(Error::disk(&path, "lock", e)),
        }
    }

    /// The repositories of models in the cache, by name.
    pub fn repos(&self) -> Vec<CachedRepo> {
        let mut found: Vec<CachedRepo> = entries(&self.root)
            .into_iter()
            .filter_map(|(folder, path)| {
                let name = RepoName::from_folder(&folder)?;
                let about = fs::symlink_metadata(&path).ok()?;
                let blobs = entries(&path.join("blobs"));
                let size = blobs
                    .iter()
                    .filter_map(|(_, blob)| Some(fs::metadata(blob).ok()?.len()))
                    .sum();
                let mut refs = BTreeMap::new();
                walk(&path.join("refs"), "", 0, &mut refs);
                about.is_dir().then(|| CachedRepo {
                    name,
                    revisions: refs.into_keys().collect(),
                    size,
                    path,
                })
            })
            .collect();
        found.sort_by(|a, b| a.name.id().cmp(b.name.id()));
        found
    }

    /// Reads every blob of a repository again. `step` is told the bytes read and may stop it.
    ///
    /// # Errors
    /// [`Error::Disk`] when one cannot be read, [`Error::Interrupted`] when `step` says so.
    pub fn verify(
        &self,
        name: &RepoName,
        step: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Vec<BlobCheck>> {
        let names = self.names_of_blobs(name);
        let mut checks = Vec::new();
        for (etag, path) in entries(&self.repo(name).join("blobs")) {
            if !is_etag(&etag) {
                continue;
            }
            let size = fs::metadata(&path)
                .map_err(|e| Error::disk(&path, "read", e))?
                .len();
            let mut hasher = Hasher::new(&etag, size);
            let mut file = File::open(&path).map_err(|e| Error::disk(&path, "read", e))?;
            let mut chunk = vec![0; 1 << 20];
            loop {
                let count = file
                    .read(&mut chunk)
                    .map_err(|e| Error::disk(&path, "read", e))?;
                if count == 0 {
                    break;
                }
                hasher.update(chunk.get(..count).unwrap_or_default());
                if !step(count as u64) {
                    return Err(Error::Interrupted);
                }
            }
            let file = names.get(&etag).cloned().unwrap_or_else(|| etag.clone());
            checks.push(BlobCheck {
                path,
                file,
                size,
                good: hasher.finish() == etag,
            });
        }
        checks.sort_by(|a, b| a.file.cmp(&b.file));
        Ok(checks)
    }

    /// A file's name for each blob.
    fn names_of_blobs(&self, name: &RepoName) -> BTreeMap<String, String> {
        let mut names = BTreeMap::new();
        for (commit, folder) in entries(&self.repo(name).join("snapshots")) {
            for file in self.files(name, &commit).into_keys() {
                let target = fs::read_link(folder.join(&file)).ok();
                let etag = target
                    .as_deref()
                    .and_then(Path::file_name)
                    .map(|n| n.to_string_lossy().into_owned());
                if let Some(etag) = etag {
                    names.insert(etag, file);
                }
            }
        }
        names
    }

    /// Removes a repository from the cache, and nothing else: links are removed, not what they lead to.
    ///
    /// # Errors
    /// [`Error::NotFound`] when it is not there; [`Error::Disk`] when a process fetches it or it cannot be removed.
    pub fn remove(&self, name: &RepoName) -> Result<()> {
        let path = self.repo(name);
        let about = fs::symlink_metadata(&path).map_err(|_| Error::NotFound {
            what: name.id().to_owned(),
            hint: format!("it is not in the cache {}", self.root.display()),
        })?;
        for (_, lock) in entries(&self.locks(name)) {
            let taken = File::open(&lock)
                .is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)));
            if taken {
                return Err(Error::disk(
                    &path,
                    "remove",
                    io::Error::new(
                        ErrorKind::ResourceBusy,
                        "another process is fetching it; wait for that to end",
                    ),
                ));
            }
        }
        let removed = if about.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(|e| Error::disk(&path, "remove", e))?;
        let _ = fs::remove_dir_all(self.locks(name));
        Ok(())
    }
}

/// The hash that a blob is named by: SHA-256 of its bytes, or git's SHA-1 of a blob object.
pub(super) enum Hasher {
    Git(sha1::Sha1),
    Sha256(sha2::Sha256),
}

impl Hasher {
    pub(super) fn new(etag: &str, size: u64) -> Self {
        if etag.len() == 64 {
            return Self::Sha256(sha2::Sha256::new());
        }
        let mut hasher = sha1::Sha1::new();
        hasher.update(format!("blob {size}\0"));
        Self::Git(hasher)
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Git(hasher) => hasher.update(bytes),
            Self::Sha256(hasher) => hasher.update(bytes),
        }
    }

    pub(super) fn finish(self) -> String {
        let hex = |digest: &[u8]| digest.iter().map(|b| format!("{b:02x}")).collect();
        match self {
            Self::Git(hasher) => hex(&hasher.finalize()),
            Self::Sha256(hasher) => hex(&hasher.finalize()),
        }
    }
}

/// Makes a folder and those above it.
pub(super) fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| Error::disk(path, "create", e))
}

#[cfg(unix)]
fn make_link(target: &Path, link: &Path, _blob: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

/// Where links are a privilege, the file has a second name, or is there twice.
#[cfg(not(unix))]
fn make_link(_target: &Path, link: &Path, blob: &Path) -> io::Result<()> {
    fs::hard_link(blob, link).or_else(|_| fs::copy(blob, link).map(|_| ()))
}

#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => a.ino() == b.ino() && a.dev() == b.dev(),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_at(_file: &File, _path: &Path) -> bool {
    true
}

/// The first bytes of a small text file.
fn read_short(path: &Path) -> Option<String> {
    let mut text = String::new();
    let file = File::open(path)
        .ok()
        .filter(|f| f.metadata().is_ok_and(|m| m.is_file()))?;
    file.take(200).read_to_string(&mut text).ok()?;
    Some(text)
}

/// The entries of a folder whose names are text, sorted; nothing when it cannot be read.
fn entries(folder: &Path) -> Vec<(String, PathBuf)> {
    let all = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut named: Vec<_> = all
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .collect();
    named.sort();
    named
}

fn walk(folder: &Path, prefix: &str, depth: usize, found: &mut BTreeMap<String, u64>) {
    for (name, path) in entries(folder) {
        let inner = if prefix.is_empty() {
            name
        } else {
            format!("{prefix}/{name}")
        };
        match fs::metadata(&path) {
            Ok(about) if about.is_dir() && depth < MAX_DEPTH => {
                walk(&path, &inner, depth + 1, found)
            }
            Ok(about) if about.is_file() && is_file_name(&inner) => {
                found.insert(inner, about.len());
            }
            Ok(_) => {}
            Err(e) => tracing::debug!("{}: {}", printable(&path.to_string_lossy()), e),
        }
    }
}
