//! Squares of one colour, as A1111's `t2ia_color_grid`: OpenCV's cubic resize to a 64th, and back by nearest pixels.

/// Pixels of a square's side.
const SQUARE: usize = 64;
/// Bits of fraction of a coefficient.
const BITS: i64 = 11;

/// The mosaic of `rgb [h, w, 3]`, of the same size `(width, height)`.
pub(super) fn mosaic(rgb: &[u8], (w, h): (usize, usize)) -> Vec<u8> {
    let (columns, rows) = ((w / SQUARE).max(1), (h / SQUARE).max(1));
    let (across, down) = (taps(w, columns), taps(h, rows));
    let mut small = Vec::with_capacity(columns * rows * 3);
    for vertical in &down {
        for horizontal in &across {
            for c in 0..3 {
                let line = |y: usize| -> i64 {
                    let taps = horizontal.iter();
                    taps.map(|(x, k)| i64::from(rgb[(y * w + x) * 3 + c]) * k)
                        .sum()
                };
                let sum: i64 = vertical.iter().map(|(y, k)| line(*y) * k).sum();
                let value = (sum + (1 << (2 * BITS - 1))) >> (2 * BITS);
                small.push(value.clamp(0, 255) as u8);
            }
        }
    }
    let mut out = Vec::with_capacity(rgb.len());
    for y in 0..h {
        let row = (y * rows / h).min(rows - 1);
        for x in 0..w {
            let column = (x * columns / w).min(columns - 1);
            out.extend_from_slice(&small[(row * columns + column) * 3..][..3]);
        }
    }
    out
}

/// For each of `to` places the four of `from` that it is made of, with their coefficients (Keys' cubic, a = −0.75); no smoothing.
fn taps(from: usize, to: usize) -> Vec<[(usize, i64); 4]> {
    let scale = from as f64 / to as f64;
    (0..to)
        .map(|i| {
            let place = ((i as f64 + 0.5) * scale - 0.5) as f32;
            let first = place.floor();
            let weights = cubic(place - first);
            std::array::from_fn(|k| {
                let at = first as i64 + k as i64 - 1;
                let at = at.clamp(0, from as i64 - 1) as usize;
                let weight = (weights[k] * (1 << BITS) as f32).round_ties_even();
                (at, weight as i64)
            })
        })
        .collect()
}

fn cubic(x: f32) -> [f32; 4] {
    const A: f32 = -0.75;
    let first = ((A * (x + 1.0) - 5.0 * A) * (x + 1.0) + 8.0 * A) * (x + 1.0) - 4.0 * A;
    let second = ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let y = 1.0 - x;
    let third = ((A + 2.0) * y - (A + 3.0)) * y * y + 1.0;
    [first, second, third, 1.0 - first - second - third]
}
