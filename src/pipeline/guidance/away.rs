//! Away from a network that sees less: perturbed attention (Ahn et al., arXiv 2403.17377), and blurred latents (Hong et al., arXiv 2210.00939).

use candle_core::Tensor;

use super::rules::by_picture;
use crate::error::{Error, Result};

/// Guidance away from a network in some of whose self-attentions every place sees itself alone (diffusers 0.42.1
/// `StableDiffusionPAGPipeline`).
#[derive(Debug, Clone, PartialEq)]
pub struct Perturbed {
    /// How much of the difference is added.
    pub scale: f64,
    /// How much less it is for each of the 1000 times of training that noise is behind; 0 is none.
    pub adaptive: f64,
    /// Parts of the names of self-attentions, such as `mid` or `down_blocks.1`.
    pub layers: Vec<String>,
}

impl Perturbed {
    /// The scale at a time from 0 to 999.
    pub(in super::super) fn at(&self, timestep: f64) -> f64 {
        match self.adaptive > 0.0 {
            true => (self.scale - self.adaptive * (1000.0 - timestep)).max(0.0),
            false => self.scale,
        }
    }
}

/// The self-attentions, of those that a network has, that the `layers` name.
///
/// # Errors
/// [`Error::Usage`] when one of them names none.
pub(in super::super) fn resolve(layers: &[String], names: &[&str]) -> Result<Vec<String>> {
    if names.is_empty() {
        return Err(Error::Usage(
            "--pag-scale is for UNets with self-attention, and this model has none; leave it out"
                .to_owned(),
        ));
    }
    let mut found = Vec::new();
    for layer in layers {
        let before = found.len();
        let named = names.iter().filter(|name| name.contains(layer.as_str()));
        found.extend(named.map(|&name| name.to_owned()));
        if layer.is_empty() || found.len() == before {
            return Err(Error::Usage(format!(
                "--pag-layers names {layer:?}, expected a part of a self-attention's name, such as mid, down_blocks.1 or {}",
                names.last().unwrap_or(&"")
            )));
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// Pixels of the kernel on each side of its middle; its deviation is one pixel.
const REACH: usize = 4;

/// Clean latents `[n, c, h, w]`, less themselves blurred, where `mass [n, 1, h', w']`, how much places are looked at, is above 1; 0 elsewhere.
pub(in super::super) fn blurred(denoised: &Tensor, mass: &Tensor) -> Result<Tensor> {
    let ((_, _, h, w), (_, _, mh, mw)) = (denoised.dims4()?, mass.dims4()?);
    if h <= REACH || w <= REACH {
        return Err(Error::Usage(format!(
            "--sag-scale blurs over {REACH} latents on each side, and the picture has {w}x{h}; make it larger"
        )));
    }
    let looked_at: Vec<f32> = mass.flatten_all()?.to_vec1()?;
    let mut picture = 0;
    by_picture(&[denoised], |slices, out| {
        let &[x] = slices else { return };
        let mass = &looked_at[picture * mh * mw..][..mh * mw];
        picture += 1;
        for (x, out) in x.chunks(h * w).zip(out.chunks_mut(h * w)) {
            let soft = blur(x, (h, w));
            for (i, out) in out.iter_mut().enumerate() {
                let (row, column) = (i / w * mh / h, i % w * mw / w);
                let inside = mass[row * mw + column] > 1.0;
                *out = if inside { soft[i] - x[i] } else { 0.0 };
            }
        }
    })
}

/// A Gaussian of deviation 1, 9 pixels wide, over a picture that is mirrored at its edges.
fn blur(x: &[f32], (h, w): (usize, usize)) -> Vec<f32> {
    let reach = REACH.cast_signed();
    let weights: Vec<f64> = (-reach..=reach)
        .map(|i| (-0.5 * (i * i) as f64).exp())
        .collect();
    let sum: f64 = weights.iter().sum();
    let mirrored = |i: usize, k: usize, n: usize| {
        let at = (i + k).cast_signed() - reach;
        let last = n.cast_signed() - 1;
        (last - (last - at.abs()).abs()).unsigned_abs()
    };
    let along = |x: &dyn Fn(usize, usize) -> f64, across: bool| -> Vec<f64> {
        let value = |i: usize| {
            let (row, column) = (i / w, i % w);
            let terms = weights.iter().enumerate().map(|(k, weight)| {
                let (row, column) = match across {
                    true => (row, mirrored(column, k, w)),
                    false => (mirrored(row, k, h), column),
                };
                weight / sum * x(row, column)
            });
            terms.sum::<f64>()
        };
        (0..h * w).map(value).collect()
    };
    let once = along(&|row, column| f64::from(x[row * w + column]), true);
    let twice = along(&|row, column| once[row * w + column], false);
    twice.into_iter().map(|x| x as f32).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn layers_are_parts_of_names() {
        let names = [
            "mid_block.a.attn1",
            "up_blocks.1.a.attn1",
            "up_blocks.2.a.attn1",
        ];
        let of = |layers: &[&str]| {
            let layers: Vec<String> = layers.iter().map(|&l| l.to_owned()).collect();
            resolve(&layers, &names)
        };
        assert_eq!(of(&["mid"]).unwrap(), ["mid_block.a.attn1"]);
        assert_eq!(of(&["up", "blocks.2"]).unwrap().len(), 2);
        for wrong in [&["down"][..], &["mid", ""]] {
            assert!(of(wrong).unwrap_err().to_string().contains("--pag-layers"));
        }
        assert!(resolve(&["mid".to_owned()], &[]).is_err());
    }

    #[test]
    fn a_blur_keeps_what_is_even_and_mirrors_at_edges() {
        let even = blur(&[2.5; 35], (5, 7));
        assert!(even.iter().all(|x| (x - 2.5).abs() < 1e-6));
        let mut point = vec![0.0; 63];
        point[1] = 1.0; // beside the corner: seen twice from the corner's other side
        let soft = blur(&point, (7, 9));
        assert!(soft[1] > soft[3] && soft[0] > soft[10]);
    }
}
