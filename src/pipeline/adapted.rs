//! Adapters on the networks of a model: which tensors these have, and their weights with the changes in them.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device};
use sd_kernels::{Source, Weights};
use sd_models::clip::TextEncoder;
use sd_models::denoiser::Denoiser;
use sd_models::t5::T5Encoder;

use super::coverage::source;
use crate::adapters::{Adapters, Bound, Network, Owner};
use crate::error::Result;
use crate::spec::{Component, ModelSpec};

/// Finds what `adapters` change in the networks of a model, from whose checkpoint `spec` was read.
///
/// # Errors
/// [`crate::Error::BadModel`] when an adapter does not fit the model.
pub fn bind_adapters(spec: &ModelSpec, adapters: &Adapters) -> Result<Arc<Bound>> {
    if adapters.is_empty() {
        return Ok(Arc::default());
    }
    let title = spec.family.phrase();
    adapters.bind(&networks(spec), title).map(Arc::new)
}

/// The networks that adapters may change, with all tensors that these ask for.
fn networks(spec: &ModelSpec) -> Vec<Network> {
    let towers = spec.text.iter().map(|tower| {
        let component = &tower.component;
        let load = |w: &Weights| drop(TextEncoder::load(w, &component.config));
        network(Owner::Text(tower.role.component), component, &load)
    });
    let t5 = spec.t5.iter().map(|t5| {
        let component = &t5.component;
        let load = |w: &Weights| drop(T5Encoder::load(w, &component.config));
        network(Owner::Text(t5.role.component), component, &load)
    });
    let load = |w: &Weights| drop(Denoiser::load(w, &spec.unet.config));
    towers
        .chain(t5)
        .chain([network(Owner::Denoiser, &spec.unet, &load)])
        .collect()
}

fn network<C>(owner: Owner, component: &Component<C>, load: &dyn Fn(&Weights)) -> Network {
    let source = source(component);
    let weights = Weights::new(
        Arc::clone(&source) as Arc<dyn Source>,
        DType::F32,
        &Device::Cpu,
    );
    load(&weights);
    // that nothing is missing was found before
    let names = weights.check().unwrap_or_default().into_iter();
    let shape = |name: String| {
        let shape = source.shape(&name, &[])?;
        Some((name, shape))
    };
    let tensors: BTreeMap<String, Vec<usize>> = names.filter_map(shape).collect();
    let compressed = tensors.keys().filter(|name| source.is_compressed(name));
    Network {
        owner,
        compressed: compressed.cloned().collect(),
        tensors,
    }
}
