//! A picture at the result's size.

use crate::error::{Error, Result};
use crate::picture::{Filter, Grey, Picture, Rect};

/// How a picture of another shape gets the result's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Resize {
    /// Stretched, as diffusers does
    #[default]
    Stretch,
    /// Scaled until it covers all, and cut in the middle
    Crop,
    /// Scaled until all of it is seen, with the middle colour of its borders around it
    Fill,
}

impl Resize {
    /// The size to which a picture is scaled before it is cut or filled up.
    fn scaled(self, from: (u32, u32), to: (u32, u32)) -> (u32, u32) {
        let ratio = |to: u32, from: u32| f64::from(to) / f64::from(from.max(1));
        let (x, y) = (ratio(to.0, from.0), ratio(to.1, from.1));
        let factor = match self {
            Self::Stretch => return to,
            Self::Crop => x.max(y),
            Self::Fill => x.min(y),
        };
        let side = |pixels: u32| (f64::from(pixels) * factor).round_ties_even().max(1.0) as u32;
        (side(from.0), side(from.1))
    }
}

/// The picture at `size` (width, height), by Lanczos' filter.
pub(crate) fn fit(picture: &Picture, size: (usize, usize), how: Resize) -> Result<Picture> {
    let to = sides(size)?;
    let (w, h) = how.scaled((picture.width(), picture.height()), to);
    let scaled = picture.resize(w, h, Filter::Lanczos)?;
    match how {
        Resize::Stretch => Ok(scaled),
        Resize::Crop => scaled.crop(middle((w, h), to)),
        Resize::Fill => {
            let color = border_color(picture);
            let count = to.0 as usize * to.1 as usize;
            let mut whole = Picture::from_rgb(to.0, to.1, color.repeat(count))?;
            let place = middle(to, (w.min(to.0), h.min(to.1)));
            whole.paste(&scaled, place.left.into(), place.top.into());
            Ok(whole)
        }
    }
}

/// A mask of the picture at the same size, by nearest pixels; around it nothing is hidden.
pub(super) fn fit_mask(mask: &Grey, size: (usize, usize), how: Resize) -> Result<Grey> {
    let to = sides(size)?;
    let (w, h) = how.scaled((mask.width(), mask.height()), to);
    let scaled = mask.resize(w, h, Filter::Nearest)?;
    match how {
        Resize::Stretch => Ok(scaled),
        Resize::Crop => scaled.crop(middle((w, h), to)),
        Resize::Fill => {
            let count = to.0 as usize * to.1 as usize;
            let mut whole = Picture::from_rgb(to.0, to.1, vec![0; 3 * count])?;
            let place = middle(to, (w.min(to.0), h.min(to.1)));
            whole.paste(&scaled.to_picture(), place.left.into(), place.top.into());
            Ok(whole.to_luma())
        }
    }
}

fn sides((width, height): (usize, usize)) -> Result<(u32, u32)> {
    let side = |pixels: usize| {
        u32::try_from(pixels)
            .map_err(|_| Error::Usage(format!("a picture side of {pixels} pixels is too large")))
    };
    Ok((side(width)?, side(height)?))
}

/// A part of size `part` in the middle of `whole`.
fn middle(whole: (u32, u32), part: (u32, u32)) -> Rect {
    Rect {
        left: whole.0.saturating_sub(part.0) / 2,
        top: whole.1.saturating_sub(part.1) / 2,
        width: part.0.min(whole.0),
        height: part.1.min(whole.1),
    }
}

/// The median of the outermost pixels, channel by channel.
fn border_color(picture: &Picture) -> [u8; 3] {
    let (w, h) = (picture.width() as usize, picture.height() as usize);
    let pixel = |x: usize, y: usize| (y * w + x) * 3;
    let rows = (0..w).flat_map(|x| [pixel(x, 0), pixel(x, h - 1)]);
    let columns = (0..h).flat_map(|y| [pixel(0, y), pixel(w - 1, y)]);
    let places: Vec<usize> = rows.chain(columns).collect();
    std::array::from_fn(|c| {
        let mut values: Vec<u8> = places
            .iter()
            .map(|place| picture.rgb()[place + c])
            .collect();
        values.sort_unstable();
        // an even number of values: the mean of the two in the middle, cut off
        let (low, high) = (values[values.len() / 2 - 1], values[values.len() / 2]);
        low.midpoint(high)
    })
}
