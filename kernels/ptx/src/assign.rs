//! Which registers are read before they are written.

use crate::lower::{Code, FALSE, TRUE};
use crate::op::{Base, NONE, Op, Reg};

fn base(base: Base, f: &mut dyn FnMut(Reg, bool)) {
    match base {
        Base::None => {}
        Base::R32(n) => f(Reg::R32(n), false),
        Base::R64(n) => f(Reg::R64(n), false),
    }
}

/// Calls `f` with every register of an operation: reads (`false`) first, then writes.
fn registers(op: &Op, f: &mut dyn FnMut(Reg, bool)) {
    use Reg::{Pred, R32, R64};
    let mut all = |reads: &[Reg], writes: &[Reg]| {
        reads
            .iter()
            .filter(|r| **r != Pred(NONE) && **r != R32(NONE))
            .for_each(|r| f(*r, false));
        writes
            .iter()
            .filter(|r| **r != Pred(NONE))
            .for_each(|r| f(*r, true));
    };
    match op {
        Op::A1(_, d, a) | Op::Mov32(d, a) => all(&[R32(*a)], &[R32(*d)]),
        Op::A2(_, d, a, b) => all(&[R32(*a), R32(*b)], &[R32(*d)]),
        Op::A3(_, d, a, b, c) | Op::Lop3(_, d, a, b, c) => {
            all(&[R32(*a), R32(*b), R32(*c)], &[R32(*d)])
        }
        Op::A4(_, d, s) => all(&s.map(R32), &[R32(*d)]),
        Op::B1(_, d, a) | Op::Mov64(d, a) | Op::ToSpace(_, d, a) | Op::FromSpace(_, d, a) => {
            all(&[R64(*a)], &[R64(*d)])
        }
        Op::B2(_, d, a, b) => all(&[R64(*a), R64(*b)], &[R64(*d)]),
        Op::B3(_, d, a, b, c) => all(&[R64(*a), R64(*b), R64(*c)], &[R64(*d)]),
        Op::Widen(_, d, a) => all(&[R32(*a)], &[R64(*d)]),
        Op::Narrow(_, d, a) => all(&[R64(*a)], &[R32(*d)]),
        Op::Wide2(_, d, a, b) => all(&[R32(*a), R32(*b)], &[R64(*d)]),
        Op::Wide3(_, d, a, b, c) => all(&[R32(*a), R32(*b), R64(*c)], &[R64(*d)]),
        Op::Shift(_, d, a, b) => all(&[R64(*a), R32(*b)], &[R64(*d)]),
        Op::Field(_, d, a, b, c) => all(&[R64(*a), R32(*b), R32(*c)], &[R64(*d)]),
        Op::Insert(_, d, [a, b, c, e]) => all(&[R64(*a), R64(*b), R32(*c), R32(*e)], &[R64(*d)]),
        Op::Test32(_, p, a, b) => all(&[R32(*a), R32(*b)], &[Pred(*p)]),
        Op::Test64(_, p, a, b) => all(&[R64(*a), R64(*b)], &[Pred(*p)]),
        Op::MovPred(d, a) | Op::NotPred(d, a) => all(&[Pred(*a)], &[Pred(*d)]),
        Op::Logic(_, d, a, b) => all(&[Pred(*a), Pred(*b)], &[Pred(*d)]),
        Op::Combine { p, q, t, c, .. } => all(&[Pred(*t), Pred(*c)], &[Pred(*p), Pred(*q)]),
        Op::Select32(d, a, b, p) => all(&[R32(*a), R32(*b), Pred(*p)], &[R32(*d)]),
        Op::Select64(d, a, b, p) => all(&[R64(*a), R64(*b), Pred(*p)], &[R64(*d)]),
        Op::Convert(parts) => all(&[parts.2], &[parts.1]),
        Op::Carry(c) => {
            all(&[c.a, c.b], &[]);
            if c.product.is_some() {
                all(&[c.c], &[]);
            }
            all(&[], &[c.d]);
        }
        Op::Clock32(d) | Op::ActiveMask(d) => all(&[], &[R32(*d)]),
        Op::Clock64(d) => all(&[], &[R64(*d)]),
        Op::IsSpace(_, p, a) => all(&[R64(*a)], &[Pred(*p)]),
        Op::Load(a) | Op::Store(a) => {
            let load = matches!(op, Op::Load(_));
            base(a.base, f);
            for reg in &a.regs[..usize::from(a.count)] {
                f(if a.width == 64 { R64(*reg) } else { R32(*reg) }, load);
            }
        }
        Op::Atom(a) => {
            base(a.base, f);
            f(a.b, false);
            if let Some(c) = a.c {
                f(c, false);
            }
            if let Some(d) = a.d {
                f(d, true);
            }
        }
        Op::Shuffle {
            d,
            p,
            a,
            b,
            c,
            mask,
            ..
        } => all(
            &[R32(*a), R32(*b), R32(*c), R32(*mask)],
            &[R32(*d), Pred(*p)],
        ),
        Op::Vote { d, p, mask, .. } => all(&[Pred(*p), R32(*mask)], &[*d]),
        Op::Match { d, p, a, mask, .. } => all(&[*a, R32(*mask)], &[R32(*d), Pred(*p)]),
        Op::Redux { d, a, mask, .. } => all(&[R32(*a), R32(*mask)], &[R32(*d)]),
        Op::WarpSync(mask) => all(&[R32(*mask)], &[]),
        Op::Barrier(b) => all(
            &[R32(b.id), R32(b.count), Pred(b.p.0)],
            &b.d.map_or(vec![], |d| vec![d]),
        ),
        Op::Mma(m) => {
            let (a, b, c) = match m.tile {
                crate::op::Tile::Brain16 | crate::op::Tile::Half16 | crate::op::Tile::Tensor8 => {
                    (4, 2, 4)
                }
                _ => (2, 1, 4),
            };
            let c = if m.halves { 2 } else { c };
            all(&m.a.map(R32)[..a], &[]);
            all(&m.b.map(R32)[..b], &[]);
            all(&m.c.map(R32)[..c], &m.d.map(R32)[..c]);
        }
        Op::LoadMatrix {
            count, d, base: b, ..
        } => {
            base(*b, f);
            d[..usize::from(*count)]
                .iter()
                .for_each(|d| f(R32(*d), true));
        }
        Op::CopyAsync(c) => {
            base(c.to.0, f);
            base(c.from.0, f);
            if c.source != NONE {
                f(R32(c.source), false);
            }
            if c.ignore != NONE {
                f(Pred(c.ignore), false);
            }
        }
        Op::BranchTable(index, _) => all(&[R32(*index)], &[]),
        Op::Nop | Op::Commit | Op::Wait(_) | Op::WaitAll | Op::Branch(_) | Op::Exit | Op::Trap => {}
    }
}

/// A set of registers of all banks.
#[derive(Clone, PartialEq)]
struct Set(Vec<u64>);

impl Set {
    fn has(&self, at: usize) -> bool {
        self.0[at / 64] >> (at % 64) & 1 == 1
    }

    fn add(&mut self, at: usize) {
        self.0[at / 64] |= 1 << (at % 64);
    }
}

/// What is read before it is written.
pub(crate) struct Unset {
    /// Operations that read what no way to them writes.
    pub(crate) never: Option<(usize, Reg)>,
    /// Registers that some way to a read does not write.
    pub(crate) sometimes: Vec<Reg>,
}

/// Looks for reads before writes over all ways through the code.
pub(crate) fn unset(code: &Code) -> Unset {
    let [n32, n64, np] = code.registers.map(|n| n as usize);
    let at = |reg: Reg| match reg {
        Reg::R32(n) => n as usize,
        Reg::R64(n) => n32 + n as usize,
        Reg::Pred(n) => n32 + n64 + n as usize,
    };
    let words = (n32 + n64 + np).div_ceil(64).max(1);
    let mut first = Set(vec![0; words]);
    code.const32
        .iter()
        .for_each(|(r, _)| first.add(at(Reg::R32(*r))));
    code.const64
        .iter()
        .for_each(|(r, _)| first.add(at(Reg::R64(*r))));
    code.specials
        .iter()
        .for_each(|(r, _)| first.add(at(Reg::R32(*r))));
    first.add(at(Reg::Pred(FALSE)));
    first.add(at(Reg::Pred(TRUE)));
    let (starts, next) = blocks(code);
    // what is written on some way, and on every way, to each block
    let mut may = vec![None::<Set>; starts.len()];
    let mut must = vec![None::<Set>; starts.len()];
    (may[0], must[0]) = (Some(first.clone()), Some(first));
    let mut work = vec![0];
    while let Some(block) = work.pop() {
        let (Some(mut some), Some(mut every)) = (may[block].clone(), must[block].clone()) else {
            continue;
        };
        for inst in &code.insts[range(&starts, block, code.insts.len())] {
            registers(&inst.op, &mut |reg, write| {
                if write {
                    some.add(at(reg));
                    if inst.guard == NONE {
                        every.add(at(reg));
                    }
                }
            });
        }
        for to in &next[block] {
            let joined_may = may[*to].as_ref().map_or(some.clone(), |m| {
                Set(m.0.iter().zip(&some.0).map(|(a, b)| a | b).collect())
            });
            let joined_must = must[*to].as_ref().map_or(every.clone(), |m| {
                Set(m.0.iter().zip(&every.0).map(|(a, b)| a & b).collect())
            });
            if may[*to].as_ref() != Some(&joined_may) || must[*to].as_ref() != Some(&joined_must) {
                (may[*to], must[*to]) = (Some(joined_may), Some(joined_must));
                work.push(*to);
            }
        }
    }
    let mut out = Unset {
        never: None,
        sometimes: Vec::new(),
    };
    for block in 0..starts.len() {
        let (Some(mut some), Some(mut every)) = (may[block].clone(), must[block].clone()) else {
            continue;
        };
        for i in range(&starts, block, code.insts.len()) {
            let inst = &code.insts[i];
            let mut seen = |reg: Reg, write: bool| {
                if write {
                    some.add(at(reg));
                    if inst.guard == NONE {
                        every.add(at(reg));
                    }
                    return;
                }
                if !some.has(at(reg)) && out.never.is_none() {
                    out.never = Some((i, reg));
                }
                if !every.has(at(reg)) && !out.sometimes.contains(&reg) {
                    out.sometimes.push(reg);
                }
            };
            if inst.guard != NONE {
                seen(Reg::Pred(inst.guard >> 1), false);
            }
            registers(&inst.op, &mut seen);
        }
    }
    out
}

fn range(starts: &[usize], block: usize, end: usize) -> std::ops::Range<usize> {
    starts[block]..starts.get(block + 1).copied().unwrap_or(end)
}

/// Where straight pieces of code begin, and which follow which.
fn blocks(code: &Code) -> (Vec<usize>, Vec<Vec<usize>>) {
    let mut starts = vec![0];
    for (i, inst) in code.insts.iter().enumerate() {
        match &inst.op {
            Op::Branch(target) => starts.extend([*target as usize, i + 1]),
            Op::BranchTable(_, targets) => {
                starts.extend(targets.iter().map(|t| *t as usize));
                starts.push(i + 1);
            }
            Op::Exit => starts.push(i + 1),
            _ => {}
        }
    }
    starts.retain(|s| *s < code.insts.len());
    starts.sort_unstable();
    starts.dedup();
    let of = |at: usize| starts.partition_point(|s| *s <= at) - 1;
    let mut next = vec![Vec::new(); starts.len()];
    for (block, next) in next.iter_mut().enumerate() {
        let last = range(&starts, block, code.insts.len()).end - 1;
        let inst = &code.insts[last];
        let mut to = |at: usize| {
            if at < code.insts.len() {
                next.push(of(at));
            }
        };
        match &inst.op {
            Op::Branch(target) => to(*target as usize),
            Op::BranchTable(_, targets) => targets.iter().for_each(|t| to(*t as usize)),
            _ => {}
        }
        if inst.guard != NONE || !matches!(inst.op, Op::Branch(_) | Op::BranchTable(..) | Op::Exit)
        {
            to(last + 1);
        }
    }
    (starts, next)
}
