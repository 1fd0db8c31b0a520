//! The text towers of a model: its own, or those of other files, which are told apart by what they hold.

use std::sync::Arc;

use super::table::{Row, Spelling, T5Role};
use super::{Component, TextTower, TowerRole, folder_component};
use crate::checkpoint::{Checkpoint, TensorSet};
use crate::error::{Error, Result};
use crate::weights::t5 as t5_names;
use crate::weights::text_tower::{self, OpenClip, POSITIONS, PROJECTION, at};
use sd_models::{clip, t5};

/// The text side of a model.
pub(super) struct Text {
    /// CLIP towers, in the family's order.
    pub(super) towers: Vec<TextTower>,
    /// T5, where there is one.
    pub(super) t5: Option<T5Tower>,
    /// Names of the components that other files gave.
    pub(super) others: Vec<&'static str>,
}

/// T5 and how it is read.
pub struct T5Tower {
    /// Structure and tensors.
    pub component: Component<t5::Config>,
    /// What the family does with it.
    pub role: T5Role,
}

/// The components that other files hold, without which the checkpoint's own are missed.
pub(super) fn given(row: &Row, files: &[Checkpoint]) -> Result<Vec<&'static str>> {
    let sorted = sort(row, files)?;
    let clip = row.towers.iter().zip(&sorted.clip);
    let mut names: Vec<_> = clip
        .filter_map(|(role, file)| file.as_ref().map(|_| role.component))
        .collect();
    if let (Some(role), Some(_)) = (row.t5, &sorted.t5) {
        names.push(role.component);
    }
    Ok(names)
}

/// Reads every tower that `row` asks for.
pub(super) fn read(checkpoint: &Checkpoint, row: &Row, files: &[Checkpoint]) -> Result<Text> {
    let sorted = sort(row, files)?;
    let mut others = Vec::new();
    let mut towers = Vec::with_capacity(row.towers.len());
    for (role, file) in row.towers.iter().zip(sorted.clip) {
        let component = match file {
            Some(found) => {
                others.push(role.component);
                found.clip(role)?
            }
            None if checkpoint.is_folder() => folder_clip(checkpoint, *role)?,
            None => single_clip(checkpoint, role)?,
        };
        let role = *role;
        towers.push(TextTower { component, role });
    }
    let t5 = match (row.t5, sorted.t5) {
        (None, _) => None,
        (Some(role), Some(found)) => {
            others.push(role.component);
            let component = found.t5()?;
            Some(T5Tower { component, role })
        }
        (Some(role), None) => {
            own_t5(checkpoint, role)?.map(|component| T5Tower { component, role })
        }
    };
    Ok(Text { towers, t5, others })
}

/// Other files by the towers that they hold.
struct Sorted<'a> {
    /// One place a role.
    clip: Vec<Option<Found<'a>>>,
    t5: Option<Found<'a>>,
}

/// A tower in a file of its own.
#[derive(Clone)]
struct Found<'a> {
    file: &'a Checkpoint,
    tensors: Arc<TensorSet>,
    prefix: String,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Transformers,
    OpenClip,
    T5,
}

/// The ends of names by which a tower and its place are known.
const SIGNS: [(&str, Kind); 5] = [
    (
        "text_model.embeddings.token_embedding.weight",
        Kind::Transformers,
    ),
    ("embeddings.token_embedding.weight", Kind::Transformers),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", Kind::T5),
    ("enc.blk.0.attn_q.weight", Kind::T5),
    ("token_embedding.weight", Kind::OpenClip),
];

/// Which file is which tower: T5 by its names, CLIP towers by their widths, the family's order being that of growing width.
fn sort<'a>(row: &Row, files: &'a [Checkpoint]) -> Result<Sorted<'a>> {
    let mut sorted = Sorted {
        clip: vec![None; row.towers.len()],
        t5: None,
    };
    let mut clip = Vec::new();
    for file in files {
        let found = find(file)?;
        if found.kind != Kind::T5 {
            clip.push((found.width()?, found));
        } else if row.t5.is_none() {
            return Err(superfluous(
                file,
                "T5, which models of this family do not have",
            ));
        } else if sorted.t5.replace(found).is_some() {
            return Err(superfluous(file, "a second T5"));
        }
    }
    clip.sort_by_key(|(width, _)| *width);
    if let Some((_, last)) = clip.get(row.towers.len()) {
        return Err(superfluous(
            last.file,
            "one CLIP more than models of this family have",
        ));
    }
    // fewer files than towers: the narrow one is the first, a wide one the last
    let wide = |width: usize| width > WIDEST_FIRST;
    for (width, found) in clip {
        let free = |place: &Option<Found<'_>>| place.is_none();
        let place = if wide(width) {
            sorted.clip.iter().rposition(free)
        } else {
            sorted.clip.iter().position(free)
        };
        if let Some(place) = place.and_then(|place| sorted.clip.get_mut(place)) {
            *place = Some(found);
        }
    }
    Ok(sorted)
}

/// CLIP-L is 768 wide, OpenCLIP-G 1280.
const WIDEST_FIRST: usize = 1024;

fn superfluous(file: &Checkpoint, what: &str) -> Error {
    Error::bad_model(
        file.path(),
        format!("--text-encoder gives {what}; leave it out"),
    )
}

fn find(file: &Checkpoint) -> Result<Found<'_>> {
    let tensors = match file.single() {
        Some(tensors) => tensors,
        None => file.require("text_encoder")?,
    };
    for (sign, kind) in SIGNS {
        let name = tensors.names().find(|name| name.ends_with(sign));
        let Some(place) = name.and_then(|name| name.strip_suffix(sign)) else {
            continue;
        };
        let prefix = place.trim_end_matches('.').to_owned();
        return Ok(Found {
            file,
            tensors,
            prefix,
            kind,
        });
    }
    Err(Error::bad_model(
        file.path(),
        "the file holds neither CLIP nor T5; give a text encoder with --text-encoder",
    ))
}

impl Found<'_> {
    fn shapes(&self) -> impl Fn(&str) -> Option<Vec<usize>> + '_ {
        |name| self.tensors.info(name).map(|info| info.shape.clone())
    }

    fn width(&self) -> Result<usize> {
        let names = [
            "embeddings.token_embedding.weight",
            "text_model.embeddings.token_embedding.weight",
            "token_embedding.weight",
        ];
        let shape = names
            .iter()
            .find_map(|name| self.tensors.shape(&at(&self.prefix, name)));
        match shape {
            Some(&[_, width]) => Ok(width),
            _ => Err(Error::bad_model(
                self.file.path(),
                "its table of tokens has an unexpected rank",
            )),
        }
    }

    fn clip(&self, role: &TowerRole) -> Result<Component<clip::Config>> {
        let shapes = self.shapes();
        let read = match (self.kind, self.file.config("text_encoder")) {
            (Kind::OpenClip, _) => {
                let used = match role.spelling {
                    Spelling::OpenClip(used) => used,
                    Spelling::Transformers(_) => OpenClip::Whole,
                };
                text_tower::read_open_clip(&self.prefix, used, &shapes)
            }
            _ => text_tower::read_transformers(&self.prefix, role.transformers(), &shapes),
        };
        let (config, layout) = read.map_err(|e| Error::bad_model(self.file.path(), e))?;
        Ok(Component::new(config, &self.tensors, layout))
    }

    fn t5(&self) -> Result<Component<t5::Config>> {
        let (config, layout) = t5_names::read(&self.prefix, &self.shapes())
            .map_err(|e| Error::bad_model(self.file.path(), e))?;
        Ok(Component::new(config, &self.tensors, layout))
    }
}

impl TowerRole {
    /// What transformers' spelling does not tell: the activation, and whether the projection is used.
    pub(super) fn transformers(&self) -> (text_tower::Activation, bool) {
        match self.spelling {
            Spelling::Transformers(activation) => (activation, self.projects),
            Spelling::OpenClip(_) => (text_tower::Activation::Gelu, self.projects),
        }
    }
}

fn single_clip(checkpoint: &Checkpoint, role: &TowerRole) -> Result<Component<clip::Config>> {
    let tensors = single(checkpoint)?;
    let shapes = |name: &str| tensors.info(name).map(|info| info.shape.clone());
    let (config, layout) = super::single::read_tower(role, &shapes)
        .map_err(|e| Error::bad_model(checkpoint.path(), e))?;
    Ok(Component::new(config, &tensors, layout))
}

fn single(checkpoint: &Checkpoint) -> Result<Arc<TensorSet>> {
    checkpoint
        .single()
        .ok_or_else(|| Error::bad_model(checkpoint.path(), "the file holds no tensors"))
}

/// The checkpoint's own T5; none where it has none and need not have one.
fn own_t5(checkpoint: &Checkpoint, role: T5Role) -> Result<Option<Component<t5::Config>>> {
    if checkpoint.is_folder() {
        if role.optional && checkpoint.tensors(role.component).is_none() {
            return Ok(None);
        }
        let mut component = folder_component(checkpoint, role.component, t5::Config::from_json)?;
        // the table of tokens has two names, and folders either or both
        let (_, layout) = t5_names::read("", &|name: &str| {
            component.tensors.info(name).map(|info| info.shape.clone())
        })
        .map_err(|e| Error::bad_model(checkpoint.path().join(role.component), e))?;
        component.layout = layout;
        return Ok(Some(component));
    }
    let tensors = single(checkpoint)?;
    if role.optional && tensors.names_below(role.prefix).next().is_none() {
        return Ok(None);
    }
    let shapes = |name: &str| tensors.info(name).map(|info| info.shape.clone());
    let (config, layout) =
        t5_names::read(role.prefix, &shapes).map_err(|e| Error::bad_model(checkpoint.path(), e))?;
    Ok(Some(Component::new(config, &tensors, layout)))
}

/// A folder's CLIP tower, in either of transformers' spellings.
fn folder_clip(checkpoint: &Checkpoint, role: TowerRole) -> Result<Component<clip::Config>> {
    let mut component = folder_component(checkpoint, role.component, clip::Config::from_json)?;
    let layout = &mut component.layout;
    let nested = "text_model.embeddings.token_embedding.weight";
    if component.tensors.info(nested).is_some() {
        *layout = text_tower::transformers_layout("");
    }
    for name in [
        "text_model.embeddings.position_ids",
        "embeddings.position_ids",
    ] {
        layout.ignore(name, POSITIONS);
    }
    for name in ["text_projection", "logit_scale"] {
        layout.ignore(name, PROJECTION);
    }
    let config = &mut component.config;
    if role.pooled && !role.states {
        config.projection = None;
    } else if let Some(&[output, _]) = component.tensors.shape("text_projection.weight")
        && !role.norm
    {
        // a config without a class: the layer itself tells
        config.projection.get_or_insert(output);
    }
    Ok(component)
}
