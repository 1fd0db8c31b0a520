//! Files that are broken, hostile, or something else: each its own sentence, none a panic, none accepted.

use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use sd_rs::Error;
use sd_rs::checkpoint::{Checkpoint, TensorFile};

use super::build::{Tensors, file_of, with_header};

fn refusal(path: &Path) -> String {
    match TensorFile::open(path, true) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("accepted"),
    }
}

fn refusal_of(bytes: &[u8]) -> String {
    let file = file_of(bytes);
    match TensorFile::open(&file.path, true) {
        Err(error) => {
            assert_eq!(error.code(), "bad-model", "{error}");
            let message = error.to_string();
            let sentence = message.strip_prefix(&format!("{}: ", file.path.display()));
            let sentence = sentence.expect("the file is named").to_owned();
            assert!(!sentence.contains(char::is_control), "{sentence:?}");
            sentence
        }
        Ok(_) => panic!("accepted"),
    }
}

const ONE: &str = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;

#[test]
fn broken_headers_are_told_apart() {
    let u8s = |n: usize| vec![b'1'; n];
    let entry = |name: &str, dtype: &str, shape: &str, offsets: &str| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    };
    let two = |a: String, b: String| format!("{{{a},{b}}}");
    let a = || entry("a", "U8", "[4]", "[0,4]");
    let shape = |shape: &str, bytes: usize| {
        let header = format!("{{{}}}", entry("a", "F32", shape, &format!("[0,{bytes}]")));
        with_header(&header, &u8s(bytes))
    };
    let (has, wants) = (8 + ONE.len() + 3, 8 + ONE.len() + 4);
    let short = format!(
        "the file is {has} bytes, and its header describes {wants}; the download is incomplete"
    );
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "empty file"),
        ("7 bytes", vec![0; 7], "too small for a safetensors file"),
        (
            "length 0",
            0u64.to_le_bytes().to_vec(),
            "header length is 0",
        ),
        ("zeros", vec![0; 5000], "header length is 0"),
        (
            "length u64::MAX",
            [&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
            "18446744073709551615 bytes",
        ),
        (
            "100 MB + 1",
            [&100_000_001u64.to_le_bytes()[..], b"{}"].concat(),
            "100000000 is the limit",
        ),
        (
            "one byte too long",
            [&3u64.to_le_bytes()[..], b"{}"].concat(),
            "should be 3 bytes, and the file of 10 bytes has only 2",
        ),
        (
            "not UTF-8",
            [&2u64.to_le_bytes()[..], b"\xff\xfe"].concat(),
            "not valid UTF-8",
        ),
        ("array", with_header("[]", b""), "not a JSON object"),
        (
            "number",
            with_header("1234567890", b""),
            "not a JSON object",
        ),
        ("BOM", with_header("\u{feff}{}", b""), "not a JSON object"),
        ("no tensors", with_header("{}", b""), "holds no tensors"),
        (
            "only metadata",
            with_header(r#"{"__metadata__":{"a":"b"}}"#, b""),
            "holds no tensors",
        ),
        (
            "NUL padding",
            with_header("{}\0\0", b""),
            "trailing characters",
        ),
        (
            "deep",
            with_header(
                &format!(r#"{{"a":{}{}}}"#, "[".repeat(200_000), "]".repeat(200_000)),
                b"",
            ),
            "tensor `a`: ",
        ),
        (
            "deep inside",
            with_header(
                &format!(
                    r#"{{"a":{{"z":{}{}}}}}"#,
                    "[".repeat(200_000),
                    "]".repeat(200_000)
                ),
                b"",
            ),
            "missing field `dtype`",
        ),
        (
            "metadata twice",
            with_header(
                r#"{"__metadata__":{"x":"1"},"__metadata__":{"x":"2"}}"#,
                b"",
            ),
            "`__metadata__` is there twice",
        ),
        (
            "metadata number",
            with_header(r#"{"__metadata__":{"x":1}}"#, b""),
            "in `__metadata__`: invalid type",
        ),
        (
            "name twice, same place",
            with_header(&two(a(), entry("a", "I8", "[4]", "[0,4]")), &u8s(4)),
            "duplicate tensor `a`",
        ),
        (
            "name twice",
            with_header(&two(a(), entry("a", "U8", "[4]", "[4,8]")), &u8s(8)),
            "duplicate tensor `a`",
        ),
        (
            "field twice",
            with_header(
                r#"{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}"#,
                &u8s(4),
            ),
            "tensor `a`: duplicate field",
        ),
        (
            "overlap",
            with_header(&two(a(), entry("b", "U8", "[4]", "[2,6]")), &u8s(6)),
            "tensors `a` and `b` overlap",
        ),
        (
            "same bytes",
            with_header(&two(a(), entry("b", "U8", "[4]", "[0,4]")), &u8s(4)),
            "tensors `a` and `b` overlap",
        ),
        (
            "gap",
            with_header(&two(a(), entry("b", "U8", "[4]", "[5,9]")), &u8s(9)),
            "1 bytes in front of tensor `b` belong to no tensor",
        ),
        (
            "first offset",
            with_header(
                &format!("{{{}}}", entry("a", "U8", "[4]", "[3,7]")),
                &u8s(7),
            ),
            "3 bytes in front of tensor `a`",
        ),
        (
            "reversed",
            with_header(
                &format!("{{{}}}", entry("a", "U8", "[4]", "[4,0]")),
                &u8s(4),
            ),
            "`a` ends before it begins",
        ),
        (
            "negative",
            with_header(
                &format!("{{{}}}", entry("a", "U8", "[-4]", "[0,4]")),
                &u8s(4),
            ),
            "tensor `a`: invalid value: integer `-4`",
        ),
        (
            "float",
            with_header(
                &format!("{{{}}}", entry("a", "U8", "[4.0]", "[0,4]")),
                &u8s(4),
            ),
            "tensor `a`: invalid type: floating point",
        ),
        (
            "unknown type",
            with_header(
                &format!("{{{}}}", entry("a", "F128", "[1]", "[0,16]")),
                &u8s(16),
            ),
            "unknown variant `F128`",
        ),
        (
            "wrong size",
            with_header(
                &format!("{{{}}}", entry("a", "F32", "[4]", "[0,4]")),
                &u8s(4),
            ),
            "needs 16 bytes, and the header gives it 4",
        ),
        (
            "overflow",
            shape("[2147483648,2147483648,2147483648]", 4),
            "impossible shape",
        ),
        (
            "wide",
            shape("[4294967296,4294967296]", 4),
            "a dimension of 4294967296",
        ),
        (
            "zero before wide",
            shape("[0,18446744073709551615,18446744073709551615]", 0),
            "a dimension of 18446744073709551615",
        ),
        (
            "zero hides overflow",
            shape("[0,2147483648,2147483648,2147483648]", 0),
            "impossible shape",
        ),
        (
            "65 dimensions",
            shape(&format!("[{}]", ["1"; 65].join(",")), 4),
            "65 dimensions",
        ),
        (
            "half a byte",
            with_header(
                &format!("{{{}}}", entry("a", "F4", "[3]", "[0,1]")),
                &u8s(1),
            ),
            "whole byte",
        ),
        (
            "trailing",
            with_header(ONE, b"1234PK\x03\x04"),
            "the last 4 bytes belong to no tensor",
        ),
        ("short by one", with_header(ONE, b"123"), &short),
        (
            "short by half",
            with_header(ONE, b"12"),
            "download it again",
        ),
        (
            "far offsets",
            with_header(
                &format!(
                    "{{{}}}",
                    entry(
                        "a",
                        "U8",
                        "[0]",
                        "[18446744073709551615,18446744073709551615]"
                    )
                ),
                b"",
            ),
            "lies beyond any file",
        ),
    ];
    for (what, bytes, expected) in &cases {
        let sentence = refusal_of(bytes);
        assert!(sentence.contains(expected), "{what}: {sentence}");
    }
}

#[test]
fn other_files_are_named() {
    let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa\nsize 4265146304\n";
    let mut tar = vec![b'a'; 600];
    tar[257..262].copy_from_slice(b"ustar");
    let cases: &[(&[u8], &str)] = &[
        (
            b"<!DOCTYPE html>\n<html lang=\"en\"><head><title>Log in</title>",
            "an HTML page",
        ),
        (b"<html>", "an HTML page"),
        (
            b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>",
            "an XML page",
        ),
        (
            lfs.as_bytes(),
            "a Git LFS pointer, a few lines that stand for the real file; run `git lfs pull`",
        ),
        (
            b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00\x00\x00archive/data.pkl",
            "the end of its zip archive is missing",
        ),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "a picture"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", "a picture"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "a picture"),
        (b"{\"_class_name\": \"UNet2DConditionModel\"}", "JSON text"),
        (b"{}", "JSON text"),
        (b"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00", "a program"),
        (b"\x89HDF\r\n\x1a\n\x00\x00\x00\x00", "an HDF5 file"),
        (
            b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
            "a packed archive",
        ),
        (
            b"Access to model x/y is restricted. You must be authenticated.",
            "plain text",
        ),
        (&tar, "a packed archive"),
    ];
    for (bytes, expected) in cases {
        let sentence = refusal_of(bytes);
        assert!(sentence.contains(expected), "{expected}: {sentence}");
    }
}

#[test]
fn what_is_legal_is_read() {
    let open = |bytes: &[u8]| {
        let file = file_of(bytes);
        let mapped = TensorFile::open(&file.path, true).unwrap();
        let read = TensorFile::open(&file.path, false).unwrap();
        let bytes = |file: &TensorFile| -> Vec<(String, Vec<usize>, Vec<u8>)> {
            file.entries()
                .map(|info| {
                    (
                        info.name.clone(),
                        info.shape.clone(),
                        file.bytes(info).unwrap().into_owned(),
                    )
                })
                .collect()
        };
        assert_eq!(bytes(&mapped), bytes(&read));
        for info in mapped.entries() {
            mapped.release(info);
        }
        assert_eq!(bytes(&mapped), bytes(&read), "released bytes come back");
        bytes(&mapped)
    };
    let scalar = open(&with_header(
        r#"{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#,
        b"1234",
    ));
    assert_eq!(scalar[0].1, Vec::<usize>::new());
    let zero = open(&with_header(
        r#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#,
        b"",
    ));
    assert!(zero[0].2.is_empty());
    // extra fields, spaces in front and behind, odd names, data out of order and not aligned
    let header = r#"   {"\u0000../../x":{"dtype":"F32","shape":[1],"data_offsets":[1,5],"more":{"x":[1]}},"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}  "#;
    let odd = open(&with_header(header, b"12345"));
    assert_eq!(odd[0].0, "");
    assert_eq!(odd[1].0, "\0../../x");
    assert_eq!(odd[1].2, b"2345");
}

#[test]
fn a_thousand_released_pages_come_back() {
    let mut tensors = Tensors::default();
    let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7 % 251) as u8).collect();
    tensors.add_bytes("a", "U8", &[1_000_000], bytes[..1_000_000].to_vec());
    tensors.add_bytes("b", "U8", &[2_000_000], bytes[1_000_000..].to_vec());
    let file = tensors.file();
    let open = TensorFile::open(&file.path, true).unwrap();
    for _ in 0..2 {
        assert!(open.bytes(open.get("a").unwrap()).unwrap()[..] == bytes[..1_000_000]);
        assert!(open.bytes(open.get("b").unwrap()).unwrap()[..] == bytes[1_000_000..]);
        open.release(open.get("b").unwrap());
        open.release(open.get("a").unwrap());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn released_bytes_leave_memory() {
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut of_file = false;
        let mut sum = 0;
        for line in status.lines() {
            if line.contains("-") && line.split_whitespace().count() >= 5 && !line.contains(" kB") {
                of_file = line.ends_with("x.safetensors") && line.contains("resident-test");
            } else if let Some(rest) = line.strip_prefix("Rss:").filter(|_| of_file) {
                sum += rest
                    .trim()
                    .trim_end_matches(" kB")
                    .trim()
                    .parse::<usize>()
                    .unwrap();
            }
        }
        sum
    };
    let folder = tempfile::Builder::new()
        .prefix("resident-test")
        .tempdir()
        .unwrap();
    let path = folder.path().join("x.safetensors");
    let mut tensors = Tensors::default();
    tensors.add_bytes("a", "U8", &[8 << 20], vec![1; 8 << 20]);
    tensors.write(&path);
    let open = TensorFile::open(&path, true).unwrap();
    let info = open.get("a").unwrap();
    let sum: u64 = open
        .bytes(info)
        .unwrap()
        .iter()
        .map(|&b| u64::from(b))
        .sum();
    assert_eq!(sum, 8 << 20);
    assert!(resident() > 8000, "{} kB", resident());
    open.release(info);
    assert!(resident() < 200, "{} kB", resident());
}

#[test]
fn a_file_that_changes_is_noticed() {
    let file = file_of(&with_header(ONE, b"1234"));
    for mapped in [true, false] {
        let open = TensorFile::open(&file.path, mapped).unwrap();
        let info = open.get("a").unwrap();
        assert_eq!(&open.bytes(info).unwrap()[..], b"1234");
        let handle = std::fs::File::options()
            .write(true)
            .open(&file.path)
            .unwrap();
        handle.set_len(5).unwrap();
        let error = open.bytes(info).unwrap_err().to_string();
        assert!(
            error.contains("bytes when it was opened and is 5 now"),
            "{error}"
        );
        std::fs::write(&file.path, with_header(ONE, b"1234")).unwrap();
        handle
            .set_modified(
                std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(u64::from(mapped)),
            )
            .unwrap();
        let error = open.bytes(info).unwrap_err().to_string();
        assert!(error.contains("was changed while it was read"), "{error}");
    }
}

#[test]
fn plain_reads_outlive_a_file_that_is_cut_and_grown() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let mut tensors = Tensors::default();
    tensors.add_bytes("a", "U8", &[4 << 20], vec![7; 4 << 20]);
    let file = tensors.file();
    let size = std::fs::metadata(&file.path).unwrap().len();
    let open = TensorFile::open(&file.path, false).unwrap();
    let other = std::fs::File::options()
        .write(true)
        .open(&file.path)
        .unwrap();
    let time = other.metadata().unwrap().modified().unwrap();
    let done = AtomicBool::new(false);
    let (mut whole, mut failed) = (0, 0);
    std::thread::scope(|scope| {
        // cut and made whole again under the time that the file had, so that often only the read itself can notice
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for length in [1000, size] {
                    other.set_len(length).unwrap();
                    other.set_modified(time).unwrap();
                }
            }
        });
        for _ in 0..300 {
            match open.bytes(open.get("a").unwrap()) {
                Ok(bytes) => whole += usize::from(bytes.len() == 4 << 20),
                Err(error) => {
                    failed += 1;
                    assert!(matches!(error.code(), "disk" | "bad-model"), "{error}");
                }
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(whole + failed, 300);
    assert!(failed > 0);
}

#[test]
fn absurd_lengths_cost_nothing() {
    // lengths that the file does not have, and one that it has: a hole of 100 MB
    let started = Instant::now();
    for length in [0, u64::MAX, 100_000_001, 99_999_999, 1 << 40] {
        refusal_of(&length.to_le_bytes());
    }
    let file = file_of(&[&100_000_000u64.to_le_bytes()[..], b"\xffnot json"].concat());
    std::fs::File::options()
        .write(true)
        .open(&file.path)
        .unwrap()
        .set_len(200_000_000)
        .unwrap();
    assert!(refusal(&file.path).contains("not valid UTF-8"));
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn too_many_tensors_are_refused_early() {
    let mut header = String::from("{");
    for i in 0..100_001 {
        header.push_str(&format!(
            r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"#
        ));
    }
    header.push_str("this is never read");
    assert!(refusal_of(&with_header(&header, b"")).contains("more than 100000 tensors"));
}

#[test]
fn a_large_file_opens_at_once() {
    let mut tensors = Tensors::default();
    for i in 0..2000 {
        tensors.add(format!("blocks.{i}.weight"), &[1024, 2048]);
    }
    let file = tensors.file();
    assert!(std::fs::metadata(&file.path).unwrap().len() > 8_000_000_000);
    let started = Instant::now();
    let open = TensorFile::open(&file.path, true).unwrap();
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "{:?}",
        started.elapsed()
    );
    let last = open.get("blocks.1999.weight").unwrap();
    assert_eq!(open.bytes(last).unwrap().len(), 4 << 20);
}

#[test]
fn names_are_never_printed_raw() {
    let header = r#"{"a\u001b[2J\u0007":{"dtype":"U8","shape":[9],"data_offsets":[0,4]}}"#;
    assert!(refusal_of(&with_header(header, b"1234")).contains("\\u{1b}[2J"));
    let header = r#"{"a":{"dtype":"\u001b[31m","shape":[9],"data_offsets":[0,4]}}"#;
    assert!(refusal_of(&with_header(header, b"1234")).contains("\\u{1b}[31m"));
    let header = format!(
        r#"{{"{}":{{"dtype":"U8","shape":[9],"data_offsets":[0,4]}}}}"#,
        "x".repeat(100_000)
    );
    assert!(refusal_of(&with_header(&header, b"1234")).len() < 500);
}

#[cfg(unix)]
#[test]
fn what_is_no_file_is_refused_without_waiting() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let started = Instant::now();
    let fifo = std::process::Command::new("mkfifo")
        .arg(at("fifo"))
        .status();
    if fifo.is_ok_and(|status| status.success()) {
        assert!(refusal(&at("fifo")).contains("not a plain file"));
    }
    assert!(refusal(Path::new("/dev/zero")).contains("not a plain file"));
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    assert!(refusal(&at("socket")).contains("not a plain file"));
    symlink(at("b"), at("a")).unwrap();
    symlink(at("a"), at("b")).unwrap();
    assert!(refusal(&at("a")).contains("symbolic link leads nowhere"));
    symlink(at("gone"), at("c")).unwrap();
    assert!(refusal(&at("c")).contains("symbolic link to a file that does not exist"));
    assert!(refusal(folder.path()).contains("this is a folder"));
    assert!(started.elapsed() < Duration::from_secs(5));
    let missing = Checkpoint::open(at("nothing")).unwrap_err();
    assert!(matches!(missing, Error::NotFound { .. }), "{missing}");
    let under = Checkpoint::open(Path::new("/dev/null/x")).unwrap_err();
    assert!(matches!(under, Error::NotFound { .. }), "{under}");
    let long = Checkpoint::open(at(&"x".repeat(5000))).unwrap_err();
    assert_eq!(long.code(), "disk", "{long}");
}

#[cfg(unix)]
#[test]
fn paths_need_not_be_unicode() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder
        .path()
        .join(std::ffi::OsStr::from_bytes(b"mo del\xff.safetensors"));
    std::fs::write(&path, with_header(ONE, b"1234")).unwrap();
    Checkpoint::open(&path).unwrap();
}

/// A good file of three tensors to be spoiled.
fn good() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"F16","shape":[5],"data_offsets":[24,34]},"c":{"dtype":"I64","shape":[],"data_offsets":[34,42]}}"#;
    with_header(header, &[7; 42])
}

/// Whatever is accepted lies in the file, without gaps, and the reference reader accepts it too.
fn check(bytes: &[u8]) {
    let file = file_of(bytes);
    let Ok(open) = TensorFile::open(&file.path, true) else {
        return;
    };
    let mut position = 0;
    for info in open.entries() {
        if position > 0 {
            assert_eq!(info.range.start, position);
        }
        position = info.range.end;
        assert!(position <= bytes.len());
        assert_eq!(info.dtype.bytes(info.elements()), Some(info.size()));
        assert_eq!(open.bytes(info).unwrap()[..], bytes[info.range.clone()]);
    }
    assert_eq!(position, bytes.len());
    let reference = safetensors::SafeTensors::deserialize(bytes).expect("stricter than the crate");
    assert_eq!(reference.len(), open.entries().count());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn spoiled_bytes_never_lead_outside(edits in prop::collection::vec((0usize..300, any::<u8>()), 1..6)) {
        let mut bytes = good();
        for (at, value) in edits {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        check(&bytes);
    }

    #[test]
    fn spoiled_numbers_never_lead_outside(which in 0usize..12, number in prop_oneof![0u64..64, any::<u64>()], cut in 0usize..3) {
        let text = String::from_utf8(good()[8..].to_vec()).unwrap();
        let header = &text[..text.rfind('}').unwrap() + 1];
        let mut parts: Vec<String> = Vec::new();
        for c in header.chars() {
            let digit = c.is_ascii_digit();
            match parts.last_mut() {
                Some(last) if last.ends_with(|p: char| p.is_ascii_digit()) == digit => last.push(c),
                _ => parts.push(c.to_string()),
            }
        }
        let numbers: Vec<usize> = (0..parts.len()).filter(|&i| parts[i].parse::<u64>().is_ok()).collect();
        parts[numbers[which % numbers.len()]] = number.to_string();
        check(&with_header(&parts.concat(), &vec![7; 42 - cut]));
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200), length in 0u64..200) {
        check(&bytes);
        check(&[&length.to_le_bytes()[..], b"{", &bytes].concat());
    }
}
