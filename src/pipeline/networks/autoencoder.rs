//! The autoencoder: latents to pictures, and pictures to the distribution of their latents.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use sd_kernels::cpu::Level;
use sd_kernels::plan::{Feed, Options, Plan, Store};
use sd_kernels::{Graph, Source, Weights};
use sd_models::vae::{self, Encoder};

use super::super::coverage::{ENCODER, named};
use super::super::tiling::{Surface, Watch};
use super::{Networks, precision};
use crate::error::{Error, Result};

/// What pictures are encoded with, which few runs need: its weights are asked for then.
pub(super) struct EncoderParts {
    pub(super) config: vae::Config,
    pub(super) source: Arc<dyn Source>,
}

/// The distribution of a picture's latents, before they are scaled.
#[derive(Debug, Clone)]
pub struct Posterior {
    mean: Tensor,
    deviation: Tensor,
}

impl Posterior {
    /// Of `[b, 2 · c, h, w]`: means, and logarithms of variances.
    pub(super) fn new(moments: &Tensor) -> Result<Self> {
        let half = moments.dim(1)? / 2;
        let logarithm = moments.narrow(1, half, half)?.clamp(-30f64, 20f64)?;
        Ok(Self {
            mean: moments.narrow(1, 0, half)?.contiguous()?,
            deviation: (logarithm * 0.5)?.exp()?,
        })
    }

    /// The most probable latents `[b, c, h, w]`.
    pub fn mode(&self) -> Tensor {
        self.mean.clone()
    }

    /// A sample for each of the draws `[n, c, h, w]` of standard normal numbers.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor> {
        let spread = noise.broadcast_mul(&self.deviation)?;
        Ok(spread.broadcast_add(&self.mean)?)
    }

    pub(super) fn is_finite(&self) -> Result<bool> {
        let sum = |x: &Tensor| x.abs()?.sum_all()?.to_scalar::<f32>();
        Ok(sum(&self.mean)?.is_finite() && sum(&self.deviation)?.is_finite())
    }
}

impl Networks {
    /// Latents `[b, c, h, w]` → pictures `[b, 3, H, W]`, computed in `dtype`.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub fn decode(&self, latents: &Tensor, dtype: DType) -> Result<Tensor> {
        let (b, _, h, w) = latents.dims4()?;
        let shape = latents.shape();
        let latents = latents.to_dtype(DType::F32)?.flatten_all()?;
        let mut values = latents.to_vec1::<f32>()?;
        self.vae.prepare(&mut values, h * w);
        if let Some(planned) = &self.planned {
            let (graph, output) = self.record_vae((w, h), b)?;
            let options = vae_options(dtype);
            let mut plan = Plan::compile(&graph, &output, &options, &planned.vae)?;
            let mut picture = Vec::new();
            plan.run(
                &[Feed {
                    name: "latents",
                    values: &values,
                }],
                &mut picture,
            )?;
            return Ok(Tensor::from_vec(
                picture,
                plan.output_shape(),
                &self.device,
            )?);
        }
        let latents = Tensor::from_vec(values, shape, &self.device)?.to_dtype(dtype)?;
        if dtype == self.dtype {
            return Ok(self.vae.forward(&latents.into())?.into_data()?);
        }
        let weights = Weights::new(Arc::clone(&self.vae_source), dtype, &self.device);
        let decoder = self.vae.reload(&weights);
        Ok(decoder.forward(&latents.into())?.into_data()?)
    }

    /// What pictures `[b, 3, H, W]` in [−1, 1] are in the autoencoder's latents, before they are scaled; computed in `dtype`.
    ///
    /// # Errors
    /// [`Error::Weights`] when the encoder is not whole; when the shapes do not fit or the executor fails.
    pub fn encode(&self, pictures: &Tensor, dtype: DType) -> Result<Posterior> {
        Posterior::new(&self.moments(pictures, dtype)?)
    }

    /// Means of the latents, and logarithms of their variances.
    pub(super) fn moments(&self, pictures: &Tensor, dtype: DType) -> Result<Tensor> {
        let EncoderParts { config, source } = &self.encoder;
        let weights = Weights::new(Arc::clone(source), dtype, &self.device);
        let encoder = Encoder::load(&weights, config);
        if self.planned.is_some() {
            named(ENCODER, weights.check())?;
            let graph = Graph::new();
            let output = encoder.moments(&graph.input("pictures", pictures.dims()))?;
            let mut plan = Plan::compile(&graph, &output, &vae_options(dtype), &Store::default())?;
            let values = pictures
                .to_dtype(DType::F32)?
                .flatten_all()?
                .to_vec1::<f32>()?;
            let feed = Feed {
                name: "pictures",
                values: &values,
            };
            let mut moments = Vec::new();
            plan.run(&[feed], &mut moments)?;
            Ok(Tensor::from_vec(
                moments,
                plan.output_shape(),
                &self.device,
            )?)
        } else {
            named(ENCODER, weights.finish())?;
            let pictures = pictures.to_dtype(dtype)?;
            let moments = encoder.moments(&pictures.into())?.into_data()?;
            Ok(moments.to_dtype(DType::F32)?)
        }
    }

    /// The same in the run's type, or in f32 where that leaves the numbers.
    ///
    /// # Errors
    /// As [`Networks::encode`], and [`Error::Numeric`] when the result is not finite even then.
    pub fn encode_safely(
        &self,
        pictures: &Tensor,
        surface: &Surface,
        watch: &mut Watch<'_>,
    ) -> Result<Posterior> {
        let posterior = self.encode_as(pictures, self.dtype, surface, watch)?;
        if posterior.is_finite()? {
            return Ok(posterior);
        }
        let posterior = self.encode_as(pictures, DType::F32, surface, watch)?;
        if posterior.is_finite()? {
            return Ok(posterior);
        }
        Err(Error::Numeric(
            "the picture's latents are not numbers, even in f32; the checkpoint's autoencoder may be damaged".to_owned(),
        ))
    }

    /// The UNet's latents for those of the encoder.
    ///
    /// # Errors
    /// When the device has no memory.
    pub fn scale_latents(&self, latents: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = latents.dims4()?;
        let mut values: Vec<f32> = latents.flatten_all()?.to_vec1()?;
        self.encoder.config.normalise(&mut values, h * w);
        Ok(Tensor::from_vec(values, latents.shape(), &self.device)?)
    }

    /// The autoencoder's structure, which has the scaling of latents.
    pub fn autoencoder(&self) -> &vae::Config {
        &self.encoder.config
    }

    /// Decoding `batch` pictures, recorded, for latents of `w × h`.
    ///
    /// # Errors
    /// When the network cannot take the size.
    pub fn record_vae(
        &self,
        (w, h): (usize, usize),
        batch: usize,
    ) -> Result<(Graph, sd_kernels::Tensor)> {
        let graph = Graph::new();
        let channels = self.vae.latent_channels();
        let output = self
            .vae
            .forward(&graph.input("latents", &[batch, channels, h, w]))?;
        Ok((graph, output))
    }
}

/// How plans of the decoder are made: one picture after another reads every weight once each, and to pack them again costs less than the memory
/// to keep them.
pub(super) fn vae_options(dtype: DType) -> Options {
    Options {
        transient: true,
        ..Options::new(Level::current(), precision(dtype))
    }
}
