//! What a file is that holds no tensors in a known way, from its first bytes: each kind with its own sentence and advice.

/// How many bytes of a file are enough to recognise it.
pub(super) const SNIFF_LENGTH: usize = 4096;

/// A kind of file that begins with fixed bytes.
struct Magic {
    offset: usize,
    bytes: &'static [u8],
    what: &'static str,
}

const fn magic(offset: usize, bytes: &'static [u8], what: &'static str) -> Magic {
    Magic {
        offset,
        bytes,
        what,
    }
}

const ARCHIVE: &str =
    "a packed archive; unpack it and give the .safetensors file or the folder inside";
const PROGRAM: &str = "a program, not a model; give a .safetensors file";
const PICTURE: &str = "a picture, not a model; give a .safetensors file";
const DOCUMENT: &str = "a document, not a model; give a .safetensors file";
const HDF5: &str = "an HDF5 file (Keras or older frameworks), which is not read; give the same model as .safetensors";
const GGML: &str = "a GGML file, which is not read; give the same model as .safetensors";

const MAGICS: &[Magic] = &[
    magic(0, b"ggml", GGML),
    magic(0, b"lmgg", GGML),
    magic(0, b"tjgg", GGML),
    magic(0, b"\x89PNG\r\n\x1a\n", PICTURE),
    magic(0, b"\xff\xd8\xff", PICTURE),
    magic(0, b"GIF8", PICTURE),
    magic(0, b"BM", PICTURE),
    magic(0, b"II*\0", PICTURE),
    magic(0, b"MM\0*", PICTURE),
    magic(8, b"WEBP", PICTURE),
    magic(4, b"ftypavif", PICTURE),
    magic(4, b"ftypheic", PICTURE),
    magic(0, b"%PDF", DOCUMENT),
    magic(0, b"\x1f\x8b", ARCHIVE),
    magic(0, b"7z\xbc\xaf\x27\x1c", ARCHIVE),
    magic(0, b"Rar!", ARCHIVE),
    magic(0, b"\xfd7zXZ\0", ARCHIVE),
    magic(0, b"\x28\xb5\x2f\xfd", ARCHIVE),
    magic(0, b"BZh", ARCHIVE),
    magic(257, b"ustar", ARCHIVE),
    magic(0, b"\x89HDF\r\n\x1a\n", HDF5),
    magic(0, b"\x7fELF", PROGRAM),
    magic(0, b"MZ", PROGRAM),
    magic(0, b"#!", PROGRAM),
];

/// What the first bytes of a file show it to be, as the end of the sentence "this is …"; `None` when nothing is recognised.
///
/// `head` is the first [`SNIFF_LENGTH`] bytes, or all of them when there are fewer.
pub(super) fn recognise(head: &[u8]) -> Option<&'static str> {
    let fits = |m: &&Magic| {
        head.get(m.offset..)
            .is_some_and(|tail| tail.starts_with(m.bytes))
    };
    if let Some(found) = MAGICS.iter().find(fits) {
        return Some(found.what);
    }
    recognise_text(head)
}

/// The kinds that are text.
fn recognise_text(head: &[u8]) -> Option<&'static str> {
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    let text = text.trim_ascii_start();
    if text.starts_with(b"version https://git-lfs.github.com/spec/") {
        return Some(
            "a Git LFS pointer, a few lines that stand for the real file; run `git lfs pull` in its folder, or download the file itself",
        );
    }
    let start = text
        .get(..text.len().min(512))
        .unwrap_or(text)
        .to_ascii_lowercase();
    if start.starts_with(b"<!doctype html")
        || start.starts_with(b"<html")
        || contains(&start, b"<head")
    {
        return Some(
            "an HTML page, probably what a site shows instead of the file when one must log in or follow a link; download the file itself",
        );
    }
    if start.starts_with(b"<?xml") || start.starts_with(b"<error") {
        return Some(
            "an XML page, probably the error message of a server; download the file again",
        );
    }
    if start.starts_with(b"{") || start.starts_with(b"[") {
        return Some(
            "JSON text, perhaps a config or the index of a model in several files; give the folder that it lies in, or a .safetensors file",
        );
    }
    let plain = |&b: &u8| (b' '..=b'~').contains(&b) || b == b'\n' || b == b'\r' || b == b'\t';
    let long_enough = head.len() >= 16;
    (long_enough && head.iter().all(plain))
        .then_some("plain text, not a model; download the file again, or give a .safetensors file")
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_apart() {
        let kind = |bytes: &[u8]| recognise(bytes).unwrap_or("unknown");
        assert!(kind(b"\n <!DOCTYPE HTML>\n<html>").contains("HTML"));
        assert!(
            kind(b"version https://git-lfs.github.com/spec/v1\noid sha256:0").contains("Git LFS")
        );
        assert!(kind(b"{\"a\": 1}").contains("JSON"));
        assert!(kind(b"Access to this file is denied.").contains("plain text"));
        assert_eq!(kind(&[0; 64]), "unknown");
        assert_eq!(kind(b""), "unknown");
    }
}
