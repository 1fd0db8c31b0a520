//! Autoencoders of other files (`--vae`): in every spelling the same pictures as the checkpoint's own, and tiny ones against diffusers.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use sd_rs::checkpoint::{Checkpoint, ReadOptions};
use sd_rs::pipeline::Engine;
use sd_rs::spec::Others;

use crate::models::{CALL, close, flat};
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm, SingleForm, Values};

fn base(dir: &Dir) -> Checkpoint {
    Case::load("single-sd1").write_folder(dir.root(), &FolderForm::default());
    Checkpoint::open(dir.root()).unwrap()
}

fn with(base: &Checkpoint, vae: &Path) -> sd_rs::Result<Engine> {
    let vae = Checkpoint::open_part(vae, "vae", &ReadOptions::default())?;
    let others = Others {
        vae: Some(&vae),
        ..Others::default()
    };
    Engine::load_with(base, others, &Device::Cpu, DType::F32)
}

fn decoded(engine: &Engine, latents: &Tensor) -> Tensor {
    engine.networks().decode(latents, DType::F32).unwrap()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/taesd")
        .join(name)
}

fn expected(name: &str) -> Tensor {
    let path = fixture("expected.safetensors");
    let mut all = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    all.remove(name).unwrap()
}

#[test]
fn another_autoencoder_in_every_spelling() {
    let dir = Dir::new();
    let base = base(&dir);
    // another model's autoencoder, of the same latents
    let other = Case::load("single-sd2");
    let folder = Dir::new();
    other.write_folder(folder.root(), &FolderForm::default());
    let whole = folder.path("whole.safetensors");
    other.write_single_file(&whole, &SingleForm::default());
    let latents = Tensor::randn(0f32, 1.0, (1, 4, 3, 5), &Device::Cpu).unwrap();
    let own = Engine::load(&base, &Device::Cpu, DType::F32).unwrap();
    let want = Engine::load(
        &Checkpoint::open(folder.root()).unwrap(),
        &Device::Cpu,
        DType::F32,
    );
    let want = flat(&decoded(&want.unwrap(), &latents));
    assert_ne!(flat(&decoded(&own, &latents)), want);
    let lone = folder.path("vae/diffusion_pytorch_model.safetensors");
    for path in [folder.root(), &folder.path("vae"), &whole, &lone] {
        let engine = with(&base, path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(engine.warnings(), &[] as &[String]);
        assert_eq!(
            flat(&decoded(&engine, &latents)),
            want,
            "{}",
            path.display()
        );
    }
}

#[test]
fn a_file_without_autoencoder_is_refused() {
    let dir = Dir::new();
    let base = base(&dir);
    let unet = dir.path("unet/diffusion_pytorch_model.safetensors");
    let error = with(&base, &unet).err().unwrap().to_string();
    assert!(error.contains("no autoencoder"), "{error}");
    let error = with(&base, &fixture("sixteen.safetensors"))
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("latents of 4 channels, and --vae decodes 16"),
        "{error}"
    );
}

#[test]
fn tiny_autoencoders() {
    let dir = Dir::new();
    let base = base(&dir);
    let want = expected("picture_4");
    let want = Values {
        shape: want.dims().to_vec(),
        data: flat(&want),
    };
    for name in ["diffusers.safetensors", "original.safetensors"] {
        let engine = with(&base, &fixture(name)).unwrap();
        let picture = decoded(&engine, &expected("latents_4"));
        close(name, &picture, &want, CALL);
    }
}
