//! What leaves the program: pictures with the story of how they were made, and latents. Nothing here knows how they are computed.

mod file;
pub mod image;
pub mod infotext;
pub mod png;
pub mod save;
mod stream;

pub use image::Image;
pub use infotext::{NoiseSource, Parameters};
pub use save::{Target, check_file, check_target, save, save_bytes, save_latents};
pub use stream::{NewFile, NewFolder, check_room};
