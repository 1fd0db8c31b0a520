//! Writes GGUF files as stable-diffusion.cpp and ComfyUI-GGUF read them; see `checkpoint/gguf.rs` for the format.

use std::collections::BTreeMap;

use safetensors::Dtype;

use super::item::refuse;
use super::task::Task;
use super::{Change, Watch};
use crate::checkpoint::{BlockType, Family, TensorType};
use crate::error::{Error, Result};
use crate::output::NewFile;

/// Where each tensor's bytes begin: at multiples of this.
const ALIGNMENT: usize = 32;
/// The most dimensions of a tensor.
const MAX_RANK: usize = 4;
/// The longest name of a tensor that both programs read, in bytes.
const MAX_NAME: usize = 127;

/// What a GGUF file says besides its tensors.
pub(super) struct Keys {
    /// `general.architecture`.
    pub(super) architecture: &'static str,
    /// `general.file_type`, ggml's number of the type that most weights have.
    pub(super) file_type: u32,
    /// Everything else, as texts.
    pub(super) texts: BTreeMap<String, String>,
}

/// What ComfyUI-GGUF calls a family: it goes by the tensors' shapes and wants to know only of what kind the network is.
pub(super) fn architecture(family: Family) -> &'static str {
    match family {
        Family::Sd1 | Family::Sd2 => "sd1",
        Family::Sdxl | Family::SdxlRefiner | Family::Ssd1b | Family::Vega | Family::Koala => "sdxl",
        Family::Sd3 | Family::Sd35 => "sd3",
        Family::Flux1 | Family::Chroma => "flux",
        other => other.id(),
    }
}

/// ggml's number of a file whose weights are mostly of this type (`enum llama_ftype`).
pub(super) fn file_type(weights: TensorType) -> u32 {
    match weights {
        TensorType::Plain(Dtype::F16) => 1,
        TensorType::Plain(Dtype::BF16) => 32,
        TensorType::Plain(_) => 0,
        TensorType::Block(block) => match block {
            BlockType::Q4_0 => 2,
            BlockType::Q4_1 => 3,
            BlockType::Q8_0 => 7,
            BlockType::Q5_0 => 8,
            BlockType::Q5_1 => 9,
            BlockType::Q2K => 10,
            BlockType::Q3K => 11,
            BlockType::Q4K => 14,
            BlockType::Q5K => 16,
            BlockType::Q6K => 18,
        },
    }
}

/// ggml's number of a type (`enum ggml_type`).
pub(super) fn number(dtype: TensorType) -> Option<u32> {
    Some(match dtype {
        TensorType::Plain(dtype) => match dtype {
            Dtype::F32 => 0,
            Dtype::F16 => 1,
            Dtype::I8 => 24,
            Dtype::I16 => 25,
            Dtype::I32 => 26,
            Dtype::I64 => 27,
            Dtype::F64 => 28,
            Dtype::BF16 => 30,
            _ => return None,
        },
        TensorType::Block(block) => match block {
            BlockType::Q4_0 => 2,
            BlockType::Q4_1 => 3,
            BlockType::Q5_0 => 6,
            BlockType::Q5_1 => 7,
            BlockType::Q8_0 => 8,
            BlockType::Q2K => 10,
            BlockType::Q3K => 11,
            BlockType::Q4K => 12,
            BlockType::Q5K => 13,
            BlockType::Q6K => 14,
        },
    })
}

/// Writes `tasks`, sorted by name.
///
/// # Errors
/// Whatever stops it; then nothing is left behind.
pub(super) fn write(
    mut file: NewFile,
    mut tasks: Vec<Task>,
    keys: &Keys,
    (change, watch): (Option<&dyn Change>, &dyn Watch),
) -> Result<()> {
    tasks.sort_by(|a, b| a.item.name.cmp(&b.item.name));
    let mut head = Vec::new();
    head.extend(b"GGUF");
    head.extend(3u32.to_le_bytes());
    head.extend((tasks.len() as u64).to_le_bytes());
    head.extend((keys.texts.len() as u64 + 3).to_le_bytes());
    text_key(&mut head, "general.architecture", keys.architecture);
    number_key(&mut head, "general.quantization_version", 2);
    number_key(&mut head, "general.file_type", keys.file_type);
    for (key, value) in &keys.texts {
        text_key(&mut head, key, value);
    }
    let mut offset: usize = 0;
    for task in &tasks {
        describe(&mut head, task, offset)?;
        let too_large = || refuse(&task.item.name, "makes the file too large");
        let end = offset.checked_add(task.size()?).ok_or_else(too_large)?;
        offset = end
            .checked_next_multiple_of(ALIGNMENT)
            .ok_or_else(too_large)?;
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
    file.write(&head)?;
    for task in &tasks {
        let mut written: usize = 0;
        task.write(change, &mut |bytes| {
            if watch.stopped() {
                return Err(Error::Interrupted);
            }
            file.write(bytes)?;
            written += bytes.len();
            watch.written(bytes.len() as u64);
            Ok(())
        })?;
        let size = task.size()?;
        if written != size {
            return Err(refuse(
                &task.item.name,
                format!("has {written} bytes, expected {size}; its file has changed or is damaged"),
            ));
        }
        let padding = size.next_multiple_of(ALIGNMENT) - size;
        file.write(&vec![0; padding])?;
    }
    file.finish()
}

fn describe(head: &mut Vec<u8>, task: &Task, offset: usize) -> Result<()> {
    let Task { item, target, .. } = task;
    if item.shape.len() > MAX_RANK {
        return Err(refuse(
            &item.name,
            format!(
                "has {} dimensions, and {MAX_RANK} is the limit of GGUF",
                item.shape.len()
            ),
        ));
    }
    if item.name.len() > MAX_NAME {
        return Err(refuse(
            &item.name,
            format!("has a name of {} bytes, too long for GGUF", item.name.len()),
        ));
    }
    let Some(number) = number(*target) else {
        return Err(refuse(
            &item.name,
            format!("is of type {target}, which GGUF does not have; choose --dtype f16"),
        ));
    };
    text(head, &item.name);
    head.extend((item.shape.len() as u32).to_le_bytes());
    for &dim in item.shape.iter().rev() {
        head.extend((dim as u64).to_le_bytes());
    }
    head.extend(number.to_le_bytes());
    head.extend((offset as u64).to_le_bytes());
    Ok(())
}

fn text(head: &mut Vec<u8>, text: &str) {
    head.extend((text.len() as u64).to_le_bytes());
    head.extend(text.as_bytes());
}

fn text_key(head: &mut Vec<u8>, key: &str, value: &str) {
    text(head, key);
    head.extend(8u32.to_le_bytes());
    text(head, value);
}

fn number_key(head: &mut Vec<u8>, key: &str, value: u32) {
    text(head, key);
    head.extend(4u32.to_le_bytes());
    head.extend(value.to_le_bytes());
}
