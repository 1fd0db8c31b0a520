//! Lines by the difference of two blurs (Winnemöller, "XDoG", 2011), as A1111's `scribble_xdog` with its threshold of 32.

/// Deviations of the two blurs, in pixels.
const SHARP: f64 = 0.5;
const SOFT: f64 = 5.0;
/// Above this a difference is a line.
const THRESHOLD: u8 = 32;

/// 255 on dark lines and 0 elsewhere, for `rgb [h, w, 3]` of `(width, height)` pixels.
pub(super) fn xdog(rgb: &[u8], size: (usize, usize)) -> Vec<u8> {
    let (sharp, soft) = (blur(rgb, size, SHARP), blur(rgb, size, SOFT));
    let pixels = sharp.as_chunks::<3>().0.iter().zip(soft.as_chunks::<3>().0);
    pixels
        .map(|(sharp, soft)| {
            let differences = sharp.iter().zip(soft).map(|(a, b)| b - a);
            let least = differences.fold(f32::INFINITY, f32::min);
            // bytes, cut off and not rounded, and doubled as bytes are: 128 becomes 0
            let byte = (255.0 - least).clamp(0.0, 255.0) as u8;
            let doubled = (255 - byte).wrapping_mul(2);
            if doubled > THRESHOLD { 255 } else { 0 }
        })
        .collect()
}

/// OpenCV's Gaussian blur of 32-bit floats: a kernel as wide as eight deviations, mirrored borders; `[h, w, 3]`.
fn blur(rgb: &[u8], (w, h): (usize, usize), deviation: f64) -> Vec<f32> {
    let kernel = kernel(deviation);
    let half = kernel.len() / 2;
    let mut rows = vec![0f32; w * h * 3];
    let taps_x: Vec<Vec<usize>> = (0..w).map(|x| taps(x, half, w)).collect();
    let taps_y: Vec<Vec<usize>> = (0..h).map(|y| taps(y, half, h)).collect();
    for (y, row) in rows.chunks_exact_mut(w * 3).enumerate() {
        let source = &rgb[y * w * 3..][..w * 3];
        for (x, pixel) in row.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            for (c, value) in pixel.iter_mut().enumerate() {
                let products = taps_x[x].iter().zip(&kernel);
                *value = products
                    .map(|(x, k)| f32::from(source[x * 3 + c]) * k)
                    .sum();
            }
        }
    }
    let mut out = vec![0f32; w * h * 3];
    for (y, row) in out.chunks_exact_mut(w * 3).enumerate() {
        for (from, k) in taps_y[y].iter().zip(&kernel) {
            let source = &rows[from * w * 3..][..w * 3];
            for (value, x) in row.iter_mut().zip(source) {
                *value += x * k;
            }
        }
    }
    out
}

fn kernel(deviation: f64) -> Vec<f32> {
    let size = (deviation * 8.0 + 1.0).round_ties_even() as usize | 1;
    let center = (size - 1) as f64 / 2.0;
    let weight = |i: usize| (-(i as f64 - center).powi(2) / (2.0 * deviation * deviation)).exp();
    let weights: Vec<f64> = (0..size).map(weight).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| (weight / sum) as f32).collect()
}

/// The places `at − half … at + half` of a row of `count`, mirrored at its ends without repeating the last.
fn taps(at: usize, half: usize, count: usize) -> Vec<usize> {
    let period = (2 * count).saturating_sub(2).max(1);
    (at..=at + 2 * half)
        .map(|place| {
            // shifted by whole periods so that nothing is below zero
            let place = (place + half * period - half) % period;
            place.min(period - place).min(count - 1)
        })
        .collect()
}
