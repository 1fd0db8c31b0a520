//! The zip archive that torch.save writes since 1.6: entries lie in it as they are, so that a tensor is a range of the file.
//!
//! The format: APPNOTE 6.3.10 (PKWARE). Read from the central directory alone, whose every number is checked against the file; an entry's own
//! header must name the same entry. Compressed and encrypted entries are refused: torch.save makes none, and so no bomb unfolds here.

use std::collections::HashMap;
use std::io::SeekFrom;
use std::ops::Range;

use crate::checkpoint::input::{Bytes, Fault, Input, Outcome};
use crate::checkpoint::printable::printable;

/// The end record is looked for in this much of the file's end: its own 22 bytes and the longest comment.
const TAIL: u64 = 22 + 0xffff;
/// The longest central directory, in bytes: a checkpoint's takes about 100 bytes a tensor.
const MAX_DIRECTORY: u64 = 64 << 20;
/// What a 32-bit field holds when the number is in the zip64 field.
const WIDE: u64 = 0xffff_ffff;

/// Where the entries of an archive lie in the file.
#[derive(Debug)]
pub(super) struct Archive {
    entries: HashMap<String, Range<u64>>,
    /// What all entries' names begin with, with its slash.
    folder: String,
}

/// What the directory says of an entry.
struct Entry {
    name: String,
    header: u64,
    size: u64,
}

impl Archive {
    /// Reads the directory of the file of `size` bytes.
    pub(super) fn open(file: &mut dyn Bytes, size: u64) -> Outcome<Self> {
        let directory = find_directory(file, size)?;
        let entries = read_directory(file, &directory)?;
        let mut places = HashMap::new();
        let mut ranges = Vec::new();
        for entry in entries {
            let range = place(file, &entry, directory.start)?;
            ranges.push((entry.header, range.end, entry.name.clone()));
            if places.insert(entry.name.clone(), range).is_some() {
                let name = printable(&entry.name);
                return Err(Fault::Bad(format!(
                    "its archive holds the entry `{name}` twice, so it is not known which one is meant; download it again"
                )));
            }
        }
        ranges.sort();
        for pair in ranges.windows(2) {
            if let [(_, end, before), (start, _, name)] = pair
                && start < end
            {
                return Err(Fault::Bad(format!(
                    "the entries `{}` and `{}` of its archive overlap; it was made by hand, and is not read",
                    printable(before),
                    printable(name)
                )));
            }
        }
        let mut folders = places.keys().filter_map(|name| {
            let folder = name.strip_suffix("data.pkl")?;
            let depth = folder.matches('/').count();
            (folder.is_empty() || (folder.ends_with('/') && depth == 1)).then_some(folder)
        });
        let folder = match (folders.next(), folders.next()) {
            (Some(folder), None) => folder.to_owned(),
            (None, _) => {
                return Err(Fault::Bad(
                    "this is a zip archive without a PyTorch checkpoint (data.pkl) in it; unpack it and give the file or folder inside"
                        .to_owned(),
                ));
            }
            _ => {
                return Err(Fault::Bad(
                    "its archive holds more than one data.pkl, so it is not known which one is meant"
                        .to_owned(),
                ));
            }
        };
        let archive = Self {
            entries: places,
            folder,
        };
        if archive.get("constants.pkl").is_some() {
            return Err(Fault::Bad(
                "this is a TorchScript program, not a checkpoint; take the model's .safetensors"
                    .to_owned(),
            ));
        }
        Ok(archive)
    }

    /// Where the entry of this name lies, its folder left out.
    pub(super) fn get(&self, name: &str) -> Option<Range<u64>> {
        self.entries.get(&format!("{}{name}", self.folder)).cloned()
    }
}

/// The central directory's place, by the end record.
fn find_directory(file: &mut dyn Bytes, size: u64) -> Outcome<Range<u64>> {
    let start = size.saturating_sub(TAIL);
    let tail = Input::new(file, start, size)?.bytes(size - start)?;
    // it ends with the file: what is appended to an archive is no part of it, and other readers may take another directory
    let ends = |(at, window): &(usize, &[u8])| {
        let comment = usize::from(u16::from_le_bytes([window[20], window[21]]));
        window.starts_with(b"PK\x05\x06") && at + window.len() + comment == tail.len()
    };
    let (at, _) = tail.windows(22).enumerate().rfind(ends).ok_or_else(|| {
        Fault::Bad("the end of its zip archive is missing, or something was appended to it; the download is incomplete or damaged: download it again".to_owned())
    })?;
    let end_record = start + at as u64;
    let mut input = Input::new(file, end_record, size)?;
    input.skip(4)?;
    let [disk, with_directory] = [input.u16()?, input.u16()?];
    let [here, all] = [input.u16()?, input.u16()?];
    let (mut length, mut offset) = (u64::from(input.u32()?), u64::from(input.u32()?));
    if [disk, with_directory]
        .iter()
        .any(|&n| n != 0 && n != 0xffff)
        || here != all
    {
        return Err(Fault::Bad(
            "its zip archive is in several parts; join them first".to_owned(),
        ));
    }
    let mut limit = end_record;
    if length == WIDE || offset == WIDE || here == 0xffff || disk == 0xffff {
        (length, offset, limit) = wide_directory(file, end_record)?;
    }
    let end = offset.checked_add(length).filter(|&end| end <= limit);
    let end = end.ok_or_else(|| {
        Fault::Bad(format!(
            "the directory of its zip archive should be {length} bytes at {offset}, and the file of {size} bytes has no room for it there; \
             it is damaged: download it again"
        ))
    })?;
    if length > MAX_DIRECTORY {
        return Err(Fault::Bad(format!(
            "the directory of its zip archive is {length} bytes, and {MAX_DIRECTORY} is the limit"
        )));
    }
    Ok(offset..end)
}

/// Length and place of the directory by the zip64 end record, and where that record begins.
fn wide_directory(file: &mut dyn Bytes, end_record: u64) -> Outcome<(u64, u64, u64)> {
    let damaged = || {
        Fault::Bad("the zip64 record of its archive is missing or wrong; the file is damaged: download it again".to_owned())
    };
    let locator = end_record.checked_sub(20).ok_or_else(damaged)?;
    let mut input = Input::new(file, locator, end_record)?;
    if input.array()? != *b"PK\x06\x07" {
        return Err(damaged());
    }
    input.skip(4)?;
    let record = input.u64()?;
    if record.checked_add(56).is_none_or(|end| end > locator) {
        return Err(damaged());
    }
    let mut input = Input::new(file, record, locator)?;
    if input.array()? != *b"PK\x06\x06" {
        return Err(damaged());
    }
    // its own size, versions, disks, and the numbers of entries
    input.skip(36)?;
    Ok((input.u64()?, input.u64()?, record))
}

fn read_directory(file: &mut dyn Bytes, directory: &Range<u64>) -> Outcome<Vec<Entry>> {
    let mut input = Input::new(file, directory.start, directory.end)?;
    let mut entries = Vec::new();
    while input.left() > 0 {
        if input.array()? != *b"PK\x01\x02" {
            return Err(Fault::Bad(
                "the directory of its zip archive is damaged: download it again".to_owned(),
            ));
        }
        input.skip(4)?;
        let [flags, method] = [input.u16()?, input.u16()?];
        input.skip(8)?;
        let mut sizes = [u64::from(input.u32()?), u64::from(input.u32()?)];
        let [name, extra, comment] = [input.u16()?, input.u16()?, input.u16()?];
        input.skip(8)?;
        let mut header = u64::from(input.u32()?);
        let name = String::from_utf8_lossy(&input.bytes(name.into())?).into_owned();
        let extra = input.bytes(extra.into())?;
        input.skip(comment.into())?;
        widen(&extra, &mut sizes, &mut header);
        let [packed, size] = sizes;
        let shown = printable(&name);
        if flags & 1 != 0 {
            return Err(Fault::Bad(format!(
                "the entry `{shown}` of its archive is encrypted; unpack it and give what is inside"
            )));
        }
        if method != 0 || packed != size {
            return Err(Fault::Bad(format!(
                "the entry `{shown}` of its archive is compressed ({packed} bytes for {size}), which torch.save never does; it is not unpacked: \
                 save the model again with torch.save, or take its .safetensors"
            )));
        }
        entries.push(Entry { name, header, size });
    }
    Ok(entries)
}

/// Takes from the zip64 field what did not fit: size, packed size, and offset, in this order, each only if it is marked.
fn widen(mut extra: &[u8], sizes: &mut [u64; 2], header: &mut u64) {
    while let Some((head, rest)) = extra.split_first_chunk::<4>() {
        let [a, b, c, d] = *head;
        let length = usize::from(u16::from_le_bytes([c, d])).min(rest.len());
        let (field, next) = rest.split_at(length);
        if u16::from_le_bytes([a, b]) == 1 {
            let mut numbers = field.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b));
            let [packed, size] = sizes;
            for number in [size, packed, header] {
                if *number == WIDE {
                    *number = numbers.next().unwrap_or(*number);
                }
            }
            return;
        }
        extra = next;
    }
}

/// Where an entry's bytes lie: behind its own header, in front of the directory.
fn place(file: &mut dyn Bytes, entry: &Entry, directory: u64) -> Outcome<Range<u64>> {
    let shown = printable(&entry.name);
    let outside = || {
        Fault::Bad(format!(
            "the entry `{shown}` of its archive ({} bytes) does not lie in front of the archive's directory at {directory}; the file is damaged: \
             download it again",
            entry.size
        ))
    };
    if entry.header > directory {
        return Err(outside());
    }
    file.seek(SeekFrom::Start(entry.header))?;
    let mut head = [0; 30];
    if directory - entry.header < head.len() as u64 {
        return Err(outside());
    }
    file.read_exact(&mut head)?;
    let at = |i: usize| u64::from(u16::from_le_bytes([head[i], head[i + 1]]));
    let mut name = vec![0; usize::from(u16::from_le_bytes([head[26], head[27]]))];
    file.read_exact(&mut name)?;
    if !head.starts_with(b"PK\x03\x04") || String::from_utf8_lossy(&name) != entry.name {
        return Err(Fault::Bad(format!(
            "the entry `{shown}` of its archive is not where the archive's directory says; the file is damaged: download it again"
        )));
    }
    let start = entry.header + 30 + at(26) + at(28);
    match start.checked_add(entry.size) {
        Some(end) if end <= directory => Ok(start..end),
        _ => Err(outside()),
    }
}
