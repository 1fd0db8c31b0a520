//! What attentions saw in one call, for later ones.

use candle_core::Tensor;

use super::asks::Text;
use crate::error::{Error, Result};

/// What attentions of one kind saw, in the order of the way through a network: `[texts · n, s, c]` each.
#[derive(Default)]
pub(super) struct Kept {
    texts: Vec<Text>,
    seen: Vec<Tensor>,
}

impl Kept {
    pub(super) fn new(texts: &[Text], seen: Vec<Tensor>) -> Self {
        Self {
            texts: texts.to_vec(),
            seen,
        }
    }

    /// The same for other texts: where the negative prompt is not among them, each has the mean of its own and of the negative prompt's, as the
    /// package tgate has it.
    ///
    /// # Errors
    /// [`Error::Numeric`] when a text had no say.
    pub(super) fn for_texts(&self, texts: &[Text]) -> Result<Vec<Tensor>> {
        if self.texts == texts {
            return Ok(self.seen.clone());
        }
        let place = |text: &Text| self.texts.iter().position(|own| own == text);
        let negative = place(&Text::Negative).filter(|_| !texts.contains(&Text::Negative));
        let seen = self.seen.iter().map(|seen| {
            let parts = seen.chunk(self.texts.len(), 0)?;
            let parts = texts.iter().map(|text| {
                let Some(own) = place(text).and_then(|place| parts.get(place)) else {
                    return Err(Error::Numeric("nothing was kept for a text".to_owned()));
                };
                Ok(match negative.and_then(|place| parts.get(place)) {
                    Some(negative) => ((negative + own)? / 2.0)?,
                    None => own.clone(),
                })
            });
            Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
        });
        seen.collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_text_alone_has_the_mean_with_the_negative_prompts() {
        let seen = Tensor::new(vec![2f32, 4.0, 10.0, 20.0, 6.0, 8.0], &Device::Cpu).unwrap();
        let seen = seen.reshape((6, 1, 1)).unwrap();
        let texts = [Text::Negative, Text::Prompt, Text::Region(0)];
        let kept = Kept::new(&texts, vec![seen]);
        let of = |texts: &[Text]| {
            let seen = kept.for_texts(texts).unwrap();
            seen[0].flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(of(&texts), [2.0, 4.0, 10.0, 20.0, 6.0, 8.0]);
        assert_eq!(of(&[Text::Prompt]), [6.0, 12.0]);
        assert_eq!(of(&[Text::Prompt, Text::Region(0)]), [6.0, 12.0, 4.0, 6.0]);
        assert!(kept.for_texts(&[Text::Region(1)]).is_err());
    }
}
