//! Why a checkpoint cannot make pictures from text yet: one sentence for each kind, and the only place where they stand.

use super::family::{Detection, Family, Variant};

impl Detection {
    /// The end of the sentence "FILE: …" that says what this is instead of a text-to-image checkpoint of a supported family, how that
    /// was seen, and what to do; `None` when `generate` can use it.
    pub fn refusal(&self) -> Option<String> {
        if let Some(obstacle) = &self.obstacle {
            return Some(match self.family {
                Family::Unknown => obstacle.clone(),
                _ => format!("this is {}, but {obstacle}", self.title()),
            });
        }
        match self.family {
            family if !family.components().is_empty() => self.refuse_stable_diffusion(),
            family => {
                let seen = self.evidence.first().map_or("", String::as_str);
                Some(format!(
                    "this is {} ({seen}), {}",
                    self.title(),
                    advice(family)
                ))
            }
        }
    }

    /// What this is, with its article: "an SDXL base checkpoint", "a Stable Diffusion 1 inpainting checkpoint", "a LoRA (LoKr)".
    pub fn title(&self) -> String {
        let needed = self.family.components().len();
        let alone = needed > 0 && self.missing.len() + 1 == needed;
        let networks = [("unet", "UNet"), ("transformer", "transformer")];
        let network = networks.iter().find(|(name, _)| {
            self.family.components().contains(name) && !self.missing.contains(name)
        });
        let mut title = if let (true, Some((_, network))) = (alone, network) {
            let phrase = self.family.phrase();
            let whole = phrase.strip_suffix(" checkpoint").unwrap_or(phrase);
            format!("the {network} alone of {whole}")
        } else {
            self.family.phrase().to_owned()
        };
        let word = match self.variant {
            Variant::Inpainting => Some("for inpainting"),
            Variant::Pix2Pix => Some("for editing by instruction (pix2pix)"),
            Variant::Zero123 => Some("for turning objects (Zero123)"),
            Variant::Depth => Some("with a depth map"),
            Variant::Control => Some("for control by another picture"),
            Variant::Text2Image | Variant::Other(_) | Variant::None => None,
        };
        if let Some(word) = word {
            title = format!("{title} {word}");
        }
        if let Some(kind) = self.kind {
            title = format!("{title} ({kind})");
        }
        title
    }

    /// The flags that give what is missing, where they can.
    fn parts_hint(&self) -> &'static str {
        let text = self.missing.iter().any(|name| name.starts_with("text"));
        let vae = self.missing.contains(&"vae");
        let network = self
            .missing
            .iter()
            .any(|name| ["unet", "transformer"].contains(name));
        match (network, text, vae) {
            (true, ..) | (_, false, false) => "",
            (_, true, true) => ", or the rest with --text-encoder and --vae",
            (_, true, false) => ", or the rest with --text-encoder",
            (_, false, true) => ", or the rest with --vae",
        }
    }

    fn refuse_stable_diffusion(&self) -> Option<String> {
        let title = self.title();
        match self.variant {
            Variant::Text2Image
            | Variant::None
            | Variant::Inpainting
            | Variant::Pix2Pix
            | Variant::Control => {}
            Variant::Zero123 => {
                return Some(format!(
                    "this is {title}, which reads a pose in the text's place and is not supported yet"
                ));
            }
            Variant::Depth => {
                return Some(format!(
                    "this is {title}, which needs a picture's depth, which this version does not take yet"
                ));
            }
            Variant::Other(_) if self.family == Family::X4Upscaler => {}
            Variant::Other(channels) => {
                return Some(format!(
                    "this is {title} whose network takes {channels} channels, and no kind of such a model is known"
                ));
            }
        }
        let (_, others) = self.missing.split_last()?;
        let list = and(&self.missing);
        Some(format!(
            "this is {title}: its {list} {} missing, and a picture needs all of {}; give a whole checkpoint{}",
            if others.is_empty() { "is" } else { "are" },
            and(self.family.components()),
            self.parts_hint()
        ))
    }
}

/// "a, b and c".
fn and(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [others @ .., last] => format!("{} and {last}", others.join(", ")),
    }
}

/// What to do with a file of another family.
fn advice(family: Family) -> &'static str {
    match family {
        Family::Lora => {
            "not a base model; give a base model with --model, and the LoRA with --lora"
        }
        Family::Vae => "not a base model; give a base model with --model, and the VAE with --vae",
        Family::ControlNet | Family::T2iAdapter => {
            "not a base model; give a base model with --model, and this with --controlnet"
        }
        Family::Embedding => {
            "not a base model; give a base model with --model, and this with --embedding"
        }
        Family::Upscaler => {
            "not a base model; it makes finished pictures larger: `sd-rs upscale IMAGE --model` takes it"
        }
        Family::Taesd => {
            "not a base model; give a base model with --model, and this in its VAE's place with --vae"
        }
        Family::Hypernetwork => {
            "not a base model, and hypernetworks are not supported; give a base model with --model, and a LoRA that was trained for the same with --lora"
        }
        Family::IpAdapter => {
            "not a base model; give a base model with --model, and this with --ip-adapter"
        }
        Family::MotionModule => {
            "not a base model, and not supported yet; give a base model with --model"
        }
        Family::TextEncoder | Family::T5 => {
            "only a part of a model; give a checkpoint with --model, and this with --text-encoder if that lacks it"
        }
        Family::Unknown => "so it cannot be used; give a Stable Diffusion or FLUX.1 checkpoint",
        Family::Sd1
        | Family::Sd2
        | Family::Sdxl
        | Family::SdxlRefiner
        | Family::Ssd1b
        | Family::Vega
        | Family::Koala
        | Family::Sd3
        | Family::Sd35
        | Family::Flux1
        | Family::Flux2
        | Family::Chroma
        | Family::Svd
        | Family::X4Upscaler
        | Family::UnClip => {
            "which is not supported yet; give a Stable Diffusion 1, 2, XL or 3 or a FLUX.1 checkpoint"
        }
    }
}
