//! What an adapter says of itself: the family it was made for, its forms, ranks and alphas, its hash.

use std::collections::BTreeMap;

use super::file::Adapter;
use super::form::{Factor, Form};
use super::keys::{Owner, flat, owners};

/// A summary for people and for JSON.
#[derive(Debug, Clone, serde::Serialize)]
pub struct About {
    /// The family that it was made for, if that can be told, and why.
    pub base_model: Option<String>,
    /// Why.
    pub base_evidence: Option<String>,
    /// Modules by form: "LoRA", "LoHa" …
    pub forms: BTreeMap<String, usize>,
    /// Modules by rank.
    pub ranks: BTreeMap<usize, usize>,
    /// Modules by alpha; "none" where there is none.
    pub alphas: BTreeMap<String, usize>,
    /// Modules by network: `unet`, `text_encoder` …
    pub networks: BTreeMap<String, usize>,
    /// Whether weights are decomposed into directions and lengths.
    pub dora: bool,
    /// Tensors that are no part of a change.
    pub strange: Vec<String>,
}

impl Adapter {
    /// What it is.
    pub fn about(&self) -> About {
        let (base_model, base_evidence) = made_for(self).unzip();
        let mut about = About {
            base_model,
            base_evidence,
            forms: BTreeMap::new(),
            ranks: BTreeMap::new(),
            alphas: BTreeMap::new(),
            networks: BTreeMap::new(),
            dora: false,
            strange: self.strange.clone(),
        };
        for module in &self.modules {
            let form = module.form.as_ref().map_or("bias", Form::name);
            *about.forms.entry(form.to_owned()).or_default() += 1;
            if let Some(rank) = module.form.as_ref().and_then(Form::rank) {
                *about.ranks.entry(rank).or_default() += 1;
                let alpha = module.alpha.map_or("none".to_owned(), |a| a.to_string());
                *about.alphas.entry(alpha).or_default() += 1;
            }
            about.dora |= module.magnitude.is_some();
            let flat = flat(&module.name);
            let network = match owners(&flat).first() {
                Some((Some(Owner::Text(name)), _)) => name,
                Some((None, rest)) if is_text(rest) => "text_encoder",
                _ => "unet",
            };
            *about.networks.entry(network.to_owned()).or_default() += 1;
        }
        about
    }

    /// Another name that the file gives itself: kohya's `ss_output_name`.
    pub fn alias(&self) -> Option<&str> {
        self.metadata().get("ss_output_name").map(String::as_str)
    }
}

/// Whether a name without a network is a text tower's.
fn is_text(flat: &str) -> bool {
    flat.contains("encoder_layers_") || flat.contains("resblocks_")
}

/// Values of `ss_base_model_version` and `modelspec.architecture`, and the families; the first that fits decides.
const WORDS: &[(&str, &str)] = &[
    ("sdxl", "Stable Diffusion XL"),
    ("stable-diffusion-xl", "Stable Diffusion XL"),
    ("sd_v2", "Stable Diffusion 2"),
    ("stable-diffusion-v2", "Stable Diffusion 2"),
    ("sd_2", "Stable Diffusion 2"),
    ("sd_v1", "Stable Diffusion 1"),
    ("sd_1", "Stable Diffusion 1"),
    ("stable-diffusion-v1", "Stable Diffusion 1"),
    ("sd3", "Stable Diffusion 3"),
    ("stable-diffusion-3", "Stable Diffusion 3"),
    ("flux", "FLUX"),
];

/// Parts of flat names that only one family has.
const MARKS: &[(&str, &str)] = &[
    ("double_blocks_", "FLUX"),
    ("single_transformer_blocks_", "FLUX"),
    ("joint_blocks_", "Stable Diffusion 3"),
    ("lora_te2_", "Stable Diffusion XL"),
    ("text_encoder_2_", "Stable Diffusion XL"),
    ("lora_prior_", "Stable Cascade"),
];

/// The family that an adapter was made for and what shows it: what it says, else names, else the width of the text that it attends to.
pub(super) fn made_for(adapter: &Adapter) -> Option<(String, String)> {
    for key in ["ss_base_model_version", "modelspec.architecture"] {
        let value = adapter.metadata().get(key).map(|v| v.to_lowercase());
        let found = value.as_ref().and_then(|value| {
            let word = WORDS.iter().find(|(word, _)| value.starts_with(word));
            word.map(|(_, family)| (*family).to_owned())
        });
        if let (Some(family), Some(value)) = (found, value) {
            let value = crate::checkpoint::printable_to(&value, 60);
            return Some((family, format!("`{key}` is {value}")));
        }
    }
    let flat: Vec<(String, Option<usize>)> = adapter
        .modules
        .iter()
        .map(|module| (flat(&module.name), module.form.as_ref().and_then(inputs)))
        .collect();
    for (mark, family) in MARKS {
        if let Some((name, _)) = flat.iter().find(|(name, _)| name.contains(mark)) {
            return Some(((*family).to_owned(), format!("module `{name}`")));
        }
    }
    flat.iter().find_map(|(name, inputs)| {
        let inputs = (*inputs)?;
        let attends = name.ends_with("attn2_to_k") || name.ends_with("attn2_to_v");
        let family = match inputs {
            768 => "Stable Diffusion 1",
            1024 => "Stable Diffusion 2",
            2048 => "Stable Diffusion XL",
            _ => return None,
        };
        let evidence = format!("module `{name}` reads {inputs} channels");
        attends.then(|| (family.to_owned(), evidence))
    })
}

/// The inputs of a linear layer that a form changes, where its tensors tell.
fn inputs(form: &Form) -> Option<usize> {
    match form {
        Form::LowRank { down, .. } => Some(down.columns()),
        Form::Hadamard { first, .. } => Some(first.1.columns()),
        Form::Full(difference) => Some(difference.columns()),
        Form::Kronecker { first, second } => {
            let width = |factor: &Factor| match factor {
                Factor::Whole(whole) => whole.columns(),
                Factor::Product(_, b, _) => b.columns(),
            };
            width(first).checked_mul(width(second))
        }
        _ => None,
    }
}
