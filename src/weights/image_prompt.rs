//! IP-Adapters and CLIP's picture tower: structure and names read from the tensors' shapes.

use sd_kernels::Activation;
use sd_models::clip::{self, VisionConfig};
use sd_models::image_projection::Config;

use super::layout::{Inner, Layout, part_of};
use super::ldm_unet::Shapes;
use super::text_tower::at;

/// More layers than any of them has.
const MAX_LAYERS: usize = 256;
/// Tokens of the adapters that have one linear layer; shapes do not tell.
const TOKENS: usize = 4;
/// Where an IP-Adapter keeps its projection, and keys and values.
const PROJECTION: &str = "image_proj";
pub(crate) const LAYERS: &str = "ip_adapter";
/// Fused keys and values of a resampler.
const FUSED: &[Inner] = &[
    part_of("0.to_k.weight", "0.to_kv.weight", (0, 1, 2)),
    part_of("0.to_v.weight", "0.to_kv.weight", (1, 1, 2)),
];
/// The tokens of one linear layer.
const SPLIT: [&[Inner]; TOKENS] = [
    &[
        part_of("weight", "weight", (0, 1, 4)),
        part_of("bias", "bias", (0, 1, 4)),
    ],
    &[
        part_of("weight", "weight", (1, 1, 4)),
        part_of("bias", "bias", (1, 1, 4)),
    ],
    &[
        part_of("weight", "weight", (2, 1, 4)),
        part_of("bias", "bias", (2, 1, 4)),
    ],
    &[
        part_of("weight", "weight", (3, 1, 4)),
        part_of("bias", "bias", (3, 1, 4)),
    ],
];

/// Structure and names of the projection of an IP-Adapter with these shapes.
///
/// # Errors
/// A sentence that says what it is instead, or what is missing.
pub(crate) fn read_projection(shapes: &Shapes<'_>) -> Result<(Config, Layout), String> {
    let shape = |name: &str| shapes(&at(PROJECTION, name));
    let matrix = |name: &str| match shape(name).as_deref() {
        Some(&[output, input]) if output > 0 && input > 0 => Ok((output, input)),
        _ => Err(format!(
            "tensor `{PROJECTION}.{name}` is missing or has an unexpected rank"
        )),
    };
    let mut layout = Layout::identity(PROJECTION);
    if shape("proj.weight").is_some() {
        let (rows, input) = matrix("proj.weight")?;
        if rows % TOKENS != 0 {
            return Err(format!(
                "tensor `{PROJECTION}.proj.weight` has {rows} rows, expected a multiple of {TOKENS}"
            ));
        }
        for (i, inner) in SPLIT.iter().enumerate() {
            layout.rename(&format!("proj.{i}"), &at(PROJECTION, "proj"), inner);
        }
        let config = Config::Plain {
            input,
            tokens: TOKENS,
            output: rows / TOKENS,
        };
        return Ok((config, layout));
    }
    if shape("proj.3.weight").is_some() {
        let (inner, input) = matrix("proj.0.weight")?;
        let (output, _) = matrix("proj.2.weight")?;
        return Ok((
            Config::Full {
                input,
                inner,
                output,
            },
            layout,
        ));
    }
    if shape("perceiver_resampler.proj_in.weight").is_some() || shape("norm.weight").is_some() {
        return Err("this is an IP-Adapter FaceID, which reads a face recogniser's vector and is not supported; give an IP-Adapter that reads CLIP's".to_owned());
    }
    let (width, input) = matrix("proj_in.weight")?;
    let (output, _) = matrix("proj_out.weight")?;
    let (attention, _) = matrix("layers.0.0.to_q.weight")?;
    let (intermediate, _) = matrix("layers.0.1.1.weight")?;
    let tokens = match shape("latents").as_deref() {
        Some(&[1, tokens, _]) if tokens > 0 => tokens,
        _ => {
            return Err(format!(
                "tensor `{PROJECTION}.latents` is missing or has an unexpected rank"
            ));
        }
    };
    let layer = |i: &usize| shape(&format!("layers.{i}.0.to_q.weight")).is_some();
    let layers = (0..MAX_LAYERS).take_while(layer).count();
    for i in 0..layers {
        let name = format!("layers.{i}");
        layout.rename(&name, &at(PROJECTION, &name), FUSED);
    }
    Ok((
        Config::Resampler {
            input,
            width,
            attention,
            intermediate,
            layers,
            tokens,
            output,
        },
        layout,
    ))
}

/// Names of a picture tower: transformers' own, with `vision_model.` or without.
pub(crate) fn vision_layout(nested: bool) -> Layout {
    let mut layout = Layout::identity(if nested { "vision_model" } else { "" });
    layout.rename("visual_projection", "visual_projection", &[]);
    layout
}

/// Structure and names of a picture tower in a single file of these shapes.
///
/// # Errors
/// A sentence that says what is missing or cannot be.
pub(crate) fn read_vision(shapes: &Shapes<'_>) -> Result<(VisionConfig, Layout), String> {
    let patches = "embeddings.patch_embedding.weight";
    let nested = shapes(&at("vision_model", patches)).is_some();
    let prefix = if nested { "vision_model" } else { "" };
    let missing = |name: &str| format!("tensor `{name}` is missing or has an unexpected rank");
    let of = |name: &str| shapes(&at(prefix, name));
    let Some(&[width, 3, patch, _]) = of(patches).as_deref() else {
        return Err(missing(&at("vision_model", patches)));
    };
    let positions = "embeddings.position_embedding.weight";
    let Some(&[positions, _]) = of(positions).as_deref() else {
        return Err(missing(&at(prefix, positions)));
    };
    let fc1 = "encoder.layers.0.mlp.fc1.weight";
    let Some(&[intermediate, _]) = of(fc1).as_deref() else {
        return Err(missing(&at(prefix, fc1)));
    };
    let side = positions.saturating_sub(1).isqrt();
    if width == 0 || patch == 0 || side == 0 || side * side + 1 != positions {
        return Err(format!(
            "the picture tower has {positions} positions, expected a square of patches and one"
        ));
    }
    let layer = |i: &usize| of(&format!("encoder.layers.{i}.mlp.fc1.weight")).is_some();
    // heads are 64 wide in CLIP-L, 80 in ViT-H, 104 in bigG; shapes do not tell
    let heads = [(1024, 16), (1280, 16), (1664, 16)];
    let heads = heads.iter().find(|(w, _)| *w == width).map_or_else(
        || {
            (1..=(width / 64).max(1))
                .rev()
                .find(|n| width.is_multiple_of(*n))
                .unwrap_or(1)
        },
        |(_, heads)| *heads,
    );
    let config = VisionConfig {
        tower: clip::Config {
            vocabulary: 0,
            positions,
            width,
            intermediate,
            layers: (0..MAX_LAYERS).take_while(layer).count(),
            heads,
            // OpenAI's own towers, up to CLIP-L, have the quick one
            activation: if width <= 1024 {
                Activation::QuickGelu
            } else {
                Activation::Gelu
            },
            eps: 1e-5,
            projection: shapes("visual_projection.weight").and_then(|s| s.first().copied()),
        },
        size: side * patch,
        patch,
    };
    Ok((config, vision_layout(nested)))
}
