//! The types that values are stored as.

use super::Options;
use super::ir::{Program, Rate, Type, Work};

/// Operands of products are stored as the products read them, and so is what only norms read; everything else, the residual stream above all,
/// stays in f32.
pub(super) fn choose_types(program: &mut Program, options: &Options) {
    if !options.precision.is_bf16() {
        return;
    }
    let mut only_norms = vec![false; program.values.len()];
    for step in &program.steps {
        // products of the timestep, and of what is embedded beside it, are few and feed every block: they keep their precision
        let vectors = |work: &Work| {
            work.operands()
                .iter()
                .all(|&v| program.values[v].pixels == 1)
        };
        let embeds = matches!(step.work, Work::Product(_)) && vectors(&step.work);
        if embeds || program.values[step.out].rate == Rate::Timestep {
            continue;
        }
        for value in step.work.operands() {
            program.values[value].kind = Type::Bf16;
        }
        match &step.work {
            // attention stores what it reads
            Work::Attention { .. } | Work::WindowAttention { .. } => {
                program.values[step.out].kind = Type::Bf16;
            }
            Work::Product(product) => only_norms[step.out] = product.residual.is_none(),
            _ => {}
        }
    }
    for output in program.outputs() {
        only_norms[output.value] = false;
    }
    for step in &program.steps {
        let norm = matches!(
            step.work,
            Work::GroupNorm { .. }
                | Work::Statistics { .. }
                | Work::LayerNorm { .. }
                | Work::AdaptiveNorm { .. }
                | Work::RmsNorm { .. }
        );
        if !norm {
            for value in step.work.reads() {
                only_norms[value] = false;
            }
        }
    }
    for (value, only) in program.values.iter_mut().zip(only_norms) {
        if only && value.rate != Rate::Timestep {
            value.kind = Type::Bf16;
        }
    }
    copied_as_read(program);
}

/// What is only read to be copied into operands is rounded where it is made: to the same numbers, in half the room.
fn copied_as_read(program: &mut Program) {
    let mut readers = vec![0usize; program.values.len()];
    for value in program.steps.iter().flat_map(|step| step.work.reads()) {
        readers[value] += 1;
    }
    for output in program.outputs() {
        readers[output.value] += 1;
    }
    for step in program.steps.iter().rev() {
        let copies = match step.work {
            Work::Join(a, b) => vec![a, b],
            Work::Tokens { source, .. } => vec![source],
            _ => continue,
        };
        if program.values[step.out].kind == Type::Bf16 {
            for value in copies {
                let value_of = &mut program.values[value];
                if readers[value] == 1 && value_of.rate != Rate::Timestep {
                    value_of.kind = Type::Bf16;
                }
            }
        }
    }
}
