//! `upscale --with-model`: tiles are what runs of their own are, fade into each other, and keep what the picture had.

use std::path::Path;

use sd_rs::output::png;
use sd_rs::picture::{Filter, Grey, Picture, Rect};

use crate::picture::noise;
use crate::support::Dir;

const RUN: [&str; 10] = [
    "-p",
    "hills at noon",
    "--strength",
    "0.5",
    "--steps",
    "4",
    "--cfg-scale",
    "3",
    "--dtype",
    "f32",
];

fn scene() -> Picture {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/pictures/1.png");
    Picture::open(&path).unwrap()
}

fn random(name: &str, width: u32, height: u32) -> Picture {
    let pixels = noise(name, 3 * (width * height) as usize);
    Picture::from_rgb(width, height, pixels).unwrap()
}

fn part(picture: &Picture, left: u32, top: u32, side: u32) -> Picture {
    let part = Rect {
        left,
        top,
        width: side,
        height: side,
    };
    picture.crop(part).unwrap()
}

fn write(dir: &Dir, name: &str, picture: &Picture) {
    let alpha = picture.alpha();
    let size = (picture.width(), picture.height());
    let alpha = alpha.as_ref().map(Grey::values);
    let bytes = png::encode_plain(size, picture.rgb(), alpha, &[]).unwrap();
    std::fs::write(dir.path(name), bytes).unwrap();
}

fn open(dir: &Dir, name: &str) -> Picture {
    Picture::open(&dir.path(name)).unwrap()
}

/// What `upscale` makes of `in.png`.
fn drawn(dir: &Dir, more: &[&str]) -> Picture {
    let fixed = ["upscale", "in.png", "-o", "out.png", "--overwrite"];
    dir.ok(&[&fixed[..], &["--with-model"], &RUN, more].concat());
    open(dir, "out.png")
}

/// What `generate` makes of a picture, with the sampler that is the model's own.
fn alone(dir: &Dir, picture: &Picture, more: &[&str]) -> Picture {
    write(dir, "tile.png", picture);
    let fixed = ["generate", "-i", "tile.png", "-o", "one.png", "--overwrite"];
    dir.ok(&[&fixed[..], &RUN, more].concat());
    open(dir, "one.png")
}

#[test]
fn one_tile_is_what_generate_makes_of_the_picture() {
    let dir = Dir::new();
    let picture = part(&scene(), 16, 32, 64);
    write(&dir, "in.png", &picture);
    let seed = ["--seed", "7"];
    let wanted = alone(&dir, &picture, &seed);
    assert_eq!(drawn(&dir, &["--seed", "7", "--scale", "1"]), wanted);
    assert_ne!(drawn(&dir, &["--seed", "8", "--scale", "1"]), wanted);
    // enlarged before, by other arithmetic, and with another sampler
    let larger = picture.resize(96, 96, Filter::Bicubic).unwrap();
    let sampler = ["--seed", "7", "--sampler", "DPM++ 2M", "-n", "night"];
    let wanted = alone(&dir, &larger, &sampler);
    let more = ["--scale", "1.5", "--resampler", "bicubic"];
    assert_eq!(drawn(&dir, &[&sampler[..], &more].concat()), wanted);
    // twice where nothing is said; by a network where there is one
    let larger = picture.resize(128, 128, Filter::Lanczos).unwrap();
    assert_eq!(drawn(&dir, &seed), alone(&dir, &larger, &seed));
    let network = crate::upscale::write("compact-x2", &dir);
    let network = network.to_str().unwrap();
    dir.ok(&["upscale", "in.png", "-m", network, "-o", "large.png"]);
    let wanted = alone(&dir, &open(&dir, "large.png"), &seed);
    let more = ["-m", network, "--seed", "7"];
    assert_eq!(drawn(&dir, &more), wanted);
}

#[test]
fn tiles_are_their_own_runs_and_show_no_seams() {
    let dir = Dir::new();
    let picture = scene();
    write(&dir, "in.png", &picture);
    let tiled = [
        "--scale",
        "1",
        "--seed",
        "5",
        "--tile-size",
        "64",
        "--tile-overlap",
        "16",
    ];
    let whole = drawn(&dir, &tiled);
    // tiles begin at 0, 32 and 64; over 16 pixels in the middle of where they overlap they fade
    for (tile, left, top, (x, y), side) in [
        (0, 0, 0, (0, 0), 40),
        (2, 64, 0, (88, 0), 40),
        (4, 32, 32, (56, 56), 16),
        (8, 64, 64, (88, 88), 40),
    ] {
        let seed = (5 + tile).to_string();
        let own = alone(&dir, &part(&picture, left, top, 64), &["--seed", &seed]);
        let wanted = part(&own, x - left, y - top, side);
        assert_eq!(part(&whole, x, y, side), wanted, "tile {tile}");
    }
    // by how much neighbouring columns differ more than they do in the picture before
    let steps = |picture: &Picture, x: usize| -> f64 {
        let rows = picture.rgb().chunks(128 * 3);
        let row = |row: &[u8]| -> u64 {
            let pairs = row[3 * x..][..3].iter().zip(&row[3 * x + 3..][..3]);
            pairs.map(|(a, b)| u64::from(a.abs_diff(*b))).sum()
        };
        rows.map(row).sum::<u64>() as f64 / (3 * 128) as f64
    };
    let excess = |x: usize| steps(&whole, x) - steps(&picture, x);
    let most = |columns: &[std::ops::Range<usize>]| {
        let all = columns.iter().cloned().flatten().map(excess);
        all.fold(f64::NEG_INFINITY, f64::max)
    };
    let (seams, others) = (most(&[39..57, 71..89]), most(&[20..39, 57..71, 89..108]));
    assert!(seams <= others + 0.5, "{seams} {others}");
    // half a tile's overlap, and none, are possible
    drawn(
        &dir,
        &[
            "--scale",
            "0.5",
            "--tile-size",
            "32",
            "--tile-overlap",
            "16",
        ],
    );
    drawn(
        &dir,
        &["--scale", "0.5", "--tile-size", "32", "--tile-overlap", "0"],
    );
}

/// A picture that steers is fitted to the whole, and each tile gets its part of it.
#[test]
fn what_steers_steers_every_tile() {
    let dir = Dir::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let adapter = root.join("examples/adapters/outline.safetensors");
    let adapter = adapter.to_str().unwrap();
    // wider than the picture is
    write(&dir, "wide.png", &random("wide", 150, 64));
    let steered = |file, how| {
        [
            "--seed",
            "7",
            "--controlnet",
            adapter,
            "--control-image",
            file,
            "--control-resize",
            how,
        ]
    };
    let picture = part(&scene(), 16, 32, 64);
    write(&dir, "in.png", &picture);
    let mut seen = Vec::new();
    for how in ["stretch", "crop", "fill"] {
        let wanted = alone(&dir, &picture, &steered("wide.png", how));
        let whole = ["--scale", "1"];
        let got = drawn(&dir, &[&steered("wide.png", how)[..], &whole].concat());
        assert_eq!(got, wanted, "{how}");
        assert!(!seen.contains(&got), "{how}");
        seen.push(got);
    }
    let picture = part(&scene(), 0, 0, 96);
    let map = random("map", 96, 96);
    write(&dir, "in.png", &picture);
    write(&dir, "map.png", &map);
    write(&dir, "part.png", &part(&map, 0, 0, 64));
    let tiled = ["--scale", "1", "--tile-size", "64", "--tile-overlap", "32"];
    let whole = drawn(&dir, &[&steered("map.png", "stretch")[..], &tiled].concat());
    let own = alone(
        &dir,
        &part(&picture, 0, 0, 64),
        &steered("part.png", "stretch"),
    );
    assert_eq!(part(&whole, 0, 0, 32), part(&own, 0, 0, 32));
}

#[test]
fn sizes_alpha_and_texts() {
    let dir = Dir::new();
    let alpha = Grey::new(41, 30, noise("alpha", 41 * 30)).unwrap();
    let small = scene().resize(41, 30, Filter::Lanczos).unwrap();
    let picture = small.with_alpha(Some(alpha)).unwrap();
    write(&dir, "in.png", &picture);
    let whole = drawn(&dir, &["--seed", "5", "--tile-size", "64"]);
    let larger = picture.resize(82, 60, Filter::Lanczos).unwrap();
    assert_eq!((whole.width(), whole.height()), (82, 60));
    assert_eq!(whole.alpha(), larger.alpha());
    let texts = png::read_text(&dir.path("out.png")).unwrap();
    let parameters = texts.get("parameters").unwrap();
    for wanted in [
        "hills at noon\nSteps: 4, ",
        "Seed: 5, Size: 82x60",
        "Denoising strength: 0.5",
        "SD upscale overlap: 8, SD upscale upscaler: lanczos",
    ] {
        assert!(parameters.contains(wanted), "{parameters}");
    }
    let fixed = ["upscale", "in.png", "-o", "again.png", "--json"];
    let more = [
        "--with-model",
        "--seed",
        "5",
        "--steps",
        "5",
        "--tile-size",
        "32",
    ];
    let outcome = dir.sd_rs(&[&fixed[..], &more].concat());
    assert_eq!(outcome.status, Some(0), "{outcome:?}");
    let json = &outcome.json()[0];
    assert_eq!(json["width"], 82);
    assert_eq!(json["drawn"]["tiles"], 9);
    assert_eq!(json["drawn"]["strength"], 0.2);
    assert_eq!(json["drawn"]["tile_overlap"], 4);
}

#[test]
fn flags_that_cannot_be_are_refused() {
    let dir = Dir::new();
    write(&dir, "in.png", &part(&scene(), 0, 0, 64));
    let network = crate::upscale::write("compact-x1", &dir);
    let network = network.to_str().unwrap();
    let refused = |more: &[&str], word: &str| {
        let told = dir.fails(&[&["upscale", "in.png"][..], more].concat(), 2);
        assert!(told.contains(word), "{more:?}: {told}");
    };
    refused(&[], "--model");
    refused(&["-m", network, "--steps", "3"], "--with-model");
    refused(&["-m", network, "-n", "night"], "--with-model");
    refused(&["-m", network, "--strength", "0.5"], "--with-model");
    refused(&["-m", network, "-p", "hills"], "--with-model");
    refused(&["-m", network, "--controlnet", "x"], "--with-model");
    refused(
        &["-m", network, "--with-model", "--resampler", "bicubic"],
        "--resampler",
    );
    refused(&["--with-model", "--tile-size", "20"], "multiple of 8");
    refused(&["--with-model", "--tile-size", "0"], "multiple of 8");
    refused(
        &["--with-model", "--tile-size", "64", "--tile-overlap", "33"],
        "at most 32",
    );
    refused(&["--with-model", "--strength", "1.5"], "--strength is 1.5");
    // before the network has enlarged anything: there is no picture
    std::fs::write(dir.path("none.png"), "none").unwrap();
    for (more, word) in [
        (["--sampler", "Typo"], "Typo"),
        (["--strength", "1.5"], "--strength is 1.5"),
        (["--steps", "0"], "--steps"),
    ] {
        let args = ["upscale", "none.png", "-m", network, "--with-model"];
        let told = dir.fails(&[&args[..], &more].concat(), 2);
        assert!(told.contains(word), "{more:?}: {told}");
    }
    refused(&["--with-model", "--seed=-5"], "--seed");
    refused(&["--with-model", "--scale", "0"], "the scale is 0");
    refused(&["--with-model", "--control-scale", "1"], "--controlnet");
    assert!(!dir.path("in-x2.png").exists());
}
