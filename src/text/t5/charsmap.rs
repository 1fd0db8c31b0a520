//! SentencePiece's table of normalised characters, looked through before anybody walks it: a trie as a double array of 32-bit units, and behind
//! it the texts that characters become (`sentencepiece/src/normalizer.cc`, darts-clone).

use tokenizers::normalizers::precompiled::Precompiled;

/// The table, if no walk through it can leave it.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub(super) fn read(bytes: &[u8]) -> Result<Precompiled, String> {
    check(bytes).ok_or("its table of normalised characters is damaged")?;
    Precompiled::from(bytes).map_err(|e| e.to_string())
}

/// `None` when a walk could leave the array or a character become a text that is not there.
fn check(bytes: &[u8]) -> Option<()> {
    let (size, rest) = bytes.split_first_chunk::<4>()?;
    let size = usize::try_from(u32::from_le_bytes(*size)).ok()?;
    if size == 0 || size % 4 != 0 {
        return None;
    }
    let (trie, texts) = rest.split_at_checked(size)?;
    let texts = std::str::from_utf8(texts).ok()?;
    let units: Vec<usize> = trie
        .as_chunks::<4>()
        .0
        .iter()
        .map(|unit| u32::from_le_bytes(*unit) as usize)
        .collect();
    for (place, &unit) in units.iter().enumerate() {
        // a unit with the highest bit is a value, which nobody walks through; but every walk begins at the first
        let is_value = (unit >> 31) & 1 == 1;
        if is_value && place > 0 {
            continue;
        }
        let offset = (unit >> 10) << ((unit & (1 << 9)) >> 6);
        let next = place ^ offset;
        if next | 0xff >= units.len() {
            return None;
        }
        let has_leaf = (unit >> 8) & 1 == 1;
        if has_leaf {
            let value = units.get(next)? & ((1 << 31) - 1);
            if !texts.is_char_boundary(value) {
                return None;
            }
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::super::vocabulary::CHARSMAP;
    use super::*;

    #[test]
    fn damaged_tables_are_refused() {
        assert!(read(CHARSMAP).is_ok());
        for bytes in [&[][..], &[0; 4], &[4, 0, 0, 0], &[4, 0, 0, 0, 1, 2, 3, 4]] {
            assert!(read(bytes).is_err());
        }
        assert!(read(&CHARSMAP[..CHARSMAP.len() / 2]).is_err());
        // every unit in turn points far away
        let mut refused = 0;
        for place in (4..4000).step_by(4) {
            let mut bytes = CHARSMAP.to_vec();
            bytes[place..place + 4].copy_from_slice(&0x7fff_fc00u32.to_le_bytes());
            refused += usize::from(read(&bytes).is_err());
        }
        assert_eq!(refused, 999);
    }
}
