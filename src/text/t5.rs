//! T5's tokenizer (to come).

use std::path::Path;

use super::prompt::{Role, Syntax};
use crate::error::{Error, Result};

/// T5's tokenizer.
#[derive(Debug, Clone)]
pub struct T5Tokenizer;

/// A text as T5 reads it.
#[derive(Debug, Clone)]
pub struct T5Text {
    /// Token ids, filled up.
    pub ids: Vec<u32>,
    /// A weight a token.
    pub weights: Vec<f32>,
    /// What was cut.
    pub warning: Option<String>,
}

impl T5Tokenizer {
    /// The built-in vocabulary.
    pub fn embedded() -> Result<Self> {
        Ok(Self)
    }

    /// A folder's own.
    pub fn from_folder(_: &Path) -> Result<Self> {
        Ok(Self)
    }

    /// Cuts.
    pub fn tokenize(&self, _: &str, _: (Syntax, Role), _: usize) -> Result<T5Text> {
        Err(Error::Unsupported("T5 texts".to_owned()))
    }
}
