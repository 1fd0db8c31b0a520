//! Full-size models with made-up weights: the configs of the models that they stand for.

use candle_core::{DType, Device};
use sd_models::{clip, unet, vae};
use serde_json::{Value, json};

use super::args::RandomFamily;
use crate::checkpoint::Family;
use crate::error::{Error, Result};
use crate::pipeline::{Configs, Networks};
use crate::sampling::Prediction;
use crate::spec::{self, TowerRole};

/// What is measured.
pub(super) struct Model {
    pub(super) name: String,
    pub(super) networks: Networks,
    /// Pixels of each side.
    pub(super) size: usize,
    pub(super) roles: Vec<TowerRole>,
    /// What the UNet is told beside the text.
    pub(super) numbers: usize,
}

/// The UNet of Stable Diffusion 1.5.
pub(super) fn sd15_unet() -> Value {
    json!({ "cross_attention_dim": 768 })
}

/// The UNet of Stable Diffusion XL.
pub(super) fn sdxl_unet() -> Value {
    json!({
        "cross_attention_dim": 2048, "block_out_channels": [320, 640, 1280], "use_linear_projection": true,
        "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    })
}

/// A network of full size with made-up weights, by the configs of the models that it stands for.
pub(super) fn random(family: RandomFamily, device: &Device, dtype: DType) -> Result<Model> {
    let clip_l = json!({ "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12 });
    let (name, row, towers, unet, numbers) = match family {
        RandomFamily::Sd15 => ("sd15", Family::Sd1, vec![clip_l], sd15_unet(), 0),
        RandomFamily::Sd21 => (
            "sd21",
            Family::Sd2,
            vec![
                json!({ "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
                    "num_attention_heads": 16, "hidden_act": "gelu" }),
            ],
            json!({ "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20] }),
            0,
        ),
        RandomFamily::Sdxl => (
            "sdxl",
            Family::Sdxl,
            vec![
                clip_l,
                json!({ "architectures": ["CLIPTextModelWithProjection"], "hidden_size": 1280, "intermediate_size": 5120,
                    "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280 }),
            ],
            sdxl_unet(),
            6,
        ),
    };
    let vae = json!({
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
        "layers_per_block": 2,
    });
    let broken = |e: sd_models::config::ConfigError| Error::Usage(e.to_string());
    let towers = towers
        .iter()
        .map(|config| clip::Config::from_json(config).map_err(broken))
        .collect::<Result<Vec<_>>>()?;
    let configs = Configs {
        towers: &towers.iter().collect::<Vec<_>>(),
        unet: &unet::Config::from_json(&unet).map_err(broken)?,
        vae: &vae::Config::from_json(&vae).map_err(broken)?,
        tiny: None,
    };
    let prediction = match family {
        RandomFamily::Sd21 => Prediction::V,
        _ => Prediction::Epsilon,
    };
    Ok(Model {
        name: name.to_owned(),
        networks: Networks::random(configs, device, dtype)?,
        size: spec::native_size(row, prediction),
        roles: spec::towers(row).to_vec(),
        numbers,
    })
}
