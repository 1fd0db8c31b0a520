//! Time, text and guidance as one vector (diffusers 0.42.1 `CombinedTimestepTextProjEmbeddings`, `CombinedTimestepGuidanceTextProjEmbeddings`).

use sd_kernels::ops::{self, apply};
use sd_kernels::{Activation, Error, Op, Result, Tensor, Weights};

use super::{Embedding, given};

/// Width of the sinusoids of time and guidance.
pub const SINUSOIDS: usize = 256;

/// Numbers `[n]` as `[n, 256]`, cosines first.
///
/// # Errors
/// When the executor fails.
pub fn sinusoids(numbers: &Tensor) -> Result<Tensor> {
    let sinusoid = Op::Sinusoid {
        width: SINUSOIDS,
        flip_sin_to_cos: true,
        freq_shift: 0.0,
    };
    apply(sinusoid, &[numbers])
}

/// What makes the vector.
pub struct TimeTextEmbedding {
    time: Embedding,
    text: Embedding,
    guidance: Option<Embedding>,
}

impl TimeTextEmbedding {
    /// Reads `timestep_embedder`, `text_embedder` (of texts `pooled` wide) and, where the network is told its guidance, `guidance_embedder`.
    pub fn load(weights: &Weights, (pooled, width): (usize, usize), guided: bool) -> Self {
        let embedding =
            |name, input| Embedding::load(&weights.at(name), (input, width), Activation::Silu);
        Self {
            time: embedding("timestep_embedder", SINUSOIDS),
            text: embedding("text_embedder", pooled),
            guidance: guided.then(|| embedding("guidance_embedder", SINUSOIDS)),
        }
    }

    /// Timesteps `[b]`, 0 to 1000, whole texts' vectors `[b, pooled]` and the sinusoids of guidances `[b, 256]` as one vector `[b, width]`, activated
    /// as every block reads it.
    ///
    /// # Errors
    /// When an input is missing or the executor fails.
    pub fn forward(
        &self,
        timestep: &Tensor,
        pooled: Option<&Tensor>,
        guidance: Option<&Tensor>,
    ) -> Result<Tensor> {
        let missing = |op, wanted| Error::Shape {
            op,
            expected: given(wanted).to_owned(),
            got: given(!wanted).to_owned(),
        };
        let pooled = pooled.ok_or_else(|| missing("text_embedder", true))?;
        let time = self.time.forward(&sinusoids(timestep)?)?; // [b, width]
        let time = match (&self.guidance, guidance) {
            (None, None) => time,
            (Some(embedding), Some(guidance)) => ops::add(&time, &embedding.forward(guidance)?)?,
            (embedding, _) => return Err(missing("guidance_embedder", embedding.is_some())),
        };
        let temb = ops::add(&time, &self.text.forward(pooled)?)?;
        ops::activate(&temb, Activation::Silu)
    }
}
