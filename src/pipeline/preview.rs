//! What a picture is going to be, while it is computed: the network's estimate of the clean latents, made visible.

use candle_core::{DType, Tensor};
use sd_kernels::cpu::Level;
use sd_kernels::plan::{Feed, Options, Plan, Precision, Store};
use sd_kernels::{Graph, Weights};
use sd_models::vae::{TinyConfig, TinyDecoder};

use super::coverage::{VAE, named, source};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::output::Image;
use crate::spec::{ModelSpec, Rgb, tiny_decoder};

/// How previews are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PreviewKind {
    /// A pixel a latent, by a factor for each channel and colour: costs nothing.
    #[default]
    Latent,
    /// By the tiny decoder that [`super::Engine::with_preview_decoder`] was given, in the picture's own size.
    Tiny,
}

/// Pictures that are wanted while a run goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preview {
    /// How they are made.
    pub kind: PreviewKind,
    /// Steps from one to the next; 0 counts as 1.
    pub every: usize,
}

/// A tiny decoder for previews.
pub(super) struct TinyPreview {
    decoder: TinyDecoder,
    config: TinyConfig,
    store: Store,
}

impl TinyPreview {
    /// Opens the decoder of latents that `spec`'s model makes.
    ///
    /// # Errors
    /// [`Error::BadModel`] when there is none in the file or it is of other latents.
    pub(super) fn open(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<Self> {
        let component = tiny_decoder(checkpoint)?;
        let (got, wanted) = (
            component.config.latent_channels,
            spec.vae.config.latent_channels,
        );
        if got != wanted {
            return Err(Error::bad_model(
                checkpoint.path(),
                format!(
                    "the decoder for previews takes latents of {got} channels, and the model's have {wanted}; give one that was made for it"
                ),
            ));
        }
        let weights = Weights::new(source(&component), DType::F32, &candle_core::Device::Cpu);
        let decoder = TinyDecoder::load(&weights, &component.config);
        named(VAE, weights.check())?;
        Ok(Self {
            decoder,
            config: component.config,
            store: Store::default(),
        })
    }

    /// `[1, c, h, w]` → the picture.
    fn image(&self, latents: &Tensor) -> Result<Image> {
        let mut values: Vec<f32> = latents.flatten_all()?.to_vec1()?;
        self.config.limit(&mut values);
        let graph = Graph::new();
        let output = self
            .decoder
            .forward(&graph.input("latents", latents.dims()))?;
        let options = Options {
            transient: true,
            ..Options::new(Level::current(), Precision::F32)
        };
        let mut plan = Plan::compile(&graph, &output, &options, &self.store)?;
        let mut picture = Vec::new();
        let feed = Feed {
            name: "latents",
            values: &values,
        };
        plan.run(&[feed], &mut picture)?;
        let (_, _, h, w) = output.dims4()?;
        Image::from_planar(&picture, w, h)
    }
}

/// Makes previews of a run.
pub(super) struct Previewer<'a> {
    pub(super) preview: Preview,
    pub(super) rgb: Option<Rgb>,
    pub(super) tiny: Option<&'a TinyPreview>,
}

impl Previewer<'_> {
    /// Whether there is one after so many steps.
    pub(super) fn is_due(&self, done: usize) -> bool {
        done.is_multiple_of(self.preview.every.max(1))
    }

    /// The pictures of clean latents `[b, c, h, w]`, side by side; nothing where nobody can tell what they look like.
    ///
    /// # Errors
    /// When the tiny decoder fails.
    pub(super) fn image(&self, latents: &Tensor) -> Result<Option<Image>> {
        let mut images = Vec::with_capacity(latents.dim(0)?);
        for i in 0..latents.dim(0)? {
            let latents = latents.narrow(0, i, 1)?.to_dtype(DType::F32)?;
            let image = match (self.preview.kind, self.tiny, self.rgb) {
                (PreviewKind::Tiny, Some(tiny), _) => tiny.image(&latents)?,
                (PreviewKind::Latent, _, Some(rgb)) => coloured(&latents, &rgb)?,
                _ => return Ok(None),
            };
            images.push(image);
        }
        Ok(side_by_side(&images))
    }
}

/// A pixel a latent.
fn coloured(latents: &Tensor, rgb: &Rgb) -> Result<Image> {
    let (_, _, h, w) = latents.dims4()?;
    let values: Vec<f32> = latents.flatten_all()?.to_vec1()?;
    let mut planes = Vec::with_capacity(3 * h * w);
    for colour in 0..3 {
        planes.extend((0..h * w).map(|at| {
            let channels = values.iter().skip(at).step_by((h * w).max(1));
            let sum: f32 = channels.zip(rgb.factors).map(|(v, f)| v * f[colour]).sum();
            let value = sum + rgb.bias[colour];
            // a picture that has gone astray is the run's to refuse
            if value.is_finite() { value } else { -1.0 }
        }));
    }
    Image::from_planar(&planes, w, h)
}

/// Pictures of one size in one.
fn side_by_side(images: &[Image]) -> Option<Image> {
    let first = images.first()?;
    let count = u32::try_from(images.len()).ok()?;
    let row = 3 * first.width as usize;
    let mut rgb = Vec::with_capacity(images.len() * first.rgb.len());
    for y in 0..first.height as usize {
        for image in images {
            rgb.extend_from_slice(image.rgb.get(y * row..(y + 1) * row)?);
        }
    }
    Some(Image {
        width: first.width.checked_mul(count)?,
        height: first.height,
        rgb,
    })
}
