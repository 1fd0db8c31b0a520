//! The structure of a text tower, from transformers' `config.json` (single files give it from their shapes).

use sd_kernels::Activation;
use serde_json::Value;

use crate::config::{ConfigError, ConfigResult, Fields};

/// The structure of a text tower.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Rows of the token table.
    pub vocabulary: usize,
    /// The longest sequence.
    pub positions: usize,
    /// Width of the text states.
    pub width: usize,
    /// Width inside the feed-forward.
    pub intermediate: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Between the two layers of the feed-forward.
    pub activation: Activation,
    /// Epsilon of the norms.
    pub eps: f64,
    /// Width of a whole text's vector (`text_projection`), where the tower gives one.
    pub projection: Option<usize>,
}

impl Config {
    /// Reads transformers' `text_encoder/config.json` with the defaults of `CLIPTextConfig` (transformers 5.23).
    ///
    /// # Errors
    /// When a field has a wrong type or asks for something that is not built.
    pub fn from_json(value: &Value) -> ConfigResult<Self> {
        let fields = Fields(value);
        let config = Self {
            vocabulary: fields.positive("vocab_size", 49408)?,
            positions: fields.positive("max_position_embeddings", 77)?,
            width: fields.positive("hidden_size", 512)?,
            intermediate: fields.positive("intermediate_size", 2048)?,
            layers: fields.positive("num_hidden_layers", 12)?,
            heads: fields.positive("num_attention_heads", 8)?,
            activation: crate::unet::activation(&fields, "hidden_act", "quick_gelu")?,
            eps: fields.number("layer_norm_eps", 1e-5)?,
            projection: match projects(value) {
                true => Some(fields.positive("projection_dim", 512)?),
                false => None,
            },
        };
        if !config.width.is_multiple_of(config.heads) {
            return Err(ConfigError(format!(
                "config field `hidden_size` is {}, which {} attention heads (`num_attention_heads`) cannot share",
                config.width, config.heads
            )));
        }
        if config.layers > 1024 {
            return Err(ConfigError(format!(
                "config field `num_hidden_layers` is {}, expected at most 1024",
                config.layers
            )));
        }
        Ok(config)
    }
}

/// Every tower's config has `projection_dim`; the class says whether there is such a layer.
fn projects(value: &Value) -> bool {
    let class = value.get("architectures").and_then(|list| list.get(0));
    class.and_then(Value::as_str) == Some("CLIPTextModelWithProjection")
}
