//! The autoencoder of single files (CompVis' names): structure and names read from the tensors' shapes.

use sd_kernels::Activation;
use sd_models::vae::Config;

use super::layout::{Inner, Layout, convolution, inner};
use super::ldm_unet::{Shapes, groups};

const RESNET: &[Inner] = &[inner("conv_shortcut", "nin_shortcut")];
const ATTENTION: &[Inner] = &[
    inner("group_norm", "norm"),
    convolution("to_q", "q"),
    convolution("to_k", "k"),
    convolution("to_v", "v"),
    convolution("to_out.0", "proj_out"),
];
/// More levels than any autoencoder has.
const MAX_LEVELS: usize = 16;

/// Structure and names of the autoencoder below `prefix` (such as `first_stage_model`), with the scaling factor of its family.
///
/// # Errors
/// A sentence that says what is missing.
pub(crate) fn read(
    prefix: &str,
    scaling_factor: f64,
    shapes: &Shapes<'_>,
) -> Result<(Config, Layout), String> {
    let name = |name: &str| {
        format!("{prefix}.{name}")
            .trim_start_matches('.')
            .to_owned()
    };
    let conv = |tensor: &str| match shapes(&name(tensor)).as_deref() {
        Some(&[o, i, _, _]) if o > 0 && i > 0 => Ok((o, i)),
        _ => Err(format!(
            "tensor `{}` is missing or has an unexpected rank",
            name(tensor)
        )),
    };
    let count_while = |max: usize, tensor: &dyn Fn(usize) -> String| {
        (0..max)
            .take_while(|&i| shapes(&name(&tensor(i))).is_some())
            .count()
    };
    let levels = count_while(MAX_LEVELS, &|i| {
        format!("decoder.up.{i}.block.0.conv1.weight")
    });
    let channels = (0..levels)
        .map(|i| conv(&format!("decoder.up.{i}.block.0.conv1.weight")).map(|(o, _)| o))
        .collect::<Result<Vec<_>, _>>()?;
    let (_, latent_channels) = conv("decoder.conv_in.weight")?;
    let (out_channels, _) = conv("decoder.conv_out.weight")?;
    let resnets = count_while(64, &|j| format!("decoder.up.0.block.{j}.conv1.weight"));
    let Some(layers) = resnets.checked_sub(1).filter(|&n| n > 0) else {
        return Err(format!(
            "tensor `{}` is missing",
            name("decoder.up.0.block.1.conv1.weight")
        ));
    };

    let has = |tensor: &str| shapes(&name(tensor)).is_some();
    let config = Config {
        in_channels: conv("encoder.conv_in.weight").map_or(3, |(_, i)| i),
        out_channels,
        latent_channels,
        layers,
        groups: groups(&channels.iter().copied()),
        channels,
        activation: Activation::Silu,
        scaling_factor,
        shift_factor: 0.0,
        spread: None,
        mid_attention: has("decoder.mid.attn_1.norm.weight"),
        quant_conv: has("quant_conv.weight"),
        post_quant_conv: has("post_quant_conv.weight"),
    };
    Ok((config, layout(prefix, levels, layers)))
}

/// The names below `prefix` of an autoencoder of so many levels, with so many residual blocks a level in the encoder.
pub(crate) fn layout(prefix: &str, levels: usize, layers: usize) -> Layout {
    let name = |name: &str| {
        format!("{prefix}.{name}")
            .trim_start_matches('.')
            .to_owned()
    };
    let mut layout = Layout::default();
    let mut rename = |canonical: String, stored: String, inner: &'static [Inner]| {
        layout.rename(&canonical, &name(&stored), inner);
    };
    for side in ["encoder", "decoder"] {
        rename(format!("{side}.conv_in"), format!("{side}.conv_in"), &[]);
        rename(
            format!("{side}.conv_norm_out"),
            format!("{side}.norm_out"),
            &[],
        );
        rename(format!("{side}.conv_out"), format!("{side}.conv_out"), &[]);
        for (i, block) in ["block_1", "block_2"].iter().enumerate() {
            rename(
                format!("{side}.mid_block.resnets.{i}"),
                format!("{side}.mid.{block}"),
                RESNET,
            );
        }
        rename(
            format!("{side}.mid_block.attentions.0"),
            format!("{side}.mid.attn_1"),
            ATTENTION,
        );
    }
    for i in 0..levels {
        for j in 0..layers {
            rename(
                format!("encoder.down_blocks.{i}.resnets.{j}"),
                format!("encoder.down.{i}.block.{j}"),
                RESNET,
            );
        }
        rename(
            format!("encoder.down_blocks.{i}.downsamplers.0"),
            format!("encoder.down.{i}.downsample"),
            &[],
        );
        // the decoder's levels are numbered from full size in single files, from the smallest in diffusers
        let up = levels - 1 - i;
        for j in 0..=layers {
            rename(
                format!("decoder.up_blocks.{i}.resnets.{j}"),
                format!("decoder.up.{up}.block.{j}"),
                RESNET,
            );
        }
        rename(
            format!("decoder.up_blocks.{i}.upsamplers.0"),
            format!("decoder.up.{up}.upsample"),
            &[],
        );
    }
    for conv in ["quant_conv", "post_quant_conv"] {
        rename(conv.to_owned(), conv.to_owned(), &[]);
    }
    layout
}
