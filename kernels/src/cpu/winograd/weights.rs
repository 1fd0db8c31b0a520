//! Weights of 3×3 convolutions, transformed and packed once.

use rayon::prelude::*;

use super::Form;
use super::lanes::{Kept, Lanes, Work, vectorised};
use super::scheme::{F2, F4, Scheme};
use crate::cpu::Level;
use crate::cpu::aligned::Aligned;
use crate::cpu::micro::{LANES, NR};

/// The weights of one convolution: for each panel of up to 64 columns `[position][k / step][column][step]`, where a position is one of the
/// 16 or 36 products of a tile, `k` runs over the channels of all sources (each padded with zeros to whole steps), and a step is
/// [`crate::cpu::micro::Operand::K_STEP`].
pub(crate) struct WinogradWeights<T> {
    data: Aligned<T>,
    form: Form,
    columns: usize,
    channels: Vec<usize>,
}

impl<T: Kept> WinogradWeights<T> {
    /// Transforms and packs. `channels` of each source; `weight(column, source, out)` gives `[channel][tap]`, taps row by row.
    ///
    /// The transforms are computed in f32, and rounded once.
    ///
    /// # Errors
    /// When there is no memory.
    pub(crate) fn pack(
        form: Form,
        columns: usize,
        channels: &[usize],
        weight: impl Fn(usize, usize, &mut [f32]) + Sync,
    ) -> std::io::Result<Self> {
        let empty = Self {
            data: Aligned::zeros(0)?,
            form,
            columns,
            channels: channels.to_vec(),
        };
        let numbers = form.positions() * empty.k();
        let mut data = Aligned::zeros(columns.next_multiple_of(LANES) * numbers)?;
        let taps = 9 * channels.iter().copied().max().unwrap_or(0);
        let panels = data
            .as_mut_slice()
            .par_chunks_mut((NR * numbers).max(1))
            .enumerate();
        panels.for_each_init(
            || vec![0f32; taps * LANES],
            |taps, (p, panel)| {
                for first in (0..empty.width(p)).step_by(LANES) {
                    let mut k = 0;
                    for (source, &channels) in channels.iter().enumerate() {
                        let n = 9 * channels;
                        for lane in 0..LANES {
                            let column = p * NR + first + lane;
                            let taps = &mut taps[lane * n..][..n];
                            if column < columns {
                                weight(column, source, taps)
                            } else {
                                taps.fill(0.0)
                            }
                        }
                        let place = Place {
                            k,
                            column: first,
                            width: empty.width(p),
                            position: empty.k() * empty.width(p),
                        };
                        let taps = &taps[..n * LANES];
                        match form {
                            Form::F2 => place.put::<T, F2>(taps, channels, panel),
                            Form::F4 => place.put::<T, F4>(taps, channels, panel),
                        }
                        k += channels.next_multiple_of(T::K_STEP);
                    }
                }
            },
        );
        Ok(Self { data, ..empty })
    }

    /// The form that they were transformed for.
    pub(crate) fn form(&self) -> Form {
        self.form
    }

    /// Columns, without padding.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Channels of each source.
    pub(crate) fn channels(&self) -> &[usize] {
        &self.channels
    }

    /// Bytes of the packed numbers.
    pub(crate) fn bytes(&self) -> usize {
        self.data.len() * size_of::<T>()
    }

    /// Channels of all sources, padding included.
    pub(super) fn k(&self) -> usize {
        padded_channels::<T>(&self.channels)
    }

    /// How many panels there are.
    pub(super) fn count(&self) -> usize {
        self.columns.div_ceil(NR)
    }

    /// Columns of a panel, padding included: 16, 32, 48 or 64.
    pub(super) fn width(&self, panel: usize) -> usize {
        (self.columns - panel * NR).min(NR).next_multiple_of(LANES)
    }

    /// The numbers of one panel and position.
    pub(super) fn panel(&self, panel: usize, position: usize) -> &[T] {
        let (k, width) = (self.k(), self.width(panel));
        &self.data.as_slice()[panel * NR * k * self.form.positions() + position * k * width..]
            [..k * width]
    }
}

/// Channels of all sources, each padded to whole steps.
pub(super) fn padded_channels<T: Kept>(channels: &[usize]) -> usize {
    channels.iter().map(|c| c.next_multiple_of(T::K_STEP)).sum()
}

/// Where 16 columns of a source belong in a panel.
struct Place {
    /// `k` of the source's first channel.
    k: usize,
    /// The first of the columns, and how many the panel has.
    column: usize,
    width: usize,
    /// Numbers from one position to the next.
    position: usize,
}

impl Place {
    fn put<T: Kept, S: Scheme>(&self, taps: &[f32], channels: usize, panel: &mut [T]) {
        let work = Put::<T, S> {
            place: self,
            taps,
            channels,
            panel,
            of: std::marker::PhantomData,
        };
        // SAFETY: it asks for nothing
        unsafe { vectorised(Level::current(), work) }
    }
}

/// Transforms `[column][channel][tap]` of 16 columns.
struct Put<'a, T, S> {
    place: &'a Place,
    taps: &'a [f32],
    channels: usize,
    panel: &'a mut [T],
    of: std::marker::PhantomData<S>,
}

impl<T: Kept, S: Scheme> Work for Put<'_, T, S> {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            place,
            taps,
            channels,
            panel,
            ..
        } = self;
        let mut products = [[[0f32; LANES]; 2]; 36];
        for first in (0..channels).step_by(T::K_STEP) {
            if first + T::K_STEP > channels {
                products = [[[0f32; LANES]; 2]; 36];
            }
            for step in 0..T::K_STEP.min(channels - first) {
                let mut own = [[0f32; LANES]; 9];
                for lane in 0..LANES {
                    let from = &taps[(lane * channels + first + step) * 9..][..9];
                    for tap in 0..9 {
                        own[tap][lane] = from[tap];
                    }
                }
                for lane in (0..LANES).step_by(L::N) {
                    transform::<L, S>(&own, lane, step, &mut products);
                }
            }
            let at = (place.k + first) * place.width + place.column * T::K_STEP;
            for (position, products) in products.iter().enumerate().take(S::IN * S::IN) {
                T::interleave(
                    products,
                    &mut panel[position * place.position + at..][..LANES * T::K_STEP],
                );
            }
        }
    }
}

/// G g Gᵀ for the columns from `lane`.
#[inline(always)]
fn transform<L: Lanes, S: Scheme>(
    taps: &[[f32; LANES]; 9],
    lane: usize,
    step: usize,
    products: &mut [[[f32; LANES]; 2]; 36],
) {
    // SAFETY: `lane` is a multiple of `N`, which divides 16
    let tap = |y: usize, x: usize| unsafe { L::load_f32(taps[y * 3 + x][lane..].as_ptr()) };
    let mut columns = [[L::splat(0.0); 6]; 3];
    for (x, column) in columns.iter_mut().enumerate() {
        *column = S::weight([tap(0, x), tap(1, x), tap(2, x)]);
    }
    for y in 0..S::IN {
        let row = S::weight([columns[0][y], columns[1][y], columns[2][y]]);
        for x in 0..S::IN {
            // SAFETY: as above
            unsafe { row[x].store_f32(products[y * S::IN + x][step][lane..].as_mut_ptr()) };
        }
    }
}
