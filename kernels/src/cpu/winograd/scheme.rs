//! The transforms of F(2,3) and F(4,3), one dimension each; two dimensions are rows after columns.
//!
//! Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (2016): interpolation at 0, ±1, ∞ and at 0, ±1, ±2, ∞. The squares are
//! written out so that what two results share is computed once.

use super::lanes::Lanes;

/// One of the forms, known when compiled. Arrays hold [`Scheme::IN`] values; what a smaller form does not use is left as it came.
pub(super) trait Scheme {
    /// Results of a tile's side.
    const OUT: usize;
    /// Pixels that they read: two more.
    const IN: usize;
    /// Bᵀ d: pixels to products' left operands.
    fn input<L: Lanes>(d: [L; 6]) -> [L; 6];
    /// Aᵀ m: products to results, the first [`Scheme::OUT`].
    fn output<L: Lanes>(m: [L; 6]) -> [L; 6];
    /// G g: taps to products' right operands.
    fn weight<L: Lanes>(g: [L; 3]) -> [L; 6];
}

/// F(2,3).
pub(super) struct F2;
/// F(4,3).
pub(super) struct F4;

impl Scheme for F2 {
    const OUT: usize = 2;
    const IN: usize = 4;

    #[inline(always)]
    fn input<L: Lanes>(d: [L; 6]) -> [L; 6] {
        [
            d[0].sub(d[2]),
            d[1].add(d[2]),
            d[2].sub(d[1]),
            d[1].sub(d[3]),
            d[4],
            d[5],
        ]
    }

    #[inline(always)]
    fn output<L: Lanes>(m: [L; 6]) -> [L; 6] {
        [
            m[0].add(m[1]).add(m[2]),
            m[1].sub(m[2]).sub(m[3]),
            m[2],
            m[3],
            m[4],
            m[5],
        ]
    }

    #[inline(always)]
    fn weight<L: Lanes>(g: [L; 3]) -> [L; 6] {
        let half = L::splat(0.5);
        let (even, odd) = (g[0].add(g[2]).mul(half), g[1].mul(half));
        [g[0], even.add(odd), even.sub(odd), g[2], odd, odd]
    }
}

/// The points ±a and ±b of F(4,3), beside 0 and ∞.
const A: f32 = std::f32::consts::FRAC_1_SQRT_2;
const B: f32 = std::f32::consts::SQRT_2;
/// Their squares, exactly.
const A2: f32 = 0.5;
const B2: f32 = 2.0;

impl Scheme for F4 {
    const OUT: usize = 4;
    const IN: usize = 6;

    #[inline(always)]
    fn input<L: Lanes>(d: [L; 6]) -> [L; 6] {
        let (even_a, odd_a) = (d[2].mul_add(-B2, d[4]), d[1].mul_add(-B2, d[3]));
        let (even_b, odd_b) = (d[2].mul_add(-A2, d[4]), d[1].mul_add(-A2, d[3]));
        [
            d[0].mul_add(A2 * B2, d[2].mul_add(-A2 - B2, d[4])),
            odd_a.mul_add(A, even_a),
            odd_a.mul_add(-A, even_a),
            odd_b.mul_add(B, even_b),
            odd_b.mul_add(-B, even_b),
            d[1].mul_add(A2 * B2, d[3].mul_add(-A2 - B2, d[5])),
        ]
    }

    #[inline(always)]
    fn output<L: Lanes>(m: [L; 6]) -> [L; 6] {
        let (even_a, odd_a) = (m[1].add(m[2]), m[1].sub(m[2]));
        let (even_b, odd_b) = (m[3].add(m[4]), m[3].sub(m[4]));
        [
            m[0].add(even_a).add(even_b),
            odd_a.mul_add(A, odd_b.mul(L::splat(B))),
            even_a.mul_add(A2, even_b.mul(L::splat(B2))),
            odd_a.mul_add(A * A2, odd_b.mul_add(B * B2, m[5])),
            m[4],
            m[5],
        ]
    }

    #[inline(always)]
    fn weight<L: Lanes>(g: [L; 3]) -> [L; 6] {
        const FA: f32 = 1.0 / (2.0 * A2 * (A2 - B2));
        const FB: f32 = 1.0 / (2.0 * B2 * (B2 - A2));
        let (even_a, odd_a) = (
            g[2].mul_add(A2, g[0]).mul(L::splat(FA)),
            g[1].mul(L::splat(A * FA)),
        );
        let (even_b, odd_b) = (
            g[2].mul_add(B2, g[0]).mul(L::splat(FB)),
            g[1].mul(L::splat(B * FB)),
        );
        [
            g[0].mul(L::splat(1.0 / (A2 * B2))),
            even_a.add(odd_a),
            even_a.sub(odd_a),
            even_b.add(odd_b),
            even_b.sub(odd_b),
            g[2],
        ]
    }
}
