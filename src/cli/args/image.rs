//! Flags of runs that begin at a picture.

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use crate::picture::Rect;
use crate::pipeline::{Edges, Extend, ExtendFill, Fill, Fit, Margins, Whose};

/// A picture to begin at, what of it is painted anew, and how far it is extended.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "From a picture")]
#[command(group = ArgGroup::new("masked").args(["mask", "mask_box"]).multiple(true))]
#[command(group = ArgGroup::new("painted").args(["mask", "mask_box", "extend"]).multiple(true))]
pub struct ImageArgs {
    /// A PNG, JPEG or WebP to begin at, or a folder of them, one after the other
    #[arg(short, long, value_name = "FILE")]
    pub init_image: Option<PathBuf>,
    /// How much of it is given up, 0 to 1 [default: 0.75; 1 with --extend]
    #[arg(long, value_name = "F", requires = "init_image")]
    pub strength: Option<f64>,
    /// A picture of any size, white where the first one is painted anew; `alpha` takes what is transparent in that
    #[arg(long, value_name = "FILE", requires = "init_image")]
    pub mask: Option<PathBuf>,
    /// A box to be painted anew; may be repeated
    #[arg(long, value_name = "LEFT,TOP,WIDTH,HEIGHT", value_parser = parse_box, requires = "init_image")]
    pub mask_box: Vec<Rect>,
    /// Paint what is black, keep what is white
    #[arg(long, requires = "masked")]
    pub invert_mask: bool,
    /// Pixels by which the mask is blurred [default: 4 with a named sampler, else 0]
    #[arg(long, value_name = "F", requires = "painted")]
    pub mask_blur: Option<f64>,
    /// What greys of the mask mean
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "HOW",
        requires = "painted"
    )]
    pub mask_edges: Edges,
    /// What stands where the picture is painted anew, before it is
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "WITH",
        requires = "painted"
    )]
    pub fill: Fill,
    /// Compute only what lies around the mask, with so many pixels about it, at the model's own size (or --width, --height), and put it back
    #[arg(long, value_name = "PIXELS", num_args = 0..=1, default_missing_value = "32", requires = "masked", conflicts_with = "extend")]
    pub only_masked: Option<usize>,
    /// Extend the picture past its edges, such as left=128,top=64
    #[arg(long, value_name = "SIDE=PIXELS,…", value_parser = parse_margins, requires = "init_image")]
    pub extend: Option<Margins>,
    /// Pixels over which the old picture passes into the new
    #[arg(long, value_name = "PIXELS", default_value_t = Extend::FEATHER, requires = "extend")]
    pub extend_feather: u32,
    /// What stands beyond the edges, before it is painted
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "WITH",
        requires = "extend"
    )]
    pub extend_fill: ExtendFill,
    /// How the picture is made to fit where --width and --height are others
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "HOW",
        requires = "init_image"
    )]
    pub fit: Fit,
    /// Whose meaning strength and masks have [default: diffusers' for a folder's own sampler, else a1111]
    #[arg(long, value_enum, value_name = "TOOL", requires = "init_image")]
    pub like: Option<Whose>,
    /// Guidance towards the picture, of models that change pictures by instruction [default: 1.5]
    #[arg(long, value_name = "F", requires = "init_image")]
    pub image_cfg_scale: Option<f64>,
    /// Let FLUX.1 Kontext look at the picture in its own size, not in the nearest that it was trained at
    #[arg(long, requires = "init_image")]
    pub own_size: bool,
    /// Timesteps of noise that the x4 upscaler's picture is given [default: 20]
    #[arg(long, value_name = "N", requires = "init_image")]
    pub noise_level: Option<usize>,
    /// Begin again at the result, so many times in all, with the next seed
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000), requires = "init_image")]
    pub loopback: u16,
}

/// `LEFT,TOP,WIDTH,HEIGHT`.
fn parse_box(text: &str) -> Result<Rect, String> {
    let numbers: Option<Vec<u32>> = text.split(',').map(|n| n.trim().parse().ok()).collect();
    match numbers.as_deref() {
        Some(&[left, top, width, height]) if width > 0 && height > 0 => Ok(Rect {
            left,
            top,
            width,
            height,
        }),
        _ => Err("expected LEFT,TOP,WIDTH,HEIGHT in pixels, such as 64,64,256,128".to_owned()),
    }
}

/// `left=128,top=64`, or one number for all sides.
fn parse_margins(text: &str) -> Result<Margins, String> {
    const EXPECTED: &str =
        "expected sides with pixels, such as left=128,top=64, or all=64; at most 8192 each";
    let mut margins = Margins::default();
    for part in text.split(',') {
        let (side, pixels) = part.split_once('=').unwrap_or(("all", part));
        let pixels: u32 = pixels.trim().parse().map_err(|_| EXPECTED.to_owned())?;
        if pixels > Margins::MOST {
            return Err(EXPECTED.to_owned());
        }
        match side.trim() {
            "left" => margins.left = pixels,
            "right" => margins.right = pixels,
            "top" | "up" => margins.top = pixels,
            "bottom" | "down" => margins.bottom = pixels,
            "all" => margins = Margins::all(pixels),
            _ => return Err(EXPECTED.to_owned()),
        }
    }
    if margins == Margins::default() {
        return Err(EXPECTED.to_owned());
    }
    Ok(margins)
}
