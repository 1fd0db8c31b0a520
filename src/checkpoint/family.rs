//! Which model a checkpoint is, from names and shapes of its tensors or from a folder's configs, with the evidence kept.
//!
//! Nothing is looked up in a table of known sizes: a Stable Diffusion with other channels, levels or context widths is one all the same.
//! What decides is which names there are, how the text tower is spelled, the rank of a projection, and channels relative to each other.
//! Rules as in ComfyUI's `model_detection.py` and `supported_models.py`, A1111's `sd_models_config.py`, diffusers' `single_file_utils.py`.

use serde_json::Value;

use super::printable::printable;
use super::structure::{Below, Place, Structure, UnetStructure};
use super::{Checkpoint, TensorSet, folder, markers, prediction, structure};

/// What kind of model a file or folder holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Stable Diffusion 1.x.
    Sd1,
    /// Stable Diffusion 2.x.
    Sd2,
    /// Stable Diffusion XL, base.
    Sdxl,
    /// Stable Diffusion XL, refiner.
    SdxlRefiner,
    /// Segmind SSD-1B: SDXL with fewer blocks.
    Ssd1b,
    /// Segmind Vega: SDXL with still fewer blocks.
    Vega,
    /// KOALA: SDXL with fewer blocks and one layer a level.
    Koala,
    /// Stable Diffusion 3.
    Sd3,
    /// Stable Diffusion 3.5.
    Sd35,
    /// FLUX.1 and what is built on it.
    Flux1,
    /// FLUX.2.
    Flux2,
    /// Chroma.
    Chroma,
    /// Stable Video Diffusion.
    Svd,
    /// The Stable Diffusion ×4 upscaler.
    X4Upscaler,
    /// Stable Diffusion 2.1 unCLIP.
    UnClip,
    /// A LoRA or a relative (LoHa, LoKr, OFT …).
    Lora,
    /// An autoencoder alone.
    Vae,
    /// A ControlNet.
    ControlNet,
    /// A T2I-Adapter.
    T2iAdapter,
    /// An IP-Adapter.
    IpAdapter,
    /// A textual-inversion embedding.
    Embedding,
    /// A hypernetwork.
    Hypernetwork,
    /// An upscaler of finished pictures: ESRGAN, SwinIR and their kin.
    Upscaler,
    /// A tiny autoencoder.
    Taesd,
    /// A CLIP tower alone.
    TextEncoder,
    /// A T5 text encoder alone.
    T5,
    /// AnimateDiff's motion modules.
    MotionModule,
    /// Nothing that is known.
    Unknown,
}

/// What goes into the denoising network beside the noisy latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Variant {
    /// Nothing: text to image.
    Text2Image,
    /// A mask and the masked picture's latents: 9 channels for 4.
    Inpainting,
    /// A picture's latents: 8 channels for 4 (instruct-pix2pix).
    Pix2Pix,
    /// A picture's latents, and a pose in place of the text: 8 channels for 4.
    Zero123,
    /// A depth map: 5 channels for 4.
    Depth,
    /// Another picture's latents that steer a transformer: edges or depth.
    Control,
    /// Something else; so many channels in all.
    Other(usize),
    /// Not a denoising UNet.
    None,
}

/// What the network predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity √ᾱ·noise − √(1−ᾱ)·picture (Salimans & Ho, arXiv 2202.00512).
    V,
    /// The picture itself.
    Sample,
    /// Karras et al.'s F, of which the picture is a part (arXiv 2206.00364, table 1).
    Edm,
}

/// The noise levels that a single file's network was trained at.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Noise {
    /// The family's betas.
    #[default]
    Betas,
    /// The family's betas, rescaled so that the last level is pure noise.
    ZeroSnr,
    /// Continuous levels (Karras et al., arXiv 2206.00364).
    Continuous {
        /// The least and the most noise.
        range: (f64, f64),
        /// Standard deviation of the clean latents.
        data: f64,
        /// Mean and standard deviation that latents are normalised by, channel by channel.
        spread: Option<(Vec<f64>, Vec<f64>)>,
    },
}

/// A model that was trained to need few steps and no guidance. Tensors do not tell; names do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Distilled {
    /// Adversarial diffusion distillation (Sauer et al., arXiv 2311.17042).
    Turbo,
    /// Progressive adversarial distillation (Lin et al., arXiv 2402.13929), for so many steps.
    Lightning(usize),
    /// Hyper-SD (Ren et al., arXiv 2404.13686), for so many steps.
    Hyper(usize),
    /// Latent consistency (Luo et al., arXiv 2310.04378).
    Lcm,
    /// Trajectory consistency (Zheng et al., arXiv 2402.19159).
    Tcd,
}

impl Distilled {
    /// By a file's or folder's name.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        let steps = || {
            let (before, _) = name.split_once("step")?;
            let digits: String = before
                .trim_end_matches(['-', '_', ' '])
                .chars()
                .rev()
                .take_while(char::is_ascii_digit)
                .collect();
            let digits: String = digits.chars().rev().collect();
            digits.parse().ok().filter(|steps| (1..=16).contains(steps))
        };
        let has = |word: &str| {
            name.split(|c: char| !c.is_ascii_alphabetic())
                .any(|w| w == word)
        };
        if has("lightning") {
            Some(Self::Lightning(steps().unwrap_or(4)))
        } else if has("turbo") {
            Some(Self::Turbo)
        } else if has("hyper") {
            Some(Self::Hyper(steps().unwrap_or(8)))
        } else if has("lcm") {
            Some(Self::Lcm)
        } else if has("tcd") {
            Some(Self::Tcd)
        } else {
            None
        }
    }

    /// The word for it.
    pub fn id(self) -> &'static str {
        match self {
            Self::Turbo => "turbo",
            Self::Lightning(_) => "lightning",
            Self::Hyper(_) => "hyper",
            Self::Lcm => "lcm",
            Self::Tcd => "tcd",
        }
    }
}

/// What a checkpoint is, and why.
#[derive(Debug, Clone)]
pub struct Detection {
    /// The family.
    pub family: Family,
    /// The kind within the family, where there is a word for it ("dev", "LoHa").
    pub kind: Option<&'static str>,
    /// What the network takes beside the latents.
    pub variant: Variant,
    /// What the network predicts; none where the question does not arise or the file does not tell.
    pub prediction: Option<Prediction>,
    /// The noise levels, as a single file tells them.
    pub noise: Noise,
    /// How it was trained to need few steps, if it was.
    pub distilled: Option<Distilled>,
    /// What was seen, the deciding fact first; fit to be printed.
    pub evidence: Vec<String>,
    /// Where the components lie in a single file. Empty for folders.
    pub places: Vec<Place>,
    /// The components without which no picture can be made and that are not there.
    pub missing: Vec<&'static str>,
    /// The sizes of the networks.
    pub structure: Structure,
    /// What stands in the way of using a file whose family is fine: a sentence's end, such as "its text tower is not CLIP …".
    pub obstacle: Option<String>,
}

impl Family {
    /// A short name for machines: `sd1`, `sdxl-refiner`, `lora` …
    pub fn id(self) -> &'static str {
        self.words().0
    }

    /// The family's name with its article: "a Stable Diffusion 1 checkpoint", "a LoRA".
    pub fn phrase(self) -> &'static str {
        self.words().1
    }

    /// The components without which a picture cannot be made, by their names in a folder; none for families that pictures are not made with.
    pub fn components(self) -> &'static [&'static str] {
        match self {
            Self::Sd1 | Self::Sd2 | Self::X4Upscaler => &["unet", "text_encoder", "vae"],
            Self::Sdxl | Self::Ssd1b | Self::Vega | Self::Koala => {
                &["unet", "text_encoder", "text_encoder_2", "vae"]
            }
            Self::SdxlRefiner => &["unet", "text_encoder_2", "vae"],
            Self::Sd3 | Self::Sd35 | Self::Flux1 => {
                &["transformer", "text_encoder", "text_encoder_2", "vae"]
            }
            _ => &[],
        }
    }

    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Sd1 => ("sd1", "a Stable Diffusion 1 checkpoint"),
            Self::Sd2 => ("sd2", "a Stable Diffusion 2 checkpoint"),
            Self::Sdxl => ("sdxl", "an SDXL base checkpoint"),
            Self::SdxlRefiner => ("sdxl-refiner", "an SDXL refiner checkpoint"),
            Self::Ssd1b => ("ssd-1b", "an SSD-1B checkpoint (a smaller SDXL)"),
            Self::Vega => ("vega", "a Segmind Vega checkpoint (a smaller SDXL)"),
            Self::Koala => ("koala", "a KOALA checkpoint (a smaller SDXL)"),
            Self::Sd3 => ("sd3", "a Stable Diffusion 3 checkpoint"),
            Self::Sd35 => ("sd3.5", "a Stable Diffusion 3.5 checkpoint"),
            Self::Flux1 => ("flux1", "a FLUX.1 checkpoint"),
            Self::Flux2 => ("flux2", "a FLUX.2 checkpoint"),
            Self::Chroma => ("chroma", "a Chroma checkpoint"),
            Self::Svd => ("svd", "a Stable Video Diffusion checkpoint"),
            Self::X4Upscaler => ("x4-upscaler", "a Stable Diffusion x4 upscaler"),
            Self::UnClip => ("unclip", "a Stable unCLIP checkpoint"),
            Self::Lora => ("lora", "a LoRA"),
            Self::Vae => ("vae", "a VAE alone"),
            Self::ControlNet => ("controlnet", "a ControlNet"),
            Self::T2iAdapter => ("t2i-adapter", "a T2I-Adapter"),
            Self::IpAdapter => ("ip-adapter", "an IP-Adapter"),
            Self::Embedding => ("embedding", "a textual-inversion embedding"),
            Self::Hypernetwork => ("hypernetwork", "a hypernetwork"),
            Self::Upscaler => ("upscaler", "an upscaler"),
            Self::Taesd => ("taesd", "a tiny autoencoder (TAESD)"),
            Self::TextEncoder => ("text-encoder", "a CLIP text encoder alone"),
            Self::T5 => ("t5", "a T5 text encoder alone"),
            Self::MotionModule => ("motion-module", "an AnimateDiff motion module"),
            Self::Unknown => ("unknown", "no kind of model that is known here"),
        }
    }
}

impl Variant {
    /// A short name for machines.
    pub fn id(self) -> &'static str {
        match self {
            Self::Text2Image => "text2image",
            Self::Inpainting => "inpainting",
            Self::Pix2Pix => "pix2pix",
            Self::Zero123 => "zero123",
            Self::Depth => "depth",
            Self::Control => "control",
            Self::Other(_) => "other",
            Self::None => "none",
        }
    }

    /// From the UNet's channels, relative to each other: nothing is assumed of the latents' number.
    pub(super) fn from_channels(input: usize, output: usize) -> Self {
        match input.checked_sub(output) {
            Some(0) => Self::Text2Image,
            // a transformer's masked picture and mask are five times as wide as its latents
            Some(more) if more == output.saturating_mul(5) => Self::Inpainting,
            Some(1) => Self::Depth,
            Some(more) if more == output => Self::Pix2Pix,
            Some(more) if more == output.saturating_add(1) => Self::Inpainting,
            _ => Self::Other(input),
        }
    }
}

impl Prediction {
    /// The name that diffusers and modelspec use: `epsilon`, `v_prediction`, `sample`.
    pub fn id(self) -> &'static str {
        match self {
            Self::Epsilon => "epsilon",
            Self::V => "v_prediction",
            Self::Sample => "sample",
            Self::Edm => "edm",
        }
    }

    /// From any of the spellings in use.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "epsilon" | "eps" => Some(Self::Epsilon),
            "v" | "v_prediction" | "v-prediction" | "v_pred" => Some(Self::V),
            "sample" => Some(Self::Sample),
            _ => None,
        }
    }
}

impl Detection {
    pub(super) fn new(family: Family, evidence: String) -> Self {
        Self {
            family,
            kind: None,
            variant: Variant::None,
            prediction: None,
            noise: Noise::default(),
            distilled: None,
            evidence: vec![evidence],
            places: Vec::new(),
            missing: Vec::new(),
            structure: Structure::default(),
            obstacle: None,
        }
    }
}

/// Finds out what `checkpoint` is. Reads headers and configs, and for a Stable Diffusion 2 in a single file one small tensor.
pub fn detect(checkpoint: &Checkpoint) -> Detection {
    let mut detection = match checkpoint.single() {
        Some(tensors) => detect_single(&tensors),
        None => folder::detect(checkpoint),
    };
    if !detection.family.components().is_empty() {
        let name = checkpoint.path().file_name().unwrap_or_default();
        detection.distilled = Distilled::from_name(&name.to_string_lossy());
    }
    if let Some(distilled) = detection.distilled {
        let id = distilled.id();
        let evidence = format!("its name says {id}: few steps, no guidance");
        detection.evidence.push(evidence);
    }
    detection
}

/// `key \`name\``, the name fit to be printed.
fn key(name: &str) -> String {
    format!("key `{}`", printable(name))
}

fn detect_single(tensors: &TensorSet) -> Detection {
    let (places, structure) = structure::read_single(tensors);
    let mut detection = decide_single(tensors, &places, &structure);
    detection.places = places;
    place_transformer(tensors, &mut detection);
    detection.structure = structure;
    detection.note_metadata(tensors);
    let there = |name: &&str| {
        detection
            .places
            .iter()
            .any(|place| place.component == *name)
    };
    let needed = detection.family.components().iter().copied();
    detection.missing = needed.filter(|name| !there(name)).collect();
    if tensors.info("scaled_fp8").is_some() {
        detection.evidence.push(key("scaled_fp8"));
    }
    let averaged = tensors.names_below("model_ema.").count();
    if averaged > 0 && detection.structure.unet.is_some() {
        let note =
            format!("an averaged copy (tensors below `model_ema.`, {averaged} of them) is ignored");
        detection.evidence.push(note);
    }
    detection
}

/// Where a transformer lies and what it takes; FLUX has T5 where Stable Diffusion 3 has its second CLIP.
fn place_transformer(tensors: &TensorSet, detection: &mut Detection) {
    if !detection.family.components().contains(&"transformer") {
        return;
    }
    let found = structure::NETWORK_PREFIXES.iter().find_map(|prefix| {
        let names = Below { tensors, prefix };
        Some((prefix, structure::transformer_widths(names)?))
    });
    let Some((prefix, (input, output))) = found else {
        return;
    };
    detection.variant = match input.checked_sub(output) {
        Some(more) if more == output => Variant::Control,
        _ => Variant::from_channels(input, output),
    };
    detection.places.push(Place {
        component: "transformer",
        prefix: (*prefix).to_owned(),
    });
    if detection.family == Family::Flux1 {
        for place in &mut detection.places {
            if place.component == "text_encoder_3" {
                place.component = "text_encoder_2";
            }
        }
    }
}

fn decide_single(tensors: &TensorSet, places: &[Place], structure: &Structure) -> Detection {
    if let Some(found) = markers::find_whole(tensors) {
        let mut detection = Detection::new(found.family, key(&found.key));
        detection.kind = found.kind;
        if let Some(unet) = &structure.unet {
            detection.variant = Variant::from_channels(unet.in_channels, unet.out_channels);
        }
        return detection;
    }
    let unet_place = places.iter().find(|place| place.component == "unet");
    if let (Some(unet), Some(place)) = (&structure.unet, unet_place) {
        let names = Below {
            tensors,
            prefix: &place.prefix,
        };
        return decide_unet(names, unet, structure);
    }
    if tensors.names_below("model_ema.").next().is_some() {
        let mut detection = Detection::new(Family::Unknown, key("model_ema."));
        detection.obstacle = Some(
            "the file holds only the averaged copy (`model_ema.*`) of a UNet, without the UNet itself; take the model's usual file"
                .to_owned(),
        );
        return detection;
    }
    if let Some(found) = markers::find_part(tensors) {
        let mut detection = Detection::new(found.family, key(&found.key));
        detection.kind = found.kind;
        return detection;
    }
    let some: Vec<String> = tensors
        .names()
        .take(3)
        .map(|name| format!("`{}`", printable(name)))
        .collect();
    Detection::new(
        Family::Unknown,
        format!("names such as {}", some.join(", ")),
    )
}

/// The families that are a UNet.
fn decide_unet(names: Below<'_>, unet: &UnetStructure, structure: &Structure) -> Detection {
    let has = |name: &str| names.tensors.info(&names.full(name)).is_some();
    let conv_in = ["input_blocks.0.0.weight", "conv_in.weight"]
        .into_iter()
        .find(|name| has(name))
        .map_or_else(String::new, |name| names.full(name));
    let mut detection = if has("label_emb.weight") || has("class_embedding.weight") {
        let name = if has("label_emb.weight") {
            "label_emb.weight"
        } else {
            "class_embedding.weight"
        };
        Detection::new(Family::X4Upscaler, key(&names.full(name)))
    } else if let Some(width) = unet.class_width {
        decide_class_embedded(names, unet, width)
    } else {
        decide_generation(names, unet, structure)
    };
    detection.variant = Variant::from_channels(unet.in_channels, unet.out_channels);
    let posed = names.tensors.info("cc_projection.weight").is_some();
    if detection.variant == Variant::Pix2Pix && posed {
        detection.variant = Variant::Zero123;
        detection.evidence.push(key("cc_projection.weight"));
    }
    detection.evidence.push(format!(
        "`{}` takes {} channels and {} come out: {}",
        printable(&conv_in),
        unet.in_channels,
        unet.out_channels,
        detection.variant.id()
    ));
    if !detection.family.components().is_empty() {
        prediction::decide(names, unet, &mut detection);
    }
    detection
}

/// SDXL and its relatives: a vector is embedded beside the time.
fn decide_class_embedded(names: Below<'_>, unet: &UnetStructure, width: usize) -> Detection {
    let first = |prefix: &str| names.tensors.names_below(prefix).next().map(str::to_owned);
    let [refiner, base] = ["conditioner.embedders.0.model.", "conditioner.embedders.1."].map(first);
    let label = ["label_emb.0.0.weight", "add_embedding.linear_1.weight"].map(|n| names.full(n));
    let label = label
        .iter()
        .find(|name| names.tensors.info(name).is_some())
        .map_or("", String::as_str);
    let embeds = format!("key `{}` of {width} columns", printable(label));
    // widths of the embedded vector: pooled text and 5 or 6 numbers of 256 (SDXL), a picture's CLIP vector twice (unCLIP)
    match (refiner, base, width) {
        (_, Some(base), _) => decide_sdxl(unet, key(&base)),
        (Some(refiner), None, _) => Detection::new(Family::SdxlRefiner, key(&refiner)),
        (None, None, 2560) => Detection::new(Family::SdxlRefiner, embeds),
        (None, None, 1536 | 2048) => Detection::new(Family::UnClip, embeds),
        (None, None, _) => decide_sdxl(unet, embeds),
    }
}

/// SDXL or one of the distilled networks, told apart by their transformers' depths.
fn decide_sdxl(unet: &UnetStructure, evidence: String) -> Detection {
    let depths: Vec<usize> = unet.depths.concat();
    let mut detection = Detection::new(sdxl_of_depths(&depths), evidence);
    detection
        .evidence
        .push(format!("transformer blocks on the way down: {depths:?}"));
    detection
}

/// The relative of SDXL whose way down has transformers of these depths.
pub(super) fn sdxl_of_depths(depths: &[usize]) -> Family {
    match depths {
        [0, 0, 2, 2, 4, 4] => Family::Ssd1b,
        [0, 0, 1, 1, 2, 2] => Family::Vega,
        [0, 2, 5 | 6] => Family::Koala,
        _ => Family::Sdxl,
    }
}

/// Stable Diffusion 1 or 2: by the text tower's spelling, and without one by the rank of the projections.
fn decide_generation(names: Below<'_>, unet: &UnetStructure, structure: &Structure) -> Detection {
    let tower = names
        .tensors
        .names_below("cond_stage_model.")
        .next()
        .is_some();
    let mut detection = match (&structure.text, unet.linear) {
        (Some(text), _) if text.open_clip => Detection::new(
            Family::Sd2,
            "the text tower has OpenCLIP's names (key `cond_stage_model.model.…`), as in Stable Diffusion 2".to_owned(),
        ),
        (Some(_), _) => Detection::new(
            Family::Sd1,
            "the text tower has CLIP-L's names (key `cond_stage_model.transformer.…`), as in Stable Diffusion 1".to_owned(),
        ),
        (None, _) if tower => {
            let mut detection = Detection::new(
                Family::Unknown,
                "a latent diffusion UNet with a text tower that is not CLIP".to_owned(),
            );
            detection.obstacle = Some("its text tower is not CLIP, so it is no Stable Diffusion".to_owned());
            return detection;
        }
        (None, Some(true)) => Detection::new(
            Family::Sd2,
            "there is no text tower; the transformers' `proj_in` are linear (rank 2), as in Stable Diffusion 2".to_owned(),
        ),
        (None, Some(false)) => Detection::new(
            Family::Sd1,
            "there is no text tower; the transformers' `proj_in` are convolutions (rank 4), as in Stable Diffusion 1".to_owned(),
        ),
        (None, None) => Detection::new(
            Family::Unknown,
            "a UNet without text tower and without transformers".to_owned(),
        ),
    };
    detection
        .evidence
        .push("no `label_emb`, so not SDXL or one of its relatives".to_owned());
    if let Some(width) = unet.context {
        detection
            .evidence
            .push(format!("cross-attention over a text of width {width}"));
    }
    detection
}

impl Detection {
    /// What the file says of itself; it is shown, and decides nothing here.
    fn note_metadata(&mut self, tensors: &TensorSet) {
        const TELLING: [&str; 4] = [
            "modelspec.architecture",
            "modelspec.implementation",
            "ss_base_model_version",
            "ss_network_module",
        ];
        for file in tensors.files() {
            for name in TELLING {
                if let Some(value) = file.metadata().get(name) {
                    self.evidence
                        .push(format!("metadata `{name}` says {}", printable(value)));
                }
            }
        }
    }

    /// A config's number, as the folder's detection needs it.
    pub(super) fn number(config: Option<&Value>, name: &str) -> Option<usize> {
        usize::try_from(config?.get(name)?.as_u64()?).ok()
    }
}
