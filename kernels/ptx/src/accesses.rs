//! The instructions that touch memory, other lanes or the flow of control, decoded.

use crate::Error;
use crate::lower::Lower;
use crate::op::{Access, Atom, Atomic, Copy, NONE, Op, Reg};
use crate::syntax::{Class, Literal, Operand, Space, Type};

const B32: Type = Type {
    class: Class::Bits,
    bits: 32,
    packed: false,
};

/// The state space that a modifier names.
fn space(part: &str) -> Option<Space> {
    Some(match part {
        "global" => Space::Global,
        "shared" | "shared::cta" => Space::Shared,
        "local" => Space::Local,
        "const" => Space::Const,
        "param" | "param::entry" | "param::func" => Space::Param,
        _ => return None,
    })
}

/// Modifiers of order, scope and caching, which change nothing here.
fn hint(part: &str) -> bool {
    let plain = [
        "weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys", "ca",
        "cg", "cs", "lu", "cv", "wb", "wt", "nc",
    ];
    plain.contains(&part) || part.starts_with("L1::") || part.starts_with("L2::")
}

fn integer(operand: Option<&Operand>) -> Option<u64> {
    match operand {
        Some(Operand::Literal(Literal::Integer(value))) => Some(*value),
        _ => None,
    }
}

impl Lower<'_> {
    /// Decodes an instruction if it is of this kind.
    pub(crate) fn other(
        &mut self,
        name: &str,
        parts: &[&str],
        operands: &[Operand],
    ) -> Result<bool, Error> {
        match name {
            "ld" | "ldu" => self.access(parts, operands, true)?,
            "st" => self.access(parts, operands, false)?,
            "cvta" | "isspacep" => self.window(name, parts, operands)?,
            "atom" | "red" => self.atom(name, parts, operands)?,
            "shfl" => self.shuffle(parts, operands)?,
            "vote" => self.vote(parts, operands)?,
            "match" => self.matching(parts, operands)?,
            "redux" => self.redux(parts, operands)?,
            "activemask" => {
                let d = self.destination32(self.nth(operands, 0)?)?;
                self.emit(Op::ActiveMask(d));
            }
            "bar" | "barrier" => self.barrier(parts, operands)?,
            "membar" | "fence" | "prefetch" | "prefetchu" | "nanosleep" | "pmevent"
            | "applypriority" => self.emit(Op::Nop),
            "mma" => self.mma(parts, operands)?,
            "ldmatrix" => self.load_matrix(parts, operands)?,
            "cp" => self.copy(parts, operands)?,
            "bra" => match self.nth(operands, 0)? {
                Operand::Name(label) => {
                    let target = self.target(label)?;
                    self.emit(Op::Branch(target));
                }
                _ => return Err(self.error("a branch to no label")),
            },
            "brx" => {
                let index = self.source32(self.nth(operands, 0)?, B32)?;
                let Operand::Name(table) = self.nth(operands, 1)? else {
                    return Err(self.error("a branch without its table"));
                };
                let targets = self.targets(table)?;
                self.emit(Op::BranchTable(index, targets.into()));
            }
            "ret" => self.leave(),
            "exit" => self.emit(Op::Exit),
            "trap" => self.emit(Op::Trap),
            _ => return Ok(false),
        }
        Ok(true)
    }

    pub(crate) fn nth<'o>(&self, operands: &'o [Operand], n: usize) -> Result<&'o Operand, Error> {
        operands
            .get(n)
            .ok_or_else(|| self.error("too few operands"))
    }

    fn access(&mut self, parts: &[&str], operands: &[Operand], load: bool) -> Result<(), Error> {
        let (mut named, mut count, mut kind) = (None, 1_u8, None);
        for part in parts {
            match *part {
                "v2" => count = 2,
                "v4" => count = 4,
                part if space(part).is_some() => named = space(part),
                part if hint(part) => {}
                part => {
                    kind = Some(Type::named(part).ok_or_else(|| {
                        self.error(format!("the modifier .{part} is not interpreted"))
                    })?)
                }
            }
        }
        let kind = kind
            .filter(|k| k.bits >= 8)
            .ok_or_else(|| self.error("an access without a type"))?;
        let (address, values) = if load { (1, 0) } else { (0, 1) };
        let (base, offset, of) = self.address(self.nth(operands, address)?)?;
        let space = match (named, of) {
            // parameters of functions lie in local memory
            (Some(Space::Param), Some(Space::Local)) => Space::Local,
            (Some(named), Some(of)) if named != of => {
                return Err(self.error("a variable of another state space"));
            }
            (Some(named), _) => named,
            (None, of) => of.unwrap_or(Space::Generic),
        };
        let values = match self.nth(operands, values)? {
            Operand::Vector(values) => values.clone(),
            value => vec![value.clone()],
        };
        let size = (kind.width() / 8) as u8;
        if values.len() != usize::from(count) || size * count > 16 {
            return Err(self.error("a vector of this size is not interpreted"));
        }
        if !load && matches!(space, Space::Shared | Space::Generic) {
            self.code.piece = self.code.piece.min(u32::from(size * count));
        }
        let (regs, width) = self.values(&values, kind, load)?;
        if u32::from(width) < kind.width().min(16) {
            return Err(self.error("a register narrower than its type"));
        }
        let access = Access {
            space,
            size,
            count,
            signed: kind.is_signed(),
            width,
            regs,
            base,
            offset,
        };
        match (load, space) {
            (false, Space::Param | Space::Const) => {
                return Err(self.error("a store to a constant state space"));
            }
            (false, _) => self.emit(Op::Store(access)),
            (true, _) => self.emit(Op::Load(access)),
        }
        Ok(())
    }

    /// The registers of a load's results or a store's values, all of one bank, and their width.
    fn values(
        &mut self,
        values: &[Operand],
        kind: Type,
        load: bool,
    ) -> Result<([u32; 4], u8), Error> {
        let mut wide = kind.width() == 64;
        let mut width = kind.width().clamp(16, 64) as u8;
        for value in values {
            if let Operand::Name(name) = value
                && name != "_"
                && let Ok(crate::lower::Symbol::Register(reg, bits)) = self.symbol(name)
            {
                wide = matches!(reg, Reg::R64(_));
                width = bits as u8;
            }
        }
        let bank = Type {
            class: kind.class,
            bits: if wide { 64 } else { kind.width().min(32) },
            packed: false,
        };
        let mut regs = [0; 4];
        for (reg, value) in regs.iter_mut().zip(values) {
            let found = if load {
                self.destination(value, bank)?.0
            } else {
                self.source(value, bank)?
            };
            *reg = match found {
                Reg::R64(n) if wide => n,
                Reg::R32(n) if !wide && kind.width() <= 32 => n,
                _ => return Err(self.error("registers of different widths")),
            };
        }
        Ok((regs, width))
    }

    fn atom(&mut self, name: &str, parts: &[&str], operands: &[Operand]) -> Result<(), Error> {
        let (mut named, mut what, mut kind) = (None, None, None);
        for part in parts {
            match *part {
                "add" => what = Some(Atomic::Add),
                "min" => what = Some(Atomic::Min),
                "max" => what = Some(Atomic::Max),
                "and" => what = Some(Atomic::And),
                "or" => what = Some(Atomic::Or),
                "xor" => what = Some(Atomic::Xor),
                "exch" => what = Some(Atomic::Exchange),
                "cas" => what = Some(Atomic::Compare),
                "inc" => what = Some(Atomic::Increment),
                "dec" => what = Some(Atomic::Decrement),
                "noftz" => {}
                part if space(part).is_some() => named = space(part),
                part if hint(part) => {}
                part => {
                    kind = Some(Type::named(part).ok_or_else(|| {
                        self.error(format!("the modifier .{part} is not interpreted"))
                    })?)
                }
            }
        }
        let (Some(what), Some(kind)) = (what, kind) else {
            return Err(self.error("not interpreted"));
        };
        let float = kind.is_float();
        let supported = match what {
            Atomic::Add => true,
            Atomic::Min | Atomic::Max => !float || kind.packed || kind.bits == 16,
            _ => !float,
        };
        if !supported || kind.width() < 16 {
            return Err(self.error("an atomic operation of this type is not interpreted"));
        }
        let at = usize::from(name == "atom");
        let (base, offset, of) = self.address(self.nth(operands, at)?)?;
        let d = if at == 1 {
            Some(self.destination(&operands[0], kind)?.0)
        } else {
            None
        };
        let b = self.source(self.nth(operands, at + 1)?, kind)?;
        let c = if what == Atomic::Compare {
            Some(self.source(self.nth(operands, at + 2)?, kind)?)
        } else {
            None
        };
        let fits = |reg: &Reg| {
            matches!(
                (reg, kind.width()),
                (Reg::R64(_), 64) | (Reg::R32(_), 16 | 32)
            )
        };
        if !fits(&b) || !d.iter().chain(&c).all(fits) {
            return Err(self.error("registers of different widths"));
        }
        let space = named.or(of).unwrap_or(Space::Generic);
        self.emit(Op::Atom(Box::new(Atom {
            what,
            kind,
            space,
            base,
            offset,
            d,
            b,
            c,
        })));
        Ok(())
    }

    fn copy(&mut self, parts: &[&str], operands: &[Operand]) -> Result<(), Error> {
        match parts {
            ["async", "commit_group"] => self.emit(Op::Commit),
            ["async", "wait_all"] => self.emit(Op::WaitAll),
            ["async", "wait_group"] => {
                let count =
                    integer(operands.first()).ok_or_else(|| self.error("expected a number"))?;
                self.emit(Op::Wait(count as u32));
            }
            [
                "async",
                cache @ ("ca" | "cg"),
                "shared" | "shared::cta",
                "global",
                rest @ ..,
            ] if rest.iter().all(|p| hint(p)) => {
                let size = integer(operands.get(2))
                    .ok_or_else(|| self.error("expected a number of bytes"))?;
                if !matches!((*cache, size), ("cg", 16) | ("ca", 4 | 8 | 16)) {
                    return Err(
                        self.error("a copy of 16 bytes, or of 4 or 8 with .ca, was expected")
                    );
                }
                let to = self.address(self.nth(operands, 0)?)?;
                let from = self.address(self.nth(operands, 1)?)?;
                let (mut source, mut ignore) = (NONE, NONE);
                if let Some(operand) = operands.get(3) {
                    match self.source(operand, B32)? {
                        Reg::R32(n) => source = n,
                        Reg::Pred(n) => ignore = n,
                        Reg::R64(_) => return Err(self.error("cache policies are not interpreted")),
                    }
                }
                if operands.len() > 4 {
                    return Err(self.error("cache policies are not interpreted"));
                }
                let copy = Copy {
                    size: size as u8,
                    to: (to.0, to.1),
                    from: (from.0, from.1),
                    source,
                    ignore,
                };
                self.emit(Op::CopyAsync(Box::new(copy)));
            }
            _ => return Err(self.error("not interpreted")),
        }
        Ok(())
    }
}
