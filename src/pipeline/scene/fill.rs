//! Colours of what lies around, drawn into what is painted anew (A1111's "fill").

use crate::error::Result;
use crate::picture::{Grey, Picture};

/// Radius in pixels and how often it is laid over, from the widest.
const LAYERS: [(f32, usize); 6] = [
    (256.0, 1),
    (64.0, 1),
    (16.0, 2),
    (4.0, 4),
    (2.0, 2),
    (0.0, 1),
];

/// The picture with blurred surroundings where the mask is white.
pub(in super::super) fn around(picture: &Picture, mask: &Grey) -> Result<Picture> {
    let (width, height) = (picture.width(), picture.height());
    let kept = mask.clone().invert();
    let black = Picture::from_rgb(width, height, vec![0; picture.rgb().len()])?;
    let seen = black.blend(picture, &kept)?; // colours times what is kept of them
    let mut filled = vec![[0f32; 4]; kept.values().len()]; // colours times weight, and weight
    for (radius, times) in LAYERS {
        let colours = seen.gaussian_blur(radius)?;
        let weights = kept.gaussian_blur(radius)?;
        for _ in 0..times {
            let pixels = filled.iter_mut().zip(colours.rgb().chunks_exact(3));
            for ((to, from), weight) in pixels.zip(weights.values()) {
                let left = 1.0 - f32::from(*weight) / 255.0;
                for (to, from) in to.iter_mut().zip(from.iter().chain([weight])) {
                    *to = f32::from(*from) + *to * left;
                }
            }
        }
    }
    let bytes = |[r, g, b, weight]: &[f32; 4]| {
        let whole = 255.0 / weight.max(1.0);
        [r, g, b].map(|value| (value * whole).round().clamp(0.0, 255.0) as u8)
    };
    Picture::from_rgb(width, height, filled.iter().flat_map(bytes).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_hole_takes_the_colour_around_it() {
        let mut rgb = [200, 40, 90].repeat(64 * 64);
        let mut mask = vec![0; 64 * 64];
        for y in 24..40 {
            for x in 24..40 {
                mask[y * 64 + x] = 255;
                rgb[3 * (y * 64 + x)..][..3].copy_from_slice(&[0, 255, 0]);
            }
        }
        let picture = Picture::from_rgb(64, 64, rgb).unwrap();
        let mask = Grey::new(64, 64, mask).unwrap();
        let filled = around(&picture, &mask).unwrap();
        let middle = &filled.rgb()[3 * (32 * 64 + 32)..][..3];
        for (got, want) in middle.iter().zip([200i32, 40, 90]) {
            assert!((i32::from(*got) - want).abs() <= 4, "{middle:?}");
        }
        assert_eq!(&filled.rgb()[..3], [200, 40, 90]);
    }
}
