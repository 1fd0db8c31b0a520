//! Where each value lies: offsets in one arena, reused as soon as the last reader is done.

use super::ir::{Program, Rate, ValueId};
use crate::{Error, Result};

/// Offsets are multiples of this.
const LINE: usize = 64;
/// Bytes behind each value that may be read (never used): products read channels in pairs.
const SLACK: usize = 64;

/// Places of all values of a program that live in the arena.
#[derive(Debug, Clone, Default)]
pub(super) struct Places {
    /// Byte offset of each value; those of the timestep lie elsewhere.
    pub offsets: Vec<usize>,
    /// Bytes of the arena.
    pub bytes: usize,
}

/// First and last step that a value must outlive, in steps of the program.
#[derive(Debug, Clone, Copy)]
struct Life {
    from: usize,
    to: usize,
}

/// Places every value: the largest first, each at the lowest offset where nothing that lives at the same time lies.
pub(super) fn place(program: &Program) -> Places {
    let lives = lives(program);
    let mut order: Vec<ValueId> = (0..program.values.len())
        .filter(|&v| program.values[v].rate != Rate::Timestep && lives[v].is_some())
        .collect();
    let size = |v: ValueId| {
        (program.values[v].len() * program.values[v].kind.bytes() + SLACK).next_multiple_of(LINE)
    };
    order.sort_by_key(|&v| (std::cmp::Reverse(size(v)), v));
    let mut places = Places {
        offsets: vec![0; program.values.len()],
        bytes: 0,
    };
    let mut placed: Vec<ValueId> = Vec::new();
    for v in order {
        let Some(life) = lives[v] else { continue };
        let mut taken: Vec<(usize, usize)> = placed
            .iter()
            .filter(|&&p| {
                lives[p].is_some_and(|other| other.from <= life.to && life.from <= other.to)
            })
            .map(|&p| (places.offsets[p], places.offsets[p] + size(p)))
            .collect();
        taken.sort_unstable();
        let mut at = 0;
        for (start, end) in taken {
            if at + size(v) <= start {
                break;
            }
            at = at.max(end);
        }
        places.offsets[v] = at;
        places.bytes = places.bytes.max(at + size(v));
        placed.push(v);
    }
    places
}

/// Makes sure that no step's result lies where something lies that it reads or that is read later: what the executor's slices rely on.
pub(super) fn check_places(program: &Program, places: &Places) -> Result<()> {
    let lives = lives(program);
    let range = |v: ValueId| {
        (
            places.offsets[v],
            places.offsets[v] + program.values[v].len() * program.values[v].kind.bytes() + SLACK,
        )
    };
    let stored = |v: &ValueId| program.values[*v].rate != Rate::Timestep;
    for (i, step) in program
        .steps
        .iter()
        .enumerate()
        .filter(|(_, s)| stored(&s.out))
    {
        let (start, end) = range(step.out);
        for v in (0..program.values.len()).filter(|&v| v != step.out && stored(&v)) {
            let alive = lives[v].is_some_and(|life| life.from <= i && i <= life.to);
            let (other_start, other_end) = range(v);
            if alive && start < other_end && other_start < end {
                return Err(Error::Memory(format!(
                    "plan step {i} would overwrite value {v}"
                )));
            }
        }
    }
    Ok(())
}

/// From the step that writes a value to the last that reads it. Inputs are there from the beginning; what is computed once a run stays for
/// all of its calls, and so do inputs of such steps.
fn lives(program: &Program) -> Vec<Option<Life>> {
    let end = program.steps.len();
    let mut lives: Vec<Option<Life>> = vec![None; program.values.len()];
    for input in &program.inputs {
        lives[input.value] = Some(Life { from: 0, to: 0 });
    }
    for (i, step) in program.steps.iter().enumerate() {
        lives[step.out] = Some(Life { from: i, to: i });
        for value in step.work.reads() {
            if let Some(life) = &mut lives[value] {
                life.to = life.to.max(i);
            }
        }
    }
    for output in program.outputs() {
        if let Some(life) = &mut lives[output.value] {
            life.to = end;
        }
    }
    let calls = program
        .steps
        .iter()
        .position(|s| program.values[s.out].rate == Rate::Call)
        .unwrap_or(end);
    for (value, life) in program.values.iter().zip(&mut lives) {
        if let (Rate::Run, Some(life)) = (value.rate, life) {
            // read by a call: there for good; else only while the steps of the run go
            if life.to >= calls {
                *life = Life { from: 0, to: end };
            }
        }
    }
    lives
}

#[cfg(test)]
mod tests {
    use super::super::ir::{Output, Step, Type, Value, Work};
    use super::*;
    use crate::op::LayerClass;

    #[test]
    fn what_lives_together_lies_apart_and_memory_is_used_again() {
        // 0 → 1 → 2 → 3, and 0 is read again by the last
        let value = |rate| Value {
            rate,
            batch: 1,
            pixels: 10,
            channels: 100,
            kind: Type::F32,
        };
        let step = |work, out| Step {
            work,
            out,
            class: LayerClass::Other,
        };
        let program = Program {
            values: vec![value(Rate::Call); 5],
            inputs: vec![super::super::ir::Input {
                name: "x".into(),
                value: 0,
                shape: vec![1, 100, 10, 1],
            }],
            steps: vec![
                step(Work::Geglu(0), 1),
                step(Work::Geglu(1), 2),
                step(Work::Geglu(2), 3),
                step(Work::Add(0, 3), 4),
            ],
            output: Output {
                value: 4,
                shape: vec![],
            },
            taps: vec![],
        };
        let places = place(&program);
        let size = 4000 + SLACK;
        let size = size.next_multiple_of(LINE);
        for (i, step) in program.steps.iter().enumerate() {
            for read in step.work.reads() {
                assert!(
                    places.offsets[read].abs_diff(places.offsets[step.out]) >= size,
                    "step {i}"
                );
            }
        }
        assert!(
            places.offsets[0].abs_diff(places.offsets[2]) >= size,
            "0 lives until the end"
        );
        assert_eq!(places.bytes, 3 * size);
    }
}
