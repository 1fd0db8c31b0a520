//! Text to words, with the line that each stands on.

use crate::Error;

/// One word or sign.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Token<'a> {
    /// A name, number, directive or operation, with the dots that it contains.
    Word(&'a str),
    /// What stands between quotes.
    Text(&'a str),
    /// Everything else, one character at a time.
    Sign(char),
}

/// A token and where it stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lexeme<'a> {
    pub(crate) token: Token<'a>,
    pub(crate) line: u32,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

fn in_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | b'%' | b'.')
}

/// Splits a text; comments are left out.
pub(crate) fn lex(text: &str) -> Result<Vec<Lexeme<'_>>, Error> {
    let bytes = text.as_bytes();
    let mut out = Vec::new();
    let (mut at, mut line) = (0, 1);
    while let Some(&byte) = bytes.get(at) {
        let start = at;
        match byte {
            b'\n' => {
                line += 1;
                at += 1;
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'/') => {
                at += bytes[at..].iter().take_while(|b| **b != b'\n').count();
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'*') => {
                let end = text[at..].find("*/").map_or(bytes.len(), |n| at + n + 2);
                line += bytes[at..end].iter().filter(|b| **b == b'\n').count() as u32;
                at = end;
                continue;
            }
            // a driver's text may end with the zero of a C string
            b' ' | b'\t' | b'\r' | 0 => {
                at += 1;
                continue;
            }
            b'"' => {
                let Some(n) = text[at + 1..].find('"') else {
                    return Err(Error::Parse {
                        line,
                        text: text[at..].lines().next().unwrap_or_default().to_owned(),
                        reason: "a text without its closing quote".to_owned(),
                    });
                };
                at += n + 2;
                let token = Token::Text(&text[start + 1..at - 1]);
                out.push(Lexeme {
                    token,
                    line,
                    start,
                    end: at,
                });
                continue;
            }
            b if in_word(b) => at += bytes[at..].iter().take_while(|b| in_word(**b)).count(),
            _ => at += text[at..].chars().next().map_or(1, char::len_utf8),
        }
        let token = if in_word(byte) {
            Token::Word(&text[start..at])
        } else {
            Token::Sign(text[start..].chars().next().unwrap_or(' '))
        };
        out.push(Lexeme {
            token,
            line,
            start,
            end: at,
        });
    }
    Ok(out)
}
