//! The command line: typed arguments become a request; results go to stdout, everything else to stderr.

pub mod args;
mod bench;
mod doctor;
mod full_size;
mod generate;
pub mod inspect;
mod interrupt;
mod kernels;

use std::io::Write;
use std::path::Path;

use args::{Cli, Command};

use crate::checkpoint::{Checkpoint, ReadOptions};
use crate::error::{Error, Result};

/// Runs the command.
///
/// # Errors
/// Whatever stops it; see [`Error::exit_status`].
pub fn run(cli: Cli) -> Result<()> {
    let stdout = &mut std::io::stdout();
    match cli.command {
        Command::Generate(args) => generate::run(&args, cli.quiet),
        Command::Inspect(args) => inspect::run(&args, stdout),
        Command::Bench(args) => bench::run(&args, cli.quiet),
        Command::Doctor(args) => doctor::run(stdout, args.json),
    }
}

/// The checkpoint that `--model` names, or the one in this binary.
fn open_model(model: Option<&Path>, no_mmap: bool) -> Result<Checkpoint> {
    match model {
        Some(path) => Checkpoint::open_with(path, &read_options(no_mmap)),
        None => crate::demo::checkpoint(),
    }
}

fn read_options(no_mmap: bool) -> ReadOptions {
    ReadOptions {
        no_mmap,
        ..ReadOptions::default()
    }
}

/// The name of a model in reports: the file's stem or the folder's name.
fn model_name(model: Option<&Path>) -> String {
    let Some(path) = model else {
        return "demo".to_owned();
    };
    let stem = if path.is_dir() {
        path.file_name()
    } else {
        path.file_stem()
    };
    stem.map_or_else(
        || path.display().to_string(),
        |stem| stem.to_string_lossy().into_owned(),
    )
}

/// Sets the number of threads of every parallel loop; must come before the first of them.
fn set_threads(threads: Option<u16>) -> Result<usize> {
    if let Some(threads) = threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(usize::from(threads))
            .build_global()
            .map_err(|e| Error::Usage(format!("--threads {threads} cannot be set: {e}")))?;
    }
    Ok(rayon::current_num_threads())
}

/// Writes a line to stdout; a reader that has gone away is no error.
fn print_line(line: &str) -> Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::disk("stdout", "write", e))
        }
        _ => Ok(()),
    }
}
