//! A scale that changes from step to step.

use std::f64::consts::FRAC_PI_2;

/// How a scale changes: from what was asked for to the least, or the other way round (sd-dynamic-thresholding's schedules).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ScaleSchedule {
    /// The curve.
    pub shape: ScaleShape,
    /// Where it ends, or begins.
    pub least: f64,
}

/// The curve of a scale over the steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum ScaleShape {
    /// The same at every step
    #[default]
    Constant,
    /// In equal steps down to --cfg-min
    LinearDown,
    /// In equal steps up from --cfg-min
    LinearUp,
    /// Down to --cfg-min, slowly at first
    CosineDown,
    /// Up from --cfg-min, slowly at first
    CosineUp,
}

impl ScaleSchedule {
    /// The scale of step `step` of `steps`, where `scale` was asked for.
    pub(in super::super) fn at(&self, scale: f64, step: usize, steps: usize) -> f64 {
        let part = step as f64 / steps.saturating_sub(1).max(1) as f64;
        let part = match self.shape {
            ScaleShape::Constant => return scale,
            ScaleShape::LinearDown => 1.0 - part,
            ScaleShape::LinearUp => part,
            ScaleShape::CosineDown => (part * FRAC_PI_2).cos(),
            ScaleShape::CosineUp => 1.0 - (part * FRAC_PI_2).cos(),
        };
        self.least + (scale - self.least) * part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_begin_and_end_where_they_should() {
        let at = |shape, step| ScaleSchedule { shape, least: 2.0 }.at(8.0, step, 5);
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        near(at(ScaleShape::Constant, 3), 8.0);
        for (shape, first, middle, last) in [
            (ScaleShape::LinearDown, 8.0, 5.0, 2.0),
            (ScaleShape::LinearUp, 2.0, 5.0, 8.0),
            (ScaleShape::CosineDown, 8.0, 2.0 + 6.0 * 0.5f64.sqrt(), 2.0),
            (ScaleShape::CosineUp, 2.0, 8.0 - 6.0 * 0.5f64.sqrt(), 8.0),
        ] {
            near(at(shape, 0), first);
            near(at(shape, 2), middle);
            near(at(shape, 4), last);
        }
        // one step is the first
        let one = ScaleSchedule {
            shape: ScaleShape::LinearDown,
            least: 0.0,
        };
        near(one.at(8.0, 0, 1), 8.0);
    }
}
