//! Dynamic thresholding of estimates (Saharia et al., "Imagen", arXiv 2205.11487, section 2.3; diffusers 0.42.1 `_threshold_sample`).

/// How an estimate of x₀ is limited: the range that holds the part `ratio` of a picture's values, from 1 to `most`, becomes −1 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Threshold {
    /// `dynamic_thresholding_ratio`, 0 to 1.
    pub ratio: f64,
    /// `sample_max_value`.
    pub most: f64,
}

impl Threshold {
    /// Limits the values of one picture.
    pub fn limit(&self, values: &mut [f64]) {
        let sizes = values.iter().map(|x| x.abs()).collect();
        let range = quantile(sizes, self.ratio).max(1.0).min(self.most);
        for value in values {
            *value = value.clamp(-range, range) / range;
        }
    }
}

/// The value that the part `part` of `values` is not above, between two of them in proportion (`torch.quantile`).
pub fn quantile(mut values: Vec<f64>, part: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let place = part * values.len().saturating_sub(1) as f64;
    let (below, rest) = (place as usize, place.fract());
    match (values.get(below), values.get(below + 1)) {
        (Some(a), Some(b)) => a + (b - a) * rest,
        (Some(a), None) => *a,
        _ => 0.0,
    }
}
