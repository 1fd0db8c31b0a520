//! IP-Adapters against diffusers, and pictures as CLIP reads them against transformers.

use sd_rs::control::clip_pixels;
use sd_rs::pipeline::ImageRequest;
use sd_rs::spec::IMAGE_ENCODER;

use super::*;

struct Images {
    record: Value,
    expected: HashMap<String, Values>,
}

fn load() -> Images {
    let record = std::fs::read(fixtures().join("images.json")).unwrap();
    Images {
        record: serde_json::from_slice(&record).unwrap(),
        expected: floats(&fixtures().join("images.safetensors")),
    }
}

fn adapter<'a>(images: &'a Images, name: &str) -> Part<'a> {
    Part {
        name: name.to_owned(),
        record: &images.record["adapters"][name],
    }
}

/// CLIP's picture tower as a folder, or as a file.
fn write_encoder(images: &Images, dir: &Dir, folder: bool) -> PathBuf {
    let encoder = Part {
        name: "image_encoder".to_owned(),
        record: &images.record["encoder"],
    };
    if folder {
        let place = dir.path("image_encoder");
        std::fs::create_dir_all(&place).unwrap();
        let config = serde_json::to_string(encoder.config()).unwrap();
        std::fs::write(place.join("config.json"), config).unwrap();
        save(encoder.weights().iter(), &place.join("model.safetensors"));
        return place;
    }
    let file = dir.path("image_encoder.safetensors");
    save(encoder.weights().iter(), &file);
    file
}

/// An adapter as a file, with a folder of the tower that it reads.
pub(super) fn write(dir: &Dir, name: &str) {
    let images = load();
    adapter(&images, name).write(dir, Form::Single);
    write_encoder(&images, dir, true);
}

fn open_encoder(path: &Path) -> Checkpoint {
    Checkpoint::open_part(path, IMAGE_ENCODER, &ReadOptions::default()).unwrap()
}

#[test]
fn runs_with_pictures_beside_the_prompt() {
    let images = load();
    for run in list(&images.record["runs"]) {
        let dir = Dir::new();
        let names: Vec<&str> = list(&run["adapters"]).iter().map(text).collect();
        let base = write_base(&adapter(&images, names[0]).base(), &dir, run);
        let encoder = write_encoder(&images, &dir, true);
        let files = names.iter().map(|name| {
            let file = adapter(&images, name).write(&dir, Form::Single);
            [Checkpoint::open(file).unwrap(), open_encoder(&encoder)]
        });
        let files: Vec<[Checkpoint; 2]> = files.collect();
        let engine =
            Engine::load(&Checkpoint::open(&base).unwrap(), &Device::Cpu, DType::F32).unwrap();
        let engine = engine.with_image_prompts(&files).unwrap();
        let wanted = names
            .iter()
            .zip(list(&run["scales"]))
            .map(|(name, scale)| ImageRequest {
                picture: picture(&format!("picture/{name}"), (28, 28)),
                scale: scale.as_f64().unwrap(),
            });
        let request = Request {
            prompt: "a fox in the snow, watercolour".to_owned(),
            negative_prompt: Some("blurry, low quality".to_owned()),
            prompt_syntax: Syntax::Plain,
            width: Some(96),
            height: Some(64),
            steps: Some(number(&run["steps"])),
            cfg_scale: run["cfg_scale"].as_f64(),
            seed: Some(7),
            images: wanted.collect(),
            ..Request::default()
        };
        let key = text(&run["expected"]);
        close(key, &latents(&engine, &request), &images.expected[key], RUN);
    }
}

#[test]
fn pixels_equal_transformers() {
    let images = load();
    for row in list(&images.record["pixels"]) {
        let (name, size) = (text(&row[0]), (number(&row[1][0]), number(&row[1][1])));
        let got = clip_pixels(&picture(name, size), 28).unwrap();
        let got = Tensor::from_vec(got, (3, 28, 28), &Device::Cpu).unwrap();
        close(name, &got, &images.expected[name], 1e-6);
    }
}

#[test]
fn adapters_and_towers_that_do_not_fit_are_refused() {
    let images = load();
    let dir = Dir::new();
    let base = dir.path("base");
    Case::load("single-sd1").write_folder(&base, &FolderForm::default());
    let encoder = write_encoder(&images, &dir, false);
    let refusal = |file: &Path| {
        let engine =
            Engine::load(&Checkpoint::open(&base).unwrap(), &Device::Cpu, DType::F32).unwrap();
        let files = [Checkpoint::open(file).unwrap(), open_encoder(&encoder)];
        match engine.with_image_prompts([&files]) {
            Ok(_) => panic!("{} was taken", file.display()),
            Err(error) => error.to_string(),
        }
    };
    let xl = adapter(&images, "plain-xl").write(&dir, Form::Single);
    assert!(refusal(&xl).contains("made for this family"));
    assert!(refusal(&encoder).contains("expected an IP-Adapter"));
    let mut tensors = adapter(&images, "plain").weights();
    for tensor in &mut tensors {
        tensor.name = tensor
            .name
            .replace("image_proj.proj.", "image_proj.proj.0.");
    }
    let face = dir.path("face.safetensors");
    save(tensors.iter(), &face);
    assert!(refusal(&face).contains("FaceID"));
    // a file of a tower alone is read without a config
    let plus = adapter(&images, "plus").write(&dir, Form::Single);
    let engine = Engine::load(&Checkpoint::open(&base).unwrap(), &Device::Cpu, DType::F32).unwrap();
    let files = [Checkpoint::open(plus).unwrap(), open_encoder(&encoder)];
    engine.with_image_prompts([&files]).map(|_| ()).unwrap();
}
