//! Rules by which the predictions of negative prompt and prompt become one.
//!
//! All of them look at one picture of a batch at a time, so that a picture equals the one made alone.

use candle_core::Tensor;

use super::mimic::Mimic;
use crate::error::{Error, Result};

/// How two predictions become one.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Rule {
    /// Negative + scale · (prompt − negative).
    #[default]
    Plain,
    /// Adaptive projected guidance (Sadat et al., arXiv 2410.02416).
    Projected(Projected),
    /// CFG-Zero* (Fan et al., arXiv 2503.18886): the negative prediction is scaled to fit the prompt's, and the first steps predict nothing.
    ZeroStar {
        /// How many steps predict nothing.
        zero_steps: usize,
    },
    /// Perp-Neg (Armandpour et al., arXiv 2304.04968; ComfyUI's form): of the negative prompt counts what is perpendicular to the prompt, both seen
    /// from the empty text.
    Perpendicular {
        /// How much of it.
        scale: f64,
    },
    /// Tangential damping (Kwon et al., arXiv 2503.18137): the negative prediction without what lies across both.
    Tangential,
    /// High scales that keep the range of low ones (sd-dynamic-thresholding).
    Mimic(Mimic),
}

/// Adaptive projected guidance, as diffusers 0.42.1's guider has it: on predictions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Projected {
    /// How much of the part along the prompt's prediction remains.
    pub eta: f64,
    /// The most that the difference's norm may be; 0 is no bound.
    pub threshold: f64,
    /// How much of the last difference is added to each; usually negative.
    pub momentum: Option<f64>,
}

impl Rule {
    /// The flag that asks for it.
    pub(super) fn flag(&self) -> &'static str {
        match self {
            Self::Plain => "--cfg-scale",
            Self::Projected(_) => "--apg",
            Self::ZeroStar { .. } => "--cfg-zero",
            Self::Perpendicular { .. } => "--perp-neg",
            Self::Tangential => "--tcfg",
            Self::Mimic(_) => "--mimic-scale",
        }
    }

    /// Its numbers with their flags.
    pub(super) fn numbers(&self) -> Vec<(&'static str, f64)> {
        match self {
            Self::Projected(apg) => [
                ("--apg-eta", Some(apg.eta)),
                ("--apg-threshold", Some(apg.threshold)),
                ("--apg-momentum", apg.momentum),
            ]
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)))
            .collect(),
            Self::Perpendicular { scale } => vec![("--perp-neg", *scale)],
            Self::Mimic(mimic) => vec![("--mimic-scale", mimic.scale), ("--mimic-phi", mimic.phi)],
            Self::Plain | Self::ZeroStar { .. } | Self::Tangential => Vec::new(),
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        match self {
            Self::Mimic(mimic) if !(0.0..=100.0).contains(&mimic.percentile) => {
                Err(Error::Usage(format!(
                    "--mimic-percentile is {}, expected 0 to 100",
                    mimic.percentile
                )))
            }
            Self::Projected(apg) if apg.threshold < 0.0 => Err(Error::Usage(format!(
                "--apg-threshold is {}, expected 0 (none) or more",
                apg.threshold
            ))),
            _ => Ok(()),
        }
    }
}

/// `f(slices of one picture, its result)` for every picture of tensors of one shape `[n, …]`.
pub(super) fn by_picture(
    tensors: &[&Tensor],
    mut f: impl FnMut(&[&[f32]], &mut [f32]),
) -> Result<Tensor> {
    let first = tensors
        .first()
        .ok_or_else(|| Error::Numeric("guidance needs predictions".to_owned()))?;
    let values = tensors
        .iter()
        .map(|x| Ok(x.flatten_all()?.to_vec1::<f32>()?))
        .collect::<Result<Vec<Vec<f32>>>>()?;
    let len = first.elem_count();
    let each = (len / first.dim(0)?.max(1)).max(1);
    let mut out = vec![0f32; len];
    for (i, out) in out.chunks_mut(each).enumerate() {
        let slices: Vec<&[f32]> = values.iter().map(|x| &x[i * each..][..each]).collect();
        f(&slices, out);
    }
    Ok(Tensor::from_vec(out, first.shape(), first.device())?)
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
    products.sum()
}

/// `Σ factor · slice`.
fn sum<const N: usize>(out: &mut [f32], terms: [(f64, &[f32]); N]) {
    for (i, out) in out.iter_mut().enumerate() {
        let terms = terms.iter();
        *out = terms
            .map(|(factor, x)| factor * f64::from(x[i]))
            .sum::<f64>() as f32;
    }
}

/// `difference` of the predictions, which may be what earlier steps left of it, becomes the guided prediction.
pub(super) fn projected(
    apg: &Projected,
    scale: f64,
    (negative, prompt, difference): (&Tensor, &Tensor, &Tensor),
) -> Result<Tensor> {
    by_picture(&[negative, prompt, difference], |slices, out| {
        let &[negative, prompt, difference] = slices else {
            return;
        };
        let norm = dot(difference, difference).sqrt();
        let bound = match apg.threshold > 0.0 && norm > apg.threshold {
            true => apg.threshold / norm,
            false => 1.0,
        };
        // torch's `normalize` divides by at least this
        let length = dot(prompt, prompt).sqrt().max(1e-12);
        let along = bound * dot(difference, prompt) / (length * length);
        let terms = [
            (1.0, negative),
            (scale * bound, difference),
            (scale * (apg.eta - 1.0) * along, prompt),
        ];
        sum(out, terms);
    })
}

pub(super) fn zero_star(scale: f64, (negative, prompt): (&Tensor, &Tensor)) -> Result<Tensor> {
    by_picture(&[negative, prompt], |slices, out| {
        let &[negative, prompt] = slices else { return };
        let fit = dot(prompt, negative) / (dot(negative, negative) + 1e-8);
        sum(out, [(fit * (1.0 - scale), negative), (scale, prompt)]);
    })
}

pub(super) fn perpendicular(
    (scale, weight): (f64, f64),
    (negative, prompt, empty): (&Tensor, &Tensor, &Tensor),
) -> Result<Tensor> {
    by_picture(&[negative, prompt, empty], |slices, out| {
        let &[negative, prompt, empty] = slices else {
            return;
        };
        let from = |x: &[f32]| -> Vec<f32> { x.iter().zip(empty).map(|(x, e)| x - e).collect() };
        let (positive, negative) = (from(prompt), from(negative));
        let norm = dot(&positive, &positive);
        let along = match norm > 0.0 {
            true => dot(&negative, &positive) / norm,
            false => 0.0,
        };
        let terms = [
            (1.0, empty),
            (scale * (1.0 + weight * along), positive.as_slice()),
            (-scale * weight, negative.as_slice()),
        ];
        sum(out, terms);
    })
}

/// The negative prediction becomes its part along the first right singular vector of both.
pub(super) fn tangential(scale: f64, (negative, prompt): (&Tensor, &Tensor)) -> Result<Tensor> {
    by_picture(&[negative, prompt], |slices, out| {
        let &[negative, prompt] = slices else { return };
        let (cc, cu, uu) = (
            dot(prompt, prompt),
            dot(prompt, negative),
            dot(negative, negative),
        );
        // the larger eigenvalue of [[cc, cu], [cu, uu]] and its vector (a, b)
        let half = (cc - uu) / 2.0;
        let root = (half * half + cu * cu).sqrt();
        let largest = (cc + uu) / 2.0 + root;
        let (a, b) = match half >= 0.0 {
            true => (half + root, cu),
            false => (cu, root - half),
        };
        let length = a.hypot(b);
        let (a, b) = match length > 0.0 {
            true => (a / length, b / length),
            false => (1.0, 0.0),
        };
        let along = match largest > 0.0 {
            true => (a * cu + b * uu) / largest,
            false => 0.0,
        };
        let kept = (1.0 - scale) * along;
        sum(out, [(scale + kept * a, prompt), (kept * b, negative)]);
    })
}

/// `guided` brought back, by the part `part`, to the deviation of the prompt's prediction (Lin et al., arXiv 2305.08891, section 3.4).
pub(super) fn rescaled(part: f64, guided: &Tensor, prompt: &Tensor) -> Result<Tensor> {
    by_picture(&[guided, prompt], |slices, out| {
        let &[guided, prompt] = slices else { return };
        let (is, wanted) = (deviation(guided), deviation(prompt));
        let factor = match is > 0.0 {
            true => part * wanted / is + (1.0 - part),
            false => 1.0,
        };
        sum(out, [(factor, guided)]);
    })
}

/// The deviation of a sample, n − 1 in the denominator.
pub(super) fn deviation(x: &[f32]) -> f64 {
    let n = x.len() as f64;
    let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let squares = x.iter().map(|&x| (f64::from(x) - mean).powi(2));
    (squares.sum::<f64>() / (n - 1.0).max(1.0)).sqrt()
}
