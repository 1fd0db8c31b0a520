//! `--embedding` and names in prompts as a user types them, and what the picture's parameters say afterwards.

use safetensors::Dtype;

use super::write;
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm};

/// A folder with a model, and embeddings in the models folder and beside it.
fn place() -> Dir {
    let dir = Dir::new();
    Case::load("single-sd1").write_folder(&dir.path("model"), &FolderForm::default());
    std::fs::create_dir_all(dir.path(".models/embeddings/sub")).unwrap();
    let words = [("ink_style", "emb_params")];
    write(
        &dir.path(".models/embeddings/sub/bad ink.safetensors"),
        "sd1",
        &words,
        Dtype::F32,
    );
    write(&dir.path("other.safetensors"), "sd1", &words, Dtype::F32);
    // one for another model, and one that is broken, under words that prompts say
    write(
        &dir.path(".models/embeddings/fox.safetensors"),
        "sdxl",
        &[("clip_l", "clip_l"), ("clip_g", "clip_g")],
        Dtype::F32,
    );
    std::fs::write(dir.path(".models/embeddings/snow.pt"), "no pickle").unwrap();
    dir
}

#[test]
fn names_flags_and_files_mean_the_same() {
    let dir = place();
    let plain = dir.latents("a fox in snow", &[]);
    assert!(!dir.parameters().contains("TI hashes"));
    let named = dir.latents("a fox, Bad Ink", &[]);
    let hash =
        sd_rs::checkpoint::sha256_file(&dir.path(".models/embeddings/sub/bad ink.safetensors"))
            .unwrap();
    let told = dir.parameters();
    assert!(
        told.contains(&format!("TI hashes: \"bad ink: {}\"", &hash[..12])),
        "{told}"
    );
    assert_ne!(named, plain);
    for (prompt, more) in [
        ("a fox, embedding:bad ink", &[][..]),
        ("a fox, other", &["--embedding", "other.safetensors"]),
        ("a fox, <xyz>", &["--embedding", "other.safetensors:<xyz>"]),
        ("a fox, <xyz>", &["--embedding", "sub/bad ink:<xyz>"]),
        (
            "a fox, xyz",
            &["--embedding", "Bad Ink:xyz", "--prompt-syntax", "plain"],
        ),
    ] {
        assert_eq!(dir.latents(prompt, more), named, "{prompt}");
    }
    let negative = dir.latents("a fox", &["-n", "bad ink"]);
    assert_ne!(negative, dir.latents("a fox", &["-n", "bad drawing"]));
    let weighted = dir.latents("a fox, (bad ink:1.4)", &[]);
    assert_ne!(weighted, named);
}

#[test]
fn mistakes_are_told() {
    let dir = place();
    let run = |prompt: &str, more: &[&str], status: i32| {
        let mut args = vec!["generate", "-m", "model", "-p", prompt, "--steps", "1"];
        args.extend(more);
        dir.fails(&args, status)
    };
    let absent = run("an embedding:nothing, x", &[], 1);
    assert!(
        absent.contains("nothing") && absent.contains("embeddings"),
        "{absent}"
    );
    let foreign = run("an embedding:fox", &[], 1);
    assert!(
        foreign.contains("made for Stable Diffusion XL"),
        "{foreign}"
    );
    let foreign = run("x", &["--embedding", "fox"], 1);
    assert!(
        foreign.contains("made for Stable Diffusion XL"),
        "{foreign}"
    );
    let model = run(
        "x",
        &[
            "--embedding",
            "model/unet/diffusion_pytorch_model.safetensors",
        ],
        1,
    );
    assert!(model.contains("not a textual inversion"), "{model}");
    let twice = [
        "--embedding",
        "other.safetensors",
        "--embedding",
        "other.safetensors",
    ];
    assert!(run("x", &twice, 2).contains("two embeddings"));
    let hyper = run("<hypernet:a:1>", &[], 1);
    assert!(hyper.contains("hypernetwork"), "{hyper}");
}

#[test]
fn inspect_says_how_many_vectors_and_for_what() {
    let dir = place();
    let text = dir.ok(&["inspect", "other.safetensors"]);
    assert!(
        text.contains("3 vectors, 64 wide") && text.contains("--embedding"),
        "{text}"
    );
    let outcome = dir.ok(&["inspect", "fox", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&outcome).unwrap();
    assert_eq!(json["embedding"]["made_for"], "Stable Diffusion XL");
    assert_eq!(json["embedding"]["words"][0]["vectors"], 2);
}
