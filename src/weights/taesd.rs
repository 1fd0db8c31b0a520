//! Tiny autoencoders: their layers are numbered, and what stands at a number tells what it is. What has no weights leaves a gap: a limit before
//! the first convolution, a ReLU behind it, later on an enlargement.

use sd_models::vae::{TinyConfig, TinyLayer};

use super::layout::Layout;
use super::ldm_unet::Shapes;

/// Where decoders lie in files.
const PREFIXES: [&str; 4] = ["decoder.layers", "taesd_decoder", "decoder", ""];
/// More layers than any has.
const MAX_LAYERS: usize = 256;

/// Structure and names of the tiny decoder in a file.
///
/// # Errors
/// A sentence that says what is missing.
pub(crate) fn read(shapes: &Shapes<'_>) -> Result<(TinyConfig, Layout), String> {
    let found = PREFIXES.into_iter().find_map(|prefix| {
        let layers = layers(prefix, shapes);
        let enough = layers
            .iter()
            .any(|layer| matches!(layer, TinyLayer::Block { .. }));
        enough.then_some((prefix, layers))
    });
    let Some((prefix, layers)) = found else {
        return Err("the file holds no decoder of a tiny autoencoder (TAESD)".to_owned());
    };
    let Some(&TinyLayer::Conv {
        channels: (latent_channels, _),
        ..
    }) = layers.first()
    else {
        return Err("the tiny decoder does not begin with a convolution".to_owned());
    };
    let config = TinyConfig {
        latent_channels,
        layers,
    };
    Ok((config, Layout::identity(prefix)))
}

fn layers(prefix: &str, shapes: &Shapes<'_>) -> Vec<TinyLayer> {
    let shape = |name: String| {
        let full = format!("{prefix}.{name}");
        shapes(full.trim_start_matches('.'))
    };
    let mut layers = Vec::new();
    let mut gap = 0;
    for index in 0..MAX_LAYERS {
        let conv = shape(format!("{index}.weight"));
        let block = shape(format!("{index}.conv.0.weight"));
        let layer = match (conv.as_deref(), block.as_deref()) {
            (Some(&[o, i, 3, 3]), None) => TinyLayer::Conv {
                index,
                channels: (i, o),
                bias: shape(format!("{index}.bias")).is_some(),
            },
            (None, Some(&[o, i, 3, 3])) => TinyLayer::Block {
                index,
                channels: (i, o),
                skip: shape(format!("{index}.skip.weight")).is_some(),
            },
            _ => {
                gap += 1;
                continue;
            }
        };
        match (gap, layers.len()) {
            (0, _) | (_, 0) => {}
            (1, 1) => layers.push(TinyLayer::Relu),
            (1, _) => layers.push(TinyLayer::Upsample),
            // the end, and something else behind it
            _ => break,
        }
        gap = 0;
        layers.push(layer);
    }
    layers
}
