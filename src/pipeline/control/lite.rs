//! Pictures as ControlNet-LLLites take them: −1 to 1, and as many squares as the level has places on which a module lies.

use sd_models::lllite::View;

use crate::error::{Error, Result};

/// `planar [c, h, w]`, 0 to 1, as `view` has it for latents of `latents` (width, height).
///
/// A module's convolutions drop what is no whole square, where the UNet rounds up. What they give is then resampled to the size of the level by its
/// nearest places, as A1111's extension does (`nearest-exact`); here the squares of the picture are, which is the same.
///
/// # Errors
/// [`Error::Usage`] when the picture is far smaller than the module's convolutions take.
pub(super) fn viewed(
    planar: &[f32],
    (width, height): (usize, usize),
    view: View,
    latents: (usize, usize),
) -> Result<Vec<f32>> {
    let side = view.stride;
    let (across, down) = view.squares(latents);
    let (own_across, own_down) = (width / side.max(1), height / side.max(1));
    if across > 2 * own_across || down > 2 * own_down {
        return Err(Error::Usage(format!(
            "the picture is {width}x{height}, of which the ControlNet-LLLite makes {own_across}x{own_down} squares of {side} pixels, and the model's UNet has {across}x{down} places there; ask for a larger picture, or give one that was made for this family"
        )));
    }
    let (columns, rows) = (nearest(own_across, across), nearest(own_down, down));
    let mut out = Vec::with_capacity(view.channels * across * down * side * side);
    for plane in planar.chunks_exact(width * height) {
        for row in rows.iter().flat_map(|row| row * side..(row + 1) * side) {
            let line = &plane[row * width..][..width];
            for column in &columns {
                let square = &line[column * side..][..side];
                out.extend(square.iter().map(|v| v * 2.0 - 1.0));
            }
        }
    }
    Ok(out)
}

/// Which of `from` each of `to` is, as PyTorch's `nearest-exact` counts: in f32.
fn nearest(from: usize, to: usize) -> Vec<usize> {
    let scale = from as f32 / to as f32;
    let place = |i: usize| ((i as f32 + 0.5) * scale).floor() as usize;
    let last = from.saturating_sub(1);
    (0..to).map(|i| place(i).min(last)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_seen_twice_where_places_are_more() {
        assert_eq!(nearest(3, 3), [0, 1, 2]);
        assert_eq!(nearest(2, 3), [0, 1, 1]);
        assert_eq!(nearest(3, 4), [0, 1, 1, 2]);
        assert_eq!(nearest(4, 2), [1, 3]);
        // of numbers whose middle lies at a border, as torch 2.15 has them
        let odd = nearest(6, 7);
        assert_eq!(odd, [0, 1, 2, 3, 3, 4, 5]);
    }
}
