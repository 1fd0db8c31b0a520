//! What several tests need: the binary run as a user runs it, in a folder of its own, with a limit on its time.
#![allow(
    dead_code,
    reason = "tools, not every one of them in use at every time"
)]

pub(crate) mod card;
pub(crate) mod containers;
pub(crate) mod weights;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a command may take before the test fails; a run that hangs must not hang the tests.
const LIMIT: Duration = Duration::from_secs(300);

/// A folder that goes away with the value.
pub(crate) struct Dir(tempfile::TempDir);

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The exit status; none when a signal ended it.
    pub(crate) status: Option<i32>,
    /// Standard output, byte for byte.
    pub(crate) stdout: Vec<u8>,
    /// Standard error.
    pub(crate) stderr: String,
}

impl Dir {
    /// A new, empty folder.
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// The folder.
    pub(crate) fn root(&self) -> &Path {
        self.0.path()
    }

    /// A file or folder in it, which need not exist.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// The names in it, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.root())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// `sd-rs` with these arguments, to be run in this folder; standard input is empty, colours and settings of the caller are off.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sd-rs"));
        command
            .args(args)
            .current_dir(self.root())
            .env("NO_COLOR", "1");
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            let ours = ["SD_RS_", "HF_", "HUGGING", "TRANSFORMERS_"]
                .iter()
                .any(|start| name.starts_with(start));
            if ours || name == "RUST_LOG" {
                command.env_remove(&*name);
            }
        }
        // no test reads or writes the user's own models, and none leaves this machine
        command
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_ENDPOINT", "http://127.0.0.1:9")
            .env("HF_HOME", self.path(".hf"))
            .env("XDG_CACHE_HOME", self.path(".cache"))
            .env("SD_RS_MODELS", self.path(".models"));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs `sd-rs` with these arguments in this folder.
    pub(crate) fn sd_rs(&self, args: &[&str]) -> Outcome {
        finish(self.command(args).spawn().unwrap())
    }

    /// Runs it and expects success; gives its standard output.
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let outcome = self.sd_rs(args);
        assert_eq!(outcome.status, Some(0), "sd-rs {args:?}: {outcome:?}");
        outcome.text()
    }

    /// The latents of a small run of the model in `model`, whose picture is `p.png`.
    pub(crate) fn latents(&self, prompt: &str, more: &[&str]) -> Vec<u8> {
        let mut args = vec![
            "generate",
            "-m",
            "model",
            "-p",
            prompt,
            "-o",
            "p.png",
            "--overwrite",
        ];
        args.extend([
            "-W", "64", "-H", "64", "--steps", "2", "-s", "1", "--dtype", "f32",
        ]);
        args.extend(["--save-latents", "l.safetensors"]);
        args.extend(more);
        self.ok(&args);
        std::fs::read(self.path("l.safetensors")).unwrap()
    }

    /// A1111's text in `p.png`.
    pub(crate) fn parameters(&self) -> String {
        let file = std::fs::File::open(self.path("p.png")).unwrap();
        let decoder = png::Decoder::new(std::io::BufReader::new(file));
        let reader = decoder.read_info().unwrap();
        let texts = &reader.info().uncompressed_latin1_text;
        let found = texts.iter().find(|text| text.keyword == "parameters");
        found.unwrap().text.clone()
    }

    /// Runs it and expects this failure, told in one sentence; gives the sentence.
    pub(crate) fn fails(&self, args: &[&str], status: i32) -> String {
        let outcome = self.sd_rs(args);
        assert_eq!(outcome.status, Some(status), "sd-rs {args:?}: {outcome:?}");
        outcome.stderr
    }
}

impl Outcome {
    /// Standard output as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }

    /// The JSON object on each line of standard output.
    pub(crate) fn json(&self) -> Vec<serde_json::Value> {
        let text = self.text();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

/// Waits for a started command, whose outputs must be pipes.
///
/// # Panics
/// When it takes longer than [`LIMIT`]; it is ended then.
pub(crate) fn finish(mut child: Child) -> Outcome {
    let stdout = drain(child.stdout.take().unwrap());
    let stderr = drain(child.stderr.take().unwrap());
    let start = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if start.elapsed() > LIMIT => {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("sd-rs took longer than {LIMIT:?}");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    Outcome {
        status: status.code(),
        stdout: stdout.join().unwrap(),
        stderr: String::from_utf8_lossy(&stderr.join().unwrap()).into_owned(),
    }
}

/// Reads a pipe to its end beside the test, so that neither side waits for the other.
fn drain(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).unwrap();
        bytes
    })
}
