//! The one integration binary. A new test goes into the module whose line describes it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

/// LoRA and its relatives against diffusers, PEFT and LyCORIS.
mod adapters;
/// Guards the direction of imports and the places of `cfg(feature)` and `unsafe` by reading the sources.
mod architecture;
/// Autoencoders of other files, tiny ones too.
mod autoencoders;
/// Tiles, textures, previews and second passes, against diffusers, torch and k-diffusion.
mod canvas;
/// Whole runs on a card that an interpreter plays, against diffusers.
mod card;
/// Formats, truncated and hostile files, families.
mod checkpoint;
/// The binary: results, exit statuses, messages.
mod cli;
/// ControlNets, T2I-Adapters and what is made of their pictures, against diffusers and OpenCV.
mod control;
/// `convert`: round trips, types, quantised, merged; against diffusers, gguf and torch.
mod convert;
/// Stable Diffusion 3 and FLUX: transformers, T5, what their single files are called inside.
mod dit;
/// Textual inversions against diffusers and transformers.
mod embeddings;
/// Runs that begin at a picture, against diffusers.
mod from_picture;
/// Guidance of special kinds, regions and shortcuts against diffusers and DeepCache.
mod guidance;
/// The Hub's client and the models folder, against a Hub on this machine that behaves and misbehaves.
mod hub;
/// Networks and whole runs against diffusers and transformers, from every form of file.
mod models;
/// UNets in files of their own, with the rest beside them.
mod parts;
/// Pictures from files, resized and blurred, against Pillow and OpenCV.
mod picture;
/// Pictures drawn anew tile by tile, against runs of their own.
mod redraw;
/// Noise levels, trajectories and random numbers against diffusers, k-diffusion and torch.
mod samplers;
/// Runs that begin at a picture, and inpainting's levels, against diffusers' schedulers and k-diffusion's samplers.
mod samplers_picture;
/// Brownian trees against torchsde, stochastic samplers against k-diffusion and diffusers.
mod samplers_sde;
/// The XL family: two towers, sizes, refiner, continuous noise levels.
mod sdxl;
/// Temporary folders, running the binary.
mod support;
/// Upscalers of attention within windows against spandrel.
mod swin;
/// T5's tokens against transformers, and tokenizers that folders bring.
mod t5;
/// Prompt grammar, tokens and chunks against transformers and A1111's rules.
mod text;
/// Upscalers against spandrel: spellings, tiles, the command.
mod upscale;
