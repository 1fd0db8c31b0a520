//! A repository into the cache: asked about, planned, fetched four files at a time, and only when all is there, named.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::cache::Cache;
use super::client::Client;
use super::download::{Job, Wanted};
use super::listing::Listing;
use super::name::RepoName;
use super::plan::{Plan, Remote, is_complete, plan};
use super::settings::Settings;
use super::{Event, Listener};
use crate::checkpoint::printable;
use crate::error::{Error, Result};

/// Files that are fetched at once.
const AT_ONCE: usize = 4;

/// A repository, or a file of one, that is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// The snapshot's folder, or the one file in it.
    pub path: PathBuf,
    /// The commit.
    pub commit: String,
}

/// What the model needs, by the Hub's listing; nothing is fetched.
///
/// # Errors
/// As [`pull`].
pub fn preview(
    settings: &Settings,
    name: &RepoName,
    variant: Option<&str>,
    listener: &dyn Listener,
) -> Result<Plan> {
    online(settings, name)?;
    let listing = Client::new(settings)?.listing(name, listener)?;
    plan(name, &listing.files, variant)
}

/// Fetches what the model needs and is not here yet, and gives its place. `variant` is a precision that is wanted, such as `fp16`.
///
/// # Errors
/// [`Error::NotFound`] when the Hub has no such repository or file, or when it is not here and the Hub may not be asked;
/// [`Error::Network`] when it does not answer, refuses, or sends something else; [`Error::Disk`]; [`Error::Interrupted`].
pub fn pull(
    settings: &Settings,
    name: &RepoName,
    variant: Option<&str>,
    listener: &dyn Listener,
) -> Result<Pulled> {
    if settings.offline
        && let Some(found) = cached(settings, name, true)
    {
        return Ok(found);
    }
    online(settings, name)?;
    let client = Client::new(settings)?;
    let listing = client.listing(name, listener)?;
    if listing.id != name.id() {
        listener.event(Event::Note(&format!(
            "{} is called {} now",
            name.id(),
            printable(&listing.id)
        )));
    }
    let plan = plan(name, &listing.files, variant)?;
    let wanted = complete(&client, name, &listing, &plan, listener)?;
    let bytes = wanted.iter().map(|file| file.size).sum();
    listener.event(Event::Planned {
        files: wanted.len(),
        bytes,
    });
    let cache = Cache::new(&settings.cache);
    let job = Job {
        client: &client,
        cache: &cache,
        repo: name,
        commit: &listing.commit,
        listener,
        timeout: settings.timeout,
    };
    fetch_all(&job, &wanted)?;
    for file in &wanted {
        cache.link(name, &listing.commit, &file.path, &file.etag)?;
    }
    cache.set_commit(name, &listing.commit)?;
    let mut path = cache.snapshot(name, &listing.commit);
    path.extend(&plan.single);
    Ok(Pulled {
        path,
        commit: listing.commit,
    })
}

/// What is here already and is whole. Without `alone` a single file counts only when it was asked for by name: the Hub may have others.
pub fn cached(settings: &Settings, name: &RepoName, alone: bool) -> Option<Pulled> {
    let cache = Cache::new(&settings.cache);
    let commit = cache.commit(name)?;
    let snapshot = cache.snapshot(name, &commit);
    let files: Vec<Remote> = cache
        .files(name, &commit)
        .into_iter()
        .map(|(path, size)| Remote {
            path,
            size: Some(size),
            etag: None,
        })
        .collect();
    let plan = plan(name, &files, None).ok()?;
    if let Some(file) = &plan.single {
        let sure = alone || name.file().is_some();
        return sure.then(|| Pulled {
            path: snapshot.join(file),
            commit,
        });
    }
    let text = std::fs::read(snapshot.join("model_index.json")).ok()?;
    let index = serde_json::from_slice(&text).ok()?;
    let paths: Vec<&str> = plan.files.iter().map(|file| file.path.as_str()).collect();
    is_complete(&index, &paths).then_some(Pulled {
        path: snapshot,
        commit,
    })
}

/// Refuses when the Hub may not be asked.
fn online(settings: &Settings, name: &RepoName) -> Result<()> {
    if !settings.offline {
        return Ok(());
    }
    let cache = Cache::new(&settings.cache);
    let hint = match cache.commit(name) {
        None => format!(
            "it is not in the cache {} and HF_HUB_OFFLINE forbids to ask the Hub; unset it",
            settings.cache.display()
        ),
        Some(commit) => {
            let files = cache.files(name, &commit).len();
            format!(
                "the cache {} has {files} of its files, not all that are needed, and HF_HUB_OFFLINE forbids to ask the Hub; unset it",
                settings.cache.display()
            )
        }
    };
    Err(Error::NotFound {
        what: name.to_string(),
        hint,
    })
}

/// The planned files with size and etag; those that the listing did not tell are asked for one by one.
fn complete(
    client: &Client<'_>,
    name: &RepoName,
    listing: &Listing,
    plan: &Plan,
    listener: &dyn Listener,
) -> Result<Vec<Wanted>> {
    let mut wanted = Vec::new();
    for file in &plan.files {
        let known = match (&file.etag, file.size) {
            (Some(_), Some(_)) => file.clone(),
            _ => client.about(name, &listing.commit, &file.path, listener)?,
        };
        let (Some(etag), Some(size)) = (known.etag, known.size) else {
            return Err(Error::Network(format!(
                "the server tells neither hash nor size of `{}`; what it sends could not be checked",
                printable(&file.path)
            )));
        };
        wanted.push(Wanted {
            path: file.path.clone(),
            size,
            etag,
        });
    }
    // two files of one content are one blob, whose size cannot be two numbers
    let mut sizes: BTreeMap<&str, u64> = BTreeMap::new();
    for file in &wanted {
        if *sizes.entry(&file.etag).or_insert(file.size) != file.size {
            return Err(Error::Network(format!(
                "the server gives two sizes for one content, `{}`; nothing is fetched",
                printable(&file.path)
            )));
        }
    }
    Ok(wanted)
}

/// Fetches the files, the largest first; the first failure stops the rest.
fn fetch_all(job: &Job<'_>, wanted: &[Wanted]) -> Result<()> {
    let mut order: Vec<&Wanted> = wanted.iter().collect();
    order.sort_by_key(|file| std::cmp::Reverse(file.size));
    let stop = Stopping {
        inner: job.listener,
        failed: AtomicBool::new(false),
    };
    let (next, first) = (AtomicUsize::new(0), Mutex::new(None));
    let work = || {
        let job = Job {
            listener: &stop,
            ..*job
        };
        while let Some(file) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            if stop.stopped() {
                return;
            }
            if let Err(error) = job.fetch(file) {
                let mut first = first
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                // whoever is stopped by another's failure must not speak in its place
                if !stop.failed.swap(true, Ordering::SeqCst) {
                    *first = Some(error);
                }
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(order.len()) {
            scope.spawn(work);
        }
    });
    match first
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
    {
        Some(error) => Err(error),
        None if job.listener.stopped() => Err(Error::Interrupted),
        None => Ok(()),
    }
}

/// A listener that also stops when another file has failed.
struct Stopping<'a> {
    inner: &'a dyn Listener,
    failed: AtomicBool,
}

impl Listener for Stopping<'_> {
    fn stopped(&self) -> bool {
        self.failed.load(Ordering::SeqCst) || self.inner.stopped()
    }

    fn event(&self, event: Event<'_>) {
        self.inner.event(event);
    }
}
