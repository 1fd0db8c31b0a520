//! GGUF files, as stable-diffusion.cpp and ComfyUI-GGUF write them: numbers whole or in quantised blocks, in place.
//!
//! The format: `GGUF`, version, counts of tensors and keys, the keys with their values, the tensors' names, dimensions (innermost first),
//! types and offsets, then their data from the next multiple of the alignment on.
//! <https://github.com/ggml-org/ggml/blob/v0.9.4/docs/gguf.md>. Every count and length is checked against the file's size before memory is
//! taken.

use std::collections::{BTreeMap, HashMap, HashSet};

use safetensors::Dtype;

use super::header::{Header, MAX_TENSORS};
use super::input::{Bytes, Fault, Input, Outcome};
use super::printable::printable;
use super::tensor_info::{BlockType, TensorInfo, TensorType, check_shape};

/// The longest header, in bytes: vocabularies of language models take a few MB.
const MAX_HEADER: u64 = 100_000_000;
/// The most keys, and the longest key or name of a tensor, in bytes.
const MAX_KEYS: u64 = 100_000;
const MAX_NAME: u64 = 1024;
/// The longest text of a key that is kept, in bytes.
const MAX_TEXT: u64 = 64 << 10;
/// How deep arrays may lie in arrays.
const MAX_DEPTH: usize = 4;
/// The most dimensions of a tensor: ggml's own limit.
const MAX_RANK: u32 = 4;
/// What ComfyUI-GGUF keeps the shapes of tensors under that it has stored in other ones.
const ORIGINAL: &str = "comfy.gguf.orig_shape.";

/// What a file says besides its tensors.
#[derive(Default)]
struct Keys {
    texts: BTreeMap<String, String>,
    alignment: Option<u64>,
    /// Shapes by tensor.
    shapes: HashMap<String, Vec<usize>>,
}

/// The tensors of the file of `size` bytes.
pub(super) fn read(file: &mut dyn Bytes, size: u64) -> Outcome<Header> {
    let mut input = Input::new(file, 0, size.min(MAX_HEADER))?;
    input.skip(4)?;
    let version = input.array::<4>()?;
    check_version(version)?;
    let (tensors, keys) = (input.u64()?, input.u64()?);
    if tensors > MAX_TENSORS as u64 || keys > MAX_KEYS {
        return Err(Fault::Bad(format!(
            "the GGUF file should hold {tensors} tensors and {keys} keys, and {MAX_TENSORS} and {MAX_KEYS} are the limits; it is damaged: \
             download it again"
        )));
    }
    if tensors == 0 {
        return Err(Fault::Bad("the file holds no tensors".to_owned()));
    }
    let mut about = Keys::default();
    let mut seen = HashSet::new();
    for _ in 0..keys {
        let key = name(&mut input, "key")?;
        about.read(&mut input, &key)?;
        if !seen.insert(key.clone()) {
            let key = printable(&key);
            return Err(Fault::Bad(format!(
                "the GGUF file has the key `{key}` twice"
            )));
        }
    }
    seen.clear();
    let mut entries = Vec::new();
    for _ in 0..tensors {
        let entry = Entry::read(&mut input)?;
        if !seen.insert(entry.name.clone()) {
            let name = printable(&entry.name);
            return Err(Fault::Bad(format!("duplicate tensor `{name}`")));
        }
        entries.push(entry);
    }
    let alignment = about.alignment.unwrap_or(32);
    let data = input.position().checked_next_multiple_of(alignment);
    let data = data.filter(|&start| start <= size).ok_or(Fault::End)?;
    let tensors = entries.into_iter();
    let tensors = tensors.map(|entry| entry.place(&about, (data, alignment), size));
    let mut tensors = tensors.collect::<Result<Vec<_>, String>>()?;
    tensors.sort_by_key(|info| (info.range.start, info.range.end));
    check_overlaps(&tensors)?;
    Ok(Header {
        tensors,
        metadata: about.texts,
    })
}

fn check_version(version: [u8; 4]) -> Outcome<()> {
    let reason = match u32::from_le_bytes(version) {
        2 | 3 => return Ok(()),
        1 => "the GGUF file is of version 1, which was in use for a few days in 2023 and is not read; convert the model again".to_owned(),
        _ if matches!(u32::from_be_bytes(version), 1..=3) => {
            "the GGUF file was made for big-endian machines, which is not read; convert the model again".to_owned()
        }
        version => format!("the GGUF file is of version {version}, and 2 and 3 are read; use a newer sd-rs, or convert the model again"),
    };
    Err(Fault::Bad(reason))
}

fn name(input: &mut Input<'_>, what: &str) -> Outcome<String> {
    let length = input.u64()?;
    if length > MAX_NAME {
        return Err(Fault::Bad(format!(
            "the GGUF file has a {what} of {length} bytes, and {MAX_NAME} is the limit; it is damaged: download it again"
        )));
    }
    String::from_utf8(input.bytes(length)?).map_err(|_| {
        Fault::Bad(format!(
            "the GGUF file has a {what} that is not valid UTF-8; it is damaged: download it again"
        ))
    })
}

impl Keys {
    /// Reads the value of `key`, and keeps what is of use.
    fn read(&mut self, input: &mut Input<'_>, key: &str) -> Outcome<()> {
        let kind = input.u32()?;
        if let Some(tensor) = key.strip_prefix(ORIGINAL)
            && kind == 9
        {
            let shape = shape(input, key)?;
            self.shapes.insert(tensor.to_owned(), shape);
            return Ok(());
        }
        let text = value(input, key, kind, 0)?;
        if key == "general.alignment" {
            let alignment = text.as_deref().and_then(|text| text.parse::<u64>().ok());
            let fits = |n: &u64| n.is_power_of_two() && (8..=1 << 20).contains(n);
            self.alignment = Some(alignment.filter(fits).ok_or_else(|| {
                Fault::Bad(format!(
                    "the GGUF file has an alignment of {}, expected a power of two from 8 to 1048576; it is damaged: download it again",
                    text.as_deref().map_or_else(|| "no number".to_owned(), printable)
                ))
            })?);
        }
        if let Some(text) = text {
            self.texts.insert(key.to_owned(), text);
        }
        Ok(())
    }
}

/// Reads a value; gives what is to be shown of it: all but arrays and long texts.
fn value(input: &mut Input<'_>, key: &str, kind: u32, depth: usize) -> Outcome<Option<String>> {
    let text = match kind {
        0 => input.byte()?.to_string(),
        1 => input.byte()?.cast_signed().to_string(),
        2 => input.u16()?.to_string(),
        3 => input.u16()?.cast_signed().to_string(),
        4 => input.u32()?.to_string(),
        5 => input.u32()?.cast_signed().to_string(),
        6 => f32::from_bits(input.u32()?).to_string(),
        7 => (input.byte()? != 0).to_string(),
        8 => {
            let length = input.u64()?;
            if length > MAX_TEXT {
                input.skip(length)?;
                return Ok(None);
            }
            String::from_utf8_lossy(&input.bytes(length)?).into_owned()
        }
        9 if depth < MAX_DEPTH => {
            let (kind, count) = (input.u32()?, input.u64()?);
            // whatever they are, each takes a byte
            if count > input.left() {
                return Err(Fault::End);
            }
            match fixed_size(kind) {
                Some(size) => input.skip(count.checked_mul(size).ok_or(Fault::End)?)?,
                None => {
                    for _ in 0..count {
                        value(input, key, kind, depth + 1)?;
                    }
                }
            }
            return Ok(None);
        }
        10 => input.u64()?.to_string(),
        11 => input.u64()?.cast_signed().to_string(),
        12 => f64::from_bits(input.u64()?).to_string(),
        _ => {
            let key = printable(key);
            return Err(Fault::Bad(format!(
                "the GGUF file's key `{key}` is of the unknown type {kind}, or arrays lie deeper than {MAX_DEPTH}; it is damaged: download it again"
            )));
        }
    };
    Ok(Some(text))
}

/// Bytes of a value of a type, where all have as many.
fn fixed_size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// Reads an array of a few whole numbers.
fn shape(input: &mut Input<'_>, key: &str) -> Outcome<Vec<usize>> {
    let (kind, count) = (input.u32()?, input.u64()?);
    let mut shape = Vec::new();
    for _ in 0..count.min(8) {
        let dim = match kind {
            4 | 5 => u64::from(input.u32()?),
            10 | 11 => input.u64()?,
            _ => u64::MAX,
        };
        shape.push(usize::try_from(dim).unwrap_or(usize::MAX));
    }
    match count {
        0..=8 if !shape.contains(&usize::MAX) => Ok(shape),
        _ => Err(Fault::Bad(format!(
            "the GGUF file's key `{}` is no shape; it is damaged: download it again",
            printable(key)
        ))),
    }
}

/// What the file says of one tensor.
struct Entry {
    name: String,
    /// Innermost first.
    dims: Vec<u64>,
    kind: u32,
    offset: u64,
}

impl Entry {
    fn read(input: &mut Input<'_>) -> Outcome<Self> {
        let name = name(input, "name of a tensor")?;
        let rank = input.u32()?;
        if rank > MAX_RANK {
            let name = printable(&name);
            return Err(Fault::Bad(format!(
                "tensor `{name}` has {rank} dimensions, and {MAX_RANK} is the limit of GGUF"
            )));
        }
        let dims = (0..rank).map(|_| input.u64()).collect::<Outcome<_>>()?;
        let (kind, offset) = (input.u32()?, input.u64()?);
        Ok(Self {
            name,
            dims,
            kind,
            offset,
        })
    }

    /// Where it lies in the file of `size` bytes whose data begin at `data`.
    fn place(
        self,
        about: &Keys,
        (data, alignment): (u64, u64),
        size: u64,
    ) -> Result<TensorInfo, String> {
        let shown = printable(&self.name);
        let dtype = element_type(&shown, self.kind)?;
        let dim = |&dim: &u64| usize::try_from(dim).unwrap_or(usize::MAX);
        let mut shape: Vec<usize> = self.dims.iter().rev().map(dim).collect();
        check_shape(&shown, &shape)?;
        let elements: usize = shape.iter().product();
        let whole = match dtype {
            TensorType::Block(block) => shape.last().is_none_or(|n| n % block.elements() == 0),
            TensorType::Plain(_) => true,
        };
        let Some(bytes) = dtype.bytes(elements).filter(|_| whole) else {
            return Err(format!(
                "tensor `{shown}` of shape {shape:?} does not end on a whole block of {dtype}; the file is damaged: download it again"
            ));
        };
        if let Some(original) = about.shapes.get(&self.name) {
            check_shape(&shown, original)?;
            if original.iter().product::<usize>() != elements {
                return Err(format!(
                    "tensor `{shown}` of shape {shape:?} should have had the shape {original:?}, which holds another number of elements"
                ));
            }
            shape.clone_from(original);
        }
        if !self.offset.is_multiple_of(alignment) {
            return Err(format!(
                "tensor `{shown}` lies at {}, which is no multiple of the file's alignment of {alignment}",
                self.offset
            ));
        }
        let start = data.checked_add(self.offset);
        let range = start.and_then(|start| Some(start..start.checked_add(bytes as u64)?));
        let range = range.filter(|range| range.end <= size).and_then(|range| {
            Some(usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?)
        });
        let range = range.ok_or_else(|| {
            format!(
                "tensor `{shown}` of {bytes} bytes at {} reaches beyond the file of {size} bytes; the download is incomplete: download it again",
                self.offset
            )
        })?;
        Ok(TensorInfo {
            name: self.name,
            dtype,
            shape,
            range,
            strides: None,
        })
    }
}

/// ggml's numbers for types, by `ggml.h`.
fn element_type(shown: &str, kind: u32) -> Result<TensorType, String> {
    let block = match kind {
        0 => return Ok(Dtype::F32.into()),
        1 => return Ok(Dtype::F16.into()),
        24 => return Ok(Dtype::I8.into()),
        25 => return Ok(Dtype::I16.into()),
        26 => return Ok(Dtype::I32.into()),
        27 => return Ok(Dtype::I64.into()),
        28 => return Ok(Dtype::F64.into()),
        30 => return Ok(Dtype::BF16.into()),
        2 => BlockType::Q4_0,
        3 => BlockType::Q4_1,
        6 => BlockType::Q5_0,
        7 => BlockType::Q5_1,
        8 => BlockType::Q8_0,
        10 => BlockType::Q2K,
        11 => BlockType::Q3K,
        12 => BlockType::Q4K,
        13 => BlockType::Q5K,
        14 => BlockType::Q6K,
        _ => {
            const OTHERS: [(u32, &str); 18] = [
                (4, "Q4_2"),
                (5, "Q4_3"),
                (9, "Q8_1"),
                (15, "Q8_K"),
                (16, "IQ2_XXS"),
                (17, "IQ2_XS"),
                (18, "IQ3_XXS"),
                (19, "IQ1_S"),
                (20, "IQ4_NL"),
                (21, "IQ3_S"),
                (22, "IQ2_S"),
                (23, "IQ4_XS"),
                (29, "IQ1_M"),
                (31, "Q4_0_4_4"),
                (32, "Q4_0_4_8"),
                (34, "TQ1_0"),
                (35, "TQ2_0"),
                (39, "MXFP4"),
            ];
            let name = OTHERS.iter().find(|(number, _)| *number == kind);
            let name =
                name.map_or_else(|| format!("number {kind}"), |(_, name)| (*name).to_owned());
            return Err(format!(
                "tensor `{shown}` is of ggml's type {name}, which is not read; take a file in Q8_0, Q6_K or another of the usual types"
            ));
        }
    };
    Ok(TensorType::Block(block))
}

/// Tensors, in the order of their bytes, may leave room between them and not share any.
fn check_overlaps(tensors: &[TensorInfo]) -> Result<(), String> {
    let mut before: Option<&TensorInfo> = None;
    for info in tensors.iter().filter(|info| !info.range.is_empty()) {
        if let Some(before) = before.filter(|before| info.range.start < before.range.end) {
            return Err(format!(
                "tensors `{}` and `{}` overlap",
                printable(&before.name),
                printable(&info.name)
            ));
        }
        before = Some(info);
    }
    Ok(())
}
