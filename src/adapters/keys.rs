//! What the tensors of adapter files are called: which part of which form a name's end means, and which network its beginning.
//!
//! Spellings as in kohya's sd-scripts, LyCORIS, PEFT, diffusers (new and old) and ComfyUI. kohya's names have `_` for every `.`, which
//! cannot be undone, so that all names are compared in that form.

/// What a tensor is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are those of the files")]
pub(super) enum Role {
    Up,
    UpBias,
    Down,
    Mid,
    Alpha,
    Magnitude,
    Diff,
    DiffBias,
    HadaW1A,
    HadaW1B,
    HadaW2A,
    HadaW2B,
    HadaT1,
    HadaT2,
    LokrW1,
    LokrW1A,
    LokrW1B,
    LokrW2,
    LokrW2A,
    LokrW2B,
    LokrT2,
    GloraA1,
    GloraA2,
    GloraB1,
    GloraB2,
    GloraBm,
    OftBlocks,
    OftDiagonal,
    Rescale,
    Ia3Weight,
    Ia3OnInput,
}

/// The ends of names. `.weight` alone, IA3's, is taken only where `.on_input` stands beside it.
const ENDS: &[(&str, Role)] = &[
    (".lora_up.weight", Role::Up),
    (".lora_down.weight", Role::Down),
    (".lora_mid.weight", Role::Mid),
    ("_lora.up.weight", Role::Up),
    ("_lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_up.bias", Role::UpBias),
    (".alpha", Role::Alpha),
    (".dora_scale", Role::Magnitude),
    (".diff", Role::Diff),
    (".diff_b", Role::DiffBias),
    (".w_norm", Role::Diff),
    (".b_norm", Role::DiffBias),
    (".hada_w1_a", Role::HadaW1A),
    (".hada_w1_b", Role::HadaW1B),
    (".hada_w2_a", Role::HadaW2A),
    (".hada_w2_b", Role::HadaW2B),
    (".hada_t1", Role::HadaT1),
    (".hada_t2", Role::HadaT2),
    (".lokr_w1", Role::LokrW1),
    (".lokr_w1_a", Role::LokrW1A),
    (".lokr_w1_b", Role::LokrW1B),
    (".lokr_w2", Role::LokrW2),
    (".lokr_w2_a", Role::LokrW2A),
    (".lokr_w2_b", Role::LokrW2B),
    (".lokr_t2", Role::LokrT2),
    (".a1.weight", Role::GloraA1),
    (".a2.weight", Role::GloraA2),
    (".b1.weight", Role::GloraB1),
    (".b2.weight", Role::GloraB2),
    (".bm.weight", Role::GloraBm),
    (".oft_blocks", Role::OftBlocks),
    (".oft_diag", Role::OftDiagonal),
    (".rescale", Role::Rescale),
    (".on_input", Role::Ia3OnInput),
    (".weight", Role::Ia3Weight),
];

/// PEFT's marks, behind which an adapter's name, `weight` or both may stand.
const MARKS: [(&str, Role); 3] = [
    (".lora_A", Role::Down),
    (".lora_B", Role::Up),
    (".lora_magnitude_vector", Role::Magnitude),
];

/// The ends of names of XLabs' processors for FLUX, behind `_lora1` for the picture and `_lora2` for the text.
const XLABS: [(&str, Role); 2] = [(".down.weight", Role::Down), (".up.weight", Role::Up)];

/// The module that a tensor is of, and its role there.
pub(super) fn split(name: &str) -> Option<(&str, Role)> {
    for (mark, role) in MARKS {
        let Some(at) = name.rfind(mark) else { continue };
        let (module, rest) = (name.get(..at)?, name.get(at + mark.len()..)?);
        let parts: Vec<&str> = rest.split('.').collect();
        return match parts.as_slice() {
            [""] | ["", _] | ["", _, "weight"] if !rest.ends_with("bias") => Some((module, role)),
            ["", "bias"] | ["", _, "bias"] if role == Role::Up => Some((module, Role::UpBias)),
            _ => None,
        };
    }
    for (end, role) in XLABS {
        if let Some(module) = name.strip_suffix(end)
            && (module.ends_with("_lora1") || module.ends_with("_lora2"))
        {
            return Some((module, role));
        }
    }
    // PEFT writes its adapter's name behind LyCORIS' marks as well
    let name = name.strip_suffix(".default").unwrap_or(name);
    ENDS.iter()
        .find_map(|(end, role)| Some((name.strip_suffix(end)?, *role)))
}

/// A network of a model, as adapters address it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// The denoising network: a UNet or a transformer.
    Denoiser,
    /// The text tower of this name in a folder: `text_encoder`, `text_encoder_2`, `text_encoder_3`.
    Text(&'static str),
}

impl Owner {
    /// The network in words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Denoiser => "denoising network",
            Self::Text(name) => name,
        }
    }
}

const TEXT: Owner = Owner::Text("text_encoder");
pub(super) const TEXT_2: Owner = Owner::Text("text_encoder_2");
/// T5, which FLUX has as its second.
pub(super) const TEXT_3: Owner = Owner::Text("text_encoder_3");

/// Beginnings that say nothing of the network.
const WRAPPERS: [&str; 2] = ["base_model_model_", "lycoris_"];

/// Beginnings and whose they are, in kohya's spelling.
const BEGINNINGS: &[(&str, Owner)] = &[
    ("lora_unet_", Owner::Denoiser),
    ("lora_transformer_", Owner::Denoiser),
    ("oft_unet_", Owner::Denoiser),
    ("lora_te1_", TEXT),
    ("lora_te2_", TEXT_2),
    ("lora_te3_", TEXT_3),
    ("lora_te_", TEXT),
    ("model_diffusion_model_", Owner::Denoiser),
    ("diffusion_model_", Owner::Denoiser),
    ("unet_", Owner::Denoiser),
    ("transformer_", Owner::Denoiser),
    ("text_encoders_clip_l_", TEXT),
    ("text_encoders_clip_g_", TEXT_2),
    ("text_encoders_clip_h_", TEXT),
    ("text_encoders_t5xxl_", TEXT_3),
    ("clip_l_", TEXT),
    ("clip_g_", TEXT_2),
    ("t5xxl_", TEXT_3),
    ("text_encoder_2_", TEXT_2),
    ("text_encoder_3_", TEXT_3),
    ("text_encoder_", TEXT),
    ("cond_stage_model_", TEXT),
    ("conditioner_embedders_0_", TEXT),
    ("conditioner_embedders_1_", TEXT_2),
];

/// A module's name with `_` for every `.`, without what old diffusers puts between an attention and its projections.
pub(super) fn flat(module: &str) -> String {
    module.replace('.', "_").replace("_processor_", "_")
}

/// The networks that a flat name may be of, best first, and its name there; no network where any could be meant.
pub(super) fn owners(flat: &str) -> Vec<(Option<Owner>, &str)> {
    let mut rest = flat;
    while let Some(inner) = WRAPPERS.iter().find_map(|w| rest.strip_prefix(w)) {
        rest = inner;
    }
    let named = BEGINNINGS
        .iter()
        .find_map(|(start, owner)| Some((Some(*owner), rest.strip_prefix(start)?)));
    named.into_iter().chain([(None, rest)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_is_split() {
        for (name, module, role) in [
            ("lora_unet_a_b.lora_up.weight", "lora_unet_a_b", Role::Up),
            ("unet.a.to_q.lora_A.weight", "unet.a.to_q", Role::Down),
            ("unet.a.to_q.lora_B.default.weight", "unet.a.to_q", Role::Up),
            ("unet.a.to_q.lora_B.bias", "unet.a.to_q", Role::UpBias),
            ("a.to_q.lora_magnitude_vector", "a.to_q", Role::Magnitude),
            (
                "a.to_q.lora_magnitude_vector.default.weight",
                "a.to_q",
                Role::Magnitude,
            ),
            (
                "a.processor.to_out_lora.down.weight",
                "a.processor.to_out",
                Role::Down,
            ),
            ("t.q_proj.lora_linear_layer.up.weight", "t.q_proj", Role::Up),
            ("t.q_proj.lora.up.weight", "t.q_proj", Role::Up),
            ("lycoris_x.lokr_w2_b", "lycoris_x", Role::LokrW2B),
            ("x.hada_w1_a.default", "x", Role::HadaW1A),
            ("x.b1.weight", "x", Role::GloraB1),
            ("x.b_norm", "x", Role::DiffBias),
            (
                "d.0.processor.qkv_lora2.up.weight",
                "d.0.processor.qkv_lora2",
                Role::Up,
            ),
            (
                "s.0.processor.qkv_lora.up.weight",
                "s.0.processor.qkv",
                Role::Up,
            ),
        ] {
            assert_eq!(split(name), Some((module, role)), "{name}");
        }
        assert_eq!(split("emb_params"), None);
        assert_eq!(split("x.lora_A.a.b.weight"), None);
    }

    #[test]
    fn beginnings_name_networks() {
        let first = |name: &str| {
            let flat = flat(name);
            let (owner, rest) = owners(&flat).swap_remove(0);
            (owner, rest.to_owned())
        };
        for (name, owner, rest) in [
            ("lora_te2_text_model_x", TEXT_2, "text_model_x"),
            ("text_encoder_2.text_model.x", TEXT_2, "text_model_x"),
            (
                "unet.a.attn1.processor.to_q",
                Owner::Denoiser,
                "a_attn1_to_q",
            ),
            ("base_model.model.unet.a", Owner::Denoiser, "a"),
            ("lycoris_unet_a", Owner::Denoiser, "a"),
            ("model.diffusion_model.a", Owner::Denoiser, "a"),
        ] {
            assert_eq!(first(name), (Some(owner), rest.to_owned()), "{name}");
        }
        assert_eq!(first("down_blocks.0"), (None, "down_blocks_0".to_owned()));
    }
}
