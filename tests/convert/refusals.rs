//! What must fail, and leaves nothing behind.

use std::cell::Cell;
use std::fs;

use safetensors::Dtype;
use sd_rs::convert::{self, Change, Request, Watch, WeightName};
use sd_rs::{Checkpoint, Error};

use super::{by_name, same, tensors};
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm, SingleForm, Stored, edit, save};

/// A folder with a small model as `in.safetensors`.
fn model() -> Dir {
    let dir = Dir::new();
    let form = SingleForm {
        ema: false,
        ..SingleForm::default()
    };
    Case::load("single-sd1").write_single_file(&dir.path("in.safetensors"), &form);
    dir
}

#[test]
fn nothing_is_written_over() {
    let dir = model();
    fs::write(dir.path("taken.safetensors"), b"mine").unwrap();
    fs::create_dir(dir.path("photos")).unwrap();
    fs::write(dir.path("photos/one.jpg"), b"mine").unwrap();
    let fails = |args: &[&str], status: i32, what: &str| {
        let sentence = dir.fails(&[&["convert", "in.safetensors"], args].concat(), status);
        assert!(
            sentence.starts_with("error: ") && sentence.contains(what),
            "{args:?}: {sentence}"
        );
        assert_eq!(sentence.trim_end().lines().count(), 1, "{sentence}");
    };
    fails(&["taken.safetensors"], 1, "it exists already");
    fails(&["photos"], 1, "it exists already");
    fails(
        &["photos", "--force"],
        1,
        "holds no model_index.json, so it is not replaced",
    );
    fails(
        &["taken.safetensors/x"],
        1,
        "does not exist; create it first",
    );
    fails(
        &["none/out.safetensors"],
        1,
        "the folder none does not exist; create it first",
    );
    fails(
        &["in.safetensors", "--force"],
        2,
        "is read and would be written over",
    );
    fails(
        &["./photos/../in.safetensors", "--force"],
        2,
        "is read and would be written over",
    );
    fails(&[".", "--force"], 2, "is read and would be written over");
    fails(&["out.ckpt"], 2, "end the output in .safetensors");
    fails(
        &["out.safetensors", "--quantise", "q8_0"],
        2,
        "end the output in .gguf",
    );
    fails(
        &["out.safetensors", "--alpha", "0.5"],
        2,
        "--merge or --add-difference",
    );
    fails(
        &[
            "out.safetensors",
            "--merge",
            "in.safetensors",
            "--alpha",
            "nan",
        ],
        2,
        "no weight",
    );
    #[cfg(unix)]
    fails(&["/dev/null"], 1, "is not a folder");
    assert_eq!(
        dir.names(),
        ["in.safetensors", "photos", "taken.safetensors"]
    );
    assert_eq!(fs::read(dir.path("taken.safetensors")).unwrap(), b"mine");

    dir.ok(&["convert", "in.safetensors", "taken.safetensors", "--force"]);
    dir.ok(&["convert", "in.safetensors", "out"]);
    let before = fs::read(dir.path("out/unet/config.json")).unwrap();
    fs::write(dir.path("out/stray"), b"").unwrap();
    dir.ok(&["convert", "in.safetensors", "out", "--force"]);
    assert!(!dir.path("out/stray").exists());
    assert_eq!(fs::read(dir.path("out/unet/config.json")).unwrap(), before);
    let sentence = dir.fails(&["convert", "out", "out", "--force"], 2);
    assert!(sentence.contains("would be written over"), "{sentence}");
    assert_eq!(
        dir.names(),
        ["in.safetensors", "out", "photos", "taken.safetensors"]
    );
}

#[test]
fn infinities_are_never_made() {
    let dir = model();
    edit(&dir.path("in.safetensors"), |tensors| {
        let name = "model.diffusion_model.out.2.bias";
        let tensor = tensors.iter_mut().find(|t| t.name == name).unwrap();
        let count: usize = tensor.shape.iter().product();
        let numbers: Vec<f32> = (0..count)
            .map(|i| if i == 1 { 70000.0 } else { 1.0 })
            .collect();
        tensor.dtype = Dtype::F32;
        tensor.bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    });
    for output in ["out.safetensors", "out", "out.gguf"] {
        let sentence = dir.fails(&["convert", "in.safetensors", output, "--dtype", "f16"], 1);
        assert!(
            sentence.contains("holds 70000, which F16 cannot") && sentence.contains("bias"),
            "{sentence}"
        );
    }
    assert_eq!(dir.names(), ["in.safetensors"]);
    dir.ok(&[
        "convert",
        "in.safetensors",
        "out.safetensors",
        "--dtype",
        "bf16",
    ]);
}

#[test]
fn what_is_no_whole_model_keeps_its_form() {
    let dir = Dir::new();
    let tensor = |name: &str, shape: &[usize]| Stored {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: Dtype::F32,
        bytes: vec![0; 4 * shape.iter().product::<usize>()],
    };
    let lora = [
        tensor("lora_unet_x.lora_up.weight", &[8, 4]),
        tensor("lora_unet_x.lora_down.weight", &[4, 8]),
    ];
    save(lora.iter(), &dir.path("lora.safetensors"));
    dir.ok(&[
        "convert",
        "lora.safetensors",
        "half.safetensors",
        "--dtype",
        "f16",
    ]);
    assert_eq!(tensors(&dir.path("half.safetensors")).len(), 2);
    let sentence = dir.fails(&["convert", "lora.safetensors", "folder"], 1);
    assert!(sentence.contains("this is a LoRA"), "{sentence}");
    // a UNet alone has no folder to go into
    Case::load("single-sd1")
        .write_single_file(&dir.path("unet.safetensors"), &SingleForm::default());
    edit(&dir.path("unet.safetensors"), |tensors| {
        tensors.retain(|t| t.name.starts_with("model.diffusion_model."))
    });
    let sentence = dir.fails(&["convert", "unet.safetensors", "folder"], 1);
    assert!(sentence.contains("missing"), "{sentence}");
    // a folder whose structure no single file can tell
    Case::load("options").write_folder(&dir.path("options"), &FolderForm::default());
    let sentence = dir.fails(&["convert", "options", "options.safetensors"], 1);
    assert!(
        sentence.contains("a single file cannot say what this model is"),
        "{sentence}"
    );
    let mut names = dir.names();
    names.retain(|name| {
        name.starts_with(".sd-rs") || name == "folder" || name == "options.safetensors"
    });
    assert!(names.is_empty(), "{names:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn damaged_input_leaves_nothing() {
    let dir = model();
    let bytes = fs::read(dir.path("in.safetensors")).unwrap();
    fs::write(dir.path("cut.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    dir.fails(&["convert", "cut.safetensors", "out.safetensors"], 1);
    dir.fails(&["convert", "nothing.safetensors", "out.safetensors"], 1);
    assert_eq!(dir.names(), ["cut.safetensors", "in.safetensors"]);
}

/// Stops after so many pieces.
struct Stop(Cell<usize>);

impl Watch for Stop {
    fn planned(&self, bytes: u64) {
        assert!(bytes > 0);
    }
    fn written(&self, _: u64) {
        self.0.set(self.0.get().saturating_sub(1));
    }
    fn stopped(&self) -> bool {
        self.0.get() == 0
    }
    fn note(&self, _: &str) {}
}

fn request<'a>(input: &'a Checkpoint, output: std::path::PathBuf) -> Request<'a> {
    Request {
        input,
        output,
        dtype: convert::Dtype::Keep,
        quantise: None,
        merge: None,
        vae: None,
        change: None,
        notes: Vec::new(),
        force: true,
        date: None,
    }
}

#[test]
fn who_stops_leaves_nothing() {
    let dir = model();
    let input = Checkpoint::open(dir.path("in.safetensors")).unwrap();
    fs::write(dir.path("out.safetensors"), b"old").unwrap();
    for (output, pieces) in [
        ("out.safetensors", 0),
        ("out.safetensors", 50),
        ("out.gguf", 50),
        ("out", 3),
        ("out", 300),
    ] {
        let request = request(&input, dir.path(output));
        let error = convert::convert(&request, &Stop(Cell::new(pieces))).unwrap_err();
        assert!(matches!(error, Error::Interrupted), "{error}");
        assert_eq!(
            dir.names(),
            ["in.safetensors", "out.safetensors"],
            "{output} {pieces}"
        );
    }
    assert_eq!(fs::read(dir.path("out.safetensors")).unwrap(), b"old");
}

/// Adds to the numbers of some weights, as a LoRA does.
struct Add(&'static [&'static str]);

impl Change for Add {
    fn touches(&self, weight: &WeightName) -> bool {
        self.0.iter().any(|name| weight.name == *name)
    }
    fn apply(
        &self,
        weight: &WeightName,
        shape: &[usize],
        numbers: &mut [f32],
    ) -> sd_rs::Result<()> {
        assert_eq!(shape.iter().product::<usize>(), numbers.len(), "{weight:?}");
        let count = numbers.len() as f32;
        for (i, number) in numbers.iter_mut().enumerate() {
            *number += i as f32 / count;
        }
        Ok(())
    }
}

#[test]
fn changes_reach_weights_wherever_they_lie() {
    // a plain matrix, a third of a fused one, and one that is stored the other way round
    let change = Add(&[
        "encoder.layers.0.self_attn.k_proj.weight",
        "text_projection.weight",
        "conv_in.weight",
        "encoder.mid_block.attentions.0.to_q.weight",
    ]);
    for name in ["single-sd1", "single-sd2", "single-sdxl"] {
        let dir = Dir::new();
        let case = Case::load(name);
        case.write_folder(&dir.path("folder"), &FolderForm::default());
        let form = SingleForm {
            ema: false,
            extras: false,
            ..SingleForm::default()
        };
        case.write_single_file(&dir.path("in.safetensors"), &form);
        let go = Stop(Cell::new(usize::MAX));
        let run = |from: &str, to: &str, change: Option<&dyn Change>| {
            let input = Checkpoint::open(dir.path(from)).unwrap();
            let request = Request {
                change,
                dtype: convert::Dtype::F32,
                ..request(&input, dir.path(to))
            };
            convert::convert(&request, &go).unwrap();
        };
        run("in.safetensors", "one.safetensors", Some(&change));
        run("folder", "two", Some(&change));
        run("two", "two.safetensors", None);
        run("in.safetensors", "plain.safetensors", None);
        let (mut one, mut two) = (
            tensors(&dir.path("one.safetensors")),
            tensors(&dir.path("two.safetensors")),
        );
        let plain = tensors(&dir.path("plain.safetensors"));
        let changed = one
            .iter()
            .filter(|(name, content)| plain[*name] != **content)
            .count();
        assert_eq!(changed, if name == "single-sdxl" { 5 } else { 3 }, "{name}");
        // but for what nobody computes with
        let weights = by_name(case.single_weights(None));
        one.retain(|name, _| weights.contains_key(name));
        two.retain(|name, _| weights.contains_key(name));
        same(name, &one, &two);
    }
}
