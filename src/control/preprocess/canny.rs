//! Edges (Canny, "A Computational Approach to Edge Detection", 1986), byte for byte as OpenCV's `cv2.Canny(rgb, low, high)`: Sobel's 3×3
//! gradients of the channel where they are largest, |dx| + |dy| for the length, directions by the tangents of 22.5° and 67.5°.

/// tan 22.5° with 15 bits of fraction.
const TANGENT: i32 = 13573;

/// What is known of a pixel.
#[derive(Clone, Copy, PartialEq)]
enum State {
    No,
    /// An edge if it touches one.
    Maybe,
    Edge,
}

/// 255 on edges and 0 elsewhere, for `rgb [h, w, 3]` of `(width, height)` pixels.
pub fn canny(rgb: &[u8], (w, h): (usize, usize), (low, high): (i32, i32)) -> Vec<u8> {
    let (dx, dy) = gradients(rgb, (w, h));
    let lengths: Vec<i32> = dx.iter().zip(&dy).map(|(x, y)| x.abs() + y.abs()).collect();
    // nothing is around the picture
    let length = |x: isize, y: isize| match (usize::try_from(x), usize::try_from(y)) {
        (Ok(x), Ok(y)) if x < w && y < h => lengths[y * w + x],
        _ => 0,
    };
    let mut states = vec![State::No; w * h];
    let mut open = Vec::new();
    for i in 0..w * h {
        let (x, y) = ((i % w).cast_signed(), (i / w).cast_signed());
        let m = lengths[i];
        if m <= low || !is_largest((dx[i], dy[i]), m, |a, b| length(x + a, y + b)) {
            continue;
        }
        states[i] = State::Maybe;
        if m > high {
            states[i] = State::Edge;
            open.push(i);
        }
    }
    while let Some(i) = open.pop() {
        let (x, y) = (i % w, i / w);
        for y in y.saturating_sub(1)..(y + 2).min(h) {
            for x in x.saturating_sub(1)..(x + 2).min(w) {
                if states[y * w + x] == State::Maybe {
                    states[y * w + x] = State::Edge;
                    open.push(y * w + x);
                }
            }
        }
    }
    let byte = |state: &State| if *state == State::Edge { 255 } else { 0 };
    states.iter().map(byte).collect()
}

/// Whether a gradient of length `m` is the largest across the edge; `length` is that of the pixel so much to the right and below. Of two
/// equal ones, the left or upper one is taken.
fn is_largest((dx, dy): (i32, i32), m: i32, length: impl Fn(isize, isize) -> i32) -> bool {
    let (x, y) = (dx.abs(), dy.abs() << 15);
    let flat = x * TANGENT;
    // tan 67.5° = tan 22.5° + 2
    let steep = flat + (x << 16);
    if y < flat {
        m > length(-1, 0) && m >= length(1, 0)
    } else if y > steep {
        m > length(0, -1) && m >= length(0, 1)
    } else {
        let side = if (dx ^ dy) < 0 { -1 } else { 1 };
        m > length(-side, -1) && m > length(side, 1)
    }
}

/// Sobel's derivatives to the right and downwards; borders repeat. Of the three channels that counts whose derivatives are largest together, the
/// first of equal ones.
fn gradients(rgb: &[u8], (w, h): (usize, usize)) -> (Vec<i32>, Vec<i32>) {
    let one = |i: usize| {
        let (x, y) = (i % w, i / w);
        let (left, right) = (x.saturating_sub(1), (x + 1).min(w - 1));
        let (above, below) = (y.saturating_sub(1), (y + 1).min(h - 1));
        let of = |c: usize| {
            let at = |x: usize, y: usize| i32::from(rgb[(y * w + x) * 3 + c]);
            let dx = at(right, above) + 2 * at(right, y) + at(right, below)
                - at(left, above)
                - 2 * at(left, y)
                - at(left, below);
            let dy = at(left, below) + 2 * at(x, below) + at(right, below)
                - at(left, above)
                - 2 * at(x, above)
                - at(right, above);
            (dx, dy)
        };
        let length = |(x, y): (i32, i32)| x.abs() + y.abs();
        let first = of(0);
        (1..3).map(of).fold(first, |best, next| {
            if length(next) > length(best) {
                next
            } else {
                best
            }
        })
    };
    (0..w * h).map(one).unzip()
}
