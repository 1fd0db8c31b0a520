//! T5's tokens against transformers' tokenizer (`fixtures/text/make_t5.py`), and folders that bring a tokenizer of their own.

use std::path::Path;

use sd_rs::text::T5Tokenizer;
use serde_json::{Value, json};

use crate::support::Dir;

fn assets(name: &str) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::fs::read(root.join("assets/t5").join(name)).unwrap()
}

fn cases() -> Vec<(String, Vec<u32>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("tests/fixtures/text/t5.json")).unwrap();
    let record: Value = serde_json::from_str(&text).unwrap();
    let cases = record["cases"].as_array().unwrap().iter();
    cases
        .map(|case| {
            let ids = serde_json::from_value(case["ids"].clone()).unwrap();
            (case["text"].as_str().unwrap().to_owned(), ids)
        })
        .collect()
}

fn is_transformers(tokenizer: &T5Tokenizer) {
    let cases = cases();
    assert!(cases.len() > 200);
    for (text, ids) in cases {
        let mut got = tokenizer.encode(&text).unwrap();
        got.push(1);
        assert_eq!(got, ids, "{text:?}");
    }
}

#[test]
fn token_ids_are_transformers() {
    is_transformers(&T5Tokenizer::embedded().unwrap());
}

/// The pieces in the order of their ids.
fn pieces() -> Vec<(String, f32)> {
    let text = String::from_utf8(assets("pieces.tsv")).unwrap();
    let own = text.lines().map(|line| {
        let (piece, score) = line.split_once('\t').unwrap();
        (piece.to_owned(), score.parse().unwrap())
    });
    ["<pad>", "</s>", "<unk>"]
        .map(|token| (token.to_owned(), 0.0))
        .into_iter()
        .chain(own)
        .collect()
}

fn field(out: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    out.push(number << 3 | 2);
    let mut len = bytes.len();
    while len >= 0x80 {
        out.push((len & 0x7f) as u8 | 0x80);
        len >>= 7;
    }
    out.push(len as u8);
    out.extend(bytes);
}

/// The same vocabulary as SentencePiece keeps it.
fn spiece() -> Vec<u8> {
    let mut model = Vec::new();
    for (i, (piece, score)) in pieces().into_iter().enumerate() {
        let mut message = Vec::new();
        field(&mut message, 1, piece.as_bytes());
        message.push(2 << 3 | 5);
        message.extend(score.to_le_bytes());
        message.extend([
            3 << 3,
            if i == 2 {
                2
            } else if i < 2 {
                3
            } else {
                1
            },
        ]);
        field(&mut model, 1, &message);
    }
    let mut normalizer = Vec::new();
    field(&mut normalizer, 1, b"nmt_nfkc");
    field(&mut normalizer, 2, &assets("charsmap.bin"));
    field(&mut model, 3, &normalizer);
    model
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let all =
            chunk.iter().fold(0, |all, &b| all << 8 | u32::from(b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = DIGITS[(all >> (18 - 6 * i)) as usize & 63];
            out.push(if i <= chunk.len() { digit as char } else { '=' });
        }
    }
    out
}

#[test]
fn folders_bring_their_own() {
    let dir = Dir::new();
    std::fs::write(dir.path("spiece.model"), spiece()).unwrap();
    is_transformers(&T5Tokenizer::from_folder(dir.root()).unwrap());

    let dir = Dir::new();
    let mut vocab: Vec<Value> = pieces()
        .iter()
        .map(|(p, s)| json!([p, f64::from(*s)]))
        .collect();
    vocab.extend(
        (0..100)
            .rev()
            .map(|i| json!([format!("<extra_id_{i}>"), 0.0])),
    );
    let charsmap =
        json!({ "type": "Precompiled", "precompiled_charsmap": base64(&assets("charsmap.bin")) });
    let file = json!({ "added_tokens": [{ "id": 1, "content": "</s>" }],
        "normalizer": { "type": "Sequence", "normalizers": [charsmap] },
        "model": { "type": "Unigram", "unk_id": 2, "vocab": vocab } });
    std::fs::write(dir.path("tokenizer.json"), file.to_string()).unwrap();
    is_transformers(&T5Tokenizer::from_folder(dir.root()).unwrap());
}

#[test]
fn broken_folders_say_what_is_wrong() {
    let refused = |name: &str, bytes: &[u8]| {
        let dir = Dir::new();
        std::fs::write(dir.path(name), bytes).unwrap();
        T5Tokenizer::from_folder(dir.root())
            .err()
            .unwrap()
            .to_string()
    };
    let json = |value: Value| refused("tokenizer.json", value.to_string().as_bytes());
    let model = |vocab: Value, unk: Value| json!({ "model": { "type": "Unigram", "unk_id": unk, "vocab": vocab } });
    for (message, expected) in [
        (refused("other", b""), "not found"),
        (refused("tokenizer.json", b"{"), "this is no tokenizer"),
        (
            refused("spiece.model", &[0xff; 40]),
            "not a SentencePiece model",
        ),
        (refused("spiece.model", b""), "no piece for what is unknown"),
        (refused("spiece.model", &spiece()[..5000]), "SentencePiece"),
        (
            json(json!({ "model": { "type": "BPE", "vocab": [] } })),
            "expected Unigram",
        ),
        (json(model(json!([]), json!(0))), "cannot be a vocabulary"),
        (
            json(model(json!([["a", 0.0]]), json!(7))),
            "cannot be a vocabulary",
        ),
        (
            json(model(json!([["", 0.0]]), json!(0))),
            "piece 0 is empty",
        ),
        (
            json(model(json!([["a", 0.0]]), json!(0))),
            "is not in the vocabulary",
        ),
        (json(model(json!([["a", 0.0]]), json!(null))), "unk_id"),
    ] {
        assert!(message.contains(expected), "{message}");
    }
    let mut value = model(
        json!([["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0]]),
        json!(2),
    );
    value["normalizer"] = json!({ "precompiled_charsmap": "AAAA" });
    assert!(json(value).contains("damaged"));
}
