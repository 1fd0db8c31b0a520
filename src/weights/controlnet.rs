//! ControlNets of single files: structure and names read from the tensors' shapes, in the original spelling (`input_blocks.…`) and in diffusers'
//! (`down_blocks.…`), which files without a config have as well.

use sd_kernels::Activation;
use sd_models::controlnet::{Config, Union};
use sd_models::layers::TimeConfig;
use sd_models::unet::{self, Added, Level, Mid};

use super::layout::{Inner, Layout, part_of};
use super::ldm_unet::{self, MAX_BLOCKS, NUMBER_WIDTH, Shapes, groups, heads};
use super::text_tower::at;

/// Where files in the original spelling keep the network.
const PREFIXES: [&str; 2] = ["control_model", ""];
/// More convolutions than any embedding of a hint has.
const MAX_HINTS: usize = 32;
/// The values of a union's transformer, fused with queries and keys.
const FUSED: &[Inner] = &[
    part_of("attn.to_v.weight", "attn.in_proj_weight", (2, 1, 3)),
    part_of("attn.to_v.bias", "attn.in_proj_bias", (2, 1, 3)),
];

/// Structure and names of a ControlNet in a file of these shapes.
///
/// # Errors
/// A sentence that says what is missing or cannot be.
pub(crate) fn read(shapes: &Shapes<'_>) -> Result<(Config, Layout), String> {
    let has = |name: &str| shapes(name).is_some();
    if has("controlnet_cond_embedding.conv_in.weight") {
        return read_diffusers(shapes);
    }
    let own = |prefix: &&&str| has(&at(prefix, "input_hint_block.0.weight"));
    let Some(prefix) = PREFIXES.iter().find(own) else {
        return Err(
            "tensor `input_hint_block.0.weight` is missing or has an unexpected rank".to_owned(),
        );
    };
    read_original(prefix, shapes)
}

fn read_original(prefix: &str, shapes: &Shapes<'_>) -> Result<(Config, Layout), String> {
    let (trunk, layout) = ldm_unet::read_half(prefix, shapes)?;
    finish_original(prefix, (trunk, layout), shapes)
}

/// Structure and names of a Control-LoRA, which has the structure of the UNet that it is for.
///
/// # Errors
/// As [`read`].
pub(crate) fn read_lora(
    unet: &unet::Config,
    shapes: &Shapes<'_>,
) -> Result<(Config, Layout), String> {
    let mut trunk = unet.clone();
    for level in &mut trunk.levels {
        level.up.clear();
    }
    let layout = ldm_unet::layout("", &trunk);
    finish_original("", (trunk, layout), shapes)
}

/// The rest of a ControlNet of which half a UNet is known.
fn finish_original(
    prefix: &str,
    (trunk, mut layout): (unet::Config, Layout),
    shapes: &Shapes<'_>,
) -> Result<(Config, Layout), String> {
    let (hint_channels, hint_widths) = hint(
        |i| at(prefix, &format!("input_hint_block.{}.weight", 2 * i)),
        shapes,
    )?;
    let mut rename = |canonical: String, stored: String| {
        layout.rename(&canonical, &at(prefix, &stored), &[]);
    };
    let last = 2 * hint_widths.len() - 1;
    let embedding = |name: &str| format!("controlnet_cond_embedding.{name}");
    // an activation stands between the convolutions
    rename(embedding("conv_in"), "input_hint_block.0".to_owned());
    for i in 0..last - 1 {
        let stored = format!("input_hint_block.{}", 2 * (i + 1));
        rename(embedding(&format!("blocks.{i}")), stored);
    }
    rename(
        embedding("conv_out"),
        format!("input_hint_block.{}", 2 * last),
    );
    let config = Config {
        trunk,
        hint_channels,
        hint_widths,
        bgr: false,
        pools: false,
        union: None,
    };
    for i in 0..config.residual_channels().0.len() {
        rename(
            format!("controlnet_down_blocks.{i}"),
            format!("zero_convs.{i}.0"),
        );
    }
    rename(
        "controlnet_mid_block".to_owned(),
        "middle_block_out.0".to_owned(),
    );
    Ok((config, layout))
}

/// Channels of the hint, and of each size of its embedding. `name` gives the convolution behind so many others: two of each size, one that
/// keeps it and one that halves it, and the last to the latents' channels.
fn hint(
    name: impl Fn(usize) -> String,
    shapes: &Shapes<'_>,
) -> Result<(usize, Vec<usize>), String> {
    let shape = |i: usize| match shapes(&name(i)).as_deref() {
        Some(&[output, input, _, _]) if output > 0 && input > 0 => Some((output, input)),
        _ => None,
    };
    let missing = |i| format!("tensor `{}` is missing or has an unexpected rank", name(i));
    let count = (0..MAX_HINTS).take_while(|&i| shape(i).is_some()).count();
    let (first, channels) = shape(0).ok_or_else(|| missing(0))?;
    if count % 2 != 0 || count < 2 {
        return Err(missing(count));
    }
    let mut widths = vec![first];
    for i in (2..count - 1).step_by(2) {
        widths.push(shape(i).ok_or_else(|| missing(i))?.0);
    }
    Ok((channels, widths))
}

fn read_diffusers(shapes: &Shapes<'_>) -> Result<(Config, Layout), String> {
    let has = |name: &str| shapes(name).is_some();
    let blocks = (0..MAX_HINTS)
        .take_while(|i| has(&format!("controlnet_cond_embedding.blocks.{i}.weight")))
        .count();
    let (hint_channels, hint_widths) = hint(
        |i| match i {
            0 => "controlnet_cond_embedding.conv_in.weight".to_owned(),
            i if i <= blocks => {
                format!("controlnet_cond_embedding.blocks.{}.weight", i - 1)
            }
            i if i == blocks + 1 => "controlnet_cond_embedding.conv_out.weight".to_owned(),
            _ => String::new(),
        },
        shapes,
    )?;
    let config = Config {
        trunk: diffusers_trunk(shapes)?,
        hint_channels,
        hint_widths,
        bgr: false,
        pools: false,
        union: union(shapes)?,
    };
    let layout = diffusers_layout(&config);
    Ok((config, layout))
}

/// Diffusers' names, and what is fused among them.
pub(crate) fn diffusers_layout(config: &Config) -> Layout {
    let mut layout = Layout::identity("");
    for i in 0..config.union.map_or(0, |union| union.layers) {
        let name = format!("transformer_layes.{i}");
        layout.rename(&name, &name, FUSED);
    }
    layout
}

fn union(shapes: &Shapes<'_>) -> Result<Option<Union>, String> {
    let Some(tasks) = shapes("task_embedding") else {
        return Ok(None);
    };
    let embedding = "control_add_embedding.linear_1.weight";
    let (&[kinds, width], Some(&[_, input])) = (tasks.as_slice(), shapes(embedding).as_deref())
    else {
        return Err(format!(
            "tensor `{embedding}` is missing or has an unexpected rank"
        ));
    };
    if kinds == 0 || width == 0 || input % kinds != 0 {
        return Err(format!(
            "tensor `task_embedding` is of {kinds} kinds of hints, and `{embedding}` takes {input} numbers"
        ));
    }
    let layer = |i: &usize| shapes(&format!("transformer_layes.{i}.ln_1.weight")).is_some();
    Ok(Some(Union {
        kinds,
        width,
        layers: (0..MAX_BLOCKS).take_while(layer).count(),
        number: input / kinds,
    }))
}

/// The half of a UNet under diffusers' names.
fn diffusers_trunk(shapes: &Shapes<'_>) -> Result<unet::Config, String> {
    let missing = |name: &str| format!("tensor `{name}` is missing or has an unexpected rank");
    let has = |name: &str| shapes(name).is_some();
    let rows = |name: &str| match shapes(name).as_deref() {
        Some(&[output, input, ..]) if output > 0 && input > 0 => Ok((output, input)),
        _ => Err(missing(name)),
    };
    let (first, in_channels) = rows("conv_in.weight")?;
    let (time_output, time_input) = rows("time_embedding.linear_1.weight")?;
    let transformer = |stored: &str| {
        let block = |i: usize| format!("{stored}.transformer_blocks.{i}.attn2.to_k.weight");
        let depth = (0..MAX_BLOCKS).take_while(|&i| has(&block(i))).count();
        let context = shapes(&block(0)).and_then(|shape| shape.get(1).copied());
        let linear = shapes(&format!("{stored}.proj_in.weight")).is_some_and(|s| s.len() == 2);
        (depth, context.map(|context| (context, linear)))
    };
    let mut kind = None;
    let mut levels = Vec::new();
    for level in 0..MAX_BLOCKS {
        let block = format!("down_blocks.{level}");
        let mut down = Vec::new();
        let mut channels = 0;
        for layer in 0..MAX_BLOCKS {
            let conv = format!("{block}.resnets.{layer}.conv2.weight");
            if !has(&conv) {
                break;
            }
            channels = rows(&conv)?.0;
            let (depth, found) = transformer(&format!("{block}.attentions.{layer}"));
            kind = kind.or(found);
            down.push(depth);
        }
        if down.is_empty() {
            break;
        }
        levels.push((channels, down));
    }
    if levels.is_empty() {
        return Err(missing("down_blocks.0.resnets.0.conv2.weight"));
    }
    let (middle, found) = transformer("mid_block.attentions.0");
    let (context, linear) = kind.or(found).unwrap_or((768, false));
    let added = match shapes("add_embedding.linear_1.weight").as_deref() {
        Some(&[_, input]) => Some(Added {
            input,
            number: NUMBER_WIDTH,
        }),
        Some(_) => return Err(missing("add_embedding.linear_1.weight")),
        None => None,
    };
    let channels: Vec<usize> = levels.iter().map(|(channels, _)| *channels).collect();
    let level = |(channels, down): (usize, Vec<usize>)| Level {
        channels,
        heads: heads(channels, linear),
        context,
        only_cross_attention: false,
        down,
        up: Vec::new(),
    };
    Ok(unet::Config {
        in_channels,
        out_channels: in_channels,
        levels: levels.into_iter().map(level).collect(),
        mid: match (has("mid_block.resnets.0.conv1.weight"), middle) {
            (false, _) => Mid::None,
            (true, 0) => Mid::Resnet,
            (true, depth) => Mid::Attention { depth },
        },
        mid_scale: 1.0,
        groups: groups(&channels.iter().copied().chain([first])),
        eps: 1e-5,
        activation: Activation::Silu,
        time: TimeConfig {
            input: time_input,
            output: time_output,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            activation: Activation::Silu,
            condition: None,
        },
        added,
        classes: None,
        time_activation: None,
        scale_shift: false,
        downsample_padding: 1,
        center_input: false,
        conv_in_kernel: 3,
        conv_out_kernel: 3,
    })
}
