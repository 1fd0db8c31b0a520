//! Weights in the order in which products read them, packed once.

use rayon::prelude::*;

use super::aligned::Aligned;
use super::micro::{LANES, NR, Operand, Weight};

/// The weights of one product, column block by column block: for each *panel* of up to 64 columns all of `k`, padded with zeros to whole
/// vectors and pairs.
///
/// `k` runs over groups of taps: group by group, in a group tap by tap, in a tap channel by channel.
pub(crate) struct Panels<W> {
    data: Aligned<W>,
    groups: Vec<Group>,
    columns: usize,
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
}

impl<W: Weight> Panels<W> {
    /// Packs `columns` columns. `weight(column, group, out)` gives a column's weights of one group in the order `[channel][tap]`, which is
    /// how files keep them.
    ///
    /// # Errors
    /// When there is no memory.
    pub(crate) fn pack(
        columns: usize,
        groups: &[Group],
        weight: impl Fn(usize, usize, &mut [f32]) + Sync,
    ) -> std::io::Result<Self> {
        let k: usize = groups.iter().map(|g| g.taps * g.k_len::<W::Row>()).sum();
        let mut data = Aligned::zeros(columns.next_multiple_of(LANES) * k)?;
        let packed = Self {
            data: Aligned::zeros(0)?,
            groups: groups.to_vec(),
            columns,
        };
        let largest = groups
            .iter()
            .map(|g| g.taps * g.channels)
            .max()
            .unwrap_or(0);
        data.as_mut_slice()
            .par_chunks_mut((NR * k).max(1))
            .enumerate()
            .for_each_init(
                || vec![0f32; largest],
                |column_weights, (p, panel)| {
                    let width = packed.width(p);
                    for j in 0..(columns - p * NR).min(NR) {
                        let mut panel = &mut panel[..];
                        for (g, group) in groups.iter().enumerate() {
                            let values = &mut column_weights[..group.taps * group.channels];
                            weight(p * NR + j, g, values);
                            let (own, rest) =
                                panel.split_at_mut(group.taps * group.k_len::<W::Row>() * width);
                            scatter(values, *group, (width, j), own);
                            panel = rest;
                        }
                    }
                },
            );
        Ok(Self { data, ..packed })
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
    pub(crate) fn k(&self) -> usize {
        self.groups
            .iter()
            .map(|g| g.taps * g.k_len::<W::Row>())
            .sum()
    }

    /// One panel's numbers.
    pub(crate) fn panel(&self, panel: usize) -> &[W] {
        let k = self.k();
        &self.data.as_slice()[panel * NR * k..][..self.width(panel) * k]
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
