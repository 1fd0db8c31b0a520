//! `sd-rs doctor`: what this machine can do, and in plain words what stands in the way.
//!
//! Everything is read from the system at run time and nothing is changed; what cannot be found out is left open, never guessed.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sd_kernels::cpu::Level;
use sd_kernels::gpu::Info;
use sd_kernels::gpu::cuda::{self, Absent};
use serde_json::{Value, json};

use crate::device;
use crate::error::{Error, Result};
use crate::memory::Memory;

/// Memory below which Stable Diffusion 1.5 at 512×512 in f32 does not fit, in bytes.
const SD15_BYTES: u64 = 5_000_000_000;

/// Memory below which even the demonstration checkpoint may not fit, in bytes.
const DEMO_BYTES: u64 = 500_000_000;

/// Free disk space below which pictures are at risk, in bytes.
const DISK_BYTES: u64 = 50_000_000;

/// Prints the report: lines for people, or one JSON object.
///
/// # Errors
/// [`Error::Disk`] when the report cannot be written.
pub(super) fn run(out: &mut dyn Write, json: bool) -> Result<()> {
    let machine = Machine::look();
    let text = if json {
        format!("{:#}\n", machine.to_json())
    } else {
        machine.to_text()
    };
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|source| Error::disk("standard output", "write", source))
}

/// What was found out. Sizes are bytes; absent is unknown.
struct Machine {
    system: String,
    cpu: Option<String>,
    features: Vec<(&'static str, bool)>,
    /// Physical cores.
    cores: Option<usize>,
    logical_cpus: Option<usize>,
    /// What this process may use: affinity and container quota respected.
    usable_threads: usize,
    memory_total: Option<u64>,
    memory_available: Option<u64>,
    /// The container's limit, where it is below the total.
    memory_limit: Option<u64>,
    /// NVIDIA's cards, or why there is none.
    cards: std::result::Result<Vec<Info>, Absent>,
    folder: Option<PathBuf>,
    folder_writable: bool,
    disk_free: Option<u64>,
}

impl Machine {
    fn look() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let folder = std::env::current_dir().ok();
        let memory = Memory::look();
        Self {
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            cpu: cpuinfo_field(&cpuinfo, "model name")
                .or_else(|| sysctl("machdep.cpu.brand_string")),
            features: cpu_features(&cpuinfo),
            cores: physical_cores(&cpuinfo).or_else(|| sysctl("hw.physicalcpu")?.parse().ok()),
            logical_cpus: logical_cpus(&cpuinfo).or_else(|| sysctl("hw.logicalcpu")?.parse().ok()),
            usable_threads: std::thread::available_parallelism().map_or(1, usize::from),
            memory_total: memory.total.or_else(|| sysctl("hw.memsize")?.parse().ok()),
            memory_available: memory.available,
            memory_limit: memory.limit,
            cards: cuda::list(),
            folder_writable: folder.as_deref().is_some_and(writable),
            disk_free: folder.as_deref().and_then(disk_free),
            folder,
        }
    }

    fn has(&self, feature: &str) -> bool {
        self.features
            .iter()
            .any(|(name, there)| *name == feature && *there)
    }

    /// What stands in the way, with what to do about it.
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if cfg!(target_arch = "x86_64") && !(self.has("avx2") && self.has("fma")) {
            problems.push(
                "the processor has no AVX2 with FMA: everything works, several times slower"
                    .to_owned(),
            );
        }
        match self.memory_available {
            Some(free) if free < DEMO_BYTES => problems.push(format!(
                "only {} of memory are free: even the demonstration checkpoint may not fit; close other programs",
                gigabytes(free)
            )),
            Some(free) if free < SD15_BYTES => problems.push(format!(
                "{} of memory are free and Stable Diffusion 1.5 at 512x512 takes about {}: make smaller pictures or close other programs",
                gigabytes(free),
                gigabytes(SD15_BYTES)
            )),
            _ => {}
        }
        if let Some(all) = self.logical_cpus.filter(|all| self.usable_threads < *all) {
            problems.push(format!(
                "this process may use {} of {all} processors (a container's quota or an affinity mask)",
                self.usable_threads
            ));
        }
        if self.folder.is_none() {
            problems.push(
                "the current folder cannot be read: name the picture with --output FILE".to_owned(),
            );
        } else if !self.folder_writable {
            problems.push("pictures cannot be written to the current folder: use --output FILE or another folder".to_owned());
        }
        if let Some(free) = self.disk_free.filter(|free| *free < DISK_BYTES) {
            problems.push(format!("only {} of disk are free here", gigabytes(free)));
        }
        problems
    }

    fn devices(&self) -> Vec<(&'static str, bool, String)> {
        let level = Level::current();
        let types = if level.has_bf16() { "bf16, f32" } else { "f32" };
        let note = format!("{types}; kernels for {}", level.name());
        let mut devices = vec![("cpu", true, note)];
        match &self.cards {
            Ok(cards) => devices.extend(cards.iter().map(|card| {
                let is_new = card.capability >= (8, 0);
                ("cuda", is_new, of_card(card))
            })),
            Err(absent) => devices.push(("cuda", false, absent.to_string())),
        }
        if device::is_built("cuda") {
            let note =
                "candle's operations, never tried on hardware: --device cuda with SD_RS_EAGER=1";
            devices.push(("cuda", true, note.to_owned()));
        }
        if cfg!(target_os = "macos") {
            let (is_built, note) = candles("metal");
            devices.push(("metal", is_built, note));
        }
        devices
    }

    fn to_text(&self) -> String {
        let unknown = || "unknown".to_owned();
        let size = |bytes: Option<u64>| bytes.map_or_else(unknown, gigabytes);
        let count = |number: Option<usize>| number.map_or_else(unknown, |n| n.to_string());
        let list = |there: bool| {
            let names: Vec<&str> = self
                .features
                .iter()
                .filter(|f| f.1 == there)
                .map(|f| f.0)
                .collect();
            if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(" ")
            }
        };
        let limit = self.memory_limit.map_or_else(String::new, |limit| {
            format!(", this container may use {}", gigabytes(limit))
        });
        let folder = self
            .folder
            .as_ref()
            .map_or_else(unknown, |path| path.display().to_string());
        let mut rows = vec![
            (
                "program",
                format!("sd-rs {} on {}", env!("CARGO_PKG_VERSION"), self.system),
            ),
            ("processor", self.cpu.clone().unwrap_or_else(unknown)),
            ("has", list(true)),
            ("lacks", list(false)),
            (
                "threads",
                format!(
                    "{} usable; {} cores, {} logical processors",
                    self.usable_threads,
                    count(self.cores),
                    count(self.logical_cpus)
                ),
            ),
            (
                "memory",
                format!(
                    "{} free of {}{limit}",
                    size(self.memory_available),
                    size(self.memory_total)
                ),
            ),
        ];
        for (name, usable, note) in self.devices() {
            rows.push((
                "device",
                format!(
                    "{name} {} ({note})",
                    if usable { "usable" } else { "not usable" }
                ),
            ));
        }
        rows.push((
            "model",
            "the demonstration checkpoint is built in and used when --model is not given"
                .to_owned(),
        ));
        rows.push((
            "output",
            format!(
                "{folder} ({} free), unless --output says otherwise",
                size(self.disk_free)
            ),
        ));
        let mut text: String = rows
            .iter()
            .map(|(name, value)| format!("{name:<10} {value}\n"))
            .collect();
        match self.problems().as_slice() {
            [] => text.push_str("\nno problems found\n"),
            problems => {
                text.push('\n');
                for problem in problems {
                    text.push_str(&format!("note: {problem}\n"));
                }
            }
        }
        text
    }

    fn to_json(&self) -> Value {
        let features: serde_json::Map<String, Value> = self
            .features
            .iter()
            .map(|(name, there)| ((*name).to_owned(), Value::Bool(*there)))
            .collect();
        let devices: Vec<Value> = self
            .devices()
            .into_iter()
            .map(|(name, usable, note)| json!({"name": name, "usable": usable, "note": note}))
            .collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "system": self.system,
            "cpu": self.cpu,
            "cpu_features": features,
            "cores": self.cores,
            "logical_cpus": self.logical_cpus,
            "usable_threads": self.usable_threads,
            "memory_total_bytes": self.memory_total,
            "memory_available_bytes": self.memory_available,
            "memory_limit_bytes": self.memory_limit,
            "devices": devices,
            "demonstration_checkpoint": true,
            "output_folder": self.folder.as_ref().map(|path| path.display().to_string()),
            "output_folder_writable": self.folder_writable,
            "disk_free_bytes": self.disk_free,
            "problems": self.problems(),
        })
    }
}

/// Decimal gigabytes, as disks and this program's messages count them.
fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

/// Instruction sets that kernels use or will use, by run-time detection.
#[cfg(target_arch = "x86_64")]
fn cpu_features(cpuinfo: &str) -> Vec<(&'static str, bool)> {
    use std::arch::is_x86_feature_detected as detected;
    // The standard library does not detect AMX yet; Linux tells.
    let flags = cpuinfo_field(cpuinfo, "flags").unwrap_or_default();
    let flag = |name: &str| flags.split_whitespace().any(|flag| flag == name);
    vec![
        ("avx2", detected!("avx2")),
        ("fma", detected!("fma")),
        ("f16c", detected!("f16c")),
        ("avx512f", detected!("avx512f")),
        ("avx512_vnni", detected!("avx512vnni")),
        ("avx512_bf16", detected!("avx512bf16")),
        ("avx512_fp16", detected!("avx512fp16")),
        ("avx_vnni", detected!("avxvnni")),
        ("amx_bf16", flag("amx_bf16")),
        ("amx_int8", flag("amx_int8")),
    ]
}

/// Instruction sets that kernels use or will use, by run-time detection.
#[cfg(target_arch = "aarch64")]
fn cpu_features(_cpuinfo: &str) -> Vec<(&'static str, bool)> {
    use std::arch::is_aarch64_feature_detected as detected;
    vec![
        ("neon", detected!("neon")),
        ("fp16", detected!("fp16")),
        ("dotprod", detected!("dotprod")),
        ("bf16", detected!("bf16")),
        ("i8mm", detected!("i8mm")),
        ("sve", detected!("sve")),
    ]
}

/// No instruction sets are known for this architecture.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn cpu_features(_cpuinfo: &str) -> Vec<(&'static str, bool)> {
    Vec::new()
}

/// The first value of a field in `/proc/cpuinfo`.
fn cpuinfo_field(cpuinfo: &str, name: &str) -> Option<String> {
    cpuinfo_values(cpuinfo, name).next().map(str::to_owned)
}

/// All values of a field in `/proc/cpuinfo`, one a processor.
fn cpuinfo_values<'a>(cpuinfo: &'a str, name: &'a str) -> impl Iterator<Item = &'a str> {
    let fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    fields
        .filter(move |(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim())
}

fn logical_cpus(cpuinfo: &str) -> Option<usize> {
    Some(cpuinfo_values(cpuinfo, "processor").count()).filter(|count| *count > 0)
}

/// Distinct pairs of socket and core.
fn physical_cores(cpuinfo: &str) -> Option<usize> {
    let sockets = cpuinfo_values(cpuinfo, "physical id");
    let cores: std::collections::BTreeSet<_> =
        sockets.zip(cpuinfo_values(cpuinfo, "core id")).collect();
    Some(cores.len()).filter(|count| *count > 0)
}

/// Whether a device of candle's can be used, and what is to be said of it.
fn candles(name: &str) -> (bool, String) {
    match device::is_built(name) {
        true => (
            true,
            format!("candle's operations, never tried on hardware: --device {name}"),
        ),
        false => (
            false,
            format!("this binary was built without --features {name}"),
        ),
    }
}

/// What is to be said of a card.
fn of_card(card: &Info) -> String {
    let (major, minor) = card.capability;
    let fits = if card.capability < (8, 0) {
        "too old: 8.0 is needed"
    } else {
        "never tried on hardware: --device cuda"
    };
    format!(
        "{}, compute {major}.{minor}, {}; {fits}",
        card.name,
        gigabytes(card.memory)
    )
}

/// Whether a file can be made in a folder: tried, because permission bits do not tell of read-only mounts.
fn writable(folder: &Path) -> bool {
    tempfile::tempfile_in(folder).is_ok()
}

/// Free space in a folder's file system, as POSIX `df` tells it.
fn disk_free(folder: &Path) -> Option<u64> {
    df_available(&output_of("df", &["-Pk", folder.to_str()?])?)
}

/// The fourth column of `df -Pk`, in KiB. Counted from the column of percent signs, because names may hold spaces.
fn df_available(text: &str) -> Option<u64> {
    let words: Vec<&str> = text.lines().nth(1)?.split_whitespace().collect();
    let percent = words.iter().position(|word| word.ends_with('%'))?;
    words
        .get(percent.checked_sub(1)?)?
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// A value of macOS' `sysctl`.
fn sysctl(name: &str) -> Option<String> {
    cfg!(target_os = "macos").then(|| output_of("sysctl", &["-n", name]))?
}

/// What a program of the system prints, when it succeeds.
fn output_of(program: &str, arguments: &[&str]) -> Option<String> {
    let run = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .env("LC_ALL", "C")
        .output()
        .ok()?;
    let text = String::from_utf8(run.stdout).ok()?;
    run.status.success().then(|| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    const CPUINFO: &str = "processor\t: 0\nmodel name\t: Tiny CPU @ 2.0GHz: rev 2\nphysical id\t: 0\ncore id\t\t: 0\nflags\t\t: fpu amx_int8\n\n\
                           processor\t: 1\nmodel name\t: Tiny CPU\nphysical id\t: 0\ncore id\t\t: 0\n\n\
                           processor\t: 2\nmodel name\t: Tiny CPU\nphysical id\t: 1\ncore id\t\t: 0\n";

    #[test]
    fn proc_files_are_read() {
        assert_eq!(
            cpuinfo_field(CPUINFO, "model name").unwrap(),
            "Tiny CPU @ 2.0GHz: rev 2"
        );
        assert_eq!(logical_cpus(CPUINFO), Some(3));
        assert_eq!(physical_cores(CPUINFO), Some(2));
        assert_eq!((logical_cpus(""), physical_cores("")), (None, None));
        let df = "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/a b 100 60 40 60% /my disk\n";
        assert_eq!(df_available(df), Some(40 * 1024));
        assert_eq!(df_available("df: no"), None);
    }

    #[test]
    fn problems_are_told_with_a_way_out() {
        let mut machine = Machine::look();
        machine.memory_available = Some(3_200_000_000);
        machine.folder_writable = false;
        machine.disk_free = Some(1_000_000);
        machine.logical_cpus = Some(machine.usable_threads + 1);
        machine.features = vec![("avx2", false)];
        let text = machine.to_text();
        for part in ["3.2 GB", "--output", "of disk", "may use"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert_eq!(
            machine.to_json()["problems"].as_array().unwrap().len(),
            machine.problems().len()
        );
    }

    #[test]
    fn both_reports_are_whole() {
        let report = |json| {
            let mut out = Vec::new();
            run(&mut out, json).unwrap();
            String::from_utf8(out).unwrap()
        };
        let text = report(false);
        for name in [
            "processor",
            "threads",
            "memory",
            "device",
            "model",
            "output",
        ] {
            assert!(
                text.lines().any(|line| line.starts_with(name)),
                "{name} in {text}"
            );
        }
        let value: Value = serde_json::from_str(&report(true)).unwrap();
        assert!(value["usable_threads"].as_u64().unwrap() >= 1);
        assert_eq!(value["devices"][0]["name"], "cpu");
        if cfg!(target_os = "linux") {
            assert!(value["memory_total_bytes"].as_u64().unwrap() > 100_000_000);
            assert!(value["disk_free_bytes"].is_u64());
        }
    }
}
