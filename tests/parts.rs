//! UNets in files of their own, with text encoders and autoencoder beside them: the same latents as from the whole file.

use std::path::Path;

use candle_core::{DType, Device};
use sd_rs::checkpoint::{Checkpoint, detect};
use sd_rs::pipeline::{Control, Engine, Plan, Request};
use sd_rs::spec::Others;

use crate::models::flat;
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm, SingleForm, save};

fn latents(path: &Path, others: Others<'_>) -> Vec<f32> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let engine = Engine::load_with(&checkpoint, others, &Device::Cpu, DType::F32)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(engine.warnings(), &[] as &[String]);
    let request = Request {
        prompt: "a fox in the snow".to_owned(),
        width: Some(64),
        height: Some(64),
        steps: Some(2),
        seed: Some(5),
        ..Request::default()
    };
    let plan = Plan::new(&engine, &request).unwrap();
    let mut latents = Vec::new();
    let mut finish = |batch: sd_rs::pipeline::Batch| {
        latents = flat(&batch.latents);
        Ok(())
    };
    engine
        .generate(&request, &plan, &mut |_| Control::Continue, &mut finish)
        .unwrap();
    latents
}

#[test]
fn a_unet_alone_with_the_rest_beside_it() {
    for name in ["single-sd1", "single-sd2", "single-sdxl"] {
        let (case, dir) = (Case::load(name), Dir::new());
        let form = SingleForm {
            ema: false,
            ..SingleForm::default()
        };
        case.write_single_file(&dir.path("whole.safetensors"), &form);
        let whole = latents(&dir.path("whole.safetensors"), Others::default());
        let part = |component: &str, prefix: &str| {
            let path = dir.path(&format!("{component}.safetensors"));
            save(case.part(component, prefix, None).iter(), &path);
            Checkpoint::open(&path).unwrap()
        };
        // as a folder has them: of Stable Diffusion 2 without the layer that nothing computes
        case.write_folder(&dir.path("folder"), &FolderForm::default());
        let towers = case.components().into_iter();
        let text: Vec<Checkpoint> = towers
            .filter(|component| component.starts_with("text_encoder"))
            .map(|component| {
                let path = dir.path(&format!("folder/{component}/model.safetensors"));
                Checkpoint::open(path).unwrap()
            })
            .collect();
        let vae = part("vae", "");
        let others = Others {
            vae: Some(&vae),
            text: &text,
            t5_length: None,
        };
        for prefix in ["", "model.diffusion_model."] {
            let unet = part("unet", prefix);
            let refusal = detect(&unet).refusal().unwrap();
            assert!(
                refusal.contains("the UNet alone") && refusal.contains("--text-encoder and --vae"),
                "{refusal}"
            );
            let got = latents(&dir.path("unet.safetensors"), others);
            assert!(
                got == whole,
                "{name} {prefix:?}: {:?}",
                detect(&unet).evidence
            );
        }
    }
}
