//! Writes a diffusers folder: each component's tensors in one file, with configs and tokenizers.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::item::Item;
use super::merge::flat;
use super::provenance::{self, About};
use super::target::Target;
use super::task::Task;
use super::view::{Folder, Model};
use super::{Request, Watch, configs, plan, safetensors, title};
use crate::error::{Error, Result};
use crate::output::{NewFile, NewFolder, check_room};
use crate::text::tokenizer_files;

/// The file by which a folder is known to be a model's.
const INDEX: &str = "model_index.json";
/// The largest file that is copied from one folder to another, in bytes: vocabularies and configs.
const MAX_COPY: u64 = 64 << 20;

/// Writes `model` as a folder.
///
/// # Errors
/// Whatever stops it; then nothing is left behind.
pub(super) fn write(request: &Request<'_>, model: &mut Model<'_>, watch: &dyn Watch) -> Result<()> {
    let from_folder = model.checkpoint.is_folder();
    let parts = parts(request, model)?;
    let linear = is_linear(&parts);
    let about = About {
        title: title(&request.output),
        date: request.date.as_deref(),
        merge: request.merge.as_ref(),
        safetensors: true,
    };
    let mut metadata = provenance::metadata(model, &about);
    metadata.extend(request.notes.iter().cloned());
    let mut planned: BTreeMap<String, Vec<Task>> = BTreeMap::new();
    for mut task in plan::tasks(request, Target::Folder, flat(parts), watch)? {
        let name = task.item.name.split_once('/');
        if let Some((component, name)) = name.map(|(a, b)| (a.to_owned(), b.to_owned())) {
            task.item.name = name;
            planned.entry(component).or_default().push(task);
        }
    }
    let bytes = planned.values().map(|tasks| plan::bytes(tasks));
    let bytes = bytes.sum::<Result<u64>>()?;
    check_room(&request.output, bytes)?;
    watch.planned(bytes);

    let folder = NewFolder::create(&request.output, request.force, INDEX)?;
    if from_folder {
        copy_files(request, model, &folder)?;
    } else {
        write_files(model, linear, &folder)?;
    }
    if request.vae.is_some() && from_folder {
        let config = configs::vae(model.spec()?);
        folder.write("vae/config.json", format!("{config:#}\n").as_bytes())?;
    }
    for (component, tasks) in planned {
        let plain = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let metadata = if component == "unet" {
            &metadata
        } else {
            &plain
        };
        let place = folder.place(&format!("{component}/{}.safetensors", stem(&component)))?;
        let file = NewFile::create(&place, false)?;
        safetensors::write(file, &place, tasks, metadata, (request.change, watch))?;
    }
    folder.finish()
}

/// The tensors of each component. A folder's own stay as they are unless their weights change: those are then under today's names.
fn parts(request: &Request<'_>, model: &mut Model<'_>) -> Result<Vec<Folder>> {
    if !model.checkpoint.is_folder() {
        return model.folder();
    }
    let mut parts = model.folder_as_it_is();
    let changed = request.merge.is_some() || request.change.is_some();
    if !changed && request.vae.is_none() {
        return Ok(parts);
    }
    let known = model.folder()?;
    if request.merge.is_some() {
        return Ok(known); // what is no network cannot be merged, and goes
    }
    for part in known {
        let is_other = changed || part.component == "vae";
        let old = parts.iter_mut().find(|old| old.component == part.component);
        if let Some(old) = old.filter(|_| is_other) {
            *old = part;
        }
    }
    Ok(parts)
}

/// What diffusers and transformers call a component's weights.
fn stem(component: &str) -> &'static str {
    let transformers = ["text_encoder", "safety_checker", "image_encoder"];
    match transformers.iter().any(|name| component.starts_with(name)) {
        true => "model",
        false => "diffusion_pytorch_model",
    }
}

/// Whether the projections of the UNet's transformers are linear layers.
fn is_linear(parts: &[Folder]) -> bool {
    let unet = parts.iter().find(|part| part.component == "unet");
    let items = unet.into_iter().flat_map(|part| &part.items);
    let is_projection = |item: &&Item| item.name.ends_with(".proj_in.weight");
    items
        .into_iter()
        .find(is_projection)
        .is_some_and(|item| item.shape.len() == 2)
}

/// Configs and tokenizers of a model that has none.
fn write_files(model: &mut Model<'_>, linear: bool, folder: &NewFolder) -> Result<()> {
    let detection = model.detection.clone();
    let spec = model.spec()?;
    for (name, json) in configs::files(spec, &detection, linear)? {
        folder.write(&name, format!("{json:#}\n").as_bytes())?;
    }
    for tower in &spec.text {
        for (name, text) in tokenizer_files(tower.role.pad)? {
            folder.write(&format!("{}/{name}", tower.role.tokenizer), text.as_bytes())?;
        }
    }
    Ok(())
}

/// The files of a folder that are not its weights.
fn copy_files(request: &Request<'_>, model: &Model<'_>, folder: &NewFolder) -> Result<()> {
    let root = model.checkpoint.path();
    copy_small(root, "", folder, &|name| {
        name == INDEX || name == "sd-rs.json"
    })?;
    let names: Vec<&str> = model.checkpoint.component_names().collect();
    for component in names {
        let Some(place) = model.checkpoint.component_path(component) else {
            continue;
        };
        let replaced = component == "vae" && request.vae.is_some();
        copy_small(place, component, folder, &|name| {
            let is_config = name == "config.json" && replaced;
            let is_index = name.ends_with(".index.json") || name.contains(".index.");
            !is_config
                && !is_index
                && (name.ends_with(".json") || name.ends_with(".txt") || name.ends_with(".model"))
        })?;
    }
    if model.checkpoint.model_index().is_none() {
        let reason = "the folder has no model_index.json, so nobody could open what is written; download it again";
        return Err(Error::bad_model(root, reason));
    }
    Ok(())
}

fn copy_small(
    from: &Path,
    to: &str,
    folder: &NewFolder,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<()> {
    let failed = |e| Error::disk(from, "read", e);
    for entry in fs::read_dir(from).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = entry.path();
        let about = fs::metadata(&path).map_err(|e| Error::disk(&path, "read", e))?;
        if !about.is_file() || !wanted(&name) {
            continue;
        }
        if about.len() > MAX_COPY {
            let reason =
                format!("the file is larger than {MAX_COPY} bytes, too large for a config");
            return Err(Error::bad_model(path, reason));
        }
        let bytes = fs::read(&path).map_err(|e| Error::disk(&path, "read", e))?;
        let name = if to.is_empty() {
            name
        } else {
            format!("{to}/{name}")
        };
        folder.write(&name, &bytes)?;
    }
    Ok(())
}
