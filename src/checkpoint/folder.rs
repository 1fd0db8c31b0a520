//! Which model a diffusers folder is: from its pipeline's class, and within Stable Diffusion from its configs.

use serde_json::Value;

use super::Checkpoint;
use super::family::{Detection, Family, Prediction, Variant};
use super::printable::printable;
use super::structure::{self, Below, Structure};

/// Beginnings of diffusers' pipeline classes; the first that fits decides. Stable Diffusion 1 and 2 share theirs.
const CLASSES: &[(&str, Family)] = &[
    ("StableDiffusionXL", Family::Sdxl),
    ("StableDiffusion3", Family::Sd3),
    ("StableDiffusionUpscale", Family::X4Upscaler),
    ("StableDiffusionLatentUpscale", Family::Unknown),
    ("StableUnCLIP", Family::UnClip),
    ("StableVideoDiffusion", Family::Svd),
    ("AnimateDiff", Family::MotionModule),
    ("Flux2", Family::Flux2),
    ("Flux", Family::Flux1),
    ("Chroma", Family::Chroma),
    ("StableDiffusion", Family::Sd1),
    ("LatentConsistencyModel", Family::Sd1),
    ("OnnxStableDiffusion", Family::Sd1),
];
/// The same for folders without a model_index.json, by the network's class.
const NETWORKS: &[(&str, Family)] = &[
    ("SD3Transformer", Family::Sd3),
    ("Flux2Transformer", Family::Flux2),
    ("FluxTransformer", Family::Flux1),
    ("ChromaTransformer", Family::Chroma),
    ("UNetSpatioTemporal", Family::Svd),
    ("UNetMotionModel", Family::MotionModule),
    ("UNet2DConditionModel", Family::Sd1),
];

/// Finds out what a folder is.
pub(super) fn detect(checkpoint: &Checkpoint) -> Detection {
    let mut detection = by_class(checkpoint);
    detection.structure = read_structure(checkpoint);
    if detection.family == Family::Sdxl {
        narrow_sdxl(checkpoint, &mut detection);
    }
    let transformer = checkpoint.config("transformer");
    if detection.family == Family::Sd3 && text(transformer, "qk_norm").is_some() {
        detection.family = Family::Sd35;
        detection
            .evidence
            .push("transformer/config.json has `qk_norm`".to_owned());
    }
    set_variant(checkpoint, &mut detection);
    if detection.family == Family::Sd1 {
        decide_generation(checkpoint, &mut detection);
    }
    let needed = detection.family.components().iter().copied();
    detection.missing = needed
        .filter(|name| checkpoint.tensors(name).is_none())
        .collect();
    set_prediction(checkpoint, &mut detection);
    detection
}

fn text<'a>(config: Option<&'a Value>, name: &str) -> Option<&'a str> {
    config?.get(name)?.as_str()
}

fn by_class(checkpoint: &Checkpoint) -> Detection {
    let lookup = |table: &[(&str, Family)], class: &str| {
        let row = table.iter().find(|(start, _)| class.starts_with(start));
        row.map_or(Family::Unknown, |(_, family)| *family)
    };
    if let Some(class) = text(checkpoint.model_index(), "_class_name") {
        let evidence = format!("model_index.json names the class {}", printable(class));
        return Detection::new(lookup(CLASSES, class), evidence);
    }
    for network in ["unet", "transformer"] {
        let config = checkpoint.config(network);
        let Some(class) = text(config, "_class_name") else {
            continue;
        };
        let evidence = format!("{network}/config.json names the class {}", printable(class));
        let mut family = lookup(NETWORKS, class);
        if family == Family::Sd1 && text(config, "addition_embed_type").is_some() {
            family = Family::Sdxl;
        }
        return Detection::new(family, evidence);
    }
    Detection::new(
        Family::Unknown,
        "neither model_index.json nor the network's config.json names a class".to_owned(),
    )
}

fn read_structure(checkpoint: &Checkpoint) -> Structure {
    fn read<T>(
        checkpoint: &Checkpoint,
        component: &str,
        read: impl Fn(Below<'_>) -> Option<T>,
    ) -> Option<T> {
        let tensors = checkpoint.tensors(component)?;
        read(Below {
            tensors: &tensors,
            prefix: "",
        })
    }
    Structure {
        unet: read(checkpoint, "unet", structure::read_unet),
        text: read(checkpoint, "text_encoder", structure::read_text),
        vae: read(checkpoint, "vae", structure::read_vae),
    }
}

/// Base, refiner (it has only the second text encoder) or one of the distilled networks.
fn narrow_sdxl(checkpoint: &Checkpoint, detection: &mut Detection) {
    let has = |name: &str| checkpoint.tensors(name).is_some();
    if has("text_encoder_2") && !has("text_encoder") {
        detection.family = Family::SdxlRefiner;
        detection
            .evidence
            .push("only the second text encoder is there".to_owned());
    } else if let Some(unet) = &detection.structure.unet {
        detection.family = super::family::sdxl_of_depths(&unet.depths.concat());
    }
}

fn set_variant(checkpoint: &Checkpoint, detection: &mut Detection) {
    let transformer = checkpoint
        .config("transformer")
        .filter(|_| detection.family.components().contains(&"transformer"));
    let config = transformer.or(checkpoint.config("unet"));
    let sizes = detection.structure.unet.as_ref();
    let input = Detection::number(config, "in_channels").or(sizes.map(|unet| unet.in_channels));
    let output = Detection::number(config, "out_channels").or(sizes.map(|unet| unet.out_channels));
    let (what, output) = match transformer {
        // FLUX's configs name no output where it is the input
        Some(_) => ("transformer", output.or(input)),
        None => ("UNet", output),
    };
    if let (Some(input), Some(output)) = (input, output) {
        detection.variant = match input.checked_sub(output) {
            Some(more) if more == output && transformer.is_some() => Variant::Control,
            _ => Variant::from_channels(input, output),
        };
        detection.evidence.push(format!(
            "the {what} takes {input} channels and {output} come out: {}",
            detection.variant.id()
        ));
    }
}

/// Stable Diffusion 1 or 2: the text tower's activation tells CLIP-L from OpenCLIP; without it, the projections.
fn decide_generation(checkpoint: &Checkpoint, detection: &mut Detection) {
    let activation = text(checkpoint.config("text_encoder"), "hidden_act");
    let unet = checkpoint.config("unet");
    let linear = unet
        .and_then(|unet| unet.get("use_linear_projection")?.as_bool())
        .or(detection
            .structure
            .unet
            .as_ref()
            .and_then(|unet| unet.linear));
    let (family, evidence) = match (activation, linear) {
        (Some("quick_gelu"), _) => (
            Family::Sd1,
            "text_encoder/config.json has `hidden_act` quick_gelu: CLIP-L, as in Stable Diffusion 1",
        ),
        (Some(_), _) => (
            Family::Sd2,
            "text_encoder/config.json has a `hidden_act` that is not quick_gelu: OpenCLIP, as in Stable Diffusion 2",
        ),
        (None, Some(true)) => (
            Family::Sd2,
            "the UNet's projections are linear, as in Stable Diffusion 2",
        ),
        (None, _) => (
            Family::Sd1,
            "the UNet's projections are convolutions, as in Stable Diffusion 1",
        ),
    };
    detection.family = family;
    detection.evidence.push(evidence.to_owned());
}

/// A folder says what it predicts.
fn set_prediction(checkpoint: &Checkpoint, detection: &mut Detection) {
    let Some(scheduler) = checkpoint.config("scheduler") else {
        return;
    };
    match text(Some(scheduler), "prediction_type") {
        Some(name) => {
            detection.prediction = Prediction::from_name(name);
            detection.evidence.push(format!(
                "scheduler_config.json has `prediction_type` {}",
                printable(name)
            ));
        }
        None if detection.family.components().contains(&"unet") => {
            detection.prediction = Some(Prediction::Epsilon);
            detection.evidence.push(
                "scheduler_config.json has no `prediction_type`, which means epsilon".to_owned(),
            );
        }
        None => {}
    }
}
