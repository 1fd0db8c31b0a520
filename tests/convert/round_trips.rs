//! Single files, folders, types: what goes in comes out.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};
use safetensors::Dtype;
use sd_rs::pipeline::{Batch, Control, Engine, Plan, Request};
use sd_rs::{Checkpoint, checkpoint};

use super::{Content, by_name, same, singles, tensors};
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm, SingleForm, Stored, edit};

/// The weights of a component as folders have them: those of text towers below `text_model.`.
fn folder_weights(case: &Case, component: &str) -> BTreeMap<String, Content> {
    let mut weights = case.weights(component, None);
    for tensor in &mut weights {
        let bare = component.starts_with("text_encoder")
            && !tensor.name.starts_with("text_model.")
            && !tensor.name.starts_with("text_projection");
        if bare {
            tensor.name.insert_str(0, "text_model.");
        }
    }
    by_name(weights)
}

fn component_file(folder: &Path, component: &str) -> std::path::PathBuf {
    let stem = match component.starts_with("text_encoder") {
        true => "model",
        false => "diffusion_pytorch_model",
    };
    folder.join(component).join(format!("{stem}.safetensors"))
}

/// The latents that a model makes.
pub(super) fn latents(path: &Path) -> Vec<f32> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let engine = Engine::load(&checkpoint, &Device::Cpu, DType::F32)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let request = Request {
        prompt: "a (red:1.2) fox, ".repeat(20),
        negative_prompt: Some("blurry".to_owned()),
        width: Some(64),
        height: Some(96),
        steps: Some(2),
        seed: Some(5),
        sampler: Some("Euler".to_owned()),
        ..Request::default()
    };
    let plan = Plan::new(&engine, &request).unwrap();
    let mut latents = Vec::new();
    let mut finish = |batch: Batch| {
        latents = batch.latents.flatten_all().unwrap().to_vec1().unwrap();
        Ok(())
    };
    engine
        .generate(&request, &plan, &mut |_| Control::Continue, &mut finish)
        .unwrap();
    assert!(latents.iter().all(|x: &f32| x.is_finite()));
    latents
}

#[test]
fn a_folder_becomes_the_single_file_that_diffusers_knows() {
    for (name, case) in singles() {
        let dir = Dir::new();
        case.write_folder(&dir.path("in"), &FolderForm::default());
        dir.ok(&["convert", "in", "out.safetensors"]);
        let mut got = tensors(&dir.path("out.safetensors"));
        let mut want = by_name(case.single_weights(None));
        // what is no weight and says what the model predicts
        for mark in ["v_pred", "ztsnr"] {
            assert_eq!(
                got.remove(mark).is_some(),
                name == "single-sdxl-v",
                "{name} {mark}"
            );
        }
        // OpenCLIP's last layer, which nobody computes, stands behind the last one that is
        if name.starts_with("single-sd2") {
            let spare = |n: &str| {
                let prefix = "cond_stage_model.model.transformer.resblocks.";
                let (number, rest) = n.strip_prefix(prefix)?.split_once('.')?;
                Some((number.parse::<usize>().unwrap(), rest.to_owned()))
            };
            let last = got
                .keys()
                .filter_map(|n| spare(n))
                .map(|(n, _)| n)
                .max()
                .unwrap();
            let count = got.len();
            got.retain(|n, _| spare(n).is_none_or(|(number, _)| number != last));
            assert_eq!(count - got.len(), 12, "{name}");
            want.retain(|n, _| spare(n).is_none_or(|(number, _)| number != last));
        }
        same(&name, &got, &want);

        // and back
        dir.ok(&["convert", "out.safetensors", "back"]);
        for component in case.components() {
            let back = tensors(&component_file(&dir.path("back"), component));
            same(
                &format!("{name} {component}"),
                &back,
                &folder_weights(&case, component),
            );
        }
        dir.ok(&["convert", "back", "again.safetensors"]);
        let again = tensors(&dir.path("again.safetensors"));
        same(&name, &again, &tensors(&dir.path("out.safetensors")));
    }
}

#[test]
fn every_single_file_becomes_its_folder() {
    let forms = [
        SingleForm::default(),
        SingleForm {
            text_model: false,
            position_ids: Some(Dtype::F32),
            ema: false,
            ..SingleForm::default()
        },
    ];
    for (name, case) in singles() {
        for form in &forms {
            let dir = Dir::new();
            case.write_single_file(&dir.path("in.safetensors"), form);
            dir.ok(&["convert", "in.safetensors", "out"]);
            for component in case.components() {
                let got = tensors(&component_file(&dir.path("out"), component));
                same(
                    &format!("{name} {component}"),
                    &got,
                    &folder_weights(&case, component),
                );
            }
            let want = latents(&dir.path("in.safetensors"));
            assert!(latents(&dir.path("out")) == want, "{name}");
            dir.ok(&["convert", "out", "back.safetensors"]);
            assert!(latents(&dir.path("back.safetensors")) == want, "{name}");
        }
    }
}

#[test]
fn old_names_and_shards_are_the_same_model() {
    for name in ["single-sd1", "single-sdxl"] {
        let case = Case::load(name);
        let dir = Dir::new();
        let form = FolderForm {
            shards: Some(3),
            old_names: true,
            ..FolderForm::default()
        };
        case.write_folder(&dir.path("in"), &form);
        dir.ok(&["convert", "in", "out.safetensors"]);
        same(
            name,
            &tensors(&dir.path("out.safetensors")),
            &by_name(case.single_weights(None)),
        );
        // a folder stays a folder under its own names, in one file each
        dir.ok(&["convert", "in", "out"]);
        assert_eq!(
            latents(&dir.path("in")),
            latents(&dir.path("out")),
            "{name}"
        );
        let index = dir.path("out/unet/diffusion_pytorch_model.safetensors.index.json");
        assert!(!index.exists());
    }
}

#[test]
fn a_file_of_the_same_form_keeps_every_key() {
    let case = Case::load("single-sd2");
    let dir = Dir::new();
    case.write_single_file(&dir.path("in.safetensors"), &SingleForm::default());
    dir.ok(&["convert", "in.safetensors", "out.safetensors"]);
    let (want, got) = (
        tensors(&dir.path("in.safetensors")),
        tensors(&dir.path("out.safetensors")),
    );
    same("kept", &got, &want);
    // once more, and from the result: the same bytes
    let bytes = |name: &str| std::fs::read(dir.path(name)).unwrap();
    dir.ok(&["convert", "in.safetensors", "out.safetensors", "--force"]);
    let first = bytes("out.safetensors");
    dir.ok(&["convert", "out.safetensors", "twice.safetensors"]);
    dir.ok(&["convert", "in.safetensors", "out.safetensors", "--force"]);
    assert_eq!(first, bytes("out.safetensors"));
    same("twice", &tensors(&dir.path("twice.safetensors")), &want);
}

#[test]
fn types_change_for_weights_alone() {
    let case = Case::load("single-sd1");
    let dir = Dir::new();
    case.write_single_file(&dir.path("in.safetensors"), &SingleForm::default());
    for (word, dtype) in [
        ("f16", Dtype::F16),
        ("bf16", Dtype::BF16),
        ("f32", Dtype::F32),
    ] {
        let output = format!("{word}.safetensors");
        dir.ok(&["convert", "in.safetensors", &output, "--dtype", word]);
        let (kept, got) = (
            tensors(&dir.path("in.safetensors")),
            tensors(&dir.path(&output)),
        );
        let want = by_name(case.single_weights(Some(dtype)));
        for (name, (got_dtype, shape, bytes)) in &got {
            match want.get(name) {
                Some((_, want_shape, want_bytes)) => {
                    assert_eq!((*got_dtype, shape), (dtype, want_shape), "{name}");
                    assert!(bytes == want_bytes, "{word} {name}");
                }
                None if name.starts_with("model_ema.") && shape.len() > 1 => {
                    assert_eq!(*got_dtype, dtype, "{name}")
                }
                None if name.starts_with("model_ema.") => {}
                // positions, betas
                None => assert!(
                    bytes == &kept[name].2 && *got_dtype == kept[name].0,
                    "{name}"
                ),
            }
        }
        assert_eq!(got.len(), kept.len());
    }
}

#[test]
fn what_the_file_says_of_itself() {
    let case = Case::load("single-sd2-v");
    let dir = Dir::new();
    case.write_folder(&dir.path("in"), &FolderForm::default());
    dir.ok(&[
        "convert",
        "in",
        "my model.safetensors",
        "--date",
        "2025-02-03",
    ]);
    let path = dir.path("my model.safetensors");
    let file = checkpoint::TensorFile::open(&path, true).unwrap();
    let said = |key: &str| file.metadata()[key].as_str();
    assert_eq!(said("modelspec.sai_model_spec"), "1.0.0");
    assert_eq!(said("modelspec.architecture"), "stable-diffusion-v2-768-v");
    assert_eq!(said("modelspec.title"), "my model");
    assert_eq!(said("modelspec.resolution"), "768x768");
    assert_eq!(said("modelspec.prediction_type"), "v");
    assert_eq!(said("modelspec.date"), "2025-02-03");
    assert_eq!(said("format"), "pt");
    let bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    assert_eq!(header % 8, 0);
    let data = dir.path("data");
    std::fs::write(&data, &bytes[8 + header..]).unwrap();
    let hash = checkpoint::sha256_file(&data).unwrap();
    assert_eq!(said("modelspec.hash_sha256"), format!("0x{hash}"));
}

#[test]
fn another_autoencoder_is_baked_in() {
    let (case, other) = (Case::load("single-sd1"), Case::load("single-sd2"));
    let dir = Dir::new();
    case.write_single_file(&dir.path("in.safetensors"), &SingleForm::default());
    other.write_single_file(&dir.path("vae.safetensors"), &SingleForm::default());
    edit(&dir.path("vae.safetensors"), |tensors| {
        tensors.retain(|t| t.name.starts_with("first_stage_model."))
    });
    dir.ok(&[
        "convert",
        "in.safetensors",
        "out.safetensors",
        "--vae",
        "vae.safetensors",
    ]);
    let mut want = tensors(&dir.path("in.safetensors"));
    want.retain(|name, _| !name.starts_with("first_stage_model."));
    want.extend(tensors(&dir.path("vae.safetensors")));
    same("baked", &tensors(&dir.path("out.safetensors")), &want);
}

/// A single file and, of other models, what is put in.
fn edited(name: &str, change: impl FnOnce(&mut Vec<Stored>)) -> Dir {
    let dir = Dir::new();
    let form = SingleForm {
        ema: false,
        ..SingleForm::default()
    };
    Case::load(name).write_single_file(&dir.path("in.safetensors"), &form);
    edit(&dir.path("in.safetensors"), change);
    dir
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Goes to a folder and back, and compares the tensors that are of the model.
fn there_and_back(dir: &Dir) -> BTreeMap<String, Content> {
    dir.ok(&["convert", "in.safetensors", "folder"]);
    dir.ok(&["convert", "folder", "back.safetensors"]);
    let mut want = tensors(&dir.path("in.safetensors"));
    let got = tensors(&dir.path("back.safetensors"));
    want.retain(|name, _| got.contains_key(name));
    same("back", &got, &want);
    got
}

#[test]
fn models_for_inpainting_and_editing() {
    let pipelines = [
        ("single-sd1", 5, "StableDiffusionInpaintPipeline"),
        ("single-sd1", 4, "StableDiffusionInstructPix2PixPipeline"),
        ("single-sdxl", 5, "StableDiffusionXLInpaintPipeline"),
        ("single-sdxl", 4, "StableDiffusionXLInstructPix2PixPipeline"),
    ];
    for (name, more, pipeline) in pipelines {
        let dir = edited(name, |tensors| {
            let conv = "model.diffusion_model.input_blocks.0.0.weight";
            let conv = tensors.iter_mut().find(|t| t.name == conv).unwrap();
            let bytes = conv.bytes.len() / conv.shape[1];
            conv.bytes.extend((0..more * bytes).map(|i| (i % 7) as u8));
            conv.shape[1] += more;
        });
        there_and_back(&dir);
        assert_eq!(
            json(&dir.path("folder/model_index.json"))["_class_name"],
            pipeline
        );
        assert_eq!(
            json(&dir.path("folder/unet/config.json"))["in_channels"],
            4 + more
        );
    }
}

#[test]
fn continuous_noise_levels_are_kept() {
    let float = |name: &str, shape: &[usize], numbers: &[f32]| Stored {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: Dtype::F32,
        bytes: numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
    };
    let playground = [
        float("edm_mean", &[1, 4, 1, 1], &[-1.5, 0.25, 0.5, 1.0]),
        float("edm_std", &[1, 4, 1, 1], &[5.0, 4.5, 6.25, 3.5]),
    ];
    let cos = [
        float("edm_vpred.sigma_max", &[], &[90.0]),
        float("edm_vpred.sigma_min", &[], &[0.25]),
    ];
    for (marks, class) in [
        (playground, "EDMDPMSolverMultistepScheduler"),
        (cos, "EDMEulerScheduler"),
    ] {
        let dir = edited("single-sdxl", |tensors| tensors.extend(marks.clone()));
        let back = there_and_back(&dir);
        assert!(
            marks.iter().all(|mark| back.contains_key(&mark.name)),
            "{class}"
        );
        let scheduler = json(&dir.path("folder/scheduler/scheduler_config.json"));
        assert_eq!(scheduler["_class_name"], class);
        let want = latents(&dir.path("in.safetensors"));
        assert!(latents(&dir.path("folder")) == want, "{class}");
        assert!(latents(&dir.path("back.safetensors")) == want, "{class}");
    }
}

#[test]
fn checkpoints_of_other_containers() {
    let containers = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/containers");
    let dir = Dir::new();
    for name in ["lightning.ckpt", "lightning-old.ckpt"] {
        std::fs::copy(containers.join(name), dir.path(name)).unwrap();
        dir.ok(&["convert", name, "out.safetensors", "--force"]);
        let (got, want) = (
            tensors(&dir.path("out.safetensors")),
            tensors(&containers.join("lightning.safetensors")),
        );
        same(name, &got, &want);
    }
    // fp8 with scales: as it is, and as numbers, which the scales are then part of
    std::fs::copy(
        containers.join("eight-bits.safetensors"),
        dir.path("eight.safetensors"),
    )
    .unwrap();
    dir.ok(&["convert", "eight.safetensors", "kept.safetensors"]);
    same(
        "fp8",
        &tensors(&dir.path("kept.safetensors")),
        &tensors(&dir.path("eight.safetensors")),
    );
    dir.ok(&[
        "convert",
        "eight.safetensors",
        "wide.safetensors",
        "--dtype",
        "f32",
    ]);
    let (wide, want) = (
        tensors(&dir.path("wide.safetensors")),
        tensors(&containers.join("eight-bits-expected.safetensors")),
    );
    let mut seen = 0;
    for (name, content) in &want {
        let Some(got) = wide.get(name) else { continue };
        assert_eq!((got.0, &got.1), (content.0, &content.1), "{name}");
        let floats = |bytes: &[u8]| {
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect::<Vec<_>>()
        };
        let pairs = floats(&got.2).into_iter().zip(floats(&content.2));
        // one NaN is as good as another
        assert!(
            pairs
                .into_iter()
                .all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())),
            "{name}"
        );
        seen += 1;
    }
    assert!(seen > 0);
    assert!(
        !wide
            .keys()
            .any(|name| name.ends_with("scale_weight") || name == "scaled_fp8")
    );
}

#[test]
fn depths_that_differ_within_a_level() {
    let dir = Dir::new();
    Case::load("sdxl-nested").write_folder(&dir.path("in"), &FolderForm::default());
    // what shapes do not tell, as every model of the family has it
    for (component, field, value) in [
        ("unet", "norm_num_groups", 32),
        ("unet", "attention_head_dim", 1),
        ("text_encoder", "num_attention_heads", 1),
        ("text_encoder_2", "num_attention_heads", 1),
    ] {
        let path = dir.path(&format!("in/{component}/config.json"));
        let sentence = dir.fails(&["convert", "in", "out.safetensors"], 1);
        assert!(sentence.contains("would become"), "{sentence}");
        let mut config = json(&path);
        config[field] = value.into();
        std::fs::write(&path, config.to_string()).unwrap();
    }
    dir.ok(&["convert", "in", "out.safetensors"]);
    dir.ok(&["convert", "out.safetensors", "folder"]);
    let (given, written) = (
        json(&dir.path("in/unet/config.json")),
        json(&dir.path("folder/unet/config.json")),
    );
    for field in [
        "mid_block_type",
        "up_block_types",
        "transformer_layers_per_block",
        "reverse_transformer_layers_per_block",
    ] {
        assert_eq!(given[field], written[field], "{field}");
    }
    let want = latents(&dir.path("in"));
    assert!(latents(&dir.path("out.safetensors")) == want);
    assert!(latents(&dir.path("folder")) == want);
}
