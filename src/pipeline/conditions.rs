//! What the UNet is told beside latents and time.

use std::borrow::Cow;

use candle_core::{DType, Tensor};
use sd_models::denoiser;
use sd_models::variant::Slot;

use super::control::Acting;
use super::image_prompt::ActingImage;

use crate::error::Result;
use crate::text::{Conditioning, Encoded};

/// Names of the inputs of a recorded UNet that stay the same during a run.
pub(super) const CONTEXT: &str = "context";
pub(super) const ADDED: &str = "added";
pub(super) const GUIDANCE: &str = "guidance";
pub(super) const EXTRA: &str = "extra";
pub(super) const REFERENCE: &str = "reference";
pub(super) const LABEL: &str = "label";
/// What the names of inputs begin with that are what cross-attentions saw once and for all.
pub(super) const CROSS: &str = "cross ";
/// And of inputs that say at every call which tokens stay, the same for all texts.
pub(super) const CHOICE: &str = "choice ";

/// The name of the input that a changed UNet takes from outside.
pub(super) fn slot_input(slot: Slot) -> Cow<'static, str> {
    match slot {
        Slot::Deep => Cow::from("deep"),
        Slot::Cross(index) => Cow::from(format!("{CROSS}{index}")),
        Slot::Own(index) => Cow::from(format!("own {index}")),
        Slot::Choice(index) => Cow::from(format!("{CHOICE}{index}")),
    }
}

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
    /// Pictures that steer.
    pub(super) controls: Vec<Acting>,
    /// Pictures beside the text.
    pub(super) images: Vec<ActingImage>,
    /// What cross-attentions saw in an earlier call, `[b, s, c]` each, f32, where that is used again.
    pub(super) seen: Vec<Tensor>,
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

/// What a part of a batch is told.
#[derive(Clone, Copy)]
pub struct Told<'a> {
    /// The text.
    pub text: &'a Encoded,
    /// What SDXL is told beside it.
    pub numbers: &'a [f64],
    /// The channels of a picture beside the latents are zeros.
    pub unseen: bool,
}

/// What is given of a picture, for every part of a batch.
fn rows_of(given: &Tensor, texts: &[Told<'_>]) -> Result<Tensor> {
    let unseen = given.zeros_like()?;
    let rows = texts
        .iter()
        .map(|told| if told.unseen { &unseen } else { given });
    Ok(Tensor::cat(&rows.collect::<Vec<_>>(), 0)?)
}

impl Conditions {
    /// Those of a batch of `n` pictures, the negative prompt's first where it has a say; `numbers` are what SDXL is told with the negative prompt and with the
    /// prompt, the scale is for networks that embed it, and `given` is what of a picture is.
    ///
    /// # Errors
    /// When the device has no memory.
    pub fn new(
        config: &denoiser::Config,
        conditioning: &Conditioning,
        (n, guided): (usize, bool),
        (numbers, cfg_scale): (&[Vec<f64>; 2], f64),
        given: &Given,
    ) -> Result<Self> {
        let [negative, positive] = numbers;
        let told = |text, numbers| Told {
            text,
            numbers,
            unseen: false,
        };
        let mut texts = vec![told(conditioning.prompt(), positive)];
        if guided {
            texts.insert(0, told(conditioning.negative(), negative));
        }
        Self::of_texts(config, &texts, (n, cfg_scale), given)
    }

    /// Those of `n` pictures for each of some texts, and what is given of a picture.
    ///
    /// # Errors
    /// When the device has no memory.
    pub fn of_texts(
        config: &denoiser::Config,
        texts: &[Told<'_>],
        (n, cfg_scale): (usize, f64),
        given: &Given,
    ) -> Result<Self> {
        let states: Vec<&Tensor> = texts.iter().map(|told| &told.text.states).collect();
        let states = of_one_length(&states)?;
        let context = repeated(&states.iter().collect::<Vec<_>>(), n)?;
        let (batch, device) = (context.dim(0)?, context.device());
        let pooled = texts.iter().map(|told| told.text.pooled.as_ref());
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
                let numbers = texts.iter().map(|told| embed(told.numbers));
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
        let rows = |given: &Option<Tensor>| {
            let rows = given.as_ref().map(|given| rows_of(given, texts));
            rows.transpose()
        };
        Ok(Self {
            added,
            guidance,
            extra: rows(&given.extra)?,
            reference: rows(&given.reference)?,
            label: rows(&given.label)?,
            ..Self::of_text(context)
        })
    }

    /// Text alone: states `[b, t, width]`.
    pub fn of_text(context: Tensor) -> Self {
        Self {
            context,
            added: None,
            guidance: None,
            extra: None,
            reference: None,
            label: None,
            controls: Vec::new(),
            images: Vec::new(),
            seen: Vec::new(),
        }
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
            controls: self.controls.clone(),
            images: self.images.clone(),
            seen: self
                .seen
                .iter()
                .map(|x| x.to_dtype(dtype))
                .collect::<candle_core::Result<_>>()?,
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
