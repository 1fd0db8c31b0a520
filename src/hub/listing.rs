//! What the Hub says of a repository, read with distrust: a commit, and files with sizes and hashes.

use serde_json::Value;

use super::name::{RepoName, is_commit, is_etag, is_file_name};
use super::plan::Remote;
use crate::checkpoint::printable;
use crate::error::{Error, Result};

/// The most files of a repository.
const MAX_FILES: usize = 100_000;

/// A repository at one commit.
#[derive(Debug)]
pub(super) struct Listing {
    /// Its name now, which differs from the one that was asked for when it was renamed.
    pub(super) id: String,
    pub(super) commit: String,
    pub(super) files: Vec<Remote>,
}

/// Reads the Hub's answer to `/api/models/…?blobs=true`.
pub(super) fn read_listing(endpoint: &str, repo: &RepoName, text: &[u8]) -> Result<Listing> {
    let odd = |what: &str| {
        Error::Network(format!(
            "{endpoint} did not send a listing of {repo} but {what}; check HF_ENDPOINT, the proxy, or whether this network wants a login"
        ))
    };
    let json: Value = serde_json::from_slice(text).map_err(|_| {
        let is_page = text.trim_ascii_start().first() == Some(&b'<');
        odd(if is_page {
            "a web page"
        } else {
            "something else"
        })
    })?;
    let commit = json.get("sha").and_then(Value::as_str).unwrap_or("");
    if !is_commit(commit) {
        return Err(odd(&format!(
            "the commit `{}`, expected 40 hexadecimal digits",
            printable(commit)
        )));
    }
    let siblings = json
        .get("siblings")
        .and_then(Value::as_array)
        .ok_or_else(|| odd("an object without files"))?;
    if siblings.len() > MAX_FILES {
        return Err(odd(&format!(
            "{} files, more than {MAX_FILES}",
            siblings.len()
        )));
    }
    let files = siblings
        .iter()
        .map(|file| read_file(endpoint, repo, file))
        .collect::<Result<Vec<_>>>()?;
    let id = json
        .get("id")
        .or_else(|| json.get("modelId"))
        .and_then(Value::as_str);
    Ok(Listing {
        id: id.unwrap_or(repo.id()).to_owned(),
        commit: commit.to_owned(),
        files,
    })
}

fn read_file(endpoint: &str, repo: &RepoName, file: &Value) -> Result<Remote> {
    let path = file.get("rfilename").and_then(Value::as_str).unwrap_or("");
    if !is_file_name(path) {
        let path = printable(path);
        return Err(Error::Network(format!(
            "{endpoint} lists a file of {repo} as `{path}`, which is not a name within a folder; nothing is fetched"
        )));
    }
    let large = file.get("lfs").filter(|lfs| lfs.is_object());
    let hash = match large {
        Some(lfs) => lfs.get("sha256").or_else(|| lfs.get("oid")),
        None => file.get("blobId"),
    };
    let etag = hash.and_then(Value::as_str).map(str::to_owned);
    if let Some(etag) = etag.as_deref().filter(|etag| !is_etag(etag)) {
        return Err(strange_etag(path, etag));
    }
    let size = large
        .and_then(|lfs| lfs.get("size"))
        .or_else(|| file.get("size"));
    Ok(Remote {
        path: path.to_owned(),
        size: size.and_then(Value::as_u64),
        etag,
    })
}

/// The error for a blob whose name is none.
pub(super) fn strange_etag(path: &str, etag: &str) -> Error {
    let (path, etag) = (printable(path), printable(etag));
    Error::Network(format!(
        "the server calls the content of `{path}` `{etag}`, expected 40 or 64 hexadecimal digits; nothing is fetched"
    ))
}
