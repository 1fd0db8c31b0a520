//! Convolutions 3×3 of stride 1 over channels-last pictures by Winograd's minimal filtering (Lavin & Gray 2016).
//!
//! A picture is cut into tiles of 2×2 or 4×4 results. Their 4×4 or 6×6 pixels are transformed, always in f32; at each of the 16 or 36
//! positions the transformed pixels of all tiles, `[tiles, channels]`, are multiplied by the transformed weights, `[channels, columns]`; and
//! the products are transformed to results: 2.25 or 4 times fewer multiplications than the definition. Products are of f32 or, in F(2×2, 3×3)
//! only, of bf16 numbers summed in f32: a rounding error of 0.4 % (the definition has 0.24 %), where F(4×4, 3×3) would have 2.4 %.
//!
//! Where there are many tiles, a thread takes a few, whose operands and products stay in its second-level cache, through all panels of
//! weights. Where there are few, all threads transform them together, and then share out panels, so that each weight is fetched once.

mod lanes;
mod scheme;
#[cfg(test)]
mod tests;
mod transform;
mod weights;

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::Level;
use super::epilogue::{Epilogue, Stored, Target};
use super::micro::{LANES, MR, NR, Segments, Tile, evenly};
use super::product::MOST_CHANNELS;
use super::view::Numbers;
use crate::Wrap;
pub(crate) use lanes::Kept;
use scheme::{F2, F4, Scheme};
use transform::{Input, Output};
pub(crate) use weights::WinogradWeights;

/// How many results a tile has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Form {
    /// F(2×2, 3×3): 16 products for 4 results.
    F2,
    /// F(4×4, 3×3): 36 products for 16 results; f32 only.
    F4,
}

impl Form {
    /// Results of a tile's side.
    pub(crate) fn side(self) -> usize {
        match self {
            Self::F2 => 2,
            Self::F4 => 4,
        }
    }

    /// Products of a tile, for each channel and column.
    pub(crate) fn positions(self) -> usize {
        (self.side() + 2) * (self.side() + 2)
    }
}

/// A channels-last picture, or one of several that lie side by side as if their channels were one picture's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a, I> {
    /// `[pictures, h / enlarged, w / enlarged, channels]`. Picture `i` of the result reads picture `i` modulo their number.
    pub(crate) data: &'a [I],
    /// How many pictures there are.
    pub(crate) pictures: usize,
    /// Numbers of a pixel.
    pub(crate) channels: usize,
    /// Numbers from one pixel to the next; `channels` or more.
    pub(crate) pixel_stride: usize,
    /// How many pixels of the convolved picture each becomes, along either side: 1, or more where the picture is enlarged first. The
    /// enlarged picture is nowhere.
    pub(crate) enlarged: usize,
    /// Along which axes the picture goes on at its other side, in the place of zeros.
    pub(crate) wrap: Wrap,
}

/// The sizes of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape<'a> {
    /// How many results a tile has.
    pub(crate) form: Form,
    /// Pictures, and the height and width of sources and results.
    pub(crate) pictures: (usize, usize, usize),
    /// Channels of each source.
    pub(crate) channels: &'a [usize],
    /// Channels of the result.
    pub(crate) columns: usize,
}

impl Shape<'_> {
    /// Bytes of workspace that [`convolve`] needs with that many threads and products of `T`.
    pub(crate) fn workspace_bytes<T: Kept>(&self, threads: usize) -> usize {
        let plan = Plan::new::<T>(self, threads);
        plan.operand_bytes::<T>() * plan.shares(threads) + plan.product_bytes() * threads
    }
}

/// `out = epilogue(3×3 convolution of the sources, with one pixel of zeros around them, or of their other side)`, of `(pictures, height, width)`; `out` is
/// `[pictures, height, width, columns]`.
///
/// Work goes to the threads of the current rayon pool; bits do not depend on how many they are. The workspace, of
/// [`Shape::workspace_bytes`] for [`rayon::current_num_threads`], begins at a multiple of 64 bytes.
///
/// # Panics
/// When sizes do not fit, a level has no products of `T`, or F(4×4) is asked for in bf16: a planner's mistake, never a user's.
pub(crate) fn convolve<T: Kept, I: Kept, O: Stored>(
    (level, weights): (Level, &WinogradWeights<T>),
    (pictures, sources): ((usize, usize, usize), &[Source<'_, I>]),
    epilogue: &Epilogue<'_>,
    out: &mut [O],
    workspace: &mut [u8],
) {
    check((level, weights), (pictures, sources), epilogue, out.len());
    if out.is_empty() {
        return;
    }
    let shape = Shape {
        form: weights.form(),
        pictures,
        channels: weights.channels(),
        columns: weights.columns(),
    };
    let target = Target {
        out: out.as_mut_ptr(),
        columns: weights.columns(),
    };
    let plan = Plan::new::<T>(&shape, rayon::current_num_threads());
    let job = Job {
        level,
        weights,
        sources,
        epilogue,
        target,
        plan,
    };
    match weights.form() {
        Form::F2 => job.run::<F2>(workspace),
        Form::F4 => job.run::<F4>(workspace),
    }
}

fn check<T: Kept, I: Kept>(
    (level, weights): (Level, &WinogradWeights<T>),
    ((batch, h, w), sources): ((usize, usize, usize), &[Source<'_, I>]),
    epilogue: &Epilogue<'_>,
    out: usize,
) {
    let columns = weights.columns();
    assert!(
        T::kernel(level, MR, NR).is_some(),
        "no products of these numbers at level {}",
        level.name()
    );
    assert!(
        weights.form() == Form::F2 || T::K_STEP == 1,
        "F(4×4, 3×3) of bf16 is too coarse"
    );
    assert_eq!(out, batch * h * w * columns, "the result's size");
    assert!(!epilogue.gated && epilogue.bias.is_none_or(|bias| bias.len() == columns));
    assert!(
        epilogue
            .slopes
            .is_none_or(|slopes| !epilogue.gated && slopes.len() == columns)
    );
    for values in [epilogue.image, epilogue.gate].into_iter().flatten() {
        assert!(values.fits(columns));
    }
    assert!(epilogue.residual.is_none_or(|more| {
        let len = match more {
            Numbers::F32(more) => more.len(),
            Numbers::Bf16(more) => more.len(),
        };
        len > 0 && len.is_multiple_of(columns)
    }));
    assert_eq!(sources.len(), weights.channels().len(), "sources");
    for (source, &channels) in sources.iter().zip(weights.channels()) {
        assert!(
            source.channels == channels
                && channels <= MOST_CHANNELS
                && source.pixel_stride >= channels
                && source.pictures > 0
                && source.enlarged > 0
                && h.is_multiple_of(source.enlarged)
                && w.is_multiple_of(source.enlarged)
        );
        let pixels = source.pictures * (h / source.enlarged) * (w / source.enlarged);
        assert!(
            pixels == 0 || source.data.len() >= (pixels - 1) * source.pixel_stride + channels,
            "a source's size"
        );
    }
}

/// The tiles of all pictures, row by row.
#[derive(Debug, Clone, Copy)]
struct Tiles {
    h: usize,
    w: usize,
    down: usize,
    across: usize,
}

impl Tiles {
    /// Picture, and the tile's row and column.
    fn at(&self, tile: usize) -> (usize, usize, usize) {
        (
            tile / (self.down * self.across),
            tile / self.across % self.down,
            tile % self.across,
        )
    }
}

/// How a convolution is cut and laid out.
#[derive(Debug, Clone, Copy)]
struct Plan {
    tiles: Tiles,
    positions: usize,
    /// All tiles.
    count: usize,
    /// Tiles whose operands are kept at a time: by each thread, or `shared` by all.
    kept: usize,
    shared: bool,
    /// Tiles whose products are kept at a time, by each thread.
    block: usize,
    /// Numbers from the operands of one tile to the next, and of one position.
    row: usize,
    position: usize,
}

/// Bytes that a thread keeps in its second-level cache.
const CACHE: usize = 720 << 10;
/// Channels that are summed in one go. Sums of sums lose less than one long sum, and a chunk of weights stays in the caches nearest.
const CHUNK: usize = 128;
/// Bytes of operands that threads share.
const SHARED: usize = 12 << 20;
/// Fewer tiles than this at a time and the weights, which each block of tiles reads anew, cost more than the products.
const FEWEST: usize = 24;
/// More tiles than this at a time and a block's products leave the cache.
const MOST: usize = 120;

impl Plan {
    fn new<T: Kept>(shape: &Shape<'_>, threads: usize) -> Self {
        let (batch, h, w) = shape.pictures;
        let side = shape.form.side();
        let tiles = Tiles {
            h,
            w,
            down: h.div_ceil(side),
            across: w.div_ceil(side),
        };
        let count = batch * tiles.down * tiles.across;
        let positions = shape.form.positions();
        let k = weights::padded_channels::<T>(shape.channels);
        let row = k.next_multiple_of(64 / size_of::<T>());
        let tile_bytes = positions * row * size_of::<T>();
        let own = CACHE / (tile_bytes + positions * NR * size_of::<f32>()) / MR * MR;
        let (kept, shared, block) = if own >= FEWEST && count >= own * 8 * threads {
            (own, false, own)
        } else {
            let panels = shape.columns.div_ceil(NR).max(1);
            let kept = (SHARED / tile_bytes.max(1)).max(96).min(count);
            let kept = count.div_ceil(count.div_ceil(kept.max(1)).max(1));
            let blocks = (8 * threads).div_ceil(panels).max(kept.div_ceil(MOST));
            (
                kept,
                true,
                kept.div_ceil(blocks.max(1))
                    .next_multiple_of(MR)
                    .max(FEWEST),
            )
        };
        // a line more, so that positions do not all fall into the same sets of a cache
        let position = kept * row + 64 / size_of::<T>();
        Self {
            tiles,
            positions,
            count,
            kept,
            shared,
            block,
            row,
            position,
        }
    }

    fn operand_bytes<T>(&self) -> usize {
        self.positions * self.position * size_of::<T>()
    }

    /// Numbers from the products of one position to the next.
    fn product_position(&self) -> usize {
        self.block * NR + LANES
    }

    fn product_bytes(&self) -> usize {
        self.positions * self.product_position() * size_of::<f32>()
    }

    /// How many sets of operands there are.
    fn shares(&self, threads: usize) -> usize {
        if self.shared { 1 } else { threads }
    }
}

/// One convolution.
struct Job<'a, T, I, O> {
    level: Level,
    weights: &'a WinogradWeights<T>,
    sources: &'a [Source<'a, I>],
    epilogue: &'a Epilogue<'a>,
    target: Target<O>,
    plan: Plan,
}

/// Operands of tiles, which tasks write each its own.
#[derive(Clone, Copy)]
struct Operands<T>(*mut T);
// SAFETY: whoever writes through it promises that no two tasks write the same tile
unsafe impl<T: Send> Send for Operands<T> {}
// SAFETY: as above
unsafe impl<T: Sync> Sync for Operands<T> {}

impl<T: Kept, I: Kept, O: Stored> Job<'_, T, I, O> {
    fn run<S: Scheme>(&self, workspace: &mut [u8]) {
        let threads = rayon::current_num_threads();
        let plan = &self.plan;
        assert!(
            (workspace.as_ptr() as usize).is_multiple_of(64),
            "a workspace begins at a multiple of 64 bytes"
        );
        let (operands, products) =
            workspace.split_at_mut(plan.operand_bytes::<T>() * plan.shares(threads));
        let products = &mut products[..plan.product_bytes() * threads];
        if plan.shared {
            self.share::<S>(operands, products);
        } else {
            self.each_its_own::<S>(operands, products);
        }
    }

    /// A thread takes a few tiles through everything.
    fn each_its_own<S: Scheme>(&self, operands: &mut [u8], products: &mut [u8]) {
        let plan = &self.plan;
        let next = AtomicUsize::new(0);
        let scratch = operands
            .par_chunks_mut(plan.operand_bytes::<T>())
            .zip(products.par_chunks_mut(plan.product_bytes()));
        scratch.for_each(|(operands, products)| {
            let operands = Operands(operands.as_mut_ptr().cast());
            while let Some(tiles) =
                part(next.fetch_add(1, Ordering::Relaxed), plan.block, plan.count)
            {
                // SAFETY: the thread's own operands, of as many tiles as a block has
                unsafe { self.operands::<S>(tiles.clone(), operands, 0) };
                for panel in 0..self.weights.count() {
                    // SAFETY: they have just been written
                    unsafe { self.results::<S>(panel, tiles.clone(), (operands, 0), products) };
                }
            }
        });
    }

    /// All threads transform the sources, then multiply them by panels.
    fn share<S: Scheme>(&self, operands: &mut [u8], products: &mut [u8]) {
        let plan = &self.plan;
        let operands = Operands(operands.as_mut_ptr().cast());
        for first in (0..plan.count).step_by(plan.kept) {
            let kept = (plan.count - first).min(plan.kept);
            let few = kept.div_ceil(16 * rayon::current_num_threads());
            (0..kept.div_ceil(few)).into_par_iter().for_each(|task| {
                if let Some(tiles) = part(task, few, kept) {
                    // SAFETY: tasks differ in tiles, which `operands` has room for
                    unsafe {
                        self.operands::<S>(
                            first + tiles.start..first + tiles.end,
                            operands,
                            tiles.start,
                        )
                    };
                }
            });
            let next = AtomicUsize::new(0);
            let blocks = kept.div_ceil(plan.block);
            products
                .par_chunks_mut(plan.product_bytes())
                .for_each(|products| {
                    loop {
                        let task = next.fetch_add(1, Ordering::Relaxed);
                        let (panel, block) = (task / blocks, task % blocks);
                        let Some(tiles) =
                            part(block, plan.block, kept).filter(|_| panel < self.weights.count())
                        else {
                            return;
                        };
                        // SAFETY: all operands have been written
                        unsafe {
                            self.results::<S>(
                                panel,
                                first + tiles.start..first + tiles.end,
                                (operands, tiles.start),
                                products,
                            )
                        };
                    }
                });
        }
    }

    /// Transforms the sources' tiles into the operands from tile `at`.
    ///
    /// # Safety
    /// The operands have room for them, and nobody else reads or writes these.
    unsafe fn operands<S: Scheme>(&self, tiles: Range<usize>, operands: Operands<T>, at: usize) {
        let plan = &self.plan;
        let mut k = 0;
        for source in self.sources {
            let input = Input::<T, I, S> {
                source,
                tiles: plan.tiles,
                range: tiles.clone(),
                to: operands.0.wrapping_add(at * plan.row + k),
                row: plan.row,
                position: plan.position,
                form: PhantomData,
            };
            // SAFETY: the caller's promise; `check` compared the source's size
            unsafe { input.transform(self.level) };
            k += source.channels.next_multiple_of(T::K_STEP);
        }
    }

    /// Multiplies the operands, which begin with tile `at` of those kept, by a panel, and stores the results.
    ///
    /// # Safety
    /// The operands are there; nobody else reads or writes these results.
    unsafe fn results<S: Scheme>(
        &self,
        panel: usize,
        tiles: Range<usize>,
        (operands, at): (Operands<T>, usize),
        products: &mut [u8],
    ) {
        let plan = &self.plan;
        let (width, products) = (
            self.weights.width(panel),
            products.as_mut_ptr().cast::<f32>(),
        );
        for position in 0..plan.positions {
            let weights = self.weights.panel(panel, position);
            let operands = operands
                .0
                .wrapping_add(position * plan.position + at * plan.row);
            let products = products.wrapping_add(position * plan.product_position());
            for (i, weights) in weights.chunks(CHUNK * width).enumerate() {
                let rows = operands.wrapping_add(i * CHUNK).cast_const();
                let tile = Tile {
                    a: std::ptr::null(),
                    rows: tiles.len(),
                    segments: &Segments::one(weights.len() / width),
                    panel: weights.as_ptr(),
                    c: products,
                    ldc: NR,
                    add: i > 0,
                };
                // SAFETY: rows of `k` numbers, by the caller's promise; a panel of `k_len × width`; products have room for a block
                unsafe { evenly(self.level, (rows, plan.row), width, &tile) };
            }
        }
        let output = Output::<O, S> {
            level: self.level,
            tiles: plan.tiles,
            range: tiles,
            from: products,
            position: plan.product_position(),
            width,
            columns: (
                panel * NR,
                (self.weights.columns() - panel * NR).min(NR),
                self.weights.columns(),
            ),
            epilogue: self.epilogue,
            target: self.target,
            form: PhantomData,
        };
        // SAFETY: the products have just been written; the caller's promise
        unsafe { output.transform(self.level) };
    }
}

/// Part `i` of `0..count` in parts of `size`.
fn part(i: usize, size: usize, count: usize) -> Option<Range<usize>> {
    let first = i.checked_mul(size)?;
    (first < count).then(|| first..(first + size).min(count))
}
