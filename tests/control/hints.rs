//! What is made of pictures before a network sees them, against OpenCV.

use sd_rs::control::{Preprocessor, Resize, hint};
use sd_rs::picture::Grey;

use super::*;

/// A map by its name: pictures have three channels, what OpenCV gives in grey has one.
fn bytes(file: &SafeTensors<'_>, name: &str) -> (Vec<usize>, Vec<u8>) {
    let view = file.tensor(name).unwrap();
    (view.shape().to_vec(), view.data().to_vec())
}

#[test]
fn maps_equal_opencvs() {
    let data = std::fs::read(fixtures().join("preprocess.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&data).unwrap();
    let pictures = file.names();
    let pictures: Vec<&str> = pictures
        .iter()
        .copied()
        .filter(|n| !n.contains('/'))
        .collect();
    assert!(pictures.len() >= 5);
    for name in pictures {
        let (shape, rgb) = bytes(&file, name);
        let picture = Picture::from_rgb(shape[1] as u32, shape[0] as u32, rgb).unwrap();
        for (kind, which) in [
            (Preprocessor::Canny, "canny"),
            (Preprocessor::Threshold, "threshold"),
            (Preprocessor::Scribble, "scribble"),
            (Preprocessor::Color, "color"),
        ] {
            let key = format!("{name}/{which}");
            if !file.names().contains(&key.as_str()) {
                continue;
            }
            let (shape, want) = bytes(&file, &key);
            let want: Vec<u8> = match shape.len() {
                2 => want.iter().flat_map(|v| [*v; 3]).collect(),
                _ => want,
            };
            let got = kind.apply(&picture).unwrap();
            let wrong = got.rgb().iter().zip(&want).filter(|(a, b)| a != b).count();
            assert_eq!(wrong, 0, "{name} {which}: of {} bytes", want.len());
        }
    }
}

#[test]
fn hints_are_planes_of_the_results_size() {
    let picture = picture("picture/a", (20, 40));
    let size = (16, 16);
    let all = |resize, preprocessor, bgr| {
        hint((&picture, None), (preprocessor, resize), size, (3, bgr)).unwrap()
    };
    let rgb = all(Resize::Stretch, Preprocessor::None, false);
    let bgr = all(Resize::Stretch, Preprocessor::None, true);
    assert_eq!(rgb.len(), 3 * 256);
    assert_eq!(rgb[..256], bgr[512..]);
    assert_eq!(rgb[256..512], bgr[256..512]);
    let inverse = all(Resize::Stretch, Preprocessor::Invert, false);
    let sums = rgb.iter().zip(&inverse).map(|(a, b)| a + b);
    assert!(sums.into_iter().all(|sum| (sum - 1.0).abs() < 1e-6));
    // scaled to 16 pixels high and 32 wide, of which the middle 16 are seen
    let stretched = hint(
        (&picture, None),
        (Preprocessor::None, Resize::Stretch),
        (32, 16),
        (3, false),
    )
    .unwrap();
    let cropped = all(Resize::Crop, Preprocessor::None, false);
    assert_eq!(cropped[..16], stretched[8..24]);
    // scaled to 8 pixels high, of the same colour above and below
    let filled = all(Resize::Fill, Preprocessor::None, false);
    assert_eq!(filled[0], filled[255]);
    assert_eq!(filled[..64], vec![filled[0]; 64]);
    let grey = hint(
        (&picture, None),
        (Preprocessor::None, Resize::Stretch),
        size,
        (1, false),
    );
    assert_eq!(grey.unwrap().len(), 256);
}

#[test]
fn hidden_pixels_are_below_zero() {
    let picture = picture("picture/a", (8, 8));
    let mask: Vec<u8> = (0..64).map(|i| if i < 16 { 255 } else { 100 }).collect();
    let mask = Grey::new(8, 8, mask).unwrap();
    let got = hint(
        (&picture, Some(&mask)),
        (Preprocessor::Inpaint, Resize::Stretch),
        (8, 8),
        (3, false),
    )
    .unwrap();
    for plane in got.chunks(64) {
        assert!(plane[..16].iter().all(|v| *v == -1.0));
        assert!(plane[16..].iter().all(|v| *v >= 0.0));
    }
}

#[test]
fn the_command_writes_a_map() {
    let dir = Dir::new();
    let made = picture("picture/a", (48, 64));
    let file = dir.path("in.png");
    let image = image::RgbImage::from_raw(64, 48, made.rgb().to_vec()).unwrap();
    image.save(&file).unwrap();
    let args = [
        "control",
        "in.png",
        "-o",
        "out.png",
        "--preprocessor",
        "canny",
    ];
    dir.ok(&args);
    let map = Picture::open(&dir.path("out.png")).unwrap();
    let want = Preprocessor::Canny.apply(&made).unwrap();
    assert_eq!(map.rgb(), want.rgb());
    // nothing is replaced unasked
    dir.fails(&args, 1);
}

#[test]
fn flags_of_generate_are_the_requests() {
    let cases = Cases::load();
    let mut runs = list(&cases.record["runs"]).iter();
    let run = runs.find(|r| r["name"] == "edges").unwrap();
    let dir = Dir::new();
    let part = cases.part("edges");
    write_base(&part.base(), &dir, run);
    part.write(&dir, Form::Folder);
    let made = picture("picture/edges", (64, 96));
    let image = image::RgbImage::from_raw(96, 64, made.rgb().to_vec()).unwrap();
    image.save(dir.path("hint.png")).unwrap();
    let common = "generate -m base --controlnet edges --prompt-syntax plain -W 96 -H 64 --steps 4 --cfg-scale 7.5 -s 7 --dtype f32 -o out.png";
    let mut args: Vec<&str> = common.split(' ').collect();
    args.extend([
        "-p",
        "a fox in the snow, watercolour",
        "-n",
        "blurry, low quality",
    ]);
    let without = dir.fails(&args, 2);
    assert!(without.contains("--control-image"), "{without}");
    args.extend(["--control-image", "hint.png", "--control-scale", "0.8"]);
    args.extend(["--save-latents", "latents.safetensors"]);
    dir.ok(&args);
    let latents = candle_core::safetensors::load(dir.path("latents.safetensors"), &Device::Cpu);
    let key = text(&run["expected"]);
    close(key, &latents.unwrap()["latents"], &cases.expected[key], RUN);
}
