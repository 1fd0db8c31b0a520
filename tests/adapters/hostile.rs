//! Adapters that are broken, odd, or made for another model: one sentence each, no panic.

use std::sync::Arc;

use candle_core::{DType, Device};
use safetensors::Dtype;
use sd_rs::adapters::{Adapter, Adapters};
use sd_rs::checkpoint::{Checkpoint, ReadOptions};
use sd_rs::pipeline::Engine;
use serde_json::{Value, json};

use super::{case, tensors, write, write_tensors};
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm, Stored};

/// What is said of a file on a small Stable Diffusion 1: an error, or the warnings.
fn told(model: &Dir, tensors: &[Stored], metadata: &Value) -> Result<Vec<String>, String> {
    let dir = Dir::new();
    let path = dir.path("lora.safetensors");
    write_tensors(tensors, metadata, &path);
    let adapter = Adapter::open(&path, &ReadOptions::default()).map_err(|e| e.to_string())?;
    let mut adapters = Adapters::default();
    adapters.add(&Arc::new(adapter), 1.0, 1.0).unwrap();
    let checkpoint = Checkpoint::open(model.root()).unwrap();
    let engine = Engine::load_adapted(
        &checkpoint,
        sd_rs::spec::Others::default(),
        &adapters,
        &Device::Cpu,
        DType::F32,
    );
    engine
        .map(|engine| engine.warnings().to_vec())
        .map_err(|e| e.to_string())
}

fn sd1() -> Dir {
    let dir = Dir::new();
    Case::load("single-sd1").write_folder(dir.root(), &FolderForm::default());
    dir
}

fn stored(name: &str, shape: &[usize], numbers: &[f32]) -> Stored {
    Stored {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: Dtype::F32,
        bytes: numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

#[test]
fn broken_modules_are_named() {
    let model = sd1();
    let module = "lora_unet_mid_block_attentions_0_proj_in";
    let name = |end: &str| format!("{module}.{end}");
    let zeros = |end: &str, shape: &[usize]| {
        let count = shape.iter().product();
        stored(&name(end), shape, &vec![0.0; count])
    };
    let (up, down) = ("lora_up.weight", "lora_down.weight");
    let good = || vec![zeros(up, &[96, 2, 1, 1]), zeros(down, &[2, 96, 1, 1])];
    assert_eq!(told(&model, &good(), &json!({})), Ok(Vec::new()));
    let with = |more: Vec<Stored>| [good(), more].concat();
    let alpha = |x: &[f32], shape: &[usize]| vec![stored(&name("alpha"), shape, x)];
    let mut whole_numbers = good();
    whole_numbers[0].dtype = Dtype::I32;
    for (tensors, words) in [
        (vec![zeros(up, &[96, 2])], "`lora_down` is missing"),
        (vec![zeros(down, &[2, 96])], "`lora_up` is missing"),
        (
            vec![zeros(up, &[96, 0]), zeros(down, &[0, 96])],
            "holds no numbers",
        ),
        (
            vec![zeros(up, &[96, 2]), zeros(down, &[3, 96])],
            "the shapes [96, 2], [3, 96]",
        ),
        (
            vec![zeros(up, &[95, 2]), zeros(down, &[2, 96])],
            "the weight that it changes is [96, 96, 1, 1]",
        ),
        (with(alpha(&[f32::NAN], &[])), "is not a number"),
        (with(alpha(&[f32::INFINITY], &[1])), "is not a number"),
        (with(alpha(&[1.0, 2.0], &[2])), "is not a number"),
        (with(vec![zeros("dora_scale", &[7])]), "dora_scale"),
        (with(vec![zeros("diff_b", &[7])]), "bias by 7 numbers"),
        (with(vec![zeros("lora_mid.weight", &[2, 3, 1, 1])]), "CP"),
        (whole_numbers, "of the type I32"),
        (alpha(&[1.0], &[]), "nothing that these would scale"),
        (vec![zeros("oft_blocks", &[2, 8, 4, 4])], "BOFT"),
        (vec![zeros("oft_diag", &[8])], "oft_diag"),
        (vec![zeros("oft_blocks", &[8, 12, 11])], "(OFT)"),
        (
            vec![zeros("hada_w1_a", &[96, 2]), zeros("hada_w1_b", &[2, 96])],
            "`hada_w2_a` is missing",
        ),
        (
            vec![zeros("lokr_w1", &[5, 4]), zeros("lokr_w2", &[24, 24])],
            "(LoKr)",
        ),
        (vec![zeros("diff", &[96, 97])], "(full difference)"),
        (
            vec![stored("lora_unet_x.diff", &[1], &[0.0])],
            "none of its 1 modules, such as `lora_unet_x`",
        ),
        (
            vec![stored("conv_in.weight", &[1], &[0.0])],
            "not a LoRA or another adapter",
        ),
    ] {
        let error = told(&model, &tensors, &json!({})).unwrap_err();
        assert!(error.contains(words), "{words}: {error}");
        assert!(!error.contains('\n') && error.len() < 600, "{error}");
    }
}

#[test]
fn an_alpha_of_nothing_is_none() {
    let module = "lora_unet_mid_block_attentions_0_proj_in";
    let scale = |alpha: Option<f32>| {
        let dir = Dir::new();
        let path = dir.path("lora.safetensors");
        let mut tensors = vec![
            stored(&format!("{module}.lora_up.weight"), &[96, 2], &[0.5; 192]),
            stored(&format!("{module}.lora_down.weight"), &[2, 96], &[1.0; 192]),
        ];
        let alpha = alpha.map(|alpha| stored(&format!("{module}.alpha"), &[], &[alpha]));
        tensors.extend(alpha);
        write_tensors(&tensors, &json!({}), &path);
        let adapter = Adapter::open(&path, &ReadOptions::default()).unwrap();
        let mut adapters = Adapters::default();
        adapters.add(&Arc::new(adapter), 1.0, 1.0).unwrap();
        let owner = sd_rs::adapters::Owner::Denoiser;
        let name = "mid_block.attentions.0.proj_in.weight";
        let network = sd_rs::adapters::Network {
            owner,
            tensors: [(name.to_owned(), vec![96, 96])].into(),
            compressed: [].into(),
        };
        let bound = adapters.bind(&[network], "a model").unwrap();
        let mut weight = vec![0.0; 96 * 96];
        bound.apply(owner, name, &[96, 96], &mut weight).unwrap();
        weight[5]
    };
    assert_eq!(scale(None), 1.0);
    assert_eq!(scale(Some(0.0)), 1.0);
    assert_eq!(scale(Some(2.0)), 1.0);
    assert_eq!(scale(Some(1.0)), 0.5);
    assert_eq!(scale(Some(-4.0)), -2.0);
}

#[test]
fn another_familys_adapter_is_refused_by_both_names() {
    let model = sd1();
    let xl = told(&model, &tensors(&case("kohya-sdxl")), &json!({})).unwrap_err();
    for words in [
        "made for Stable Diffusion XL",
        "the model is a Stable Diffusion 1 checkpoint",
    ] {
        assert!(xl.contains(words), "{xl}");
    }
    // a file may say it itself
    let says = json!({ "ss_base_model_version": "sd_v2" });
    let error = told(&model, &tensors(&case("kohya-sdxl"))[..3], &says).unwrap_err();
    assert!(
        error.contains("made for Stable Diffusion 2 (`ss_base_model_version` is sd_v2)"),
        "{error}"
    );
    let flux = [stored(
        "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight",
        &[1, 1],
        &[0.0],
    )];
    let flux: Vec<Stored> = flux
        .into_iter()
        .chain([stored(
            "transformer.single_transformer_blocks.0.attn.to_k.lora_B.weight",
            &[1, 1],
            &[0.0],
        )])
        .collect();
    let error = told(&model, &flux, &json!({})).unwrap_err();
    assert!(error.contains("made for FLUX"), "{error}");
}

#[test]
fn what_has_no_place_is_a_warning() {
    let model = sd1();
    let mut odd = tensors(&case("old-sd1"));
    odd.push(stored("unet.nowhere.lora_A.weight", &[1, 1], &[0.0]));
    odd.push(stored("unet.nowhere.lora_B.weight", &[1, 1], &[0.0]));
    odd.push(stored("odd.\u{1b}x", &[1], &[0.0]));
    let warnings = told(&model, &odd, &json!({})).unwrap();
    let [warning] = warnings.as_slice() else {
        panic!("{warnings:?}")
    };
    for words in ["128 of its 129 modules", "`unet.nowhere`", "x`"] {
        assert!(warning.contains(words), "{warning}");
    }
}

#[test]
fn files_that_are_cut_short_or_not_adapters() {
    let dir = sd1();
    let path = dir.path("lora.safetensors");
    write(&case("old-sd1"), &path);
    let bytes = std::fs::read(&path).unwrap();
    for end in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..end]).unwrap();
        assert!(
            Adapter::open(&path, &ReadOptions::default()).is_err(),
            "{end}"
        );
    }
    let model = Adapter::open(dir.root(), &ReadOptions::default()).unwrap_err();
    assert!(model.to_string().contains("give a LoRA's file"), "{model}");
}
