//! Writes safetensors files: the same tensors give the same bytes. The widest types come first, so that every tensor is aligned, and names are
//! sorted within a type.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::item::refuse;
use super::task::Task;
use super::{Change, Watch};
use crate::checkpoint::TensorType;
use crate::error::{Error, Result};
use crate::output::NewFile;

/// The key that holds the hash of all bytes behind the header, by ModelSpec.
pub(super) const HASH: &str = "modelspec.hash_sha256";
/// The header ends on a multiple of this.
const ALIGNMENT: usize = 8;
/// The longest header that readers take.
const MAX_HEADER: usize = 100_000_000;

/// Writes `tasks` to `path`. Where the metadata hold [`HASH`], its value is put in.
///
/// # Errors
/// Whatever stops it; then nothing is left behind.
pub(super) fn write(
    mut file: NewFile,
    path: &Path,
    mut tasks: Vec<Task>,
    metadata: &BTreeMap<String, String>,
    (change, watch): (Option<&dyn Change>, &dyn Watch),
) -> Result<()> {
    tasks.sort_by(|a, b| {
        let key = |task: &Task| std::cmp::Reverse(width(task));
        key(a)
            .cmp(&key(b))
            .then_with(|| a.item.name.cmp(&b.item.name))
    });
    let mut metadata = metadata.clone();
    if let Some(hash) = metadata.get_mut(HASH) {
        *hash = format!("0x{}", "0".repeat(64));
    }
    let header = header(&tasks, &metadata)?;
    if header.len() > MAX_HEADER {
        let reason = format!(
            "the header would be {} bytes, and {MAX_HEADER} is the limit",
            header.len()
        );
        return Err(Error::bad_model(path, reason));
    }
    file.write(&(header.len() as u64).to_le_bytes())?;
    file.write(header.as_bytes())?;
    let mut hasher = Sha256::new();
    for task in &tasks {
        let mut written = 0;
        task.write(change, &mut |bytes| {
            if watch.stopped() {
                return Err(Error::Interrupted);
            }
            hasher.update(bytes);
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
    }
    if let Some(hash) = metadata.get(HASH)
        && let Some(at) = header.find(&format!("\"{HASH}\":\"{hash}\""))
    {
        let digits: String = hasher
            .finalize()
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        let start = 8 + at + HASH.len() + 4 + 2;
        file.amend(start as u64, digits.as_bytes())?;
    }
    file.finish()
}

fn width(task: &Task) -> usize {
    match task.target {
        TensorType::Plain(dtype) => dtype.bitsize(),
        TensorType::Block(_) => 0,
    }
}

fn header(tasks: &[Task], metadata: &BTreeMap<String, String>) -> Result<String> {
    let mut object = Map::new();
    if !metadata.is_empty() {
        object.insert("__metadata__".to_owned(), json!(metadata));
    }
    let mut start: usize = 0;
    for task in tasks {
        let TensorType::Plain(dtype) = task.target else {
            return Err(refuse(
                &task.item.name,
                format!("cannot be {} in a safetensors file", task.target),
            ));
        };
        let too_large = || refuse(&task.item.name, "makes the file too large");
        let end = start.checked_add(task.size()?).ok_or_else(too_large)?;
        object.insert(
            task.item.name.clone(),
            json!({ "dtype": dtype_name(dtype), "shape": task.item.shape, "data_offsets": [start, end] }),
        );
        start = end;
    }
    let mut text = Value::Object(object).to_string();
    let length = text.len().next_multiple_of(ALIGNMENT);
    text.extend(std::iter::repeat_n(' ', length - text.len()));
    Ok(text)
}

/// The format's word for a type.
fn dtype_name(dtype: Dtype) -> Value {
    serde_json::to_value(dtype).unwrap_or_else(|_| json!(dtype.to_string()))
}
