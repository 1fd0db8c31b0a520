//! Which type each tensor gets in the output, and what is mixed into it.

use std::collections::BTreeMap;

use safetensors::Dtype as Plain;

use super::encode::can_encode;
use super::item::{Item, Role};
use super::merge::{Form, Partners};
use super::target::Target;
use super::task::Task;
use super::{Dtype, Request, Watch, gguf};
use crate::checkpoint::{BlockType, TensorType, leftover};
use crate::error::Result;

/// Matrices of fewer numbers stay as they are (ComfyUI-GGUF's limit).
const SMALL: usize = 1024;
/// Parts of names of layers that every step depends on and that cost next to nothing: stable-diffusion.cpp and ComfyUI-GGUF leave them.
const PRECISE: [&str; 22] = [
    "time_embed.",
    "label_emb.",
    "time_embedding.",
    "add_embedding.",
    "class_embedding.",
    "img_in.",
    "txt_in.",
    "time_in.",
    "vector_in.",
    "guidance_in.",
    "final_layer.",
    "x_embedder.",
    "t_embedder.",
    "y_embedder.",
    "pos_embed",
    "context_embedder.",
    "positional_embedding",
    "position_embedding",
    "token_embedding",
    "first_stage_model.",
    "edm_",
    "model_ema.",
];

/// What each of `items` becomes.
///
/// # Errors
/// When models that are to be merged differ.
pub(super) fn tasks(
    request: &Request<'_>,
    target: Target,
    items: Vec<Item>,
    watch: &dyn Watch,
) -> Result<Vec<Task>> {
    let form = match target {
        Target::Folder => Form::Folder,
        _ => Form::Single,
    };
    let own: Vec<&Item> = items.iter().collect();
    let mut partners = match &request.merge {
        Some(merge) => Some(Partners::new(merge, form, &own)?),
        None => None,
    };
    let as_it_is = request.dtype == Dtype::Keep
        && request.quantise.is_none()
        && request.merge.is_none()
        && request.change.is_none()
        && target == Target::SafeTensors;
    let mut left_out: BTreeMap<&'static str, usize> = BTreeMap::new();
    let mut tasks = Vec::new();
    for item in items {
        if let Some(what) = left_out_as(&item, target, as_it_is) {
            *left_out.entry(what).or_default() += 1;
            continue;
        }
        let mix = match &mut partners {
            Some(partners) => partners.of(&item)?,
            None => None,
        };
        let stored = item.stored_type();
        let kept = as_it_is
            .then_some(stored)
            .flatten()
            .filter(|t| matches!(t, TensorType::Plain(_)));
        let plain = item.plain_type().map(TensorType::Plain);
        let target = match kept {
            Some(kept) => kept,
            None => target_type(request, target, &item),
        };
        let whole_blocks = stored == Some(target) && is_whole(&item, target);
        let copied = kept.is_some()
            || plain == Some(target)
            || (whole_blocks && matches!(target, TensorType::Block(_)));
        tasks.push(Task {
            item,
            target,
            mix,
            copied,
        });
    }
    for (what, count) in left_out {
        watch.note(&format!("left out: {count} {what}"));
    }
    Ok(tasks)
}

/// What an item is that the output has no use for.
fn left_out_as(item: &Item, target: Target, as_it_is: bool) -> Option<&'static str> {
    const BESIDE: &str = "tensors that only say how 8-bit weights are kept";
    if as_it_is {
        return None;
    }
    let beside = leftover(&item.name).filter(|what| *what == BESIDE);
    if beside.is_some() {
        return beside;
    }
    if target != Target::Gguf {
        return None;
    }
    if item.role == Role::Spare && item.name.starts_with("model_ema.") {
        return leftover(&item.name);
    }
    let unknown = !item.is_float()
        && item
            .stored_type()
            .is_some_and(|t| gguf::number(t).is_none());
    unknown.then_some("tensors of types that GGUF does not have")
}

/// The type of an item in the output.
fn target_type(request: &Request<'_>, target: Target, item: &Item) -> TensorType {
    let stored = item.stored_type();
    if !item.is_float() {
        return stored.unwrap_or(TensorType::Plain(Plain::F32));
    }
    let plain = item
        .plain_type()
        .map(TensorType::Plain)
        .filter(|t| can_encode(*t));
    let natural = TensorType::Plain(item.natural_type());
    let kept = match stored {
        Some(block @ TensorType::Block(_))
            if target == Target::Gguf && is_whole(item, block) && request.merge.is_none() =>
        {
            block
        }
        // 8-bit floats stay what they are where the output has them
        Some(eight @ TensorType::Plain(_))
            if item.plain_type().is_some() && target != Target::Gguf && request.merge.is_none() =>
        {
            eight
        }
        _ => plain.unwrap_or(natural),
    };
    if item.role == Role::Aside {
        return plain.unwrap_or(kept);
    }
    let wanted = match request.dtype {
        Dtype::Keep => kept,
        Dtype::F32 => TensorType::Plain(Plain::F32),
        Dtype::F16 => TensorType::Plain(Plain::F16),
        Dtype::Bf16 => TensorType::Plain(Plain::BF16),
    };
    match request.quantise.map(|block| fitting(item, block)) {
        Some(block) if is_quantised(item, block) => TensorType::Block(block),
        // blocks of another kind do not stay beside those that were asked for
        Some(_) if matches!(wanted, TensorType::Block(_)) => plain.unwrap_or(natural),
        _ => wanted,
    }
}

/// The block type for an item: where rows are no whole blocks of 256, llama.cpp takes these in the place of the K types.
fn fitting(item: &Item, block: BlockType) -> BlockType {
    if is_whole(item, TensorType::Block(block)) {
        return block;
    }
    match block {
        BlockType::Q4K => BlockType::Q5_0,
        BlockType::Q5K => BlockType::Q5_1,
        BlockType::Q6K => BlockType::Q8_0,
        other => other,
    }
}

/// Whether an item ends every row on a whole block.
fn is_whole(item: &Item, dtype: TensorType) -> bool {
    match dtype {
        TensorType::Block(block) => item
            .shape
            .last()
            .is_some_and(|n| n.is_multiple_of(block.elements())),
        TensorType::Plain(_) => true,
    }
}

/// Whether an item's weights are quantised: large matrices, but for those that everything depends on.
fn is_quantised(item: &Item, block: BlockType) -> bool {
    item.role == Role::Weight
        && item.shape.len() > 1
        && item.elements() > SMALL
        && is_whole(item, TensorType::Block(block))
        && !item.name.ends_with(".bias")
        && !PRECISE.iter().any(|part| item.name.contains(part))
}

/// Bytes of all tensors.
///
/// # Errors
/// When a tensor does not end on a whole block.
pub(super) fn bytes(tasks: &[Task]) -> Result<u64> {
    tasks.iter().try_fold(
        0u64,
        |sum, task| Ok(sum.saturating_add(task.size()? as u64)),
    )
}

/// The type that most bytes of weights have.
pub(super) fn most(tasks: &[Task]) -> TensorType {
    let mut counts: Vec<(TensorType, usize)> = Vec::new();
    for task in tasks.iter().filter(|task| task.item.shape.len() > 1) {
        match counts.iter_mut().find(|(dtype, _)| *dtype == task.target) {
            Some((_, count)) => *count += task.item.elements(),
            None => counts.push((task.target, task.item.elements())),
        }
    }
    let quantised = counts
        .iter()
        .filter(|(dtype, _)| matches!(dtype, TensorType::Block(_)));
    let most = quantised
        .max_by_key(|(_, count)| *count)
        .or_else(|| counts.iter().max_by_key(|(_, count)| *count));
    most.map_or(TensorType::Plain(Plain::F32), |(dtype, _)| *dtype)
}
