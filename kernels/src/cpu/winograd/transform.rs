//! From pixels to the left operands of the products, and from products to results.

use std::marker::PhantomData;

use super::lanes::{Kept, Lanes, Work, vectorised};
use super::scheme::Scheme;
use super::{Source, Tiles};
use crate::cpu::Level;
use crate::cpu::epilogue::{self, Epilogue, Finish, Stored, Target};
use crate::cpu::micro::NR;
use crate::cpu::product::MOST_CHANNELS;

/// What pixels outside the picture hold, f32 or bf16.
#[repr(align(64))]
struct Zeros([f32; MOST_CHANNELS]);
static ZEROS: Zeros = Zeros([0.0; MOST_CHANNELS]);

/// Transformed tiles of a source: `[position][tile][k]`.
pub(super) struct Input<'a, T, I, S> {
    /// Where the pixels are.
    pub(crate) source: &'a Source<'a, I>,
    /// The tiles of the picture.
    pub(crate) tiles: Tiles,
    /// Which of them.
    pub(crate) range: std::ops::Range<usize>,
    /// The first tile's first number of this source.
    pub(crate) to: *mut T,
    /// Numbers from one tile to the next.
    pub(crate) row: usize,
    /// Numbers from one position to the next.
    pub(crate) position: usize,
    /// The form.
    pub(crate) form: PhantomData<S>,
}

/// The pixel of `size` before the one at `after`, if there is one. What tiles reach beyond the one pixel of padding is in no result.
#[inline(always)]
fn place(wraps: bool, after: usize, size: usize) -> Option<usize> {
    match after.checked_sub(1) {
        Some(at) if at < size => Some(at),
        Some(at) if wraps && at == size => Some(0),
        None if wraps => size.checked_sub(1),
        _ => None,
    }
}

impl<T: Kept, I: Kept, S: Scheme> Input<'_, T, I, S> {
    /// # Safety
    /// `to` is where [`Scheme::IN`]² times `range` times the source's channels, padded to whole steps, may be written, apart as said; the
    /// source has `pictures · h · w` pixels.
    pub(super) unsafe fn transform(self, level: Level) {
        // SAFETY: passed on
        unsafe { vectorised(level, self) }
    }

    /// Where the pixels of a tile are.
    #[inline(always)]
    fn gather(&self, tile: usize) -> [*const I; 36] {
        let Tiles { h, w, .. } = self.tiles;
        let (picture, y, x) = self.tiles.at(tile);
        let enlarged = self.source.enlarged;
        let mut pixels = [ZEROS.0.as_ptr().cast::<I>(); 36];
        for dy in 0..S::IN {
            let Some(y) = place(self.source.wrap.y, y * S::OUT + dy, h) else {
                continue;
            };
            let line = picture % self.source.pictures * (h / enlarged) + y / enlarged;
            let line = line * (w / enlarged);
            for dx in 0..S::IN {
                if let Some(x) = place(self.source.wrap.x, x * S::OUT + dx, w) {
                    pixels[dy * S::IN + dx] = self.source.data
                        [(line + x / enlarged) * self.source.pixel_stride..]
                        .as_ptr();
                }
            }
        }
        pixels
    }
}

impl<T: Kept, I: Kept, S: Scheme> Work for Input<'_, T, I, S> {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let channels = self.source.channels;
        let whole = channels / L::N * L::N;
        for (i, tile) in self.range.clone().enumerate() {
            let pixels = self.gather(tile);
            // SAFETY: tile `i` of those that the caller promises room for
            unsafe {
                let to = self.to.add(i * self.row);
                for channel in (0..whole).step_by(L::N) {
                    input::<T, I, S, L>(&pixels, channel, to, self.position);
                }
                for channel in whole..channels {
                    input::<T, I, S, f32>(&pixels, channel, to, self.position);
                }
                for channel in channels..channels.next_multiple_of(T::K_STEP) {
                    for position in 0..S::IN * S::IN {
                        *to.add(position * self.position + channel) = T::of(0.0);
                    }
                }
            }
        }
    }
}

/// Bᵀ d B for a few channels of a tile.
///
/// # Safety
/// All pixels have the channels, and `to` has them at all positions.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // rows and columns of squares: the indices say which
unsafe fn input<T: Kept, I: Kept, S: Scheme, L: Lanes>(
    pixels: &[*const I; 36],
    channel: usize,
    to: *mut T,
    position: usize,
) {
    let mut columns = [[L::splat(0.0); 6]; 6];
    for x in 0..S::IN {
        let mut d = [L::splat(0.0); 6];
        for y in 0..S::IN {
            // SAFETY: the caller's promise
            d[y] = unsafe { I::load::<L>(pixels[y * S::IN + x].add(channel)) };
        }
        columns[x] = S::input(d);
    }
    for y in 0..S::IN {
        let mut d = [L::splat(0.0); 6];
        for x in 0..S::IN {
            d[x] = columns[x][y];
        }
        let row = S::input(d);
        for x in 0..S::IN {
            // SAFETY: the caller's promise
            unsafe { T::store(row[x], to.add((y * S::IN + x) * position + channel)) };
        }
    }
}

/// Results of transformed products `[position][tile][64]`, finished and stored.
pub(super) struct Output<'a, O, S> {
    /// For the epilogue.
    pub(crate) level: Level,
    /// The tiles of the picture.
    pub(crate) tiles: Tiles,
    /// Which of them.
    pub(crate) range: std::ops::Range<usize>,
    /// The first tile's first product.
    pub(crate) from: *const f32,
    /// Numbers from one position to the next.
    pub(crate) position: usize,
    /// Columns of products, padding included.
    pub(crate) width: usize,
    /// The first column, the columns to store, and those of the layer.
    pub(crate) columns: (usize, usize, usize),
    /// What is done to the results.
    pub(crate) epilogue: &'a Epilogue<'a>,
    /// Where to.
    pub(crate) target: Target<O>,
    /// The form.
    pub(crate) form: PhantomData<S>,
}

impl<O: Stored, S: Scheme> Output<'_, O, S> {
    /// # Safety
    /// `from` has the products; nobody else reads or writes these columns of these tiles' results in the target, which has them.
    pub(super) unsafe fn transform(self, level: Level) {
        // SAFETY: passed on
        unsafe { vectorised(level, self) }
    }
}

/// Results of the largest tile.
const RESULTS: usize = 16;

impl<O: Stored, S: Scheme> Work for Output<'_, O, S> {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Tiles { h, w, .. } = self.tiles;
        // one row more, for results outside the picture
        let mut sums = [0f32; (RESULTS + 1) * NR];
        for (i, tile) in self.range.clone().enumerate() {
            let (picture, y, x) = self.tiles.at(tile);
            let (mut rows, mut count) = ([0; RESULTS], 0);
            let mut places = [RESULTS * NR; RESULTS];
            for dy in 0..S::OUT.min(h - y * S::OUT) {
                for dx in 0..S::OUT.min(w - x * S::OUT) {
                    rows[count] = (picture * h + y * S::OUT + dy) * w + x * S::OUT + dx;
                    places[dy * S::OUT + dx] = count * NR;
                    count += 1;
                }
            }
            for column in (0..self.width).step_by(L::N) {
                // SAFETY: a tile of those that the caller promises; places are of `sums`
                unsafe {
                    output::<S, L>(
                        self.from.add(i * NR + column),
                        self.position,
                        sums[column..].as_mut_ptr(),
                        &places,
                    )
                };
            }
            let finish = Finish {
                sums: &sums[..count * NR],
                ldc: NR,
                rows: &rows[..count],
                width: self.columns.1,
                column: self.columns.0,
                columns: self.columns.2,
                target: self.target,
            };
            // SAFETY: the caller's promise
            unsafe { epilogue::finish(self.level, self.epilogue, &finish) };
        }
    }
}

/// Aᵀ m A for a few columns of a tile.
///
/// # Safety
/// `from` has all positions; `to` has the places.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // as in `input`
unsafe fn output<S: Scheme, L: Lanes>(
    from: *const f32,
    position: usize,
    to: *mut f32,
    places: &[usize; RESULTS],
) {
    let mut columns = [[L::splat(0.0); 6]; 6];
    for x in 0..S::IN {
        let mut m = [L::splat(0.0); 6];
        for y in 0..S::IN {
            // SAFETY: the caller's promise
            m[y] = unsafe { L::load_f32(from.add((y * S::IN + x) * position)) };
        }
        columns[x] = S::output(m);
    }
    for y in 0..S::OUT {
        let mut m = [L::splat(0.0); 6];
        for x in 0..S::IN {
            m[x] = columns[x][y];
        }
        let row = S::output(m);
        for x in 0..S::OUT {
            // SAFETY: the caller's promise
            unsafe { row[x].store_f32(to.add(places[y * S::OUT + x])) };
        }
    }
}
