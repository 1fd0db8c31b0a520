//! LoRAs beside the weights that they change give what they give merged, whatever the network and the file.

use candle_core::Tensor;
use serde_json::Value;

use super::{
    MODES, adapters, adapters_by, case, engine, folder, latents_of, record, write, write_tensors,
};
use crate::models::{list, text};
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm, Law, SingleForm, Stored, encode, uniform};
use safetensors::Dtype;
use sd_rs::adapters::Mode;

/// Relative distance of runs whose sums are in another order.
const SUMMED: f64 = 2e-5;

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let square = |x: Tensor| -> f64 {
        let sum = x.sqr().unwrap().sum_all().unwrap();
        f64::from(sum.to_scalar::<f32>().unwrap())
    };
    (square((a - b).unwrap()) / square(a.clone())).sqrt()
}

#[test]
fn whatever_is_worn() {
    let more = std::fs::read_to_string(folder().join("cases_dit.json")).unwrap();
    let more: Value = serde_json::from_str(&more).unwrap();
    let mut seen = 0;
    for case in list(&record()["cases"]).iter().chain(list(&more["cases"])) {
        let name = text(&case["name"]);
        let (dir, model) = (Dir::new(), Case::load(text(&case["base"])));
        model.write_folder(&dir.path("model"), &FolderForm::default());
        write(case, &dir.path("lora.safetensors"));
        let of = |mode| {
            let adapters = adapters_by(mode, &dir.path("lora.safetensors"), 0.75);
            let engine = engine(&dir.path("model"), &adapters);
            latents_of(&engine, &model, None, Some(2))
        };
        let [merged, beside] = MODES.map(of);
        let off = distance(&merged, &beside);
        assert!(off < SUMMED, "{name}: {off:e}");
        // those of text encoders, and what is no product of two, are merged in any case
        let is_merged = ["t5", "dora", "lycoris"]
            .iter()
            .any(|what| name.starts_with(what));
        assert_eq!(off == 0.0, is_merged, "{name}: {off:e}");
        seen += 1;
    }
    assert!(seen > 12, "{seen}");
}

/// A file that keeps weights compressed is left so; one that does not is merged with, unless strengths change.
#[test]
fn compressed_weights_stay_so() {
    let case = case("kohya-sd1");
    let (dir, model) = (Dir::new(), Case::load(text(&case["base"])));
    model.write_single_file(&dir.path("plain.safetensors"), &SingleForm::default());
    write(&case, &dir.path("lora.safetensors"));
    dir.ok(&[
        "convert",
        "plain.safetensors",
        "q8.gguf",
        "--quantise",
        "q8_0",
    ]);
    let of = |file: &str, mode, changes| {
        let path = dir.path("lora.safetensors");
        let mut adapters = match changes {
            true => adapters_by(Mode::Runtime, &path, 0.75),
            false => adapters(&path, 0.75),
        };
        adapters.set_mode(mode);
        let engine = engine(&dir.path(file), &adapters);
        latents_of(&engine, &model, Some("Euler"), Some(3))
    };
    let off = |file: &str, changes| {
        let auto = of(file, Mode::Auto, changes);
        MODES.map(|mode| distance(&auto, &of(file, mode, changes)))
    };
    let [merged, beside] = off("plain.safetensors", false);
    assert!(merged == 0.0 && beside > 0.0, "{merged:e} {beside:e}");
    // merging anew at every step would take longer than all steps
    let [merged, beside] = off("plain.safetensors", true);
    assert!(merged > 0.0 && beside == 0.0, "{merged:e} {beside:e}");
    let [merged, beside] = off("q8.gguf", false);
    assert!(merged > 0.0 && merged < SUMMED, "{merged:e}");
    // what the file does not keep compressed is merged
    assert!(beside < SUMMED, "{beside:e}");
}

/// At run time a change stays apart from its weight only where it is much smaller.
#[test]
fn what_is_not_thin_is_merged() {
    let (dir, model) = (Dir::new(), Case::load("single-sd1"));
    model.write_folder(&dir.path("model"), &FolderForm::default());
    let block = "unet.down_blocks.0.attentions.0.transformer_blocks.0";
    // 32 inputs; one rank of (32 + 32) / 32² and of (32 + 256) / (32 · 256)
    for (layer, outputs, is_thin) in [("attn1.to_q", 32, false), ("ff.net.0.proj", 256, true)] {
        let tensor = |end: &str, shape: Vec<usize>| {
            let law = Law {
                scale: 0.3,
                offset: 0.0,
            };
            Stored {
                bytes: encode(&uniform(end, &shape, law), Dtype::F32, Dtype::F32),
                dtype: Dtype::F32,
                name: format!("{block}.{layer}.{end}.weight"),
                shape,
            }
        };
        let tensors = [
            tensor("lora_A", vec![1, 32]),
            tensor("lora_B", vec![outputs, 1]),
        ];
        let path = dir.path("lora.safetensors");
        write_tensors(&tensors, &Value::Null, &path);
        let [merged, runtime] = MODES.map(|mode| {
            let mut adapters = adapters(&path, 1.0);
            adapters.set_mode(mode);
            let engine = engine(&dir.path("model"), &adapters);
            latents_of(&engine, &model, Some("Euler"), Some(2))
        });
        let off = distance(&merged, &runtime);
        assert!(off < SUMMED && (off > 0.0) == is_thin, "{layer}: {off:e}");
    }
}
