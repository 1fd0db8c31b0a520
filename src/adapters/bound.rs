//! Adapters on a model: what each weight becomes, one module's change after another.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::DType;
use rayon::prelude::*;
use safetensors::Dtype;
use sd_kernels::LowRank;

use super::delta::{self, DoraNorm};
use super::file::{Adapter, Module};
use super::form::{Extent, Form, Stored};
use super::keys::Owner;
use super::strength::Strength;
use crate::checkpoint::TensorType;
use crate::error::Result;
use crate::weights::layout::Rows;
use crate::weights::values;

/// What stands between a weight's name and the place of what is computed beside it: in no name of a tensor.
const BESIDE: &str = "#";
/// How the names of its matrices end.
const UP: &str = ".up";
const DOWN: &str = ".down";
/// How many numbers a thread changes at a time.
const PIECE: usize = 1 << 16;

/// Adapters on a model: what each of its weights becomes. Strengths may change while it is worn; whoever holds weights made before is told which.
#[derive(Debug, Default)]
pub struct Bound {
    pub(super) patches: BTreeMap<Owner, BTreeMap<String, Vec<Patch>>>,
    pub(super) warnings: Vec<String>,
    pub(super) norm: DoraNorm,
    pub(super) worn: Vec<Worn>,
    /// The tensors of each network that stay as they are: what changes them is computed beside them.
    pub(super) beside: BTreeMap<Owner, BTreeSet<String>>,
}

/// How the denoising network wears what is a product of two thin matrices. What is not, and what the text encoders wear, is merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Mode {
    /// At run time where the file keeps a weight compressed, so that it can stay so, or a strength changes from step to step; merged elsewhere.
    #[default]
    Auto,
    /// Merged into the weights when they are read: steps cost nothing more.
    Merge,
    /// Beside the weights, which stay as they are, also where that costs little: at most a twentieth of a layer's own multiplications.
    Runtime,
}

/// What has changed in the denoising network.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// The weights that are others now.
    pub weights: BTreeSet<String>,
    /// Whether what is computed beside weights is another.
    pub beside: bool,
}

impl Changed {
    /// Whether nothing has.
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty() && !self.beside
    }
}

/// An adapter that is worn.
#[derive(Debug)]
pub(super) struct Worn {
    pub(super) fit: Fit,
    pub(super) strength: Mutex<Strength>,
    /// The strengths of now, in the text towers and in the denoising network: bits of f32.
    pub(super) now: [AtomicU32; 2],
}

/// What of an adapter is used in a model.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Fit {
    /// Its file.
    pub file: String,
    /// Modules that it changes.
    pub modules: usize,
    /// Those among them that the model has.
    pub used: usize,
    /// Tensors of the model that are changed.
    pub tensors: usize,
    /// Names in the file that have no place in the model, fit to be printed.
    pub unmatched: Vec<String>,
}

impl Worn {
    pub(super) fn new(fit: Fit, strength: Strength) -> Self {
        let (text, denoiser) = strength.at(0, 1);
        Self {
            fit,
            now: [text, denoiser].map(|s| AtomicU32::new((s as f32).to_bits())),
            strength: Mutex::new(strength),
        }
    }

    fn now(&self, owner: Owner) -> f32 {
        let [text, denoiser] = &self.now;
        let bits = match owner {
            Owner::Denoiser => denoiser,
            Owner::Text(_) => text,
        };
        f32::from_bits(bits.load(Ordering::Relaxed))
    }

    /// Takes the strengths of a step; which of them are others now.
    fn step(&self, step: usize, steps: usize) -> [bool; 2] {
        let strength = self.strength.lock().unwrap_or_else(PoisonError::into_inner);
        let (text, denoiser) = strength.at(step, steps);
        let set = |at: &AtomicU32, to: f64| {
            let to = (to as f32).to_bits();
            at.swap(to, Ordering::Relaxed) != to
        };
        let [old_text, old_denoiser] = &self.now;
        [set(old_text, text), set(old_denoiser, denoiser)]
    }
}

/// One module's change of one tensor.
#[derive(Debug, Clone)]
pub(super) struct Patch {
    pub(super) adapter: Arc<Adapter>,
    pub(super) module: usize,
    /// Whose: a place in [`Bound::worn`].
    pub(super) worn: usize,
    /// The block's weight.
    pub(super) factor: f32,
    pub(super) rows: Option<Rows>,
    /// The adapter has the second half of its rows first.
    pub(super) swapped: bool,
    pub(super) bias: bool,
}

/// The weight that an adapter was made for, of which the model's is a part.
pub(super) fn whole(part: Extent, rows: Option<Rows>) -> Extent {
    Extent {
        rows: match rows {
            Some(rows) => part.rows / rows.span.max(1) * rows.count,
            None => part.rows,
        },
        ..part
    }
}

/// Whether DoRA's lengths are of inputs: their first axis is one, and there are more of them.
/// PEFT's are always of outputs, though of convolutions they come as `[1, rows, 1, 1]`.
pub(super) fn is_per_input(magnitude: &Stored, of: Extent) -> bool {
    let is_peft = magnitude.name.contains(".lora_magnitude_vector");
    !is_peft && magnitude.shape.len() > 1 && magnitude.rows() == 1 && of.rows != 1
}

impl Bound {
    /// Whether a tensor is changed, merged or beside it.
    pub fn changes(&self, owner: Owner, name: &str) -> bool {
        self.patches_of(owner, name)
            .is_some_and(|patches| patches.iter().any(|p| self.strength(owner, p) != 0.0))
    }

    /// Whether what changes a tensor is computed beside it.
    fn is_beside(&self, owner: Owner, name: &str) -> bool {
        let beside = self.beside.get(&owner);
        beside.is_some_and(|beside| beside.contains(name))
    }

    /// Whether a tensor is another one when it is read.
    pub(super) fn merges(&self, owner: Owner, name: &str) -> bool {
        !self.is_beside(owner, name) && self.changes(owner, name)
    }

    /// What is computed beside a tensor now; what has a strength of 0 is left out.
    pub(super) fn beside(&self, owner: Owner, name: &str) -> Vec<LowRank> {
        if !self.is_beside(owner, name) {
            return Vec::new();
        }
        let patches = self.patches_of(owner, name).unwrap_or_default();
        let change = |(place, patch): (usize, &Patch)| {
            let module = patch.module()?;
            let (_, down) = module.factors()?;
            Some(LowRank {
                down: format!("{name}{BESIDE}{place}{DOWN}"),
                up: format!("{name}{BESIDE}{place}{UP}"),
                rank: down.rows(),
                scale: self.strength(owner, patch) * module.scale,
            })
        };
        let changes = patches.iter().enumerate().filter_map(change);
        changes.filter(|change| change.scale != 0.0).collect()
    }

    /// A matrix beside a weight, by the name that [`Bound::beside`] gave it, as `[rows, ..]` with the rows and in the order of the model.
    fn factor(&self, owner: Owner, name: &str) -> Option<Thin<'_>> {
        let (weight, rest) = name.rsplit_once(BESIDE)?;
        let (place, is_up) = match rest.strip_suffix(UP) {
            Some(place) => (place, true),
            None => (rest.strip_suffix(DOWN)?, false),
        };
        let patches = self.patches_of(owner, weight)?;
        let patch = patches.get(place.parse::<usize>().ok()?)?;
        let (up, down) = patch.module()?.factors()?;
        Some(Thin {
            patch,
            stored: if is_up { up } else { down },
            is_up,
        })
    }

    /// The type that such a matrix is stored as; none where there is none of that name.
    pub(super) fn factor_type(&self, owner: Owner, name: &str) -> Option<DType> {
        let Thin { patch, stored, .. } = self.factor(owner, name)?;
        let info = patch.adapter.tensors.info(&stored.name)?;
        Some(match info.dtype {
            TensorType::Plain(Dtype::F16) => DType::F16,
            TensorType::Plain(Dtype::BF16) => DType::BF16,
            _ => DType::F32,
        })
    }

    /// The numbers of such a matrix, which is to have `length` of them.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn factor_numbers(
        &self,
        owner: Owner,
        name: &str,
        length: usize,
    ) -> Result<Option<Vec<f32>>> {
        let Some(Thin {
            patch,
            stored,
            is_up,
        }) = self.factor(owner, name)
        else {
            return Ok(None);
        };
        let mut numbers = values::all(&patch.adapter.tensors, &stored.name)?;
        if is_up {
            numbers = patch.own(numbers, length);
        }
        numbers.resize(length, 0.0);
        Ok(Some(numbers))
    }

    /// How much of a patch there is now.
    fn strength(&self, owner: Owner, patch: &Patch) -> f32 {
        let now = self
            .worn
            .get(patch.worn)
            .map_or(0.0, |worn| worn.now(owner));
        now * patch.factor
    }

    /// Takes the strengths that hold at step `step` of `steps`, the first being 0: what of the denoising network is another now.
    pub fn at_step(&self, step: usize, steps: usize) -> Changed {
        let changed = self.worn.iter().map(|worn| worn.step(step, steps)[1]);
        self.changed_by(Owner::Denoiser, &changed.collect::<Vec<_>>())
    }

    /// Gives the adapter at `place`, in the order in which they were put on, other strengths: what of the denoising network is another now.
    /// Strengths of 0 take it off.
    pub fn set_strength(&self, place: usize, strength: Strength) -> Changed {
        let mut changed = vec![false; self.worn.len()];
        if let (Some(worn), Some(changed)) = (self.worn.get(place), changed.get_mut(place)) {
            *worn.strength.lock().unwrap_or_else(PoisonError::into_inner) = strength;
            *changed = worn.step(0, 1)[1];
        }
        self.changed_by(Owner::Denoiser, &changed)
    }

    /// What the adapters at the places marked change in a network.
    fn changed_by(&self, owner: Owner, marked: &[bool]) -> Changed {
        if !marked.contains(&true) {
            return Changed::default();
        }
        let theirs = |patches: &[Patch]| {
            let mut patches = patches.iter();
            patches.any(|p| p.factor != 0.0 && marked.get(p.worn) == Some(&true))
        };
        let tensors = self.patches.get(&owner).into_iter().flatten();
        let changed = tensors.filter(|(_, patches)| theirs(patches));
        let (beside, weights): (Vec<_>, Vec<_>) = changed
            .map(|(name, _)| name.clone())
            .partition(|name| self.is_beside(owner, name));
        Changed {
            weights: weights.into_iter().collect(),
            beside: !beside.is_empty(),
        }
    }

    /// What of each adapter is used, in the order in which they were put on.
    pub fn fits(&self) -> impl Iterator<Item = &Fit> {
        self.worn.iter().map(|worn| &worn.fit)
    }

    /// Whether anything of a network is changed.
    pub(super) fn has(&self, owner: Owner) -> bool {
        self.patches.contains_key(&owner)
    }

    /// How many tensors are changed.
    pub fn len(&self) -> usize {
        self.patches.values().map(BTreeMap::len).sum()
    }

    /// Whether nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What was not used of the adapters.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn patches_of(&self, owner: Owner, name: &str) -> Option<&[Patch]> {
        let patches = self.patches.get(&owner)?.get(name)?;
        Some(patches)
    }

    /// What the numbers `values` of a tensor become, of which `shape` is the model's: all of them, row-major, in f32.
    ///
    /// # Errors
    /// When a tensor of an adapter cannot be read.
    pub fn apply(
        &self,
        owner: Owner,
        name: &str,
        shape: &[usize],
        values: &mut [f32],
    ) -> Result<()> {
        for patch in self.patches_of(owner, name).unwrap_or_default() {
            let strength = self.strength(owner, patch);
            if strength != 0.0 {
                patch.apply((Extent::of(shape), values), strength, self.norm)?;
            }
        }
        Ok(())
    }
}

/// A matrix beside a weight.
struct Thin<'a> {
    patch: &'a Patch,
    stored: &'a Stored,
    is_up: bool,
}

impl Patch {
    pub(super) fn module(&self) -> Option<&Module> {
        self.adapter.modules.get(self.module)
    }

    /// Whether it can be computed beside the weight.
    pub(super) fn is_product(&self) -> bool {
        !self.bias
            && self
                .module()
                .is_some_and(|module| module.factors().is_some())
    }

    fn apply(
        &self,
        (extent, weight): (Extent, &mut [f32]),
        strength: f32,
        norm: DoraNorm,
    ) -> Result<()> {
        let Some(module) = self.module() else {
            return Ok(());
        };
        let read = |stored: &Stored| values::all(&self.adapter.tensors, &stored.name);
        if self.bias {
            if let Some((bias, scaled)) = &module.bias {
                let scale = if *scaled { module.scale } else { 1.0 };
                let own = self.own(read(bias)?, weight.len());
                add(weight, &own, strength * scale);
            }
            return Ok(());
        }
        let Some(form) = &module.form else {
            return Ok(());
        };
        if let (
            Some(rows),
            Form::LowRank {
                up,
                down,
                mid: None,
            },
        ) = (self.rows, form)
        {
            // only the rows that are meant
            let count = extent.rows;
            let first = count / rows.span.max(1) * rows.index;
            let change = delta::low_rank(&read, (up, down), (first, count))?;
            add(weight, &change, strength * module.scale);
            return Ok(());
        }
        let of = whole(extent, self.rows);
        let change = delta::change(form, &read, weight, of, module.alpha)?;
        let Some(magnitude) = &module.magnitude else {
            let change = self.own(change, weight.len());
            add(weight, &change, strength * module.scale);
            return Ok(());
        };
        // the whole change, of which the strength is a part: as ComfyUI and A1111 do
        let mut merged = weight.to_vec();
        add(&mut merged, &change, module.scale);
        let lengths = read(magnitude)?;
        let lengths = (lengths.as_slice(), is_per_input(magnitude, of));
        delta::decompose(&mut merged, weight, of, lengths, norm);
        for (w, merged) in weight.iter_mut().zip(&merged) {
            *w += strength * (merged - *w);
        }
        Ok(())
    }

    /// The part of a whole change that is meant, in the order of the model.
    fn own(&self, mut change: Vec<f32>, length: usize) -> Vec<f32> {
        if let Some(rows) = self.rows {
            let first = length / rows.span.max(1) * rows.index;
            change.drain(..first.min(change.len()));
        }
        if self.swapped {
            let half = change.len() / 2;
            change.rotate_left(half);
        }
        change
    }
}

/// `weight` + `scale` · `change`, as far as the one goes.
fn add(weight: &mut [f32], change: &[f32], scale: f32) {
    let weight = weight.par_chunks_mut(PIECE).zip(change.par_chunks(PIECE));
    weight.for_each(|(weight, change)| {
        for (w, change) in weight.iter_mut().zip(change) {
            *w += scale * change;
        }
    });
}
