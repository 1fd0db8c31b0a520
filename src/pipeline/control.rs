//! Pictures that steer: ControlNets and T2I-Adapters beside the UNet, ControlNet-LLLites within. What is asked of them, what of it acts at which
//! call, and how they are recorded into the UNet's graph.

mod lite;
mod steer;

pub(super) use steer::{steer, values};

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use candle_core::{DType, Device};
use sd_kernels::{Source, Weights};
use sd_models::controlnet::{self, ControlNet, Ramp, Strength};
use sd_models::lllite::{Lllite, View};
use sd_models::t2i_adapter::{self, T2iAdapter};
use sd_models::unet;

use super::coverage::{named, source};
use crate::control::{Preprocessor, Resize, hint};
use crate::error::{Error, Result};
use crate::picture::{Grey, Picture};
use crate::sampling::Trajectory;
use crate::spec::{Component, ControlSpec};
use crate::weights::{CheckpointSource, ControlLoraSource, below};

/// A picture for one ControlNet, ControlNet-LLLite or T2I-Adapter of an engine; the n-th belongs to the n-th.
#[derive(Debug, Clone, PartialEq)]
pub struct ControlRequest {
    /// The picture.
    pub picture: Picture,
    /// What is not to be seen of it, for networks that fill in: from 128 on is hidden.
    pub mask: Option<Grey>,
    /// What is made of it first.
    pub preprocessor: Preprocessor,
    /// How it gets the size of the result.
    pub resize: Resize,
    /// How much the network has to say; 1 is what it was trained for.
    pub scale: f64,
    /// Between which parts of the steps it has a say, 0 to 1.
    pub span: (f64, f64),
    /// Who matters more, picture or prompt.
    pub mode: ControlMode,
    /// For networks of several kinds of pictures: which one this is.
    pub kind: Option<usize>,
}

impl ControlRequest {
    /// The picture as it is, with everything else as usual.
    pub fn new(picture: Picture) -> Self {
        Self {
            picture,
            mask: None,
            preprocessor: Preprocessor::None,
            resize: Resize::default(),
            scale: 1.0,
            span: (0.0, 1.0),
            mode: ControlMode::default(),
            kind: None,
        }
    }
}

/// Who matters more, picture or prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum ControlMode {
    /// Both alike
    #[default]
    Balanced,
    /// The prompt: the less, the larger the picture's parts are that a residual is about (A1111's soft weights)
    Prompt,
    /// The picture: the same, and it steers only what the prompt predicts, not what the negative prompt does
    Control,
    /// diffusers' guess mode: as `control`, growing from 0.1 to 1
    Guess,
}

impl ControlMode {
    fn ramp(self) -> Ramp {
        match self {
            Self::Balanced => Ramp::Flat,
            Self::Prompt | Self::Control => Ramp::Soft,
            Self::Guess => Ramp::Guess,
        }
    }

    /// Whether only the prompt's prediction is steered.
    fn is_one_sided(self) -> bool {
        matches!(self, Self::Control | Self::Guess)
    }
}

/// A network that steers, loaded.
pub(super) struct LoadedControl {
    network: Network,
    weights: Weights,
    /// Pixels that a latent is wide.
    scale: usize,
    unused: Vec<String>,
}

enum Network {
    Net(Box<ControlNet>),
    Lite(Lllite),
    Adapter(T2iAdapter),
}

/// A request resolved: what acts in a plan.
#[derive(Debug, Clone)]
pub(super) struct Acting {
    /// Which of the engine's.
    pub(super) index: usize,
    pub(super) strength: Strength,
    pub(super) one_sided: bool,
    kind: Option<usize>,
    /// `[c, h, w]` as the network wants them, by the names of a plan's inputs.
    hints: Arc<Vec<(String, Vec<f32>)>>,
}

impl Acting {
    /// What it is to the plan: inputs of these names, the same during a run and for all pictures of a batch.
    pub(super) fn inputs(&self) -> impl Iterator<Item = Cow<'static, str>> {
        let hints = self.hints.iter().map(|(name, _)| name.clone());
        let kind = self.kind.map(|_| kind_name(self.index));
        hints.chain(kind).map(Cow::from)
    }
}

/// A request resolved, for a whole run.
#[derive(Debug, Clone)]
pub(super) struct Planned {
    pub(super) acting: Acting,
    /// For each network call whether it acts.
    pub(super) calls: Vec<bool>,
}

/// Where weights and inputs of a network that steers are found: its place in the engine.
fn label(index: usize) -> String {
    format!("control {index}")
}

fn hint_name(index: usize) -> String {
    format!("{} hint", label(index))
}

/// The same of a picture that a ControlNet-LLLite takes.
fn view_name(index: usize, view: View) -> String {
    let View {
        stride,
        level,
        channels,
    } = view;
    format!("{} {stride} {level} {channels}", hint_name(index))
}

fn kind_name(index: usize) -> String {
    format!("{} kind", label(index))
}

impl LoadedControl {
    /// Builds a network over a model's UNet; `base` are that one's weights.
    ///
    /// # Errors
    /// [`Error::Weights`] that lists what is missing; [`Error::Usage`] when it was made for another family.
    pub(super) fn load(
        spec: &ControlSpec,
        index: usize,
        (unet, scale): (&unet::Config, usize),
        base: &Arc<dyn Source>,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        let own = match spec {
            ControlSpec::Net(component) | ControlSpec::Lora(component) => source(component),
            ControlSpec::Lite(component) => source(component),
            ControlSpec::Adapter(component) => source(component),
        };
        let source: Arc<dyn Source> = match spec {
            ControlSpec::Lora(_) => Arc::new(ControlLoraSource {
                own: Arc::clone(&own),
                base: Arc::clone(base),
            }),
            _ => Arc::<CheckpointSource>::clone(&own),
        };
        let weights = below(&label(index), source, dtype, device);
        let network = match spec {
            ControlSpec::Net(Component { config, .. })
            | ControlSpec::Lora(Component { config, .. }) => {
                fits(config, (unet, scale))?;
                Network::Net(Box::new(ControlNet::load(&weights, config)))
            }
            ControlSpec::Lite(component) => {
                Network::Lite(Lllite::load(&weights, &component.config))
            }
            ControlSpec::Adapter(component) => {
                adapter_fits(&component.config, unet)?;
                Network::Adapter(T2iAdapter::load(&weights, &component.config))
            }
        };
        named(spec.title(), weights.check())?;
        Ok(Self {
            network,
            weights,
            scale,
            unused: spec.left(&own.found()),
        })
    }

    /// Tensors of its file that nothing asked for.
    pub(super) fn unused(&self) -> &[String] {
        &self.unused
    }

    /// Reads all weights, for the eager executor.
    ///
    /// # Errors
    /// Whatever reading gives.
    pub(super) fn finish(&self) -> Result<()> {
        self.weights.finish()?;
        Ok(())
    }

    /// Bytes of its weights as the eager executor holds them.
    pub(super) fn bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// The pictures that a ControlNet-LLLite takes.
    fn views(&self) -> Option<Vec<View>> {
        match &self.network {
            Network::Lite(lite) => Some(lite.config().views()),
            Network::Net(_) | Network::Adapter(_) => None,
        }
    }

    /// Channels of the one picture that others take, and how many pixels of a side become channels.
    fn hint_form(&self) -> (usize, usize) {
        match &self.network {
            Network::Net(net) => (net.config().hint_channels, 1),
            Network::Lite(_) => (3, 1),
            Network::Adapter(adapter) => (adapter.config().hint_channels, adapter.config().factor),
        }
    }

    /// The kinds of pictures that it tells apart.
    fn kinds(&self) -> Option<usize> {
        match &self.network {
            Network::Net(net) => net.config().union.map(|union| union.kinds),
            Network::Lite(_) | Network::Adapter(_) => None,
        }
    }

    fn pools(&self) -> bool {
        matches!(&self.network, Network::Net(net) if net.config().pools)
    }

    /// One that acts as far as sizes go: for estimates.
    pub(super) fn stand_in(&self, index: usize) -> Acting {
        let names = match self.views() {
            Some(views) => views.iter().map(|view| view_name(index, *view)).collect(),
            None => vec![hint_name(index)],
        };
        let hints = names.into_iter().map(|name| (name, Vec::new()));
        Acting {
            index,
            strength: Strength {
                scale: 1.0,
                ramp: Ramp::Flat,
            },
            one_sided: false,
            kind: self.kinds().map(|_| 0),
            hints: Arc::new(hints.collect()),
        }
    }

    /// Resolves a request for a picture of `size` (width, height) in pixels.
    ///
    /// # Errors
    /// [`Error::Usage`] for values out of range and sizes that do not fit.
    pub(super) fn resolve(
        &self,
        request: &ControlRequest,
        index: usize,
        (width, height): (usize, usize),
    ) -> Result<Acting> {
        let parts = [request.span.0, request.span.1];
        if !request.scale.is_finite() || parts.iter().any(|part| !(0.0..=1.0).contains(part)) {
            return Err(Error::Usage(format!(
                "--control-scale is {}, --control-start {} and --control-end {}, expected a number and parts of the steps from 0 to 1",
                request.scale, request.span.0, request.span.1
            )));
        }
        let kind = match (self.kinds(), request.kind) {
            (None, None) => None,
            (None, Some(_)) => {
                return Err(Error::Usage(
                    "--control-type is for ControlNets of several kinds (union); leave it out"
                        .to_owned(),
                ));
            }
            (Some(kinds), Some(kind)) if kind < kinds => Some(kind),
            (Some(kinds), _) => {
                return Err(Error::Usage(format!(
                    "this ControlNet is for {kinds} kinds of pictures; say which one this is with --control-type, 0 to {}",
                    kinds.saturating_sub(1)
                )));
            }
        };
        let ramp = match &self.network {
            Network::Net(_) => request.mode.ramp(),
            Network::Lite(_) if request.mode != ControlMode::Balanced => {
                return Err(Error::Usage(
                    "--control-mode is for ControlNets and T2I-Adapters, and this is a ControlNet-LLLite; leave it out, and say with --control-scale how much it has to say".to_owned(),
                ));
            }
            Network::Lite(_) | Network::Adapter(_) => Ramp::Flat,
        };
        Ok(Acting {
            index,
            strength: Strength {
                scale: request.scale,
                ramp,
            },
            one_sided: request.mode.is_one_sided() || self.pools(),
            kind,
            hints: Arc::new(self.hints(request, index, (width, height))?),
        })
    }

    /// The request's picture as the network wants it.
    fn hints(
        &self,
        request: &ControlRequest,
        index: usize,
        (width, height): (usize, usize),
    ) -> Result<Vec<(String, Vec<f32>)>> {
        let hint = |channels: usize, bgr: bool| {
            hint(
                (&request.picture, request.mask.as_ref()),
                (request.preprocessor, request.resize),
                (width, height),
                (channels, bgr),
            )
        };
        if let Some(views) = self.views() {
            let latents = (width / self.scale.max(1), height / self.scale.max(1));
            let mut planes = BTreeMap::new();
            let mut hints = Vec::with_capacity(views.len());
            for view in views {
                let planar = match planes.entry(view.channels) {
                    Entry::Occupied(made) => made.into_mut(),
                    Entry::Vacant(none) => none.insert(hint(view.channels, false)?),
                };
                let values = lite::viewed(planar, (width, height), view, latents)?;
                hints.push((view_name(index, view), values));
            }
            return Ok(hints);
        }
        let (channels, factor) = self.hint_form();
        if !width.is_multiple_of(factor) || !height.is_multiple_of(factor) {
            return Err(Error::Usage(format!(
                "the picture is {width}x{height}, and this T2I-Adapter wants multiples of {factor}"
            )));
        }
        let bgr = matches!(&self.network, Network::Net(net) if net.config().bgr);
        let values = unshuffled(hint(channels, bgr)?, (channels, width, height), factor);
        Ok(vec![(hint_name(index), values)])
    }

    /// The shape of the hint for latents `[b, _, h, w]`.
    fn hint_shape(&self, batch: usize, (w, h): (usize, usize)) -> Vec<usize> {
        let (channels, factor) = self.hint_form();
        let side = |latents: usize| latents * self.scale / factor.max(1);
        vec![batch, channels * factor * factor, side(h), side(w)]
    }
}

/// For each call of a run whether what has `span` acts: by the part of the calls, as diffusers counts, or of the steps, as A1111 does.
pub(super) fn acting_calls(trajectory: &Trajectory, span: (f64, f64), by_calls: bool) -> Vec<bool> {
    let count = trajectory.calls.len() as f64;
    let calls = trajectory.calls.iter().enumerate();
    calls
        .map(|(i, call)| {
            if by_calls {
                let i = i as f64;
                i / count >= span.0 && (i + 1.0) / count <= span.1
            } else {
                let part = call.step as f64 / trajectory.steps.max(1) as f64;
                (span.0..=span.1).contains(&part)
            }
        })
        .collect()
}

/// `[c, h, w]` with squares of `factor` pixels as channels: `[c · f · f, h/f, w/f]`, as `torch.nn.PixelUnshuffle`.
fn unshuffled(
    planar: Vec<f32>,
    (channels, width, height): (usize, usize, usize),
    factor: usize,
) -> Vec<f32> {
    if factor <= 1 {
        return planar;
    }
    let (w, h) = (width / factor, height / factor);
    let mut out = Vec::with_capacity(planar.len());
    for plane in planar.chunks_exact(width * height).take(channels) {
        for (dy, dx) in (0..factor).flat_map(|dy| (0..factor).map(move |dx| (dy, dx))) {
            for y in 0..h {
                let row = &plane[(y * factor + dy) * width..][..width];
                out.extend((0..w).map(|x| row[x * factor + dx]));
            }
        }
    }
    out
}

/// Whether a ControlNet was made for this UNet, and pictures of latents `scale` pixels wide.
fn fits(config: &controlnet::Config, (unet, scale): (&unet::Config, usize)) -> Result<()> {
    let widths = |config: &unet::Config| {
        let levels = config.levels.iter();
        let levels = levels.map(|level| (level.channels, level.down.len()));
        (levels.collect::<Vec<_>>(), config.mid != unet::Mid::None)
    };
    if widths(&config.trunk) != widths(unet) {
        return Err(Error::Usage(format!(
            "the ControlNet has levels of {:?} channels and residual blocks, and the model {:?}; give one that was made for this family",
            widths(&config.trunk).0,
            widths(unet).0
        )));
    }
    if config.trunk.context_width() != unet.context_width() {
        return Err(Error::Usage(format!(
            "the ControlNet reads text {} wide, and the model's is {}; give one that was made for this family",
            config.trunk.context_width(),
            unet.context_width()
        )));
    }
    // what stands beside the latents, such as a mask, is the UNet's alone
    if config.trunk.in_channels != unet.out_channels {
        return Err(Error::Usage(format!(
            "the ControlNet takes latents of {} channels, and the model's UNet {}; they do not go together",
            config.trunk.in_channels, unet.out_channels
        )));
    }
    if let Some(added) = config.trunk.added
        && unet.added.map(|added| added.input) != Some(added.input)
    {
        return Err(Error::Usage(
            "the ControlNet is told sizes beside the time that the model's UNet is not; give one that was made for this family".to_owned(),
        ));
    }
    if config.hint_scale() != scale {
        return Err(Error::Usage(format!(
            "the ControlNet wants pictures {} times as large as latents, and the model's are {scale} times as large",
            config.hint_scale()
        )));
    }
    Ok(())
}

fn adapter_fits(config: &t2i_adapter::Config, unet: &unet::Config) -> Result<()> {
    let wanted: Vec<usize> = unet.levels.iter().map(|level| level.channels).collect();
    let common = config.channels.len().min(wanted.len());
    if config.channels[..common] != wanted[..common] || config.channels.len() > wanted.len() + 1 {
        return Err(Error::Usage(format!(
            "the T2I-Adapter makes features of {:?} channels, and the model's levels have {wanted:?}; give one that was made for this family",
            config.channels
        )));
    }
    Ok(())
}
