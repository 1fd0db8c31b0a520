//! `sd-rs control`: what a network that steers would see of a picture.

use super::args::ControlMapArgs;
use super::print_line;
use crate::error::Result;
use crate::output::{NewFile, png};
use crate::picture::Picture;

/// Runs the command.
///
/// # Errors
/// Whatever stops it.
pub(super) fn run(args: &ControlMapArgs) -> Result<()> {
    // before any work, so that a long one is not for nothing
    let mut file = NewFile::create(&args.output, args.overwrite)?;
    let picture = Picture::open(&args.picture)?;
    let map = args.preprocessor.apply(&picture)?;
    let name = super::args::value_name(&args.preprocessor);
    let text = format!("Module: {name}");
    let bytes = png::encode(&map.into_image(), &text, None)?;
    file.write(&bytes)?;
    file.finish()?;
    print_line(&args.output.display().to_string())
}
