//! PNG out, with the texts that tell how the picture was made; and those texts back in, from files that may be hostile.
//!
//! Two texts are written. `parameters` is A1111's ([`super::infotext`]), as tEXt when it is Latin-1 and as iTXt otherwise, which is what
//! Pillow does for A1111. `sd-rs` (iTXt) is our exact request as JSON; where both are there it is the one to believe, because A1111's
//! format cannot carry every prompt.
//!
//! The reader never touches pixels. It walks the chunks, copies only the texts into a tiny picture of its own, and lets the `png` crate
//! read that: nothing else in the file can cost memory or time.

use std::fs::File;
use std::io::{self, BufReader, Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use super::Image;
use crate::error::{Error, Result};

/// Keyword of A1111's text.
pub const PARAMETERS: &str = "parameters";

/// Keyword of our request.
pub const REQUEST: &str = "sd-rs";

/// Largest side of a picture whose texts are read, in pixels.
const MAX_SIDE: u32 = 65_536;

/// Most bytes of text, as stored and again as unpacked.
const MAX_TEXT: usize = 4 << 20;

/// Most chunks that are looked at.
const MAX_CHUNKS: usize = 200_000;

const SIGNATURE: [u8; 8] = *b"\x89PNG\r\n\x1a\n";

/// What a picture's file says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PngText {
    /// Pixels a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Keyword and text, as the file orders them within each kind (tEXt, zTXt, iTXt). May hold terminal control characters.
    pub texts: Vec<(String, String)>,
}

impl PngText {
    /// The first text of that keyword.
    pub fn get(&self, keyword: &str) -> Option<&str> {
        let found = self.texts.iter().find(|(k, _)| k == keyword);
        found.map(|(_, text)| text.as_str())
    }
}

/// The whole file: RGB with 8 bits a channel, the `parameters` text, and the request where there is one.
///
/// # Errors
/// [`Error::Usage`] when the picture is empty or its bytes do not fit its size.
pub fn encode(
    image: &Image,
    parameters: &str,
    request: Option<&serde_json::Value>,
) -> Result<Vec<u8>> {
    let failed = |source: png::EncodingError| {
        Error::Usage(format!(
            "a picture of {}x{} with {} bytes cannot be written as PNG: {source}",
            image.width,
            image.height,
            image.rgb.len()
        ))
    };
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, image.width, image.height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    // PNG's texts cannot hold NUL: readers would see the text end there.
    let text = parameters.replace('\0', "\u{fffd}");
    let keyword = PARAMETERS.to_owned();
    if text.chars().all(|c| u32::from(c) <= 0xff) {
        encoder.add_text_chunk(keyword, text).map_err(failed)?;
    } else {
        encoder.add_itxt_chunk(keyword, text).map_err(failed)?;
    }
    if let Some(request) = request {
        encoder
            .add_itxt_chunk(REQUEST.to_owned(), request.to_string())
            .map_err(failed)?;
    }
    let mut writer = encoder.write_header().map_err(failed)?;
    writer.write_image_data(&image.rgb).map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(bytes)
}

/// The whole file of a picture of that width and height with these texts; those whose keyword PNG does not allow are left out. `rgb` is
/// `[height, width, 3]`, `alpha` `[height, width]`.
///
/// # Errors
/// [`Error::Usage`] when the picture is empty or its bytes do not fit its size.
pub fn encode_plain(
    (width, height): (u32, u32),
    rgb: &[u8],
    alpha: Option<&[u8]>,
    texts: &[(String, String)],
) -> Result<Vec<u8>> {
    let failed = |source: png::EncodingError| {
        Error::Usage(format!(
            "a picture of {width}x{height} with {} bytes cannot be written as PNG: {source}",
            rgb.len()
        ))
    };
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(match alpha {
        Some(_) => png::ColorType::Rgba,
        None => png::ColorType::Rgb,
    });
    encoder.set_depth(png::BitDepth::Eight);
    let latin = |text: &str| text.chars().all(|c| u32::from(c) <= 0xff);
    for (keyword, text) in texts {
        if keyword.is_empty() || keyword.chars().count() > 79 || !latin(keyword) {
            continue;
        }
        let (keyword, text) = (keyword.clone(), text.replace('\0', "\u{fffd}"));
        match latin(&text) {
            true => encoder.add_text_chunk(keyword, text),
            false => encoder.add_itxt_chunk(keyword, text),
        }
        .map_err(failed)?;
    }
    let mut writer = encoder.write_header().map_err(failed)?;
    match alpha {
        None => writer.write_image_data(rgb),
        Some(alpha) => {
            let pixels = rgb.chunks(3).zip(alpha);
            let mixed = pixels.flat_map(|(rgb, &alpha)| rgb.iter().copied().chain([alpha]));
            writer.write_image_data(&mixed.collect::<Vec<u8>>())
        }
    }
    .map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(bytes)
}

/// The texts of a PNG file. Texts that are damaged are left out.
///
/// # Errors
/// [`Error::Disk`] when the file cannot be read, is no PNG, or claims more than anything honest does.
pub fn read_text(path: &Path) -> Result<PngText> {
    File::open(path)
        .and_then(|file| read_text_from(&mut BufReader::new(file)))
        .map_err(|source| Error::disk(path, "read", source))
}

/// [`read_text`] from anything that can be searched.
fn read_text_from(file: &mut (impl Read + Seek)) -> io::Result<PngText> {
    let mut signature = [0; 8];
    file.read_exact(&mut signature)
        .map_err(|_| bad("it is not a PNG file"))?;
    if signature != SIGNATURE {
        return Err(bad("it is not a PNG file"));
    }
    let (kind, size) =
        chunk_head(file)?.ok_or_else(|| bad("the PNG file ends before its header"))?;
    let mut header = [0; 8];
    file.read_exact(&mut header)
        .map_err(|_| bad("the PNG file ends in its header"))?;
    if kind != *b"IHDR" || size != 13 {
        return Err(bad("the PNG file does not begin with a header"));
    }
    let [w0, w1, w2, w3, h0, h1, h2, h3] = header;
    let (width, height) = (
        u32::from_be_bytes([w0, w1, w2, w3]),
        u32::from_be_bytes([h0, h1, h2, h3]),
    );
    if width == 0 || height == 0 || width > MAX_SIDE || height > MAX_SIDE {
        return Err(bad(&format!(
            "the PNG file claims {width}x{height} pixels; expected 1 to {MAX_SIDE} a side"
        )));
    }
    // The rest of the header and its checksum.
    file.seek_relative(5 + 4)?;
    let texts = texts(text_chunks(file)?)?;
    Ok(PngText {
        width,
        height,
        texts,
    })
}

/// The kind and length of the next chunk; none where the file ends.
fn chunk_head(file: &mut impl Read) -> io::Result<Option<([u8; 4], u32)>> {
    let mut head = [0; 8];
    match file.read_exact(&mut head) {
        Ok(()) => {}
        Err(end) if end.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(other) => return Err(other),
    }
    let [l0, l1, l2, l3, k0, k1, k2, k3] = head;
    Ok(Some((
        [k0, k1, k2, k3],
        u32::from_be_bytes([l0, l1, l2, l3]),
    )))
}

/// The text chunks as they are in the file, with their lengths and checksums. A cut file gives those that are whole.
fn text_chunks(file: &mut (impl Read + Seek)) -> io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    for _ in 0..MAX_CHUNKS {
        let Some((kind, size)) = chunk_head(file)? else {
            return Ok(kept);
        };
        match &kind {
            b"IEND" => return Ok(kept),
            b"tEXt" | b"zTXt" | b"iTXt" => {
                let whole = u64::from(size) + 4;
                if kept.len() as u64 + whole > MAX_TEXT as u64 {
                    return Err(bad(&format!(
                        "the PNG file holds more than {MAX_TEXT} bytes of text"
                    )));
                }
                let before = kept.len();
                kept.extend(size.to_be_bytes());
                kept.extend(kind);
                if file.take(whole).read_to_end(&mut kept)? as u64 != whole {
                    kept.truncate(before);
                    return Ok(kept);
                }
            }
            _ => {
                file.seek(SeekFrom::Current(i64::from(size) + 4))?;
            }
        }
    }
    Err(bad(&format!(
        "the PNG file has more than {MAX_CHUNKS} chunks"
    )))
}

/// Decodes text chunks, by way of a picture of one pixel that holds nothing else.
fn texts(chunks: Vec<u8>) -> io::Result<Vec<(String, String)>> {
    if chunks.is_empty() {
        return Ok(Vec::new());
    }
    let mut carrier = Vec::new();
    let mut writer = png::Encoder::new(&mut carrier, 1, 1)
        .write_header()
        .map_err(io::Error::from)?;
    writer.write_image_data(&[0]).map_err(io::Error::from)?;
    writer.finish().map_err(io::Error::from)?;
    // Behind the signature (8) and the header chunk (4 + 4 + 13 + 4).
    let behind_header = SIGNATURE.len() + 25;
    carrier.splice(behind_header..behind_header, chunks);

    let decoder = png::Decoder::new_with_limits(
        Cursor::new(carrier),
        png::Limits {
            bytes: 4 * MAX_TEXT,
        },
    );
    let reader = decoder.read_info().map_err(io::Error::from)?;
    let info = reader.info();
    let mut budget = MAX_TEXT;
    let mut texts = Vec::new();
    for chunk in &info.uncompressed_latin1_text {
        // Stored as Latin-1 under MAX_TEXT, so at most twice that as UTF-8.
        texts.push((chunk.keyword.clone(), chunk.text.clone()));
    }
    for chunk in &info.compressed_latin1_text {
        let mut chunk = chunk.clone();
        if chunk.decompress_text_with_limit(budget).is_ok() {
            keep(
                &mut texts,
                &mut budget,
                chunk.keyword.clone(),
                chunk.get_text(),
            );
        }
    }
    for chunk in &info.utf8_text {
        let mut chunk = chunk.clone();
        if chunk.decompress_text_with_limit(budget).is_ok() {
            keep(
                &mut texts,
                &mut budget,
                chunk.keyword.clone(),
                chunk.get_text(),
            );
        }
    }
    Ok(texts)
}

/// Keeps a sound text and takes it off what may still be unpacked.
fn keep(
    texts: &mut Vec<(String, String)>,
    budget: &mut usize,
    keyword: String,
    text: std::result::Result<String, png::DecodingError>,
) {
    if let Ok(text) = text {
        *budget = budget.saturating_sub(text.len());
        texts.push((keyword, text));
    }
}

fn bad(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;
    use proptest::prelude::*;

    fn picture() -> Image {
        let rgb = (0..5 * 3 * 3)
            .map(|i| u8::try_from(i * 5).unwrap())
            .collect();
        Image {
            width: 5,
            height: 3,
            rgb,
        }
    }

    fn read(bytes: &[u8]) -> io::Result<PngText> {
        read_text_from(&mut Cursor::new(bytes))
    }

    /// Kinds of the chunks of a sound file, with their data.
    fn chunks(bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
        let mut rest = &bytes[8..];
        let mut found = Vec::new();
        while !rest.is_empty() {
            let size = u32::from_be_bytes(rest[..4].try_into().unwrap()) as usize;
            found.push((
                String::from_utf8(rest[4..8].to_vec()).unwrap(),
                rest[8..8 + size].to_vec(),
            ));
            rest = &rest[12 + size..];
        }
        found
    }

    /// A file with `extra` chunks behind its header; checksums are right.
    fn with_chunks(extra: &[([u8; 4], &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = png::Encoder::new(&mut bytes, 1, 1).write_header().unwrap();
        for (kind, data) in extra {
            writer
                .write_chunk(png::chunk::ChunkType(*kind), data)
                .unwrap();
        }
        writer.write_image_data(&[0]).unwrap();
        writer.finish().unwrap();
        bytes
    }

    #[test]
    fn both_texts_and_all_pixels_come_back() {
        let request = serde_json::json!({"prompt": "ice \0 \n Negative prompt: 狐"});
        for (text, kind) in [
            ("fox\nSteps: 1, é\u{ff}", "tEXt"),
            ("狐\nSteps: 1", "iTXt"),
            ("", "tEXt"),
        ] {
            let bytes = encode(&picture(), text, Some(&request)).unwrap();
            let kinds: Vec<String> = chunks(&bytes).into_iter().map(|(kind, _)| kind).collect();
            assert_eq!(kinds, ["IHDR", kind, "iTXt", "IDAT", "IEND"]);
            let back = read(&bytes).unwrap();
            assert_eq!((back.width, back.height), (5, 3));
            assert_eq!(back.get(PARAMETERS), Some(text));
            let back: serde_json::Value = serde_json::from_str(back.get(REQUEST).unwrap()).unwrap();
            assert_eq!(back, request);

            let mut reader = png::Decoder::new(Cursor::new(&bytes)).read_info().unwrap();
            let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
            let info = reader.next_frame(&mut pixels).unwrap();
            assert_eq!(
                (info.color_type, info.bit_depth),
                (png::ColorType::Rgb, png::BitDepth::Eight)
            );
            assert_eq!(pixels, picture().rgb);
        }
    }

    #[test]
    fn nul_does_not_cut_the_text() {
        let bytes = encode(&picture(), "fox\0on ice", None).unwrap();
        assert_eq!(
            read(&bytes).unwrap().get(PARAMETERS),
            Some("fox\u{fffd}on ice")
        );
    }

    #[test]
    fn a_picture_that_does_not_fit_its_size_is_refused() {
        let mut image = picture();
        image.rgb.pop();
        assert!(matches!(encode(&image, "", None), Err(Error::Usage(_))));
        image.width = 0;
        assert!(matches!(encode(&image, "", None), Err(Error::Usage(_))));
    }

    /// Pictures that Pillow wrote (`tests/fixtures/infotext/make.py`).
    #[test]
    fn reads_what_pillow_writes() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/infotext/");
        for (name, text) in [
            ("text.png", "fox, \u{e9}\nSteps: 1"),
            ("itxt.png", "\u{72d0}\nSteps: 1"),
            ("ztxt.png", "fox, packed"),
            ("itxt_packed.png", "\u{72d0}, packed"),
            ("behind_pixels.png", "fox, at the end"),
        ] {
            let found = read_text(Path::new(&format!("{folder}{name}"))).unwrap();
            assert_eq!(found.get(PARAMETERS), Some(text), "{name}");
            assert_eq!((found.width, found.height), (3, 2), "{name}");
        }
    }

    /// Runs when `SD_RS_PYTHON` names a Python with Pillow.
    #[test]
    fn pillow_reads_what_we_write() {
        let Some(python) = std::env::var_os("SD_RS_PYTHON") else {
            return;
        };
        let script = "import json, sys; from PIL import Image; i = Image.open(sys.argv[1]); i.load(); \
                      print(json.dumps([i.mode, i.size, i.tobytes().hex(), i.text]))";
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        for text in ["fox\nSteps: 1, \u{e9}", "\u{72d0}\nSteps: 1"] {
            std::fs::write(
                &path,
                encode(&picture(), text, Some(&serde_json::json!({"n": 1}))).unwrap(),
            )
            .unwrap();
            let run = std::process::Command::new(&python)
                .args(["-c", script])
                .arg(&path)
                .output()
                .unwrap();
            assert!(
                run.status.success(),
                "{}",
                String::from_utf8_lossy(&run.stderr)
            );
            let seen: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
            let hex: String = picture()
                .rgb
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            let texts = serde_json::json!({PARAMETERS: text, REQUEST: "{\"n\":1}"});
            assert_eq!(seen, serde_json::json!(["RGB", [5, 3], hex, texts]));
        }
    }

    #[test]
    fn hostile_files_are_refused_or_harmless() {
        let message = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
        assert_eq!(message(b""), "it is not a PNG file");
        assert_eq!(message(b"<html><body>not found"), "it is not a PNG file");

        let mut huge = with_chunks(&[]);
        huge[16..24].copy_from_slice(&[0, 1, 0x86, 0xa0, 0, 1, 0x86, 0xa0]);
        assert!(
            message(&huge).contains("100000x100000"),
            "{}",
            message(&huge)
        );

        // Claims 4 GiB of text in a file of 100 bytes: ends, without reserving it.
        let mut cut = with_chunks(&[(*b"tEXt", b"parameters\0fox")]);
        cut[33..37].copy_from_slice(&[0xff; 4]);
        assert!(message(&cut).contains("bytes of text"));

        let long = [b"parameters\0".as_slice(), &vec![b'a'; MAX_TEXT]].concat();
        assert!(message(&with_chunks(&[(*b"tEXt", &long)])).contains("bytes of text"));

        // 16 MiB packed into a few KiB; the text beside it is still read.
        let mut packed = Vec::new();
        let mut encoder = png::Encoder::new(&mut packed, 1, 1);
        encoder
            .add_ztxt_chunk("bomb".to_owned(), "a".repeat(16 << 20))
            .unwrap();
        encoder
            .add_text_chunk("parameters".to_owned(), "fox".to_owned())
            .unwrap();
        encoder
            .write_header()
            .unwrap()
            .write_image_data(&[0])
            .unwrap();
        assert!(packed.len() < MAX_TEXT);
        let found = read(&packed).unwrap();
        assert_eq!(found.texts, [("parameters".to_owned(), "fox".to_owned())]);

        // Text that is not UTF-8 where it must be, and an animation of more frames than a u32 holds with one added.
        let invalid = [b"parameters\0\0\0\0\0".as_slice(), &[0xff, 0xfe]].concat();
        let frames = [0xff; 8];
        let found = read(&with_chunks(&[(*b"iTXt", &invalid), (*b"acTL", &frames)])).unwrap();
        assert_eq!(found.texts, []);
    }

    #[test]
    fn a_cut_file_gives_its_whole_texts() {
        let bytes = encode(&picture(), "fox", Some(&serde_json::json!(1))).unwrap();
        for end in 0..bytes.len() {
            match read(&bytes[..end]) {
                Ok(found) => assert!(
                    found
                        .texts
                        .iter()
                        .all(|(_, text)| text == "fox" || text == "1")
                ),
                Err(error) => assert!(end < 24 + 9, "{end}: {error}"),
            }
        }
    }

    proptest! {
        #[test]
        fn damage_never_panics(at in 0..400usize, byte in any::<u8>(), more in prop::collection::vec(any::<u8>(), 0..40)) {
            let mut bytes = encode(&picture(), "狐", Some(&serde_json::json!({"a": 1}))).unwrap();
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = read(&bytes);
            bytes.splice(at..at, more);
            let _ = read(&bytes);
        }

        #[test]
        fn any_text_comes_back(text in any::<String>()) {
            let bytes = encode(&picture(), &text, None).unwrap();
            let (found, expected) = (read(&bytes).unwrap(), text.replace('\0', "\u{fffd}"));
            prop_assert_eq!(found.get(PARAMETERS), Some(expected.as_str()));
        }
    }
}
