//! `--lora` and `<lora:…>` as a user types them, and what the picture's parameters say afterwards.

use serde_json::Value;

use super::{case, write};
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm};

/// A folder with a model, and an adapter for it in the models folder.
fn place() -> Dir {
    let dir = Dir::new();
    Case::load("single-sd1").write_folder(&dir.path("model"), &FolderForm::default());
    std::fs::create_dir_all(dir.path(".models/loras/sub")).unwrap();
    let mut case = case("kohya-sd1");
    case["metadata"] = serde_json::json!({ "ss_output_name": "Alias" });
    write(&case, &dir.path(".models/loras/sub/ink.safetensors"));
    dir
}

#[test]
fn flags_and_tags_mean_the_same() {
    let dir = place();
    let none = dir.latents("a fox ", &[]);
    assert!(!dir.parameters().contains("Lora"), "{}", dir.parameters());
    let path = ".models/loras/sub/ink.safetensors";
    let flag = dir.latents("a fox ", &["--lora", &format!("{path}:0.5")]);
    assert_ne!(flag, none);
    let shown = dir.parameters();
    assert!(shown.starts_with("a fox  <lora:ink:0.5>\n"), "{shown}");
    let hash = shown.split("Lora hashes: \"ink: ").nth(1).unwrap();
    let hash = hash.split('"').next().unwrap().to_owned();
    assert!(
        hash.len() == 12 && hash.chars().all(|c| c.is_ascii_hexdigit()),
        "{hash}"
    );
    for (prompt, more) in [
        ("a fox ", &["--lora", "ink:0.5"][..]),
        ("a fox ", &["--lora", "sub/ink:0.5"]),
        ("a fox <lora:ink:0.5>", &[]),
        ("a fox <lora:INK:0.5:0.5>", &[]),
        ("<lora:Alias:te=0.5>a fox ", &[]),
        ("a <lora:ink:1>fox <lora:ink:-0.5>", &[]),
        ("a fox <lora:ink:0.25>", &["--lora", "ink:0.25"]),
    ] {
        assert_eq!(dir.latents(prompt, more), flag, "{prompt} {more:?}");
        let shown = dir.parameters();
        assert!(shown.starts_with(prompt), "{shown}");
        assert!(shown.contains(&hash), "{shown}");
    }
    assert_eq!(dir.latents("a fox <lora:ink:0>", &[]), none);
    assert_ne!(dir.latents("a fox <lora:ink:0:0.5>", &[]), flag);
}

#[test]
fn what_is_wrong_with_a_lora_is_told() {
    let dir = place();
    std::fs::write(dir.path("cut.safetensors"), [9, 0, 0, 0, 0, 0, 0, 0, b'{']).unwrap();
    for (prompt, more, status, words) in [
        (
            "x",
            &["--lora", "nothing"][..],
            1,
            "the LoRA `nothing` not found",
        ),
        ("x <lora:in:1>", &[], 1, "near it: ink"),
        ("x <lora:ink:many>", &[], 2, "\"many\""),
        ("x <lora:ink:1000>", &[], 2, "-100 to 100"),
        ("x", &["--lora", "ink:nan"], 2, "--lora ink:nan"),
        ("x", &["--lora", "cut.safetensors"], 1, "cut.safetensors"),
        ("x", &["--lora", "model"], 1, "not a LoRA"),
        (
            "x",
            &["--lora", "no/such.safetensors"],
            1,
            "no/such.safetensors",
        ),
        ("x <hypernet:y:1>", &[], 1, "hypernet"),
    ] {
        let mut args = vec![
            "generate", "-m", "model", "-p", prompt, "-W", "64", "-H", "64",
        ];
        args.extend(["--steps", "1"]);
        args.extend(more);
        let error = dir.fails(&args, status);
        assert!(error.contains(words), "{prompt} {more:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    assert!(!dir.names().iter().any(|name| name.ends_with(".png")));
}

#[test]
fn plain_prompts_have_no_tags() {
    let dir = place();
    let plain = dir.latents("a <lora:nothing:1>", &["--prompt-syntax", "plain"]);
    assert_ne!(plain, dir.latents("a ", &["--prompt-syntax", "plain"]));
}

#[test]
fn inspect_says_what_an_adapter_is() {
    let dir = place();
    let path = ".models/loras/sub/ink.safetensors";
    let text = dir.ok(&["inspect", path]);
    for words in [
        "a LoRA",
        "usable      yes, with `sd-rs generate --lora`",
        "LoRA: 290",
        "rank 2",
        "text_encoder",
        "ss_output_name = Alias",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let report: Value = serde_json::from_str(&dir.ok(&["inspect", "--json", path])).unwrap();
    let adapter = &report["adapter"];
    assert_eq!(adapter["forms"]["LoRA"], 290);
    assert_eq!(adapter["networks"]["text_encoder"], 12);
    assert_eq!(adapter["tensors_sha256"].as_str().map(str::len), Some(64));
    assert_eq!(report["family"], "lora");
}
