//! How a denoising network may differ from what its weights are: for guidance away from a worse self, and for less work.

use sd_kernels::{Op, Result, Tensor, ops::apply};

/// What is done otherwise in a call. The default is the network as it is.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Variant {
    /// Blocks that a transformer does without.
    pub skipped: Vec<usize>,
    /// Self-attentions, by their names in the network, in which every place sees itself alone (Ahn et al., "Self-Rectifying Diffusion
    /// Sampling with Perturbed-Attention Guidance", arXiv 2403.17377).
    pub identities: Vec<String>,
    /// Other weights of what comes up and what is skipped, in a UNet.
    pub free_u: Option<FreeU>,
    /// Values inside a UNet that come out beside the prediction, in this order.
    pub taps: Vec<Tap>,
    /// A UNet takes its deep features from an earlier call ([`Tap::Deep`]) and computes its outermost layers alone.
    pub shallow: bool,
    /// What a UNet's cross-attentions see (Zhang et al., "Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models", arXiv
    /// 2404.02747).
    pub cross: Reuse,
    /// What its self-attentions see (Liu et al., "Faster Diffusion via Temporal Attention Decomposition", the same paper's second version).
    pub own: Reuse,
    /// Self-attentions of a UNet look at fewer tokens.
    pub merging: Option<Merging>,
}

/// What becomes of the outcomes of attentions, behind the last projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reuse {
    /// They are computed.
    #[default]
    Nothing,
    /// They come out beside the prediction, too.
    Keep,
    /// They are taken from an earlier call.
    Take,
}

/// Tokens that are alike become one before self-attention (Bolya & Hoffman, "Token Merging for Fast Stable Diffusion", arXiv 2303.17604; tomesd 0.1.3
/// with strides of 2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Merging {
    /// The part of the tokens that goes, below 0.75.
    pub ratio: f64,
    /// How many times smaller than the latents a level may be that merges.
    pub max_downsample: usize,
    /// Which of each four tokens stays is told from outside ([`Slot::Choice`]); else it is the first.
    pub random: bool,
}

impl Merging {
    /// How many of `h × w` tokens go, in a network of latents of another height and width; nothing where none does.
    pub(crate) fn merged(
        &self,
        (h, w): (usize, usize),
        (height, width): (usize, usize),
    ) -> Option<usize> {
        let tokens = h * w;
        let smaller = (height * width / tokens.max(1)) as f64;
        if smaller.sqrt().ceil() > self.max_downsample as f64 {
            return None;
        }
        let staying = (h / 2) * (w / 2);
        let merged = (tokens as f64 * self.ratio) as usize;
        let merged = merged.min(tokens - staying);
        (merged > 0 && staying > 0).then_some(merged)
    }
}

/// A value that a changed network is given beside its inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// What [`Tap::Deep`] was in an earlier call.
    Deep,
    /// What a cross-attention saw in an earlier call, `[b, s, c]`, by its place on the way through the network.
    Cross(usize),
    /// The same of a self-attention.
    Own(usize),
    /// Which of each 2×2 tokens stays, 0 to 3, for a matching: `[b, n]`.
    Choice(usize),
}

/// Gives a value of a shape.
pub type Earlier<'a> = dyn Fn(Slot, &[usize]) -> Result<Tensor> + 'a;

/// A value inside a UNet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tap {
    /// What enters the last layer on the way up, before it meets the first convolution's result: `[b, c, h, w]` (Ma et al., "DeepCache",
    /// arXiv 2312.00858, branch 0).
    Deep,
    /// How much the middle's pixels are looked at: `[b, 1, h, w]`.
    Mass,
}

/// What one call of a network gives.
pub struct Outputs {
    /// The prediction `[b, out_channels, h, w]`.
    pub prediction: Tensor,
    /// As many as [`Variant::taps`].
    pub taps: Vec<Tensor>,
    /// What cross-attentions saw, `[b, s, c]` each, if it is kept.
    pub cross: Vec<Tensor>,
    /// What self-attentions saw.
    pub own: Vec<Tensor>,
}

/// FreeU (Si et al., arXiv 2309.11497): features on the way up count for more, low frequencies of skips for less.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FreeU {
    /// Factors of the features, of the first and the second stage.
    pub features: [f64; 2],
    /// Factors of the skips' low frequencies.
    pub skips: [f64; 2],
    /// Which form.
    pub version: FreeUVersion,
}

/// Which form of FreeU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FreeUVersion {
    /// The first two blocks on the way up, by constant factors (diffusers 0.42.1 `enable_freeu`).
    First,
    /// Where features have four or two times the channels of the first level, by factors that follow their mean (ComfyUI `FreeU_V2`).
    Second,
}

impl FreeU {
    /// Features and the skip that joins them, as block `index` on the way up has them, of a network whose first level has `first` channels.
    ///
    /// # Errors
    /// When the executor fails.
    pub(crate) fn apply(
        &self,
        (x, skip): (&Tensor, &Tensor),
        index: usize,
        first: usize,
    ) -> Result<(Tensor, Tensor)> {
        let stage = match self.version {
            FreeUVersion::First => Some(index).filter(|index| *index < 2),
            FreeUVersion::Second => match x.dims4()?.1 {
                c if c == 4 * first => Some(0),
                c if c == 2 * first => Some(1),
                _ => None,
            },
        };
        let Some(stage) = stage else {
            return Ok((x.clone(), skip.clone()));
        };
        let amplify = Op::Amplify {
            scale: self.features[stage],
            by_mean: self.version == FreeUVersion::Second,
        };
        let filter = Op::LowFrequencies {
            scale: self.skips[stage],
        };
        Ok((apply(amplify, &[x])?, apply(filter, &[skip])?))
    }
}
