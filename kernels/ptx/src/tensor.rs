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

/// Spreads fragments of 16-bit numbers; `half` counts the registers along k.
fn gather<H: Half>(mma: &Mma, halves: usize, regs: &[L32], tiles: &mut Tiles) {
    for half in 0..halves {
        for upper in 0..2 {
            let reg = &regs[mma.a[half * 2 + upper] as usize];
            for g in 0..8 {
                let row = &mut tiles.a[g + upper * 8];
                for t in 0..4 {
                    let value = reg[g * 4 + t];
                    row[t * 2 + half * 8] = H::up(value & 0xffff);
                    row[t * 2 + half * 8 + 1] = H::up(value >> 16);
                }
            }
        }
        let reg = &regs[mma.b[half] as usize];
        for t in 0..4 {
            for g in 0..8 {
                let value = reg[g * 4 + t];
                tiles.b[t * 2 + half * 8][g] = H::up(value & 0xffff);
                tiles.b[t * 2 + half * 8 + 1][g] = H::up(value >> 16);
            }
        }
    }
}

/// Spreads fragments of tf32, whose lowest 13 bits the hardware does not look at.
fn gather_tensor(mma: &Mma, halves: usize, regs: &[L32], tiles: &mut Tiles) {
    let up = |x: u32| f32::from_bits(x & !0x1fff);
    for half in 0..halves {
        for lane in 0..32 {
            for upper in 0..2 {
                let row = &mut tiles.a[lane / 4 + upper * 8];
                row[lane % 4 + half * 4] = up(regs[mma.a[half * 2 + upper] as usize][lane]);
            }
            tiles.b[lane % 4 + half * 4][lane / 4] = up(regs[mma.b[half] as usize][lane]);
        }
    }
}

/// sums += a · b over the first `K` columns of a.
fn multiply<const K: usize>(tiles: &Tiles, sums: &mut [[f32; 8]; 16]) {
    for (row, sums) in tiles.a.iter().zip(sums) {
        let mut sum = *sums;
        for (a, b) in row.iter().zip(&tiles.b).take(K) {
            for n in 0..8 {
                sum[n] += a * b[n];
            }
        }
        *sums = sum;
    }
}

/// d = a · b + c.
pub(crate) fn mma(mma: &Mma, regs: &mut [L32]) {
    let mut tiles = Tiles {
        a: [[0.0; 16]; 16],
        b: [[0.0; 8]; 16],
    };
    let mut sums = [[0.0; 8]; 16];
    for upper in 0..2 {
        let (c0, c1) = if mma.halves {
            let c = &regs[mma.c[upper] as usize];
            (
                c.map(|x| Ieee::up(x & 0xffff).to_bits()),
                c.map(|x| Ieee::up(x >> 16).to_bits()),
            )
        } else {
            (
                regs[mma.c[upper * 2] as usize],
                regs[mma.c[upper * 2 + 1] as usize],
            )
        };
        for g in 0..8 {
            let row = &mut sums[g + upper * 8];
            for t in 0..4 {
                row[t * 2] = f32::from_bits(c0[g * 4 + t]);
                row[t * 2 + 1] = f32::from_bits(c1[g * 4 + t]);
            }
        }
    }
    match mma.tile {
        Tile::Brain16 => gather::<Brain>(mma, 2, regs, &mut tiles),
        Tile::Half16 => gather::<Ieee>(mma, 2, regs, &mut tiles),
        Tile::Brain8 => gather::<Brain>(mma, 1, regs, &mut tiles),
        Tile::Half8 => gather::<Ieee>(mma, 1, regs, &mut tiles),
        Tile::Tensor8 => gather_tensor(mma, 2, regs, &mut tiles),
        Tile::Tensor4 => gather_tensor(mma, 1, regs, &mut tiles),
    }
    match mma.tile {
        Tile::Brain16 | Tile::Half16 => multiply::<16>(&tiles, &mut sums),
        Tile::Brain8 | Tile::Half8 | Tile::Tensor8 => multiply::<8>(&tiles, &mut sums),
        Tile::Tensor4 => multiply::<4>(&tiles, &mut sums),
    }
    for upper in 0..2 {
        let (mut d0, mut d1) = ([0; 32], [0; 32]);
        for g in 0..8 {
            let row = &sums[g + upper * 8];
            for t in 0..4 {
                (d0[g * 4 + t], d1[g * 4 + t]) = (row[t * 2].to_bits(), row[t * 2 + 1].to_bits());
            }
        }
        if mma.halves {
            let d = &mut regs[mma.d[upper] as usize];
            for lane in 0..32 {
                d[lane] = Ieee::down(f32::from_bits(d0[lane]))
                    | Ieee::down(f32::from_bits(d1[lane])) << 16;
            }
        } else {
            (
                regs[mma.d[upper * 2] as usize],
                regs[mma.d[upper * 2 + 1] as usize],
            ) = (d0, d1);
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
