//! Tensors by name, out of the dicts that training tools nest them in.

use std::collections::{BTreeMap, HashSet};
use std::rc::Rc;

use super::value::{Heap, Value, View};
use crate::checkpoint::header::MAX_TENSORS;
use crate::checkpoint::input::{Fault, Outcome};
use crate::checkpoint::printable::printable;

/// What the weights are kept under beside epochs, optimizers and such; the first that holds a dict with tensors is taken.
const ROOTS: [&str; 10] = [
    "state_dict",
    "model_state_dict",
    "params_ema",
    "params-ema",
    "params",
    "model",
    "module",
    "generator",
    "weights",
    "net",
];
/// How deep dicts in dicts are looked through.
const MAX_DEPTH: usize = 8;
/// How many values are looked at; dicts may refer to each other so that there seem to be many more.
const MAX_VISITS: usize = 1_000_000;
/// The longest name of a tensor, in bytes.
const MAX_NAME: usize = 500;
/// How many single values beside the weights are kept to be shown.
const MAX_METADATA: usize = 100;

type Named = Vec<(String, Rc<View>)>;

/// The tensors below `root` and the single values beside them.
pub(super) fn below(heap: &Heap, root: &Value) -> Outcome<(Named, BTreeMap<String, String>)> {
    let mut metadata = BTreeMap::new();
    let mut root = root;
    for _ in 0..MAX_DEPTH {
        if let Value::Dict(place) = root {
            note(heap.pairs(*place), &mut metadata);
        }
        match inner(heap, root) {
            Some(inner) => root = inner,
            None => break,
        }
    }
    let mut walk = Walk {
        heap,
        visits: 0,
        names: HashSet::new(),
        found: Vec::new(),
    };
    walk.visit(String::new(), root, 0)?;
    Ok((walk.found, metadata))
}

/// The dict of weights inside a dict that has no more tensors of its own.
fn inner<'a>(heap: &'a Heap, root: &'a Value) -> Option<&'a Value> {
    let count = |value: &Value, counts: fn(&Value) -> bool| match value {
        Value::Dict(place) => {
            let values = heap.pairs(*place).iter();
            values.filter(|(_, value)| counts(value)).count()
        }
        _ => 0,
    };
    let is_tensor = |value: &Value| matches!(value, Value::Tensor(_));
    let is_dict = |value: &Value| matches!(value, Value::Dict(_));
    let own = count(root, is_tensor);
    let mut inner = ROOTS.iter().filter_map(|name| heap.get(root, name));
    inner.find(|value| {
        let tensors = count(value, is_tensor);
        tensors > own || (own == 0 && count(value, is_dict) > 0)
    })
}

/// Keeps what single values say: epochs, steps, versions, names.
fn note(pairs: &[(Value, Value)], metadata: &mut BTreeMap<String, String>) {
    for (name, value) in pairs {
        let value = match value {
            Value::Text(text) => text.to_string(),
            Value::Int(number) => number.to_string(),
            Value::Float(number) => number.to_string(),
            Value::Bool(truth) => truth.to_string(),
            _ => continue,
        };
        if let Value::Text(name) = name
            && metadata.len() < MAX_METADATA
        {
            metadata.insert(name.to_string(), value);
        }
    }
}

/// The way through nested dicts and lists.
struct Walk<'a> {
    heap: &'a Heap,
    visits: usize,
    names: HashSet<String>,
    found: Named,
}

impl Walk<'_> {
    fn visit(&mut self, name: String, value: &Value, depth: usize) -> Outcome<()> {
        self.visits += 1;
        if self.visits > MAX_VISITS || self.found.len() > MAX_TENSORS {
            return Err(Fault::Bad(format!(
                "its pickle holds more than {MAX_VISITS} values or {MAX_TENSORS} tensors, as no checkpoint does; it is not read"
            )));
        }
        if name.len() > MAX_NAME {
            return Err(Fault::Bad(format!(
                "its pickle holds a name of {} bytes, `{}`, and {MAX_NAME} is the limit",
                name.len(),
                printable(&name)
            )));
        }
        match value {
            Value::Tensor(view) => {
                if !self.names.insert(name.clone()) {
                    let name = printable(&name);
                    return Err(Fault::Bad(format!("duplicate tensor `{name}`")));
                }
                self.found.push((name, Rc::clone(view)));
            }
            Value::Dict(place) if depth < MAX_DEPTH => {
                let heap = self.heap;
                for (key, value) in heap.pairs(*place) {
                    if !may_hold(value) {
                        continue;
                    }
                    let key = match key {
                        Value::Text(text) => text.to_string(),
                        Value::Int(number) => number.to_string(),
                        _ => continue,
                    };
                    self.visit(join(&name, &key), value, depth + 1)?;
                }
            }
            Value::Items(place) if depth < MAX_DEPTH => {
                let heap = self.heap;
                let items = heap.items(*place).iter().enumerate();
                for (index, value) in items.filter(|(_, value)| may_hold(value)) {
                    self.visit(join(&name, &index.to_string()), value, depth + 1)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Whether a value is a tensor or may have some inside.
fn may_hold(value: &Value) -> bool {
    matches!(value, Value::Tensor(_) | Value::Dict(_) | Value::Items(_))
}

fn join(name: &str, key: &str) -> String {
    match name {
        "" => key.to_owned(),
        _ => format!("{name}.{key}"),
    }
}
