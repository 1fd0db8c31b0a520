//! What the few names that may be called make: tensors as views into storages, and dicts.

use std::rc::Rc;

use safetensors::Dtype;

use super::globals::Global;
use super::machine::{MAX_STEPS, Machine, too_long};
use super::value::{Storage, Value, View};
use crate::checkpoint::input::{Fault, Outcome};
use crate::checkpoint::tensor_info::MAX_RANK;

impl Machine {
    /// What calling a name makes.
    pub(super) fn call(&mut self, function: &Value, arguments: &Value) -> Outcome<Value> {
        let Value::Global(function) = function else {
            return Ok(Value::Opaque);
        };
        let given = self.heap.items_of(arguments).unwrap_or(&[]);
        Ok(match function {
            Global::Tensor => Value::Tensor(self.view(given)?.into()),
            Global::First => given.first().cloned().unwrap_or(Value::None),
            Global::FromType => match given {
                [Value::Global(Global::Tensor), _, arguments, ..] => {
                    let given = self.heap.items_of(arguments).unwrap_or(&[]);
                    Value::Tensor(self.view(given)?.into())
                }
                _ => Value::Opaque,
            },
            Global::Dict => {
                let given = given.first().and_then(|pairs| self.heap.items_of(pairs));
                let given = given.unwrap_or(&[]);
                self.copied = self.copied.saturating_add(given.len());
                if self.copied > MAX_STEPS {
                    return Err(too_long());
                }
                let pairs = given
                    .iter()
                    .filter_map(|pair| match self.heap.items_of(pair)? {
                        [key, value] => Some((key.clone(), value.clone())),
                        _ => None,
                    });
                let pairs = pairs.collect();
                self.heap.new_dict(pairs)
            }
            Global::Holder => {
                let holder = self.heap.new_dict(Vec::new());
                if let Value::Dict(place) = holder {
                    self.holders.insert(place);
                }
                holder
            }
            Global::Storage(_) | Global::Type(_) | Global::Opaque => Value::Opaque,
        })
    }

    /// Gives an object its state: only those that hold tensors there take any.
    pub(super) fn build(&mut self, object: &Value, state: &Value) -> Outcome<()> {
        if let (Value::Dict(place), Value::Dict(state)) = (object, state)
            && self.holders.contains(place)
        {
            let pairs = self.heap.pairs(*state).to_vec();
            self.copied = self.copied.saturating_add(pairs.len());
            if self.copied > MAX_STEPS {
                return Err(too_long());
            }
            let flat = pairs.into_iter().flat_map(|(key, value)| [key, value]);
            self.heap.extend_dict(object, flat.collect());
        }
        Ok(())
    }

    /// `('storage', type, key, device, count[, (key, first, count)])`, by `torch.serialization`.
    pub(super) fn storage(&self, id: &Value) -> Outcome<Storage> {
        let wrong = || {
            Fault::Bad("its pickle refers to something outside that is no storage of numbers; torch.save writes no such file".to_owned())
        };
        let (dtype, key, count, view) = match self.heap.items_of(id) {
            Some(
                [
                    Value::Text(word),
                    Value::Global(Global::Storage(dtype)),
                    Value::Text(key),
                    _,
                    Value::Int(count),
                    view @ ..,
                ],
            ) if **word == *"storage" => (*dtype, key, *count, view.first()),
            _ => return Err(wrong()),
        };
        let count = u64::try_from(count).map_err(|_| wrong())?;
        let (first, count) = match view.and_then(|view| self.heap.items_of(view)) {
            None => (0, count),
            Some([_, Value::Int(first), Value::Int(count)]) => (
                u64::try_from(*first).map_err(|_| wrong())?,
                u64::try_from(*count).map_err(|_| wrong())?,
            ),
            Some(_) => return Err(wrong()),
        };
        Ok(Storage {
            key: Rc::clone(key),
            dtype,
            count,
            first,
        })
    }

    /// `(storage, offset, size, stride, requires_grad, hooks[, type][, metadata])`, by `torch._utils`.
    fn view(&self, given: &[Value]) -> Outcome<View> {
        let wrong = || {
            Fault::Bad("its pickle describes a tensor in a way that torch.save does not".to_owned())
        };
        let [
            Value::Storage(storage),
            Value::Int(offset),
            size,
            stride,
            more @ ..,
        ] = given
        else {
            return Err(wrong());
        };
        let sizes = |value: &Value| -> Option<Vec<usize>> {
            let number = |value: &Value| match value {
                Value::Int(number) => usize::try_from(*number).ok(),
                _ => None,
            };
            let items = self.heap.items_of(value)?;
            let few = items.len() <= MAX_RANK;
            few.then(|| items.iter().map(number).collect())?
        };
        if let Some(size) = self.heap.items_of(size).filter(|s| s.len() > MAX_RANK) {
            let rank = size.len();
            return Err(Fault::Bad(format!(
                "a tensor of its pickle has {rank} dimensions, and {MAX_RANK} is the limit"
            )));
        }
        let (shape, strides) = (
            sizes(size).ok_or_else(wrong)?,
            sizes(stride).ok_or_else(wrong)?,
        );
        if shape.len() != strides.len() {
            return Err(wrong());
        }
        if let Some(Value::Dict(metadata)) = more.last().filter(|_| more.len() > 2)
            && !self.heap.pairs(*metadata).is_empty()
        {
            return Err(Fault::Bad("a tensor of its pickle is negated or conjugated when it is read, which is not done here; save the model again".to_owned()));
        }
        let said = more.iter().find_map(|value| match value {
            Value::Global(Global::Type(dtype)) => Some(*dtype),
            _ => None,
        });
        let dtype: Dtype = said.or(storage.dtype).ok_or_else(wrong)?;
        Ok(View {
            storage: Rc::clone(storage),
            dtype,
            offset: u64::try_from(*offset).map_err(|_| wrong())?,
            shape,
            strides,
        })
    }
}
