//! The hashes of model files, remembered: reading a checkpoint takes seconds, and its hash holds as long as its size and time do.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::checkpoint::sha256_file;
use crate::error::{Error, Result};

/// The largest file of hashes that is read, in bytes.
const MAX_SIZE: u64 = 64 << 20;

/// What is known of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    size: u64,
    /// When it was changed last, in nanoseconds since 1970.
    changed: u64,
    sha256: String,
}

/// Hashes by path, kept in a JSON file. One that cannot be read or written is no fault: then hashes are computed again.
#[derive(Debug)]
pub struct Hashes {
    file: Option<PathBuf>,
    known: BTreeMap<String, Known>,
}

impl Hashes {
    /// What the file knows.
    pub(super) fn open(file: Option<&Path>) -> Self {
        let read = |file: &Path| {
            let small = fs::metadata(file).ok()?.len() <= MAX_SIZE;
            serde_json::from_slice(&fs::read(file).ok().filter(|_| small)?).ok()
        };
        Self {
            known: file.and_then(read).unwrap_or_default(),
            file: file.map(Path::to_owned),
        }
    }

    /// The SHA-256 of a file that has not changed since it was computed.
    pub fn known(&self, path: &Path) -> Option<&str> {
        let (key, size, changed) = about(path)?;
        let known = self.known.get(&key)?;
        (known.size == size && known.changed == changed).then_some(known.sha256.as_str())
    }

    /// The SHA-256 of a file, read if need be, and remembered.
    ///
    /// # Errors
    /// [`Error::Disk`] when it cannot be read.
    pub fn learn(&mut self, path: &Path) -> Result<String> {
        if let Some(sha256) = self.known(path) {
            return Ok(sha256.to_owned());
        }
        let before = about(path);
        let sha256 = sha256_file(path)?;
        // a file that is being written has no hash yet that is worth remembering
        if let Some((key, size, changed)) =
            before.filter(|before| about(path).as_ref() == Some(before))
        {
            self.known.insert(
                key,
                Known {
                    size,
                    changed,
                    sha256: sha256.clone(),
                },
            );
            if let Err(error) = self.save() {
                tracing::debug!("hashes are not remembered: {error}");
            }
        }
        Ok(sha256)
    }

    fn save(&self) -> Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let folder = file.parent().unwrap_or(Path::new("."));
        let failed = |e| Error::disk(file, "write", e);
        fs::create_dir_all(folder).map_err(failed)?;
        let mut part = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        let text = serde_json::to_vec_pretty(&self.known).unwrap_or_default();
        part.write_all(&text).map_err(failed)?;
        part.persist(file).map_err(|e| failed(e.error))?;
        Ok(())
    }
}

/// A file's key, size and time.
fn about(path: &Path) -> Option<(String, u64, u64)> {
    let real = fs::canonicalize(path).ok()?;
    let about = fs::metadata(&real).ok()?;
    let changed = about.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some((
        real.to_str()?.to_owned(),
        about.len(),
        u64::try_from(changed.as_nanos()).ok()?,
    ))
}
