//! Textual inversions on a model: each tower's table of tokens gets their vectors, its tokenizer their names.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Engine, Request};
use crate::adapters::{Embedding, Vectors};
use crate::error::Result;
use crate::text::Word;
use crate::text::chunks::Chunking;
use crate::text::prompt::Role;

impl Engine {
    /// The same model with textual inversions, which prompts may then name.
    ///
    /// # Errors
    /// [`crate::Error::BadModel`] when one was made for another kind of model.
    pub fn with_embeddings(mut self, embeddings: &[Arc<Embedding>]) -> Result<Self> {
        let title = self.spec.family.phrase();
        let towers = self.tower_widths();
        let fits = embeddings.iter().map(|one| one.fit(&towers, title));
        let fits: Vec<Vec<Option<&Vectors>>> = fits.collect::<Result<_>>()?;
        for (place, tower) in self.networks.towers_mut().iter_mut().enumerate() {
            let mut next = tower.vocabulary();
            let (mut words, mut vectors) = (Vec::new(), Vec::new());
            for (index, (embedding, fit)) in embeddings.iter().zip(&fits).enumerate() {
                let part = fit.get(place).copied().flatten();
                let mut ids = None;
                if let Some(part) = part {
                    let first = next;
                    next = next.saturating_add(part.count);
                    vectors.extend_from_slice(&part.values);
                    ids = u32::try_from(first).ok().zip(u32::try_from(next).ok());
                }
                words.push(Word {
                    index,
                    words: embedding.words(),
                    tokens: embedding.tokens(),
                    spellings: embedding.spellings().to_vec(),
                    ids: ids.map(|(first, next)| first..next),
                });
            }
            if !vectors.is_empty() {
                tower.learn(vectors)?;
            }
            if let Some(tokenizer) = self.tokenizers.clip.get_mut(place) {
                *tokenizer = tokenizer.clone().with_words(&words)?;
            }
        }
        Ok(self)
    }

    /// Whether this model can read an embedding; if not, the sentence that says why.
    ///
    /// # Errors
    /// [`crate::Error::BadModel`] when it was made for another kind of model.
    pub fn check_embedding(&self, embedding: &Embedding) -> Result<()> {
        let title = self.spec.family.phrase();
        embedding.fit(&self.tower_widths(), title).map(drop)
    }

    /// The numbers of the embeddings that a request's prompts name.
    ///
    /// # Errors
    /// When a prompt cannot be read.
    pub fn embeddings_in(&self, request: &Request) -> Result<BTreeSet<usize>> {
        let mut found = BTreeSet::new();
        for (tower, tokenizer) in self.networks.towers().iter().zip(&self.tokenizers.clip) {
            let chunking = Chunking {
                syntax: request.prompt_syntax,
                length: crate::text::Tower::positions(tower),
            };
            let negative = request.negative_prompt.as_deref().unwrap_or_default();
            for (text, role) in [
                (request.prompt.as_str(), Role::Prompt),
                (negative, Role::Negative),
            ] {
                found.extend(chunking.words(tokenizer, text, role)?);
            }
        }
        Ok(found)
    }

    /// The CLIP towers by name and width.
    fn tower_widths(&self) -> Vec<(&'static str, usize)> {
        let towers = self.spec.text.iter();
        towers
            .map(|tower| (tower.role.component, tower.component.config.width))
            .collect()
    }
}
