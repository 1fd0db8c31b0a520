//! `<lora:name:weight>` in a prompt: A1111's way to name adapters, taken out before anything else is read.
//!
//! Reference: `modules/extra_networks.py` of AUTOMATIC1111/stable-diffusion-webui. `<lyco:…>` is the same there, and so is `<loractl:…>` of the
//! extension sd-webui-loractl. Other networks stay in the text, which then refuses them by name.

use super::prompt::lexer::quote;
use super::prompt::{Role, check_length};
use super::refusals::find_network;
use crate::error::{Error, Result};

/// An adapter that a prompt names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraTag {
    /// Its name: a file's stem, or what the file calls itself.
    pub name: String,
    /// What stands behind the name, between colons.
    pub arguments: Vec<String>,
    /// All of it.
    pub tag: String,
}

/// The prompt without its `<lora:…>`, and these in order.
///
/// # Errors
/// [`Error::Usage`] for a tag without a name.
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
    matches!(kind, "lora" | "lyco" | "loractl").then(|| read(tag, arguments))
}

fn read(tag: &str, arguments: &str) -> Result<LoraTag> {
    let mut arguments = arguments.split(':').map(str::to_owned);
    let name = arguments.next().unwrap_or_default();
    // sd-webui-lora-block-weight writes names in quotes
    let bare = name
        .strip_prefix('"')
        .and_then(|name| name.strip_suffix('"'));
    let name = bare.unwrap_or(&name);
    if name.is_empty() {
        return Err(Error::Usage(format!(
            "{} names no LoRA; write <lora:name:0.8>",
            quote(tag)
        )));
    }
    Ok(LoraTag {
        name: name.to_owned(),
        arguments: arguments.collect(),
        tag: tag.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn tags(prompt: &str) -> (String, Vec<String>) {
        let (text, tags) = take_loras(prompt).unwrap();
        let tags = tags.into_iter();
        let tags = tags.map(|tag| format!("{} {}", tag.name, tag.arguments.join(" ")));
        (text, tags.collect())
    }

    #[test]
    fn tags_are_taken_out() {
        for (prompt, text, tag) in [
            ("a <lora:x:0.6>, b", "a , b", "x 0.6"),
            ("<lora:x>", "", "x "),
            ("<lora:x:.5:-1>", "", "x .5 -1"),
            ("<lyco:x:te=2>", "", "x te=2"),
            ("<loractl:x:0@0,1@0.5>", "", "x 0@0,1@0.5"),
            ("<lora:\"x y\":1:lbw=MIDD>", "", "x y 1 lbw=MIDD"),
            ("<lora:sub/x y.v1:0>", "", "sub/x y.v1 0"),
        ] {
            assert_eq!(
                tags(prompt),
                (text.to_owned(), vec![tag.to_owned()]),
                "{prompt}"
            );
        }
        assert_eq!(tags("é <lora:a:1><lora:a:2> (b:1.2)").1.len(), 2);
        assert_eq!(
            tags("<hypernet:a:1> <lora:b> <3"),
            ("<hypernet:a:1>  <3".to_owned(), vec!["b ".to_owned()])
        );
        for plain in ["a < b: c>", "<lora:", "<lora>", ""] {
            assert_eq!(tags(plain), (plain.to_owned(), Vec::new()));
        }
        let error = take_loras("<lora::1>").unwrap_err().to_string();
        assert!(error.contains("names no LoRA"), "{error}");
    }
}
