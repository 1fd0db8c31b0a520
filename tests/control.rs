//! Networks that steer by a picture against diffusers, from every form of file. The cases are described in `fixtures/control/README.md`.

mod begun;
mod executors;
mod hints;
mod images;
mod lite;
mod lora;
mod refusals;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use sd_kernels::Weights;
use sd_models::controlnet::{self, ControlNet, Hint, Ramp, Strength};
use sd_models::{t2i_adapter, unet};
use sd_rs::checkpoint::{Checkpoint, ReadOptions};
use sd_rs::picture::Picture;
use sd_rs::pipeline::{Control, ControlMode, ControlRequest, Engine, Plan, Request};
use sd_rs::spec::CONTROL;
use sd_rs::text::Syntax;
use serde_json::Value;

use crate::models::{CALL, Memory, RUN, close, list, tensor, text};
use crate::support::Dir;
use crate::support::weights::{
    Case, FolderForm, Law, Stored, Values, encode, floats, save, uniform,
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/control")
}

/// The networks, calls and runs.
struct Cases {
    record: Value,
    expected: HashMap<String, Values>,
}

impl Cases {
    fn load() -> Self {
        let record = std::fs::read(fixtures().join("cases.json")).unwrap();
        Self {
            record: serde_json::from_slice(&record).unwrap(),
            expected: floats(&fixtures().join("expected.safetensors")),
        }
    }

    fn part(&self, name: &str) -> Part<'_> {
        Part {
            name: name.to_owned(),
            record: &self.record["parts"][name],
        }
    }
}

/// One network.
struct Part<'a> {
    name: String,
    record: &'a Value,
}

/// How it is written.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    Folder,
    /// diffusers' names without a config.
    Single,
    /// The original names, below this prefix.
    Original(&'static str),
}

impl Part<'_> {
    fn config(&self) -> &Value {
        &self.record["config"]
    }

    fn base(&self) -> Case {
        Case::load(text(&self.record["base"]))
    }

    /// Its tensors under diffusers' names.
    fn weights(&self) -> Vec<Stored> {
        let kept: Dtype = serde_json::from_value(self.record["dtype"].clone()).unwrap();
        let rows = list(&self.record["tensors"]).iter();
        rows.map(|row| {
            let shape: Vec<usize> = list(&row[1]).iter().map(number).collect();
            let law = Law {
                scale: row[2].as_f64().unwrap() as f32,
                offset: row[3].as_f64().unwrap_or(0.0) as f32,
            };
            let name = text(&row[0]).to_owned();
            let values = uniform(&format!("{}/{name}", self.name), &shape, law);
            Stored {
                bytes: encode(&values, kept, kept),
                dtype: kept,
                name,
                shape,
            }
        })
        .collect()
    }

    /// The same under the original names.
    fn original(&self, prefix: &str) -> Vec<Stored> {
        let mut by_name: HashMap<String, Stored> = self
            .weights()
            .into_iter()
            .map(|tensor| (tensor.name.clone(), tensor))
            .collect();
        let pairs = list(&self.record["original"]).iter();
        pairs
            .map(|pair| Stored {
                name: format!("{prefix}{}", text(&pair[0])),
                ..by_name.remove(text(&pair[1])).unwrap()
            })
            .collect()
    }

    fn write(&self, dir: &Dir, form: Form) -> PathBuf {
        match form {
            Form::Folder => {
                let folder = dir.path(&self.name);
                std::fs::create_dir_all(&folder).unwrap();
                let config = serde_json::to_string(self.config()).unwrap();
                std::fs::write(folder.join("config.json"), config).unwrap();
                let file = folder.join("diffusion_pytorch_model.safetensors");
                save(self.weights().iter(), &file);
                folder
            }
            Form::Single | Form::Original(_) => {
                let file = dir.path(&format!("{}.safetensors", self.name));
                let tensors = match form {
                    Form::Original(prefix) => self.original(prefix),
                    _ => self.weights(),
                };
                save(tensors.iter(), &file);
                file
            }
        }
    }
}

fn number(value: &Value) -> usize {
    usize::try_from(value.as_u64().unwrap()).unwrap()
}

/// A tensor given to a network: numbers by name.
fn given(name: &str, shape: &[usize], scale: f32, offset: f32) -> Tensor {
    let data = uniform(name, shape, Law { scale, offset });
    tensor(Values {
        shape: shape.to_vec(),
        data,
    })
}

/// A picture of squares 16 pixels wide with random colours.
fn picture(name: &str, (height, width): (usize, usize)) -> Picture {
    let (rows, columns) = (height.div_ceil(16), width.div_ceil(16));
    let law = Law {
        scale: 128.0,
        offset: 128.0,
    };
    let squares = uniform(name, &[rows, columns, 3], law);
    let byte = |v: f32| v.clamp(0.0, 255.0).floor() as u8;
    let pixels = (0..height).flat_map(|y| (0..width).map(move |x| (y / 16, x / 16)));
    let rgb = pixels.flat_map(|(y, x)| squares[(y * columns + x) * 3..][..3].iter().copied());
    let rgb = rgb.map(byte).collect();
    Picture::from_rgb(width as u32, height as u32, rgb).unwrap()
}

/// The part's weights under diffusers' names, with the fused ones in three.
fn memory(part: &Part<'_>) -> Weights {
    let mut tensors = Vec::new();
    for stored in part.weights() {
        let numbers = sd_rs_values(&stored);
        let fused = stored
            .name
            .split_once("in_proj_")
            .map(|(a, b)| (a.to_owned(), b.to_owned()));
        let Some((stem, kind)) = fused else {
            tensors.push((stored.name, stored.shape, numbers));
            continue;
        };
        let third = numbers.len() / 3;
        let mut shape = stored.shape.clone();
        shape[0] /= 3;
        for (i, name) in ["to_q", "to_k", "to_v"].iter().enumerate() {
            let values = numbers[i * third..][..third].to_vec();
            tensors.push((format!("{stem}{name}.{kind}"), shape.clone(), values));
        }
    }
    let source = Arc::new(Memory::of(tensors));
    Weights::new(source, DType::F32, &Device::Cpu)
}

fn sd_rs_values(stored: &Stored) -> Vec<f32> {
    match stored.dtype {
        Dtype::F16 => {
            let halves = stored.bytes.as_chunks().0.iter();
            halves
                .map(|b| half::f16::from_le_bytes(*b).to_f32())
                .collect()
        }
        _ => {
            let floats = stored.bytes.as_chunks().0.iter();
            floats.map(|b| f32::from_le_bytes(*b)).collect()
        }
    }
}

/// `[b, c, H, W]` → `[b, c · f · f, H/f, W/f]`.
fn unshuffled(x: &Tensor, f: usize) -> Tensor {
    let (b, c, h, w) = x.dims4().unwrap();
    let x = x.reshape(&[b, c, h / f, f, w / f, f][..]).unwrap();
    let x = x.permute([0, 1, 3, 5, 2, 4]).unwrap().contiguous().unwrap();
    x.reshape((b, c * f * f, h / f, w / f)).unwrap()
}

#[test]
fn one_call_of_each_network() {
    let cases = Cases::load();
    for call in list(&cases.record["calls"]) {
        let part = cases.part(text(&call["part"]));
        let base = part.base();
        let unet_config = unet::Config::from_json(base.config("unet")).unwrap();
        let weights = Memory::weights(&base, "unet");
        let network = unet::UNet::load(&weights, &unet_config);
        weights.finish().unwrap();
        let sides = |value: &Value| -> Vec<usize> { list(value).iter().map(number).collect() };
        let (latents, hint) = (sides(&call["latents"]), sides(&call["hint"]));
        let sample = given(
            "input/latents",
            &[2, 4, latents[0], latents[1]],
            1.732_050_8,
            0.0,
        );
        let width = unet_config.context_width();
        let context = given("input/context", &[2, 77, width], 1.732_050_8, 0.0);
        let shape = [2, number(&call["channels"]), hint[0], hint[1]];
        let hint = given(&format!("{}/hint", part.name), &shape, 0.5, 0.5);
        let (sample, hint) = match call["same"].as_bool() {
            Some(true) => (twice(&sample), twice(&hint)),
            _ => (sample, hint),
        };
        let timestep = call["timestep"].as_f64().unwrap() as f32;
        let timestep = Tensor::full(timestep, 2, &Device::Cpu).unwrap();
        let added = call.get("time_ids").map(|ids| {
            let width = base.config("text_encoder_2")["projection_dim"]
                .as_u64()
                .unwrap();
            let pooled = given("input/text_embeds", &[2, width as usize], 1.732_050_8, 0.0);
            added(&unet_config, &pooled, ids)
        });
        let scale = call["scale"].as_f64().unwrap();
        let (sample, timestep, context) = (sample.into(), timestep.into(), context.into());
        let added = added.map(sd_kernels::Tensor::from);
        let inputs = unet::Inputs {
            sample: &sample,
            timestep: &timestep,
            context: &context,
            added: added.as_ref(),
            guidance: None,
            label: None,
            reference: None,
            steering: unet::Steering::default(),
        };
        let weights = memory(&part);
        let (mut residuals, mut features) = (None, Vec::new());
        if part.config()["_class_name"] == "T2IAdapter" {
            let config = t2i_adapter::Config::from_json(part.config()).unwrap();
            let adapter = t2i_adapter::T2iAdapter::load(&weights, &config);
            weights.finish().unwrap();
            let hint = unshuffled(&hint, config.factor);
            features = adapter.forward(&hint.into(), scale).unwrap();
        } else {
            let config = controlnet::Config::from_json(part.config()).unwrap();
            let net = ControlNet::load(&weights, &config);
            weights.finish().unwrap();
            let kind = call["kind"].as_u64().map(|kind| kind as usize);
            let sinusoids = kind.map(|kind| {
                let one = net.embed_kind(kind).unwrap().unwrap().into_data().unwrap();
                sd_kernels::Tensor::from(Tensor::cat(&[&one, &one], 0).unwrap())
            });
            let hint = match config.bgr {
                true => {
                    let places = Tensor::new(&[2u32, 1, 0], &Device::Cpu).unwrap();
                    hint.index_select(&places, 1).unwrap()
                }
                false => hint,
            };
            let hint = Hint {
                picture: &hint.into(),
                kind: kind.zip(sinusoids.as_ref()),
            };
            let ramp = Ramp::Flat;
            residuals = Some(
                net.forward(&inputs, hint, Strength { scale, ramp })
                    .unwrap(),
            );
        }
        let inputs = unet::Inputs {
            steering: unet::Steering {
                residuals: residuals.as_ref(),
                features: &features,
                images: &[],
                lites: &[],
            },
            ..inputs
        };
        let got = network.forward(&inputs).unwrap().into_data().unwrap();
        let key = text(&call["expected"]);
        close(key, &got, &cases.expected[key], CALL);
    }
}

/// The first row in the place of both.
fn twice(x: &Tensor) -> Tensor {
    let row = x.narrow(0, 0, 1).unwrap();
    Tensor::cat(&[&row, &row], 0).unwrap()
}

fn added(config: &unet::Config, pooled: &Tensor, ids: &Value) -> Tensor {
    let rows = list(ids).iter().map(|row| {
        let row: Vec<f32> = list(row)
            .iter()
            .map(|n| n.as_f64().unwrap() as f32)
            .collect();
        let row = Tensor::new(row, &Device::Cpu).unwrap();
        let row = config
            .embed_numbers(&row.into())
            .unwrap()
            .into_data()
            .unwrap();
        row.flatten_all().unwrap().unsqueeze(0).unwrap()
    });
    let rows = Tensor::cat(&rows.collect::<Vec<_>>(), 0).unwrap();
    Tensor::cat(&[pooled, &rows], 1).unwrap()
}

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open_part(path, CONTROL, &ReadOptions::default()).unwrap()
}

/// The latents of a run by the model at `base` with the networks at `parts`.
fn run_latents(base: &Path, parts: &[PathBuf], run: &Value) -> Tensor {
    let engine = Engine::load(&Checkpoint::open(base).unwrap(), &Device::Cpu, DType::F32).unwrap();
    steered_latents(engine, parts, run)
}

/// The same of an engine that is there.
fn steered_latents(engine: Engine, parts: &[PathBuf], run: &Value) -> Tensor {
    let checkpoints: Vec<Checkpoint> = parts.iter().map(|path| open(path)).collect();
    let engine = engine.with_controls(&checkpoints).unwrap();
    assert!(engine.warnings().is_empty(), "{:?}", engine.warnings());
    let controls = list(&run["pictures"]).iter().enumerate();
    let controls = controls.map(|(i, of)| {
        let size = (number(&of[1][0]), number(&of[1][1]));
        ControlRequest {
            scale: run["scales"][i].as_f64().unwrap(),
            span: match run["factor"].as_f64() {
                Some(factor) => (0.0, factor),
                None => (
                    run["starts"][i].as_f64().unwrap(),
                    run["ends"][i].as_f64().unwrap(),
                ),
            },
            mode: match run["mode"].as_str() {
                None => ControlMode::Balanced,
                Some("prompt") => ControlMode::Prompt,
                Some("control") => ControlMode::Control,
                Some("guess") => ControlMode::Guess,
                Some(other) => panic!("{other}"),
            },
            kind: run["kinds"][i].as_u64().map(|kind| kind as usize),
            ..ControlRequest::new(picture(text(&of[0]), size))
        }
    });
    let request = Request {
        prompt: "a fox in the snow, watercolour".to_owned(),
        negative_prompt: Some("blurry, low quality".to_owned()),
        prompt_syntax: Syntax::Plain,
        width: Some(number(&run["width"])),
        height: Some(number(&run["height"])),
        steps: Some(number(&run["steps"])),
        cfg_scale: run["cfg_scale"].as_f64(),
        seed: run["seed"].as_u64(),
        controls: controls.collect(),
        ..Request::default()
    };
    latents(&engine, &request)
}

fn latents(engine: &Engine, request: &Request) -> Tensor {
    let plan = Plan::new(engine, request).unwrap();
    let mut latents = None;
    let mut keep = |batch: sd_rs::pipeline::Batch| {
        latents = Some(batch.latents);
        Ok(())
    };
    engine
        .generate(request, &plan, &mut |_| Control::Continue, &mut keep)
        .unwrap();
    latents.unwrap()
}

/// A base model's folder with the run's sampler.
fn write_base(case: &Case, dir: &Dir, run: &Value) -> PathBuf {
    let folder = dir.path("base");
    case.write_folder(&folder, &FolderForm::default());
    let config = folder.join("scheduler/scheduler_config.json");
    std::fs::write(config, run["scheduler"].to_string()).unwrap();
    folder
}

#[test]
fn runs_of_folders() {
    let cases = Cases::load();
    for run in list(&cases.record["runs"]) {
        let dir = Dir::new();
        let parts: Vec<Part<'_>> = list(&run["parts"])
            .iter()
            .map(|p| cases.part(text(p)))
            .collect();
        let base = write_base(&parts[0].base(), &dir, run);
        let paths: Vec<PathBuf> = parts
            .iter()
            .map(|part| part.write(&dir, Form::Folder))
            .collect();
        let got = run_latents(&base, &paths, run);
        let key = text(&run["expected"]);
        close(key, &got, &cases.expected[key], RUN);
    }
}

#[test]
fn single_files_are_what_folders_are() {
    let cases = Cases::load();
    let forms = [
        ("edges", Form::Original("control_model."), "edges"),
        ("edges", Form::Original(""), "edges"),
        ("edges", Form::Single, "edges"),
        ("shuffle", Form::Original(""), "shuffle"),
        ("depth-xl", Form::Original(""), "depth-xl"),
        ("depth-xl", Form::Single, "depth-xl"),
        ("union", Form::Single, "union"),
        ("sketch", Form::Original(""), "sketch"),
        ("sketch", Form::Single, "sketch"),
        ("sketch-xl", Form::Original(""), "sketch-xl"),
        ("sketch-xl", Form::Single, "sketch-xl"),
        ("depth-xl", Form::Original("control_model."), "depth-xl"),
    ];
    for (name, form, run) in forms {
        let mut runs = list(&cases.record["runs"]).iter();
        let run = runs.find(|r| r["name"] == run).unwrap();
        let part = cases.part(name);
        let dir = Dir::new();
        let base = write_base(&part.base(), &dir, run);
        let got = run_latents(&base, &[part.write(&dir, form)], run);
        let key = text(&run["expected"]);
        close(&format!("{name} {form:?}"), &got, &cases.expected[key], RUN);
    }
    // the light one has no run of its own
    let mut runs = list(&cases.record["runs"]).iter();
    let run = runs.find(|r| r["name"] == "sketch").unwrap();
    let of = |form| {
        let dir = Dir::new();
        let part = cases.part("color");
        let base = write_base(&part.base(), &dir, run);
        run_latents(&base, &[part.write(&dir, form)], run)
    };
    let want = crate::models::flat(&of(Form::Folder));
    for form in [Form::Original(""), Form::Single] {
        assert_eq!(crate::models::flat(&of(form)), want, "{form:?}");
    }
}
