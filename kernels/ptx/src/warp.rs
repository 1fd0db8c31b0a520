//! 32 lanes that execute together.
//!
//! Lanes whose program counters differ wait in `pcs`; of all groups the one with the smallest counter runs, so that lanes that took
//! different ways meet again where the ways do.

use crate::convert::convert;
use crate::copies::Copies;
use crate::error::{Kind, Trap, trap};
use crate::exec::Machine;
use crate::lanes::{BIT, FULL, L32, L64, lanes};
use crate::lower::{Code, FALSE, SPECIALS, TRUE};
use crate::op::{Base, NONE, Op, Reg};

/// Why a warp stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// All lanes have ended.
    Done,
    /// It is at the barrier of the operation of this number, which is not yet passed.
    Barrier(u32),
}

/// The state of a warp.
pub(crate) struct Warp {
    pub(crate) r32: Vec<L32>,
    pub(crate) r64: Vec<L64>,
    pub(crate) preds: Vec<u32>,
    /// Local memory, lane after lane.
    pub(crate) local: Vec<u32>,
    /// Bytes of one lane's local memory, and what of them is in use.
    pub(crate) local_bytes: usize,
    pub(crate) local_used: usize,
    pub(crate) pc: u32,
    /// Lanes that execute at `pc`.
    pub(crate) mask: u32,
    /// Lanes that have not ended.
    pub(crate) live: u32,
    born: u32,
    /// Lanes that wait elsewhere, and the least of their counters.
    waiting: u32,
    least: u32,
    pcs: [u32; 32],
    pub(crate) carry: u32,
    pub(crate) index: usize,
    pub(crate) copies: Copies,
    /// Operations of lanes.
    pub(crate) count: u64,
}

/// Writes the lanes of a mask.
#[inline(always)]
pub(crate) fn put<T: Copy>(to: &mut [T; 32], value: &[T; 32], mask: u32) {
    if mask == FULL {
        *to = *value;
    } else {
        for lane in 0..32 {
            to[lane] = if mask & BIT[lane] != 0 {
                value[lane]
            } else {
                to[lane]
            };
        }
    }
}

impl Warp {
    pub(crate) fn new(code: &Code, index: usize) -> Self {
        let [n32, n64, np] = code.registers.map(|n| n as usize);
        let local_bytes = code.local.next_multiple_of(16);
        let mut warp = Self {
            r32: vec![[u32::MAX; 32]; n32],
            r64: vec![[u64::MAX; 32]; n64],
            preds: vec![0; np],
            local: vec![u32::MAX; local_bytes / 4 * 32],
            local_bytes,
            local_used: code.local,
            pc: 0,
            mask: 0,
            live: 0,
            born: 0,
            waiting: 0,
            least: NONE,
            pcs: [0; 32],
            carry: 0,
            index,
            copies: Copies::default(),
            count: 0,
        };
        for (reg, value) in &code.const32 {
            warp.r32[*reg as usize] = [*value; 32];
        }
        for (reg, value) in &code.const64 {
            warp.r64[*reg as usize] = [*value; 32];
        }
        warp.preds[FALSE as usize] = 0;
        warp.preds[TRUE as usize] = FULL;
        warp
    }

    /// Makes it a warp of a new block.
    pub(crate) fn reset(
        &mut self,
        code: &Code,
        block: [u32; 3],
        size: [u32; 3],
        grid: [u32; 3],
        dynamic: u32,
    ) {
        let threads = size[0] * size[1] * size[2];
        let first = self.index as u32 * 32;
        self.live = if threads - first >= 32 {
            FULL
        } else {
            (1 << (threads - first)) - 1
        };
        self.born = self.live;
        (self.mask, self.pc, self.waiting, self.least, self.carry) = (self.live, 0, 0, NONE, 0);
        self.copies.clear();
        for reg in &code.unset {
            match reg {
                Reg::R32(n) => self.r32[*n as usize] = [u32::MAX; 32],
                Reg::R64(n) => self.r64[*n as usize] = [u64::MAX; 32],
                Reg::Pred(n) => self.preds[*n as usize] = 0,
            }
        }
        self.local.fill(u32::MAX);
        for (reg, special) in &code.specials {
            let name = SPECIALS[*special];
            let axis = match name.as_bytes()[name.len() - 1] {
                b'y' => 1,
                b'z' => 2,
                _ => 0,
            };
            for (lane, value) in self.r32[*reg as usize].iter_mut().enumerate() {
                let thread = first + lane as u32;
                let tid = [
                    thread % size[0],
                    thread / size[0] % size[1],
                    thread / size[0] / size[1],
                ];
                let bit = 1_u32 << lane;
                *value = match name.split('.').next().unwrap_or_default() {
                    "%tid" => tid[axis],
                    "%ntid" => size[axis],
                    "%ctaid" => block[axis],
                    "%nctaid" => grid[axis],
                    "%laneid" => lane as u32,
                    "%warpid" => self.index as u32,
                    "%nwarpid" => threads.div_ceil(32),
                    "%nsmid" => 1,
                    "%lanemask_eq" => bit,
                    "%lanemask_le" => bit | (bit - 1),
                    "%lanemask_lt" => bit - 1,
                    "%lanemask_ge" => !(bit - 1),
                    "%lanemask_gt" => !(bit | (bit - 1)),
                    "%dynamic_smem_size" => dynamic,
                    "%total_smem_size" => {
                        (code.shared.next_multiple_of(code.dynamic_align) as u32) + dynamic
                    }
                    _ => 0,
                };
            }
        }
    }

    /// Lanes that the block has given it.
    pub(crate) fn born(&self) -> u32 {
        self.born
    }

    /// Puts the running lanes among those that wait, and takes the group with the smallest counter.
    #[cold]
    fn regroup(&mut self) {
        for lane in lanes(self.mask) {
            self.pcs[lane] = self.pc;
        }
        let all = self.mask | self.waiting;
        let mut least = [NONE; 2];
        for lane in lanes(all) {
            let pc = self.pcs[lane];
            if pc < least[0] {
                least = [pc, least[0]];
            } else if pc > least[0] && pc < least[1] {
                least[1] = pc;
            }
        }
        self.pc = least[0];
        self.mask = lanes(all)
            .filter(|lane| self.pcs[*lane] == least[0])
            .fold(0, |m, lane| m | 1 << lane);
        self.waiting = all & !self.mask;
        self.least = least[1];
    }

    fn branch(&mut self, taken: u32, target: u32) {
        if taken == self.mask {
            self.pc = target;
            return;
        }
        // those that do not take it wait behind it, unless they come first
        for lane in lanes(self.mask & !taken) {
            self.pcs[lane] = self.pc + 1;
        }
        self.waiting |= self.mask & !taken;
        self.mask = taken;
        self.pc = target;
        self.regroup();
    }

    /// Ends lanes. Whether none is left.
    fn end(&mut self, mask: u32) -> Result<bool, Trap> {
        self.copies.none_pending(mask)?;
        self.live &= !mask;
        self.mask &= !mask;
        self.pc += 1;
        if self.mask == 0 {
            if self.waiting == 0 {
                return Ok(true);
            }
            self.regroup();
        }
        Ok(false)
    }

    /// The addresses of all lanes.
    #[inline]
    pub(crate) fn addresses(&self, base: Base, offset: i64) -> L64 {
        let mut out = [offset as u64; 32];
        match base {
            Base::None => {}
            Base::R64(n) => {
                for (out, base) in out.iter_mut().zip(&self.r64[n as usize]) {
                    *out = base.wrapping_add(offset as u64);
                }
            }
            Base::R32(n) => {
                for (out, base) in out.iter_mut().zip(&self.r32[n as usize]) {
                    *out = u64::from(base.wrapping_add(offset as u32));
                }
            }
        }
        out
    }

    /// Runs until all lanes end or wait at a barrier. On a trap `pc` is the operation that did it.
    pub(crate) fn run(&mut self, machine: &mut Machine<'_>) -> Result<Stop, Trap> {
        let code = machine.code;
        loop {
            let inst = &code.insts[self.pc as usize];
            let mut mask = self.mask;
            if inst.guard != NONE {
                let p = self.preds[(inst.guard >> 1) as usize];
                mask &= if inst.guard & 1 == 1 { !p } else { p };
            }
            self.count += u64::from(mask.count_ones());
            if mask != 0 {
                match &inst.op {
                    Op::Branch(target) => {
                        self.branch(mask, *target);
                        if self.pc >= self.least {
                            self.regroup();
                        }
                        continue;
                    }
                    Op::BranchTable(index, targets) => {
                        self.jump(mask, *index, targets)?;
                        continue;
                    }
                    Op::Exit => {
                        if self.end(mask)? {
                            return Ok(Stop::Done);
                        }
                        if self.pc >= self.least {
                            self.regroup();
                        }
                        continue;
                    }
                    Op::Barrier(barrier) => {
                        let at = self.pc;
                        self.enter(mask, barrier.id)?;
                        self.pc += 1;
                        return Ok(Stop::Barrier(at));
                    }
                    op => self.step(op, mask, machine)?,
                }
            }
            self.pc += 1;
            if self.pc >= self.least {
                self.regroup();
            }
        }
    }

    fn jump(&mut self, mask: u32, index: u32, targets: &[u32]) -> Result<(), Trap> {
        let index = self.r32[index as usize];
        for lane in lanes(self.mask) {
            self.pcs[lane] = self.pc + 1;
        }
        for lane in lanes(mask) {
            let Some(target) = targets.get(index[lane] as usize) else {
                return Err(trap(
                    Kind::Bounds,
                    lane as u32,
                    format!("branch {} of a table of {}", index[lane], targets.len()),
                ));
            };
            self.pcs[lane] = *target;
        }
        self.waiting |= self.mask;
        self.mask = 0;
        self.regroup();
        Ok(())
    }

    /// A barrier is entered by all lanes of a warp at once.
    fn enter(&self, mask: u32, id: u32) -> Result<(), Trap> {
        let lane = mask.trailing_zeros();
        if mask != self.live {
            let missing = self.live & !mask;
            return Err(trap(
                Kind::Lanes,
                lane,
                format!("a barrier that lanes {missing:#010x} of the warp do not execute"),
            ));
        }
        let ids = &self.r32[id as usize];
        if lanes(mask).any(|l| ids[l] != ids[lane as usize] || ids[l] > 15) {
            return Err(trap(
                Kind::Barrier,
                lane,
                format!(
                    "a barrier's number is 0 to 15 and the same in all lanes, got {}",
                    ids[lane as usize]
                ),
            ));
        }
        Ok(())
    }

    /// An operation that neither branches nor ends.
    #[inline]
    fn step(&mut self, op: &Op, mask: u32, machine: &mut Machine<'_>) -> Result<(), Trap> {
        macro_rules! a {
            ($n:expr) => {
                &self.r32[*$n as usize]
            };
        }
        macro_rules! b {
            ($n:expr) => {
                &self.r64[*$n as usize]
            };
        }
        macro_rules! to32 {
            ($d:expr, $v:expr) => {{
                let v = $v;
                put(&mut self.r32[*$d as usize], &v, mask)
            }};
        }
        macro_rules! to64 {
            ($d:expr, $v:expr) => {{
                let v = $v;
                put(&mut self.r64[*$d as usize], &v, mask)
            }};
        }
        match op {
            Op::A1(f, d, x) => to32!(d, f(a!(x))),
            Op::A2(f, d, x, y) => to32!(d, f(a!(x), a!(y))),
            Op::A3(f, d, x, y, z) => to32!(d, f(a!(x), a!(y), a!(z))),
            Op::A4(f, d, [x, y, z, w]) => to32!(d, f(a!(x), a!(y), a!(z), a!(w))),
            Op::B1(f, d, x) => to64!(d, f(b!(x))),
            Op::B2(f, d, x, y) => to64!(d, f(b!(x), b!(y))),
            Op::B3(f, d, x, y, z) => to64!(d, f(b!(x), b!(y), b!(z))),
            Op::Widen(f, d, x) => to64!(d, f(a!(x))),
            Op::Narrow(f, d, x) => to32!(d, f(b!(x))),
            Op::Wide2(f, d, x, y) => to64!(d, f(a!(x), a!(y))),
            Op::Wide3(f, d, x, y, z) => to64!(d, f(a!(x), a!(y), b!(z))),
            Op::Shift(f, d, x, y) => to64!(d, f(b!(x), a!(y))),
            Op::Field(f, d, x, y, z) => to64!(d, f(b!(x), a!(y), a!(z))),
            Op::Insert(f, d, [x, y, z, w]) => to64!(d, f(b!(x), b!(y), a!(z), a!(w))),
            Op::Test32(f, p, x, y) => {
                let v = f(a!(x), a!(y));
                self.set(*p, v, mask);
            }
            Op::Test64(f, p, x, y) => {
                let v = f(b!(x), b!(y));
                self.set(*p, v, mask);
            }
            Op::Mov32(d, x) => to32!(d, self.r32[*x as usize]),
            Op::Mov64(d, x) => to64!(d, self.r64[*x as usize]),
            Op::MovPred(d, x) => self.set(*d, self.preds[*x as usize], mask),
            Op::NotPred(d, x) => self.set(*d, !self.preds[*x as usize], mask),
            Op::Logic(how, d, x, y) => self.set(
                *d,
                how.of(self.preds[*x as usize], self.preds[*y as usize]),
                mask,
            ),
            Op::Combine {
                p,
                q,
                t,
                c,
                negated,
                how,
            } => {
                let (t, c) = (self.preds[*t as usize], self.preds[*c as usize]);
                let c = if *negated { !c } else { c };
                self.set(*p, how.of(t, c), mask);
                if *q != NONE {
                    self.set(*q, how.of(!t, c), mask);
                }
            }
            Op::Select32(d, x, y, p) => {
                let mut v = self.r32[*y as usize];
                put(&mut v, a!(x), self.preds[*p as usize]);
                to32!(d, v);
            }
            Op::Select64(d, x, y, p) => {
                let mut v = self.r64[*y as usize];
                put(&mut v, b!(x), self.preds[*p as usize]);
                to64!(d, v);
            }
            Op::Lop3(table, d, x, y, z) => to32!(d, lop3(*table, a!(x), a!(y), a!(z))),
            Op::Load(access) => self.load(access, mask, machine)?,
            Op::Store(access) => self.store(access, mask, machine)?,
            Op::Mma(mma) => {
                self.together(mask, FULL, "mma.sync")?;
                crate::tensor::mma(mma, &mut self.r32);
            }
            Op::LoadMatrix {
                count,
                transposed,
                d,
                base,
                offset,
            } => {
                self.together(mask, FULL, "ldmatrix.sync")?;
                self.load_matrix(*count, *transposed, *d, (*base, *offset), machine)?;
            }
            Op::Shuffle {
                how,
                d,
                p,
                a,
                b,
                c,
                mask: members,
            } => {
                self.members(mask, *members, "shfl.sync")?;
                self.shuffle(*how, [*d, *p, *a, *b, *c], mask);
            }
            Op::ToSpace(space, d, x) => {
                let v = crate::exec::to_space(*space, b!(x), mask)?;
                to64!(d, v);
            }
            Op::FromSpace(space, d, x) => to64!(d, crate::exec::from_space(*space, b!(x))),
            Op::Convert(parts) => {
                let (conversion, d, x) = **parts;
                for lane in lanes(mask) {
                    let value = convert(&conversion, self.get(x, lane));
                    self.put(d, lane, value);
                }
            }
            Op::Nop => {}
            op => self.rare(op, mask, machine)?,
        }
        Ok(())
    }

    #[inline]
    pub(crate) fn set(&mut self, p: u32, value: u32, mask: u32) {
        let p = &mut self.preds[p as usize];
        *p = *p & !mask | value & mask;
    }

    /// One lane of a register.
    pub(crate) fn get(&self, reg: Reg, lane: usize) -> u64 {
        match reg {
            Reg::R32(n) => u64::from(self.r32[n as usize][lane]),
            Reg::R64(n) => self.r64[n as usize][lane],
            Reg::Pred(n) => u64::from(self.preds[n as usize] >> lane & 1),
        }
    }

    pub(crate) fn put(&mut self, reg: Reg, lane: usize, value: u64) {
        match reg {
            Reg::R32(n) => self.r32[n as usize][lane] = value as u32,
            Reg::R64(n) => self.r64[n as usize][lane] = value,
            Reg::Pred(n) => self.set(n, (value as u32 & 1) << lane, 1 << lane),
        }
    }
}

/// Any function of three bits: `table` holds its value at a·4 + b·2 + c.
fn lop3(table: u8, a: &L32, b: &L32, c: &L32) -> L32 {
    let mut out = [0; 32];
    for term in (0..8).filter(|term| table >> term & 1 == 1) {
        let flip = |bit: u32| if term & bit == 0 { u32::MAX } else { 0 };
        let (fa, fb, fc) = (flip(4), flip(2), flip(1));
        for lane in 0..32 {
            out[lane] |= (a[lane] ^ fa) & (b[lane] ^ fb) & (c[lane] ^ fc);
        }
    }
    out
}
