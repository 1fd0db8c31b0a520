//! The Hub's client and the models folder, against a Hub on this machine that behaves and misbehaves.

/// The commands as a user runs them, and what `--model` takes.
mod commands;
/// Whatever a server can do wrong, and what is left on disk then.
mod faults;
/// Repositories fetched from a server that behaves: layout, resuming, locks, sharing.
mod pull;
/// The server.
mod server;

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use sd_rs::hub::{Event, Listener, Pulled, RepoName, Settings, Token, pull};
use server::Hub;

use crate::support::Dir;

/// The token in these tests; nobody but the Hub may see it.
const TOKEN: &str = "hf_secretsecret";

/// A server, a cache, and what is said.
struct Stage {
    hub: Hub,
    dir: Dir,
    settings: Settings,
    said: Said,
}

/// Remembers what it is told, and stops after so many bytes.
#[derive(Default)]
struct Said {
    lines: Mutex<Vec<String>>,
    bytes: Mutex<u64>,
    stop_after: Option<u64>,
}

impl Listener for Said {
    fn stopped(&self) -> bool {
        self.stop_after
            .is_some_and(|most| *self.bytes.lock().unwrap() >= most)
    }

    fn event(&self, event: Event<'_>) {
        match &event {
            Event::Bytes(bytes) => *self.bytes.lock().unwrap() += bytes,
            Event::Lost(bytes) => *self.bytes.lock().unwrap() -= bytes,
            _ => self.lines.lock().unwrap().push(format!("{event:?}")),
        }
    }
}

impl Said {
    fn has(&self, words: &str) -> bool {
        self.lines
            .lock()
            .unwrap()
            .iter()
            .any(|line| line.contains(words))
    }
}

impl Stage {
    fn new() -> Self {
        let (hub, dir) = (Hub::new(), Dir::new());
        let settings = Settings {
            endpoint: hub.endpoint(),
            cache: dir.path("hf/hub"),
            token: Token::new(TOKEN).unwrap(),
            offline: false,
            timeout: Duration::from_secs(5),
            backoff: Duration::from_millis(1),
            certificates: None,
        };
        Self {
            hub,
            dir,
            settings,
            said: Said::default(),
        }
    }

    fn pull(&self, name: &str) -> sd_rs::Result<Pulled> {
        pull(
            &self.settings,
            &RepoName::parse(name).unwrap(),
            None,
            &self.said,
        )
    }

    /// Pulls, and expects it to fail with these words, in one line.
    fn fails(&self, name: &str, words: &str) {
        let error = self.pull(name).expect_err(words).to_string();
        assert!(error.contains(words), "expected `{words}`: {error}");
        assert!(!error.contains('\n') && !error.contains(TOKEN), "{error}");
    }

    /// The files below the repository's folder.
    fn files(&self, id: &str) -> Vec<String> {
        let root = self
            .settings
            .cache
            .join(format!("models--{}", id.replace('/', "--")));
        let mut found = Vec::new();
        walk(&root, &root, &mut found);
        found.sort();
        found
    }

    fn blob(&self, id: &str, etag: &str) -> PathBuf {
        self.settings
            .cache
            .join(format!("models--{}/blobs/{etag}", id.replace('/', "--")))
    }
}

fn walk(root: &Path, folder: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.symlink_metadata().unwrap().is_dir() {
            walk(root, &path, found);
        } else {
            found.push(
                path.strip_prefix(root)
                    .unwrap()
                    .to_string_lossy()
                    .into_owned(),
            );
        }
    }
}

/// Bytes that no part of is like another.
fn content(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next)
        .flatten()
        .take(length)
        .collect()
}
