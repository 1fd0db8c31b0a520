//! `mma` and `ldmatrix`, with the fragment layouts of the PTX ISA ("Matrix Fragments for mma.m16n8k16" and its neighbours).
//!
//! With g = lane / 4 and t = lane mod 4, a 16-bit fragment holds in registers
//!
//! * A, 16 × 16, by rows: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with the next column above it;
//! * B, 16 × 8, by columns: (2t, g), (2t + 8, g), each with the next row above it;
//! * C and D, 16 × 8, in f32: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
//!
//! The tf32 shapes hold one number a register: A (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); B (t, g), (t + 4, g).
//!
//! Sums are in f32, one product after the other from k = 0, starting from c. The hardware adds several products at once in an order and
//! with digits that NVIDIA does not tell; results differ by what a reordering of the sum may change.

use crate::halves::{Brain, Half, Ieee};
use crate::lanes::L32;
use crate::op::{Mma, Tile};

/// Rows × k and k × columns.
struct Tiles {
    a: [[f32; 16]; 16],
    b: [[f32; 8]; 16],
}

fn gather<H: Half>(mma: &Mma, k: usize, regs: &[L32], tiles: &mut Tiles) {
    for half in 0..k / 8 {
        for upper in 0..2 {
            let reg = &regs[mma.a[half * 2 + upper] as usize];
            for (lane, value) in reg.iter().enumerate() {
                let row = &mut tiles.a[lane / 4 + upper * 8];
                row[lane % 4 * 2 + half * 8] = H::up(value & 0xffff);
                row[lane % 4 * 2 + half * 8 + 1] = H::up(value >> 16);
            }
        }
        let reg = &regs[mma.b[half] as usize];
        for (lane, value) in reg.iter().enumerate() {
            tiles.b[lane % 4 * 2 + half * 8][lane / 4] = H::up(value & 0xffff);
            tiles.b[lane % 4 * 2 + half * 8 + 1][lane / 4] = H::up(value >> 16);
        }
    }
}

fn gather_tensor(mma: &Mma, k: usize, regs: &[L32], tiles: &mut Tiles) {
    // the hardware does not look at the lowest 13 bits
    let up = |x: u32| f32::from_bits(x & !0x1fff);
    for half in 0..k / 4 {
        for lane in 0..32 {
            for upper in 0..2 {
                tiles.a[lane / 4 + upper * 8][lane % 4 + half * 4] =
                    up(regs[mma.a[half * 2 + upper] as usize][lane]);
            }
            tiles.b[lane % 4 + half * 4][lane / 4] = up(regs[mma.b[half] as usize][lane]);
        }
    }
}

/// d = a · b + c.
pub(crate) fn mma(mma: &Mma, regs: &mut [L32]) {
    let mut tiles = Tiles {
        a: [[0.0; 16]; 16],
        b: [[0.0; 8]; 16],
    };
    let k = match mma.tile {
        Tile::Brain16 | Tile::Half16 => 16,
        Tile::Brain8 | Tile::Half8 | Tile::Tensor8 => 8,
        Tile::Tensor4 => 4,
    };
    match mma.tile {
        Tile::Brain16 | Tile::Brain8 => gather::<Brain>(mma, k, regs, &mut tiles),
        Tile::Half16 | Tile::Half8 => gather::<Ieee>(mma, k, regs, &mut tiles),
        Tile::Tensor8 | Tile::Tensor4 => gather_tensor(mma, k, regs, &mut tiles),
    }
    let mut sums = [[0.0; 8]; 16];
    for upper in 0..2 {
        for lane in 0..32 {
            let pair = &mut sums[lane / 4 + upper * 8][lane % 4 * 2..][..2];
            if mma.halves {
                let value = regs[mma.c[upper] as usize][lane];
                (pair[0], pair[1]) = (Ieee::up(value & 0xffff), Ieee::up(value >> 16));
            } else {
                pair[0] = f32::from_bits(regs[mma.c[upper * 2] as usize][lane]);
                pair[1] = f32::from_bits(regs[mma.c[upper * 2 + 1] as usize][lane]);
            }
        }
    }
    for (row, sum) in tiles.a.iter().zip(&mut sums) {
        for (a, b) in row[..k].iter().zip(&tiles.b) {
            for (s, b) in sum.iter_mut().zip(b) {
                *s += a * b;
            }
        }
    }
    for upper in 0..2 {
        for lane in 0..32 {
            let pair = &sums[lane / 4 + upper * 8][lane % 4 * 2..][..2];
            if mma.halves {
                regs[mma.d[upper] as usize][lane] = Ieee::down(pair[0]) | Ieee::down(pair[1]) << 16;
            } else {
                regs[mma.d[upper * 2] as usize][lane] = pair[0].to_bits();
                regs[mma.d[upper * 2 + 1] as usize][lane] = pair[1].to_bits();
            }
        }
    }
}

/// The registers of one 8 × 8 matrix of 16-bit numbers whose rows of 16 bytes are given.
pub(crate) fn matrix(rows: &[[u32; 4]; 8], transposed: bool) -> L32 {
    let mut out = [0; 32];
    for (lane, out) in out.iter_mut().enumerate() {
        let (g, t) = (lane / 4, lane % 4);
        *out = if transposed {
            let at = |row: usize| rows[row][g / 2] >> (g % 2 * 16) & 0xffff;
            at(t * 2) | at(t * 2 + 1) << 16
        } else {
            rows[g][t]
        };
    }
    out
}
