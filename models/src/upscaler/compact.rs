//! The compact networks of Real-ESRGAN (BasicSR's `SRVGGNetCompact`): a chain of convolutions, whose last one makes the pixels of a square, added
//! to the picture enlarged by repetition.

use sd_kernels::{Param, Result, Tensor, Weights, ops};

use crate::layers::Conv2d;

/// The structure of a compact network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompactConfig {
    /// Channels of pictures that come in.
    pub input: usize,
    /// Channels of pictures that go out; as many, or `input` is one.
    pub output: usize,
    /// Channels between convolutions.
    pub features: usize,
    /// Convolutions, the first and the last among them: at least two.
    pub convs: usize,
    /// How many pixels wide one pixel becomes.
    pub scale: usize,
}

/// The network.
pub struct Compact {
    scale: usize,
    /// Each with the slopes that follow it.
    convs: Vec<(Conv2d, Param)>,
    last: Conv2d,
}

impl Compact {
    /// Asks for every weight, by the layers' numbers: convolutions are even, slopes odd.
    pub fn load(weights: &Weights, config: &CompactConfig) -> Self {
        let weights = weights.at("body");
        let f = config.features;
        let last = config.convs.saturating_sub(1);
        let conv = |i: usize| {
            let input = if i == 0 { config.input } else { f };
            let slopes = weights.at(2 * i + 1).param("weight", &[f]);
            (Conv2d::load3x3(&weights.at(2 * i), (input, f)), slopes)
        };
        let pixels = config.scale * config.scale;
        Self {
            scale: config.scale,
            convs: (0..last).map(conv).collect(),
            last: Conv2d::load3x3(&weights.at(2 * last), (f, config.output * pixels)),
        }
    }

    /// `x [b, input, h, w]` → `[b, output, scale · h, scale · w]`.
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = x.dims4()?;
        let mut y = x.clone();
        for (conv, slopes) in &self.convs {
            y = ops::prelu(&conv.forward(&y)?, slopes)?; // [b, features, h, w]
        }
        let y = ops::pixel_shuffle(&self.last.forward(&y)?, self.scale)?;
        let base = ops::upsample(x, self.scale * h, self.scale * w)?;
        ops::add(&y, &base)
    }
}
