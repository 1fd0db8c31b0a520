//! What `inspect` says of a LoRA: its forms, ranks and alphas, which networks it changes, what it was made for and how.

use serde::Serialize;

use super::{VALUE_TEXT, line, list};
use crate::adapters::{About, Adapter};
use crate::checkpoint::{Checkpoint, Detection, Family, ReadOptions, printable, printable_to};

/// What trainers say of a file that helps to choose weights and words for it.
const TOLD: [&str; 16] = [
    "ss_output_name",
    "modelspec.title",
    "modelspec.author",
    "modelspec.trigger_phrase",
    "modelspec.usage_hint",
    "modelspec.license",
    "ss_sd_model_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_clip_skip",
    "ss_resolution",
    "ss_num_train_images",
    "ss_epoch",
    "ss_training_comment",
];

/// A LoRA's part of the report.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct AdapterReport {
    #[serde(flatten)]
    about: About,
    /// SHA-256 behind the header: kohya's `sshs_model_hash`. Its first 12 digits are A1111's `Lora hashes`.
    pub(super) tensors_sha256: Option<String>,
    #[serde(skip)]
    told: Vec<String>,
}

impl AdapterReport {
    /// The report on a checkpoint that looks like a LoRA: none for others; an error says why it cannot be used.
    pub(super) fn of(
        checkpoint: &Checkpoint,
        detection: &Detection,
    ) -> Result<Option<Self>, String> {
        if detection.family != Family::Lora {
            return Ok(None);
        }
        let adapter = Adapter::open(checkpoint.path(), &ReadOptions::default());
        let adapter = adapter.map_err(|error| match error {
            crate::Error::BadModel { reason, .. } => reason,
            other => other.to_string(),
        })?;
        let told = TOLD.iter().filter_map(|key| {
            let value = adapter.metadata().get(*key)?;
            Some(format!("{key} = {}", printable_to(value, VALUE_TEXT)))
        });
        let mut about = adapter.about();
        about.strange = about.strange.iter().map(|name| printable(name)).collect();
        Ok(Some(Self {
            told: told.collect(),
            about,
            tensors_sha256: None,
        }))
    }

    /// The lines for people.
    pub(super) fn text(&self) -> String {
        let about = &self.about;
        let mut text = String::new();
        if let (Some(family), Some(why)) = (&about.base_model, &about.base_evidence) {
            text.push_str(&line("made for", &format!("{family} ({})", printable(why))));
        }
        let dora = if about.dora { ", with DoRA" } else { "" };
        let forms: Vec<String> = about
            .forms
            .iter()
            .map(|(form, count)| format!("{form}: {count} modules"))
            .collect();
        text.push_str(&line("forms", &format!("{}{dora}", forms.join(", "))));
        let ranks: Vec<String> = about
            .ranks
            .iter()
            .map(|(rank, count)| format!("rank {rank}: {count}"))
            .collect();
        let alphas: Vec<String> = about
            .alphas
            .iter()
            .map(|(alpha, count)| format!("alpha {alpha}: {count}"))
            .collect();
        list(&mut text, "ranks", &ranks, super::SHOWN);
        list(&mut text, "alphas", &alphas, super::SHOWN);
        let networks: Vec<String> = about
            .networks
            .iter()
            .map(|(network, count)| format!("{network}: {count} modules"))
            .collect();
        list(&mut text, "changes", &networks, usize::MAX);
        list(&mut text, "training", &self.told, usize::MAX);
        list(&mut text, "unused", &about.strange, super::SHOWN);
        text
    }

    /// The line on its hash.
    pub(super) fn hash_text(&self) -> String {
        let Some(hash) = &self.tensors_sha256 else {
            return String::new();
        };
        let short = hash.get(..12).unwrap_or(hash);
        line("lora hash", &format!("{short} (A1111), {hash}"))
    }
}
