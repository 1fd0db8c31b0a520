//! What a Stable Diffusion in a single file predicts. Files do not say; the rules are those in use elsewhere.

use safetensors::Dtype;

use super::family::{Detection, Family, Noise, Prediction, Variant};
use super::printable::printable;
use super::structure::{Below, UnetStructure};
use super::tensor_info::TensorType;
use super::tensor_set::TensorSet;

/// ComfyUI's rule (`comfy/supported_models.py`, `SD20.model_type`): above this standard deviation of a norm's bias in the last
/// attention on the way up, a Stable Diffusion 2 predicts v.
const V_DEVIATION: f64 = 0.09;
/// More blocks than any way up has.
const MAX_BLOCKS: usize = 256;

/// Sets `detection.prediction` and `detection.noise`, and says why.
pub(super) fn decide(names: Below<'_>, unet: &UnetStructure, detection: &mut Detection) {
    if let Some((prediction, noise, evidence)) = from_edm(names.tensors) {
        detection.prediction = Some(prediction);
        detection.noise = noise;
        detection.evidence.push(evidence);
        return;
    }
    if names.tensors.info("ztsnr").is_some() {
        detection.noise = Noise::ZeroSnr;
        detection
            .evidence
            .push("key `ztsnr`: the last noise level is pure noise".to_owned());
    }
    let (prediction, evidence) = from_words(names.tensors)
        .or_else(|| from_family(detection.family, detection.variant))
        .unwrap_or_else(|| from_norm(names, unet));
    detection.prediction = prediction;
    detection.evidence.push(evidence);
}

/// What the file says in words: metadata, or the key `v_pred`.
fn from_words(tensors: &TensorSet) -> Option<(Option<Prediction>, String)> {
    if tensors.info("v_pred").is_some() {
        return Some((Some(Prediction::V), "key `v_pred`: predicts v".to_owned()));
    }
    let said = |file: &super::TensorFile| {
        let name = file.metadata().get("modelspec.prediction_type")?;
        Some((Prediction::from_name(name)?, printable(name)))
    };
    let (prediction, name) = tensors.files().find_map(said)?;
    let evidence = format!("metadata `modelspec.prediction_type` says {name}");
    Some((Some(prediction), evidence))
}

/// Continuous noise levels, by the keys that ComfyUI knows them by: CosXL predicts v, Playground 2.5 Karras et al.'s F.
fn from_edm(tensors: &TensorSet) -> Option<(Prediction, Noise, String)> {
    let numbers = |name: &str| {
        values(tensors, name)
            .ok()
            .filter(|v| v.iter().all(|x| x.is_finite()))
    };
    let level = |name: &str| numbers(name)?.first().copied().filter(|&level| level > 0.0);
    if tensors.info("edm_vpred.sigma_max").is_some() {
        let max = level("edm_vpred.sigma_max").unwrap_or(120.0);
        let min = level("edm_vpred.sigma_min")
            .filter(|&min| min < max)
            .unwrap_or(0.002);
        let noise = Noise::Continuous {
            range: (min, max),
            data: 1.0,
            spread: None,
        };
        let evidence = format!(
            "key `edm_vpred.sigma_max`: predicts v at continuous noise levels from {min} to {max}"
        );
        return Some((Prediction::V, noise, evidence));
    }
    tensors.info("edm_mean").and(tensors.info("edm_std"))?;
    let spread = numbers("edm_mean").zip(numbers("edm_std"));
    let noise = Noise::Continuous {
        range: (0.002, 80.0),
        data: 0.5,
        spread: spread.filter(|(mean, std)| mean.len() == std.len() && !std.contains(&0.0)),
    };
    let evidence =
        "keys `edm_mean` and `edm_std`: continuous noise levels from 0.002 to 80, latents normalised channel by channel".to_owned();
    Some((Prediction::Edm, noise, evidence))
}

/// What goes without saying.
fn from_family(family: Family, variant: Variant) -> Option<(Option<Prediction>, String)> {
    let evidence = match (family, variant) {
        (Family::Sd2, Variant::Text2Image) => return None,
        (Family::Sd2, _) => {
            "Stable Diffusion 2 with more than the latents going in predicts epsilon"
        }
        (Family::X4Upscaler, _) => {
            let evidence = "the x4 upscaler predicts v".to_owned();
            return Some((Some(Prediction::V), evidence));
        }
        (Family::Sd1, _) => "Stable Diffusion 1 predicts epsilon",
        _ => "nothing says otherwise, and SDXL predicts epsilon",
    };
    Some((Some(Prediction::Epsilon), evidence.to_owned()))
}

/// The rule for Stable Diffusion 2: the last attention on the way up tells.
fn from_norm(names: Below<'_>, unet: &UnetStructure) -> (Option<Prediction>, String) {
    let Some(name) = last_attention_norm(names, unet) else {
        return (
            None,
            "the prediction type is not known: no attention on the way up".to_owned(),
        );
    };
    match deviation(names.tensors, &name) {
        Ok(deviation) => {
            let is_v = deviation > V_DEVIATION;
            let (prediction, relation) = match is_v {
                true => (Prediction::V, "above"),
                false => (Prediction::Epsilon, "not above"),
            };
            let evidence = format!(
                "the values of `{}` (the last attention) deviate by {deviation:.4}, {relation} {V_DEVIATION}: predicts {}",
                printable(&name),
                prediction.id()
            );
            (Some(prediction), evidence)
        }
        Err(reason) => (None, format!("the prediction type is not known: {reason}")),
    }
}

/// `output_blocks.11.1…` in models of the usual depth; the last attention's in others.
fn last_attention_norm(names: Below<'_>, unet: &UnetStructure) -> Option<String> {
    const NORM: &str = "transformer_blocks.0.norm1.bias";
    let there = |name: &String| names.tensors.info(name).is_some();
    let ldm = (0..MAX_BLOCKS)
        .rev()
        .map(|n| names.full(&format!("output_blocks.{n}.1.{NORM}")))
        .find(there);
    ldm.or_else(|| {
        (0..unet.channels.len())
            .rev()
            .flat_map(|level| (0..MAX_BLOCKS).rev().map(move |layer| (level, layer)))
            .map(|(level, layer)| {
                names.full(&format!("up_blocks.{level}.attentions.{layer}.{NORM}"))
            })
            .find(there)
    })
}

/// A float tensor's values.
fn values(tensors: &TensorSet, name: &str) -> Result<Vec<f64>, String> {
    let shown = printable(name);
    let info = tensors
        .info(name)
        .ok_or_else(|| format!("`{shown}` is missing"))?;
    let bytes = tensors.bytes(name).map_err(|e| e.to_string())?;
    Ok(match info.dtype {
        TensorType::Plain(Dtype::F64) => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f64::from_le_bytes(*b))
            .collect(),
        TensorType::Plain(Dtype::F32) => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f64::from(f32::from_le_bytes(*b)))
            .collect(),
        TensorType::Plain(Dtype::F16) => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| half::f16::from_le_bytes(*b).to_f64())
            .collect(),
        TensorType::Plain(Dtype::BF16) => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| half::bf16::from_le_bytes(*b).to_f64())
            .collect(),
        other => return Err(format!("`{shown}` is of type {other}")),
    })
}

/// The standard deviation of a float tensor's values, over all of them.
fn deviation(tensors: &TensorSet, name: &str) -> Result<f64, String> {
    let values = values(tensors, name)?;
    if values.is_empty() {
        return Err(format!("`{}` is empty", printable(name)));
    }
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / count;
    Ok(variance.sqrt())
}
