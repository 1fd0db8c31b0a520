//! How the networks of a model lie in a single file, and what such a file cannot say: the other direction of reading one.

use super::table::{Spelling, row};
use super::{ModelSpec, SINGLE_VAE, TextTower, TowerRole};
use crate::error::Result;
use crate::weights::layout::Layout;
use crate::weights::ldm_unet::Shapes;
use crate::weights::text_tower::{self, OpenClip, open_clip_layout, transformers_layout};
use crate::weights::{ldm_unet, ldm_vae};
use sd_models::{clip, unet, vae};

/// Where a single file keeps its UNet.
pub(crate) const SINGLE_UNET: &str = "model.diffusion_model";

/// The names of each network in a single file.
pub(crate) struct SingleLayouts {
    /// The UNet's.
    pub(crate) unet: Layout,
    /// The autoencoder's.
    pub(crate) vae: Layout,
    /// The text towers', in the model's order.
    pub(crate) text: Vec<SingleTower>,
}

/// The names of a text tower in a single file.
pub(crate) struct SingleTower {
    /// All names.
    pub(crate) layout: Layout,
    /// A layer that the file has behind the last one and that nothing computes: whoever reads such a file counts it and leaves it out.
    pub(crate) spare_layer: bool,
}

/// The structure and names of a text tower in a single file of these shapes.
pub(super) fn read_tower(
    role: &TowerRole,
    shapes: &Shapes<'_>,
) -> std::result::Result<(clip::Config, Layout), String> {
    match role.spelling {
        Spelling::Transformers(_) => {
            text_tower::read_transformers(role.prefix, role.transformers(), shapes)
        }
        Spelling::OpenClip(used) => text_tower::read_open_clip(role.prefix, used, shapes),
    }
}

/// The names that a single file has for the networks of `spec`.
///
/// # Errors
/// When it has a transformer in the UNet's place.
pub(crate) fn layouts(spec: &ModelSpec) -> Result<SingleLayouts> {
    let unet = spec.unet_config()?;
    let vae = &spec.vae.config;
    let tower = |tower: &TextTower| {
        let spare_layer = tower.role.spelling == Spelling::OpenClip(OpenClip::AllButLast);
        let layers = tower.component.config.layers + usize::from(spare_layer);
        let layout = match tower.role.spelling {
            Spelling::Transformers(_) => transformers_layout(tower.role.prefix),
            Spelling::OpenClip(_) => open_clip_layout(tower.role.prefix, layers),
        };
        SingleTower {
            layout,
            spare_layer,
        }
    };
    Ok(SingleLayouts {
        unet: ldm_unet::layout(SINGLE_UNET, unet),
        vae: ldm_vae::layout(SINGLE_VAE, vae.channels.len(), vae.layers),
        text: spec.text.iter().map(tower).collect(),
    })
}

/// What of `spec` would be another thing for those who read a single file of these shapes, which says little besides: they go by the
/// family's rules. A sentence, or none where nothing is lost.
pub(crate) fn difference(spec: &ModelSpec, shapes: &Shapes<'_>) -> Option<String> {
    let Some(row) = row(spec.family) else {
        return Some("its family is not known in single files".to_owned());
    };
    let own_unet = match spec.unet_config() {
        Ok(own) => own,
        Err(refusal) => return Some(refusal.to_string()),
    };
    let (mut unet, _) = match ldm_unet::read(SINGLE_UNET, shapes) {
        Ok(read) => read,
        Err(reason) => return Some(reason),
    };
    if let (Some(read), Some(own)) = (&mut unet.added, own_unet.added) {
        // the width of a number's sinusoids follows from the text's
        read.number = own.number;
    }
    if let Some(what) = unet_difference(own_unet, &unet) {
        return Some(format!("UNet: {what}"));
    }
    match ldm_vae::read(SINGLE_VAE, row.scaling_factor, shapes) {
        Ok((vae, _)) => {
            if let Some(what) = vae_difference(&spec.vae.config, &vae) {
                return Some(format!("autoencoder: {what}"));
            }
        }
        Err(reason) => return Some(reason),
    }
    spec.text
        .iter()
        .find_map(|tower| match read_tower(&tower.role, shapes) {
            Ok((config, _)) => text_difference(&tower.component.config, &config)
                .map(|what| format!("text encoder: {what}")),
            Err(reason) => Some(reason),
        })
}

/// The first of these pairs that differs, as a sentence.
macro_rules! first_difference {
    ($($what:literal: $own:expr, $read:expr;)*) => {
        $(if $own != $read {
            return Some(format!(concat!($what, ": {:?} would become {:?}"), $own, $read));
        })*
    };
}

/// The first thing in which two UNets differ, `own` as it is and `read` as it would become.
pub(crate) fn unet_difference(own: &unet::Config, read: &unet::Config) -> Option<String> {
    first_difference! {
        "input channels": own.in_channels, read.in_channels;
        "output channels": own.out_channels, read.out_channels;
        "middle": own.mid, read.mid;
        "levels": own.levels.len(), read.levels.len();
        "division of the middle's sums": own.mid_scale, read.mid_scale;
        "groups of the norms": own.groups, read.groups;
        "epsilon of the norms": own.eps, read.eps;
        "activation": own.activation, read.activation;
        "timestep's embedding": own.time, read.time;
        "vector beside the time": own.added, read.added;
        "classes": own.classes, read.classes;
        "activation of the time's embedding": own.time_activation, read.time_activation;
        "time as scale and shift": own.scale_shift, read.scale_shift;
        "padding of downsampling": own.downsample_padding, read.downsample_padding;
        "shift of the input": own.center_input, read.center_input;
        "kernel of the first convolution": own.conv_in_kernel, read.conv_in_kernel;
        "kernel of the last convolution": own.conv_out_kernel, read.conv_out_kernel;
    }
    let last = own.levels.len().saturating_sub(1);
    for (i, (own_level, level)) in own.levels.iter().zip(&read.levels).enumerate() {
        first_difference! {
            "channels of a level": own_level.channels, level.channels;
            "transformers on the way down": own_level.down, level.down;
            "transformers on the way up": own_level.up, level.up;
            "attention of transformers": own_level.only_cross_attention, level.only_cross_attention;
        }
        let middle = i == last && matches!(own.mid, unet::Mid::Attention { .. });
        let depths = own_level.down.iter().chain(&own_level.up);
        if middle || depths.copied().any(|depth| depth > 0) {
            first_difference! {
                "attention heads": own_level.heads, level.heads;
                "width of the text": own_level.context, level.context;
            }
        }
    }
    None
}

fn vae_difference(own: &vae::Config, read: &vae::Config) -> Option<String> {
    first_difference! {
        "channels of the picture": (own.in_channels, own.out_channels), (read.in_channels, read.out_channels);
        "channels of the latents": own.latent_channels, read.latent_channels;
        "channels": own.channels, read.channels;
        "residual blocks a level": own.layers, read.layers;
        "groups of the norms": own.groups, read.groups;
        "activation": own.activation, read.activation;
        "shift of the latents": own.shift_factor, read.shift_factor;
        "attention in the middle": own.mid_attention, read.mid_attention;
        "quantising convolutions": (own.quant_conv, own.post_quant_conv), (read.quant_conv, read.post_quant_conv);
    }
    // channel by channel, a single file says it in tensors
    if own.spread.is_none() {
        first_difference! { "scaling factor": own.scaling_factor, read.scaling_factor; }
    }
    None
}

fn text_difference(own: &clip::Config, read: &clip::Config) -> Option<String> {
    first_difference! {
        "sizes": (own.vocabulary, own.positions, own.width, own.intermediate), (read.vocabulary, read.positions, read.width, read.intermediate);
        "layers": own.layers, read.layers;
        "attention heads": own.heads, read.heads;
        "activation": own.activation, read.activation;
        "epsilon of the norms": own.eps, read.eps;
        "projection": own.projection, read.projection;
    }
    None
}
