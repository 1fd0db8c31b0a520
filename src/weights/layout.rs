//! How a component's canonical names map onto the names in a file: a table read off the file itself, so any depth and width works.

use std::collections::BTreeMap;

/// Where a canonical tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The tensor in the file.
    pub stored: String,
    /// It is some of the tensor's rows.
    pub rows: Option<Rows>,
    /// The file has the matrix with rows and columns exchanged.
    pub transposed: bool,
    /// The file has the second half of the rows first.
    pub swapped: bool,
    /// The file has the matrix as a 1×1 convolution's weight; readers need not care, writers must.
    pub convolution: bool,
}

/// Some of several equal parts of a fused tensor, along its first axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// The first part.
    pub index: usize,
    /// How many parts.
    pub span: usize,
    /// Of how many.
    pub count: usize,
}

/// A renaming of everything below one canonical prefix.
#[derive(Debug, Clone)]
pub struct Rename {
    /// The prefix in the file.
    pub stored: String,
    /// Renamings inside it; a name that none fits stays as it is.
    pub inner: &'static [Inner],
}

/// One renaming inside a block: canonical, stored, and the part of a fused tensor if it is one.
#[derive(Debug, Clone, Copy)]
pub struct Inner {
    /// Canonical name or prefix, a whole number of dotted parts.
    pub canonical: &'static str,
    /// Stored name or prefix.
    pub stored: &'static str,
    /// Part of a fused tensor, along the first axis.
    pub rows: Option<Rows>,
    /// A matrix that is stored with rows and columns exchanged.
    pub transposed: bool,
    /// The second half of the rows is stored first.
    pub swapped: bool,
    /// Matrices below it are stored as weights of 1×1 convolutions.
    pub convolution: bool,
}

/// A plain renaming inside a block.
pub const fn inner(canonical: &'static str, stored: &'static str) -> Inner {
    Inner {
        canonical,
        stored,
        rows: None,
        transposed: false,
        swapped: false,
        convolution: false,
    }
}

/// Parts `index .. index + span` of the `count` equal ones of a fused tensor.
pub const fn part_of(
    canonical: &'static str,
    stored: &'static str,
    (index, span, count): (usize, usize, usize),
) -> Inner {
    Inner {
        rows: Some(Rows { index, span, count }),
        ..inner(canonical, stored)
    }
}

/// A renaming of what is a linear layer here and a 1×1 convolution there.
pub const fn convolution(canonical: &'static str, stored: &'static str) -> Inner {
    Inner {
        convolution: true,
        ..inner(canonical, stored)
    }
}

/// The names of one component.
#[derive(Debug, Clone, Default)]
pub struct Layout {
    prefixes: BTreeMap<String, Rename>,
    aliases: Vec<(String, String)>,
    ignored: Vec<(String, &'static str)>,
}

impl Layout {
    /// The canonical names, with `prefix` in front of each.
    pub fn identity(prefix: &str) -> Self {
        let mut layout = Self::default();
        layout.rename("", prefix.trim_end_matches('.'), &[]);
        layout
    }

    /// Everything below `canonical` lies below `stored`.
    pub fn rename(&mut self, canonical: &str, stored: &str, inner: &'static [Inner]) {
        let rename = Rename {
            stored: stored.to_owned(),
            inner,
        };
        self.prefixes.insert(canonical.to_owned(), rename);
    }

    /// A canonical part of a name that older files spell otherwise; tried when the first spelling is not there.
    pub fn alias(&mut self, canonical: &str, stored: &str) {
        self.aliases.push((canonical.to_owned(), stored.to_owned()));
    }

    /// Stored names below this prefix are known and not needed; `what` says what they are, in the plural.
    pub fn ignore(&mut self, stored: &str, what: &'static str) {
        self.ignored.push((stored.to_owned(), what));
    }

    /// What a stored name is that is known to be of no use.
    pub fn ignored_as(&self, stored: &str) -> Option<&'static str> {
        self.ignored
            .iter()
            .find(|(prefix, _)| below(stored, prefix).is_some())
            .map(|(_, what)| *what)
    }

    /// Where `canonical` may lie, best guess first.
    pub fn places(&self, canonical: &str) -> Vec<Part> {
        let mut places: Vec<Part> = self.place(canonical).into_iter().collect();
        for (name, stored) in &self.aliases {
            if canonical.contains(name.as_str()) {
                places.extend(self.place(&canonical.replace(name.as_str(), stored)));
            }
        }
        places
    }

    /// Where `canonical` lies in a file of this layout, newest spelling.
    pub fn place(&self, canonical: &str) -> Option<Part> {
        // the longest prefix decides: walk from the whole name upwards
        let mut end = canonical.len();
        loop {
            let prefix = &canonical[..end];
            if let Some(rename) = self.prefixes.get(prefix) {
                let rest = canonical[end..].trim_start_matches('.');
                return Some(rename.apply(rest));
            }
            if end == 0 {
                return None;
            }
            end = prefix.rfind('.').unwrap_or(0);
        }
    }
}

impl Rename {
    fn apply(&self, rest: &str) -> Part {
        let fit = self
            .inner
            .iter()
            .find_map(|rule| Some((rule, below(rest, rule.canonical)?)));
        let Some((rule, tail)) = fit else {
            return Part {
                stored: join(&self.stored, rest),
                rows: None,
                transposed: false,
                swapped: false,
                convolution: false,
            };
        };
        Part {
            stored: join(&self.stored, &join(rule.stored, tail)),
            rows: rule.rows,
            transposed: rule.transposed,
            swapped: rule.swapped,
            convolution: rule.convolution,
        }
    }
}

/// What follows `prefix` in `name`, if `name` lies below it or is it.
fn below<'a>(name: &'a str, prefix: &str) -> Option<&'a str> {
    let rest = name.strip_prefix(prefix)?;
    if rest.is_empty() || prefix.is_empty() {
        return Some(rest);
    }
    rest.strip_prefix('.')
}

fn join(a: &str, b: &str) -> String {
    match (a.is_empty(), b.is_empty()) {
        (true, _) => b.to_owned(),
        (_, true) => a.to_owned(),
        _ => format!("{a}.{b}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INNER: &[Inner] = &[
        inner("norm1", "in_layers.0"),
        part_of("attn.to_q.weight", "attn.in_proj_weight", (0, 1, 3)),
    ];

    #[test]
    fn the_longest_prefix_decides() {
        let mut layout = Layout::identity("unet");
        layout.rename("down.0", "input_blocks.1", INNER);
        let stored = |name| layout.places(name)[0].stored.clone();
        assert_eq!(
            stored("down.0.norm1.weight"),
            "input_blocks.1.in_layers.0.weight"
        );
        assert_eq!(
            stored("down.0.norm10.weight"),
            "input_blocks.1.norm10.weight"
        );
        assert_eq!(stored("down.00.norm1.weight"), "unet.down.00.norm1.weight");
        assert_eq!(
            layout.places("down.0.attn.to_q.weight")[0].rows,
            Some(Rows {
                index: 0,
                span: 1,
                count: 3
            })
        );
    }

    #[test]
    fn aliases_come_second() {
        let mut layout = Layout::identity("");
        layout.alias("to_q.", "query.");
        let places = layout.places("mid.to_q.weight");
        assert_eq!(places[0].stored, "mid.to_q.weight");
        assert_eq!(places[1].stored, "mid.query.weight");
    }
}
