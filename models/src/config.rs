//! Reading `config.json` files: absent fields take the reference's default, unknown ones are ignored, what cannot be computed is named.

use serde_json::Value;

/// The largest size that a config may give; anything above is a broken file, and would overflow products of sizes.
const MAX_SIZE: u64 = 1 << 20;

/// A config that cannot be used: which field, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(pub String);

impl std::fmt::Display for ConfigError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

/// A result with [`ConfigError`].
pub type ConfigResult<T> = Result<T, ConfigError>;

/// Typed access to the fields of one JSON object.
pub struct Fields<'a>(pub &'a Value);

impl<'a> Fields<'a> {
    /// The field, or `None` when it is absent or null.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn wrong(name: &str, expected: &str, got: &Value) -> ConfigError {
        let mut got = got.to_string();
        if got.len() > 60 {
            got = got.chars().take(60).collect::<String>() + "…";
        }
        ConfigError(format!(
            "config field `{name}` is {got}, expected {expected}"
        ))
    }

    fn as_size(name: &str, value: &Value) -> ConfigResult<usize> {
        value
            .as_u64()
            .filter(|&n| n <= MAX_SIZE)
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(|| Self::wrong(name, "a whole number from 0 to 1048576", value))
    }

    /// A whole number.
    ///
    /// # Errors
    /// When the field is something else or absurdly large.
    pub fn size(&self, name: &str, default: usize) -> ConfigResult<usize> {
        self.get(name)
            .map_or(Ok(default), |value| Self::as_size(name, value))
    }

    /// A whole number that must not be zero.
    ///
    /// # Errors
    /// When the field is something else, zero or absurdly large.
    pub fn positive(&self, name: &str, default: usize) -> ConfigResult<usize> {
        match self.size(name, default)? {
            0 => Err(ConfigError(format!(
                "config field `{name}` is 0, expected at least 1"
            ))),
            n => Ok(n),
        }
    }

    /// A finite number.
    ///
    /// # Errors
    /// When the field is something else.
    pub fn number(&self, name: &str, default: f64) -> ConfigResult<f64> {
        self.get(name).map_or(Ok(default), |value| {
            value
                .as_f64()
                .filter(|n| n.is_finite())
                .ok_or_else(|| Self::wrong(name, "a number", value))
        })
    }

    /// True or false.
    ///
    /// # Errors
    /// When the field is something else.
    pub fn flag(&self, name: &str, default: bool) -> ConfigResult<bool> {
        self.get(name).map_or(Ok(default), |value| {
            value
                .as_bool()
                .ok_or_else(|| Self::wrong(name, "true or false", value))
        })
    }

    /// A text.
    ///
    /// # Errors
    /// When the field is something else.
    pub fn text(&self, name: &str, default: &'a str) -> ConfigResult<&'a str> {
        self.get(name).map_or(Ok(default), |value| {
            value
                .as_str()
                .ok_or_else(|| Self::wrong(name, "a text", value))
        })
    }

    /// A list of texts.
    ///
    /// # Errors
    /// When the field is something else.
    pub fn texts(&self, name: &str, default: &[&str]) -> ConfigResult<Vec<String>> {
        let Some(value) = self.get(name) else {
            return Ok(default.iter().map(|&text| text.to_owned()).collect());
        };
        value
            .as_array()
            .and_then(|list| {
                list.iter()
                    .map(|item| item.as_str().map(str::to_owned))
                    .collect()
            })
            .ok_or_else(|| Self::wrong(name, "a list of texts", value))
    }

    /// A list of whole numbers.
    ///
    /// # Errors
    /// When the field is something else.
    pub fn sizes(&self, name: &str, default: &[usize]) -> ConfigResult<Vec<usize>> {
        let Some(value) = self.get(name) else {
            return Ok(default.to_vec());
        };
        value
            .as_array()
            .ok_or_else(|| Self::wrong(name, "a list of whole numbers", value))?
            .iter()
            .map(|item| Self::as_size(name, item))
            .collect()
    }

    /// One whole number for all of `count` levels, or a list with one for each.
    ///
    /// # Errors
    /// When the field is something else or the list has another length.
    pub fn per_level(&self, name: &str, default: usize, count: usize) -> ConfigResult<Vec<usize>> {
        match self.get(name) {
            Some(value @ Value::Array(list)) => {
                if list.len() != count {
                    return Err(Self::wrong(
                        name,
                        &format!("{count} numbers, one a level"),
                        value,
                    ));
                }
                self.sizes(name, &[])
            }
            _ => Ok(vec![self.size(name, default)?; count]),
        }
    }

    /// Refuses a field that is present with a value that is not built.
    ///
    /// # Errors
    /// When the field is there and neither null, false nor `neutral`.
    pub fn must_be_neutral(&self, name: &str, neutral: &Value) -> ConfigResult<()> {
        match self.get(name) {
            Some(value) if value != neutral && *value != Value::Bool(false) => Err(ConfigError(
                format!("config field `{name}` is {value}, which is not supported yet"),
            )),
            _ => Ok(()),
        }
    }
}
