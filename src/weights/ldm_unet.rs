//! The UNet of single files (CompVis' latent-diffusion names): structure and names read from the tensors' shapes.
//!
//! `input_blocks.N`, `middle_block.N`, `output_blocks.N` are walked in order; what stands in a block tells what it is: `in_layers` a
//! residual block, `transformer_blocks` a transformer, `op` a downsampler, `conv` an upsampler.

use sd_kernels::Activation;
use sd_models::layers::TimeConfig;
use sd_models::unet::{Added, Config, Level, Mid};

use super::layout::{Inner, Layout, inner};

pub(crate) const RESNET: &[Inner] = &[
    inner("norm1", "in_layers.0"),
    inner("conv1", "in_layers.2"),
    inner("time_emb_proj", "emb_layers.1"),
    inner("norm2", "out_layers.0"),
    inner("conv2", "out_layers.3"),
    inner("conv_shortcut", "skip_connection"),
];
pub(crate) const DOWNSAMPLE: &[Inner] = &[inner("conv", "op")];
pub(crate) const TIME: &[Inner] = &[inner("linear_1", "0"), inner("linear_2", "2")];

/// Group norms of CompVis' code always have 32 groups.
const GROUPS: usize = 32;
/// Width of the sinusoids of a size in SDXL.
pub(super) const NUMBER_WIDTH: usize = 256;
/// More blocks than any network has.
pub(super) const MAX_BLOCKS: usize = 256;

/// The shapes of the file, by stored name.
pub(crate) type Shapes<'a> = dyn Fn(&str) -> Option<Vec<usize>> + 'a;

/// A level while it is being read.
struct Draft {
    channels: usize,
    /// Its first attentions look at the text.
    crossed: bool,
    down: Vec<usize>,
    up: Vec<usize>,
}

struct Reader<'a> {
    prefix: &'a str,
    shapes: &'a Shapes<'a>,
    levels: Vec<Draft>,
    /// Context width and whether the projections are linear, from the first transformer.
    transformer: Option<(usize, bool)>,
}

/// Structure and names of the UNet below `prefix` (such as `model.diffusion_model`).
///
/// # Errors
/// A sentence that says what is missing or cannot be.
pub(crate) fn read(prefix: &str, shapes: &Shapes<'_>) -> Result<(Config, Layout), String> {
    read_any(prefix, shapes, true)
}

/// The same of the half that a ControlNet has: no way up, nothing behind it.
///
/// # Errors
/// As [`read`].
pub(crate) fn read_half(prefix: &str, shapes: &Shapes<'_>) -> Result<(Config, Layout), String> {
    read_any(prefix, shapes, false)
}

fn read_any(prefix: &str, shapes: &Shapes<'_>, whole: bool) -> Result<(Config, Layout), String> {
    let mut reader = Reader {
        prefix,
        shapes,
        levels: Vec::new(),
        transformer: None,
    };
    let (first, in_channels, conv_in_kernel) = reader.conv("input_blocks.0.0.weight")?;
    let (out_channels, _, conv_out_kernel) = match whole {
        true => reader.conv("out.2.weight")?,
        false => (in_channels, first, conv_in_kernel),
    };
    reader.down()?;
    let mid = reader.middle();
    if whole {
        reader.up()?;
    }
    let (time_output, time_input) = match reader.shape("time_embed.0.weight").as_deref() {
        Some(&[output, input]) => (output, input),
        _ => return Err(reader.missing("time_embed.0.weight")),
    };
    let added = reader.added()?;
    let classes = match reader.shape("label_emb.weight").as_deref() {
        Some(&[classes, _]) => Some(classes),
        _ => None,
    };
    let (context, linear) = reader.transformer.unwrap_or((768, false));
    let levels = reader
        .levels
        .iter()
        .map(|draft| Level {
            channels: draft.channels,
            // the x4 upscaler has eight heads in spite of its linear projections
            heads: heads(draft.channels, linear && classes.is_none()),
            context,
            only_cross_attention: draft.crossed,
            down: draft.down.clone(),
            up: draft.up.clone(),
        })
        .collect::<Vec<_>>();
    let groups = groups(&levels.iter().map(|level| level.channels).chain([first]));
    let config = Config {
        in_channels,
        out_channels,
        levels,
        mid,
        mid_scale: 1.0,
        groups,
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
        classes,
        time_activation: None,
        scale_shift: false,
        downsample_padding: 1,
        center_input: false,
        conv_in_kernel,
        conv_out_kernel,
    };
    let layout = layout(prefix, &config);
    Ok((config, layout))
}

/// The names below `prefix` of a UNet of this structure: blocks are numbered in the order of the way down, and of the way up.
pub(crate) fn layout(prefix: &str, config: &Config) -> Layout {
    let mut layout = Layout::default();
    let mut rename = |canonical: &str, stored: &str, inner: &'static [Inner]| {
        let stored = format!("{prefix}.{stored}");
        layout.rename(canonical, stored.trim_start_matches('.'), inner);
    };
    rename("conv_in", "input_blocks.0.0", &[]);
    rename("time_embedding", "time_embed", TIME);
    rename("add_embedding", "label_emb.0", TIME);
    rename("class_embedding", "label_emb", &[]);
    rename("conv_norm_out", "out.0", &[]);
    rename("conv_out", "out.2", &[]);
    rename("mid_block.resnets.0", "middle_block.0", RESNET);
    rename("mid_block.attentions.0", "middle_block.1", &[]);
    rename("mid_block.resnets.1", "middle_block.2", RESNET);
    let mut part = |way: &str, (level, layer): (usize, usize), block: &str, depth: usize| {
        let canonical = |kind: &str| format!("{way}_blocks.{level}.{kind}.{layer}");
        rename(&canonical("resnets"), &format!("{block}.0"), RESNET);
        if depth > 0 {
            rename(&canonical("attentions"), &format!("{block}.1"), &[]);
        }
    };
    let count = config.levels.len();
    let (mut down, mut up) = (Vec::new(), Vec::new());
    let mut n = 1;
    for (i, level) in config.levels.iter().enumerate() {
        for (layer, &depth) in level.down.iter().enumerate() {
            part("down", (i, layer), &format!("input_blocks.{n}"), depth);
            n += 1;
        }
        if i + 1 < count {
            down.push((i, format!("input_blocks.{n}.0")));
            n += 1;
        }
    }
    n = 0;
    for (i, level) in config.levels.iter().rev().enumerate() {
        for (layer, &depth) in level.up.iter().enumerate() {
            let block = format!("output_blocks.{n}");
            part("up", (i, layer), &block, depth);
            n += 1;
            if layer + 1 == level.up.len() && i + 1 < count {
                up.push((i, format!("{block}.{}", 1 + usize::from(depth > 0))));
            }
        }
    }
    for (level, stored) in down {
        rename(
            &format!("down_blocks.{level}.downsamplers.0"),
            &stored,
            DOWNSAMPLE,
        );
    }
    for (level, stored) in up {
        rename(&format!("up_blocks.{level}.upsamplers.0"), &stored, &[]);
    }
    layout
}

/// Stable Diffusion 1 has eight heads at every level; Stable Diffusion 2 (linear projections) has heads 64 wide. Shapes do not tell:
/// where the rule does not divide the channels, the nearest count that does is taken.
pub(super) fn heads(channels: usize, linear: bool) -> usize {
    let wanted = if linear { (channels / 64).max(1) } else { 8 };
    (1..=wanted)
        .rev()
        .find(|&n| channels.is_multiple_of(n))
        .unwrap_or(1)
}

/// 32, or the largest power of two below it that divides all channel counts: shapes do not tell.
pub(super) fn groups(channels: &(impl Iterator<Item = usize> + Clone)) -> usize {
    let mut groups = GROUPS;
    while groups > 1 && channels.clone().any(|c| !c.is_multiple_of(groups)) {
        groups /= 2;
    }
    groups
}

impl Reader<'_> {
    fn name(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
            .trim_start_matches('.')
            .to_owned()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        (self.shapes)(&self.name(name))
    }

    fn has(&self, name: &str) -> bool {
        self.shape(name).is_some()
    }

    fn missing(&self, name: &str) -> String {
        format!(
            "tensor `{}` is missing or has an unexpected rank",
            self.name(name)
        )
    }

    /// Output channels, input channels and width of a convolution.
    fn conv(&self, name: &str) -> Result<(usize, usize, usize), String> {
        match self.shape(name).as_deref() {
            Some(&[o, i, _, k]) if o > 0 && i > 0 && k > 0 => Ok((o, i, k)),
            _ => Err(self.missing(name)),
        }
    }

    /// What is embedded beside the time in XL. Shapes do not tell how wide the sinusoids of a number are: 256 in every one of them.
    fn added(&self) -> Result<Option<Added>, String> {
        if !self.has("label_emb.0.0.weight") {
            return Ok(None);
        }
        let Some(&[_, input]) = self.shape("label_emb.0.0.weight").as_deref() else {
            return Err(self.missing("label_emb.0.0.weight"));
        };
        let number = NUMBER_WIDTH;
        Ok(Some(Added { input, number }))
    }

    /// Transformer blocks of the transformer at `stored`; notes its context width and kind.
    fn depth(&mut self, stored: &str) -> usize {
        let block = |i: usize| format!("{stored}.transformer_blocks.{i}.attn2.to_k.weight");
        let depth = (0..MAX_BLOCKS).take_while(|&i| self.has(&block(i))).count();
        if let (None, Some(&[_, context])) = (self.transformer, self.shape(&block(0)).as_deref()) {
            let linear = self
                .shape(&format!("{stored}.proj_in.weight"))
                .is_some_and(|s| s.len() == 2);
            self.transformer = Some((context, linear));
        }
        depth
    }

    /// Whether the first attention of a transformer looks at the text: its keys are then as wide as those of the second.
    fn is_crossed(&self, stored: &str, channels: usize) -> bool {
        let key = |i: usize| {
            let name = format!("{stored}.transformer_blocks.0.attn{i}.to_k.weight");
            self.shape(&name).and_then(|shape| shape.get(1).copied())
        };
        key(1).is_some_and(|width| width != channels && Some(width) == key(2))
    }

    fn down(&mut self) -> Result<(), String> {
        let mut fresh = true;
        for n in 1..MAX_BLOCKS {
            let block = format!("input_blocks.{n}");
            if self.has(&format!("{block}.0.op.weight")) {
                fresh = true;
                continue;
            }
            if !self.has(&format!("{block}.0.in_layers.2.weight")) {
                break;
            }
            let (channels, _, _) = self.conv(&format!("{block}.0.out_layers.3.weight"))?;
            if fresh {
                self.levels.push(Draft {
                    channels,
                    crossed: self.is_crossed(&format!("{block}.1"), channels),
                    down: Vec::new(),
                    up: Vec::new(),
                });
                fresh = false;
            }
            let depth = self.depth(&format!("{block}.1"));
            if let Some(draft) = self.levels.last_mut() {
                draft.down.push(depth);
            }
        }
        if self.levels.is_empty() {
            return Err(self.missing("input_blocks.1.0.in_layers.2.weight"));
        }
        Ok(())
    }

    fn middle(&mut self) -> Mid {
        if !self.has("middle_block.0.in_layers.2.weight") {
            return Mid::None;
        }
        let depth = self.depth("middle_block.1");
        if depth == 0 {
            return Mid::Resnet;
        }
        Mid::Attention { depth }
    }

    fn up(&mut self) -> Result<(), String> {
        let count = self.levels.len();
        let mut block_index = 0;
        for n in 0..MAX_BLOCKS {
            let block = format!("output_blocks.{n}");
            if !self.has(&format!("{block}.0.in_layers.2.weight")) {
                break;
            }
            if block_index >= count {
                return Err(format!(
                    "`{}` goes up more levels than the way down has",
                    self.name(&block)
                ));
            }
            let depth = self.depth(&format!("{block}.1"));
            self.levels[count - 1 - block_index].up.push(depth);
            let child = 1 + usize::from(depth > 0);
            if self.has(&format!("{block}.{child}.conv.weight")) {
                block_index += 1;
            }
        }
        match self.levels.iter().position(|level| level.up.is_empty()) {
            Some(level) => Err(format!(
                "`{}` has no blocks for level {level}",
                self.name("output_blocks")
            )),
            None => Ok(()),
        }
    }
}
