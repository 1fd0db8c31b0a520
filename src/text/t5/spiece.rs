//! SentencePiece's `spiece.model`, a protocol buffer: pieces with their scores, and the table of normalised characters
//! (`sentencepiece/src/sentencepiece_model.proto`). Only these fields are read; all lengths are held against what is there.

/// What a model holds.
#[derive(Debug, Default)]
pub(super) struct Spiece<'a> {
    /// Pieces and scores, in the order of their ids.
    pub(super) pieces: Vec<(String, f64)>,
    /// The id of what is unknown.
    pub(super) unknown: Option<usize>,
    /// The table of normalised characters.
    pub(super) charsmap: Option<&'a [u8]>,
}

/// The kind of a piece that stands for what is unknown.
const UNKNOWN: u64 = 2;

/// One field of a message.
enum Field<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    Float(f32),
    Other,
}

/// Reads a model.
///
/// # Errors
/// A sentence that says what is wrong.
pub(super) fn read(bytes: &[u8]) -> Result<Spiece<'_>, String> {
    let mut model = Spiece::default();
    each(bytes, |number, field| {
        match (number, field) {
            (1, Field::Bytes(piece)) => {
                let (text, score, kind) = read_piece(piece)?;
                if kind == UNKNOWN && model.unknown.is_none() {
                    model.unknown = Some(model.pieces.len());
                }
                model.pieces.push((text, score));
            }
            // normalizer_spec
            (3, Field::Bytes(spec)) => each(spec, |number, field| {
                if let (2, Field::Bytes(charsmap)) = (number, field)
                    && !charsmap.is_empty()
                {
                    model.charsmap = Some(charsmap);
                }
                Ok(())
            })?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(model)
}

fn read_piece(bytes: &[u8]) -> Result<(String, f64, u64), String> {
    let (mut text, mut score, mut kind) = (String::new(), 0.0, 1);
    each(bytes, |number, field| {
        match (number, field) {
            (1, Field::Bytes(bytes)) => {
                let piece = std::str::from_utf8(bytes);
                text = piece
                    .map_err(|_| "a piece is not UTF-8".to_owned())?
                    .to_owned();
            }
            (2, Field::Float(value)) => score = f64::from(value),
            (3, Field::Varint(value)) => kind = value,
            _ => {}
        }
        Ok(())
    })?;
    Ok((text, score, kind))
}

/// Calls `take` for every field of a message.
fn each<'a>(
    mut bytes: &'a [u8],
    mut take: impl FnMut(u64, Field<'a>) -> Result<(), String>,
) -> Result<(), String> {
    while !bytes.is_empty() {
        let (number, field) = next(&mut bytes).ok_or("it is not a SentencePiece model")?;
        take(number, field)?;
    }
    Ok(())
}

fn next<'a>(bytes: &mut &'a [u8]) -> Option<(u64, Field<'a>)> {
    let key = varint(bytes)?;
    let field = match key & 7 {
        0 => Field::Varint(varint(bytes)?),
        1 => {
            take::<8>(bytes)?;
            Field::Other
        }
        2 => {
            let len = usize::try_from(varint(bytes)?).ok()?;
            let (own, rest) = bytes.split_at_checked(len)?;
            *bytes = rest;
            Field::Bytes(own)
        }
        5 => Field::Float(f32::from_le_bytes(take::<4>(bytes)?)),
        _ => return None,
    };
    Some((key >> 3, field))
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (own, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*own)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let [byte] = take::<1>(bytes)?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn pieces_scores_and_tables_are_read_and_rubbish_refused() {
        // { 1: { 1: "<unk>", 3: 2 }, 1: { 1: "ab", 2: -1.5 }, 3: { 2: "xyz" }, 2: {} }
        let mut bytes = vec![0x0a, 9, 0x0a, 5];
        bytes.extend(b"<unk>");
        bytes.extend([0x18, 2, 0x0a, 9, 0x0a, 2]);
        bytes.extend(b"ab");
        bytes.push(0x15);
        bytes.extend((-1.5f32).to_le_bytes());
        bytes.extend([0x1a, 5, 0x12, 3]);
        bytes.extend(b"xyz");
        bytes.extend([0x12, 0]);
        let model = read(&bytes).unwrap();
        assert_eq!(
            model.pieces,
            [("<unk>".to_owned(), 0.0), ("ab".to_owned(), -1.5)]
        );
        assert_eq!(
            (model.unknown, model.charsmap),
            (Some(0), Some(&b"xyz"[..]))
        );
        for end in 1..bytes.len() {
            let _ = read(&bytes[..end]);
        }
        assert!(read(&bytes[..5]).is_err() && read(&[0xff; 30]).is_err());
        assert!(
            read(&[
                0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1
            ])
            .is_err()
        );
    }
}
