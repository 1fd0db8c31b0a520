//! `sd-rs convert`: round trips by bytes, pictures before and after, quantised and merged weights against gguf's and torch's, refusals.

/// Merges against torch.
mod merges;
/// GGUF files and blocks against the Python package gguf.
mod quantised;
/// What must fail, and leaves nothing behind.
mod refusals;
/// Single files, folders, types: what goes in comes out.
mod round_trips;

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;

use crate::support::weights::{Case, Stored, read};

/// Type, shape and bytes.
type Content = (Dtype, Vec<usize>, Vec<u8>);

/// The tensors of a safetensors file by name.
fn tensors(path: &Path) -> BTreeMap<String, Content> {
    by_name(read(path))
}

fn by_name(tensors: Vec<Stored>) -> BTreeMap<String, Content> {
    let entry = |t: Stored| (t.name, (t.dtype, t.shape, t.bytes));
    tensors.into_iter().map(entry).collect()
}

/// All cases that also exist as a single file.
fn singles() -> Vec<(String, Case)> {
    let cases = Case::names().into_iter().map(|name| {
        let case = Case::load(&name);
        (name, case)
    });
    let singles: Vec<_> = cases
        .filter(|(_, case)| case.record["single_file"].is_object() && !case.is_dit())
        .collect();
    assert!(singles.len() >= 6);
    singles
}

/// Compares tensors so that a failure names the tensor and not its bytes.
fn same(what: &str, got: &BTreeMap<String, Content>, want: &BTreeMap<String, Content>) {
    let names = |of: &BTreeMap<String, Content>| of.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(got), names(want), "{what}");
    for (name, (dtype, shape, bytes)) in want {
        let (got_dtype, got_shape, got_bytes) = &got[name];
        assert_eq!((got_dtype, got_shape), (dtype, shape), "{what}: {name}");
        assert!(got_bytes == bytes, "{what}: bytes of {name}");
    }
}
