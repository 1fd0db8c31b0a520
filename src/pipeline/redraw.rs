//! A picture drawn anew tile by tile: what A1111's "SD upscale" and ComfyUI's "Ultimate SD Upscale" do with a picture that was enlarged before. Each
//! tile is what a run that begins at it makes of it, and is no other than it would be alone; where tiles overlap they fade into each other.

use std::collections::BTreeSet;

use super::event::{Control, Event};
use super::{Engine, Plan, Request};
use crate::error::{Error, Result};
use crate::picture::{Filter, Picture, Rect};

/// How a picture is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Redraw {
    /// Pixels of a tile's side; the model's own size when absent.
    pub tile: Option<usize>,
    /// Pixels over which neighbours fade into each other, at most half a tile.
    pub overlap: usize,
}

impl Redraw {
    /// The overlap when nobody says, as in A1111.
    pub const OVERLAP: usize = 64;
    /// How much of a tile is given up when nobody says, as in ComfyUI's node: little enough that tiles stay what they were.
    pub const STRENGTH: f64 = 0.2;
}

/// How tiles lie in a picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TileGrid {
    across: Line,
    down: Line,
}

/// How tiles lie along one side.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    /// Pixels, with those that were added to make it a multiple.
    length: usize,
    /// Pixels of a tile.
    tile: usize,
    starts: Vec<usize>,
    /// Pixels over which neighbours fade.
    ramp: usize,
}

impl Line {
    fn new(length: usize, (tile, overlap): (usize, usize), unit: usize) -> Self {
        let length = length.max(1).next_multiple_of(unit);
        let tile = tile.min(length);
        let overlap = overlap.min(tile / 2);
        let count = (length - overlap).div_ceil(tile - overlap).max(1);
        let rest = length - tile;
        let start = |i: usize| i * rest / (count - 1).max(1);
        let starts: Vec<usize> = (0..count).map(start).collect();
        // tiles lie evenly, and may overlap by more than is asked: no two ramps are to meet
        let nearest = starts.windows(2).map(|pair| pair[1] - pair[0]).min();
        Self {
            length,
            tile,
            ramp: overlap.min(nearest.unwrap_or(overlap)),
            starts,
        }
    }

    /// How much each pixel of tile `i` counts: neighbours sum up to one, in the middle of where they overlap.
    fn weights(&self, i: usize) -> Vec<f32> {
        // what the earlier of two tiles has at a pixel of the picture
        let earlier = |left: usize, right: usize, at: usize| -> f32 {
            let (begin, end) = (self.starts[right], self.starts[left] + self.tile);
            let middle = (begin + end) as f32 / 2.0;
            let behind = at as f32 + 0.5 - middle;
            match self.ramp {
                0 => f32::from(u8::from(behind < 0.0)),
                ramp => (0.5 - behind / ramp as f32).clamp(0.0, 1.0),
            }
        };
        let weight = |at: usize| {
            let at = self.starts[i] + at;
            let rise = match i.checked_sub(1) {
                Some(before) => 1.0 - earlier(before, i, at),
                None => 1.0,
            };
            let fall = match i + 1 < self.starts.len() {
                true => earlier(i, i + 1, at),
                false => 1.0,
            };
            rise * fall
        };
        (0..self.tile).map(weight).collect()
    }
}

impl TileGrid {
    /// Tiles for a picture of that width and height, all multiples of `unit`.
    fn new((width, height): (usize, usize), tile: usize, overlap: usize, unit: usize) -> Self {
        let line = |length| Line::new(length, (tile, overlap), unit);
        Self {
            across: line(width),
            down: line(height),
        }
    }

    /// How many tiles there are.
    pub fn count(&self) -> usize {
        self.across.starts.len() * self.down.starts.len()
    }

    /// Width and height of each.
    pub fn tile(&self) -> (usize, usize) {
        (self.across.tile, self.down.tile)
    }

    /// Width and height of the picture that is divided.
    fn size(&self) -> (usize, usize) {
        (self.across.length, self.down.length)
    }

    /// Where tile `i` lies, row after row.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no such tile.
    pub fn place(&self, i: usize) -> Result<Rect> {
        if i >= self.count() {
            return Err(Error::Usage(format!(
                "there is no tile {i} among {}",
                self.count()
            )));
        }
        let (row, column) = self.row_column(i);
        let number = |n: usize| {
            u32::try_from(n)
                .map_err(|_| Error::Usage(format!("{n} pixels are more than a picture may have")))
        };
        Ok(Rect {
            left: number(self.across.starts[column])?,
            top: number(self.down.starts[row])?,
            width: number(self.across.tile)?,
            height: number(self.down.tile)?,
        })
    }

    fn row_column(&self, i: usize) -> (usize, usize) {
        let columns = self.across.starts.len();
        (i / columns, i % columns)
    }
}

/// A picture that was drawn anew.
#[derive(Debug, Clone)]
pub struct Redrawn {
    /// The picture, with the alpha of the one before.
    pub picture: Picture,
    /// What was done with the first tile; the n-th one after it has its seed plus n.
    pub plan: Plan,
    /// How tiles lay.
    pub grid: TileGrid,
}

/// Receives a tile's number, how many there are, and what happens in it.
pub type TileListener<'a> = dyn FnMut(usize, usize, Event) -> Control + 'a;

impl Engine {
    /// How a picture of that width and height is divided for this model.
    ///
    /// # Errors
    /// [`Error::Usage`] for tiles that cannot be.
    pub fn tile_grid(&self, (width, height): (u32, u32), redraw: Redraw) -> Result<TileGrid> {
        let spec = self.spec();
        let scale = spec.vae.config.scale();
        let unit = scale.saturating_mul(spec.unet.config.patch()).max(8);
        let tile = redraw.tile.unwrap_or(spec.defaults.size);
        if tile == 0 || !tile.is_multiple_of(unit) {
            return Err(Error::Usage(format!(
                "--tile-size is {tile}, expected a multiple of {unit} above 0"
            )));
        }
        if redraw.overlap > tile / 2 {
            return Err(Error::Usage(format!(
                "--tile-overlap is {}, expected at most {}, half of a tile",
                redraw.overlap,
                tile / 2
            )));
        }
        let size = (width as usize, height as usize);
        Ok(TileGrid::new(size, tile, redraw.overlap, unit))
    }

    /// Draws `picture` anew: what `request`, which says of its source all but the picture, makes of each tile. Pictures that steer are those of the
    /// whole, and are cut as it is. Tile n (from 0, row after row) has the request's seed plus n, as in A1111's script with one tile at a time.
    ///
    /// # Errors
    /// [`Error::Usage`] when the request cannot be, or the model does not begin at pictures; what [`Engine::generate`] gives.
    pub fn redraw(
        &self,
        picture: &Picture,
        request: &Request,
        redraw: Redraw,
        listener: &mut TileListener<'_>,
    ) -> Result<Redrawn> {
        let grid = self.tile_grid((picture.width(), picture.height()), redraw)?;
        let whole = Whole::new(picture, request, &grid)?;
        let mut canvas = Canvas::new(grid.size())?;
        let mut first: Option<Plan> = None;
        let mut told = BTreeSet::new();
        for i in 0..grid.count() {
            let seed = first.as_ref().map(|plan| plan.seed.wrapping_add(i as u64));
            let request = whole.request(request, grid.place(i)?, seed)?;
            let plan = self.plan_tile(&request, &grid)?;
            let mut made = None;
            let mut heard = |event: Event| match event {
                // most are the same for every tile
                Event::Warning(text) if !told.insert(text.clone()) => Control::Continue,
                event => listener(i, grid.count(), event),
            };
            self.generate(&request, &plan, &mut heard, &mut |batch| {
                made = batch.pictures.into_iter().next();
                Ok(())
            })?;
            let Some(made) = made else {
                return Err(Error::Numeric("a tile gave no picture".to_owned()));
            };
            canvas.add(&made.image.rgb, &grid, i);
            first.get_or_insert(plan);
        }
        let plan = first.ok_or_else(|| Error::Usage("the picture has no tiles".to_owned()))?;
        Ok(Redrawn {
            picture: canvas.finish(picture)?,
            plan,
            grid,
        })
    }

    /// Refuses what [`Engine::redraw`] would, whatever the picture: before long work is done on it. Whether there is memory for a tile is seen when it is
    /// that tile's turn.
    ///
    /// # Errors
    /// As [`Engine::redraw`].
    pub fn check_redraw(&self, request: &Request, redraw: Redraw) -> Result<()> {
        /// As large a tile as nothing depends on.
        const SIDE: usize = 512;
        self.tile_grid((1, 1), redraw)?;
        let side = redraw.tile.unwrap_or(self.spec().defaults.size).min(SIDE) as u32;
        let blank = Picture::from_rgb(1, 1, vec![0; 3])?.resize(side, side, Filter::Nearest)?;
        let grid = self.tile_grid((side, side), redraw)?;
        let whole = Whole::new(&blank, request, &grid)?;
        let request = Request {
            force: true,
            ..whole.request(request, grid.place(0)?, None)?
        };
        self.plan_tile(&request, &grid).map(|_| ())
    }

    fn plan_tile(&self, request: &Request, grid: &TileGrid) -> Result<Plan> {
        let plan = Plan::new(self, request)?;
        if plan.picture_size() == grid.tile() {
            return Ok(plan);
        }
        Err(Error::Usage(
            "the model gives pictures of another size than those that it begins at; give --with-model one that begins at pictures".to_owned(),
        ))
    }
}

/// The pictures of the whole, of the size that is divided.
struct Whole {
    picture: Picture,
    controls: Vec<Picture>,
}

impl Whole {
    fn new(picture: &Picture, request: &Request, grid: &TileGrid) -> Result<Self> {
        let size = (picture.width() as usize, picture.height() as usize);
        let steering = request.controls.iter().map(|control| {
            let resized = crate::control::fit(&control.picture, size, control.resize)?;
            mirrored(&resized, grid.size())
        });
        Ok(Self {
            picture: mirrored(picture, grid.size())?,
            controls: steering.collect::<Result<_>>()?,
        })
    }

    /// What is asked of a tile.
    fn request(&self, request: &Request, part: Rect, seed: Option<u64>) -> Result<Request> {
        let mut request = request.clone();
        let Some(source) = &mut request.source else {
            return Err(Error::Usage("there is no picture to draw anew".to_owned()));
        };
        source.picture = std::sync::Arc::new(self.picture.crop(part)?);
        for (control, whole) in request.controls.iter_mut().zip(&self.controls) {
            if control.mask.is_some() {
                return Err(Error::Usage(
                    "--control-mask cannot be cut into tiles; leave it out".to_owned(),
                ));
            }
            control.picture = whole.crop(part)?;
        }
        (request.width, request.height) = (None, None);
        (request.batch_size, request.count) = (1, 1);
        request.seed = seed.or(request.seed);
        Ok(request)
    }
}

/// The picture made larger to the right and below by what lies at its edge, mirrored; without alpha.
fn mirrored(picture: &Picture, (width, height): (usize, usize)) -> Result<Picture> {
    let (w, h) = (picture.width() as usize, picture.height() as usize);
    let side = |length: usize| {
        u32::try_from(length).map_err(|_| Error::Usage("the picture is too large".to_owned()))
    };
    let place = |at: usize, length: usize| {
        let period = (2 * length).saturating_sub(2).max(1);
        let at = at % period;
        at.min(period - at).min(length - 1)
    };
    let mut rgb = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        let row = &picture.rgb()[place(y, h) * w * 3..][..w * 3];
        rgb.extend_from_slice(row);
        let more = (w..width).flat_map(|x| row[place(x, w) * 3..][..3].iter().copied());
        rgb.extend(more);
    }
    Picture::from_rgb(side(width)?, side(height)?, rgb)
}

/// The picture while tiles are laid into it: sums of weighted bytes.
struct Canvas {
    sums: Vec<f32>,
    width: usize,
}

impl Canvas {
    fn new((width, height): (usize, usize)) -> Result<Self> {
        let none = || {
            Error::NoMemory(format!(
                "a picture of {width}x{height} pixels fits in no memory"
            ))
        };
        let count = width.checked_mul(height).and_then(|n| n.checked_mul(3));
        let count = count.ok_or_else(none)?;
        let mut sums = Vec::new();
        sums.try_reserve_exact(count).map_err(|_| none())?;
        sums.resize(count, 0.0);
        Ok(Self { sums, width })
    }

    /// Adds the bytes of tile `i`.
    fn add(&mut self, rgb: &[u8], grid: &TileGrid, i: usize) {
        let (row, column) = grid.row_column(i);
        let (columns, rows) = (grid.across.weights(column), grid.down.weights(row));
        let (left, top) = (grid.across.starts[column], grid.down.starts[row]);
        let lines = self.sums.chunks_mut(self.width * 3).skip(top);
        let tile = rgb.chunks(columns.len() * 3).zip(&rows);
        for (line, (from, down)) in lines.zip(tile) {
            let pixels = line[left * 3..].chunks_mut(3).zip(from.chunks(3));
            for ((sum, from), across) in pixels.zip(&columns) {
                let weight = across * down;
                let pairs = sum.iter_mut().zip(from);
                pairs.for_each(|(sum, &byte)| *sum += weight * f32::from(byte));
            }
        }
    }

    /// As large as `before`, and with its alpha.
    fn finish(self, before: &Picture) -> Result<Picture> {
        let (width, height) = (before.width() as usize, before.height() as usize);
        let rows = self.sums.chunks(self.width * 3).take(height);
        // at most 255: weights sum up to one
        let bytes = rows.flat_map(|row| row[..width * 3].iter().map(|sum| sum.round() as u8));
        let picture = Picture::from_rgb(before.width(), before.height(), bytes.collect())?;
        picture.with_alpha(before.alpha())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn weights_sum_up_to_one_and_tiles_cover_all(
            length in 1usize..2000, tiles in 1usize..40, overlap in 0usize..200, unit in prop::sample::select(vec![8usize, 16, 64]),
        ) {
            let tile = tiles * unit;
            let line = Line::new(length, (tile, overlap.min(tile / 2)), unit);
            prop_assert!(line.tile.is_multiple_of(unit) && line.length.is_multiple_of(unit));
            let mut sums = vec![0f32; line.length];
            let mut seen = vec![0usize; line.length];
            for (i, start) in line.starts.iter().enumerate() {
                for (at, weight) in line.weights(i).into_iter().enumerate() {
                    sums[start + at] += weight;
                    seen[start + at] += 1;
                }
            }
            for (sum, seen) in sums.iter().zip(seen) {
                prop_assert!(seen > 0 && (sum - 1.0).abs() < 1e-5, "{sum} in {line:?}");
            }
        }
    }

    #[test]
    fn what_only_one_tile_covers_is_its_own() {
        let line = Line::new(200, (96, 32), 8);
        assert_eq!(line.starts, [0, 52, 104]);
        let first = line.weights(0);
        assert!(first[..52].iter().all(|weight| *weight == 1.0));
        let ramp = first.iter().filter(|w| **w > 0.0 && **w < 1.0).count();
        assert_eq!(ramp, 32);
    }
}
