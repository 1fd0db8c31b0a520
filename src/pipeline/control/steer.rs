//! How what steers is recorded beside a UNet, or computed.

use std::borrow::Cow;

use sd_kernels::{Tensor, ops};
use sd_models::controlnet::{ControlNet, Hint};
use sd_models::denoiser::{Inputs, Residuals, Steering};
use sd_models::lllite::Looking;
use sd_models::unet::ImagePrompt;

use super::{Acting, LoadedControl, Network, hint_name, kind_name, view_name};
use crate::error::{Error, Result};

/// Makes the tensor that stands for an input: a node or data.
type Give<'a> = dyn Fn(&str, &[usize]) -> Result<Tensor> + 'a;

/// What networks add to a UNet.
#[derive(Default)]
pub(in super::super) struct Steered<'a> {
    residuals: Option<Residuals>,
    features: Vec<Tensor>,
    lites: Vec<Looking<'a>>,
}

impl Steered<'_> {
    /// The same beside pictures that stand with the text.
    pub(in super::super) fn beside<'a>(&'a self, images: &'a [ImagePrompt<'a>]) -> Steering<'a> {
        Steering {
            residuals: self.residuals.as_ref(),
            features: &self.features,
            lites: &self.lites,
            images,
        }
    }
}

/// What the networks of `acting` add to a UNet that takes `inputs`.
///
/// # Errors
/// When the shapes do not fit.
pub(in super::super) fn steer<'a>(
    loaded: &'a [LoadedControl],
    acting: &[Acting],
    inputs: &Inputs<'_>,
    give: &Give<'_>,
) -> Result<Steered<'a>> {
    let (batch, _, h, w) = inputs.sample.dims4()?;
    let mut steered = Steered::default();
    for one in acting {
        let Some(control) = loaded.get(one.index) else {
            return Err(Error::Numeric("a control network is missing".to_owned()));
        };
        let picture = || give(&hint_name(one.index), &control.hint_shape(batch, (w, h)));
        match &control.network {
            Network::Net(net) => {
                let more = steer_net(net, one, inputs, (&picture()?, give))?;
                steered.residuals = Some(match steered.residuals {
                    Some(residuals) => residuals.plus(&more)?,
                    None => more,
                });
            }
            Network::Lite(lite) => {
                let views = lite.config().views().into_iter();
                let pictures = views.map(|view| {
                    let (across, down) = view.squares((w, h));
                    let (high, wide) = (down * view.stride, across * view.stride);
                    let shape = [batch, view.channels, high, wide];
                    Ok((view, give(&view_name(one.index, view), &shape)?))
                });
                let pictures = pictures.collect::<Result<_>>()?;
                steered
                    .lites
                    .push(lite.look(one.strength.scale, &pictures)?);
            }
            Network::Adapter(adapter) => {
                let more = adapter.forward(&picture()?, one.strength.scale)?;
                let features = &mut steered.features;
                *features = match features.len() {
                    0 => more,
                    count if count == more.len() => {
                        let sums = features.iter().zip(&more).map(|(a, b)| ops::add(a, b));
                        sums.collect::<sd_kernels::Result<_>>()?
                    }
                    _ => {
                        return Err(Error::Usage(
                            "the T2I-Adapters have different numbers of features; they are not for one family"
                                .to_owned(),
                        ));
                    }
                };
            }
        }
    }
    Ok(steered)
}

/// What a ControlNet adds.
fn steer_net(
    net: &ControlNet,
    one: &Acting,
    inputs: &Inputs<'_>,
    (picture, give): (&Tensor, &Give<'_>),
) -> Result<Residuals> {
    let (batch, ..) = inputs.sample.dims4()?;
    let config = net.config();
    let width = config.union.map_or(0, |union| union.kinds * union.number);
    let sinusoids = match one.kind {
        Some(kind) => Some((kind, give(&kind_name(one.index), &[batch, width])?)),
        None => None,
    };
    // a ControlNet has half the UNet's inputs only where it has the layers for them
    let inputs = Inputs {
        added: inputs.added.filter(|_| config.trunk.added.is_some()),
        label: inputs.label.filter(|_| config.trunk.classes.is_some()),
        guidance: inputs
            .guidance
            .filter(|_| config.trunk.time.condition.is_some()),
        ..*inputs
    };
    let hint = Hint {
        picture,
        kind: sinusoids.as_ref().map(|(kind, x)| (*kind, x)),
    };
    Ok(net.forward(&inputs, hint, one.strength)?)
}

/// Numbers of the inputs of `acting` for `n` pictures.
///
/// # Errors
/// When the executor fails.
pub(in super::super) fn values(
    loaded: &[LoadedControl],
    acting: &[Acting],
    n: usize,
) -> Result<Vec<(Cow<'static, str>, Vec<f32>)>> {
    let mut all = Vec::new();
    for one in acting {
        for (name, hint) in one.hints.iter() {
            all.push((Cow::from(name.clone()), hint.repeat(n)));
        }
        let network = loaded.get(one.index).map(|control| &control.network);
        if let (Some(Network::Net(net)), Some(which)) = (network, one.kind)
            && let Some(sinusoids) = net.embed_kind(which)?
        {
            let sinusoids: Vec<f32> = sinusoids.into_data()?.flatten_all()?.to_vec1()?;
            all.push((Cow::from(kind_name(one.index)), sinusoids.repeat(n)));
        }
    }
    Ok(all)
}
