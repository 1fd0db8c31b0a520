//! Checkpoints as one file in the original ("LDM") layout.

use std::collections::HashMap;
use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;

use super::Case;
use super::json::{dtype_named, law, rows, sizes, text};
use super::values::{Law, Stored, encode, save, uniform};

/// Which single file to write; the default is what CompVis' and Stability's own files are like.
#[derive(Debug, Clone)]
pub(crate) struct SingleForm {
    /// Stored type of the weights; the case's own if none. A narrower one changes the weights, and so what they compute.
    pub(crate) dtype: Option<Dtype>,
    /// Whether the text names of transformers' towers (Stable Diffusion 1's, and XL's first) have `text_model.`: they lack it in the oldest and
    /// the newest files.
    pub(crate) text_model: bool,
    /// Type of `position_ids` where the text tower has them: I64, or F32 as merging tools leave them; absent if none.
    pub(crate) position_ids: Option<Dtype>,
    /// Whether averaged copies of the UNet's weights (`model_ema.…`, of other values) are there.
    pub(crate) ema: bool,
    /// Whether what else real files hold is there: betas and such, OpenCLIP's projection where it is not used, the empty tensors that tell what a
    /// model predicts. OpenCLIP's unused last layer always is.
    pub(crate) extras: bool,
}

impl Default for SingleForm {
    fn default() -> Self {
        Self {
            dtype: None,
            text_model: true,
            position_ids: Some(Dtype::I64),
            ema: true,
            extras: true,
        }
    }
}

impl Case {
    /// The tensors of the single file that are the model, in the original layout.
    pub(crate) fn single_weights(&self, dtype: Option<Dtype>) -> Vec<Stored> {
        let mut file = Vec::new();
        for (component, part) in self.record["single_file"]["parts"]
            .as_object()
            .expect("the case has no single file")
        {
            let weights = self.weights(component, dtype);
            let by_name: HashMap<&str, &Stored> = weights
                .iter()
                .map(|tensor| (tensor.name.as_str(), tensor))
                .collect();
            for row in rows(&part["tensors"]) {
                let name = format!("{}{}", text(&part["prefix"]), text(&row[0]));
                if let Some(source) = row[1]["transpose"].as_str() {
                    file.push(transposed(name, by_name[source]));
                    continue;
                }
                if let Some(source) = row[1]["swap"].as_str() {
                    file.push(swapped(name, by_name[source]));
                    continue;
                }
                // one source as it is, or [sources] below each other under a shape of their own
                let sources: Vec<&Stored> = match row[1].as_array() {
                    Some(names) => names
                        .iter()
                        .map(|name| by_name[name.as_str().unwrap()])
                        .collect(),
                    None => vec![by_name[row[1].as_str().unwrap()]],
                };
                file.push(Stored {
                    name,
                    shape: row.get(2).map_or_else(|| sources[0].shape.clone(), sizes),
                    dtype: sources[0].dtype,
                    bytes: sources
                        .iter()
                        .map(|source| source.bytes.as_slice())
                        .collect::<Vec<_>>()
                        .concat(),
                });
            }
        }
        file
    }

    /// Writes the model as one file in the original layout.
    pub(crate) fn write_single_file(&self, path: &Path, form: &SingleForm) {
        let mut tensors = self.single_weights(form.dtype);
        if form.ema {
            tensors.extend(averaged(&tensors));
        }
        for row in rows(&self.record["single_file"]["extras"]) {
            tensors.extend(extra(row, form));
        }
        if !form.text_model {
            for tensor in &mut tensors {
                for tower in [
                    "cond_stage_model.transformer.",
                    "conditioner.embedders.0.transformer.",
                ] {
                    let rest = tensor.name.strip_prefix(tower);
                    if let Some(rest) = rest.and_then(|rest| rest.strip_prefix("text_model.")) {
                        tensor.name = format!("{tower}{rest}");
                        break;
                    }
                }
            }
        }
        save(tensors.iter(), path);
    }
}

/// OpenCLIP's projection as diffusers' own conversion script leaves it: called `text_projection.weight` and not transposed. For `edit`.
pub(crate) fn linear_projection(tensors: &mut [Stored]) {
    for tensor in tensors {
        if tensor.name.ends_with(".text_projection") {
            *tensor = transposed(format!("{}.weight", tensor.name), tensor);
        }
    }
}

/// A matrix with rows and columns exchanged.
fn transposed(name: String, source: &Stored) -> Stored {
    let &[height, width] = source.shape.as_slice() else {
        panic!("{} is no matrix", source.name)
    };
    let size = source.bytes.len() / (height * width);
    let element =
        |row: usize, column: usize| &source.bytes[(row * width + column) * size..][..size];
    Stored {
        name,
        shape: vec![width, height],
        dtype: source.dtype,
        bytes: (0..width)
            .flat_map(|column| (0..height).flat_map(move |row| element(row, column)))
            .copied()
            .collect(),
    }
}

/// A tensor with its second half of the rows first.
fn swapped(name: String, source: &Stored) -> Stored {
    let (first, second) = source.bytes.split_at(source.bytes.len() / 2);
    Stored {
        name,
        bytes: [second, first].concat(),
        ..source.clone()
    }
}

/// LDM's averaged weights: the UNet's names without dots, float32, and here of other values.
fn averaged(tensors: &[Stored]) -> Vec<Stored> {
    let names = tensors.iter().filter_map(|tensor| {
        let rest = tensor.name.strip_prefix("model.")?;
        Some((
            format!("model_ema.{}", rest.replace('.', "")),
            &tensor.shape,
        ))
    });
    let law = Law {
        scale: 0.3,
        offset: 0.0,
    };
    let make = |(name, shape): (String, &Vec<usize>)| Stored {
        bytes: encode(&uniform(&name, shape, law), Dtype::F32, Dtype::F32),
        dtype: Dtype::F32,
        name,
        shape: shape.clone(),
    };
    names.map(make).collect()
}

/// One of the tensors besides the model, if `form` wants it.
fn extra(row: &Value, form: &SingleForm) -> Option<Stored> {
    let (name, shape, mut dtype) = (text(&row[0]), sizes(&row[1]), dtype_named(&row[2]));
    let values = match row[3].as_str() {
        Some("positions") => {
            dtype = form.position_ids?;
            (0u8..77).map(f32::from).collect()
        }
        _ if !form.extras && !name.contains("resblocks") => return None,
        Some("zeros") => vec![0.0],
        Some("betas") => betas().map(|beta| beta as f32).collect(),
        Some("alphas_cumprod") => {
            let mut product = 1.0;
            let alphas = betas().map(|beta| {
                product *= 1.0 - beta;
                product as f32
            });
            alphas.collect()
        }
        _ => uniform(&name, &shape, law(&row[3][0], &row[3][1])),
    };
    Some(Stored {
        bytes: encode(&values, Dtype::F32, dtype),
        dtype,
        name,
        shape,
    })
}

/// Stable Diffusion's noise variances: squares of 1000 evenly spaced numbers.
fn betas() -> impl Iterator<Item = f64> {
    let (start, end) = (0.00085_f64.sqrt(), 0.012_f64.sqrt());
    (0u16..1000).map(move |i| (start + (end - start) * f64::from(i) / 999.0).powi(2))
}
