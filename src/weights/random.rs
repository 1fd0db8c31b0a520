//! Weights made up on the spot, for benchmarks of full-size networks without a file.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use sd_kernels::{Result, Source};

/// Any tensor that is asked for, with values that keep activations near one: uniform, of variance 1/inputs.
pub struct RandomSource;

/// Elements made by one generator.
const CHUNK: usize = 1 << 16;

impl Source for RandomSource {
    fn shape(&self, _name: &str, wanted: &[usize]) -> Option<Vec<usize>> {
        Some(wanted.to_vec())
    }

    fn read(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let count: usize = shape.iter().product();
        // vectors are norms and biases: scale one, shift zero
        if shape.len() < 2 {
            let value = if name.ends_with("weight") { 1.0 } else { 0.0 };
            return Ok(Tensor::full(value as f32, shape, device)?.to_dtype(dtype)?);
        }
        let inputs: usize = shape[1..].iter().product();
        let scale = (3.0 / inputs.max(1) as f32).sqrt();
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let mut values = vec![0f32; count];
        values
            .par_chunks_mut(CHUNK)
            .enumerate()
            .for_each(|(i, chunk)| {
                // xorshift64*: speed is what counts here
                let mut state = (seed ^ (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1;
                for value in chunk {
                    state ^= state >> 12;
                    state ^= state << 25;
                    state ^= state >> 27;
                    let bits = (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32;
                    *value = (bits / (1 << 23) as f32 - 1.0) * scale;
                }
            });
        Ok(Tensor::from_vec(values, shape, device)?.to_dtype(dtype)?)
    }
}
