//! PyTorch checkpoints, GGUF and 8-bit safetensors as other programs write them, against what those programs read (`fixtures/containers`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sd_kernels::Source;
use sd_rs::checkpoint::{BlockType, Container, TensorFile, TensorSet, TensorType};
use sd_rs::weights::{CheckpointSource, Layout};

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
