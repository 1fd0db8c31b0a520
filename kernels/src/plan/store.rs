//! Weights as executors read them: packed once, shared by the plans of all sizes, and the only copy there is.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;

use super::ir::{Form, Part, Product};
use crate::cpu::panels::{Group, Panels, geglu_column};
use crate::cpu::winograd::{Kept, WinogradWeights};
use crate::{Error, Param, Reader, Result};

/// The packed weights of one network.
#[derive(Default)]
pub struct Store {
    packed: Mutex<BTreeMap<Key, Packed>>,
    vectors: Mutex<BTreeMap<String, Arc<Vec<f32>>>>,
}

/// Which weights, how.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    names: Vec<String>,
    sources: Vec<usize>,
    form: Form,
    bf16: bool,
}

/// Weights of a product in the layout of its form.
#[derive(Clone)]
pub(super) enum Packed {
    F32(Arc<Layout<f32>>),
    Bf16(Arc<Layout<bf16>>),
}

impl Packed {
    /// Packs a product's weights for sources of these channels.
    pub(super) fn now(product: &Product, channels: &[Vec<usize>], bf16: bool) -> Result<Self> {
        Ok(if bf16 {
            Self::Bf16(Arc::new(pack(product, channels)?))
        } else {
            Self::F32(Arc::new(pack(product, channels)?))
        })
    }
}

/// The layouts that kernels read.
pub(super) enum Layout<T> {
    /// For implicit products: those of each phase.
    Panels(Vec<Panels<T>>),
    /// Transformed.
    Winograd(WinogradWeights<T>),
}

impl<T: Kept> Layout<T> {
    fn bytes(&self) -> usize {
        match self {
            Self::Panels(phases) => phases.iter().map(Panels::bytes).sum(),
            Self::Winograd(weights) => weights.bytes(),
        }
    }
}

impl Store {
    /// Bytes that are held.
    pub fn bytes(&self) -> usize {
        let packed = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        let vectors = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |p: &Packed| match p {
            Packed::F32(layout) => layout.bytes(),
            Packed::Bf16(layout) => layout.bytes(),
        };
        packed.values().map(of).sum::<usize>()
            + vectors.values().map(|v| v.len() * 4).sum::<usize>()
    }

    /// Lets go of everything; plans made from it keep what they use.
    pub fn clear(&self) {
        self.packed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.vectors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// A small weight in f32: biases, norms.
    pub(super) fn vector(&self, param: &Param) -> Result<Arc<Vec<f32>>> {
        if let Some(found) = self
            .vectors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(param.name())
        {
            return Ok(Arc::clone(found));
        }
        let values = Arc::new(param.numbers()?);
        let mut vectors = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        vectors.insert(param.name().to_owned(), Arc::clone(&values));
        Ok(values)
    }

    /// The sum of a product's biases; none when it has none.
    pub(super) fn bias(&self, product: &Product) -> Result<Option<Arc<Vec<f32>>>> {
        let mut sum: Option<Vec<f32>> = None;
        for bias in &product.biases {
            let bias = self.vector(bias)?;
            match &mut sum {
                None => sum = Some(bias.to_vec()),
                Some(sum) => sum
                    .iter_mut()
                    .zip(bias.iter())
                    .for_each(|(sum, b)| *sum += b),
            }
        }
        if let (Some(bias), Form::Gated) = (&mut sum, product.form) {
            *bias = (0..bias.len())
                .map(|j| bias[geglu_column(j, bias.len() / 2)])
                .collect();
        }
        Ok(sum.map(Arc::new))
    }

    /// A product's weights for sources of these channels.
    pub(super) fn weights(
        &self,
        product: &Product,
        channels: &[Vec<usize>],
        bf16: bool,
    ) -> Result<Packed> {
        let key = Key {
            names: product
                .parts
                .iter()
                .map(|p| p.weight.name().to_owned())
                .collect(),
            sources: channels.concat(),
            form: product.form,
            bf16,
        };
        if let Some(found) = self
            .packed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
        {
            return Ok(found.clone());
        }
        let packed = Packed::now(product, channels, bf16)?;
        self.packed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key, packed.clone());
        Ok(packed)
    }
}

/// One weight of a product, as the file keeps it: `[column][input][tap]`.
struct Stored<'a> {
    numbers: Box<dyn Reader + 'a>,
    inputs: usize,
    taps: usize,
}

fn open(part: &Part) -> Result<Stored<'_>> {
    Ok(Stored {
        numbers: part.weight.open()?,
        inputs: part.weight.shape().get(1).copied().unwrap_or(1),
        taps: part.kernel.0 * part.kernel.1,
    })
}

fn pack<T: Kept>(product: &Product, channels: &[Vec<usize>]) -> Result<Layout<T>> {
    let parts = product.parts.iter().map(open).collect::<Result<Vec<_>>>()?;
    // for each group: its part and its first channel
    let mut places = Vec::new();
    for (p, channels) in channels.iter().enumerate() {
        let mut first = 0;
        for &c in channels {
            places.push((p, first, c));
            first += c;
        }
    }
    let groups = |taps: Option<usize>| -> Vec<Group> {
        places
            .iter()
            .map(|&(p, _, channels)| Group {
                taps: taps.unwrap_or(parts[p].taps),
                channels,
            })
            .collect()
    };
    let row = |column: usize, group: usize, out: &mut [f32]| {
        let (p, first, _) = places[group];
        let part = &parts[p];
        part.numbers
            .read((column * part.inputs + first) * part.taps, out);
    };
    let no_memory =
        |e: std::io::Error| Error::Weights(format!("no memory for packed weights: {e}"));
    match product.form {
        Form::Winograd(form) => {
            let channels = channels.concat();
            WinogradWeights::pack(form, product.columns, &channels, |column, source, out| {
                row(column, source, out);
            })
            .map(Layout::Winograd)
            .map_err(no_memory)
        }
        Form::Upsample => (0..4)
            .map(|phase| {
                Panels::pack(product.columns, &groups(Some(4)), |column, group, out| {
                    let mut taps = vec![0.0; out.len() / 4 * 9];
                    row(column, group, &mut taps);
                    for (taps, out) in taps.chunks_exact(9).zip(out.chunks_exact_mut(4)) {
                        sub_pixel(taps, (phase / 2, phase % 2), out);
                    }
                })
                .map_err(no_memory)
            })
            .collect::<Result<_>>()
            .map(Layout::Panels),
        form => {
            let half = product.columns / 2;
            let panels = Panels::pack(product.columns, &groups(None), |column, group, out| {
                let column = if form == Form::Gated {
                    geglu_column(column, half)
                } else {
                    column
                };
                row(column, group, out);
            });
            Ok(Layout::Panels(vec![panels.map_err(no_memory)?]))
        }
    }
}

/// The 2×2 taps that a 3×3 kernel amounts to for one of four pixels that an enlarged pixel becomes: rows (or columns) that read the same small
/// pixel are summed. Phase 0 reads the pixels before and at, phase 1 at and after.
fn sub_pixel(taps: &[f32], (dy, dx): (usize, usize), out: &mut [f32]) {
    let target = |phase: usize, k: usize| usize::from(if phase == 0 { k > 0 } else { k > 1 });
    out.fill(0.0);
    for (i, tap) in taps.iter().enumerate() {
        out[target(dy, i / 3) * 2 + target(dx, i % 3)] += tap;
    }
}
