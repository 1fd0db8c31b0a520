//! What steers in the eager reference and in bf16: the same pictures as in a plan in f32, as closely as each allows.

use super::lite::Lites;
use super::*;

/// Relative L2 distance of the eager reference from a plan, in f32.
const EAGER: f64 = 1e-5;
/// The same of a run in bf16.
const HALF: f64 = 0.05;

/// The last latents of a run of the model in `base` with these flags.
fn latents_of(dir: &Dir, flags: &[&str], (dtype, eager): (&str, bool)) -> Tensor {
    let common = "generate -m base -W 96 -H 64 --steps 3 --cfg-scale 4 -s 7 -o out.png --overwrite --save-latents latents.safetensors";
    let mut args: Vec<&str> = common.split(' ').collect();
    args.extend(["-p", "a fox in the snow", "-n", "blurry", "--dtype", dtype]);
    args.extend(flags);
    let mut command = dir.command(&args);
    if eager {
        command.env("SD_RS_EAGER", "1");
    }
    let output = command.output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{flags:?}: {words}");
    let latents = candle_core::safetensors::load(dir.path("latents.safetensors"), &Device::Cpu);
    latents.unwrap()["latents"].clone()
}

fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (crate::models::flat(a), crate::models::flat(b));
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let apart = a.iter().zip(&b).map(|(a, b)| f64::from(*a) - f64::from(*b));
    norm(&mut { apart }) / norm(&mut b.iter().map(|v| f64::from(*v)))
}

#[test]
fn executors_and_types_agree() {
    let cases = Cases::load();
    let lites = Lites::load();
    let mut runs = list(&cases.record["runs"]).iter();
    let run = runs.find(|r| r["name"] == "edges").unwrap();
    let dir = Dir::new();
    write_base(&cases.part("edges").base(), &dir, run);
    for part in ["edges", "sketch", "color"] {
        cases.part(part).write(&dir, Form::Folder);
    }
    lites.write("lite", &dir);
    super::images::write(&dir, "plus");
    for (name, size) in [("hint.png", (64, 96)), ("seen.png", (28, 28))] {
        let made = picture("picture/a", size);
        let (h, w) = (size.0 as u32, size.1 as u32);
        let image = image::RgbImage::from_raw(w, h, made.rgb().to_vec()).unwrap();
        image.save(dir.path(name)).unwrap();
    }
    let control = |model| ["--controlnet", model, "--control-image", "hint.png"];
    let image = "--ip-adapter plus.safetensors --ip-image seen.png --image-encoder image_encoder";
    let image: Vec<&str> = image.split(' ').collect();
    let lite = control("lite.safetensors");
    let all = [
        control("edges").as_slice(),
        &control("sketch"),
        &lite,
        &image,
    ]
    .concat();
    let mode = [control("edges").as_slice(), &["--control-mode", "guess"]].concat();
    let plain = latents_of(&dir, &[], ("f32", false));
    for (name, flags) in [
        ("ControlNet", control("edges").to_vec()),
        ("guess mode", mode),
        ("T2I-Adapter", control("sketch").to_vec()),
        ("light T2I-Adapter", control("color").to_vec()),
        ("LLLite", lite.to_vec()),
        ("IP-Adapter", image),
        ("all", all),
    ] {
        let want = latents_of(&dir, &flags, ("f32", false));
        let says = relative(&want, &plain);
        let eager = relative(&latents_of(&dir, &flags, ("f32", true)), &want);
        let half = relative(&latents_of(&dir, &flags, ("bf16", false)), &want);
        assert!(
            says > 3.0 * half,
            "{name}: it changes {says:.3} only, bf16 {half:.3}"
        );
        assert!(eager <= EAGER, "{name}: eager is {eager:.1e} off");
        assert!(half <= HALF, "{name}: bf16 is {half:.3} off");
    }
}
