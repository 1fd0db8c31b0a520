//! The JSON files of a diffusers folder, written for the structure that a single file was found to have. The fields are diffusers' and
//! transformers' own; what their classes take by themselves is left out where it cannot matter.

use serde_json::{Map, Value, json};

use crate::checkpoint::{Detection, Family, Noise, Variant};
use crate::error::{Error, Result};
use crate::sampling::Prediction;
use crate::spec::{ModelSpec, TextTower, betas, unet_difference};
use sd_kernels::Activation;
use sd_models::unet::{self, Level, Mid};
use sd_models::{clip, vae};

/// The version of diffusers whose fields these are.
const VERSION: &str = "0.42.1";

/// A file of the folder: its path and content.
pub(super) type File = (String, Value);

/// All JSON files of the folder but those of tokenizers. `linear` says whether transformers' projections are linear layers.
///
/// # Errors
/// When diffusers' config cannot say what the structure is.
pub(super) fn files(spec: &ModelSpec, detection: &Detection, linear: bool) -> Result<Vec<File>> {
    let scheduler = scheduler(spec, detection);
    let mut files = vec![
        ("unet/config.json".to_owned(), unet(spec, linear)?),
        ("vae/config.json".to_owned(), vae(spec)),
    ];
    let mut index = Map::new();
    let mut set = |name: &str, value: Value| index.insert(name.to_owned(), value);
    set(
        "_class_name",
        json!(pipeline(spec.family, detection.variant)),
    );
    set("_diffusers_version", json!(VERSION));
    let class = scheduler.get("_class_name").cloned();
    set("scheduler", json!(["diffusers", class]));
    set("unet", json!(["diffusers", "UNet2DConditionModel"]));
    set("vae", json!(["diffusers", "AutoencoderKL"]));
    let is_xl = spec.unet_config()?.added.is_some();
    if is_xl {
        set("force_zeros_for_empty_prompt", json!(spec.zero_negative));
        set("text_encoder", json!([null, null]));
        set("tokenizer", json!([null, null]));
    } else {
        set("safety_checker", json!([null, null]));
        set("feature_extractor", json!([null, null]));
        set("requires_safety_checker", json!(false));
    }
    if spec.family == Family::SdxlRefiner {
        set("requires_aesthetics_score", json!(true));
    }
    for tower in &spec.text {
        let class = text_class(tower);
        set(tower.role.component, json!(["transformers", class]));
        set(
            tower.role.tokenizer,
            json!(["transformers", "CLIPTokenizer"]),
        );
        files.push((format!("{}/config.json", tower.role.component), text(tower)));
    }
    if spec.low_res.is_some() {
        set("low_res_scheduler", json!(["diffusers", "DDPMScheduler"]));
        let (first, last) = betas(spec.family);
        let config = json!({
            "_class_name": "DDPMScheduler",
            "_diffusers_version": VERSION,
            "beta_end": last,
            "beta_schedule": "scaled_linear",
            "beta_start": first,
            "num_train_timesteps": 1000,
        });
        files.push(("low_res_scheduler/scheduler_config.json".to_owned(), config));
    }
    files.push(("scheduler/scheduler_config.json".to_owned(), scheduler));
    files.push(("model_index.json".to_owned(), Value::Object(index)));
    Ok(files)
}

fn pipeline(family: Family, variant: Variant) -> &'static str {
    let is_xl = !matches!(family, Family::Sd1 | Family::Sd2 | Family::X4Upscaler);
    match (is_xl, variant) {
        _ if family == Family::X4Upscaler => "StableDiffusionUpscalePipeline",
        (false, Variant::Inpainting) => "StableDiffusionInpaintPipeline",
        (false, Variant::Pix2Pix) => "StableDiffusionInstructPix2PixPipeline",
        (false, Variant::Depth) => "StableDiffusionDepth2ImgPipeline",
        (false, _) => "StableDiffusionPipeline",
        (true, Variant::Inpainting) => "StableDiffusionXLInpaintPipeline",
        (true, Variant::Pix2Pix) => "StableDiffusionXLInstructPix2PixPipeline",
        (true, _) if family == Family::SdxlRefiner => "StableDiffusionXLImg2ImgPipeline",
        (true, _) => "StableDiffusionXLPipeline",
    }
}

fn unet(spec: &ModelSpec, linear: bool) -> Result<Value> {
    let config = spec.unet_config()?;
    let levels = &config.levels;
    let mut json = json!({
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "act_fn": activation(config.activation),
        "attention_head_dim": shared(levels.iter().map(|level| level.heads)),
        "block_out_channels": levels.iter().map(|level| level.channels).collect::<Vec<_>>(),
        "center_input_sample": config.center_input,
        "conv_in_kernel": config.conv_in_kernel,
        "conv_out_kernel": config.conv_out_kernel,
        "cross_attention_dim": config.context_width(),
        "downsample_padding": config.downsample_padding,
        "flip_sin_to_cos": config.time.flip_sin_to_cos,
        "freq_shift": number(config.time.freq_shift),
        "in_channels": config.in_channels,
        "layers_per_block": shared(levels.iter().map(|level| level.down.len())),
        "mid_block_scale_factor": number(config.mid_scale),
        "norm_eps": config.eps,
        "norm_num_groups": config.groups,
        "out_channels": config.out_channels,
        "sample_size": spec.defaults.size / spec.vae.config.scale(),
        "upcast_attention": spec.family == Family::Sd2,
        "use_linear_projection": linear,
    });
    set_blocks(&mut json, config);
    let first = levels.first().map_or(0, |level| level.channels);
    if config.time.output != 4 * first {
        json["time_embedding_dim"] = json!(config.time.output);
    }
    if let Some(added) = config.added {
        json["addition_embed_type"] = json!("text_time");
        json["addition_time_embed_dim"] = json!(added.number);
        json["projection_class_embeddings_input_dim"] = json!(added.input);
    }
    if let Some(classes) = config.classes {
        json["num_class_embeds"] = json!(classes);
    }
    // what was written must be what is read
    let read = unet::Config::from_json(&json).map_err(|e| Error::Weights(e.to_string()))?;
    match unet_difference(config, &read) {
        None => Ok(json),
        Some(what) => Err(Error::Weights(format!(
            "diffusers' config of a UNet cannot say what this one is ({what}); keep it as a single file"
        ))),
    }
}

/// The kinds of blocks and the depths of their transformers.
fn set_blocks(json: &mut Value, config: &unet::Config) {
    let levels: Vec<&Level> = config.levels.iter().collect();
    let reversed = || levels.iter().rev();
    let attends = |depths: &[usize]| depths.iter().any(|&depth| depth > 0);
    let block = |depths: &[usize], way: &str| match attends(depths) {
        true => format!("CrossAttn{way}Block2D"),
        false => format!("{way}Block2D"),
    };
    let down: Vec<String> = levels
        .iter()
        .map(|level| block(&level.down, "Down"))
        .collect();
    let up: Vec<String> = reversed().map(|level| block(&level.up, "Up")).collect();
    json["down_block_types"] = json!(down);
    json["up_block_types"] = json!(up);
    json["mid_block_type"] = match config.mid {
        Mid::Attention { .. } => json!("UNetMidBlock2DCrossAttn"),
        Mid::Resnet => json!("UNetMidBlock2D"),
        Mid::None => Value::Null,
    };
    let mut depths: Vec<Value> = levels
        .iter()
        .map(|level| self::depths(&level.down))
        .collect();
    // the middle takes the last level's
    if let (Mid::Attention { depth }, Some(level), Some(last)) =
        (config.mid, levels.last(), depths.last_mut())
        && !attends(&level.down)
    {
        *last = json!(depth);
    }
    if !up_follows_down(&levels) {
        let up: Vec<Value> = reversed().map(|level| self::depths(&level.up)).collect();
        json["reverse_transformer_layers_per_block"] = json!(up);
    }
    let all_one = depths.iter().all(|depth| *depth == 1);
    json["transformer_layers_per_block"] = if all_one { json!(1) } else { json!(depths) };
}

/// Whether every block on the way up has as many transformer blocks as the first on the way down, which is what diffusers takes by itself.
fn up_follows_down(levels: &[&Level]) -> bool {
    levels.iter().all(|level| {
        let first = level
            .down
            .iter()
            .copied()
            .find(|&depth| depth > 0)
            .unwrap_or(1);
        let even = level
            .down
            .iter()
            .all(|depth| Some(depth) == level.down.first());
        even && level.up.iter().all(|&depth| depth == 0 || depth == first)
    })
}

/// One number where all are the same; 1 where there are none, since nothing asks.
fn depths(depths: &[usize]) -> Value {
    match depths.split_first() {
        Some((first, rest)) if rest.iter().all(|depth| depth == first) => json!((*first).max(1)),
        _ => json!(depths),
    }
}

/// One number where all are the same, else all.
fn shared(numbers: impl Iterator<Item = usize>) -> Value {
    let numbers: Vec<usize> = numbers.collect();
    match numbers.split_first() {
        Some((first, rest)) if rest.iter().all(|n| n == first) => json!(first),
        _ => json!(numbers),
    }
}

/// A whole number without `.0`, as Python's classes have these fields.
fn number(x: f64) -> Value {
    match x.fract() == 0.0 && x.abs() < 1e9 {
        true => json!(x as i64),
        false => json!(x),
    }
}

fn activation(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_new",
        Activation::Gelu => "gelu",
        Activation::QuickGelu => "quick_gelu",
        Activation::Mish => "mish",
        Activation::Relu => "relu",
        Activation::LeakyRelu { .. } => "leaky_relu",
        Activation::Sigmoid => "sigmoid",
    }
}

pub(super) fn vae(spec: &ModelSpec) -> Value {
    let config: &vae::Config = &spec.vae.config;
    let count = config.channels.len();
    let mut json = json!({
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "act_fn": activation(config.activation),
        "block_out_channels": config.channels,
        "down_block_types": vec!["DownEncoderBlock2D"; count],
        "force_upcast": spec.numbers() > 0,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.groups,
        "out_channels": config.out_channels,
        "sample_size": spec.defaults.size,
        "scaling_factor": config.scaling_factor,
        "up_block_types": vec!["UpDecoderBlock2D"; count],
        "use_post_quant_conv": config.post_quant_conv,
        "use_quant_conv": config.quant_conv,
    });
    if let Some(spread) = &config.spread {
        json["latents_mean"] = json!(spread.mean);
        json["latents_std"] = json!(spread.deviation);
    }
    if config.shift_factor != 0.0 {
        json["shift_factor"] = json!(config.shift_factor);
    }
    json
}

fn text_class(tower: &TextTower) -> &'static str {
    match tower.component.config.projection {
        Some(_) => "CLIPTextModelWithProjection",
        None => "CLIPTextModel",
    }
}

fn text(tower: &TextTower) -> Value {
    let config: &clip::Config = &tower.component.config;
    json!({
        "architectures": [text_class(tower)],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": activation(config.activation),
        "hidden_size": config.width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate,
        "layer_norm_eps": config.eps,
        "max_position_embeddings": config.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": 1,
        "projection_dim": config.projection.unwrap_or(config.width),
        "vocab_size": config.vocabulary,
    })
}

/// The sampler that the family's own folders name, for what the network predicts and the noise levels it knows.
fn scheduler(spec: &ModelSpec, detection: &Detection) -> Value {
    let prediction = match spec.prediction {
        Prediction::V => "v_prediction",
        Prediction::Sample => "sample",
        _ => "epsilon",
    };
    if let Noise::Continuous {
        range: (min, max),
        data,
        ..
    } = &detection.noise
    {
        let class = match spec.prediction {
            Prediction::Edm => "EDMDPMSolverMultistepScheduler",
            _ => "EDMEulerScheduler",
        };
        return json!({
            "_class_name": class,
            "_diffusers_version": VERSION,
            "num_train_timesteps": 1000,
            "prediction_type": prediction,
            "sigma_data": data,
            "sigma_max": max,
            "sigma_min": min,
        });
    }
    let class = match spec.family {
        Family::Sd1 => "PNDMScheduler",
        Family::Sd2 | Family::X4Upscaler => "DDIMScheduler",
        _ => "EulerDiscreteScheduler",
    };
    let zero = detection.noise == Noise::ZeroSnr;
    let class = match zero && spec.family == Family::Sd1 {
        true => "DDIMScheduler",
        false => class,
    };
    let (first, last) = betas(spec.family);
    let mut json = json!({
        "_class_name": class,
        "_diffusers_version": VERSION,
        "beta_end": last,
        "beta_schedule": "scaled_linear",
        "beta_start": first,
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "steps_offset": 1,
        "timestep_spacing": if zero { "trailing" } else { "leading" },
        "trained_betas": null,
    });
    match class {
        "PNDMScheduler" => {
            json["set_alpha_to_one"] = json!(false);
            json["skip_prk_steps"] = json!(true);
        }
        "DDIMScheduler" => {
            json["set_alpha_to_one"] = json!(false);
            json["clip_sample"] = json!(false);
        }
        _ => {
            json["interpolation_type"] = json!("linear");
            json["use_karras_sigmas"] = json!(false);
        }
    }
    if zero {
        json["rescale_betas_zero_snr"] = json!(true);
    }
    json
}
