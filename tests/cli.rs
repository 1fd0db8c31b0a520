//! The binary as a user runs it: results, exit statuses, messages, files that are whole or absent.

use serde_json::Value;

use crate::support::weights::{Case, FolderForm, Stored, edit};
use crate::support::{Dir, finish};

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

/// Each image has its own Brownian motion, of its own seed and generator.
#[test]
fn stochastic_noise_of_a_batch_is_the_noise_alone() {
    let dir = Dir::new();
    let latents = |name: &str, more: &[&str]| {
        let (kept, pictures) = (
            format!("{name}.safetensors"),
            format!("{name}-{{seed}}.png"),
        );
        let sampler = ["--sampler", "DPM++ SDE", "--save-latents", &kept];
        let small = ["generate", "-p", "a red circle", "-W", "64", "-H", "64"];
        let rest = ["--steps", "3", "-o", &pictures];
        dir.ok(&[&small[..], &rest, &sampler, more].concat());
        let file = candle_core::safetensors::load(dir.path(&kept), &candle_core::Device::Cpu);
        let tensor = file.unwrap()["latents"].flatten_from(1).unwrap();
        tensor.to_vec2::<f32>().unwrap()
    };
    for rng in ["cpu", "nv"] {
        let both = latents(
            &format!("{rng}-both"),
            &["-b", "2", "--seed", "3", "--rng", rng],
        );
        let alone = latents(&format!("{rng}-alone"), &["--seed", "4", "--rng", rng]);
        let apart = |a: &[f32], b: &[f32]| {
            let off = a.iter().zip(b).map(|(a, b)| (a - b).abs());
            off.fold(0.0, f32::max)
        };
        assert!(apart(&both[1], &alone[0]) < 1e-3, "{rng}");
        assert!(apart(&both[0], &alone[0]) > 0.1, "{rng}");
    }
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
        (vec!["--sampler", "DDIM CFG++"], "not built yet"),
        (
            vec!["--sampler", "DPM adaptive"],
            "what the picture looks like",
        ),
        (vec!["--dtype", "f16"], "f16"),
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

/// What the eye sees is the same in both.
#[test]
fn a_picture_in_bf16_is_the_picture_in_f32() {
    use sd_rs::device::{DtypeChoice, dtype};
    if dtype(DtypeChoice::Bf16, &candle_core::Device::Cpu).is_err() {
        return; // this processor does not multiply bf16
    }
    let dir = Dir::new();
    let picture = |dtype: &str, prompt: &str| {
        let name = format!("{dtype}.png");
        dir.ok(&[
            "generate",
            "-p",
            prompt,
            "-s",
            "5",
            "--dtype",
            dtype,
            "-o",
            &name,
            "--overwrite",
        ]);
        image::open(dir.path(&name)).unwrap().to_rgb8().into_raw()
    };
    for prompt in ["a yellow star", "the sea at sunset with a red sun"] {
        let (one, other) = (picture("f32", prompt), picture("bf16", prompt));
        let squares = one
            .iter()
            .zip(&other)
            .map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2));
        let mean = squares.sum::<f64>() / one.len() as f64;
        let psnr = 10.0 * (255.0f64.powi(2) / mean).log10();
        assert!(psnr > 40.0, "{prompt}: {psnr} dB");
    }
}

/// `auto` takes bf16 only where the processor has it; asked for by name it is refused elsewhere.
#[test]
fn bf16_needs_a_processor_that_has_it() {
    let dir = Dir::new();
    let plain = |dtype| {
        let mut command = dir.command(&["generate", "-p", "x", "--dry-run", "--dtype", dtype]);
        finish(command.env("SD_RS_CPU", "portable").spawn().unwrap())
    };
    assert_eq!(plain("auto").status, Some(0));
    let refused = plain("bf16");
    assert_eq!(refused.status, Some(1));
    assert!(
        refused.stderr.contains("level portable"),
        "{}",
        refused.stderr
    );
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

#[test]
fn plain_reads_make_the_same_picture() {
    let dir = Dir::new();
    Case::load("sd1-odd").write_folder(&dir.path("model"), &FolderForm::default());
    let file = |more: &[&'static str], name: &'static str| {
        let mut args = generate(&["-m", "model", "-o", name]);
        args.extend(more);
        dir.ok(&args);
        std::fs::read(dir.path(name)).unwrap()
    };
    assert_eq!(file(&["--no-mmap"], "a.png"), file(&[], "b.png"));
    let seen = |more: &[&'static str]| {
        let mut args = vec!["inspect", "model", "--json"];
        args.extend(more);
        dir.ok(&args)
    };
    assert_eq!(seen(&["--no-mmap"]), seen(&[]));
}

#[test]
fn unused_tensors_are_told_of_once_in_one_line() {
    let dir = Dir::new();
    Case::load("sd1-odd").write_folder(&dir.path("model"), &FolderForm::default());
    for (file, count) in [
        ("unet/diffusion_pytorch_model", 3),
        ("text_encoder/model", 2),
    ] {
        edit(&dir.path(&format!("model/{file}.safetensors")), |tensors| {
            tensors.extend((0..count).map(|i| Stored {
                name: format!("odd{i}\u{1b}"),
                shape: vec![1],
                dtype: safetensors::Dtype::F32,
                bytes: vec![0; 4],
            }));
        });
    }
    let args = generate(&["-m", "model", "--count", "2", "-b", "2", "-o", "p.png"]);
    let outcome = dir.sd_rs(&args);
    assert_eq!(outcome.status, Some(0), "{outcome:?}");
    assert_eq!(outcome.stderr.lines().count(), 1, "{}", outcome.stderr);
    for part in [
        "5 tensors are not used",
        "`text_encoder/odd0\\u{1b}`",
        "and 2 more",
        "inspect",
    ] {
        assert!(outcome.stderr.contains(part), "{part}: {}", outcome.stderr);
    }
    let mut args = generate(&["-m", "model", "-o", "q.png"]);
    args.push("-q");
    assert_eq!(dir.sd_rs(&args).stderr, "");
}

/// A folder whose tensor `name` of `component` holds `value` somewhere.
fn spoiled(component: &str, name: &str, value: half::f16) -> Dir {
    let dir = Dir::new();
    Case::load("sd1-odd").write_folder(&dir.path("model"), &FolderForm::default());
    let path = dir.path(&format!(
        "model/{component}/diffusion_pytorch_model.safetensors"
    ));
    edit(&path, |tensors| {
        let tensor = tensors
            .iter_mut()
            .find(|tensor| tensor.name == name)
            .unwrap();
        assert_eq!(tensor.dtype, safetensors::Dtype::F16);
        tensor.bytes[..2].copy_from_slice(&value.to_le_bytes());
    });
    dir
}

#[test]
fn what_is_not_numbers_never_becomes_a_picture() {
    use half::f16;
    for (component, name, value, words) in [
        ("vae", "decoder.conv_in.weight", f16::NAN, "autoencoder"),
        (
            "vae",
            "decoder.conv_in.weight",
            f16::INFINITY,
            "autoencoder",
        ),
        (
            "vae",
            "decoder.conv_out.bias",
            f16::NEG_INFINITY,
            "autoencoder",
        ),
        (
            "vae",
            "decoder.mid_block.resnets.0.norm1.weight",
            f16::NAN,
            "autoencoder",
        ),
        ("unet", "conv_in.weight", f16::NAN, "network call 1"),
        (
            "unet",
            "mid_block.resnets.0.conv1.weight",
            f16::INFINITY,
            "network call 1",
        ),
    ] {
        let dir = spoiled(component, name, value);
        let args = generate(&[
            "-m",
            "model",
            "-o",
            "p.png",
            "--save-latents",
            "l.safetensors",
        ]);
        let sentence = dir.fails(&args, 1);
        assert!(
            sentence.contains(words),
            "{component} {name} {value}: {sentence}"
        );
        assert!(sentence.contains("may be damaged"), "{sentence}");
        assert_eq!(sentence.lines().count(), 1, "{sentence}");
        assert_eq!(dir.names(), ["model"], "{component} {name} {value}");
    }
}

/// Starts a long run and gives it back when its standard error has said `words`.
#[cfg(unix)]
fn begun(dir: &Dir, more: &[&str], words: &str) -> std::process::Child {
    use std::io::{BufRead, BufReader};
    let mut args = vec![
        "-vv", "generate", "-p", "x", "-W", "64", "-H", "64", "-o", "p.png",
    ];
    args.extend(more);
    let mut child = dir.command(&args).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let said = lines.by_ref().any(|line| line.unwrap().contains(words));
    assert!(said, "{:?} ended without `{words}`", child.wait());
    // what it says from now on must not stop it
    std::thread::spawn(move || lines.for_each(drop));
    child
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_with_130_and_leaves_nothing() {
    let dir = Dir::new();
    let mut child = begun(&dir, &["--steps", "1000"], "step 2 of 1000");
    let pid = child.id().to_string();
    let mut sent = std::process::Command::new("kill");
    sent.args(["-INT", &pid]);
    assert!(sent.status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(dir.names().is_empty(), "{:?}", dir.names());
}

#[cfg(unix)]
#[test]
fn a_killed_run_leaves_no_picture_or_a_whole_one() {
    use std::time::{Duration, Instant};
    let dir = Dir::new();
    let mut child = begun(&dir, &["--steps", "1000"], "step 2 of 1000");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(dir.names().is_empty(), "{:?}", dir.names());
    // while the picture is being written: first there is an unfinished file, and the picture's name is that of a whole one
    let mut first_names = Vec::new();
    for microseconds in (0..12_000).step_by(1000) {
        let dir = Dir::new();
        let mut child = begun(&dir, &["--steps", "1", "-s", "1"], "decoding");
        let start = Instant::now();
        let mut names = Vec::new();
        while names.is_empty() && start.elapsed() < Duration::from_secs(60) {
            names = dir.names();
        }
        std::thread::sleep(Duration::from_micros(microseconds));
        child.kill().unwrap();
        child.wait().unwrap();
        first_names.extend(names);
        for name in dir.names() {
            if name == "p.png" {
                let picture = image::open(dir.path(&name)).unwrap();
                assert_eq!((picture.width(), picture.height()), (64, 64));
            } else {
                assert!(is_unfinished(&name), "{name}");
            }
        }
    }
    let seen = first_names.iter().any(|name| is_unfinished(name));
    assert!(seen, "never an unfinished file: {first_names:?}");
}

#[cfg(unix)]
fn is_unfinished(name: &str) -> bool {
    name.starts_with(".sd-rs-") && name.ends_with(".part")
}

/// A flag that is for every picture does not stand under a heading of flags that are not.
#[test]
fn help_has_plain_flags_first() {
    let dir = Dir::new();
    let help = dir.ok(&["generate", "--help"]);
    let first = help.find("From a picture:").unwrap();
    for flag in [
        "--output <",
        "--json",
        "--dtype <",
        "--models-dir <",
        "--dry-run",
    ] {
        let at = help
            .find(flag)
            .unwrap_or_else(|| panic!("{flag} is not there"));
        assert!(at < first, "{flag} stands behind other headings");
    }
}
