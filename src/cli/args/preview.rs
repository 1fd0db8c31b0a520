//! Flags of previews.

use std::path::PathBuf;

use clap::Args;

/// Pictures while the run goes.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Previews")]
pub struct PreviewArgs {
    /// Show what the picture is going to be, in terminals that show pictures (kitty's and iTerm2's ways; two pixels a character where there are 24-bit colours) and in --preview-file
    #[arg(long, value_enum, default_value_t, value_name = "HOW")]
    pub preview: PreviewHow,
    /// Steps from one preview to the next
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000), requires = "preview")]
    pub preview_every: u16,
    /// A PNG that holds the newest preview
    #[arg(long, value_name = "FILE", requires = "preview")]
    pub preview_file: Option<PathBuf>,
    /// The TAESD of --preview taesd [default: the one in the models folders by its name, such as taesd_decoder]
    #[arg(long, value_name = "FILE", requires = "preview")]
    pub preview_vae: Option<PathBuf>,
}

/// How previews are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum PreviewHow {
    /// None
    #[default]
    None,
    /// A pixel a latent
    Latent,
    /// By a tiny decoder
    Taesd,
}
