//! What is told of a picture: on the standard output, and in its text chunks.

use std::time::Duration;

use serde_json::{Value, json};

use super::Job;
use crate::adapters::{DoraNorm, Mode};
use crate::cli::args::guidance::{infotext, record};
use crate::cli::args::{hires_pairs, value_name};
use crate::cli::picture;
use crate::control::Resize;
use crate::device;
use crate::memory::peak_resident;
use crate::output::{NoiseSource, Parameters};
use crate::pipeline::{Batch, ControlMode, ControlRequest, Plan, Rng};

impl Job<'_> {
    pub(super) fn json(&self, path: &str, seed: u64, batch: &Batch) -> Value {
        let seconds = |d: Duration| d.as_secs_f64();
        let timings = &batch.timings;
        let mut object = self.common_json(seed);
        if let Some(fields) = object.as_object_mut() {
            fields.insert("path".to_owned(), json!(path));
            fields.insert(
                "timings".to_owned(),
                json!({
                    "load_s": seconds(self.session.engine.load_time() + timings.load),
                    "text_s": seconds(timings.text),
                    "denoise_s": seconds(timings.denoise),
                    "step_s": timings.steps.iter().copied().map(seconds).collect::<Vec<_>>(),
                    "decode_s": seconds(timings.decode),
                    "total_s": seconds(self.session.start.elapsed()),
                }),
            );
            fields.insert("peak_rss_bytes".to_owned(), json!(peak_resident()));
        }
        object
    }

    fn common_json(&self, seed: u64) -> Value {
        let mut object = self.own_json(seed);
        let loras: Vec<_> = self.session.engine.networks().adapters().fits().collect();
        if let Some(fields) = object.as_object_mut().filter(|_| !loras.is_empty()) {
            fields.insert("loras".to_owned(), json!(loras));
        }
        object
    }

    fn own_json(&self, seed: u64) -> Value {
        json!({
            "path": Value::Null,
            "seed": seed,
            "width": self.plan.picture_size().0,
            "height": self.plan.picture_size().1,
            "steps": self.plan.steps,
            "cfg_scale": self.plan.cfg_scale,
            "sampler": self.plan.sampler,
            "schedule": self.plan.schedule,
            "model": self.session.model,
            "family": self.session.engine.spec().family.id(),
            "dtype": device::dtype_name(self.session.engine.networks().dtype()),
            "device": device::name(self.session.engine.networks().device()),
            "threads": self.session.threads,
        })
    }

    /// Our exact request, for the picture's second text chunk.
    pub(super) fn request_json(&self, seed: u64) -> Value {
        let mut object = self.own_json(seed);
        if let Some(fields) = object.as_object_mut() {
            for key in ["path", "threads", "device"] {
                fields.shift_remove(key);
            }
            fields.insert("prompt".to_owned(), json!(self.session.worn.shown_prompt));
            fields.insert(
                "negative_prompt".to_owned(),
                json!(self.request.negative_prompt),
            );
            if let Some(vae) = self.session.vae {
                fields.insert("vae".to_owned(), json!(vae));
            }
            if !self.session.text.is_empty() {
                fields.insert("text_encoders".to_owned(), json!(self.session.text));
            }
            if let Some(length) = self.session.args.t5_length {
                fields.insert("t5_length".to_owned(), json!(length));
            }
            if let Some(refiner) = self.session.refiner {
                fields.insert("refiner".to_owned(), json!(refiner));
                let switch = json!(self.session.args.refiner_switch);
                fields.insert("refiner_switch".to_owned(), switch);
            }
            if !self.session.controls.is_empty() {
                let controls = self.session.controls.iter().zip(&self.request.controls);
                let controls = controls.map(|(name, control)| control_json(name, control));
                fields.insert("controls".to_owned(), controls.collect());
            }
            if !self.session.ip_adapters.is_empty() {
                let adapters = self.session.ip_adapters.iter().zip(&self.request.images);
                let adapters =
                    adapters.map(|(name, image)| json!({ "model": name, "scale": image.scale }));
                fields.insert("ip_adapters".to_owned(), adapters.collect());
            }
            if let Some(slg) = &self.plan.skip_layers {
                fields.insert(
                    "skip_layer_guidance".to_owned(),
                    json!({ "scale": slg.scale, "layers": slg.layers, "start": slg.span.0, "end": slg.span.1 }),
                );
            }
            if let Some(source) = &self.request.source {
                let from = picture::request_json(&self.session.args.image, source, self.plan);
                fields.insert("from_picture".to_owned(), from);
            }
            if let Some(second) = &self.plan.hires {
                let hires = &second.hires;
                fields.insert(
                    "hires".to_owned(),
                    json!({
                        "first_width": self.plan.width, "first_height": self.plan.height, "upscaler": self.session.args.hires.upscaler(),
                        "steps": second.plan.steps, "strength": hires.strength, "cfg_scale": second.plan.cfg_scale,
                    }),
                );
            }
            let wrap = self.plan.surface.wrap;
            if wrap.any() {
                fields.insert("tile".to_owned(), json!({ "x": wrap.x, "y": wrap.y }));
            }
            if !self.session.embeddings.names.is_empty() {
                fields.insert(
                    "embeddings".to_owned(),
                    json!(self.session.embeddings.names),
                );
            }
            let (guidance, shortcuts) = (&self.plan.guidance, &self.plan.shortcuts);
            fields.extend(record(guidance, shortcuts, &self.request.regions));
            if self.session.args.dora_norm != DoraNorm::default() {
                fields.insert("dora_norm".to_owned(), json!("original"));
            }
            if self.session.args.lora_mode != Mode::default() {
                let mode = value_name(&self.session.args.lora_mode);
                fields.insert("lora_mode".to_owned(), json!(mode));
            }
            fields.insert("clip_skip".to_owned(), json!(self.plan.clip_skip));
            fields.insert(
                "rng".to_owned(),
                json!(format!("{:?}", self.plan.rng).to_lowercase()),
            );
            let syntax = format!("{:?}", self.request.prompt_syntax).to_lowercase();
            fields.insert("prompt_syntax".to_owned(), json!(syntax));
            fields.insert("batch_size".to_owned(), json!(self.plan.batch_size));
        }
        object
    }

    pub(super) fn parameters(&self, seed: u64) -> Parameters {
        Parameters {
            prompt: self.session.worn.shown_prompt.clone(),
            negative_prompt: self.request.negative_prompt.clone().unwrap_or_default(),
            steps: u32::try_from(self.plan.steps).ok(),
            sampler: Some(self.plan.sampler.clone()),
            schedule_type: Some(self.plan.schedule.clone()),
            cfg_scale: Some(self.plan.cfg_scale),
            seed: Some(seed),
            size: self.first_size(),
            denoising_strength: match &self.plan.hires {
                Some(second) => Some(second.hires.strength),
                None => self.plan.strength,
            },
            model: Some(self.session.model.to_owned()),
            clip_skip: u32::try_from(self.plan.clip_skip).unwrap_or(1),
            rng: match self.plan.rng {
                Rng::Cpu => NoiseSource::Cpu,
                Rng::Nv => NoiseSource::Nv,
            },
            version: Some(Parameters::our_version()),
            extras: [
                self.other_models(),
                infotext(
                    &self.plan.guidance,
                    &self.plan.shortcuts,
                    self.plan.hires.is_some(),
                ),
            ]
            .concat(),
            ..Parameters::default()
        }
    }

    /// A1111 tells the first pass's size where there are two.
    fn first_size(&self) -> Option<(u32, u32)> {
        let (width, height) = match self.plan.hires {
            Some(_) => (self.plan.width, self.plan.height),
            None => self.plan.picture_size(),
        };
        u32::try_from(width).ok().zip(u32::try_from(height).ok())
    }

    /// A1111's keys of what else takes part.
    fn other_models(&self) -> Vec<(String, String)> {
        let mut pairs = Vec::new();
        if let Some(vae) = self.session.vae {
            pairs.push(("VAE".to_owned(), vae.to_owned()));
        }
        // Forge's words
        for (name, i) in self.session.text.iter().zip(1..) {
            pairs.push((format!("Module {i}"), (*name).to_owned()));
        }
        if let Some(refiner) = self.session.refiner {
            let switch = self.session.args.refiner_switch.to_string();
            pairs.push(("Refiner".to_owned(), refiner.to_owned()));
            pairs.push(("Refiner switch at".to_owned(), switch));
        }
        pairs.extend(picture::pairs(self.request, self.plan));
        let controls = self.session.controls.iter().zip(&self.request.controls);
        for (i, (name, control)) in controls.enumerate() {
            let text = control_infotext(name, control);
            pairs.push((format!("ControlNet {i}"), text));
        }
        pairs.extend(hires_pairs(&self.session.args.hires, self.plan));
        if let Some(hashes) = &self.session.worn.hashes {
            pairs.push(("Lora hashes".to_owned(), hashes.clone()));
        }
        if let Some(hashes) = &self.session.embeddings.hashes {
            pairs.push(("TI hashes".to_owned(), hashes.clone()));
        }
        pairs
    }

    /// Network calls of a batch, in all passes.
    pub(super) fn calls(&self) -> usize {
        let second = self.plan.hires.as_ref();
        let of = |plan: &Plan| plan.trajectory.calls.len();
        of(self.plan) + second.map_or(0, |second| of(&second.plan))
    }

    pub(super) fn describe(&self) -> String {
        let mut object = self.common_json(self.plan.seed);
        if let Some(fields) = object.as_object_mut() {
            fields.shift_remove("path");
            fields.insert("pictures".to_owned(), json!(self.plan.pictures()));
            fields.insert("network_calls".to_owned(), json!(self.calls()));
            let second = self.plan.hires.as_ref();
            let memory = second.map_or(self.plan.memory, |second| second.plan.memory);
            fields.insert("memory_bytes".to_owned(), json!(memory));
        }
        if self.session.args.json {
            return object.to_string();
        }
        let lines = object.as_object().map(|fields| {
            fields
                .iter()
                .map(|(key, value)| match value {
                    Value::String(text) => format!("{key:14} {text}"),
                    other => format!("{key:14} {other}"),
                })
                .collect::<Vec<_>>()
        });
        lines.unwrap_or_default().join("\n")
    }
}

/// What a picture's second text chunk says of a network that steered it.
fn control_json(name: &str, control: &ControlRequest) -> Value {
    json!({
        "model": name,
        "preprocessor": value_name(&control.preprocessor),
        "resize": value_name(&control.resize),
        "mode": value_name(&control.mode),
        "scale": control.scale,
        "start": control.span.0,
        "end": control.span.1,
        "type": control.kind,
    })
}

/// A1111's words for what steered a picture.
fn control_infotext(name: &str, control: &ControlRequest) -> String {
    let mode = match control.mode {
        ControlMode::Balanced => "Balanced",
        ControlMode::Prompt => "My prompt is more important",
        ControlMode::Control | ControlMode::Guess => "ControlNet is more important",
    };
    let resize = match control.resize {
        Resize::Stretch => "Just Resize",
        Resize::Crop => "Crop and Resize",
        Resize::Fill => "Resize and Fill",
    };
    format!(
        "Module: {}, Model: {name}, Weight: {}, Resize Mode: {resize}, Guidance Start: {}, Guidance End: {}, Control Mode: {mode}",
        value_name(&control.preprocessor),
        control.scale,
        control.span.0,
        control.span.1
    )
}
