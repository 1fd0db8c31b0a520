//! Pictures and masks made to fit, as A1111's `resize_image` and diffusers' `VaeImageProcessor` (0.42.1) do it.

use super::super::source::Fit;
use crate::error::Result;
use crate::picture::{Filter, Grey, Picture, Rect};

/// `picture` in another size.
pub(super) fn picture(picture: &Picture, size: (u32, u32), fit: Fit) -> Result<Picture> {
    let from = (picture.width(), picture.height());
    if from == size {
        return Ok(picture.clone());
    }
    let inner = match fit {
        Fit::Stretch | Fit::Latent => return picture.resize(size.0, size.1, Filter::Lanczos),
        Fit::Crop => covering(from, size),
        Fit::Pad => covered(from, size),
    };
    let resized = picture.resize(inner.0, inner.1, Filter::Lanczos)?;
    spread(&resized, size, corner(size, inner), Beyond::Continued)
}

/// What stands beyond an edge.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Beyond {
    /// The pixel at the edge.
    Repeated,
    /// What a cubic makes of the two pixels there, at the edge itself (Pillow's `resize` of an empty box, which both programs fill with).
    Continued,
}

/// `picture` with its corner at a place of a canvas, over which its edges are drawn out.
fn spread(
    picture: &Picture,
    size: (u32, u32),
    (left, top): (i64, i64),
    beyond: Beyond,
) -> Result<Picture> {
    let inner = (picture.width(), picture.height());
    let source = picture.rgb();
    let mut rgb = Vec::with_capacity(3 * size.0 as usize * size.1 as usize);
    for y in 0..i64::from(size.1) {
        let (row, next_row) = neighbours(y - top, inner.1);
        for x in 0..i64::from(size.0) {
            let (column, next_column) = neighbours(x - left, inner.0);
            let at = |x: usize, y: usize| 3 * (y * inner.0 as usize + x);
            let (near, next) = (at(column, row), at(next_column, next_row));
            for c in 0..3 {
                let near = source[near + c];
                rgb.push(match beyond {
                    Beyond::Repeated => near,
                    Beyond::Continued => continued(near, source[next + c]),
                });
            }
        }
    }
    Picture::from_rgb(size.0, size.1, rgb)
}

/// The pixel of a side that is nearest to a place, and the one behind it where the place lies outside.
fn neighbours(place: i64, side: u32) -> (usize, usize) {
    let near = inside(place, side);
    let next = match place {
        _ if place < 0 => inside(1, side),
        _ if place >= i64::from(side) => inside(i64::from(side) - 2, side),
        _ => near,
    };
    (near, next)
}

/// Nine eighths of one pixel less an eighth of the next.
fn continued(near: u8, next: u8) -> u8 {
    let eighths = 9 * i32::from(near) - i32::from(next);
    ((eighths + 4) >> 3).clamp(0, 255) as u8
}

/// `picture` with its right and lower edges drawn out.
pub(super) fn drawn_out(picture: &Picture, size: (u32, u32)) -> Result<Picture> {
    spread(picture, size, (0, 0), Beyond::Repeated)
}

/// A mask likewise.
pub(super) fn grey(mask: &Grey, size: (u32, u32), fit: Fit) -> Result<Grey> {
    Ok(picture(&mask.to_picture(), size, fit)?.to_luma())
}

/// The smallest size of these proportions that covers `size`.
fn covering(from: (u32, u32), size: (u32, u32)) -> (u32, u32) {
    if is_wider(size, from) {
        (size.0, scaled(from.1, size.0, from.0))
    } else {
        (scaled(from.0, size.1, from.1), size.1)
    }
}

/// The largest size of these proportions that `size` covers.
fn covered(from: (u32, u32), size: (u32, u32)) -> (u32, u32) {
    if is_wider(size, from) {
        (scaled(from.0, size.1, from.1), size.1)
    } else {
        (size.0, scaled(from.1, size.0, from.0))
    }
}

/// Whether one size is wider for its height than another.
fn is_wider(size: (u32, u32), than: (u32, u32)) -> bool {
    u64::from(size.0) * u64::from(than.1) > u64::from(than.0) * u64::from(size.1)
}

/// `side · to / from`, rounded down, at least 1.
fn scaled(side: u32, to: u32, from: u32) -> u32 {
    let exact = u64::from(side) * u64::from(to) / u64::from(from.max(1));
    u32::try_from(exact.max(1)).unwrap_or(u32::MAX)
}

/// Where the inner size begins in the outer one, whose middles lie over each other.
fn corner(outer: (u32, u32), inner: (u32, u32)) -> (i64, i64) {
    let offset = |outer: u32, inner: u32| i64::from(outer / 2) - i64::from(inner / 2);
    (offset(outer.0, inner.0), offset(outer.1, inner.1))
}

/// The nearest place inside a side.
fn inside(place: i64, side: u32) -> usize {
    usize::try_from(place.clamp(0, i64::from(side) - 1)).unwrap_or(0)
}

/// The part around all that is not black, `around` pixels larger at every side, made as wide for its height as `size` where the picture has
/// room (A1111's `get_crop_region` and `expand_crop_region`).
pub(super) fn around(mask: &Grey, around: usize, size: (u32, u32)) -> Rect {
    let all = (i64::from(mask.width()), i64::from(mask.height()));
    let around = i64::try_from(around).unwrap_or(i64::MAX).min(all.0 + all.1);
    let bounds = mask.bounds().unwrap_or(Rect {
        left: 0,
        top: 0,
        width: mask.width(),
        height: mask.height(),
    });
    let span = |first: u32, count: u32, all: i64| {
        let (first, last) = (i64::from(first), i64::from(first) + i64::from(count));
        ((first - around).max(0), (last + around).min(all))
    };
    let (mut x1, mut x2) = span(bounds.left, bounds.width, all.0);
    let (mut y1, mut y2) = span(bounds.top, bounds.height, all.1);
    let wanted = f64::from(size.0) / f64::from(size.1.max(1));
    let (wide, high) = ((x2 - x1) as f64, (y2 - y1) as f64);
    if wide / high > wanted {
        (y1, y2) = widened((y1, y2), (wide / wanted - high) as i64, all.1);
    } else {
        (x1, x2) = widened((x1, x2), (high * wanted - wide) as i64, all.0);
    }
    // within the picture, whose sides are 32 bits
    let part = |first: i64, last: i64| {
        (
            first.unsigned_abs() as u32,
            (last - first).unsigned_abs() as u32,
        )
    };
    let ((left, width), (top, height)) = (part(x1, x2), part(y1, y2));
    Rect {
        left,
        top,
        width,
        height,
    }
}

/// A span made larger by `more`, moved inside.
fn widened((mut first, mut last): (i64, i64), more: i64, all: i64) -> (i64, i64) {
    first -= more / 2;
    last += more - more / 2;
    if last >= all {
        let over = last - all;
        first -= over;
        last -= over;
    }
    if first < 0 {
        last -= first;
        first = 0;
    }
    (first, last.min(all))
}
