//! Which weights the networks of a model have: each network is built over the file's names and shapes and asks, as in every run.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device};
use sd_kernels::{Reader, Source, Weights};
use sd_models::clip::TextEncoder;
use sd_models::denoiser::Denoiser;
use sd_models::vae::{Decoder, Encoder};

use crate::error::Result;
use crate::spec::{Component, ModelSpec};
use crate::weights::CheckpointSource;

/// The weights of one network.
pub(super) struct Network {
    /// Its name in folders.
    pub(super) component: &'static str,
    /// Where its weights lie.
    pub(super) source: Arc<CheckpointSource>,
    /// Names and shapes, in the order in which the network asks.
    pub(super) weights: Vec<(String, Vec<usize>)>,
}

/// Passes questions on and writes them down.
struct Recorder {
    source: Arc<CheckpointSource>,
    asked: Mutex<Vec<(String, Vec<usize>)>>,
}

impl Source for Recorder {
    fn shape(&self, name: &str, wanted: &[usize]) -> Option<Vec<usize>> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.push((name.to_owned(), wanted.to_vec()));
        self.source.shape(name, wanted)
    }

    fn dtype(&self, name: &str) -> DType {
        self.source.dtype(name)
    }

    fn open(&self, name: &str, shape: &[usize]) -> sd_kernels::Result<Box<dyn Reader + '_>> {
        self.source.open(name, shape)
    }
}

/// The networks of a model: UNet, autoencoder, text towers in their order.
///
/// # Errors
/// [`crate::Error::Weights`] with what is missing or misshapen.
pub(super) fn networks(spec: &ModelSpec) -> Result<Vec<Network>> {
    let mut networks = vec![
        ask("unet", &spec.unet, |weights, config| {
            drop(Denoiser::load(weights, config));
        })?,
        ask("vae", &spec.vae, |weights, config| {
            drop(Encoder::load(weights, config));
            drop(Decoder::load(weights, config));
        })?,
    ];
    for tower in &spec.text {
        let component = tower.role.component;
        networks.push(ask(component, &tower.component, |weights, config| {
            drop(TextEncoder::load(weights, config));
        })?);
    }
    Ok(networks)
}

fn ask<C>(
    name: &'static str,
    component: &Component<C>,
    load: impl Fn(&Weights, &C),
) -> Result<Network> {
    let tensors = Arc::clone(&component.tensors);
    let source = Arc::new(CheckpointSource::new(tensors, component.layout.clone()));
    let recorder = Arc::new(Recorder {
        source: Arc::clone(&source),
        asked: Mutex::default(),
    });
    let passed = Arc::clone(&recorder) as Arc<dyn Source>;
    let weights = Weights::new(passed, DType::F32, &Device::Cpu);
    load(&weights, &component.config);
    weights.check().map_err(|error| match error {
        sd_kernels::Error::Weights(reason) => crate::Error::Weights(format!("{name}: {reason}")),
        other => other.into(),
    })?;
    let mut asked = recorder
        .asked
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    Ok(Network {
        component: name,
        source,
        weights: std::mem::take(&mut asked),
    })
}
