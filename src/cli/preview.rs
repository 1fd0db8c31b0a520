//! Previews on the terminal and in a file.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use super::args::{LibraryArgs, PreviewArgs, PreviewHow};
use super::fetch::open_part;
use crate::error::{Error, Result};
use crate::output::{Image, png};
use crate::picture::{Filter, Picture};
use crate::pipeline::{Engine, Preview, PreviewKind};

/// Pixels of the longer side on a terminal.
const SHOWN: u32 = 384;
/// Lines that a preview takes there.
const LINES: usize = 16;

/// What the pipeline is asked for.
pub(super) fn wanted(args: &PreviewArgs) -> Option<Preview> {
    let kind = match args.preview {
        PreviewHow::None => return None,
        PreviewHow::Latent => PreviewKind::Latent,
        PreviewHow::Taesd => PreviewKind::Tiny,
    };
    Some(Preview {
        kind,
        every: usize::from(args.preview_every),
    })
}

/// Gives the engine the decoder for previews, where they need one.
///
/// # Errors
/// [`Error::NotFound`] when there is none by its name; whatever opening it gives.
pub(super) fn equip(
    engine: Engine,
    args: &PreviewArgs,
    library: &LibraryArgs,
    no_mmap: bool,
) -> Result<Engine> {
    if args.preview != PreviewHow::Taesd {
        return Ok(engine);
    }
    let path = match &args.preview_vae {
        Some(path) => path.clone(),
        None => by_name(&engine, library)?,
    };
    let opened = open_part(&path, "vae", library, no_mmap)?;
    engine.with_preview_decoder(&opened.checkpoint)
}

/// The decoder in the models folders.
fn by_name(engine: &Engine, library: &LibraryArgs) -> Result<PathBuf> {
    let name = engine.spec().tiny_name().unwrap_or("taesd_decoder");
    match super::fetch::library(library)?.find(name)? {
        Some(entry) => Ok(entry.path),
        None => Err(Error::NotFound {
            what: format!("`{name}`"),
            hint: "--preview taesd needs a TAESD of the model's latents; give one with --preview-vae, or put one into the models folder's vae_approx"
                .to_owned(),
        }),
    }
}

/// How a terminal is given pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    /// <https://sw.kovidgoyal.net/kitty/graphics-protocol/>
    Kitty,
    /// <https://iterm2.com/documentation-images.html>
    Iterm,
    /// Two pixels a character, by the colours of its halves: any terminal with 24-bit colours.
    Blocks,
}

impl Protocol {
    /// By what terminals say of themselves.
    fn by(lookup: &dyn Fn(&str) -> Option<String>) -> Option<Self> {
        let holds = |name: &str, word: &str| lookup(name).is_some_and(|text| text.contains(word));
        let colours = ["truecolor", "24bit"];
        let colours = colours.iter().any(|word| holds("COLORTERM", word));
        let blocks = colours.then_some(Self::Blocks);
        // those within others swallow what they do not know
        if lookup("TMUX").is_some() || holds("TERM", "screen") {
            return blocks;
        }
        let kitty = lookup("KITTY_WINDOW_ID").is_some()
            || holds("TERM", "kitty")
            || holds("TERM", "ghostty")
            || holds("TERM_PROGRAM", "ghostty");
        let iterm = ["iTerm", "WezTerm", "mintty", "vscode"]
            .iter()
            .any(|name| holds("TERM_PROGRAM", name))
            || holds("LC_TERMINAL", "iTerm2");
        match (kitty, iterm) {
            (true, _) => Some(Self::Kitty),
            (_, true) => Some(Self::Iterm),
            _ => blocks,
        }
    }

    /// The bytes that show a picture at the cursor.
    ///
    /// # Errors
    /// When it cannot be resized or encoded.
    fn print(self, image: &Image) -> Result<String> {
        if self == Self::Blocks {
            return Ok(blocks(&fitted(image, 2 * LINES as u32)?));
        }
        let png = png::encode(&fitted(image, SHOWN)?, "", None)?;
        let text = base64(&png);
        Ok(match self {
            Self::Blocks => String::new(),
            Self::Iterm => format!(
                "\x1b]1337;File=inline=1;size={};height={LINES};preserveAspectRatio=1:{text}\x07",
                png.len()
            ),
            Self::Kitty => {
                /// Names our preview among the terminal's pictures.
                const NUMBER: u32 = 7501;
                /// Most bytes of a chunk.
                const CHUNK: usize = 4096;
                let chunks: Vec<&[u8]> = text.as_bytes().chunks(CHUNK).collect();
                let mut out = String::new();
                for (i, chunk) in chunks.iter().enumerate() {
                    let more = u8::from(i + 1 < chunks.len());
                    // a PNG, shown, without answers; one of the same number takes the place of the one before
                    let head = match i {
                        0 => format!("f=100,a=T,q=2,i={NUMBER},r={LINES},"),
                        _ => String::new(),
                    };
                    out.push_str(&format!("\x1b_G{head}m={more};"));
                    out.push_str(&String::from_utf8_lossy(chunk));
                    out.push_str("\x1b\\");
                }
                out
            }
        })
    }
}

/// Upper halves of characters in one pixel's colour, over the one below it.
fn blocks(image: &Image) -> String {
    let width = image.width as usize;
    let pixel = |x: usize, y: usize| {
        let at = image.rgb.get(3 * (y * width + x)..);
        at.and_then(|rgb| rgb.first_chunk::<3>()).copied()
    };
    let mut out = String::new();
    for y in (0..image.height as usize).step_by(2) {
        for x in 0..width {
            let [r, g, b] = pixel(x, y).unwrap_or_default();
            out.push_str(&format!("\x1b[38;2;{r};{g};{b}m"));
            if let Some([r, g, b]) = pixel(x, y + 1) {
                out.push_str(&format!("\x1b[48;2;{r};{g};{b}m"));
            }
            out.push('▀');
        }
        out.push_str("\x1b[0m\r\n");
    }
    out
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let byte = |i: usize| u32::from(three.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * i) & 63) as usize];
            out.push(if i > three.len() {
                '='
            } else {
                char::from(digit)
            });
        }
    }
    out
}

/// Where previews go.
#[derive(Clone)]
pub(super) struct Screen {
    protocol: Option<Protocol>,
    file: Option<PathBuf>,
    told: bool,
    /// There are lines of one before.
    shown: bool,
}

impl Screen {
    pub(super) fn new(args: &PreviewArgs, quiet: bool) -> Self {
        let terminal = !quiet && std::io::stderr().is_terminal();
        let lookup = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
        let protocol = Protocol::by(&lookup).filter(|_| terminal);
        if args.preview != PreviewHow::None && protocol.is_none() && args.preview_file.is_none() {
            tracing::warn!("this terminal shows no pictures; give --preview-file a place for them");
        }
        Self {
            protocol,
            file: args.preview_file.clone(),
            told: false,
            shown: false,
        }
    }

    /// Shows one. What goes wrong is told once: a picture is not given up for its preview.
    pub(super) fn show(&mut self, image: &Image) {
        if let Err(error) = self.try_show(image)
            && !self.told
        {
            self.told = true;
            tracing::warn!("the preview cannot be shown: {error}");
        }
    }

    fn try_show(&mut self, image: &Image) -> Result<()> {
        if let Some(file) = &self.file {
            write(file, &png::encode(image, "", None)?)?;
        }
        if let Some(protocol) = self.protocol {
            let picture = protocol.print(image)?;
            let mut out = std::io::stderr().lock();
            // room for it, or the room of the one before; then back to the line below
            let room = if self.shown {
                String::new()
            } else {
                "\n".repeat(LINES)
            };
            self.shown = true;
            let written = write!(
                out,
                "{room}\x1b[{LINES}A\r\x1b7{picture}\x1b8\x1b[{LINES}B\r"
            );
            written
                .and_then(|()| out.flush())
                .map_err(|source| Error::disk(Path::new("stderr"), "write to", source))?;
        }
        Ok(())
    }
}

/// The picture with so many pixels along its longer side.
fn fitted(image: &Image, shown: u32) -> Result<Image> {
    let long = image.width.max(image.height).max(1);
    let side = |pixels: u32| {
        let scaled = u64::from(pixels) * u64::from(shown) / u64::from(long);
        u32::try_from(scaled.max(1)).unwrap_or(shown)
    };
    let filter = if long < shown {
        Filter::Nearest
    } else {
        Filter::Lanczos
    };
    let picture = Picture::try_from(image.clone())?;
    Ok(picture
        .resize(side(image.width), side(image.height), filter)?
        .into_image())
}

/// Replaces a file whole, so that whoever watches it never reads half a picture.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    let beside = path.with_file_name(name);
    std::fs::write(&beside, bytes)
        .and_then(|()| std::fs::rename(&beside, path))
        .map_err(|source| Error::disk(path, "write", source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits() {
        // RFC 4648, section 10
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn terminals() {
        let by = |pairs: &[(&str, &str)]| {
            let find = |name: &str| {
                let found = pairs.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            Protocol::by(&find)
        };
        assert_eq!(by(&[("TERM", "xterm-kitty")]), Some(Protocol::Kitty));
        assert_eq!(by(&[("TERM_PROGRAM", "iTerm.app")]), Some(Protocol::Iterm));
        assert_eq!(by(&[("TERM_PROGRAM", "iTerm.app"), ("TMUX", "x")]), None);
        assert_eq!(by(&[("TERM", "xterm-256color")]), None);
        let colours = ("COLORTERM", "truecolor");
        assert_eq!(by(&[colours, ("TMUX", "x")]), Some(Protocol::Blocks));
        assert_eq!(
            by(&[colours, ("TERM", "xterm-kitty")]),
            Some(Protocol::Kitty)
        );
    }

    #[test]
    fn kitty_is_given_pieces() {
        // noise, which no PNG makes small
        let noise =
            (0..99 * 99 * 3u32).map(|i| (i * i).wrapping_mul(2_654_435_761).to_be_bytes()[0]);
        let image = picture(99, 99, noise.collect());
        let text = Protocol::Kitty.print(&image).unwrap_or_default();
        assert!(text.matches("\x1b_G").count() > 1);
        assert!(
            text.starts_with("\x1b_Gf=100,a=T,q=2,i=7501,r=16,m=1;") && text.contains("\x1b_Gm=0;")
        );
    }

    fn picture(width: u32, height: u32, rgb: Vec<u8>) -> Image {
        Image { width, height, rgb }
    }

    #[test]
    fn characters_are_two_pixels() {
        let rgb = [[1, 2, 3], [4, 5, 6], [7, 8, 9]].concat();
        let text = blocks(&picture(1, 3, rgb));
        assert_eq!(
            text,
            "\x1b[38;2;1;2;3m\x1b[48;2;4;5;6m▀\x1b[0m\r\n\x1b[38;2;7;8;9m▀\x1b[0m\r\n"
        );
        let wide = Protocol::Blocks.print(&picture(64, 16, vec![9; 64 * 16 * 3]));
        assert_eq!(wide.unwrap_or_default().matches('▀').count(), 32 * 4);
    }
}
