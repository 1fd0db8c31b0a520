//! Upscalers of attention within windows (SwinIR, Swin2SR, HAT): structure from names and shapes, as spandrel 0.4.2 reads them.

use sd_models::upscaler::{Link, SwinConfig, SwinGroup, SwinKind, Tail};

use super::layout::{Inner, Layout, inner, part_of};
use super::ldm_unet::Shapes;
use super::upscaler::{MAX_BLOCKS, MAX_CHANNELS, channels};

/// The widest window that is taken, in pixels.
const MAX_WINDOW: usize = 64;
/// No network enlarges by more.
const MOST: usize = 64;
/// The window's side at which networks were trained on pictures of 0 to 255 (those against JPEG's artefacts).
const BYTES_WINDOW: usize = 7;

/// Queries, keys and values lie in one tensor.
const FUSED: &[Inner] = &[
    part_of("q.weight", "qkv.weight", (0, 1, 3)),
    part_of("k.weight", "qkv.weight", (1, 1, 3)),
    part_of("v.weight", "qkv.weight", (2, 1, 3)),
    part_of("q.bias", "qkv.bias", (0, 1, 3)),
    part_of("k.bias", "qkv.bias", (1, 1, 3)),
    part_of("v.bias", "qkv.bias", (2, 1, 3)),
];
/// The same, but for biases.
const FUSED_WEIGHTS: &[Inner] = &[
    FUSED[0],
    FUSED[1],
    FUSED[2],
    inner("q.bias", "q_bias"),
    inner("v.bias", "v_bias"),
];

/// Whether a stored name is a table that follows from the window's size.
pub(super) fn is_index(name: &str) -> bool {
    [
        "attn_mask",
        "relative_position_index",
        "relative_position_index_SA",
        "relative_position_index_OCA",
    ]
    .contains(&name.rsplit('.').next().unwrap_or_default())
}

/// Structure and names of such a network; None where it is another.
///
/// # Errors
/// A sentence that says what is missing, or cannot be read.
pub(super) fn read(
    prefix: &str,
    shapes: &Shapes<'_>,
) -> Result<Option<(SwinConfig, Layout)>, String> {
    let there = |name: &str| shapes(name).is_some();
    if !there("layers.0.residual_group.blocks.0.norm1.weight")
        || !there("layers.0.residual_group.blocks.0.mlp.fc1.weight")
    {
        return Ok(None);
    }
    if there("absolute_pos_embed") {
        return Err("it adds absolute positions (`absolute_pos_embed`), so it takes pictures of one size only, which is not supported; use one without".to_owned());
    }
    let unshuffled = there("conv_first.1.weight");
    let first = if unshuffled {
        "conv_first.1"
    } else {
        "conv_first"
    };
    let (width, input) = channels(shapes, &format!("{first}.weight"))?;
    let unshuffle = match unshuffled {
        true => (input / 3).isqrt().max(1),
        false => 1,
    };
    if !input.is_multiple_of(unshuffle * unshuffle) {
        return Err(format!(
            "its first convolution takes {input} channels, expected 3 times a square"
        ));
    }
    let input = input / (unshuffle * unshuffle);
    let (kind, window) = kind(shapes)?;
    let groups = groups(shapes, kind, width)?;
    let (tail, output) = tail(shapes, input)?;
    let config = SwinConfig {
        kind,
        input,
        output,
        width,
        hidden: rows(shapes, "layers.0.residual_group.blocks.0.mlp.fc1.weight")?,
        window,
        bias: match kind {
            SwinKind::Second { .. } => there("layers.0.residual_group.blocks.0.attn.q_bias"),
            _ => there("layers.0.residual_group.blocks.0.attn.qkv.bias"),
        },
        norm: there("patch_embed.norm.weight"),
        link: link(shapes, kind)?,
        tail,
        unshuffle,
        bytes: window == BYTES_WINDOW && !matches!(kind, SwinKind::Hybrid { .. }),
        groups,
    };
    let factor = config.factor();
    if factor > MOST {
        return Err(format!(
            "it enlarges by more than {MOST}, which is no upscaler that is known"
        ));
    }
    if factor == 0 || !factor.is_multiple_of(unshuffle) {
        return Err(format!(
            "its first convolution takes squares of {unshuffle}x{unshuffle} pixels, which it enlarges {factor} times: expected a multiple of {unshuffle}"
        ));
    }
    let layout = layout(prefix, &config, first);
    Ok(Some((config, layout)))
}

fn layout(prefix: &str, config: &SwinConfig, first: &str) -> Layout {
    let mut layout = Layout::identity(prefix);
    layout.rename("conv_first", &format!("{prefix}{first}"), &[]);
    let fused = match config.kind {
        SwinKind::Second { .. } => FUSED_WEIGHTS,
        _ => FUSED,
    };
    for (i, group) in config.groups.iter().enumerate() {
        let below = format!("layers.{i}.residual_group");
        for j in 0..group.blocks {
            let name = format!("{below}.blocks.{j}.attn");
            layout.rename(&name, &format!("{prefix}{name}"), fused);
        }
        let name = format!("{below}.overlap_attn");
        layout.rename(&name, &format!("{prefix}{name}"), fused);
    }
    layout
}

/// The first axis of a tensor.
fn rows(shapes: &Shapes<'_>, name: &str) -> Result<usize, String> {
    match shapes(name).as_deref().and_then(<[usize]>::first) {
        Some(&rows) if (1..=MAX_CHANNELS).contains(&rows) => Ok(rows),
        Some(rows) => Err(format!(
            "tensor `{name}` has {rows} rows, expected 1 to {MAX_CHANNELS}"
        )),
        None => Err(format!(
            "tensor `{name}` is missing, so the network is not whole"
        )),
    }
}

/// The root of a table's rows: how many distances there are along one axis.
fn distances(shapes: &Shapes<'_>, name: &str) -> Result<usize, String> {
    let found = shapes(name);
    let rows = found.as_deref().and_then(<[usize]>::first).copied();
    let rows =
        rows.ok_or_else(|| format!("tensor `{name}` is missing, so the network is not whole"))?;
    let n = rows.isqrt();
    match n * n == rows && n % 2 == 1 && n < 4 * MAX_WINDOW {
        true => Ok(n),
        false => Err(format!(
            "tensor `{name}` has {rows} rows, expected the square of an odd number below {}",
            4 * MAX_WINDOW
        )),
    }
}

/// Which network it is, and its window's side.
fn kind(shapes: &Shapes<'_>) -> Result<(SwinKind, usize), String> {
    const BLOCK: &str = "layers.0.residual_group.blocks.0";
    const OVERLAP: &str = "layers.0.residual_group.overlap_attn";
    let attention = |name: &str| format!("{BLOCK}.attn.{name}");
    if shapes(&attention("logit_scale")).is_some() {
        let name = attention("relative_coords_table");
        let n = match shapes(&name).as_deref() {
            Some(&[1, n, m, 2]) if n == m && n % 2 == 1 && n < 2 * MAX_WINDOW => n,
            Some(shape) => {
                return Err(format!(
                    "tensor `{name}` has shape {shape:?}, expected [1, n, n, 2] with an odd n below {}",
                    2 * MAX_WINDOW
                ));
            }
            None => {
                return Err(format!(
                    "tensor `{name}` is missing, so the network is not whole"
                ));
            }
        };
        let positions = rows(shapes, &attention("cpb_mlp.0.bias"))?;
        return Ok((SwinKind::Second { positions }, n.div_ceil(2)));
    }
    let n = distances(shapes, &attention("relative_position_bias_table"))?;
    let window = n.div_ceil(2);
    if window > MAX_WINDOW {
        return Err(format!(
            "its windows are {window} pixels wide, expected at most {MAX_WINDOW}"
        ));
    }
    if shapes(&format!("{OVERLAP}.qkv.weight")).is_none() {
        return Ok((SwinKind::First, window));
    }
    let wide = distances(shapes, &format!("{OVERLAP}.relative_position_bias_table"))?;
    // a window and one that is wider on both sides: side + side + 2 · beyond − 1
    let beyond = wide.checked_sub(n).map(|more| more / 2);
    let Some(beyond) = beyond else {
        return Err(format!(
            "its overlapping windows have {wide} distances and the others {n}, expected at least as many"
        ));
    };
    let inner = |name: &str| rows(shapes, &format!("{BLOCK}.conv_block.cab.{name}.weight"));
    let kind = SwinKind::Hybrid {
        squeezed: inner("0")?,
        weighed: inner("3.attention.1")?,
        beyond,
    };
    Ok((kind, window))
}

fn groups(shapes: &Shapes<'_>, kind: SwinKind, width: usize) -> Result<Vec<SwinGroup>, String> {
    let block = |i: usize, j: usize| format!("layers.{i}.residual_group.blocks.{j}");
    let there = |i: usize, j: usize| shapes(&format!("{}.norm1.weight", block(i, j))).is_some();
    let count = (0..MAX_BLOCKS).take_while(|&i| there(i, 0)).count();
    let group = |i: usize| {
        let heads = match kind {
            SwinKind::Second { .. } => rows(shapes, &format!("{}.attn.logit_scale", block(i, 0)))?,
            _ => {
                let name = format!("{}.attn.relative_position_bias_table", block(i, 0));
                let found = shapes(&name);
                found.and_then(|shape| shape.get(1).copied()).unwrap_or(0)
            }
        };
        if heads == 0 || !width.is_multiple_of(heads) {
            return Err(format!(
                "group {i} of its layers has {heads} heads for {width} channels, expected a divisor"
            ));
        }
        let blocks = (0..MAX_BLOCKS).take_while(|&j| there(i, j)).count();
        Ok(SwinGroup { blocks, heads })
    };
    (0..count).map(group).collect()
}

fn link(shapes: &Shapes<'_>, kind: SwinKind) -> Result<Link, String> {
    if shapes("conv_after_body.weight").is_some() {
        return Ok(Link::One);
    }
    if shapes("conv_after_body.0.weight").is_some() {
        return Ok(Link::Three(rows(shapes, "conv_after_body.0.weight")?));
    }
    match kind {
        SwinKind::Hybrid { .. } => Ok(Link::Nothing),
        _ => Err(
            "tensor `conv_after_body.weight` is missing, so the network is not whole".to_owned(),
        ),
    }
}

/// How the picture is made larger, and its channels.
fn tail(shapes: &Shapes<'_>, input: usize) -> Result<(Tail, usize), String> {
    let there = |name: &str| shapes(name).is_some();
    for (name, what) in [
        (
            "conv_bicubic.weight",
            "an auxiliary picture (`conv_bicubic`)",
        ),
        (
            "conv_after_body_hf.weight",
            "a second network for details (`layers_hf`)",
        ),
    ] {
        if there(name) {
            return Err(format!(
                "it is a Swin2SR network with {what}, which is not built; use one that only enlarges"
            ));
        }
    }
    if !there("conv_before_upsample.0.weight") {
        if !there("upsample.0.weight") {
            return Ok((Tail::Same, channels(shapes, "conv_last.weight")?.0));
        }
        let (pixels, _) = channels(shapes, "upsample.0.weight")?;
        let scale = (pixels / input).isqrt();
        return match scale * scale * input == pixels {
            true => Ok((Tail::Direct { scale }, input)),
            false => Err(format!(
                "its last convolution has {pixels} channels, expected {input} times a square"
            )),
        };
    }
    let (features, _) = channels(shapes, "conv_before_upsample.0.weight")?;
    let (output, _) = channels(shapes, "conv_last.weight")?;
    if there("conv_up1.weight") {
        let step = |i: &usize| there(&format!("conv_up{i}.weight"));
        let doublings = (1..10).take_while(step).count();
        let tail = Tail::Nearest {
            features,
            doublings,
        };
        return Ok((tail, output));
    }
    let mut factors = Vec::new();
    while there(&format!("upsample.{}.weight", 2 * factors.len())) && factors.len() < 10 {
        let name = format!("upsample.{}.weight", 2 * factors.len());
        let (pixels, from) = channels(shapes, &name)?;
        let factor = (pixels / from).isqrt();
        if factor * factor * features != pixels || from != features || factor > 16 {
            return Err(format!(
                "tensor `{name}` makes {pixels} channels out of {from}, expected {features} times a square out of {features}"
            ));
        }
        factors.push(factor);
    }
    Ok((Tail::Shuffle { features, factors }, output))
}
