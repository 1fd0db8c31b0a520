//! Prompts to what the UNet reads: text → pieces → tokens → chunks → states.

pub mod chunks;
mod encode;
pub mod prompt;
mod refusals;
pub mod tokenizer;
mod vocabulary;

pub use encode::{Conditioning, Texts, Tower, encode};
pub use prompt::Syntax;
pub use tokenizer::ClipTokenizer;

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::spec::{ModelSpec, Pad};

/// The folder's own tokenizer where it has one, CLIP's in this binary otherwise.
///
/// # Errors
/// When the folder's tokenizer is broken or does not fit the model.
pub fn tokenizer_for(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<ClipTokenizer> {
    let folder = checkpoint.path().join("tokenizer");
    let own = ["tokenizer.json", "vocab.json"]
        .iter()
        .any(|name| folder.join(name).exists());
    let tokenizer = if checkpoint.is_folder() && own {
        ClipTokenizer::from_folder(&folder)?
    } else {
        let tokenizer = ClipTokenizer::embedded()?;
        match spec.defaults.pad {
            Pad::Zero => tokenizer.with_pad(0),
            Pad::End if pads_with_zero(checkpoint) => tokenizer.with_pad(0),
            Pad::End => tokenizer,
        }
    };
    tokenizer.check_vocab(spec.text.config.vocabulary)?;
    Ok(tokenizer)
}

/// Whether a folder's tokenizer config, which may be there without a vocabulary, pads with `!`, token 0.
fn pads_with_zero(checkpoint: &Checkpoint) -> bool {
    let pad = checkpoint
        .config("tokenizer")
        .and_then(|config| config.get("pad_token"));
    let pad = pad.map(|pad| pad.get("content").unwrap_or(pad));
    pad.and_then(serde_json::Value::as_str) == Some("!")
}
