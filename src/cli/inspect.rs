//! `sd-rs inspect`: what a file is and why, in a screenful or as one JSON object. Reads headers and configs; weights only to hash them.

mod adapter;
mod embedding;

use std::collections::BTreeMap;
use std::io::Write;

use serde::Serialize;

use self::adapter::AdapterReport;
use self::embedding::EmbeddingReport;
use super::args::InspectArgs;
use super::fetch::open_model;
use crate::checkpoint::{
    Checkpoint, Detection, Structure, TensorInfo, TensorSet, auto_v2, detect, leftover, printable,
    printable_to, sha256_file, sha256_tensors,
};
use crate::error::{Error, Result};
use crate::pipeline::Coverage;
use crate::spec::ModelSpec;

/// Names shown of a longer list.
const SHOWN: usize = 8;
/// The longest metadata value that is shown, in characters: in the text, and in the JSON.
const VALUE_TEXT: usize = 100;
const VALUE_JSON: usize = 10_000;
/// The same for a problem in the text.
const PROBLEM_TEXT: usize = 400;

/// What is known of a file or folder. The JSON of `--json`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// The path as given.
    pub file: String,
    /// Bytes of all tensor files.
    pub size_bytes: u64,
    /// `safetensors`, `PyTorch checkpoint`, `GGUF` or `diffusers folder`.
    pub format: &'static str,
    /// The family's short name, such as `sd1`.
    pub family: &'static str,
    /// A sentence's part for people: "a Stable Diffusion 1 checkpoint".
    pub title: String,
    /// `text2image`, `inpainting` …
    pub variant: &'static str,
    /// `epsilon`, `v_prediction`, `sample` or null.
    pub prediction: Option<&'static str>,
    /// Why it cannot make pictures from text (yet); null when it can.
    pub refusal: Option<String>,
    /// What was seen, the deciding fact first.
    pub evidence: Vec<String>,
    /// The components by name.
    pub components: BTreeMap<String, Component>,
    /// What a LoRA is; null for all else.
    pub adapter: Option<AdapterReport>,
    /// What a textual inversion is; null for all else.
    pub embedding: Option<EmbeddingReport>,
    /// The sizes of the networks.
    pub structure: serde_json::Value,
    /// The header's texts, control characters escaped.
    pub metadata: BTreeMap<String, String>,
    /// SHA-256 of a single file.
    pub sha256: Option<String>,
    /// Its first ten digits, by which model sites know it.
    pub autov2: Option<String>,
    /// The files of a folder.
    pub files: Vec<FileReport>,
    /// Tensors that are known and not needed, by what they are.
    pub ignored: BTreeMap<String, usize>,
    /// Tensors that no network asks for; those of folders below their component's name.
    pub unused: Vec<String>,
    /// What is wrong or unusual.
    pub problems: Vec<String>,
}

/// One component's tensors.
#[derive(Debug, Default, Serialize)]
pub(super) struct Component {
    /// What their names begin with in a single file.
    pub prefix: String,
    /// How many there are.
    pub tensors: usize,
    /// Their elements.
    pub parameters: u64,
    /// Their bytes in the file.
    pub bytes: u64,
    /// Tensors of each type.
    pub dtypes: BTreeMap<String, usize>,
}

/// One file of a folder.
#[derive(Debug, Serialize)]
pub(super) struct FileReport {
    /// Its path below the folder.
    pub path: String,
    /// Its container, as [`Report::format`].
    pub format: &'static str,
    /// Its size.
    pub size_bytes: u64,
    /// Its SHA-256.
    pub sha256: Option<String>,
}

/// Writes what a file or folder is to `out`: a screenful, or one JSON object. The hash, which needs the whole file read, comes last.
///
/// # Errors
/// Those of [`Checkpoint::open`], with a sentence that says what the file is instead; [`Error::Disk`] when `out` cannot be written.
pub fn run(args: &InspectArgs, out: &mut dyn Write) -> Result<()> {
    let checkpoint = open_model(Some(&args.file), &args.library, args.no_mmap)?.checkpoint;
    let mut report = Report::new(&checkpoint, &detect(&checkpoint));
    if args.json {
        report.hash(&checkpoint)?;
        return report.write_json(out);
    }
    report.write_text(out)?;
    report.hash(&checkpoint)?;
    report.write_hash(out)
}

impl Report {
    /// Everything but the hash.
    fn new(checkpoint: &Checkpoint, detection: &Detection) -> Self {
        let size = |file: &crate::checkpoint::TensorFile| file.size();
        let mut report = Self {
            file: printable(&checkpoint.path().display().to_string()),
            size_bytes: checkpoint.files().map(size).sum(),
            format: match checkpoint.files().next() {
                Some(file) if !checkpoint.is_folder() => file.container().name(),
                _ => "diffusers folder",
            },
            family: detection.family.id(),
            title: detection.title(),
            variant: detection.variant.id(),
            prediction: detection.prediction.map(|prediction| prediction.id()),
            refusal: detection.refusal(),
            evidence: detection.evidence.clone(),
            components: BTreeMap::new(),
            adapter: None,
            embedding: None,
            structure: structure_json(&detection.structure),
            metadata: BTreeMap::new(),
            sha256: None,
            autov2: None,
            files: Vec::new(),
            ignored: BTreeMap::new(),
            unused: Vec::new(),
            problems: checkpoint.warnings().to_vec(),
        };
        for file in checkpoint.files() {
            let texts = file.metadata().iter();
            let texts =
                texts.map(|(name, value)| (printable(name), printable_to(value, VALUE_JSON)));
            report.metadata.extend(texts);
            if checkpoint.is_folder() {
                let below = file.path().strip_prefix(checkpoint.path());
                let below = below.unwrap_or(file.path());
                report.files.push(FileReport {
                    path: printable(&below.display().to_string()),
                    format: file.container().name(),
                    size_bytes: file.size(),
                    sha256: None,
                });
            }
        }
        match checkpoint.single() {
            Some(tensors) => report.count_single(&tensors, detection),
            None => report.count_folder(checkpoint),
        }
        match AdapterReport::of(checkpoint, detection) {
            Ok(adapter) => report.adapter = adapter,
            Err(reason) => report.problems.push(reason),
        }
        match EmbeddingReport::of(checkpoint, detection) {
            Ok(embedding) => report.embedding = embedding,
            Err(reason) => report.problems.push(reason),
        }
        if report.refusal.is_none() {
            report.cover(checkpoint, detection);
        }
        let missing = detection.missing.iter();
        let missing = missing.map(|name| format!("the component `{name}` is missing"));
        report.problems.extend(missing);
        report
    }

    /// Lets the networks ask for their weights: what is missing stands in the way, what is left over is listed.
    fn cover(&mut self, checkpoint: &Checkpoint, detection: &Detection) {
        let spec = match ModelSpec::read(checkpoint, detection) {
            Ok(spec) => spec,
            Err(error) => {
                let reason = match error {
                    // the file's own name stands above
                    Error::BadModel { path, reason } if path == checkpoint.path() => reason,
                    other => other.to_string(),
                };
                self.refusal = Some(printable_to(&reason, VALUE_JSON));
                return;
            }
        };
        let coverage = Coverage::of(checkpoint, &spec);
        if !coverage.problems.is_empty() {
            let why = "its networks lack tensors, or what is there does not fit (see problems)";
            self.refusal = Some(why.to_owned());
        }
        self.problems.extend(coverage.problems);
        self.problems.extend(coverage.notices);
        self.unused = coverage.unused;
        self.ignored = coverage.ignored;
    }

    fn count_single(&mut self, tensors: &TensorSet, detection: &Detection) {
        for info in tensors.names().filter_map(|name| tensors.info(name)) {
            let fits = |prefix: &str| info.name.starts_with(prefix);
            let place = detection.places.iter().find(|place| fits(&place.prefix));
            let (component, prefix) = match place {
                Some(place) => (place.component, place.prefix.as_str()),
                None if detection.places.is_empty() => ("tensors", ""),
                None => {
                    self.count_outside(&info.name);
                    continue;
                }
            };
            let entry = self.components.entry(component.to_owned()).or_default();
            entry.prefix = prefix.to_owned();
            entry.add(info);
        }
    }

    fn count_outside(&mut self, name: &str) {
        match leftover(name) {
            Some(what) => *self.ignored.entry(what.to_owned()).or_default() += 1,
            None => self.unused.push(printable(name)),
        }
    }

    fn count_folder(&mut self, checkpoint: &Checkpoint) {
        for name in checkpoint.component_names() {
            let entry = self.components.entry(printable(name)).or_default();
            let Some(tensors) = checkpoint.tensors(name) else {
                continue;
            };
            for info in tensors.names().filter_map(|name| tensors.info(name)) {
                entry.add(info);
            }
        }
    }

    /// Hashes the files: reads all of them.
    ///
    /// # Errors
    /// [`Error::Disk`] when a file cannot be read.
    fn hash(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        if !checkpoint.is_folder() {
            let sha256 = sha256_file(checkpoint.path())?;
            self.autov2 = Some(auto_v2(&sha256).to_owned());
            self.sha256 = Some(sha256);
            if let Some(adapter) = &mut self.adapter {
                adapter.tensors_sha256 = Some(sha256_tensors(checkpoint.path())?);
            }
            return Ok(());
        }
        for (report, file) in self.files.iter_mut().zip(checkpoint.files()) {
            report.sha256 = Some(sha256_file(file.path())?);
        }
        Ok(())
    }

    /// Writes one JSON object and a newline.
    ///
    /// # Errors
    /// [`Error::Disk`] when `out` cannot be written.
    fn write_json(&self, out: &mut dyn Write) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|e| output_error(e.into()))?;
        writeln!(out, "{text}").map_err(output_error)
    }

    /// Writes everything but the hash for people.
    ///
    /// # Errors
    /// [`Error::Disk`] when `out` cannot be written.
    fn write_text(&self, out: &mut dyn Write) -> Result<()> {
        out.write_all(self.text().as_bytes()).map_err(output_error)
    }

    fn write_hash(&self, out: &mut dyn Write) -> Result<()> {
        let mut text = String::new();
        if let (Some(sha256), Some(short)) = (&self.sha256, &self.autov2) {
            text.push_str(&line("sha-256", sha256));
            text.push_str(&line("model hash", &format!("{short} (AutoV2)")));
        }
        if let Some(adapter) = &self.adapter {
            text.push_str(&adapter.hash_text());
        }
        for file in &self.files {
            let sha256 = file.sha256.as_deref().unwrap_or_default();
            let about = format!(
                "{sha256}  {} ({}, {})",
                file.path,
                bytes(file.size_bytes),
                file.format
            );
            text.push_str(&line("sha-256", &about));
        }
        out.write_all(text.as_bytes()).map_err(output_error)
    }

    fn text(&self) -> String {
        let mut text = line(
            "file",
            &format!(
                "{} ({}, {})",
                self.file,
                bytes(self.size_bytes),
                self.format
            ),
        );
        text.push_str(&line("is", &self.title));
        text.push_str(&match &self.refusal {
            _ if self.adapter.is_some() => line("usable", "yes, with `sd-rs generate --lora`"),
            _ if self.embedding.is_some() => {
                line("usable", "yes, with `sd-rs generate --embedding`")
            }
            Some(why) => line("usable", &format!("no: {why}")),
            None => line("usable", "yes, with `sd-rs generate --model`"),
        });
        if let Some(prediction) = self.prediction {
            text.push_str(&line("predicts", prediction));
        }
        list(&mut text, "because", &self.evidence, usize::MAX);
        if let Some(adapter) = &self.adapter {
            text.push_str(&adapter.text());
        }
        if let Some(embedding) = &self.embedding {
            text.push_str(&embedding.text());
        }
        let components: Vec<String> = self.components.iter().map(component_line).collect();
        list(&mut text, "components", &components, usize::MAX);
        list(
            &mut text,
            "structure",
            &structure_lines(&self.structure),
            usize::MAX,
        );
        let metadata: Vec<String> = self
            .metadata
            .iter()
            .map(|(name, value)| format!("{name} = {}", printable_to(value, VALUE_TEXT)))
            .collect();
        list(&mut text, "metadata", &metadata, SHOWN);
        let ignored: Vec<String> = self
            .ignored
            .iter()
            .map(|(what, count)| match count {
                1 => format!("1 {}", what.replacen("tensors", "tensor", 1)),
                _ => format!("{count} {what}"),
            })
            .collect();
        list(&mut text, "ignored", &ignored, usize::MAX);
        list(&mut text, "unused", &self.unused, SHOWN);
        let problems: Vec<String> = self
            .problems
            .iter()
            .map(|problem| printable_to(problem, PROBLEM_TEXT))
            .collect();
        list(&mut text, "problems", &problems, SHOWN);
        text
    }
}

impl Component {
    fn add(&mut self, info: &TensorInfo) {
        self.tensors += 1;
        self.parameters = self.parameters.saturating_add(info.elements() as u64);
        self.bytes = self.bytes.saturating_add(info.size() as u64);
        *self.dtypes.entry(info.dtype.to_string()).or_default() += 1;
    }
}

fn output_error(source: std::io::Error) -> Error {
    Error::disk("standard output", "write", source)
}

fn structure_json(structure: &Structure) -> serde_json::Value {
    use serde_json::json;
    let mut object = serde_json::Map::new();
    if let Some(unet) = &structure.unet {
        let fields = json!({
            "in_channels": unet.in_channels, "out_channels": unet.out_channels, "channels": unet.channels,
            "transformer_depths": unet.depths, "mid_depth": unet.mid_depth, "context_width": unet.context,
            "linear_projections": unet.linear, "class_width": unet.class_width,
        });
        object.insert("unet".to_owned(), fields);
    }
    if let Some(text) = &structure.text {
        let fields = json!({
            "width": text.width, "layers": text.layers, "vocabulary": text.vocabulary, "positions": text.positions,
            "spelling": if text.open_clip { "open_clip" } else { "transformers" },
        });
        object.insert("text_encoder".to_owned(), fields);
    }
    if let Some(vae) = &structure.vae {
        let fields = json!({ "latent_channels": vae.latent_channels, "channels": vae.channels });
        object.insert("vae".to_owned(), fields);
    }
    object.into()
}

/// One line a network: `unet: channels [320,640], context width 768 …`; what is null or an empty list is left out.
fn structure_lines(structure: &serde_json::Value) -> Vec<String> {
    let networks = structure.as_object().into_iter().flatten();
    networks
        .map(|(name, fields)| {
            let fields = fields.as_object().into_iter().flatten();
            let fields: Vec<String> = fields
                .filter(|(_, value)| {
                    !value.is_null() && value.as_array().is_none_or(|v| !v.is_empty())
                })
                .map(|(field, value)| {
                    let value = value.to_string().replace('"', "");
                    format!("{} {value}", field.replace('_', " "))
                })
                .collect();
            format!("{name}: {}", fields.join(", "))
        })
        .collect()
}

fn component_line((name, component): (&String, &Component)) -> String {
    if component.tensors == 0 {
        return name.clone();
    }
    let dtypes: Vec<String> = component
        .dtypes
        .iter()
        .map(|(dtype, count)| format!("{count} {dtype}"))
        .collect();
    let below = match component.prefix.as_str() {
        "" => String::new(),
        prefix => format!(" below `{}`", printable(prefix)),
    };
    format!(
        "{name}: {} tensor{}{below}, {} parameters, {} ({})",
        component.tensors,
        if component.tensors == 1 { "" } else { "s" },
        millions(component.parameters),
        bytes(component.bytes),
        dtypes.join(", ")
    )
}

/// `label      value`
fn line(label: &str, value: &str) -> String {
    format!("{label:<12}{value}\n")
}

/// A labelled list, one item a line, at most `most`; nothing for an empty list.
fn list(text: &mut String, label: &str, items: &[String], most: usize) {
    for (i, item) in items.iter().take(most).enumerate() {
        text.push_str(&line(if i == 0 { label } else { "" }, item));
    }
    if items.len() > most {
        text.push_str(&line("", &format!("… and {} more", items.len() - most)));
    }
}

fn millions(count: u64) -> String {
    match count {
        0..1_000_000 => count.to_string(),
        _ => format!("{:.1} M", count as f64 / 1e6),
    }
}

fn bytes(count: u64) -> String {
    match count {
        0..1_000 => format!("{count} bytes"),
        1_000..1_000_000 => format!("{:.1} kB", count as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", count as f64 / 1e6),
        _ => format!("{:.2} GB", count as f64 / 1e9),
    }
}
