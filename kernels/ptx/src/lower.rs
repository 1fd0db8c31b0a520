//! Syntax to operations: scopes, registers, constants and calls.
//!
//! Functions are inlined at every call; their parameters lie in the local memory of the thread. Literals and special registers are
//! registers that are filled before the first instruction, so that every operand of an operation is a register.

mod operands;

use std::collections::HashMap;
use std::sync::Arc;

use crate::Error;
use crate::op::{Inst, NONE, Op, Place, Reg};
use crate::syntax::{Function, Instruction, Operand, Space, Statement, Text, Type, Variable};

/// Special registers that hold one number per lane or warp.
pub(crate) const SPECIALS: &[&str] = &[
    "%tid.x",
    "%tid.y",
    "%tid.z",
    "%ntid.x",
    "%ntid.y",
    "%ntid.z",
    "%ctaid.x",
    "%ctaid.y",
    "%ctaid.z",
    "%nctaid.x",
    "%nctaid.y",
    "%nctaid.z",
    "%laneid",
    "%warpid",
    "%nwarpid",
    "%smid",
    "%nsmid",
    "%lanemask_eq",
    "%lanemask_le",
    "%lanemask_lt",
    "%lanemask_ge",
    "%lanemask_gt",
    "%dynamic_smem_size",
    "%total_smem_size",
];

/// The predicate that is always false, and the one that is always true.
pub(crate) const FALSE: u32 = 0;
pub(crate) const TRUE: u32 = 1;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Symbol {
    Register(Reg, u32),
    Variable(Space, u64),
    /// An array whose size the launch tells.
    Dynamic,
}

#[derive(Default)]
struct Scope {
    names: HashMap<String, Symbol>,
    prefixes: Vec<(String, u32, Type)>,
    labels: HashMap<String, u32>,
    targets: HashMap<String, Vec<String>>,
}

/// What is decoded of a kernel.
#[derive(Default)]
pub(crate) struct Code {
    pub(crate) insts: Vec<Inst>,
    pub(crate) places: Vec<Place>,
    /// Registers of each bank: 32 bits, 64 bits, predicates.
    pub(crate) registers: [u32; 3],
    pub(crate) const32: Vec<(u32, u32)>,
    pub(crate) const64: Vec<(u32, u64)>,
    /// Registers and what of [`SPECIALS`] they hold.
    pub(crate) specials: Vec<(u32, usize)>,
    pub(crate) shared: usize,
    pub(crate) dynamic_align: usize,
    /// Registers that hold the address of the dynamic array.
    pub(crate) dynamic: Vec<Reg>,
    pub(crate) local: usize,
    /// Registers that may be read before they are written.
    pub(crate) unset: Vec<Reg>,
    /// Bytes of the smallest store to shared memory, at most 4.
    pub(crate) piece: u32,
}

pub(crate) struct Lower<'a> {
    text: &'a Text,
    /// Addresses of `.global` and `.const` variables.
    globals: &'a HashMap<String, (Space, u64)>,
    pub(crate) code: Code,
    scopes: Vec<Scope>,
    constants: HashMap<(u64, bool), u32>,
    specials: HashMap<usize, u32>,
    module_shared: HashMap<String, Symbol>,
    /// Place of each label in the code.
    labels: Vec<u32>,
    calls: Vec<String>,
    /// Where `ret` goes in a function.
    after: Option<u32>,
    place: Place,
    guard: u32,
}

/// Decodes a kernel.
pub(crate) fn lower(
    text: &Text,
    globals: &HashMap<String, (Space, u64)>,
    kernel: &Function,
    params: &[usize],
) -> Result<Code, Error> {
    let place = Place {
        line: kernel.line,
        text: Arc::from(kernel.name.as_str()),
    };
    let mut lower = Lower {
        text,
        globals,
        code: Code {
            registers: [0, 0, 2],
            piece: 4,
            dynamic_align: 1,
            ..Code::default()
        },
        scopes: vec![Scope::default()],
        constants: HashMap::new(),
        specials: HashMap::new(),
        module_shared: HashMap::new(),
        labels: Vec::new(),
        calls: Vec::new(),
        after: None,
        place,
        guard: NONE,
    };
    for (param, offset) in kernel.params.iter().zip(params) {
        lower.define(&param.name, Symbol::Variable(Space::Param, *offset as u64));
    }
    lower.body(kernel.body.as_deref().unwrap_or_default())?;
    lower.guard = NONE;
    lower.emit(Op::Exit);
    lower.finish()
}

impl<'a> Lower<'a> {
    pub(crate) fn error(&self, reason: impl Into<String>) -> Error {
        Error::Parse {
            line: self.place.line,
            text: self.place.text.to_string(),
            reason: reason.into(),
        }
    }

    pub(crate) fn emit(&mut self, op: Op) {
        self.code.insts.push(Inst {
            op,
            guard: self.guard,
        });
        self.code.places.push(self.place.clone());
    }

    fn define(&mut self, name: &str, symbol: Symbol) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.names.insert(name.to_owned(), symbol);
        }
    }

    fn body(&mut self, statements: &'a [Statement]) -> Result<(), Error> {
        self.collect_labels(statements);
        for (i, statement) in statements.iter().enumerate() {
            match statement {
                Statement::Open => {
                    self.scopes.push(Scope::default());
                    self.collect_labels(&statements[i + 1..]);
                }
                Statement::Close => {
                    self.scopes.pop();
                }
                Statement::Register {
                    name,
                    count: None,
                    kind,
                } => {
                    let reg = self.register(*kind);
                    self.define(name, Symbol::Register(reg, kind.width()));
                }
                Statement::Register {
                    name,
                    count: Some(count),
                    kind,
                } => {
                    if let Some(scope) = self.scopes.last_mut() {
                        scope.prefixes.push((name.clone(), *count, *kind));
                    }
                }
                Statement::Variable(variable) => self.variable(variable)?,
                Statement::Label(name) => {
                    if let Some(label) = self.scopes.last().and_then(|s| s.labels.get(name)) {
                        self.labels[*label as usize] = self.code.insts.len() as u32;
                    }
                }
                Statement::Targets(name, targets) => {
                    if let Some(scope) = self.scopes.last_mut() {
                        scope.targets.insert(name.clone(), targets.clone());
                    }
                }
                Statement::Instruction(instruction) => self.instruction(instruction)?,
            }
        }
        Ok(())
    }

    /// The labels of the scope that begins here.
    fn collect_labels(&mut self, statements: &[Statement]) {
        let mut depth = 0;
        for statement in statements {
            match statement {
                Statement::Open => depth += 1,
                Statement::Close if depth == 0 => break,
                Statement::Close => depth -= 1,
                Statement::Label(name) if depth == 0 => {
                    let label = self.label();
                    if let Some(scope) = self.scopes.last_mut() {
                        scope.labels.insert(name.clone(), label);
                    }
                }
                _ => {}
            }
        }
    }

    pub(crate) fn label(&mut self) -> u32 {
        self.labels.push(NONE);
        self.labels.len() as u32 - 1
    }

    pub(crate) fn target(&self, name: &str) -> Result<u32, Error> {
        let found = self
            .scopes
            .iter()
            .rev()
            .find_map(|s| s.labels.get(name).copied());
        found.ok_or_else(|| self.error(format!("no label {name}")))
    }

    pub(crate) fn targets(&self, name: &str) -> Result<Vec<u32>, Error> {
        let found = self.scopes.iter().rev().find_map(|s| s.targets.get(name));
        let names = found.ok_or_else(|| self.error(format!("no branch targets {name}")))?;
        names.iter().map(|n| self.target(n)).collect()
    }

    fn variable(&mut self, variable: &Variable) -> Result<(), Error> {
        let symbol = match variable.space {
            Space::Shared => self.shared_variable(variable),
            Space::Local | Space::Param => Symbol::Variable(Space::Local, self.local(variable)),
            _ => {
                self.place = Place {
                    line: variable.line,
                    text: variable.name.as_str().into(),
                };
                return Err(
                    self.error("a variable of this state space within a body is not interpreted")
                );
            }
        };
        self.define(&variable.name, symbol);
        Ok(())
    }

    fn local(&mut self, variable: &Variable) -> u64 {
        let start = self.code.local.next_multiple_of(variable.align);
        self.code.local = start + variable.bytes;
        start as u64
    }

    fn shared_variable(&mut self, variable: &Variable) -> Symbol {
        if variable.bytes == 0 {
            self.code.dynamic_align = self.code.dynamic_align.max(variable.align);
            return Symbol::Dynamic;
        }
        let start = self.code.shared.next_multiple_of(variable.align);
        self.code.shared = start + variable.bytes;
        Symbol::Variable(Space::Shared, start as u64)
    }

    fn instruction(&mut self, instruction: &'a Instruction) -> Result<(), Error> {
        self.place = Place {
            line: instruction.line,
            text: Arc::clone(&instruction.text),
        };
        self.guard = NONE;
        if let Some((name, negated)) = &instruction.guard {
            let (p, _) = self.predicate(&Operand::Name(name.clone()))?;
            self.guard = p * 2 + u32::from(*negated);
        }
        if instruction.parts[0] == "call" {
            return self.call(&instruction.operands);
        }
        self.operation(instruction)
    }

    /// `ret`: out of the kernel, or behind the call of an inlined function.
    pub(crate) fn leave(&mut self) {
        let op = self.after.map_or(Op::Exit, Op::Branch);
        self.emit(op);
    }

    fn call(&mut self, operands: &[Operand]) -> Result<(), Error> {
        let group = |o: Option<&Operand>| match o {
            Some(Operand::Group(names)) => Some(names.clone()),
            _ => None,
        };
        let results = group(operands.first());
        let at = usize::from(results.is_some());
        let Some(Operand::Name(name)) = operands.get(at) else {
            return Err(self.error("a call without a name"));
        };
        let arguments = group(operands.get(at + 1)).unwrap_or_default();
        let text = self.text;
        let function = text.functions.iter().find(|f| f.name == *name && !f.entry);
        let Some((function, body)) = function.and_then(|f| f.body.as_ref().map(|b| (f, b))) else {
            return Err(self.error(format!(
                "no function {name} with a body; indirect calls are not interpreted"
            )));
        };
        if self.calls.contains(name) {
            return Err(self.error("recursion is not interpreted"));
        }
        let mut scope = Scope::default();
        let formals = function.returns.iter().zip(results.unwrap_or_default());
        for (formal, actual) in formals.chain(function.params.iter().zip(arguments)) {
            let Operand::Name(actual) = actual else {
                return Err(self.error("an argument that is no parameter"));
            };
            let symbol = self.symbol(&actual)?;
            if !matches!(symbol, Symbol::Variable(Space::Local, _)) {
                return Err(self.error("an argument that is no parameter"));
            }
            scope.names.insert(formal.name.clone(), symbol);
        }
        let (place, guard, after) = (self.place.clone(), self.guard, self.label());
        if guard != NONE {
            self.guard ^= 1;
            self.emit(Op::Branch(after));
        }
        let outer = std::mem::replace(&mut self.scopes, vec![scope]);
        let returns = self.after.replace(after);
        self.calls.push(name.clone());
        self.body(body)?;
        self.calls.pop();
        self.after = returns;
        self.scopes = outer;
        self.place = place;
        self.labels[after as usize] = self.code.insts.len() as u32;
        Ok(())
    }

    /// Puts the places of labels and of the dynamic array where they are used.
    fn finish(mut self) -> Result<Code, Error> {
        let labels = std::mem::take(&mut self.labels);
        for inst in &mut self.code.insts {
            match &mut inst.op {
                Op::Branch(target) => *target = labels[*target as usize],
                Op::BranchTable(_, targets) => {
                    targets.iter_mut().for_each(|t| *t = labels[*t as usize])
                }
                _ => {}
            }
        }
        let base = self.code.shared.next_multiple_of(self.code.dynamic_align);
        for reg in &self.code.dynamic {
            match reg {
                Reg::R32(n) | Reg::Pred(n) => {
                    self.code
                        .const32
                        .iter_mut()
                        .filter(|(r, _)| r == n)
                        .for_each(|(_, v)| *v = v.wrapping_add(base as u32));
                }
                Reg::R64(n) => self
                    .code
                    .const64
                    .iter_mut()
                    .filter(|(r, _)| r == n)
                    .for_each(|(_, v)| *v = v.wrapping_add(base as u64)),
            }
        }
        let unset = crate::assign::unset(&self.code);
        if let Some((at, _)) = unset.never {
            self.place = self.code.places[at].clone();
            return Err(self.error("reads a register that is never written before"));
        }
        self.code.unset = unset.sometimes;
        Ok(self.code)
    }
}
