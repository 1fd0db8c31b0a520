//! A text tower, loaded: token ids to states, and to a whole text's vector.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use sd_kernels::cpu::Level;
use sd_kernels::plan::{Feed, Options, Plan, Precision, Store};
use sd_kernels::{Graph, Weights};
use sd_models::clip::{self, TextEncoder};
use sd_models::t5::T5Encoder;

use super::coverage::{TEXT, named};
use crate::adapters::enlarge;
use crate::error::{Error, Result};
use crate::text::{Encoded, LongTower, Reading, Tower};

/// The table of tokens in a CLIP tower.
const TOKENS: &str = "embeddings.token_embedding.weight";

/// How a tower's parts are run.
pub(super) struct Runner {
    weights: Weights,
    device: Device,
    /// What the eager executor computes in; none where plans run the tower.
    eager: Option<DType>,
}

/// A CLIP tower on a device.
pub struct LoadedTower {
    encoder: TextEncoder,
    runner: Runner,
}

/// T5 on a device.
pub struct LoadedT5 {
    encoder: T5Encoder,
    runner: Runner,
}

impl Runner {
    pub(super) fn new(weights: Weights, device: &Device, eager: Option<DType>) -> Self {
        Self {
            weights,
            device: device.clone(),
            eager,
        }
    }

    /// Lets go of the weights.
    pub(super) fn release(&self) {
        self.weights.release();
    }

    /// Token ids `[rows, length]`.
    fn ids(&self, ids: &[u32], rows: usize, vocabulary: usize) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(Error::Numeric(format!(
                "token {id} is outside the vocabulary of {vocabulary}"
            )));
        }
        let length = ids.len() / rows.max(1);
        Ok(Tensor::from_slice(ids, (rows, length), &self.device)?)
    }

    /// Numbers in the type that the tower computes in.
    pub(super) fn convert(&self, input: &Tensor) -> Result<Tensor> {
        Ok(input.to_dtype(self.eager.unwrap_or(DType::F32))?)
    }

    /// Runs a part of the tower on one input.
    pub(super) fn run(
        &self,
        input: &Tensor,
        part: &dyn Fn(&sd_kernels::Tensor) -> sd_kernels::Result<sd_kernels::Tensor>,
    ) -> Result<Tensor> {
        if self.eager.is_some() {
            let out = part(&input.clone().into())?.into_data()?;
            return Ok(out.to_dtype(DType::F32)?);
        }
        let graph = Graph::new();
        let output = part(&graph.input("x", input.dims()))?;
        // the text is encoded once a prompt, and every later number depends on it: always in f32
        let options = Options {
            // each weight is read once: T5's alone would take 10 to 20 GB
            transient: true,
            ..Options::new(Level::current(), Precision::F32)
        };
        let mut plan = Plan::compile(&graph, &output, &options, &Store::default())?;
        let values = input.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let feed = Feed {
            name: "x",
            values: &values,
        };
        let mut out = Vec::new();
        plan.run(&[feed], &mut out)?;
        Ok(Tensor::from_vec(out, plan.output_shape(), &self.device)?)
    }
}

impl LoadedTower {
    pub(super) fn new(encoder: TextEncoder, runner: Runner) -> Self {
        Self { encoder, runner }
    }

    /// Rows of its table of tokens.
    pub fn vocabulary(&self) -> usize {
        self.encoder.config().vocabulary
    }

    /// Puts vectors, whole rows one behind the other, at the end of the tower's table of tokens.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub(super) fn learn(&mut self, vectors: Vec<f32>) -> Result<()> {
        let config = self.encoder.config();
        let (width, rows) = (config.width, vectors.len() / config.width.max(1));
        let config = clip::Config {
            vocabulary: config.vocabulary.saturating_add(rows),
            ..config.clone()
        };
        let inner = Arc::clone(self.runner.weights.source());
        let weights = self
            .runner
            .weights
            .over(enlarge(inner, TOKENS, (Arc::new(vectors), width)));
        self.encoder = TextEncoder::load(&weights, &config);
        let found = match self.runner.eager {
            Some(_) => weights.finish(),
            None => weights.check(),
        };
        named(TEXT, found)?;
        self.runner.weights = weights;
        Ok(())
    }
}

impl LoadedT5 {
    pub(super) fn new(encoder: T5Encoder, runner: Runner) -> Self {
        Self { encoder, runner }
    }

    /// Tokens of the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.encoder.config().vocabulary
    }
}

impl LongTower for LoadedT5 {
    fn states(&self, ids: &[u32]) -> Result<Tensor> {
        let ids = self.runner.ids(ids, 1, self.vocabulary())?;
        let states = self.runner.run(&ids, &|ids| self.encoder.forward(ids))?;
        self.runner.weights.release();
        Ok(states)
    }
}

impl Tower for LoadedTower {
    fn positions(&self) -> usize {
        self.encoder.config().positions
    }

    /// The weights are let go of at the end: between prompts they would only take room (0.5 GB in f32).
    fn states(&self, ids: &[u32], chunks: usize, reading: Reading<'_>) -> Result<Encoded> {
        let ids = self
            .runner
            .ids(ids, chunks, self.encoder.config().vocabulary)?;
        let Reading { skip, norm, pooled } = reading;
        let states = if norm {
            self.runner
                .run(&ids, &|ids| self.encoder.forward(ids, skip))?
        } else {
            self.runner
                .run(&ids, &|ids| self.encoder.hidden(ids, skip))?
        };
        let pooled = match pooled {
            [] => None,
            _ if norm => {
                return Err(Error::Numeric(
                    "a text's vector needs the states before the norm".to_owned(),
                ));
            }
            _ => Some(self.pool(&states, skip, pooled)?),
        };
        self.runner.weights.release();
        Ok(Encoded { states, pooled })
    }
}

impl LoadedTower {
    /// The vectors of the texts that end at `places` (chunk, position): `[places, projection]`.
    fn pool(&self, states: &Tensor, skip: usize, places: &[(usize, usize)]) -> Result<Tensor> {
        let chunks: Vec<Tensor> = places
            .iter()
            .map(|&(chunk, _)| states.narrow(0, chunk, 1))
            .collect::<candle_core::Result<_>>()?;
        let dtype = self.runner.eager.unwrap_or(DType::F32);
        let chunks = Tensor::cat(&chunks, 0)?.to_dtype(dtype)?;
        let finished = self
            .runner
            .run(&chunks, &|x| self.encoder.finish(x, skip))?;
        let ends: Vec<Tensor> = places
            .iter()
            .enumerate()
            .map(|(i, &(_, end))| finished.narrow(0, i, 1)?.narrow(1, end, 1))
            .collect::<candle_core::Result<_>>()?;
        let ends = Tensor::cat(&ends, 0)?.to_dtype(dtype)?; // [places, 1, width]
        Ok(self
            .runner
            .run(&ends, &|x| self.encoder.project(x))?
            .squeeze(1)?)
    }
}
