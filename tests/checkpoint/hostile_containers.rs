//! PyTorch checkpoints and GGUF files that are broken or hostile: each its own sentence, none a panic, nothing run, nothing large made.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use sd_rs::checkpoint::TensorFile;

use super::build::file_of;
use super::containers::fixture;
use crate::support::containers::{Gguf, Pickle, gguf_text, zip, zip64};

/// Why a file is not read: one printable sentence.
fn refusal(bytes: &[u8]) -> String {
    let file = file_of(bytes);
    let started = Instant::now();
    let error = TensorFile::open(&file.path, true).expect_err("accepted");
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(error.code(), "bad-model", "{error}");
    let message = error.to_string();
    let sentence = message.strip_prefix(&format!("{}: ", file.path.display()));
    let sentence = sentence.expect("the file is named").to_owned();
    assert!(!sentence.contains(char::is_control), "{sentence:?}");
    assert!(sentence.len() < 1000, "{sentence}");
    sentence
}

#[track_caller]
fn refused(what: &str, bytes: &[u8], expected: &str) {
    let sentence = refusal(bytes);
    assert!(sentence.contains(expected), "{what}: {sentence}");
}

/// An archive of a pickle and one record of eight bytes.
fn archive(pickle: Pickle) -> Vec<u8> {
    zip(&[
        ("m/data.pkl".to_owned(), pickle.end()),
        ("m/data/0".to_owned(), vec![1; 8]),
    ])
}

/// `{'a': …}` around a tensor over two floats.
fn one(offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let pickle = Pickle::new().raw(b"}").text("a");
    archive(
        pickle
            .tensor(("0", "Float", 2), offset, shape, strides)
            .raw(b"s"),
    )
}

#[test]
fn what_a_pickle_may_not_ask_for_is_named() {
    let call = |name: &str| {
        let pickle = Pickle::new().raw(b"}").text("state_dict");
        archive(pickle.global(name).text("touch hacked").raw(b"\x85Rs"))
    };
    for name in [
        "os.system",
        "posix.system",
        "subprocess.Popen",
        "builtins.eval",
        "builtins.exec",
        "builtins.getattr",
        "__builtin__.apply",
        "torch.load",
        "numpy.load",
        "webbrowser.open",
        "ldm.models.diffusion.ddpm.LatentDiffusion",
    ] {
        refused(name, &call(name), &format!("asks for `{name}`"));
    }
    // however it is asked, and whatever follows: before good tensors, never called, by texts, by old instructions, from a bare stream
    let stacked = Pickle::new().raw(b"\x8c\x02os\x8c\x06system\x93");
    refused("stack", &archive(stacked), "asks for `os.system`");
    refused(
        "instance",
        &archive(Pickle::new().raw(b"(ios\nsystem\n")),
        "`os.system`",
    );
    let never = Pickle::new().global("os.system").raw(b"0}").text("a");
    let never = never.tensor(("0", "Float", 2), 0, &[2], &[1]).raw(b"s");
    refused("never called", &archive(never), "`os.system`");
    let mut stream = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.".to_vec();
    stream.extend(Pickle::new().global("os.system").end());
    refused("stream", &stream, "`os.system`");
    refused(
        "escape",
        &call("o\u{1b}[2Js.system"),
        "`o\\u{1b}[2Js.system`",
    );
    assert!(!std::path::Path::new("hacked").exists());
}

#[test]
fn broken_pickles_are_told_apart() {
    let raw = |bytes: &[u8]| archive(Pickle::new().raw(bytes));
    for (what, bytes, expected) in [
        ("unknown", raw(b"\xff"), "unknown instruction 0xff at byte"),
        ("empty stack", raw(b"0"), "values that were never given"),
        ("no mark", raw(b"}u"), "values that were never given"),
        ("memo", raw(b"h\x05"), "values that were never given"),
        ("wide memo", raw(b"}r\xff\xff\xff\xff"), "holds no tensors"),
        ("nothing", raw(b"N"), "holds no tensors"),
        ("protocol", raw(b"\x80\x09"), "protocol 9"),
        ("long text", raw(b"X\xff\xff\xff\xff"), "ends in the middle"),
        (
            "longer text",
            raw(b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffx"),
            "ends in the middle",
        ),
        (
            "long number",
            raw(b"\x8b\xff\xff\xff\x7f"),
            "ends in the middle",
        ),
        ("not UTF-8", raw(b"X\x01\0\0\0\xff"), "not valid UTF-8"),
        ("no name", raw(&[b'c'; 2000]), "a name that is no name"),
        ("outside", raw(b"NQ"), "no storage of numbers"),
        (
            "not a record",
            archive(
                Pickle::new()
                    .raw(b"}")
                    .text("a")
                    .tensor(("../0", "Float", 2), 0, &[2], &[1])
                    .raw(b"s"),
            ),
            "(record `../0`) are not in the file",
        ),
        (
            "negative",
            one(-1, &[1], &[1]),
            "in a way that torch.save does not",
        ),
        (
            "offset",
            one(2, &[1], &[1]),
            "reaches beyond its storage of 8 bytes",
        ),
        (
            "far",
            one(i64::MAX, &[1], &[1]),
            "reaches beyond its storage",
        ),
        ("shape", one(0, &[3], &[1]), "reaches beyond its storage"),
        (
            "stride",
            one(0, &[2], &[i64::MAX]),
            "reaches beyond its storage",
        ),
        (
            "wide",
            one(0, &[i64::MAX], &[0]),
            "and 2147483648 is the limit",
        ),
        (
            "product",
            one(0, &[1 << 31, 1 << 31, 1 << 31], &[0, 0, 0]),
            "impossible shape",
        ),
        (
            "repeats",
            one(0, &[1 << 20, 1 << 20], &[0, 0]),
            "repeats the 2 numbers of its storage",
        ),
        (
            "rank",
            one(0, &[1; 9], &[1; 9]),
            "9 dimensions, and 8 is the limit",
        ),
        (
            "strides",
            one(0, &[1, 1], &[1]),
            "in a way that torch.save does not",
        ),
    ] {
        refused(what, &bytes, expected);
    }
    let count = Pickle::new()
        .raw(b"}")
        .text("a")
        .tensor(("0", "Float", 3), 0, &[1], &[1]);
    refused(
        "count",
        &archive(count.raw(b"s")),
        "reaches beyond its storage",
    );
    let two = |p: Pickle| {
        p.text("a")
            .tensor(("0", "Float", 2), 0, &[2], &[1])
            .raw(b"s")
    };
    refused(
        "twice",
        &archive(two(two(Pickle::new().raw(b"}")))),
        "duplicate tensor `a`",
    );
    refused(
        "plain",
        b"\x80\x03}q\0X\x01\0\0\0aK\x01s.........",
        "that torch.save did not write",
    );
    refused(
        "cut",
        b"\x80\x02\x8a\nl\xfc",
        "ends in the middle of its header",
    );
}

#[test]
fn bombs_stay_small() {
    // 1,500,000 lists in each other, a list in itself, and eleven levels of ten references each
    let mut deep = Pickle::new().raw(&vec![b']'; 1_500_000]);
    deep = deep.raw(&vec![b'a'; 1_499_999]);
    let many = "more than 2000000 instructions";
    refused("deep", &archive(deep), many);
    let marks = Pickle::new().raw(&vec![b'('; 1_999_000]);
    refused("marks", &archive(marks), "values that were never given");
    refused(
        "itself",
        &archive(Pickle::new().raw(b"]q\0h\0a")),
        "holds no tensors",
    );
    let mut laughs = Pickle::new().raw(b"]q\0");
    for level in 1..=11u8 {
        laughs = laughs
            .raw(b"](")
            .raw(&[b'h', level - 1].repeat(10))
            .raw(&[b'e', b'q', level]);
    }
    refused("laughs", &archive(laughs), "more than 1000000 values");
    // a long list of pairs, made a dict again and again
    let mut pairs = Pickle::new()
        .raw(b"](")
        .raw(&b"NN\x86".repeat(100_000))
        .raw(b"eq\0");
    pairs = pairs.global("collections.OrderedDict").raw(b"q\x01");
    pairs = pairs.raw(&b"h\x01h\0\x85R0".repeat(1000));
    refused("copies", &archive(pairs), many);
    let endless = Pickle::new().raw(&b"N0".repeat(1_100_000));
    refused("endless", &archive(endless), many);
}

/// Where the directory of an archive begins.
fn directory(file: &[u8]) -> usize {
    let at = file.len() - 6;
    u32::from_le_bytes(file[at..at + 4].try_into().unwrap()) as usize
}

/// The archive with some bytes changed, counted from the directory's beginning.
fn spoiled(file: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    let at = directory(&file) + at;
    file[at..at + bytes.len()].copy_from_slice(bytes);
    file
}

#[test]
fn broken_archives_are_told_apart() {
    let good = one(0, &[2], &[1]);
    TensorFile::open(&file_of(&good).path, true).unwrap();
    let second = 46 + "m/data.pkl".len();
    for (what, bytes, expected) in [
        (
            "cut",
            good[..good.len() - 30].to_vec(),
            "the end of its zip archive is missing,",
        ),
        (
            "half",
            good[..good.len() / 2].to_vec(),
            "the end of its zip archive is missing,",
        ),
        (
            "start",
            b"PK\x03\x04".to_vec(),
            "the end of its zip archive is missing,",
        ),
        (
            "deflated",
            spoiled(&good, 10, &[8]),
            "`m/data.pkl` of its archive is compressed",
        ),
        (
            "bomb",
            spoiled(&good, second + 24, &[0, 0, 0, 0x7f]),
            "`m/data/0` of its archive is compressed (8 bytes for 2130706432)",
        ),
        ("encrypted", spoiled(&good, 8, &[1]), "is encrypted"),
        (
            "long",
            spoiled(&good, second + 20, &[9, 0, 0, 0, 9, 0, 0, 0]),
            "does not lie in front of the archive's directory",
        ),
        (
            "huge",
            spoiled(&good, second + 20, &[0xfe; 8]),
            "does not lie in front of the archive's directory",
        ),
        (
            "far",
            spoiled(&good, second + 42, &[0xfe; 4]),
            "does not lie in front of",
        ),
        (
            "elsewhere",
            spoiled(&good, second + 42, &[0; 4]),
            "is not where the archive's directory says",
        ),
        (
            "directory",
            spoiled(&good, 0, b"XX"),
            "directory of its zip archive is damaged",
        ),
    ] {
        refused(what, &bytes, expected);
    }
    let end = good.len() - 22;
    refused(
        "more",
        &[&good[..], b"GGUF"].concat(),
        "or something was appended to it",
    );
    let mut comment = [&good[..], b"a comment"].concat();
    comment[end + 20] = 9;
    TensorFile::open(&file_of(&comment).path, true).unwrap();
    let mut outside = good.clone();
    outside[end + 12..end + 16].fill(0x7f);
    refused("outside", &outside, "has no room for it there");
    let mut wide = good.clone();
    wide[end + 16..end + 20].fill(0xff);
    refused("zip64", &wide, "zip64 record of its archive is missing");
    let mut parts = good.clone();
    parts[end + 4] = 1;
    refused("parts", &parts, "in several parts");
    let pickle = || Pickle::new().raw(b"}").end();
    let entry = |name: &str| (name.to_owned(), pickle());
    refused(
        "none",
        &zip(&[entry("m/x.txt")]),
        "without a PyTorch checkpoint",
    );
    refused(
        "two",
        &zip(&[entry("a/data.pkl"), entry("b/data.pkl")]),
        "more than one data.pkl",
    );
    refused(
        "twice",
        &zip(&[entry("a/data.pkl"), entry("a/data.pkl")]),
        "`a/data.pkl` twice",
    );
    refused(
        "script",
        &zip(&[entry("a/data.pkl"), entry("a/constants.pkl")]),
        "a TorchScript program",
    );
    let big = zip(&[
        entry("a/data.pkl"),
        ("a/byteorder".to_owned(), b"big".to_vec()),
    ]);
    refused("big-endian", &big, "big-endian machine");
    // the second entry inside the first, under a header of its own
    let inner = zip(&[("m/data/0".to_owned(), vec![1u8; 8])]);
    let hidden = zip(&[
        ("m/data.pkl".to_owned(), [&pickle()[..], &inner].concat()),
        ("m/data/0".to_owned(), vec![1; 8]),
    ]);
    let inside = (30 + "m/data.pkl".len() + pickle().len()) as u32;
    refused(
        "overlap",
        &spoiled(&hidden, second + 42, &inside.to_le_bytes()),
        "`m/data.pkl` and `m/data/0` of its archive overlap",
    );
}

#[test]
fn wide_archives_are_read_and_their_records_checked() {
    let pickle = Pickle::new().raw(b"}").text("a");
    let pickle = pickle.tensor(("0", "Float", 2), 0, &[2], &[1]).raw(b"s");
    let good = zip64(&[
        ("m/data.pkl".to_owned(), pickle.end()),
        ("m/data/0".to_owned(), b"12345678".to_vec()),
    ]);
    let open = TensorFile::open(&file_of(&good).path, true).unwrap();
    assert_eq!(
        &open.bytes(open.get("a").unwrap()).unwrap()[..],
        b"12345678"
    );
    let end = good.len() - 22;
    let with = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let wrong = "zip64 record of its archive is missing or wrong";
    refused("locator", &with(end - 20, b"XX"), wrong);
    refused("record far", &with(end - 12, &[0xff; 8]), wrong);
    refused("record", &with(end - 76, b"XX"), wrong);
    refused(
        "offset",
        &with(end - 76 + 48, &[0xff; 8]),
        "has no room for it there",
    );
    // the last entry's own offset
    refused(
        "entry",
        &with(end - 84, &[0xff; 8]),
        "does not lie in front of",
    );
}

#[test]
fn broken_streams_are_told_apart() {
    let good = std::fs::read(fixture("lightning-old.ckpt")).unwrap();
    refused("cut", &good[..good.len() - 1], "ends in the middle");
    refused("half", &good[..good.len() / 2], "ends in the middle");
    refused(
        "more",
        &[&good[..], b"PK"].concat(),
        "the last 2 bytes of the file belong to no tensor",
    );
    let at = |needle: &[u8]| {
        good.windows(needle.len())
            .position(|w| w == needle)
            .unwrap()
            + needle.len()
    };
    let mut big = good.clone();
    big[at(b"little_endianq\x02")] = 0x89;
    refused("big-endian", &big, "big-endian machine");
    let mut version = good.clone();
    version[at(b"\x19.\x80\x02M")] = 0;
    refused("version", &version, "unknown version");
}

/// A file of two tensors.
fn gguf() -> Gguf {
    let mut file = Gguf::new();
    file.key("general.name", 8, &gguf_text("x"));
    file.tensor("a", &[2, 4], 0, vec![1; 32]);
    file.tensor("b", &[2, 32], 8, vec![1; 68]);
    file
}

fn changed(change: impl FnOnce(&mut Gguf)) -> Vec<u8> {
    let mut file = gguf();
    change(&mut file);
    file.bytes()
}

#[test]
fn broken_gguf_files_are_told_apart() {
    let good = gguf().bytes();
    TensorFile::open(&file_of(&good).path, true).unwrap();
    let with = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let huge = u64::MAX.to_le_bytes();
    let key = |name: &'static str, kind: u32, value: Vec<u8>| {
        changed(|f| {
            f.key(name, kind, &value);
        })
    };
    let align = |n: u32| key("general.alignment", 4, n.to_le_bytes().to_vec());
    let array = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    let nested: Vec<u8> = (0..6).flat_map(|_| array(9, 1)).collect();
    let shape = |dims: Vec<u64>| changed(|f| f.tensors[0].1 = dims);
    for (what, bytes, expected) in [
        (
            "magic alone",
            b"GGUF".to_vec(),
            "ends in the middle of its header",
        ),
        (
            "version 1",
            with(4, &[1]),
            "version 1, which was in use for a few days",
        ),
        (
            "version 9",
            with(4, &[9]),
            "version 9, and 2 and 3 are read",
        ),
        ("big-endian", with(4, &[0, 0, 0, 3]), "big-endian"),
        (
            "tensors",
            with(8, &huge),
            "should hold 18446744073709551615 tensors",
        ),
        ("keys", with(16, &huge), "18446744073709551615 keys"),
        ("none", Gguf::new().bytes(), "holds no tensors"),
        (
            "key",
            with(24, &huge),
            "a key of 18446744073709551615 bytes",
        ),
        ("text", key("k", 8, huge.to_vec()), "ends in the middle"),
        (
            "array",
            key("k", 9, array(0, u64::MAX)),
            "ends in the middle",
        ),
        (
            "wide array",
            key("k", 9, array(12, u64::MAX / 4)),
            "ends in the middle",
        ),
        (
            "texts",
            key("k", 9, array(8, 1 << 40)),
            "ends in the middle",
        ),
        ("nested", key("k", 9, nested), "arrays lie deeper than 4"),
        (
            "type of key",
            key("k", 77, vec![]),
            "of the unknown type 77",
        ),
        (
            "key twice",
            key("general.name", 8, gguf_text("y")),
            "the key `general.name` twice",
        ),
        ("alignment 0", align(0), "an alignment of 0"),
        ("alignment 3", align(3), "an alignment of 3"),
        (
            "alignment text",
            key("general.alignment", 8, gguf_text("\u{1b}")),
            "an alignment of \\u{1b}",
        ),
        (
            "rank",
            changed(|f| f.tensors[0].1 = vec![1; 5]),
            "5 dimensions, and 4 is the limit",
        ),
        (
            "many",
            changed(|f| f.tensors[0].1 = vec![1; 500]),
            "500 dimensions",
        ),
        (
            "dimension",
            shape(vec![u64::MAX]),
            "and 2147483648 is the limit",
        ),
        (
            "product",
            shape(vec![1 << 31, 1 << 31, 1 << 31]),
            "impossible shape",
        ),
        (
            "exabytes",
            shape(vec![1 << 30, 1 << 27]),
            "reaches beyond the file",
        ),
        (
            "block",
            changed(|f| f.tensors[1].1 = vec![31, 2]),
            "does not end on a whole block of Q8_0",
        ),
        (
            "rows of blocks",
            changed(|f| f.tensors[1].1 = vec![16, 4]),
            "does not end on a whole block of Q8_0",
        ),
        (
            "type",
            changed(|f| f.tensors[1].2 = 16),
            "of ggml's type IQ2_XXS, which is not read",
        ),
        (
            "new type",
            changed(|f| f.tensors[1].2 = 4000),
            "of ggml's type number 4000",
        ),
        (
            "twice",
            changed(|f| f.tensors[1].0 = "a".to_owned()),
            "duplicate tensor `a`",
        ),
        (
            "name",
            changed(|f| f.tensors[0].0 = "x".repeat(2000)),
            "a name of a tensor of 2000 bytes",
        ),
        (
            "cut",
            good[..good.len() - 40].to_vec(),
            "reaches beyond the file",
        ),
        ("half", good[..100].to_vec(), "ends in the middle"),
    ] {
        refused(what, &bytes, expected);
    }
    // offsets stand in front of the next name, or of the data
    let at = good
        .windows(9)
        .position(|w| w == b"\x01\0\0\0\0\0\0\0b")
        .unwrap()
        - 8;
    refused(
        "far",
        &with(at, &(u64::MAX - 31).to_le_bytes()),
        "reaches beyond the file",
    );
    refused(
        "odd",
        &with(at, &[1]),
        "no multiple of the file's alignment of 32",
    );
    refused("overlap", &with(at, &[32]), "tensors `a` and `b` overlap");
    let original = [
        array(4, 2),
        [3u32, 3].iter().flat_map(|n| n.to_le_bytes()).collect(),
    ]
    .concat();
    refused(
        "original",
        &key("comfy.gguf.orig_shape.a", 9, original),
        "should have had the shape [3, 3]",
    );
}

/// Opens what a file may have become: whatever is accepted lies in the file and can be read.
fn survive(bytes: &[u8]) -> bool {
    let file = file_of(bytes);
    let Ok(open) = TensorFile::open(&file.path, true) else {
        return false;
    };
    for info in open.entries() {
        assert!(info.range.start <= info.range.end && info.range.end <= bytes.len());
        let read = open.bytes(info).unwrap();
        assert_eq!(
            Some(read.len()),
            info.dtype.bytes(info.elements()),
            "{info:?}"
        );
    }
    true
}

/// Changes, cuts, repeats and fills of single bytes and stretches.
fn mutated(good: &[u8], edits: &[(usize, u8, u8, u8)]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for &(at, kind, value, length) in edits {
        let at = at % bytes.len().max(1);
        let end = bytes.len().min(at + usize::from(length) + 1);
        match kind % 8 {
            0..=3 => bytes[at] = value,
            4 => bytes[at] ^= 1 << (value % 8),
            5 => bytes[at..end.min(at + 8)].fill(value),
            6 => drop(bytes.drain(at..end)),
            _ => {
                let piece = bytes[at..end].to_vec();
                let to = usize::from(value) * bytes.len() / 256;
                bytes.splice(to..to, piece);
            }
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
    bytes
}

proptest! {
    // always the same mutations, so that a failure is everybody's
    #![proptest_config(ProptestConfig { rng_seed: prop::test_runner::RngSeed::Fixed(7), failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

    #[test]
    fn mutated_containers_never_lead_outside(
        edits in prop::collection::vec((any::<usize>(), any::<u8>(), any::<u8>(), any::<u8>()), 1..5),
        early in any::<bool>(),
    ) {
        thread_local!(static GOOD: Vec<Vec<u8>> = {
            let read = |name: &str| std::fs::read(fixture(name)).unwrap();
            vec![read("lightning.ckpt"), read("lightning-old.ckpt"), read("eight-bits.pt"), gguf().bytes(), one(0, &[2], &[1])]
        });
        GOOD.with(|files| for good in files {
            // the headers are where it matters
            let edits: Vec<_> = edits.iter().map(|&(at, k, v, l)| (if early { at % 600 } else { at }, k, v, l)).collect();
            survive(&mutated(good, &edits));
        });
    }
}
