//! Where tokens stand: text at the origin, a picture's patches by row and column (diffusers 0.42.1 `FluxPosEmbed`).

use std::sync::Arc;

use sd_kernels::Turns;

use crate::layers::JointTurns;

/// The base of the frequencies.
const THETA: f64 = 10_000.0;

/// Turns of `length` tokens of text, of `h × w` of a picture, and of those of a second picture behind it, which are told apart by their first
/// axis; computed in f64, as the reference does: in bf16 far places would be the same.
pub(super) fn turns(
    axes: &[usize],
    length: usize,
    (h, w): (usize, usize),
    (other_h, other_w): (usize, usize),
) -> JointTurns {
    let all = |places: &mut dyn Iterator<Item = [usize; 3]>| -> Turns {
        Arc::new(places.flat_map(|place| turn(axes, place)).collect())
    };
    JointTurns {
        context: all(&mut (0..length).map(|_| [0; 3])),
        sample: {
            let first = (0..h).flat_map(|y| (0..w).map(move |x| [0, y, x]));
            let other = (0..other_h).flat_map(|y| (0..other_w).map(move |x| [1, y, x]));
            all(&mut first.chain(other))
        },
    }
}

/// Text and picture behind each other.
pub(super) fn joined(turns: &JointTurns) -> Turns {
    Arc::new([turns.context.as_slice(), turns.sample.as_slice()].concat())
}

/// Cosines and sines of one place, axis by axis.
fn turn(axes: &[usize], place: [usize; 3]) -> Vec<[f32; 2]> {
    let axes = axes.iter().zip(place);
    axes.flat_map(|(&width, place)| {
        (0..width / 2).map(move |i| {
            let angle = place as f64 / THETA.powf(2.0 * i as f64 / width as f64);
            [angle.cos() as f32, angle.sin() as f32]
        })
    })
    .collect()
}
