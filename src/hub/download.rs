//! One file's way into `blobs/`: locked, resumed, measured, hashed, and only then named.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::cache::{Cache, Hasher, create_folder};
use super::client::{Answer, Client, Part};
use super::name::RepoName;
use super::refusal::{Failure, Try};
use super::{Event, Listener};
use crate::checkpoint::printable;
use crate::error::{Error, Result};

/// How much is read at a time, in bytes.
const CHUNK: usize = 1 << 18;
/// Who has got this much further may fail as often again, in bytes.
const PROGRESS: u64 = 1 << 20;
/// The least that must come in six times the timeout, in bytes: less is a stream that will not end.
const LEAST: u64 = 64 << 10;

/// Where files come from and go to.
pub(super) struct Job<'a> {
    pub(super) client: &'a Client<'a>,
    pub(super) cache: &'a Cache,
    pub(super) repo: &'a RepoName,
    pub(super) commit: &'a str,
    pub(super) listener: &'a dyn Listener,
    pub(super) timeout: Duration,
}

/// A file whose size and blob are known.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) path: String,
    pub(super) size: u64,
    pub(super) etag: String,
}

/// An unfinished blob.
struct Partial {
    path: PathBuf,
    file: File,
    len: u64,
    hasher: Hasher,
}

impl Job<'_> {
    /// Sees to it that the blob is there. What is there already in the right size is not fetched again.
    pub(super) fn fetch(&self, wanted: &Wanted) -> Result<()> {
        let blob = self.cache.blob(self.repo, &wanted.etag);
        if is_whole(&blob, wanted) {
            self.listener.event(Event::Bytes(wanted.size));
            return Ok(());
        }
        create_folder(blob.parent().unwrap_or(&blob))?;
        let _lock = self.lock(wanted)?;
        if is_whole(&blob, wanted) {
            self.listener.event(Event::Bytes(wanted.size));
            return Ok(()); // whoever had the lock has fetched it
        }
        let part = self.fill(wanted)?;
        part.file
            .sync_all()
            .and_then(|()| fs::rename(&part.path, &blob))
            .map_err(|e| Error::disk(&blob, "write", e))?;
        let _ = fs::remove_file(validator_path(&part.path));
        // the name itself reaches the disk with the folder; where folders cannot be synced there is nothing to do
        if let Some(Ok(folder)) = blob.parent().map(File::open) {
            let _ = folder.sync_all();
        }
        Ok(())
    }

    fn lock(&self, wanted: &Wanted) -> Result<File> {
        let mut told = false;
        loop {
            if let Some(lock) = self.cache.try_lock(self.repo, &wanted.etag)? {
                return Ok(lock);
            }
            if self.listener.stopped() {
                return Err(Error::Interrupted);
            }
            if !told {
                self.listener.event(Event::Waiting(&wanted.path));
                told = true;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Fetches until the partial file is whole and right.
    fn fill(&self, wanted: &Wanted) -> Result<Partial> {
        let mut part = self.open(wanted)?;
        self.listener.event(Event::Bytes(part.len));
        let (mut tries, mut best, mut spoiled) = (0, part.len, false);
        loop {
            let done = match part.len == wanted.size {
                true => Ok(()),
                false => self.stream(wanted, &mut part),
            };
            if done.is_ok() {
                let whole = part.hasher.finish();
                if whole == wanted.etag {
                    part.hasher = Hasher::new(&wanted.etag, 0);
                    return Ok(part);
                }
                part.hasher = Hasher::new(&wanted.etag, wanted.size);
                self.restart(wanted, &mut part)?;
                if spoiled {
                    let _ = fs::remove_file(&part.path);
                    return Err(corrupt(wanted, &whole));
                }
                spoiled = true; // what an earlier run left may have been at fault
                continue;
            }
            match done {
                Ok(()) => {}
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(error, wait)) => {
                    if part.len >= best + PROGRESS {
                        (tries, best) = (0, part.len);
                    }
                    tries += 1;
                    self.client.pause(tries, error, wait, self.listener)?;
                }
            }
        }
    }

    /// Opens what an earlier run left, and hashes it.
    fn open(&self, wanted: &Wanted) -> Result<Partial> {
        let mut path = self.cache.blob(self.repo, &wanted.etag).into_os_string();
        path.push(".incomplete");
        let path = PathBuf::from(path);
        let failed = |e| Error::disk(&path, "write", e);
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        let mut hasher = Hasher::new(&wanted.etag, wanted.size);
        let mut len = file.metadata().map_err(failed)?.len();
        if len > wanted.size {
            file.set_len(0).map_err(failed)?;
            len = 0;
        }
        let mut chunk = vec![0; CHUNK];
        loop {
            if self.listener.stopped() {
                return Err(Error::Interrupted);
            }
            match file.read(&mut chunk).map_err(failed)? {
                0 => break,
                count => hasher.update(chunk.get(..count).unwrap_or_default()),
            }
        }
        Ok(Partial {
            path,
            file,
            len,
            hasher,
        })
    }

    /// Throws away what is there.
    fn restart(&self, wanted: &Wanted, part: &mut Partial) -> Result<()> {
        let failed = |e| Error::disk(&part.path, "write", e);
        part.file.set_len(0).map_err(failed)?;
        part.file.seek(SeekFrom::Start(0)).map_err(failed)?;
        self.listener.event(Event::Lost(part.len));
        part.len = 0;
        part.hasher = Hasher::new(&wanted.etag, wanted.size);
        let _ = fs::remove_file(validator_path(&part.path));
        Ok(())
    }

    /// Asks for the rest and appends what comes.
    fn stream(&self, wanted: &Wanted, part: &mut Partial) -> Try<()> {
        let validator = fs::read_to_string(validator_path(&part.path)).ok();
        let asked = Part {
            from: part.len,
            etag: &wanted.etag,
            validator: validator.as_deref(),
        };
        let mut answer = self
            .client
            .file(self.repo, self.commit, &wanted.path, asked)?;
        self.check(wanted, &answer, part)?;
        if part.len == 0 {
            self.remember(&answer, &part.path);
        }
        let mut reader = answer.body.as_reader();
        let mut chunk = vec![0; CHUNK];
        let mut watch = Watch::new(self.timeout * 6, Instant::now());
        while part.len < wanted.size {
            if self.listener.stopped() {
                return Err(Failure::Final(Error::Interrupted));
            }
            let count = match reader.read(&mut chunk) {
                Ok(0) => return Err(self.short(wanted, part.len, "the connection ended")),
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.short(wanted, part.len, &printable(&e.to_string()))),
            };
            if part.len + count as u64 > wanted.size {
                self.restart(wanted, part).map_err(Failure::Final)?;
                return Err(self.sized(wanted, "more bytes"));
            }
            let bytes = chunk.get(..count).unwrap_or_default();
            part.file
                .write_all(bytes)
                .map_err(|e| Failure::Final(Error::disk(&part.path, "write", e)))?;
            part.hasher.update(bytes);
            part.len += count as u64;
            self.listener.event(Event::Bytes(count as u64));
            if !watch.goes_on(count as u64, Instant::now()) {
                return Err(self.short(wanted, part.len, "almost nothing comes"));
            }
        }
        // reading to the end gives the connection back, and shows what is too much
        match reader.read(&mut chunk) {
            Ok(count) if count > 0 => {
                self.restart(wanted, part).map_err(Failure::Final)?;
                Err(self.sized(wanted, "more bytes"))
            }
            _ => Ok(()),
        }
    }

    /// Looks at an answer before a byte of it is kept.
    fn check(&self, wanted: &Wanted, answer: &Answer, part: &mut Partial) -> Try<()> {
        let path = printable(&wanted.path);
        let fatal = |text: String| Err(Failure::Final(Error::Network(text)));
        if let Some(commit) = answer
            .hub_header("x-repo-commit")
            .filter(|commit| *commit != self.commit)
        {
            return fatal(format!(
                "the server sends `{path}` of commit {}, expected {}; try again",
                printable(commit),
                self.commit
            ));
        }
        let kind = answer.header("content-type");
        if kind.starts_with("text/html") && !wanted.path.ends_with(".html") {
            return fatal(format!(
                "a web page came in place of `{path}`; check the proxy, or whether this network wants a login"
            ));
        }
        if let Some(etag) = answer
            .etag()
            .filter(|etag| *etag != wanted.etag && answer.hub_header("x-linked-etag").is_some())
        {
            self.restart(wanted, part).map_err(Failure::Final)?;
            return fatal(format!(
                "`{path}` has changed on the server (it is `{}` now, expected `{}`); try again",
                printable(&etag),
                wanted.etag
            ));
        }
        match answer.status {
            206 => match range(answer.header("content-range")) {
                Some((from, total)) if from == part.len && total == wanted.size => Ok(()),
                _ => {
                    self.restart(wanted, part).map_err(Failure::Final)?;
                    Err(self.sized(wanted, "another part"))
                }
            },
            416 => {
                self.restart(wanted, part).map_err(Failure::Final)?;
                Err(self.sized(wanted, "no such part"))
            }
            // no range was asked for, or the server knows none, or its file has changed: from the beginning
            _ => {
                if part.len > 0 {
                    self.restart(wanted, part).map_err(Failure::Final)?;
                }
                match answer.header("content-length").parse::<u64>() {
                    Ok(length) if length != wanted.size => {
                        Err(self.sized(wanted, &format!("{length} bytes")))
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    /// Keeps what the storage calls its copy, so that a later run resumes only that.
    fn remember(&self, answer: &Answer, part: &Path) {
        let validator = answer.header("etag");
        let strong = validator.starts_with('"') && validator.len() > 2;
        if answer.elsewhere && strong {
            let _ = fs::write(validator_path(part), validator);
        }
    }

    fn short(&self, wanted: &Wanted, len: u64, reason: &str) -> Failure {
        let path = printable(&wanted.path);
        let text = format!(
            "`{path}` broke off after {len} of {} bytes ({reason}); what is here is kept, try again later",
            wanted.size
        );
        Failure::Passing(Error::Network(text), None)
    }

    fn sized(&self, wanted: &Wanted, what: &str) -> Failure {
        let path = printable(&wanted.path);
        let text = format!(
            "the server sends {what} of `{path}`, expected {} bytes as it lists them; try again later",
            wanted.size
        );
        Failure::Passing(Error::Network(text), None)
    }
}

fn corrupt(wanted: &Wanted, found: &str) -> Error {
    let path = printable(&wanted.path);
    Error::Network(format!(
        "`{path}` came damaged twice: its hash is {found}, expected {}; nothing of it is kept, try again later",
        wanted.etag
    ))
}

fn is_whole(blob: &Path, wanted: &Wanted) -> bool {
    fs::metadata(blob).is_ok_and(|about| about.is_file() && about.len() == wanted.size)
}

fn validator_path(part: &Path) -> PathBuf {
    let mut path = part.as_os_str().to_owned();
    path.push(".etag");
    PathBuf::from(path)
}

/// Of `bytes 5-9/10`: 5 and 10.
fn range(header: &str) -> Option<(u64, u64)> {
    let (span, total) = header.strip_prefix("bytes ")?.split_once('/')?;
    Some((span.split_once('-')?.0.parse().ok()?, total.parse().ok()?))
}

/// Sees to it that a stream gets on: one byte a second keeps a connection open for ever.
struct Watch {
    window: Duration,
    since: Instant,
    bytes: u64,
}

impl Watch {
    fn new(window: Duration, now: Instant) -> Self {
        Self {
            window,
            since: now,
            bytes: 0,
        }
    }

    /// Counts bytes; false when too few have come in a whole window.
    fn goes_on(&mut self, bytes: u64, now: Instant) -> bool {
        self.bytes += bytes;
        if now.duration_since(self.since) < self.window {
            return true;
        }
        let enough = self.bytes >= LEAST;
        (self.since, self.bytes) = (now, 0);
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dribble_is_told_from_a_slow_line() {
        let start = Instant::now();
        let second = |s: u64| start + Duration::from_secs(s);
        let mut watch = Watch::new(Duration::from_secs(10), start);
        assert!((1..10).all(|s| watch.goes_on(1, second(s))));
        assert!(!watch.goes_on(1, second(10)));
        assert!((11..40).all(|s| watch.goes_on(LEAST / 8, second(s))));
    }

    #[test]
    fn ranges_are_read() {
        assert_eq!(range("bytes 5-9/10"), Some((5, 10)));
        for odd in ["", "bytes */10", "bytes 5-9/*", "items 5-9/10"] {
            assert_eq!(range(odd), None, "{odd}");
        }
    }
}
