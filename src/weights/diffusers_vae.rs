//! The autoencoder in one file under diffusers' names, without a config: structure read from the tensors' shapes.

use sd_kernels::Activation;
use sd_models::vae::Config;

use super::layout::Layout;
use super::ldm_unet::{Shapes, groups};

/// More levels, or layers of one, than any autoencoder has.
const MAX_PARTS: usize = 64;

/// diffusers renamed the attention's parts in 2023; older files keep the old names.
pub(crate) const OLD_NAMES: [(&str, &str); 4] = [
    (".to_q.", ".query."),
    (".to_k.", ".key."),
    (".to_v.", ".value."),
    (".to_out.0.", ".proj_attn."),
];

/// Structure and names of the autoencoder below `prefix`, with the scaling factor of its family.
///
/// # Errors
/// A sentence that says what is missing.
pub(crate) fn read(
    prefix: &str,
    scaling_factor: f64,
    shapes: &Shapes<'_>,
) -> Result<(Config, Layout), String> {
    let full = |name: &str| {
        format!("{prefix}.{name}")
            .trim_start_matches('.')
            .to_owned()
    };
    let conv = |name: &str| match shapes(&full(name)).as_deref() {
        Some(&[o, i, _, _]) if o > 0 && i > 0 => Ok((o, i)),
        _ => Err(format!(
            "tensor `{}` is missing or has an unexpected rank",
            full(name)
        )),
    };
    let block = |level: usize, layer: usize| {
        format!("decoder.up_blocks.{level}.resnets.{layer}.conv1.weight")
    };
    let mut channels: Vec<usize> = (0..MAX_PARTS)
        .map_while(|level| Some(conv(&block(level, 0)).ok()?.0))
        .collect();
    channels.reverse(); // the decoder's blocks are counted from the smallest
    let resnets = (0..MAX_PARTS)
        .take_while(|&layer| conv(&block(0, layer)).is_ok())
        .count();
    let Some(layers) = resnets.checked_sub(1).filter(|&layers| layers > 0) else {
        return Err(format!("tensor `{}` is missing", full(&block(0, 1))));
    };
    let has = |name: &str| shapes(&full(name)).is_some();
    let config = Config {
        in_channels: conv("encoder.conv_in.weight").map_or(3, |(_, i)| i),
        out_channels: conv("decoder.conv_out.weight")?.0,
        latent_channels: conv("decoder.conv_in.weight")?.1,
        layers,
        groups: groups(&channels.iter().copied()),
        channels,
        activation: Activation::Silu,
        scaling_factor,
        shift_factor: 0.0,
        spread: None,
        mid_attention: has("decoder.mid_block.attentions.0.group_norm.weight"),
        quant_conv: has("quant_conv.weight"),
        post_quant_conv: has("post_quant_conv.weight"),
    };
    let mut layout = Layout::identity(prefix);
    for (name, old) in OLD_NAMES {
        layout.alias(name, old);
    }
    Ok((config, layout))
}
