//! One file of tensors: opened only when it is a plain file and its header is good. Its tensors are looked at where they lie in a mapping,
//! or, where that is not wanted or the file system cannot do it, each is read when it is asked for.
//!
//! The container (safetensors, a PyTorch checkpoint, GGUF) is told by the file's first bytes, whatever its name, and matters no more once its
//! header is read. Nothing but the header is read when a file is opened, so a file of any size opens in milliseconds. This is the one file
//! of the crate with `unsafe`: mapping a file, and giving mapped pages back.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, Metadata};
use std::io::{self, Read, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::Mmap;

use super::gguf;
use super::header::{self, Header, PREFIX};
use super::input::Bytes;
use super::pickle;
use super::printable::printable;
use super::sniff::{self, SNIFF_LENGTH};
use super::tensor_info::TensorInfo;
use crate::error::{Error, Result};

/// The smallest page of any machine; ranges are given back from a multiple of it.
const PAGE: usize = 4096;

/// How tensors are kept in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// <https://github.com/huggingface/safetensors>
    SafeTensors,
    /// What `torch.save` writes: a pickle and numbers in a zip archive, or behind each other as before torch 1.6.
    PyTorch,
    /// <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>
    Gguf,
}

impl Container {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::SafeTensors => "safetensors",
            Self::PyTorch => "PyTorch checkpoint",
            Self::Gguf => "GGUF",
        }
    }
}

/// An open file of tensors.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    size: u64,
    container: Container,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
    store: Store,
    /// Why the file is read instead of mapped, when mapping was tried.
    unmapped: Option<String>,
}

/// Where the bytes are.
#[derive(Debug)]
enum Store {
    /// Looked at where they lie.
    Mapped(Mmap, Opened),
    /// Each tensor is read when it is asked for, and belongs to whoever asked.
    Plain(Opened),
    /// Inside the program.
    Static(&'static [u8]),
}

/// An open file, and when it was changed last.
#[derive(Debug)]
struct Opened {
    file: File,
    modified: Option<SystemTime>,
}

impl TensorFile {
    /// Opens `path`; `mapped` says whether to map it (else, and where mapping fails, each tensor is read when asked for).
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such file; [`Error::BadModel`] with one sentence when it is not a plain file, of no known
    /// container (the sentence says what it is instead), damaged, or cut short; [`Error::Disk`] when it cannot be read.
    pub fn open(path: &Path, mapped: bool) -> Result<Self> {
        let mut file = open_plain_file(path)?;
        let about = file.metadata().map_err(|e| Error::disk(path, "read", e))?;
        let size = about.len();
        let (container, header) = read_header(&mut file, path, size)?;
        let modified = about.modified().ok();
        let (store, unmapped) = Store::new(Opened { file, modified }, mapped);
        Ok(Self {
            unmapped,
            container,
            ..Self::assemble(path, size, header, store)
        })
    }

    /// The bytes of a file inside the program; `name` stands for its path in messages.
    ///
    /// # Errors
    /// [`Error::BadModel`] as [`TensorFile::open`].
    pub fn from_static(name: impl Into<PathBuf>, bytes: &'static [u8]) -> Result<Self> {
        let path = name.into();
        let size = bytes.len() as u64;
        let mut reader = io::Cursor::new(bytes);
        let (container, header) = read_header(&mut reader, &path, size)?;
        Ok(Self {
            container,
            ..Self::assemble(&path, size, header, Store::Static(bytes))
        })
    }

    fn assemble(path: &Path, size: u64, header: Header, store: Store) -> Self {
        let by_name = header
            .tensors
            .iter()
            .enumerate()
            .map(|(i, info)| (info.name.clone(), i))
            .collect();
        Self {
            path: path.to_owned(),
            size,
            container: Container::SafeTensors,
            tensors: header.tensors,
            by_name,
            metadata: header.metadata,
            store,
            unmapped: None,
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How it keeps tensors.
    pub fn container(&self) -> Container {
        self.container
    }

    /// What the header says in words: `__metadata__` of safetensors, the single values beside a checkpoint's weights, a GGUF's keys. They may hold any character: see [`printable`].
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The tensors in the order of their bytes.
    pub fn entries(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.iter()
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(*self.by_name.get(name)?)
    }

    /// Why the file is not mapped although that was wanted, if so.
    pub fn unmapped(&self) -> Option<&str> {
        self.unmapped.as_deref()
    }

    /// The bytes of a tensor of this file, dense, row-major, little endian, not aligned: borrowed from the mapping, or read.
    ///
    /// The file's size and time are looked at first: a mapped file that somebody cut short since would otherwise end the process.
    ///
    /// # Errors
    /// [`Error::BadModel`] when the file has changed since it was opened or `info` is of another file; [`Error::Disk`] when reading fails.
    pub fn bytes(&self, info: &TensorInfo) -> Result<Cow<'_, [u8]>> {
        self.check_unchanged()?;
        let bytes = self.spanned(info)?;
        let Some(strides) = &info.strides else {
            return Ok(bytes);
        };
        let dense = info.gather(strides, &bytes);
        dense.map(Cow::Owned).ok_or_else(|| self.outside(info))
    }

    fn outside(&self, info: &TensorInfo) -> Error {
        let name = printable(&info.name);
        let reason = format!("tensor `{name}` does not lie in this file");
        Error::bad_model(&self.path, reason)
    }

    /// The bytes of a tensor's range as they lie.
    fn spanned(&self, info: &TensorInfo) -> Result<Cow<'_, [u8]>> {
        let held: &[u8] = match &self.store {
            Store::Mapped(map, _) => map,
            Store::Static(bytes) => bytes,
            Store::Plain(_) if info.range.end as u64 > self.size => return Err(self.outside(info)),
            Store::Plain(opened) => {
                let mut bytes = vec![0; info.range.len()];
                read_exact_at(&opened.file, &mut bytes, info.range.start as u64)
                    .map_err(|e| Error::disk(&self.path, "read", e))?;
                return Ok(Cow::Owned(bytes));
            }
        };
        held.get(info.range.clone())
            .map(Cow::Borrowed)
            .ok_or_else(|| self.outside(info))
    }

    /// Tells the system that the bytes of a tensor are not needed any more: they leave this process's memory and come back from the file
    /// if they are asked for again. So a file and its converted copy are never both resident. Does nothing where it cannot.
    pub fn release(&self, info: &TensorInfo) {
        if let Store::Mapped(map, _) = &self.store {
            give_back(map, info);
        }
    }

    fn check_unchanged(&self) -> Result<()> {
        let (Store::Mapped(_, opened) | Store::Plain(opened)) = &self.store else {
            return Ok(());
        };
        let now = opened
            .file
            .metadata()
            .map_err(|e| Error::disk(&self.path, "read", e))?;
        if now.len() != self.size {
            let reason = format!(
                "the file was {} bytes when it was opened and is {} now; something writes to it: try again when that is done",
                self.size,
                now.len()
            );
            return Err(Error::bad_model(&self.path, reason));
        }
        if now.modified().ok() != opened.modified {
            return Err(Error::bad_model(
                &self.path,
                "the file was changed while it was read; try again when nothing writes to it",
            ));
        }
        Ok(())
    }
}

/// Opens a plain file; anything else (a folder, a FIFO, a device) is refused without touching it, because opening a FIFO would wait.
pub(super) fn open_plain_file(path: &Path) -> Result<File> {
    let about = look_at(path)?;
    if about.is_dir() {
        return Err(Error::bad_model(
            path,
            "this is a folder, and a file is needed here",
        ));
    }
    let not_plain = || {
        Error::bad_model(
            path,
            "this is a pipe, a socket or a device, not a plain file; give a .safetensors file",
        )
    };
    if !about.is_file() {
        return Err(not_plain());
    }
    let file = File::open(path).map_err(|e| Error::disk(path, "open", e))?;
    let opened = file.metadata().map_err(|e| Error::disk(path, "read", e))?;
    if opened.is_file() {
        Ok(file)
    } else {
        Err(not_plain())
    }
}

/// What lies at `path`, links followed; a missing file, a link into nothing and a circle of links each get their sentence.
pub(super) fn look_at(path: &Path) -> Result<Metadata> {
    let error = match std::fs::metadata(path) {
        Ok(about) => return Ok(about),
        Err(error) => error,
    };
    let is_link = std::fs::symlink_metadata(path).is_ok_and(|about| about.is_symlink());
    match (is_link, error.kind()) {
        (true, io::ErrorKind::NotFound) => Err(Error::bad_model(
            path,
            "this is a symbolic link to a file that does not exist; download the file again",
        )),
        (true, io::ErrorKind::PermissionDenied) => Err(Error::disk(path, "read", error)),
        (true, _) => Err(Error::bad_model(
            path,
            format!("this symbolic link leads nowhere ({error})"),
        )),
        (false, io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Err(Error::NotFound {
            what: path.display().to_string(),
            hint: "there is no such file or folder; check the path".to_owned(),
        }),
        (false, _) => Err(Error::disk(path, "read", error)),
    }
}

/// Reads and checks the header of whatever container the first bytes show.
fn read_header(file: &mut impl Bytes, path: &Path, size: u64) -> Result<(Container, Header)> {
    if size == 0 {
        let reason = "this is an empty file; download it again";
        return Err(Error::bad_model(path, reason));
    }
    let mut head = Vec::new();
    file.by_ref()
        .take(SNIFF_LENGTH as u64)
        .read_to_end(&mut head)
        .map_err(|e| Error::disk(path, "read", e))?;
    const END: &str =
        "the file ends in the middle of its header; the download is incomplete: download it again";
    let told = match head.as_slice() {
        // the length of a header may look like the first bytes of anything
        head if begins_header(head, size) => {
            let header = read_safetensors(file, path, head, size)?;
            return Ok((Container::SafeTensors, header));
        }
        [b'P', b'K', 3, 4, ..] => {
            pickle::read_archive(file, size).map(|header| (Container::PyTorch, header))
        }
        // a pickle begins with its protocol
        [0x80, 2..=5, ..] => {
            pickle::read_stream(file, size).map(|header| (Container::PyTorch, header))
        }
        [b'G', b'G', b'U', b'F', ..] => {
            gguf::read(file, size).map(|header| (Container::Gguf, header))
        }
        _ => {
            let header = read_safetensors(file, path, &head, size)?;
            return Ok((Container::SafeTensors, header));
        }
    };
    told.map_err(|fault| fault.about(path, END))
}

/// Whether a file begins with a possible length and an object: it is taken at its word then. Everything else may be another kind of file.
fn begins_header(head: &[u8], size: u64) -> bool {
    head.split_first_chunk::<PREFIX>()
        .is_some_and(|(prefix, text)| {
            header::header_length(*prefix, size).is_ok()
                && text.trim_ascii_start().starts_with(b"{")
        })
}

/// Reads and checks the header of what should be safetensors and begins with `head`. Its length is found possible before memory is taken for it.
fn read_safetensors(file: &mut impl Bytes, path: &Path, head: &[u8], size: u64) -> Result<Header> {
    let bad = |reason: String| Error::bad_model(path, reason);
    let broken = |e: io::Error| Error::disk(path, "read", e);
    let Some((prefix, text)) = head.split_first_chunk::<PREFIX>() else {
        let what =
            sniff::recognise(head).map_or_else(String::new, |what| format!(": it is {what}"));
        return Err(bad(format!(
            "the file is {} bytes, too small for a safetensors file, which has a header of at least 8{what}",
            head.len()
        )));
    };
    let length = header::header_length(*prefix, size);
    if let Some(what) = sniff::recognise(head).filter(|_| !begins_header(head, size)) {
        return Err(bad(format!("not a file of tensors: this is {what}")));
    }
    let length = length.map_err(bad)?;
    if text.len() < length && text.first().is_some_and(|b| !b.is_ascii()) {
        // spare reading a long header that cannot be one
        return header::parse(text, size).map_err(bad);
    }
    let mut text = vec![0; length];
    file.seek(SeekFrom::Start(PREFIX as u64))
        .and_then(|_| file.read_exact(&mut text))
        .map_err(broken)?;
    header::parse(&text, size).map_err(bad)
}

impl Store {
    /// A mapping if that is wanted and the file system can do it (some answer ENODEV), else plain reads; and why not, if it could not.
    fn new(opened: Opened, mapped: bool) -> (Self, Option<String>) {
        if !mapped {
            return (Self::Plain(opened), None);
        }
        match map(&opened.file) {
            Ok(map) => (Self::Mapped(map, opened), None),
            Err(e) => {
                let why =
                    format!("the file cannot be mapped into memory ({e}), so it is read instead");
                (Self::Plain(opened), Some(why))
            }
        }
    }
}

/// Fills `bytes` from `offset` on, wherever the file's position is: several threads read at once. A file that was cut short is an error.
#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

/// Fills `bytes` from `offset` on, wherever the file's position is: several threads read at once. A file that was cut short is an error.
#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                bytes = bytes.get_mut(n..).unwrap_or_default();
                offset = offset.saturating_add(n as u64);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[allow(unsafe_code)]
fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the mapping is read-only and private to `TensorFile`, which hands out slices for as long as it lives. A mapped file must not
    // be changed by others meanwhile: nobody can guarantee that, as for every program that maps files. The bytes are only ever copied or
    // converted as numbers, for which every bit pattern is valid; `bytes` looks at size and time before each use, so that a file that
    // was cut short ends in an error and not in SIGBUS, but for the moment between look and use.
    unsafe { Mmap::map(file) }
}

#[cfg(unix)]
#[allow(unsafe_code)]
fn give_back(map: &Mmap, info: &TensorInfo) {
    // from the first page that begins inside to the end of the last that does not reach beyond: neighbours stay resident
    let start = info.range.start.next_multiple_of(PAGE);
    let end = info.range.end / PAGE * PAGE;
    if start >= end || end > map.len() {
        return;
    }
    // SAFETY: for a shared, read-only mapping of a file `DontNeed` changes no content: pages leave this process and are taken from the file
    // again at the next access. A failure leaves them where they are, so the result does not matter.
    let _ = unsafe {
        map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start)
    };
}

#[cfg(not(unix))]
fn give_back(_map: &Mmap, _info: &TensorInfo) {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn what_cannot_be_mapped_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        // a file that is open for writing alone cannot be mapped, whatever the system
        let file = File::create(&path).unwrap();
        let opened = |file| Opened {
            file,
            modified: None,
        };
        let (store, why) = Store::new(opened(file), true);
        assert!(matches!(store, Store::Plain(_)));
        assert!(why.unwrap().contains("so it is read instead"));
        std::fs::write(&path, b"12").unwrap();
        let (store, why) = Store::new(opened(File::open(&path).unwrap()), true);
        assert!(matches!(store, Store::Mapped(..)) && why.is_none());
        let (store, why) = Store::new(opened(File::open(&path).unwrap()), false);
        assert!(matches!(store, Store::Plain(_)) && why.is_none());
    }

    /// The kernel's own files are plain files that answer ENODEV.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_file_system_without_mappings_is_no_obstacle() {
        const ENODEV: i32 = 19;
        let Ok(file) = File::open("/sys/kernel/mm/transparent_hugepage/enabled") else {
            return; // a container may hide them
        };
        assert_eq!(map(&file).unwrap_err().raw_os_error(), Some(ENODEV));
        let (store, why) = Store::new(
            Opened {
                file,
                modified: None,
            },
            true,
        );
        assert!(why.is_some());
        let Store::Plain(opened) = store else {
            panic!("mapped")
        };
        let mut bytes = [0; 4];
        read_exact_at(&opened.file, &mut bytes, 1).unwrap();
        assert!(read_exact_at(&opened.file, &mut [0; 9999], 0).is_err());
    }
}
