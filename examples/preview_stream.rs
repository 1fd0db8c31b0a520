//! A run whose previews go to another program: a line a step, and a PNG a preview in this folder.
//!
//! ```sh
//! cargo run --release --example preview_stream -- "a fox" [MODEL]
//! ```

use std::path::PathBuf;

use sd_rs::checkpoint::Checkpoint;
use sd_rs::device::{self, DeviceChoice, DtypeChoice};
use sd_rs::output::png;
use sd_rs::pipeline::{Control, Engine, Event, Plan, Preview, PreviewKind, Request};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let prompt = args.next().unwrap_or_else(|| "a fox".to_owned());
    let checkpoint = match args.next() {
        Some(path) => Checkpoint::open(PathBuf::from(path))?,
        None => sd_rs::demo::checkpoint()?,
    };
    let device = device::open(DeviceChoice::Auto)?;
    let dtype = device::dtype(DtypeChoice::Auto, &device)?;
    let engine = Engine::load(&checkpoint, &device, dtype)?;
    let request = Request {
        prompt,
        preview: Some(Preview {
            kind: PreviewKind::Latent,
            every: 2,
        }),
        ..Request::default()
    };
    let plan = Plan::new(&engine, &request)?;
    let mut step = 0;
    let mut listener = |event: Event| {
        match event {
            Event::Step { done, total } => {
                step = done;
                eprintln!("step {done} of {total}");
            }
            Event::Preview(image) => {
                let path = format!("preview-{step:03}.png");
                let written =
                    png::encode(&image, "", None).map(|bytes| std::fs::write(&path, bytes));
                match written {
                    Ok(Ok(())) => eprintln!("{path} {}x{}", image.width, image.height),
                    // whoever shows previews may have gone away
                    _ => return Control::Stop,
                }
            }
            _ => {}
        }
        Control::Continue
    };
    engine.generate(&request, &plan, &mut listener, &mut |batch| {
        for picture in &batch.pictures {
            eprintln!("done: {}x{}", picture.image.width, picture.image.height);
        }
        Ok(())
    })?;
    Ok(())
}
