//! Bytes of a header, read in order and never beyond the end: what containers whose headers are streams are read with.

use std::io::{self, BufReader, Read, Seek, SeekFrom};

use crate::error::Error;

/// A file, or bytes in memory.
pub(super) trait Bytes: Read + Seek {}
impl<T: Read + Seek> Bytes for T {}

/// Why a header cannot be read.
#[derive(Debug)]
pub(super) enum Fault {
    /// It ends too early.
    End,
    /// It is wrong: the end of a sentence that begins with the file.
    Bad(String),
    /// The system failed.
    Disk(io::Error),
}

pub(super) type Outcome<T> = std::result::Result<T, Fault>;

impl Fault {
    /// The error about the file at `path`; `end` is the reason when it ends too early.
    pub(super) fn about(self, path: &std::path::Path, end: &str) -> Error {
        match self {
            Self::End => Error::bad_model(path, end),
            Self::Bad(reason) => Error::bad_model(path, reason),
            Self::Disk(error) => Error::disk(path, "read", error),
        }
    }
}

impl From<String> for Fault {
    fn from(reason: String) -> Self {
        Self::Bad(reason)
    }
}

impl From<&str> for Fault {
    fn from(reason: &str) -> Self {
        Self::Bad(reason.to_owned())
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::End,
            _ => Self::Disk(error),
        }
    }
}

/// A part of a file, read from its beginning on. Every length is found possible before memory is taken for it.
pub(super) struct Input<'a> {
    inner: BufReader<&'a mut dyn Bytes>,
    position: u64,
    end: u64,
}

impl<'a> Input<'a> {
    /// The bytes of `file` from `start` to `end`.
    pub(super) fn new(file: &'a mut dyn Bytes, start: u64, end: u64) -> Outcome<Self> {
        file.seek(SeekFrom::Start(start))?;
        Ok(Self {
            inner: BufReader::new(file),
            position: start,
            end,
        })
    }

    /// Where the next byte lies in the file.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// How many bytes are left.
    pub(super) fn left(&self) -> u64 {
        self.end.saturating_sub(self.position)
    }

    fn advance(&mut self, count: u64) -> Outcome<()> {
        if count > self.left() {
            return Err(Fault::End);
        }
        self.position += count;
        Ok(())
    }

    /// The next bytes, as many as the array has.
    pub(super) fn array<const N: usize>(&mut self) -> Outcome<[u8; N]> {
        self.advance(N as u64)?;
        let mut bytes = [0; N];
        self.inner.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// The next byte.
    pub(super) fn byte(&mut self) -> Outcome<u8> {
        self.array().map(|[byte]| byte)
    }

    /// The next number, little endian.
    pub(super) fn u16(&mut self) -> Outcome<u16> {
        self.array().map(u16::from_le_bytes)
    }

    /// The next number, little endian.
    pub(super) fn u32(&mut self) -> Outcome<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next number, little endian.
    pub(super) fn u64(&mut self) -> Outcome<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// The next `count` bytes.
    pub(super) fn bytes(&mut self, count: u64) -> Outcome<Vec<u8>> {
        self.advance(count)?;
        let count = usize::try_from(count).map_err(|_| Fault::End)?;
        let mut bytes = vec![0; count];
        self.inner.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Passes over `count` bytes.
    pub(super) fn skip(&mut self, count: u64) -> Outcome<()> {
        self.advance(count)?;
        let count = i64::try_from(count).map_err(|_| Fault::End)?;
        self.inner.seek_relative(count)?;
        Ok(())
    }

    /// The text up to the next newline, which is passed over; `None` when there is none within `most` bytes.
    pub(super) fn line(&mut self, most: usize) -> Outcome<Option<Vec<u8>>> {
        let mut line = Vec::new();
        while line.len() <= most {
            match self.byte()? {
                b'\n' => return Ok(Some(line)),
                byte => line.push(byte),
            }
        }
        Ok(None)
    }
}
