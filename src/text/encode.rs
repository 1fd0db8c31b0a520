//! Prompt and negative prompt through the text tower, in one batch.

use candle_core::{DType, Tensor};

use super::ClipTokenizer;
use super::chunks::{Chunk, Tokenized, tokenize_pair};
use crate::error::Result;
use crate::pipeline::{Networks, Request};

/// What the UNet reads: text states of the prompt and of the negative prompt, of the same length.
pub struct Conditioning {
    /// Of the negative prompt, `[1, t, width]`.
    unconditional: Tensor,
    /// Of the prompt, `[1, t, width]`.
    conditional: Tensor,
    /// Notices: what was cut.
    pub warnings: Vec<String>,
}

impl Conditioning {
    /// The context of a batch: all unconditional states before all conditional ones, or only the latter without guidance.
    ///
    /// # Errors
    /// When the device has no memory.
    pub fn for_batch(&self, batch: usize, guided: bool) -> Result<Tensor> {
        let (_, t, width) = self.conditional.dims3()?;
        let repeat = |x: &Tensor| x.broadcast_as((batch, t, width))?.contiguous();
        Ok(if guided {
            Tensor::cat(&[repeat(&self.unconditional)?, repeat(&self.conditional)?], 0)?
        } else {
            repeat(&self.conditional)?
        })
    }
}

/// Encodes the texts of `request`.
///
/// # Errors
/// When a prompt uses what is not built, or the tower fails.
pub fn encode(
    networks: &Networks,
    tokenizer: &ClipTokenizer,
    request: &Request,
    clip_skip: usize,
) -> Result<Conditioning> {
    let positions = networks.text().config().positions;
    let [prompt, negative] = tokenize_pair(tokenizer, request, positions)?;
    let chunks: Vec<&Chunk> = negative.chunks.iter().chain(&prompt.chunks).collect();
    let ids: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.ids.iter().copied()).collect();
    let ids = Tensor::from_vec(ids, (chunks.len(), positions), networks.device())?;
    let states = networks
        .text()
        .forward(&ids.into(), clip_skip.saturating_sub(1))?
        .into_data()?; // [chunks, positions, width]
    let n = negative.chunks.len();
    let gather = |first: usize, tokenized: &Tokenized| -> Result<Tensor> {
        let parts = tokenized
            .chunks
            .iter()
            .enumerate()
            .map(|(i, chunk)| emphasise(&states.narrow(0, first + i, 1)?, chunk))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 1)?)
    };
    Ok(Conditioning {
        unconditional: gather(0, &negative)?,
        conditional: gather(n, &prompt)?,
        warnings: prompt.warnings.into_iter().chain(negative.warnings).collect(),
    })
}

/// A1111's "Original" emphasis: each token's state times its weight, then the whole chunk scaled so that its mean stays what it was.
fn emphasise(states: &Tensor, chunk: &Chunk) -> Result<Tensor> {
    if chunk.weights.iter().all(|&w| w == 1.0) {
        return Ok(states.clone());
    }
    let dtype = states.dtype();
    let x = states.to_dtype(DType::F32)?;
    let weights = Tensor::new(chunk.weights.as_slice(), x.device())?.reshape((1, (), 1))?;
    let weighted = x.broadcast_mul(&weights)?;
    let mean = |x: &Tensor| -> Result<f64> { Ok(x.to_dtype(DType::F64)?.mean_all()?.to_scalar::<f64>()?) };
    let (before, after) = (mean(&x)?, mean(&weighted)?);
    Ok((weighted * (before / after))?.to_dtype(dtype)?)
}
