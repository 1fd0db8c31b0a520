//! Upscalers against spandrel, in every spelling: `tests/fixtures/upscalers/README.md`; tiles, alpha, the command and its refusals.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use safetensors::Dtype;
use sd_rs::Checkpoint;
use sd_rs::output::png;
use sd_rs::picture::{Filter, Grey, Picture};
use sd_rs::upscale::{Planes, Tiling, Upscaler};
use serde_json::Value;

use crate::picture::noise;
use crate::support::Dir;
use crate::support::weights::{Law, Stored, encode, save, uniform};

const CASES: [&str; 14] = [
    "numbered-x4",
    "numbered-x8",
    "numbered-x2",
    "numbered-x1",
    "plus-x4",
    "trunk-x4",
    "body-x4",
    "body-x2",
    "body-x1",
    "compact-x4",
    "compact-x2",
    "compact-x3",
    "compact-x1",
    "compact-grey-x2",
];

pub(crate) const WHOLE: Tiling = Tiling {
    side: Some(0),
    overlap: None,
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/upscalers")
        .join(name)
}

fn case(name: &str) -> Value {
    let text = std::fs::read_to_string(fixture("cases.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()[name].clone()
}

fn tensors(name: &str) -> Vec<Stored> {
    let case = case(name);
    let rows = case["tensors"].as_array().unwrap();
    rows.iter().map(|row| tensor(row, name)).collect()
}

/// A row of a case: name, shape and the law of the numbers.
pub(crate) fn tensor(row: &Value, case: &str) -> Stored {
    let number = |value: &Value| value.as_f64().unwrap() as f32;
    let name = row[0].as_str().unwrap().to_owned();
    let shape: Vec<usize> = serde_json::from_value(row[1].clone()).unwrap();
    let law = Law {
        scale: number(&row[2]),
        offset: number(&row[3]),
    };
    let values = uniform(&format!("{case}/{name}"), &shape, law);
    Stored {
        bytes: encode(&values, Dtype::F32, Dtype::F32),
        name,
        shape,
        dtype: Dtype::F32,
    }
}

pub fn write(name: &str, dir: &Dir) -> PathBuf {
    let path = dir.path(&format!("{name}.safetensors"));
    save(tensors(name).iter(), &path);
    path
}

pub(crate) fn open(path: &Path) -> sd_rs::Result<Upscaler> {
    Upscaler::load(&Checkpoint::open(path)?, &Device::Cpu, DType::F32)
}

pub fn load(name: &str) -> Upscaler {
    open(&write(name, &Dir::new())).unwrap()
}

fn input(name: &str) -> Planes {
    input_of(&case(name), name)
}

/// What a case's network is given.
pub(crate) fn input_of(case: &Value, name: &str) -> Planes {
    let size = |i: usize| case["size"][i].as_u64().unwrap() as usize;
    let channels = case["channels"].as_u64().unwrap() as usize;
    let law = Law {
        scale: 0.5,
        offset: 0.5,
    };
    let shape = [1, channels, size(0), size(1)];
    Planes {
        values: uniform(&format!("{name}/picture"), &shape, law),
        width: size(1),
        height: size(0),
    }
}

pub(crate) fn run(upscaler: &Upscaler, planes: &Planes, tiling: Tiling) -> Planes {
    upscaler.run(planes, tiling, &mut |_, _| true).unwrap()
}

/// Relative L2 distance.
pub(crate) fn distance(found: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let pairs = found.iter().zip(wanted);
    norm(&mut pairs.map(|(a, b)| f64::from(a - b)))
        / norm(&mut wanted.iter().map(|v| f64::from(*v)))
}

/// What the fixtures keep of a result: every `stride`th pixel of every `stride`th row.
pub(crate) fn kept(found: &Planes, stride: usize) -> Vec<f32> {
    let rows = found.values.chunks(found.width).enumerate();
    rows.filter(|(row, _)| (row % found.height).is_multiple_of(stride))
        .flat_map(|(_, row)| row.iter().step_by(stride).copied())
        .collect()
}

#[test]
fn every_spelling_and_structure_equals_spandrel() {
    let all =
        candle_core::safetensors::load(fixture("expected.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(all.len(), CASES.len());
    for name in CASES {
        let case = case(name);
        let (upscaler, planes) = (load(name), input(name));
        assert_eq!(upscaler.scale() as u64, case["scale"].as_u64().unwrap());
        let found = run(&upscaler, &planes, WHOLE);
        let kept = kept(&found, case["stride"].as_u64().unwrap() as usize);
        let wanted = all[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let error = distance(&kept, &wanted);
        assert!(error < 5e-6, "{name}: {error:e}");
    }
}

#[test]
fn averaged_weights_of_a_pickle_count() {
    let upscaler = open(&fixture("wrapped.pth")).unwrap();
    let planes = input("compact-x3");
    let found = run(&upscaler, &planes, WHOLE);
    let wanted = run(&load("compact-x3"), &planes, WHOLE);
    assert_eq!(found, wanted);
}

#[test]
fn frameworks_prefixes_do_not_matter() {
    for (name, prefix) in [
        ("body-x4", "module."),
        ("numbered-x2", "netG."),
        ("compact-x1", "params_ema."),
    ] {
        let dir = Dir::new();
        let mut stored = tensors(name);
        for tensor in &mut stored {
            tensor.name = format!("{prefix}{}", tensor.name);
        }
        let path = dir.path("a.safetensors");
        save(stored.iter(), &path);
        let planes = input(name);
        let found = run(&open(&path).unwrap(), &planes, WHOLE);
        assert_eq!(found, run(&load(name), &planes, WHOLE), "{name}");
    }
}

pub(crate) fn random(channels: usize, width: usize, height: usize) -> Planes {
    let values = noise("tiles", channels * width * height);
    Planes {
        values: values.into_iter().map(|v| f32::from(v) / 255.0).collect(),
        width,
        height,
    }
}

#[test]
fn tiles_that_overlap_enough_give_what_one_piece_gives() {
    for (name, width, height, side, overlap) in [
        ("compact-x4", 61, 47, 24, None),
        ("compact-x3", 40, 90, 16, Some(6)),
        ("compact-grey-x2", 33, 25, 20, None),
        // 35 and 40 pixels of reach; 20, for which there is no room
        ("numbered-x4", 180, 75, 144, None),
        ("body-x2", 200, 90, 162, Some(81)),
        ("numbered-x1", 70, 41, 64, Some(32)),
    ] {
        let upscaler = load(name);
        let planes = random(upscaler.config().input(), width, height);
        let whole = run(&upscaler, &planes, WHOLE);
        let tiling = Tiling {
            side: Some(side),
            overlap,
        };
        assert!(
            upscaler.tiles((width, height), tiling).unwrap() > 1,
            "{name}"
        );
        let tiled = run(&upscaler, &planes, tiling);
        let far = whole.values.iter().zip(&tiled.values);
        let far = far.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let most = whole.values.iter().fold(0.0, |a: f32, b| a.max(b.abs()));
        let limit = if name == "numbered-x1" { 0.05 } else { 2e-5 };
        assert!(far <= limit * most, "{name}: {far:e} of {most}");
    }
}

fn colours(width: u32, height: u32) -> Picture {
    let count = (width * height * 3) as usize;
    Picture::from_rgb(width, height, noise("colours", count)).unwrap()
}

#[test]
fn alpha_passes_through_the_network_as_grey() {
    let upscaler = load("compact-x3");
    let enlarge = |picture: &Picture| {
        upscaler
            .enlarge(picture, Tiling::default(), &mut |_, _| true)
            .unwrap()
    };
    let plain = colours(14, 10);
    assert_eq!(enlarge(&plain).alpha(), None);
    let same = Grey::new(14, 10, vec![77; 140]).unwrap();
    let larger = enlarge(&plain.clone().with_alpha(Some(same)).unwrap());
    assert_eq!(larger.rgb(), enlarge(&plain).rgb());
    assert_eq!(larger.alpha().unwrap().values(), [77; 140 * 9]);
    let alpha = Grey::new(14, 10, noise("alpha", 140)).unwrap();
    let larger = enlarge(&plain.clone().with_alpha(Some(alpha.clone())).unwrap());
    assert_eq!(larger.rgb(), enlarge(&plain).rgb());
    let grey = enlarge(&alpha.to_picture()).to_luma();
    assert_eq!(larger.alpha().unwrap(), grey);
}

#[test]
fn a_network_is_applied_until_a_factor_is_reached() {
    let upscaler = load("compact-x3");
    let to = |factor: f64| {
        let tiling = Tiling::default();
        upscaler.enlarge_to(&colours(7, 5), factor, tiling, &mut |_, _| true)
    };
    let once = upscaler
        .enlarge(&colours(7, 5), WHOLE, &mut |_, _| true)
        .unwrap();
    assert_eq!(to(3.0).unwrap(), once);
    assert_eq!(
        to(2.0).unwrap(),
        once.resize(14, 10, Filter::Lanczos).unwrap()
    );
    let twice = upscaler.enlarge(&once, WHOLE, &mut |_, _| true).unwrap();
    let wanted = twice.resize(32, 23, Filter::Lanczos).unwrap();
    assert_eq!(to(4.5).unwrap(), wanted);
    for bad in [0.0, -2.0, f64::NAN, f64::INFINITY, 5000.0] {
        assert!(to(bad).is_err(), "{bad}");
    }
    let stopped = upscaler.enlarge(&colours(7, 5), WHOLE, &mut |_, _| false);
    assert!(matches!(stopped, Err(sd_rs::Error::Interrupted)));
}

fn write_png(path: &Path, texts: &[(&str, &str)]) -> Picture {
    let picture = colours(10, 8);
    let texts: Vec<(String, String)> = texts
        .iter()
        .map(|(keyword, text)| ((*keyword).to_owned(), (*text).to_owned()))
        .collect();
    let bytes = png::encode_plain((10, 8), picture.rgb(), None, &texts).unwrap();
    std::fs::write(path, bytes).unwrap();
    picture
}

#[test]
fn the_command_writes_what_the_library_gives_and_keeps_texts() {
    let dir = Dir::new();
    let model = write("compact-x3", &dir);
    let model = model.to_str().unwrap();
    let parameters = "a füchs 狐\nSteps: 3, Seed: 1";
    let picture = write_png(&dir.path("in.png"), &[("parameters", parameters)]);
    let outcome = dir.sd_rs(&["upscale", "in.png", "-m", model, "-o", "out.png", "--json"]);
    assert_eq!(outcome.status, Some(0), "{outcome:?}");
    let json = &outcome.json()[0];
    assert_eq!(
        (json["width"].as_u64(), json["height"].as_u64()),
        (Some(30), Some(24))
    );
    assert_eq!(json["network"], "compact");
    let wanted = load("compact-x3")
        .enlarge(&picture, Tiling::default(), &mut |_, _| true)
        .unwrap();
    assert_eq!(Picture::open(&dir.path("out.png")).unwrap(), wanted);
    let texts = png::read_text(&dir.path("out.png")).unwrap();
    assert_eq!(texts.get("parameters"), Some(parameters));
    let piped = dir.sd_rs(&["upscale", "in.png", "-m", model, "-o", "-"]);
    assert_eq!(piped.stdout, std::fs::read(dir.path("out.png")).unwrap());
    // without --output beside where the command runs
    dir.ok(&["upscale", "in.png", "-m", model]);
    assert!(dir.path("in-x3.png").is_file());
    dir.ok(&[
        "upscale",
        "in.png",
        "-m",
        model,
        "--scale",
        "1.5",
        "--tile",
        "8",
        "--tile-overlap",
        "2",
    ]);
    let half = Picture::open(&dir.path("in-x1.5.png")).unwrap();
    assert_eq!((half.width(), half.height()), (15, 12));
}

#[test]
fn several_pictures_go_into_a_folder() {
    let dir = Dir::new();
    let model = write("compact-x1", &dir);
    let model = model.to_str().unwrap();
    std::fs::create_dir(dir.path("from")).unwrap();
    for name in ["b.png", "a.png"] {
        write_png(&dir.path("from").join(name), &[]);
    }
    std::fs::write(dir.path("from/notes.txt"), "no picture").unwrap();
    let told = dir.ok(&["upscale", "from", "-m", model, "-o", "to"]);
    assert_eq!(told.lines().count(), 2);
    assert!(told.starts_with("to/a.png"), "{told}");
    assert!(dir.path("to/b.png").is_file());
    let refused = dir.fails(&["upscale", "from", "-m", model, "-o", "to"], 1);
    assert!(refused.contains("--overwrite"), "{refused}");
    dir.ok(&["upscale", "from", "-m", model, "-o", "to", "--overwrite"]);
    // a broken one does not keep the others from being made
    std::fs::write(dir.path("from/aa.png"), "broken").unwrap();
    let refused = dir.fails(&["upscale", "from", "-m", model, "-o", "again/"], 1);
    assert!(refused.contains("aa.png"), "{refused}");
    assert!(dir.path("again/b.png").is_file());
    let refused = dir.fails(&["upscale", "from", "-m", model, "-o", "x.png"], 2);
    assert!(refused.contains("folder"), "{refused}");
    let twice = ["upscale", "from/a.png", "from/a.png", "-m", model];
    assert!(dir.fails(&twice, 2).contains("two pictures"));
}

#[test]
fn what_is_no_upscaler_is_refused_by_name() {
    let dir = Dir::new();
    let refused = |rows: &[(&str, &[usize])]| {
        let stored: Vec<Stored> = rows
            .iter()
            .map(|(name, shape)| Stored {
                name: (*name).to_owned(),
                shape: shape.to_vec(),
                dtype: Dtype::F32,
                bytes: vec![0; 4 * shape.iter().product::<usize>()],
            })
            .collect();
        let path = dir.path("other.safetensors");
        save(stored.iter(), &path);
        let error = open(&path).err().unwrap();
        assert_eq!(error.code(), "bad-model", "{error}");
        error.to_string()
    };
    let dat: &[(&str, &[usize])] = &[("layers.0.blocks.0.attn.qkv.weight", &[180, 60])];
    assert!(refused(dat).contains("DAT"));
    let face: &[(&str, &[usize])] = &[
        ("quantize.embedding.weight", &[8, 4]),
        ("position_emb", &[4, 4]),
    ];
    assert!(refused(face).contains("CodeFormer"));
    let lora: &[(&str, &[usize])] = &[
        ("lora_unet_x.lora_down.weight", &[4, 8]),
        ("lora_unet_x.lora_up.weight", &[8, 4]),
    ];
    assert!(refused(lora).contains("LoRA"));
    let wide: &[(&str, &[usize])] = &[
        ("body.0.weight", &[5, 3, 3, 3]),
        ("body.1.weight", &[5]),
        ("body.2.weight", &[7, 5, 3, 3]),
    ];
    assert!(refused(wide).contains("7 channels"), "{}", refused(wide));
    // parts missing, each by its name
    for name in ["numbered-x4", "body-x2", "compact-x4"] {
        let all = tensors(name);
        for gone in 0..all.len() {
            let mut rest = all.clone();
            let gone = rest.remove(gone).name;
            let path = dir.path("part.safetensors");
            save(rest.iter(), &path);
            match open(&path) {
                Err(error) => assert_eq!(error.code(), "bad-model", "{gone}"),
                Ok(_) => panic!("{name} without {gone} is taken"),
            }
        }
    }
    let picture = write_png(&dir.path("in.png"), &[]);
    let planes = Planes {
        values: picture.to_planar(),
        width: 10,
        height: 9,
    };
    let upscaler = load("compact-x1");
    assert!(upscaler.run(&planes, WHOLE, &mut |_, _| true).is_err());
    let tiling = Tiling {
        side: Some(4),
        overlap: Some(3),
    };
    assert!(
        upscaler
            .enlarge(&picture, tiling, &mut |_, _| true)
            .is_err()
    );
}
