//! The command line: typed arguments become a request; results go to stdout, everything else to stderr.

pub mod args;
mod bench;
mod control;
mod convert;
mod doctor;
mod embedding;
mod fetch;
mod full_size;
mod generate;
pub mod inspect;
mod interrupt;
mod kernels;
mod lora;
mod models;
mod picture;
mod preview;
mod upscale;

use std::io::Write;

use args::{Cli, Command};

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
        Command::Models(args) => models::run(&args),
        Command::Control(args) => control::run(&args),
        Command::Convert(args) => convert::run(&args, cli.quiet),
        Command::Upscale(args) => upscale::run(&args, cli.quiet),
    }
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
