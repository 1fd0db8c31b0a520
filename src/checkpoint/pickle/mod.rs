//! PyTorch checkpoints (`.ckpt`, `.pt`, `.pth`, `.bin`) without Python: the pickle in them is a program, and only the few instructions
//! and names that weights need are understood. Nothing is ever run, and anything else is refused by name.
//!
//! ```text
//! zip archive (torch 1.6 and later) ─► archive: where data.pkl and data/N lie ─┐
//! old stream: magic, three pickles, storages behind each other ────────────────┴─► machine ─► names: tensors by name ─► TensorInfo
//! ```
//!
//! Both forms hold numbers as they are, so that tensors are ranges of the file like those of safetensors, but for views that are not
//! dense: those have strides. <https://github.com/pytorch/pytorch/blob/v2.9.0/torch/serialization.py>

mod archive;
mod calls;
mod globals;
mod machine;
mod names;
mod value;

use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use self::archive::Archive;
use self::machine::Machine;
use self::value::{Heap, Storage, Value, View};
use super::header::{Header, MAX_TENSORS};
use super::input::{Bytes, Fault, Input, Outcome};
use super::printable::printable;
use super::tensor_info::{TensorInfo, TensorType, check_shape};

/// The longest pickle, in bytes: a checkpoint's takes some 300 bytes a tensor.
const MAX_PICKLE: u64 = 256 << 20;
/// What old files begin with: a pickle of the number 0x1950a86a20f9469cfc6c.
const MAGIC: [u8; 13] = [
    0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, b'.',
];
/// The most elements that a view may have beyond those of its storage: it is copied out when it is read.
const MAX_REPEATED: usize = 1 << 20;

/// The tensors of the file of `size` bytes that is a zip archive.
pub(super) fn read_archive(file: &mut dyn Bytes, size: u64) -> Outcome<Header> {
    let archive = Archive::open(file, size)?;
    if let Some(range) = archive.get("byteorder") {
        let length = (range.end - range.start).min(16);
        let order = Input::new(file, range.start, range.end)?.bytes(length)?;
        check_order(order == b"little")?;
    }
    let program = archive.get("data.pkl").ok_or(Fault::End)?;
    let end = program.end.min(program.start.saturating_add(MAX_PICKLE));
    let mut machine = Machine::default();
    let root = machine.run(&mut Input::new(file, program.start, end)?)?;
    collect(&machine.heap, &root, |storage| {
        archive.get(&format!("data/{}", storage.key))
    })
}

/// The tensors of the file of `size` bytes that was written before torch 1.6, or as then.
pub(super) fn read_stream(file: &mut dyn Bytes, size: u64) -> Outcome<Header> {
    let mut input = Input::new(file, 0, size)?;
    let [_, _, magic @ ..] = input.array::<{ 2 + MAGIC.len() }>()?;
    if magic != MAGIC {
        return Err(Fault::Bad(
            "this is a Python pickle that torch.save did not write, so it is no checkpoint; take the model's .safetensors".to_owned(),
        ));
    }
    let mut machine = Machine::default();
    let protocol = machine.run(&mut input)?;
    if !matches!(protocol, Value::Int(1001)) {
        return Err(Fault::Bad(
            "this PyTorch checkpoint is of an unknown version; save the model again with torch.save".to_owned(),
        ));
    }
    let system = machine.run(&mut input)?;
    let little = machine.heap.get(&system, "little_endian");
    check_order(!matches!(little, Some(Value::Bool(false))))?;
    let root = machine.run(&mut input)?;
    let keys = machine.run(&mut input)?;
    let mut places: HashMap<Rc<str>, Range<u64>> = HashMap::new();
    for key in machine.heap.items_of(&keys).unwrap_or(&[]) {
        let Value::Text(key) = key else {
            continue;
        };
        let width = machine.widths.get(key).copied().ok_or_else(|| {
            let key = printable(key);
            Fault::Bad(format!("it holds the storage `{key}`, which nothing refers to; the file is damaged: download it again"))
        })?;
        let length = input.u64()?.checked_mul(width).ok_or(Fault::End)?;
        let start = input.position();
        input.skip(length)?;
        places.insert(Rc::clone(key), start..start + length);
    }
    if input.left() > 0 {
        let extra = input.left();
        return Err(Fault::Bad(format!(
            "the last {extra} bytes of the file belong to no tensor, so it was damaged or changed after it was written; download it again"
        )));
    }
    collect(&machine.heap, &root, |storage| {
        places.get(&storage.key).cloned()
    })
}

fn check_order(little: bool) -> Outcome<()> {
    match little {
        true => Ok(()),
        false => Err(Fault::Bad(
            "it was saved on a big-endian machine, which is not read; save it again on another"
                .to_owned(),
        )),
    }
}

/// The tensors below `root`, each found to lie in its storage, whose place `find` tells.
fn collect(
    heap: &Heap,
    root: &Value,
    find: impl Fn(&Storage) -> Option<Range<u64>>,
) -> Outcome<Header> {
    let (views, metadata) = names::below(heap, root)?;
    if views.is_empty() {
        return Err(Fault::Bad("the file holds no tensors".to_owned()));
    }
    if views.len() > MAX_TENSORS {
        return Err(Fault::Bad(format!("more than {MAX_TENSORS} tensors")));
    }
    let mut tensors = views
        .into_iter()
        .map(|(name, view)| {
            let storage = &view.storage;
            let place = find(storage).ok_or_else(|| {
                format!(
                    "the numbers of tensor `{}` (record `{}`) are not in the file; download it again",
                    printable(&name),
                    printable(&storage.key)
                )
            })?;
            locate(name, &view, &place)
        })
        .collect::<Result<Vec<_>, String>>()?;
    tensors.sort_by(|a, b| {
        let key = |info: &TensorInfo| (info.range.start, info.range.end);
        key(a).cmp(&key(b)).then_with(|| a.name.cmp(&b.name))
    });
    Ok(Header { tensors, metadata })
}

/// One tensor in its storage, which lies at `place`.
fn locate(name: String, view: &View, place: &Range<u64>) -> Result<TensorInfo, String> {
    let shown = printable(&name);
    check_shape(&shown, &view.shape)?;
    let outside = || {
        format!(
            "tensor `{shown}` of shape {:?} reaches beyond its storage of {} bytes; the file is damaged: download it again",
            view.shape,
            place.end.saturating_sub(place.start)
        )
    };
    let fit = |number: u64| usize::try_from(number).map_err(|_| outside());
    let dtype = TensorType::from(view.dtype);
    let width = dtype.bytes(1).ok_or_else(outside)?;
    let unit = view.storage.dtype.map_or(1, |dtype| dtype.bitsize() / 8);
    if view
        .storage
        .dtype
        .is_some_and(|kept| kept.bitsize() != view.dtype.bitsize())
    {
        return Err(format!(
            "tensor `{shown}` is of another type than its storage; save the model again"
        ));
    }
    // of all numbers the smallest hold: what the pickle says of the storage, and what the file has
    let kept = fit(place.end.saturating_sub(place.start))?;
    let skipped = fit(view.storage.first)?.checked_mul(unit);
    let said = fit(view.storage.count)?.checked_mul(unit);
    let (skipped, said) = skipped.zip(said).ok_or_else(outside)?;
    if skipped.checked_add(said).is_none_or(|end| end > kept) {
        return Err(outside());
    }
    let span = span(&view.shape, &view.strides).ok_or_else(outside)?;
    let first = fit(view.offset)?;
    let end = first
        .checked_add(span)
        .and_then(|end| end.checked_mul(width));
    let end = end
        .filter(|&end| end <= said || span == 0)
        .ok_or_else(outside)?;
    let elements: usize = view.shape.iter().product();
    if elements > MAX_REPEATED.max(said / width) {
        return Err(format!(
            "tensor `{shown}` of shape {:?} repeats the {} numbers of its storage; save the model again with contiguous tensors",
            view.shape,
            said / width
        ));
    }
    let base = fit(place.start)?.checked_add(skipped).ok_or_else(outside)?;
    let range = match span {
        0 => base..base,
        _ => base + first * width..base + end,
    };
    let dense = is_dense(&view.shape, &view.strides) || span == 0;
    Ok(TensorInfo {
        name,
        dtype,
        shape: view.shape.clone(),
        range,
        strides: (!dense).then(|| view.strides.clone()),
    })
}

/// How many elements lie from the first of a view to its last, both counted; `None` when there are too many.
fn span(shape: &[usize], strides: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    let mut axes = shape.iter().zip(strides);
    axes.try_fold(1usize, |span, (dim, stride)| {
        span.checked_add((dim - 1).checked_mul(*stride)?)
    })
}

/// Whether a view's elements are neighbours, row-major; the strides of axes of one element do not matter.
fn is_dense(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1usize;
    let axes = shape.iter().zip(strides).rev();
    for (&dim, &stride) in axes.filter(|(dim, _)| **dim != 1) {
        if stride != expected {
            return false;
        }
        expected = expected.saturating_mul(dim);
    }
    true
}
