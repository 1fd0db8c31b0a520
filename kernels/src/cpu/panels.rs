//! Weights in the order in which products read them, packed once.

use rayon::prelude::*;

use super::aligned::Aligned;
use super::micro::{LANES, NR, Operand, Segments, Weight};

/// The weights of one product, column block by column block: for each *panel* of up to 64 columns all of `k`, padded with zeros to whole
/// vectors and pairs.
///
/// `k` runs over groups of taps: group by group, in a group tap by tap, in a tap channel by channel.
pub(crate) struct Panels<W> {
    data: Aligned<W>,
    shape: PanelShape,
}

/// The sizes of a product's panels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PanelShape {
    columns: usize,
    groups: Vec<Group>,
}

/// A column's weights of one group, in the order `[channel][tap]` in which files keep them: `weight(column, group, out)`.
pub(crate) type Column<'a> = dyn Fn(usize, usize, &mut [f32]) + Sync + 'a;

/// Where a product finds its panels.
pub(crate) enum Source<'a, W> {
    /// Packed.
    Packed(&'a Panels<W>),
    /// In the file, from which each is packed when it is its turn, for as long as it takes: weights that are kept smaller than panels would be.
    Loose(PanelShape, &'a Column<'a>),
}

/// Room for one panel of [`Source::Loose`].
pub(crate) struct Scratch<W> {
    panel: Vec<W>,
    column: Vec<f32>,
}

impl<W> Default for Scratch<W> {
    fn default() -> Self {
        Self {
            panel: Vec::new(),
            column: Vec::new(),
        }
    }
}

impl<W: Weight> Source<'_, W> {
    /// The sizes.
    pub(crate) fn shape(&self) -> &PanelShape {
        match self {
            Self::Packed(panels) => &panels.shape,
            Self::Loose(shape, _) => shape,
        }
    }

    /// Whether each visit of a panel costs packing it.
    pub(crate) fn is_loose(&self) -> bool {
        matches!(self, Self::Loose(..))
    }

    /// One panel's numbers.
    pub(crate) fn panel<'b>(&'b self, panel: usize, scratch: &'b mut Scratch<W>) -> &'b [W] {
        match self {
            Self::Packed(panels) => panels.panel(panel),
            Self::Loose(shape, column) => {
                let len = shape.width(panel) * shape.k::<W>();
                scratch.panel.clear();
                scratch.panel.resize(len, W::from_f32(0.0));
                shape.fill(panel, column, (&mut scratch.column, &mut scratch.panel));
                &scratch.panel
            }
        }
    }
}

/// Taps that read equally many channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Group {
    /// Taps: 1 for a linear layer, 9 for a 3×3 convolution.
    pub(crate) taps: usize,
    /// Channels that each reads.
    pub(crate) channels: usize,
}

impl Group {
    /// Numbers that a tap reads: the channels, padded to what the kernels take at once.
    pub(crate) fn k_len<T: Operand>(self) -> usize {
        self.channels.next_multiple_of(T::K_STEP)
    }

    /// What a kernel reads.
    pub(crate) fn segments<T: Operand>(self) -> Segments {
        Segments {
            count: self.taps,
            k_len: self.k_len::<T>(),
        }
    }
}

impl PanelShape {
    /// Of `columns` columns.
    pub(crate) fn new(columns: usize, groups: &[Group]) -> Self {
        Self {
            columns,
            groups: groups.to_vec(),
        }
    }

    /// Columns, without padding.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// The groups of taps.
    pub(crate) fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// How many panels there are.
    pub(crate) fn count(&self) -> usize {
        self.columns.div_ceil(NR)
    }

    /// Columns of a panel, padding included: 16, 32, 48 or 64.
    pub(crate) fn width(&self, panel: usize) -> usize {
        (self.columns - panel * NR).min(NR).next_multiple_of(LANES)
    }

    /// `k` of all groups, padding included.
    pub(crate) fn k<W: Weight>(&self) -> usize {
        self.groups
            .iter()
            .map(|g| g.taps * g.k_len::<W::Row>())
            .sum()
    }

    /// Bytes of all panels, packed.
    pub(crate) fn bytes<W: Weight>(&self) -> usize {
        self.columns.next_multiple_of(LANES) * self.k::<W>() * size_of::<W>()
    }

    /// Packs one panel, which is all zeros.
    fn fill<W: Weight>(
        &self,
        p: usize,
        weight: &Column<'_>,
        (column, panel): (&mut Vec<f32>, &mut [W]),
    ) {
        let width = self.width(p);
        for j in 0..(self.columns - p * NR).min(NR) {
            let mut panel = &mut panel[..];
            for (g, group) in self.groups.iter().enumerate() {
                column.resize(group.taps * group.channels, 0.0);
                weight(p * NR + j, g, column);
                let (own, rest) = panel.split_at_mut(group.taps * group.k_len::<W::Row>() * width);
                scatter(column, *group, (width, j), own);
                panel = rest;
            }
        }
    }
}

impl<W: Weight> Panels<W> {
    /// Packs `columns` columns.
    ///
    /// # Errors
    /// When there is no memory.
    pub(crate) fn pack(
        columns: usize,
        groups: &[Group],
        weight: impl Fn(usize, usize, &mut [f32]) + Sync,
    ) -> std::io::Result<Self> {
        let shape = PanelShape::new(columns, groups);
        let k = shape.k::<W>();
        let mut data = Aligned::zeros(columns.next_multiple_of(LANES) * k)?;
        data.as_mut_slice()
            .par_chunks_mut((NR * k).max(1))
            .enumerate()
            .for_each_init(Vec::new, |column, (p, panel)| {
                shape.fill(p, &weight, (column, panel));
            });
        Ok(Self { data, shape })
    }

    /// One panel's numbers.
    pub(crate) fn panel(&self, panel: usize) -> &[W] {
        let k = self.shape.k::<W>();
        &self.data.as_slice()[panel * NR * k..][..self.shape.width(panel) * k]
    }

    /// Bytes of the packed numbers.
    pub(crate) fn bytes(&self) -> usize {
        self.data.len() * size_of::<W>()
    }
}

/// Puts one column's `[channel][tap]` values into column `j` of `[tap][channel / step][width][step]`.
fn scatter<W: Weight>(values: &[f32], group: Group, (width, j): (usize, usize), panel: &mut [W]) {
    let step = W::Row::K_STEP;
    let tap_len = group.k_len::<W::Row>() * width;
    for (channel, taps) in values.chunks_exact(group.taps.max(1)).enumerate() {
        let at = (channel / step * width + j) * step + channel % step;
        for (tap, &value) in taps.iter().enumerate() {
            panel[tap * tap_len + at] = W::from_f32(value);
        }
    }
}

/// Columns of value and gate in turns, so that a panel holds 32 of each: column `j` of the packed weights is this column of the layer's own
/// `2 · half` columns (values first, then gates).
pub(crate) fn geglu_column(j: usize, half: usize) -> usize {
    let (block, at) = (j / NR, j % NR);
    let first = block * NR / 2;
    // the last block may be narrower: values and gates share it evenly
    let wide = (half - first).min(NR / 2);
    if at < wide {
        first + at
    } else {
        half + first + at - wide
    }
}
