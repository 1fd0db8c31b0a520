//! Prompts to what the UNet reads: text → pieces → tokens → chunks → states.

pub mod chunks;
mod encode;
mod extra;
mod files;
pub mod prompt;
mod refusals;
pub mod t5;
pub mod tokenizer;
mod vocabulary;
mod words;

pub use encode::{
    Behind, Conditioning, Encoded, LongSpeaker, LongTower, Readers, Reading, Speaker, Texts, Tower,
    encode,
};
pub use extra::{LoraTag, take_loras};
pub use files::tokenizer_files;
pub use prompt::Syntax;
pub use t5::T5Tokenizer;
pub use tokenizer::ClipTokenizer;
pub use words::{Word, begins_with_name, first_name, named_embeddings};

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::spec::{ModelSpec, Pad, T5Tower, TextTower};

/// The tokenizers of a model's text towers.
pub struct Tokenizers {
    /// CLIP's, one a tower.
    pub clip: Vec<ClipTokenizer>,
    /// T5's, where the model has one.
    pub t5: Option<T5Tokenizer>,
}

/// The tokenizer of each of a model's text towers: the folder's own where it has one, that in this binary otherwise.
///
/// # Errors
/// When a folder's tokenizer is broken or does not fit the model.
pub fn tokenizers_for(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<Tokenizers> {
    let towers = spec.text.iter();
    let clip = towers.map(|tower| tokenizer_for(checkpoint, tower));
    Ok(Tokenizers {
        clip: clip.collect::<Result<_>>()?,
        t5: match &spec.t5 {
            Some(t5) => Some(t5_tokenizer_for(checkpoint, t5)?),
            None => None,
        },
    })
}

fn t5_tokenizer_for(checkpoint: &Checkpoint, t5: &T5Tower) -> Result<T5Tokenizer> {
    let folder = checkpoint.path().join(t5.role.tokenizer);
    let own = ["tokenizer.json", "spiece.model"]
        .iter()
        .any(|name| folder.join(name).exists());
    let tokenizer = if checkpoint.is_folder() && own {
        T5Tokenizer::from_folder(&folder)?
    } else {
        T5Tokenizer::embedded()?
    };
    tokenizer.check_vocab(t5.component.config.vocabulary)?;
    Ok(tokenizer)
}

fn tokenizer_for(checkpoint: &Checkpoint, tower: &TextTower) -> Result<ClipTokenizer> {
    let name = tower.role.tokenizer;
    let folder = checkpoint.path().join(name);
    let own = ["tokenizer.json", "vocab.json"]
        .iter()
        .any(|name| folder.join(name).exists());
    let tokenizer = if checkpoint.is_folder() && own {
        ClipTokenizer::from_folder(&folder)?
    } else {
        let tokenizer = ClipTokenizer::embedded()?;
        match tower.role.pad {
            Pad::Zero => tokenizer.with_pad(0),
            Pad::End if pads_with_zero(checkpoint, name) => tokenizer.with_pad(0),
            Pad::End => tokenizer,
        }
    };
    tokenizer.check_vocab(tower.component.config.vocabulary)?;
    // single files stand for models whose folders have the 2 of old transformers
    let end = checkpoint.config(tower.role.component).map(|config| {
        config
            .get("eos_token_id")
            .and_then(serde_json::Value::as_u64)
    });
    Ok(tokenizer.with_end_at_largest(end.is_none_or(|end| end == Some(2))))
}

/// Whether a folder's tokenizer config, which may be there without a vocabulary, pads with `!`, token 0.
fn pads_with_zero(checkpoint: &Checkpoint, name: &str) -> bool {
    let pad = checkpoint
        .config(name)
        .and_then(|config| config.get("pad_token"));
    let pad = pad.map(|pad| pad.get("content").unwrap_or(pad));
    pad.and_then(serde_json::Value::as_str) == Some("!")
}
