//! ControlNet-LLLite: small networks in front of a UNet's attention that look at a picture (kohya-ss, sd-scripts `networks/control_net_lllite.py`).
//!
//! Each belongs to one projection of an attention. What that projection takes, `x [b, s, c]`, becomes
//! `x + scale · up(relu(mid(emb ‖ relu(down(x)))))`, where `emb [b, s, e]` are convolutions of the picture without overlap, as small as the
//! level is on which the attention lies.

use std::collections::BTreeMap;

use sd_kernels::{Activation, Error, Padding, Result, Tensor, Weights, ops};

use crate::layers::{Conv2d, Linear};

/// The structure: a module for each projection, by the name that diffusers has for it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Config {
    /// `….attn1.to_q` and so on.
    pub modules: BTreeMap<String, Module>,
}

/// One module.
#[derive(Debug, Clone, PartialEq)]
pub struct Module {
    /// Channels of what the projection takes.
    pub width: usize,
    /// Channels between `down` and `up`.
    pub inner: usize,
    /// Channels of the picture.
    pub picture: usize,
    /// The picture's convolutions: channels that come out, and pixels of a side that become one.
    pub convolutions: Vec<(usize, usize)>,
    /// How often the latents were halved where the attention lies.
    pub level: usize,
}

impl Module {
    /// Pixels of a side that become one place of a sequence; none where that is no number.
    pub fn stride(&self) -> Option<usize> {
        let mut sides = self.convolutions.iter().map(|(_, side)| *side);
        sides.try_fold(1, usize::checked_mul)
    }

    /// The picture that it takes.
    pub fn view(&self) -> Option<View> {
        Some(View {
            stride: self.stride()?,
            level: self.level,
            channels: self.picture,
        })
    }
}

/// A picture as modules take it: so many squares as their level has places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct View {
    /// Pixels of a square's side.
    pub stride: usize,
    /// How often the latents were halved.
    pub level: usize,
    /// Channels of the picture.
    pub channels: usize,
}

impl View {
    /// Squares across and down for latents of `size` (width, height).
    pub fn squares(&self, size: (usize, usize)) -> (usize, usize) {
        let half = |side: usize| (0..self.level).fold(side, |side, _| side.div_ceil(2));
        (half(size.0), half(size.1))
    }
}

impl Config {
    /// Every picture that is taken, each once.
    pub fn views(&self) -> Vec<View> {
        let mut views: Vec<View> = self.modules.values().filter_map(Module::view).collect();
        views.sort_unstable();
        views.dedup();
        views
    }
}

/// All modules.
pub struct Lllite {
    config: Config,
    modules: BTreeMap<String, Loaded>,
}

struct Loaded {
    convolutions: Vec<Conv2d>,
    down: Linear,
    mid: Linear,
    up: Linear,
}

impl Loaded {
    fn load(weights: &Weights, module: &Module) -> Self {
        let mut input = module.picture;
        let mut convolutions = Vec::with_capacity(module.convolutions.len());
        for (i, &(output, side)) in module.convolutions.iter().enumerate() {
            // an activation stands between the convolutions
            let weights = weights.at("conditioning1").at(2 * i);
            let padding = Padding::same(0);
            convolutions.push(Conv2d::load(&weights, (input, output), side, side, padding));
            input = output;
        }
        let linear = |name, input, output| Linear::load(&weights.at(name), input, output);
        let inner = module.inner;
        Self {
            convolutions,
            down: linear("down.0", module.width, inner),
            mid: linear("mid.0", inner.saturating_add(input), inner),
            up: linear("up.0", inner, module.width),
        }
    }

    /// `picture [b, c, h · stride, w · stride]` → `[b, h · w, e]`.
    fn embed(&self, picture: &Tensor) -> Result<Tensor> {
        let mut x = picture.clone();
        for (i, convolution) in self.convolutions.iter().enumerate() {
            if i > 0 {
                x = ops::activate(&x, Activation::Relu)?;
            }
            x = convolution.forward(&x)?;
        }
        ops::flatten(&x)
    }

    /// What is added to `x [b, s, c]`.
    fn change(&self, x: &Tensor, seen: &Tensor) -> Result<Tensor> {
        let relu = |x: Tensor| ops::activate(&x, Activation::Relu);
        let x = relu(self.down.forward(x)?)?; // [b, s, inner]
        let x = relu(self.mid.forward(&ops::concat(seen, &x)?)?)?; // [b, s, inner]
        self.up.forward(&x)
    }
}

impl Lllite {
    /// Asks for every weight.
    pub fn load(weights: &Weights, config: &Config) -> Self {
        let modules = config.modules.iter();
        let modules =
            modules.map(|(name, module)| (name.clone(), Loaded::load(&weights.at(name), module)));
        Self {
            modules: modules.collect(),
            config: config.clone(),
        }
    }

    /// The structure.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// At work on a picture: `pictures` has every [`View`] of it, `[b, channels, h · stride, w · stride]`, −1 to 1.
    ///
    /// # Errors
    /// When one is missing, the shapes do not fit or the executor fails.
    pub fn look(&self, scale: f64, pictures: &BTreeMap<View, Tensor>) -> Result<Looking<'_>> {
        let mut seen = BTreeMap::new();
        for (name, loaded) in &self.modules {
            let view = self.config.modules.get(name).and_then(Module::view);
            let picture = view.and_then(|view| pictures.get(&view));
            let picture = picture.ok_or_else(|| Error::Shape {
                op: "lllite",
                expected: format!("a picture for {view:?}"),
                got: "none".to_owned(),
            })?;
            seen.insert(name.as_str(), (loaded, loaded.embed(picture)?));
        }
        Ok(Looking { scale, seen })
    }
}

/// Modules that have seen their picture.
pub struct Looking<'a> {
    scale: f64,
    seen: BTreeMap<&'a str, (&'a Loaded, Tensor)>,
}

/// What the projection `name` takes in the place of `x [b, s, c]`: all that is added follows from `x` itself.
///
/// # Errors
/// When the shapes do not fit or the executor fails.
pub fn steered(all: &[Looking<'_>], name: &str, x: &Tensor) -> Result<Tensor> {
    let mut sum = x.clone();
    for one in all {
        if let Some((module, seen)) = one.seen.get(name) {
            let change = ops::affine(&module.change(x, seen)?, one.scale, 0.0)?;
            sum = ops::add(&change, &sum)?;
        }
    }
    Ok(sum)
}
