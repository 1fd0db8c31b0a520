//! Registers, constants and addresses of operands.

use super::{FALSE, Lower, SPECIALS, Symbol, TRUE};
use crate::Error;
use crate::lanes::Func;
use crate::op::{Base, Op, Reg};
use crate::syntax::{Class, Literal, Operand, Space, Type};

impl Lower<'_> {
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
}
