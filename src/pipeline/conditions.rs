//! What the UNet is told beside latents and time.

use candle_core::{DType, Tensor};
use sd_models::denoiser;

use crate::error::Result;
use crate::text::{Conditioning, Encoded};

/// Names of the inputs of a recorded UNet that stay the same during a run.
pub(super) const CONTEXT: &str = "context";
pub(super) const ADDED: &str = "added";
pub(super) const GUIDANCE: &str = "guidance";
/// And of one that changes: what a shallow UNet takes from an earlier call.
pub(super) const DEEP: &str = "deep";

/// What the UNet is told beside latents and time; a batch has the unconditional rows first if there are any.
#[derive(Debug, Clone)]
pub struct Conditions {
    /// Text states `[b, t, width]`, f32.
    pub context: Tensor,
    /// The vector beside the time `[b, width]`, f32, where the network takes one.
    pub added: Option<Tensor>,
    /// The guidance that the network itself was trained to follow `[b, width]`, f32, where it takes one.
    pub guidance: Option<Tensor>,
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
        let [negative, positive] = numbers;
        let mut texts: Vec<(&Encoded, &[f64])> = vec![(conditioning.prompt(), positive)];
        if guided {
            texts.insert(0, (conditioning.negative(), negative));
        }
        Self::of_texts(config, &texts, n, cfg_scale)
    }

    /// Those of `n` pictures for each of some texts, which come with what SDXL is told beside them.
    ///
    /// # Errors
    /// When the device has no memory.
    pub fn of_texts(
        config: &denoiser::Config,
        texts: &[(&Encoded, &[f64])],
        n: usize,
        cfg_scale: f64,
    ) -> Result<Self> {
        let states: Vec<&Tensor> = texts.iter().map(|(text, _)| &text.states).collect();
        let states = of_one_length(&states)?;
        let context = repeated(&states.iter().collect::<Vec<_>>(), n)?;
        let (batch, device) = (context.dim(0)?, context.device());
        let pooled = texts.iter().map(|(text, _)| text.pooled.as_ref());
        let pooled = match pooled.collect::<Option<Vec<&Tensor>>>() {
            Some(pooled) => Some(repeated(&pooled, n)?),
            None => None,
        };
        let unet = config.unet().filter(|unet| unet.added.is_some());
        let added = match (unet, pooled) {
            (None, pooled) => pooled.filter(|_| config.added_width().is_some()),
            (Some(config), Some(pooled)) => {
                let embed = |numbers: &[f64]| -> Result<Tensor> {
                    let numbers: Vec<f32> = numbers.iter().map(|&x| x as f32).collect();
                    let numbers = Tensor::new(numbers, device)?;
                    let embedded = config.embed_numbers(&numbers.into())?.into_data()?;
                    Ok(embedded.flatten_all()?.unsqueeze(0)?)
                };
                let numbers = texts.iter().map(|(_, numbers)| embed(numbers));
                let numbers = numbers.collect::<Result<Vec<Tensor>>>()?;
                let numbers = repeated(&numbers.iter().collect::<Vec<_>>(), n)?;
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
            context,
            added,
            guidance,
        })
    }

    pub(super) fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let convert = |x: &Option<Tensor>| x.as_ref().map(|x| x.to_dtype(dtype)).transpose();
        Ok(Self {
            context: self.context.to_dtype(dtype)?,
            added: convert(&self.added)?,
            guidance: convert(&self.guidance)?,
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

/// Each row of each tensor `n` times.
fn repeated(rows: &[&Tensor], n: usize) -> Result<Tensor> {
    let all: Vec<&Tensor> = rows.iter().flat_map(|&row| vec![row; n]).collect();
    Ok(Tensor::cat(&all, 0)?)
}

/// States `[1, t, width]` of one length: attention to a text behind itself is attention to it.
fn of_one_length(states: &[&Tensor]) -> Result<Vec<Tensor>> {
    let lengths = states.iter().map(|x| x.dim(1));
    let lengths = lengths.collect::<std::result::Result<Vec<usize>, _>>()?;
    let common = lengths.iter().copied().fold(1, least_common_multiple);
    let states = states.iter().zip(lengths);
    states
        .map(|(x, length)| Ok(Tensor::cat(&vec![*x; common / length.max(1)], 1)?))
        .collect()
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x.max(1) * b
}
