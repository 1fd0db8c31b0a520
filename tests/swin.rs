//! Upscalers of attention within windows against spandrel: `tests/fixtures/swin/README.md`; tiles, files as training leaves them, refusals.

use std::path::{Path, PathBuf};

use candle_core::Device;
use safetensors::Dtype;
use sd_rs::upscale::{Tiling, Upscaler};
use serde_json::Value;

use crate::support::Dir;
use crate::support::weights::{Stored, save};
use crate::upscale::{WHOLE, distance, input_of, kept, open, random, run, tensor};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/swin")
        .join(name)
}

fn cases() -> Value {
    let text = std::fs::read_to_string(fixture("cases.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Masks and indices are there, as zeros: nobody is to read them.
fn tensors(case: &Value, name: &str) -> Vec<Stored> {
    let rows = case["tensors"].as_array().unwrap();
    let made = |row: &Value| {
        if !row[2].is_null() {
            return tensor(row, name);
        }
        let stored = row[0].as_str().unwrap().to_owned();
        let shape: Vec<usize> = serde_json::from_value(row[1].clone()).unwrap();
        let dtype = match stored.contains("index") {
            true => Dtype::I64,
            false => Dtype::F32,
        };
        Stored {
            bytes: vec![0; dtype.bitsize() / 8 * shape.iter().product::<usize>()],
            name: stored,
            shape,
            dtype,
        }
    };
    rows.iter().map(made).collect()
}

fn saved(stored: &[Stored]) -> sd_rs::Result<Upscaler> {
    let dir = Dir::new();
    let path = dir.path("a.safetensors");
    save(stored.iter(), &path);
    open(&path)
}

fn load(name: &str) -> Upscaler {
    saved(&tensors(&cases()[name], name)).unwrap()
}

#[test]
fn every_kind_and_structure_equals_spandrel() {
    let all =
        candle_core::safetensors::load(fixture("expected.safetensors"), &Device::Cpu).unwrap();
    let cases = cases();
    let cases = cases.as_object().unwrap();
    assert_eq!(all.len(), cases.len());
    for (name, case) in cases {
        let upscaler = saved(&tensors(case, name)).unwrap();
        assert_eq!(upscaler.scale() as u64, case["scale"].as_u64().unwrap());
        let kind = upscaler.config().name().to_lowercase();
        assert!(name.starts_with(&format!("{kind}-")), "{name}: {kind}");
        let found = run(&upscaler, &input_of(case, name), WHOLE);
        let kept = kept(&found, case["stride"].as_u64().unwrap() as usize);
        let wanted = all[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let error = distance(&kept, &wanted);
        assert!(error < 1e-5, "{name}: {error:e}");
    }
}

#[test]
fn files_as_training_leaves_them() {
    let (name, cases) = ("swinir-tiny", cases());
    let planes = input_of(&cases[name], name);
    let wanted = run(&load(name), &planes, WHOLE);
    let found = run(&open(&fixture("wrapped.pth")).unwrap(), &planes, WHOLE);
    assert_eq!(found, wanted);
    for prefix in ["module.", "params_ema.", "params.module.", "state_dict."] {
        let mut stored = tensors(&cases[name], name);
        for tensor in &mut stored {
            tensor.name = format!("{prefix}{}", tensor.name);
        }
        assert_eq!(run(&saved(&stored).unwrap(), &planes, WHOLE), wanted);
    }
    // indices and masks may be gone
    let mut stored = tensors(&cases[name], name);
    stored.retain(|tensor| !tensor.name.contains("index") && !tensor.name.contains("mask"));
    assert_eq!(run(&saved(&stored).unwrap(), &planes, WHOLE), wanted);
}

#[test]
fn tiles_that_overlap_enough_give_what_one_piece_gives() {
    for (name, width, height, side) in [
        ("swinir-tiny", 85, 60, 48),
        ("swinir-direct-x2", 250, 40, 176),
        ("swin2sr-jpeg", 150, 130, 112),
    ] {
        let upscaler = load(name);
        let reach = upscaler.config().reach().unwrap();
        let planes = random(upscaler.config().input(), width, height);
        let whole = run(&upscaler, &planes, WHOLE);
        let tiling = Tiling {
            side: Some(side),
            overlap: Some(2 * reach),
        };
        assert!(
            upscaler.tiles((width, height), tiling).unwrap() > 1,
            "{name}"
        );
        let tiled = run(&upscaler, &planes, tiling);
        let pairs = whole.values.iter().zip(&tiled.values);
        let far = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let most = whole.values.iter().fold(0.0, |a: f32, b| a.max(b.abs()));
        assert!(
            far <= 2e-5 * most,
            "{name}: {far:e} of {most}, reach {reach}"
        );
    }
    // HAT looks at all: tiles are others there, and fade into each other
    let upscaler = load("hat-x2");
    assert_eq!(upscaler.config().reach(), None);
    let planes = random(3, 90, 40);
    let whole = run(&upscaler, &planes, WHOLE);
    let tiling = Tiling {
        side: Some(64),
        overlap: Some(32),
    };
    let tiled = run(&upscaler, &planes, tiling);
    assert!(distance(&tiled.values, &whole.values) < 0.2);
}

#[test]
fn what_is_not_whole_or_not_built_is_refused() {
    let cases = cases();
    for name in ["swinir-tiny", "swin2sr-nearest-x4", "hat-x3"] {
        let all = tensors(&cases[name], name);
        for gone in 0..all.len() {
            let mut rest = all.clone();
            let gone = rest.remove(gone).name;
            let derived = gone.contains("index") || gone.contains("mask");
            match saved(&rest) {
                Err(error) => assert_eq!(error.code(), "bad-model", "{gone}"),
                // what is gone as a whole may be another structure
                Ok(_) if derived => {}
                Ok(_) => panic!("{name} without {gone} is taken"),
            }
        }
        // and one too many
        let mut more = all.clone();
        more.push(Stored {
            name: "layers.0.residual_group.blocks.0.extra".to_owned(),
            ..all[0].clone()
        });
        assert!(saved(&more).is_err(), "{name}");
    }
    let refused = |change: &dyn Fn(&mut Vec<Stored>)| {
        let mut stored = tensors(&cases["swinir-tiny"], "swinir-tiny");
        change(&mut stored);
        let error = saved(&stored).err().unwrap();
        assert_eq!(error.code(), "bad-model", "{error}");
        error.to_string()
    };
    let named = |name: &str, shape: &[usize]| Stored {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: Dtype::F32,
        bytes: vec![0; 4 * shape.iter().product::<usize>()],
    };
    let absolute = refused(&|stored| stored.push(named("absolute_pos_embed", &[1, 36, 8])));
    assert!(absolute.contains("one size"), "{absolute}");
    let auxiliary = refused(&|stored| stored.push(named("conv_bicubic.weight", &[4, 3, 3, 3])));
    assert!(auxiliary.contains("auxiliary"), "{auxiliary}");
    let table = |shape: &[usize]| {
        let shape = shape.to_vec();
        refused(&move |stored| {
            for tensor in stored.iter_mut() {
                if tensor
                    .name
                    .ends_with("blocks.0.attn.relative_position_bias_table")
                {
                    *tensor = named(&tensor.name, &shape);
                }
            }
        })
    };
    assert!(table(&[24, 2]).contains("square of an odd number"));
    assert!(table(&[25, 3]).contains("3 heads for 8 channels"));
    assert!(table(&[49, 2]).contains("blocks.1"), "{}", table(&[49, 2]));
    // twice smaller, then three times larger
    let mut stored = tensors(&cases["swinir-unshuffle"], "swinir-unshuffle");
    stored.retain(|tensor| !tensor.name.starts_with("upsample.2"));
    for tensor in &mut stored {
        if let Some(end) = tensor.name.strip_prefix("upsample.0.") {
            let shape: &[usize] = match end {
                "weight" => &[576, 64, 3, 3],
                _ => &[576],
            };
            *tensor = named(&tensor.name, shape);
        }
    }
    let half = saved(&stored).err().unwrap().to_string();
    assert!(
        half.contains("enlarges 3 times: expected a multiple of 2"),
        "{half}"
    );
    let other = refused(&|stored| {
        *stored = vec![named("layers.0.blocks.0.attn.qkv.weight", &[3, 1])];
    });
    assert!(other.contains("DAT"), "{other}");
}
