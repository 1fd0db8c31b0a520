//! The header of a safetensors file, read strictly: whatever passes describes every byte of the file exactly once.
//!
//! The format: eight bytes, little endian, give the header's length; the header is a JSON object from tensor names to `dtype`, `shape` and
//! `data_offsets` (from the end of the header), with an optional object `__metadata__` of texts; then the data, without gaps.
//! <https://github.com/huggingface/safetensors/blob/v0.8.0/README.md>. Stricter than the `safetensors` crate: a name may not come twice,
//! ranks and dimensions are bounded, an empty header is refused. Every number is checked against the real size of the file.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use safetensors::tensor::TensorInfo as Entry;
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::printable::{printable, printable_to};
use super::tensor_info::{TensorInfo, check_shape};

/// Bytes in front of the header: its length.
pub(super) const PREFIX: usize = 8;
/// The longest header, in bytes: the format's own limit.
pub(super) const MAX_HEADER: u64 = 100_000_000;
/// The most tensors in a file; the largest models have a few thousand.
pub(super) const MAX_TENSORS: usize = 100_000;
/// A header that was found good, of whatever container.
#[derive(Debug)]
pub(super) struct Header {
    /// The tensors in the order of their bytes.
    pub(super) tensors: Vec<TensorInfo>,
    /// The texts of `__metadata__`.
    pub(super) metadata: BTreeMap<String, String>,
}

/// The length of the header of a file of `file_size` bytes that begins with `prefix`, found possible before anything is allocated.
pub(super) fn header_length(prefix: [u8; PREFIX], file_size: u64) -> Result<usize, String> {
    let length = u64::from_le_bytes(prefix);
    let room = file_size.saturating_sub(PREFIX as u64);
    if length == 0 {
        return Err("not a safetensors file, or a download that was never filled: its header length is 0; download it again".to_owned());
    }
    if length > MAX_HEADER {
        return Err(format!(
            "not a safetensors file: its first 8 bytes would mean a header of {length} bytes, and {MAX_HEADER} is the limit; \
             download it again, or give a .safetensors file"
        ));
    }
    if length > room {
        return Err(format!(
            "the header should be {length} bytes, and the file of {file_size} bytes has only {room} after the first 8; \
             the download is incomplete, or this is not a safetensors file: download it again"
        ));
    }
    usize::try_from(length)
        .map_err(|_| format!("the header of {length} bytes does not fit in memory"))
}

/// Reads the header's text of a file of `file_size` bytes.
pub(super) fn parse(text: &[u8], file_size: u64) -> Result<Header, String> {
    let text = std::str::from_utf8(text).map_err(|e| {
        format!("the header is not valid UTF-8 (at byte {}), so the file is damaged or not safetensors; download it again", e.valid_up_to())
    })?;
    if !text.trim_start().starts_with('{') {
        return Err("the header is not a JSON object, so this is not a safetensors file or a damaged one; download it again".to_owned());
    }
    let raw: RawHeader = serde_json::from_str(text).map_err(|e| {
        format!(
            "the header is wrong: {}; the file is damaged or not safetensors: download it again",
            printable_to(&e.to_string(), 300)
        )
    })?;
    let data_start = PREFIX + text.len();
    let mut tensors = raw
        .tensors
        .into_iter()
        .map(|(name, entry)| check_tensor(name, entry, data_start))
        .collect::<Result<Vec<_>, _>>()?;
    if tensors.is_empty() {
        return Err("the file holds no tensors".to_owned());
    }
    tensors.sort_by_key(|info| (info.range.start, info.range.end));
    check_cover(&tensors, data_start, file_size)?;
    Ok(Header {
        tensors,
        metadata: raw.metadata,
    })
}

/// One tensor by itself: its rank, dimensions, size and offsets.
fn check_tensor(name: String, entry: Entry, data_start: usize) -> Result<TensorInfo, String> {
    let shown = printable(&name);
    check_shape(&shown, &entry.shape)?;
    let (start, end) = entry.data_offsets;
    if end < start {
        return Err(format!(
            "tensor `{shown}` ends before it begins (offsets {start} to {end})"
        ));
    }
    let bits = entry.dtype.bitsize() * entry.shape.iter().product::<usize>();
    if !bits.is_multiple_of(8) {
        return Err(format!("tensor `{shown}` does not end on a whole byte"));
    }
    if end - start != bits / 8 {
        return Err(format!(
            "tensor `{shown}` of shape {:?} and type {} needs {} bytes, and the header gives it {}",
            entry.shape,
            entry.dtype,
            bits / 8,
            end - start
        ));
    }
    let range = match (data_start.checked_add(start), data_start.checked_add(end)) {
        (Some(start), Some(end)) => start..end,
        _ => {
            return Err(format!(
                "tensor `{shown}` lies beyond any file (offsets {start} to {end})"
            ));
        }
    };
    Ok(TensorInfo {
        name,
        dtype: entry.dtype.into(),
        shape: entry.shape,
        range,
        strides: None,
    })
}

/// All tensors together: from the end of the header to the end of the file, each beginning where the last one ended.
fn check_cover(tensors: &[TensorInfo], data_start: usize, file_size: u64) -> Result<(), String> {
    let mut position = data_start;
    let mut previous: Option<&TensorInfo> = None;
    for info in tensors {
        let start = info.range.start;
        let shown = printable(&info.name);
        if start > position {
            let gap = start - position;
            return Err(format!(
                "{gap} bytes in front of tensor `{shown}` belong to no tensor"
            ));
        }
        if start < position {
            let before = previous.map_or_else(String::new, |info| printable(&info.name));
            return Err(format!("tensors `{before}` and `{shown}` overlap"));
        }
        position = info.range.end;
        previous = Some(info);
    }
    let described = position as u64;
    if file_size < described {
        return Err(format!(
            "the file is {file_size} bytes, and its header describes {described}; the download is incomplete: download it again"
        ));
    }
    if file_size > described {
        let extra = file_size - described;
        return Err(format!(
            "the file is {file_size} bytes, and its header describes {described}: the last {extra} bytes belong to no tensor, so it was \
             damaged or changed after it was written; download it again"
        ));
    }
    Ok(())
}

/// The header as it stands, names still in the file's order and known to be different.
struct RawHeader {
    tensors: Vec<(String, Entry)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Sees each entry as it is written; a map would silently keep the last of two equal names.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut tensors = Vec::new();
        let mut metadata: Option<BTreeMap<String, String>> = None;
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if metadata.is_some() {
                    return Err(A::Error::custom("`__metadata__` is there twice"));
                }
                let texts = map.next_value::<Option<BTreeMap<String, String>>>();
                let texts =
                    texts.map_err(|e| A::Error::custom(format!("in `__metadata__`: {e}")))?;
                metadata = Some(texts.unwrap_or_default());
                continue;
            }
            if tensors.len() >= MAX_TENSORS {
                return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
            }
            if !names.insert(name.clone()) {
                map.next_value::<IgnoredAny>()?;
                return Err(A::Error::custom(format!(
                    "duplicate tensor `{}`",
                    printable(&name)
                )));
            }
            let entry = map
                .next_value::<Entry>()
                .map_err(|e| A::Error::custom(format!("tensor `{}`: {e}", printable(&name))))?;
            tensors.push((name, entry));
        }
        Ok(RawHeader {
            tensors,
            metadata: metadata.unwrap_or_default(),
        })
    }
}
