//! Files and requests that cannot be used, each in one sentence.

use super::*;

pub(super) fn refused(base: &str, path: &Path) -> String {
    let dir = Dir::new();
    let case = Case::load(base);
    case.write_folder(dir.root(), &FolderForm::default());
    let engine = Engine::load(
        &Checkpoint::open(dir.root()).unwrap(),
        &Device::Cpu,
        DType::F32,
    )
    .unwrap();
    match engine.with_controls([&open(path)]) {
        Ok(_) => panic!("{} was taken", path.display()),
        Err(error) => error.to_string(),
    }
}

pub(super) fn zeros(name: &str, shape: &[usize]) -> Stored {
    let count: usize = shape.iter().product();
    Stored {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: Dtype::F32,
        bytes: vec![0; 4 * count],
    }
}

#[test]
fn relatives_are_refused_by_name() {
    let cases = Cases::load();
    let dir = Dir::new();
    let edges = cases.part("edges");
    let mut difference = edges.original("control_model.");
    difference.push(zeros("difference", &[0]));
    let flux = vec![
        zeros("controlnet_x_embedder.weight", &[64, 64]),
        zeros("controlnet_blocks.0.weight", &[64, 64]),
    ];
    let style = vec![
        zeros("style_embedding", &[1, 8, 64]),
        zeros("ln_post.weight", &[64]),
        zeros("transformer_layes.0.ln_1.weight", &[64]),
    ];
    for (name, tensors, words) in [
        ("difference", difference, "difference from its base model"),
        ("flux", flux, "Stable Diffusion 3 or FLUX"),
        ("style", style, "style adapter"),
    ] {
        let file = dir.path(&format!("{name}.safetensors"));
        save(tensors.iter(), &file);
        let reason = refused("single-sd1", &file);
        assert!(reason.contains(words), "{name}: {reason}");
        assert!(!reason.contains('\n'), "{reason}");
    }
}

#[test]
fn networks_of_other_families_are_refused() {
    let cases = Cases::load();
    let dir = Dir::new();
    let xl = cases.part("depth-xl").write(&dir, Form::Folder);
    let reason = refused("single-sd1", &xl);
    assert!(reason.contains("made for this family"), "{reason}");
    let sketch = cases.part("sketch").write(&dir, Form::Folder);
    let reason = refused("single-sdxl", &sketch);
    assert!(reason.contains("made for this family"), "{reason}");
    let edges = cases.part("edges");
    let mut tensors = edges.weights();
    tensors.retain(|tensor| tensor.name != "controlnet_mid_block.bias");
    let file = dir.path("lacking.safetensors");
    save(tensors.iter(), &file);
    let reason = refused("single-sd1", &file);
    assert!(reason.contains("controlnet_mid_block.bias"), "{reason}");
    let base = dir.path("base");
    Case::load("single-sd1")
        .write_single_file(&base, &crate::support::weights::SingleForm::default());
    let reason = refused("single-sd1", &base);
    assert!(reason.contains("expected a ControlNet"), "{reason}");
}

#[test]
fn requests_out_of_range_are_refused() {
    let cases = Cases::load();
    let dir = Dir::new();
    let base = dir.path("base");
    Case::load("single-sd1").write_folder(&base, &FolderForm::default());
    let edges = cases.part("edges").write(&dir, Form::Folder);
    let engine = Engine::load(&Checkpoint::open(&base).unwrap(), &Device::Cpu, DType::F32).unwrap();
    let engine = engine.with_controls([&open(&edges)]).unwrap();
    let usual = ControlRequest::new(picture("picture/a", (64, 96)));
    let refusal = |control: ControlRequest| {
        let request = Request {
            width: Some(96),
            height: Some(64),
            controls: vec![control],
            ..Request::default()
        };
        Plan::new(&engine, &request).unwrap_err().to_string()
    };
    let with = |change: &dyn Fn(&mut ControlRequest)| {
        let mut control = usual.clone();
        change(&mut control);
        control
    };
    assert!(refusal(with(&|c| c.scale = f64::NAN)).contains("--control-scale"));
    assert!(refusal(with(&|c| c.span.1 = 1.5)).contains("--control-end"));
    assert!(refusal(with(&|c| c.kind = Some(1))).contains("--control-type"));
    assert!(
        refusal(with(
            &|c| c.preprocessor = sd_rs::control::Preprocessor::Inpaint
        ))
        .contains("--control-mask")
    );
    let none = Request::default();
    let reason = Plan::new(&engine, &none).unwrap_err().to_string();
    assert!(reason.contains("--control-image"), "{reason}");
}
