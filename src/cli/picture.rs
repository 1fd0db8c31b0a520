//! The pictures that `generate` begins at, from flags and files.

use std::fs;
use std::path::{Path, PathBuf};

use super::args::ImageArgs;
use crate::error::{Error, Result};
use crate::picture::{Grey, Picture, Rect};
use crate::pipeline::{Extend, Fill, IMAGE_CFG_SCALE, Masking, NOISE_LEVEL, Plan, Request, Source};
use serde_json::{Value, json};

/// The word that takes a picture's transparency for a mask.
const ALPHA: &str = "alpha";

/// Files that a run begins at, in order; none for pictures from text.
///
/// # Errors
/// [`Error::Usage`] for a folder without pictures; [`Error::Disk`] when the folder cannot be read.
pub(super) fn files(args: &ImageArgs) -> Result<Vec<PathBuf>> {
    let Some(path) = &args.init_image else {
        return Ok(Vec::new());
    };
    if !path.is_dir() {
        return Ok(vec![path.clone()]);
    }
    let entries = fs::read_dir(path).map_err(|source| Error::disk(path, "read", source))?;
    let mut files = Vec::new();
    for entry in entries {
        let file = entry
            .map_err(|source| Error::disk(path, "read", source))?
            .path();
        let ending = file.extension().map(|e| e.to_string_lossy().to_lowercase());
        let known = ["png", "jpg", "jpeg", "webp"];
        if ending.is_some_and(|ending| known.contains(&ending.as_str())) {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::Usage(format!(
            "{}: the folder holds no PNG, JPEG or WebP; give --init-image a picture or a folder of them",
            path.display()
        )));
    }
    Ok(files)
}

/// What a run with the picture at `path` begins at.
///
/// # Errors
/// Whatever reading the pictures gives.
pub(super) fn source(args: &ImageArgs, path: &Path) -> Result<Source> {
    with_picture(args, Picture::open(path)?)
}

/// The same with a picture in memory.
///
/// # Errors
/// Whatever reading the mask gives; [`Error::Usage`] for a mask that the picture has not.
pub(super) fn with_picture(args: &ImageArgs, picture: Picture) -> Result<Source> {
    let mut mask = mask(args, &picture)?;
    let mut picture = picture;
    if let Some(margins) = args.extend {
        let extend = Extend {
            margins,
            feather: args.extend_feather,
            fill: args.extend_fill,
        };
        let (canvas, covered) = extend.apply(&picture, mask.as_ref())?;
        (picture, mask) = (canvas, Some(covered));
    }
    let masking = mask.map(|mask| Masking {
        mask,
        blur: args.mask_blur,
        fill: args.fill,
        only_masked: args.only_masked,
        edges: args.mask_edges,
    });
    Ok(Source {
        strength: args.strength.or(args.extend.map(|_| 1.0)),
        fit: args.fit,
        masking,
        whose: args.like,
        image_cfg_scale: args.image_cfg_scale.unwrap_or(IMAGE_CFG_SCALE),
        own_size: args.own_size,
        noise_level: args.noise_level.unwrap_or(NOISE_LEVEL),
        ..Source::new(picture)
    })
}

/// What is painted anew, white, of the picture's size; none for all of it.
fn mask(args: &ImageArgs, picture: &Picture) -> Result<Option<Grey>> {
    let mut mask = match &args.mask {
        None if args.mask_box.is_empty() => return Ok(None),
        None => None,
        Some(name) if name.as_os_str() == ALPHA => {
            let alpha = picture.alpha().ok_or_else(|| {
                Error::Usage(
                    "--mask alpha needs a picture with transparency, and --init-image has none; give a picture as mask".to_owned(),
                )
            })?;
            Some(alpha.invert())
        }
        Some(path) => {
            let (width, height) = (picture.width(), picture.height());
            let mask = Picture::open(path)?.to_luma();
            Some(mask.resize(width, height, crate::picture::Filter::Lanczos)?)
        }
    };
    if !args.mask_box.is_empty() {
        mask = Some(boxes(&args.mask_box, mask, picture)?);
    }
    Ok(mask.map(|mask| {
        if args.invert_mask {
            mask.invert()
        } else {
            mask
        }
    }))
}

/// White boxes over a mask.
fn boxes(boxes: &[Rect], mask: Option<Grey>, picture: &Picture) -> Result<Grey> {
    let (width, height) = (picture.width(), picture.height());
    let mut values = match mask {
        Some(mask) => mask.values().to_vec(),
        None => vec![0; width as usize * height as usize],
    };
    for part in boxes {
        let (right, bottom) = (
            part.left.saturating_add(part.width).min(width),
            part.top.saturating_add(part.height).min(height),
        );
        if part.left >= right || part.top >= bottom {
            return Err(Error::Usage(format!(
                "--mask-box {},{},{},{} lies outside of the picture of {width}x{height} pixels",
                part.left, part.top, part.width, part.height
            )));
        }
        for row in values
            .chunks_exact_mut(width as usize)
            .take(bottom as usize)
            .skip(part.top as usize)
        {
            row[part.left as usize..right as usize].fill(255);
        }
    }
    Grey::new(width, height, values)
}

/// A1111's keys of what a run began at.
pub(super) fn pairs(request: &Request, plan: &Plan) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut add = |key: &str, value: String| pairs.push((key.to_owned(), value));
    if let Some(scale) = plan.image_cfg_scale {
        add("Image CFG scale", scale.to_string());
    }
    let Some(masking) = request
        .source
        .as_ref()
        .and_then(|source| source.masking.as_ref())
    else {
        return pairs;
    };
    if let Some(blur) = masking.blur {
        add("Mask blur", blur.to_string());
    }
    if masking.fill != Fill::Original {
        let name = match masking.fill {
            Fill::Original => "original",
            Fill::Fill => "fill",
            Fill::Noise => "latent noise",
            Fill::Nothing => "latent nothing",
        };
        add("Masked content", name.to_owned());
    }
    if let Some(around) = masking.only_masked {
        add("Inpaint area", "Only masked".to_owned());
        add("Masked area padding", around.to_string());
    }
    pairs
}

/// What a run began at, for the picture's own record.
pub(super) fn request_json(args: &ImageArgs, source: &Source, plan: &Plan) -> Value {
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let word = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
    let boxes: Vec<_> = args
        .mask_box
        .iter()
        .map(|b| [b.left, b.top, b.width, b.height])
        .collect();
    let mut object = json!({
        "init_image": path(&args.init_image),
        "strength": plan.strength,
        "fit": word(&source.fit),
        "like": plan.whose.id(),
        "image_cfg_scale": plan.image_cfg_scale,
        "mask": path(&args.mask),
        "mask_boxes": boxes,
        "invert_mask": args.invert_mask,
    });
    if let (Some(masking), Some(fields)) = (&source.masking, object.as_object_mut()) {
        fields.insert("mask_blur".to_owned(), json!(masking.blur));
        fields.insert("mask_edges".to_owned(), json!(word(&masking.edges)));
        fields.insert("fill".to_owned(), json!(word(&masking.fill)));
        fields.insert("only_masked".to_owned(), json!(masking.only_masked));
    }
    if let (Some(margins), Some(fields)) = (args.extend, object.as_object_mut()) {
        let sides = [margins.left, margins.top, margins.right, margins.bottom];
        fields.insert("extend".to_owned(), json!(sides));
        fields.insert("extend_feather".to_owned(), json!(args.extend_feather));
        fields.insert("extend_fill".to_owned(), json!(word(&args.extend_fill)));
    }
    object
}
