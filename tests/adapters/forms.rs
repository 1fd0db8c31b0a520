//! What does not depend on a reference: the same change from every container and folder, fused projections, PEFT's settings.

use std::path::Path;
use std::sync::Arc;

use sd_rs::adapters::{Adapter, Adapters, DoraNorm, Network, Owner};
use sd_rs::checkpoint::ReadOptions;
use serde_json::{Value, json};

use super::{case, tensors, write, write_tensors};
use crate::support::Dir;
use crate::support::containers::{torch_archive, torch_stream};
use crate::support::weights::Stored;

const NAME: &str = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight";

/// What the adapter at `path` makes of zeros, or of ones.
fn change(path: &Path, owner: Owner, name: &str, shape: &[usize], base: f32) -> Vec<f32> {
    change_with(path, (owner, name, shape), base, DoraNorm::Merged)
}

fn change_with(
    path: &Path,
    (owner, name, shape): (Owner, &str, &[usize]),
    base: f32,
    norm: DoraNorm,
) -> Vec<f32> {
    let adapter = Adapter::open(path, &ReadOptions::default()).unwrap();
    let mut adapters = Adapters::default();
    adapters.add(&Arc::new(adapter), 1.0, 1.0).unwrap();
    adapters.set_dora_norm(norm);
    let network = Network {
        owner,
        tensors: [(name.to_owned(), shape.to_vec())].into(),
        compressed: [].into(),
    };
    let bound = adapters.bind(&[network], "a model").unwrap();
    let mut weight = vec![base; shape.iter().product()];
    bound.apply(owner, name, shape, &mut weight).unwrap();
    weight
}

fn stored(name: &str, shape: &[usize], numbers: &[f32]) -> Stored {
    Stored {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: safetensors::Dtype::F32,
        bytes: numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

#[test]
fn every_container_makes_the_same_change() {
    let (dir, case) = (Dir::new(), case("kohya-sd1"));
    let stored = tensors(&case);
    write(&case, &dir.path("a.safetensors"));
    std::fs::write(dir.path("b.pt"), torch_archive(&stored)).unwrap();
    std::fs::write(dir.path("c.ckpt"), torch_stream(&stored)).unwrap();
    let of = |file: &str| change(&dir.path(file), Owner::Denoiser, NAME, &[32, 32], 0.0);
    let want = of("a.safetensors");
    assert!(want.iter().any(|w| *w != 0.0));
    assert_eq!(of("b.pt"), want);
    assert_eq!(of("c.ckpt"), want);
}

#[test]
fn folders_of_diffusers_and_peft() {
    let (dir, case) = (Dir::new(), case("peft-sd1"));
    std::fs::create_dir_all(dir.path("diffusers")).unwrap();
    std::fs::create_dir_all(dir.path("peft")).unwrap();
    write(
        &case,
        &dir.path("diffusers/pytorch_lora_weights.safetensors"),
    );
    let mut bare = tensors(&case);
    for tensor in &mut bare {
        let rest = tensor.name.strip_prefix("unet.").unwrap();
        tensor.name = format!("base_model.model.{rest}");
    }
    let file = dir.path("peft/adapter_model.safetensors");
    write_tensors(&bare, &Value::Null, &file);
    let of = |folder: &str| change(&dir.path(folder), Owner::Denoiser, NAME, &[32, 32], 0.0);
    let want = of("diffusers");
    // without its settings, the scale is one in place of 8 / 4
    let plain = of("peft");
    let twice: Vec<f32> = plain.iter().map(|x| 2.0 * x).collect();
    assert_eq!(twice, want);
    let settings = json!({ "peft_type": "LORA", "r": 4, "lora_alpha": 8 });
    std::fs::write(dir.path("peft/adapter_config.json"), settings.to_string()).unwrap();
    assert_eq!(of("peft"), want);
    let stabilised = json!({ "lora_alpha": 8, "use_rslora": true });
    std::fs::write(dir.path("peft/adapter_config.json"), stabilised.to_string()).unwrap();
    let four: Vec<f32> = plain.iter().map(|x| 4.0 * x).collect();
    assert_eq!(of("peft"), four);
}

#[test]
fn a_fused_projection_gives_each_its_rows() {
    let dir = Dir::new();
    let path = dir.path("lora.safetensors");
    let module = "lora_te2_transformer_resblocks_0_attn_in_proj";
    let up: Vec<f32> = (0..6).map(|row| row as f32).collect();
    let parts = [
        stored(&format!("{module}.lora_up.weight"), &[6, 1], &up),
        stored(&format!("{module}.lora_down.weight"), &[1, 2], &[1.0, 10.0]),
    ];
    write_tensors(&parts, &Value::Null, &path);
    let owner = Owner::Text("text_encoder_2");
    for (name, want) in [
        ("q_proj", [0.0, 0.0, 1.0, 10.0]),
        ("k_proj", [2.0, 20.0, 3.0, 30.0]),
        ("v_proj", [4.0, 40.0, 5.0, 50.0]),
    ] {
        let name = format!("encoder.layers.0.self_attn.{name}.weight");
        assert_eq!(change(&path, owner, &name, &[2, 2], 0.0), want, "{name}");
    }
}

#[test]
fn lengths_of_dora_are_of_what_is_asked() {
    // W is all ones, the change one row of threes: merged 4, 4 and 1, 1
    let dir = Dir::new();
    let path = dir.path("lora.safetensors");
    let weight = (Owner::Denoiser, "conv_in.weight", &[2usize, 2][..]);
    let make = |end: &str, shape: &[usize]| {
        let parts = [
            stored("conv_in.lora_up.weight", &[2, 1], &[3.0, 0.0]),
            stored("conv_in.lora_down.weight", &[1, 2], &[1.0, 1.0]),
            stored(&format!("conv_in.{end}"), shape, &[2.0, 2.0]),
        ];
        write_tensors(&parts, &Value::Null, &path);
    };
    let close = |got: Vec<f32>, want: [f32; 4]| {
        let near = got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(near, "{got:?} {want:?}");
    };
    let root = 2.0f32.sqrt();
    make("dora_scale", &[2, 1]);
    close(change_with(&path, weight, 1.0, DoraNorm::Merged), [root; 4]);
    let original = [4.0 * root, 4.0 * root, root, root];
    close(
        change_with(&path, weight, 1.0, DoraNorm::Original),
        original,
    );
    // a first axis of one: lengths of inputs, √17 each
    make("dora_scale", &[1, 2]);
    let inputs = [8.0, 8.0, 2.0, 2.0].map(|x: f32| x / 17.0f32.sqrt());
    close(change_with(&path, weight, 1.0, DoraNorm::Merged), inputs);
    close(change_with(&path, weight, 1.0, DoraNorm::Original), inputs);
    // PEFT's are of outputs however they lie
    make("lora_magnitude_vector", &[1, 2]);
    close(change_with(&path, weight, 1.0, DoraNorm::Merged), [root; 4]);
}
