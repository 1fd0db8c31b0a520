//! What networks were trained to see of a picture: edges, colours, its inverse. Those that need no network of their own.

mod canny;
mod palette;
mod scribble;

use crate::error::Result;
use crate::picture::Picture;

pub use canny::canny;

/// What is made of a picture first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Preprocessor {
    /// Nothing: the picture is a map already
    #[default]
    None,
    /// Edges, as OpenCV's Canny with the thresholds 100 and 200
    Canny,
    /// Dark lines as white ones on black, as A1111's scribble_xdog
    Scribble,
    /// Black and white exchanged: for drawings in black on white
    Invert,
    /// White where the grey is above 127, black elsewhere
    Threshold,
    /// The picture itself, as A1111's tile_resample at rate 1: for ControlNets that repair or enlarge
    Tile,
    /// Squares of 64 pixels of one colour: for T2I-Adapters of colour
    Color,
    /// The picture itself, of which what the mask hides is left out: for ControlNets that fill in
    Inpaint,
}

/// Thresholds of edges where nobody says otherwise.
const CANNY: (i32, i32) = (100, 200);
/// Above this a grey is white.
const WHITE: u8 = 127;

impl Preprocessor {
    /// The map of `picture`, of the same size.
    ///
    /// # Errors
    /// When the sizes do not fit.
    pub fn apply(self, picture: &Picture) -> Result<Picture> {
        let (width, height) = (picture.width(), picture.height());
        let size = (width as usize, height as usize);
        let rgb = match self {
            Self::None | Self::Tile | Self::Inpaint => return Ok(picture.clone()),
            Self::Canny => grey_to_rgb(&canny(picture.rgb(), size, CANNY)),
            Self::Scribble => grey_to_rgb(&scribble::xdog(picture.rgb(), size)),
            Self::Invert => picture.rgb().iter().map(|value| 255 - value).collect(),
            Self::Threshold => {
                let white = |grey: u8| if grey > WHITE { 255 } else { 0 };
                let greys = picture.rgb().as_chunks().0.iter().map(opencv_grey);
                grey_to_rgb(&greys.map(white).collect::<Vec<u8>>())
            }
            Self::Color => palette::mosaic(picture.rgb(), size),
        };
        Picture::from_rgb(width, height, rgb)
    }
}

fn grey_to_rgb(grey: &[u8]) -> Vec<u8> {
    grey.iter().flat_map(|value| [*value; 3]).collect()
}

/// Luma as OpenCV's `RGB2GRAY` has it: 15 bits of fraction.
fn opencv_grey(&[r, g, b]: &[u8; 3]) -> u8 {
    let sum = 9798 * u32::from(r) + 19235 * u32::from(g) + 3735 * u32::from(b) + (1 << 14);
    // at most 255
    (sum >> 15) as u8
}
