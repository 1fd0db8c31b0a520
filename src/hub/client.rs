//! Speaking to the Hub: a repository's listing, a file's stream. Redirects are followed here, hop by hop, so that the token goes to the
//! Hub's own address and nowhere else.

use std::io::Read;
use std::time::{Duration, Instant};

use ureq::http::{HeaderMap, Method, Request};
use ureq::{Agent, Body};

use super::agent::{agent, unreached};
use super::listing::{Listing, read_listing, strange_etag};
use super::name::{RepoName, is_etag};
use super::plan::Remote;
use super::refusal::{Asked, Failure, Refusal, Try, failure};
use super::settings::Settings;
use super::url::{Url, encode};
use super::{Event, Listener};
use crate::checkpoint::printable;
use crate::error::{Error, Result};

/// How often an answer may lead elsewhere.
const MAX_HOPS: usize = 10;
/// The largest listing that is read, in bytes.
const MAX_LISTING: u64 = 64 << 20;
/// How often something is tried without getting further.
pub(super) const ATTEMPTS: u32 = 5;
/// The longest pause that a server may ask for; beyond it the user decides.
const MAX_WAIT: Duration = Duration::from_secs(120);

/// An HTTP client with its settings.
pub(super) struct Client<'a> {
    agent: Agent,
    settings: &'a Settings,
    endpoint: Url,
}

/// Which part of a file is wanted.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Part<'a> {
    /// Bytes that are here already.
    pub(super) from: u64,
    /// The blob that they are of, for `If-Range` at the Hub itself.
    pub(super) etag: &'a str,
    /// What the storage behind the Hub called its copy, for `If-Range` there.
    pub(super) validator: Option<&'a str>,
}

/// An answer that is no redirect, and what was said on the way to it.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) body: Body,
    /// The headers of the Hub's own answers, the first one first.
    hub: Vec<HeaderMap>,
    /// Whether another host gave the last answer.
    pub(super) elsewhere: bool,
}

impl Answer {
    /// A header of the last answer; empty when it is not there.
    pub(super) fn header(&self, name: &str) -> &str {
        header(&self.headers, name)
    }

    /// A header that the Hub itself gave.
    pub(super) fn hub_header(&self, name: &str) -> Option<&str> {
        self.hub
            .iter()
            .map(|headers| header(headers, name))
            .find(|value| !value.is_empty())
    }

    /// The etag that the Hub gives the file: `X-Linked-Etag`, or `ETag` where it sends the file itself.
    pub(super) fn etag(&self) -> Option<String> {
        let own = || (!self.elsewhere).then(|| self.header("etag"));
        let raw = self.hub_header("x-linked-etag").or_else(own)?;
        let etag = bare(raw);
        (!etag.is_empty()).then(|| etag.to_owned())
    }
}

impl<'a> Client<'a> {
    /// A client for these settings; no connection is opened yet.
    pub(super) fn new(settings: &'a Settings) -> Result<Self> {
        let endpoint = Url::parse(&settings.endpoint)
            .map_err(|reason| Error::Network(format!("HF_ENDPOINT: {reason}")))?;
        Ok(Self {
            agent: agent(settings, &endpoint)?,
            settings,
            endpoint,
        })
    }

    /// What a repository holds.
    pub(super) fn listing(&self, repo: &RepoName, listener: &dyn Listener) -> Result<Listing> {
        let revision = encode(repo.revision(), "");
        let address = format!(
            "{}/api/models/{}/revision/{revision}?blobs=true",
            self.settings.endpoint,
            repo.id()
        );
        self.retry(listener, || {
            let mut answer = self.ask(&Method::GET, &address, repo, None, Part::default())?;
            let mut text = Vec::new();
            let reader = answer.body.as_reader().take(MAX_LISTING + 1);
            read_all(reader, &mut text, listener).map_err(|e| self.broken(repo, &e))?;
            if text.len() as u64 > MAX_LISTING {
                return Err(Failure::Final(Error::Network(format!(
                    "the listing of {repo} is larger than {MAX_LISTING} bytes; it is not read"
                ))));
            }
            read_listing(&self.settings.endpoint, repo, &text).map_err(Failure::Final)
        })
    }

    /// Size and etag of a file that the listing says nothing of.
    pub(super) fn about(
        &self,
        repo: &RepoName,
        commit: &str,
        path: &str,
        listener: &dyn Listener,
    ) -> Result<Remote> {
        let address = self.address(repo, commit, path);
        self.retry(listener, || {
            let answer = self.ask(&Method::HEAD, &address, repo, Some(path), Part::default())?;
            let linked = answer
                .hub_header("x-linked-size")
                .and_then(|size| size.parse().ok());
            let size = linked.or_else(|| answer.header("content-length").parse().ok());
            let etag = answer.etag();
            if let Some(etag) = etag.as_deref().filter(|etag| !is_etag(etag)) {
                return Err(Failure::Final(strange_etag(path, etag)));
            }
            Ok(Remote {
                path: path.to_owned(),
                size,
                etag,
            })
        })
    }

    /// The stream of a file, or of its rest. The caller looks at the status: 200, 206 or 416.
    pub(super) fn file(
        &self,
        repo: &RepoName,
        commit: &str,
        path: &str,
        part: Part<'_>,
    ) -> Try<Answer> {
        self.ask(
            &Method::GET,
            &self.address(repo, commit, path),
            repo,
            Some(path),
            part,
        )
    }

    fn address(&self, repo: &RepoName, commit: &str, path: &str) -> String {
        format!(
            "{}/{}/resolve/{commit}/{}",
            self.settings.endpoint,
            repo.id(),
            encode(path, "/")
        )
    }

    /// Tries until it works, fails for good, or has failed too often or too long; the pauses double, or are as long as the server asks for.
    pub(super) fn retry<T>(
        &self,
        listener: &dyn Listener,
        mut what: impl FnMut() -> Try<T>,
    ) -> Result<T> {
        let (mut tries, start) = (0, Instant::now());
        loop {
            match what() {
                Ok(done) => return Ok(done),
                Err(Failure::Final(error)) => return Err(error),
                // who waits for a first word should not wait long
                Err(Failure::Passing(error, None)) if start.elapsed() >= self.settings.timeout => {
                    return Err(error);
                }
                Err(Failure::Passing(error, wait)) => {
                    tries += 1;
                    self.pause(tries, error, wait, listener)?;
                }
            }
        }
    }

    /// Waits before another try, or gives up with the error.
    pub(super) fn pause(
        &self,
        tries: u32,
        error: Error,
        wait: Option<Duration>,
        listener: &dyn Listener,
    ) -> Result<()> {
        if tries >= ATTEMPTS || wait.is_some_and(|wait| wait > MAX_WAIT) {
            return Err(error);
        }
        let doubled = self.settings.backoff * 2u32.pow(tries - 1);
        // half of it is by chance, so that many clients do not come back at once
        let chance = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |t| t.subsec_micros() % 1000);
        let wait = wait.unwrap_or(doubled / 2 + doubled / 2 * chance / 1000);
        listener.event(Event::Retrying(&error.to_string(), wait));
        let end = Instant::now() + wait;
        loop {
            if listener.stopped() {
                return Err(Error::Interrupted);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }

    /// Asks, and follows where the answers lead. Everything but 2xx and 416 is a failure.
    fn ask(
        &self,
        method: &Method,
        address: &str,
        repo: &RepoName,
        file: Option<&str>,
        part: Part<'_>,
    ) -> Try<Answer> {
        let bad = |reason: String| {
            Failure::Final(Error::Network(format!(
                "{} sends {repo} to another place: {reason}; it is not followed",
                self.endpoint.host()
            )))
        };
        let mut url = Url::parse(address).map_err(bad)?;
        let mut hub = Vec::new();
        for _ in 0..MAX_HOPS {
            let at_home = url.same_origin(&self.endpoint);
            let request = self.request(method, &url, at_home, part).map_err(|e| {
                Failure::Final(Error::Network(format!(
                    "{address} cannot be asked for: {e}"
                )))
            })?;
            let answer = self
                .agent
                .run(request)
                .map_err(|e| unreached(self.settings, &url, &e))?;
            let (head, body) = answer.into_parts();
            let status = head.status.as_u16();
            if at_home {
                hub.push(head.headers.clone());
            }
            if matches!(status, 301 | 302 | 303 | 307 | 308) {
                let location = header(&head.headers, "location");
                // a file's own headers come with the redirect: who only wants those need not go on to the storage
                if method == Method::HEAD && at_home && head.headers.contains_key("x-linked-etag") {
                    return Ok(Answer {
                        status,
                        headers: head.headers,
                        body,
                        hub,
                        elsewhere: true,
                    });
                }
                url = url.join(location).map_err(bad)?;
                continue;
            }
            let answer = Answer {
                status,
                headers: head.headers,
                body,
                hub,
                elsewhere: !at_home,
            };
            return match status {
                200..=299 | 416 => Ok(answer),
                _ => Err(self.refused(repo, file, &answer, at_home)),
            };
        }
        Err(bad(format!("more than {MAX_HOPS} times, in a circle")))
    }

    fn request(
        &self,
        method: &Method,
        url: &Url,
        at_home: bool,
        part: Part<'_>,
    ) -> std::result::Result<Request<()>, ureq::http::Error> {
        let mut request = Request::builder().method(method).uri(url.uri());
        if let Some(token) = self.settings.token.as_ref().filter(|_| at_home) {
            request = request.header("authorization", token.bearer());
        }
        if part.from > 0 {
            request = request.header("range", format!("bytes={}-", part.from));
            let own = format!("\"{}\"", part.etag);
            match part.validator {
                _ if at_home => request = request.header("if-range", own),
                Some(validator) => request = request.header("if-range", validator),
                None => {}
            }
        }
        request.body(())
    }

    fn refused(
        &self,
        repo: &RepoName,
        file: Option<&str>,
        answer: &Answer,
        at_home: bool,
    ) -> Failure {
        // the storage behind the Hub speaks of its own matters: its 403 is a link that has grown old, and a new one is made by asking again
        if !at_home && matches!(answer.status, 400..=499) {
            let text = format!(
                "the storage behind {} refuses {} (status {})",
                self.endpoint.host(),
                printable(file.unwrap_or("")),
                answer.status
            );
            return Failure::Passing(Error::Network(format!("{text}; try again later")), None);
        }
        let wait = answer
            .header("retry-after")
            .trim()
            .parse()
            .ok()
            .map(Duration::from_secs);
        let asked = Asked {
            repo,
            endpoint: &self.settings.endpoint,
            file,
            token: self.settings.token.is_some(),
        };
        let refusal = Refusal {
            status: answer.status,
            code: answer.header("x-error-code"),
            message: answer.header("x-error-message"),
            wait,
        };
        failure(&asked, &refusal)
    }

    /// The connection broke while an answer was read.
    fn broken(&self, repo: &RepoName, error: &std::io::Error) -> Failure {
        if error.kind() == std::io::ErrorKind::Interrupted {
            return Failure::Final(Error::Interrupted);
        }
        Failure::Passing(
            Error::Network(format!(
                "{} broke off while it listed {repo}: {error}; try again later",
                self.endpoint.host()
            )),
            None,
        )
    }
}

/// Reads to the end, and stops when the user wants to: then the error's kind is `Interrupted`.
fn read_all(
    mut reader: impl Read,
    text: &mut Vec<u8>,
    listener: &dyn Listener,
) -> std::io::Result<()> {
    let mut chunk = vec![0; 1 << 16];
    loop {
        if listener.stopped() {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
        match reader.read(&mut chunk)? {
            0 => return Ok(()),
            count => text.extend_from_slice(chunk.get(..count).unwrap_or_default()),
        }
    }
}

fn header<'h>(headers: &'h HeaderMap, name: &str) -> &'h str {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("")
}

/// An etag without quotes and without the sign of a weak one.
fn bare(etag: &str) -> &str {
    etag.trim().trim_start_matches("W/").trim_matches('"')
}
