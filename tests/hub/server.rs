//! A Hub on this machine, with a storage behind it on another port: it behaves, and it misbehaves when told to.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use sha1::Digest;

/// The commit of every repository here.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// Whether it came to the storage behind the Hub.
    pub(crate) storage: bool,
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: BTreeMap<String, String>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// Whether it asks for the content of a file.
    pub(crate) fn is_file(&self) -> bool {
        self.storage || self.path.contains("/resolve/")
    }
}

/// An answer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// The connection is closed after so many bytes of the body.
    pub(crate) cut: Option<usize>,
    /// Nothing more comes after so many bytes; the connection stays open for this long.
    pub(crate) stall: Option<(usize, Duration)>,
    /// No length is told: the body comes in chunks.
    pub(crate) chunked: bool,
    /// Before the answer.
    pub(crate) delay: Duration,
}

impl Reply {
    pub(crate) fn new(status: u16) -> Self {
        Self {
            status,
            ..Self::default()
        }
    }

    pub(crate) fn with<T: std::fmt::Display>(mut self, name: &str, value: T) -> Self {
        self.headers.retain(|(key, _)| key != name);
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }

    pub(crate) fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }
}

/// A repository: its files, and which of them lie in the storage.
#[derive(Debug, Clone, Default)]
pub(crate) struct Repo {
    pub(crate) files: BTreeMap<String, Vec<u8>>,
}

type Change = Box<dyn FnMut(&mut Value) + Send>;
type Hook = Box<dyn FnMut(&Request, Reply) -> Reply + Send>;

#[derive(Default)]
struct State {
    hub: Mutex<String>,
    storage: Mutex<String>,
    repos: Mutex<BTreeMap<String, Repo>>,
    log: Mutex<Vec<Request>>,
    hook: Mutex<Option<Hook>>,
    listing: Mutex<Option<Change>>,
    open: AtomicUsize,
    most: AtomicUsize,
    stop: AtomicBool,
}

/// The server; ends with the value.
pub(crate) struct Hub {
    state: Arc<State>,
}

impl Hub {
    pub(crate) fn new() -> Self {
        let state = Arc::new(State::default());
        for storage in [false, true] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = format!("http://{}", listener.local_addr().unwrap());
            *if storage { &state.storage } else { &state.hub }
                .lock()
                .unwrap() = address;
            let state = Arc::clone(&state);
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    if state.stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let state = Arc::clone(&state);
                    std::thread::spawn(move || {
                        let _ = serve(&state, stream.unwrap(), storage);
                    });
                }
            });
        }
        Self { state }
    }

    pub(crate) fn endpoint(&self) -> String {
        self.state.hub.lock().unwrap().clone()
    }

    pub(crate) fn storage(&self) -> String {
        self.state.storage.lock().unwrap().clone()
    }

    /// Adds a repository of these files. Those that end in `.safetensors` lie in the storage.
    pub(crate) fn add(&self, id: &str, files: &[(&str, &[u8])]) {
        let files = files
            .iter()
            .map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec()))
            .collect();
        self.state
            .repos
            .lock()
            .unwrap()
            .insert(id.to_owned(), Repo { files });
    }

    /// From now on every answer goes through `hook`.
    pub(crate) fn hook(&self, hook: impl FnMut(&Request, Reply) -> Reply + Send + 'static) {
        *self.state.hook.lock().unwrap() = Some(Box::new(hook));
    }

    pub(crate) fn behave(&self) {
        *self.state.hook.lock().unwrap() = None;
        *self.state.listing.lock().unwrap() = None;
    }

    /// From now on listings are changed by `change`.
    pub(crate) fn listing(&self, change: impl FnMut(&mut Value) + Send + 'static) {
        *self.state.listing.lock().unwrap() = Some(Box::new(change));
    }

    /// What was asked since the last call.
    pub(crate) fn log(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.log.lock().unwrap())
    }

    /// The most requests that were being answered at once.
    pub(crate) fn most(&self) -> usize {
        self.state.most.load(Ordering::SeqCst)
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        for address in [self.endpoint(), self.storage()] {
            let _ = TcpStream::connect(address.trim_start_matches("http://"));
        }
    }
}

/// The name of a content's blob on the Hub.
pub(crate) fn etag(path: &str, bytes: &[u8]) -> String {
    let hex = |digest: &[u8]| digest.iter().map(|b| format!("{b:02x}")).collect();
    if path.ends_with(".safetensors") {
        return hex(&sha2::Sha256::digest(bytes));
    }
    let mut hasher = sha1::Sha1::new();
    hasher.update(format!("blob {}\0", bytes.len()));
    hasher.update(bytes);
    hex(&hasher.finalize())
}

fn serve(state: &State, mut stream: TcpStream, storage: bool) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else {
            break;
        };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    if method.is_empty() {
        return Ok(());
    }
    let request = Request {
        storage,
        method,
        path,
        headers,
    };
    state.log.lock().unwrap().push(request.clone());
    let now = state.open.fetch_add(1, Ordering::SeqCst) + 1;
    state.most.fetch_max(now, Ordering::SeqCst);
    let mut reply = answer(state, &request);
    if let Some(hook) = state.hook.lock().unwrap().as_mut() {
        reply = hook(&request, reply);
    }
    std::thread::sleep(reply.delay);
    // before the last byte, upon which the next request may follow
    state.open.fetch_sub(1, Ordering::SeqCst);
    write(&mut stream, &request, &reply)
}

fn answer(state: &State, request: &Request) -> Reply {
    let path = request.path.split('?').next().unwrap_or("");
    let repos = state.repos.lock().unwrap();
    let missing = |code: &str| {
        Reply::new(404)
            .with("X-Error-Code", code)
            .with("X-Error-Message", "no")
    };
    if let Some(rest) = path.strip_prefix("/api/models/") {
        let Some((id, revision)) = rest.split_once("/revision/") else {
            return missing("EntryNotFound");
        };
        let Some(repo) = repos.get(id) else {
            return Reply::new(401).with("X-Error-Code", "RepoNotFound");
        };
        if !["main", COMMIT, "v1", "refs%2Fpr%2F1"].contains(&revision) {
            return missing("RevisionNotFound");
        }
        let siblings: Vec<Value> = repo
            .files
            .iter()
            .map(|(path, bytes)| sibling(path, bytes))
            .collect();
        let mut listing = json!({ "id": id, "sha": COMMIT, "gated": false, "siblings": siblings });
        if let Some(change) = state.listing.lock().unwrap().as_mut() {
            change(&mut listing);
        }
        return Reply::new(200)
            .with("Content-Type", "application/json")
            .body(listing.to_string());
    }
    let Some((id, file)) = path.trim_start_matches('/').split_once("/resolve/") else {
        return missing("EntryNotFound");
    };
    let (commit, file) = file.split_once('/').unwrap_or_default();
    let file = file.replace("%20", " ");
    let Some(bytes) = repos.get(id).and_then(|repo| repo.files.get(&file)) else {
        return missing("EntryNotFound");
    };
    let etag = etag(&file, bytes);
    if request.storage {
        return part(request, bytes, &format!("\"storage-{}\"", &etag[..8]));
    }
    if file.ends_with(".safetensors") {
        let place = format!(
            "{}/{id}/resolve/{commit}/{}?signature=x:y",
            state.storage.lock().unwrap(),
            file.replace(' ', "%20")
        );
        return Reply::new(302)
            .with("Location", place)
            .with("X-Repo-Commit", commit)
            .with("X-Linked-Etag", format!("\"{etag}\""))
            .with("X-Linked-Size", bytes.len());
    }
    part(request, bytes, &format!("\"{etag}\"")).with("X-Repo-Commit", commit)
}

fn sibling(path: &str, bytes: &[u8]) -> Value {
    if path.ends_with(".safetensors") {
        let lfs = json!({ "sha256": etag(path, bytes), "size": bytes.len(), "pointerSize": 134 });
        return json!({ "rfilename": path, "size": bytes.len(), "blobId": "f".repeat(40), "lfs": lfs });
    }
    json!({ "rfilename": path, "size": bytes.len(), "blobId": etag(path, bytes) })
}

/// The whole content, or the part that `Range` asks for when `If-Range` allows it.
fn part(request: &Request, bytes: &[u8], own: &str) -> Reply {
    let reply = Reply::new(200)
        .with("ETag", own)
        .with("Content-Type", "binary/octet-stream");
    let from = request.header("range").and_then(|range| {
        range
            .strip_prefix("bytes=")?
            .strip_suffix('-')?
            .parse::<usize>()
            .ok()
    });
    let fresh = request
        .header("if-range")
        .is_none_or(|validator| validator == own);
    match from {
        Some(from) if fresh && from < bytes.len() => Reply {
            status: 206,
            ..reply
        }
        .with(
            "Content-Range",
            format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len()),
        )
        .body(&bytes[from..]),
        Some(_) if fresh => Reply {
            status: 416,
            ..reply
        },
        _ => reply.body(bytes),
    }
}

fn write(stream: &mut TcpStream, request: &Request, reply: &Reply) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} x\r\nConnection: close\r\n", reply.status);
    let told = reply
        .headers
        .iter()
        .any(|(name, _)| name == "Content-Length");
    if reply.chunked {
        head.push_str("Transfer-Encoding: chunked\r\n");
    } else if !told {
        head.push_str(&format!("Content-Length: {}\r\n", reply.body.len()));
    }
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if request.method == "HEAD" {
        return Ok(());
    }
    if let Some((bytes, time)) = reply.stall {
        stream.write_all(&reply.body[..bytes.min(reply.body.len())])?;
        stream.flush()?;
        // the other side may give up earlier
        stream.set_read_timeout(Some(time))?;
        let _ = stream.read(&mut [0]);
        return Ok(());
    }
    let body = &reply.body[..reply.cut.unwrap_or(reply.body.len()).min(reply.body.len())];
    if reply.chunked {
        for chunk in body.chunks(1000) {
            write!(stream, "{:x}\r\n", chunk.len())?;
            stream.write_all(chunk)?;
            stream.write_all(b"\r\n")?;
        }
        return if reply.cut.is_none() {
            stream.write_all(b"0\r\n\r\n")
        } else {
            Ok(())
        };
    }
    stream.write_all(body)
}
