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
}

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
