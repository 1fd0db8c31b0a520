//! PyTorch checkpoints, GGUF and 8-bit safetensors as other programs write them, against what those programs read (`fixtures/containers`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sd_kernels::Source;
use sd_rs::checkpoint::{
    BlockType, Checkpoint, Container, Family, TensorFile, TensorSet, TensorType, detect,
};
use sd_rs::weights::{CheckpointSource, Layout};

use super::build::file_of;
use crate::support::containers::{Pickle, zip};

/// A file of `tests/fixtures/containers`.
pub(super) fn fixture(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/fixtures/containers").join(name)
}

fn tensors(name: &str, mapped: bool) -> TensorSet {
    let file = TensorFile::open(&fixture(name), mapped).unwrap_or_else(|e| panic!("{e}"));
    TensorSet::new(vec![file]).unwrap()
}

/// All numbers of a tensor, read in pieces of odd lengths.
fn numbers(tensors: &Arc<TensorSet>, name: &str) -> Vec<f32> {
    let source = CheckpointSource::new(Arc::clone(tensors), Layout::identity(""));
    let shape = tensors.shape(name).unwrap().to_vec();
    let count = shape.iter().product();
    let mut numbers = vec![0.0; count];
    let reader = source.open(name, &shape).unwrap();
    let mut first = 0;
    for length in [1, 7, 32, 33, 255, 257, 1000].into_iter().cycle() {
        let end = count.min(first + length);
        reader.read(first, &mut numbers[first..end]);
        if end == count {
            break;
        }
        first = end;
    }
    numbers
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    // what kind of NaN does not matter
    let bits = |v: &f32| {
        if v.is_nan() {
            f32::NAN.to_bits()
        } else {
            v.to_bits()
        }
    };
    numbers.iter().map(bits).collect()
}

#[test]
fn checkpoints_of_torch_hold_what_was_saved() {
    let expected = tensors("lightning.safetensors", true);
    assert_eq!(expected.len(), 16);
    for name in ["lightning.ckpt", "lightning-old.ckpt", "protocol-4.ckpt"] {
        for mapped in [true, false] {
            let found = tensors(name, mapped);
            assert!(found.names().eq(expected.names()), "{name}");
            for tensor in expected.names() {
                let what = format!("{name} {tensor}");
                let (got, want) = (found.info(tensor).unwrap(), expected.info(tensor).unwrap());
                assert_eq!((got.dtype, &got.shape), (want.dtype, &want.shape), "{what}");
                let (got, want) = (found.bytes(tensor), expected.bytes(tensor));
                assert!(got.unwrap() == want.unwrap(), "{what}");
            }
            // what is stored once lies once in the file, and views lie in it
            let range = |tensor| found.info(tensor).unwrap().range.clone();
            assert_eq!(range("a.f32"), range("b.tied"));
            assert!(
                range("a.f32").start < range("b.rows").start
                    && range("b.rows").end < range("a.f32").end
            );
            let strides = |tensor| found.info(tensor).unwrap().strides.clone();
            assert_eq!(strides("b.rows"), None);
            assert_eq!(strides("b.transposed"), Some(vec![1, 8]));
            assert_eq!(strides("b.expanded"), Some(vec![0, 0]));
            let file = found.files().next().unwrap();
            assert_eq!(file.container(), Container::PyTorch);
            assert_eq!(file.metadata()["global_step"], "470000");
            assert_eq!(file.metadata()["pytorch-lightning_version"], "1.4.2");
            for tensor in found.names() {
                found.release(tensor);
            }
            assert!(found.bytes("b.four").unwrap() == expected.bytes("b.four").unwrap());
        }
    }
}

#[test]
fn eight_bits_are_read_in_all_their_forms() {
    let expected = Arc::new(tensors("eight-bits-expected.safetensors", true));
    let stored = Arc::new(tensors("eight-bits.safetensors", true));
    assert_eq!(expected.len(), 6);
    for name in expected.names() {
        let (got, want) = (numbers(&stored, name), numbers(&expected, name));
        assert_eq!(bits(&got), bits(&want), "{name}");
    }
    let source = CheckpointSource::new(Arc::clone(&stored), Layout::identity(""));
    for (name, dtype) in [
        ("plain_e4m3.weight", candle_core::DType::F16),
        ("plain_e5m2.weight", candle_core::DType::F16),
        ("scaled_e4m3.weight", candle_core::DType::BF16),
        ("rows_e5m2.weight", candle_core::DType::BF16),
    ] {
        assert_eq!(source.dtype(name), dtype, "{name}");
        source.shape(name, &[]).unwrap();
    }
    // helpers count as asked for
    let found = source.found();
    for name in [
        "scaled_e4m3.scale_weight",
        "scaled_e4m3.scale_input",
        "rows_e5m2.weight_scale",
    ] {
        assert!(found.contains(name), "{name}");
    }
    // torch's own file of the same codes, whose storages have no type
    let torch = Arc::new(tensors("eight-bits.pt", true));
    for kind in ["e4m3", "e5m2"] {
        let want = numbers(&expected, &format!("plain_{kind}.weight"));
        assert_eq!(bits(&numbers(&torch, kind)), bits(&want), "{kind}");
    }
}

#[test]
fn gguf_of_every_type_gives_the_references_numbers() {
    let expected = Arc::new(tensors("types.safetensors", true));
    for mapped in [true, false] {
        let found = Arc::new(tensors("types.gguf", mapped));
        assert!(found.names().eq(expected.names()));
        for name in expected.names() {
            assert_eq!(found.shape(name), expected.shape(name), "{name}");
            let (got, want) = (numbers(&found, name), numbers(&expected, name));
            let differing = got
                .iter()
                .zip(&want)
                .filter(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(differing.count(), 0, "{name}");
        }
        let file = found.files().next().unwrap();
        assert_eq!(file.container(), Container::Gguf);
        assert_eq!(file.metadata()["general.name"], "every type");
        assert_eq!(file.metadata()["some.number"], "1.5");
        let dtype = |name: &str| found.info(name).unwrap().dtype;
        assert_eq!(dtype("q6_k.weight"), TensorType::Block(BlockType::Q6K));
        assert_eq!(dtype("bf16.weight").to_string(), "BF16");
        let source = CheckpointSource::new(Arc::clone(&found), Layout::identity(""));
        assert_eq!(source.dtype("q4_0.weight"), candle_core::DType::F16);
        assert_eq!(source.dtype("bf16.weight"), candle_core::DType::BF16);
    }
}

#[test]
fn weights_are_found_in_what_tools_wrap_them_in() {
    let tensor = |pickle: Pickle, name: &str| {
        let pickle = pickle.text(name);
        pickle
            .tensor(("0", "Float", 128), 0, &[2, 64], &[64, 1])
            .raw(b"s")
    };
    let open = |pickle: Pickle| {
        let entries = [
            ("m/data.pkl".to_owned(), pickle.end()),
            ("m/data/0".to_owned(), vec![0; 512]),
        ];
        let file = file_of(&zip(&entries));
        let checkpoint = Checkpoint::open(&file.path).unwrap();
        let names: Vec<String> = checkpoint
            .single()
            .unwrap()
            .names()
            .map(str::to_owned)
            .collect();
        (names, detect(&checkpoint).family)
    };
    let root = || Pickle::new().raw(b"}");
    // a step counter that is a tensor, two wrappers, an averaged copy that is preferred
    let inside = tensor(tensor(root().text("state_dict").raw(b"}"), "a"), "b").raw(b"s");
    assert_eq!(open(tensor(inside, "global_step")).0, ["a", "b"]);
    let twice = tensor(root().text("model").raw(b"}").text("params").raw(b"}"), "a").raw(b"ss");
    assert_eq!(open(twice).0, ["a"]);
    let pair = tensor(root().text("params").raw(b"}"), "old").raw(b"s");
    let pair = tensor(pair.text("params_ema").raw(b"}"), "new").raw(b"s");
    assert_eq!(open(pair).0, ["new"]);
    // kinds other than whole models keep the names by which they are known
    let embedding = tensor(root().text("string_to_param").raw(b"}"), "*").raw(b"s");
    assert_eq!(
        open(embedding),
        (vec!["string_to_param.*".to_owned()], Family::Embedding)
    );
    let lora = tensor(
        root(),
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
    );
    assert_eq!(open(lora).1, Family::Lora);
    // a hypernetwork: two dicts in a tuple, under a number
    let two = tensor(
        Pickle(
            tensor(root().int(768).raw(b"(}"), "linear.0.weight")
                .raw(b"}")
                .0,
        ),
        "linear.0.weight",
    );
    assert_eq!(
        open(two.raw(b"ts")),
        (
            vec![
                "768.0.linear.0.weight".to_owned(),
                "768.1.linear.0.weight".to_owned()
            ],
            Family::Hypernetwork
        )
    );
}
