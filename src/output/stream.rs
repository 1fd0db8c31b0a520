//! Files and folders that take long to write: they grow under another name beside their own and take it when they are whole. Let go of before,
//! they leave nothing behind.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::file::{self, Existing, PART, claim, folder_of, part_file, sweep, sync_folder, taken};
use crate::error::{Error, Result};

/// Bytes that are collected before they are written.
const BUFFER: usize = 1 << 20;

/// Fails when the disk that `path` is to be written to has less room than `bytes`, where the system tells.
///
/// # Errors
/// [`Error::Disk`].
pub fn check_room(path: &Path, bytes: u64) -> Result<()> {
    let Some(free) = free(folder_of(&normal(path))).filter(|free| *free < bytes) else {
        return Ok(());
    };
    let mega = |bytes: u64| bytes.div_ceil(1_000_000);
    let reason = format!(
        "it needs {} MB, and the disk has {} MB left; make room or choose another disk",
        mega(bytes),
        free / 1_000_000
    );
    let source = io::Error::new(io::ErrorKind::StorageFull, reason);
    Err(Error::disk(path, "write", source))
}

/// Bytes that the user may still write to the disk of this folder.
#[cfg(unix)]
fn free(folder: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(folder).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Not known here; a full disk ends the run then.
#[cfg(not(unix))]
fn free(_: &Path) -> Option<u64> {
    None
}

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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_disk_without_room_is_told_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        check_room(&path, 1).unwrap();
        let error = check_room(&path, u64::MAX).unwrap_err().to_string();
        assert!(error.contains("it needs 18446744073710 MB"), "{error}");
    }

    #[test]
    fn a_folder_takes_the_place_of_its_like_alone() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("model");
        let make = |overwrite| -> Result<()> {
            let folder = NewFolder::create(&path, overwrite, "mark")?;
            folder.write("mark", b"1")?;
            folder.write("inside/x", b"2")?;
            folder.finish()
        };
        make(false).unwrap();
        assert_eq!(fs::read(path.join("inside/x")).unwrap(), b"2");
        assert!(make(false).is_err());
        make(true).unwrap();
        fs::remove_file(path.join("mark")).unwrap();
        assert!(make(true).is_err());
        let names = fs::read_dir(root.path()).unwrap().count();
        assert_eq!(names, 1);
    }
}
