//! Holds the sources to `src/ARCHITECTURE.md` by reading them: who may import whom, where `cfg(feature)` and `unsafe` may stand.
//!
//! The reader is a small tokenizer, not a compiler: it sees `crate::`, `super::` and the names of the workspace's crates wherever they
//! are written, in `use` lines and in paths. What stands in a `mod tests { … }` is free. Sizes of files are printed, never judged.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What each module of `src/` may name: other modules (or a part of them), and those crates that are listed in [`CRATES`].
const ALLOWED: &[(&str, &[&str])] = &[
    (
        "adapters",
        &["checkpoint", "weights", "sd_kernels", "candle_core"],
    ),
    ("checkpoint", &[]),
    ("control", &["picture"]),
    (
        "cli",
        &[
            "adapters",
            "checkpoint",
            "control",
            "convert",
            "demo",
            "device",
            "hub",
            "library",
            "memory",
            "output",
            "picture",
            "pipeline",
            "sampling",
            "spec",
            "text",
            "upscale",
            "weights",
            "sd_kernels",
            "sd_models",
            "candle_core",
        ],
    ),
    (
        "convert",
        &[
            "checkpoint",
            "output::NewFile",
            "output::NewFolder",
            "output::check_room",
            "sampling",
            "spec",
            "text::tokenizer_files",
            "weights",
            "sd_kernels",
            "sd_models",
            "candle_core",
        ],
    ),
    ("demo", &["checkpoint"]),
    ("device", &["sd_kernels", "candle_core"]),
    ("error", &["candle_core", "sd_kernels"]),
    (
        "hub",
        &["checkpoint::printable", "checkpoint::printable_to"],
    ),
    ("library", &["checkpoint", "hub"]),
    ("memory", &["sd_kernels"]),
    ("output", &[]),
    (
        "pipeline",
        &[
            "adapters",
            "checkpoint",
            "control",
            "device",
            "memory",
            "output::Image",
            "picture",
            "sampling",
            "spec",
            "text",
            "upscale",
            "weights",
            "sd_kernels",
            "sd_models",
            "candle_core",
        ],
    ),
    ("picture", &["output::Image"]),
    ("sampling", &[]),
    ("spec", &["checkpoint", "sampling", "weights", "sd_models"]),
    ("text", &["checkpoint", "spec", "sd_models", "candle_core"]),
    (
        "upscale",
        &[
            "checkpoint",
            "device",
            "memory",
            "picture",
            "weights",
            "sd_kernels",
            "sd_models",
            "candle_core",
        ],
    ),
    (
        "weights",
        &["checkpoint", "sd_kernels", "sd_models", "candle_core"],
    ),
];

/// What every module of `src/` may name.
const ALWAYS: &[&str] = &["error", "Error", "Result"];

/// The crates whose direction is guarded.
const CRATES: &[&str] = &[
    "sd_rs",
    "sd_models",
    "sd_kernels",
    "candle_core",
    "candle_nn",
    "candle_transformers",
];

/// What the other crates may name.
const CRATE_ALLOWED: &[(&str, &[&str])] = &[
    ("models", &["sd_kernels", "candle_core", "candle_nn"]),
    ("kernels", &["candle_core", "candle_nn"]),
];

/// A word or a sign of a source, and its line.
#[derive(Debug, Clone, PartialEq)]
struct Token {
    text: String,
    line: usize,
}

/// Splits a source into words, `::` and single signs; comments are left out, strings and characters become `""`.
fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut found = Vec::new();
    let (mut i, mut line) = (0, 1);
    while i < chars.len() {
        let start = i;
        let c = at(i);
        let mut text = None;
        if c == '/' && at(i + 1) == '/' {
            while i < chars.len() && at(i) != '\n' {
                i += 1;
            }
        } else if c == '/' && at(i + 1) == '*' {
            i = end_of_comment(&chars, i);
        } else if let Some(end) = end_of_literal(&chars, i) {
            i = end;
            text = Some("\"\"".to_owned());
        } else if is_word(c) {
            while is_word(at(i)) {
                i += 1;
            }
            text = Some(chars[start..i].iter().collect());
        } else if c == ':' && at(i + 1) == ':' {
            i += 2;
            text = Some("::".to_owned());
        } else {
            i += 1;
            text = (!c.is_whitespace()).then(|| c.to_string());
        }
        if let Some(text) = text {
            found.push(Token { text, line });
        }
        line += chars[start..i.min(chars.len())]
            .iter()
            .filter(|c| **c == '\n')
            .count();
    }
    found
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Behind a block comment, which may hold others.
fn end_of_comment(chars: &[char], start: usize) -> usize {
    let (mut i, mut depth) = (start, 0);
    while i < chars.len() {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => (depth, i) = (depth + 1, i + 2),
            ('*', Some('/')) => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            break;
        }
    }
    i
}

/// Behind a string, raw string or character that begins here; none for lifetimes and all else.
fn end_of_literal(chars: &[char], start: usize) -> Option<usize> {
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut i = start;
    while i < start + 2 && matches!(at(i), 'b' | 'c' | 'r') {
        i += 1;
    }
    let raw = i > start && at(i - 1) == 'r';
    let hashes = if raw {
        (i..).take_while(|j| at(*j) == '#').count()
    } else {
        0
    };
    match at(i + hashes) {
        '"' if raw => {
            i += hashes + 1;
            while i < chars.len() && !(at(i) == '"' && (1..=hashes).all(|j| at(i + j) == '#')) {
                i += 1;
            }
            Some(i + 1 + hashes)
        }
        quote @ ('"' | '\'') => {
            // 'a is a lifetime, 'a' a character.
            if quote == '\'' && at(i + 1) != '\\' && at(i + 2) != '\'' {
                return None;
            }
            i += 1;
            while i < chars.len() && at(i) != quote {
                i += if at(i) == '\\' { 2 } else { 1 };
            }
            Some(i + 1)
        }
        _ => None,
    }
}

/// A path that a source names, from the crate's root or from the name of a crate.
#[derive(Debug, PartialEq)]
struct Named {
    path: Vec<String>,
    line: usize,
}

/// All guarded paths of a source whose own module is `module`.
fn named(tokens: &[Token], module: &[String]) -> Vec<Named> {
    let text = |i: usize| tokens.get(i).map_or("", |t| t.text.as_str());
    let mut found = Vec::new();
    let mut inner: Vec<(usize, String)> = Vec::new(); // brace depth and name of inline modules
    let (mut depth, mut i) = (0, 0);
    while i < tokens.len() {
        match text(i) {
            "mod" if text(i + 2) == "{" => {
                if text(i + 1) == "tests" {
                    i = behind_group(tokens, i + 2);
                    continue;
                }
                inner.push((depth, text(i + 1).to_owned()));
            }
            "{" => depth += 1,
            "}" => {
                depth -= 1;
                inner.retain(|(at, _)| *at < depth);
            }
            start if text(i + 1) == "::" && (i == 0 || text(i - 1) != "::") => {
                let mut path = Vec::new();
                let mut here: Vec<String> = module
                    .iter()
                    .cloned()
                    .chain(inner.iter().map(|m| m.1.clone()))
                    .collect();
                let mut rest = i + 2;
                let guarded = match start {
                    "crate" => true,
                    "self" | "super" => {
                        if start == "super" {
                            here.pop();
                        }
                        while text(rest) == "super" {
                            here.pop();
                            rest += 2;
                        }
                        path = here;
                        true
                    }
                    name => {
                        path.push(name.to_owned());
                        CRATES.contains(&name)
                    }
                };
                if guarded {
                    collect(tokens, rest, &path, &mut found);
                }
            }
            _ => {}
        }
        i += 1;
    }
    found
}

/// Behind the group whose opening bracket is at `open`.
fn behind_group(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match token.text.as_str() {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i + 1;
        }
    }
    tokens.len()
}

/// Adds the path that goes on at `i`, or every path of the group there.
fn collect(tokens: &[Token], mut i: usize, prefix: &[String], found: &mut Vec<Named>) {
    let text = |i: usize| tokens.get(i).map_or("", |t| t.text.as_str());
    let mut path = prefix.to_vec();
    loop {
        if text(i) == "{" {
            let end = behind_group(tokens, i) - 1;
            let mut item = i + 1;
            while item < end {
                collect(tokens, item, &path, found);
                while item < end && text(item) != "," {
                    item = if text(item) == "{" {
                        behind_group(tokens, item)
                    } else {
                        item + 1
                    };
                }
                item += 1;
            }
            return;
        }
        path.push(text(i).to_owned());
        if text(i + 1) != "::" || text(i + 2) == "<" {
            break;
        }
        i += 2;
    }
    let line = tokens.get(i).map_or(0, |t| t.line);
    found.push(Named { path, line });
}

/// The faults of one source, and how many edges to other modules or crates were looked at.
fn check(file: &str, source: &str) -> (Vec<String>, usize) {
    let tokens = tokens(source);
    let mut faults: Vec<String> = places(file, &tokens);
    let (home, module) = match module_of(file) {
        Some(found) => found,
        None => return (faults, 0),
    };
    let allowed: &[&str] = match ALLOWED
        .iter()
        .chain(CRATE_ALLOWED)
        .find(|(name, _)| *name == home)
    {
        Some((_, allowed)) => allowed,
        None => {
            faults.push(format!("{file}: module {home} is not in the table of tests/architecture.rs; add what it may import"));
            return (faults, 0);
        }
    };
    let in_root = file.starts_with("src/");
    let mut edges = 0;
    for Named { path, line } in named(&tokens, &module) {
        let first = path.first().map_or("", String::as_str);
        let foreign = CRATES.contains(&first);
        if !foreign && (!in_root || first == home) {
            continue;
        }
        edges += 1;
        let fits = |rule: &&str| {
            let parts: Vec<&str> = rule.split("::").collect();
            path.len() >= parts.len() && path.iter().zip(&parts).all(|(a, b)| a == b)
        };
        let always = if in_root { ALWAYS } else { &[] };
        if !allowed.iter().chain(always).any(fits) {
            faults.push(format!(
                "{file}:{line}: {home} may not import {}",
                path.join("::")
            ));
        }
    }
    (faults, edges)
}

/// The guarded unit that a file belongs to (a module of `src/`, or another crate) and its module path within its crate; none for the
/// roots of the main crate, which join everything, and for files of tests.
fn module_of(file: &str) -> Option<(String, Vec<String>)> {
    let (unit, path) = file.split_once("src/")?;
    let mut module: Vec<String> = path
        .trim_end_matches(".rs")
        .split('/')
        .map(str::to_owned)
        .collect();
    if module.last().is_some_and(|name| name == "tests") {
        return None;
    }
    if module
        .last()
        .is_some_and(|name| name == "mod" || name == "lib" || name == "main")
    {
        module.pop();
    }
    match unit {
        "" => Some((module.first()?.clone(), module)),
        other => Some((other.trim_end_matches('/').to_owned(), module)),
    }
}

/// `cfg(feature)` and `unsafe` where they may not stand.
fn places(file: &str, tokens: &[Token]) -> Vec<String> {
    let text = |i: usize| tokens.get(i).map_or("", |t| t.text.as_str());
    let mut faults = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        let line = token.line;
        match token.text.as_str() {
            "unsafe"
                if !file.starts_with("kernels/") && file != "src/checkpoint/tensor_file.rs" =>
            {
                faults.push(format!(
                    "{file}:{line}: unsafe belongs in kernels/ and src/checkpoint/tensor_file.rs"
                ));
            }
            "cfg" | "cfg_attr" if !file.starts_with("kernels/") && file != "src/device.rs" => {
                let open = if text(i + 1) == "!" { i + 2 } else { i + 1 };
                let end = behind_group(tokens, open);
                let inside = tokens.get(open..end).unwrap_or_default();
                let on_feature = text(open) == "(" && inside.iter().any(|t| t.text == "feature");
                if on_feature && !guards_module(tokens, end) {
                    let place = "kernels/, src/device.rs and on the lines of modules";
                    faults.push(format!("{file}:{line}: cfg(feature) belongs in {place}"));
                }
            }
            _ => {}
        }
    }
    faults
}

/// Whether the attribute whose inside ends at `i` stands before `mod`.
fn guards_module(tokens: &[Token], mut i: usize) -> bool {
    let text = |i: usize| tokens.get(i).map_or("", |t| t.text.as_str());
    if text(i) != "]" {
        return false;
    }
    i += 1;
    loop {
        match text(i) {
            "#" => i = behind_group(tokens, i + 1),
            "pub" => i += 1,
            "(" => i = behind_group(tokens, i),
            word => return word == "mod",
        }
    }
}

/// Every Rust source below a folder, as paths from the workspace's root.
fn sources(root: &Path, folder: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut open: Vec<PathBuf> = vec![root.join(folder)];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs")
                && let Ok(name) = path.strip_prefix(root)
            {
                found.push(name.to_string_lossy().replace('\\', "/"));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn sources_keep_the_laws() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut faults, mut edges, mut units) = (Vec::new(), 0, BTreeSet::new());
    for folder in ["src", "models/src", "kernels/src"] {
        let files = sources(root, folder);
        assert!(!files.is_empty(), "no sources in {folder}");
        for file in files {
            let source = fs::read_to_string(root.join(&file)).unwrap();
            let (found, seen) = check(&file, &source);
            faults.extend(found);
            edges += seen;
            units.extend(module_of(&file).map(|(unit, _)| unit));
            let lines = source
                .split("#[cfg(test)]\nmod tests")
                .next()
                .unwrap_or("")
                .lines()
                .count();
            if lines > 450 {
                eprintln!("{file}: {lines} lines of code");
            }
        }
    }
    eprintln!("{edges} imports of {} modules checked", units.len());
    assert!(
        edges > 30 && units.len() > 8,
        "{edges} edges of {units:?}: the reader sees nothing"
    );
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// The faults of a source, without their places.
fn faults(file: &str, source: &str) -> Vec<String> {
    let strip = |fault: String| fault.split_once(": ").unwrap().1.to_owned();
    check(file, source).0.into_iter().map(strip).collect()
}

#[test]
fn forbidden_imports_are_seen_however_they_are_written() {
    let bad = "sampling may not import pipeline";
    for source in [
        "use crate::pipeline::Plan;",
        "use crate::{error::Result, pipeline::Plan};",
        "use crate::{\n    error::{Error, Result},\n    pipeline::{self, plan::{A, B}},\n};",
        "fn f() -> crate::pipeline::Plan { todo!() }",
        "use super::super::pipeline::Plan;",
        "mod inner { use super::super::super::pipeline::Plan; }",
        "mod a { mod b {} use super::super::super::pipeline; }",
        "fn f<'a>(x: &'a str, c: char) { if c == '\"' { g(r#\"\"\"#, crate::pipeline::A) } }",
    ] {
        let found = faults("src/sampling/noise.rs", source);
        assert!(
            !found.is_empty() && found.iter().all(|f| f.starts_with(bad)),
            "{source}: {found:?}"
        );
    }
    assert_eq!(
        faults("src/spec/mod.rs", "use super::cli::Args;"),
        ["spec may not import cli::Args"]
    );
    assert_eq!(
        faults("src/output/mod.rs", "use candle_core::Tensor;"),
        ["output may not import candle_core::Tensor"]
    );
    assert_eq!(
        faults("src/pipeline/a.rs", "use crate::output::{Image, save};"),
        ["pipeline may not import output::save"]
    );
    assert_eq!(
        faults("models/src/unet/mod.rs", "use sd_rs::Error;"),
        ["models may not import sd_rs::Error"]
    );
    assert_eq!(
        faults("kernels/src/lib.rs", "use sd_models::unet;"),
        ["kernels may not import sd_models::unet"]
    );
    assert_eq!(faults("src/novel.rs", "").len(), 1);
}

#[test]
fn what_is_allowed_is_not_a_fault() {
    for (file, source) in [
        (
            "src/sampling/noise.rs",
            "use crate::{error::Result, Error};\nuse super::schedule; use crate::sampling::solver::A;",
        ),
        (
            "src/sampling/noise.rs",
            "// crate::pipeline::A\n/* /* */ crate::pipeline */ const A: &str = \"crate::pipeline::\\\"A\";",
        ),
        (
            "src/sampling/noise.rs",
            "mod tests { use crate::pipeline::Plan; fn f() { if true {} } }",
        ),
        (
            "src/sampling/mod.rs",
            "mod a { use super::b; mod b { use super::super::c; } }",
        ),
        ("src/sampling/tests.rs", "use crate::pipeline::Plan;"),
        (
            "src/pipeline/a.rs",
            "use crate::output::Image; use crate::text::encode; pub(crate) fn f() {}",
        ),
        (
            "models/src/unet/mod.rs",
            "use crate::pipeline::X; use super::super::vae; use sd_kernels::ops;",
        ),
        (
            "src/lib.rs",
            "pub use pipeline::Engine; use crate::cli::run;",
        ),
    ] {
        assert_eq!(faults(file, source), [""; 0], "{source}");
    }
    assert_eq!(
        check(
            "src/text/mod.rs",
            "use crate::{spec::A, error::B}; use super::checkpoint::C;"
        )
        .1,
        3
    );
}

#[test]
fn features_and_unsafe_have_their_places() {
    let feature = "#[cfg(feature = \"cuda\")]\n";
    let gated = format!("{feature}fn f() {{}}");
    assert_eq!(faults("models/src/lib.rs", &gated).len(), 1);
    assert_eq!(
        faults(
            "src/pipeline/mod.rs",
            "if cfg!(all(unix, feature = \"x\")) {}"
        )
        .len(),
        1
    );
    assert_eq!(
        faults("src/lib.rs", "#![cfg_attr(feature = \"x\", allow(y))]").len(),
        1
    );
    for file in ["kernels/src/lib.rs", "src/device.rs"] {
        assert_eq!(faults(file, &gated), [""; 0]);
    }
    assert_eq!(
        faults(
            "src/lib.rs",
            &format!("{feature}#[doc(hidden)]\npub(crate) mod server;")
        ),
        [""; 0]
    );
    assert_eq!(
        faults(
            "src/lib.rs",
            "#[cfg(test)] fn f() {} #[cfg(unix)] fn g() {} // cfg(feature = 1)"
        ),
        [""; 0]
    );

    let raw = "fn f() { unsafe { g() } }";
    assert_eq!(faults("src/output/png.rs", raw).len(), 1);
    assert_eq!(faults("src/checkpoint/tensor_file.rs", raw), [""; 0]);
    assert_eq!(faults("kernels/src/cpu/gemm.rs", raw), [""; 0]);
    assert_eq!(
        faults("src/output/png.rs", "#![allow(unsafe_code)] // unsafe"),
        [""; 0]
    );
}
