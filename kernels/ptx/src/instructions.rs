//! The instructions that compute and branch, decoded.

use crate::Error;
use crate::convert::{self, Conversion};
use crate::floats::{self, Rounding};
use crate::halves;
use crate::integers;
use crate::lanes::{Func, m};
use crate::lower::Lower;
use crate::op::{Carry, Logic, NONE, Op, Reg};
use crate::syntax::{Class, Instruction, Operand, Space, Type};

/// Modifiers of computing instructions that the tables know.
const KNOWN: &[&str] = &[
    "rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna", "ftz", "sat", "approx", "full",
    "lo", "hi", "wide", "NaN", "cc", "relu", "l", "r", "clamp", "wrap", "to", "f4e", "b4e", "rc8",
    "ecl", "ecr", "rc16", "shiftamt",
];

const B32: Type = Type {
    class: Class::Bits,
    bits: 32,
    packed: false,
};

impl Lower<'_> {
    /// Decodes one instruction.
    pub(crate) fn operation(&mut self, instruction: &Instruction) -> Result<(), Error> {
        let parts: Vec<&str> = instruction.parts.iter().map(String::as_str).collect();
        let (name, parts) = (parts[0], &parts[1..]);
        let operands = instruction.operands.as_slice();
        if self.other(name, parts, operands)? {
            return Ok(());
        }
        let types: Vec<Type> = parts.iter().filter_map(|p| Type::named(p)).collect();
        let kind = *types.last().ok_or_else(|| self.error("not interpreted"))?;
        let Some((d, sources)) = operands.split_first() else {
            return Err(self.error("too few operands"));
        };
        match name {
            "mov" => return self.mov(d, sources, kind),
            "setp" => return self.setp(parts, d, sources, kind),
            "set" => return self.set(parts, d, sources, types[0], kind),
            "selp" => return self.selp(d, sources, kind),
            "slct" => return self.slct(d, sources, types[0], kind),
            "testp" => {
                let func = floats::property(parts[0])
                    .filter(|_| kind.bits == 32)
                    .ok_or_else(|| self.error("not interpreted"))?;
                return self.apply(func, d, &[sources[0].clone(), sources[0].clone()], kind);
            }
            "lop3" => return self.lop3(d, sources),
            _ => {}
        }
        if let Some(part) = parts
            .iter()
            .find(|p| Type::named(p).is_none() && !KNOWN.contains(p))
        {
            return Err(self.error(format!("the modifier .{part} is not interpreted")));
        }
        if name == "cvt" {
            return self.cvt(parts, d, sources, &types);
        }
        if kind.class == Class::Predicate {
            return self.logic(name, d, sources);
        }
        if parts.contains(&"cc") || matches!(name, "addc" | "subc" | "madc") {
            return self.carry(name, parts, d, sources, kind);
        }
        let func = match (kind.class, kind.bits) {
            (Class::Float, 32) => floats::single(name, parts),
            (Class::Float, 64) => floats::double(name, parts),
            (Class::Float | Class::Brain, 16) => halves::half(name, parts, kind),
            (Class::Unsigned | Class::Signed | Class::Bits, _) => {
                integers::integer(name, parts, kind).or_else(|| integers::bits(name, parts, kind))
            }
            _ => None,
        };
        let func = func.ok_or_else(|| self.error("not interpreted"))?;
        self.apply(func, d, sources, kind)?;
        if kind.class == Class::Float && kind.bits == 32 && parts.contains(&"sat") {
            self.apply(floats::saturation(), d, std::slice::from_ref(d), kind)?;
        }
        Ok(())
    }

    fn mov(&mut self, d: &Operand, sources: &[Operand], kind: Type) -> Result<(), Error> {
        let source = sources
            .first()
            .ok_or_else(|| self.error("too few operands"))?;
        match (d, source) {
            (Operand::Vector(to), from) => return self.unpack(to, from, kind),
            (_, Operand::Vector(from)) => return self.pack(d, from, kind),
            (_, Operand::Name(name))
                if matches!(
                    name.as_str(),
                    "%clock" | "%clock_hi" | "%clock64" | "%globaltimer"
                ) =>
            {
                let op = match self.destination(d, kind)?.0 {
                    Reg::R64(n) => Op::Clock64(n),
                    Reg::R32(n) => Op::Clock32(n),
                    Reg::Pred(_) => return Err(self.error("a predicate takes no clock")),
                };
                self.emit(op);
                return Ok(());
            }
            _ => {}
        }
        let to = self.destination(d, kind)?.0;
        let op = match (to, self.source(source, kind)?) {
            (Reg::R32(d), Reg::R32(a)) => Op::Mov32(d, a),
            (Reg::R64(d), Reg::R64(a)) => Op::Mov64(d, a),
            (Reg::Pred(d), Reg::Pred(a)) => Op::MovPred(d, a),
            _ => return Err(self.error("registers of different widths")),
        };
        self.emit(op);
        Ok(())
    }

    fn pack(&mut self, d: &Operand, from: &[Operand], kind: Type) -> Result<(), Error> {
        let half = Type {
            class: Class::Bits,
            bits: kind.width() / from.len().max(1) as u32,
            packed: false,
        };
        let join16 = m!(A2: |a: u32, b: u32| -> u32 { a & 0xffff | b << 16 });
        let join32 = m!(Wide2: |a: u32, b: u32| -> u64 { u64::from(b) << 32 | u64::from(a) });
        match (kind.width(), from.len()) {
            (32, 2) => self.apply(join16, d, from, half),
            (64, 2) => self.apply(join32, d, from, half),
            (64, 4) => {
                let (Func::A2(join), Func::Wide2(wide)) = (join16, join32) else {
                    return Ok(());
                };
                let mut pairs = [0; 2];
                for (pair, two) in pairs.iter_mut().zip(from.chunks(2)) {
                    let (a, b) = (self.source32(&two[0], half)?, self.source32(&two[1], half)?);
                    *pair = self.scratch32();
                    self.emit(Op::A2(join, *pair, a, b));
                }
                let d = self.destination64(d)?;
                self.emit(Op::Wide2(wide, d, pairs[0], pairs[1]));
                Ok(())
            }
            _ => Err(self.error("a vector of this width is not interpreted")),
        }
    }

    fn unpack(&mut self, to: &[Operand], from: &Operand, kind: Type) -> Result<(), Error> {
        let low16 = m!(A1: |a: u32| -> u32 { a & 0xffff });
        let high16 = m!(A1: |a: u32| -> u32 { a >> 16 });
        let low32 = m!(Narrow: |a: u64| -> u32 { a as u32 });
        let high32 = m!(Narrow: |a: u64| -> u32 { (a >> 32) as u32 });
        let part = [
            m!(Narrow: |a: u64| -> u32 { a as u32 & 0xffff }),
            m!(Narrow: |a: u64| -> u32 { (a >> 16) as u32 & 0xffff }),
            m!(Narrow: |a: u64| -> u32 { (a >> 32) as u32 & 0xffff }),
            m!(Narrow: |a: u64| -> u32 { (a >> 48) as u32 }),
        ];
        let funcs: &[Func] = match (kind.width(), to.len()) {
            (32, 2) => &[low16, high16],
            (64, 2) => &[low32, high32],
            (64, 4) => &part,
            _ => return Err(self.error("a vector of this width is not interpreted")),
        };
        // the source may be among the results
        let copy = if kind.width() == 32 {
            let (copy, from) = (self.scratch32(), self.source32(from, kind)?);
            self.emit(Op::Mov32(copy, from));
            copy
        } else {
            self.source64(from, kind)?
        };
        for (func, d) in funcs.iter().zip(to) {
            if *d == Operand::Name("_".to_owned()) {
                continue;
            }
            let d = self.destination32(d)?;
            match func {
                Func::A1(f) => self.emit(Op::A1(*f, d, copy)),
                Func::Narrow(f) => self.emit(Op::Narrow(*f, d, copy)),
                _ => {}
            }
        }
        Ok(())
    }

    /// The comparison among the modifiers of `setp` and `set`.
    fn comparison(&self, parts: &[&str], kind: Type) -> Result<Func, Error> {
        let name = parts.first().copied().unwrap_or_default();
        if let Some(part) = parts[1..]
            .iter()
            .find(|p| Type::named(p).is_none() && !matches!(**p, "and" | "or" | "xor" | "ftz"))
        {
            return Err(self.error(format!("the modifier .{part} is not interpreted")));
        }
        let unordered = matches!(
            name,
            "equ" | "neu" | "ltu" | "leu" | "gtu" | "geu" | "num" | "nan"
        );
        let unsigned = matches!(name, "lo" | "ls" | "hi" | "hs");
        let func = match (kind.class, kind.bits) {
            _ if kind.packed => None,
            (Class::Float, 32 | 64) if !unsigned => {
                floats::test(name, parts.contains(&"ftz"), kind.bits)
            }
            (Class::Float | Class::Brain, 16) if !unsigned => halves::test(name, kind.class),
            (Class::Unsigned | Class::Signed | Class::Bits, _) if !unordered => {
                integers::test(name, kind)
            }
            _ => None,
        };
        func.ok_or_else(|| self.error("this comparison is not interpreted"))
    }

    fn setp(
        &mut self,
        parts: &[&str],
        d: &Operand,
        sources: &[Operand],
        kind: Type,
    ) -> Result<(), Error> {
        let func = self.comparison(parts, kind)?;
        let (p, q) = match d {
            Operand::Pair(p, q) => (
                self.destination_predicate(p)?,
                self.destination_predicate(q)?,
            ),
            p => (self.destination_predicate(p)?, NONE),
        };
        let how = logic_among(parts);
        if q == NONE && how.is_none() {
            return self.apply_test(func, p, sources, kind);
        }
        let t = self.scratch_predicate();
        self.apply_test(func, t, sources, kind)?;
        let (c, negated) = match (how, sources.get(2)) {
            (Some(_), Some(c)) => self.predicate(c)?,
            (Some(_), None) => return Err(self.error("too few operands")),
            // t and true
            _ => (crate::lower::TRUE, false),
        };
        self.emit(Op::Combine {
            p,
            q,
            t,
            c,
            negated,
            how: how.unwrap_or(Logic::And),
        });
        Ok(())
    }

    fn set(
        &mut self,
        parts: &[&str],
        d: &Operand,
        sources: &[Operand],
        to: Type,
        kind: Type,
    ) -> Result<(), Error> {
        if kind.packed {
            let func = halves::test_pairs(parts.first().copied().unwrap_or_default(), kind.class)
                .filter(|_| to.packed && parts.len() == 3);
            let func = func.ok_or_else(|| self.error("this comparison is not interpreted"))?;
            return self.apply(func, d, sources, kind);
        }
        let func = self.comparison(parts, kind)?;
        let mut t = self.scratch_predicate();
        self.apply_test(func, t, sources, kind)?;
        if let (Some(how), Some(c)) = (logic_among(parts), sources.get(2)) {
            let (c, negated) = self.predicate(c)?;
            let p = self.scratch_predicate();
            self.emit(Op::Combine {
                p,
                q: NONE,
                t,
                c,
                negated,
                how,
            });
            t = p;
        }
        let yes = match (to.class, to.bits) {
            (Class::Float, 32) => 1.0_f32.to_bits(),
            (Class::Float, 16) => 0x3c00,
            (Class::Brain, 16) => 0x3f80,
            (Class::Unsigned | Class::Signed | Class::Bits, 32) => u32::MAX,
            (Class::Unsigned | Class::Signed | Class::Bits, 16) => 0xffff,
            _ => return Err(self.error("a result of this type is not interpreted")),
        };
        let (d, yes, no) = (
            self.destination32(d)?,
            self.constant32(yes),
            self.constant32(0),
        );
        self.emit(Op::Select32(d, yes, no, t));
        Ok(())
    }

    fn selp(&mut self, d: &Operand, sources: &[Operand], kind: Type) -> Result<(), Error> {
        let [a, b, p] = sources else {
            return Err(self.error("expected three sources"));
        };
        let (p, _) = self.predicate(p)?;
        let op = if kind.width() == 64 {
            Op::Select64(
                self.destination64(d)?,
                self.source64(a, kind)?,
                self.source64(b, kind)?,
                p,
            )
        } else {
            Op::Select32(
                self.destination32(d)?,
                self.source32(a, kind)?,
                self.source32(b, kind)?,
                p,
            )
        };
        self.emit(op);
        Ok(())
    }

    fn slct(
        &mut self,
        d: &Operand,
        sources: &[Operand],
        to: Type,
        kind: Type,
    ) -> Result<(), Error> {
        let [a, b, c] = sources else {
            return Err(self.error("expected three sources"));
        };
        let func = self.comparison(&["ge"], kind)?;
        let p = self.scratch_predicate();
        let zero = Operand::Literal(crate::syntax::Literal::Integer(0));
        self.apply_test(func, p, &[c.clone(), zero], kind)?;
        let op = if to.width() == 64 {
            Op::Select64(
                self.destination64(d)?,
                self.source64(a, to)?,
                self.source64(b, to)?,
                p,
            )
        } else {
            Op::Select32(
                self.destination32(d)?,
                self.source32(a, to)?,
                self.source32(b, to)?,
                p,
            )
        };
        self.emit(op);
        Ok(())
    }

    fn lop3(&mut self, d: &Operand, sources: &[Operand]) -> Result<(), Error> {
        let [
            a,
            b,
            c,
            Operand::Literal(crate::syntax::Literal::Integer(table)),
        ] = sources
        else {
            return Err(self.error("expected three sources and a table"));
        };
        let s = [
            self.source32(a, B32)?,
            self.source32(b, B32)?,
            self.source32(c, B32)?,
        ];
        let d = self.destination32(d)?;
        self.emit(Op::Lop3(*table as u8, d, s[0], s[1], s[2]));
        Ok(())
    }

    fn logic(&mut self, name: &str, d: &Operand, sources: &[Operand]) -> Result<(), Error> {
        let d = self.destination_predicate(d)?;
        let mut inputs = [0; 2];
        for (input, source) in inputs.iter_mut().zip(sources) {
            *input = self.predicate(source)?.0;
        }
        let [a, b] = inputs;
        self.emit(match name {
            "and" => Op::Logic(Logic::And, d, a, b),
            "or" => Op::Logic(Logic::Or, d, a, b),
            "xor" => Op::Logic(Logic::Xor, d, a, b),
            "not" => Op::NotPred(d, a),
            _ => return Err(self.error("not interpreted")),
        });
        Ok(())
    }

    fn cvt(
        &mut self,
        parts: &[&str],
        d: &Operand,
        sources: &[Operand],
        types: &[Type],
    ) -> Result<(), Error> {
        let [to, from] = *types else {
            return Err(self.error("expected two types"));
        };
        let (result, width) = self.destination(d, to)?;
        let conversion = Conversion {
            to,
            from,
            width,
            rounding: Rounding::among(parts),
            integral: parts
                .iter()
                .any(|p| matches!(*p, "rni" | "rzi" | "rmi" | "rpi")),
            saturate: parts.contains(&"sat"),
            flush: parts.contains(&"ftz"),
            relu: parts.contains(&"relu"),
        };
        if let Some(func) = convert::fast(&conversion, parts) {
            return self.apply(func, d, sources, from);
        }
        if to.packed || from.packed {
            return Err(self.error("not interpreted"));
        }
        let source = sources
            .first()
            .ok_or_else(|| self.error("too few operands"))?;
        let source = self.source(source, from)?;
        if matches!(result, Reg::Pred(_)) || matches!(source, Reg::Pred(_)) {
            return Err(self.error("predicates are not converted"));
        }
        if to.width() > width || from.width() == 64 && matches!(source, Reg::R32(_)) {
            return Err(self.error("a register narrower than its type"));
        }
        self.emit(Op::Convert(Box::new((conversion, result, source))));
        Ok(())
    }

    fn carry(
        &mut self,
        name: &str,
        parts: &[&str],
        d: &Operand,
        sources: &[Operand],
        kind: Type,
    ) -> Result<(), Error> {
        let product = matches!(name, "mad" | "madc").then(|| parts.contains(&"hi"));
        if kind.is_float()
            || !matches!(kind.bits, 32 | 64)
            || !matches!(name, "add" | "addc" | "sub" | "subc" | "mad" | "madc")
        {
            return Err(self.error("not interpreted"));
        }
        let mut regs = [Reg::Pred(0); 3];
        for (reg, source) in regs.iter_mut().zip(sources) {
            *reg = self.source(source, kind)?;
        }
        let d = self.destination(d, kind)?.0;
        let fits = |reg: &Reg| matches!((reg, kind.bits), (Reg::R32(_), 32) | (Reg::R64(_), 64));
        if !fits(&d)
            || !regs[..sources.len().min(3)].iter().all(fits)
            || sources.len() != 2 + usize::from(product.is_some())
        {
            return Err(self.error("registers of different widths"));
        }
        self.emit(Op::Carry(Box::new(Carry {
            subtract: name.starts_with("sub"),
            product,
            signed: kind.is_signed(),
            from: name.ends_with('c'),
            to: parts.contains(&"cc"),
            d,
            a: regs[0],
            b: regs[1],
            c: regs[2],
        })));
        Ok(())
    }

    /// `cvta` and `isspacep`.
    pub(crate) fn window(
        &mut self,
        name: &str,
        parts: &[&str],
        operands: &[Operand],
    ) -> Result<(), Error> {
        let [d, a] = operands else {
            return Err(self.error("expected two operands"));
        };
        let space = parts.iter().find_map(|p| match *p {
            "shared" | "shared::cta" => Some(Space::Shared),
            "local" => Some(Space::Local),
            "global" => Some(Space::Global),
            "const" => Some(Space::Const),
            _ => None,
        });
        let space = space.ok_or_else(|| self.error("this state space is not interpreted"))?;
        let kind = Type {
            class: Class::Unsigned,
            bits: 64,
            packed: false,
        };
        let a = self.source64(a, kind)?;
        let op = match name {
            "isspacep" => Op::IsSpace(space, self.destination_predicate(d)?, a),
            _ if parts.contains(&"to") => Op::ToSpace(space, self.destination64(d)?, a),
            _ => Op::FromSpace(space, self.destination64(d)?, a),
        };
        self.emit(op);
        Ok(())
    }
}

fn logic_among(parts: &[&str]) -> Option<Logic> {
    parts.iter().skip(1).find_map(|p| match *p {
        "and" => Some(Logic::And),
        "or" => Some(Logic::Or),
        "xor" => Some(Logic::Xor),
        _ => None,
    })
}
