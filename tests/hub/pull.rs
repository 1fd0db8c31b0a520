//! Repositories fetched from a server that behaves: layout, resuming, locks, sharing.

use std::fs;
use std::path::Path;
use std::time::Duration;

use sd_rs::hub::{self, Cache, RepoName, Silent, pull};

use super::server::{COMMIT, etag};
use super::{Said, Stage, TOKEN, content};

/// A diffusers folder with more than is needed.
fn folder(stage: &Stage) -> Vec<(&'static str, Vec<u8>)> {
    let files: Vec<(&str, Vec<u8>)> = vec![
        ("README.md", b"readme".to_vec()),
        (
            "model_index.json",
            br#"{"unet": ["diffusers", "U"], "scheduler": ["diffusers", "S"]}"#.to_vec(),
        ),
        ("scheduler/scheduler_config.json", b"{}".to_vec()),
        ("unet/config.json", b"{ }".to_vec()),
        ("unet/diffusion_pytorch_model.bin", content(9, 100)),
        (
            "unet/diffusion_pytorch_model.fp16.safetensors",
            content(2, 500),
        ),
        (
            "unet/diffusion_pytorch_model.safetensors",
            content(1, 300_000),
        ),
        ("vae/diffusion_pytorch_model.safetensors", content(3, 0)),
    ];
    let borrowed: Vec<(&str, &[u8])> = files.iter().map(|(p, b)| (*p, b.as_slice())).collect();
    stage.hub.add("o/n", &borrowed);
    files
}

const NEEDED: [&str; 5] = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
];

#[test]
fn a_folder_is_fetched_into_pythons_layout() {
    let stage = Stage::new();
    let files = folder(&stage);
    let pulled = stage.pull("o/n").unwrap();
    assert_eq!(
        pulled.path,
        stage
            .settings
            .cache
            .join("models--o--n/snapshots")
            .join(COMMIT)
    );
    let mut expected: Vec<String> = NEEDED
        .iter()
        .map(|path| format!("snapshots/{COMMIT}/{path}"))
        .collect();
    for (path, bytes) in files.iter().filter(|(path, _)| NEEDED.contains(path)) {
        expected.push(format!("blobs/{}", etag(path, bytes)));
        let file = pulled.path.join(path);
        assert_eq!(&fs::read(&file).unwrap(), bytes, "{path}");
        #[cfg(unix)]
        {
            let up = "../".repeat(2 + path.matches('/').count());
            assert_eq!(
                fs::read_link(&file).unwrap(),
                Path::new(&format!("{up}blobs/{}", etag(path, bytes)))
            );
        }
    }
    expected.push("refs/main".to_owned());
    expected.sort();
    assert_eq!(stage.files("o/n"), expected);
    assert_eq!(
        fs::read_to_string(stage.settings.cache.join("models--o--n/refs/main")).unwrap(),
        COMMIT
    );
    let log = stage.hub.log();
    for request in &log {
        let token = request.header("authorization");
        assert_eq!(token.is_some(), !request.storage, "{request:?}");
        assert!(token.is_none_or(|t| t == format!("Bearer {TOKEN}")));
    }
    assert!(log.iter().any(|r| r.storage));

    // a second time only the listing is asked for; a file that went missing comes alone
    stage.pull("o/n").unwrap();
    assert_eq!(stage.hub.log().len(), 1);
    let (path, bytes) = &files[2];
    fs::remove_file(stage.blob("o/n", &etag(path, bytes))).unwrap();
    assert!(hub::cached(&stage.settings, &RepoName::parse("o/n").unwrap(), false).is_none());
    stage.pull("o/n").unwrap();
    let asked: Vec<String> = stage
        .hub
        .log()
        .into_iter()
        .filter(|r| r.is_file())
        .map(|r| r.path)
        .collect();
    assert_eq!(asked, [format!("/o/n/resolve/{COMMIT}/{path}")]);
    assert!(hub::cached(&stage.settings, &RepoName::parse("o/n").unwrap(), false).is_some());
}

#[test]
fn files_variants_and_revisions_are_asked_for_by_name() {
    let stage = Stage::new();
    folder(&stage);
    let name = RepoName::parse("o/n@v1").unwrap();
    let half = pull(&stage.settings, &name, Some("fp16"), &Silent).unwrap();
    assert!(
        half.path
            .join("unet/diffusion_pytorch_model.fp16.safetensors")
            .is_file()
    );
    assert!(
        !half
            .path
            .join("unet/diffusion_pytorch_model.safetensors")
            .exists()
    );
    let one = stage.pull("o/n@refs/pr/1:README.md").unwrap();
    assert_eq!(fs::read(&one.path).unwrap(), b"readme");
    let commit = stage.pull(&format!("o/n@{COMMIT}:README.md")).unwrap();
    assert_eq!(commit, one);
    let files = stage.files("o/n");
    let refs: Vec<&String> = files.iter().filter(|f| f.starts_with("refs/")).collect();
    assert_eq!(refs, ["refs/refs/pr/1", "refs/v1"]);
    stage.fails("o/n@none", "the revision `none` of o/n");
    stage.fails("o/n:none.safetensors", "no file `none.safetensors`");
    assert!(stage.hub.log().iter().all(|r| !r.path.contains("/../")));
}

#[test]
fn names_with_spaces_are_asked_for() {
    let stage = Stage::new();
    stage.hub.add("o/n", &[("a b.safetensors", b"abc")]);
    assert_eq!(fs::read(stage.pull("o/n").unwrap().path).unwrap(), b"abc");
}

#[test]
fn four_files_come_at_once() {
    let stage = Stage::new();
    let bodies: Vec<(String, Vec<u8>)> = (1..=8)
        .map(|i| {
            (
                format!("unet/diffusion_pytorch_model-0000{i}-of-00008.safetensors"),
                content(i, 1000),
            )
        })
        .collect();
    let mut files: Vec<(&str, &[u8])> = bodies
        .iter()
        .map(|(p, b)| (p.as_str(), b.as_slice()))
        .collect();
    files.push(("unet/diffusion_pytorch_model.safetensors.index.json", b"{}"));
    files.push(("model_index.json", b"{}"));
    stage.hub.add("o/n", &files);
    stage.hub.hook(|request, reply| super::server::Reply {
        delay: Duration::from_millis(if request.storage { 200 } else { 0 }),
        ..reply
    });
    let pulled = stage.pull("o/n").unwrap();
    assert_eq!(fs::read_dir(pulled.path.join("unet")).unwrap().count(), 9);
    assert_eq!(stage.hub.most(), 4);
}

#[test]
fn what_was_stopped_goes_on_where_it_was() {
    let mut stage = Stage::new();
    let body = content(1, 3_000_000);
    stage.hub.add("o/n", &[("a.safetensors", &body)]);
    stage.said = Said {
        stop_after: Some(600_000),
        ..Said::default()
    };
    assert!(matches!(stage.pull("o/n"), Err(sd_rs::Error::Interrupted)));
    let blob = stage.blob("o/n", &etag("a.safetensors", &body));
    let partial = blob.with_extension("incomplete");
    let kept = fs::metadata(&partial).unwrap().len();
    assert!((600_000..3_000_000).contains(&kept), "{kept}");
    assert!(!blob.exists() && !stage.settings.cache.join("models--o--n/snapshots").exists());
    stage.hub.log();

    stage.said = Said::default();
    let pulled = stage.pull("o/n").unwrap();
    assert_eq!(fs::read(pulled.path).unwrap(), body);
    let log = stage.hub.log();
    let asked = log.iter().find(|r| r.storage).unwrap();
    assert_eq!(asked.header("range").unwrap(), format!("bytes={kept}-"));
    let own = format!("\"storage-{}\"", &etag("a.safetensors", &body)[..8]);
    assert_eq!(asked.header("if-range"), Some(own.as_str()));
    assert_eq!(*stage.said.bytes.lock().unwrap(), 3_000_000);
    let blobs: Vec<String> = stage
        .files("o/n")
        .into_iter()
        .filter(|f| f.starts_with("blobs/"))
        .collect();
    assert_eq!(blobs, [format!("blobs/{}", etag("a.safetensors", &body))]);
}

#[test]
fn who_comes_second_waits_and_fetches_nothing() {
    let stage = Stage::new();
    let body = content(1, 1000);
    stage.hub.add("o/n", &[("a.safetensors", &body)]);
    let name = RepoName::parse("o/n").unwrap();
    let lock = stage
        .settings
        .cache
        .join(".locks/models--o--n")
        .join(format!("{}.lock", etag("a.safetensors", &body)));
    fs::create_dir_all(lock.parent().unwrap()).unwrap();
    let held = fs::File::create(&lock).unwrap();
    held.lock().unwrap();
    std::thread::scope(|scope| {
        let second = scope.spawn(|| stage.pull("o/n"));
        while !stage.said.has("Waiting") {
            assert!(
                !second.is_finished(),
                "it did not wait: {:?}",
                second.join()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(stage.hub.log().iter().all(|r| !r.is_file()));
        // the first one finishes
        let blob = stage.blob("o/n", &etag("a.safetensors", &body));
        fs::write(&blob, &body).unwrap();
        drop(held);
        let pulled = second.join().unwrap().unwrap();
        assert_eq!(fs::read(pulled.path).unwrap(), body);
    });
    assert!(stage.hub.log().iter().all(|r| !r.is_file()));

    // and while somebody fetches it, nobody removes it
    let held = fs::File::open(&lock).unwrap();
    held.lock().unwrap();
    let cache = Cache::new(&stage.settings.cache);
    assert!(
        cache
            .remove(&name)
            .unwrap_err()
            .to_string()
            .contains("another process")
    );
    drop(held);
    cache.remove(&name).unwrap();
    assert!(stage.files("o/n").is_empty());
}

#[test]
fn two_at_once_fetch_each_file_once() {
    let stage = Stage::new();
    folder(&stage);
    stage.hub.hook(|request, reply| super::server::Reply {
        delay: Duration::from_millis(if request.storage { 100 } else { 0 }),
        ..reply
    });
    std::thread::scope(|scope| {
        let both: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| stage.pull("o/n").unwrap()))
            .collect();
        let paths: Vec<_> = both
            .into_iter()
            .map(|one| one.join().unwrap().path)
            .collect();
        assert_eq!(paths[0], paths[1]);
    });
    let mut asked: Vec<String> = stage
        .hub
        .log()
        .into_iter()
        .filter(|r| r.is_file() && !r.storage)
        .map(|r| r.path)
        .collect();
    let all = asked.len();
    asked.sort();
    asked.dedup();
    assert_eq!(all, asked.len());
    assert!(stage.said.has("Waiting"));
}

#[cfg(unix)]
#[test]
fn a_half_written_cache_is_mended() {
    let stage = Stage::new();
    let body = content(1, 1000);
    stage.hub.add("o/n", &[("a.safetensors", &body)]);
    let path = stage.pull("o/n").unwrap().path;
    let blob = stage.blob("o/n", &etag("a.safetensors", &body));
    // too short; gone; a link to elsewhere
    fs::write(&blob, "x").unwrap();
    assert_eq!(fs::read(stage.pull("o/n").unwrap().path).unwrap(), body);
    fs::remove_file(&blob).unwrap();
    assert_eq!(fs::read(stage.pull("o/n").unwrap().path).unwrap(), body);
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/nowhere", &path).unwrap();
    assert_eq!(fs::read(stage.pull("o/n").unwrap().path).unwrap(), body);
    // where links are not possible, Python keeps the file itself: it stays
    fs::remove_file(&path).unwrap();
    fs::write(&path, &body).unwrap();
    stage.pull("o/n").unwrap();
    assert!(!path.symlink_metadata().unwrap().is_symlink());
}

#[test]
fn damage_is_found_and_removing_stays_inside() {
    let stage = Stage::new();
    let files = folder(&stage);
    stage.pull("o/n").unwrap();
    let (cache, name) = (
        Cache::new(&stage.settings.cache),
        RepoName::parse("o/n").unwrap(),
    );
    let check = |cache: &Cache| cache.verify(&name, &mut |_| true).unwrap();
    assert!(check(&cache).iter().all(|one| one.good) && check(&cache).len() == 5);
    let (path, bytes) = &files[3];
    fs::write(stage.blob("o/n", &etag(path, bytes)), "{X}").unwrap();
    let bad: Vec<String> = check(&cache)
        .into_iter()
        .filter(|one| !one.good)
        .map(|one| one.file)
        .collect();
    assert_eq!(bad, [*path]);
    assert!(matches!(
        cache.verify(&name, &mut |_| false),
        Err(sd_rs::Error::Interrupted)
    ));

    let outside = stage.dir.path("outside");
    fs::create_dir_all(&outside).unwrap();
    fs::write(outside.join("kept"), "").unwrap();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(
            &outside,
            stage.settings.cache.join("models--o--n/blobs/link"),
        )
        .unwrap();
        std::os::unix::fs::symlink(&outside, stage.settings.cache.join("models--o--linked"))
            .unwrap();
        cache.remove(&RepoName::parse("o/linked").unwrap()).unwrap();
    }
    fs::create_dir_all(stage.settings.cache.join("models--o--other")).unwrap();
    cache.remove(&name).unwrap();
    assert!(outside.join("kept").is_file());
    let left: Vec<String> = cache
        .repos()
        .into_iter()
        .map(|repo| repo.name.id().to_owned())
        .collect();
    assert_eq!(left, ["o/other"]);
    assert!(
        cache
            .remove(&name)
            .unwrap_err()
            .to_string()
            .contains("not in the cache")
    );
}

#[test]
fn offline_asks_nobody() {
    let mut stage = Stage::new();
    folder(&stage);
    stage.settings.offline = true;
    stage.fails("o/n", "HF_HUB_OFFLINE forbids");
    assert!(stage.hub.log().is_empty());
    stage.settings.offline = false;
    stage.pull("o/n:README.md").unwrap();
    stage.hub.log();
    stage.settings.offline = true;
    stage.fails("o/n", "has 1 of its files, not all that are needed");
    let name = |text: &str| RepoName::parse(text).unwrap();
    assert!(hub::cached(&stage.settings, &name("o/n:README.md"), false).is_some());
    assert!(hub::cached(&stage.settings, &name("o/n"), true).is_none());
    assert!(stage.hub.log().is_empty());
    stage.settings.offline = false;
    let whole = stage.pull("o/n").unwrap();
    stage.hub.log();
    stage.settings.offline = true;
    assert_eq!(stage.pull("o/n").unwrap(), whole);
    assert!(stage.hub.log().is_empty());
}
