//! LoRAs of Stable Diffusion 3 and FLUX under kohya's, PEFT's and XLabs' names, T5's among them: merged weights against diffusers and PEFT.

use safetensors::Dtype;
use sd_rs::adapters::Owner;
use sd_rs::checkpoint::{Checkpoint, detect};
use sd_rs::pipeline::bind_adapters;
use sd_rs::spec::ModelSpec;
use serde_json::Value;

use super::{adapters, folder, read, write};
use crate::models::{list, text};
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm, Stored};

/// Relative distance of the sums that the fixtures keep of a weight.
const SUMS: f64 = 1e-5;

/// A weight's rows and columns against a wave: two vectors one behind the other.
fn sums(numbers: &[f32], rows: usize) -> Vec<f64> {
    let columns = numbers.len() / rows;
    let wave = |i: usize| f64::from((i as f32 * 0.37).cos());
    let mut sums = vec![0.0; rows + columns];
    for (r, row) in numbers.chunks_exact(columns).enumerate() {
        for (c, x) in row.iter().enumerate() {
            sums[r] += f64::from(*x) * wave(c);
            sums[rows + c] += f64::from(*x) * wave(r);
        }
    }
    sums
}

#[test]
fn every_trainers_names_are_understood() {
    let record = std::fs::read_to_string(folder().join("cases_dit.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    let expected = read("expected_dit.safetensors");
    for case in list(&record["cases"]) {
        let (name, component) = (text(&case["name"]), text(&case["component"]));
        let (dir, model) = (Dir::new(), Case::load(text(&case["base"])));
        model.write_folder(&dir.path("model"), &FolderForm::default());
        write(case, &dir.path("lora.safetensors"));
        let checkpoint = Checkpoint::open(dir.path("model")).unwrap();
        let spec = ModelSpec::read(&checkpoint, &detect(&checkpoint)).unwrap();
        let worn = adapters(
            &dir.path("lora.safetensors"),
            case["strength"].as_f64().unwrap(),
        );
        let bound = bind_adapters(&spec, &worn).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(bound.warnings(), &[] as &[String], "{name}");
        let owner = match component {
            "transformer" => Owner::Denoiser,
            "text_encoder_2" => Owner::Text("text_encoder_2"),
            _ => Owner::Text("text_encoder_3"),
        };
        let weights = model.weights(component, Some(Dtype::F32));
        let merged = case["merged"].as_object().unwrap();
        for (weight, key) in merged {
            let base: &Stored = weights.iter().find(|w| w.name == *weight).unwrap();
            let numbers = base.bytes.as_chunks().0.iter();
            let mut got: Vec<f32> = numbers.map(|b| f32::from_le_bytes(*b)).collect();
            bound.apply(owner, weight, &base.shape, &mut got).unwrap();
            let want = &expected[text(key)].data;
            let got = sums(&got, base.shape[0]);
            assert_eq!(got.len(), want.len());
            let norm: f64 = want.iter().map(|x| f64::from(*x).powi(2)).sum();
            let off: f64 = got
                .iter()
                .zip(want)
                .map(|(g, w)| (g - f64::from(*w)).powi(2))
                .sum();
            let off = (off / norm).sqrt();
            assert!(off < SUMS, "{name}: {weight} is {off:.1e} off");
        }
        assert_eq!(bound.len(), merged.len(), "{name}");
    }
}
