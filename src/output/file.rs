//! Files written whole or not at all, and never over another file unless told.
//!
//! The bytes go to `.sd-rs-*.part` in the target's own folder, reach the disk, and only then take the target's name. A name is claimed
//! by the system call that makes it, so that two programs at once never write one file.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::error::{Error, Result};

/// Beginning and end of the names of unfinished files.
pub(super) const PART: (&str, &str) = (".sd-rs-", ".part");

/// An unfinished file as old as this belongs to a run that was killed.
const STALE: Duration = Duration::from_secs(3600);

/// Numbers that are tried behind a taken name.
const MAX_NUMBER: usize = 100_000;

/// What happens to a file that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Existing {
    /// It stays, and writing fails.
    Refuse,
    /// It is replaced.
    Overwrite,
    /// It stays, and the new one is called `name-2`, `name-3` …
    Number,
}

/// Fails, before the work begins, where writing a file would fail afterwards.
///
/// # Errors
/// [`Error::Disk`]: the folder is missing, is no folder or cannot be written to; the path is a folder; the file exists and may not be
/// replaced.
pub(super) fn check(path: &Path, existing: Existing) -> Result<()> {
    let refuse = |kind: io::ErrorKind, reason: String| {
        Err(Error::disk(path, "write", io::Error::new(kind, reason)))
    };
    if path.is_dir()
        || path.as_os_str().as_encoded_bytes().ends_with(b"/")
        || path.file_name().is_none()
    {
        return refuse(
            io::ErrorKind::IsADirectory,
            "it names a folder; name a file in it".to_owned(),
        );
    }
    if is_special(path) {
        return Ok(());
    }
    let folder = folder_of(path);
    match fs::metadata(folder) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            let reason = format!(
                "the folder {} does not exist; create it first",
                folder.display()
            );
            return refuse(source.kind(), reason);
        }
        Err(source) => return Err(Error::disk(path, "write", source)),
        Ok(found) if !found.is_dir() => {
            let reason = format!("{} is not a folder", folder.display());
            return refuse(io::ErrorKind::NotADirectory, reason);
        }
        Ok(_) => {}
    }
    if existing == Existing::Refuse && fs::symlink_metadata(path).is_ok() {
        return Err(taken(path));
    }
    // Asking is not enough: read-only file systems and access lists show only when tried.
    part_file(folder).map_err(|source| Error::disk(path, "write", source))?;
    Ok(())
}

/// Writes a whole file and gives its name, which differs from `path` only where a number was needed.
///
/// Devices and pipes are written to as they are.
///
/// # Errors
/// [`Error::Disk`]; then there is no new file and an old one is as it was.
pub(super) fn write(path: &Path, bytes: &[u8], existing: Existing) -> Result<PathBuf> {
    let failed = |source| Error::disk(path, "write", source);
    if is_special(path) {
        let mut device = File::options().write(true).open(path).map_err(failed)?;
        device.write_all(bytes).map_err(failed)?;
        return Ok(path.to_owned());
    }
    let folder = folder_of(path);
    let mut part = part_file(folder).map_err(failed)?;
    part.write_all(bytes)
        .and_then(|()| part.as_file().sync_all())
        .map_err(failed)?;
    let written = claim(part, path, existing)?;
    sync_folder(folder);
    Ok(written)
}

/// The name of a file itself reaches the disk with the folder; where folders cannot be synced there is nothing to do.
pub(super) fn sync_folder(folder: &Path) {
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}

/// Gives the finished part its name.
pub(super) fn claim(
    part: tempfile::NamedTempFile,
    path: &Path,
    existing: Existing,
) -> Result<PathBuf> {
    if existing == Existing::Overwrite {
        // A link stays a link, and a file keeps its permissions.
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if let Ok(old) = fs::metadata(&target) {
            let _ = part.as_file().set_permissions(old.permissions());
        }
        let done = part.persist(target);
        return match done {
            Ok(_) => Ok(path.to_owned()),
            Err(error) => Err(Error::disk(path, "write", error.error)),
        };
    }
    let mut part = part;
    for number in 1..=MAX_NUMBER {
        let name = numbered(path, number);
        match part.persist_noclobber(&name) {
            Ok(_) => return Ok(name),
            Err(error) if error.error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::disk(path, "write", error.error));
            }
            Err(_) if existing == Existing::Refuse => break,
            Err(error) => part = error.file,
        }
    }
    Err(taken(path))
}

pub(super) fn taken(path: &Path) -> Error {
    let reason = "it exists already; choose another name or give --overwrite";
    Error::disk(
        path,
        "write",
        io::Error::new(io::ErrorKind::AlreadyExists, reason),
    )
}

/// An empty unfinished file, which goes away with the value.
pub(super) fn part_file(folder: &Path) -> io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PART.0).suffix(PART.1);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // As any new file: the user's mask decides, not the secrecy of temporary files.
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder)
}

/// Removes unfinished files of runs that were killed. Whoever is still writing one is younger than that.
pub(super) fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let ours = name
            .to_str()
            .is_some_and(|name| name.starts_with(PART.0) && name.ends_with(PART.1));
        if !ours {
            continue;
        }
        let age = entry
            .metadata()
            .and_then(|file| file.modified())
            .ok()
            .and_then(|time| SystemTime::now().duration_since(time).ok());
        if age.is_some_and(|age| age > STALE) {
            let path = entry.path();
            let _ = match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                true => fs::remove_dir_all(path),
                false => fs::remove_file(path),
            };
        }
    }
}

/// `a.png` → `a-2.png`; 1 changes nothing.
pub(super) fn numbered(path: &Path, number: usize) -> PathBuf {
    if number <= 1 {
        return path.to_owned();
    }
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{number}"));
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

/// Whether a path is there and is neither file nor folder: a device, a pipe.
pub(super) fn is_special(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir())
}

/// The folder that a file lies in.
pub(super) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn message(result: Result<impl std::fmt::Debug>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn existing_files_stay_unless_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        assert_eq!(write(&path, b"one", Existing::Refuse).unwrap(), path);
        assert!(message(check(&path, Existing::Refuse)).contains("--overwrite"));
        assert!(message(write(&path, b"two", Existing::Refuse)).contains("--overwrite"));
        assert_eq!(fs::read(&path).unwrap(), b"one");

        check(&path, Existing::Number).unwrap();
        let second = write(&path, b"two", Existing::Number).unwrap();
        let third = write(&path, b"three", Existing::Number).unwrap();
        assert_eq!(
            (second, third),
            (folder.path().join("a-2.png"), folder.path().join("a-3.png"))
        );
        assert_eq!(fs::read(&path).unwrap(), b"one");

        check(&path, Existing::Overwrite).unwrap();
        assert_eq!(write(&path, b"four", Existing::Overwrite).unwrap(), path);
        assert_eq!(fs::read(&path).unwrap(), b"four");
        assert_eq!(names(folder.path()), ["a-2.png", "a-3.png", "a.png"]);
    }

    #[test]
    fn writers_at_once_get_different_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        std::thread::scope(|scope| {
            for i in 0..16u8 {
                let path = &path;
                scope.spawn(move || write(path, &[i], Existing::Number).unwrap());
            }
        });
        let mut seen: Vec<u8> = Vec::new();
        for name in names(folder.path()) {
            seen.extend(fs::read(folder.path().join(name)).unwrap());
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..16).collect::<Vec<u8>>());
    }

    #[test]
    fn hopeless_targets_are_refused_before_the_work() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, b"").unwrap();
        let refused = |path: PathBuf| message(check(&path, Existing::Overwrite));
        assert!(refused(folder.path().join("none/a.png")).contains("does not exist"));
        assert!(refused(file.join("a.png")).contains("is not a folder"));
        assert!(refused(folder.path().to_owned()).contains("names a folder"));
        assert!(refused(folder.path().join("new/")).contains("names a folder"));
        assert!(refused(PathBuf::from("/")).contains("names a folder"));
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[test]
    fn leftovers_of_killed_runs_are_swept() {
        let folder = tempfile::tempdir().unwrap();
        let old = SystemTime::now() - 2 * STALE;
        for (name, time) in [
            (".sd-rs-old.part", old),
            (".sd-rs-new.part", SystemTime::now()),
            ("mine.part", old),
        ] {
            let file = File::create(folder.path().join(name)).unwrap();
            file.set_modified(time).unwrap();
        }
        sweep(folder.path());
        assert_eq!(names(folder.path()), [".sd-rs-new.part", "mine.part"]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_told_and_devices_stay_devices() {
        for existing in [Existing::Refuse, Existing::Overwrite] {
            let full = Path::new("/dev/full");
            check(full, existing).unwrap();
            let error = write(full, b"x", existing).unwrap_err();
            assert!(
                matches!(&error, Error::Disk { source, .. } if source.kind() == io::ErrorKind::StorageFull)
            );
            write(Path::new("/dev/null"), b"x", existing).unwrap();
            assert!(is_special(Path::new("/dev/null")));
        }
    }

    #[cfg(unix)]
    #[test]
    fn permissions_and_links_are_kept() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let (plain, ours) = (folder.path().join("plain"), folder.path().join("ours.png"));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        fs::write(&plain, b"").unwrap();
        write(&ours, b"1", Existing::Refuse).unwrap();
        assert_eq!(mode(&ours), mode(&plain));

        fs::set_permissions(&ours, fs::Permissions::from_mode(0o640)).unwrap();
        let link = folder.path().join("link.png");
        symlink(&ours, &link).unwrap();
        write(&link, b"2", Existing::Overwrite).unwrap();
        assert_eq!(fs::read(&ours).unwrap(), b"2");
        assert_eq!(mode(&ours), 0o640);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());

        let dangling = folder.path().join("dangling.png");
        symlink(folder.path().join("nowhere"), &dangling).unwrap();
        assert!(check(&dangling, Existing::Refuse).is_err());
    }
}
