//! Prompt and negative prompt through the text tower, in one batch.

use candle_core::{DType, Tensor};

use super::ClipTokenizer;
use super::chunks::{Chunk, Chunking, Tokenized, emphasis_scale};
use super::prompt::Syntax;
use crate::error::Result;

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
            Tensor::cat(
                &[repeat(&self.unconditional)?, repeat(&self.conditional)?],
                0,
            )?
        } else {
            repeat(&self.conditional)?
        })
    }
}

/// A text encoder, whoever runs it.
pub trait Tower {
    /// Tokens of a chunk.
    fn positions(&self) -> usize;

    /// States in f32 of `chunks` chunks of [`Tower::positions`] ids each, behind all but the last `skip` layers and the final norm:
    /// `[chunks, positions, width]`.
    ///
    /// # Errors
    /// When an id is out of range or the executor fails.
    fn states(&self, ids: &[u32], chunks: usize, skip: usize) -> Result<Tensor>;
}

/// What is to be encoded.
#[derive(Debug, Clone, Copy)]
pub struct Texts<'a> {
    /// The prompt.
    pub prompt: &'a str,
    /// The negative prompt.
    pub negative: &'a str,
    /// The language of both.
    pub syntax: Syntax,
    /// A1111's numbering: 1 takes the tower's last layer.
    pub clip_skip: usize,
}

/// Encodes a prompt and its negative prompt.
///
/// # Errors
/// When a prompt uses what is not built, or the tower fails.
pub fn encode(
    tower: &dyn Tower,
    tokenizer: &ClipTokenizer,
    texts: Texts<'_>,
) -> Result<Conditioning> {
    let positions = tower.positions();
    let chunking = Chunking {
        syntax: texts.syntax,
        length: positions,
    };
    let [prompt, negative] = chunking.tokenize_pair(tokenizer, texts.prompt, texts.negative)?;
    let chunks: Vec<&Chunk> = negative.chunks.iter().chain(&prompt.chunks).collect();
    let ids: Vec<u32> = chunks
        .iter()
        .flat_map(|chunk| chunk.ids.iter().copied())
        .collect();
    let states = tower.states(&ids, chunks.len(), texts.clip_skip.saturating_sub(1))?;
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
        warnings: prompt
            .warnings
            .into_iter()
            .chain(negative.warnings)
            .collect(),
    })
}

/// A1111's "Original" emphasis: each token's state times its weight, then the whole chunk scaled so that its mean stays what it was.
fn emphasise(states: &Tensor, chunk: &Chunk) -> Result<Tensor> {
    if !chunk.is_weighted() {
        return Ok(states.clone());
    }
    let dtype = states.dtype();
    let x = states.to_dtype(DType::F32)?;
    let weights = Tensor::new(chunk.weights.as_slice(), x.device())?.reshape((1, (), 1))?;
    let weighted = x.broadcast_mul(&weights)?;
    let mean =
        |x: &Tensor| -> Result<f64> { Ok(x.to_dtype(DType::F64)?.mean_all()?.to_scalar::<f64>()?) };
    let scale = emphasis_scale(mean(&x)?, mean(&weighted)?)?;
    Ok((weighted * scale)?.to_dtype(dtype)?)
}
