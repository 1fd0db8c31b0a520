//! The three networks of a model, loaded and ready.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use sd_kernels::{Graph, Source, Weights};
use sd_models::clip::{self, TextEncoder};
use sd_models::unet::{self, UNet};
use sd_models::vae::{self, Decoder};

use super::coverage::{Coverage, TEXT, UNET, VAE, named, source};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::spec::ModelSpec;
use crate::weights::RandomSource;

/// Text encoder, UNet and picture decoder on a device.
pub struct Networks {
    text: TextEncoder,
    unet: UNet,
    vae: Decoder,
    text_weights: Weights,
    vae_source: Arc<dyn Source>,
    device: Device,
    dtype: DType,
    weight_bytes: u64,
}

/// The sources of the three networks' weights.
struct Sources {
    text: Arc<dyn Source>,
    unet: Arc<dyn Source>,
    vae: Arc<dyn Source>,
}

impl Networks {
    /// Reads the networks of a checkpoint, from which `spec` was read; with them comes what its other tensors are.
    ///
    /// # Errors
    /// [`Error::BadModel`] that names missing or misshapen tensors, before any is read; whatever reading one gives.
    pub fn load(
        checkpoint: &Checkpoint,
        spec: &ModelSpec,
        device: &Device,
        dtype: DType,
    ) -> Result<(Self, Coverage)> {
        let coverage = Coverage::of(checkpoint, spec);
        coverage.check(checkpoint)?;
        let sources = Sources {
            text: source(&spec.text),
            unet: source(&spec.unet),
            vae: source(&spec.vae),
        };
        let configs = (&spec.text.config, &spec.unet.config, &spec.vae.config);
        let networks = Self::build(configs, sources, device, dtype).map_err(|e| match e {
            Error::Weights(reason) => Error::bad_model(checkpoint.path(), reason),
            other => other,
        })?;
        Ok((networks, coverage))
    }

    /// Networks of these structures with made-up weights.
    ///
    /// # Errors
    /// When the machine has no memory for them.
    pub fn random(
        configs: (&clip::Config, &unet::Config, &vae::Config),
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let source = || Arc::new(RandomSource) as Arc<dyn Source>;
        let sources = Sources {
            text: source(),
            unet: source(),
            vae: source(),
        };
        Self::build(configs, sources, device, dtype)
    }

    fn build(
        (text, unet, vae): (&clip::Config, &unet::Config, &vae::Config),
        sources: Sources,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let weights = |source: &Arc<dyn Source>| Weights::new(Arc::clone(source), dtype, device);
        let (text_weights, unet_weights, vae_weights) = (
            weights(&sources.text),
            weights(&sources.unet),
            weights(&sources.vae),
        );
        let networks = Self {
            text: TextEncoder::load(&text_weights, text),
            unet: UNet::load(&unet_weights, unet),
            vae: Decoder::load(&vae_weights, vae),
            text_weights: text_weights.clone(),
            vae_source: sources.vae,
            device: device.clone(),
            dtype,
            weight_bytes: text_weights.bytes() + unet_weights.bytes() + vae_weights.bytes(),
        };
        for (name, weights) in [
            (TEXT, text_weights),
            (UNET, unet_weights),
            (VAE, vae_weights),
        ] {
            named(name, weights.finish())?;
        }
        Ok(networks)
    }

    /// The text encoder.
    pub fn text(&self) -> &TextEncoder {
        &self.text
    }

    /// Frees the text encoder's weights; encoding again reads them again. Between prompts they only take room (0.5 GB in f32).
    pub fn release_text(&self) {
        self.text_weights.release();
    }

    /// The denoising network.
    pub fn unet(&self) -> &UNet {
        &self.unet
    }

    /// Channels of the latents that the decoder takes.
    pub fn vae_latent_channels(&self) -> usize {
        self.vae.config().latent_channels
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The compute type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of all weights as held.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// The UNet's prediction in f32 for `sample [b, c, h, w]` in f32.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub fn predict(&self, sample: &Tensor, timestep: f64, context: &Tensor) -> Result<Tensor> {
        let batch = sample.dim(0)?;
        let timestep = Tensor::full(timestep as f32, batch, &self.device)?;
        let sample = sample.to_dtype(self.dtype)?;
        let out = self
            .unet
            .forward(&sample.into(), &timestep.into(), &context.clone().into())?
            .into_data()?;
        Ok(out.to_dtype(DType::F32)?)
    }

    /// Latents `[b, c, h, w]` → pictures `[b, 3, H, W]`, computed in `dtype`.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub fn decode(&self, latents: &Tensor, dtype: DType) -> Result<Tensor> {
        if dtype == self.dtype {
            return Ok(self
                .vae
                .forward(&latents.to_dtype(dtype)?.into())?
                .into_data()?);
        }
        let weights = Weights::new(Arc::clone(&self.vae_source), dtype, &self.device);
        let decoder = Decoder::load(&weights, self.vae.config());
        Ok(decoder
            .forward(&latents.to_dtype(dtype)?.into())?
            .into_data()?)
    }

    /// One call of the UNet, recorded, for latents of `w × h`: what it costs and what it holds.
    ///
    /// # Errors
    /// When the network cannot take the size.
    pub fn record_unet(&self, (w, h): (usize, usize), batch: usize) -> Result<Graph> {
        let graph = Graph::new();
        let config = self.unet.config();
        let sample = graph.input("sample", &[batch, config.in_channels, h, w]);
        let timestep = graph.input("timestep", &[batch]);
        let tokens = self.text.config().positions;
        let context = graph.input("context", &[batch, tokens, config.context_width()]);
        self.unet.forward(&sample, &timestep, &context)?;
        Ok(graph)
    }

    /// Decoding `batch` pictures, recorded, for latents of `w × h`.
    ///
    /// # Errors
    /// When the network cannot take the size.
    pub fn record_vae(&self, (w, h): (usize, usize), batch: usize) -> Result<Graph> {
        let graph = Graph::new();
        let channels = self.vae.config().latent_channels;
        self.vae
            .forward(&graph.input("latents", &[batch, channels, h, w]))?;
        Ok(graph)
    }
}
