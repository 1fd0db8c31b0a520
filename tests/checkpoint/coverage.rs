//! What the networks ask for, what is missing and what is left over, as `inspect` tells it and as a run meets it.

use std::path::Path;

use candle_core::{DType, Device};
use safetensors::Dtype;
use sd_rs::checkpoint::Checkpoint;
use sd_rs::pipeline::Engine;
use serde_json::{Value, json};

use super::inspect::output;
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm, SingleForm, Stored, edit};

const SINGLES: [&str; 3] = ["single-sd1", "single-sd2", "single-sd2-v"];

fn inspect(path: &Path) -> Value {
    serde_json::from_str(&output(path, true)).unwrap()
}

/// What `inspect` says of a model that must be usable.
#[track_caller]
fn usable(path: &Path) -> Value {
    let report = inspect(path);
    assert_eq!(report["refusal"], Value::Null, "{}", report["problems"]);
    report
}

/// The refusal's problems as one text; loading must fail with the first of them.
#[track_caller]
fn unusable(path: &Path) -> String {
    let report = inspect(path);
    assert_ne!(report["refusal"], Value::Null);
    let error = load(path).err().expect("it loads").to_string();
    let problems = report["problems"].as_array().unwrap();
    if let Some(first) = problems.first() {
        assert!(error.contains(first.as_str().unwrap()), "{error}: {first}");
    }
    let text = output(path, false);
    assert!(text.contains("usable      no: "), "{text}");
    format!("{} {}", report["refusal"], report["problems"])
}

fn load(path: &Path) -> sd_rs::Result<Engine> {
    Engine::load(&Checkpoint::open(path)?, &Device::Cpu, DType::F32)
}

fn tensor(name: &str) -> Stored {
    Stored {
        name: name.to_owned(),
        shape: vec![2],
        dtype: Dtype::F32,
        bytes: vec![0; 8],
    }
}

fn folder(case: &str) -> Dir {
    let dir = Dir::new();
    Case::load(case).write_folder(dir.root(), &FolderForm::default());
    dir
}

#[test]
fn of_a_good_file_nothing_is_left_over() {
    for name in SINGLES {
        let dir = Dir::new();
        let path = dir.path("model.safetensors");
        let case = Case::load(name);
        case.write_single_file(&path, &SingleForm::default());
        let report = usable(&path);
        assert_eq!(report["unused"], json!([]), "{name}");
        assert_eq!(report["problems"], json!([]), "{name}");
        let ignored = report["ignored"].as_object().unwrap();
        let count = |word: &str| -> u64 {
            let fits = ignored.iter().filter(|(what, _)| what.contains(word));
            fits.map(|(_, count)| count.as_u64().unwrap()).sum()
        };
        // the averaged copy of the UNet, its two counters, and CompVis' twelve tables
        assert_eq!(
            (count("averaged copy"), count("noise schedule")),
            (688, 12),
            "{name}"
        );
        if name == "single-sd1" {
            assert_eq!(count("position_ids"), 1, "{name}");
        } else {
            assert_eq!((count("last layer"), count("CLIP's")), (12, 2), "{name}");
        }
        // whatever the networks did not ask for is in one of the lists
        let all: u64 = ignored.values().map(|count| count.as_u64().unwrap()).sum();
        let file = Checkpoint::open(&path).unwrap().single().unwrap();
        assert_eq!(
            file.len() as u64 - all,
            case.single_weights(None).len() as u64,
            "{name}"
        );
        assert_eq!(load(&path).unwrap().warnings(), &[] as &[String], "{name}");
    }
}

#[test]
fn of_a_good_folder_nothing_is_left_over() {
    for case in ["sd1-odd", "sd2-v", "five-levels", "options"] {
        for old_names in [false, true] {
            let dir = Dir::new();
            let form = FolderForm {
                old_names,
                ..FolderForm::default()
            };
            Case::load(case).write_folder(dir.root(), &form);
            let report = usable(dir.root());
            assert_eq!(report["unused"], json!([]), "{case}");
            assert_eq!(report["ignored"], json!({}), "{case}");
            assert_eq!(report["problems"], json!([]), "{case}");
        }
    }
}

#[test]
fn tensors_inside_components_that_nothing_asks_for_are_listed() {
    let dir = Dir::new();
    let path = dir.path("model.safetensors");
    Case::load("single-sd1").write_single_file(&path, &SingleForm::default());
    let odd = [
        "cond_stage_model.transformer.text_model.encoder.layers.7.more",
        "first_stage_model.decoder.mask",
        "first_stage_model.encoder.odd",
        "model.diffusion_model.input_blocks.1.0.odd",
        "strange\u{7}",
    ];
    edit(&path, |tensors| tensors.extend(odd.map(tensor)));
    let report = usable(&path);
    let mut shown = odd.map(str::to_owned);
    shown[4] = "strange\\u{7}".to_owned();
    assert_eq!(report["unused"], json!(shown));

    let dir = folder("sd1-odd");
    edit(
        &dir.path("unet/diffusion_pytorch_model.safetensors"),
        |tensors| tensors.push(tensor("down_blocks.0.more")),
    );
    edit(&dir.path("text_encoder/model.safetensors"), |tensors| {
        tensors.push(tensor("text_projection.weight"));
    });
    std::fs::create_dir(dir.path("image_encoder")).unwrap();
    let mut index: Value =
        serde_json::from_str(&std::fs::read_to_string(dir.path("model_index.json")).unwrap())
            .unwrap();
    index["image_encoder"] = json!(["transformers", "CLIPVisionModelWithProjection"]);
    std::fs::write(dir.path("model_index.json"), index.to_string()).unwrap();
    std::fs::copy(
        dir.path("text_encoder/model.safetensors"),
        dir.path("image_encoder/model.safetensors"),
    )
    .unwrap();
    let report = usable(dir.root());
    assert_eq!(report["unused"], json!(["unet/down_blocks.0.more"]));
    assert_eq!(
        report["ignored"],
        json!({
            "tensors of CLIP's comparison of texts with pictures": 1,
            "tensors of the component `image_encoder`": 53,
        })
    );
}

#[test]
fn what_is_missing_or_misshapen_stands_in_the_way() {
    let path = |dir: &Dir| dir.path("unet/diffusion_pytorch_model.safetensors");
    let dir = folder("sd1-odd");
    edit(&path(&dir), |tensors| {
        tensors.retain(|tensor| tensor.name != "mid_block.resnets.0.conv1.bias");
        let bias = tensors
            .iter_mut()
            .find(|tensor| tensor.name == "conv_out.bias")
            .unwrap();
        bias.shape = vec![2, 2];
    });
    let problems = unusable(dir.root());
    for part in [
        "UNet: ",
        "`mid_block.resnets.0.conv1.bias` is missing",
        "`conv_out.bias` has shape [2, 2], expected [4]",
    ] {
        assert!(problems.contains(part), "{part}: {problems}");
    }

    let dir = folder("sd1-odd");
    edit(&path(&dir), |tensors| {
        let bias = tensors
            .iter_mut()
            .find(|tensor| tensor.name == "conv_out.bias")
            .unwrap();
        bias.dtype = Dtype::I16;
    });
    let problems = unusable(dir.root());
    assert!(problems.contains("`conv_out.bias` I16"), "{problems}");
}

#[test]
fn what_cannot_be_built_is_inspected_all_the_same() {
    let config = |dir: &Dir, component: &str, field: &str, value: Value| {
        let path = dir.path(component).join("config.json");
        let mut config: Value =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        config[field] = value;
        std::fs::write(&path, config.to_string()).unwrap();
    };
    let dir = folder("sd1-odd");
    config(&dir, "text_encoder", "hidden_act", json!("sine"));
    let problems = unusable(dir.root());
    assert!(problems.contains("hidden_act"), "{problems}");
    assert_eq!(inspect(dir.root())["components"]["unet"]["tensors"], 444);

    // networks of a million blocks are refused before they are built
    let dir = folder("sd1-odd");
    config(&dir, "unet", "layers_per_block", json!(1_000_000));
    let problems = unusable(dir.root());
    assert!(problems.contains("holds only 444 tensors"), "{problems}");
}

#[test]
fn a_decoder_is_enough_for_pictures_from_text() {
    let dir = folder("sd1-odd");
    edit(
        &dir.path("vae/diffusion_pytorch_model.safetensors"),
        |tensors| tensors.retain(|tensor| !tensor.name.starts_with("encoder.")),
    );
    let report = usable(dir.root());
    let problems = report["problems"].to_string();
    assert!(
        problems.contains("not needed for pictures from text"),
        "{problems}"
    );
    load(dir.root()).unwrap();
}
