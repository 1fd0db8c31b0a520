//! What `inspect` says of a textual inversion: its words, how many vectors each has, and what it was made for.

use serde::Serialize;

use super::line;
use crate::adapters::Embedding;
use crate::checkpoint::{Checkpoint, Detection, Family, ReadOptions, printable};

/// An embedding's part of the report.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct EmbeddingReport {
    words: Vec<WordReport>,
    /// The models that it was made for.
    made_for: String,
}

/// One word.
#[derive(Debug, Serialize)]
struct WordReport {
    name: String,
    /// What the file itself calls it.
    token: Option<String>,
    vectors: usize,
    /// The width for each text encoder.
    widths: Vec<usize>,
    /// Their names in a folder, where the file says them.
    towers: Vec<Option<&'static str>>,
}

impl EmbeddingReport {
    /// The report on a checkpoint that looks like a textual inversion: none for others; an error says why it cannot be used.
    pub(super) fn of(
        checkpoint: &Checkpoint,
        detection: &Detection,
    ) -> Result<Option<Self>, String> {
        if detection.family != Family::Embedding {
            return Ok(None);
        }
        let found = Embedding::open(checkpoint.path(), &ReadOptions::default());
        let found = found.map_err(|error| match error {
            crate::Error::BadModel { reason, .. } => reason,
            other => other.to_string(),
        })?;
        let made_for = found.first().map(Embedding::made_for).unwrap_or_default();
        let words = found.iter().map(|one| WordReport {
            name: printable(one.name()),
            token: one.token().map(printable),
            vectors: one.count(),
            widths: one.parts().iter().map(|part| part.width).collect(),
            towers: one.parts().iter().map(|part| part.tower).collect(),
        });
        Ok(Some(Self {
            words: words.collect(),
            made_for,
        }))
    }

    /// The lines for people.
    pub(super) fn text(&self) -> String {
        let mut text = line("made for", &self.made_for);
        for word in &self.words {
            let token = match &word.token {
                Some(token) if *token != word.name => format!(" (`{token}` in the file)"),
                _ => String::new(),
            };
            let widths: Vec<String> = word.widths.iter().map(usize::to_string).collect();
            let vectors = if word.vectors == 1 {
                "vector"
            } else {
                "vectors"
            };
            let about = format!(
                "`{}`{token}: {} {vectors}, {} wide",
                word.name,
                word.vectors,
                widths.join(" and ")
            );
            text.push_str(&line("word", &about));
        }
        text
    }
}
