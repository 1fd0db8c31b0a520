//! The structure of a UNet, from diffusers' `config.json` (single files give it from their shapes).

use sd_kernels::ops::{self, apply};
use sd_kernels::{Activation, Op, Result, Tensor};
use serde_json::{Value, json};

use crate::config::{ConfigError, ConfigResult, Fields};
use crate::layers::TimeConfig;

/// The structure of a UNet.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Channels of the input: 4, 9 for inpainting, 8 for pix2pix.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Levels from full size to the smallest; never empty.
    pub levels: Vec<Level>,
    /// What stands in the middle.
    pub mid: Mid,
    /// Divides the middle's residual sums.
    pub mid_scale: f64,
    /// Groups of every group norm.
    pub groups: usize,
    /// Epsilon of the group norms outside transformers.
    pub eps: f64,
    /// Activation of residual blocks and output.
    pub activation: Activation,
    /// The timestep's embedding.
    pub time: TimeConfig,
    /// What is embedded beside the time, if anything.
    pub added: Option<Added>,
    /// How many classes have a row in a table that is added to the time's embedding (the x4 upscaler's levels of noise).
    pub classes: Option<usize>,
    /// Applied once to the time embedding before the blocks, if given.
    pub time_activation: Option<Activation>,
    /// Residual blocks take the time as scale and shift.
    pub scale_shift: bool,
    /// Padding of the downsampling convolutions.
    pub downsample_padding: usize,
    /// The input is mapped from [0, 1] to [−1, 1] first.
    pub center_input: bool,
    /// Kernel width of the first convolution.
    pub conv_in_kernel: usize,
    /// Kernel width of the last convolution.
    pub conv_out_kernel: usize,
}

/// A vector that is embedded and added to the time's embedding: a whole text's vector and a few numbers as sinusoids (Podell et al.,
/// "SDXL", arXiv 2307.01952, section 2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Added {
    /// Width of the vector.
    pub input: usize,
    /// Width of one number's sinusoids.
    pub number: usize,
}

/// One resolution of a UNet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Level {
    /// Feature channels.
    pub channels: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the text states that cross-attention reads.
    pub context: usize,
    /// The first attention of each block looks at the text too.
    pub only_cross_attention: bool,
    /// Transformer blocks behind each residual block on the way down; 0 is no transformer.
    pub down: Vec<usize>,
    /// The same on the way up.
    pub up: Vec<usize>,
}

/// The middle of a UNet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mid {
    /// Nothing.
    None,
    /// One residual block.
    Resnet,
    /// Two residual blocks around a transformer.
    Attention {
        /// Transformer blocks.
        depth: usize,
    },
}

/// Options of `UNet2DConditionModel` that no Stable Diffusion 1, 2 or XL uses, with the value that means "off".
fn unsupported() -> [(&'static str, Value); 10] {
    [
        ("dual_cross_attention", json!(false)),
        ("class_embed_type", Value::Null),
        ("encoder_hid_dim", Value::Null),
        ("encoder_hid_dim_type", Value::Null),
        ("timestep_post_act", Value::Null),
        ("time_embedding_type", json!("positional")),
        ("attention_type", json!("default")),
        ("class_embeddings_concat", json!(false)),
        ("cross_attention_norm", Value::Null),
        ("conditioning_embedding_out_channels", Value::Null),
    ]
}

impl Config {
    /// Whether a level has attention that is at most `smaller` times smaller than the latents.
    pub fn attends_within(&self, smaller: usize) -> bool {
        let levels = self.levels.iter().enumerate();
        let mut near = levels.take_while(|(i, _)| smaller.checked_shr(*i as u32) > Some(0));
        near.any(|(_, level)| level.down.iter().chain(&level.up).any(|&depth| depth > 0))
    }

    /// Reads diffusers' `unet/config.json` with the defaults of `UNet2DConditionModel` (diffusers 0.42.1).
    ///
    /// # Errors
    /// When a field has a wrong type or length, or asks for something that is not built.
    pub fn from_json(value: &Value) -> ConfigResult<Self> {
        let fields = Fields(value);
        for (name, neutral) in unsupported() {
            fields.must_be_neutral(name, &neutral)?;
        }
        let channels = fields.sizes("block_out_channels", &[320, 640, 1280, 1280])?;
        let Some(&first) = channels.first().filter(|_| channels.iter().all(|&c| c > 0)) else {
            return Err(ConfigError(
                "config field `block_out_channels` must list at least one level, all above 0"
                    .to_owned(),
            ));
        };
        let activation = activation(&fields, "act_fn", "silu")?;
        let time_input = first;
        Ok(Self {
            in_channels: fields.positive("in_channels", 4)?,
            out_channels: fields.positive("out_channels", 4)?,
            mid: mid(&fields, &channels)?,
            levels: levels(&fields, &channels)?,
            mid_scale: fields.number("mid_block_scale_factor", 1.0)?,
            groups: fields.positive("norm_num_groups", 32)?,
            eps: fields.number("norm_eps", 1e-5)?,
            activation,
            time: TimeConfig {
                input: time_input,
                output: fields.positive("time_embedding_dim", first * 4)?,
                flip_sin_to_cos: fields.flag("flip_sin_to_cos", true)?,
                freq_shift: fields.number("freq_shift", 0.0)?,
                activation,
                condition: match fields.size("time_cond_proj_dim", 0)? {
                    0 => None,
                    width => Some(width),
                },
            },
            added: added(&fields)?,
            classes: match fields.size("num_class_embeds", 0)? {
                0 => None,
                count => Some(count),
            },
            time_activation: match fields.get("time_embedding_act_fn") {
                Some(_) => Some(self::activation(&fields, "time_embedding_act_fn", "silu")?),
                None => None,
            },
            scale_shift: match fields.text("resnet_time_scale_shift", "default")? {
                "default" => false,
                "scale_shift" => true,
                other => return Err(not_built("resnet_time_scale_shift", other)),
            },
            downsample_padding: fields.size("downsample_padding", 1)?,
            center_input: fields.flag("center_input_sample", false)?,
            conv_in_kernel: fields.positive("conv_in_kernel", 3)?,
            conv_out_kernel: fields.positive("conv_out_kernel", 3)?,
        })
    }

    /// What the network embeds beside the time, for one row of a batch: sinusoids of `numbers [n]`, `[n, added.number]`.
    ///
    /// # Errors
    /// When the executor fails.
    pub fn embed_numbers(&self, numbers: &Tensor) -> Result<Tensor> {
        let sinusoid = Op::Sinusoid {
            width: self.added.map_or(0, |added| added.number),
            flip_sin_to_cos: self.time.flip_sin_to_cos,
            freq_shift: self.time.freq_shift,
        };
        apply(sinusoid, &[numbers])
    }

    /// The guidance scale as a latent consistency model reads it, `[b]` → `[b, time.condition]` (Luo et al., arXiv 2310.04378; diffusers'
    /// `get_guidance_scale_embedding`).
    ///
    /// # Errors
    /// When the executor fails.
    pub fn embed_guidance(&self, scale: &Tensor) -> Result<Tensor> {
        let sinusoid = Op::Sinusoid {
            width: self.time.condition.unwrap_or(0),
            flip_sin_to_cos: false,
            freq_shift: 1.0,
        };
        apply(sinusoid, &[&ops::affine(scale, 1000.0, -1000.0)?])
    }

    /// The width of the text states that the network reads.
    pub fn context_width(&self) -> usize {
        self.levels.first().map_or(0, |level| level.context)
    }

    /// Latent height and width must be multiples of this for a picture without odd sizes inside; others work too.
    pub fn size_multiple(&self) -> usize {
        1 << self.levels.len().saturating_sub(1)
    }
}

fn added(fields: &Fields<'_>) -> ConfigResult<Option<Added>> {
    match fields.get("addition_embed_type") {
        None => Ok(None),
        Some(_) => match fields.text("addition_embed_type", "")? {
            "text_time" => Ok(Some(Added {
                input: fields.positive("projection_class_embeddings_input_dim", 0)?,
                number: fields.positive("addition_time_embed_dim", 0)?,
            })),
            other => Err(not_built("addition_embed_type", other)),
        },
    }
}

fn not_built(field: &str, value: &str) -> ConfigError {
    ConfigError(format!(
        "config field `{field}` is \"{value}\", which is not supported yet"
    ))
}

pub(crate) fn activation(
    fields: &Fields<'_>,
    name: &str,
    default: &str,
) -> ConfigResult<Activation> {
    let value = match fields.get(name) {
        Some(_) => fields.text(name, "")?,
        None => default,
    };
    Activation::from_name(value).ok_or_else(|| not_built(name, value))
}

/// `true` for one value or a list of values a level.
fn flags(fields: &Fields<'_>, name: &str, count: usize) -> ConfigResult<Vec<bool>> {
    match fields.get(name) {
        Some(Value::Array(list)) if list.len() == count => list
            .iter()
            .map(|item| {
                item.as_bool().ok_or_else(|| {
                    ConfigError(format!(
                        "config field `{name}` holds {item}, expected true or false"
                    ))
                })
            })
            .collect(),
        _ => Ok(vec![fields.flag(name, false)?; count]),
    }
}

/// Transformer blocks behind each of `layers[i]` residual blocks, for each level: one number for all, one a level, or a list a level.
fn depths(fields: &Fields<'_>, name: &str, layers: &[usize]) -> ConfigResult<Vec<Vec<usize>>> {
    let nested =
        matches!(fields.get(name), Some(Value::Array(list)) if list.iter().any(Value::is_array));
    if !nested {
        let per_level = fields.per_level(name, 1, layers.len())?;
        return Ok(per_level
            .iter()
            .zip(layers)
            .map(|(&d, &n)| vec![d; n])
            .collect());
    }
    let wrong = || {
        ConfigError(format!(
            "config field `{name}` must give one number or list a level"
        ))
    };
    let list = fields
        .get(name)
        .and_then(Value::as_array)
        .ok_or_else(wrong)?;
    if list.len() != layers.len() {
        return Err(wrong());
    }
    list.iter()
        .zip(layers)
        .map(|(item, &n)| match item {
            Value::Array(_) => {
                let wrapped = json!({ "depths": item });
                let depths = Fields(&wrapped).sizes("depths", &[])?;
                if depths.len() == n {
                    Ok(depths)
                } else {
                    Err(wrong())
                }
            }
            _ => Ok(vec![Fields(&json!({ "depth": item })).size("depth", 1)?; n]),
        })
        .collect()
}

/// Which blocks of one way have transformers, in the order of the config; `defaults` are those of Stable Diffusion.
fn attends(
    fields: &Fields<'_>,
    way: &str,
    defaults: &[&str],
    count: usize,
) -> ConfigResult<Vec<bool>> {
    let name = format!("{}_block_types", way.to_lowercase());
    let (plain, cross) = (format!("{way}Block2D"), format!("CrossAttn{way}Block2D"));
    let defaults: Vec<String> = defaults
        .iter()
        .map(|prefix| format!("{prefix}{plain}"))
        .collect();
    let defaults: Vec<&str> = defaults.iter().map(String::as_str).collect();
    let types = fields.texts(&name, &defaults)?;
    if types.len() != count {
        return Err(ConfigError(format!(
            "config field `{name}` has {} entries, expected {count}, one a level",
            types.len()
        )));
    }
    types
        .iter()
        .map(
            |block| match block.strip_prefix("UNetRes").unwrap_or(block) {
                block if block == plain => Ok(false),
                block if block == cross => Ok(true),
                other => Err(not_built(&name, other)),
            },
        )
        .collect()
}

fn levels(fields: &Fields<'_>, channels: &[usize]) -> ConfigResult<Vec<Level>> {
    let count = channels.len();
    let down_attends = attends(
        fields,
        "Down",
        &["CrossAttn", "CrossAttn", "CrossAttn", ""],
        count,
    )?;
    let mut up_attends = attends(
        fields,
        "Up",
        &["", "CrossAttn", "CrossAttn", "CrossAttn"],
        count,
    )?;
    up_attends.reverse();

    let layers = fields.per_level("layers_per_block", 2, count)?;
    let up_layers: Vec<usize> = layers.iter().map(|n| n + 1).collect();
    let down_depths = depths(fields, "transformer_layers_per_block", &layers)?;
    let up_depths = match fields.get("reverse_transformer_layers_per_block") {
        Some(_) => {
            let reversed: Vec<usize> = up_layers.iter().rev().copied().collect();
            let mut depths = depths(fields, "reverse_transformer_layers_per_block", &reversed)?;
            depths.reverse();
            depths
        }
        None => down_depths
            .iter()
            .zip(&up_layers)
            .map(|(d, &n)| vec![d.first().copied().unwrap_or(1); n])
            .collect(),
    };
    let heads = heads(fields, count)?;
    let contexts = fields.per_level("cross_attention_dim", 1280, count)?;
    let only_cross = flags(fields, "only_cross_attention", count)?;
    (0..count)
        .map(|i| {
            let attending = down_attends[i] || up_attends[i] || i + 1 == count;
            if attending && (heads[i] == 0 || !channels[i].is_multiple_of(heads[i])) {
                return Err(ConfigError(format!(
                    "{} channels cannot be shared by {} attention heads (config field `attention_head_dim`)",
                    channels[i], heads[i]
                )));
            }
            let keep = |attends: bool, depths: &[usize]| -> Vec<usize> {
                depths.iter().map(|&d| if attends { d } else { 0 }).collect()
            };
            Ok(Level {
                channels: channels[i],
                heads: heads[i],
                context: contexts[i],
                only_cross_attention: only_cross[i],
                down: keep(down_attends[i], &down_depths[i]),
                up: keep(up_attends[i], &up_depths[i]),
            })
        })
        .collect()
}

/// `attention_head_dim` holds the *number* of heads in every UNet config, by a misnomer that diffusers keeps for compatibility
/// (huggingface/diffusers issue 2011); `num_attention_heads`, where a config has it, says the same under its right name.
fn heads(fields: &Fields<'_>, count: usize) -> ConfigResult<Vec<usize>> {
    let name = match fields.get("num_attention_heads") {
        Some(_) => "num_attention_heads",
        None => "attention_head_dim",
    };
    fields.per_level(name, 8, count)
}

fn mid(fields: &Fields<'_>, channels: &[usize]) -> ConfigResult<Mid> {
    // null means "no middle block", which is not the same as a field that is not there
    if fields.0.get("mid_block_type") == Some(&Value::Null) {
        return Ok(Mid::None);
    }
    match fields.text("mid_block_type", "UNetMidBlock2DCrossAttn")? {
        "UNetMidBlock2DCrossAttn" => {
            let depths = depths(
                fields,
                "transformer_layers_per_block",
                &vec![1; channels.len()],
            );
            // a list a level: the middle takes the first of the last level's
            let depth = match depths {
                Ok(depths) => depths.last().and_then(|d| d.first().copied()),
                Err(_) => fields
                    .get("transformer_layers_per_block")
                    .and_then(Value::as_array)
                    .and_then(|list| list.last()?.as_array()?.first()?.as_u64())
                    .and_then(|n| usize::try_from(n).ok()),
            };
            Ok(Mid::Attention {
                depth: depth.unwrap_or(1),
            })
        }
        "UNetMidBlock2D" => Ok(Mid::Resnet),
        other => Err(not_built("mid_block_type", other)),
    }
}
