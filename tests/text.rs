//! Prompts to tokens: against transformers' tokenizer and A1111's rules (`fixtures/text/make.py`), and properties of any input.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use proptest::prelude::*;
use sd_rs::text::chunks::{Chunk, Chunking, emphasis_scale};
use sd_rs::text::prompt::{MAX_WEIGHT, Piece, Role, Syntax, parse};
use sd_rs::text::tokenizer::ClipTokenizer;
use serde::de::DeserializeOwned;
use serde_json::Value;

static CLIP: LazyLock<ClipTokenizer> = LazyLock::new(|| ClipTokenizer::embedded().unwrap());

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/text")
}

fn table<T: DeserializeOwned>(name: &str) -> Vec<T> {
    let text = std::fs::read_to_string(fixtures().join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn a1111(text: &str) -> sd_rs::error::Result<Vec<Piece>> {
    parse(text, Syntax::A1111, Role::Prompt)
}

const PLAIN: Chunking = Chunking {
    syntax: Syntax::Plain,
    length: 77,
};

#[test]
fn token_ids_are_transformers() {
    for (text, ids) in table::<(String, Vec<u32>)>("tokens.json") {
        assert_eq!(CLIP.encode(&text).unwrap(), ids, "{text:?}");
    }
}

/// A piece as the fixtures write it: `"BREAK"` or `[text, weight]`.
fn piece(value: &Value) -> Piece {
    match value.as_array() {
        None => Piece::Break,
        Some(pair) => Piece::Text {
            text: pair[0].as_str().unwrap().to_owned(),
            weight: pair[1].as_str().unwrap().parse().unwrap(),
        },
    }
}

#[derive(serde::Deserialize)]
struct Expected {
    text: String,
    pieces: Vec<Value>,
    chunks: Vec<ExpectedChunk>,
    zeros: Vec<usize>,
}

#[derive(serde::Deserialize)]
struct ExpectedChunk {
    ids: Vec<u32>,
    /// Positions and weights other than 1.
    weights: Vec<(usize, String)>,
}

#[test]
fn weights_and_chunks_are_a1111s() {
    let zero = CLIP.clone().with_pad(0);
    for case in table::<Expected>("prompts.json") {
        let text = &case.text;
        let pieces: Vec<Piece> = case.pieces.iter().map(piece).collect();
        assert_eq!(a1111(text).unwrap(), pieces, "{text:?}");

        let made = Chunking::default()
            .tokenize(&CLIP, text, Role::Prompt)
            .unwrap();
        let padded = Chunking::default()
            .tokenize(&zero, text, Role::Prompt)
            .unwrap();
        assert!(made.warnings.is_empty());
        assert_eq!(made.chunks.len(), case.chunks.len(), "{text:?}");
        for (i, expected) in case.chunks.iter().enumerate() {
            let mut weights = vec![1.0; 77];
            for (at, weight) in &expected.weights {
                weights[*at] = weight.parse::<f64>().unwrap() as f32;
            }
            assert_eq!(made.chunks[i].is_weighted(), !expected.weights.is_empty());
            let mut ids = expected.ids.clone();
            assert_eq!(
                made.chunks[i],
                Chunk {
                    ids: ids.clone(),
                    weights: weights.clone()
                },
                "{text:?}, chunk {i}"
            );
            ids[77 - case.zeros[i]..].fill(0);
            assert_eq!(
                padded.chunks[i],
                Chunk { ids, weights },
                "{text:?}, chunk {i}, padded with 0"
            );
        }
    }
}

#[test]
fn what_is_not_built_is_refused() {
    for (what, text) in table::<(String, String)>("refused.json") {
        let error = a1111(&text).expect_err(&text);
        assert_eq!(error.code(), "unsupported", "{text:?}: {error}");
        assert!(error.to_string().contains(&what), "{text:?}: {error}");
    }
}

#[test]
fn plain_text_is_cut_as_diffusers_cuts_it() {
    // What is quoted is the user's own text; transformers gives back tokens, in lower case and with spaces of its own.
    let bare = |text: &str| text.to_lowercase().split_whitespace().collect::<String>();
    for (text, ids, cut) in table::<(String, Vec<u32>, String)>("plain.json") {
        let made = PLAIN.tokenize(&CLIP, &text, Role::Negative).unwrap();
        assert_eq!(
            made.chunks,
            [Chunk {
                ids,
                weights: vec![1.0; 77]
            }],
            "{text:?}"
        );
        assert_eq!(
            made.warnings.len(),
            usize::from(!cut.is_empty()),
            "{text:?}"
        );
        for warning in &made.warnings {
            assert!(warning.starts_with("the negative prompt has"), "{warning}");
            let mut ends = text.char_indices().map(|(at, _)| &text[at..]);
            let quoted = ends
                .find(|end| warning.ends_with(&format!("cut off: {end:?}")))
                .expect(warning);
            assert!(bare(quoted).ends_with(&bare(&cut)), "{quoted:?} {cut:?}");
            assert!(
                bare(quoted).len() < bare(&cut).len() + 4,
                "{quoted:?} {cut:?}"
            );
        }
    }
}

#[test]
fn a_pair_has_as_many_chunks_on_either_side() {
    let clip = CLIP.clone().with_pad(0);
    let [prompt, negative] = Chunking::default()
        .tokenize_pair(&clip, "a BREAK b BREAK c", "salt AND pepper")
        .unwrap();
    assert_eq!((prompt.chunks.len(), negative.chunks.len()), (3, 3));
    let mut empty = vec![0; 77];
    empty[..2].copy_from_slice(&[49406, 49407]);
    assert_eq!(
        negative.chunks[2],
        Chunk {
            ids: empty,
            weights: vec![1.0; 77]
        }
    );
    assert_eq!(negative.chunks[1], negative.chunks[2]);
}

#[test]
fn other_context_lengths() {
    let short = |length| Chunking {
        length,
        ..Chunking::default()
    };
    let made = short(5)
        .tokenize(&CLIP, "a b c, d e f", Role::Prompt)
        .unwrap();
    // Three tokens to a chunk; the comma opens the second, and goes no further back.
    let ids: Vec<&[u32]> = made.chunks.iter().map(|c| &c.ids[1..4]).collect();
    let all = CLIP.encode("a b c, d e f").unwrap();
    assert_eq!(ids, [&all[..3], &all[3..6], &[all[6], 49407, 49407]]);
    for length in [0, 2, usize::MAX] {
        assert!(short(length).tokenize(&CLIP, "a", Role::Prompt).is_err());
        assert!(
            Chunking { length, ..PLAIN }
                .tokenize(&CLIP, "a", Role::Prompt)
                .is_err()
        );
    }
}

#[test]
fn the_mean_is_restored_or_it_is_an_error() {
    assert_eq!(emphasis_scale(-0.1, -0.2).unwrap(), 0.5);
    assert_eq!(emphasis_scale(0.1, 0.0).unwrap_err().code(), "numeric");
    assert!(emphasis_scale(f64::NAN, 1.0).is_err());
}

#[derive(serde::Deserialize)]
struct Folder {
    folder: String,
    ids: [u32; 3],
    texts: Vec<(String, Vec<u32>)>,
}

#[test]
fn folders_are_read_as_transformers_reads_them() {
    for case in table::<Folder>("folders.json") {
        let name = &case.folder;
        let made = ClipTokenizer::from_folder(&fixtures().join("folders").join(name)).unwrap();
        assert_eq!([made.bos(), made.eos(), made.pad()], case.ids, "{name}");
        for (text, ids) in case.texts {
            assert_eq!(made.encode(&text).unwrap(), ids, "{name}: {text:?}");
        }
    }
}

#[test]
fn a_folder_with_our_vocabulary_is_the_embedded_tokenizer() {
    let asset = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/clip/merges.txt");
    let merges = std::fs::read_to_string(asset).unwrap();
    let joined = merges.lines().map(|line| line.replacen(' ', "", 1));
    let small = fixtures().join("folders/bare/vocab.json");
    let small: serde_json::Map<String, Value> =
        serde_json::from_slice(&std::fs::read(small).unwrap()).unwrap();
    let specials = ["<|startoftext|>", "<|endoftext|>"].map(str::to_owned);
    let words = small
        .keys()
        .take(512)
        .cloned()
        .chain(joined)
        .chain(specials);
    let vocab: serde_json::Map<String, Value> = words
        .zip(0u32..)
        .map(|(word, id)| (word, id.into()))
        .collect();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(
        folder.path().join("vocab.json"),
        serde_json::to_vec(&vocab).unwrap(),
    )
    .unwrap();
    std::fs::write(
        folder.path().join("merges.txt"),
        format!("#version: 0.2\r\n{}", merges.replace('\n', "\r\n")),
    )
    .unwrap();
    let made = ClipTokenizer::from_folder(folder.path()).unwrap();
    made.check_vocab(49408).unwrap();
    for (text, ids) in table::<(String, Vec<u32>)>("tokens.json") {
        assert_eq!(made.encode(&text).unwrap(), ids, "{text:?}");
    }
}

/// The fixture folder `kind` with some files replaced, and the error of reading it.
fn broken(kind: &str, files: &[(&str, &[u8])]) -> String {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(fixtures().join("folders").join(kind)).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    ClipTokenizer::from_folder(folder.path())
        .unwrap_err()
        .to_string()
}

#[test]
fn broken_folders_say_what_is_wrong() {
    let deep = "[".repeat(100_000);
    let huge = vec![b' '; (32 << 20) + 1];
    let whole = |model: &str| format!("{{\"model\": {model}}}").into_bytes();
    let cases: [(&str, &str, Vec<u8>, &[&str]); 17] = [
        ("bare", "vocab.json", vec![], &["vocab.json", "JSON"]),
        (
            "bare",
            "vocab.json",
            b"{\"a\": -1}".to_vec(),
            &["vocab.json", "JSON"],
        ),
        (
            "bare",
            "vocab.json",
            b"{\"a\": 1, \"b\": 1}".to_vec(),
            &["vocab.json", "two tokens have the id 1"],
        ),
        (
            "bare",
            "vocab.json",
            b"{\"a\": 1}".to_vec(),
            &["merges.txt", "vocabulary lacks"],
        ),
        (
            "bare",
            "vocab.json",
            vec![0xff, 0xfe],
            &["vocab.json", "UTF-8"],
        ),
        (
            "bare",
            "merges.txt",
            b"a b c\n".to_vec(),
            &["merges.txt", "line 1", "a b c"],
        ),
        (
            "bare",
            "merges.txt",
            b"i n\nin i\n".to_vec(),
            &["merges.txt", "ini"],
        ),
        ("bare", "merges.txt", huge, &["merges.txt", "32 MB"]),
        (
            "bare",
            "tokenizer.json",
            deep.into_bytes(),
            &["tokenizer.json", "JSON"],
        ),
        (
            "bare",
            "tokenizer.json",
            whole("{\"type\": \"Unigram\"}"),
            &["tokenizer.json", "Unigram"],
        ),
        (
            "bare",
            "tokenizer.json",
            whole("{\"type\": \"BPE\", \"vocab\": {}, \"end_of_word_suffix\": \"</w>\"}"),
            &["<|startoftext|>", "not in the vocabulary"],
        ),
        (
            "bare",
            "tokenizer.json",
            whole("{\"vocab\": [], \"end_of_word_suffix\": \"</w>\"}"),
            &["model.vocab"],
        ),
        (
            "bare",
            "tokenizer_config.json",
            b"{\"pad_token\": 3}".to_vec(),
            &["tokenizer_config.json"],
        ),
        (
            "bare",
            "tokenizer_config.json",
            b"{\"added_tokens_decoder\": {\"x\": {\"content\": \"a\"}}}".to_vec(),
            &["tokenizer_config.json", "\"x\""],
        ),
        (
            "added",
            "added_tokens.json",
            b"{\"<new>\": 900}".to_vec(),
            &["<new>", "900", "574"],
        ),
        (
            "bare",
            "special_tokens_map.json",
            b"[]".to_vec(),
            &["special_tokens_map.json"],
        ),
        (
            "whole",
            "tokenizer.json",
            b"<html>".to_vec(),
            &["tokenizer.json", "JSON"],
        ),
    ];
    for (kind, name, bytes, parts) in cases {
        let message = broken(kind, &[(name, &bytes)]);
        for part in parts {
            assert!(message.contains(part), "{name}: {message:?} lacks {part:?}");
        }
    }
    let none = tempfile::tempdir().unwrap();
    assert_eq!(
        ClipTokenizer::from_folder(none.path()).unwrap_err().code(),
        "not-found"
    );
}

#[test]
fn ids_beyond_the_text_model_are_found() {
    let added = ClipTokenizer::from_folder(&fixtures().join("folders/added")).unwrap();
    added.check_vocab(575).unwrap();
    assert!(added.check_vocab(574).is_err());
}

/// Texts of the characters that mean something, and of any others.
fn texts() -> impl Strategy<Value = String> {
    let parts = prop::sample::select(vec![
        "(", ")", "[", "]", ":", "\\", "|", "1.3", ":1.2)", ":-.5)", " BREAK ", "BREAK", "AND",
        "<", ">", "<lora:", "a", "fox", ",", " ", "\n", "é", "🦊", "0", ".", "e5",
    ]);
    let marked = prop::collection::vec(parts, 0..60).prop_map(|parts| parts.concat());
    prop_oneof![3 => marked, 1 => any::<String>()]
}

proptest! {
    #[test]
    fn any_text_parses_or_is_refused(text in texts()) {
        for role in [Role::Prompt, Role::Negative] {
            match parse(&text, Syntax::A1111, role) {
                Ok(pieces) => for piece in pieces {
                    if let Piece::Text { text, weight } = piece {
                        prop_assert!(!text.is_empty() && weight.abs() <= MAX_WEIGHT);
                    }
                },
                Err(error) => prop_assert!(["usage", "unsupported"].contains(&error.code())),
            }
        }
    }

    #[test]
    fn any_text_makes_whole_chunks(text in texts(), length in 3usize..100, syntax in prop::sample::select(vec![Syntax::A1111, Syntax::Plain])) {
        if let Ok(made) = (Chunking { syntax, length }).tokenize(&CLIP, &text, Role::Negative) {
            prop_assert!(!made.chunks.is_empty());
            for chunk in made.chunks {
                prop_assert_eq!((chunk.ids.len(), chunk.weights.len()), (length, length));
                prop_assert_eq!((chunk.ids[0], chunk.ids[length - 1]), (49406, 49407));
                prop_assert_eq!((chunk.weights[0], chunk.weights[length - 1]), (1.0, 1.0));
            }
        }
    }

    #[test]
    fn text_without_marks_is_kept(text in r"[^\\()\[\]:|<]*") {
        prop_assume!(!text.contains("BREAK") && !text.contains("AND"));
        let kept: String = a1111(&text).unwrap().iter().map(|piece| match piece {
            Piece::Text { text, weight } => { assert_eq!(*weight, 1.0); text.as_str() }
            Piece::Break => "",
        }).collect();
        prop_assert_eq!(kept, text);
    }

    #[test]
    fn escaped_text_is_kept(text in any::<String>()) {
        prop_assume!(!text.contains("BREAK") && !text.contains("AND") && !text.contains(['<', '|']));
        let escaped: String = text.chars().flat_map(|c| "()[]\\".contains(c).then_some('\\').into_iter().chain([c])).collect();
        let pieces = a1111(&escaped).unwrap();
        let expected = (!text.is_empty()).then_some(Piece::Text { text, weight: 1.0 });
        prop_assert_eq!(pieces, expected.into_iter().collect::<Vec<_>>());
    }
}
