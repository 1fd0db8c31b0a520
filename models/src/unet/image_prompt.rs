//! Pictures beside the text: keys and values of their own in every cross-attention (Ye et al., "IP-Adapter: Text Compatible Image Prompt
//! Adapter for Text-to-Image Diffusion Models", arXiv 2308.06721; diffusers 0.42.1 `IPAdapterAttnProcessor`).

use sd_kernels::{Error, Result, Tensor, Weights, ops};

use super::config::{Config, Level, Mid};
use crate::layers::Linear;

/// The layers of an IP-Adapter for one UNet, in the order in which cross-attentions are passed.
pub struct ImageLayers(Vec<(Linear, Linear)>);

/// An IP-Adapter at work.
#[derive(Clone, Copy)]
pub struct ImagePrompt<'a> {
    /// The picture's tokens `[b, t, context]`.
    pub tokens: &'a Tensor,
    /// How much of what is seen is added.
    pub scale: f64,
    /// Keys and values.
    pub layers: &'a ImageLayers,
}

impl ImageLayers {
    /// Reads `N.to_k_ip` and `N.to_v_ip`, where diffusers counts attentions from 0 down, up and through the middle, and every second one looks at
    /// the text.
    pub fn load(weights: &Weights, config: &Config) -> Self {
        let down: Vec<_> = config
            .levels
            .iter()
            .flat_map(|level| sizes(level, &level.down))
            .collect();
        // the way up begins at the last level
        let up: Vec<_> = config
            .levels
            .iter()
            .rev()
            .flat_map(|level| sizes(level, &level.up))
            .collect();
        let mid = match (config.mid, config.levels.last()) {
            (Mid::Attention { depth }, Some(level)) => vec![(level.channels, level.context); depth],
            _ => Vec::new(),
        };
        let layer = |(index, (channels, context)): (usize, (usize, usize))| {
            let weights = weights.at(2 * index + 1);
            let linear = |name| Linear::load_no_bias(&weights.at(name), context, channels);
            (linear("to_k_ip"), linear("to_v_ip"))
        };
        let first_mid = down.len() + up.len();
        let places = (0..down.len())
            .chain(first_mid..first_mid + mid.len())
            .chain(down.len()..first_mid);
        let all = down.iter().chain(&mid).chain(&up).copied();
        Self(places.zip(all).map(layer).collect())
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// Channels and width of the text of each cross-attention of a level's way.
fn sizes(level: &Level, depths: &[usize]) -> impl Iterator<Item = (usize, usize)> + use<> {
    let count = depths.iter().sum();
    std::iter::repeat_n((level.channels, level.context), count)
}

impl ImagePrompt<'_> {
    /// What cross-attention `index` sees by `queries [b, s, c]`.
    pub(super) fn attend(&self, index: usize, queries: &Tensor, heads: usize) -> Result<Tensor> {
        let Some((to_k, to_v)) = self.layers.0.get(index) else {
            return Err(Error::Shape {
                op: "image prompt",
                expected: format!("more than {index} layers"),
                got: self.layers.len().to_string(),
            });
        };
        let (k, v) = (to_k.forward(self.tokens)?, to_v.forward(self.tokens)?);
        ops::attention(queries, &k, &v, heads, false)
    }
}
