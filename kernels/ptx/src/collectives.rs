//! The instructions that a warp's lanes execute together, decoded.

use crate::Error;
use crate::lower::{Lower, TRUE};
use crate::op::{Barrier, BarrierResult, Mma, NONE, Op, Reduce, Reg, Shuffle, Tile, Vote};
use crate::syntax::{Class, Operand, Type};

const B32: Type = Type {
    class: Class::Bits,
    bits: 32,
    packed: false,
};

impl Lower<'_> {
    pub(crate) fn shuffle(&mut self, parts: &[&str], operands: &[Operand]) -> Result<(), Error> {
        let how = match parts {
            ["sync", "up", "b32"] => Shuffle::Up,
            ["sync", "down", "b32"] => Shuffle::Down,
            ["sync", "bfly", "b32"] => Shuffle::Butterfly,
            ["sync", "idx", "b32"] => Shuffle::Index,
            _ => return Err(self.error("not interpreted")),
        };
        let [d, a, b, c, mask] = operands else {
            return Err(self.error("expected five operands"));
        };
        let (d, p) = match d {
            Operand::Pair(d, p) => (self.destination32(d)?, self.destination_predicate(p)?),
            d => (self.destination32(d)?, NONE),
        };
        let s = [
            self.source32(a, B32)?,
            self.source32(b, B32)?,
            self.source32(c, B32)?,
        ];
        let mask = self.source32(mask, B32)?;
        self.emit(Op::Shuffle {
            how,
            d,
            p,
            a: s[0],
            b: s[1],
            c: s[2],
            mask,
        });
        Ok(())
    }

    pub(crate) fn vote(&mut self, parts: &[&str], operands: &[Operand]) -> Result<(), Error> {
        let how = match parts {
            ["sync", "all", "pred"] => Vote::All,
            ["sync", "any", "pred"] => Vote::Any,
            ["sync", "uni", "pred"] => Vote::Uniform,
            ["sync", "ballot", "b32"] => Vote::Ballot,
            _ => return Err(self.error("not interpreted")),
        };
        let [d, p, mask] = operands else {
            return Err(self.error("expected three operands"));
        };
        let d = match how {
            Vote::Ballot => Reg::R32(self.destination32(d)?),
            _ => Reg::Pred(self.destination_predicate(d)?),
        };
        let (p, negated) = self.predicate(p)?;
        let mask = self.source32(mask, B32)?;
        self.emit(Op::Vote {
            how,
            d,
            p,
            negated,
            mask,
        });
        Ok(())
    }

    pub(crate) fn matching(&mut self, parts: &[&str], operands: &[Operand]) -> Result<(), Error> {
        let (all, kind) = match parts {
            ["any", "sync", kind] => (false, Type::named(kind)),
            ["all", "sync", kind] => (true, Type::named(kind)),
            _ => (false, None),
        };
        let (Some(kind), [d, a, mask]) = (kind, operands) else {
            return Err(self.error("not interpreted"));
        };
        let (d, p) = match d {
            Operand::Pair(d, p) => (self.destination32(d)?, self.destination_predicate(p)?),
            d => (self.destination32(d)?, NONE),
        };
        let (a, mask) = (self.source(a, kind)?, self.source32(mask, B32)?);
        self.emit(Op::Match { all, d, p, a, mask });
        Ok(())
    }

    pub(crate) fn redux(&mut self, parts: &[&str], operands: &[Operand]) -> Result<(), Error> {
        let how = match parts {
            ["sync", "add", "u32" | "s32"] => Reduce::Add,
            ["sync", "min", "s32"] => Reduce::Min(true),
            ["sync", "min", "u32"] => Reduce::Min(false),
            ["sync", "max", "s32"] => Reduce::Max(true),
            ["sync", "max", "u32"] => Reduce::Max(false),
            ["sync", "and", "b32"] => Reduce::And,
            ["sync", "or", "b32"] => Reduce::Or,
            ["sync", "xor", "b32"] => Reduce::Xor,
            _ => return Err(self.error("not interpreted")),
        };
        let [d, a, mask] = operands else {
            return Err(self.error("expected three operands"));
        };
        let (a, mask) = (self.source32(a, B32)?, self.source32(mask, B32)?);
        let d = self.destination32(d)?;
        self.emit(Op::Redux { how, d, a, mask });
        Ok(())
    }

    pub(crate) fn barrier(&mut self, parts: &[&str], operands: &[Operand]) -> Result<(), Error> {
        let parts: Vec<&str> = parts
            .iter()
            .copied()
            .filter(|p| !matches!(*p, "aligned" | "cta"))
            .collect();
        if parts == ["warp", "sync"] {
            let mask = self.source32(self.nth(operands, 0)?, B32)?;
            self.emit(Op::WarpSync(mask));
            return Ok(());
        }
        let result = match parts[..] {
            ["sync" | "arrive"] => BarrierResult::Nothing,
            ["red", "popc", "u32"] => BarrierResult::Count,
            ["red", "and", "pred"] => BarrierResult::And,
            ["red", "or", "pred"] => BarrierResult::Or,
            _ => return Err(self.error("not interpreted")),
        };
        let (mut rest, mut d, mut p) = (operands, None, (TRUE, false));
        if result != BarrierResult::Nothing {
            let (Some((first, middle)), Some(last)) = (operands.split_first(), operands.last())
            else {
                return Err(self.error("too few operands"));
            };
            d = Some(match result {
                BarrierResult::Count => Reg::R32(self.destination32(first)?),
                _ => Reg::Pred(self.destination_predicate(first)?),
            });
            p = self.predicate(last)?;
            rest = &middle[..middle.len() - 1];
        }
        let id = self.source32(self.nth(rest, 0)?, B32)?;
        let count = match rest.get(1) {
            Some(count) => self.source32(count, B32)?,
            None => NONE,
        };
        let arrive = parts[0] == "arrive";
        self.emit(Op::Barrier(Box::new(Barrier {
            id,
            count,
            arrive,
            result,
            d,
            p,
        })));
        Ok(())
    }

    pub(crate) fn mma(&mut self, parts: &[&str], operands: &[Operand]) -> Result<(), Error> {
        let (tile, halves) = match parts {
            ["sync", "aligned", shape, "row", "col", d, a, b, c] if a == b && c == d => {
                match (*shape, *d, *a) {
                    ("m16n8k16", "f32", "bf16") => (Tile::Brain16, false),
                    ("m16n8k16", "f32", "f16") => (Tile::Half16, false),
                    ("m16n8k16", "f16", "f16") => (Tile::Half16, true),
                    ("m16n8k8", "f32", "bf16") => (Tile::Brain8, false),
                    ("m16n8k8", "f32", "f16") => (Tile::Half8, false),
                    ("m16n8k8", "f16", "f16") => (Tile::Half8, true),
                    ("m16n8k8", "f32", "tf32") => (Tile::Tensor8, false),
                    ("m16n8k4", "f32", "tf32") => (Tile::Tensor4, false),
                    _ => {
                        return Err(
                            self.error("a product of this shape and type is not interpreted")
                        );
                    }
                }
            }
            _ => return Err(self.error("a product of this shape and type is not interpreted")),
        };
        let (na, nb) = match tile {
            Tile::Brain16 | Tile::Half16 | Tile::Tensor8 => (4, 2),
            Tile::Brain8 | Tile::Half8 | Tile::Tensor4 => (2, 1),
        };
        let nc = if halves { 2 } else { 4 };
        let d = self.results(self.nth(operands, 0)?, nc)?;
        let a = self.fragments(self.nth(operands, 1)?, na)?;
        let b = self.fragments(self.nth(operands, 2)?, nb)?;
        let c = self.fragments(self.nth(operands, 3)?, nc)?;
        self.emit(Op::Mma(Box::new(Mma {
            tile,
            halves,
            d,
            a,
            b: [b[0], b[1]],
            c,
        })));
        Ok(())
    }

    pub(crate) fn fragments(&mut self, operand: &Operand, count: usize) -> Result<[u32; 4], Error> {
        let list = match operand {
            Operand::Vector(list) => list.as_slice(),
            other => std::slice::from_ref(other),
        };
        if list.len() != count {
            return Err(self.error(format!("expected a vector of {count} registers")));
        }
        let kind = Type {
            class: Class::Float,
            bits: 32,
            packed: false,
        };
        let mut out = [0; 4];
        for (reg, operand) in out.iter_mut().zip(list) {
            *reg = self.source32(operand, kind)?;
        }
        Ok(out)
    }

    pub(crate) fn results(&mut self, operand: &Operand, count: usize) -> Result<[u32; 4], Error> {
        let list = match operand {
            Operand::Vector(list) => list.as_slice(),
            other => std::slice::from_ref(other),
        };
        if list.len() != count {
            return Err(self.error(format!("expected a vector of {count} registers")));
        }
        let mut out = [0; 4];
        for (reg, operand) in out.iter_mut().zip(list) {
            *reg = self.destination32(operand)?;
        }
        Ok(out)
    }

    pub(crate) fn load_matrix(
        &mut self,
        parts: &[&str],
        operands: &[Operand],
    ) -> Result<(), Error> {
        let ["sync", "aligned", "m8n8", count, rest @ ..] = parts else {
            return Err(self.error("not interpreted"));
        };
        let count = match *count {
            "x1" => 1,
            "x2" => 2,
            "x4" => 4,
            _ => return Err(self.error("not interpreted")),
        };
        let (transposed, rest) = match rest {
            ["trans", rest @ ..] => (true, rest),
            rest => (false, rest),
        };
        if !matches!(rest, ["shared" | "shared::cta", "b16"]) {
            return Err(self.error("not interpreted"));
        }
        let d = self.results(self.nth(operands, 0)?, count)?;
        let (base, offset, _) = self.address(self.nth(operands, 1)?)?;
        self.emit(Op::LoadMatrix {
            count: count as u8,
            transposed,
            d,
            base,
            offset,
        });
        Ok(())
    }
}
