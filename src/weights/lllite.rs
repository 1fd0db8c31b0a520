//! ControlNet-LLLites: which projection of the UNet each module is for, and its sizes.
//!
//! Files name a module by the projection that it stands before, with underscores for dots: `lllite_unet_input_blocks_4_1_…_attn1_to_q.down.0.weight`.
//! The numbers are CompVis'; diffusers' names mean the same.

use std::collections::{BTreeMap, BTreeSet};

use sd_models::lllite::{Config, Module};
use sd_models::unet::{self, Level, Mid};

use super::layout::Layout;
use super::ldm_unet::{self, Shapes};

/// What names of modules begin with.
const LEAD: &str = "lllite_unet_";
/// More convolutions than any picture's embedding has.
const MAX_CONVOLUTIONS: usize = 16;

/// Whether a file with this tensor is one.
pub(crate) fn is_lllite(name: &str) -> bool {
    name.starts_with(LEAD)
}

/// Structure and names of a file of tensors `names`, for a model with this UNet.
///
/// # Errors
/// A sentence that says what is missing, or does not belong to this UNet.
pub(crate) fn read<'a>(
    unet: &unet::Config,
    names: impl Iterator<Item = &'a str>,
    shapes: &Shapes<'_>,
) -> Result<(Config, Layout), String> {
    let stored: BTreeSet<&str> = names
        .filter(|name| is_lllite(name))
        .map(|name| name.split_once('.').map_or(name, |(module, _)| module))
        .collect();
    let places = places(unet);
    let mut config = Config::default();
    let mut layout = Layout::default();
    for module in stored {
        let flat = module.strip_prefix(LEAD).unwrap_or(module);
        let Some(place) = places.get(flat) else {
            return Err(format!(
                "`{module}` stands before no query, key or value that the model's UNet makes of latents; give a ControlNet-LLLite that was made for this family, and one that steers attention alone"
            ));
        };
        layout.rename(&place.name, module, &[]);
        let read = read_module(module, place, shapes)?;
        if config.modules.insert(place.name.clone(), read).is_some() {
            return Err(format!("`{module}` is there under two names"));
        }
    }
    Ok((config, layout))
}

fn read_module(stored: &str, place: &Place, shapes: &Shapes<'_>) -> Result<Module, String> {
    let missing =
        |name: &str| format!("tensor `{stored}.{name}` is missing or has an unexpected rank");
    let shape = |name: &str| shapes(&format!("{stored}.{name}"));
    let down = "down.0.weight";
    let Some(&[inner, width]) = shape(down).as_deref() else {
        return Err(missing(down));
    };
    if inner == 0 {
        return Err(format!("tensor `{stored}.{down}` has no numbers"));
    }
    if width != place.width {
        return Err(format!(
            "tensor `{stored}.{down}` takes {width} channels, and the model's UNet has {} there; give a ControlNet-LLLite that was made for this family",
            place.width
        ));
    }
    let convolution = |i: usize| format!("conditioning1.{}.weight", 2 * i);
    let mut picture = None;
    let mut convolutions = Vec::new();
    for i in 0..MAX_CONVOLUTIONS {
        match shape(&convolution(i)).as_deref() {
            Some(&[output, input, _, side]) if output > 0 && input > 0 && side > 0 => {
                picture = picture.or(Some(input));
                convolutions.push((output, side));
            }
            Some(_) => return Err(missing(&convolution(i))),
            None => break,
        }
    }
    let module = Module {
        width,
        inner,
        picture: picture.ok_or_else(|| missing(&convolution(0)))?,
        convolutions,
        level: place.level,
    };
    match module.stride() {
        Some(_) => Ok(module),
        None => Err(format!(
            "the convolutions `{stored}.conditioning1` make the picture smaller than any is"
        )),
    }
}

/// A projection that a module may stand before.
struct Place {
    /// As diffusers has it.
    name: String,
    /// Channels that it takes.
    width: usize,
    /// How often the latents were halved there.
    level: usize,
}

/// All of a UNet's, by their flat names.
fn places(unet: &unet::Config) -> BTreeMap<String, Place> {
    let layout = ldm_unet::layout("", unet);
    let count = unet.levels.len();
    let mut all = BTreeMap::new();
    let mut add = |attention: &str, depth: usize, (index, level): (usize, &Level)| {
        for block in 0..depth {
            let block = format!("{attention}.transformer_blocks.{block}");
            // what is made of the text is nobody's
            let own: &[&str] = match level.only_cross_attention {
                true => &["attn1.to_q", "attn2.to_q"],
                false => &["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q"],
            };
            for part in own {
                let name = format!("{block}.{part}");
                let numbered = layout.place(&name).map(|part| part.stored);
                for spelling in numbered.iter().chain([&name]) {
                    let place = Place {
                        name: name.clone(),
                        width: level.channels,
                        level: index,
                    };
                    all.insert(spelling.replace('.', "_"), place);
                }
            }
        }
    };
    for (i, level) in unet.levels.iter().enumerate() {
        for (layer, &depth) in level.down.iter().enumerate() {
            add(
                &format!("down_blocks.{i}.attentions.{layer}"),
                depth,
                (i, level),
            );
        }
        let block = count - 1 - i;
        for (layer, &depth) in level.up.iter().enumerate() {
            add(
                &format!("up_blocks.{block}.attentions.{layer}"),
                depth,
                (i, level),
            );
        }
    }
    if let (Mid::Attention { depth }, Some(last)) = (unet.mid, unet.levels.last()) {
        let level = Level {
            only_cross_attention: false,
            ..last.clone()
        };
        add("mid_block.attentions.0", depth, (count - 1, &level));
    }
    all
}
