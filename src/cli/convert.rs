//! `sd-rs convert`: opens what was named, shows how far it is, and says where the result is.

use std::cell::Cell;
use std::io::IsTerminal;
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};

use super::args::{ConvertArgs, Quantised};
use super::fetch::{Opened, open_model, open_part};
use super::{interrupt, lora};
use crate::adapters::{Adapters, Bound, Owner};
use crate::checkpoint::{self, BlockType, Checkpoint};
use crate::convert::{self, Change, Merge, Others, Request, Watch, WeightName};
use crate::error::{Error, Result};
use crate::pipeline::bind_adapters;
use crate::spec::{self, ModelSpec};

/// Runs the command.
///
/// # Errors
/// Whatever stops it.
pub(super) fn run(args: &ConvertArgs, quiet: bool) -> Result<()> {
    check(args)?;
    interrupt::listen();
    let open = |path| open_model(Some(path), &args.library, args.no_mmap);
    let input = open(&args.input)?;
    warn(&input);
    let others = match (&args.merge, args.add_difference.as_deref()) {
        (Some(b), _) => vec![open(b)?],
        (None, Some([b, c])) => vec![open(b)?, open(c)?],
        _ => Vec::new(),
    };
    let vae = match &args.vae {
        Some(path) => Some(open_part(path, "vae", &args.library, args.no_mmap)?),
        None => None,
    };
    others.iter().chain(&vae).for_each(warn);
    let merge = match others.as_slice() {
        [b] => Some((Others::Sum(&b.checkpoint), 0.5)),
        [b, c] => Some((Others::Difference(&b.checkpoint, &c.checkpoint), 1.0)),
        _ => None,
    };
    let baked = lora::bake(args)?;
    let change = match args.lora.is_empty() {
        true => None,
        false => Some(Baked::new(&input.checkpoint, &baked.adapters)?),
    };
    let request = Request {
        input: &input.checkpoint,
        output: args.output.clone(),
        dtype: args.dtype,
        quantise: args.quantise.map(BlockType::from),
        merge: merge.map(|(others, alpha)| Merge {
            others,
            alpha: args.alpha.unwrap_or(alpha),
            blocks: args.block_weights.clone(),
        }),
        vae: vae.as_ref().map(|vae| &vae.checkpoint),
        change: change.as_ref().map(|change| change as &dyn Change),
        notes: baked.notes,
        force: args.force,
        date: args.date.clone(),
    };
    let bar = Bar {
        bar: hidden_or_shown(quiet),
        bytes: Cell::default(),
    };
    convert::convert(&request, &bar)?;
    bar.bar.finish_and_clear();
    tracing::info!(
        "{} bytes of tensors written to {}",
        bar.bytes.get(),
        args.output.display()
    );
    Ok(())
}

/// Adapters on their way into the weights.
struct Baked(Arc<Bound>);

impl Baked {
    fn new(input: &Checkpoint, adapters: &Adapters) -> Result<Self> {
        let spec = ModelSpec::read_any(input, &checkpoint::detect(input), spec::Others::default())?;
        let bound = bind_adapters(&spec, adapters)?;
        for warning in bound.warnings() {
            tracing::warn!("{warning}");
        }
        bound.fits().for_each(lora::tell);
        Ok(Self(bound))
    }

    fn owner(weight: &WeightName) -> Option<Owner> {
        match weight.component {
            "unet" | "transformer" => Some(Owner::Denoiser),
            component if component.starts_with("text_encoder") => Some(Owner::Text(component)),
            _ => None,
        }
    }
}

impl Change for Baked {
    fn touches(&self, weight: &WeightName) -> bool {
        Self::owner(weight).is_some_and(|owner| self.0.changes(owner, &weight.name))
    }

    fn apply(&self, weight: &WeightName, shape: &[usize], numbers: &mut [f32]) -> Result<()> {
        match Self::owner(weight) {
            Some(owner) => self.0.apply(owner, &weight.name, shape, numbers),
            None => Ok(()),
        }
    }
}

/// What flags mean together.
fn check(args: &ConvertArgs) -> Result<()> {
    let merges = args.merge.is_some() || args.add_difference.is_some();
    if !merges && (args.alpha.is_some() || args.block_weights.is_some()) {
        let reason =
            "--alpha and --block-weights are for merging; give --merge or --add-difference, too";
        return Err(Error::Usage(reason.to_owned()));
    }
    let weights = args.block_weights.iter().flatten().chain(&args.alpha);
    for weight in weights {
        if !weight.is_finite() {
            return Err(Error::Usage(format!(
                "{weight} is no weight; give a number such as 0.5"
            )));
        }
    }
    Ok(())
}

fn warn(opened: &Opened) {
    for warning in opened.checkpoint.warnings() {
        tracing::warn!("{warning}");
    }
}

impl From<Quantised> for BlockType {
    fn from(quantised: Quantised) -> Self {
        match quantised {
            Quantised::Q8_0 => Self::Q8_0,
            Quantised::Q6_K => Self::Q6K,
            Quantised::Q5_K => Self::Q5K,
            Quantised::Q4_K => Self::Q4K,
            Quantised::Q5_1 => Self::Q5_1,
            Quantised::Q5_0 => Self::Q5_0,
            Quantised::Q4_1 => Self::Q4_1,
            Quantised::Q4_0 => Self::Q4_0,
        }
    }
}

/// A bar on a terminal, nothing elsewhere.
struct Bar {
    bar: ProgressBar,
    bytes: Cell<u64>,
}

fn hidden_or_shown(quiet: bool) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    let template = "converting {wide_bar} {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

impl Watch for Bar {
    fn planned(&self, bytes: u64) {
        self.bytes.set(bytes);
        self.bar.set_length(bytes);
    }

    fn written(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn stopped(&self) -> bool {
        interrupt::stopped()
    }

    fn note(&self, text: &str) {
        self.bar.suspend(|| tracing::warn!("{text}"));
    }
}
