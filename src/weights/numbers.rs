//! Bytes of every type that weights are stored as, read as f32.

use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;

use super::quantised;
use crate::checkpoint::TensorType;

/// Whether networks can be read from tensors of this type.
pub fn is_readable(dtype: TensorType) -> bool {
    match dtype {
        TensorType::Plain(dtype) => width(dtype).is_some(),
        TensorType::Block(_) => true,
    }
}

/// Whether a number takes eight bits, which a scale beside the tensor may belong to.
pub(super) fn is_eight_bits(dtype: TensorType) -> bool {
    matches!(dtype, TensorType::Plain(Dtype::F8_E4M3 | Dtype::F8_E5M2))
}

/// The numbers from `first` on of a tensor whose bytes, not aligned, are `bytes`: as many as `out` has. Other types give no numbers.
pub(super) fn read(dtype: TensorType, bytes: &[u8], first: usize, out: &mut [f32]) {
    match dtype {
        TensorType::Block(block) => quantised::read(block, bytes, first, out),
        TensorType::Plain(dtype) => match width(dtype) {
            Some(width) => to_f32(dtype, &bytes[first * width..][..out.len() * width], out),
            None => out.fill(f32::NAN),
        },
    }
}

/// Bytes of a number of a float type; `None` for other types.
fn width(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F64 => Some(8),
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        Dtype::F8_E4M3 | Dtype::F8_E5M2 => Some(1),
        _ => None,
    }
}

/// Little-endian bytes of a float type as f32: as many as `out` has. Other types give no numbers.
fn to_f32(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => each(bytes, out, f32::from_le_bytes),
        Dtype::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        Dtype::BF16 => each(bytes, out, |b| {
            f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)
        }),
        Dtype::F8_E4M3 => each(bytes, out, |[b]| e4m3(b)),
        // the upper half of an f16
        Dtype::F8_E5M2 => each(bytes, out, |[b]| half::f16::from_le_bytes([0, b]).to_f32()),
        Dtype::F16 => {
            // through a small aligned buffer, so that the conversion is vectorised whatever the alignment
            let mut buffer = [half::f16::ZERO; 1024];
            let blocks = bytes.chunks(2 * buffer.len());
            for (out, bytes) in out.chunks_mut(buffer.len()).zip(blocks) {
                let buffer = &mut buffer[..out.len()];
                for (half, b) in buffer.iter_mut().zip(bytes.as_chunks().0) {
                    *half = half::f16::from_le_bytes(*b);
                }
                buffer.convert_to_f32_slice(out);
            }
        }
        _ => out.fill(f32::NAN),
    }
}

fn each<const N: usize>(bytes: &[u8], out: &mut [f32], number: impl Fn([u8; N]) -> f32) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *out = number(*bytes);
    }
}

/// One sign bit, four exponent bits (bias 7), three mantissa bits; no infinities (Micikevicius et al., arXiv 2209.05433).
fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if bits & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_float_type_reads_unaligned() {
        let mut bytes = vec![0u8];
        bytes.extend(half::f16::from_f32(-1.5).to_le_bytes());
        bytes.extend(half::bf16::from_f32(3.0).to_le_bytes());
        bytes.extend(0.1f32.to_le_bytes());
        bytes.extend(0.1f64.to_le_bytes());
        let one = |dtype, bytes: &[u8]| {
            let mut out = vec![0.0; bytes.len() / width(dtype).unwrap_or(8)];
            to_f32(dtype, bytes, &mut out);
            out
        };
        assert_eq!(one(Dtype::F16, &bytes[1..3]), [-1.5]);
        assert_eq!(one(Dtype::BF16, &bytes[3..5]), [3.0]);
        assert_eq!(one(Dtype::F32, &bytes[5..9]), [0.1]);
        assert_eq!(one(Dtype::F64, &bytes[9..17]), [0.1]);
        assert!(is_readable(Dtype::BF16.into()) && !is_readable(Dtype::I64.into()));
        // from the paper's table: largest 448, smallest normal 2⁻⁶, smallest 2⁻⁹
        assert_eq!(
            one(Dtype::F8_E4M3, &[0x7e, 0x08, 0x81]),
            [448.0, 0.015625, -0.001953125]
        );
    }
}
