//! Tiles that overlap, and how their results are laid together so that no seam shows.
//!
//! Near a tile's edge the network sees zeros where the picture goes on. A result is untouched by that from the network's reach on. Where tiles
//! overlap by twice the reach or more, only untouched results are used, and the whole is what one tile would have given. Else the quarter of the
//! overlap that lies at a tile's edge is left out, and over the half in the middle one tile fades into the other.

use super::Planes;
use crate::error::{Error, Result};
use crate::memory::Memory;

/// How a picture is cut into tiles.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tiling {
    /// Pixels of a tile's side, of the picture that comes in; 0: the picture in one piece. None: as large as memory allows.
    pub side: Option<usize>,
    /// Pixels by which neighbours overlap. None: what the network needs, where that is not too much.
    pub overlap: Option<usize>,
}

/// The overlap for a network of that reach, in tiles of that side.
pub(super) fn overlap(reach: usize, side: usize) -> usize {
    /// Networks that look farther than this see little of what is far away.
    const FAR: usize = 48;
    // on a photograph, RealESRGAN_x4plus in tiles of 128 is 47.6 dB from one piece with an overlap of 32, 55.1 dB with 64
    let wanted = if reach <= FAR { 2 * reach } else { 48 };
    wanted.min(side / 2)
}

/// How tiles lie along one side of a picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Axis {
    /// Where each tile begins.
    starts: Vec<usize>,
    /// Pixels of a tile.
    tile: usize,
    /// Pixels at a tile's inner edges whose results are not used.
    margin: usize,
    /// Pixels behind the margin over which a tile fades in.
    ramp: usize,
}

impl Axis {
    /// `length` is a multiple of `multiple`, and so will be all tiles and their places; tiles overlap by half at most.
    pub(super) fn new(
        length: usize,
        (side, overlap): (usize, usize),
        (reach, multiple): (usize, usize),
    ) -> Self {
        let side = side.next_multiple_of(multiple).min(length);
        let overlap = overlap.next_multiple_of(multiple).min(side - multiple);
        let margin = if overlap >= 2 * reach {
            reach
        } else {
            overlap / 4
        };
        let count = (length - overlap).div_ceil(side - overlap).max(1);
        // no larger than they must be, for all are of one size
        let tile = (length + (count - 1) * overlap).div_ceil(count);
        let tile = tile.next_multiple_of(multiple).min(length);
        let start = |i: usize| match count {
            1 => 0,
            // spread evenly, and rounded down
            _ => i * (length - tile) / multiple / (count - 1) * multiple,
        };
        Self {
            starts: (0..count).map(start).collect(),
            tile,
            margin,
            ramp: overlap - 2 * margin,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.starts.len()
    }

    pub(super) fn tile(&self) -> usize {
        self.tile
    }

    /// How much each pixel of tile `i`, enlarged by `scale`, counts.
    fn weights(&self, i: usize, scale: usize) -> Vec<f32> {
        let (margin, ramp) = (self.margin * scale, self.ramp * scale);
        let rise = |from_edge: usize| -> f32 {
            let behind = from_edge as f32 + 0.5 - margin as f32;
            match ramp {
                0 => f32::from(u8::from(behind > 0.0)),
                _ => (behind / ramp as f32).clamp(0.0, 1.0),
            }
        };
        let length = self.tile * scale;
        let (first, last) = (i == 0, i + 1 == self.count());
        (0..length)
            .map(|at| {
                let left = if first { 1.0 } else { rise(at) };
                let right = if last { 1.0 } else { rise(length - 1 - at) };
                left * right
            })
            .collect()
    }

    /// The weights of tile `i`, divided by what those of all tiles sum up to at each place.
    fn shares(&self, i: usize, scale: usize) -> Vec<f32> {
        let mut shares = self.weights(i, scale);
        let mut sums = shares.clone();
        let start = self.starts[i] * scale;
        let neighbours = i.saturating_sub(4)..(i + 5).min(self.count());
        for other in neighbours.filter(|&other| other != i) {
            let begins = self.starts[other] * scale;
            for (at, weight) in self.weights(other, scale).into_iter().enumerate() {
                if let Some(sum) = (begins + at)
                    .checked_sub(start)
                    .and_then(|i| sums.get_mut(i))
                {
                    *sum += weight;
                }
            }
        }
        for (share, sum) in shares.iter_mut().zip(sums) {
            if sum > 0.0 {
                *share /= sum;
            }
        }
        shares
    }
}

/// The planes with both sides filled up to multiples, by what lies mirrored inside.
pub(super) fn padded(planes: &Planes, channels: usize, multiple: usize) -> Planes {
    let (w, h) = (planes.width, planes.height);
    let (width, height) = (w.next_multiple_of(multiple), h.next_multiple_of(multiple));
    if (width, height) == (w, h) {
        return planes.clone();
    }
    let mirrored = |at: usize, length: usize| {
        if length == 1 {
            return 0;
        }
        let place = at % (2 * (length - 1));
        place.min(2 * (length - 1) - place)
    };
    let mut values = Vec::with_capacity(channels * width * height);
    for plane in planes.values.chunks(w * h) {
        for y in 0..height {
            let row = &plane[mirrored(y, h) * w..][..w];
            values.extend((0..width).map(|x| row[mirrored(x, w)]));
        }
    }
    Planes {
        values,
        width,
        height,
    }
}

/// Tile `x`, `y` of the planes.
pub(super) fn cut(
    planes: &Planes,
    channels: usize,
    (across, x): (&Axis, usize),
    (down, y): (&Axis, usize),
) -> Vec<f32> {
    let (left, top) = (across.starts[x], down.starts[y]);
    let mut values = Vec::with_capacity(channels * across.tile * down.tile);
    for plane in planes.values.chunks(planes.width * planes.height) {
        for row in plane.chunks(planes.width).skip(top).take(down.tile) {
            values.extend_from_slice(&row[left..left + across.tile]);
        }
    }
    values
}

/// The larger picture while tiles are laid into it.
pub(super) struct Canvas {
    planes: Planes,
    scale: usize,
}

impl Canvas {
    /// For a result of that width and height.
    pub(super) fn new(
        channels: usize,
        (width, height): (usize, usize),
        scale: usize,
    ) -> Result<Self> {
        let count = width
            .checked_mul(height)
            .and_then(|area| area.checked_mul(channels));
        let bytes = count.and_then(|count| count.checked_mul(size_of::<f32>()));
        let (Some(count), Some(bytes)) = (count, bytes) else {
            return Err(Error::NoMemory(format!(
                "a picture of {width}x{height} pixels fits in no memory"
            )));
        };
        if let Some(free) = Memory::look().available
            && bytes as u64 > free
        {
            return Err(Error::NoMemory(format!(
                "the result of {width}x{height} pixels takes {} MiB, but only {} MiB are free; give a smaller picture",
                bytes >> 20,
                free >> 20
            )));
        }
        Ok(Self {
            planes: Planes {
                values: vec![0.0; count],
                width,
                height,
            },
            scale,
        })
    }

    /// Adds a tile's result; what lies outside of the picture is left out.
    pub(super) fn add(
        &mut self,
        tile: &[f32],
        (across, x): (&Axis, usize),
        (down, y): (&Axis, usize),
    ) {
        let scale = self.scale;
        let (columns, rows) = (across.shares(x, scale), down.shares(y, scale));
        let (left, top) = (across.starts[x] * scale, down.starts[y] * scale);
        let (width, height) = (self.planes.width, self.planes.height);
        let seen = width.saturating_sub(left).min(columns.len());
        let planes = self.planes.values.chunks_mut(width * height);
        for (plane, tile) in planes.zip(tile.chunks(columns.len() * rows.len())) {
            let lines = plane.chunks_mut(width).skip(top);
            let from = tile.chunks(columns.len()).zip(&rows);
            for (line, (from, &row)) in lines.zip(from).filter(|(_, (_, row))| **row > 0.0) {
                let out = line[left..left + seen].iter_mut();
                for ((out, &value), &column) in out.zip(from).zip(&columns) {
                    // nothing times what is not a number would not be nothing
                    if column > 0.0 {
                        *out += value * (column * row);
                    }
                }
            }
        }
    }

    pub(super) fn finish(self) -> Planes {
        self.planes
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shares_sum_up_to_one_everywhere(
            units in 1usize..200, side in 1usize..90, overlap in 0usize..80, reach in 0usize..50,
            multiple in prop::sample::select(vec![1usize, 2, 4]), scale in 1usize..4,
        ) {
            let length = units * multiple;
            let overlap = overlap.min(side / 2);
            let axis = Axis::new(length, (side, overlap), (reach, multiple));
            let mut sums = vec![0f32; length * scale];
            for i in 0..axis.count() {
                let start = axis.starts[i];
                prop_assert!(start.is_multiple_of(multiple) && axis.tile.is_multiple_of(multiple));
                prop_assert!(start + axis.tile <= length);
                for (at, share) in axis.shares(i, scale).into_iter().enumerate() {
                    sums[start * scale + at] += share;
                }
            }
            for sum in sums {
                prop_assert!((sum - 1.0).abs() < 1e-5, "{sum} in {axis:?}");
            }
        }

        #[test]
        fn nothing_within_the_reach_of_an_edge_is_used(
            length in 1usize..400, side in 80usize..160, reach in 0usize..20, more in 0usize..20,
        ) {
            let overlap = (2 * reach + more).min(side / 2);
            let axis = Axis::new(length, (side, overlap), (reach, 1));
            for i in 0..axis.count() {
                let shares = axis.shares(i, 1);
                if i > 0 {
                    prop_assert!(shares[..reach].iter().all(|share| *share == 0.0));
                }
                if i + 1 < axis.count() {
                    prop_assert!(shares[axis.tile - reach..].iter().all(|share| *share == 0.0));
                }
            }
        }
    }
}
