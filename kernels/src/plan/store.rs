//! Weights as executors read them: packed once, shared by the plans of all sizes, and the only copy there is.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::bf16;

use super::ir::{Form, Part, Product, Program, Type};
use crate::cpu::Level;
use crate::cpu::micro::{Brain, Half, LANES, Weight};
use crate::cpu::panels::{Group, PanelShape, Panels, geglu_column};
use crate::cpu::winograd::{self, Kept, WinogradWeights};
use crate::gpu::{Buffer, Gpu};
use crate::{Error, Param, Reader, Result};
use candle_core::DType;

/// The packed weights of one network.
#[derive(Default)]
pub struct Store {
    packed: Mutex<BTreeMap<Key, Packed>>,
    vectors: Mutex<BTreeMap<String, Arc<Vec<f32>>>>,
    /// What is on a card; the products' weights, then the vectors.
    uploaded: Mutex<BTreeMap<Key, Arc<Buffer>>>,
}

/// Which weights, how.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    names: Vec<String>,
    sources: Vec<usize>,
    form: Form,
    kind: Type,
}

impl Key {
    fn of(product: &Product, channels: &[Vec<usize>], kind: Type) -> Self {
        let names = product.parts.iter().map(|p| p.weight.name().to_owned());
        Self {
            names: names.collect(),
            sources: channels.concat(),
            form: product.form,
            kind,
        }
    }
}

/// Weights of a product in the layout of its form.
#[derive(Clone)]
pub(super) enum Packed {
    /// For implicit products, those of each phase.
    F32(Phases<f32>),
    Bf16(Phases<bf16>),
    /// Kept as the file has them, and multiplied as f32.
    Half(Phases<Half>),
    Brain(Phases<Brain>),
    /// Transformed.
    WinogradF32(Arc<WinogradWeights<f32>>),
    WinogradBf16(Arc<WinogradWeights<bf16>>),
}

type Phases<W> = Arc<Vec<Panels<W>>>;

/// How [`Packed`] keeps weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    F32,
    Bf16,
    Half,
    Brain,
    WinogradF32(winograd::Form),
    WinogradBf16(winograd::Form),
}

impl Layout {
    fn of(product: &Product, (kind, level): (Type, Level)) -> Self {
        match (kind, product.form) {
            (Type::F32, Form::Winograd(form)) => Self::WinogradF32(form),
            (Type::Bf16, Form::Winograd(form)) => Self::WinogradBf16(form),
            (Type::Bf16, _) => Self::Bf16,
            // f32 arithmetic on the numbers that the file has, which take half the room
            (Type::F32, Form::Direct | Form::Gated) if level > Level::Portable => {
                let mut types = product.parts.iter().map(|part| part.weight.dtype());
                let first = types.next();
                match first.filter(|first| types.all(|dtype| dtype == *first)) {
                    Some(DType::F16) => Self::Half,
                    Some(DType::BF16) => Self::Brain,
                    _ => Self::F32,
                }
            }
            (Type::F32, _) => Self::F32,
        }
    }

    /// For one input, one tap and one column.
    fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::WinogradF32(_) => 4,
            _ => 2,
        }
    }
}

/// Bytes that a product's weights take when they are packed; a little less than the truth where channels are odd.
pub(super) fn packed_bytes(product: &Product, how: (Type, Level)) -> usize {
    let layout = Layout::of(product, how);
    let inputs = |part: &Part| part.weight.shape().get(1).copied().unwrap_or(1);
    let taps = |part: &Part| match product.form {
        Form::Winograd(form) => form.positions(),
        Form::Upsample => 16,
        _ => part.kernel.0 * part.kernel.1,
    };
    let k: usize = product.parts.iter().map(|p| inputs(p) * taps(p)).sum();
    product.columns.next_multiple_of(LANES) * k * layout.bytes()
}

impl Packed {
    /// Packs a product's weights for sources of these channels, for products of `kind`.
    pub(super) fn now(
        product: &Product,
        channels: &[Vec<usize>],
        (kind, level): (Type, Level),
    ) -> Result<Self> {
        let stored = Stored::open(product, channels)?;
        Ok(match Layout::of(product, (kind, level)) {
            Layout::F32 => Self::F32(Arc::new(stored.panels()?)),
            Layout::Bf16 => Self::Bf16(Arc::new(stored.panels()?)),
            Layout::Half => Self::Half(Arc::new(stored.panels()?)),
            Layout::Brain => Self::Brain(Arc::new(stored.panels()?)),
            Layout::WinogradF32(form) => Self::WinogradF32(Arc::new(stored.winograd(form)?)),
            Layout::WinogradBf16(form) => Self::WinogradBf16(Arc::new(stored.winograd(form)?)),
        })
    }

    fn bytes(&self) -> usize {
        fn of<W: Weight>(phases: &[Panels<W>]) -> usize {
            phases.iter().map(Panels::bytes).sum()
        }
        match self {
            Self::F32(phases) => of(phases),
            Self::Bf16(phases) => of(phases),
            Self::Half(phases) => of(phases),
            Self::Brain(phases) => of(phases),
            Self::WinogradF32(weights) => weights.bytes(),
            Self::WinogradBf16(weights) => weights.bytes(),
        }
    }
}

impl Store {
    /// Bytes that are held.
    pub fn bytes(&self) -> usize {
        let packed = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        let vectors = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        packed.values().map(Packed::bytes).sum::<usize>()
            + vectors.values().map(|v| v.len() * 4).sum::<usize>()
            + self.uploaded().values().map(|b| b.len()).sum::<usize>()
    }

    fn uploaded(&self) -> MutexGuard<'_, BTreeMap<Key, Arc<Buffer>>> {
        self.uploaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `make` gives, on the card; made once.
    fn once(
        &self,
        gpu: &Gpu,
        key: Key,
        make: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Arc<Buffer>> {
        if let Some(found) = self.uploaded().get(&key).filter(|b| b.is_on(gpu)) {
            return Ok(Arc::clone(found));
        }
        let buffer = Arc::new(gpu.holding(&make()?)?);
        self.uploaded().insert(key, Arc::clone(&buffer));
        Ok(buffer)
    }

    /// A small weight on the card.
    pub(super) fn on_card(
        &self,
        gpu: &Gpu,
        name: String,
        make: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Arc<Buffer>> {
        let key = Key {
            names: vec![name],
            sources: Vec::new(),
            form: Form::Direct,
            kind: Type::F32,
        };
        self.once(gpu, key, make)
    }

    /// A product's weights on the card.
    pub(super) fn weights_on_card(
        &self,
        (program, product): (&Program, &Product),
        gpu: &Gpu,
        make: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Arc<Buffer>> {
        let (channels, kind) = program.sources(product);
        self.once(gpu, Key::of(product, &channels, kind), make)
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
        self.uploaded().clear();
    }

    /// Lets go of the weights of these names, which have changed; plans made from it keep what they use.
    pub fn forget(&self, fits: &dyn Fn(&str) -> bool) {
        self.packed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|key, _| !key.names.iter().any(|name| fits(name)));
        self.vectors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|name, _| !fits(name));
        self.uploaded()
            .retain(|key, _| !key.names.iter().any(|name| fits(name)));
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

    /// The sum of a product's biases in the order of its packed columns; none when it has none.
    pub(super) fn bias(&self, product: &Product) -> Result<Option<Arc<Vec<f32>>>> {
        let mut sum = self.sum_of_biases(product)?;
        if let (Some(bias), Form::Gated) = (&mut sum, product.form) {
            *bias = (0..bias.len())
                .map(|j| bias[geglu_column(j, bias.len() / 2)])
                .collect();
        }
        Ok(sum.map(Arc::new))
    }

    /// The same in the order of the file's columns.
    pub(super) fn sum_of_biases(&self, product: &Product) -> Result<Option<Vec<f32>>> {
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
        Ok(sum)
    }

    /// A product's weights for sources of these channels.
    pub(super) fn weights(
        &self,
        product: &Product,
        channels: &[Vec<usize>],
        (kind, level): (Type, Level),
    ) -> Result<Packed> {
        let key = Key::of(product, channels, kind);
        if let Some(found) = self
            .packed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
        {
            return Ok(found.clone());
        }
        let packed = Packed::now(product, channels, (kind, level))?;
        self.packed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key, packed.clone());
        Ok(packed)
    }
}

/// The weights of a product as the file keeps them: each `[column][input][tap]`.
pub(super) struct Stored<'a> {
    product: &'a Product,
    parts: Vec<Box<dyn Reader + 'a>>,
    /// For each source: its part, its first input, and its channels.
    places: Vec<(usize, usize, usize)>,
}

impl<'a> Stored<'a> {
    pub(super) fn open(product: &'a Product, channels: &[Vec<usize>]) -> Result<Self> {
        let parts = product.parts.iter().map(|part| part.weight.open());
        let mut places = Vec::new();
        for (p, channels) in channels.iter().enumerate() {
            let mut first = 0;
            for &c in channels {
                places.push((p, first, c));
                first += c;
            }
        }
        Ok(Self {
            product,
            parts: parts.collect::<Result<_>>()?,
            places,
        })
    }

    /// A column's weights for one source, `[input][tap]`.
    pub(super) fn row(&self, column: usize, source: usize, out: &mut [f32]) {
        let (p, first, _) = self.places[source];
        let part = &self.product.parts[p];
        let inputs = part.weight.shape().get(1).copied().unwrap_or(1);
        let taps = part.kernel.0 * part.kernel.1;
        self.parts[p].read((column * inputs + first) * taps, out);
    }

    /// Whether the product enlarges, so that four phases of 2×2 taps each stand for its 3×3.
    pub(super) fn enlarges(&self) -> bool {
        self.product.form == Form::Upsample
    }

    fn winograd<T: Kept>(&self, form: winograd::Form) -> Result<WinogradWeights<T>> {
        let channels: Vec<usize> = self.places.iter().map(|place| place.2).collect();
        let row = |column, source, out: &mut [f32]| self.row(column, source, out);
        WinogradWeights::pack(form, self.product.columns, &channels, row).map_err(|e| no_memory(&e))
    }

    /// What each source brings; `taps` where they are not those of the kernel.
    fn groups(&self, taps: Option<usize>) -> Vec<Group> {
        let group = |&(p, _, channels): &(usize, usize, usize)| {
            let (kh, kw) = self.product.parts[p].kernel;
            let taps = taps.unwrap_or(kh * kw);
            Group { taps, channels }
        };
        self.places.iter().map(group).collect()
    }

    fn panels<W: Weight>(&self) -> Result<Vec<Panels<W>>> {
        let columns = self.product.columns;
        let groups = |taps| self.groups(taps);
        let packed = match self.product.form {
            Form::Upsample => (0..4)
                .map(|phase| {
                    Panels::pack(columns, &groups(Some(4)), |column, group, out| {
                        let mut taps = vec![0.0; out.len() / 4 * 9];
                        self.row(column, group, &mut taps);
                        for (taps, out) in taps.chunks_exact(9).zip(out.chunks_exact_mut(4)) {
                            sub_pixel(taps, (phase / 2, phase % 2), out);
                        }
                    })
                })
                .collect(),
            Form::Gated => Panels::pack(columns, &groups(None), |column, group, out| {
                self.row(geglu_column(column, columns / 2), group, out);
            })
            .map(|panels| vec![panels]),
            _ => Panels::pack(columns, &groups(None), |column, group, out| {
                self.row(column, group, out);
            })
            .map(|panels| vec![panels]),
        };
        packed.map_err(|e| no_memory(&e))
    }
}

/// The weights of a product where they lie, to be packed panel by panel.
pub(super) struct Loose<'a> {
    stored: Stored<'a>,
    layout: Layout,
}

impl<'a> Loose<'a> {
    /// Opens a product's weights; none where its form wants all of them at once.
    pub(super) fn open(
        product: &'a Product,
        channels: &[Vec<usize>],
        how: (Type, Level),
    ) -> Result<Option<Self>> {
        if !matches!(product.form, Form::Direct | Form::Gated) {
            return Ok(None);
        }
        Ok(Some(Self {
            stored: Stored::open(product, channels)?,
            layout: Layout::of(product, how),
        }))
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }

    pub(super) fn shape(&self) -> PanelShape {
        PanelShape::new(self.stored.product.columns, &self.stored.groups(None))
    }

    /// A column's weights for one source, `[input][tap]`.
    pub(super) fn column(&self, column: usize, group: usize, out: &mut [f32]) {
        let product = self.stored.product;
        let column = match product.form {
            Form::Gated => geglu_column(column, product.columns / 2),
            _ => column,
        };
        self.stored.row(column, group, out);
    }
}

fn no_memory(error: &std::io::Error) -> Error {
    Error::Memory(format!("no memory for packed weights: {error}"))
}

/// The 2×2 taps that a 3×3 kernel amounts to for one of four pixels that an enlarged pixel becomes: rows (or columns) that read the same small
/// pixel are summed. Phase 0 reads the pixels before and at, phase 1 at and after.
pub(super) fn sub_pixel(taps: &[f32], (dy, dx): (usize, usize), out: &mut [f32]) {
    let target = |phase: usize, k: usize| usize::from(if phase == 0 { k > 0 } else { k > 1 });
    out.fill(0.0);
    for (i, tap) in taps.iter().enumerate() {
        out[target(dy, i / 3) * 2 + target(dx, i % 3)] += tap;
    }
}
