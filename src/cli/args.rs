//! What can be typed. Nothing is resolved here; see `docs` of each command for what it does.

mod adapters;
mod canvas;
mod control;
pub(super) mod guidance;
mod hires;
mod image;
mod image_prompt;
mod preview;
mod redraw;
mod sampling;
mod upscale;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub use adapters::{EmbeddingArgs, LoraArgs};
pub use canvas::{Axes, CanvasArgs};
pub(super) use control::value_name;
pub use control::{ControlArgs, ControlMapArgs};
pub use hires::{HiresArgs, pairs as hires_pairs};
pub use image::ImageArgs;
pub use image_prompt::ImagePromptArgs;
pub use preview::{PreviewArgs, PreviewHow};
pub use redraw::{RedrawArgs, Resampler};
pub use sampling::SamplingArgs;
pub use upscale::UpscaleArgs;

use crate::adapters::{DoraNorm, Mode};
use crate::convert::Dtype;
use crate::device::{DeviceChoice, DtypeChoice};
use crate::output::save::DEFAULT_NAME;
use crate::pipeline::Rng;
use crate::text::Syntax;
use guidance::{GuidanceArgs, RegionArgs, ShortcutArgs};

/// Stable Diffusion in one binary.
#[derive(Debug, Parser)]
#[command(
    name = "sd-rs",
    version,
    about,
    propagate_version = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// Say more; twice: everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,
    /// Say nothing but results and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make pictures from text, and from pictures
    #[command(visible_alias = "txt2img")]
    Generate(Box<GenerateArgs>),
    /// Say what a model file is, and why
    Inspect(InspectArgs),
    /// Measure speed and memory
    Bench(BenchArgs),
    /// Say what this machine can do
    Doctor(DoctorArgs),
    /// List, fetch, check and remove models
    Models(ModelsArgs),
    /// Show what a ControlNet or T2I-Adapter would see of a picture
    Control(ControlMapArgs),
    /// Change a model's form: single file, folder, GGUF; its type; merge it
    Convert(Box<ConvertArgs>),
    /// Make pictures larger with a network of the ESRGAN family or SwinIR's, with a Stable Diffusion model tile by tile, or with both
    Upscale(Box<UpscaleArgs>),
}

/// Arguments of `convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// A model file or folder, or what else `generate --model` takes
    pub input: PathBuf,
    /// Where it goes: a name ending in .safetensors or .gguf, else a diffusers folder
    pub output: PathBuf,
    /// Where names are looked up
    #[command(flatten)]
    pub library: LibraryArgs,
    /// Read model files instead of mapping them into memory: for network file systems, and files that others write to
    #[arg(long)]
    pub no_mmap: bool,
    /// The weights' type
    #[arg(long, value_enum, default_value_t)]
    pub dtype: Dtype,
    /// Quantise the matrices: for GGUF
    #[arg(
        long,
        visible_alias = "quantize",
        value_enum,
        value_name = "TYPE",
        ignore_case = true
    )]
    pub quantise: Option<Quantised>,
    /// A LoRA or LyCORIS to bake in, a file or a name in the models folders, and its weight; may be repeated. `NAME:TEXT:UNET` weighs it apart
    #[arg(long, value_name = "FILE_OR_NAME[:WEIGHT]")]
    pub lora: Vec<String>,
    /// Which lengths DoRA divides by: those of the changed weight (PEFT, LyCORIS, A1111) or of the weight before (ComfyUI)
    #[arg(long, value_name = "WHICH", value_enum, default_value_t)]
    pub dora_norm: DoraNorm,
    /// How LoRAs are taken
    #[command(flatten)]
    pub lora_options: LoraArgs,
    /// B: merge it in as a weighted sum, A·(1−alpha) + B·alpha
    #[arg(
        long,
        value_name = "B",
        help_heading = "Merging",
        conflicts_with = "add_difference"
    )]
    pub merge: Option<PathBuf>,
    /// B and C: add their difference, A + (B−C)·alpha
    #[arg(long, num_args = 2, value_names = ["B", "C"], help_heading = "Merging")]
    pub add_difference: Option<Vec<PathBuf>>,
    /// How much of it [default: 0.5 of --merge, 1 of --add-difference]
    #[arg(
        long,
        value_name = "F",
        allow_negative_numbers = true,
        help_heading = "Merging"
    )]
    pub alpha: Option<f64>,
    /// Alpha for each block of the UNet: IN00 to the last, M00, OUT00 to the last, with one for all else in front if there is one more (26 numbers
    /// of Stable Diffusion 1 and 2, 20 of XL); else --alpha is for all else
    #[arg(
        long,
        value_name = "F,F,…",
        value_delimiter = ',',
        allow_hyphen_values = true,
        help_heading = "Merging"
    )]
    pub block_weights: Option<Vec<f64>>,
    /// Another autoencoder, which takes the place of its own
    #[arg(long, value_name = "FILE")]
    pub vae: Option<PathBuf>,
    /// The date for the metadata, such as 2025-01-31; without one the same input gives the same bytes
    #[arg(long)]
    pub date: Option<String>,
    /// Replace what is there
    #[arg(long)]
    pub force: bool,
}

/// ggml's types that `convert` makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[allow(non_camel_case_types, reason = "ggml writes them so")]
pub enum Quantised {
    /// 8 bits: next to no loss
    #[value(name = "q8_0", alias = "int8")]
    Q8_0,
    /// 6 bits, in larger blocks with scales of scales
    #[value(name = "q6_k")]
    Q6_K,
    /// 5 bits, in larger blocks
    #[value(name = "q5_k")]
    Q5_K,
    /// 4 bits, in larger blocks
    #[value(name = "q4_k")]
    Q4_K,
    /// 5 bits, with an offset
    #[value(name = "q5_1")]
    Q5_1,
    /// 5 bits
    #[value(name = "q5_0")]
    Q5_0,
    /// 4 bits, with an offset
    #[value(name = "q4_1")]
    Q4_1,
    /// 4 bits
    #[value(name = "q4_0")]
    Q4_0,
}

/// Arguments of `generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    // those under a heading of their own come last: what follows them would stand there, too
    /// What to show
    #[arg(short, long, allow_hyphen_values = true)]
    pub prompt: String,
    /// How it is made
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// A .safetensors, .ckpt or .gguf file, a diffusers folder, a name or hash in the models folder, or a Hub repository
    /// `owner/name[@revision][:file]` [default: the demonstration checkpoint in this binary]
    #[arg(short, long)]
    pub model: Option<PathBuf>,
    /// Another autoencoder: a file or folder of one, a TAESD, or a checkpoint that has one; by the same names
    #[arg(long, value_name = "FILE")]
    pub vae: Option<PathBuf>,
    /// A text encoder that the model lacks or that takes its own's place: CLIP-L, OpenCLIP-G or T5, told apart by what is in it; may be
    /// repeated
    #[arg(long, value_name = "FILE", visible_aliases = ["clip-l", "clip-g", "t5xxl"])]
    pub text_encoder: Vec<PathBuf>,
    /// Tokens of T5 that a text is filled up to, and cut at [default: the model family's own]
    #[arg(long, value_name = "N")]
    pub t5_length: Option<usize>,
    /// A LoRA or LyCORIS, a file or a name in the models folders, and its weight; may be repeated. `NAME:TEXT:UNET` weighs it apart,
    /// `NAME:0.8@0.2-0.7` is a part of the run, `NAME:0@0,1@0.5` changes over it, `NAME:1:lbw=OUTALL` weighs blocks
    #[arg(long, value_name = "FILE_OR_NAME[:WEIGHT]")]
    pub lora: Vec<String>,
    /// Which lengths DoRA divides by: those of the changed weight (PEFT, LyCORIS, A1111) or of the weight before (ComfyUI)
    #[arg(long, value_name = "WHICH", value_enum, default_value_t)]
    pub dora_norm: DoraNorm,
    /// How the denoising network wears LoRAs: merged into its weights, or beside them wherever that costs little (runtime); auto is beside weights that
    /// the file keeps quantised, so that they stay so, and beside all if a strength changes over the steps
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub lora_mode: Mode,
    /// How LoRAs are taken
    #[command(flatten)]
    pub lora_options: LoraArgs,
    /// Textual inversions
    #[command(flatten)]
    pub embedding: EmbeddingArgs,
    /// Where names are looked up
    #[command(flatten)]
    pub library: LibraryArgs,
    /// Read model files instead of mapping them into memory: for network file systems, and files that others write to
    #[arg(long)]
    pub no_mmap: bool,
    /// Pixels, a multiple of 8 [default: the model's own size]
    #[arg(short = 'W', long)]
    pub width: Option<usize>,
    /// Pixels, a multiple of 8 [default: the model's own size]
    #[arg(short = 'H', long)]
    pub height: Option<usize>,
    /// Images computed together
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub batch_size: u16,
    /// Batches
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub count: u16,
    /// A model that finishes pictures: the SDXL refiner
    #[arg(long, value_name = "MODEL", help_heading = "SDXL")]
    pub refiner: Option<PathBuf>,
    /// The part of the noise levels after which the refiner takes over
    #[arg(
        long,
        value_name = "PART",
        default_value_t = 0.8,
        requires = "refiner",
        help_heading = "SDXL"
    )]
    pub refiner_switch: f64,
    /// Guidance away from Stable Diffusion 3.5 without some of its layers; 2.8 is usual for medium [default: none]
    #[arg(long, value_name = "F", help_heading = "Stable Diffusion 3")]
    pub slg_scale: Option<f64>,
    /// The layers that it goes away from
    #[arg(long, value_name = "N,N…", value_delimiter = ',', default_values_t = [7, 8, 9], help_heading = "Stable Diffusion 3")]
    pub skip_layers: Vec<usize>,
    /// The part of the steps at which it begins
    #[arg(
        long,
        value_name = "F",
        default_value_t = 0.01,
        help_heading = "Stable Diffusion 3"
    )]
    pub skip_layer_start: f64,
    /// The part of the steps at which it ends
    #[arg(
        long,
        value_name = "F",
        default_value_t = 0.2,
        help_heading = "Stable Diffusion 3"
    )]
    pub skip_layer_end: f64,
    /// What SDXL is told of a picture's size before it was scaled [default: the picture's size]
    #[arg(long, value_name = "WxH", value_parser = size, help_heading = "SDXL")]
    pub original_size: Option<(usize, usize)>,
    /// What SDXL is told of pixels cut off at the left and at the top [default: 0,0]
    #[arg(long, value_name = "LEFT,TOP", value_parser = corner, help_heading = "SDXL")]
    pub crop: Option<(usize, usize)>,
    /// What SDXL is told of the result's size [default: the picture's size]
    #[arg(long, value_name = "WxH", value_parser = size, help_heading = "SDXL")]
    pub target_size: Option<(usize, usize)>,
    /// The same with the negative prompt [default: as with the prompt]
    #[arg(long, value_name = "WxH", value_parser = size, help_heading = "SDXL")]
    pub negative_original_size: Option<(usize, usize)>,
    /// The same with the negative prompt [default: as with the prompt]
    #[arg(long, value_name = "LEFT,TOP", value_parser = corner, help_heading = "SDXL")]
    pub negative_crop: Option<(usize, usize)>,
    /// The same with the negative prompt [default: as with the prompt]
    #[arg(long, value_name = "WxH", value_parser = size, help_heading = "SDXL")]
    pub negative_target_size: Option<(usize, usize)>,
    /// What the SDXL refiner is told of the result's beauty, 0 to 10 [default: 6]
    #[arg(long, value_name = "SCORE", value_parser = score, help_heading = "SDXL")]
    pub aesthetic_score: Option<f64>,
    /// The same with the negative prompt [default: 2.5]
    #[arg(long, value_name = "SCORE", value_parser = score, help_heading = "SDXL")]
    pub negative_aesthetic_score: Option<f64>,
    /// The prompts' language
    #[arg(long, value_enum, default_value_t)]
    pub prompt_syntax: Syntax,
    /// Random numbers: PyTorch's CPU generator, or Philox as A1111's NV
    #[arg(long, value_enum, default_value_t)]
    pub rng: Rng,
    /// The compute type
    #[arg(long, value_enum, default_value_t)]
    pub dtype: DtypeChoice,
    /// auto, cpu, cuda, cuda:N or metal
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// Threads to compute with [default: one a core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Where the picture goes; {seed}, {n} and {name} (that of the picture begun at) are replaced, - is the standard output
    #[arg(short, long, default_value = DEFAULT_NAME)]
    pub output: String,
    /// Replace files that are there
    #[arg(long)]
    pub overwrite: bool,
    /// Save the denoised latents (safetensors, key `latents`, f32)
    #[arg(long, value_name = "FILE")]
    pub save_latents: Option<PathBuf>,
    /// One JSON object a picture on the standard output
    #[arg(long)]
    pub json: bool,
    /// Print the plan and the memory estimate, compute nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Begin even when the estimate says that memory will not do
    #[arg(long)]
    pub force: bool,
    /// The picture to begin at
    #[command(flatten)]
    pub image: ImageArgs,
    /// The second pass
    #[command(flatten)]
    pub hires: HiresArgs,
    /// Tiles and textures
    #[command(flatten)]
    pub canvas: CanvasArgs,
    /// Previews
    #[command(flatten)]
    pub preview: PreviewArgs,
    /// Guidance beyond one scale
    #[command(flatten)]
    pub guidance: GuidanceArgs,
    /// Prompts for parts of the picture
    #[command(flatten)]
    pub regions: RegionArgs,
    /// Less work for nearly the same picture
    #[command(flatten)]
    pub shortcuts: ShortcutArgs,
    /// Pictures that steer
    #[command(flatten)]
    pub control: ControlArgs,
    /// Pictures beside the prompt
    #[command(flatten)]
    pub image_prompt: ImagePromptArgs,
}

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A model file or folder, or what else `generate --model` takes
    pub file: PathBuf,
    /// Where names are looked up
    #[command(flatten)]
    pub library: LibraryArgs,
    /// Read model files instead of mapping them into memory: for network file systems, and files that others write to
    #[arg(long)]
    pub no_mmap: bool,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// Where models are looked for by name.
#[derive(Debug, Clone, Default, Args)]
pub struct LibraryArgs {
    /// The models folder [default: sd-rs/models in the platform's data folder]
    #[arg(long, global = true, value_name = "FOLDER", env = "SD_RS_MODELS")]
    pub models_dir: Option<PathBuf>,
    /// The folder of A1111's program, whose models are used, too
    #[arg(long, global = true, value_name = "FOLDER", env = "SD_RS_A1111_DIR")]
    pub a1111_dir: Option<PathBuf>,
    /// ComfyUI's file of folders [default: extra_model_paths.yaml in the models folder]
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "SD_RS_EXTRA_MODEL_PATHS"
    )]
    pub extra_model_paths: Option<PathBuf>,
}

/// Arguments of `models`.
#[derive(Debug, Args)]
pub struct ModelsArgs {
    /// What to do
    #[command(subcommand)]
    pub command: ModelsCommand,
    /// Where names are looked up
    #[command(flatten)]
    pub library: LibraryArgs,
}

/// What `models` can do.
#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// Show the models that are here
    List(ListArgs),
    /// Fetch repositories from the Hugging Face Hub: only the files that are needed, each checked
    Pull(PullArgs),
    /// Read models again and compare their hashes
    Verify {
        /// Names of models or repositories [default: all]
        names: Vec<String>,
        /// Remove damaged files of repositories, so that pulling fetches them again
        #[arg(long)]
        repair: bool,
    },
    /// Remove a repository from the Hub's cache, or a model from the models folder
    Rm(RmArgs),
    /// Print where a model is; nothing is fetched
    Path {
        /// A name, hash or repository [default: the models folder itself]
        name: Option<String>,
    },
}

/// Arguments of `models list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// One JSON object a model
    #[arg(long)]
    pub json: bool,
    /// Compute the hashes that are not known yet
    #[arg(long)]
    pub hash: bool,
}

/// Arguments of `models pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// `owner/name[@revision][:file]`
    #[arg(required = true, value_name = "REPOSITORY")]
    pub names: Vec<String>,
    /// The precision of a diffusers folder, such as fp16 [default: the plain files, then fp16]
    #[arg(long)]
    pub variant: Option<String>,
    /// Print which files would be fetched
    #[arg(long)]
    pub dry_run: bool,
}

/// Arguments of `models rm`.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// A repository, or a name in the models folder
    pub name: String,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// A model to measure [default: the demonstration checkpoint in this binary]
    #[arg(short, long, conflicts_with = "random_weights")]
    pub model: Option<PathBuf>,
    /// Where names are looked up
    #[command(flatten)]
    pub library: LibraryArgs,
    /// A full-size network with made-up weights, no file needed
    #[arg(long, value_enum, value_name = "FAMILY")]
    pub random_weights: Option<RandomFamily>,
    /// Read model files instead of mapping them into memory: for network file systems, and files that others write to
    #[arg(long)]
    pub no_mmap: bool,
    /// Pixels of each side [default: the model's own size]
    #[arg(long)]
    pub size: Option<usize>,
    /// Network calls to measure, after one that is not counted
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub steps: u16,
    /// Pictures to decode
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub decodes: u16,
    /// Every layer shape of Stable Diffusion 1.5 and XL by itself, in place of a model
    #[arg(long, conflicts_with_all = ["model", "random_weights", "size", "steps", "decodes"])]
    pub kernels: bool,
    /// The compute type
    #[arg(long, value_enum, default_value_t)]
    pub dtype: DtypeChoice,
    /// auto, cpu, cuda, cuda:N or metal
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// Threads to compute with [default: one a core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// Families that can be made up at full size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum RandomFamily {
    /// Stable Diffusion 1.5
    Sd15,
    /// Stable Diffusion 2.1
    Sd21,
    /// Stable Diffusion XL
    Sdxl,
    /// Stable Diffusion 3 medium
    Sd3,
    /// Stable Diffusion 3.5 medium
    Sd35Medium,
    /// Stable Diffusion 3.5 large
    Sd35Large,
    /// FLUX.1 dev
    FluxDev,
    /// FLUX.1 schnell
    FluxSchnell,
}

/// The largest number of pixels that is told.
const MOST_PIXELS: usize = 65_536;

/// `WxH`.
fn size(text: &str) -> Result<(usize, usize), String> {
    pair(text, ['x', 'X', '×'].as_slice(), 1).ok_or_else(|| {
        format!("expected WIDTHxHEIGHT in pixels, 1 to {MOST_PIXELS} each, such as 1024x768")
    })
}

/// `LEFT,TOP`.
fn corner(text: &str) -> Result<(usize, usize), String> {
    pair(text, [','].as_slice(), 0).ok_or_else(|| {
        format!("expected LEFT,TOP in pixels, 0 to {MOST_PIXELS} each, such as 0,256")
    })
}

fn pair(text: &str, between: &[char], least: usize) -> Option<(usize, usize)> {
    let (first, second) = text.split_once(between)?;
    let number = |text: &str| {
        let number: usize = text.trim().parse().ok()?;
        (least..=MOST_PIXELS).contains(&number).then_some(number)
    };
    Some((number(first)?, number(second)?))
}

fn score(text: &str) -> Result<f64, String> {
    let number: Option<f64> = text.parse().ok();
    number
        .filter(|score| (0.0..=10.0).contains(score))
        .ok_or_else(|| "expected a number from 0 to 10".to_owned())
}
