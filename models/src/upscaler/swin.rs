//! Networks of attention within windows: SwinIR (Liang et al., arXiv 2108.10257), Swin2SR (Conde et al., arXiv 2209.11345) and HAT (Chen et al.,
//! "Activating More Pixels in Image Super-Resolution Transformer", arXiv 2205.04437). The names are those of their authors' code.

use std::sync::Arc;

use sd_kernels::ops::{self, activate, affine};
use sd_kernels::{Activation, Result, Tensor, Weights};

use super::swin_block::{Block, Overlap};
use crate::layers::{Conv2d, LayerNorm};

/// What is below 0 is divided by 5.
const LEAKY: Activation = Activation::LeakyRelu { percent: 20 };
/// PyTorch's own slope: behind the convolution before enlargements.
const SLIGHT: Activation = Activation::LeakyRelu { percent: 1 };
/// The mean of a collection of photographs (DIV2K), which is taken from pictures of three channels.
const MEAN: [f32; 3] = [0.4488, 0.4371, 0.4040];
/// Added to variances.
pub(super) const EPS: f64 = 1e-5;

/// The structure of such a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwinConfig {
    /// Which of the three.
    pub kind: SwinKind,
    /// Channels of pictures that come in.
    pub input: usize,
    /// Channels of pictures that go out.
    pub output: usize,
    /// Channels between blocks.
    pub width: usize,
    /// Channels inside of a block's two linear layers.
    pub hidden: usize,
    /// Pixels of a window's side.
    pub window: usize,
    /// Groups of blocks.
    pub groups: Vec<SwinGroup>,
    /// Whether queries and values, and where it is not Swin2SR keys, have a bias.
    pub bias: bool,
    /// Whether what goes into the first group is normalised.
    pub norm: bool,
    /// What stands behind each group, and behind all.
    pub link: Link,
    /// How the picture is made larger.
    pub tail: Tail,
    /// Pixels of a square whose channels stand side by side before the first convolution; 1 for none.
    pub unshuffle: usize,
    /// Pictures are 0 to 255 inside.
    pub bytes: bool,
}

/// Which network of windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SwinKind {
    /// SwinIR: norms before what they are for, scores with a table.
    First,
    /// Swin2SR: norms behind, scores that are cosines.
    Second {
        /// Channels of the network that makes the tables.
        positions: usize,
    },
    /// HAT: as SwinIR, with convolutions beside and a look around at each group's end.
    Hybrid {
        /// Channels between a block's two convolutions.
        squeezed: usize,
        /// Channels of the network that weighs channels.
        weighed: usize,
        /// Pixels that the look around goes beyond a window.
        beyond: usize,
    },
}

/// Blocks one behind the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SwinGroup {
    /// How many.
    pub blocks: usize,
    /// Heads of each.
    pub heads: usize,
}

/// What stands before something is added to what came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Nothing.
    Nothing,
    /// A 3×3 convolution.
    One,
    /// A 3×3, a 1×1 and a 3×3 convolution with so many channels between them.
    Three(usize),
}

/// The end of such a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tail {
    /// A convolution, whose result is added to the picture.
    Same,
    /// A convolution that makes the pixels of a square.
    Direct {
        /// Side of the square.
        scale: usize,
    },
    /// Convolutions that each make the pixels of a square.
    Shuffle {
        /// Channels between them.
        features: usize,
        /// Sides of the squares.
        factors: Vec<usize>,
    },
    /// A convolution behind each of so many doublings.
    Nearest {
        /// Channels between them.
        features: usize,
        /// How many.
        doublings: usize,
    },
}

impl SwinConfig {
    /// How many pixels wide one pixel of a square that the first convolution takes becomes.
    pub fn factor(&self) -> usize {
        match &self.tail {
            Tail::Same => 1,
            Tail::Direct { scale } => *scale,
            Tail::Shuffle { factors, .. } => factors.iter().product(),
            Tail::Nearest { doublings, .. } => 1 << doublings,
        }
    }

    /// How many pixels wide one pixel becomes.
    pub fn scale(&self) -> usize {
        self.factor() / self.unshuffle
    }

    /// What both sides of a picture are a multiple of.
    pub(super) fn multiple(&self) -> usize {
        self.window * self.unshuffle
    }

    /// See [`super::Config::reach`].
    pub(super) fn reach(&self) -> Option<usize> {
        if matches!(self.kind, SwinKind::Hybrid { .. }) {
            return None; // it weighs channels by their means over the picture
        }
        let link = match self.link {
            Link::Nothing => 0,
            Link::One => 1,
            Link::Three(_) => 2,
        };
        let group = |group: &SwinGroup| group.blocks * (self.window - 1) + link;
        // the first convolution, the groups, what stands behind them, the one before enlargements, and a pixel less than three in the larger pictures
        let groups: usize = self.groups.iter().map(group).sum();
        Some((1 + groups + link + 1 + 3) * self.unshuffle)
    }
}

/// The network.
pub struct Swin {
    config: SwinConfig,
    first: Conv2d,
    /// Of Swin2SR: a 1×1 convolution before tokens.
    embed: Option<Conv2d>,
    embed_norm: Option<LayerNorm>,
    groups: Vec<Group>,
    norm: LayerNorm,
    body: Convs,
    before: Option<Conv2d>,
    steps: Vec<Conv2d>,
    fine: Option<Conv2d>,
    last: Option<Conv2d>,
}

impl Swin {
    /// Asks for every weight.
    pub fn load(weights: &Weights, config: &SwinConfig) -> Self {
        let (c, inside) = (config.width, weights.at("patch_embed"));
        let conv = |name: String, channels| Conv2d::load3x3(&weights.at(name), channels);
        let named = |name: &str, channels| Some(conv(name.to_owned(), channels));
        let second = matches!(config.kind, SwinKind::Second { .. });
        let input = config.input * config.unshuffle * config.unshuffle;
        let groups = config.groups.iter().enumerate();
        let (before, steps, fine, last) = match &config.tail {
            Tail::Same => (
                None,
                Vec::new(),
                None,
                named("conv_last", (c, config.output)),
            ),
            Tail::Direct { scale } => {
                let step = conv("upsample.0".to_owned(), (c, config.output * scale * scale));
                (None, vec![step], None, None)
            }
            Tail::Shuffle { features, factors } => {
                let f = *features;
                let steps = factors.iter().enumerate();
                let step =
                    |(i, n): (usize, &usize)| conv(format!("upsample.{}", 2 * i), (f, f * n * n));
                (
                    named("conv_before_upsample.0", (c, f)),
                    steps.map(step).collect(),
                    None,
                    named("conv_last", (f, config.output)),
                )
            }
            Tail::Nearest {
                features,
                doublings,
            } => {
                let f = *features;
                let step = |i: usize| conv(format!("conv_up{i}"), (f, f));
                (
                    named("conv_before_upsample.0", (c, f)),
                    (1..=*doublings).map(step).collect(),
                    named("conv_hr", (f, f)),
                    named("conv_last", (f, config.output)),
                )
            }
        };
        Self {
            first: conv("conv_first".to_owned(), (input, c)),
            embed: second.then(|| Conv2d::load1x1(&inside.at("proj"), (c, c))),
            embed_norm: config
                .norm
                .then(|| LayerNorm::load(&inside.at("norm"), c, EPS)),
            groups: groups
                .map(|(i, group)| Group::load(&weights.at("layers").at(i), config, *group))
                .collect(),
            norm: LayerNorm::load(&weights.at("norm"), c, EPS),
            body: Convs::load(&weights.at("conv_after_body"), c, config.link),
            before,
            steps,
            fine,
            last,
            config: config.clone(),
        }
    }

    /// `x [b, input, h, w]` → `[b, output, scale · h, scale · w]`; both sides are multiples of the window's, times that of squares.
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let range = if self.config.bytes { 255.0 } else { 1.0 };
        let mut x = x.clone();
        if self.config.input == MEAN.len() {
            x = ops::shift(&x, &Arc::new(MEAN.map(|mean| -mean).to_vec()))?;
        }
        x = affine(&x, range, 0.0)?;
        if self.config.unshuffle > 1 {
            x = ops::pixel_unshuffle(&x, self.config.unshuffle)?;
        }
        let first = self.first.forward(&x)?; // [b, width, h, w]
        let deep = ops::add(&self.body.forward(&self.deep(&first)?)?, &first)?;
        let y = self.enlarge(&deep, &x)?;
        let y = affine(&y, 1.0 / range, 0.0)?;
        match self.config.output == MEAN.len() {
            true => ops::shift(&y, &Arc::new(MEAN.to_vec())),
            false => Ok(y),
        }
    }

    /// All groups: `[b, width, h, w]` → same.
    fn deep(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = x.dims4()?;
        let mut y = match &self.embed {
            Some(embed) => ops::flatten(&embed.forward(x)?)?,
            None => ops::flatten(x)?,
        };
        if let Some(norm) = &self.embed_norm {
            y = norm.forward(&y)?;
        }
        for group in &self.groups {
            y = group.forward(&y, (h, w))?; // [b, h · w, width]
        }
        ops::unflatten(&self.norm.forward(&y)?, h, w)
    }

    /// The picture out of `x [b, width, h, w]`; `picture` is what came in.
    fn enlarge(&self, x: &Tensor, picture: &Tensor) -> Result<Tensor> {
        let mut x = match &self.before {
            Some(before) => activate(&before.forward(x)?, SLIGHT)?,
            None => x.clone(),
        };
        let factors = match &self.config.tail {
            Tail::Same => Vec::new(),
            Tail::Direct { scale } => vec![*scale],
            Tail::Shuffle { factors, .. } => factors.clone(),
            Tail::Nearest { .. } => {
                for step in &self.steps {
                    let (_, _, h, w) = x.dims4()?;
                    x = activate(&step.forward(&ops::upsample(&x, 2 * h, 2 * w)?)?, LEAKY)?;
                }
                Vec::new()
            }
        };
        for (step, factor) in self.steps.iter().zip(factors) {
            x = ops::pixel_shuffle(&step.forward(&x)?, factor)?;
        }
        if let Some(fine) = &self.fine {
            x = activate(&fine.forward(&x)?, LEAKY)?;
        }
        if let Some(last) = &self.last {
            x = last.forward(&x)?;
        }
        match self.config.tail {
            Tail::Same => ops::add(&x, picture),
            _ => Ok(x),
        }
    }
}

/// What [`Link`] says.
struct Convs(Vec<Conv2d>);

impl Convs {
    fn load(weights: &Weights, c: usize, link: Link) -> Self {
        Self(match link {
            Link::Nothing => Vec::new(),
            Link::One => vec![Conv2d::load3x3(weights, (c, c))],
            Link::Three(between) => vec![
                Conv2d::load3x3(&weights.at(0), (c, between)),
                Conv2d::load1x1(&weights.at(2), (between, between)),
                Conv2d::load3x3(&weights.at(4), (between, c)),
            ],
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, conv) in self.0.iter().enumerate() {
            if i > 0 {
                x = activate(&x, LEAKY)?;
            }
            x = conv.forward(&x)?;
        }
        Ok(x)
    }
}

/// A group of blocks, whose result is added to what came in.
struct Group {
    blocks: Vec<Block>,
    overlap: Option<Overlap>,
    convs: Convs,
    /// Of Swin2SR.
    embed: Option<Conv2d>,
}

impl Group {
    fn load(weights: &Weights, config: &SwinConfig, group: SwinGroup) -> Self {
        let (inside, c) = (weights.at("residual_group"), config.width);
        let block = |i: usize| Block::load(&inside.at("blocks").at(i), config, (i, group.heads));
        Self {
            blocks: (0..group.blocks).map(block).collect(),
            overlap: Overlap::load(&inside.at("overlap_attn"), config, group.heads),
            convs: Convs::load(&weights.at("conv"), c, config.link),
            embed: matches!(config.kind, SwinKind::Second { .. })
                .then(|| Conv2d::load1x1(&weights.at("patch_embed.proj"), (c, c))),
        }
    }

    /// `x [b, h · w, width]` → same.
    fn forward(&self, x: &Tensor, (h, w): (usize, usize)) -> Result<Tensor> {
        let mut y = x.clone();
        for block in &self.blocks {
            y = block.forward(&y, (h, w))?;
        }
        if let Some(overlap) = &self.overlap {
            y = overlap.forward(&y, (h, w))?;
        }
        let mut y = self.convs.forward(&ops::unflatten(&y, h, w)?)?;
        if let Some(embed) = &self.embed {
            y = embed.forward(&y)?;
        }
        ops::add(&ops::flatten(&y)?, x)
    }
}
