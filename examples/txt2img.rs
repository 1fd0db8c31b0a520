//! A prompt becomes a picture, with the demonstration checkpoint that is built into the library.
//!
//! ```console
//! $ cargo run --release --example txt2img -- "the sea at sunset with a red sun" sea.png
//! ```

use sd_rs::device::{self, DeviceChoice, DtypeChoice};
use sd_rs::output::png;
use sd_rs::{Control, Engine, Plan, Request, Result};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let prompt = args.next().unwrap_or("a yellow star".to_owned());
    let path = args.next().unwrap_or("txt2img.png".to_owned());

    // `Checkpoint::open("model.safetensors")` for one of your own
    let checkpoint = sd_rs::demo::checkpoint()?;
    let device = device::open(DeviceChoice::Auto)?;
    let dtype = device::dtype(DtypeChoice::Auto, &device)?;
    let engine = Engine::load(&checkpoint, &device, dtype)?;

    let request = Request {
        prompt: prompt.clone(),
        seed: Some(1),
        ..Request::default()
    };
    let plan = Plan::new(&engine, &request)?; // every refusal happens here
    engine.generate(&request, &plan, &mut |_| Control::Continue, &mut |batch| {
        for picture in &batch.pictures {
            let bytes = png::encode(&picture.image, &prompt, None)?;
            std::fs::write(&path, bytes).map_err(|e| sd_rs::Error::disk(&path, "write", e))?;
            eprintln!("{path}: seed {}", picture.seed);
        }
        Ok(())
    })
}
