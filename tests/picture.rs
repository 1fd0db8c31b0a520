//! `sd_rs::picture` against Pillow and OpenCV: `tests/fixtures/picture/README.md`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sd_rs::picture::{CvBlur, Filter, Grey, Picture, Rect};
use sha2::{Digest, Sha256};

use crate::support::weights::{Law, uniform};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/picture")
}

/// Random bytes, the highest of each number's.
pub(crate) fn noise(name: &str, count: usize) -> Vec<u8> {
    let law = Law {
        scale: 1.0,
        offset: 0.0,
    };
    let byte = |unit: f32| ((unit + 1.0) * 128.0) as u8;
    uniform(name, &[count], law).into_iter().map(byte).collect()
}

fn grey(width: u32, height: u32) -> Grey {
    let count = (width * height) as usize;
    Grey::new(width, height, noise(&format!("L/{width}x{height}"), count)).unwrap()
}

fn colours(width: u32, height: u32) -> Picture {
    let count = (width * height * 3) as usize;
    let rgb = noise(&format!("RGB/{width}x{height}"), count);
    Picture::from_rgb(width, height, rgb).unwrap()
}

fn with_alpha(width: u32, height: u32) -> Picture {
    let count = (width * height * 4) as usize;
    let bytes = noise(&format!("RGBA/{width}x{height}"), count);
    let rgb = bytes.chunks(4).flat_map(|p| [p[0], p[1], p[2]]).collect();
    let clear = |alpha: u8| match alpha {
        201.. => 255,
        ..50 => 0,
        other => other,
    };
    let alpha = bytes.chunks(4).map(|p| clear(p[3])).collect();
    let alpha = Grey::new(width, height, alpha).unwrap();
    let picture = Picture::from_rgb(width, height, rgb).unwrap();
    picture.with_alpha(Some(alpha)).unwrap()
}

/// The bytes with alpha between them, if there is any.
fn bytes(picture: &Picture) -> Vec<u8> {
    let Some(alpha) = picture.alpha() else {
        return picture.rgb().to_vec();
    };
    let pixels = picture.rgb().chunks(3).zip(alpha.values());
    pixels.flat_map(|(p, &a)| [p[0], p[1], p[2], a]).collect()
}

fn filter(name: &str) -> Filter {
    match name {
        "nearest" => Filter::Nearest,
        "box" => Filter::Box,
        "bilinear" => Filter::Bilinear,
        "bicubic" => Filter::Bicubic,
        "lanczos" => Filter::Lanczos,
        other => panic!("{other}"),
    }
}

fn size(text: &str) -> (u32, u32) {
    let (w, h) = text.split_once('x').unwrap();
    (w.parse().unwrap(), h.parse().unwrap())
}

/// What was done, by its name.
fn made(name: &str) -> Vec<u8> {
    let parts: Vec<&str> = name.split('/').collect();
    let number = |i: usize| parts[i].parse::<f64>().unwrap();
    let (w, h) = parts.get(2).map_or((0, 0), |text| size(text));
    match (parts[0], parts[1]) {
        ("resize", mode) => {
            let ((nw, nh), filter) = (size(parts[3]), filter(parts[4]));
            match mode {
                "L" => grey(w, h).resize(nw, nh, filter).unwrap().values().to_vec(),
                "RGB" => bytes(&colours(w, h).resize(nw, nh, filter).unwrap()),
                _ => bytes(&with_alpha(w, h).resize(nw, nh, filter).unwrap()),
            }
        }
        ("gaussian", "L") => {
            let blurred = grey(w, h).gaussian_blur(number(3) as f32).unwrap();
            blurred.values().to_vec()
        }
        ("gaussian", _) => bytes(&colours(w, h).gaussian_blur(number(3) as f32).unwrap()),
        ("cv", _) => {
            let (x, y) = (number(3), number(4));
            let blurred = grey(w, h).cv_blur(CvBlur::a1111(x, 0.0)).unwrap();
            let blurred = blurred.cv_blur(CvBlur::a1111(0.0, y)).unwrap();
            blurred.values().to_vec()
        }
        ("cv_both", _) => {
            let (kx, ky) = size(parts[3]);
            let blur = CvBlur {
                kernel: (kx as usize, ky as usize),
                sigma: (number(4), number(5)),
            };
            grey(w, h).cv_blur(blur).unwrap().values().to_vec()
        }
        ("luma", _) => colours(w, h).to_luma().values().to_vec(),
        ("composite", _) => {
            let own = colours(w, h);
            let turned = own.rgb().chunks(3).rev().flatten().copied().collect();
            let turned = Picture::from_rgb(w, h, turned).unwrap();
            bytes(&own.blend(&turned, &grey(w, h)).unwrap())
        }
        _ => panic!("{name}"),
    }
}

#[test]
fn bytes_equal_pillow_and_opencv() {
    let data = std::fs::read(folder().join("expected.safetensors")).unwrap();
    let expected = safetensors::SafeTensors::deserialize(&data).unwrap();
    let mut kinds = BTreeMap::<String, usize>::new();
    for (name, tensor) in expected.tensors() {
        let kind = name.split('/').next().unwrap().to_owned();
        *kinds.entry(kind.clone()).or_default() += 1;
        if kind == "file" {
            continue;
        }
        let found = made(&name);
        assert_eq!(found.len(), tensor.data().len(), "{name}");
        let wrong = found.iter().zip(tensor.data()).filter(|(a, b)| a != b);
        assert_eq!(wrong.count(), 0, "wrong bytes in {name}");
    }
    assert_eq!(
        (kinds["resize"], kinds["gaussian"], kinds["cv"]),
        (40, 6, 4)
    );
}

#[test]
fn rows_of_all_widths_equal_pillow() {
    let data = std::fs::read(folder().join("expected.safetensors")).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&data).unwrap();
    let digests = &metadata.metadata().as_ref().unwrap()["digests"];
    let digests: BTreeMap<String, String> = serde_json::from_str(digests).unwrap();
    assert_eq!(digests.len(), 5);
    for (name, expected) in digests {
        let mut hash = Sha256::new();
        for old in 1..=64 {
            for new in 1..=64 {
                hash.update(grey(old, 1).resize(new, 1, filter(&name)).unwrap().values());
            }
        }
        let found: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn files_hold_what_pillow_finds() {
    let data = std::fs::read(folder().join("expected.safetensors")).unwrap();
    let expected = safetensors::SafeTensors::deserialize(&data).unwrap();
    let mut seen = 0;
    for (name, tensor) in expected.tensors() {
        let Some(file) = name.strip_prefix("file/") else {
            continue;
        };
        seen += 1;
        let picture = Picture::open(&folder().join(file)).unwrap();
        let shape = [picture.height() as usize, picture.width() as usize];
        assert_eq!(tensor.shape()[..2], shape, "{file}");
        let found = bytes(&picture);
        assert_eq!(found.len(), tensor.data().len(), "{file}");
        // decoders of JPEG and of lossy WebP may round otherwise
        let most = match file {
            "lossy.webp" | "subsampled.jpg" => 3,
            _ if file.starts_with("turned") && file.ends_with(".jpg") => 5, // as lossy as that is
            _ if file.ends_with(".jpg") => 2,
            _ => 0,
        };
        let off = found.iter().zip(tensor.data()).map(|(a, b)| a.abs_diff(*b));
        assert!(off.max().unwrap() <= most, "{file}");
    }
    assert_eq!(seen, 24);
}

fn refusal(bytes: &[u8]) -> String {
    let error = Picture::decode(bytes, Path::new("x")).unwrap_err();
    assert_eq!(error.code(), "disk");
    error.to_string()
}

#[test]
fn broken_and_hostile_files_are_refused() {
    assert!(refusal(b"").contains("PNG, JPEG or WebP"));
    assert!(refusal(b"GIF89a and so on").contains("PNG, JPEG or WebP"));
    let read = |name: &str| std::fs::read(folder().join(name)).unwrap();
    assert!(refusal(&read("cmyk.jpg")).contains("CMYK"));
    for name in ["rgb.png", "rgb.jpg", "lossless.webp", "progressive.jpg"] {
        let whole = read(name);
        for part in 1..8 {
            assert!(refusal(&whole[..whole.len() * part / 8]).starts_with("x: cannot read"));
        }
        // no byte changed may do more than change the picture or have it refused
        for place in 0..whole.len() {
            let mut broken = whole.clone();
            broken[place] ^= 0x55;
            let _ = Picture::decode(&broken, Path::new("x"));
        }
    }
    let mut huge = read("rgb.png");
    huge[16..24].copy_from_slice(&[0, 0, 0x80, 0, 0, 0, 0x80, 0]);
    let crc = checksum(&huge[12..29]);
    huge[29..33].copy_from_slice(&crc.to_be_bytes());
    assert!(refusal(&huge).contains("32768x32768"), "{}", refusal(&huge));
    assert!(matches!(
        Picture::open(&folder()),
        Err(sd_rs::Error::Disk { .. })
    ));
}

/// PNG's checksum.
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & 0u32.wrapping_sub(crc & 1))
        })
    })
}

#[test]
fn parts_are_cut_and_put_back() {
    let picture = with_alpha(13, 9);
    let part = Rect {
        left: 3,
        top: 2,
        width: 5,
        height: 4,
    };
    let cut = picture.crop(part).unwrap();
    assert_eq!((cut.width(), cut.height()), (5, 4));
    assert_eq!(cut.rgb()[..3], picture.rgb()[(2 * 13 + 3) * 3..][..3]);
    assert_eq!(
        cut.alpha().unwrap(),
        picture.alpha().unwrap().crop(part).unwrap()
    );
    let mut black = Picture::from_rgb(13, 9, vec![0; 13 * 9 * 3]).unwrap();
    black.paste(&cut, 3, 2);
    assert_eq!(black.crop(part).unwrap().rgb(), cut.rgb());
    let filled = black.to_luma().map(|value| 255 * u8::from(value > 0));
    assert!(filled.bounds().unwrap().width <= 5);
    // only what lies inside
    let mut edge = Picture::from_rgb(4, 4, vec![0; 48]).unwrap();
    edge.paste(&cut, -3, -2);
    assert_eq!(edge.rgb()[..6], cut.rgb()[(2 * 5 + 3) * 3..][..6]);
    assert_eq!(edge.rgb()[6..12], [0; 6]);
    edge.paste(&cut, 4, 0);
    edge.paste(&cut, i64::MIN, i64::MAX);
    for bad in [
        Rect { left: 9, ..part },
        Rect { width: 0, ..part },
        Rect {
            top: u32::MAX,
            ..part
        },
    ] {
        assert!(picture.crop(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn sizes_and_numbers_out_of_range_are_refused() {
    let picture = colours(13, 9);
    assert!(picture.resize(0, 5, Filter::Lanczos).is_err());
    assert!(picture.resize(5, 16_385, Filter::Nearest).is_err());
    assert!(picture.gaussian_blur(-1.0).is_err());
    assert!(picture.gaussian_blur(f32::NAN).is_err());
    assert!(picture.blend(&colours(9, 13), &grey(13, 9)).is_err());
    assert!(Grey::new(3, 3, vec![0; 8]).is_err());
    assert!(Picture::from_planar(1, 1, &[0.0, f32::NAN, 1.0]).is_err());
    let even = CvBlur {
        kernel: (4, 1),
        sigma: (1.0, 1.0),
    };
    assert!(grey(5, 5).cv_blur(even).is_err());
    let back = Picture::from_planar(13, 9, &picture.to_planar()).unwrap();
    assert_eq!(back, picture);
}
