//! Pictures beside the prompt: IP-Adapters with the picture towers that they read.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use sd_kernels::{Source, Weights};
use sd_models::clip::VisionEncoder;
use sd_models::image_projection::ImageProjection;
use sd_models::unet::{self, ImageLayers, ImagePrompt};

use super::coverage::{named, source};
use super::tower::Runner;
use crate::control::clip_pixels;
use crate::error::{Error, Result};
use crate::picture::Picture;
use crate::spec::ImagePromptSpec;
use crate::weights::{CheckpointSource, below};

/// A picture for one IP-Adapter of an engine; the n-th belongs to the n-th.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageRequest {
    /// The picture.
    pub picture: Picture,
    /// How much it has to say; 1 is what the adapter was trained for.
    pub scale: f64,
}

/// An IP-Adapter, loaded.
pub(super) struct LoadedImagePrompt {
    encoder: VisionEncoder,
    projection: ImageProjection,
    encoder_runner: Runner,
    projection_runner: Runner,
    reads_vector: bool,
    layers: ImageLayers,
    layer_weights: Weights,
}

/// A picture's tokens, for the negative prompt and for the prompt: `[1, t, width]`, f32.
#[derive(Debug, Clone)]
pub(super) struct ImageTokens {
    pub(super) index: usize,
    pub(super) scale: f64,
    pub(super) negative: Tensor,
    pub(super) positive: Tensor,
}

/// A batch's tokens of one adapter.
#[derive(Debug, Clone)]
pub(super) struct ActingImage {
    pub(super) index: usize,
    pub(super) scale: f64,
    /// `[b, t, width]`, f32.
    pub(super) tokens: Tensor,
}

/// The name of the input of a plan that tokens are.
pub(super) fn image_input(index: usize) -> Cow<'static, str> {
    Cow::from(format!("image {index}"))
}

impl LoadedImagePrompt {
    /// Builds an adapter over a model's UNet.
    ///
    /// # Errors
    /// [`Error::Weights`] that lists what is missing; [`Error::Usage`] when it was made for another family.
    pub(super) fn load(
        spec: &ImagePromptSpec,
        index: usize,
        unet: &unet::Config,
        (device, dtype, eager): (&Device, DType, Option<DType>),
    ) -> Result<Self> {
        let config = &spec.projection.config;
        if config.output() != unet.context_width() {
            return Err(Error::Usage(format!(
                "the IP-Adapter makes tokens of {} numbers, and the model reads text {} wide; give one that was made for this family",
                config.output(),
                unet.context_width()
            )));
        }
        let weights =
            |source: Arc<dyn Source>| Weights::new(source, eager.unwrap_or(DType::F32), device);
        let encoder_weights = weights(source(&spec.encoder));
        let encoder = VisionEncoder::load(
            &encoder_weights,
            &spec.encoder.config,
            config.reads_vector(),
        );
        named("image encoder", encoder_weights.check())?;
        let projection_weights = weights(source(&spec.projection));
        let projection = ImageProjection::load(&projection_weights, config);
        named("IP-Adapter", projection_weights.check())?;
        let tensors = Arc::clone(&spec.projection.tensors);
        let layer_source = Arc::new(CheckpointSource::new(tensors, spec.layers.clone()));
        let layer_weights = below(&image_input(index), layer_source, dtype, device);
        let layers = ImageLayers::load(&layer_weights, unet);
        named("IP-Adapter", layer_weights.check())?;
        if eager.is_some() {
            layer_weights.finish()?;
        }
        Ok(Self {
            encoder,
            projection,
            encoder_runner: Runner::new(encoder_weights, device, eager),
            projection_runner: Runner::new(projection_weights, device, eager),
            reads_vector: config.reads_vector(),
            layers,
            layer_weights,
        })
    }

    /// Bytes of the layers in the UNet; the tower's weights are let go of.
    pub(super) fn bytes(&self) -> u64 {
        self.layer_weights.bytes()
    }

    /// Tokens of a request, as diffusers makes them: without the prompt, those of no vector, or of a picture of zeros.
    ///
    /// # Errors
    /// When the executor fails.
    pub(super) fn encode(
        &self,
        index: usize,
        request: &ImageRequest,
        device: &Device,
    ) -> Result<ImageTokens> {
        let size = self.encoder.config().size;
        let pixels = clip_pixels(&request.picture, size)?;
        let pixels = Tensor::from_vec(pixels, (1, 3, size, size), device)?;
        let see = |pixels: &Tensor| {
            let pixels = self.encoder_runner.convert(pixels)?;
            self.encoder_runner
                .run(&pixels, &|x| self.encoder.forward(x))
        };
        let seen = see(&pixels)?;
        let nothing = match self.reads_vector {
            true => seen.zeros_like()?,
            false => see(&pixels.zeros_like()?)?,
        };
        let tokens = |x: &Tensor| {
            let x = self.projection_runner.convert(x)?;
            self.projection_runner
                .run(&x, &|x| self.projection.forward(x))
        };
        let (negative, positive) = (tokens(&nothing)?, tokens(&seen)?);
        self.encoder_runner.release();
        self.projection_runner.release();
        Ok(ImageTokens {
            index,
            scale: request.scale,
            negative,
            positive,
        })
    }
}

impl ImageTokens {
    /// For `n` pictures with each of some texts, of which some say what is to be seen.
    ///
    /// # Errors
    /// When the device has no memory.
    pub(super) fn for_texts(&self, n: usize, positive: &[bool]) -> Result<ActingImage> {
        let rows = positive.iter().flat_map(|&positive| match positive {
            true => vec![&self.positive; n],
            false => vec![&self.negative; n],
        });
        Ok(ActingImage {
            index: self.index,
            scale: self.scale,
            tokens: Tensor::cat(&rows.collect::<Vec<_>>(), 0)?,
        })
    }
}

/// IP-Adapters at work on tokens that are given.
pub(super) fn prompts<'a>(
    loaded: &'a [LoadedImagePrompt],
    acting: &[ActingImage],
    tokens: &'a [sd_kernels::Tensor],
) -> Vec<ImagePrompt<'a>> {
    let pairs = acting.iter().zip(tokens);
    pairs
        .filter_map(|(one, tokens)| {
            Some(ImagePrompt {
                tokens,
                scale: one.scale,
                layers: &loaded.get(one.index)?.layers,
            })
        })
        .collect()
}
