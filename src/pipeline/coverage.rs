//! What the tensors of a checkpoint are to the networks: asked for, missing, of the wrong shape, or of no use. Nothing is read for it.
//!
//! The networks are built over the files' names and shapes alone and ask for their weights as always. `generate` begins with it, and
//! `inspect` prints it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{DType, Device};
use sd_kernels::{Source, Weights};
use sd_models::clip::TextEncoder;
use sd_models::denoiser::{self, Denoiser};
use sd_models::t5::T5Encoder;
use sd_models::unet::{self, Mid};
use sd_models::vae::{AnyDecoder, Encoder};

use crate::checkpoint::{Checkpoint, TensorSet, leftover, printable};
use crate::error::{Error, Result};
use crate::spec::{Component, ModelSpec, SINGLE_VAE};
use crate::weights::{CheckpointSource, Layout, is_readable};

/// How many names one sentence holds.
const NAMED: usize = 3;

/// What is there, what is missing and what is left over. Names are as in the files and fit to be printed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Why the networks cannot be built: a sentence for each of them that lacks something.
    pub problems: Vec<String>,
    /// What is incomplete and not needed for pictures from text.
    pub notices: Vec<String>,
    /// Tensors that no network asks for, sorted; those of folders below their component's name (`unet/…`).
    pub unused: Vec<String>,
    /// Tensors that are known and not needed: what they are, in the plural, and how many.
    pub ignored: BTreeMap<String, usize>,
}

impl Coverage {
    /// Lets every network of `spec` ask for its weights in `checkpoint`, from which `spec` was read.
    pub fn of(checkpoint: &Checkpoint, spec: &ModelSpec) -> Self {
        let mut coverage = Self::default();
        let towers = spec.text.iter().map(|tower| &tower.component);
        let text: Vec<_> = towers.clone().map(source).collect();
        let t5 = spec.t5.as_ref().map(|t5| (source(&t5.component), t5));
        let unet = source(&spec.unet);
        let vae = source(&spec.vae);
        let decoder = spec.tiny.as_ref().map_or_else(|| Arc::clone(&vae), source);
        if coverage.sizes_are_possible(spec) {
            let ask = |name, source: &Arc<CheckpointSource>, load: &dyn Fn(&Weights)| {
                let weights = weights(source);
                load(&weights);
                named(name, weights.check()).err()
            };
            let mut problems: Vec<_> = text
                .iter()
                .zip(towers.clone())
                .map(|(source, tower)| {
                    ask(TEXT, source, &|w| drop(TextEncoder::load(w, &tower.config)))
                })
                .collect();
            if let Some((source, t5)) = &t5 {
                let config = &t5.component.config;
                problems.push(ask(T5, source, &|w| drop(T5Encoder::load(w, config))));
            }
            problems.extend([
                ask(UNET, &unet, &|w| drop(Denoiser::load(w, &spec.unet.config))),
                ask(VAE, &decoder, &|w| {
                    let tiny = spec.tiny.as_ref().map(|tiny| &tiny.config);
                    drop(AnyDecoder::load(w, &spec.vae.config, tiny));
                }),
            ]);
            let problems = problems.into_iter().flatten();
            coverage.problems.extend(problems.map(|e| e.to_string()));
            for (source, tower) in text.iter().zip(towers.clone()) {
                coverage.check_types(TEXT, &source.found(), &tower.tensors);
            }
            if let Some((source, t5)) = &t5 {
                coverage.check_types(T5, &source.found(), &t5.component.tensors);
            }
            coverage.check_types(UNET, &unet.found(), &spec.unet.tensors);
            let tensors = spec.tiny.as_ref().map_or(&spec.vae.tensors, |t| &t.tensors);
            coverage.check_types(VAE, &decoder.found(), tensors);
            let encoder = ask(ENCODER, &vae, &|w| {
                drop(Encoder::load(w, &spec.vae.config));
            });
            coverage.notices.extend(
                encoder.map(|error| {
                    format!("not needed for pictures from text and incomplete: {error}")
                }),
            );
        }
        let mut parts: Vec<Part<'_>> = text
            .iter()
            .zip(&spec.text)
            .map(|(source, tower)| {
                (
                    tower.role.component,
                    source.found(),
                    &tower.component.layout,
                )
            })
            .collect();
        if let Some((source, t5)) = &t5 {
            parts.push((t5.role.component, source.found(), &t5.component.layout));
        }
        parts.retain(|(name, ..)| !spec.other_text.contains(name));
        parts.push((spec.network(), unet.found(), &spec.unet.layout));
        if !spec.other_vae {
            parts.push(("vae", vae.found(), &spec.vae.layout));
        }
        match checkpoint.single() {
            Some(tensors) => coverage.count_single(&tensors, &parts, spec),
            None => coverage.count_folder(checkpoint, &parts),
        }
        coverage
    }

    /// Fails if the networks cannot be built.
    ///
    /// # Errors
    /// [`Error::BadModel`] with the first problem.
    pub fn check(&self, checkpoint: &Checkpoint) -> Result<()> {
        let Some((first, others)) = self.problems.split_first() else {
            return Ok(());
        };
        let more = match others {
            [] => "",
            _ => "; `sd-rs inspect` tells what else is wrong",
        };
        Err(Error::bad_model(
            checkpoint.path(),
            format!("{first}{more}"),
        ))
    }

    /// One sentence about the tensors that nothing asked for, if there are any.
    pub fn warning(&self, checkpoint: &Checkpoint) -> Option<String> {
        let sentence = unused(checkpoint, &self.unused)?;
        let hint = match self.unused.len() {
            0..=NAMED => "",
            _ => "; `sd-rs inspect` lists more of them",
        };
        Some(format!("{sentence}{hint}"))
    }

    /// Configs are made by strangers: a network of a million layers would take all memory before the first missing tensor is seen.
    fn sizes_are_possible(&mut self, spec: &ModelSpec) -> bool {
        let vae = &spec.vae.config;
        let towers = spec.text.iter().map(|tower| {
            let component = &tower.component;
            (TEXT, component.config.layers, &component.tensors)
        });
        let t5 = spec.t5.iter().map(|t5| {
            let component = &t5.component;
            (T5, component.config.layers, &component.tensors)
        });
        let others = [
            (UNET, blocks(&spec.unet.config), &spec.unet.tensors),
            (
                VAE,
                vae.layers.saturating_mul(vae.channels.len()),
                &spec.vae.tensors,
            ),
        ];
        for (name, blocks, tensors) in towers.chain(t5).chain(others) {
            if blocks > tensors.len() {
                self.problems.push(format!(
                    "{name}: its config describes {blocks} blocks, and the file holds only {} tensors; they are not of one model",
                    tensors.len()
                ));
            }
        }
        self.problems.is_empty()
    }

    /// Tensors that were asked for and whose types nothing is computed from (whole numbers, exotic floats).
    fn check_types(&mut self, network: &str, found: &BTreeSet<String>, tensors: &TensorSet) {
        let infos = found.iter().filter_map(|name| tensors.info(name));
        let odd: Vec<String> = infos
            .filter(|info| !is_readable(info.dtype))
            .map(|info| format!("`{}` {}", printable(&info.name), info.dtype))
            .collect();
        if !odd.is_empty() {
            let names = list_some(&odd, NAMED);
            self.problems.push(format!(
                "{network}: tensors are of types that networks are not read from: {names}"
            ));
        }
    }

    fn count_single(&mut self, tensors: &TensorSet, parts: &[Part<'_>], spec: &ModelSpec) {
        let replaced = spec.replaced_text();
        for name in tensors.names() {
            if parts.iter().any(|(_, found, _)| found.contains(name)) {
                continue;
            }
            let known = parts
                .iter()
                .find_map(|(.., layout)| layout.ignored_as(name));
            if spec.other_vae && name.starts_with(SINGLE_VAE) {
                self.ignore("tensors of the autoencoder, in whose place another one is");
                continue;
            }
            if replaced.iter().any(|prefix| name.starts_with(prefix)) {
                self.ignore("tensors of text encoders, in whose place others are");
                continue;
            }
            match known.or_else(|| leftover(name)) {
                Some(what) => self.ignore(what),
                None => self.unused.push(printable(name)),
            }
        }
    }

    fn count_folder(&mut self, checkpoint: &Checkpoint, parts: &[Part<'_>]) {
        for component in checkpoint.component_names() {
            let Some(tensors) = checkpoint.tensors(component) else {
                continue;
            };
            let part = parts.iter().find(|(name, ..)| *name == component);
            let Some((_, found, layout)) = part else {
                let what = format!("tensors of the component `{}`", printable(component));
                *self.ignored.entry(what).or_default() += tensors.len();
                continue;
            };
            for name in tensors.names().filter(|name| !found.contains(*name)) {
                match layout.ignored_as(name) {
                    Some(what) => self.ignore(what),
                    None => self.unused.push(format!("{component}/{}", printable(name))),
                }
            }
        }
    }

    fn ignore(&mut self, what: &str) {
        *self.ignored.entry(what.to_owned()).or_default() += 1;
    }
}

/// A component by its name in folders, the stored names that were asked for, and its names.
type Part<'a> = (&'static str, BTreeSet<String>, &'a Layout);

/// What the networks are called in messages.
pub(super) const TEXT: &str = "text encoder";
pub(super) const T5: &str = "T5";
pub(super) const UNET: &str = "UNet";
pub(super) const VAE: &str = "autoencoder";
pub(super) const ENCODER: &str = "encoder of the autoencoder";

/// The weights of a component under canonical names.
pub(super) fn source<C>(component: &Component<C>) -> Arc<CheckpointSource> {
    let tensors = Arc::clone(&component.tensors);
    Arc::new(CheckpointSource::new(tensors, component.layout.clone()))
}

/// Puts the network's name in front of what its weights lack.
pub(super) fn named<T>(network: &str, outcome: sd_kernels::Result<T>) -> Result<T> {
    outcome.map_err(|error| match error {
        sd_kernels::Error::Weights(reason) => Error::Weights(format!("{network}: {reason}")),
        other => other.into(),
    })
}

/// Weights that are asked for and never read, so that type and device do not matter.
fn weights(source: &Arc<CheckpointSource>) -> Weights {
    let source = Arc::clone(source) as Arc<dyn Source>;
    Weights::new(source, DType::F32, &Device::Cpu)
}

/// Residual blocks and blocks of transformers of a denoising network.
fn blocks(config: &denoiser::Config) -> usize {
    match config {
        denoiser::Config::UNet(config) => unet_blocks(config),
        denoiser::Config::Mmdit(config) => config.layers,
        denoiser::Config::Flux(config) => config.layers.saturating_add(config.single_layers),
    }
}

/// Those of a UNet.
fn unet_blocks(config: &unet::Config) -> usize {
    let levels = config.levels.iter();
    let sides = levels.flat_map(|level| [&level.down, &level.up]);
    let mid = match config.mid {
        Mid::Attention { depth } => depth,
        _ => 0,
    };
    sides.fold(mid, |sum, depths| {
        let depths = depths.iter().copied();
        sum.saturating_add(depths.fold(0, |sum: usize, depth| {
            sum.saturating_add(depth).saturating_add(1)
        }))
    })
}

/// A sentence about tensors that nothing asked for, if there are any.
pub(super) fn unused(checkpoint: &Checkpoint, names: &[String]) -> Option<String> {
    let count = names.len();
    (count > 0).then(|| {
        format!(
            "{}: {count} {} not used: {}",
            checkpoint.path().display(),
            if count == 1 {
                "tensor is"
            } else {
                "tensors are"
            },
            list_some(&in_backticks(names), NAMED),
        )
    })
}

fn in_backticks(names: &[String]) -> Vec<String> {
    names.iter().map(|name| format!("`{name}`")).collect()
}

/// The first names, and how many more there are.
fn list_some(names: &[String], most: usize) -> String {
    let shown = names.get(..most).unwrap_or(names).join(", ");
    match names.len().saturating_sub(most) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
