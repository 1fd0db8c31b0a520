//! The machine that a pickle is a program for, without the means to run anything: names are looked up in a table of a few dozen, and
//! calling one makes the value that it stands for.
//!
//! Opcodes as in CPython 3.14's `Lib/pickletools.py`. Steps and texts are limited; no value is copied but by reference, so that a short
//! program cannot make much (no "billion laughs"), and nothing recurses.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use super::globals;
use super::value::{Heap, Place, Value};
use crate::checkpoint::input::{Fault, Input, Outcome};
use crate::checkpoint::printable::printable;

/// The most opcodes of a program: a checkpoint of a thousand tensors with its optimizer's state has some 200,000.
pub(super) const MAX_STEPS: usize = 2_000_000;
/// The longest text that is kept, in bytes; longer ones are passed over.
const MAX_TEXT: u64 = 1 << 20;
/// The longest name of a module or class.
const MAX_NAME: usize = 1000;

/// A program's state.
#[derive(Default)]
pub(super) struct Machine {
    pub(super) heap: Heap,
    /// Bytes of an element of each storage that was referred to.
    pub(super) widths: HashMap<Rc<str>, u64>,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    /// Values that were copied out of lists, by calls.
    pub(super) copied: usize,
    /// Dicts that take what objects' states hold.
    pub(super) holders: HashSet<Place>,
}

impl Machine {
    /// Runs one program to its end; gives what it leaves.
    pub(super) fn run(&mut self, input: &mut Input<'_>) -> Outcome<Value> {
        self.stack.clear();
        self.marks.clear();
        self.memo.clear();
        for _ in 0..MAX_STEPS {
            let at = input.position();
            let op = input.byte()?;
            if op == b'.' {
                return self.pop();
            }
            let known = self.literal(op, input)?
                || self.text(op, input)?
                || self.collection(op)?
                || self.memory(op, input)?
                || self.object(op, input)?;
            if !known {
                return Err(Fault::Bad(format!(
                    "its pickle has the unknown instruction 0x{op:02x} at byte {at}; the file is damaged: download it again"
                )));
            }
        }
        Err(too_long())
    }

    fn push(&mut self, value: Value) -> Outcome<bool> {
        self.stack.push(value);
        Ok(true)
    }

    fn pop(&mut self) -> Outcome<Value> {
        // what lies under the last mark belongs to whoever set it
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len() > floor {
            true => self.stack.pop().ok_or_else(unbalanced),
            false => Err(unbalanced()),
        }
    }

    fn top(&self) -> Outcome<Value> {
        self.stack.last().cloned().ok_or_else(unbalanced)
    }

    fn pop_mark(&mut self) -> Outcome<Vec<Value>> {
        let mark = self.marks.pop().ok_or_else(unbalanced)?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn pop_many(&mut self, count: usize) -> Outcome<Vec<Value>> {
        let mut values = Vec::with_capacity(count);
        for _ in 0..count {
            values.push(self.pop()?);
        }
        values.reverse();
        Ok(values)
    }

    /// Numbers and constants.
    fn literal(&mut self, op: u8, input: &mut Input<'_>) -> Outcome<bool> {
        let value = match op {
            0x80 => {
                let protocol = input.byte()?;
                return match protocol {
                    0..=5 => Ok(true),
                    _ => Err(Fault::Bad(format!(
                        "its pickle is of protocol {protocol}, and 5 is the last one known"
                    ))),
                };
            }
            // frames only tell how much to read at once
            0x95 => return input.u64().map(|_| true),
            b'N' => Value::None,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'K' => Value::Int(input.byte()?.into()),
            b'M' => Value::Int(input.u16()?.into()),
            b'J' => Value::Int(i32::from_le_bytes(input.array()?).into()),
            b'G' => Value::Float(f64::from_be_bytes(input.array()?)),
            0x8a => {
                let length = u64::from(input.byte()?);
                long(input, length)?
            }
            0x8b => {
                let length = u64::from(input.u32()?);
                long(input, length)?
            }
            b'I' | b'L' | b'F' => number(&text_line(input)?, op),
            _ => return Ok(false),
        };
        self.push(value)
    }

    /// Texts and bytes.
    fn text(&mut self, op: u8, input: &mut Input<'_>) -> Outcome<bool> {
        let length = match op {
            b'U' | b'C' | 0x8c => u64::from(input.byte()?),
            b'T' | b'X' | b'B' => u64::from(input.u32()?),
            0x8d | 0x8e | 0x96 => input.u64()?,
            b'S' | b'V' => {
                let line = text_line(input)?;
                let line = line.trim_matches(['\'', '"']);
                return self.push(Value::Text(line.into()));
            }
            _ => return Ok(false),
        };
        if length > MAX_TEXT || matches!(op, b'B' | b'C' | 0x8e | 0x96) {
            input.skip(length)?;
            return self.push(Value::Opaque);
        }
        let bytes = input.bytes(length)?;
        let value = match String::from_utf8(bytes) {
            Ok(text) => Value::Text(text.into()),
            Err(_) if matches!(op, b'U' | b'T') => Value::Opaque,
            Err(_) => {
                return Err(Fault::Bad(
                    "its pickle holds a text that is not valid UTF-8; the file is damaged: download it again".to_owned(),
                ));
            }
        };
        self.push(value)
    }

    /// Tuples, lists, dicts and sets.
    fn collection(&mut self, op: u8) -> Outcome<bool> {
        let value = match op {
            b'(' => {
                self.marks.push(self.stack.len());
                return Ok(true);
            }
            b')' | b']' => self.heap.new_items(Vec::new()),
            b'}' => self.heap.new_dict(Vec::new()),
            0x8f => Value::Opaque,
            b't' | b'l' => {
                let items = self.pop_mark()?;
                self.heap.new_items(items)
            }
            0x85..=0x87 => {
                let items = self.pop_many(usize::from(op - 0x84))?;
                self.heap.new_items(items)
            }
            b'd' => {
                let items = self.pop_mark()?;
                let dict = self.heap.new_dict(Vec::new());
                self.heap.extend_dict(&dict, items);
                dict
            }
            0x91 => {
                self.pop_mark()?;
                Value::Opaque
            }
            b'a' | b'e' | 0x90 => {
                let more = match op {
                    b'a' => vec![self.pop()?],
                    _ => self.pop_mark()?,
                };
                let list = self.top()?;
                self.heap.extend_items(&list, more);
                return Ok(true);
            }
            b's' | b'u' => {
                let more = match op {
                    b's' => self.pop_many(2)?,
                    _ => self.pop_mark()?,
                };
                let dict = self.top()?;
                self.heap.extend_dict(&dict, more);
                return Ok(true);
            }
            _ => return Ok(false),
        };
        self.push(value)
    }

    /// The stack itself and the memo.
    fn memory(&mut self, op: u8, input: &mut Input<'_>) -> Outcome<bool> {
        let index = |text: &str| text.parse::<u32>().map_err(|_| unbalanced());
        match op {
            // a mark is what is popped where nothing lies on it
            b'0' if self.marks.last() == Some(&self.stack.len()) => drop(self.marks.pop()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'2' => {
                let value = self.top()?;
                self.stack.push(value);
            }
            b'q' | b'r' | b'p' | 0x94 => {
                let index = match op {
                    b'q' => u32::from(input.byte()?),
                    b'r' => input.u32()?,
                    b'p' => index(&text_line(input)?)?,
                    _ => u32::try_from(self.memo.len()).map_err(|_| unbalanced())?,
                };
                let value = self.top()?;
                self.memo.insert(index, value);
            }
            b'h' | b'j' | b'g' => {
                let index = match op {
                    b'h' => u32::from(input.byte()?),
                    b'j' => input.u32()?,
                    _ => index(&text_line(input)?)?,
                };
                let value = self.memo.get(&index).cloned();
                self.stack.push(value.ok_or_else(unbalanced)?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Names, calls and what lies outside the pickle.
    fn object(&mut self, op: u8, input: &mut Input<'_>) -> Outcome<bool> {
        let value = match op {
            b'c' => {
                let (module, name) = (name_line(input)?, name_line(input)?);
                global(&module, &name)?
            }
            0x93 => match (self.pop()?, self.pop()?) {
                (Value::Text(name), Value::Text(module)) => global(&module, &name)?,
                _ => return Err(unbalanced()),
            },
            // a class and its arguments, by old protocols
            b'i' => {
                let (module, name) = (name_line(input)?, name_line(input)?);
                global(&module, &name)?;
                self.pop_mark()?;
                Value::Opaque
            }
            b'o' => {
                self.pop_mark()?;
                Value::Opaque
            }
            b'R' | 0x81 => {
                let arguments = self.pop()?;
                let function = self.pop()?;
                self.call(&function, &arguments)?
            }
            0x92 => {
                self.pop_many(3)?;
                Value::Opaque
            }
            // the state of an object, whose class would take it: only its tensors matter here, and all but a few keep them in dicts
            b'b' => {
                let state = self.pop()?;
                if let Some(object) = self.stack.last().cloned() {
                    self.build(&object, &state)?;
                }
                return Ok(true);
            }
            b'Q' => {
                let id = self.pop()?;
                // old files say which module a class is of, and bring its source along
                if let Some([Value::Text(word), class @ Value::Global(_), ..]) =
                    self.heap.items_of(&id)
                    && **word == *"module"
                {
                    let class = class.clone();
                    self.push(class)?;
                    return Ok(true);
                }
                let storage = self.storage(&id)?;
                let width = storage.dtype.map_or(1, |dtype| dtype.bitsize() as u64 / 8);
                self.widths.insert(Rc::clone(&storage.key), width);
                Value::Storage(storage.into())
            }
            _ => return Ok(false),
        };
        self.push(value)
    }
}

/// A name, if it may be asked for.
fn global(module: &str, name: &str) -> Outcome<Value> {
    let found = globals::resolve(module, name).map(Value::Global);
    found.ok_or_else(|| {
        Fault::Bad(format!(
            "this PyTorch checkpoint asks for `{}.{}`, which weights do not need and which could run code elsewhere; nothing of it was run, and \
             it is not read: take the model's .safetensors",
            printable(module),
            printable(name)
        ))
    })
}

/// A whole number of `length` bytes, little endian, with its sign; nothing here needs more than 8.
fn long(input: &mut Input<'_>, length: u64) -> Outcome<Value> {
    if length > 8 {
        input.skip(length)?;
        return Ok(Value::Opaque);
    }
    let bytes = input.bytes(length)?;
    let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
    let mut wide = [if negative { 0xff } else { 0 }; 8];
    for (wide, byte) in wide.iter_mut().zip(bytes) {
        *wide = byte;
    }
    Ok(Value::Int(i64::from_le_bytes(wide)))
}

/// A number as text; `01` and `00` are how protocol 0 writes booleans.
fn number(text: &str, op: u8) -> Value {
    let text = text.trim_end_matches('L');
    match (op, text) {
        (b'I', "01") => Value::Bool(true),
        (b'I', "00") => Value::Bool(false),
        (b'F', text) => text.parse().map_or(Value::Opaque, Value::Float),
        (_, text) => text.parse().map_or(Value::Opaque, Value::Int),
    }
}

fn text_line(input: &mut Input<'_>) -> Outcome<String> {
    let limit = usize::try_from(MAX_TEXT).unwrap_or(usize::MAX);
    let line = input.line(limit)?.ok_or_else(unbalanced)?;
    Ok(String::from_utf8_lossy(&line).into_owned())
}

fn name_line(input: &mut Input<'_>) -> Outcome<String> {
    let line = input.line(MAX_NAME)?;
    let line = line.and_then(|line| String::from_utf8(line).ok());
    line.ok_or_else(|| {
        Fault::Bad(
            "its pickle asks for a name that is no name; the file is damaged: download it again"
                .to_owned(),
        )
    })
}

pub(super) fn too_long() -> Fault {
    Fault::Bad(format!(
        "its pickle has more than {MAX_STEPS} instructions, which no checkpoint needs; it is not read"
    ))
}

fn unbalanced() -> Fault {
    Fault::Bad(
        "its pickle takes values that were never given; the file is damaged: download it again"
            .to_owned(),
    )
}
