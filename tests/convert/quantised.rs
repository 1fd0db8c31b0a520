//! GGUF files and blocks against the Python package gguf.

use std::path::Path;

use sd_rs::Checkpoint;
use sd_rs::checkpoint::{BlockType, TensorFile, TensorType};

use super::round_trips::latents;
use crate::support::Dir;
use crate::support::weights::{Case, SingleForm, Stored, read, save};

#[test]
fn blocks_are_those_of_gguf() {
    let fixture = read(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/convert/blocks.safetensors"),
    );
    let of = |name: &str| fixture.iter().find(|t| t.name == name).unwrap();
    let dir = Dir::new();
    let numbers = Stored {
        name: "some.weight".to_owned(),
        ..of("numbers").clone()
    };
    save([&numbers].into_iter(), &dir.path("in.safetensors"));
    for (name, block) in [
        ("q8_0", BlockType::Q8_0),
        ("q4_0", BlockType::Q4_0),
        ("q4_1", BlockType::Q4_1),
        ("q5_0", BlockType::Q5_0),
        ("q5_1", BlockType::Q5_1),
    ] {
        let output = format!("{name}.gguf");
        dir.ok(&["convert", "in.safetensors", &output, "--quantize", name]);
        let file = TensorFile::open(&dir.path(&output), true).unwrap();
        let info = file.get("some.weight").unwrap();
        assert_eq!(
            (info.dtype, info.shape.as_slice()),
            (TensorType::Block(block), &[40, 64][..])
        );
        let got = file.bytes(info).unwrap();
        let (want, size) = (&of(name).bytes, block.bytes());
        for (i, (got, want)) in got.chunks(size).zip(want.chunks(size)).enumerate() {
            assert_eq!(got, want, "{name} block {i}");
        }
        assert_eq!(got.len(), want.len());
    }
}

#[test]
fn a_whole_model_as_gguf() {
    let case = Case::load("single-sdxl");
    let dir = Dir::new();
    case.write_single_file(&dir.path("in.safetensors"), &SingleForm::default());
    dir.ok(&["convert", "in.safetensors", "f32.gguf", "--dtype", "f32"]);
    assert!(latents(&dir.path("f32.gguf")) == latents(&dir.path("in.safetensors")));
    let outcome = dir.sd_rs(&["convert", "in.safetensors", "q8.gguf", "--quantise", "Q8_0"]);
    assert_eq!(outcome.status, Some(0), "{outcome:?}");
    assert!(
        outcome.stderr.contains("left out:") && outcome.stderr.contains("averaged copy"),
        "{outcome:?}"
    );
    let checkpoint = Checkpoint::open(dir.path("q8.gguf")).unwrap();
    let tensors = checkpoint.single().unwrap();
    let file = checkpoint.files().next().unwrap();
    assert_eq!(file.metadata()["general.architecture"], "sdxl");
    assert_eq!(file.metadata()["general.file_type"], "7");
    let mut quantised = 0;
    for name in tensors.names() {
        let info = tensors.info(name).unwrap();
        let precise = ["time_embed", "label_emb", "first_stage_model", "embedding"];
        if let TensorType::Block(block) = info.dtype {
            assert_eq!(block, BlockType::Q8_0);
            assert!(
                info.shape.len() > 1
                    && info.elements() > 1024
                    && !precise.iter().any(|part| name.contains(part)),
                "{name}"
            );
            quantised += 1;
        }
    }
    assert!(quantised > 10, "{quantised}");
    // blocks are read as 16-bit numbers, and so they become a file or a folder of such
    let want = latents(&dir.path("q8.gguf"));
    dir.ok(&["convert", "q8.gguf", "half.safetensors"]);
    assert!(latents(&dir.path("half.safetensors")) == want);
    dir.ok(&["convert", "q8.gguf", "half"]);
    assert!(latents(&dir.path("half")) == want);
    // once more as it is
    dir.ok(&["convert", "q8.gguf", "again.gguf"]);
    assert!(latents(&dir.path("again.gguf")) == want);
}

#[test]
fn k_types_lose_little() {
    let dir = Dir::new();
    let count = 6 * 512;
    let numbers: Vec<f32> = (0..count)
        .map(|i| ((i * 7919) as f32 * 0.37).sin() * 0.1)
        .collect();
    let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    let wide = Stored {
        name: "wide.weight".to_owned(),
        shape: vec![6, 512],
        dtype: safetensors::Dtype::F32,
        bytes,
    };
    let narrow = Stored {
        name: "narrow.weight".to_owned(),
        shape: vec![32, 96],
        ..wide.clone()
    };
    save([&wide, &narrow].into_iter(), &dir.path("in.safetensors"));
    for (word, block, other, most) in [
        ("q6_K", BlockType::Q6K, BlockType::Q8_0, 0.02),
        ("q5_K", BlockType::Q5K, BlockType::Q5_1, 0.04),
        ("q4_K", BlockType::Q4K, BlockType::Q5_0, 0.08),
    ] {
        let output = format!("{word}.gguf");
        dir.ok(&["convert", "in.safetensors", &output, "--quantise", word]);
        dir.ok(&[
            "convert",
            &output,
            "back.safetensors",
            "--dtype",
            "f32",
            "--force",
        ]);
        let file = TensorFile::open(&dir.path(&output), true).unwrap();
        assert_eq!(
            file.get("wide.weight").unwrap().dtype,
            TensorType::Block(block)
        );
        assert_eq!(
            file.get("narrow.weight").unwrap().dtype,
            TensorType::Block(other)
        );
        let back = read(&dir.path("back.safetensors"));
        let back = &back.iter().find(|t| t.name == "wide.weight").unwrap().bytes;
        let back = back.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
        let (mut lost, mut all) = (0.0, 0.0);
        for (got, want) in back.zip(&numbers) {
            lost += f64::from((got - want).powi(2));
            all += f64::from(want.powi(2));
        }
        let relative = (lost / all).sqrt();
        assert!(relative > 1e-4 && relative < most, "{word}: {relative}");
    }
}
