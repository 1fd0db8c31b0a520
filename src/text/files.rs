//! The files of the embedded tokenizer, as transformers reads them from a folder.

use serde_json::{Map, Value, json};

use super::vocabulary::{BOS, EOS, Vocabulary};
use crate::error::Result;
use crate::spec::Pad;

/// Positions that a prompt takes.
const LENGTH: usize = 77;

/// The files of a `tokenizer` folder with CLIP's vocabulary, by name; prompts are filled up with `pad`.
///
/// # Errors
/// When the embedded vocabulary is damaged.
pub fn tokenizer_files(pad: Pad) -> Result<Vec<(&'static str, String)>> {
    let vocabulary = Vocabulary::embedded()?;
    let mut ids: Vec<(&String, &u32)> = vocabulary.ids.iter().collect();
    ids.sort_by_key(|(_, id)| **id);
    let ids: Map<String, Value> = ids
        .into_iter()
        .map(|(word, id)| (word.clone(), json!(id)))
        .collect();
    let mut merges = "#version: 0.2\n".to_owned();
    for (a, b) in &vocabulary.merges {
        merges.extend([a.as_str(), " ", b.as_str(), "\n"]);
    }
    let token = |content: &str| json!({ "content": content, "lstrip": false, "normalized": true, "rstrip": false, "single_word": false });
    let pad = match pad {
        Pad::End => EOS,
        Pad::Zero => "!",
    };
    let names = json!({ "bos_token": token(BOS), "eos_token": token(EOS), "pad_token": pad, "unk_token": token(EOS) });
    let typed = |content: &str| {
        let mut token = token(content);
        token["__type"] = json!("AddedToken");
        token
    };
    let config = json!({
        "add_prefix_space": false,
        "bos_token": typed(BOS),
        "do_lower_case": true,
        "eos_token": typed(EOS),
        "errors": "replace",
        "model_max_length": LENGTH,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": typed(EOS),
    });
    Ok(vec![
        ("vocab.json", Value::Object(ids).to_string()),
        ("merges.txt", merges),
        ("special_tokens_map.json", format!("{names:#}\n")),
        ("tokenizer_config.json", format!("{config:#}\n")),
    ])
}
