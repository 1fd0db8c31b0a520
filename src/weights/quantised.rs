//! ggml's quantised blocks as numbers: a block at a time, with the products in the order of ggml's own `dequantize_row_…`, so that every
//! number is the same bit for bit.
//!
//! A block holds small whole numbers q of neighbours and what they are multiplied with: f16 scales d (and offsets m), in the K types with
//! small whole scales of groups of 16 or 32 between. Layouts: `ggml-common.h` and `ggml-quants.c` of
//! <https://github.com/ggml-org/ggml/tree/v0.9.4/src>. Products with blocks as they are would read them here, too.

use half::f16;

use crate::checkpoint::BlockType;

/// The elements of the largest block.
const LARGEST: usize = 256;

/// The numbers from `first` on of a tensor that `bytes` are the blocks of: as many as `out` has.
pub(super) fn read(block: BlockType, bytes: &[u8], first: usize, mut out: &mut [f32]) {
    let (count, size) = (block.elements(), block.bytes());
    let mut buffer = [0.0; LARGEST];
    let mut skip = first % count;
    for bytes in bytes.chunks_exact(size).skip(first / count) {
        if out.is_empty() {
            return;
        }
        let numbers = &mut buffer[..count];
        decode(block, bytes, numbers);
        let take = out.len().min(count - skip);
        let (now, later) = std::mem::take(&mut out).split_at_mut(take);
        now.copy_from_slice(&numbers[skip..skip + take]);
        (out, skip) = (later, 0);
    }
}

/// One whole block.
fn decode(block: BlockType, bytes: &[u8], out: &mut [f32]) {
    match block {
        BlockType::Q4_0 => nibbles(half(bytes, 0), -8, &bytes[2..], out),
        BlockType::Q4_1 => {
            nibbles(half(bytes, 0), 0, &bytes[4..], out);
            add(out, half(bytes, 2));
        }
        BlockType::Q5_0 => fives(half(bytes, 0), -16, &bytes[2..], out),
        BlockType::Q5_1 => {
            fives(half(bytes, 0), 0, &bytes[4..], out);
            add(out, half(bytes, 2));
        }
        BlockType::Q8_0 => {
            let d = half(bytes, 0);
            for (out, &q) in out.iter_mut().zip(&bytes[2..]) {
                *out = d * f32::from(q.cast_signed());
            }
        }
        BlockType::Q2K => q2_k(bytes, out),
        BlockType::Q3K => q3_k(bytes, out),
        BlockType::Q4K => q4_k(bytes, out),
        BlockType::Q5K => q5_k(bytes, out),
        BlockType::Q6K => q6_k(bytes, out),
    }
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn add(out: &mut [f32], offset: f32) {
    out.iter_mut().for_each(|out| *out += offset);
}

/// Four bits a number: the low halves of all bytes, then the high halves.
fn nibbles(d: f32, offset: i8, bytes: &[u8], out: &mut [f32]) {
    let (low, high) = out.split_at_mut(16);
    let number = |q: u8| f32::from(q.cast_signed() + offset) * d;
    for ((low, high), &q) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (number(q & 15), number(q >> 4));
    }
}

/// The same with a fifth bit for each, in four bytes in front.
fn fives(d: f32, offset: i8, bytes: &[u8], out: &mut [f32]) {
    let (fifth, bytes) = bytes.split_at(4);
    let fifth = u32::from_le_bytes([fifth[0], fifth[1], fifth[2], fifth[3]]);
    let bit = |i: usize| ((fifth >> i & 1) << 4) as u8;
    let number = |q: u8| f32::from(q.cast_signed() + offset) * d;
    let (low, high) = out.split_at_mut(16);
    for (i, (&q, (low, high))) in bytes.iter().zip(low.iter_mut().zip(high)).enumerate() {
        (*low, *high) = (number(q & 15 | bit(i)), number(q >> 4 | bit(i + 16)));
    }
}

/// `[scales 16][q 64][d][dmin]`: groups of 16, each with four bits of scale and four of offset; two bits a number.
fn q2_k(bytes: &[u8], out: &mut [f32]) {
    let (scales, q) = (&bytes[..16], &bytes[16..80]);
    let (d, dmin) = (half(bytes, 80), half(bytes, 82));
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = scales[group];
        let (d, m) = (d * f32::from(scale & 15), dmin * f32::from(scale >> 4));
        for (out, &q) in out.iter_mut().zip(&q[two_bits(group)..]) {
            *out = d * f32::from(q >> shift(group) & 3) - m;
        }
    }
}

/// `[high bits 32][q 64][scales 12][d]`: groups of 16 with six bits of scale; two bits a number and a third that counts −4 where it is 0.
fn q3_k(bytes: &[u8], out: &mut [f32]) {
    let (high, q, scales) = (&bytes[..32], &bytes[32..96], &bytes[96..108]);
    let d = half(bytes, 108);
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let low = scales[group % 8] >> (4 * (group / 8)) & 15;
        let top = scales[8 + group % 4] >> (2 * (group / 4)) & 3;
        let d = d * f32::from((low | top << 4).cast_signed() - 32);
        let high = &high[16 * (group % 2)..];
        for ((out, &q), &high) in out.iter_mut().zip(&q[two_bits(group)..]).zip(high) {
            let third = if high >> (group / 2) & 1 == 0 { 4 } else { 0 };
            *out = d * f32::from((q >> shift(group) & 3).cast_signed() - third);
        }
    }
}

/// Where the bytes of a group of 16 begin in a Q2_K or Q3_K: 128 numbers share 32 bytes.
fn two_bits(group: usize) -> usize {
    32 * (group / 8) + 16 * (group % 2)
}

/// Which of the four pairs of bits of a byte is the group's.
fn shift(group: usize) -> usize {
    2 * (group / 2 % 4)
}

/// `[d][dmin][scales 12][q 128]`: groups of 32 with six bits of scale and six of offset; four bits a number.
fn q4_k(bytes: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half(bytes, 0), half(bytes, 2));
    let (scales, q) = (&bytes[4..16], &bytes[16..144]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, offset) = six_bits(scales, group);
        let (d, m) = (d * f32::from(scale), dmin * f32::from(offset));
        for (out, &q) in out.iter_mut().zip(&q[32 * (group / 2)..]) {
            *out = d * f32::from(q >> (4 * (group % 2)) & 15) - m;
        }
    }
}

/// `[d][dmin][scales 12][fifth bits 32][q 128]`: as Q4_K, with a fifth bit.
fn q5_k(bytes: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half(bytes, 0), half(bytes, 2));
    let (scales, fifth, q) = (&bytes[4..16], &bytes[16..48], &bytes[48..176]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, offset) = six_bits(scales, group);
        let (d, m) = (d * f32::from(scale), dmin * f32::from(offset));
        let q = &q[32 * (group / 2)..];
        for ((out, &q), &fifth) in out.iter_mut().zip(q).zip(fifth) {
            let q = q >> (4 * (group % 2)) & 15 | (fifth >> group & 1) << 4;
            *out = d * f32::from(q) - m;
        }
    }
}

/// Scale and offset of a group, six bits each in twelve bytes: those of the last four groups are in pieces.
fn six_bits(scales: &[u8], group: usize) -> (u8, u8) {
    match group {
        0..4 => (scales[group] & 63, scales[group + 4] & 63),
        _ => (
            scales[group + 4] & 15 | scales[group - 4] >> 6 << 4,
            scales[group + 4] >> 4 | scales[group] >> 6 << 4,
        ),
    }
}

/// `[low four bits 128][high two bits 64][scales 16][d]`: groups of 16 with a signed byte of scale; six bits a number.
fn q6_k(bytes: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&bytes[..128], &bytes[128..192], &bytes[192..208]);
    let d = half(bytes, 208);
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        // 128 numbers share 64 bytes of low and 32 of high bits; within them, the quarter of 32
        let (part, quarter, second) = (group / 8, group % 8 / 2, 16 * (group % 2));
        let low = &low[64 * part + 32 * (quarter % 2) + second..];
        let high = &high[32 * part + second..];
        let d = d * f32::from(scales[group].cast_signed());
        for ((out, &low), &high) in out.iter_mut().zip(low).zip(high) {
            let q = low >> (4 * (quarter / 2)) & 15 | (high >> (2 * quarter) & 3) << 4;
            *out = d * f32::from(q.cast_signed() - 32);
        }
    }
}
