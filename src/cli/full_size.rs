//! Full-size models with made-up weights: the configs of the models that they stand for.

use candle_core::{DType, Device};
use sd_models::config::{ConfigError, ConfigResult};
use sd_models::{clip, denoiser, flux, mmdit, t5, unet, vae};
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
    /// Tokens of T5's texts, where the family has T5.
    pub(super) t5_length: Option<usize>,
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

/// The transformer of Stable Diffusion 3: of medium, of 3.5 medium, or of 3.5 large.
fn mmdit(layers: usize, is_35: bool) -> Value {
    let dual: Vec<usize> = if is_35 && layers == 24 {
        (0..13).collect()
    } else {
        Vec::new()
    };
    let positions = if is_35 && layers == 24 { 384 } else { 192 };
    json!({
        "num_layers": layers, "num_attention_heads": layers, "caption_projection_dim": 64 * layers, "pos_embed_max_size": positions,
        "dual_attention_layers": dual, "qk_norm": if is_35 { json!("rms_norm") } else { Value::Null },
    })
}

/// What a family's networks are made of.
struct Shape {
    name: &'static str,
    row: Family,
    towers: Vec<Value>,
    network: denoiser::Config,
    /// Numbers beside the whole text's vector.
    numbers: usize,
    /// Channels of the latents.
    latents: usize,
}

fn shape(family: RandomFamily) -> ConfigResult<Shape> {
    let clip_l = json!({ "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12 });
    let mut clip_l_projected = clip_l.clone();
    clip_l_projected["architectures"] = json!(["CLIPTextModelWithProjection"]);
    clip_l_projected["projection_dim"] = json!(768);
    let clip_h = json!({ "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
        "hidden_act": "gelu" });
    let clip_g = json!({ "architectures": ["CLIPTextModelWithProjection"], "hidden_size": 1280, "intermediate_size": 5120,
        "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280 });
    let unet = |config: &Value| unet::Config::from_json(config).map(denoiser::Config::UNet);
    let sd3 = |name, row, config: &Value| -> ConfigResult<Shape> {
        Ok(Shape {
            name,
            row,
            towers: vec![clip_l_projected.clone(), clip_g.clone()],
            network: denoiser::Config::Mmdit(mmdit::Config::from_json(config)?),
            numbers: 0,
            latents: 16,
        })
    };
    let flux = |name, guidance: bool| -> ConfigResult<Shape> {
        Ok(Shape {
            name,
            row: Family::Flux1,
            towers: vec![clip_l.clone()],
            network: denoiser::Config::Flux(flux::Config::from_json(
                &json!({ "guidance_embeds": guidance }),
            )?),
            numbers: 0,
            latents: 16,
        })
    };
    let ldm = |name, row, towers, network, numbers| Shape {
        name,
        row,
        towers,
        network,
        numbers,
        latents: 4,
    };
    Ok(match family {
        RandomFamily::Sd15 => ldm("sd15", Family::Sd1, vec![clip_l], unet(&sd15_unet())?, 0),
        RandomFamily::Sd21 => {
            let config =
                json!({ "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20] });
            ldm("sd21", Family::Sd2, vec![clip_h], unet(&config)?, 0)
        }
        RandomFamily::Sdxl => {
            let network = unet(&sdxl_unet())?;
            ldm("sdxl", Family::Sdxl, vec![clip_l, clip_g], network, 6)
        }
        RandomFamily::Sd3 => sd3("sd3", Family::Sd3, &mmdit(24, false))?,
        RandomFamily::Sd35Medium => sd3("sd35-medium", Family::Sd35, &mmdit(24, true))?,
        RandomFamily::Sd35Large => sd3("sd35-large", Family::Sd35, &mmdit(38, true))?,
        RandomFamily::FluxDev => flux("flux-dev", true)?,
        RandomFamily::FluxSchnell => flux("flux-schnell", false)?,
    })
}

/// A network of full size with made-up weights, by the configs of the models that it stands for.
pub(super) fn random(family: RandomFamily, device: &Device, dtype: DType) -> Result<Model> {
    let broken = |e: ConfigError| Error::Usage(e.to_string());
    let shape = shape(family).map_err(broken)?;
    let vae = json!({
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
        "layers_per_block": 2, "latent_channels": shape.latents, "use_quant_conv": shape.latents == 4, "use_post_quant_conv": shape.latents == 4,
    });
    let t5 = json!({ "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu" });
    let t5 = t5::Config::from_json(&t5).map_err(broken)?;
    let t5_length = spec::t5_length(shape.row);
    let towers = shape
        .towers
        .iter()
        .map(|config| clip::Config::from_json(config).map_err(broken))
        .collect::<Result<Vec<_>>>()?;
    let roles = spec::towers(shape.row).to_vec();
    let beside = roles.iter().any(|role| role.states);
    let configs = Configs {
        towers: &towers.iter().collect::<Vec<_>>(),
        t5: t5_length.map(|_| &t5),
        tokens: 77 * usize::from(beside) + t5_length.unwrap_or(0),
        unet: &shape.network,
        vae: &vae::Config::from_json(&vae).map_err(broken)?,
        tiny: None,
    };
    let prediction = match family {
        RandomFamily::Sd21 => Prediction::V,
        _ => Prediction::Epsilon,
    };
    Ok(Model {
        name: shape.name.to_owned(),
        networks: Networks::random(configs, device, dtype)?,
        size: spec::native_size(shape.row, prediction),
        roles,
        numbers: shape.numbers,
        t5_length,
    })
}
