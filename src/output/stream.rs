//! Files and folders that take long to write: they grow under another name beside their own and take it when they are whole. Let go of before,
//! they leave nothing behind.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::file::{self, Existing, PART, claim, folder_of, part_file, sweep, sync_folder, taken};
use crate::error::{Error, Result};

/// Bytes that are collected before they are written.
const BUFFER: usize = 1 << 20;

/// A file that is being written.
pub struct NewFile {
    part: BufWriter<tempfile::NamedTempFile>,
    path: PathBuf,
    existing: Existing,
}

impl NewFile {
    /// Begins `path`; only with `overwrite` may it take another file's place.
    ///
    /// # Errors
    /// [`Error::Disk`] when it could not be written: no folder, no right, a file in its place.
    pub fn create(path: &Path, overwrite: bool) -> Result<Self> {
        let existing = match overwrite {
            true => Existing::Overwrite,
            false => Existing::Refuse,
        };
        file::check(path, existing)?;
        if file::is_special(path) {
            let reason = "it is a device or a pipe; name a file";
            let source = io::Error::new(io::ErrorKind::InvalidInput, reason);
            return Err(Error::disk(path, "write", source));
        }
        let folder = folder_of(path);
        sweep(folder);
        let part = part_file(folder).map_err(|e| Error::disk(path, "write", e))?;
        Ok(Self {
            part: BufWriter::with_capacity(BUFFER, part),
            path: path.to_owned(),
            existing,
        })
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// [`Error::Disk`], such as when there is no room.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.part.write_all(bytes);
        written.map_err(|e| Error::disk(&self.path, "write", e))
    }

    /// Writes over bytes that were written before, from `start` on.
    ///
    /// # Errors
    /// As [`NewFile::write`].
    pub fn amend(&mut self, start: u64, bytes: &[u8]) -> Result<()> {
        let amended = self
            .part
            .seek(SeekFrom::Start(start))
            .and_then(|_| self.part.write_all(bytes))
            .and_then(|()| self.part.seek(SeekFrom::End(0)));
        amended.map_err(|e| Error::disk(&self.path, "write", e))?;
        Ok(())
    }

    /// Gives the whole file its name.
    ///
    /// # Errors
    /// As [`NewFile::write`], or another file has taken the name meanwhile.
    pub fn finish(self) -> Result<()> {
        let failed = |e: io::Error| Error::disk(&self.path, "write", e);
        let part = self.part.into_inner().map_err(|e| failed(e.into_error()))?;
        part.as_file().sync_all().map_err(failed)?;
        claim(part, &self.path, self.existing)?;
        sync_folder(folder_of(&self.path));
        Ok(())
    }
}

/// A folder that is being written.
pub struct NewFolder {
    part: tempfile::TempDir,
    path: PathBuf,
    overwrite: bool,
}

impl NewFolder {
    /// Begins `path`; only with `overwrite` may it take another folder's place, and only that of one that holds a file called `mark`, or
    /// nothing: nobody's pictures go.
    ///
    /// # Errors
    /// [`Error::Disk`] when it could not be written.
    pub fn create(path: &Path, overwrite: bool, mark: &str) -> Result<Self> {
        let path = &normal(path);
        let refuse =
            |kind, reason: String| Err(Error::disk(path, "write", io::Error::new(kind, reason)));
        if let Ok(found) = fs::symlink_metadata(path) {
            let empty = fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
            if !found.is_dir() {
                let reason = "it is not a folder; choose another name".to_owned();
                return refuse(io::ErrorKind::NotADirectory, reason);
            }
            if !empty && !overwrite {
                return Err(taken(path));
            }
            if !empty && !path.join(mark).is_file() {
                let reason = format!(
                    "the folder that is there holds no {mark}, so it is not replaced; choose another name"
                );
                return refuse(io::ErrorKind::AlreadyExists, reason);
            }
        }
        let parent = folder_of(path);
        if !parent.is_dir() {
            let reason = format!(
                "the folder {} does not exist; create it first",
                parent.display()
            );
            return refuse(io::ErrorKind::NotFound, reason);
        }
        sweep(parent);
        let mut builder = tempfile::Builder::new();
        builder.prefix(PART.0).suffix(PART.1);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(fs::Permissions::from_mode(0o777));
        }
        let part = builder
            .tempdir_in(parent)
            .map_err(|e| Error::disk(path, "write", e))?;
        Ok(Self {
            part,
            path: path.clone(),
            overwrite,
        })
    }

    /// Where `name` is to be written; folders above it are made.
    ///
    /// # Errors
    /// [`Error::Disk`].
    pub fn place(&self, name: &str) -> Result<PathBuf> {
        let place = self.part.path().join(name);
        fs::create_dir_all(folder_of(&place)).map_err(|e| Error::disk(&self.path, "write", e))?;
        Ok(place)
    }

    /// Writes a small file.
    ///
    /// # Errors
    /// [`Error::Disk`].
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut file = NewFile::create(&self.place(name)?, false)?;
        file.write(bytes)?;
        file.finish()
    }

    /// Gives the whole folder its name.
    ///
    /// # Errors
    /// [`Error::Disk`], or another folder has taken the name meanwhile.
    pub fn finish(self) -> Result<()> {
        let failed = |e: io::Error| Error::disk(&self.path, "write", e);
        let parent = folder_of(&self.path);
        let mut old = None;
        if fs::symlink_metadata(&self.path).is_ok() {
            let empty = fs::read_dir(&self.path).is_ok_and(|mut entries| entries.next().is_none());
            if !empty && !self.overwrite {
                return Err(taken(&self.path));
            }
            // the old folder steps aside, and comes back if the new one cannot take its name
            let aside = tempfile::Builder::new()
                .prefix(PART.0)
                .suffix(PART.1)
                .tempdir_in(parent)
                .map_err(failed)?;
            fs::rename(&self.path, aside.path().join("old")).map_err(failed)?;
            old = Some(aside);
        }
        let part = self.part.keep();
        if let Err(error) = fs::rename(&part, &self.path) {
            if let Some(aside) = &old {
                let _ = fs::rename(aside.path().join("old"), &self.path);
            }
            let _ = fs::remove_dir_all(&part);
            return Err(failed(error));
        }
        if let Ok(folder) = File::open(&self.path) {
            let _ = folder.sync_all();
        }
        sync_folder(parent);
        Ok(())
    }
}

/// A path without a separator at its end.
fn normal(path: &Path) -> PathBuf {
    path.components().collect()
}
