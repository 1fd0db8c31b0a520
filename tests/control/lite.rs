//! ControlNet-LLLites: modules before projections, as kohya's code has them (`fixtures/control/make_lite.py`).

use std::collections::BTreeMap;

use sd_models::lllite::{Config, Lllite, Module};
use sd_rs::adapters::{Adapter, Adapters};
use sd_rs::spec::Others;

use super::refusals::zeros;
use super::*;

/// The record of `lite.json`.
pub(super) struct Lites {
    record: Value,
    expected: HashMap<String, Values>,
}

impl Lites {
    pub(super) fn load() -> Self {
        let record = std::fs::read(fixtures().join("lite.json")).unwrap();
        Self {
            record: serde_json::from_slice(&record).unwrap(),
            expected: floats(&fixtures().join("lite.safetensors")),
        }
    }

    fn modules(&self, part: &str) -> &[Value] {
        list(&self.record["parts"][part]["modules"])
    }

    /// A file's tensors.
    fn tensors(&self, part: &str) -> Vec<Stored> {
        let modules = self.modules(part).iter();
        let all = modules.flat_map(|row| {
            let name = text(&row["name"]);
            let shapes = shapes(row).into_iter();
            shapes.map(move |(key, shape)| (format!("{name}.{key}"), shape))
        });
        let make = |(name, shape): (String, Vec<usize>)| {
            let fan: usize = shape[1..].iter().product();
            let scale = match shape.len() {
                1 => 0.125,
                _ => (((3.0 / fan as f64).sqrt() * 1024.0).round_ties_even() / 1024.0) as f32,
            };
            let law = Law { scale, offset: 0.0 };
            let values = uniform(&format!("{part}/{name}"), &shape, law);
            Stored {
                bytes: encode(&values, Dtype::F16, Dtype::F16),
                dtype: Dtype::F16,
                name,
                shape,
            }
        };
        all.map(make).collect()
    }

    pub(super) fn write(&self, part: &str, dir: &Dir) -> PathBuf {
        let file = dir.path(&format!("{part}.safetensors"));
        save(self.tensors(part).iter(), &file);
        file
    }

    fn run(&self, name: &str) -> &Value {
        let mut runs = list(&self.record["runs"]).iter();
        runs.find(|run| run["name"] == name).unwrap()
    }

    /// The LoRA of a run.
    fn lora(&self, dir: &Dir) -> PathBuf {
        let lora = &self.record["lora"];
        let rank = number(&lora["rank"]);
        let alpha = lora["alpha"].as_f64().unwrap() as f32;
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: Vec<usize>, values: &[f32]| {
            tensors.push(Stored {
                bytes: encode(values, Dtype::F32, Dtype::F32),
                dtype: Dtype::F32,
                name,
                shape,
            });
        };
        for row in list(&lora["modules"]) {
            let (name, out, width) = (text(&row[0]), number(&row[1]), number(&row[2]));
            for (part, shape, scale) in [
                ("lora_up", vec![out, rank], 0.5),
                ("lora_down", vec![rank, width], 0.25),
            ] {
                let tensor = format!("{name}.{part}.weight");
                let law = Law { scale, offset: 0.0 };
                let values = uniform(&format!("lite-lora/{tensor}"), &shape, law);
                add(tensor, shape, &values);
            }
            add(format!("{name}.alpha"), vec![], &[alpha]);
        }
        let file = dir.path("lora.safetensors");
        save(tensors.iter(), &file);
        file
    }
}

fn convolutions(row: &Value) -> Vec<(usize, usize)> {
    let pairs = list(&row["convolutions"]).iter();
    pairs
        .map(|pair| (number(&pair[0]), number(&pair[1])))
        .collect()
}

/// Tensors of a module.
fn shapes(row: &Value) -> Vec<(String, Vec<usize>)> {
    let (inner, width) = (number(&row["inner"]), number(&row["width"]));
    let mut before = 3;
    let mut all = Vec::new();
    let mut add = |key: String, shape: Vec<usize>| {
        all.push((format!("{key}.bias"), vec![shape[0]]));
        all.push((format!("{key}.weight"), shape));
    };
    for (i, (out, side)) in convolutions(row).into_iter().enumerate() {
        let shape = vec![out, before, side, side];
        add(format!("conditioning1.{}", 2 * i), shape);
        before = out;
    }
    add("down.0".to_owned(), vec![inner, width]);
    add("mid.0".to_owned(), vec![inner, inner + before]);
    add("up.0".to_owned(), vec![width, inner]);
    all
}

/// The name that diffusers has for the projection, in Stable Diffusion XL's structure of `single-sdxl`.
fn canonical(stored: &str) -> String {
    let flat = stored.strip_prefix("lllite_unet_").unwrap();
    let (block, tail) = flat.split_once("_transformer_blocks_").unwrap();
    let block = match block {
        "input_blocks_4_1" => "down_blocks.1.attentions.0",
        "input_blocks_5_1" => "down_blocks.1.attentions.1",
        "input_blocks_7_1" => "down_blocks.2.attentions.0",
        "input_blocks_8_1" => "down_blocks.2.attentions.1",
        "middle_block_1" | "mid_block_attentions_0" => "mid_block.attentions.0",
        // this file has diffusers' names
        other => {
            let parts: Vec<&str> = other.split('_').collect();
            let [way, _, i, _, j] = parts[..] else {
                panic!("{other}")
            };
            return format!("{way}_blocks.{i}.attentions.{j}.{}", dotted(tail));
        }
    };
    format!("{block}.{}", dotted(tail))
}

fn dotted(tail: &str) -> String {
    let (number, tail) = tail.split_once('_').unwrap();
    let (attention, part) = tail.split_once('_').unwrap();
    format!("transformer_blocks.{number}.{attention}.{part}")
}

#[test]
fn one_call_of_modules() {
    let lites = Lites::load();
    for call in list(&lites.record["calls"]) {
        let part = text(&call["part"]);
        let base = Case::load(text(&lites.record["parts"][part]["base"]));
        let unet_config = unet::Config::from_json(base.config("unet")).unwrap();
        let weights = Memory::weights(&base, "unet");
        let network = unet::UNet::load(&weights, &unet_config);
        weights.finish().unwrap();
        let mut config = Config::default();
        let mut tensors = Vec::new();
        for row in lites.modules(part) {
            let convolutions = convolutions(row);
            let stride: usize = convolutions.iter().map(|(_, side)| side).product();
            let module = Module {
                width: number(&row["width"]),
                inner: number(&row["inner"]),
                picture: 3,
                convolutions,
                level: (stride / 8).ilog2() as usize,
            };
            config.modules.insert(canonical(text(&row["name"])), module);
        }
        for stored in lites.tensors(part) {
            let (module, key) = stored.name.split_once('.').unwrap();
            let name = format!("{}.{key}", canonical(module));
            tensors.push((name, stored.shape.clone(), sd_rs_values(&stored)));
        }
        let source = Arc::new(Memory::of(tensors));
        let weights = Weights::new(source, DType::F32, &Device::Cpu);
        let lite = Lllite::load(&weights, &config);
        weights.finish().unwrap();
        let hint = given(&format!("{part}/hint"), &[2, 3, 64, 96], 0.5, 0.5);
        let hint = hint.affine(2.0, -1.0).unwrap();
        let views = config.views().into_iter();
        let pictures: BTreeMap<_, sd_kernels::Tensor> =
            views.map(|view| (view, hint.clone().into())).collect();
        let scale = call["scale"].as_f64().unwrap();
        let looking = [lite.look(scale, &pictures).unwrap()];
        let root = 3_f32.sqrt();
        let sample = given("input/latents", &[2, 4, 8, 12], root, 0.0).into();
        let width = unet_config.context_width();
        let context = given("input/context", &[2, 77, width], root, 0.0).into();
        let width = number(&base.config("text_encoder_2")["projection_dim"]);
        let pooled = given("input/text_embeds", &[2, width], root, 0.0);
        let added = added(&unet_config, &pooled, &call["time_ids"]).into();
        let timestep = call["timestep"].as_f64().unwrap() as f32;
        let timestep = Tensor::full(timestep, 2, &Device::Cpu).unwrap().into();
        let inputs = unet::Inputs {
            sample: &sample,
            timestep: &timestep,
            context: &context,
            added: Some(&added),
            guidance: None,
            label: None,
            reference: None,
            steering: unet::Steering {
                lites: &looking,
                ..unet::Steering::default()
            },
        };
        let got = network.forward(&inputs).unwrap().into_data().unwrap();
        let key = text(&call["expected"]);
        close(key, &got, &lites.expected[key], CALL);
    }
}

#[test]
fn runs_with_modules() {
    let cases = Cases::load();
    let lites = Lites::load();
    for run in list(&lites.record["runs"]) {
        let dir = Dir::new();
        let base = write_base(&Case::load(text(&run["base"])), &dir, run);
        let parts = list(&run["parts"]).iter().map(text);
        let paths: Vec<PathBuf> = parts
            .map(|part| match part.starts_with("lite") {
                true => lites.write(part, &dir),
                false => cases.part(part).write(&dir, Form::Folder),
            })
            .collect();
        let mut adapters = Adapters::default();
        if run["lora"] == true {
            let weight = lites.record["lora"]["weight"].as_f64().unwrap();
            let lora = Adapter::open(&lites.lora(&dir), &ReadOptions::default()).unwrap();
            adapters.add(&Arc::new(lora), weight, weight).unwrap();
        }
        let engine = Engine::load_adapted(
            &Checkpoint::open(&base).unwrap(),
            Others::default(),
            &adapters,
            &Device::Cpu,
            DType::F32,
        );
        let got = steered_latents(engine.unwrap(), &paths, run);
        let key = text(&run["expected"]);
        close(key, &got, &lites.expected[key], RUN);
    }
}

/// A file of these tensors on a model, refused.
fn reason(tensors: &[Stored], base: &str) -> String {
    let dir = Dir::new();
    let file = dir.path("lite.safetensors");
    save(tensors.iter(), &file);
    let reason = super::refusals::refused(base, &file);
    assert!(!reason.contains('\n'), "{reason}");
    reason
}

/// What is told of a file of these tensors on a model.
fn warnings(tensors: &[Stored], base: &str) -> Vec<String> {
    let dir = Dir::new();
    let (file, folder) = (dir.path("lite.safetensors"), dir.path("base"));
    save(tensors.iter(), &file);
    Case::load(base).write_folder(&folder, &FolderForm::default());
    let model = Checkpoint::open(&folder).unwrap();
    let engine = Engine::load(&model, &Device::Cpu, DType::F32).unwrap();
    let engine = engine.with_controls([&open(&file)]).unwrap();
    engine.warnings().to_vec()
}

#[test]
fn modules_that_do_not_fit_are_refused() {
    let lites = Lites::load();
    let xl = lites.tensors("lite-xl");
    let other = reason(&xl, "single-sd1");
    assert!(other.contains("made for this family"), "{other}");
    for end in [
        "conditioning1.0.weight",
        "conditioning1.2.weight",
        "conditioning1.2.bias",
        "down.0.weight",
        "mid.0.weight",
        "up.0.bias",
    ] {
        let mut tensors = lites.tensors("lite-xl");
        let place = tensors.iter().position(|tensor| tensor.name.ends_with(end));
        tensors.remove(place.unwrap());
        let reason = reason(&tensors, "single-sdxl");
        // without its last convolution, what follows is of another width
        let named = reason.contains(end)
            || end == "conditioning1.2.weight" && reason.contains("mid.0.weight");
        assert!(named, "{end}: {reason}");
    }
    let mut more = lites.tensors("lite-xl");
    let last = more.last().unwrap().name.clone();
    let (module, _) = last.split_once('.').unwrap();
    more.push(zeros(&format!("{module}.depth"), &[1]));
    let told = warnings(&more, "single-sdxl");
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0].ends_with(&format!("1 tensor is not used: `{module}.depth`")),
        "{told:?}"
    );
    let mut none = lites.tensors("lite-xl");
    let down = none.iter_mut().find(|t| t.name.ends_with("down.0.weight"));
    let down = down.unwrap();
    *down = zeros(&down.name, &[0, down.shape[1]]);
    let empty = reason(&none, "single-sdxl");
    assert!(
        empty.contains("down.0.weight") && empty.contains("no numbers"),
        "{empty}"
    );
    let mut more = lites.tensors("lite-xl");
    let name = "lllite_unet_input_blocks_4_1_transformer_blocks_0_ff_net_2";
    more.push(zeros(&format!("{name}.down.0.weight"), &[64, 512]));
    let steers = reason(&more, "single-sdxl");
    assert!(steers.contains(name), "{steers}");
}

#[test]
fn what_modules_cannot_do_is_refused() {
    let lites = Lites::load();
    let dir = Dir::new();
    let base = write_base(&Case::load("single-sd1"), &dir, lites.run("plain"));
    let lite = open(&lites.write("lite", &dir));
    let engine = Engine::load(&Checkpoint::open(&base).unwrap(), &Device::Cpu, DType::F32).unwrap();
    let engine = engine.with_controls([&lite]).unwrap();
    let usual = ControlRequest::new(picture("picture/a", (64, 96)));
    let refusal = |control: ControlRequest, (width, height)| {
        let request = Request {
            width: Some(width),
            height: Some(height),
            controls: vec![control],
            ..Request::default()
        };
        Plan::new(&engine, &request).map_err(|e| e.to_string())
    };
    assert!(refusal(usual.clone(), (96, 64)).is_ok());
    let mode = ControlRequest {
        mode: ControlMode::Prompt,
        ..usual.clone()
    };
    let reason = refusal(mode, (96, 64)).unwrap_err();
    assert!(reason.contains("--control-mode"), "{reason}");
    // smaller than the third level's squares
    let reason = refusal(usual, (24, 64)).unwrap_err();
    assert!(reason.contains("larger picture"), "{reason}");
}
