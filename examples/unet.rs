//! One call of a model's UNet, for comparisons: reads `sample [n, c, h, w]`, `timestep [1]`, `context [n, t, width]` and, for those that take
//! one, the vector beside the time (`added [n, width]`) from a safetensors file and writes `prediction [n, c, h, w]` to another.
//!
//! ```console
//! $ cargo run --release --example unet -- MODEL f32 inputs.safetensors prediction.safetensors
//! ```

use std::collections::HashMap;

use candle_core::{Device, safetensors};
use sd_models::variant::Variant;
use sd_rs::checkpoint::{Checkpoint, detect};
use sd_rs::device::{self, DtypeChoice};
use sd_rs::pipeline::{Conditions, Networks};
use sd_rs::spec::ModelSpec;
use sd_rs::{Error, Result};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, dtype, inputs, prediction] = args.as_slice() else {
        return Err(Error::Usage(
            "expected MODEL, f32 or bf16, a file of inputs and one to write".to_owned(),
        ));
    };
    let dtype = match dtype.as_str() {
        "bf16" => DtypeChoice::Bf16,
        _ => DtypeChoice::F32,
    };
    let dtype = device::dtype(dtype, &Device::Cpu)?;
    let checkpoint = Checkpoint::open(model)?;
    let spec = ModelSpec::read(&checkpoint, &detect(&checkpoint))?;
    let (networks, _) = Networks::load(&checkpoint, &spec, &Device::Cpu, dtype)?;

    let inputs = safetensors::load(inputs, &Device::Cpu)?;
    let input = |name: &str| {
        let found = inputs.get(name);
        found.ok_or_else(|| Error::Usage(format!("the inputs lack `{name}`")))
    };
    let (sample, context) = (input("sample")?, input("context")?);
    let timestep = f64::from(input("timestep")?.flatten_all()?.to_vec1::<f32>()?[0]);
    let size = <[usize; 4]>::from(sample.dims4()?);
    let mut conditions = Conditions::of_text(context.clone());
    conditions.added = inputs.get("added").cloned();
    conditions.guidance = inputs.get("guidance").cloned();
    let mut denoiser = networks.denoiser(
        size,
        &conditions,
        &[timestep],
        (&Variant::default(), Default::default()),
    )?;
    let out = denoiser.predict(sample, timestep)?;
    safetensors::save(&HashMap::from([("prediction", out)]), prediction)?;
    Ok(())
}
