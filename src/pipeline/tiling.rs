//! Pictures in tiles: which there are, how far they overlap, and how they are put together again.

use sd_kernels::Wrap;
use sd_kernels::op::Window;

use crate::error::{Error, Result};

/// Whether the autoencoder works on tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum TilingMode {
    /// Where the whole does not fit into what is free
    #[default]
    Auto,
    /// Always
    On,
    /// Never
    Off,
}

/// Whose means and variances the norms of a tile go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum TileNorm {
    /// The whole picture's: no tile is to be seen
    #[default]
    Shared,
    /// Each tile's own, blended over the overlap, as diffusers does
    Own,
}

/// How the autoencoder divides its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// Whether it does.
    pub mode: TilingMode,
    /// Latents of a tile's side, a multiple of 4.
    pub tile: usize,
    /// The norms.
    pub norm: TileNorm,
}

impl Default for Tiling {
    fn default() -> Self {
        Self {
            mode: TilingMode::default(),
            tile: Self::TILE,
            norm: TileNorm::default(),
        }
    }
}

impl Tiling {
    /// Latents of a side where nobody says otherwise.
    pub const TILE: usize = 64;
    /// The fewest.
    pub const LEAST: usize = 8;
    /// The most.
    pub const MOST: usize = 1024;
}

/// What a picture is to the networks' convolutions, and how the autoencoder divides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Surface {
    /// Along which axes it has no edges: a texture that may be laid side by side.
    pub wrap: Wrap,
    /// The autoencoder's tiles.
    pub tiling: Tiling,
}

impl Surface {
    /// # Errors
    /// [`Error::Usage`] for tiles that are too small or do not go together with a texture.
    pub fn check(&self) -> Result<()> {
        let Tiling { mode, tile, norm } = self.tiling;
        if !(Tiling::LEAST..=Tiling::MOST).contains(&tile) || !tile.is_multiple_of(4) {
            return Err(Error::Usage(format!(
                "--vae-tile is {tile}, expected a multiple of 4 from {} to {} latents",
                Tiling::LEAST,
                Tiling::MOST
            )));
        }
        if self.wrap.any() && mode != TilingMode::Off && norm == TileNorm::Own {
            return Err(Error::Usage(
                "--vae-tile-norm own gives tiles edges of their own, which --tile does without; use shared"
                    .to_owned(),
            ));
        }
        Ok(())
    }
}

/// How a size becomes another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scale {
    Up(usize),
    Down(usize),
}

impl Scale {
    pub(super) fn of(self, pixels: usize) -> usize {
        match self {
            Self::Up(n) => pixels * n,
            Self::Down(n) => pixels / n.max(1),
        }
    }
}

/// Told of tiles that are done, of so many in all; an error of its own ends the work.
pub type Watch<'a> = dyn FnMut(usize, usize) -> Result<()> + 'a;

/// A tile along one axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    /// Its first pixel; below 0 where the axis wraps.
    start: isize,
    /// Its pixels.
    pub(super) size: usize,
    /// Its own part in the whole: first pixel, and how many.
    own: (usize, usize),
}

impl Span {
    /// Where its own part begins within it.
    fn inner(&self) -> usize {
        usize::try_from(self.own.0.cast_signed() - self.start).unwrap_or(0)
    }
}

/// Tiles of about `tile` of `size` pixels, of which at least half are their own, all of one size, each with `margin` pixels about its own part wherever the picture goes on. All begin
/// at multiples of `align`.
pub(super) fn spans(
    size: usize,
    (tile, margin, align): (usize, usize, usize),
    wraps: bool,
) -> Vec<Span> {
    if size <= tile && !wraps {
        return vec![Span {
            start: 0,
            size,
            own: (0, size),
        }];
    }
    let margin = margin.next_multiple_of(align);
    let most = tile.saturating_sub(2 * margin).max(tile / 2).max(align) / align * align;
    let step = size.div_ceil(size.div_ceil(most)).next_multiple_of(align);
    let whole = step + 2 * margin;
    let extent = if wraps { whole } else { whole.min(size) };
    let last = size.saturating_sub(extent).cast_signed();
    (0..size)
        .step_by(step.max(1))
        .map(|at| {
            let start = at.cast_signed() - margin.cast_signed();
            Span {
                start: if wraps { start } else { start.clamp(0, last) },
                size: extent,
                own: (at, step.min(size - at)),
            }
        })
        .collect()
}

/// The part of a tile that is its own, in the tile's pixels.
pub(super) fn own_part(rows: &Span, columns: &Span) -> Window {
    Window {
        top: rows.inner(),
        left: columns.inner(),
        height: rows.own.1,
        width: columns.own.1,
    }
}

/// Planes `[c, h, w]`.
pub(super) struct Planes {
    pub(super) values: Vec<f32>,
    pub(super) shape: [usize; 3],
}

impl Planes {
    pub(super) fn zeros(shape: [usize; 3]) -> Self {
        Self {
            values: vec![0.0; shape.iter().product()],
            shape,
        }
    }

    /// A tile, margins included.
    pub(super) fn cut(&self, rows: &Span, columns: &Span) -> Vec<f32> {
        let [_, h, w] = self.shape;
        let mut out = Vec::with_capacity(self.shape[0] * rows.size * columns.size);
        let place = |span: &Span, i: usize, size: usize| {
            let at = span.start + i.cast_signed();
            usize::try_from(at.rem_euclid(size.cast_signed().max(1))).unwrap_or(0)
        };
        for plane in self.values.chunks_exact((h * w).max(1)) {
            for y in 0..rows.size {
                let row = &plane[place(rows, y, h) * w..][..w];
                out.extend((0..columns.size).map(|x| row[place(columns, x, w)]));
            }
        }
        out
    }

    /// Puts what became of a tile's own part in its place; `tile` is all of it.
    pub(super) fn put(&mut self, tile: &[f32], (rows, columns): (&Span, &Span), scale: Scale) {
        let [_, h, w] = self.shape;
        let (high, wide) = (scale.of(rows.size), scale.of(columns.size));
        let (top, left) = (scale.of(rows.inner()), scale.of(columns.inner()));
        let (y, x) = (scale.of(rows.own.0), scale.of(columns.own.0));
        let (height, width) = (scale.of(rows.own.1), scale.of(columns.own.1));
        let planes = self.values.chunks_exact_mut((h * w).max(1));
        for (plane, tile) in planes.zip(tile.chunks_exact((high * wide).max(1))) {
            for row in 0..height {
                let from = &tile[(top + row) * wide + left..][..width];
                plane[(y + row) * w + x..][..width].copy_from_slice(from);
            }
        }
    }
}

/// Tiles as diffusers cuts and blends them (0.42.1, `AutoencoderKL.tiled_decode`, with its overlap of a quarter).
pub(super) struct Blended {
    /// Pixels of a tile's side before, and after.
    pub(super) tile: (usize, usize),
}

impl Blended {
    /// Where tiles begin along a side.
    fn starts(&self, size: usize) -> impl Iterator<Item = usize> {
        (0..size).step_by((self.tile.0 - self.tile.0 / 4).max(1))
    }

    /// Computes every tile with `network` (`[c, h, w]` → `[c', h', w']`) and blends them into planes of `shape`.
    pub(super) fn run(
        &self,
        input: &Planes,
        shape: [usize; 3],
        network: &mut dyn FnMut(Planes) -> Result<Planes>,
        watch: &mut Watch<'_>,
    ) -> Result<Planes> {
        let [_, h, w] = input.shape;
        let total = self.starts(h).count() * self.starts(w).count();
        let blend = self.tile.1 / 4;
        let limit = self.tile.1 - blend;
        let mut out = Planes::zeros(shape);
        let mut above: Vec<Planes> = Vec::new();
        for (i, y) in self.starts(h).enumerate() {
            let mut row: Vec<Planes> = Vec::new();
            for (j, x) in self.starts(w).enumerate() {
                let part = |at: usize, size: usize| Span {
                    start: at.cast_signed(),
                    size: self.tile.0.min(size - at),
                    own: (at, 0),
                };
                let (rows, columns) = (part(y, h), part(x, w));
                let mut tile = network(Planes {
                    values: input.cut(&rows, &columns),
                    shape: [input.shape[0], rows.size, columns.size],
                })?;
                if let Some(above) = above.get(j) {
                    tile.blend(above, blend, true);
                }
                if let Some(left) = j.checked_sub(1).and_then(|j| row.get(j)) {
                    tile.blend(left, blend, false);
                }
                out.paste(&tile, (i * limit, j * limit), limit);
                row.push(tile);
                watch(i * self.starts(w).count() + j + 1, total)?;
            }
            above = row;
        }
        Ok(out)
    }
}

impl Planes {
    /// Lets the last rows (or columns) of `before` pass into the first ones.
    fn blend(&mut self, before: &Self, most: usize, down: bool) {
        let ([c, h, w], [_, bh, bw]) = (self.shape, before.shape);
        let extent = if down {
            most.min(bh).min(h)
        } else {
            most.min(bw).min(w)
        };
        let (high, wide) = if down {
            (extent, w.min(bw))
        } else {
            (h.min(bh), extent)
        };
        for plane in 0..c {
            for y in 0..high {
                for x in 0..wide {
                    let (step, from) = if down {
                        (y, (bh - extent + y) * bw + x)
                    } else {
                        (x, y * bw + bw - extent + x)
                    };
                    let part = step as f32 / extent as f32;
                    let old = before.values[plane * bh * bw + from];
                    let new = &mut self.values[(plane * h + y) * w + x];
                    *new = old * (1.0 - part) + *new * part;
                }
            }
        }
    }

    /// The first `limit` rows and columns of a tile, as far as there is room.
    fn paste(&mut self, tile: &Self, (top, left): (usize, usize), limit: usize) {
        let ([c, h, w], [_, th, tw]) = (self.shape, tile.shape);
        let high = th.min(limit).min(h.saturating_sub(top));
        let wide = tw.min(limit).min(w.saturating_sub(left));
        for plane in 0..c {
            for y in 0..high {
                let from = &tile.values[(plane * th + y) * tw..][..wide];
                self.values[(plane * h + top + y) * w + left..][..wide].copy_from_slice(from);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Every pixel is some tile's own, once, and each tile has its margin or the picture's edge about it.
    #[test]
    fn spans_cover_a_side() {
        for (size, tile, margin, align, wraps) in [
            (100, 64, 8, 1, false),
            (100, 64, 8, 1, true),
            (33, 64, 5, 1, true),
            (4096, 512, 30, 8, false),
            (520, 512, 61, 8, false),
            (64, 16, 7, 1, false),
            (64, 8, 7, 1, true),
        ] {
            let spans = spans(size, (tile, margin, align), wraps);
            let mut next = 0;
            for span in &spans {
                assert_eq!(span.own.0, next);
                next += span.own.1;
                assert_eq!(span.size, spans[0].size);
                assert_eq!(span.start.rem_euclid(align as isize), 0);
                let (before, after) = (span.inner(), span.size - span.inner() - span.own.1);
                if wraps {
                    assert!(before >= margin && after >= margin);
                } else {
                    let end = span.start as usize + span.size;
                    assert!(before >= margin || span.start == 0, "{span:?}");
                    assert!(after >= margin || end == size, "{span:?}");
                    assert!(end <= size);
                }
            }
            assert_eq!(next, size);
        }
    }

    #[test]
    fn tiles_come_back_where_they_were() {
        let planes = Planes {
            values: (0..2 * 30 * 21).map(|v| v as f32).collect(),
            shape: [2, 30, 21],
        };
        for wraps in [false, true] {
            let rows = spans(30, (14, 3, 2), wraps);
            let columns = spans(21, (11, 3, 1), wraps);
            let mut out = Planes::zeros([2, 30, 21]);
            for r in &rows {
                for c in &columns {
                    out.put(&planes.cut(r, c), (r, c), Scale::Up(1));
                }
            }
            assert_eq!(out.values, planes.values);
        }
    }
}
