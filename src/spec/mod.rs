//! What a checkpoint is to the pipeline: the structure of its networks, where their tensors lie, how it samples, and its defaults.
//! Presets are in `table.rs`.

mod autoencoder;
mod control;
mod image_prompt;
mod single;
mod table;
mod text;

use std::sync::Arc;

use serde_json::Value;

use crate::checkpoint::{self, Checkpoint, Detection, Family, Noise, TensorSet};
use crate::error::{Error, Result};
use crate::sampling::{Class, Flow, NoiseSchedule, Prediction, SchedulerConfig};
use crate::weights::Layout;
use autoencoder::Autoencoder;
pub(crate) use autoencoder::SINGLE_VAE;
pub use control::{CONTROL, ControlSpec};
pub use image_prompt::{IMAGE_ENCODER, ImagePromptSpec};
use sd_models::config::ConfigResult;
use sd_models::vae::TinyConfig;
use sd_models::{clip, denoiser, unet, vae};
pub(crate) use single::{SINGLE_UNET, difference, layouts, unet_difference};
pub(crate) use table::betas;
pub use table::{Defaults, Pad, Rgb, T5Role, TowerRole, native_size, t5_length, towers};
use table::{FlowLevels, NORMALISED_FACTOR, NORMALISED_RGB, Row, row};
pub use text::T5Tower;

/// Everything about a model that is known before a tensor is read.
pub struct ModelSpec {
    /// The family.
    pub family: Family,
    /// What the denoising network predicts.
    pub prediction: Prediction,
    /// The denoising network.
    pub unet: Component<denoiser::Config>,
    /// The autoencoder.
    pub vae: Component<vae::Config>,
    /// A tiny decoder that takes its decoder's place.
    pub tiny: Option<Component<TinyConfig>>,
    /// The autoencoder or decoder is not the checkpoint's own.
    pub other_vae: bool,
    /// The CLIP towers, whose states stand side by side; at least one.
    pub text: Vec<TextTower>,
    /// T5, whose states stand behind theirs.
    pub t5: Option<T5Tower>,
    /// States of T5 that are zeros, where a family has one and the model has not.
    pub without_t5: Option<usize>,
    /// Names of the text towers that are not the checkpoint's own.
    pub other_text: Vec<&'static str>,
    /// The folder's own sampler, or that which folders of the family have; none for single files of models with betas.
    pub scheduler: Option<SchedulerConfig>,
    /// The noise levels of runs by a sampler's name.
    pub levels: NoiseSchedule,
    /// Without a negative prompt the network is given zeros in its place, not the states of an empty text.
    pub zero_negative: bool,
    /// The latents of a picture that an instruction changes are scaled as all others are (CosXL), and not as the encoder leaves them.
    pub scales_instructions: bool,
    /// The noise that a picture is given which the network enlarges, by timestep; none for all other networks.
    pub low_res: Option<NoiseSchedule>,
    /// The network was trained to look at a picture's latents behind its own (FLUX.1 Kontext); only names tell.
    pub looks_at_pictures: bool,
    /// What is used when the user does not say.
    pub defaults: Defaults,
}

/// Files beside a checkpoint that hold parts of the model.
#[derive(Clone, Copy, Default)]
pub struct Others<'a> {
    /// An autoencoder, or a tiny decoder, in the place of its own.
    pub vae: Option<&'a Checkpoint>,
    /// Text encoders in the place of its own.
    pub text: &'a [Checkpoint],
    /// Tokens that T5 reads, in the place of the family's number.
    pub t5_length: Option<usize>,
}

/// A text tower and how it is read.
pub struct TextTower {
    /// Structure and tensors.
    pub component: Component<clip::Config>,
    /// What the family does with it.
    pub role: TowerRole,
}

/// One network of a model: its structure, and its tensors under the names that the file gives them.
pub struct Component<C> {
    /// The structure.
    pub config: C,
    /// The file or files.
    pub tensors: Arc<TensorSet>,
    /// Canonical names → names in the file.
    pub layout: Layout,
}

impl ModelSpec {
    /// Reads structures and names of a checkpoint of a supported family.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other families, by name; [`Error::BadModel`] when a component or a config is broken.
    pub fn read(checkpoint: &Checkpoint, detection: &Detection) -> Result<Self> {
        Self::read_with(checkpoint, detection, Others::default())
    }

    /// The same with parts of other files.
    ///
    /// # Errors
    /// As [`ModelSpec::read`].
    pub fn read_with(
        checkpoint: &Checkpoint,
        detection: &Detection,
        others: Others<'_>,
    ) -> Result<Self> {
        let mut detection = detection.clone();
        let vae = others.vae;
        if vae.is_some() {
            detection.missing.retain(|name| *name != "vae");
        }
        if let Some(row) = row(detection.family) {
            let given = text::given(row, others.text)?;
            detection.missing.retain(|name| !given.contains(name));
        }
        if let Some(refusal) = detection.refusal() {
            return Err(Error::Unsupported(format!(
                "{}: {refusal}",
                checkpoint.path().display()
            )));
        }
        Self::read_any(checkpoint, &detection, others)
    }

    /// The same of models that need more than a text, such as those for inpainting: nothing is refused but what is not there.
    ///
    /// # Errors
    /// [`Error::BadModel`] when a component is missing or broken, or the family has no components that are known.
    pub fn read_any(
        checkpoint: &Checkpoint,
        detection: &Detection,
        others: Others<'_>,
    ) -> Result<Self> {
        let vae = others.vae;
        let Some(row) = row(detection.family) else {
            let reason = format!("this is {}, whose parts are not known", detection.title());
            return Err(Error::bad_model(checkpoint.path(), reason));
        };
        let factors = (row.scaling_factor, row.shift_factor);
        let other = match vae {
            Some(vae) => Some(autoencoder::of_another(vae, factors)?),
            None => None,
        };
        let (full, tiny) = match other {
            Some(Autoencoder::Full(vae)) => (Some(vae), None),
            Some(Autoencoder::Tiny(tiny)) => (None, Some(tiny)),
            None => (None, None),
        };
        let mut spec = if checkpoint.is_folder() {
            Self::from_folder(checkpoint, detection, (row, others), full)?
        } else {
            Self::from_single_file(checkpoint, detection, (row, others), full)?
        };
        spec.set_t5_length(others.t5_length)?;
        spec.other_vae = vae.is_some();
        spec.tiny = tiny;
        spec.check_latents(checkpoint)?;
        Ok(spec)
    }

    /// What the model's latents look like; none where nobody knows.
    pub fn rgb(&self) -> Option<Rgb> {
        let (rgb, _) = row(self.family)?.rgb;
        let rgb = match self.vae.config.spread {
            Some(_) => NORMALISED_RGB,
            None => rgb,
        };
        (rgb.factors.len() == self.vae.config.latent_channels).then_some(rgb)
    }

    /// What a tiny decoder of the model's latents is called in models folders.
    pub fn tiny_name(&self) -> Option<&'static str> {
        row(self.family).map(|row| row.rgb.1)
    }

    /// The UNet's latents are the autoencoder's.
    fn check_latents(&self, checkpoint: &Checkpoint) -> Result<()> {
        let wanted = self.unet.config.out_channels();
        let got = match &self.tiny {
            Some(tiny) => tiny.config.latent_channels,
            None => self.vae.config.latent_channels,
        };
        if got == wanted {
            return Ok(());
        }
        let owner = if self.other_vae {
            "--vae"
        } else {
            "its autoencoder"
        };
        Err(Error::bad_model(
            checkpoint.path(),
            format!(
                "the UNet makes latents of {wanted} channels, and {owner} decodes {got}; they are not of one kind"
            ),
        ))
    }

    fn from_folder(
        checkpoint: &Checkpoint,
        detection: &Detection,
        (row, others): (&Row, Others<'_>),
        vae: Option<Component<vae::Config>>,
    ) -> Result<Self> {
        let scheduler = match checkpoint.config("scheduler") {
            Some(value) => {
                let config = SchedulerConfig::from_json(value).map_err(|e| {
                    Error::bad_model(checkpoint.path().join("scheduler"), e.to_string())
                })?;
                Some(match row.corrects_scheduler {
                    true => config.corrected_for_stable_diffusion(),
                    false => config,
                })
            }
            None => None,
        };
        let unet = folder_component(checkpoint, row.network.component(), |value| {
            row.network.config(value)
        })?;
        let mut vae = match vae {
            Some(vae) => vae,
            None => autoencoder::of_folder(checkpoint)?,
        };
        if row.enlarges {
            // diffusers' pipeline does not believe what old configs say
            vae.config.scaling_factor = row.scaling_factor;
        }
        let text = text::read(checkpoint, row, others.text)?;
        let (prediction, levels) = trained(scheduler.as_ref(), row.flow_of(&unet.config));
        let mut defaults = row.defaults_of(&unet.config, prediction, detection.distilled);
        let zero_negative = checkpoint
            .model_index()
            .and_then(|index| index.get("force_zeros_for_empty_prompt")?.as_bool())
            .unwrap_or(row.zero_negative);
        let sample_size = checkpoint
            .config(row.network.component())
            .and_then(|c| c.get("sample_size"))
            .and_then(Value::as_u64);
        if let Some(size) = sample_size
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| (1..=1024).contains(n))
        {
            defaults.size = size * vae.config.scale();
        }
        defaults.amend(checkpoint.defaults());
        Self {
            family: detection.family,
            prediction,
            unet,
            vae,
            tiny: None,
            other_vae: false,
            without_t5: row.t5.filter(|_| text.t5.is_none()).map(|role| role.length),
            text: text.towers,
            t5: text.t5,
            other_text: text.others,
            scheduler,
            levels,
            zero_negative,
            low_res: low_res(checkpoint, row)?,
            looks_at_pictures: is_kontext(checkpoint, row),
            scales_instructions: checkpoint
                .model_index()
                .and_then(|index| index.get("is_cosxl_edit")?.as_bool())
                .unwrap_or(false),
            defaults,
        }
        .check_vector(checkpoint)
    }

    fn from_single_file(
        checkpoint: &Checkpoint,
        detection: &Detection,
        (row, others): (&Row, Others<'_>),
        vae: Option<Component<vae::Config>>,
    ) -> Result<Self> {
        let tensors = checkpoint
            .single()
            .ok_or_else(|| Error::bad_model(checkpoint.path(), "the file holds no tensors"))?;
        let unet = single_network(checkpoint, row, &tensors)?;
        let mut vae = match vae {
            Some(vae) => vae,
            None => {
                let factors = (row.scaling_factor, row.shift_factor);
                autoencoder::of_single(checkpoint, &tensors, factors)?
            }
        };
        let text = text::read(checkpoint, row, others.text)?;
        let flow = row.flow_of(&unet.config);
        let prediction = match detection.prediction {
            _ if flow.is_some() => Prediction::Flow,
            Some(checkpoint::Prediction::V) => Prediction::V,
            Some(checkpoint::Prediction::Sample) => Prediction::Sample,
            Some(checkpoint::Prediction::Edm) => Prediction::Edm,
            Some(checkpoint::Prediction::Epsilon) | None => Prediction::Epsilon,
        };
        let levels = match &detection.noise {
            Noise::Betas => match flow {
                Some(flow) => NoiseSchedule::flow(flow.shift, flow.levels),
                None if row.enlarges => NoiseSchedule::new(&scaled_linear(row.betas)),
                None => NoiseSchedule::default(),
            },
            Noise::ZeroSnr => NoiseSchedule::new(&SchedulerConfig {
                class_name: "EulerDiscreteScheduler".to_owned(),
                rescale_betas_zero_snr: true,
                ..SchedulerConfig::default()
            }),
            Noise::Continuous { range, data, .. } => {
                NoiseSchedule::continuous(range.0, range.1, *data)
            }
        };
        let defaults = row.defaults_of(&unet.config, prediction, detection.distilled);
        let scheduler = row.scheduler_of(&unet.config);
        let scheduler = scheduler
            .map(|value| SchedulerConfig::from_json(&value))
            .transpose()?;
        if let Noise::Continuous {
            spread: Some((mean, deviation)),
            ..
        } = &detection.noise
            && mean.len() == vae.config.latent_channels
        {
            vae.config.scaling_factor = NORMALISED_FACTOR;
            vae.config.spread = Some(vae::Spread {
                mean: mean.clone(),
                deviation: deviation.clone(),
            });
        }
        Self {
            family: detection.family,
            prediction,
            unet,
            vae,
            tiny: None,
            other_vae: false,
            without_t5: row.t5.filter(|_| text.t5.is_none()).map(|role| role.length),
            text: text.towers,
            t5: text.t5,
            other_text: text.others,
            scheduler,
            levels,
            zero_negative: row.zero_negative,
            low_res: low_res(checkpoint, row)?,
            looks_at_pictures: is_kontext(checkpoint, row),
            scales_instructions: prediction == Prediction::Edm,
            defaults,
        }
        .check_vector(checkpoint)
    }

    /// Another length of T5's texts than the family's.
    fn set_t5_length(&mut self, length: Option<usize>) -> Result<()> {
        /// No model was trained on more.
        const MOST: usize = 512;
        let Some(length) = length else {
            return Ok(());
        };
        if !(1..=MOST).contains(&length) {
            return Err(Error::Usage(format!(
                "--t5-length is {length}, expected 1 to {MOST}"
            )));
        }
        match (&mut self.t5, &mut self.without_t5) {
            (Some(t5), _) => t5.role.length = length,
            (None, Some(zeros)) => *zeros = length,
            (None, None) => {
                return Err(Error::Usage(
                    "--t5-length is for models with T5, Stable Diffusion 3 and FLUX; leave it out"
                        .to_owned(),
                ));
            }
        }
        Ok(())
    }

    /// The structure of its UNet.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it has a transformer in the UNet's place.
    pub(crate) fn unet_config(&self) -> Result<&unet::Config> {
        self.unet.config.unet().ok_or_else(|| {
            Error::Unsupported(format!(
                "this is {}: folders and single files of models with a transformer are not converted into each other, nor merged, yet",
                self.family.phrase()
            ))
        })
    }

    /// What diffusers' pipeline of a flow model tells its scheduler for latents of `size` (width, height); none for models with betas.
    pub fn flow(&self, (width, height): (usize, usize)) -> Option<Flow> {
        let patch = self.unet.config.patch();
        let patches = (width / patch).saturating_mul(height / patch);
        let gives_levels = match self.unet.config {
            denoiser::Config::UNet(_) => return None,
            denoiser::Config::Mmdit(_) => false,
            denoiser::Config::Flux(_) => true,
        };
        Some(Flow {
            patches,
            gives_levels,
        })
    }

    /// Tokens of a short text's states, of all towers behind each other.
    pub fn tokens(&self) -> usize {
        let beside = self.text.iter().find(|tower| tower.role.states);
        let beside = beside.map_or(0, |tower| tower.component.config.positions);
        let t5 = self.t5.as_ref().map(|t5| t5.role.length);
        beside + t5.or(self.without_t5).unwrap_or(0)
    }

    /// The denoising network's name in folders.
    pub fn network(&self) -> &'static str {
        match self.unet.config {
            denoiser::Config::UNet(_) => "unet",
            _ => "transformer",
        }
    }

    /// Where a single file keeps the text towers in whose place others are.
    pub(crate) fn replaced_text(&self) -> Vec<&'static str> {
        let towers = self
            .text
            .iter()
            .map(|tower| (tower.role.component, tower.role.prefix));
        let t5 = self.t5.iter().map(|t5| (t5.role.component, t5.role.prefix));
        let all = towers.chain(t5);
        all.filter(|(component, _)| self.other_text.contains(component))
            .map(|(_, prefix)| prefix)
            .collect()
    }

    /// Width of the whole text's vector that the network is given: those of all towers that give one.
    pub fn pooled_width(&self) -> usize {
        let towers = self.text.iter().filter(|tower| tower.role.pooled);
        let widths = towers.map(|tower| {
            let config = &tower.component.config;
            config.projection.unwrap_or(config.width)
        });
        widths.fold(0, usize::saturating_add)
    }

    /// The text's vector and states are as wide as the transformer wants them.
    fn check_pooled(self, checkpoint: &Checkpoint) -> Result<Self> {
        let Some(wanted) = self.unet.config.added_width() else {
            return Ok(self);
        };
        let states = self.text.iter().filter(|tower| tower.role.states);
        let widths = states.map(|tower| tower.component.config.width);
        let beside = widths.fold(0, usize::saturating_add);
        let context = self.unet.config.context_width();
        let t5 = self
            .t5
            .as_ref()
            .map_or(context, |t5| t5.component.config.width);
        let pooled = self.pooled_width();
        if pooled == wanted && beside <= context && t5 == context {
            return Ok(self);
        }
        Err(Error::bad_model(
            checkpoint.path(),
            format!(
                "the transformer reads states {context} wide and a vector of {wanted} numbers; CLIP gives {beside} and {pooled}, T5 {t5}; transformer and text encoders are not of one model"
            ),
        ))
    }

    /// The numbers that follow the whole text's vector: six (original size, crop, target size) or five (an aesthetic score in the target's
    /// place); none where the UNet takes no vector.
    pub fn numbers(&self) -> usize {
        let Some(added) = self.unet.config.unet().and_then(|unet| unet.added) else {
            return 0;
        };
        added.input.saturating_sub(self.pooled_width()) / added.number.max(1)
    }

    fn check_vector(mut self, checkpoint: &Checkpoint) -> Result<Self> {
        let pooled = self.pooled_width();
        let denoiser::Config::UNet(unet::Config {
            added: Some(added), ..
        }) = &mut self.unet.config
        else {
            return self.check_pooled(checkpoint);
        };
        let rest = added.input.saturating_sub(pooled);
        let wanted = if self.family == Family::SdxlRefiner {
            5
        } else {
            6
        };
        if rest == 0
            || rest % wanted != 0
            || (checkpoint.is_folder() && rest / wanted != added.number)
        {
            return Err(Error::bad_model(
                checkpoint.path(),
                format!(
                    "the UNet takes a vector of {} numbers beside the time, and a text's {pooled} with {wanted} sizes do not make that; UNet and text encoders are not of one model",
                    added.input
                ),
            ));
        }
        added.number = rest / wanted;
        Ok(self)
    }
}

/// The denoising network of a single file.
fn single_network(
    checkpoint: &Checkpoint,
    row: &Row,
    tensors: &Arc<TensorSet>,
) -> Result<Component<denoiser::Config>> {
    let shapes = |name: &str| tensors.info(name).map(|info| info.shape.clone());
    let mut first = None;
    for prefix in checkpoint::NETWORK_PREFIXES {
        match row.network.read(prefix.trim_end_matches('.'), &shapes) {
            Ok((config, layout)) => return Ok(Component::new(config, tensors, layout)),
            Err(reason) => first = first.or(Some(reason)),
        }
    }
    Err(Error::bad_model(
        checkpoint.path(),
        first.unwrap_or_default(),
    ))
}

/// What a folder's network predicts and the noise levels of runs by name. Where the betas are the usual ones, a folder and a single file of the
/// same model run alike, to the last bit.
fn trained(
    scheduler: Option<&SchedulerConfig>,
    flow: Option<FlowLevels>,
) -> (Prediction, NoiseSchedule) {
    let config = match (scheduler, flow) {
        (Some(config), Some(_)) if config.is_flow() => config,
        (_, Some(flow)) => {
            let levels = NoiseSchedule::flow(flow.shift, flow.levels);
            return (Prediction::Flow, levels);
        }
        (None, None) => return (Prediction::Epsilon, NoiseSchedule::default()),
        (Some(config), None) => config,
    };
    if matches!(config.class(), Class::EdmEuler | Class::EdmDpmMultistep) {
        let (min, max) = config.edm_range();
        let prediction = match config.prediction {
            Prediction::Epsilon => Prediction::Edm,
            other => other,
        };
        let levels = NoiseSchedule::continuous(min, max, config.sigma_data);
        return (prediction, levels);
    }
    let levels = if config.has_standard_betas() {
        NoiseSchedule::default()
    } else {
        NoiseSchedule::new(config)
    };
    (config.prediction, levels)
}

/// The noise of pictures that are enlarged: the folder's own, or that of the family's training.
fn low_res(checkpoint: &Checkpoint, row: &Row) -> Result<Option<NoiseSchedule>> {
    if !row.enlarges {
        return Ok(None);
    }
    let config = match checkpoint.config("low_res_scheduler") {
        Some(value) => SchedulerConfig::from_json(value).map_err(|e| {
            Error::bad_model(checkpoint.path().join("low_res_scheduler"), e.to_string())
        })?,
        None => scaled_linear(row.betas),
    };
    Ok(Some(NoiseSchedule::new(&config)))
}

/// Betas whose roots are even.
fn scaled_linear((beta_start, beta_end): (f64, f64)) -> SchedulerConfig {
    SchedulerConfig {
        class_name: "DDIMScheduler".to_owned(),
        beta_start,
        beta_end,
        ..SchedulerConfig::default()
    }
}

/// Whether the model calls itself Kontext: its folder's pipeline, or its file's name. Its tensors are those of FLUX.1 dev.
fn is_kontext(checkpoint: &Checkpoint, row: &Row) -> bool {
    let class = checkpoint
        .model_index()
        .and_then(|index| index.get("_class_name")?.as_str());
    let name = checkpoint.path().file_name().unwrap_or_default();
    let named = name.to_string_lossy().to_ascii_lowercase();
    row.is_flux() && (class.is_some_and(|c| c.contains("Kontext")) || named.contains("kontext"))
}

/// The tiny decoder in a file or folder of one.
///
/// # Errors
/// [`Error::BadModel`] when it holds none.
pub fn tiny_decoder(checkpoint: &Checkpoint) -> Result<Component<TinyConfig>> {
    match autoencoder::of_another(checkpoint, (1.0, 0.0))? {
        Autoencoder::Tiny(tiny) => Ok(tiny),
        Autoencoder::Full(_) => Err(Error::bad_model(
            checkpoint.path(),
            "this is a whole autoencoder, which is too slow for previews; give --preview-vae a TAESD",
        )),
    }
}

impl<C> Component<C> {
    fn new(config: C, tensors: &Arc<TensorSet>, layout: Layout) -> Self {
        Self {
            config,
            tensors: Arc::clone(tensors),
            layout,
        }
    }
}

impl Defaults {
    /// Takes over what a folder's `sd-rs.json` says: `steps` and `cfg_scale`.
    fn amend(&mut self, file: Option<&Value>) {
        let Some(file) = file else { return };
        let steps = file
            .get("steps")
            .and_then(Value::as_u64)
            .and_then(|n| usize::try_from(n).ok());
        if let Some(steps) = steps.filter(|n| (1..=1000).contains(n)) {
            self.steps = steps;
        }
        if let Some(cfg_scale) = file.get("cfg_scale").and_then(Value::as_f64) {
            self.cfg_scale = cfg_scale;
        }
    }
}

fn folder_component<C>(
    checkpoint: &Checkpoint,
    name: &str,
    parse: impl Fn(&Value) -> ConfigResult<C>,
) -> Result<Component<C>> {
    let path = checkpoint.path().join(name);
    let tensors = checkpoint
        .tensors(name)
        .ok_or_else(|| Error::bad_model(&path, "the folder has no tensors of this component"))?;
    let config = checkpoint
        .config(name)
        .ok_or_else(|| Error::bad_model(path.join("config.json"), "the file is missing"))?;
    let config =
        parse(config).map_err(|e| Error::bad_model(path.join("config.json"), e.to_string()))?;
    Ok(Component::new(config, &tensors, Layout::identity("")))
}
