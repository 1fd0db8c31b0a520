//! The structure of a T5 encoder, from transformers' `config.json` (single files give it from their shapes).

use sd_kernels::Activation;
use serde_json::Value;

use crate::config::{ConfigError, ConfigResult, Fields};

/// The structure of a T5 encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Numbers of a token's state.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Numbers of a head.
    pub head: usize,
    /// Width of the feed-forward.
    pub intermediate: usize,
    /// Layers.
    pub layers: usize,
    /// Buckets of the distances.
    pub buckets: usize,
    /// The distance from which on all share the last bucket.
    pub max_distance: usize,
    /// Of the feed-forward.
    pub activation: Activation,
    /// Whether a second layer's result is multiplied with the activated one (T5 1.1).
    pub gated: bool,
    /// Of every norm.
    pub eps: f64,
}

impl Config {
    /// Reads transformers' `config.json` with the defaults of `T5Config` (transformers 5.23).
    ///
    /// # Errors
    /// When a field has a wrong type or asks for something that is not built.
    pub fn from_json(value: &Value) -> ConfigResult<Self> {
        let fields = Fields(value);
        let kind = fields.text("feed_forward_proj", "relu")?;
        let (gated, name) = match kind.strip_prefix("gated-") {
            Some(name) => (true, name),
            None => (false, kind),
        };
        // transformers reads this one name as the approximation
        let name = if gated && name == "gelu" {
            "gelu_new"
        } else {
            name
        };
        let activation = Activation::from_name(name).ok_or_else(|| {
            ConfigError(format!(
                "config field `feed_forward_proj` is \"{kind}\", which is not supported yet"
            ))
        })?;
        let buckets = fields.positive("relative_attention_num_buckets", 32)?;
        if !buckets.is_multiple_of(4) {
            return Err(ConfigError(format!(
                "config field `relative_attention_num_buckets` is {buckets}, expected a multiple of 4"
            )));
        }
        Ok(Self {
            vocabulary: fields.positive("vocab_size", 32128)?,
            width: fields.positive("d_model", 512)?,
            heads: fields.positive("num_heads", 8)?,
            head: fields.positive("d_kv", 64)?,
            intermediate: fields.positive("d_ff", 2048)?,
            layers: fields.positive("num_layers", 6)?,
            buckets,
            max_distance: fields.positive("relative_attention_max_distance", 128)?,
            activation,
            gated,
            eps: fields.number("layer_norm_epsilon", 1e-6)?,
        })
    }
}
