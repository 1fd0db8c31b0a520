//! CLIP's picture tower, which IP-Adapters read (Radford et al., arXiv 2103.00020; transformers 5.23 `CLIPVisionModelWithProjection`).
//!
//! In: a square picture `[b, 3, size, size]`, normalised. Out: states of its patches and of the picture, `[b, patches + 1, width]`, and the
//! picture's vector `[b, projection]`.

use sd_kernels::ops::{self, apply};
use sd_kernels::{Op, Padding, Param, Result, Tensor, Weights, Wrap};
use serde_json::Value;

use super::{Config, Layer};
use crate::config::{ConfigError, ConfigResult, Fields};
use crate::layers::{LayerNorm, Linear};

/// The structure of a picture tower.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Its layers; the vocabulary is not used, positions are patches and one.
    pub tower: Config,
    /// Pixels of a picture's side.
    pub size: usize,
    /// Pixels of a patch's side.
    pub patch: usize,
}

impl VisionConfig {
    /// Reads transformers' `image_encoder/config.json` with the defaults of `CLIPVisionConfig` (transformers 5.23).
    ///
    /// # Errors
    /// When a field has a wrong type or asks for something that is not built.
    pub fn from_json(value: &Value) -> ConfigResult<Self> {
        let value = value.get("vision_config").unwrap_or(value);
        let fields = Fields(value);
        let (size, patch) = (
            fields.positive("image_size", 224)?,
            fields.positive("patch_size", 32)?,
        );
        if !size.is_multiple_of(patch) || size > 4096 {
            return Err(ConfigError(format!(
                "config fields `image_size` and `patch_size` are {size} and {patch}, expected a multiple of the second up to 4096"
            )));
        }
        let (width, heads) = (
            fields.positive("hidden_size", 768)?,
            fields.positive("num_attention_heads", 12)?,
        );
        let layers = fields.positive("num_hidden_layers", 12)?;
        if !width.is_multiple_of(heads) || layers > 1024 {
            return Err(ConfigError(format!(
                "config fields `hidden_size`, `num_attention_heads` and `num_hidden_layers` are {width}, {heads} and {layers}, which do not make a tower"
            )));
        }
        Ok(Self {
            tower: Config {
                vocabulary: 0,
                positions: (size / patch).pow(2) + 1,
                width,
                intermediate: fields.positive("intermediate_size", 3072)?,
                layers,
                heads,
                activation: crate::unet::activation(&fields, "hidden_act", "quick_gelu")?,
                eps: fields.number("layer_norm_eps", 1e-5)?,
                projection: Some(fields.positive("projection_dim", 512)?),
            },
            size,
            patch,
        })
    }
}

/// The picture tower, without `vision_model.` in front of its names.
pub struct VisionEncoder {
    config: VisionConfig,
    class: Param,
    /// A convolution as wide as its stride.
    patches: Op,
    positions: Param,
    pre_norm: LayerNorm,
    layers: Vec<Layer>,
    post_norm: LayerNorm,
    projection: Option<Linear>,
}

impl VisionEncoder {
    /// Asks for the weights of the tower; those of the last layer and of the vector only where it is `projected`.
    pub fn load(weights: &Weights, config: &VisionConfig, projected: bool) -> Self {
        let tower = &config.tower;
        let embeddings = weights.at("embeddings");
        let norm = |name| LayerNorm::load(&weights.at(name), tower.width, tower.eps);
        let kept = if projected {
            tower.layers
        } else {
            tower.layers.saturating_sub(1)
        };
        Self {
            class: embeddings.param("class_embedding", &[1, tower.width]),
            patches: Op::Conv2d {
                weight: embeddings
                    .at("patch_embedding")
                    .param("weight", &[tower.width, 3, config.patch, config.patch]),
                bias: None,
                stride: config.patch,
                padding: Padding::same(0),
                wrap: Wrap::default(),
            },
            positions: embeddings
                .at("position_embedding")
                .param("weight", &[tower.positions, tower.width]),
            // the name is theirs
            pre_norm: norm("pre_layrnorm"),
            layers: (0..kept)
                .map(|i| Layer::load(&weights.at("encoder.layers").at(i), tower, false))
                .collect(),
            post_norm: norm("post_layernorm"),
            projection: tower.projection.filter(|_| projected).map(|output| {
                Linear::load_no_bias(&weights.at("visual_projection"), tower.width, output)
            }),
            config: config.clone(),
        }
    }

    /// The tower's structure.
    pub fn config(&self) -> &VisionConfig {
        &self.config
    }

    /// The vector of pictures `[b, 3, size, size]` as one token, `[b, 1, projection]`; without a projection the states before the last layer,
    /// `[b, patches + 1, width]`.
    ///
    /// # Errors
    /// When the shape does not fit or the executor fails.
    pub fn forward(&self, pictures: &Tensor) -> Result<Tensor> {
        let x = ops::flatten(&apply(self.patches.clone(), &[pictures])?)?; // [b, patches, width]
        let nothing = ops::affine(&ops::tokens(&x, 0, 1)?, 0.0, 0.0)?;
        let class = ops::add_positions(&nothing, &self.class)?; // [b, 1, width]
        let x = ops::add_positions(&ops::join(&class, &x)?, &self.positions)?;
        let mut x = self.pre_norm.forward(&x)?;
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        match &self.projection {
            Some(projection) => {
                projection.forward(&self.post_norm.forward(&ops::tokens(&x, 0, 1)?)?)
            }
            None => Ok(x),
        }
    }
}
