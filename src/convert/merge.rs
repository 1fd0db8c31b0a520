//! Merges of models of one structure, with A1111's meaning: weighted sums `A·(1−m) + B·m`, and differences added, `A + (B−C)·m`, in f32.
//!
//! `m` is one number, or one for each block of the UNet ("merge block weighted"): the blocks on the way in, the middle, the blocks on the way
//! out, in front of them perhaps one for all else. The time's embedding belongs to the first block, the last norm and convolution to the last.

use std::collections::{HashMap, HashSet};

use super::item::{Item, Numbers, Role, refuse};
use super::view::{Folder, Model};
use crate::checkpoint::{Checkpoint, printable};
use crate::error::{Error, Result};
use crate::spec::SINGLE_UNET;

/// What is merged into the input.
pub struct Merge<'a> {
    /// B, and C where their difference is added.
    pub others: Others<'a>,
    /// How much of it: m.
    pub alpha: f64,
    /// m for each block of the UNet, if given.
    pub blocks: Option<Vec<f64>>,
}

/// The other models.
pub enum Others<'a> {
    /// `A·(1−m) + B·m`.
    Sum(&'a Checkpoint),
    /// `A + (B−C)·m`.
    Difference(&'a Checkpoint, &'a Checkpoint),
}

/// The other models' tensors under the names of the input's.
pub(super) struct Partners {
    b: Tensors,
    c: Option<Tensors>,
    multipliers: Multipliers,
}

/// By the name in the output.
type Tensors = HashMap<String, Item>;

/// The form in which tensors of several models are found by each other's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// As in a single file.
    Single,
    /// As in a folder: the component, a slash, the name there.
    Folder,
}

/// What a tensor is mixed with.
pub(super) struct Mix {
    b: Item,
    c: Option<Item>,
    multiplier: f64,
    /// Numbers of an output channel in the input and in the others, where the input has more channels.
    channels: Option<(usize, usize)>,
}

/// m by tensor.
pub(super) struct Multipliers {
    base: f64,
    /// Those of the way in, the middle and the way out.
    blocks: Option<(Vec<f64>, f64, Vec<f64>)>,
}

impl Multipliers {
    /// `blocks` holds a number for each block of the UNet whose tensors are `names`, or one more in front.
    pub(super) fn new<'a>(
        alpha: f64,
        blocks: Option<&[f64]>,
        names: impl Iterator<Item = &'a str>,
    ) -> Result<Self> {
        let Some(given) = blocks else {
            return Ok(Self {
                base: alpha,
                blocks: None,
            });
        };
        let (mut input, mut output) = (0, 0);
        for name in names {
            match place(name) {
                Some(Block::In(n)) => input = input.max(n + 1),
                Some(Block::Out(n)) => output = output.max(n + 1),
                _ => {}
            }
        }
        let count = input + 1 + output;
        let (base, rest) = match given.split_first() {
            Some((base, rest)) if rest.len() == count => (*base, rest),
            _ if given.len() == count => (alpha, given),
            _ => {
                return Err(Error::Usage(format!(
                    "--block-weights has {} numbers, expected {count} ({input} blocks in, the middle, {output} out), or {} with one for all \
                     else in front",
                    given.len(),
                    count + 1
                )));
            }
        };
        let (way_in, rest) = rest.split_at(input);
        let Some((middle, way_out)) = rest.split_first() else {
            return Ok(Self { base, blocks: None });
        };
        Ok(Self {
            base,
            blocks: Some((way_in.to_vec(), *middle, way_out.to_vec())),
        })
    }

    /// m of a tensor by its name in a single file.
    pub(super) fn of(&self, name: &str) -> f64 {
        let Some((way_in, middle, way_out)) = &self.blocks else {
            return self.base;
        };
        let found = match place(name) {
            Some(Block::In(n)) => way_in.get(n).copied(),
            Some(Block::First) => way_in.first().copied(),
            Some(Block::Middle) => Some(*middle),
            Some(Block::Out(n)) => way_out.get(n).copied(),
            Some(Block::Last) => way_out.last().copied(),
            None => None,
        };
        found.unwrap_or(self.base)
    }
}

enum Block {
    First,
    In(usize),
    Middle,
    Out(usize),
    Last,
}

/// The block of the UNet that a tensor of a single file belongs to.
fn place(name: &str) -> Option<Block> {
    let mut parts = name
        .strip_prefix(SINGLE_UNET)?
        .strip_prefix('.')?
        .split('.');
    let kind = parts.next()?;
    let number = || parts.next()?.parse().ok();
    match kind {
        "input_blocks" => ({ number })().map(Block::In),
        "output_blocks" => ({ number })().map(Block::Out),
        "middle_block" => Some(Block::Middle),
        "time_embed" | "label_emb" => Some(Block::First),
        "out" => Some(Block::Last),
        _ => None,
    }
}

impl Partners {
    /// The other models' tensors; `own` are the input's. Everything that is a weight in one must be in all.
    ///
    /// # Errors
    /// [`Error::BadModel`] that names the first tensor in which they differ.
    pub(super) fn new(merge: &Merge<'_>, form: Form, own: &[&Item]) -> Result<Self> {
        let (b, c) = match merge.others {
            Others::Sum(b) => (b, None),
            Others::Difference(b, c) => (b, Some(c)),
        };
        let names = own.iter().map(|item| item.block.as_str());
        Ok(Self {
            multipliers: Multipliers::new(merge.alpha, merge.blocks.as_deref(), names)?,
            c: match c {
                Some(c) => Some(partner(c, form, own)?),
                None => None,
            },
            b: partner(b, form, own)?,
        })
    }

    /// What `item` of the input is mixed with; none for what is no weight.
    ///
    /// # Errors
    /// When shapes differ in another way than models for inpainting differ from others.
    pub(super) fn of(&mut self, item: &Item) -> Result<Option<Mix>> {
        if item.role == Role::Aside {
            return Ok(None);
        }
        let Some(b) = self.b.remove(&item.name) else {
            return Ok(None);
        };
        let c = match &mut self.c {
            Some(c) => match c.remove(&item.name) {
                Some(c) => Some(c),
                None => return Ok(None),
            },
            None => None,
        };
        let mut channels = None;
        for other in std::iter::once(&b).chain(&c) {
            if other.elements() == item.elements() && other.is_float() {
                continue;
            }
            channels = Some(fewer_channels(item, other)?);
        }
        if let Some(c) = c.as_ref().filter(|c| c.elements() != b.elements()) {
            return Err(refuse(
                &c.name,
                format!(
                    "has the shapes {:?} and {:?} in the models whose difference is to be added",
                    b.shape, c.shape
                ),
            ));
        }
        let multiplier = self.multipliers.of(&item.block);
        Ok(Some(Mix {
            b,
            c,
            multiplier,
            channels,
        }))
    }
}

/// A model for inpainting or editing takes more channels than others; the latents' are the first (A1111 merges those alone).
fn fewer_channels(item: &Item, other: &Item) -> Result<(usize, usize)> {
    if let (&[o, i, h, w], &[o2, i2, h2, w2]) = (item.shape.as_slice(), other.shape.as_slice())
        && item.block.ends_with("input_blocks.0.0.weight")
        && (o, h, w) == (o2, h2, w2)
    {
        if i > i2 {
            return Ok((i * h * w, i2 * h * w));
        }
        return Err(refuse(
            &item.name,
            format!(
                "takes {i} channels here and {i2} in the model that is merged into it; give the model for inpainting or editing as the first"
            ),
        ));
    }
    Err(refuse(
        &item.name,
        format!(
            "has shape {:?} here and {:?} in the model that is merged into it; they are not of one structure",
            item.shape, other.shape
        ),
    ))
}

/// The tensors of another model under the input's names.
fn partner(checkpoint: &Checkpoint, form: Form, own: &[&Item]) -> Result<Tensors> {
    let mut model = Model::new(checkpoint, None)?;
    let items = match form {
        Form::Single => model.single()?,
        Form::Folder => flat(model.folder()?),
    };
    let named = items.into_iter().map(|item| (item.name.clone(), item));
    let mut items: Tensors = named.collect();
    let differs = |name: &str, what: &str| {
        let name = printable(name);
        let reason = format!("tensor `{name}` {what}; they are not of one structure");
        Err(Error::bad_model(checkpoint.path(), reason))
    };
    for item in own {
        if items.contains_key(&item.name) {
            continue;
        }
        match other_spelling(&item.name).and_then(|name| items.remove(&name)) {
            Some(other) => {
                items.insert(item.name.clone(), other);
            }
            None if item.role == Role::Weight => {
                return differs(
                    &item.name,
                    "of the model that it is merged into is not in it",
                );
            }
            None => {}
        }
    }
    let known: HashSet<&str> = own.iter().map(|item| item.name.as_str()).collect();
    let more = items
        .iter()
        .filter(|(_, item)| item.role == Role::Weight)
        .map(|(name, _)| name.as_str())
        .filter(|name| !known.contains(name));
    match more.min() {
        Some(name) => differs(name, "is not in the model that it is merged into"),
        None => Ok(items),
    }
}

/// The tensors of a folder with their components in front of their names.
pub(super) fn flat(parts: Vec<Folder>) -> Vec<Item> {
    let part = |Folder { component, items }| {
        items.into_iter().map(move |mut item: Item| {
            item.name = format!("{component}/{}", item.name);
            item
        })
    };
    parts.into_iter().flat_map(part).collect()
}

/// CLIP's names with `text_model.` or without: files have either.
fn other_spelling(name: &str) -> Option<String> {
    let (tower, rest) = name.split_once(".transformer.")?;
    Some(match rest.strip_prefix("text_model.") {
        Some(rest) => format!("{tower}.transformer.{rest}"),
        None => format!("{tower}.transformer.text_model.{rest}"),
    })
}

/// The numbers of what a tensor is mixed with.
pub(super) struct MixNumbers<'a> {
    b: Numbers<'a>,
    c: Option<Numbers<'a>>,
    mix: &'a Mix,
}

impl Mix {
    /// Opens the numbers.
    pub(super) fn open(&self) -> Result<MixNumbers<'_>> {
        Ok(MixNumbers {
            b: self.b.open(None)?,
            c: match &self.c {
                Some(c) => Some(c.open(None)?),
                None => None,
            },
            mix: self,
        })
    }
}

impl MixNumbers<'_> {
    /// Mixes into `numbers`, which are the input's from `first` on.
    pub(super) fn apply(&self, first: usize, numbers: &mut [f32]) {
        let Some((own, others)) = self.mix.channels else {
            return self.blend(first, numbers);
        };
        // output channel by output channel, what the others have of it
        let mut at = first;
        let mut rest = numbers;
        while !rest.is_empty() {
            let (channel, inside) = (at / own, at % own);
            let take = rest.len().min(own - inside);
            let (now, later) = rest.split_at_mut(take);
            let shared = others.saturating_sub(inside).min(take);
            if let Some(now) = now.get_mut(..shared) {
                self.blend(channel * others + inside, now);
            }
            at += take;
            rest = later;
        }
    }

    fn blend(&self, first: usize, numbers: &mut [f32]) {
        let m = self.mix.multiplier as f32;
        let rest = (1.0 - self.mix.multiplier) as f32;
        let mut b = vec![0.0; numbers.len()];
        self.b.read(first, &mut b);
        match &self.c {
            None => {
                for (a, b) in numbers.iter_mut().zip(&b) {
                    *a = rest * *a + m * b;
                }
            }
            Some(reader) => {
                let mut c = vec![0.0; numbers.len()];
                reader.read(first, &mut c);
                for ((a, b), c) in numbers.iter_mut().zip(&b).zip(&c) {
                    *a += m * (b - c);
                }
            }
        }
    }
}
