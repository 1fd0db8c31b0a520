//! Products of rows with packed weights: linear layers, and convolutions as implicit products over channels-last pictures.
//!
//! A row of the result is a pixel (or token). What it reads is listed as pointers, one a tap, into the source where it lies: nothing is copied,
//! pixels outside the picture point to zeros. The work is cut into blocks of rows by ranges of panels, handed out to the threads as they come free.

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Level;
use super::aligned::Plain;
use super::epilogue::{self, Epilogue, Finish, Stored, Target};
use smallvec::SmallVec;

use super::micro::{MOST_ROWS, MR, NR, Operand, Rows, Tile, Weight};
use super::panels::{self, Group, PanelShape, Scratch};
use super::view::Numbers;
use crate::Wrap;

/// Where the taps of one group read: a channels-last picture (or sequence, as a picture one pixel high).
#[derive(Debug, Clone)]
pub(crate) struct Source<'a, T> {
    /// `[pictures, h, w, channels]`, and at least one number more where `channels` is not a multiple of [`super::micro::Operand::K_STEP`]. Picture `i` of the
    /// result reads picture `i` modulo their number.
    pub(crate) data: &'a [T],
    /// How many pictures there are.
    pub(crate) pictures: usize,
    /// Pixels of a column.
    pub(crate) h: usize,
    /// Pixels of a row.
    pub(crate) w: usize,
    /// Numbers of a pixel.
    pub(crate) channels: usize,
    /// Numbers from one pixel to the next; `channels` or more.
    pub(crate) pixel_stride: usize,
    /// Pixels from one result to the next.
    pub(crate) stride: usize,
    /// For each tap the pixel that result (0, 0) reads, as (y, x); result (y, x) reads `stride · (y, x)` further on. Outside are zeros.
    pub(crate) taps: &'a [(isize, isize)],
    /// Along which axes the picture goes on at its other side instead.
    pub(crate) wrap: Wrap,
}

/// The grid of results of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grid {
    /// Pictures.
    pub(crate) batch: usize,
    /// Results of a column.
    pub(crate) h: usize,
    /// Results of a row.
    pub(crate) w: usize,
    /// Where result (y, x) is stored: pixel (y · step + dy, x · step + dx) of pictures `step` times as high and wide. (1, 0, 0) is in place; the
    /// sub-pixel form of an upsampling convolution stores four interleaved grids.
    pub(crate) place: (usize, usize, usize),
}

impl Grid {
    /// Results in place.
    pub(crate) fn plain(batch: usize, h: usize, w: usize) -> Self {
        Self {
            batch,
            h,
            w,
            place: (1, 0, 0),
        }
    }

    fn rows(&self) -> usize {
        self.batch * self.h * self.w
    }

    /// Picture, y and x of a row.
    fn at(&self, row: usize) -> (usize, usize, usize) {
        let (picture, pixel) = (row / (self.h * self.w), row % (self.h * self.w));
        (picture, pixel / self.w, pixel % self.w)
    }

    /// The row of the stored result.
    fn stored(&self, row: usize) -> usize {
        let (step, dy, dx) = self.place;
        if step == 1 {
            return row;
        }
        let (picture, y, x) = self.at(row);
        (picture * self.h * step + y * step + dy) * self.w * step + x * step + dx
    }
}

/// The most channels of a source: as many as there are zeros for taps outside the picture.
pub(crate) const MOST_CHANNELS: usize = 1 << 15;

/// What a thread's tasks work in; kept so that no call has to find room anew.
struct Room {
    /// Where the taps of a task's rows read.
    pointers: Vec<*const u8>,
    /// Sums of rows by the columns of a panel, from the first multiple of 64 bytes.
    sums: Vec<f32>,
}

impl Room {
    const LINE: usize = 64;

    /// Sums of so many rows.
    fn sums(&mut self, rows: usize) -> (&[*const u8], &mut [f32]) {
        let len = rows * NR;
        if self.sums.len() < len + Self::LINE / size_of::<f32>() {
            self.sums = vec![0.0; len + Self::LINE / size_of::<f32>()];
        }
        let first = self.sums.as_ptr().align_offset(Self::LINE);
        (&self.pointers, &mut self.sums[first..][..len])
    }
}

thread_local! {
    static ROOM: RefCell<Room> = const { RefCell::new(Room { pointers: Vec::new(), sums: Vec::new() }) };
}

/// `out = epilogue(rows × weights)`.
///
/// # Panics
/// When sizes do not fit: a planner's mistake, never a user's.
pub(crate) fn product<W: Weight, O: Stored>(
    level: Level,
    weights: &panels::Source<'_, W>,
    (grid, sources): (Grid, &[Source<'_, W::Row>]),
    epilogue: &Epilogue<'_>,
    out: &mut [O],
) {
    let shape = weights.shape();
    check::<W>(shape, grid, sources, epilogue, out.len());
    let job = Job {
        level,
        weights,
        grid,
        sources,
        epilogue,
        target: Target {
            out: out.as_mut_ptr(),
            columns: if epilogue.gated {
                shape.columns() / 2
            } else {
                shape.columns()
            },
        },
    };
    if grid.rows() == 0 || weights.shape().columns() == 0 {
        return;
    }
    let cut = Cut::new(level, grid.rows(), weights, rayon::current_num_threads());
    let next = AtomicUsize::new(0);
    let work = || {
        let mut scratch = Scratch::default();
        ROOM.with_borrow_mut(|room| {
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                let Some((rows, panels)) = cut.task(task) else {
                    return;
                };
                job.run(rows, panels, (room, &mut scratch));
            }
        });
    };
    if cut.tasks() == 1 {
        work();
    } else {
        rayon::broadcast(|_| work());
    }
}

fn check<W: Weight>(
    weights: &PanelShape,
    grid: Grid,
    sources: &[Source<'_, W::Row>],
    epilogue: &Epilogue<'_>,
    out: usize,
) {
    let columns = weights.columns();
    let results = if epilogue.gated { columns / 2 } else { columns };
    let step = grid.place.0;
    assert_eq!(
        out,
        grid.rows() * step * step * results,
        "the result's size"
    );
    assert!(grid.place.1 < step && grid.place.2 < step);
    assert!(epilogue.bias.is_none_or(|bias| bias.len() == columns));
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
        len > 0 && len.is_multiple_of(results)
    }));
    assert_eq!(sources.len(), weights.groups().len(), "one source a group");
    for (source, group) in sources.iter().zip(weights.groups()) {
        assert_eq!(
            Group {
                taps: source.taps.len(),
                channels: source.channels
            },
            *group
        );
        let pixels = source.pictures * source.h * source.w;
        let k_len = group.k_len::<W::Row>();
        assert!(pixels > 0 && source.pixel_stride >= source.channels && k_len <= MOST_CHANNELS);
        assert!(
            source.data.len() >= (pixels - 1) * source.pixel_stride + k_len,
            "a source too short for its padding"
        );
    }
}

/// How the work is cut: blocks of rows by ranges of panels.
struct Cut {
    rows: usize,
    block: usize,
    panels: usize,
    range: usize,
}

impl Cut {
    fn new<W: Weight>(
        level: Level,
        rows: usize,
        weights: &panels::Source<'_, W>,
        threads: usize,
    ) -> Self {
        let (shape, panels) = (weights.shape(), weights.shape().count());
        let most_taps = shape.groups().iter().map(|g| g.taps).max().unwrap_or(1);
        let k_bytes = shape.k::<W>() * size_of::<W::Row>();
        let sizes = Sizes {
            rows,
            panels,
            k_bytes,
            taps: most_taps.max(1),
            weights: shape.bytes::<W>(),
            is_loose: weights.is_loose(),
            threads,
        };
        let at_once = W::Row::rows(level);
        let (block, range) = match at_once.most {
            ..=MR => sizes.for_vectors(),
            _ => sizes.for_tiles(at_once.even),
        };
        Self {
            rows,
            block,
            panels,
            range,
        }
    }

    fn tasks(&self) -> usize {
        self.rows.div_ceil(self.block) * self.panels.div_ceil(self.range)
    }

    /// Rows and panels of a task; neighbours share the rows.
    fn task(&self, i: usize) -> Option<(std::ops::Range<usize>, std::ops::Range<usize>)> {
        let ranges = self.panels.div_ceil(self.range);
        let (row, panel) = (i / ranges * self.block, i % ranges * self.range);
        (row < self.rows).then(|| {
            (
                row..(row + self.block).min(self.rows),
                panel..(panel + self.range).min(self.panels),
            )
        })
    }
}

/// What decides on the [`Cut`] of a product.
struct Sizes {
    rows: usize,
    panels: usize,
    /// Bytes that a row reads, and how many taps share them with its neighbours.
    k_bytes: usize,
    taps: usize,
    /// Bytes of all weights.
    weights: usize,
    is_loose: bool,
    threads: usize,
}

impl Sizes {
    /// Weights that are read again and again without being missed elsewhere.
    const LIGHT: usize = 4 << 20;
    /// The most rows of a block where it is its columns that are shared out.
    const MOST: usize = 2048;

    /// As many tasks as are wanted, so that no thread waits long for the last.
    fn want(&self) -> usize {
        8 * self.threads
    }

    /// A block of rows stays in a core's second-level cache while all panels pass by; with few rows and many weights the panels are shared out
    /// instead, so that each is fetched once.
    fn for_vectors(&self) -> (usize, usize) {
        const CACHE: usize = 384 << 10;
        let row_bytes = self.k_bytes / self.taps.min(6);
        let block = (CACHE / row_bytes.max(1))
            .clamp(48, 384)
            .next_multiple_of(MR);
        let whole = self.rows.next_multiple_of(MR);
        let few = self.threads > 1 && self.rows.div_ceil(block) < self.want();
        if self.is_loose || (few && (self.weights > Self::LIGHT || self.rows < 96 * self.threads)) {
            let block = whole.min(Self::MOST);
            (block, self.range(block))
        } else if few {
            let share = self.rows.div_ceil(self.want()).next_multiple_of(MR);
            (share.max(MR * 4), self.panels)
        } else {
            (block.min(whole), self.panels)
        }
    }

    /// Tiles multiply faster than the third-level cache gives: a block of rows stays in the second-level cache while many panels pass by, and is as
    /// large as fits there, so that they pass by seldom. Only where weights are light is it smaller, for there to be enough tasks.
    fn for_tiles(&self, even: usize) -> (usize, usize) {
        const CACHE: usize = 1 << 20;
        const FEWEST: usize = 128;
        let most = match self.is_loose {
            true => Self::MOST,
            false => CACHE / (self.k_bytes / self.taps).max(1),
        };
        let mut blocks = self.rows.div_ceil(most.clamp(FEWEST, Self::MOST));
        if self.weights <= Self::LIGHT && !self.is_loose {
            // a thin product has few panels: better short blocks than idle threads
            let idle = self.panels * self.rows.div_ceil(FEWEST) < self.threads;
            let fewest = if idle { even } else { FEWEST };
            blocks = blocks.max(self.want().min(self.rows.div_ceil(fewest)));
        }
        let block = self.rows.div_ceil(blocks).next_multiple_of(even);
        (block, self.range(block))
    }

    /// Panels of a task.
    fn range(&self, block: usize) -> usize {
        let tasks = self.panels * self.rows.div_ceil(block);
        tasks.div_ceil(self.want()).clamp(1, self.panels.max(1))
    }
}

struct Job<'a, W: Weight, O> {
    level: Level,
    weights: &'a panels::Source<'a, W>,
    grid: Grid,
    sources: &'a [Source<'a, W::Row>],
    epilogue: &'a Epilogue<'a>,
    target: Target<O>,
}

impl<W: Weight, O: Stored> Job<'_, W, O> {
    fn run(
        &self,
        rows: std::ops::Range<usize>,
        panels: std::ops::Range<usize>,
        (room, scratch): (&mut Room, &mut Scratch<W>),
    ) {
        let Rows { most, .. } = W::Row::rows(self.level);
        self.gather(rows.clone(), most, &mut room.pointers);
        let (pointers, sums) = room.sums(most);
        let shape = self.weights.shape();
        let taps: usize = shape.groups().iter().map(|g| g.taps).sum();
        let segments = shape.groups().iter();
        let segments: SmallVec<[_; 4]> = segments.map(|group| group.segments::<W::Row>()).collect();
        let mut stored = [0usize; MOST_ROWS];
        for p in panels {
            let width = shape.width(p);
            let used = (shape.columns() - p * NR).min(NR);
            let panel = self.weights.panel(p, scratch);
            for (tile, first) in rows.clone().step_by(most).enumerate() {
                let count = (rows.end - first).min(most);
                let Some(kernel) = W::kernel(self.level, count, width) else {
                    return;
                };
                let pointers = &pointers[tile * taps * most..][..taps * count];
                let tile = Tile {
                    a: pointers.as_ptr().cast(),
                    rows: count,
                    segments: &segments,
                    panel: panel.as_ptr(),
                    c: sums.as_mut_ptr(),
                    ldc: width,
                    add: false,
                };
                // SAFETY: `gather` listed `count` pointers a tap for this tile, each to as much as `check` saw there; the panel holds `width` numbers
                // for each `k`; sums has as many rows as a kernel takes
                unsafe { kernel(&tile) };
                for (r, stored) in stored.iter_mut().enumerate().take(count) {
                    *stored = self.grid.stored(first + r);
                }
                let finish = Finish {
                    sums: &sums[..count * width],
                    ldc: width,
                    rows: &stored[..count],
                    width: used,
                    column: p * NR,
                    columns: shape.columns(),
                    target: self.target,
                };
                // SAFETY: tasks differ in rows or panels, and `check` compared the target's size with both
                unsafe { epilogue::finish(self.level, self.epilogue, &finish) };
            }
        }
    }

    /// Lists for each tile of `most` rows what each tap reads: `[tile][tap][rows of the tile]`, tiles `taps × most` apart.
    fn gather(&self, rows: std::ops::Range<usize>, most: usize, pointers: &mut Vec<*const u8>) {
        let taps: usize = self.sources.iter().map(|s| s.taps.len()).sum();
        pointers.clear();
        pointers.resize(rows.len().div_ceil(most) * most * taps, zeros());
        for (tile, first) in rows.clone().step_by(most).enumerate() {
            let count = (rows.end - first).min(most);
            let tile = &mut pointers[tile * taps * most..][..taps * count];
            let mut done = 0;
            while done < count {
                // as many as lie side by side
                let (picture, y, x) = self.grid.at(first + done);
                let run = (self.grid.w - x).min(count - done);
                let mut lines = tile.chunks_exact_mut(count);
                for source in self.sources {
                    for (&tap, line) in source.taps.iter().zip(&mut lines) {
                        source.list(tap, (picture, y, x), &mut line[done..done + run]);
                    }
                }
                done += run;
            }
        }
    }
}

impl<T> Source<'_, T> {
    /// What a tap reads for results side by side, the first at `(picture, y, x)`. Places outside the picture are left as they are.
    fn list(
        &self,
        (dy, dx): (isize, isize),
        (picture, y, x): (usize, usize, usize),
        places: &mut [*const u8],
    ) {
        let y = (y * self.stride).cast_signed() + dy;
        let Some(y) = Wrap::place(self.wrap.y, y, self.h) else {
            return;
        };
        let line = (picture % self.pictures * self.h + y) * self.w;
        for (i, place) in places.iter_mut().enumerate() {
            let x = ((x + i) * self.stride).cast_signed() + dx;
            if let Some(x) = Wrap::place(self.wrap.x, x, self.w) {
                // `check` compared the length with all pixels
                let pixel = self.data.as_ptr();
                *place = pixel.wrapping_add((line + x) * self.pixel_stride).cast();
            }
        }
    }
}

/// `MOST_CHANNELS` zeros, there for good.
fn zeros<T: Plain>() -> *const T {
    #[repr(align(64))]
    struct Zeros([u8; MOST_CHANNELS * 4]);
    static ZERO: Zeros = Zeros([0; MOST_CHANNELS * 4]);
    ZERO.0.as_ptr().cast()
}
