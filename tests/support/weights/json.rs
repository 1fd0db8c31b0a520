//! Reading case.json.

use safetensors::Dtype;
use serde_json::Value;

use super::values::Law;

pub(super) fn dtype_named(value: &Value) -> Dtype {
    serde_json::from_value(value.clone()).unwrap()
}

pub(super) fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

pub(super) fn sizes(value: &Value) -> Vec<usize> {
    rows(value)
        .iter()
        .map(|size| usize::try_from(size.as_u64().unwrap()).unwrap())
        .collect()
}

pub(super) fn rows(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

/// A missing offset is 0. The numbers have few digits, so float64 between the text and float32 changes nothing.
pub(super) fn law(scale: &Value, offset: &Value) -> Law {
    Law {
        scale: scale.as_f64().unwrap() as f32,
        offset: offset.as_f64().unwrap_or(0.0) as f32,
    }
}
