//! Text towers of single files: transformers' spelling (Stable Diffusion 1) and OpenCLIP's (Stable Diffusion 2), read from shapes.

pub(crate) use sd_kernels::Activation;
use sd_models::clip::Config;

use super::layout::{Inner, Layout, inner, part_of};
use super::ldm_unet::Shapes;

const fn third(canonical: &'static str, stored: &'static str, index: usize) -> Inner {
    part_of(canonical, stored, (index, 1, 3))
}

pub(crate) const BLOCK: &[Inner] = &[
    inner("layer_norm1", "ln_1"),
    third("self_attn.q_proj.weight", "attn.in_proj_weight", 0),
    third("self_attn.k_proj.weight", "attn.in_proj_weight", 1),
    third("self_attn.v_proj.weight", "attn.in_proj_weight", 2),
    third("self_attn.q_proj.bias", "attn.in_proj_bias", 0),
    third("self_attn.k_proj.bias", "attn.in_proj_bias", 1),
    third("self_attn.v_proj.bias", "attn.in_proj_bias", 2),
    inner("self_attn.out_proj", "attn.out_proj"),
    inner("layer_norm2", "ln_2"),
    inner("mlp.fc1", "mlp.c_fc"),
    inner("mlp.fc2", "mlp.c_proj"),
];

/// OpenCLIP multiplies by this matrix from the other side.
const PROJECT: &[Inner] = &[Inner {
    transposed: true,
    ..inner("weight", "text_projection")
}];

/// Heads are 64 wide in every CLIP tower; narrower towers have one.
const HEAD_WIDTH: usize = 64;
/// More layers than any tower has.
const MAX_LAYERS: usize = 256;

/// What `position_ids` are.
pub(crate) const POSITIONS: &str = "tensors of counted positions (position_ids)";
/// What stands behind the text encoder in CLIP itself.
pub(crate) const PROJECTION: &str = "tensors of CLIP's comparison of texts with pictures";

/// A name below a prefix, which may be nothing.
pub(crate) fn at(prefix: &str, name: &str) -> String {
    format!("{prefix}.{name}")
        .trim_start_matches('.')
        .to_owned()
}

fn heads(width: usize) -> usize {
    if width.is_multiple_of(HEAD_WIDTH) {
        (width / HEAD_WIDTH).max(1)
    } else {
        1
    }
}

fn matrix(shapes: &Shapes<'_>, name: &str) -> Result<(usize, usize), String> {
    match shapes(name).as_deref() {
        Some(&[rows, columns]) if rows > 0 && columns > 0 => Ok((rows, columns)),
        _ => Err(format!(
            "tensor `{name}` is missing or has an unexpected rank"
        )),
    }
}

fn count_layers(shapes: &Shapes<'_>, name: impl Fn(usize) -> String) -> usize {
    (0..MAX_LAYERS)
        .take_while(|&i| shapes(&name(i)).is_some())
        .count()
}

/// A tower in transformers' spelling below `prefix` (such as `cond_stage_model.transformer`), with or without `text_model.`; its activation and
/// whether its projection is used, shapes do not tell.
///
/// # Errors
/// A sentence that says what is missing.
pub(crate) fn read_transformers(
    prefix: &str,
    (activation, projects): (Activation, bool),
    shapes: &Shapes<'_>,
) -> Result<(Config, Layout), String> {
    let inside = at(prefix, "text_model");
    let has_inside = shapes(&at(&inside, "embeddings.token_embedding.weight")).is_some();
    let root = if has_inside {
        inside
    } else {
        prefix.to_owned()
    };
    let of = |name: &str| matrix(shapes, &at(&root, name));
    let (vocabulary, width) = of("embeddings.token_embedding.weight")?;
    let (positions, _) = of("embeddings.position_embedding.weight")?;
    let (intermediate, _) = of("encoder.layers.0.mlp.fc1.weight")?;
    let mut layout = Layout::identity(&root);
    layout.ignore(&at(&root, "embeddings.position_ids"), POSITIONS);
    let projection = match shapes(&at(prefix, "text_projection.weight")).as_deref() {
        Some(&[output, _]) if projects => {
            layout.rename("text_projection", &at(prefix, "text_projection"), &[]);
            Some(output)
        }
        _ => {
            layout.ignore(&at(prefix, "text_projection"), PROJECTION);
            None
        }
    };
    layout.ignore(&at(prefix, "logit_scale"), PROJECTION);
    let config = Config {
        vocabulary,
        positions,
        width,
        intermediate,
        layers: count_layers(shapes, |i| {
            at(&root, &format!("encoder.layers.{i}.mlp.fc1.weight"))
        }),
        heads: heads(width),
        activation,
        eps: 1e-5,
        projection,
    };
    Ok((config, layout))
}

/// What of an OpenCLIP tower is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OpenClip {
    /// The states behind the last layer but one, so that the last is left out: as in diffusers' folders of Stable Diffusion 2.
    AllButLast,
    /// Everything, the projection included: Stable Diffusion XL.
    Whole,
}

/// A tower in OpenCLIP's spelling below `prefix` (such as `cond_stage_model.model`).
///
/// # Errors
/// A sentence that says what is missing.
pub(crate) fn read_open_clip(
    prefix: &str,
    used: OpenClip,
    shapes: &Shapes<'_>,
) -> Result<(Config, Layout), String> {
    let name = |name: &str| at(prefix, name);
    let block = |i: usize| name(&format!("transformer.resblocks.{i}"));
    let (vocabulary, width) = matrix(shapes, &name("token_embedding.weight"))?;
    let (positions, _) = matrix(shapes, &name("positional_embedding"))?;
    let (intermediate, _) = matrix(shapes, &format!("{}.mlp.c_fc.weight", block(0)))?;
    let stored = count_layers(shapes, |i| format!("{}.mlp.c_fc.weight", block(i)));
    let layers = match used {
        OpenClip::AllButLast => stored.saturating_sub(1),
        OpenClip::Whole => stored,
    };
    let mut layout = open_clip_layout(prefix, layers);
    let projection = match used {
        OpenClip::AllButLast => {
            layout.ignore(
                &block(layers),
                "tensors of the text encoder's last layer, which Stable Diffusion 2 leaves out",
            );
            layout.ignore(&name("text_projection"), PROJECTION);
            None
        }
        OpenClip::Whole => Some(projection(prefix, shapes, &mut layout)?),
    };
    for unused in ["logit_scale", "attn_mask"] {
        layout.ignore(&name(unused), PROJECTION);
    }
    let config = Config {
        vocabulary,
        positions,
        width,
        intermediate,
        layers,
        heads: heads(width),
        activation: Activation::Gelu,
        eps: 1e-5,
        projection,
    };
    Ok((config, layout))
}

/// The names below `prefix` of an OpenCLIP tower of so many layers, the projection included.
pub(crate) fn open_clip_layout(prefix: &str, layers: usize) -> Layout {
    let mut layout = Layout::default();
    layout.rename(
        "embeddings.token_embedding",
        &at(prefix, "token_embedding"),
        &[],
    );
    layout.rename(
        "embeddings.position_embedding.weight",
        &at(prefix, "positional_embedding"),
        &[],
    );
    layout.rename("final_layer_norm", &at(prefix, "ln_final"), &[]);
    layout.rename("text_projection", prefix, PROJECT);
    for i in 0..layers {
        let block = at(prefix, &format!("transformer.resblocks.{i}"));
        layout.rename(&format!("encoder.layers.{i}"), &block, BLOCK);
    }
    layout
}

/// The names below `prefix` of a tower in transformers' spelling, with `text_model.`, as folders and single files have it but for the oldest and
/// the newest; the projection stands outside.
pub(crate) fn transformers_layout(prefix: &str) -> Layout {
    let below = |name: &str| at(prefix, name);
    let mut layout = Layout::identity(&below("text_model"));
    layout.rename("text_projection", &below("text_projection"), &[]);
    layout
}

/// The width of a whole text's vector. Files from some tools keep the matrix as a linear layer's weight.
fn projection(prefix: &str, shapes: &Shapes<'_>, layout: &mut Layout) -> Result<usize, String> {
    let linear = at(prefix, "text_projection");
    if let Some(&[output, _]) = shapes(&format!("{linear}.weight")).as_deref() {
        layout.rename("text_projection", &linear, &[]);
        return Ok(output);
    }
    let (_, output) = matrix(shapes, &linear)?;
    Ok(output)
}
