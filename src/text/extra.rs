//! `<lora:name:weight>` in a prompt: A1111's way to name adapters, taken out before anything else is read.
//!
//! Reference: `modules/extra_networks.py` and `extensions-builtin/Lora/extra_networks_lora.py` of AUTOMATIC1111/stable-diffusion-webui.
//! `<lyco:…>` is the same there. Other networks stay in the text, which then refuses them by name.

use super::prompt::lexer::quote;
use super::prompt::{Role, check_length};
use super::refusals::find_network;
use crate::error::{Error, Result};

/// An adapter that a prompt names.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraTag {
    /// Its name: a file's stem, or what the file calls itself.
    pub name: String,
    /// Its weight in the text encoders.
    pub text: f64,
    /// Its weight in the denoising network.
    pub denoiser: f64,
}

/// The prompt without its `<lora:…>`, and these in order. `<lora:name:0.8>` sets both weights, `<lora:name:0.5:0.8>` that of the text encoders and
/// that of the UNet, and so do `te=0.5` and `unet=0.8`; 1 where nothing is said.
///
/// # Errors
/// [`Error::Usage`] for a weight that is no number or a tag without a name; [`Error::Unsupported`] for `dyn`.
pub fn take_loras(prompt: &str) -> Result<(String, Vec<LoraTag>)> {
    check_length(prompt, Role::Prompt)?;
    let (mut text, mut tags) = (String::with_capacity(prompt.len()), Vec::new());
    let mut rest = prompt;
    while let Some(tag) = find_network(rest) {
        let at = rest.find(tag).unwrap_or_default();
        let (before, after) = rest.split_at(at);
        text.push_str(before);
        rest = after.get(tag.len()..).unwrap_or_default();
        match parse(tag) {
            Some(lora) => tags.push(lora?),
            None => text.push_str(tag),
        }
    }
    text.push_str(rest);
    Ok((text, tags))
}

/// What a tag says; none where it is not an adapter's.
fn parse(tag: &str) -> Option<Result<LoraTag>> {
    let inside = tag.strip_prefix('<')?.strip_suffix('>')?;
    let (kind, arguments) = inside.split_once(':')?;
    matches!(kind, "lora" | "lyco").then(|| read(tag, arguments))
}

fn read(tag: &str, arguments: &str) -> Result<LoraTag> {
    let number = |text: &str| match text.trim().parse::<f64>() {
        Ok(number) if number.is_finite() => Ok(number),
        _ => Err(Error::Usage(format!(
            "the weight {} in {} is not a number; write <lora:name:0.8>",
            quote(text),
            quote(tag)
        ))),
    };
    let (mut plain, mut text, mut denoiser) = (Vec::new(), None, None);
    for argument in arguments.split(':') {
        match argument.split_once('=') {
            None => plain.push(argument),
            Some(("te", value)) => text = Some(number(value)?),
            Some(("unet", value)) => denoiser = Some(number(value)?),
            Some((key, _)) => {
                return Err(Error::Unsupported(format!(
                    "{} in {} is not supported; te= and unet= are",
                    quote(key),
                    quote(tag)
                )));
            }
        }
    }
    let mut plain = plain.into_iter();
    let name = plain.next().unwrap_or_default();
    if name.is_empty() {
        return Err(Error::Usage(format!(
            "{} names no LoRA; write <lora:name:0.8>",
            quote(tag)
        )));
    }
    let first = plain.next().map(number).transpose()?;
    let second = plain.next().map(number).transpose()?;
    if plain.next().is_some() {
        return Err(Error::Unsupported(format!(
            "{} has a third number, a dynamic rank, which is not supported; write <lora:name:0.8> or <lora:name:0.5:0.8>",
            quote(tag)
        )));
    }
    let text = text.or(first).unwrap_or(1.0);
    Ok(LoraTag {
        name: name.to_owned(),
        text,
        denoiser: denoiser.or(second).unwrap_or(text),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn tags(prompt: &str) -> (String, Vec<(String, f64, f64)>) {
        let (text, tags) = take_loras(prompt).unwrap();
        let tags = tags.into_iter().map(|t| (t.name, t.text, t.denoiser));
        (text, tags.collect())
    }

    #[test]
    fn tags_are_taken_out() {
        let one = |name: &str, text, denoiser| (name.to_owned(), text, denoiser);
        for (prompt, text, tag) in [
            ("a <lora:x:0.6>, b", "a , b", one("x", 0.6, 0.6)),
            ("<lora:x>", "", one("x", 1.0, 1.0)),
            ("<lora:x:.5:-1>", "", one("x", 0.5, -1.0)),
            ("<lora:x:unet=2>", "", one("x", 1.0, 2.0)),
            ("<lyco:x:te=2>", "", one("x", 2.0, 2.0)),
            ("<lora:x:0.5:te=2>", "", one("x", 2.0, 2.0)),
            ("<lora:sub/x y.v1:0>", "", one("sub/x y.v1", 0.0, 0.0)),
        ] {
            assert_eq!(tags(prompt), (text.to_owned(), vec![tag]), "{prompt}");
        }
        assert_eq!(tags("é <lora:a:1><lora:a:2> (b:1.2)").1.len(), 2);
        assert_eq!(
            tags("<hypernet:a:1> <lora:b> <3"),
            ("<hypernet:a:1>  <3".to_owned(), vec![one("b", 1.0, 1.0)])
        );
        for plain in ["a < b: c>", "<lora:", "<lora>", ""] {
            assert_eq!(tags(plain), (plain.to_owned(), Vec::new()));
        }
    }

    #[test]
    fn what_is_wrong_in_a_tag_is_told() {
        for (prompt, words) in [
            ("<lora:x:high>", "\"high\""),
            ("<lora:x:nan>", "not a number"),
            ("<lora::1>", "names no LoRA"),
            ("<lora:x:1:1:8>", "dynamic rank"),
            ("<lora:x:dyn=8>", "\"dyn\""),
        ] {
            let error = take_loras(prompt).unwrap_err().to_string();
            assert!(error.contains(words), "{prompt}: {error}");
        }
    }
}
