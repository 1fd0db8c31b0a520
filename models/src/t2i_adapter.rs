//! T2I-Adapter: a small network that makes a feature of each size out of a picture, which a UNet adds on its way down (Mou et al.,
//! "T2I-Adapter: Learning Adapters to Dig out More Controllable Ability for Text-to-Image Diffusion Models", arXiv 2302.08453;
//! diffusers 0.42.1 `T2IAdapter`).
//!
//! In: the hint's pixels as channels, `[b, channels · f · f, H/f, W/f]`, 0 to 1. Out: features `[b, c, h, w]`, one for each block.

use sd_kernels::{Activation, Result, Tensor, Weights, ops};
use serde_json::Value;

use crate::config::{ConfigError, ConfigResult, Fields};
use crate::layers::Conv2d;

/// The three shapes of adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// For Stable Diffusion 1: every block but the first halves the size.
    Full,
    /// For Stable Diffusion XL: only the third block halves it.
    Xl,
    /// Narrow inside: every block but the first halves the size.
    Light,
}

/// The structure of an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Its shape.
    pub kind: Kind,
    /// Channels of the hint.
    pub hint_channels: usize,
    /// Channels of each feature.
    pub channels: Vec<usize>,
    /// Residual blocks in each block.
    pub layers: usize,
    /// Pixels of a side that become channels.
    pub factor: usize,
}

impl Config {
    /// Reads diffusers' `config.json` with the defaults of `T2IAdapter` (diffusers 0.42.1).
    ///
    /// # Errors
    /// When a field has a wrong type or asks for something that is not built.
    pub fn from_json(value: &Value) -> ConfigResult<Self> {
        let fields = Fields(value);
        let kind = match fields.text("adapter_type", "full_adapter")? {
            "full_adapter" => Kind::Full,
            "full_adapter_xl" => Kind::Xl,
            "light_adapter" => Kind::Light,
            other => {
                return Err(ConfigError(format!(
                    "config field `adapter_type` is \"{other}\", which is not supported yet"
                )));
            }
        };
        let mut channels = fields.sizes("channels", &[320, 640, 1280, 1280])?;
        if channels.is_empty() || channels.len() > 16 || channels.contains(&0) {
            return Err(ConfigError(
                "config field `channels` must list 1 to 16 numbers, all above 0".to_owned(),
            ));
        }
        if kind == Kind::Light {
            // its last block repeats the channels before
            channels.extend(channels.last().copied());
        }
        let layers = fields.size("num_res_blocks", 2)?;
        let factor = fields.positive("downscale_factor", 8)?;
        if layers > 256 || factor > 64 {
            return Err(ConfigError(format!(
                "config fields `num_res_blocks` and `downscale_factor` are {layers} and {factor}, expected at most 256 and 64"
            )));
        }
        Ok(Self {
            kind,
            hint_channels: fields.positive("in_channels", 3)?,
            channels,
            layers,
            factor,
        })
    }

    /// Channels of the hint when its pixels are channels.
    pub fn input(&self) -> usize {
        self.hint_channels.saturating_mul(self.factor * self.factor)
    }

    /// Whether block `index` halves the size first.
    pub fn halves(&self, index: usize) -> bool {
        match self.kind {
            Kind::Xl => index == 2,
            _ => index > 0,
        }
    }

    /// Channels in and out of block `index`.
    pub fn block(&self, index: usize) -> (usize, usize) {
        let output = self.channels[index];
        let before = |i: usize| i.checked_sub(1).and_then(|i| self.channels.get(i)).copied();
        let input = match self.kind {
            Kind::Light => before(index).unwrap_or(self.input()),
            Kind::Full => before(index).unwrap_or(output),
            // diffusers gives the later blocks their own channels, whatever comes before
            Kind::Xl if index == 1 || index == 2 => before(index).unwrap_or(output),
            Kind::Xl => output,
        };
        (input, output)
    }
}

/// The network.
pub struct T2iAdapter {
    config: Config,
    conv_in: Option<Conv2d>,
    blocks: Vec<Block>,
}

struct Block {
    halves: bool,
    in_conv: Option<Conv2d>,
    layers: Vec<(Conv2d, Conv2d)>,
    out_conv: Option<Conv2d>,
}

impl T2iAdapter {
    /// Asks for every weight of the network.
    pub fn load(weights: &Weights, config: &Config) -> Self {
        let weights = weights.at("adapter");
        let light = config.kind == Kind::Light;
        let body = weights.at("body");
        let block = |i: usize| {
            let weights = body.at(i);
            let (input, output) = config.block(i);
            let width = if light { output / 4 } else { output };
            let layer = |j: usize| {
                let weights = weights.at("resnets").at(j);
                let (first, second) = (weights.at("block1"), weights.at("block2"));
                let second = match light {
                    true => Conv2d::load3x3(&second, (width, width)),
                    false => Conv2d::load1x1(&second, (width, width)),
                };
                (Conv2d::load3x3(&first, (width, width)), second)
            };
            Block {
                halves: config.halves(i),
                in_conv: (light || input != output)
                    .then(|| Conv2d::load1x1(&weights.at("in_conv"), (input, width))),
                layers: (0..config.layers).map(layer).collect(),
                out_conv: light.then(|| Conv2d::load1x1(&weights.at("out_conv"), (width, output))),
            }
        };
        Self {
            conv_in: (!light).then(|| {
                Conv2d::load3x3(&weights.at("conv_in"), (config.input(), config.channels[0]))
            }),
            blocks: (0..config.channels.len()).map(block).collect(),
            config: config.clone(),
        }
    }

    /// The network's structure.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Features of the hint, times `scale`.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub fn forward(&self, hint: &Tensor, scale: f64) -> Result<Vec<Tensor>> {
        let mut x = match &self.conv_in {
            Some(conv) => conv.forward(hint)?,
            None => hint.clone(),
        };
        let mut features = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            x = block.forward(x)?;
            features.push(ops::affine(&x, scale, 0.0)?);
        }
        Ok(features)
    }
}

impl Block {
    fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        if self.halves {
            x = ops::average_pool(&x)?;
        }
        if let Some(conv) = &self.in_conv {
            x = conv.forward(&x)?;
        }
        for (first, second) in &self.layers {
            let h = ops::activate(&first.forward(&x)?, Activation::Relu)?;
            x = ops::add(&second.forward(&h)?, &x)?;
        }
        match &self.out_conv {
            Some(conv) => conv.forward(&x),
            None => Ok(x),
        }
    }
}
