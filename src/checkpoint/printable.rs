//! Names and values out of files, made fit for a terminal: control characters are escaped and long ones are cut.

/// The longest name that is shown whole, in characters.
const LONGEST: usize = 200;

/// `text` with control characters, direction marks and other invisible characters escaped, cut after 200 characters.
///
/// What a file holds is never printed as it is: an escape sequence in a tensor's name would be obeyed by the terminal.
pub fn printable(text: &str) -> String {
    printable_to(text, LONGEST)
}

/// [`printable`], cut after `longest` characters of `text`; what was cut is counted in bytes.
pub fn printable_to(text: &str, longest: usize) -> String {
    let end = text
        .char_indices()
        .nth(longest)
        .map_or(text.len(), |(end, _)| end);
    let (shown, cut) = text.split_at(end);
    let mut out = String::with_capacity(shown.len());
    for c in shown.chars() {
        if is_safe(c) {
            out.push(c);
        } else {
            out.extend(c.escape_default());
        }
    }
    if !cut.is_empty() {
        out.push_str(&format!("… ({} bytes more)", cut.len()));
    }
    out
}

/// Neither a control character nor one that changes the direction or place of what follows.
fn is_safe(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_reaches_the_terminal_raw() {
        assert_eq!(printable("a.weight"), "a.weight");
        assert_eq!(printable("\u{1b}[2Ja\n\0b"), "\\u{1b}[2Ja\\n\\u{0}b");
        assert_eq!(printable("fox\u{202e}gnp"), "fox\\u{202e}gnp");
        assert_eq!(printable_to("süß und gut", 3), "süß… (8 bytes more)");
    }
}
