//! From a request to pictures: texts are encoded, noise is drawn, denoised step by step, decoded.

mod adapted;
mod asks;
mod batch;
mod begin;
mod conditions;
mod control;
mod coverage;
mod decode;
mod denoise;
mod event;
mod extend;
mod guidance;
mod hires;
mod image_prompt;
mod kept;
mod known;
mod learned;
mod memory;
mod networks;
mod plan;
mod preview;
mod redraw;
mod regions;
mod relay;
mod request;
mod resize;
mod scene;
mod shortcuts;
mod sizes;
mod source;
mod tiling;
mod tower;

pub use adapted::bind_adapters;
pub use batch::{Batch, Picture, Timings};
pub use begin::Role;
pub use conditions::{Conditions, Given, Told};
pub use control::{ControlMode, ControlRequest};
pub use coverage::Coverage;
pub use event::{Control, Event, Listener};
pub use extend::{Extend, ExtendFill, Margins};
pub use guidance::{
    FreeU, FreeUVersion, Guidance, Measure, Mimic, Perturbed, Projected, Rule, ScaleSchedule,
    ScaleShape, SkipLayers,
};
pub use hires::{Hires, HiresSize, SecondPass, Upscaler};
pub use image_prompt::ImageRequest;
pub use networks::{Configs, Need, Networks, Posterior};
pub use plan::Plan;
pub use preview::{Preview, PreviewKind};
pub use redraw::{Redraw, Redrawn, TileGrid, TileListener};
pub use regions::{Place, Region, Regions};
pub use request::{Request, Rng};
pub use scene::Scene;
pub use sd_models::variant::Merging;
pub use shortcuts::{Gate, Shortcuts};
pub use sizes::SizeConditioning;
pub use source::{Edges, Fill, Fit, IMAGE_CFG_SCALE, Masking, NOISE_LEVEL, Source, Whose};
pub use tiling::{Surface, TileNorm, Tiling, TilingMode, Watch};
pub use tower::LoadedTower;

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};

use crate::adapters::Adapters;
use crate::checkpoint::{self, Checkpoint};
use crate::error::{Error, Result};
use crate::spec::{ControlSpec, ImagePromptSpec, ModelSpec, Others};
use crate::text::{
    self, Behind, Conditioning, Encoded, LongSpeaker, LongTower, Readers, Speaker, Texts,
    Tokenizers,
};
use asks::{Ask, Text};
use batch::Pass;
use image_prompt::ImageTokens;
use networks::Denoiser;
use preview::{Previewer, TinyPreview};

/// A loaded model.
pub struct Engine {
    spec: ModelSpec,
    tokenizers: Tokenizers,
    networks: Networks,
    load_time: Duration,
    warnings: Vec<String>,
    refiner: Option<Refiner>,
    /// What enlarges pictures for second passes.
    enlarger: Option<crate::upscale::Upscaler>,
    tiny: Option<TinyPreview>,
}

/// A second model that takes over where little noise is left (Podell et al., "SDXL", arXiv 2307.01952, section 2.5; Balaji et al., eDiff-I,
/// arXiv 2211.01324).
struct Refiner {
    engine: Box<Engine>,
    /// The part of the noise levels that is the first model's, 0 to 1.
    switch: f64,
}

/// What a model read of all texts.
struct Encodings {
    conditioning: Conditioning,
    /// Of each region.
    regions: Vec<Encoded>,
    /// Of the empty text, where guidance wants it.
    empty: Option<Encoded>,
}

impl Encodings {
    fn get(&self, text: Text) -> Result<&Encoded> {
        let found = match text {
            Text::Negative | Text::Unseen => Some(self.conditioning.negative()),
            Text::Prompt => Some(self.conditioning.prompt()),
            Text::Region(index) => self.regions.get(index),
            Text::Empty => self.empty.as_ref(),
        };
        found.ok_or_else(|| Error::Numeric("a text was not encoded".to_owned()))
    }
}

impl Engine {
    /// Loads every network of a checkpoint.
    ///
    /// # Errors
    /// When the family is not supported, something is missing, or a file cannot be read.
    pub fn load(checkpoint: &Checkpoint, device: &Device, dtype: DType) -> Result<Self> {
        Self::load_with(checkpoint, Others::default(), device, dtype)
    }

    /// The same with parts of other files.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn load_with(
        checkpoint: &Checkpoint,
        others: Others<'_>,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        Self::load_adapted(checkpoint, others, &Adapters::default(), device, dtype)
    }

    /// The same with adapters on its networks.
    ///
    /// # Errors
    /// As [`Engine::load`]; [`Error::BadModel`] when an adapter does not fit the model.
    pub fn load_adapted(
        checkpoint: &Checkpoint,
        others: Others<'_>,
        adapters: &Adapters,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let start = Instant::now();
        let detection = checkpoint::detect(checkpoint);
        let spec = ModelSpec::read_with(checkpoint, &detection, others)?;
        let tokenizers = text::tokenizers_for(checkpoint, &spec)?;
        let (networks, coverage) =
            Networks::load_adapted(checkpoint, &spec, adapters, device, dtype)?;
        let mut warnings = checkpoint.warnings().to_vec();
        warnings.extend(coverage.warning(checkpoint));
        warnings.extend(networks.adapters().warnings().iter().cloned());
        Ok(Self {
            spec,
            tokenizers,
            networks,
            load_time: start.elapsed(),
            warnings,
            refiner: None,
            enlarger: None,
            tiny: None,
        })
    }

    /// Lets another model finish pictures: it takes over when the part `switch` of the training's noise levels is behind, as diffusers' ensemble
    /// of experts and A1111's refiner do.
    ///
    /// # Errors
    /// [`Error::Usage`] when `switch` is out of range or the models do not share latents and prediction.
    pub fn with_refiner(mut self, refiner: Self, switch: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&switch) {
            return Err(Error::Usage(format!(
                "--refiner-switch is {switch}, expected 0 to 1"
            )));
        }
        let traits = |engine: &Self| {
            let spec = &engine.spec;
            let channels = (
                spec.vae.config.latent_channels,
                spec.unet.config.in_channels(),
            );
            (channels, spec.vae.config.scale(), spec.prediction)
        };
        if traits(&self) != traits(&refiner) {
            return Err(Error::Usage(
                "--refiner is a model of other latents or another kind of prediction than --model; give one that was made for it".to_owned(),
            ));
        }
        self.load_time += refiner.load_time;
        self.warnings.extend(refiner.warnings.iter().cloned());
        self.refiner = Some(Refiner {
            engine: Box::new(refiner),
            switch,
        });
        Ok(self)
    }

    /// Adds networks that steer this model's UNet by pictures, behind those that it has.
    ///
    /// # Errors
    /// When a file is none, or was made for another family.
    pub fn with_controls<'a>(
        mut self,
        controls: impl IntoIterator<Item = &'a Checkpoint>,
    ) -> Result<Self> {
        let start = Instant::now();
        let scale = self.spec.vae.config.scale();
        for checkpoint in controls {
            let unet = self.spec.unet.config.unet().ok_or_else(|| {
                Error::Unsupported(format!(
                    "--controlnet steers a UNet, and this is {}, which has a transformer; models of Stable Diffusion 1, 2 and XL take it",
                    self.spec.family.phrase()
                ))
            })?;
            let control = ControlSpec::read(checkpoint, unet)?;
            let added = self.networks.add_control(&control, scale);
            added.map_err(|e| match e {
                Error::Weights(reason) | Error::Usage(reason) => {
                    Error::bad_model(checkpoint.path(), reason)
                }
                other => other,
            })?;
            self.warnings.extend(checkpoint.warnings().iter().cloned());
            let loaded = self.networks.controls().last();
            let left = loaded.and_then(|control| coverage::unused(checkpoint, control.unused()));
            self.warnings.extend(left);
        }
        self.load_time += start.elapsed();
        Ok(self)
    }

    /// Adds IP-Adapters, each with the picture tower that it reads, behind those that it has.
    ///
    /// # Errors
    /// When a file is none, or was made for another family.
    pub fn with_image_prompts<'a>(
        mut self,
        adapters: impl IntoIterator<Item = &'a [Checkpoint; 2]>,
    ) -> Result<Self> {
        let start = Instant::now();
        for [adapter, encoder] in adapters {
            let spec = ImagePromptSpec::read(adapter, encoder)?;
            let added = self.networks.add_image_prompt(&spec);
            added.map_err(|e| match e {
                Error::Weights(reason) | Error::Usage(reason) => {
                    Error::bad_model(adapter.path(), reason)
                }
                other => other,
            })?;
        }
        self.load_time += start.elapsed();
        Ok(self)
    }

    /// Takes a network that enlarges pictures, for second passes.
    #[must_use]
    pub fn with_upscaler(mut self, upscaler: crate::upscale::Upscaler) -> Self {
        self.enlarger = Some(upscaler);
        self
    }

    /// Takes a TAESD, which makes the previews that [`PreviewKind::Tiny`] asks for.
    ///
    /// # Errors
    /// [`Error::BadModel`] when the checkpoint holds none of this model's latents.
    pub fn with_preview_decoder(mut self, checkpoint: &Checkpoint) -> Result<Self> {
        self.tiny = Some(TinyPreview::open(checkpoint, &self.spec)?);
        Ok(self)
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The networks.
    pub fn networks(&self) -> &Networks {
        &self.networks
    }

    /// Its own and its refiner's.
    fn all_networks(&self) -> Vec<&Networks> {
        let refiner = self.refiner.iter().map(|refiner| &refiner.engine.networks);
        std::iter::once(&self.networks).chain(refiner).collect()
    }

    /// How long loading took.
    pub fn load_time(&self) -> Duration {
        self.load_time
    }

    /// Notices from loading.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Runs a plan; `finish` receives every batch as soon as it is done.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when the listener says so; [`Error::Numeric`] when the arithmetic leaves the numbers; whatever
    /// `finish` gives.
    pub fn generate(
        &self,
        request: &Request,
        plan: &Plan,
        listener: &mut Listener<'_>,
        finish: &mut dyn FnMut(Batch) -> Result<()>,
    ) -> Result<()> {
        for warning in self.warnings.iter().chain(&plan.warnings) {
            event::send(listener, Event::Warning(warning.clone()))?;
        }
        let start = Instant::now();
        let mut encodings = vec![self.encode_all(request, plan)?];
        if let Some(refiner) = &self.refiner {
            encodings.push(refiner.engine.encode_all(request, plan)?);
        }
        let images = self.networks.image_prompts().iter().zip(&request.images);
        let images = images
            .enumerate()
            .map(|(i, (adapter, wanted))| adapter.encode(i, wanted, self.networks.device()));
        let images: Vec<ImageTokens> = images.collect::<Result<_>>()?;
        let text_time = start.elapsed();
        let warnings = encodings.first();
        let warnings = warnings.map(|first| first.conditioning.warnings.clone());
        for warning in warnings.unwrap_or_default() {
            event::send(listener, Event::Warning(warning))?;
        }
        event::send(listener, Event::Encoded)?;
        let source = request.source.as_ref();
        let previewer = request.preview.map(|preview| Previewer {
            preview,
            rgb: self.spec.rgb(),
            tiny: self.tiny.as_ref(),
        });
        for index in 0..plan.count {
            let pass = Pass {
                plan,
                encodings: &encodings,
                images: &images,
                progress: (index * plan.all_steps(), plan.count * plan.all_steps()),
                previewer: previewer.as_ref(),
            };
            let mut batch = self.batch((&pass, source), index, listener)?;
            batch.timings.text = text_time;
            finish(batch)?;
        }
        Ok(())
    }

    /// All texts as this model reads them.
    fn encode_all(&self, request: &Request, plan: &Plan) -> Result<Encodings> {
        // each alone: they need not be as long as the prompt
        let alone = |text: &str| -> Result<Encoded> {
            let texts = Texts {
                prompt: text,
                negative: None,
                syntax: request.prompt_syntax,
                clip_skip: plan.clip_skip,
            };
            Ok(text::encode(&self.readers(), texts)?.prompt().clone())
        };
        let regions = request.regions.list.iter();
        let wants_empty = matches!(plan.guidance.rule, Rule::Perpendicular { .. });
        Ok(Encodings {
            conditioning: self.encode(request, plan)?,
            regions: regions
                .map(|region| alone(&region.prompt))
                .collect::<Result<_>>()?,
            empty: match wants_empty && plan.is_guided() {
                true => Some(alone("")?),
                false => None,
            },
        })
    }

    /// Prompt and negative prompt as this model reads them.
    fn encode(&self, request: &Request, plan: &Plan) -> Result<Conditioning> {
        // T5 is the larger part of the work: nobody reads what it says of a negative prompt that has no say
        let unheard = self.networks.t5().is_some() && !plan.is_guided();
        text::encode(
            &self.readers(),
            Texts {
                prompt: &request.prompt,
                negative: match &request.negative_prompt {
                    _ if unheard => None,
                    Some(text) => Some(text),
                    None if self.spec.zero_negative => None,
                    None => Some(""),
                },
                syntax: request.prompt_syntax,
                clip_skip: plan.clip_skip,
            },
        )
    }

    /// Makes this model's network ready for a batch of `size`, to be asked at these times.
    fn denoiser(
        &self,
        plan: &Plan,
        (size, ask): ([usize; 4], &Ask),
        (encodings, given, images, seen): (&Encodings, &Given, &[ImageTokens], Vec<Tensor>),
        timesteps: &[f64],
    ) -> Result<Denoiser<'_>> {
        let [negative, positive] = plan.numbers(&self.spec);
        let told = ask.texts.iter().map(|text| match ask.as_negative {
            true => &Text::Negative,
            false => text,
        });
        let texts = told.map(|text| {
            let numbers = match text {
                Text::Negative | Text::Unseen => negative.as_slice(),
                Text::Prompt | Text::Region(_) | Text::Empty => positive.as_slice(),
            };
            Ok(Told {
                text: encodings.get(*text)?,
                numbers,
                unseen: *text == Text::Unseen,
            })
        });
        let texts = texts.collect::<Result<Vec<_>>>()?;
        let (n, scale) = (plan.batch_size, plan.cfg_scale);
        let mut conditions =
            Conditions::of_texts(&self.spec.unet.config, &texts, (n, scale), given)?;
        let prompted: Vec<bool> = ask.texts.iter().map(|text| text.is_positive()).collect();
        let images = images.iter().map(|image| image.for_texts(n, &prompted));
        conditions.images = images.collect::<Result<_>>()?;
        conditions.seen = seen;
        let acting = plan.controls.iter().zip(&ask.acting);
        let acting = acting.filter(|(_, acts)| **acts);
        conditions.controls = acting.map(|(planned, _)| planned.acting.clone()).collect();
        self.networks.denoiser(
            size,
            &conditions,
            timesteps,
            (&ask.variant, plan.surface.wrap),
        )
    }

    /// The refiner's turn begins at diffusers' cut in timesteps; A1111 rounds a fractional one.
    fn is_refiners(&self, timestep: f64) -> bool {
        let Some(refiner) = &self.refiner else {
            return false;
        };
        let last = self.spec.levels.len() as f64;
        timestep.round() < (last * (1.0 - refiner.switch)).round()
    }

    /// Itself at turn 0, its refiner behind it.
    fn by_turn(&self, turn: usize) -> &Self {
        match (&self.refiner, turn) {
            (Some(refiner), 1) => &refiner.engine,
            _ => self,
        }
    }

    /// Everybody who reads this model's texts.
    pub fn readers(&self) -> Readers<'_> {
        let towers = self.networks.towers().iter();
        let towers = towers.zip(&self.tokenizers.clip).zip(&self.spec.text).map(
            |((tower, tokenizer), spec)| Speaker {
                tower,
                tokenizer,
                role: spec.role,
            },
        );
        let t5 = self.networks.t5().zip(self.tokenizers.t5.as_ref());
        let behind = match (t5, &self.spec.t5, self.spec.without_t5) {
            (Some((tower, tokenizer)), Some(t5), _) => Behind::T5(LongSpeaker {
                tower: tower as &dyn LongTower,
                tokenizer,
                length: t5.role.length,
            }),
            (_, _, Some(length)) => Behind::Zeros(length, self.spec.unet.config.context_width()),
            _ => Behind::Nothing,
        };
        Readers {
            towers: towers.collect(),
            behind,
        }
    }
}
