//! The middle that encoder and decoder share.

use sd_kernels::{Result, Tensor, Weights, ops};

use super::config::{Config, EPS};
use crate::layers::{Attention, GroupNorm, ResnetBlock};

/// Two residual blocks, with attention of one head between them (diffusers `UNetMidBlock2D`).
pub(super) struct MidBlock {
    first: ResnetBlock,
    attention: Option<(GroupNorm, Attention)>,
    second: ResnetBlock,
}

impl MidBlock {
    pub(super) fn load(weights: &Weights, config: &Config, channels: usize) -> Self {
        let resnet = |index| {
            let weights = weights.at("resnets").at(index);
            ResnetBlock::load(&weights, (channels, channels), &config.resnet())
        };
        Self {
            first: resnet(0),
            attention: config.mid_attention.then(|| {
                let weights = weights.at("attentions.0");
                let norm = GroupNorm::load(
                    &weights.at("group_norm"),
                    channels,
                    config.groups,
                    EPS,
                    None,
                );
                (norm, Attention::load(&weights, channels, channels, 1, true))
            }),
            second: resnet(1),
        }
    }

    /// `[b, channels, h, w]` → same.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(x, None)?;
        if let Some((norm, attention)) = &self.attention {
            let (_, _, h, w) = x.dims4()?;
            let sequence = ops::flatten(&norm.forward(&x)?)?; // [b, h·w, c]
            let y = attention.forward(&sequence, &sequence)?;
            x = ops::add(&ops::unflatten(&y, h, w)?, &x)?;
        }
        self.second.forward(&x, None)
    }
}
