//! A part of a picture is painted anew; every pixel outside of it stays as it is.
//!
//! ```console
//! $ cargo run --release --example txt2img -- "hills at noon with a yellow sun" hills.png
//! $ cargo run --release --example inpaint -- hills.png "hills at noon with a white moon" 40,8,64,56 moon.png
//! ```

use std::path::Path;

use sd_rs::device::{self, DeviceChoice, DtypeChoice};
use sd_rs::output::png;
use sd_rs::picture::{Grey, Picture};
use sd_rs::pipeline::{Edges, Fill, Masking, Source};
use sd_rs::{Control, Engine, Error, Plan, Request, Result};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [from, prompt, part, to] = args.as_slice() else {
        let usage = "usage: inpaint PICTURE PROMPT LEFT,TOP,WIDTH,HEIGHT OUT";
        return Err(Error::Usage(usage.to_owned()));
    };
    let picture = Picture::open(Path::new(from))?;
    let mask = mask(&picture, part)?;

    let checkpoint = sd_rs::demo::checkpoint()?;
    let device = device::open(DeviceChoice::Auto)?;
    let dtype = device::dtype(DtypeChoice::Auto, &device)?;
    let engine = Engine::load(&checkpoint, &device, dtype)?;

    let source = Source {
        strength: Some(1.0), // nothing of what was there is kept
        masking: Some(Masking {
            mask,
            blur: None,
            fill: Fill::Original,
            only_masked: None,
            edges: Edges::Hard,
        }),
        ..Source::new(picture)
    };
    let request = Request {
        prompt: prompt.clone(),
        seed: Some(1),
        source: Some(source),
        ..Request::default()
    };
    let plan = Plan::new(&engine, &request)?; // every refusal happens here
    engine.generate(&request, &plan, &mut |_| Control::Continue, &mut |batch| {
        for picture in &batch.pictures {
            let bytes = png::encode(&picture.image, prompt, None)?;
            std::fs::write(to, bytes).map_err(|e| Error::disk(to, "write", e))?;
        }
        Ok(())
    })
}

/// White where `part` is.
fn mask(picture: &Picture, part: &str) -> Result<Grey> {
    let numbers: Vec<u32> = part
        .split(',')
        .filter_map(|n| n.trim().parse().ok())
        .collect();
    let [left, top, width, height] = numbers[..] else {
        return Err(Error::Usage(format!(
            "{part}: expected LEFT,TOP,WIDTH,HEIGHT"
        )));
    };
    let inside = |x: u32, y: u32| {
        (left..left.saturating_add(width)).contains(&x)
            && (top..top.saturating_add(height)).contains(&y)
    };
    let values = (0..picture.height())
        .flat_map(|y| (0..picture.width()).map(move |x| if inside(x, y) { 255 } else { 0 }));
    Grey::new(picture.width(), picture.height(), values.collect())
}
