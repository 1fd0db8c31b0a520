//! Prompt and negative prompt through the text towers, in one batch.

use candle_core::{DType, Tensor};

use super::ClipTokenizer;
use super::chunks::{Chunk, Chunking, Tokenized, emphasis_scale};
use super::prompt::{Role, Syntax};
use super::t5::T5Tokenizer;
use crate::error::{Error, Result};
use crate::spec::TowerRole;

/// What the UNet reads: the prompt and the negative prompt, of the same length.
pub struct Conditioning {
    /// The negative prompt.
    unconditional: Encoded,
    /// The prompt.
    conditional: Encoded,
    /// Notices: what was cut.
    pub warnings: Vec<String>,
}

/// A text as networks read it.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// States of all towers side by side, f32: `[1, t, width]`.
    pub states: Tensor,
    /// The whole text's vector, from its first chunk, f32: `[1, projection]`; where a tower gives one.
    pub pooled: Option<Tensor>,
}

impl Conditioning {
    /// The negative prompt.
    pub fn negative(&self) -> &Encoded {
        &self.unconditional
    }

    /// The prompt.
    pub fn prompt(&self) -> &Encoded {
        &self.conditional
    }
}

/// How the states of a tower are taken.
#[derive(Debug, Clone, Copy)]
pub struct Reading<'a> {
    /// Layers that are left out.
    pub skip: usize,
    /// Whether the states pass through the final norm.
    pub norm: bool,
    /// The chunks whose text's vector is wanted, with the place of the end token in each.
    pub pooled: &'a [(usize, usize)],
}

/// A text encoder, whoever runs it.
pub trait Tower {
    /// Tokens of a chunk.
    fn positions(&self) -> usize;

    /// States of `chunks` chunks of [`Tower::positions`] ids each, `[chunks, positions, width]`, and the vectors that the reading asks for,
    /// `[wanted, projection]`; in f32.
    ///
    /// # Errors
    /// When an id is out of range or the executor fails.
    fn states(&self, ids: &[u32], chunks: usize, reading: Reading<'_>) -> Result<Encoded>;
}

/// A tower with the tokenizer that goes with it.
#[derive(Clone, Copy)]
pub struct Speaker<'a> {
    /// Who encodes.
    pub tower: &'a dyn Tower,
    /// Who cuts text into tokens.
    pub tokenizer: &'a ClipTokenizer,
    /// What the family does with the tower.
    pub role: TowerRole,
}

/// T5, whoever runs it.
pub trait LongTower {
    /// States of one text's `ids`, `[1, ids, width]`, in f32.
    ///
    /// # Errors
    /// When an id is out of range or the executor fails.
    fn states(&self, ids: &[u32]) -> Result<Tensor>;
}

/// T5 with the tokenizer that goes with it.
#[derive(Clone, Copy)]
pub struct LongSpeaker<'a> {
    /// Who encodes.
    pub tower: &'a dyn LongTower,
    /// Who cuts text into tokens.
    pub tokenizer: &'a T5Tokenizer,
    /// Tokens that a text is filled up to, and cut at.
    pub length: usize,
}

/// What stands behind the states of the CLIP towers.
#[derive(Clone, Copy)]
pub enum Behind<'a> {
    /// Nothing.
    Nothing,
    /// T5's states, to whose width CLIP's are filled up with zeros.
    T5(LongSpeaker<'a>),
    /// As many zeros `(tokens, width)` in the place of a T5 that is not there.
    Zeros(usize, usize),
}

/// Everybody who reads a model's texts.
pub struct Readers<'a> {
    /// CLIP towers, in the family's order.
    pub towers: Vec<Speaker<'a>>,
    /// T5.
    pub behind: Behind<'a>,
}

/// What is to be encoded.
#[derive(Debug, Clone, Copy)]
pub struct Texts<'a> {
    /// The prompt.
    pub prompt: &'a str,
    /// The negative prompt; none for zeros in its place.
    pub negative: Option<&'a str>,
    /// The language of both.
    pub syntax: Syntax,
    /// A1111's numbering: 1 takes the family's own layer.
    pub clip_skip: usize,
}

/// Encodes a prompt and its negative prompt by every tower.
///
/// # Errors
/// When a prompt uses what is not built, or a tower fails.
pub fn encode(readers: &Readers<'_>, texts: Texts<'_>) -> Result<Conditioning> {
    let mut warnings: Vec<String> = Vec::new();
    let mut parts: [Vec<(TowerRole, Encoded)>; 2] = [Vec::new(), Vec::new()];
    for speaker in &readers.towers {
        let (both, noticed) = encode_by(speaker, texts)?;
        for (parts, encoded) in parts.iter_mut().zip(both) {
            parts.push((speaker.role, encoded));
        }
        // towers with one vocabulary cut the same text
        for warning in noticed {
            if !warnings.contains(&warning) {
                warnings.push(warning);
            }
        }
    }
    let behind = long(readers, texts)?;
    for warning in behind.warnings {
        // both towers cut the same text: T5, which holds more of it, tells what is lost to all
        warnings.clear();
        warnings.push(warning);
    }
    let [negative, positive] = parts;
    Ok(Conditioning {
        unconditional: assemble(&negative, behind.states.as_ref().map(|both| &both[0]))?,
        conditional: assemble(&positive, behind.states.as_ref().map(|both| &both[1]))?,
        warnings,
    })
}

/// The long tower's states of the negative prompt and of the prompt, and what was cut.
struct Long {
    states: Option<[Tensor; 2]>,
    warnings: Vec<String>,
}

fn long(readers: &Readers<'_>, texts: Texts<'_>) -> Result<Long> {
    let speaker = match readers.behind {
        Behind::Nothing => {
            return Ok(Long {
                states: None,
                warnings: Vec::new(),
            });
        }
        Behind::Zeros(tokens, width) => {
            let zeros = Tensor::zeros((1, tokens, width), DType::F32, &candle_core::Device::Cpu)?;
            return Ok(Long {
                states: Some([zeros.clone(), zeros]),
                warnings: Vec::new(),
            });
        }
        Behind::T5(speaker) => speaker,
    };
    let LongSpeaker {
        tower,
        tokenizer,
        length,
    } = speaker;
    let mut warnings = Vec::new();
    let mut of = |text: &str, role: Role| -> Result<Tensor> {
        // learned words are CLIP's
        let text = match readers.towers.first() {
            Some(clip) => &clip.tokenizer.without_named(text),
            None => text,
        };
        let tokens = tokenizer.tokenize(text, (texts.syntax, role), length)?;
        warnings.extend(tokens.warning);
        emphasise(&tower.states(&tokens.chunk.ids)?, &tokens.chunk)
    };
    let positive = of(texts.prompt, Role::Prompt)?;
    let negative = match texts.negative {
        Some(text) => of(text, Role::Negative)?,
        None => positive.zeros_like()?,
    };
    Ok(Long {
        states: Some([negative, positive]),
        warnings,
    })
}

/// States side by side, filled up with zeros to the width of those behind them; whole texts' vectors side by side.
fn assemble(parts: &[(TowerRole, Encoded)], behind: Option<&Tensor>) -> Result<Encoded> {
    let beside: Vec<&Tensor> = parts
        .iter()
        .filter(|(role, _)| role.states)
        .map(|(_, part)| &part.states)
        .collect();
    let beside = match beside.as_slice() {
        [] => None,
        some => Some(Tensor::cat(some, 2)?),
    };
    let states = match (beside, behind) {
        (Some(beside), None) => beside,
        (None, Some(behind)) => behind.clone(),
        (Some(beside), Some(behind)) => {
            let behind = behind.to_device(beside.device())?;
            let more = behind.dim(2)?.saturating_sub(beside.dim(2)?);
            Tensor::cat(&[beside.pad_with_zeros(2, 0, more)?, behind], 1)?
        }
        (None, None) => {
            return Err(Error::Numeric("the model has no text encoder".to_owned()));
        }
    };
    let pooled: Vec<&Tensor> = parts
        .iter()
        .filter(|(role, _)| role.pooled)
        .filter_map(|(_, part)| part.pooled.as_ref())
        .collect();
    Ok(Encoded {
        states,
        pooled: match pooled.as_slice() {
            [] => None,
            some => Some(Tensor::cat(some, 1)?),
        },
    })
}

/// The negative prompt and the prompt by one tower, and what was cut.
fn encode_by(speaker: &Speaker<'_>, texts: Texts<'_>) -> Result<([Encoded; 2], Vec<String>)> {
    let Speaker {
        tower,
        tokenizer,
        role,
    } = *speaker;
    let chunking = Chunking {
        syntax: texts.syntax,
        length: tower.positions(),
    };
    let tokenized = match texts.negative {
        Some(negative) => {
            let [prompt, negative] = chunking.tokenize_pair(tokenizer, texts.prompt, negative)?;
            vec![negative, prompt]
        }
        None => vec![chunking.tokenize(tokenizer, texts.prompt, Role::Prompt)?],
    };
    let chunks: Vec<&Chunk> = tokenized.iter().flat_map(|text| &text.chunks).collect();
    let ids: Vec<u32> = chunks
        .iter()
        .flat_map(|chunk| chunk.ids.iter().copied())
        .collect();
    let firsts: Vec<usize> = tokenized
        .iter()
        .scan(0, |next, text| {
            let first = *next;
            *next += text.chunks.len();
            Some(first)
        })
        .collect();
    let ends: Vec<(usize, usize)> = firsts
        .iter()
        .map(|&first| {
            let chunk = chunks[first];
            // transformers' reading of such a config: the largest id, which with learned words is not the end
            let end = match texts.syntax {
                Syntax::Plain if tokenizer.ends_at_largest() => chunk.largest(),
                _ => chunk.end(tokenizer.eos()),
            };
            (first, end)
        })
        .collect();
    let reading = Reading {
        skip: texts.clip_skip.saturating_sub(1).max(role.skip),
        norm: role.norm,
        pooled: if role.pooled { &ends } else { &[] },
    };
    let all = tower.states(&ids, chunks.len(), reading)?;
    let mut encoded = Vec::with_capacity(2);
    for (i, (text, &first)) in tokenized.iter().zip(&firsts).enumerate() {
        encoded.push(Encoded {
            states: gather(&all.states, first, text)?,
            pooled: match &all.pooled {
                Some(pooled) => Some(pooled.narrow(0, i, 1)?),
                None => None,
            },
        });
    }
    let positive = encoded
        .pop()
        .ok_or_else(|| Error::Numeric("the prompt was not encoded".to_owned()))?;
    let negative = match encoded.pop() {
        Some(negative) => negative,
        None => positive.zeros()?,
    };
    let warnings = tokenized.into_iter().rev().flat_map(|text| text.warnings);
    Ok(([negative, positive], warnings.collect()))
}

impl Encoded {
    /// Zeros of the same sizes.
    fn zeros(&self) -> Result<Self> {
        Ok(Self {
            states: self.states.zeros_like()?,
            pooled: match &self.pooled {
                Some(pooled) => Some(pooled.zeros_like()?),
                None => None,
            },
        })
    }
}

/// The chunks of a text, from chunk `first` on, behind each other.
fn gather(states: &Tensor, first: usize, text: &Tokenized) -> Result<Tensor> {
    let parts = text
        .chunks
        .iter()
        .enumerate()
        .map(|(i, chunk)| emphasise(&states.narrow(0, first + i, 1)?, chunk))
        .collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, 1)?)
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
