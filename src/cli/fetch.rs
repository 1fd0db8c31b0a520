//! From what `--model` says to an open checkpoint: names are looked up, repositories fetched with a bar that Ctrl-C stops at once.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::args::LibraryArgs;
use super::interrupt;
use crate::checkpoint::{Checkpoint, ReadOptions};
use crate::error::{Error, Result};
use crate::hub::{Event, Listener, human};
use crate::library::{Library, Model, Options};

/// How long a fetch that was asked to stop may take to do so; what it has written is safe either way.
const GRACE: Duration = Duration::from_secs(2);

/// A checkpoint and what reports call it.
pub(super) struct Opened {
    pub(super) checkpoint: Checkpoint,
    pub(super) name: String,
}

/// The checkpoint that `--model` names, or the one in this binary.
pub(super) fn open_model(
    model: Option<&Path>,
    library: &LibraryArgs,
    no_mmap: bool,
) -> Result<Opened> {
    let options = ReadOptions {
        no_mmap,
        ..ReadOptions::default()
    };
    let Some(typed) = model else {
        return Ok(Opened {
            checkpoint: crate::demo::checkpoint()?,
            name: "demo".to_owned(),
        });
    };
    let model = resolve(typed, library)?;
    let checkpoint = Checkpoint::open_with(&model.path, &options)?;
    Ok(Opened {
        checkpoint,
        name: model.name,
    })
}

/// A part of a model that a flag names: a file, or the folder of that one component.
pub(super) fn open_part(
    typed: &Path,
    component: &str,
    library: &LibraryArgs,
    no_mmap: bool,
) -> Result<Opened> {
    let options = ReadOptions {
        no_mmap,
        ..ReadOptions::default()
    };
    let model = resolve(typed, library)?;
    Ok(Opened {
        checkpoint: Checkpoint::open_part(&model.path, component, &options)?,
        name: model.name,
    })
}

/// What a name means; see [`Library::resolve`].
pub(super) fn resolve(typed: &Path, args: &LibraryArgs) -> Result<Model> {
    // nothing is to be looked up: folders that are not there do not matter then
    if let Some(model) = Model::existing(typed) {
        return Ok(model);
    }
    let library = library(args)?;
    let typed = typed.to_owned();
    attended(move |listener| library.resolve(&typed, listener))
}

/// The folders that the flags name.
pub(super) fn library(args: &LibraryArgs) -> Result<Library> {
    // an empty variable is one that is not set
    let given = |path: &Option<std::path::PathBuf>| {
        path.clone().filter(|path| !path.as_os_str().is_empty())
    };
    Library::new(&Options {
        models: given(&args.models_dir),
        a1111: given(&args.a1111_dir),
        extra: given(&args.extra_model_paths),
    })
}

/// Runs `work` beside this thread, which meanwhile listens for Ctrl-C: a server that says nothing cannot hold the program.
pub(super) fn attended<T: Send + 'static>(
    work: impl FnOnce(&dyn Listener) -> Result<T> + Send + 'static,
) -> Result<T> {
    interrupt::listen();
    let progress = Progress {
        bar: ProgressBar::hidden(),
    };
    let bar = progress.bar.clone();
    let (sender, receiver) = channel();
    std::thread::spawn(move || sender.send(work(&progress)));
    let mut stopping = false;
    let result = loop {
        let wait = if stopping {
            GRACE
        } else {
            Duration::from_millis(50)
        };
        match receiver.recv_timeout(wait) {
            Ok(result) => break result,
            Err(RecvTimeoutError::Timeout) if stopping => break Err(Error::Interrupted),
            Err(RecvTimeoutError::Timeout) => stopping = interrupt::stopped(),
            Err(RecvTimeoutError::Disconnected) => {
                break Err(Error::Network(
                    "the download ended for no known reason; try again".to_owned(),
                ));
            }
        }
    };
    bar.finish_and_clear();
    if interrupt::stopped() {
        Err(Error::Interrupted)
    } else {
        result
    }
}

/// A bar on a terminal; what needs saying is said as warnings are.
struct Progress {
    bar: ProgressBar,
}

impl Listener for Progress {
    fn stopped(&self) -> bool {
        interrupt::stopped()
    }

    fn event(&self, event: Event<'_>) {
        let bar = &self.bar;
        match event {
            Event::Planned { files, bytes } => {
                tracing::info!("{files} files, {}", human(bytes));
                bar.set_length(bytes);
                if std::io::stderr().is_terminal() && tracing::enabled!(tracing::Level::WARN) {
                    let template = "fetching {wide_bar} {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left";
                    if let Ok(style) = ProgressStyle::with_template(template) {
                        bar.set_style(style);
                    }
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                    bar.enable_steady_tick(Duration::from_millis(200));
                }
            }
            Event::Bytes(bytes) => bar.inc(bytes),
            Event::Lost(bytes) => bar.set_position(bar.position().saturating_sub(bytes)),
            Event::Waiting(file) => {
                bar.suspend(|| tracing::warn!("another process fetches `{file}`; waiting for it"))
            }
            Event::Retrying(reason, wait) => bar.suspend(|| {
                tracing::warn!("{reason}; trying again in {:.1} s", wait.as_secs_f64())
            }),
            Event::Note(text) => bar.suspend(|| tracing::warn!("{text}")),
        }
    }
}
