//! Control-LoRA: the same as the ControlNet that it stands for, with the differences added here.

use super::*;

/// Numbers of a matrix product `up [o, r] · down [r, …]`.
fn product(up: &[f32], down: &[f32], rank: usize) -> Vec<f32> {
    let columns = down.len() / rank;
    let rows = up.len() / rank;
    let at = |row: usize, column: usize| -> f32 {
        let terms = (0..rank)
            .map(|k| f64::from(up[row * rank + k]) * f64::from(down[k * columns + column]));
        terms.sum::<f64>() as f32
    };
    (0..rows)
        .flat_map(|row| (0..columns).map(move |column| (row, column)))
        .map(|(r, c)| at(r, c))
        .collect()
}

fn stored(name: String, shape: Vec<usize>, values: &[f32]) -> Stored {
    Stored {
        name,
        bytes: encode(values, Dtype::F32, Dtype::F32),
        dtype: Dtype::F32,
        shape,
    }
}

#[test]
fn a_difference_is_added_to_the_models_own_unet() {
    const RANK: usize = 2;
    let cases = Cases::load();
    let part = cases.part("depth-xl");
    let base = part.base();
    let unet: HashMap<String, Stored> = base
        .weights("unet", Some(Dtype::F32))
        .into_iter()
        .map(|tensor| (tensor.name.clone(), tensor))
        .collect();
    let mut lora = vec![stored("lora_controlnet".to_owned(), vec![0], &[])];
    let mut whole = Vec::new();
    let pairs = list(&part.record["original"]);
    for (tensor, pair) in part.original("").into_iter().zip(pairs) {
        let own = ["input_hint_block.", "zero_convs.", "middle_block_out."];
        if own.iter().any(|start| tensor.name.starts_with(start)) {
            lora.push(tensor.clone());
            whole.push(tensor);
            continue;
        }
        let base = &unet[text(&pair[1])];
        let numbers = sd_rs_values(base);
        let Some(stem) = tensor
            .name
            .strip_suffix("weight")
            .filter(|_| base.shape.len() > 1)
        else {
            // every other vector is the file's own
            if tensor.name.len() % 2 == 0 {
                lora.push(tensor.clone());
                whole.push(tensor);
            } else {
                whole.push(stored(tensor.name, base.shape.clone(), &numbers));
            }
            continue;
        };
        let (rows, columns) = (base.shape[0], numbers.len() / base.shape[0]);
        let law = |scale| Law { scale, offset: 0.0 };
        let up = uniform(&format!("{stem}up"), &[rows, RANK], law(0.5));
        let scale = 1.0 / (columns as f32).sqrt();
        let down = uniform(&format!("{stem}down"), &[RANK, columns], law(scale));
        let mut down_shape = base.shape.clone();
        down_shape[0] = RANK;
        let mut up_shape = vec![1; base.shape.len()];
        up_shape[..2].copy_from_slice(&[rows, RANK]);
        let change = product(&up, &down, RANK);
        let sum: Vec<f32> = numbers.iter().zip(&change).map(|(a, b)| a + b).collect();
        lora.push(stored(format!("{stem}up"), up_shape, &up));
        lora.push(stored(format!("{stem}down"), down_shape, &down));
        whole.push(stored(tensor.name.clone(), base.shape.clone(), &sum));
    }
    let mut runs = list(&cases.record["runs"]).iter();
    let run = runs.find(|r| r["name"] == "depth-xl").unwrap();
    let dir = Dir::new();
    let folder = write_base(&base, &dir, run);
    let (lora_file, whole_file) = (dir.path("lora.safetensors"), dir.path("whole.safetensors"));
    save(lora.iter(), &lora_file);
    save(whole.iter(), &whole_file);
    let want = run_latents(&folder, &[whole_file], run);
    let got = run_latents(&folder, &[lora_file], run);
    let want = Values {
        shape: want.dims().to_vec(),
        data: crate::models::flat(&want),
    };
    close("Control-LoRA", &got, &want, 1e-5);
    let key = text(&run["expected"]);
    let norm = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let plain = &cases.expected[key].data;
    let apart: Vec<f32> = want.data.iter().zip(plain).map(|(a, b)| a - b).collect();
    assert!(
        norm(&apart) > 1e-3 * norm(plain),
        "the difference makes none"
    );
}
