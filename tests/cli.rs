//! The binary as a user runs it: results, exit statuses, messages, files that are whole or absent.

use serde_json::Value;

use crate::support::Dir;

const SMALL: [&str; 8] = [
    "--width", "64", "--height", "64", "--steps", "2", "--seed", "1",
];

fn generate<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["generate", "-p", "a red circle on a blue background"];
    args.extend(SMALL);
    args.extend(more);
    args
}

#[test]
fn a_picture_its_report_and_its_latents() {
    let dir = Dir::new();
    let out = dir.ok(&generate(&[
        "--json",
        "-o",
        "p.png",
        "--save-latents",
        "l.safetensors",
    ]));
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&report["seed"], &report["width"], &report["path"]),
        (&1.into(), &64.into(), &"p.png".into())
    );
    assert_eq!(
        report["timings"]["step_s"].as_array().map(Vec::len),
        Some(2)
    );
    let picture = image::open(dir.path("p.png")).unwrap();
    assert_eq!((picture.width(), picture.height()), (64, 64));
    let latents =
        candle_core::safetensors::load(dir.path("l.safetensors"), &candle_core::Device::Cpu)
            .unwrap();
    assert_eq!(latents["latents"].dims(), [1, 4, 8, 8]);
}

#[test]
fn a_picture_of_a_batch_is_the_picture_alone() {
    let dir = Dir::new();
    dir.ok(&generate(&["-b", "2", "--count", "2", "-o", "{seed}.png"]));
    dir.ok(&[
        "generate",
        "-p",
        "a red circle on a blue background",
        "-W",
        "64",
        "-H",
        "64",
        "--steps",
        "2",
        "-s",
        "4",
        "-o",
        "alone.png",
    ]);
    let pixels = |name: &str| image::open(dir.path(name)).unwrap().to_rgb8().into_raw();
    let (of_batch, alone) = (pixels("4.png"), pixels("alone.png"));
    let most = of_batch
        .iter()
        .zip(&alone)
        .map(|(a, b)| a.abs_diff(*b))
        .max();
    assert!(most <= Some(1), "{most:?}");
    assert_ne!(pixels("3.png"), alone);
}

#[test]
fn wrong_command_lines_exit_with_2_and_say_why() {
    let dir = Dir::new();
    for (more, word) in [
        (vec!["--width", "65"], "multiple of 8"),
        (vec!["--steps", "0"], "--steps is 0"),
        (vec!["--cfg-scale", "nan"], "--cfg-scale"),
        (vec!["--sampler", "Eular"], "unknown sampler"),
        (vec!["--clip-skip", "0"], "--clip-skip is 0"),
        (vec!["--seed", "-2"], "--seed is -2"),
    ] {
        let mut args = vec!["generate", "-p", "x"];
        args.extend(more);
        let out = dir.sd_rs(&args);
        assert_eq!(out.status, Some(2), "{args:?}: {}", out.stderr);
        assert!(out.stderr.contains(word), "{args:?}: {}", out.stderr);
        assert_eq!(out.stderr.lines().count(), 1, "{args:?}: {}", out.stderr);
    }
    assert_eq!(dir.sd_rs(&["generate"]).status, Some(2));
    assert!(dir.names().is_empty());
}

#[test]
fn what_is_not_there_or_not_built_exits_with_1() {
    let dir = Dir::new();
    for (more, word) in [
        (
            vec!["--model", "nothing.safetensors"],
            "nothing.safetensors",
        ),
        (vec!["--sampler", "DPM++ SDE"], "not built yet"),
        (vec!["--dtype", "bf16"], "bf16"),
        (vec!["--device", "cuda"], "cuda"),
        (vec!["-o", "no/such/folder/p.png"], "no/such/folder"),
    ] {
        let mut args = vec!["generate", "-p", "x"];
        args.extend(more);
        let out = dir.sd_rs(&args);
        assert_eq!(out.status, Some(1), "{args:?}: {}", out.stderr);
        assert!(out.stderr.contains(word), "{args:?}: {}", out.stderr);
    }
    assert!(dir.names().is_empty());
}

#[test]
fn a_dry_run_computes_nothing() {
    let dir = Dir::new();
    let out = dir.ok(&generate(&["--dry-run", "--json"]));
    let plan: Value = serde_json::from_str(&out).unwrap();
    assert!(plan["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 0));
    assert!(dir.names().is_empty());
}

#[test]
fn bench_and_doctor_report_as_json() {
    let dir = Dir::new();
    let out = dir.ok(&["bench", "--size", "64", "--steps", "1", "--json", "-q"]);
    let report: Value = serde_json::from_str(&out).unwrap();
    for key in [
        "family",
        "size",
        "timings",
        "gflop",
        "gflops",
        "peak_gflops",
        "peak_rss_bytes",
    ] {
        assert!(!report[key].is_null(), "{key}");
    }
    let out = dir.ok(&["doctor", "--json"]);
    assert!(serde_json::from_str::<Value>(&out).unwrap().is_object());
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_with_130_and_leaves_nothing() {
    use std::process::{Command, Stdio};
    let dir = Dir::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_sd-rs"))
        .args(["generate", "-p", "x", "--steps", "1000", "-o", "p.png"])
        .current_dir(dir.root())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(3000));
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(dir.names().is_empty(), "{:?}", dir.names());
}
