//! Names: of repositories as users type them, and of everything that a server may name. Whatever fails here never becomes a path.

use crate::checkpoint::printable;
use crate::error::{Error, Result};

/// The branch that is meant when none is named.
const DEFAULT_REVISION: &str = "main";
/// The longest part of a name, as the Hub has it.
const LONGEST: usize = 96;

/// A repository, or one file of it: `owner/name[@revision][:file]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoName {
    id: String,
    revision: String,
    file: Option<String>,
}

impl RepoName {
    /// Reads `owner/name[@revision][:file]`.
    ///
    /// # Errors
    /// [`Error::NotFound`] when it has another form: then no such repository can exist.
    pub fn parse(text: &str) -> Result<Self> {
        let refuse = |reason: &str| {
            Err(Error::NotFound {
                what: printable(text),
                hint: format!(
                    "{reason}; a repository of the Hub is named owner/name[@revision][:file]"
                ),
            })
        };
        let (rest, file) = match text.split_once(':') {
            Some((rest, file)) => (rest, Some(file)),
            None => (text, None),
        };
        let (id, revision) = rest.split_once('@').unwrap_or((rest, DEFAULT_REVISION));
        if !is_id(id) {
            return refuse("this is neither a file nor a repository's name");
        }
        if !is_revision(revision) {
            return refuse("what stands behind @ is not a branch, tag or commit");
        }
        if file.is_some_and(|file| !is_file_name(file)) {
            return refuse("what stands behind : is not a file's name");
        }
        Ok(Self {
            id: id.to_owned(),
            revision: revision.to_owned(),
            file: file.map(str::to_owned),
        })
    }

    /// `owner/name`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The part behind the slash.
    pub fn short(&self) -> &str {
        self.id.rsplit('/').next().unwrap_or(&self.id)
    }

    /// A branch, tag or commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The file that was asked for.
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }

    /// Its folder in the cache, such as `models--owner--name`.
    pub fn folder(&self) -> String {
        format!("models--{}", self.id.replace('/', "--"))
    }

    /// The name whose folder in the cache this is.
    pub fn from_folder(folder: &str) -> Option<Self> {
        let (owner, name) = folder.strip_prefix("models--")?.split_once("--")?;
        Self::parse(&format!("{owner}/{name}")).ok()
    }
}

impl std::fmt::Display for RepoName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.id)?;
        if self.revision != DEFAULT_REVISION {
            write!(f, "@{}", self.revision)?;
        }
        match &self.file {
            Some(file) => write!(f, ":{file}"),
            None => Ok(()),
        }
    }
}

/// `owner/name` as the Hub allows it: letters, digits, `-`, `_`, `.`; no `--` and no `..`, which cache folders could not be told by.
pub(super) fn is_id(id: &str) -> bool {
    let good = |part: &str| {
        !part.is_empty()
            && part.len() <= LONGEST
            && !part.starts_with(['-', '.'])
            && !part.ends_with(['-', '.'])
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    let parts: Vec<&str> = id.split('/').collect();
    parts.len() == 2
        && parts.into_iter().all(good)
        && !id.contains("--")
        && !id.contains("..")
        && !id.ends_with(".git")
}

/// A branch, tag, pull request (`refs/pr/1`) or commit.
fn is_revision(revision: &str) -> bool {
    revision.len() <= 200
        && is_file_name(revision)
        && revision
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_./+".contains(&b))
}

/// A relative path that goes nowhere but down, on every system.
pub(super) fn is_file_name(name: &str) -> bool {
    let good = |part: &str| {
        let bad_sign = |c: char| c.is_control() || "\\:*?\"<>|".contains(c);
        !part.is_empty()
            && part.len() <= 255
            && !matches!(part, "." | "..")
            && !part.contains(bad_sign)
    };
    name.len() <= 1000 && name.split('/').all(good)
}

/// A commit: 40 hexadecimal digits.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && is_hex(text)
}

/// What names a blob: git's SHA-1 (40 digits) or a SHA-256 (64).
pub(super) fn is_etag(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && is_hex(text)
}

fn is_hex(text: &str) -> bool {
    text.bytes()
        .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_are_taken_apart_and_put_together() {
        let name = RepoName::parse("a-b/c.d_1@refs/pr/3:unet/x.safetensors").unwrap();
        assert_eq!(
            (name.id(), name.revision(), name.file(), name.short()),
            (
                "a-b/c.d_1",
                "refs/pr/3",
                Some("unet/x.safetensors"),
                "c.d_1"
            )
        );
        assert_eq!(name.to_string(), "a-b/c.d_1@refs/pr/3:unet/x.safetensors");
        assert_eq!(name.folder(), "models--a-b--c.d_1");
        let back = RepoName::from_folder("models--a-b--c.d_1").unwrap();
        assert_eq!((back.id(), back.revision()), ("a-b/c.d_1", "main"));
        assert_eq!(RepoName::parse("a/b").unwrap().to_string(), "a/b");
    }

    #[test]
    fn what_could_leave_the_cache_is_no_name() {
        for text in [
            "a",
            "a/b/c",
            "/a",
            "a/",
            "../b",
            "a/..",
            "a/b--c",
            "a--b/c",
            ".a/b",
            "a/b@",
            "a/b@..",
            "a/b@x/../y",
            "a/b@/x",
            "a/b:",
            "a/b:../x",
            "a/b:/etc/x",
            "a/b:x//y",
            "a/b:c\\d",
            "a/b:C:/x",
            "a b/c",
            "a/b@x y",
            "a/b:x\n",
            "a/b.git",
            "a/b:./x",
        ] {
            assert!(RepoName::parse(text).is_err(), "{text}");
        }
        for folder in [
            "models--a",
            "models--..--b",
            "datasets--a--b",
            "models--a--b--c",
        ] {
            assert_eq!(RepoName::from_folder(folder), None, "{folder}");
        }
        for etag in [
            "../../x",
            "/etc/x",
            "",
            "AB",
            &"a".repeat(41),
            &"g".repeat(40),
        ] {
            assert!(!is_etag(etag) && !is_commit(etag), "{etag}");
        }
        assert!(is_etag(&"a".repeat(64)) && is_etag(&"0".repeat(40)) && is_commit(&"f".repeat(40)));
    }
}
