//! The transformer of Stable Diffusion 3 in single files (Stability's names): structure and names read from the tensors' shapes.

use sd_models::layers::JointConfig;
use sd_models::mmdit::Config;

use super::layout::{Inner, Layout, inner, part_of};
use super::ldm_unet::Shapes;
use super::text_tower::at;

pub(crate) const SAMPLE: &[Inner] = &[
    inner("norm1.linear", "x_block.adaLN_modulation.1"),
    inner("norm1_context.linear", "context_block.adaLN_modulation.1"),
    part_of("attn.to_q.weight", "x_block.attn.qkv.weight", (0, 1, 3)),
    part_of("attn.to_k.weight", "x_block.attn.qkv.weight", (1, 1, 3)),
    part_of("attn.to_v.weight", "x_block.attn.qkv.weight", (2, 1, 3)),
    part_of("attn.to_q.bias", "x_block.attn.qkv.bias", (0, 1, 3)),
    part_of("attn.to_k.bias", "x_block.attn.qkv.bias", (1, 1, 3)),
    part_of("attn.to_v.bias", "x_block.attn.qkv.bias", (2, 1, 3)),
    inner("attn.norm_q", "x_block.attn.ln_q"),
    inner("attn.norm_k", "x_block.attn.ln_k"),
    inner("attn.to_out.0", "x_block.attn.proj"),
    part_of("attn2.to_q.weight", "x_block.attn2.qkv.weight", (0, 1, 3)),
    part_of("attn2.to_k.weight", "x_block.attn2.qkv.weight", (1, 1, 3)),
    part_of("attn2.to_v.weight", "x_block.attn2.qkv.weight", (2, 1, 3)),
    part_of("attn2.to_q.bias", "x_block.attn2.qkv.bias", (0, 1, 3)),
    part_of("attn2.to_k.bias", "x_block.attn2.qkv.bias", (1, 1, 3)),
    part_of("attn2.to_v.bias", "x_block.attn2.qkv.bias", (2, 1, 3)),
    inner("attn2.norm_q", "x_block.attn2.ln_q"),
    inner("attn2.norm_k", "x_block.attn2.ln_k"),
    inner("attn2.to_out.0", "x_block.attn2.proj"),
    inner("ff.net.0.proj", "x_block.mlp.fc1"),
    inner("ff.net.2", "x_block.mlp.fc2"),
    part_of(
        "attn.add_q_proj.weight",
        "context_block.attn.qkv.weight",
        (0, 1, 3),
    ),
    part_of(
        "attn.add_k_proj.weight",
        "context_block.attn.qkv.weight",
        (1, 1, 3),
    ),
    part_of(
        "attn.add_v_proj.weight",
        "context_block.attn.qkv.weight",
        (2, 1, 3),
    ),
    part_of(
        "attn.add_q_proj.bias",
        "context_block.attn.qkv.bias",
        (0, 1, 3),
    ),
    part_of(
        "attn.add_k_proj.bias",
        "context_block.attn.qkv.bias",
        (1, 1, 3),
    ),
    part_of(
        "attn.add_v_proj.bias",
        "context_block.attn.qkv.bias",
        (2, 1, 3),
    ),
    inner("attn.norm_added_q", "context_block.attn.ln_q"),
    inner("attn.norm_added_k", "context_block.attn.ln_k"),
    inner("attn.to_add_out", "context_block.attn.proj"),
    inner("ff_context.net.0.proj", "context_block.mlp.fc1"),
    inner("ff_context.net.2", "context_block.mlp.fc2"),
];
/// Scale and shift of a last norm stand the other way round.
pub(super) const SWAPPED: &[Inner] = &[
    Inner {
        swapped: true,
        ..inner("weight", "weight")
    },
    Inner {
        swapped: true,
        ..inner("bias", "bias")
    },
];
pub(crate) const TIME_TEXT: &[Inner] = &[
    inner("timestep_embedder.linear_1", "t_embedder.mlp.0"),
    inner("timestep_embedder.linear_2", "t_embedder.mlp.2"),
    inner("text_embedder.linear_1", "y_embedder.mlp.0"),
    inner("text_embedder.linear_2", "y_embedder.mlp.2"),
];
pub(crate) const PLACES: &[Inner] = &[
    inner("proj", "x_embedder.proj"),
    inner("pos_embed", "pos_embed"),
];

/// Heads are 64 wide in every model of the family.
const HEAD_WIDTH: usize = 64;
/// More blocks than any transformer has.
const MAX_LAYERS: usize = 256;

/// Structure and names of the transformer below `prefix` (such as `model.diffusion_model`, or nothing), in Stability's names or diffusers'.
///
/// # Errors
/// A sentence that says what is missing.
pub(crate) fn read(prefix: &str, shapes: &Shapes<'_>) -> Result<(Config, Layout), String> {
    let full = |name: &str| at(prefix, name);
    let is_diffusers = shapes(&full("transformer_blocks.0.attn.to_q.weight")).is_some();
    let layout = if is_diffusers {
        Layout::identity(prefix)
    } else {
        stability(prefix, shapes)
    };
    // every size by canonical names, wherever they lie
    let shape = |name: &str| {
        layout.places(name).into_iter().find_map(|part| {
            let mut shape = shapes(&part.stored)?;
            if let (Some(rows), Some(first)) = (part.rows, shape.first_mut()) {
                *first = *first / rows.count * rows.span;
            }
            Some(shape)
        })
    };
    let missing = |name: &str| {
        let stored = layout.places(name).into_iter().next();
        let stored = stored.map_or_else(|| name.to_owned(), |part| part.stored);
        format!("tensor `{stored}` is missing or has an unexpected rank")
    };
    let matrix = |name: &str| match shape(name).as_deref() {
        Some(&[rows, columns]) if rows > 0 && columns > 0 => Ok((rows, columns)),
        _ => Err(missing(name)),
    };
    let (width, in_channels, patch) = match shape("pos_embed.proj.weight").as_deref() {
        Some(&[o, i, h, w]) if o > 0 && i > 0 && h == w && h > 0 => (o, i, h),
        _ => return Err(missing("pos_embed.proj.weight")),
    };
    let positions = match shape("pos_embed.pos_embed").as_deref() {
        Some(&[n, _] | &[1, n, _]) if n.isqrt() * n.isqrt() == n && n > 0 => n.isqrt(),
        _ => return Err(missing("pos_embed.pos_embed")),
    };
    let (_, context) = matrix("context_embedder.weight")?;
    let (_, pooled) = matrix("time_text_embed.text_embedder.linear_1.weight")?;
    let (output, _) = matrix("proj_out.weight")?;
    let block = |i: usize, name: &str| shape(&format!("transformer_blocks.{i}.{name}"));
    let layers = (0..MAX_LAYERS)
        .take_while(|&i| block(i, "norm1.linear.weight").is_some())
        .count();
    let head = block(0, "attn.norm_q.weight").and_then(|shape| shape.first().copied());
    let heads = width / head.unwrap_or(HEAD_WIDTH).max(1);
    if heads == 0 || !width.is_multiple_of(heads) || layers == 0 {
        return Err(format!(
            "a transformer {width} wide with {layers} blocks cannot be shared by its attention heads"
        ));
    }
    let config = Config {
        in_channels,
        out_channels: output / (patch * patch),
        patch,
        layers,
        joint: JointConfig {
            width,
            heads,
            qk_norm: head.is_some(),
        },
        context,
        pooled,
        positions,
        dual: (0..layers)
            .filter(|&i| block(i, "attn2.to_q.weight").is_some())
            .collect(),
    };
    Ok((config, layout))
}

fn stability(prefix: &str, shapes: &Shapes<'_>) -> Layout {
    let full = |name: &str| at(prefix, name);
    let mut layout = Layout::identity(prefix);
    layout.rename("pos_embed", prefix, PLACES);
    layout.rename("time_text_embed", prefix, TIME_TEXT);
    layout.rename("proj_out", &full("final_layer.linear"), &[]);
    layout.rename(
        "norm_out.linear",
        &full("final_layer.adaLN_modulation.1"),
        SWAPPED,
    );
    let block = |i: usize| full(&format!("joint_blocks.{i}"));
    let layers = (0..MAX_LAYERS)
        .take_while(|&i| {
            shapes(&format!("{}.x_block.adaLN_modulation.1.weight", block(i))).is_some()
        })
        .count();
    for i in 0..layers {
        layout.rename(&format!("transformer_blocks.{i}"), &block(i), SAMPLE);
        let has_rest = shapes(&format!("{}.context_block.mlp.fc1.weight", block(i))).is_some();
        if !has_rest {
            layout.rename(
                &format!("transformer_blocks.{i}.norm1_context.linear"),
                &format!("{}.context_block.adaLN_modulation.1", block(i)),
                SWAPPED,
            );
        }
    }
    layout
}
