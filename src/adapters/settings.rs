//! PEFT's settings beside the tensors: `lora_adapter_metadata` in diffusers' files and `adapter_config.json` in PEFT's folders hold the alphas
//! that kohya's files keep as tensors.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

/// The longest `adapter_config.json` that is read, in bytes.
const MAX_SIZE: u64 = 1 << 20;

/// What the file or folder says of alphas.
#[derive(Debug, Default)]
pub(super) struct Settings {
    peft: Map<String, Value>,
    /// `….alpha` that pickles hold as plain numbers.
    alphas: BTreeMap<String, f32>,
}

impl Settings {
    /// From the header's texts, else from the file beside `path`.
    pub(super) fn read(metadata: &BTreeMap<String, String>, path: &Path) -> Self {
        let text = metadata.get("lora_adapter_metadata").cloned();
        let text = text.or_else(|| {
            let beside = path.parent()?.join("adapter_config.json");
            let is_peft = path.file_stem()?.to_str()? == "adapter_model";
            let small = std::fs::metadata(&beside).ok()?.len() <= MAX_SIZE;
            std::fs::read_to_string(beside)
                .ok()
                .filter(|_| is_peft && small)
        });
        let value = text.and_then(|text| serde_json::from_str(&text).ok());
        let plain = metadata.iter().filter(|(key, _)| key.ends_with(".alpha"));
        Self {
            peft: match value {
                Some(Value::Object(fields)) => fields,
                _ => Map::new(),
            },
            alphas: plain
                .filter_map(|(key, value)| Some((key.clone(), value.parse().ok()?)))
                .collect(),
        }
    }

    /// The alpha of a module that is no tensor.
    pub(super) fn alpha(&self, module: &str) -> Option<f32> {
        let alpha = self.alphas.get(&format!("{module}.alpha")).copied();
        alpha.filter(|alpha| alpha.is_finite())
    }

    /// alpha / rank of a module without an alpha of its own; alpha / √rank where rank-stabilised. 1 where nothing is said.
    pub(super) fn scale(&self, module: &str, rank: usize) -> f32 {
        // diffusers puts the component's name in front of each key
        let component = ["unet", "transformer", "text_encoder_2", "text_encoder"];
        let mut owner = component.into_iter();
        let owner = owner.find(|owner| module.starts_with(&format!("{owner}.")));
        let get = |key: &str| {
            let qualified = owner.and_then(|owner| self.peft.get(&format!("{owner}.{key}")));
            qualified.or_else(|| self.peft.get(key))
        };
        let pattern = get("alpha_pattern").and_then(Value::as_object);
        let mut patterns = pattern.into_iter().flatten();
        let own = patterns.find(|(key, _)| ends_with(module, key));
        let alpha = own
            .map(|(_, alpha)| alpha)
            .or_else(|| get("lora_alpha"))
            .or_else(|| get("alpha"))
            .and_then(Value::as_f64);
        let stabilised = get("use_rslora").and_then(Value::as_bool) == Some(true);
        let rank = rank.max(1) as f64;
        match alpha.filter(|alpha| alpha.is_finite() && *alpha != 0.0) {
            Some(alpha) if stabilised => (alpha / rank.sqrt()) as f32,
            Some(alpha) => (alpha / rank) as f32,
            None => 1.0,
        }
    }
}

/// Whether `end` is the last parts of a dotted name.
fn ends_with(name: &str, end: &str) -> bool {
    name.strip_suffix(end.trim_start_matches('^').trim_end_matches('$'))
        .is_some_and(|start| start.is_empty() || start.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphas_of_settings() {
        let with = |text: &str| {
            let metadata = [("lora_adapter_metadata".to_owned(), text.to_owned())];
            Settings::read(&metadata.into(), Path::new("x/y.safetensors"))
        };
        let text = r#"{"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}, "text_encoder.lora_alpha": 3,
            "text_encoder.use_rslora": true}"#;
        let settings = with(text);
        assert_eq!(settings.scale("unet.a.attn2.to_q", 4), 2.0);
        assert_eq!(settings.scale("unet.a.attn1.to_q", 4), 0.5);
        assert_eq!(settings.scale("text_encoder.a", 9), 1.0);
        assert_eq!(with("[]").scale("unet.a", 4), 1.0);
        assert_eq!(with("{\"lora_alpha\": 2}").scale("a", 4), 0.5);
    }
}
