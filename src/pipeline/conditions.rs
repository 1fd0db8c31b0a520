//! What the UNet is told beside latents and time.

use candle_core::{DType, Tensor};
use sd_models::denoiser;

use super::control::Acting;
use super::image_prompt::ActingImage;

use crate::error::Result;
use crate::text::Conditioning;

/// Names of the inputs of a recorded UNet that stay the same during a run.
pub(super) const CONTEXT: &str = "context";
pub(super) const ADDED: &str = "added";
pub(super) const GUIDANCE: &str = "guidance";

/// What the UNet is told beside latents and time; a batch has the unconditional rows first if there are any.
#[derive(Debug, Clone)]
pub struct Conditions {
    /// Text states `[b, t, width]`, f32.
    pub context: Tensor,
    /// The vector beside the time `[b, width]`, f32, where the network takes one.
    pub added: Option<Tensor>,
    /// The guidance that the network itself was trained to follow `[b, width]`, f32, where it takes one.
    pub guidance: Option<Tensor>,
    /// Pictures that steer.
    pub(super) controls: Vec<Acting>,
    /// Pictures beside the text.
    pub(super) images: Vec<ActingImage>,
}

impl Conditions {
    /// Those of a batch of `n` pictures, guided by a negative prompt or not; `numbers` are what SDXL is told with the negative prompt and with
    /// the prompt, the scale is for networks that embed it.
    ///
    /// # Errors
    /// When the device has no memory.
    pub fn new(
        config: &denoiser::Config,
        conditioning: &Conditioning,
        (n, guided): (usize, bool),
        (numbers, cfg_scale): (&[Vec<f64>; 2], f64),
    ) -> Result<Self> {
        let context = conditioning.for_batch(n, guided)?;
        let (batch, device) = (context.dim(0)?, context.device());
        let pooled = conditioning.pooled_for_batch(n, guided)?;
        let unet = config.unet().filter(|unet| unet.added.is_some());
        let added = match (unet, pooled) {
            (None, pooled) => pooled.filter(|_| config.added_width().is_some()),
            (Some(config), Some(pooled)) => {
                let embed = |numbers: &Vec<f64>| -> Result<Tensor> {
                    let numbers: Vec<f32> = numbers.iter().map(|&x| x as f32).collect();
                    let numbers = Tensor::new(numbers, device)?;
                    let embedded = config.embed_numbers(&numbers.into())?.into_data()?;
                    Ok(embedded.flatten_all()?.unsqueeze(0)?)
                };
                let [negative, positive] = numbers;
                let (negative, positive) = (embed(negative)?, embed(positive)?);
                let rows = (0..batch).map(|i| {
                    if guided && i < n {
                        &negative
                    } else {
                        &positive
                    }
                });
                let numbers = Tensor::cat(&rows.collect::<Vec<_>>(), 0)?;
                Some(Tensor::cat(&[&pooled, &numbers], 1)?)
            }
            (Some(_), None) => None,
        };
        let guidance = match config.guidance_width() {
            Some(_) => {
                let scale = Tensor::full(cfg_scale as f32, batch, device)?;
                Some(config.embed_guidance(&scale.into())?.into_data()?)
            }
            None => None,
        };
        Ok(Self {
            added,
            guidance,
            ..Self::of_text(context)
        })
    }

    /// Text alone: states `[b, t, width]`.
    pub fn of_text(context: Tensor) -> Self {
        Self {
            context,
            added: None,
            guidance: None,
            controls: Vec::new(),
            images: Vec::new(),
        }
    }

    /// Some of the rows, of which `controls` are what steers them.
    pub(super) fn rows(
        &self,
        (first, count): (usize, usize),
        controls: Vec<Acting>,
    ) -> Result<Self> {
        let images = self.images.iter().map(|image| {
            Ok(ActingImage {
                tokens: image.tokens.narrow(0, first, count)?,
                ..image.clone()
            })
        });
        let some = |x: &Option<Tensor>| x.as_ref().map(|x| x.narrow(0, first, count)).transpose();
        Ok(Self {
            context: self.context.narrow(0, first, count)?,
            added: some(&self.added)?,
            guidance: some(&self.guidance)?,
            controls,
            images: images.collect::<Result<_>>()?,
        })
    }

    pub(super) fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let convert = |x: &Option<Tensor>| x.as_ref().map(|x| x.to_dtype(dtype)).transpose();
        Ok(Self {
            context: self.context.to_dtype(dtype)?,
            added: convert(&self.added)?,
            guidance: convert(&self.guidance)?,
            controls: self.controls.clone(),
            images: self.images.clone(),
        })
    }

    /// What is there, by the names of a plan's inputs.
    pub(super) fn named(&self) -> Result<Vec<(&'static str, Vec<f32>)>> {
        let all = [
            (CONTEXT, Some(&self.context)),
            (ADDED, self.added.as_ref()),
            (GUIDANCE, self.guidance.as_ref()),
        ];
        all.into_iter()
            .filter_map(|(name, tensor)| Some((name, tensor?)))
            .map(|(name, tensor)| Ok((name, tensor.flatten_all()?.to_vec1()?)))
            .collect()
    }
}
