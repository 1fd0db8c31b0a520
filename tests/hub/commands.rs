//! The commands as a user runs them, and what `--model` takes.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::server::{COMMIT, Hub, Reply, etag};
use super::{TOKEN, content, walk};
use crate::support::weights::{Case, FolderForm};
use crate::support::{Dir, Outcome, finish};

/// `sd-rs` against this server.
fn command(dir: &Dir, hub: &Hub, args: &[&str]) -> std::process::Command {
    let mut command = dir.command(args);
    command
        .env_remove("HF_HUB_OFFLINE")
        .env("HF_ENDPOINT", hub.endpoint())
        .env("HF_TOKEN", TOKEN);
    command
}

fn run(dir: &Dir, hub: &Hub, args: &[&str]) -> Outcome {
    let outcome = finish(command(dir, hub, args).spawn().unwrap());
    assert!(!outcome.stderr.contains(TOKEN), "{outcome:?}");
    outcome
}

fn ok(dir: &Dir, hub: &Hub, args: &[&str]) -> String {
    let outcome = run(dir, hub, args);
    assert_eq!(outcome.status, Some(0), "{args:?}: {outcome:?}");
    outcome.text()
}

/// A small model as a repository `o/tiny.v1`, with files that nobody needs.
fn tiny(hub: &Hub) {
    let made = Dir::new();
    Case::load("sd1-odd").write_folder(&made.path("m"), &FolderForm::default());
    let mut paths = Vec::new();
    walk(&made.path("m"), &made.path("m"), &mut paths);
    let bodies: Vec<(String, Vec<u8>)> = paths
        .into_iter()
        .map(|path| {
            (
                path.replace('\\', "/"),
                fs::read(made.path("m").join(&path)).unwrap(),
            )
        })
        .collect();
    let mut files: Vec<(&str, &[u8])> = bodies
        .iter()
        .map(|(p, b)| (p.as_str(), b.as_slice()))
        .collect();
    files.extend([
        ("README.md", b"x".as_slice()),
        ("unet/diffusion_pytorch_model.fp16.safetensors", b"x"),
        ("unet/diffusion_pytorch_model.bin", b"x"),
    ]);
    assert!(files.iter().any(|(path, _)| *path == "model_index.json"));
    hub.add("o/tiny.v1", &files);
}

const PICTURE: [&str; 11] = [
    "generate", "-p", "x", "-W", "64", "-H", "64", "--steps", "1", "-s", "1",
];

#[test]
fn a_picture_from_the_hub_and_then_without_it() {
    let (hub, dir) = (Hub::new(), Dir::new());
    tiny(&hub);
    let mut args = vec!["-vv"];
    args.extend(PICTURE);
    args.extend(["--json", "-m", "o/tiny.v1", "-o", "a.png"]);
    let report: Value = serde_json::from_str(&ok(&dir, &hub, &args)).unwrap();
    assert_eq!(report["model"], "tiny.v1");
    let log = hub.log();
    assert!(
        log.iter().all(|r| !r.path.contains(".bin")
            && !r.path.contains("fp16")
            && !r.path.contains("README")),
        "{log:?}"
    );
    assert!(log.iter().any(|r| r.header("authorization").is_some()));

    // again: nobody is asked, online or offline, and the picture is the same
    *args.last_mut().unwrap() = "b.png";
    ok(&dir, &hub, &args);
    *args.last_mut().unwrap() = "c.png";
    dir.ok(&args);
    assert!(hub.log().is_empty());
    let picture = |name: &str| image::open(dir.path(name)).unwrap().to_rgb8().into_raw();
    assert!(picture("a.png") == picture("b.png") && picture("a.png") == picture("c.png"));
    assert!(
        String::from_utf8_lossy(&fs::read(dir.path("a.png")).unwrap()).contains("Model: tiny.v1")
    );

    let inspected: Value =
        serde_json::from_str(&dir.ok(&["inspect", "o/tiny.v1", "--json"])).unwrap();
    assert_eq!(inspected["format"], "diffusers folder");
    let sentence = dir.fails(&["inspect", "o/other"], 1);
    assert!(
        sentence.contains("HF_HUB_OFFLINE") && sentence.lines().count() == 1,
        "{sentence}"
    );
}

#[test]
fn a_place_for_the_picture_is_looked_for_before_anything_is_fetched() {
    let (hub, dir) = (Hub::new(), Dir::new());
    tiny(&hub);
    let args = [
        "generate",
        "-p",
        "x",
        "-m",
        "o/tiny.v1",
        "-o",
        "no/such/p.png",
    ];
    assert_eq!(run(&dir, &hub, &args).status, Some(1));
    assert!(hub.log().is_empty() && dir.names().is_empty());
}

#[test]
fn an_unreachable_hub_and_a_copy_in_the_cache() {
    let (hub, dir) = (Hub::new(), Dir::new());
    let body = content(1, 100);
    hub.add("o/one", &[("a.safetensors", &body)]);
    let path = ok(&dir, &hub, &["models", "pull", "o/one"]);
    assert!(path.trim().ends_with("a.safetensors"));
    // not named by its file, the Hub might have more: it is asked, and its copy is used when it does not answer or has it no more
    for code in ["GatedRepo", "RepoNotFound"] {
        hub.hook(move |_, _| Reply::new(401).with("X-Error-Code", code));
        let outcome = run(&dir, &hub, &["inspect", "o/one"]);
        let words = "the copy of o/one in the cache is used";
        assert!(outcome.stderr.contains(words), "{outcome:?}");
    }
    // but which of two files is meant the Hub must tell
    hub.behave();
    hub.add(
        "o/one",
        &[("a.safetensors", &body), ("b.safetensors", b"b")],
    );
    assert!(
        run(&dir, &hub, &["inspect", "o/one"])
            .stderr
            .contains("2 model files")
    );
    hub.log();
    let named = run(&dir, &hub, &["inspect", "o/one:a.safetensors"]);
    assert!(
        hub.log().is_empty() && named.stderr.contains("a.safetensors"),
        "{named:?}"
    );
}

#[test]
fn pulling_prints_the_place_or_the_choices() {
    let (hub, dir) = (Hub::new(), Dir::new());
    let (a, b) = (content(1, 2000), content(2, 3000));
    hub.add(
        "o/two",
        &[
            ("a.safetensors", &a),
            ("sub/b.safetensors", &b),
            ("c.safetensors", &a),
        ],
    );
    let outcome = run(&dir, &hub, &["models", "pull", "o/two"]);
    assert_eq!(outcome.status, Some(1));
    for words in [
        "a.safetensors (2.0 kB), c.safetensors",
        "appending :file",
        "o/two:a.safetensors",
    ] {
        assert!(outcome.stderr.contains(words), "{words}: {outcome:?}");
    }
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:?}");
    let planned = ok(
        &dir,
        &hub,
        &["models", "pull", "--dry-run", "o/two:b.safetensors"],
    );
    assert!(
        planned.contains("3.0 kB  sub/b.safetensors") && !dir.path(".hf").exists(),
        "{planned}"
    );
    let places = ok(
        &dir,
        &hub,
        &[
            "models",
            "pull",
            "o/two:b.safetensors",
            "o/two:a.safetensors",
        ],
    );
    let places: Vec<&str> = places.lines().collect();
    assert_eq!(fs::read(places[0]).unwrap(), b);
    assert_eq!(fs::read(places[1]).unwrap(), a);
    assert_eq!(
        dir.ok(&["models", "path", "o/two:a.safetensors"]).trim(),
        places[1]
    );
    assert!(
        dir.fails(&["models", "path", "o/none"], 1)
            .contains("models pull o/none")
    );
    for bad in ["two", "../two", "o/../two", "o/two/x"] {
        assert_eq!(
            run(&dir, &hub, &["models", "pull", bad]).status,
            Some(1),
            "{bad}"
        );
    }
    assert_eq!(run(&dir, &hub, &["models", "pull"]).status, Some(2));
}

#[test]
fn models_are_listed_verified_and_removed() {
    let (hub, dir) = (Hub::new(), Dir::new());
    tiny(&hub);
    let root = ok(&dir, &hub, &["models", "path"]);
    assert_eq!(Path::new(root.trim()), dir.path(".models"));
    assert!(
        dir.sd_rs(&["models", "list"])
            .stderr
            .contains("models pull owner/name")
    );
    fs::create_dir_all(dir.path(".models/loras")).unwrap();
    let ink = dir.path(".models/loras/Ink.pt");
    fs::write(&ink, "abc").unwrap();
    let pulled = ok(&dir, &hub, &["models", "pull", "o/tiny.v1"]);

    let table = dir.ok(&["models", "list", "--hash"]);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 3, "{table}");
    for (line, words) in lines.iter().zip([
        vec!["NAME", "WHERE"],
        vec!["Ink", "lora", "pt", "3 B", "ba7816bf8f"],
        vec!["o/tiny.v1", "repository", "diffusers", pulled.trim()],
    ]) {
        assert!(words.iter().all(|word| line.contains(word)), "{line}");
    }
    let rows: Vec<Value> = dir.sd_rs(&["models", "list", "--json"]).json();
    assert_eq!(
        (&rows[0]["autov2"], &rows[0]["kind"], &rows[1]["name"]),
        (&"ba7816bf8f".into(), &"lora".into(), &"o/tiny.v1".into())
    );
    // by hash, by name, without regard to case
    for name in ["ba7816bf8f", "ink", "INK.pt", "loras/ink"] {
        assert_eq!(
            Path::new(dir.ok(&["models", "path", name]).trim()),
            ink,
            "{name}"
        );
    }

    let all = dir.ok(&["models", "verify"]);
    assert!(
        all.lines().count() == 2 && all.lines().all(|line| line.starts_with("good")),
        "{all}"
    );
    let config = Path::new(pulled.trim()).join("unet/config.json");
    let damaged = fs::canonicalize(&config).unwrap();
    fs::write(&damaged, "{}").unwrap();
    let outcome = dir.sd_rs(&["models", "verify", "o/tiny.v1", "--repair"]);
    assert_eq!(outcome.status, Some(1));
    assert!(
        outcome.text().contains("unet/config.json") && outcome.stderr.contains("pull again"),
        "{outcome:?}"
    );
    assert!(!damaged.exists());
    ok(&dir, &hub, &["models", "pull", "o/tiny.v1"]);
    dir.ok(&["models", "verify", "o/tiny.v1"]);

    // no terminal, no answer
    assert!(
        dir.fails(&["models", "rm", "o/tiny.v1"], 1)
            .contains("--yes")
    );
    assert!(dir.fails(&["models", "rm", "ink"], 1).contains("--yes"));
    dir.ok(&["models", "rm", "o/tiny.v1", "--yes"]);
    dir.ok(&["models", "rm", "ink", "--yes"]);
    assert!(!ink.exists() && dir.path(".models/loras").exists());
    assert!(
        dir.fails(&["models", "rm", "o/tiny.v1", "--yes"], 1)
            .contains("not in the cache")
    );
}

#[test]
fn nothing_outside_is_removed() {
    let dir = Dir::new();
    for folder in [".models", "web/models/Stable-diffusion", "elsewhere"] {
        fs::create_dir_all(dir.path(folder)).unwrap();
    }
    let (theirs, file, linked) = (
        dir.path("web/models/Stable-diffusion/theirs.safetensors"),
        dir.path("mine.safetensors"),
        dir.path("elsewhere/far.safetensors"),
    );
    for path in [&theirs, &file, &linked] {
        fs::write(path, "x").unwrap();
    }
    let a1111 = ["--a1111-dir", "web"];
    let rm = |name: &str| {
        dir.fails(
            &[["models", "rm", "--yes", name].as_slice(), &a1111].concat(),
            1,
        )
    };
    assert!(rm("theirs").contains("outside the models folder"));
    for name in [
        "mine.safetensors",
        "./mine.safetensors",
        "../mine",
        "/",
        ".",
        "..",
        "o/..",
        "../x",
        "o/n@main",
        "o/n:x",
    ] {
        rm(name);
    }
    rm(file.to_str().unwrap());
    #[cfg(unix)]
    {
        use std::os::unix::fs::symlink;
        symlink(dir.path("elsewhere"), dir.path(".models/sub")).unwrap();
        assert!(rm("far").contains("outside the models folder"));
        // a link is removed, what it leads to stays
        symlink(&file, dir.path(".models/link.safetensors")).unwrap();
        dir.ok(&["models", "rm", "--yes", "link"]);
        assert!(!dir.path(".models/link.safetensors").exists());
    }
    assert!(theirs.exists() && file.exists() && linked.exists());
    // what is in others' folders can be used all the same
    let path = dir.ok(&[["models", "path", "theirs"].as_slice(), &a1111].concat());
    assert!(path.trim().ends_with("theirs.safetensors"));
    assert!(
        dir.fails(&["models", "path", "theirs"], 1)
            .contains("not found")
    );
}

#[test]
fn comfyuis_folders_are_read() {
    let dir = Dir::new();
    fs::create_dir_all(dir.path("comfy/ckpt")).unwrap();
    fs::write(dir.path("comfy/ckpt/dream.safetensors"), "x").unwrap();
    fs::write(
        dir.path("extra.yaml"),
        "comfyui:\n  base_path: comfy\n  checkpoints: ckpt\n",
    )
    .unwrap();
    let found = dir.ok(&[
        "models",
        "path",
        "dream",
        "--extra-model-paths",
        "extra.yaml",
    ]);
    assert!(found.trim().ends_with("dream.safetensors"));
    // the model is found by name wherever a model is named
    let sentence = dir.fails(
        &["inspect", "dream", "--extra-model-paths", "extra.yaml"],
        1,
    );
    assert!(sentence.contains("dream.safetensors: "), "{sentence}");
    fs::write(dir.path("extra.yaml"), "comfyui:\n  what\n").unwrap();
    assert!(
        dir.fails(&["models", "list", "--extra-model-paths", "extra.yaml"], 1)
            .contains("line 2")
    );
}

#[cfg(unix)]
#[test]
fn an_interrupted_pull_goes_on_later() {
    use std::time::{Duration, Instant};
    let (hub, dir) = (Hub::new(), Dir::new());
    let body = content(1, 3_000_000);
    hub.add("o/big", &[("a.safetensors", &body)]);
    hub.hook(|request, reply| {
        if request.storage {
            Reply {
                stall: Some((1_000_000, Duration::from_secs(60))),
                ..reply
            }
        } else {
            reply
        }
    });
    let mut child = command(&dir, &hub, &["models", "pull", "o/big"])
        .spawn()
        .unwrap();
    let partial = dir
        .path(".hf/hub/models--o--big/blobs")
        .join(format!("{}.incomplete", etag("a.safetensors", &body)));
    let start = Instant::now();
    while fs::metadata(&partial).map_or(0, |about| about.len()) < 500_000 {
        assert!(start.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    let sent = Instant::now();
    let mut kill = std::process::Command::new("kill");
    assert!(
        kill.args(["-INT", &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(
        sent.elapsed() < Duration::from_secs(6),
        "{:?}",
        sent.elapsed()
    );
    let kept = fs::metadata(&partial).unwrap().len();
    hub.behave();
    hub.log();
    let path = ok(&dir, &hub, &["models", "pull", "o/big"]);
    assert!(fs::read(path.trim()).unwrap() == body);
    assert!(!partial.exists() && path.contains(COMMIT));
    let asked = hub.log().into_iter().find(|r| r.storage).unwrap();
    assert_eq!(asked.header("range").unwrap(), format!("bytes={kept}-"));
}

#[cfg(unix)]
#[test]
fn a_killed_pull_leaves_no_file_that_is_not_whole() {
    use std::time::Duration;
    let (hub, dir) = (Hub::new(), Dir::new());
    let body = content(1, 8_000_000);
    hub.add("o/big", &[("a.safetensors", &body)]);
    for milliseconds in (0..60).step_by(6) {
        let mut child = command(&dir, &hub, &["models", "pull", "o/big"])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        child.kill().unwrap();
        child.wait().unwrap();
        let blob = dir
            .path(".hf/hub/models--o--big/blobs")
            .join(etag("a.safetensors", &body));
        if let Ok(found) = fs::read(&blob) {
            assert!(found == body, "{milliseconds}");
        }
    }
    let path = ok(&dir, &hub, &["models", "pull", "o/big"]);
    assert!(fs::read(path.trim()).unwrap() == body);
}
