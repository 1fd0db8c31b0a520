//! TAESD's decoder: a small network of plain convolutions that looks through the latents of a full autoencoder (Ollin Boer Bohan,
//! madebyollin/taesd; diffusers 0.42.1 `AutoencoderTiny`). Its structure is the list of its layers, as files number them.

use sd_kernels::{Activation, Op, Padding, Result, Tensor, Weights, Wrap, ops};

/// The largest magnitude of latents that it sees, almost: they pass through `3 · tanh(x/3)`.
const MAGNITUDE: f64 = 3.0;

/// The structure of a tiny decoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TinyConfig {
    /// Channels of latents.
    pub latent_channels: usize,
    /// What stands behind each other.
    pub layers: Vec<TinyLayer>,
}

/// A layer with its number in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TinyLayer {
    /// A 3×3 convolution.
    Conv {
        /// Its number.
        index: usize,
        /// Channels in and out.
        channels: (usize, usize),
        /// Whether it has a bias.
        bias: bool,
    },
    /// Three convolutions with ReLUs around a residual.
    Block {
        /// Its number.
        index: usize,
        /// Channels in and out.
        channels: (usize, usize),
        /// Whether the residual passes through a 1×1 convolution.
        skip: bool,
    },
    /// `max(x, 0)`.
    Relu,
    /// Twice the size, by repetition.
    Upsample,
}

impl TinyConfig {
    /// How many pixels one latent is wide.
    pub fn scale(&self) -> usize {
        let doubled = self
            .layers
            .iter()
            .filter(|layer| **layer == TinyLayer::Upsample);
        1 << doubled.count().min(16)
    }

    /// How far a pixel depends on the latents around it.
    pub fn reach(&self) -> usize {
        self.layers
            .iter()
            .rev()
            .fold(0, |reach, layer| match layer {
                TinyLayer::Conv { .. } => reach + 1,
                TinyLayer::Block { .. } => reach + 3,
                TinyLayer::Relu => reach,
                TinyLayer::Upsample => reach.div_ceil(2),
            })
    }

    /// Keeps latents within the magnitude that the network knows; comes before [`TinyDecoder::forward`].
    pub fn limit(&self, latents: &mut [f32]) {
        for value in latents {
            *value = (MAGNITUDE * (f64::from(*value) / MAGNITUDE).tanh()) as f32;
        }
    }
}

/// A convolution with or without a bias.
struct Conv(Op);

impl Conv {
    fn load(weights: &Weights, (input, output): (usize, usize), kernel: usize, bias: bool) -> Self {
        Self(Op::Conv2d {
            weight: weights.param("weight", &[output, input, kernel, kernel]),
            bias: bias.then(|| weights.param("bias", &[output])),
            stride: 1,
            padding: Padding::same(kernel / 2),
            wrap: Wrap::default(),
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::apply(self.0.clone(), &[x])
    }
}

enum Layer {
    Conv(Conv),
    Block {
        convs: [Conv; 3],
        skip: Option<Conv>,
    },
    Relu,
    Upsample,
}

/// The decoder.
pub struct TinyDecoder {
    config: TinyConfig,
    layers: Vec<Layer>,
}

impl TinyDecoder {
    /// Asks for every weight, by the layers' numbers.
    pub fn load(weights: &Weights, config: &TinyConfig) -> Self {
        let layers = config.layers.iter().map(|layer| match *layer {
            TinyLayer::Conv {
                index,
                channels,
                bias,
            } => Layer::Conv(Conv::load(&weights.at(index), channels, 3, bias)),
            TinyLayer::Block {
                index,
                channels: (input, output),
                skip,
            } => {
                let weights = weights.at(index);
                let conv = |i: usize, input| {
                    Conv::load(&weights.at("conv").at(i), (input, output), 3, true)
                };
                Layer::Block {
                    convs: [conv(0, input), conv(2, output), conv(4, output)],
                    skip: skip.then(|| Conv::load(&weights.at("skip"), (input, output), 1, false)),
                }
            }
            TinyLayer::Relu => Layer::Relu,
            TinyLayer::Upsample => Layer::Upsample,
        });
        Self {
            layers: layers.collect(),
            config: config.clone(),
        }
    }

    /// The structure.
    pub fn config(&self) -> &TinyConfig {
        &self.config
    }

    /// Limited latents `[b, latent, h, w]` as the UNet left them → pictures `[b, 3, scale·h, scale·w]`, mostly within [−1, 1].
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let mut x = latents.clone();
        for layer in &self.layers {
            x = match layer {
                Layer::Conv(conv) => conv.forward(&x)?,
                Layer::Relu => ops::activate(&x, Activation::Relu)?,
                Layer::Upsample => {
                    let (_, _, h, w) = x.dims4()?;
                    ops::upsample(&x, 2 * h, 2 * w)?
                }
                Layer::Block { convs, skip } => {
                    let [first, second, third] = convs;
                    let y = ops::activate(&first.forward(&x)?, Activation::Relu)?;
                    let y = ops::activate(&second.forward(&y)?, Activation::Relu)?;
                    let y = third.forward(&y)?;
                    let kept = match skip {
                        Some(skip) => skip.forward(&x)?,
                        None => x,
                    };
                    ops::activate(&ops::add(&y, &kept)?, Activation::Relu)?
                }
            };
        }
        ops::affine(&x, 2.0, -1.0)
    }
}
