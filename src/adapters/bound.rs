//! Adapters on a model: what each weight becomes, one module's change after another.

use std::collections::BTreeMap;
use std::sync::Arc;

use rayon::prelude::*;

use super::delta::{self, DoraNorm};
use super::file::Adapter;
use super::form::{Extent, Stored};
use super::keys::Owner;
use crate::error::Result;
use crate::weights::layout::Rows;
use crate::weights::values;

/// How many numbers a thread changes at a time.
const PIECE: usize = 1 << 16;

/// Adapters on a model: what each of its weights becomes.
#[derive(Debug, Default)]
pub struct Bound {
    pub(super) patches: BTreeMap<Owner, BTreeMap<String, Vec<Patch>>>,
    pub(super) warnings: Vec<String>,
    pub(super) norm: DoraNorm,
}

/// One module's change of one tensor.
#[derive(Debug, Clone)]
pub(super) struct Patch {
    pub(super) adapter: Arc<Adapter>,
    pub(super) module: usize,
    pub(super) strength: f32,
    pub(super) rows: Option<Rows>,
    pub(super) bias: bool,
}

/// The weight that an adapter was made for, of which the model's is a part.
pub(super) fn whole(part: Extent, rows: Option<Rows>) -> Extent {
    Extent {
        rows: part.rows.saturating_mul(rows.map_or(1, |rows| rows.count)),
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
    /// Whether a tensor is changed.
    pub fn changes(&self, owner: Owner, name: &str) -> bool {
        self.patches_of(owner, name)
            .is_some_and(|patches| patches.iter().any(|patch| patch.strength != 0.0))
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
            if patch.strength != 0.0 {
                patch.apply(Extent::of(shape), values, self.norm)?;
            }
        }
        Ok(())
    }
}

impl Patch {
    fn apply(&self, extent: Extent, weight: &mut [f32], norm: DoraNorm) -> Result<()> {
        let Some(module) = self.adapter.modules.get(self.module) else {
            return Ok(());
        };
        let read = |stored: &Stored| values::all(&self.adapter.tensors, &stored.name);
        if self.bias {
            if let Some((bias, scaled)) = &module.bias {
                let scale = if *scaled { module.scale } else { 1.0 };
                self.add(weight, &read(bias)?, self.strength * scale);
            }
            return Ok(());
        }
        let Some(form) = &module.form else {
            return Ok(());
        };
        let of = whole(extent, self.rows);
        let change = delta::change(form, &read, weight, of, module.alpha)?;
        let Some(magnitude) = &module.magnitude else {
            self.add(weight, &change, self.strength * module.scale);
            return Ok(());
        };
        // the whole change, of which the strength is a part: as ComfyUI and A1111 do
        let mut merged = weight.to_vec();
        self.add(&mut merged, &change, module.scale);
        let lengths = read(magnitude)?;
        let lengths = (lengths.as_slice(), is_per_input(magnitude, of));
        delta::decompose(&mut merged, weight, of, lengths, norm);
        for (w, merged) in weight.iter_mut().zip(&merged) {
            *w += self.strength * (merged - *w);
        }
        Ok(())
    }

    /// Adds the rows that are meant.
    fn add(&self, weight: &mut [f32], change: &[f32], scale: f32) {
        let first = self.rows.map_or(0, |rows| weight.len() * rows.index);
        let change = change.get(first..).unwrap_or_default();
        let weight = weight.par_chunks_mut(PIECE).zip(change.par_chunks(PIECE));
        weight.for_each(|(weight, change)| {
            for (w, change) in weight.iter_mut().zip(change) {
                *w += scale * change;
            }
        });
    }
}
