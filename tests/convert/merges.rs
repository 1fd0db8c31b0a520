//! Merges against torch.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Content, by_name, same, tensors};
use crate::support::Dir;
use crate::support::weights::{Case, FolderForm, SingleForm, Stored, edit, read, save};

fn fixture() -> Vec<Stored> {
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/convert/merges.safetensors"))
}

/// The tensors of one of the fixture's models.
fn model(name: &str) -> Vec<Stored> {
    let prefix = format!("{name}/");
    let own = fixture()
        .into_iter()
        .filter(|t| t.name.starts_with(&prefix));
    own.map(|t| Stored {
        name: t.name[prefix.len()..].to_owned(),
        ..t
    })
    .collect()
}

fn expected(name: &str) -> BTreeMap<String, Content> {
    by_name(model(name))
}

fn models() -> Dir {
    let dir = Dir::new();
    for name in ["a", "b", "c"] {
        save(
            model(name).iter(),
            &dir.path(&format!("{name}.safetensors")),
        );
    }
    dir
}

#[test]
fn sums_and_differences_are_a1111s() {
    let dir = models();
    let (a, b, c, out) = (
        "a.safetensors",
        "b.safetensors",
        "c.safetensors",
        "out.safetensors",
    );
    dir.ok(&["convert", a, out, "--merge", b, "--alpha", "0.3"]);
    same("sum", &tensors(&dir.path(out)), &expected("sum"));
    dir.ok(&[
        "convert",
        a,
        out,
        "--add-difference",
        b,
        c,
        "--alpha",
        "0.7",
        "--force",
    ]);
    same(
        "difference",
        &tensors(&dir.path(out)),
        &expected("difference"),
    );
    let weights = "0.9,0,0.0625,0.5,0.75,0.25";
    dir.ok(&[
        "convert",
        a,
        out,
        "--merge",
        b,
        "--block-weights",
        weights,
        "--force",
    ]);
    same("blocks", &tensors(&dir.path(out)), &expected("blocks"));
    let rest = &weights[4..];
    dir.ok(&[
        "convert",
        a,
        out,
        "--merge",
        b,
        "--alpha",
        "0.9",
        "--block-weights",
        rest,
        "--force",
    ]);
    same(
        "blocks with alpha",
        &tensors(&dir.path(out)),
        &expected("blocks"),
    );
    let sentence = dir.fails(
        &[
            "convert",
            a,
            out,
            "--merge",
            b,
            "--block-weights",
            "1,2,3",
            "--force",
        ],
        2,
    );
    assert!(
        sentence.contains("has 3 numbers, expected 5 (2 blocks in, the middle, 2 out), or 6"),
        "{sentence}"
    );
    // what is kept in words
    let file = sd_rs::checkpoint::TensorFile::open(&dir.path(out), true).unwrap();
    let recipe: serde_json::Value =
        serde_json::from_str(&file.metadata()["sd_merge_recipe"]).unwrap();
    assert_eq!(recipe["interp_method"], "Weighted sum");
    assert_eq!(recipe["secondary_model"], "b.safetensors");
    assert_eq!(recipe["block_weights"][0], 0.0);
}

#[test]
fn models_for_inpainting_take_the_latents_channels() {
    let dir = models();
    let (first, sum) = (model("inpaint"), model("inpaint_sum"));
    edit(&dir.path("a.safetensors"), |tensors| {
        for tensor in tensors.iter_mut().filter(|t| t.name == first[0].name) {
            *tensor = first[0].clone();
        }
    });
    dir.ok(&[
        "convert",
        "a.safetensors",
        "out.safetensors",
        "--merge",
        "b.safetensors",
        "--alpha",
        "0.3",
    ]);
    let mut want = expected("sum");
    want.extend(by_name(sum));
    same("inpainting", &tensors(&dir.path("out.safetensors")), &want);
    let sentence = dir.fails(
        &[
            "convert",
            "b.safetensors",
            "no.safetensors",
            "--merge",
            "a.safetensors",
        ],
        1,
    );
    assert!(
        sentence.contains("give the model for inpainting or editing as the first"),
        "{sentence}"
    );
}

#[test]
fn other_structures_are_refused_by_name() {
    let dir = models();
    edit(&dir.path("b.safetensors"), |tensors| {
        tensors.retain(|t| !t.name.ends_with("out.2.bias"));
    });
    let merge = |a: &str, b: &str| dir.fails(&["convert", a, "out.safetensors", "--merge", b], 1);
    let sentence = merge("a.safetensors", "b.safetensors");
    assert!(
        sentence.contains(
            "`model.diffusion_model.out.2.bias` of the model that it is merged into is not in it"
        ),
        "{sentence}"
    );
    let sentence = merge("b.safetensors", "a.safetensors");
    assert!(
        sentence.contains("`model.diffusion_model.out.2.bias` is not in the model"),
        "{sentence}"
    );
    edit(&dir.path("c.safetensors"), |tensors| {
        for t in tensors
            .iter_mut()
            .filter(|t| t.name.ends_with("time_embed.0.weight"))
        {
            t.shape = vec![3, 7];
        }
    });
    edit(&dir.path("a.safetensors"), |tensors| {
        for t in tensors
            .iter_mut()
            .filter(|t| t.name.ends_with("final_layer_norm.weight"))
        {
            t.shape = vec![4];
            t.bytes.truncate(8);
        }
    });
    let sentence = merge("a.safetensors", "c.safetensors");
    assert!(
        sentence.contains("final_layer_norm.weight` has shape [4] here and [9]"),
        "{sentence}"
    );
    assert_eq!(
        dir.names(),
        ["a.safetensors", "b.safetensors", "c.safetensors"]
    );
}

#[test]
fn every_form_of_the_same_models_merges_alike() {
    let case = Case::load("single-sd1");
    let dir = Dir::new();
    case.write_folder(&dir.path("folder"), &FolderForm::default());
    case.write_single_file(&dir.path("a.safetensors"), &SingleForm::default());
    let bare = SingleForm {
        text_model: false,
        position_ids: None,
        ema: false,
        extras: false,
        ..SingleForm::default()
    };
    case.write_single_file(&dir.path("b.safetensors"), &bare);
    edit(&dir.path("b.safetensors"), |tensors| {
        for tensor in tensors {
            tensor.bytes.reverse();
        }
    });
    dir.ok(&[
        "convert",
        "a.safetensors",
        "one.safetensors",
        "--merge",
        "b.safetensors",
        "--dtype",
        "f32",
    ]);
    dir.ok(&[
        "convert",
        "folder",
        "two.safetensors",
        "--merge",
        "b.safetensors",
        "--dtype",
        "f32",
    ]);
    dir.ok(&[
        "convert",
        "folder",
        "three",
        "--merge",
        "b.safetensors",
        "--dtype",
        "f32",
    ]);
    dir.ok(&["convert", "three", "three.safetensors"]);
    let mut one = tensors(&dir.path("one.safetensors"));
    let two = tensors(&dir.path("two.safetensors"));
    one.retain(|name, _| two.contains_key(name));
    same("single and folder", &one, &two);
    same("a folder", &tensors(&dir.path("three.safetensors")), &two);
}
