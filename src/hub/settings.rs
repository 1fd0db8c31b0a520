//! What the environment says of the Hub, with the meaning that Python's `huggingface_hub` gives to each variable.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::url::Url;
use crate::error::{Error, Result};

/// The Hub itself.
const ENDPOINT: &str = "https://huggingface.co";
/// How long a server may say nothing, unless `HF_HUB_DOWNLOAD_TIMEOUT` says otherwise.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The first pause before something is tried again; each further one is twice as long.
const BACKOFF: Duration = Duration::from_millis(500);

/// What says who the user is. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The token without the spaces and line ends around it; none when nothing is left.
    ///
    /// # Errors
    /// [`Error::NotFound`] when it has signs that no token has; they are not shown.
    pub fn new(text: &str) -> Result<Option<Self>> {
        let text = text.trim();
        if !text.bytes().all(|b| b.is_ascii_graphic()) {
            let reason = "the Hub's token (HF_TOKEN, or the file that HF_TOKEN_PATH names) has spaces, line ends or other signs in it; \
                          expected one word such as hf_…";
            return Err(Error::NotFound {
                what: "a usable token".to_owned(),
                hint: reason.to_owned(),
            });
        }
        Ok((!text.is_empty()).then(|| Self(text.to_owned())))
    }

    /// The header's value.
    pub(super) fn bearer(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Where the Hub and its cache are, and how to speak to it.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `HF_ENDPOINT`: the Hub or a mirror, without a slash at the end.
    pub endpoint: String,
    /// `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    pub cache: PathBuf,
    /// `HF_TOKEN`, or what is in the file `HF_TOKEN_PATH`.
    pub token: Option<Token>,
    /// `HF_HUB_OFFLINE`: no connection is opened.
    pub offline: bool,
    /// How long to wait for a connection, an answer, or more of it.
    pub timeout: Duration,
    /// The first pause before something is tried again.
    pub backoff: Duration,
    /// `SSL_CERT_FILE`: certificates that are trusted in place of Mozilla's.
    pub certificates: Option<PathBuf>,
}

impl Settings {
    /// What the environment says.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no home to put a cache into, or when a variable has a value that cannot be used.
    pub fn from_env() -> Result<Self> {
        Self::from_lookup(&|name| std::env::var_os(name))
    }

    /// What these variables say; `lookup` gives a variable's value.
    ///
    /// # Errors
    /// As [`Settings::from_env`].
    pub fn from_lookup(lookup: &dyn Fn(&str) -> Option<OsString>) -> Result<Self> {
        let text = |name: &str| {
            let value = lookup(name)?.to_string_lossy().trim().to_owned();
            (!value.is_empty()).then_some(value)
        };
        let truth = |name: &str| {
            text(name).is_some_and(|v| {
                ["1", "on", "yes", "true"].contains(&v.to_ascii_lowercase().as_str())
            })
        };
        let home = home(lookup);
        let path = |name: &str| expand(&lookup(name)?, home.as_deref());
        let hf_home = path("HF_HOME")
            .or_else(|| Some(path("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(home.as_ref()?.join(".cache").join("huggingface")));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(hf_home.as_ref()?.join("hub")))
            .ok_or_else(|| Error::NotFound {
                what: "a folder for the Hub's cache".to_owned(),
                hint: "neither HOME nor HF_HOME is set; set HF_HOME to a folder".to_owned(),
            })?;
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        Url::parse(&endpoint).map_err(|reason| Error::NotFound {
            what: "the Hub at HF_ENDPOINT".to_owned(),
            hint: format!("{reason}; expected an address such as {ENDPOINT}"),
        })?;
        let seconds = text("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|v| v.parse::<u64>().ok());
        let token = if truth("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            None
        } else {
            let file = path("HF_TOKEN_PATH").or_else(|| Some(hf_home?.join("token")));
            let kept = || file.and_then(|file| std::fs::read_to_string(file).ok());
            let given = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN"));
            Token::new(&given.or_else(kept).unwrap_or_default())?
        };
        Ok(Self {
            endpoint,
            cache,
            token,
            offline: truth("HF_HUB_OFFLINE") || truth("TRANSFORMERS_OFFLINE"),
            timeout: seconds
                .filter(|s| *s > 0)
                .map_or(TIMEOUT, Duration::from_secs),
            backoff: BACKOFF,
            certificates: path("SSL_CERT_FILE"),
        })
    }
}

/// The user's own folder.
fn home(lookup: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let name = if cfg!(windows) { "USERPROFILE" } else { "HOME" };
    lookup(name).filter(|v| !v.is_empty()).map(PathBuf::from)
}

/// A path in which `~` means the user's own folder.
pub(crate) fn expand_home(path: &str, lookup: &dyn Fn(&str) -> Option<OsString>) -> PathBuf {
    expand(path.as_ref(), home(lookup).as_deref()).unwrap_or_default()
}

/// The same; none when it is empty.
fn expand(value: &OsStr, home: Option<&Path>) -> Option<PathBuf> {
    if value.is_empty() {
        return None;
    }
    let path = Path::new(value);
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => Some(home.join(rest)),
        _ => Some(path.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings> {
        Settings::from_lookup(&|name| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        })
    }

    #[cfg(unix)]
    #[test]
    fn the_cache_lies_where_python_has_it() {
        let cache = |variables: &[(&str, &str)]| settings(variables).unwrap().cache;
        let home = ("HOME", "/h");
        let hf_home = ("HF_HOME", "~/hf");
        let xdg = ("XDG_CACHE_HOME", "/x");
        assert_eq!(cache(&[home]), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(cache(&[home, xdg]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[home, xdg, hf_home]), Path::new("/h/hf/hub"));
        let old = ("HUGGINGFACE_HUB_CACHE", "/old");
        assert_eq!(cache(&[home, hf_home, old]), Path::new("/old"));
        assert_eq!(cache(&[home, old, ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        assert!(settings(&[]).is_err());
    }

    #[test]
    fn switches_and_addresses_are_read() {
        let base = ("HF_HOME", "h");
        let plain = settings(&[base]).unwrap();
        assert_eq!((plain.endpoint.as_str(), plain.offline), (ENDPOINT, false));
        assert_eq!(plain.timeout, TIMEOUT);
        for (value, offline) in [("1", true), ("YES", true), ("0", false), ("", false)] {
            let found = settings(&[base, ("HF_HUB_OFFLINE", value)]).unwrap();
            assert_eq!(found.offline, offline, "{value}");
        }
        let mirror = settings(&[
            base,
            ("HF_ENDPOINT", "http://m.example:81/hub/"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "3"),
        ]);
        let mirror = mirror.unwrap();
        assert_eq!(mirror.endpoint, "http://m.example:81/hub");
        assert_eq!(mirror.timeout, Duration::from_secs(3));
        for bad in ["ftp://x", "huggingface.co", "https://me:secret@x.example"] {
            let error = settings(&[base, ("HF_ENDPOINT", bad)])
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("HF_ENDPOINT") && !error.contains("secret"),
                "{error}"
            );
        }
    }

    #[test]
    fn the_token_is_found_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "hf_kept\n").unwrap();
        std::fs::write(folder.path().join("other"), " hf_other \r\n").unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let base = path("");
        let base = ("HF_HOME", base.as_str());
        let token = |more: &[(&str, &str)]| {
            let all: Vec<_> = [&[base], more].concat();
            settings(&all).unwrap().token.map(|token| token.bearer())
        };
        assert_eq!(token(&[]).unwrap(), "Bearer hf_kept");
        assert_eq!(
            token(&[("HF_TOKEN_PATH", &path("other"))]).unwrap(),
            "Bearer hf_other"
        );
        assert_eq!(
            token(&[("HF_TOKEN", "hf_given\n")]).unwrap(),
            "Bearer hf_given"
        );
        assert_eq!(token(&[("HF_TOKEN_PATH", &path("none"))]), None);
        assert_eq!(token(&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        let whole = format!("{:?}", settings(&[base]).unwrap());
        assert!(!whole.contains("hf_kept"), "{whole}");
        let error = settings(&[base, ("HF_TOKEN", "hf_a\nhf_b")]).unwrap_err();
        assert!(!error.to_string().contains("hf_a"), "{error}");
    }
}
