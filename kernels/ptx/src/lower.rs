//! Syntax to operations: scopes, registers, constants and calls.
//!
//! Functions are inlined at every call; their parameters lie in the local memory of the thread. Literals and special registers are
//! registers that are filled before the first instruction, so that every operand of an operation is a register.

use std::collections::HashMap;
use std::sync::Arc;

use crate::Error;
use crate::lanes::Func;
use crate::op::{Base, Inst, NONE, Op, Place, Reg};
use crate::syntax::{
    Class, Function, Instruction, Literal, Operand, Space, Statement, Text, Type, Variable,
};

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

    /// A new register of a type.
    pub(crate) fn register(&mut self, kind: Type) -> Reg {
        let bank = match kind.width() {
            _ if kind.class == Class::Predicate => 2,
            64 => 1,
            _ => 0,
        };
        let number = self.code.registers[bank];
        self.code.registers[bank] += 1;
        match bank {
            0 => Reg::R32(number),
            1 => Reg::R64(number),
            _ => Reg::Pred(number),
        }
    }

    pub(crate) fn scratch32(&mut self) -> u32 {
        self.code.registers[0] += 1;
        self.code.registers[0] - 1
    }

    pub(crate) fn scratch64(&mut self) -> u32 {
        self.code.registers[1] += 1;
        self.code.registers[1] - 1
    }

    pub(crate) fn scratch_predicate(&mut self) -> u32 {
        self.code.registers[2] += 1;
        self.code.registers[2] - 1
    }

    /// What a name stands for.
    pub(crate) fn symbol(&mut self, name: &str) -> Result<Symbol, Error> {
        for at in (0..self.scopes.len()).rev() {
            if let Some(symbol) = self.scopes[at].names.get(name) {
                return Ok(*symbol);
            }
            let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
            // a prefix may itself end in digits
            for cut in stem.len()..name.len() {
                let number = name[cut..].parse().unwrap_or(u32::MAX);
                let known = self.scopes[at]
                    .prefixes
                    .iter()
                    .find(|(p, count, _)| *p == name[..cut] && number < *count);
                if let Some(kind) = known.map(|(_, _, kind)| *kind) {
                    let symbol = Symbol::Register(self.register(kind), kind.width());
                    self.scopes[at].names.insert(name.to_owned(), symbol);
                    return Ok(symbol);
                }
            }
        }
        if let Some(at) = SPECIALS.iter().position(|s| *s == name) {
            let known = self.specials.get(&at).copied();
            let reg = known.unwrap_or_else(|| {
                let reg = self.scratch32();
                self.specials.insert(at, reg);
                self.code.specials.push((reg, at));
                reg
            });
            return Ok(Symbol::Register(Reg::R32(reg), 32));
        }
        if let Some((space, address)) = self.globals.get(name) {
            return Ok(Symbol::Variable(*space, *address));
        }
        if let Some(symbol) = self.module_shared.get(name) {
            return Ok(*symbol);
        }
        let text = self.text;
        if let Some(variable) = text
            .variables
            .iter()
            .find(|v| v.name == name && v.space == Space::Shared)
        {
            let symbol = self.shared_variable(variable);
            self.module_shared.insert(name.to_owned(), symbol);
            return Ok(symbol);
        }
        Err(self.error(format!("{name} is not known or not interpreted")))
    }

    pub(crate) fn constant32(&mut self, value: u32) -> u32 {
        if let Some(reg) = self.constants.get(&(u64::from(value), false)) {
            return *reg;
        }
        let reg = self.scratch32();
        self.constants.insert((u64::from(value), false), reg);
        self.code.const32.push((reg, value));
        reg
    }

    pub(crate) fn constant64(&mut self, value: u64) -> u32 {
        if let Some(reg) = self.constants.get(&(value, true)) {
            return *reg;
        }
        let reg = self.scratch64();
        self.constants.insert((value, true), reg);
        self.code.const64.push((reg, value));
        reg
    }

    /// A register that will hold the address of the dynamic array plus an offset.
    fn dynamic(&mut self, offset: i64, wide: bool) -> Reg {
        let reg = if wide {
            Reg::R64(self.scratch64())
        } else {
            Reg::R32(self.scratch32())
        };
        match reg {
            Reg::R64(n) => self.code.const64.push((n, offset as u64)),
            Reg::R32(n) | Reg::Pred(n) => self.code.const32.push((n, offset as u32)),
        }
        self.code.dynamic.push(reg);
        reg
    }

    /// The register of a source operand; literals are read as of a type.
    pub(crate) fn source(&mut self, operand: &Operand, kind: Type) -> Result<Reg, Error> {
        let wide = kind.width() == 64;
        let (name, offset) = match operand {
            Operand::Literal(literal) => return Ok(self.literal(*literal, kind)),
            Operand::Name(name) => (name, 0),
            Operand::Offset(name, offset) => (name, *offset),
            _ => return Err(self.error("an operand that is neither a register nor a number")),
        };
        Ok(match self.symbol(name)? {
            Symbol::Register(reg, _) if offset == 0 => reg,
            Symbol::Register(..) => return Err(self.error("an offset to a register")),
            Symbol::Variable(_, address) if wide => {
                Reg::R64(self.constant64(address.wrapping_add_signed(offset)))
            }
            Symbol::Variable(_, address) => {
                Reg::R32(self.constant32(address.wrapping_add_signed(offset) as u32))
            }
            Symbol::Dynamic => self.dynamic(offset, wide),
        })
    }

    fn literal(&mut self, literal: Literal, kind: Type) -> Reg {
        let bits = literal.bits(kind);
        match kind.width() {
            64 => Reg::R64(self.constant64(bits)),
            16 => Reg::R32(self.constant32(bits as u32 & 0xffff)),
            _ if kind.class == Class::Predicate => Reg::Pred(if bits == 0 { FALSE } else { TRUE }),
            _ => Reg::R32(self.constant32(bits as u32)),
        }
    }

    /// A source of 32 bits or fewer.
    pub(crate) fn source32(&mut self, operand: &Operand, kind: Type) -> Result<u32, Error> {
        match self.source(operand, kind)? {
            Reg::R32(n) => Ok(n),
            _ => Err(self.error("expected a register of 32 bits or fewer")),
        }
    }

    pub(crate) fn source64(&mut self, operand: &Operand, kind: Type) -> Result<u32, Error> {
        match self.source(operand, kind)? {
            Reg::R64(n) => Ok(n),
            _ => Err(self.error("expected a register of 64 bits")),
        }
    }

    /// A predicate, and whether it is negated.
    pub(crate) fn predicate(&mut self, operand: &Operand) -> Result<(u32, bool), Error> {
        let (operand, negated) = match operand {
            Operand::Not(inner) => (inner.as_ref(), true),
            other => (other, false),
        };
        let kind = Type {
            class: Class::Predicate,
            bits: 1,
            packed: false,
        };
        match self.source(operand, kind)? {
            Reg::Pred(n) => Ok((n, negated)),
            _ => Err(self.error("expected a predicate")),
        }
    }

    /// The register that takes a result and its bits; `_` is a register that nothing reads.
    pub(crate) fn destination(
        &mut self,
        operand: &Operand,
        kind: Type,
    ) -> Result<(Reg, u32), Error> {
        let Operand::Name(name) = operand else {
            return Err(self.error("a result that is no register"));
        };
        if name == "_" {
            return Ok((self.register(kind), kind.width()));
        }
        match self.symbol(name)? {
            Symbol::Register(reg, bits) if !name.contains('.') => Ok((reg, bits)),
            _ => Err(self.error("a result that is no register")),
        }
    }

    pub(crate) fn destination32(&mut self, operand: &Operand) -> Result<u32, Error> {
        let kind = Type {
            class: Class::Bits,
            bits: 32,
            packed: false,
        };
        match self.destination(operand, kind)? {
            (Reg::R32(n), _) => Ok(n),
            _ => Err(self.error("expected a result of 32 bits or fewer")),
        }
    }

    pub(crate) fn destination64(&mut self, operand: &Operand) -> Result<u32, Error> {
        let kind = Type {
            class: Class::Bits,
            bits: 64,
            packed: false,
        };
        match self.destination(operand, kind)? {
            (Reg::R64(n), _) => Ok(n),
            _ => Err(self.error("expected a result of 64 bits")),
        }
    }

    pub(crate) fn destination_predicate(&mut self, operand: &Operand) -> Result<u32, Error> {
        let kind = Type {
            class: Class::Predicate,
            bits: 1,
            packed: false,
        };
        match self.destination(operand, kind)? {
            (Reg::Pred(n), _) => Ok(n),
            _ => Err(self.error("expected a predicate as the result")),
        }
    }

    /// Emits a function of lanes; the function tells the widths, the type how literals are read.
    pub(crate) fn apply(
        &mut self,
        func: Func,
        d: &Operand,
        sources: &[Operand],
        kind: Type,
    ) -> Result<(), Error> {
        let op = match func {
            Func::Test32(_) | Func::Test64(_) => {
                let p = self.destination_predicate(d)?;
                return self.apply_test(func, p, sources, kind);
            }
            Func::A1(f) => Op::A1(f, self.destination32(d)?, self.nth32(sources, 0, kind)?),
            Func::A2(f) => Op::A2(
                f,
                self.destination32(d)?,
                self.nth32(sources, 0, kind)?,
                self.nth32(sources, 1, kind)?,
            ),
            Func::A3(f) => {
                let s = [
                    self.nth32(sources, 0, kind)?,
                    self.nth32(sources, 1, kind)?,
                    self.nth32(sources, 2, kind)?,
                ];
                Op::A3(f, self.destination32(d)?, s[0], s[1], s[2])
            }
            Func::A4(f) => {
                let mut s = [0; 4];
                for (i, s) in s.iter_mut().enumerate() {
                    *s = self.nth32(sources, i, kind)?;
                }
                Op::A4(f, self.destination32(d)?, s)
            }
            Func::B1(f) => Op::B1(f, self.destination64(d)?, self.nth64(sources, 0, kind)?),
            Func::B2(f) => Op::B2(
                f,
                self.destination64(d)?,
                self.nth64(sources, 0, kind)?,
                self.nth64(sources, 1, kind)?,
            ),
            Func::B3(f) => {
                let s = [
                    self.nth64(sources, 0, kind)?,
                    self.nth64(sources, 1, kind)?,
                    self.nth64(sources, 2, kind)?,
                ];
                Op::B3(f, self.destination64(d)?, s[0], s[1], s[2])
            }
            Func::Widen(f) => Op::Widen(f, self.destination64(d)?, self.nth32(sources, 0, kind)?),
            Func::Narrow(f) => Op::Narrow(f, self.destination32(d)?, self.nth64(sources, 0, kind)?),
            Func::Wide2(f) => Op::Wide2(
                f,
                self.destination64(d)?,
                self.nth32(sources, 0, kind)?,
                self.nth32(sources, 1, kind)?,
            ),
            Func::Wide3(f) => {
                let (a, b) = (self.nth32(sources, 0, kind)?, self.nth32(sources, 1, kind)?);
                Op::Wide3(
                    f,
                    self.destination64(d)?,
                    a,
                    b,
                    self.nth64(sources, 2, kind)?,
                )
            }
            Func::Shift(f) => Op::Shift(
                f,
                self.destination64(d)?,
                self.nth64(sources, 0, kind)?,
                self.nth32(sources, 1, kind)?,
            ),
            Func::Field(f) => {
                let (b, c) = (self.nth32(sources, 1, kind)?, self.nth32(sources, 2, kind)?);
                Op::Field(
                    f,
                    self.destination64(d)?,
                    self.nth64(sources, 0, kind)?,
                    b,
                    c,
                )
            }
            Func::Insert(f) => {
                let (a, b) = (self.nth64(sources, 0, kind)?, self.nth64(sources, 1, kind)?);
                Op::Insert(
                    f,
                    self.destination64(d)?,
                    [
                        a,
                        b,
                        self.nth32(sources, 2, kind)?,
                        self.nth32(sources, 3, kind)?,
                    ],
                )
            }
        };
        self.emit(op);
        Ok(())
    }

    pub(crate) fn apply_test(
        &mut self,
        func: Func,
        p: u32,
        sources: &[Operand],
        kind: Type,
    ) -> Result<(), Error> {
        let op = match func {
            Func::Test32(f) => Op::Test32(
                f,
                p,
                self.nth32(sources, 0, kind)?,
                self.nth32(sources, 1, kind)?,
            ),
            Func::Test64(f) => Op::Test64(
                f,
                p,
                self.nth64(sources, 0, kind)?,
                self.nth64(sources, 1, kind)?,
            ),
            _ => return Err(self.error("no test")),
        };
        self.emit(op);
        Ok(())
    }

    fn nth32(&mut self, sources: &[Operand], n: usize, kind: Type) -> Result<u32, Error> {
        let operand = sources
            .get(n)
            .ok_or_else(|| self.error("too few operands"))?;
        let kind = if kind.width() == 64 {
            Type {
                class: Class::Bits,
                bits: 32,
                packed: false,
            }
        } else {
            kind
        };
        self.source32(operand, kind)
    }

    fn nth64(&mut self, sources: &[Operand], n: usize, kind: Type) -> Result<u32, Error> {
        let operand = sources
            .get(n)
            .ok_or_else(|| self.error("too few operands"))?;
        let kind = if kind.width() == 64 {
            kind
        } else {
            Type {
                class: Class::Signed,
                bits: 64,
                packed: false,
            }
        };
        self.source64(operand, kind)
    }

    /// The register part and the offset of an address, and the space of the variable that it names.
    pub(crate) fn address(
        &mut self,
        operand: &Operand,
    ) -> Result<(Base, i64, Option<Space>), Error> {
        let Operand::Address(base, offset) = operand else {
            return Err(self.error("expected an address"));
        };
        let Some(name) = base else {
            return Ok((Base::None, *offset, None));
        };
        Ok(match self.symbol(name)? {
            Symbol::Register(Reg::R32(n), _) => (Base::R32(n), *offset, None),
            Symbol::Register(Reg::R64(n), _) => (Base::R64(n), *offset, None),
            Symbol::Register(Reg::Pred(_), _) => {
                return Err(self.error("a predicate as an address"));
            }
            Symbol::Variable(space, address) => (
                Base::None,
                address.wrapping_add_signed(*offset) as i64,
                Some(space),
            ),
            Symbol::Dynamic => match self.dynamic(0, true) {
                Reg::R64(n) => (Base::R64(n), *offset, Some(Space::Shared)),
                _ => return Err(self.error("an address that is no register")),
            },
        })
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
