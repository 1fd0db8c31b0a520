//! The sizes of networks, read from the shapes of their tensors: what `inspect` shows and what families are told apart by.
//!
//! Both spellings of each network are read: CompVis' of single files (`input_blocks.1.0…`) and diffusers' (`down_blocks.0.resnets.0…`).

use super::tensor_set::TensorSet;

/// More blocks, levels or layers than any network has.
const MAX_PARTS: usize = 512;
/// Under which a UNet or transformer may lie in a single file.
pub(crate) const NETWORK_PREFIXES: [&str; 7] = [
    "model.diffusion_model.",
    "model.model.",
    "diffusion_model.",
    "net.",
    "unet.",
    "transformer.",
    "",
];
const VAE_PREFIXES: [&str; 3] = ["first_stage_model.", "vae.", ""];
/// Under which text towers may lie in a single file, the component that they are there.
const TEXT_PREFIXES: [(&str, &str); 10] = [
    ("cond_stage_model.transformer.", "text_encoder"),
    ("cond_stage_model.model.", "text_encoder"),
    ("cond_stage_model.", "text_encoder"),
    ("conditioner.embedders.0.model.", "text_encoder_2"),
    ("conditioner.embedders.0.", "text_encoder"),
    ("conditioner.embedders.1.", "text_encoder_2"),
    ("text_encoders.clip_l.", "text_encoder"),
    ("text_encoders.clip_g.", "text_encoder_2"),
    ("text_encoders.t5xxl.", "text_encoder_3"),
    ("text_encoder.", "text_encoder"),
];

/// Where a component lies in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The component, by its name in a diffusers folder.
    pub component: &'static str,
    /// What its tensors' names begin with, such as `first_stage_model.`; empty when the file holds nothing else.
    pub prefix: String,
}

/// The sizes of a checkpoint's networks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Structure {
    /// The denoising network, if it is a UNet.
    pub unet: Option<UnetStructure>,
    /// The (first) CLIP text tower.
    pub text: Option<TextStructure>,
    /// The autoencoder.
    pub vae: Option<VaeStructure>,
}

/// The sizes of a UNet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnetStructure {
    /// Channels that go in: 4 for text to image, 9 for inpainting.
    pub in_channels: usize,
    /// Channels that come out.
    pub out_channels: usize,
    /// Channels of each level, finest first.
    pub channels: Vec<usize>,
    /// Transformer blocks behind each residual block on the way down, level by level; 0 where there is no attention.
    pub depths: Vec<Vec<usize>>,
    /// Transformer blocks in the middle.
    pub mid_depth: usize,
    /// Width of the text that cross-attention looks at; none without cross-attention.
    pub context: Option<usize>,
    /// Whether the transformers' projections are linear (rank 2) instead of 1×1 convolutions.
    pub linear: Option<bool>,
    /// Width of the vector that is embedded beside the time (SDXL: 2816).
    pub class_width: Option<usize>,
}

/// The sizes of a CLIP text tower.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TextStructure {
    /// Width of its states.
    pub width: usize,
    /// Layers in the file.
    pub layers: usize,
    /// Tokens that it knows.
    pub vocabulary: usize,
    /// Tokens that it takes at once.
    pub positions: usize,
    /// Whether its names are OpenCLIP's (`resblocks`) instead of transformers'.
    pub open_clip: bool,
}

/// The sizes of an autoencoder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VaeStructure {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels of each level, finest first.
    pub channels: Vec<usize>,
}

/// Tensors below a prefix.
#[derive(Clone, Copy)]
pub(super) struct Below<'a> {
    pub(super) tensors: &'a TensorSet,
    pub(super) prefix: &'a str,
}

impl Below<'_> {
    pub(super) fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.shape(&self.full(name))
    }

    fn has(&self, name: &str) -> bool {
        self.shape(name).is_some()
    }

    /// Output and input channels of a convolution or linear layer.
    fn out_in(&self, name: &str) -> Option<(usize, usize)> {
        match self.shape(name)? {
            &[o, i] | &[o, i, _] | &[o, i, _, _] => Some((o, i)),
            _ => None,
        }
    }

    /// How many of `name(0)`, `name(1)` … are there without a gap.
    fn count(&self, name: impl Fn(usize) -> String) -> usize {
        (0..MAX_PARTS).take_while(|&i| self.has(&name(i))).count()
    }
}

/// Where the components of a single file lie, and their sizes.
pub(super) fn read_single(tensors: &TensorSet) -> (Vec<Place>, Structure) {
    let mut places = Vec::new();
    let mut structure = Structure::default();
    let below = |prefix| Below { tensors, prefix };
    for (prefix, component) in TEXT_PREFIXES {
        let nested = places
            .iter()
            .any(|place: &Place| place.prefix.starts_with(prefix));
        if nested || tensors.names_below(prefix).next().is_none() {
            continue;
        }
        places.push(place(component, prefix));
        structure.text = structure.text.or_else(|| read_text(below(prefix)));
    }
    for prefix in NETWORK_PREFIXES {
        if let Some(unet) = read_unet(below(prefix)) {
            structure.unet = Some(unet);
            places.push(place("unet", prefix));
            break;
        }
    }
    for prefix in VAE_PREFIXES {
        if let Some(vae) = read_vae(below(prefix)) {
            structure.vae = Some(vae);
            places.push(place("vae", prefix));
            break;
        }
    }
    if structure.text.is_none() && places.is_empty() {
        structure.text = read_text(below(""));
        if structure.text.is_some() {
            places.push(place("text_encoder", ""));
        }
    }
    (places, structure)
}

fn place(component: &'static str, prefix: &str) -> Place {
    Place {
        component,
        prefix: prefix.to_owned(),
    }
}

/// Numbers of a token that go into a transformer and that come out of it, in either spelling; a patch's where it cuts them itself.
pub(super) fn transformer_widths(names: Below<'_>) -> Option<(usize, usize)> {
    let output = ["final_layer.linear.weight", "proj_out.weight"];
    let (output, _) = output.iter().find_map(|name| names.out_in(name))?;
    let input = ["img_in.weight", "x_embedder.weight"];
    if let Some((_, input)) = input.iter().find_map(|name| names.out_in(name)) {
        return Some((input, output));
    }
    let input = ["x_embedder.proj.weight", "pos_embed.proj.weight"];
    let shape = input.iter().find_map(|name| names.shape(name))?;
    let &[_, channels, h, w] = shape else {
        return None;
    };
    let input = channels.checked_mul(h)?.checked_mul(w)?;
    Some((input, output))
}

/// A UNet in either spelling.
pub(super) fn read_unet(names: Below<'_>) -> Option<UnetStructure> {
    if let Some((_, in_channels)) = names.out_in("input_blocks.0.0.weight") {
        return Some(read_ldm_unet(names, in_channels));
    }
    let (_, in_channels) = names.out_in("conv_in.weight")?;
    names.shape("down_blocks.0.resnets.0.conv1.weight")?;
    Some(read_diffusers_unet(names, in_channels))
}

fn read_ldm_unet(names: Below<'_>, in_channels: usize) -> UnetStructure {
    let mut unet = UnetStructure {
        in_channels,
        out_channels: names.out_in("out.2.weight").map_or(4, |(o, _)| o),
        class_width: names.out_in("label_emb.0.0.weight").map(|(_, i)| i),
        ..UnetStructure::default()
    };
    let mut fresh = true;
    for n in 1..MAX_PARTS {
        if names.has(&format!("input_blocks.{n}.0.op.weight")) {
            fresh = true;
            continue;
        }
        let Some((channels, _)) = names.out_in(&format!("input_blocks.{n}.0.out_layers.3.weight"))
        else {
            break;
        };
        if fresh {
            unet.channels.push(channels);
            unet.depths.push(Vec::new());
            fresh = false;
        }
        let depth = transformer(names, &format!("input_blocks.{n}.1"), &mut unet);
        unet.depths.extend_last(depth);
    }
    unet.mid_depth = transformer(names, "middle_block.1", &mut unet);
    unet
}

fn read_diffusers_unet(names: Below<'_>, in_channels: usize) -> UnetStructure {
    let mut unet = UnetStructure {
        in_channels,
        out_channels: names.out_in("conv_out.weight").map_or(4, |(o, _)| o),
        class_width: names
            .out_in("add_embedding.linear_1.weight")
            .map(|(_, i)| i),
        ..UnetStructure::default()
    };
    for level in 0..MAX_PARTS {
        let resnet = |j| format!("down_blocks.{level}.resnets.{j}.conv1.weight");
        let Some((channels, _)) = names.out_in(&resnet(0)) else {
            break;
        };
        unet.channels.push(channels);
        let layers = names.count(resnet);
        let depths = (0..layers)
            .map(|j| {
                transformer(
                    names,
                    &format!("down_blocks.{level}.attentions.{j}"),
                    &mut unet,
                )
            })
            .collect();
        unet.depths.push(depths);
    }
    unet.mid_depth = transformer(names, "mid_block.attentions.0", &mut unet);
    unet
}

/// Blocks of the transformer at `at`; the first one tells the context's width and the kind of the projections.
fn transformer(names: Below<'_>, at: &str, unet: &mut UnetStructure) -> usize {
    let depth = names.count(|k| format!("{at}.transformer_blocks.{k}.norm1.weight"));
    let key = format!("{at}.transformer_blocks.0.attn2.to_k.weight");
    unet.context = unet.context.or(names.out_in(&key).map(|(_, i)| i));
    let rank = names.shape(&format!("{at}.proj_in.weight")).map(<[_]>::len);
    unet.linear = unet.linear.or(rank.map(|rank| rank == 2));
    depth
}

/// Adds to the last list of a list of lists.
trait ExtendLast {
    fn extend_last(&mut self, value: usize);
}

impl ExtendLast for Vec<Vec<usize>> {
    fn extend_last(&mut self, value: usize) {
        if let Some(last) = self.last_mut() {
            last.push(value);
        }
    }
}

/// A CLIP text tower in OpenCLIP's or transformers' spelling, with or without `text_model.`.
pub(super) fn read_text(names: Below<'_>) -> Option<TextStructure> {
    for root in ["", "model.", "transformer."] {
        if let Some((vocabulary, width)) = names.out_in(&format!("{root}token_embedding.weight")) {
            let layers = |i| format!("{root}transformer.resblocks.{i}.ln_1.weight");
            let positions = names.out_in(&format!("{root}positional_embedding"));
            return Some(TextStructure {
                width,
                layers: names.count(layers),
                vocabulary,
                positions: positions.map_or(0, |(n, _)| n),
                open_clip: true,
            });
        }
    }
    for root in ["", "text_model.", "transformer.", "transformer.text_model."] {
        let embedding = format!("{root}embeddings.token_embedding.weight");
        if let Some((vocabulary, width)) = names.out_in(&embedding) {
            let layers = |i| format!("{root}encoder.layers.{i}.layer_norm1.weight");
            let positions = names.out_in(&format!("{root}embeddings.position_embedding.weight"));
            return Some(TextStructure {
                width,
                layers: names.count(layers),
                vocabulary,
                positions: positions.map_or(0, |(n, _)| n),
                open_clip: false,
            });
        }
    }
    None
}

/// An autoencoder in either spelling; the decoder is enough.
pub(super) fn read_vae(names: Below<'_>) -> Option<VaeStructure> {
    let (_, latent_channels) = names.out_in("decoder.conv_in.weight")?;
    let block = |part: &str, i: usize| {
        let spellings = match part {
            "encoder" => [
                format!("encoder.down.{i}.block.0.conv1.weight"),
                format!("encoder.down_blocks.{i}.resnets.0.conv1.weight"),
            ],
            _ => [
                format!("decoder.up.{i}.block.0.conv1.weight"),
                format!("decoder.up_blocks.{i}.resnets.0.conv1.weight"),
            ],
        };
        spellings.iter().find_map(|name| names.out_in(name))
    };
    let levels = |part: &'static str| (0..MAX_PARTS).map_while(move |i| Some(block(part, i)?.0));
    let mut channels: Vec<usize> = levels("encoder").collect();
    if channels.is_empty() {
        channels = levels("decoder").collect();
        if names.has("decoder.up_blocks.0.resnets.0.conv1.weight") {
            channels.reverse(); // diffusers counts the decoder's blocks from the coarsest
        }
    }
    Some(VaeStructure {
        latent_channels,
        channels,
    })
}
