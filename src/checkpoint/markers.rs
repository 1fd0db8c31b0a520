//! Kinds of files that one or two names give away: the tables behind [`super::detect`].
//!
//! Names as read in the sources of ComfyUI, A1111, diffusers, sd-scripts and LyCORIS.

use super::family::Family;
use super::structure::NETWORK_PREFIXES;
use super::tensor_set::TensorSet;

/// A name that gives a kind away.
#[derive(Debug, Clone, Copy)]
enum Key {
    /// This very name.
    Is(&'static str),
    /// A name that begins so.
    Starts(&'static str),
    /// A name that holds this anywhere.
    Holds(&'static str),
    /// A name that begins so below one of the prefixes of a denoising network.
    Network(&'static str),
}

use Key::{Holds, Is, Network, Starts};

/// All of `keys` there: the file is of this family, and of this kind within it.
struct Marker {
    family: Family,
    kind: Option<&'static str>,
    keys: &'static [Key],
}

const fn row(family: Family, keys: &'static [Key]) -> Marker {
    Marker {
        family,
        kind: None,
        keys,
    }
}

const fn kind(family: Family, kind: &'static str, keys: &'static [Key]) -> Marker {
    Marker {
        family,
        kind: Some(kind),
        keys,
    }
}

/// What was found, and the name that showed it.
pub(super) struct Found {
    pub(super) family: Family,
    pub(super) kind: Option<&'static str>,
    pub(super) key: String,
}

/// Adapters, and base models that are no plain UNet with a text tower; the first row that fits decides. Adapters come first: their names
/// hold the names of what they adapt.
const WHOLE: &[Marker] = &[
    kind(
        Family::ControlNet,
        "a Control-LoRA",
        &[Is("lora_controlnet")],
    ),
    kind(
        Family::ControlNet,
        "a ControlNet-LLLite",
        &[Starts("lllite_unet_")],
    ),
    row(Family::ControlNet, &[Starts("control_model.")]),
    row(Family::ControlNet, &[Holds("input_hint_block.")]),
    row(Family::ControlNet, &[Starts("controlnet_cond_embedding.")]),
    row(Family::ControlNet, &[Holds("controlnet_blocks.")]),
    row(Family::ControlNet, &[Starts("controlnet_x_embedder.")]),
    row(Family::IpAdapter, &[Starts("ip_adapter.")]),
    row(
        Family::IpAdapter,
        &[Starts("image_proj."), Holds("to_k_ip")],
    ),
    row(Family::Lora, &[Holds(".lora_down.weight")]),
    row(Family::Lora, &[Holds(".lora_up.weight")]),
    row(Family::Lora, &[Holds(".lora_A.")]),
    row(Family::Lora, &[Holds("_lora.down.weight")]),
    row(Family::Lora, &[Holds("_lora1.down.weight")]),
    row(Family::Lora, &[Holds("_lora2.down.weight")]),
    row(Family::Lora, &[Holds(".lora.down.weight")]),
    row(Family::Lora, &[Holds(".lora_linear_layer.")]),
    kind(Family::Lora, "LoHa", &[Holds(".hada_w1_a")]),
    kind(Family::Lora, "LoKr", &[Holds(".lokr_w1")]),
    kind(Family::Lora, "LoKr", &[Holds(".lokr_w2")]),
    kind(Family::Lora, "OFT", &[Holds(".oft_blocks")]),
    kind(Family::Lora, "OFT", &[Holds(".oft_diag")]),
    kind(
        Family::Lora,
        "GLoRA",
        &[Starts("lora_unet_"), Holds(".a1.weight")],
    ),
    kind(Family::Lora, "full differences", &[Starts("lora_unet_")]),
    kind(Family::Lora, "text encoder only", &[Starts("lora_te")]),
    row(Family::Svd, &[Holds(".time_stack.")]),
    row(Family::Svd, &[Holds(".temporal_res_block.")]),
    row(Family::MotionModule, &[Holds("motion_modules.")]),
    row(Family::UnClip, &[Starts("embedder.model.")]),
    row(Family::UnClip, &[Starts("noise_augmentor.")]),
    row(
        Family::Flux2,
        &[Network("single_stream_modulation.lin.weight")],
    ),
    row(Family::Chroma, &[Network("distilled_guidance_layer.")]),
    kind(
        Family::Flux1,
        "dev",
        &[
            Network("guidance_in.in_layer."),
            Network("double_blocks.0.img_attn."),
        ],
    ),
    kind(
        Family::Flux1,
        "schnell",
        &[Network("double_blocks.0.img_attn.")],
    ),
    kind(
        Family::Flux1,
        "diffusers names",
        &[
            Network("single_transformer_blocks.0."),
            Network("context_embedder."),
        ],
    ),
    kind(
        Family::Sd35,
        "large",
        &[Network("joint_blocks.37."), Holds(".attn.ln_q.weight")],
    ),
    kind(
        Family::Sd35,
        "medium",
        &[Network("joint_blocks.0.x_block.attn2.")],
    ),
    row(
        Family::Sd35,
        &[Network("joint_blocks.0.x_block.attn.ln_q.weight")],
    ),
    row(Family::Sd3, &[Network("joint_blocks.0.")]),
    kind(
        Family::Sd35,
        "diffusers names",
        &[
            Network("transformer_blocks.0.attn.norm_added_q."),
            Network("pos_embed.proj."),
        ],
    ),
    kind(
        Family::Sd3,
        "diffusers names",
        &[
            Network("transformer_blocks.0.attn.add_q_proj."),
            Network("pos_embed.proj."),
        ],
    ),
];

/// Parts of models; only asked when the file holds no UNet.
const PARTS: &[Marker] = &[
    row(Family::Taesd, &[Starts("taesd_")]),
    row(Family::Taesd, &[Starts("decoder.layers.3.conv.")]),
    row(Family::Taesd, &[Starts("encoder.layers.1.conv.")]),
    row(Family::Taesd, &[Starts("decoder.3.conv.")]),
    kind(
        Family::Taesd,
        "decoder",
        &[Starts("3.conv."), Is("1.weight")],
    ),
    kind(
        Family::Taesd,
        "encoder",
        &[Starts("1.conv."), Is("0.weight")],
    ),
    row(
        Family::Vae,
        &[Is("first_stage_model.decoder.conv_in.weight")],
    ),
    row(Family::Vae, &[Is("decoder.conv_in.weight")]),
    row(Family::Vae, &[Is("vae.decoder.conv_in.weight")]),
    row(Family::T2iAdapter, &[Starts("adapter.body.0.")]),
    row(Family::T2iAdapter, &[Starts("body."), Holds(".block1.")]),
    kind(Family::Upscaler, "ESRGAN", &[Starts("model.1.sub.0.")]),
    kind(
        Family::Upscaler,
        "Real-ESRGAN",
        &[Starts("body.0.rdb1."), Is("conv_first.weight")],
    ),
    kind(
        Family::Upscaler,
        "compact",
        &[Is("body.0.weight"), Is("body.1.weight")],
    ),
    kind(
        Family::Upscaler,
        "HAT",
        &[Holds("layers.0.residual_group.overlap_attn.")],
    ),
    kind(
        Family::Upscaler,
        "Swin2SR",
        &[Holds("layers.0.residual_group.blocks.0.attn.logit_scale")],
    ),
    kind(
        Family::Upscaler,
        "SwinIR",
        &[Holds("layers.0.residual_group.blocks.0.norm1.")],
    ),
    row(Family::Upscaler, &[Is("conv_first.weight")]),
    row(Family::Upscaler, &[Is("model.0.weight")]),
    row(Family::T5, &[Holds("block.0.layer.0.SelfAttention.")]),
    row(Family::T5, &[Holds("enc.blk.0.attn_q.")]),
    kind(
        Family::TextEncoder,
        "with CLIP's picture tower",
        &[Holds("vision_model.encoder.layers.0.")],
    ),
    row(
        Family::TextEncoder,
        &[Holds("embeddings.token_embedding.weight")],
    ),
    row(Family::TextEncoder, &[Holds("transformer.resblocks.0.")]),
    row(Family::Embedding, &[Is("emb_params")]),
    row(Family::Embedding, &[Starts("string_to_param")]),
    row(Family::Embedding, &[Is("clip_l")]),
    row(Family::Embedding, &[Is("clip_g")]),
    row(Family::Embedding, &[Is("clip_h")]),
];

/// The adapter or whole model that `tensors` are, if names alone show it.
pub(super) fn find_whole(tensors: &TensorSet) -> Option<Found> {
    find(WHOLE, tensors)
}

/// The part of a model that `tensors` are.
pub(super) fn find_part(tensors: &TensorSet) -> Option<Found> {
    find(PARTS, tensors)
        .or_else(|| find_hypernetwork(tensors))
        .or_else(|| find_lone_embedding(tensors))
}

fn find(table: &[Marker], tensors: &TensorSet) -> Option<Found> {
    table.iter().find_map(|marker| {
        let mut keys = marker.keys.iter().map(|key| key.find(tensors));
        let first = keys.next()??;
        keys.all(|key| key.is_some()).then(|| Found {
            family: marker.family,
            kind: marker.kind,
            key: first.to_owned(),
        })
    })
}

impl Key {
    /// The first name that fits.
    fn find(self, tensors: &TensorSet) -> Option<&str> {
        match self {
            Is(name) => tensors.info(name).map(|info| info.name.as_str()),
            Starts(prefix) => tensors.names_below(prefix).next(),
            Holds(part) => tensors.names().find(|name| name.contains(part)),
            Network(start) => NETWORK_PREFIXES.iter().find_map(|prefix| {
                let wanted = format!("{prefix}{start}");
                tensors
                    .names_from(&wanted)
                    .filter(|name| name.starts_with(&wanted))
            }),
        }
    }
}

/// Hypernetworks: two small networks for each width, `768.0.linear.0.weight`.
fn find_hypernetwork(tensors: &TensorSet) -> Option<Found> {
    let is_one = |name: &str| {
        let mut parts = name.split('.');
        let width = parts
            .next()
            .is_some_and(|part| part.len() >= 2 && part.parse::<u32>().is_ok());
        width && matches!(parts.next(), Some("0" | "1")) && parts.next() == Some("linear")
    };
    let name = tensors.names().find(|name| is_one(name))?;
    Some(Found {
        family: Family::Hypernetwork,
        kind: None,
        key: name.to_owned(),
    })
}

/// Textual inversions as diffusers saves them: tensors of a vector or a few, of one width, named after their tokens.
fn find_lone_embedding(tensors: &TensorSet) -> Option<Found> {
    /// More vectors than a prompt has room for, more words than a file has, and the least width of a text tower.
    const MOST: usize = 77;
    const MOST_WORDS: usize = 256;
    const LEAST: usize = 8;
    let name = tensors.names().next()?;
    let width = *tensors.shape(name)?.last()?;
    let is_word = |name: &str| {
        let vectors = match tensors.shape(name) {
            Some(&[own]) if own == width => 1,
            Some(&[vectors, own]) if own == width => vectors,
            _ => return false,
        };
        vectors <= MOST && !name.ends_with(".weight") && !name.ends_with(".bias")
    };
    let fits = width >= LEAST && tensors.len() <= MOST_WORDS && tensors.names().all(is_word);
    fits.then(|| Found {
        family: Family::Embedding,
        kind: None,
        key: name.to_owned(),
    })
}
