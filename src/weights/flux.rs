//! The transformer of FLUX.1 in single files (Black Forest Labs' names): structure and names read from the tensors' shapes.

use sd_models::flux::Config;
use sd_models::layers::JointConfig;

use super::layout::{Inner, Layout, inner, part_of};
use super::ldm_unet::Shapes;
use super::mmdit::SWAPPED;
use super::text_tower::at;

pub(crate) const DOUBLE: &[Inner] = &[
    inner("norm1.linear", "img_mod.lin"),
    inner("norm1_context.linear", "txt_mod.lin"),
    part_of("attn.to_q.weight", "img_attn.qkv.weight", (0, 1, 3)),
    part_of("attn.to_k.weight", "img_attn.qkv.weight", (1, 1, 3)),
    part_of("attn.to_v.weight", "img_attn.qkv.weight", (2, 1, 3)),
    part_of("attn.to_q.bias", "img_attn.qkv.bias", (0, 1, 3)),
    part_of("attn.to_k.bias", "img_attn.qkv.bias", (1, 1, 3)),
    part_of("attn.to_v.bias", "img_attn.qkv.bias", (2, 1, 3)),
    part_of("attn.add_q_proj.weight", "txt_attn.qkv.weight", (0, 1, 3)),
    part_of("attn.add_k_proj.weight", "txt_attn.qkv.weight", (1, 1, 3)),
    part_of("attn.add_v_proj.weight", "txt_attn.qkv.weight", (2, 1, 3)),
    part_of("attn.add_q_proj.bias", "txt_attn.qkv.bias", (0, 1, 3)),
    part_of("attn.add_k_proj.bias", "txt_attn.qkv.bias", (1, 1, 3)),
    part_of("attn.add_v_proj.bias", "txt_attn.qkv.bias", (2, 1, 3)),
    inner("attn.norm_q.weight", "img_attn.norm.query_norm.scale"),
    inner("attn.norm_k.weight", "img_attn.norm.key_norm.scale"),
    inner("attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale"),
    inner("attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale"),
    inner("attn.to_out.0", "img_attn.proj"),
    inner("attn.to_add_out", "txt_attn.proj"),
    inner("ff.net.0.proj", "img_mlp.0"),
    inner("ff.net.2", "img_mlp.2"),
    inner("ff_context.net.0.proj", "txt_mlp.0"),
    inner("ff_context.net.2", "txt_mlp.2"),
];
/// `linear1` makes queries, keys and values, a width each, and four widths of the feed-forward.
pub(crate) const SINGLE: &[Inner] = &[
    inner("norm.linear", "modulation.lin"),
    part_of("attn.to_q.weight", "linear1.weight", (0, 1, 7)),
    part_of("attn.to_k.weight", "linear1.weight", (1, 1, 7)),
    part_of("attn.to_v.weight", "linear1.weight", (2, 1, 7)),
    part_of("proj_mlp.weight", "linear1.weight", (3, 4, 7)),
    part_of("attn.to_q.bias", "linear1.bias", (0, 1, 7)),
    part_of("attn.to_k.bias", "linear1.bias", (1, 1, 7)),
    part_of("attn.to_v.bias", "linear1.bias", (2, 1, 7)),
    part_of("proj_mlp.bias", "linear1.bias", (3, 4, 7)),
    inner("attn.norm_q.weight", "norm.query_norm.scale"),
    inner("attn.norm_k.weight", "norm.key_norm.scale"),
    inner("proj_out", "linear2"),
];
pub(crate) const TIME_TEXT: &[Inner] = &[
    inner("timestep_embedder.linear_1", "time_in.in_layer"),
    inner("timestep_embedder.linear_2", "time_in.out_layer"),
    inner("text_embedder.linear_1", "vector_in.in_layer"),
    inner("text_embedder.linear_2", "vector_in.out_layer"),
    inner("guidance_embedder.linear_1", "guidance_in.in_layer"),
    inner("guidance_embedder.linear_2", "guidance_in.out_layer"),
];

/// More blocks than any transformer has.
const MAX_LAYERS: usize = 256;

/// Structure and names of the transformer below `prefix` (such as `model.diffusion_model`, or nothing), in Black Forest Labs' names or
/// diffusers'.
///
/// # Errors
/// A sentence that says what is missing.
pub(crate) fn read(prefix: &str, shapes: &Shapes<'_>) -> Result<(Config, Layout), String> {
    let full = |name: &str| at(prefix, name);
    let is_diffusers = shapes(&full("x_embedder.weight")).is_some();
    let layout = if is_diffusers {
        Layout::identity(prefix)
    } else {
        black_forest(prefix, shapes)
    };
    let shape = |name: &str| {
        let part = layout.places(name).into_iter().next()?;
        shapes(&part.stored)
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
    let (width, in_width) = matrix("x_embedder.weight")?;
    let (_, context) = matrix("context_embedder.weight")?;
    let (_, pooled) = matrix("time_text_embed.text_embedder.linear_1.weight")?;
    let (out_width, _) = matrix("proj_out.weight")?;
    let guidance = "time_text_embed.guidance_embedder.linear_1.weight";
    let count = |kind: &str, name: &str| {
        (0..MAX_LAYERS)
            .take_while(|i| shape(&format!("{kind}.{i}.{name}")).is_some())
            .count()
    };
    let norm = ["transformer_blocks.0", "single_transformer_blocks.0"]
        .iter()
        .map(|block| format!("{block}.attn.norm_q.weight"))
        .find_map(|name| shape(&name)?.first().copied());
    let head = norm.ok_or_else(|| missing("transformer_blocks.0.attn.norm_q.weight"))?;
    if head == 0 || !width.is_multiple_of(head) {
        return Err(format!(
            "a transformer {width} wide cannot have attention heads {head} wide"
        ));
    }
    // 16, 56 and 56 of 128; others in proportion
    let place = head / 16 * 7;
    let config = Config {
        in_width,
        out_width,
        layers: count("transformer_blocks", "norm1.linear.weight"),
        single_layers: count("single_transformer_blocks", "norm.linear.weight"),
        joint: JointConfig {
            width,
            heads: width / head,
            qk_norm: true,
        },
        context,
        pooled,
        guidance: shape(guidance).is_some(),
        axes: vec![head.saturating_sub(2 * place), place, place],
    };
    config.check().map_err(|e| e.to_string())?;
    Ok((config, layout))
}

fn black_forest(prefix: &str, shapes: &Shapes<'_>) -> Layout {
    let full = |name: &str| at(prefix, name);
    let mut layout = Layout::identity(prefix);
    layout.rename("x_embedder", &full("img_in"), &[]);
    layout.rename("context_embedder", &full("txt_in"), &[]);
    layout.rename("time_text_embed", prefix, TIME_TEXT);
    layout.rename("proj_out", &full("final_layer.linear"), &[]);
    layout.rename(
        "norm_out.linear",
        &full("final_layer.adaLN_modulation.1"),
        SWAPPED,
    );
    let kinds = [
        (
            "transformer_blocks",
            "double_blocks",
            "img_mod.lin.weight",
            DOUBLE,
        ),
        (
            "single_transformer_blocks",
            "single_blocks",
            "modulation.lin.weight",
            SINGLE,
        ),
    ];
    for (canonical, stored, first, names) in kinds {
        for i in 0..MAX_LAYERS {
            let block = full(&format!("{stored}.{i}"));
            if shapes(&format!("{block}.{first}")).is_none() {
                break;
            }
            layout.rename(&format!("{canonical}.{i}"), &block, names);
        }
    }
    layout
}
