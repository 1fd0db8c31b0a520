//! T5 encoders of single files: transformers' spelling and llama.cpp's (GGUF), read from shapes.

use sd_kernels::Activation;
use sd_models::t5::Config;

use super::layout::{Inner, Layout, inner};
use super::ldm_unet::Shapes;
use super::text_tower::at;

const BLOCK: &[Inner] = &[
    inner("layer.0.layer_norm", "attn_norm"),
    inner("layer.0.SelfAttention.q", "attn_q"),
    inner("layer.0.SelfAttention.k", "attn_k"),
    inner("layer.0.SelfAttention.v", "attn_v"),
    inner("layer.0.SelfAttention.o", "attn_o"),
    inner(
        "layer.0.SelfAttention.relative_attention_bias",
        "attn_rel_b",
    ),
    inner("layer.1.layer_norm", "ffn_norm"),
    inner("layer.1.DenseReluDense.wi_0", "ffn_gate"),
    inner("layer.1.DenseReluDense.wi_1", "ffn_up"),
    inner("layer.1.DenseReluDense.wi", "ffn_up"),
    inner("layer.1.DenseReluDense.wo", "ffn_down"),
];
/// The decoder of a whole T5.
const DECODER: &str = "tensors of T5's decoder";
/// More layers than any encoder has.
const MAX_LAYERS: usize = 256;
/// The distance at which all T5 models stop to tell distances apart.
const MAX_DISTANCE: usize = 128;

/// An encoder below `prefix` (such as `text_encoders.t5xxl.transformer`, or nothing).
///
/// # Errors
/// A sentence that says what is missing.
pub(crate) fn read(prefix: &str, shapes: &Shapes<'_>) -> Result<(Config, Layout), String> {
    let has = |name: &str| shapes(&at(prefix, name)).is_some();
    let is_ggml = has("token_embd.weight");
    let mut layout = Layout::identity(prefix);
    if is_ggml {
        layout.rename("shared", &at(prefix, "token_embd"), &[]);
        layout.rename(
            "encoder.final_layer_norm",
            &at(prefix, "enc.output_norm"),
            &[],
        );
        for i in 0..MAX_LAYERS {
            let block = at(prefix, &format!("enc.blk.{i}"));
            if shapes(&format!("{block}.attn_q.weight")).is_none() {
                break;
            }
            layout.rename(&format!("encoder.block.{i}"), &block, BLOCK);
        }
        layout.ignore(&at(prefix, "dec"), DECODER);
    } else {
        // the same table under two names; files have either or both
        if has("shared.weight") {
            layout.ignore(
                &at(prefix, "encoder.embed_tokens"),
                "copies of T5's table of tokens",
            );
        } else {
            layout.rename("shared", &at(prefix, "encoder.embed_tokens"), &[]);
        }
        layout.ignore(&at(prefix, "decoder"), DECODER);
        layout.ignore(&at(prefix, "lm_head"), DECODER);
    }
    layout.ignore(&at(prefix, "spiece_model"), "copies of T5's vocabulary");
    let matrix = |name: &str| {
        let stored = layout
            .place(name)
            .map_or_else(|| name.to_owned(), |part| part.stored);
        match shapes(&stored).as_deref() {
            Some(&[rows, columns]) if rows > 0 && columns > 0 => Ok((rows, columns)),
            _ => Err(format!(
                "tensor `{stored}` is missing or has an unexpected rank"
            )),
        }
    };
    let block = |i: usize, name: &str| matrix(&format!("encoder.block.{i}.{name}.weight"));
    let (vocabulary, width) = matrix("shared.weight")?;
    let (buckets, heads) = block(0, "layer.0.SelfAttention.relative_attention_bias")?;
    let (inner_width, _) = block(0, "layer.0.SelfAttention.q")?;
    if !inner_width.is_multiple_of(heads) || !buckets.is_multiple_of(4) {
        return Err(format!(
            "queries {inner_width} wide and {buckets} distances do not fit {heads} attention heads"
        ));
    }
    let gated = if is_ggml {
        has("enc.blk.0.ffn_gate.weight")
    } else {
        block(0, "layer.1.DenseReluDense.wi_0").is_ok()
    };
    let (_, intermediate) = block(0, "layer.1.DenseReluDense.wo")?;
    let config = Config {
        vocabulary,
        width,
        heads,
        head: inner_width / heads,
        intermediate,
        layers: (0..MAX_LAYERS)
            .take_while(|&i| block(i, "layer.0.SelfAttention.q").is_ok())
            .count(),
        buckets,
        max_distance: MAX_DISTANCE,
        activation: if gated {
            Activation::GeluTanh
        } else {
            Activation::Relu
        },
        gated,
        eps: 1e-6,
    };
    Ok((config, layout))
}
