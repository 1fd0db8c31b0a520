//! What a program can hear and keep of a run: events as they happen, a wish to stop, the latents before they are decoded.
//!
//! ```console
//! $ cargo run --release --example latents -- latents.safetensors
//! ```

use std::path::Path;

use sd_rs::device::{self, DeviceChoice, DtypeChoice};
use sd_rs::{Control, Engine, Event, Plan, Request, Result, output};

fn main() -> Result<()> {
    let path = std::env::args().nth(1);
    let path = path.unwrap_or("latents.safetensors".to_owned());
    let device = device::open(DeviceChoice::Auto)?;
    let dtype = device::dtype(DtypeChoice::Auto, &device)?;
    let engine = Engine::load(&sd_rs::demo::checkpoint()?, &device, dtype)?;
    let request = Request {
        prompt: "mountains at night with a white moon".to_owned(),
        sampler: Some("Euler a".to_owned()),
        steps: Some(12),
        seed: Some(7),
        ..Request::default()
    };
    let plan = Plan::new(&engine, &request)?;
    eprintln!(
        "{} × {}, {} steps of {}, about {} MB",
        plan.width,
        plan.height,
        plan.steps,
        plan.sampler,
        plan.memory / 1_000_000
    );

    let mut listener = |event: Event| {
        match event {
            Event::Warning(text) => eprintln!("note: {text}"),
            Event::Encoded => eprintln!("the prompt is encoded"),
            Event::Step { done, total } => eprintln!("step {done} of {total}"),
            // only where the request asks for them, or memory is short
            Event::Preview(_) | Event::Enlarging { .. } | Event::Tile { .. } => {}
            Event::Decoding => eprintln!("the latents are being decoded"),
        }
        Control::Continue // `Control::Stop` ends the run with `Error::Interrupted`
    };
    engine.generate(&request, &plan, &mut listener, &mut |batch| {
        // [b, 4, h/8, w/8] in f32, as the UNet left them: what `--save-latents` writes
        let values: Vec<f32> = batch.latents.flatten_all()?.to_vec1()?;
        let largest = values.iter().fold(0f32, |most, v| most.max(v.abs()));
        eprintln!("latents {:?}, at most {largest:.2}", batch.latents.dims());
        output::save_latents(Path::new(&path), &values, batch.latents.dims(), true)
    })
}
