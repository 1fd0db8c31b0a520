//! The residual block of UNet and autoencoder, and the layers that change resolution.

use sd_kernels::{Activation, Padding, Result, Tensor, Weights, ops};

use super::{Conv2d, GroupNorm, Linear};

/// What a [`ResnetBlock`] needs to know beside its channels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ResnetConfig {
    /// Groups of its norms.
    pub groups: usize,
    /// Epsilon of its norms.
    pub eps: f64,
    /// Activation behind the norms and before the time projection.
    pub activation: Activation,
    /// Width of the time embedding, if there is one.
    pub time_width: Option<usize>,
    /// The time embedding scales and shifts the second norm, in place of being added before it.
    pub scale_shift: bool,
    /// The sum is divided by this.
    pub output_scale: f64,
}

/// norm, activation, 3×3; the timestep; norm, activation, 3×3; plus the input (diffusers `ResnetBlock2D`).
pub struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_projection: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
    config: ResnetConfig,
}

impl ResnetBlock {
    /// Reads a block from `input` to `output` channels.
    pub fn load(weights: &Weights, (input, output): (usize, usize), config: &ResnetConfig) -> Self {
        let norm = |name, channels, activation| {
            GroupNorm::load(
                &weights.at(name),
                channels,
                config.groups,
                config.eps,
                activation,
            )
        };
        let time_width = if config.scale_shift {
            2 * output
        } else {
            output
        };
        // with scale and shift the activation comes after them, not with the norm
        let second = (!config.scale_shift).then_some(config.activation);
        Self {
            norm1: norm("norm1", input, Some(config.activation)),
            conv1: Conv2d::load3x3(&weights.at("conv1"), (input, output)),
            time_projection: config
                .time_width
                .map(|width| Linear::load(&weights.at("time_emb_proj"), width, time_width)),
            norm2: norm("norm2", output, second),
            conv2: Conv2d::load3x3(&weights.at("conv2"), (output, output)),
            shortcut: (input != output)
                .then(|| Conv2d::load1x1(&weights.at("conv_shortcut"), (input, output))),
            config: *config,
        }
    }

    /// `x [b, input, h, w]`, `temb [b, time width]` → `[b, output, h, w]`.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub fn forward(&self, x: &Tensor, temb: Option<&Tensor>) -> Result<Tensor> {
        let h = self.conv1.forward(&self.norm1.forward(x)?)?; // [b, output, h, w]
        let time = match (&self.time_projection, temb) {
            (Some(projection), Some(temb)) => {
                Some(projection.forward(&ops::activate(temb, self.config.activation)?)?)
            }
            _ => None,
        };
        let h = match time {
            Some(time) if self.config.scale_shift => {
                let h = ops::scale_shift(&self.norm2.forward(&h)?, &time)?;
                ops::activate(&h, self.config.activation)?
            }
            Some(time) => self.norm2.forward(&ops::add_channels(&h, &time)?)?,
            None => self.norm2.forward(&h)?,
        };
        let h = self.conv2.forward(&h)?;
        let sum = match &self.shortcut {
            Some(shortcut) => ops::add(&shortcut.forward(x)?, &h)?,
            None => ops::add(x, &h)?,
        };
        ops::affine(&sum, 1.0 / self.config.output_scale, 0.0)
    }
}

/// Halves height and width by a 3×3 convolution of stride 2.
pub struct Downsample(Conv2d);

impl Downsample {
    /// `padding` 0 means one row and column of zeros on the right and below only, as diffusers does.
    pub fn load(weights: &Weights, channels: usize, padding: usize) -> Self {
        let padding = match padding {
            0 => Padding {
                before: 0,
                after: 1,
            },
            n => Padding::same(n),
        };
        Self(Conv2d::load(
            &weights.at("conv"),
            (channels, channels),
            3,
            2,
            padding,
        ))
    }

    /// `[b, c, h, w]` → `[b, c, h/2, w/2]`.
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward(x)
    }
}

/// Nearest-neighbour enlargement, then a 3×3 convolution.
pub struct Upsample(Conv2d);

impl Upsample {
    /// Reads `conv`.
    pub fn load(weights: &Weights, channels: usize) -> Self {
        Self(Conv2d::load3x3(&weights.at("conv"), (channels, channels)))
    }

    /// `[b, c, ?, ?]` → `[b, c, h, w]`.
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, x: &Tensor, h: usize, w: usize) -> Result<Tensor> {
        self.0.forward(&ops::upsample(x, h, w)?)
    }
}
