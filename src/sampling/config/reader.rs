//! Typed access to the fields of a scheduler config that a class has.

use serde_json::Value;

use super::{Class, Prediction, SigmaMap};
use crate::error::{Error, Result};

pub(super) fn wrong(field: &str, value: &Value, expected: &str) -> Error {
    Error::Usage(format!(
        "scheduler config field `{field}` is {value}, expected {expected}"
    ))
}

/// Typed access to the fields that a class has.
pub(super) struct Reader<'a> {
    pub(super) value: &'a Value,
    pub(super) class: Class,
}

impl Reader<'_> {
    /// A field's value; none when it is absent, null, not of this class, or listed as not chosen by whoever wrote the file.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        let unchosen = self.value.get("_use_default_values");
        let unchosen = unchosen
            .and_then(Value::as_array)
            .is_some_and(|names| names.iter().any(|name| name.as_str() == Some(field)));
        self.value
            .get(field)
            .filter(|v| !v.is_null() && !unchosen && self.class.has(field))
    }

    pub(super) fn number(&self, field: &str, default: f64) -> Result<f64> {
        self.get(field).map_or(Ok(default), |v| {
            // Python writes infinities bare, which is not JSON: whoever reads the file may hand them on as text
            match v.as_str().map(str::to_ascii_lowercase).as_deref() {
                Some("-inf" | "-infinity") => return Ok(f64::NEG_INFINITY),
                Some("inf" | "infinity") => return Ok(f64::INFINITY),
                _ => {}
            }
            v.as_f64()
                .filter(|n| n.is_finite())
                .ok_or_else(|| wrong(field, v, "a number"))
        })
    }

    /// A noise level, which must be above zero.
    pub(super) fn level(&self, field: &str) -> Result<Option<f64>> {
        match self.get(field) {
            None => Ok(None),
            Some(v) => v
                .as_f64()
                .filter(|&n| n > 0.0 && n.is_finite())
                .map(Some)
                .ok_or_else(|| wrong(field, v, "a number above 0")),
        }
    }

    pub(super) fn size(&self, field: &str, default: usize) -> Result<usize> {
        self.get(field).map_or(Ok(default), |v| {
            v.as_u64()
                .filter(|&n| n <= 100_000)
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(|| wrong(field, v, "a whole number up to 100000"))
        })
    }

    pub(super) fn seed(&self, field: &str) -> Result<Option<u64>> {
        self.get(field).map_or(Ok(None), |v| {
            let seed = v.as_u64();
            seed.map(Some)
                .ok_or_else(|| wrong(field, v, "a whole number from 0"))
        })
    }

    pub(super) fn flag(&self, field: &str, default: bool) -> Result<bool> {
        self.get(field).map_or(Ok(default), |v| {
            v.as_bool().ok_or_else(|| wrong(field, v, "true or false"))
        })
    }

    pub(super) fn text(&self, field: &str, default: &str) -> Result<String> {
        self.get(field).map_or_else(
            || Ok(default.to_owned()),
            |v| {
                v.as_str()
                    .map(str::to_owned)
                    .ok_or_else(|| wrong(field, v, "a text"))
            },
        )
    }

    /// The meaning of a field whose text is one of a few words.
    pub(super) fn choice<T: Copy>(
        &self,
        field: &str,
        default: &str,
        words: &[(&str, T)],
    ) -> Result<T> {
        let word = self.text(field, default)?;
        let found = words.iter().find(|(name, _)| *name == word);
        found.map(|(_, meaning)| *meaning).ok_or_else(|| {
            let words: Vec<&str> = words.iter().map(|(name, _)| *name).collect();
            wrong(field, &word.into(), &format!("one of {}", words.join(", ")))
        })
    }

    pub(super) fn prediction(&self) -> Result<Prediction> {
        if self.class.is_flow_match() {
            return Ok(Prediction::Flow);
        }
        let mut words = PREDICTIONS.to_vec();
        if self.flag("use_flow_sigmas", false)? {
            words.push(("flow_prediction", Prediction::Flow));
        }
        self.choice("prediction_type", "epsilon", &words)
    }

    pub(super) fn sigma_map(&self) -> Result<SigmaMap> {
        // diffusers asks in this order
        let maps = [
            ("use_karras_sigmas", SigmaMap::Karras),
            ("use_lu_lambdas", SigmaMap::Lu),
            ("use_exponential_sigmas", SigmaMap::Exponential),
            ("use_beta_sigmas", SigmaMap::Beta),
        ];
        for (field, map) in maps {
            if self.flag(field, false)? {
                return Ok(map);
            }
        }
        Ok(SigmaMap::None)
    }

    pub(super) fn trained_betas(&self) -> Result<Option<Vec<f64>>> {
        let Some(list) = self.get("trained_betas") else {
            return Ok(None);
        };
        let betas = list
            .as_array()
            .and_then(|l| l.iter().map(Value::as_f64).collect::<Option<Vec<_>>>())
            .filter(|l| l.len() >= 2 && l.iter().all(|b| (0.0..=1.0).contains(b)));
        betas
            .map(Some)
            .ok_or_else(|| wrong("trained_betas", &"…".into(), "numbers from 0 to 1"))
    }

    pub(super) fn disable_corrector(&self) -> Result<Vec<usize>> {
        let Some(list) = self.get("disable_corrector") else {
            return Ok(Vec::new());
        };
        list.as_array()
            .and_then(|l| l.iter().map(Value::as_u64).collect::<Option<Vec<_>>>())
            .map(|l| {
                l.into_iter()
                    .filter_map(|n| usize::try_from(n).ok())
                    .collect()
            })
            .ok_or_else(|| wrong("disable_corrector", list, "a list of steps"))
    }
}

const PREDICTIONS: &[(&str, Prediction)] = &[
    ("epsilon", Prediction::Epsilon),
    ("v_prediction", Prediction::V),
    ("sample", Prediction::Sample),
    ("original_sample", Prediction::Sample),
];
