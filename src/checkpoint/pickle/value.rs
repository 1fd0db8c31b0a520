//! What a pickle amounts to: values in a heap that refer to each other by number, so that no nesting, however deep, ends in recursion.

use std::rc::Rc;

use safetensors::Dtype;

use super::globals::Global;

/// A place in the [`Heap`].
pub(super) type Place = usize;

/// A value of the machine.
#[derive(Debug, Clone)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Rc<str>),
    /// A tuple or a list.
    Items(Place),
    Dict(Place),
    Global(Global),
    Storage(Rc<Storage>),
    Tensor(Rc<View>),
    /// Known, and of no use.
    Opaque,
}

/// Numbers in the file, by the name of their record.
#[derive(Debug)]
pub(super) struct Storage {
    pub(super) key: Rc<str>,
    /// The type of its elements; none for bytes.
    pub(super) dtype: Option<Dtype>,
    /// How many elements it has.
    pub(super) count: u64,
    /// Elements of the record in front of its own: old files keep storages that are parts of others.
    pub(super) first: u64,
}

/// A tensor: a view into a storage, not yet checked against anything.
#[derive(Debug)]
pub(super) struct View {
    pub(super) storage: Rc<Storage>,
    pub(super) dtype: Dtype,
    pub(super) offset: u64,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// What can refer to other values.
#[derive(Debug, Default)]
pub(super) struct Heap {
    items: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
}

impl Heap {
    pub(super) fn new_items(&mut self, items: Vec<Value>) -> Value {
        self.items.push(items);
        Value::Items(self.items.len() - 1)
    }

    pub(super) fn new_dict(&mut self, pairs: Vec<(Value, Value)>) -> Value {
        self.dicts.push(pairs);
        Value::Dict(self.dicts.len() - 1)
    }

    pub(super) fn items(&self, place: Place) -> &[Value] {
        self.items.get(place).map_or(&[], Vec::as_slice)
    }

    pub(super) fn pairs(&self, place: Place) -> &[(Value, Value)] {
        self.dicts.get(place).map_or(&[], Vec::as_slice)
    }

    /// The items of a tuple or a list.
    pub(super) fn items_of(&self, value: &Value) -> Option<&[Value]> {
        match value {
            Value::Items(place) => Some(self.items(*place)),
            _ => None,
        }
    }

    /// What a dict holds under a text.
    pub(super) fn get(&self, dict: &Value, key: &str) -> Option<&Value> {
        let Value::Dict(place) = dict else {
            return None;
        };
        let found = self.pairs(*place).iter().rev();
        let is_it = |name: &Value| matches!(name, Value::Text(text) if **text == *key);
        found
            .into_iter()
            .find(|(name, _)| is_it(name))
            .map(|(_, value)| value)
    }

    /// Adds to a list; anything else takes it and changes nothing.
    pub(super) fn extend_items(&mut self, value: &Value, more: Vec<Value>) {
        if let Value::Items(place) = value
            && let Some(items) = self.items.get_mut(*place)
        {
            items.extend(more);
        }
    }

    /// Adds keys and values in turn to a dict; anything else takes them and changes nothing.
    pub(super) fn extend_dict(&mut self, value: &Value, more: Vec<Value>) {
        let Value::Dict(place) = value else { return };
        let Some(pairs) = self.dicts.get_mut(*place) else {
            return;
        };
        let mut more = more.into_iter();
        while let (Some(key), Some(value)) = (more.next(), more.next()) {
            pairs.push((key, value));
        }
    }
}
