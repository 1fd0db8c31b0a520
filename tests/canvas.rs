//! Autoencoders in tiles, pictures without edges, previews and second passes, against diffusers, torch and k-diffusion. What was computed is described
//! in `fixtures/canvas/README.md`.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use sd_kernels::Wrap;
use sd_rs::checkpoint::Checkpoint;
use sd_rs::output::Image;
use sd_rs::pipeline::{
    Control, Engine, Event, Hires, HiresSize, Plan, Preview, PreviewKind, Request, Surface,
    TileNorm, Tiling, TilingMode,
};
use sd_rs::text::Syntax;
use serde_json::Value;

use crate::models::{CALL, RUN, close, flat, list, text};
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm, Law, Values, floats, uniform};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/canvas")
}

fn record() -> Value {
    serde_json::from_str(&fs::read_to_string(fixtures().join("runs.json")).unwrap()).unwrap()
}

fn expected() -> HashMap<String, Values> {
    floats(&fixtures().join("expected.safetensors"))
}

fn engine(model: &str) -> Engine {
    let dir = Dir::new();
    let folder = dir.path("model");
    Case::load(model).write_folder(&folder, &FolderForm::default());
    Engine::load(
        &Checkpoint::open(&folder).unwrap(),
        &Device::Cpu,
        DType::F32,
    )
    .unwrap()
}

/// A tensor that `make.py` made by the same name.
fn made(name: &str, shape: [usize; 4], scale: f32) -> Tensor {
    let values = uniform(name, &shape, Law { scale, offset: 0.0 });
    Tensor::from_vec(values, &shape, &Device::Cpu).unwrap()
}

fn latents(engine: &Engine) -> Tensor {
    // the reference's are already divided by the factor
    let factor = engine.spec().vae.config.scaling_factor;
    (made("canvas/latents", [1, 4, 28, 20], 1.73) * factor).unwrap()
}

fn picture() -> Tensor {
    made("canvas/picture", [1, 3, 224, 160], 1.0)
}

/// Every fifth pixel either way.
fn thin(picture: &Tensor) -> Tensor {
    let (_, _, h, w) = picture.dims4().unwrap();
    let places = |n: usize| {
        let places: Vec<u32> = (0..n as u32).step_by(5).collect();
        Tensor::new(places, &Device::Cpu).unwrap()
    };
    let rows = picture.index_select(&places(h), 2).unwrap();
    rows.index_select(&places(w), 3).unwrap()
}

fn tiled(tile: usize, norm: TileNorm, wrap: Wrap) -> Surface {
    Surface {
        wrap,
        tiling: Tiling {
            mode: TilingMode::On,
            tile,
            norm,
        },
    }
}

fn both_moments(engine: &Engine, surface: &Surface) -> Tensor {
    let posterior = engine
        .networks()
        .encode_as(&picture(), DType::F32, surface, &mut |_, _| Ok(()))
        .unwrap();
    let one = posterior.mode().ones_like().unwrap();
    let spread = (posterior.sample(&one).unwrap() - posterior.mode()).unwrap();
    Tensor::cat(&[posterior.mode(), spread], 1).unwrap()
}

/// Means, and deviations for the logarithms of variances that diffusers keeps.
fn deviations(moments: &Values) -> Values {
    let half = moments.data.len() / 2;
    let (mean, log) = moments.data.split_at(half);
    let spread = log.iter().map(|v| (0.5 * v.clamp(-30.0, 20.0)).exp());
    Values {
        shape: moments.shape.clone(),
        data: mean.iter().copied().chain(spread).collect(),
    }
}

#[test]
fn tiles_of_their_own_are_diffusers() {
    let (engine, expected) = (engine("sd1-odd"), expected());
    for tile in [8, 12] {
        let surface = tiled(tile, TileNorm::Own, Wrap::default());
        let got = engine.networks().decode_as(
            &latents(&engine),
            DType::F32,
            &surface,
            &mut |_, _| Ok(()),
        );
        let what = format!("tiles-{tile}");
        close(&what, &thin(&got.unwrap()), &expected[&what], CALL);
        let what = format!("moments-{tile}");
        let want = deviations(&expected[&what]);
        close(&what, &both_moments(&engine, &surface), &want, CALL);
    }
}

/// Whoever waits for tiles is told of each, and can stop between two of them.
#[test]
fn tiles_can_be_watched_and_stopped() {
    let engine = engine("sd1-odd");
    let (networks, latents) = (engine.networks(), latents(&engine));
    let latents = Tensor::cat(&[&latents, &latents], 0).unwrap();
    for norm in [TileNorm::Own, TileNorm::Shared] {
        let surface = tiled(8, norm, Wrap::default());
        for last in [usize::MAX, 3] {
            let mut told = Vec::new();
            let mut watch = |done, total| {
                told.push((done, total));
                match done {
                    _ if done == last => Err(sd_rs::Error::Interrupted),
                    _ => Ok(()),
                }
            };
            let run = networks.decode_as(&latents, DType::F32, &surface, &mut watch);
            let encoded = networks.encode_as(&picture(), DType::F32, &surface, &mut watch);
            assert_eq!((run.is_ok(), encoded.is_ok()), (last > 3, last > 3));
            let ends = |at: &&(usize, usize)| at.0 == 1;
            assert_eq!(told.iter().filter(ends).count(), 2, "{norm:?} {told:?}");
            let whole = |at: &&(usize, usize)| at.0 == at.1;
            let expected = if last == 3 { 0 } else { 2 };
            assert_eq!(
                told.iter().filter(whole).count(),
                expected,
                "{norm:?} {told:?}"
            );
            let ordered = told.windows(2).filter(|w| w[1].0 == w[0].0 + 1).count();
            assert_eq!(ordered, told.len() - 2, "{norm:?} {told:?}");
        }
    }
}

/// With shared norms nobody can tell tiles from the whole.
#[test]
fn tiles_with_shared_norms_are_the_whole() {
    let (engine, expected) = (engine("sd1-odd"), expected());
    for tile in [8, 12, 16, 20, 64] {
        let surface = tiled(tile, TileNorm::Shared, Wrap::default());
        let got = engine.networks().decode_as(
            &latents(&engine),
            DType::F32,
            &surface,
            &mut |_, _| Ok(()),
        );
        close("whole", &thin(&got.unwrap()), &expected["whole"], CALL);
        let want = deviations(&expected["moments"]);
        close("moments", &both_moments(&engine, &surface), &want, CALL);
    }
    let own = tiled(8, TileNorm::Own, Wrap::default());
    let own = engine
        .networks()
        .decode_as(&latents(&engine), DType::F32, &own, &mut |_, _| Ok(()));
    let own = flat(&thin(&own.unwrap()));
    let far = own
        .iter()
        .zip(&expected["whole"].data)
        .map(|(a, b)| (a - b).abs());
    assert!(far.fold(0.0, f32::max) > 0.05, "own norms are to be seen");
}

fn axes(name: &str) -> Wrap {
    Wrap {
        x: name.contains('x'),
        y: name.contains('y'),
    }
}

fn request(record: &Value) -> Request {
    Request {
        prompt: text(&record["prompt"]).to_owned(),
        negative_prompt: Some(text(&record["negative"]).to_owned()),
        prompt_syntax: Syntax::Plain,
        width: Some(160),
        height: Some(96),
        cfg_scale: Some(7.5),
        ..Request::default()
    }
}

/// Latents, pictures and events of a run.
fn go(engine: &Engine, request: &Request) -> (Tensor, Vec<Image>, Vec<Event>) {
    let plan = Plan::new(engine, request).unwrap();
    let (mut latents, mut pictures, mut events) = (None, Vec::new(), Vec::new());
    let mut listen = |event| {
        events.push(event);
        Control::Continue
    };
    engine
        .generate(request, &plan, &mut listen, &mut |batch| {
            latents = Some(batch.latents);
            pictures.extend(batch.pictures.into_iter().map(|picture| picture.image));
            Ok(())
        })
        .unwrap();
    (latents.unwrap(), pictures, events)
}

#[test]
fn textures_have_no_edges() {
    let (engine, expected, record) = (engine("sd1-odd"), expected(), record());
    for name in ["x", "y", "xy"] {
        let surface = Surface {
            wrap: axes(name),
            ..Surface::default()
        };
        let request = Request {
            steps: Some(4),
            seed: Some(11),
            surface,
            ..request(&record)
        };
        let (latents, ..) = go(&engine, &request);
        close(name, &latents, &expected[&format!("run-{name}")], RUN);
        let want = &expected[&format!("decoded-{name}")];
        let moments = deviations(&expected[&format!("encoded-{name}")]);
        for surface in [surface, tiled(16, TileNorm::Shared, axes(name))] {
            let got = engine
                .networks()
                .decode_as(&latents, DType::F32, &surface, &mut |_, _| Ok(()));
            close(name, &thin(&got.unwrap()), want, RUN);
            close(name, &both_moments(&engine, &surface), &moments, CALL);
        }
    }
}

#[test]
fn second_passes() {
    let (engine, expected, record) = (engine("sd1-odd"), expected(), record());
    assert_eq!(list(&record["second"]).len(), 8);
    for run in list(&record["second"]) {
        let name = text(&run["upscaler"]);
        let whole = |value: &Value| value.as_u64().map(|n| usize::try_from(n).unwrap());
        let size = match run["scale"].as_f64() {
            Some(scale) => HiresSize::Scale(scale),
            None => HiresSize::Pixels(
                whole(&run["size"][0]).unwrap(),
                whole(&run["size"][1]).unwrap(),
            ),
        };
        let request = Request {
            steps: whole(&run["steps"]),
            seed: run["seed"].as_u64(),
            sampler: Some("Euler".to_owned()),
            hires: Some(Hires {
                size,
                upscaler: name.parse().unwrap(),
                steps: whole(&run["hires_steps"]),
                strength: run["strength"].as_f64().unwrap(),
                cfg_scale: run["cfg_scale"].as_f64(),
            }),
            ..request(&record)
        };
        let (latents, pictures, events) = go(&engine, &request);
        let want = &expected[&format!("second-{name}")];
        close(name, &latents, want, RUN);
        let side = |i: usize| u32::try_from(8 * want.shape[i]).unwrap();
        assert_eq!((pictures[0].height, pictures[0].width), (side(2), side(3)));
        let last = events.iter().rev().find_map(|event| match event {
            Event::Step { done, total } => Some((*done, *total)),
            _ => None,
        });
        let (done, total) = last.unwrap();
        assert_eq!(done, total, "{name}");
    }
}

#[test]
fn previews() {
    let (engine, record) = (engine("sd1-odd"), record());
    let request = Request {
        steps: Some(4),
        seed: Some(5),
        batch_size: 2,
        sampler: Some("Euler".to_owned()),
        preview: Some(Preview {
            kind: PreviewKind::Latent,
            every: 2,
        }),
        ..request(&record)
    };
    let (latents, _, events) = go(&engine, &request);
    let images: Vec<&Image> = events
        .iter()
        .filter_map(|event| match event {
            Event::Preview(image) => Some(image),
            _ => None,
        })
        .collect();
    assert_eq!(images.len(), 2);
    assert_eq!((images[1].width, images[1].height), (40, 12));
    // behind the last step the estimate is the result: ComfyUI's sum for the first pixel of the second picture
    let values = flat(&latents.narrow(0, 1, 1).unwrap());
    let factors = engine.spec().rgb().unwrap().factors;
    for (colour, &got) in images[1].rgb[3 * 20..][..3].iter().enumerate() {
        let terms = factors.iter().enumerate();
        let sum: f32 = terms.map(|(c, f)| values[c * 12 * 20] * f[colour]).sum();
        let byte = ((sum + 1.0) / 2.0).clamp(0.0, 1.0) * 255.0;
        assert!((f32::from(got) - byte).abs() <= 1.0);
    }
}

#[test]
fn a_tiny_decoder_makes_previews() {
    let taesd =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/taesd/original.safetensors");
    let options = sd_rs::checkpoint::ReadOptions::default();
    let taesd = Checkpoint::open_part(&taesd, "vae", &options).unwrap();
    let engine = engine("sd1-odd").with_preview_decoder(&taesd).unwrap();
    let request = Request {
        steps: Some(2),
        seed: Some(5),
        preview: Some(Preview {
            kind: PreviewKind::Tiny,
            every: 1,
        }),
        ..request(&record())
    };
    let (_, _, events) = go(&engine, &request);
    let images = events.iter().filter_map(|event| match event {
        Event::Preview(image) => Some((image.width, image.height)),
        _ => None,
    });
    let sizes: Vec<_> = images.collect();
    assert!(
        sizes.len() >= 2 && sizes.iter().all(|&size| size.0 > 20 && size.1 > 12),
        "{sizes:?}"
    );
    let error = Engine::with_preview_decoder(
        self::engine("sd1-odd"),
        &Checkpoint::open_part(
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("tests/fixtures/taesd/sixteen.safetensors")
                .as_path(),
            "vae",
            &options,
        )
        .unwrap(),
    );
    let error = error.err().unwrap().to_string();
    assert!(error.contains("latents of 16 channels"), "{error}");
}

#[test]
fn what_cannot_be_is_refused() {
    let (engine, record) = (engine("sd1-odd"), record());
    let refused = |request: &Request| Plan::new(&engine, request).unwrap_err().to_string();
    for tile in [0, 4, 10, 2000] {
        let surface = tiled(tile, TileNorm::Shared, Wrap::default());
        let error = refused(&Request {
            surface,
            ..request(&record)
        });
        assert!(error.contains("--vae-tile is"), "{error}");
    }
    let surface = tiled(16, TileNorm::Own, Wrap { x: true, y: false });
    let error = refused(&Request {
        surface,
        ..request(&record)
    });
    assert!(error.contains("use shared"), "{error}");
    for (size, word) in [
        (HiresSize::Scale(0.0), "--hires-scale is 0"),
        (HiresSize::Scale(f64::NAN), "--hires-scale is NaN"),
        (HiresSize::Pixels(0, 0), "no pixels"),
        (HiresSize::Pixels(usize::MAX, 8), "expected"),
        (HiresSize::Pixels(16_384, 8), "up to 8192"),
    ] {
        let error = refused(&Request {
            hires: Some(Hires {
                size,
                upscaler: "latent".parse().unwrap(),
                steps: None,
                strength: Hires::STRENGTH,
                cfg_scale: None,
            }),
            ..request(&record)
        });
        assert!(error.contains(word), "{size:?}: {error}");
    }
    let error = "R-ESRGAN 4x+"
        .parse::<sd_rs::pipeline::Upscaler>()
        .unwrap_err();
    assert!(error.contains("expected one of"), "{error}");
}

#[test]
fn the_command_line() {
    let dir = Dir::new();
    let out = dir.ok(&[
        "generate",
        "-p",
        "a",
        "--steps",
        "2",
        "--seed",
        "3",
        "-W",
        "64",
        "-H",
        "64",
        "--sampler",
        "Euler",
        "--tile",
        "xy",
        "--hires-scale",
        "1.5",
        "--hires-steps",
        "3",
        "--hires-upscaler",
        "Latent (bicubic)",
        "--vae-tiling",
        "on",
        "--vae-tile",
        "8",
        "--preview",
        "latent",
        "--preview-file",
        "p.png",
        "-o",
        "a.png",
        "--json",
    ]);
    let told: Value = serde_json::from_str(out.trim()).unwrap();
    assert_eq!(
        (told["width"].as_u64(), told["height"].as_u64()),
        (Some(96), Some(96))
    );
    let texts = sd_rs::output::png::read_text(&dir.path("a.png")).unwrap();
    let parameters = texts.get("parameters").unwrap();
    for pair in [
        "Size: 64x64",
        "Denoising strength: 0.7",
        "Hires upscale: 1.5",
        "Hires steps: 3",
        "Hires upscaler: Latent (bicubic)",
        "Tiling: True",
    ] {
        assert!(parameters.contains(pair), "{parameters}");
    }
    let preview = sd_rs::picture::Picture::open(&dir.path("p.png")).unwrap();
    assert_eq!((preview.width(), preview.height()), (12, 12));
    let error = dir.fails(
        &["generate", "-p", "a", "--preview", "taesd", "--steps", "1"],
        1,
    );
    assert!(
        error.contains("taesd_decoder") && error.contains("--preview-vae"),
        "{error}"
    );
}

/// The second pass begins at what `upscale` makes of the first pass's picture, in whole multiples.
#[test]
fn a_network_enlarges_for_the_second_pass() {
    let dir = Dir::new();
    let network = crate::upscale::write("compact-x2", &dir);
    let network = network.to_str().unwrap();
    let common = [
        "generate",
        "-p",
        "a",
        "--steps",
        "4",
        "--seed",
        "3",
        "-W",
        "64",
        "-H",
        "64",
        "--sampler",
        "Euler",
        "--dtype",
        "f32",
    ];
    dir.ok(&[&common[..], &["-o", "first.png"]].concat());
    dir.ok(&["upscale", "first.png", "-m", network, "-o", "large.png"]);
    let second = [
        "--strength",
        "0.5",
        "--like",
        "a1111-exact",
        "--init-image",
        "large.png",
        "-o",
        "two.png",
        "-W",
        "128",
        "-H",
        "128",
    ];
    let mut rest = common.to_vec();
    rest.retain(|word| !["-W", "-H", "64"].contains(word));
    dir.ok(&[&rest[..], &second].concat());
    let hires = [
        "--hires-scale",
        "2",
        "--hires-strength",
        "0.5",
        "--hires-upscaler",
        network,
        "-o",
        "one.png",
    ];
    dir.ok(&[&common[..], &hires].concat());
    let open = |name| sd_rs::picture::Picture::open(&dir.path(name)).unwrap();
    let (one, two) = (open("one.png"), open("two.png"));
    assert_eq!((one.width(), one.height()), (128, 128));
    let off = |to: &sd_rs::picture::Picture| {
        let pairs = one.rgb().iter().zip(to.rgb());
        let sum: u64 = pairs.map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        sum as f64 / one.rgb().len() as f64
    };
    // a first pass that is not stored is cut to bytes where a file's is rounded
    assert!(off(&two) < 3.0, "{}", off(&two));
    let texts = sd_rs::output::png::read_text(&dir.path("one.png")).unwrap();
    let parameters = texts.get("parameters").unwrap();
    assert!(
        parameters.contains("Hires upscaler: compact-x2"),
        "{parameters}"
    );
    let error = dir.fails(
        &[
            &common[..],
            &["--hires-scale", "2", "--hires-upscaler", "4x-Nowhere"],
        ]
        .concat(),
        1,
    );
    assert!(
        error.contains("latent-antialiased") && error.contains("models list"),
        "{error}"
    );
}

/// A network at work is told of, and stops when it is told to.
#[test]
fn a_network_that_enlarges_can_be_stopped() {
    let engine = engine("sd1-odd").with_upscaler(crate::upscale::load("compact-x2"));
    let request = Request {
        sampler: Some("Euler".to_owned()),
        steps: Some(2),
        hires: Some(Hires {
            size: HiresSize::Scale(2.0),
            upscaler: sd_rs::pipeline::Upscaler::Network,
            steps: Some(2),
            strength: 0.5,
            cfg_scale: None,
        }),
        ..request(&record())
    };
    let plan = Plan::new(&engine, &request).unwrap();
    let mut steps = 0;
    let mut listener = |event: Event| match event {
        Event::Enlarging { .. } => Control::Stop,
        Event::Step { .. } => {
            steps += 1;
            Control::Continue
        }
        _ => Control::Continue,
    };
    let stopped = engine.generate(&request, &plan, &mut listener, &mut |_| Ok(()));
    assert!(
        matches!(stopped, Err(sd_rs::Error::Interrupted)),
        "{stopped:?}"
    );
    assert_eq!(steps, 2);
}

/// A flag that would say nothing by itself is not passed over in silence.
#[test]
fn flags_that_need_others_say_so() {
    let dir = Dir::new();
    for (flags, needed) in [
        (&["--hires-strength", "0.5"][..], "--hires-scale"),
        (&["--hires-upscaler", "lanczos"], "--hires-scale"),
        (&["--preview-file", "p.png"], "--preview"),
        (&["--loopback", "2"], "--init-image"),
        (&["--fit", "crop"], "--init-image"),
        (&["--like", "comfyui"], "--init-image"),
        (&["-i", "a.png", "--only-masked", "8"], "--mask"),
        (&["-i", "a.png", "--invert-mask"], "--mask"),
        (
            &["-i", "a.png", "--extend", "left=8", "--invert-mask"],
            "--mask",
        ),
        (
            &[
                "-i",
                "a.png",
                "--mask",
                "alpha",
                "--extend",
                "left=8",
                "--only-masked",
                "8",
            ],
            "cannot be used with",
        ),
        (&["-i", "a.png", "--fill", "noise"], "--mask"),
        (
            &[
                "-i",
                "a.png",
                "--mask-box",
                "0,0,8,8",
                "--extend-feather",
                "8",
            ],
            "--extend",
        ),
        (
            &["--hires-scale", "2", "--hires-strength", "5"],
            "--hires-strength is 5",
        ),
    ] {
        let error = dir.fails(
            &[&["generate", "-p", "a", "--steps", "1"], flags].concat(),
            2,
        );
        assert!(error.contains(needed), "{flags:?}: {error}");
    }
}
