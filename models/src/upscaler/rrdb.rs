//! Residual blocks of residual dense blocks (Wang et al., "ESRGAN", arXiv 1809.00219; "Real-ESRGAN", arXiv 2107.10833): the names are those of
//! BasicSR's `RRDBNet`. ESRGAN+ adds short ways inside a dense block (Rakotonirina & Rasoanaivo, arXiv 2001.08073), its noise being for training.

use sd_kernels::ops::{self, activate, affine, concat};
use sd_kernels::{Activation, Op, Padding, Result, Tensor, Weights, Wrap};

use crate::layers::Conv2d;

/// What is below 0 is divided by 5.
const LEAKY: Activation = Activation::LeakyRelu { percent: 20 };
/// How much of a block's result is added to what came in.
const RESIDUAL: f64 = 0.2;

/// The structure of such a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RrdbConfig {
    /// Channels of pictures that come in.
    pub input: usize,
    /// Channels of pictures that go out.
    pub output: usize,
    /// Channels between blocks.
    pub features: usize,
    /// Channels that each convolution of a dense block adds.
    pub growth: usize,
    /// Blocks of three dense blocks.
    pub blocks: usize,
    /// How often the size is doubled behind the blocks.
    pub doublings: usize,
    /// Pixels of a square whose channels stand side by side before the first convolution; 1 for none.
    pub unshuffle: usize,
    /// ESRGAN+: ways around the second and the fourth convolution of a dense block.
    pub plus: bool,
}

impl RrdbConfig {
    /// How many pixels wide one pixel becomes.
    pub fn scale(&self) -> usize {
        (1 << self.doublings) / self.unshuffle
    }

    /// See [`super::Config::reach`].
    pub(super) fn reach(&self) -> usize {
        // the first convolution, five in each of three dense blocks, the one behind them; a pixel less than three in the larger pictures
        (15 * self.blocks + 2 + 3) * self.unshuffle
    }
}

/// The network.
pub struct Rrdb {
    config: RrdbConfig,
    first: Conv2d,
    blocks: Vec<[Dense; 3]>,
    body: Conv2d,
    doublings: Vec<Conv2d>,
    fine: Conv2d,
    last: Conv2d,
}

impl Rrdb {
    /// Asks for every weight.
    pub fn load(weights: &Weights, config: &RrdbConfig) -> Self {
        let f = config.features;
        let conv = |name: &str, channels| Conv2d::load3x3(&weights.at(name), channels);
        let block = |i: usize| {
            let weights = weights.at("body").at(i);
            [1, 2, 3].map(|j| Dense::load(&weights.at(format!("rdb{j}")), config))
        };
        Self {
            first: conv(
                "conv_first",
                (config.input * config.unshuffle * config.unshuffle, f),
            ),
            blocks: (0..config.blocks).map(block).collect(),
            body: conv("conv_body", (f, f)),
            doublings: (1..=config.doublings)
                .map(|i| conv(&format!("conv_up{i}"), (f, f)))
                .collect(),
            fine: conv("conv_hr", (f, f)),
            last: conv("conv_last", (f, config.output)),
            config: config.clone(),
        }
    }

    /// `x [b, input, h, w]` → `[b, output, scale · h, scale · w]`; both sides are multiples of the square's.
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        if self.config.unshuffle > 1 {
            x = ops::pixel_unshuffle(&x, self.config.unshuffle)?;
        }
        let start = self.first.forward(&x)?; // [b, features, h, w]
        let mut x = start.clone();
        for dense in &self.blocks {
            let mut y = x.clone();
            for dense in dense {
                y = dense.forward(&y)?;
            }
            x = ops::add(&affine(&y, RESIDUAL, 0.0)?, &x)?;
        }
        let mut x = ops::add(&self.body.forward(&x)?, &start)?;
        for conv in &self.doublings {
            let (_, _, h, w) = x.dims4()?;
            x = activate(&conv.forward(&ops::upsample(&x, 2 * h, 2 * w)?)?, LEAKY)?;
        }
        let x = activate(&self.fine.forward(&x)?, LEAKY)?;
        self.last.forward(&x)
    }
}

/// Five convolutions, each of which sees all that those before it made.
struct Dense {
    convs: [Conv2d; 5],
    /// Of ESRGAN+: 1×1, without a bias.
    short: Option<Op>,
}

impl Dense {
    fn load(weights: &Weights, config: &RrdbConfig) -> Self {
        let (f, g) = (config.features, config.growth);
        let conv = |i: usize| {
            let channels = (f + (i - 1) * g, if i == 5 { f } else { g });
            Conv2d::load3x3(&weights.at(format!("conv{i}")), channels)
        };
        Self {
            convs: [1, 2, 3, 4, 5].map(conv),
            short: config.plus.then(|| Op::Conv2d {
                weight: weights.at("conv1x1").param("weight", &[g, f, 1, 1]),
                bias: None,
                stride: 1,
                padding: Padding::same(0),
                wrap: Wrap::default(),
            }),
        }
    }

    /// `x [b, features, h, w]` → the same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [first, second, third, fourth, fifth] = &self.convs;
        let x1 = activate(&first.forward(x)?, LEAKY)?; // [b, growth, h, w], as those that follow
        let seen = concat(x, &x1)?;
        let mut x2 = activate(&second.forward(&seen)?, LEAKY)?;
        if let Some(short) = &self.short {
            x2 = ops::add(&x2, &ops::apply(short.clone(), &[x])?)?;
        }
        let seen = concat(&seen, &x2)?;
        let x3 = activate(&third.forward(&seen)?, LEAKY)?;
        let seen = concat(&seen, &x3)?;
        let mut x4 = activate(&fourth.forward(&seen)?, LEAKY)?;
        if self.short.is_some() {
            x4 = ops::add(&x4, &x2)?;
        }
        let x5 = fifth.forward(&concat(&seen, &x4)?)?; // [b, features, h, w]
        ops::add(&affine(&x5, RESIDUAL, 0.0)?, x)
    }
}
