//! The fixtures are what they say: the bits are numpy's, and the files on disk have the names and types of real ones.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use half::f16;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::json::{rows, text};
use super::*;

/// What `digest` in weights.py computes: the beginnings of all tensors.
fn sha256<'a>(tensors: impl Iterator<Item = &'a Vec<u8>>) -> String {
    let mut hash = Sha256::new();
    tensors.for_each(|bytes| hash.update(&bytes[..bytes.len().min(1 << 18)]));
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn digest(tensors: &[Stored]) -> String {
    sha256(tensors.iter().map(|tensor| &tensor.bytes))
}

/// Names, shapes, types and bytes of all tensors of a file.
fn read(path: &Path) -> HashMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter();
    tensors
        .map(|(name, view)| {
            (
                name,
                (view.dtype(), view.shape().to_vec(), view.data().to_vec()),
            )
        })
        .collect()
}

#[test]
fn known_bits() {
    // from weights.py: [f"{v:08x}" for v in uniform("unet/conv_in.weight", [4], 0.2887, 1.0).view(torch.int32)]
    let values = uniform(
        "unet/conv_in.weight",
        &[4],
        Law {
            scale: 0.2887,
            offset: 1.0,
        },
    );
    let bits: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
    assert_eq!(bits, KNOWN);
}

#[test]
fn weights_and_inputs_are_numpys() {
    for name in Case::names() {
        let case = Case::load(&name);
        for component in case.components() {
            let wanted = text(&case.record["components"][component]["sha256"]);
            assert_eq!(
                digest(&case.weights(component, None)),
                wanted,
                "{name} {component}"
            );
        }
        let inputs: Vec<Vec<u8>> = rows(&case.record["inputs"]["tensors"])
            .iter()
            .map(|row| {
                encode(
                    &case.input(row[0].as_str().unwrap()).data,
                    Dtype::F32,
                    Dtype::F32,
                )
            })
            .collect();
        assert_eq!(
            sha256(inputs.iter()),
            case.record["inputs"]["sha256"],
            "{name}"
        );
    }
}

#[test]
fn what_is_expected_is_there_and_finite() {
    for name in Case::names() {
        let case = Case::load(&name);
        let expected = case.expected();
        let first = if case.is_dit() {
            "transformer/0"
        } else {
            "unet/0"
        };
        assert!(expected.contains_key(first), "{name}");
        for (tensor, values) in expected {
            assert_eq!(
                values.shape.iter().product::<usize>(),
                values.data.len(),
                "{name} {tensor}"
            );
            assert!(
                values.data.iter().all(|value| value.is_finite()),
                "{name} {tensor}"
            );
        }
    }
    assert!(Case::load("sd1-odd").noise("unet/0").unwrap() < 1e-4);
}

#[test]
fn folders_in_all_forms() {
    let case = Case::load("sd1-odd");
    let folder = tempfile::tempdir().unwrap();
    let at = |path: &str| folder.path().join(path);
    case.write_folder(folder.path(), &FolderForm::default());
    let plain = read(&at("vae/diffusion_pytorch_model.safetensors"));
    assert_eq!(plain.len(), case.weights("vae", None).len());
    assert!(at("model_index.json").is_file() && at("tokenizer/tokenizer_config.json").is_file());

    let form = FolderForm {
        dtype: Some(Dtype::F32),
        variant: Some("fp32"),
        shards: Some(3),
        old_names: true,
    };
    case.write_folder(folder.path(), &form);
    let index = fs::read(at(
        "vae/diffusion_pytorch_model.safetensors.index.fp32.json",
    ))
    .unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), plain.len());
    let key = "encoder.mid_block.attentions.0.query.weight";
    let (dtype, _, bytes) = &read(&at("vae").join(map[key].as_str().unwrap()))[key];
    let (_, _, halves) = &plain["encoder.mid_block.attentions.0.to_q.weight"];
    let widened: Vec<u8> = halves
        .as_chunks()
        .0
        .iter()
        .flat_map(|b| f16::from_le_bytes(*b).to_f32().to_le_bytes())
        .collect();
    assert!(*dtype == Dtype::F32 && *bytes == widened);
    let last = read(&at("text_encoder/model.fp32-00003-of-00003.safetensors"));
    assert!(last.contains_key("text_model.final_layer_norm.weight"));
}

#[test]
fn folders_of_two_towers() {
    let case = Case::load("sdxl");
    assert!(case.is_sdxl() && case.has_needs());
    assert!(!Case::load("sd1-odd").is_sdxl() && !Case::load("sd1-odd").has_needs());
    let folder = tempfile::tempdir().unwrap();
    let form = FolderForm {
        old_names: true,
        ..FolderForm::default()
    };
    case.write_folder(folder.path(), &form);
    for tower in ["text_encoder", "text_encoder_2"] {
        let tensors = read(&folder.path().join(tower).join("model.safetensors"));
        assert!(tensors.contains_key("text_model.final_layer_norm.weight"));
        let projection = tensors.get("text_projection.weight");
        assert_eq!(projection.is_some(), tower == "text_encoder_2");
    }
    let pad = |tokenizer: &str| {
        let path = folder.path().join(tokenizer).join("tokenizer_config.json");
        let config: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        text(&config["pad_token"])
    };
    assert_eq!(
        [pad("tokenizer"), pad("tokenizer_2")],
        ["<|endoftext|>", "!"]
    );
}

#[test]
fn single_files_hold_numpys_weights() {
    for name in [
        "single-sd1",
        "single-sd2",
        "single-sd2-v",
        "single-sdxl",
        "single-sdxl-v",
        "single-refiner",
        "single-sd3",
        "single-flux",
        "sd35",
        "flux-dev",
    ] {
        let case = Case::load(name);
        assert_eq!(
            digest(&case.single_weights(None)),
            case.record["single_file"]["sha256"],
            "{name}"
        );
    }
}

#[test]
fn single_files_in_all_forms() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let case = Case::load("single-sd1");
    case.write_single_file(&path, &SingleForm::default());
    let all = read(&path);
    let (dtype, shape, bytes) =
        &all["cond_stage_model.transformer.text_model.embeddings.position_ids"];
    assert!(*dtype == Dtype::I64 && shape == &[1, 77] && bytes[8] == 1);
    assert_eq!(
        all["first_stage_model.encoder.mid.attn_1.q.weight"].1,
        [64, 64, 1, 1]
    );
    let (_, _, alphas) = &all["alphas_cumprod"];
    // the values of every Stable Diffusion 1
    assert_eq!(f32::from_le_bytes(alphas[..4].try_into().unwrap()), 0.99915);
    assert!((f32::from_le_bytes(alphas[3996..].try_into().unwrap()) - 0.004660).abs() < 1e-6);
    assert!(all.contains_key("model_ema.diffusion_modelinput_blocks00weight"));

    let form = SingleForm {
        dtype: Some(Dtype::F32),
        text_model: false,
        position_ids: None,
        ema: false,
        extras: false,
    };
    case.write_single_file(&path, &form);
    let bare = read(&path);
    assert_eq!(bare.len(), case.single_weights(None).len());
    assert!(bare.contains_key("cond_stage_model.transformer.final_layer_norm.bias"));

    Case::load("single-sd2").write_single_file(&path, &SingleForm::default());
    let all = read(&path);
    assert_eq!(
        all["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"].1,
        [384, 128]
    );
    assert!(all.contains_key("cond_stage_model.model.transformer.resblocks.2.ln_1.weight"));
    assert_eq!(all["cond_stage_model.model.logit_scale"].1, [0; 0]);
}

#[test]
fn single_files_of_two_towers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let case = Case::load("single-sdxl-v");
    case.write_single_file(&path, &SingleForm::default());
    let all = read(&path);
    for (name, shape) in [
        (
            "model.diffusion_model.label_emb.0.0.weight",
            &[256, 1664][..],
        ),
        (
            "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight",
            &[384, 128],
        ),
        ("conditioner.embedders.1.model.text_projection", &[128, 128]),
        ("conditioner.embedders.1.model.logit_scale", &[]),
        (
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
            &[1, 77],
        ),
        ("v_pred", &[0]),
        ("ztsnr", &[0]),
    ] {
        assert_eq!(all[name].1, shape, "{name}");
    }
    let towers = case.weights("text_encoder_2", None);
    let projection = towers.iter().find(|t| t.name == "text_projection.weight");
    let (_, _, turned) = &all["conditioner.embedders.1.model.text_projection"];
    // row 3, column 5 of 128, in halves
    let at = |row: usize, column: usize| 2 * (128 * row + column);
    assert_eq!(
        turned[at(3, 5)..][..2],
        projection.unwrap().bytes[at(5, 3)..][..2]
    );

    edit(&path, |tensors| linear_projection(tensors));
    let converted = read(&path);
    assert_eq!(
        converted["conditioner.embedders.1.model.text_projection.weight"].2,
        projection.unwrap().bytes
    );
    assert_eq!(converted.len(), all.len());

    let form = SingleForm {
        dtype: None,
        text_model: false,
        position_ids: None,
        ema: false,
        extras: false,
    };
    Case::load("single-sdxl").write_single_file(&path, &form);
    let bare = read(&path);
    assert!(bare.contains_key("conditioner.embedders.0.transformer.final_layer_norm.bias"));
    assert!(!bare.contains_key("conditioner.embedders.1.model.logit_scale"));

    Case::load("single-refiner").write_single_file(&path, &SingleForm::default());
    let all = read(&path);
    assert!(all.contains_key("conditioner.embedders.0.model.ln_final.bias"));
    assert!(!all.keys().any(|name| name.contains("embedders.1")));
}

const KNOWN: [u32; 4] = [0x3f892dca, 0x3f7d3b9f, 0x3f9ea8d4, 0x3f9b5d2c];
