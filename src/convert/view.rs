//! A model as the list of tensors of a single file or of a folder, whichever of the two it is.
//!
//! Names go through diffusers': each network says which weights it has, the input's layout where they lie, and the output's where they go.
//! What a single file fuses, exchanges or keeps as convolutions, its layout says, the same that is used for reading.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::item::{Item, Piece, Role, WeightName, role};
use super::names::{Network, networks};
use serde_json::Value;

use crate::checkpoint::{Checkpoint, Detection, Family, TensorSet, detect};
use crate::error::{Error, Result};
use crate::sampling::{Class, Prediction};
use crate::spec::{self, ModelSpec, SINGLE_VAE, difference, layouts};
use crate::weights::CheckpointSource;
use crate::weights::layout::{Layout, Part};
use crate::weights::text_tower::transformers_layout;

/// A checkpoint, what it is, and its networks if they are known.
pub(super) struct Model<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) detection: Detection,
    spec: std::result::Result<ModelSpec, Option<Error>>,
    other_vae: bool,
}

/// The tensors of one component of a folder.
pub(super) struct Folder {
    /// The component.
    pub(super) component: String,
    /// Its tensors.
    pub(super) items: Vec<Item>,
}

impl<'a> Model<'a> {
    /// Finds out what `checkpoint` is; `vae` takes its autoencoder's place.
    pub(super) fn new(checkpoint: &'a Checkpoint, vae: Option<&Checkpoint>) -> Result<Self> {
        let detection = detect(checkpoint);
        let others = spec::Others {
            vae,
            ..spec::Others::default()
        };
        let spec = ModelSpec::read_any(checkpoint, &detection, others);
        let spec = spec.and_then(|spec| match spec.unet_config() {
            Ok(_) => Ok(spec),
            Err(refusal) => Err(refusal),
        });
        if vae.is_some() {
            let spec = spec?;
            if spec.tiny.is_some() {
                return Err(Error::Unsupported(
                    "a tiny autoencoder (TAESD) cannot take the autoencoder's place in a checkpoint; give a VAE with --vae".to_owned(),
                ));
            }
            return Ok(Self {
                checkpoint,
                detection,
                spec: Ok(spec),
                other_vae: true,
            });
        }
        Ok(Self {
            checkpoint,
            detection,
            spec: spec.map_err(Some),
            other_vae: false,
        })
    }

    /// Its networks' structure.
    ///
    /// # Errors
    /// Why it is not known.
    pub(super) fn spec(&mut self) -> Result<&ModelSpec> {
        let path = self.checkpoint.path();
        match &mut self.spec {
            Ok(spec) => Ok(spec),
            Err(error) => Err(error
                .take()
                .unwrap_or_else(|| Error::bad_model(path, "its networks are not known"))),
        }
    }

    /// Its networks' structure, where it is known.
    pub(super) fn known(&self) -> Option<&ModelSpec> {
        self.spec.as_ref().ok()
    }

    /// Its tensors as a single file has them. Those of a single file stay as they are, but for an autoencoder in whose place another is.
    ///
    /// # Errors
    /// When a folder's networks are not known, or a single file cannot tell them.
    pub(super) fn single(&mut self) -> Result<Vec<Item>> {
        let Some(tensors) = self.checkpoint.single() else {
            return self.assembled(|_| true);
        };
        let mut items = as_they_are(&tensors);
        if self.other_vae {
            let own = format!("{SINGLE_VAE}.");
            items.retain(|item| !item.name.starts_with(&own));
            items.extend(self.assembled(|component| component == "vae")?);
        }
        if let Some(spec) = self.known() {
            mark(&mut items, spec, self.checkpoint.is_folder())?;
        }
        Ok(items)
    }

    /// The networks' tensors as a single file has them.
    fn assembled(&mut self, wanted: impl Fn(&str) -> bool) -> Result<Vec<Item>> {
        let checkpoint = self.checkpoint;
        let spec = self.spec()?;
        let places = layouts(spec)?;
        let mut items = Vec::new();
        for network in networks(spec)? {
            if !wanted(network.component) {
                continue;
            }
            let position = spec
                .text
                .iter()
                .position(|tower| tower.role.component == network.component);
            match (network.component, position.and_then(|i| places.text.get(i))) {
                ("unet", _) => items.extend(lay_out(&network, &places.unet)),
                ("vae", _) => items.extend(lay_out(&network, &places.vae)),
                (_, Some(tower)) => {
                    items.extend(lay_out(&network, &tower.layout));
                    if tower.spare_layer {
                        items.extend(repeat_last_layer(&network, &tower.layout));
                    }
                }
                _ => {}
            }
        }
        let shapes: HashMap<&str, &[usize]> = items
            .iter()
            .map(|item| (item.name.as_str(), item.shape.as_slice()))
            .collect();
        let whole = wanted("unet") && wanted("vae");
        let shapes = |name: &str| shapes.get(name).map(|shape| shape.to_vec());
        match difference(spec, &shapes).filter(|_| whole) {
            None => {
                if whole {
                    items.extend(marks(spec, checkpoint.config("scheduler"))?);
                }
                Ok(items)
            }
            Some(what) => Err(Error::bad_model(
                checkpoint.path(),
                format!(
                    "a single file cannot say what this model is ({what}); convert it to a folder"
                ),
            )),
        }
    }

    /// Its tensors as a folder has them, component by component.
    ///
    /// # Errors
    /// When its networks are not known, or lack something.
    pub(super) fn folder(&mut self) -> Result<Vec<Folder>> {
        let spec = self.spec()?;
        let single = layouts(spec)?.unet;
        let folder = |network: Network| {
            let layout = match network.component {
                "unet" | "vae" => Layout::identity(""),
                _ => transformers_layout(""),
            };
            let mut items = lay_out(&network, &layout);
            if network.component == "unet" {
                for item in &mut items {
                    if let Some(part) = single.place(&item.name) {
                        item.block = part.stored;
                    }
                }
            }
            Folder {
                component: network.component.to_owned(),
                items,
            }
        };
        Ok(networks(spec)?.into_iter().map(folder).collect())
    }

    /// A folder's tensors as they are.
    pub(super) fn folder_as_it_is(&self) -> Vec<Folder> {
        let components = self.checkpoint.component_names();
        let folder = |name: &str| {
            Some(Folder {
                component: name.to_owned(),
                items: as_they_are(&self.checkpoint.tensors(name)?),
            })
        };
        components.filter_map(folder).collect()
    }
}

/// The tensors by which single files tell what a folder's scheduler says.
fn marks(spec: &ModelSpec, scheduler: Option<&Value>) -> Result<Vec<Item>> {
    let mut marks = Vec::new();
    let Some(config) = &spec.scheduler else {
        return Ok(marks);
    };
    let one = |name: &str, x: f64| Item::constant(name, &[], vec![x as f32]);
    let channels = |name: &str, numbers: &[f64]| {
        let numbers: Vec<f32> = numbers.iter().map(|x| *x as f32).collect();
        Item::constant(name, &[1, numbers.len(), 1, 1], numbers)
    };
    let says =
        |name: &str| scheduler.and_then(|s| s.get(name)).and_then(Value::as_bool) == Some(true);
    let is_edm = matches!(config.class(), Class::EdmEuler | Class::EdmDpmMultistep);
    let (min, max) = config.edm_range();
    match (is_edm, spec.prediction, &spec.vae.config.spread) {
        (true, Prediction::V, None) if config.sigma_data == 1.0 => {
            marks.push(one("edm_vpred.sigma_max", max));
            marks.push(one("edm_vpred.sigma_min", min));
        }
        (true, Prediction::Edm, Some(spread))
            if (min, max, config.sigma_data) == (0.002, 80.0, 0.5) =>
        {
            marks.push(channels("edm_mean", &spread.mean));
            marks.push(channels("edm_std", &spread.deviation));
        }
        (true, ..) | (_, _, Some(_)) => {
            return Err(Error::Unsupported(
                "a single file cannot say this model's noise levels or the scale of its latents; convert it to a folder".to_owned(),
            ));
        }
        // what a Stable Diffusion 2 predicts is told by its weights, and in the metadata
        (false, Prediction::V, None) if spec.family != Family::Sd2 => {
            marks.push(Item::constant("v_pred", &[0], Vec::new()));
        }
        _ => {}
    }
    if says("rescale_betas_zero_snr") {
        marks.push(Item::constant("ztsnr", &[0], Vec::new()));
    }
    Ok(marks)
}

/// Notes which weights the tensors of a single file are, and which of them nothing computes with.
fn mark(items: &mut [Item], spec: &ModelSpec, is_folder: bool) -> Result<()> {
    if is_folder {
        return Ok(());
    }
    let ignored = |name: &str| {
        spec.text
            .iter()
            .any(|tower| tower.component.layout.ignored_as(name).is_some())
    };
    for item in items.iter_mut().filter(|item| item.role == Role::Weight) {
        if ignored(&item.name) {
            item.role = Role::Spare;
        }
    }
    // a broken model is converted as it is; its weights are then not known by name
    let Ok(networks) = networks(spec) else {
        return Ok(());
    };
    let mut known: BTreeMap<String, Item> = BTreeMap::new();
    for network in &networks {
        let layout = match network.component {
            "unet" => &spec.unet.layout,
            "vae" => &spec.vae.layout,
            name => match spec.text.iter().find(|t| t.role.component == name) {
                Some(tower) => &tower.component.layout,
                None => continue,
            },
        };
        known.extend(
            lay_out(network, layout)
                .into_iter()
                .map(|item| (item.name.clone(), item)),
        );
    }
    for item in items {
        if let Some(found) = known.remove(&item.name)
            && item.role == Role::Weight
            && found.elements() == item.elements()
            && item.pieces.iter().all(|piece| piece.weight.is_none())
        {
            item.pieces = found.pieces;
        }
    }
    Ok(())
}

/// All tensors of a file under their own names.
fn as_they_are(tensors: &Arc<TensorSet>) -> Vec<Item> {
    let source = Arc::new(CheckpointSource::new(
        Arc::clone(tensors),
        Layout::identity(""),
    ));
    let item = |name: &str| {
        let info = tensors.info(name)?;
        Some(Item::as_it_is(
            &source,
            name,
            &info.shape,
            role(name, info.dtype),
        ))
    };
    tensors.names().filter_map(item).collect()
}

/// A network's weights where `layout` puts them: parts of fused tensors together.
fn lay_out(network: &Network, layout: &Layout) -> Vec<Item> {
    let mut fused: BTreeMap<String, BTreeMap<usize, Piece>> = BTreeMap::new();
    let mut parts: BTreeMap<String, Part> = BTreeMap::new();
    for (name, shape) in &network.weights {
        let Some(part) = layout.place(name) else {
            continue;
        };
        let piece = Piece {
            source: Arc::clone(&network.source),
            name: name.clone(),
            shape: shape.clone(),
            flipped: part.transposed,
            weight: Some(WeightName {
                component: network.component,
                name: name.clone(),
            }),
        };
        let index = part.rows.map_or(0, |rows| rows.index);
        fused
            .entry(part.stored.clone())
            .or_default()
            .insert(index, piece);
        parts.insert(part.stored.clone(), part);
    }
    let item = |(name, pieces): (String, BTreeMap<usize, Piece>)| {
        let part = parts.get(&name)?;
        let pieces: Vec<Piece> = pieces.into_values().collect();
        Some(Item {
            shape: shape_there(part, &pieces),
            block: name.clone(),
            name,
            pieces,
            constant: None,
            role: Role::Weight,
        })
    };
    fused.into_iter().filter_map(item).collect()
}

/// The shape of a tensor of these pieces at `part`.
fn shape_there(part: &Part, pieces: &[Piece]) -> Vec<usize> {
    let Some(first) = pieces.first() else {
        return Vec::new();
    };
    let mut shape = first.shape.clone();
    let stored = first.source.stored(&first.name);
    if part.rows.is_some() {
        let rows = pieces.iter().filter_map(|piece| piece.shape.first());
        if let Some(first) = shape.first_mut() {
            *first = rows.sum();
        }
        return shape;
    }
    if part.transposed {
        shape.reverse();
        return shape;
    }
    if part.convolution && shape.len() == 2 {
        shape.extend([1, 1]);
        return shape;
    }
    // a linear layer of ours may be a 1×1 convolution in either form of file, which stays what it is
    match stored {
        Some(stored) => {
            let plain = stored.part.rows.is_none() && !stored.part.transposed;
            match plain && !stored.part.convolution {
                true => stored.info.shape.clone(),
                false => shape,
            }
        }
        None => shape,
    }
}

/// The layer behind the last: a copy of the last, as trainers write it, since whoever reads the file leaves it out.
fn repeat_last_layer(network: &Network, layout: &Layout) -> Vec<Item> {
    const LAYERS: &str = "encoder.layers.";
    let number = |name: &str| -> Option<usize> {
        name.strip_prefix(LAYERS)?.split_once('.')?.0.parse().ok()
    };
    let names = network.weights.iter();
    let Some(last) = names.filter_map(|(name, _)| number(name)).max() else {
        return Vec::new();
    };
    let prefix = format!("{LAYERS}{last}.");
    let next = format!("{LAYERS}{}.", last + 1);
    let mut copies = Network {
        component: network.component,
        source: Arc::clone(&network.source),
        weights: Vec::new(),
    };
    let of_last = network
        .weights
        .iter()
        .filter(|(name, _)| name.starts_with(&prefix));
    copies.weights = of_last
        .map(|(name, shape)| (name.replace(&prefix, &next), shape.clone()))
        .collect();
    let mut items = lay_out(&copies, layout);
    for item in &mut items {
        item.role = Role::Spare;
        for piece in &mut item.pieces {
            piece.name = piece.name.replace(&next, &prefix);
            piece.weight = None;
        }
    }
    items
}
