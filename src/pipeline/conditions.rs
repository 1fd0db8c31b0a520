//! What the UNet is told beside latents and time.

use candle_core::{DType, Tensor};
use sd_models::denoiser;

use crate::error::Result;
use crate::text::{Conditioning, Text};

/// Names of the inputs of a recorded UNet that stay the same during a run.
pub(super) const CONTEXT: &str = "context";
pub(super) const ADDED: &str = "added";
pub(super) const GUIDANCE: &str = "guidance";
pub(super) const EXTRA: &str = "extra";
pub(super) const REFERENCE: &str = "reference";
pub(super) const LABEL: &str = "label";

/// What the UNet is told beside latents and time; a batch has the unconditional rows first if there are any.
#[derive(Debug, Clone)]
pub struct Conditions {
    /// Text states `[b, t, width]`, f32.
    pub context: Tensor,
    /// The vector beside the time `[b, width]`, f32, where the network takes one.
    pub added: Option<Tensor>,
    /// The guidance that the network itself was trained to follow `[b, width]`, f32, where it takes one.
    pub guidance: Option<Tensor>,
    /// Channels behind those of the latents, `[b, extra, h, w]`, f32, where the network takes some: a mask, another picture's latents.
    pub extra: Option<Tensor>,
    /// Latents of a picture that the network looks at, `[b, c, h', w']`, f32.
    pub reference: Option<Tensor>,
    /// The row of the picture's class, `[b, width]`, f32, where the network has classes.
    pub label: Option<Tensor>,
}

/// What of a picture the network is given.
#[derive(Debug, Clone, Default)]
pub struct Given {
    /// Channels beside the latents, `[n, extra, h, w]`.
    pub extra: Option<Tensor>,
    /// Latents of their own, `[n, c, h', w']`.
    pub reference: Option<Tensor>,
    /// The row of its class, `[n, width]`.
    pub label: Option<Tensor>,
}

/// What a part of a batch is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Branch {
    /// The negative prompt, and no picture.
    Unseen,
    /// The negative prompt.
    Negative,
    /// The prompt.
    Positive,
}

impl Branch {
    fn text(self) -> Text {
        match self {
            Self::Unseen | Self::Negative => Text::Negative,
            Self::Positive => Text::Positive,
        }
    }
}

/// The channels beside the latents, for every branch.
fn rows_of(extra: &Tensor, branches: &[Branch]) -> Result<Tensor> {
    let unseen = extra.zeros_like()?;
    let rows = branches.iter().map(|branch| match branch {
        Branch::Unseen => &unseen,
        Branch::Negative | Branch::Positive => extra,
    });
    Ok(Tensor::cat(&rows.collect::<Vec<_>>(), 0)?)
}

impl Conditions {
    /// Those of a batch of `n` pictures, n rows for each of `branches`; `numbers` are what SDXL is told with the negative prompt and with the
    /// prompt, the scale is for networks that embed it, and `given` is what of a picture is.
    ///
    /// # Errors
    /// When the device has no memory.
    pub fn new(
        config: &denoiser::Config,
        conditioning: &Conditioning,
        (n, branches): (usize, &[Branch]),
        (numbers, cfg_scale): (&[Vec<f64>; 2], f64),
        given: &Given,
    ) -> Result<Self> {
        let texts: Vec<Text> = branches.iter().map(|branch| branch.text()).collect();
        let context = conditioning.for_batch(n, &texts)?;
        let (batch, device) = (context.dim(0)?, context.device());
        let pooled = conditioning.pooled_for_batch(n, &texts)?;
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
                let rows = texts.iter().flat_map(|text| match text {
                    Text::Negative => vec![&negative; n],
                    Text::Positive => vec![&positive; n],
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
        let rows = |given: &Option<Tensor>| {
            let rows = given.as_ref().map(|given| rows_of(given, branches));
            rows.transpose()
        };
        Ok(Self {
            context,
            added,
            guidance,
            extra: rows(&given.extra)?,
            reference: rows(&given.reference)?,
            label: rows(&given.label)?,
        })
    }

    pub(super) fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let convert = |x: &Option<Tensor>| x.as_ref().map(|x| x.to_dtype(dtype)).transpose();
        Ok(Self {
            context: self.context.to_dtype(dtype)?,
            added: convert(&self.added)?,
            guidance: convert(&self.guidance)?,
            extra: convert(&self.extra)?,
            reference: convert(&self.reference)?,
            label: convert(&self.label)?,
        })
    }

    /// What is there, by the names of a plan's inputs.
    pub(super) fn named(&self) -> Result<Vec<(&'static str, Vec<f32>)>> {
        let all = [
            (CONTEXT, Some(&self.context)),
            (ADDED, self.added.as_ref()),
            (GUIDANCE, self.guidance.as_ref()),
            (EXTRA, self.extra.as_ref()),
            (REFERENCE, self.reference.as_ref()),
            (LABEL, self.label.as_ref()),
        ];
        all.into_iter()
            .filter_map(|(name, tensor)| Some((name, tensor?)))
            .map(|(name, tensor)| Ok((name, tensor.flatten_all()?.to_vec1()?)))
            .collect()
    }
}
