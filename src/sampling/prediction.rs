//! What a network predicts, turned into an estimate of the clean latents and of the noise (k-diffusion `external.py`).

use super::trajectory::Linear;

/// What a network predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Prediction {
    /// The noise ε.
    #[default]
    Epsilon,
    /// The velocity `α·ε − σ·x₀` (Salimans & Ho, arXiv 2202.00512).
    V,
    /// The clean latents x₀.
    Sample,
    /// Karras et al.'s F, of which x₀ = c_skip·x + c_out·F (arXiv 2206.00364, table 1): the velocity with the other sign.
    Edm,
    /// The velocity `ε − x₀` of latents `(1 − σ)·x₀ + σ·ε` (Liu et al., "Flow Straight and Fast", arXiv 2209.03003).
    Flow,
}

/// Estimates of x₀ and ε for latents `x = α·x₀ + σ·ε` and the network's `output`.
pub(super) fn estimates(
    prediction: Prediction,
    (alpha, sigma): (f64, f64),
    x: &Linear,
    output: &Linear,
) -> (Linear, Linear) {
    let (x, output) = (x.clone(), output.clone());
    match prediction {
        Prediction::Epsilon => ((x - output.clone() * sigma) * (1.0 / alpha), output),
        Prediction::Sample => (output.clone(), (x - output * alpha) * (1.0 / sigma)),
        Prediction::V => (
            x.clone() * alpha - output.clone() * sigma,
            output * alpha + x * sigma,
        ),
        Prediction::Edm => (
            x.clone() * alpha + output.clone() * sigma,
            x * sigma - output * alpha,
        ),
        Prediction::Flow => (
            x.clone() - output.clone() * sigma,
            x + output * (1.0 - sigma),
        ),
    }
}

/// The estimate of x₀ for latents `x = x₀ + σ·ε` of clean latents with standard deviation `data`; the network sees `x / √(σ² + data²)`. A flow's
/// latents are `(1 − σ)·x₀ + σ·ε`, which the network sees as they are.
pub(super) fn denoised(
    prediction: Prediction,
    (sigma, data): (f64, f64),
    x: &Linear,
    output: &Linear,
) -> Linear {
    let norm = (sigma * sigma + data * data).sqrt();
    let (x, output) = (x.clone(), output.clone());
    let kept = data * data / (norm * norm);
    match prediction {
        Prediction::Epsilon | Prediction::Flow => x - output * sigma,
        Prediction::Sample => output,
        Prediction::V => x * kept - output * (sigma * data / norm),
        Prediction::Edm => x * kept + output * (sigma * data / norm),
    }
}
