//! Guidance of special kinds, regions and shortcuts, from the command line to the latents, against diffusers, DeepCache and the methods' formulas in
//! torch. The runs are described in `fixtures/guidance/README.md`.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device};
use sd_rs::checkpoint::Checkpoint;
use sd_rs::pipeline::{
    Control, Engine, Gate, Guidance, Merging, Perturbed, Place, Plan, Projected, Region, Regions,
    Request, Rule,
};
use sd_rs::text::Syntax;
use serde_json::Value;

use crate::models::{RUN, close, flat, list, text};
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm, Values};

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/guidance")
        .join(name)
}

/// Tensors of a file, all of f32.
fn read_values(path: &Path) -> HashMap<String, Values> {
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let values = |x: &candle_core::Tensor| Values {
        shape: x.dims().to_vec(),
        data: flat(x),
    };
    tensors
        .iter()
        .map(|(name, x)| (name.clone(), values(x)))
        .collect()
}

fn runs() -> Value {
    serde_json::from_slice(&std::fs::read(fixture("runs.json")).unwrap()).unwrap()
}

/// The folders of all models in use, and a mask.
struct Models {
    dir: Dir,
}

impl Models {
    fn new(runs: &Value, names: &[&str]) -> Self {
        let dir = Dir::new();
        for name in names {
            let folder = dir.path(name);
            std::fs::create_dir(&folder).unwrap();
            Case::load(name).write_folder(&folder, &FolderForm::default());
        }
        let rows = list(&runs["mask"]);
        let pixels = rows.iter().flat_map(list);
        let pixels: Vec<u8> = pixels.map(|v| v.as_u64().unwrap() as u8).collect();
        let (w, h) = (list(&rows[0]).len() as u32, rows.len() as u32);
        image::save_buffer(
            dir.path("mask.png"),
            &pixels,
            w,
            h,
            image::ExtendedColorType::L8,
        )
        .unwrap();
        Self { dir }
    }

    fn set_scheduler(&self, run: &Value) {
        let path = format!("{}/scheduler/scheduler_config.json", text(&run["case"]));
        std::fs::write(self.dir.path(&path), run["scheduler"].to_string()).unwrap();
    }

    /// The latents of a run made by the binary with these flags beside the run's own.
    fn latents(&self, run: &Value, flags: &[&str]) -> Values {
        self.set_scheduler(run);
        let number = |key: &str| run[key].to_string();
        let (steps, scale, seed) = (number("steps"), number("cfg_scale"), number("seed"));
        let (width, height) = (number("width"), number("height"));
        let mut args = vec![
            "generate",
            "-m",
            text(&run["case"]),
            "-p",
            text(&run["prompt"]),
            "-n",
            text(&run["negative_prompt"]),
            "--prompt-syntax",
            "plain",
            "--dtype",
            "f32",
            "--steps",
            &steps,
            "--cfg-scale",
            &scale,
            "-W",
            &width,
            "-H",
            &height,
            "-s",
            &seed,
            "--save-latents",
            "latents.safetensors",
            "-o",
            "picture.png",
            "--overwrite",
        ];
        args.extend(flags);
        let outcome = self.dir.sd_rs(&args);
        assert_eq!(
            outcome.status,
            Some(0),
            "{}: {}",
            text(&run["name"]),
            outcome.stderr
        );
        read_values(&self.dir.path("latents.safetensors"))
            .remove("latents")
            .unwrap()
    }
}

fn check(only: impl Fn(&str) -> bool) {
    let runs = runs();
    let expected = read_values(&fixture("expected.safetensors"));
    let wanted: Vec<&Value> = list(&runs["runs"])
        .iter()
        .filter(|run| only(text(&run["name"])))
        .collect();
    assert!(!wanted.is_empty());
    let mut names: Vec<&str> = wanted.iter().map(|run| text(&run["case"])).collect();
    names.sort_unstable();
    names.dedup();
    let models = Models::new(&runs, &names);
    let mut wrong = Vec::new();
    for run in wanted {
        let flags: Vec<&str> = list(&run["flags"]).iter().map(text).collect();
        let name = text(&run["name"]);
        let got = models.latents(run, &flags);
        let distance = distance(&got, &expected[name]);
        eprintln!("{name}: {distance:.1e}");
        if distance > RUN {
            wrong.push(format!("{name}: {distance:.1e}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "relative distances above {RUN:.0e}: {wrong:?}"
    );
}

fn distance(got: &Values, want: &Values) -> f64 {
    assert_eq!(got.shape, want.shape);
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let pairs = got.data.iter().zip(&want.data);
    norm(&mut pairs.map(|(a, b)| f64::from(*a) - f64::from(*b)))
        / norm(&mut want.data.iter().map(|&v| f64::from(v)))
}

const GROUPS: [&[&str]; 7] = [
    &["pag", "sag"],
    &["freeu"],
    &["regions"],
    &["deep", "ngms"],
    &["mimic", "perp"],
    &["tgate"],
    &["tome"],
];

fn in_group(name: &str, group: usize) -> bool {
    GROUPS[group].iter().any(|start| name.starts_with(start))
}

#[test]
fn rules_intervals_and_schedules() {
    check(|name| (0..GROUPS.len()).all(|group| !in_group(name, group)));
}

#[test]
fn away_from_networks_that_see_less() {
    check(|name| in_group(name, 0));
}

#[test]
fn free_u_in_both_versions() {
    check(|name| in_group(name, 1));
}

#[test]
fn regions_by_boxes_and_masks() {
    check(|name| in_group(name, 2));
}

#[test]
fn shortcuts_are_those_of_their_makers() {
    check(|name| in_group(name, 3));
}

#[test]
fn a_gate_behind_which_no_text_is_read() {
    check(|name| in_group(name, 5));
}

#[test]
fn tokens_that_are_merged() {
    check(|name| in_group(name, 6));
}

#[test]
fn thresholds_and_perpendicular_negatives() {
    check(|name| in_group(name, 4));
}

fn engine(folder: &Path) -> Engine {
    Engine::load(&Checkpoint::open(folder).unwrap(), &Device::Cpu, DType::F32).unwrap()
}

fn generate(engine: &Engine, request: &Request) -> candle_core::Tensor {
    let plan = Plan::new(engine, request).unwrap();
    let mut latents = None;
    let mut finish = |batch: sd_rs::pipeline::Batch| {
        latents = Some(batch.latents);
        Ok(())
    };
    engine
        .generate(request, &plan, &mut |_| Control::Continue, &mut finish)
        .unwrap();
    latents.unwrap()
}

fn request() -> Request {
    Request {
        prompt: "a fox".to_owned(),
        negative_prompt: Some("a hen".to_owned()),
        prompt_syntax: Syntax::Plain,
        width: Some(80),
        height: Some(72),
        steps: Some(3),
        seed: Some(11),
        sampler: Some("Euler a".to_owned()),
        ..Request::default()
    }
}

/// Every kind of guidance looks at one picture at a time: a picture of a batch equals the one made alone.
#[test]
fn pictures_of_a_batch_do_not_see_each_other() {
    let runs = runs();
    let models = Models::new(&runs, &["sd1-odd"]);
    let engine = engine(&models.dir.path("sd1-odd"));
    let pag = Perturbed {
        scale: 2.0,
        adaptive: 0.0,
        layers: vec!["mid".to_owned()],
    };
    let apg = Projected {
        eta: 0.5,
        threshold: 4.0,
        momentum: Some(-0.4),
    };
    let region = Region {
        prompt: "a tower".to_owned(),
        place: Place::Box([0.0, 0.0, 0.5, 0.5]),
        weight: 2.0,
    };
    let mut requests = BTreeMap::new();
    for (name, rule) in [
        ("apg", Rule::Projected(apg)),
        ("perp-neg", Rule::Perpendicular { scale: 1.0 }),
        ("zero", Rule::ZeroStar { zero_steps: 1 }),
        ("tcfg", Rule::Tangential),
    ] {
        let guidance = Guidance {
            rule,
            rescale: 0.5,
            perturbed: Some(pag.clone()),
            self_attention: Some(0.5),
            ..Guidance::default()
        };
        let mut request = request();
        request.guidance = guidance;
        request.regions = Regions {
            list: vec![region.clone()],
            base: 1.0,
        };
        requests.insert(name, request);
    }
    let merging = Merging {
        ratio: 0.5,
        max_downsample: 2,
        random: true,
    };
    for (name, gate, merging) in [
        ("tome", None, Some(merging)),
        ("tgate", Some(Gate::at(2)), None),
        (
            "tgate and tome",
            Some(Gate {
                warm_up: 0,
                interval: 2,
                late_interval: 3,
                ..Gate::at(3)
            }),
            Some(merging),
        ),
    ] {
        let mut request = request();
        request.steps = Some(5);
        request.shortcuts.gate = gate;
        request.shortcuts.merging = merging;
        request.regions = Regions {
            list: vec![region.clone(), region.clone()],
            base: 1.0,
        };
        requests.insert(name, request);
    }
    for (name, request) in requests {
        let both = Request {
            batch_size: 2,
            ..request.clone()
        };
        let both = generate(&engine, &both);
        for i in 0..2 {
            let one = Request {
                seed: request.seed.map(|seed| seed + i as u64),
                ..request.clone()
            };
            let want = Values {
                shape: vec![1, 4, 9, 10],
                data: flat(&generate(&engine, &one)),
            };
            close(name, &both.narrow(0, i, 1).unwrap(), &want, 1e-5);
        }
    }
}

/// What has no effect changes no bit.
#[test]
fn neutral_values_change_nothing() {
    let runs = runs();
    let models = Models::new(&runs, &["sd1-odd"]);
    let engine = engine(&models.dir.path("sd1-odd"));
    let plain = flat(&generate(&engine, &request()));
    let mut others = vec![request(); 6];
    others[0].guidance.span = Some((0.0, 1.0));
    others[1].shortcuts.deep_cache = 1;
    others[2].shortcuts.least_negative_sigma = 0.01; // above no level of the run
    others[3].guidance.schedule.least = 3.0; // of a constant scale
    others[4].shortcuts.gate = Some(Gate::at(3)); // behind the last step
    others[5].shortcuts.merging = Some(Merging {
        ratio: 0.01, // of 90 tokens
        max_downsample: 8,
        random: true,
    });
    for (i, other) in others.iter().enumerate() {
        assert_eq!(flat(&generate(&engine, other)), plain, "{i}");
    }
    // every call is a whole one
    let mut cached = request();
    cached.shortcuts.deep_cache = 50;
    cached.steps = Some(1);
    let once = Request {
        steps: Some(1),
        ..request()
    };
    assert_eq!(
        flat(&generate(&engine, &cached)),
        flat(&generate(&engine, &once))
    );
}

/// A picture made with shortcuts says so, in A1111's words where it has some, and a transformer cannot take them.
#[test]
fn shortcuts_are_told_and_are_for_unets() {
    let runs = runs();
    let models = Models::new(&runs, &["sd1-odd", "sdxl", "sd35"]);
    let generate = |model: &str, flags: &[&str]| {
        let args = [
            &[
                "generate", "-m", model, "-p", "a fox", "-W", "48", "-H", "48",
            ][..],
            &["--steps", "2", "-s", "1", "-o", "a.png", "--overwrite"],
            flags,
        ];
        models.dir.sd_rs(&args.concat())
    };
    let flags = [
        "--tome",
        "0.4",
        "--tgate",
        "1",
        "--hires-scale",
        "1.5",
        "--dtype",
        "f32",
    ];
    let outcome = generate("sd1-odd", &flags);
    assert_eq!(outcome.status, Some(0), "{}", outcome.stderr);
    let texts = sd_rs::output::png::read_text(&models.dir.path("a.png")).unwrap();
    let told = texts.get("parameters").unwrap();
    for words in [
        "Token merging ratio: 0.4",
        "Token merging ratio hr: 0.4",
        "T-GATE step: 1",
    ] {
        assert!(told.contains(words), "{told}");
    }
    let outcome = generate("sdxl", &["--tome", "0.4"]);
    assert_eq!(outcome.status, Some(0), "{}", outcome.stderr);
    let notice = "--tome has no say";
    assert!(outcome.stderr.contains(notice), "{}", outcome.stderr);
    for flags in [["--tome", "0.4"], ["--tgate", "1"]] {
        let outcome = generate("sd35", &flags);
        assert_eq!(outcome.status, Some(2), "{}", outcome.stderr);
        assert!(
            outcome.stderr.contains("is for UNets"),
            "{}",
            outcome.stderr
        );
    }
}

#[test]
fn what_cannot_be_is_refused_in_one_sentence() {
    let dir = Dir::new();
    let generate = |flags: &[&str]| {
        let args = [&["generate", "-p", "a fox", "--dry-run"][..], flags].concat();
        dir.sd_rs(&args)
    };
    for (flags, words) in [
        (
            &["--cfg-rescale", "1.5"][..],
            "--cfg-rescale is 1.5, expected 0 to 1",
        ),
        (
            &["--cfg-start", "0.8", "--cfg-end", "0.2"],
            "--cfg-start is 0.8",
        ),
        (
            &["--pag-scale", "3", "--pag-layers", "nowhere"],
            "--pag-layers names \"nowhere\"",
        ),
        (&["--pag-scale", "nan"], "--pag-scale is NaN"),
        (&["--freeu", "1,2,3"], "--freeu has 3 numbers"),
        (
            &["--sag-scale", "1", "--deep-cache", "3"],
            "use one of them",
        ),
        (&["--region", "a hen"], "has no place"),
        (
            &["--region", "5000,0,64,64:a hen"],
            "is no part of a picture",
        ),
        (
            &["--region", "0,0,8,8:a hen", "--region-base", "0"],
            "no prompt counts",
        ),
        (
            &["--region", "a hen", "--region-mask", "none.png"],
            "none.png",
        ),
        (
            &["--mimic-scale", "7", "--mimic-percentile", "101"],
            "--mimic-percentile is 101",
        ),
        (&["--ngms", "-1"], "--ngms"),
        (&["--tome", "0.75"], "--tome is 0.75"),
        (&["--token-merging-ratio", "-0.1"], "--tome is -0.1"),
        (&["--tome", "nan"], "--tome is NaN"),
        (
            &["--tome", "0.5", "--tome-max-downsample", "3"],
            "--tome-max-downsample is 3",
        ),
        (&["--tgate", "0"], "--tgate is 0"),
        (
            &["--tgate", "3", "--tgate-sp-interval", "0"],
            "--tgate-sp-interval is 0",
        ),
        (
            &["--tgate", "3", "--deep-cache", "3"],
            "--tgate does not go with --deep-cache",
        ),
        (
            &["--tgate", "3", "--pag-scale", "3"],
            "--tgate does not go with --pag-scale",
        ),
        (
            &["--tgate", "3", "--sag-scale", "1"],
            "--tgate does not go with --sag-scale",
        ),
    ] {
        let outcome = generate(flags);
        assert!(
            matches!(outcome.status, Some(1 | 2)),
            "{flags:?}: {}",
            outcome.stderr
        );
        assert!(
            outcome.stderr.contains(words),
            "{flags:?}: {}",
            outcome.stderr
        );
    }
    // rules exclude each other, and parts of a rule need it
    for flags in [
        &["--apg", "--tcfg"][..],
        &["--apg-eta", "0.5"],
        &["--tome-random"],
        &["--tgate-warm-up", "3"],
    ] {
        assert_eq!(generate(flags).status, Some(2), "{flags:?}");
    }
}
