//! ControlNets in runs that begin at a picture, with masks or without, on UNets of four channels and of nine (`fixtures/control/make_from.py`).

use super::*;
use crate::from_picture;

#[test]
fn runs_that_begin_at_a_picture() {
    let cases = Cases::load();
    let record = std::fs::read(fixtures().join("from.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    let expected = floats(&fixtures().join("from.safetensors"));
    for run in list(&record["runs"]) {
        let dir = Dir::new();
        let base = dir.path("base");
        from_picture::model(run).write_folder(&base, &FolderForm::default());
        let part = text(&run["part"]);
        let control = open(&cases.part(part).write(&dir, Form::Folder));
        let engine = Engine::load(&Checkpoint::open(&base).unwrap(), &Device::Cpu, DType::F32);
        let engine = engine.unwrap().with_controls([&control]).unwrap();
        let mut request = from_picture::request(&record, run);
        request.controls = vec![ControlRequest {
            scale: run["scale"].as_f64().unwrap(),
            span: (run["start"].as_f64().unwrap(), run["end"].as_f64().unwrap()),
            mode: match run["mode"].as_str() {
                Some("guess") => ControlMode::Guess,
                _ => ControlMode::Balanced,
            },
            kind: run["kind"].as_u64().map(|kind| kind as usize),
            ..ControlRequest::new(picture(&format!("picture/{part}"), (64, 96)))
        }];
        let name = text(&run["name"]);
        close(name, &latents(&engine, &request), &expected[name], RUN);
    }
}
