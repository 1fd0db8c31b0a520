//! A file's SHA-256, and the short form by which model sites know it.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::tensor_file::open_plain_file;
use crate::error::{Error, Result};

/// How much is read at a time, in bytes.
const CHUNK: usize = 1 << 20;

/// The SHA-256 of a whole file, 64 hexadecimal digits. Reads all of it: about a second for each 2 GB.
///
/// # Errors
/// [`Error::Disk`] when the file cannot be read, [`Error::NotFound`] when it is not there.
pub fn sha256_file(path: &Path) -> Result<String> {
    sha256_from(path, 0)
}

/// The SHA-256 of a safetensors file behind its header: kohya's `sshs_model_hash`, by which A1111 knows a LoRA whatever its header says. Of other files,
/// that of the whole.
///
/// # Errors
/// As [`sha256_file`].
pub fn sha256_tensors(path: &Path) -> Result<String> {
    let mut length = [0; 8];
    let mut file = open_plain_file(path)?;
    let size = file.metadata().map_err(|e| Error::disk(path, "read", e))?;
    let header = file.read_exact(&mut length).is_ok();
    let first = u64::from_le_bytes(length).saturating_add(8);
    let is_header = header && first < size.len() && first <= 100_000_008;
    sha256_from(path, if is_header { first } else { 0 })
}

fn sha256_from(path: &Path, first: u64) -> Result<String> {
    let mut file = open_plain_file(path)?;
    file.seek(SeekFrom::Start(first))
        .map_err(|e| Error::disk(path, "read", e))?;
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = match file.read(&mut chunk) {
            Ok(read) => read,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::disk(path, "read", e)),
        };
        match chunk.get(..read) {
            Some(bytes) if read > 0 => hasher.update(bytes),
            _ => break,
        }
    }
    let digits = hasher.finalize().into_iter().map(|b| format!("{b:02x}"));
    Ok(digits.collect())
}

/// Civitai's AutoV2, A1111's `Model hash`: the first 10 digits of a file's SHA-256.
pub fn auto_v2(sha256: &str) -> &str {
    sha256.get(..10).unwrap_or(sha256)
}
