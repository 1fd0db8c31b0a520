//! Weights made up on the spot, for benchmarks of full-size networks without a file.

use candle_core::DType;
use sd_kernels::{Reader, Result, Source};

/// Any tensor that is asked for, with values that keep activations near one: uniform, of variance 1/inputs.
pub struct RandomSource;

impl Source for RandomSource {
    fn shape(&self, _name: &str, wanted: &[usize]) -> Option<Vec<usize>> {
        Some(wanted.to_vec())
    }

    fn dtype(&self, _name: &str) -> DType {
        DType::F32
    }

    fn open(&self, name: &str, shape: &[usize]) -> Result<Box<dyn Reader + '_>> {
        // vectors are norms and biases: scale one, shift zero
        if shape.len() < 2 {
            let value = if name.ends_with("weight") { 1.0 } else { 0.0 };
            return Ok(Box::new(Constant(value)));
        }
        let inputs: usize = shape[1..].iter().product();
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let scale = (3.0 / inputs.max(1) as f32).sqrt();
        Ok(Box::new(Uniform { seed, scale }))
    }
}

struct Constant(f32);

impl Reader for Constant {
    fn read(&self, _first: usize, out: &mut [f32]) {
        out.fill(self.0);
    }
}

/// Number `i` is a hash of `i` (splitmix64: Steele, Lea & Flood 2014), whatever was read before.
struct Uniform {
    seed: u64,
    scale: f32,
}

impl Reader for Uniform {
    fn read(&self, first: usize, out: &mut [f32]) {
        for (i, out) in (first as u64..).zip(out) {
            let mut bits = self
                .seed
                .wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            *out = ((bits >> 40) as f32 / (1 << 23) as f32 - 1.0) * self.scale;
        }
    }
}
