//! What a kernel is decoded to: operations on numbered registers.

use crate::convert::Conversion;
use crate::lanes::{L32, L64};
use crate::syntax::Space;

/// No register, no predicate.
pub(crate) const NONE: u32 = u32::MAX;

/// A register's number in its bank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reg {
    /// Up to 32 bits.
    R32(u32),
    R64(u32),
    Pred(u32),
}

/// The register part of an address.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Base {
    None,
    R32(u32),
    R64(u32),
}

/// What a load or store touches: `count` elements of `size` bytes and as many registers of one bank.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub(crate) space: Space,
    pub(crate) size: u8,
    pub(crate) count: u8,
    /// Loads: extend the sign to `width` bits.
    pub(crate) signed: bool,
    /// Bits of the registers: 16, 32 or 64.
    pub(crate) width: u8,
    pub(crate) regs: [u32; 4],
    pub(crate) base: Base,
    pub(crate) offset: i64,
}

/// How two predicates are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Logic {
    And,
    Or,
    Xor,
}

impl Logic {
    pub(crate) fn of(self, a: u32, b: u32) -> u32 {
        match self {
            Self::And => a & b,
            Self::Or => a | b,
            Self::Xor => a ^ b,
        }
    }
}

/// Addition, subtraction or a product with the carry of a 32- or 64-bit operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Carry {
    pub(crate) subtract: bool,
    /// `None` for sums; a product's upper half or not.
    pub(crate) product: Option<bool>,
    pub(crate) signed: bool,
    /// Reads the carry.
    pub(crate) from: bool,
    /// Writes it.
    pub(crate) to: bool,
    pub(crate) d: Reg,
    pub(crate) a: Reg,
    pub(crate) b: Reg,
    /// The addend of a product.
    pub(crate) c: Reg,
}

/// Where `shfl.sync` reads.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

/// What a vote asks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
}

/// What an atomic operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Atomic {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exchange,
    Compare,
    Increment,
    Decrement,
}

/// An atomic operation of one address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Atom {
    pub(crate) what: Atomic,
    pub(crate) kind: crate::syntax::Type,
    pub(crate) space: Space,
    pub(crate) base: Base,
    pub(crate) offset: i64,
    /// The old value; `None` for `red`.
    pub(crate) d: Option<Reg>,
    pub(crate) b: Reg,
    /// The new value of a compare and swap.
    pub(crate) c: Option<Reg>,
}

/// Shape and types of a tensor-core product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tile {
    /// m16n8k16 of bf16.
    Brain16,
    /// m16n8k16 of f16.
    Half16,
    /// m16n8k8 of bf16.
    Brain8,
    /// m16n8k8 of f16.
    Half8,
    /// m16n8k8 of tf32.
    Tensor8,
    /// m16n8k4 of tf32.
    Tensor4,
}

/// `mma.sync`: d = a · b + c.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mma {
    pub(crate) tile: Tile,
    /// Sums in f16 pairs instead of f32.
    pub(crate) halves: bool,
    pub(crate) d: [u32; 4],
    pub(crate) a: [u32; 4],
    pub(crate) b: [u32; 2],
    pub(crate) c: [u32; 4],
}

/// `redux.sync` and `match.sync`, rare: by name.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reduce {
    Add,
    Min(bool),
    Max(bool),
    And,
    Or,
    Xor,
}

/// What a barrier hands back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BarrierResult {
    Nothing,
    Count,
    And,
    Or,
}

/// `bar`/`barrier`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Barrier {
    /// Register of the barrier's number.
    pub(crate) id: u32,
    /// Register of the count of threads, or [`NONE`].
    pub(crate) count: u32,
    /// `arrive`: do not wait.
    pub(crate) arrive: bool,
    pub(crate) result: BarrierResult,
    pub(crate) d: Option<Reg>,
    /// The predicate that is reduced, and whether it is negated.
    pub(crate) p: (u32, bool),
}

/// One operation.
pub(crate) enum Op {
    Nop,
    A1(fn(&L32) -> L32, u32, u32),
    A2(fn(&L32, &L32) -> L32, u32, u32, u32),
    A3(fn(&L32, &L32, &L32) -> L32, u32, u32, u32, u32),
    A4(fn(&L32, &L32, &L32, &L32) -> L32, u32, [u32; 4]),
    B1(fn(&L64) -> L64, u32, u32),
    B2(fn(&L64, &L64) -> L64, u32, u32, u32),
    B3(fn(&L64, &L64, &L64) -> L64, u32, u32, u32, u32),
    Widen(fn(&L32) -> L64, u32, u32),
    Narrow(fn(&L64) -> L32, u32, u32),
    Wide2(fn(&L32, &L32) -> L64, u32, u32, u32),
    Wide3(fn(&L32, &L32, &L64) -> L64, u32, u32, u32, u32),
    Shift(fn(&L64, &L32) -> L64, u32, u32, u32),
    Field(fn(&L64, &L32, &L32) -> L64, u32, u32, u32, u32),
    Insert(fn(&L64, &L64, &L32, &L32) -> L64, u32, [u32; 4]),
    Test32(fn(&L32, &L32) -> u32, u32, u32, u32),
    Test64(fn(&L64, &L64) -> u32, u32, u32, u32),
    Mov32(u32, u32),
    Mov64(u32, u32),
    MovPred(u32, u32),
    NotPred(u32, u32),
    Logic(Logic, u32, u32, u32),
    /// `setp` with a third operand or a second result: p = t ∘ c, q = ¬t ∘ c.
    Combine {
        p: u32,
        q: u32,
        t: u32,
        c: u32,
        negated: bool,
        how: Logic,
    },
    Select32(u32, u32, u32, u32),
    Select64(u32, u32, u32, u32),
    Lop3(u8, u32, u32, u32, u32),
    Convert(Box<(Conversion, Reg, Reg)>),
    Carry(Box<Carry>),
    Clock32(u32),
    Clock64(u32),
    /// `cvta.to` and `cvta` of shared or local: adds or takes away a window.
    ToSpace(Space, u32, u32),
    FromSpace(Space, u32, u32),
    /// `isspacep`.
    IsSpace(Space, u32, u32),
    Load(Access),
    Store(Access),
    Atom(Box<Atom>),
    Shuffle {
        how: Shuffle,
        d: u32,
        p: u32,
        a: u32,
        b: u32,
        c: u32,
        mask: u32,
    },
    Vote {
        how: Vote,
        d: Reg,
        p: u32,
        negated: bool,
        mask: u32,
    },
    ActiveMask(u32),
    /// `match`: the lanes of the same value; with `all`, all or none, and whether so.
    Match {
        all: bool,
        d: u32,
        p: u32,
        a: Reg,
        mask: u32,
    },
    Redux {
        how: Reduce,
        d: u32,
        a: u32,
        mask: u32,
    },
    WarpSync(u32),
    Barrier(Box<Barrier>),
    Mma(Box<Mma>),
    LoadMatrix {
        count: u8,
        transposed: bool,
        d: [u32; 4],
        base: Base,
        offset: i64,
    },
    /// Copies `size` bytes of which register `from` says how many are read, the others 0.
    CopyAsync(Box<Copy>),
    Commit,
    /// Waits until at most this many groups are in flight.
    Wait(u32),
    WaitAll,
    Branch(u32),
    /// `brx.idx`.
    BranchTable(u32, Box<[u32]>),
    Exit,
    Trap,
}

/// `cp.async`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copy {
    pub(crate) size: u8,
    pub(crate) to: (Base, i64),
    pub(crate) from: (Base, i64),
    /// Register of the count of bytes that are read, or [`NONE`] for all.
    pub(crate) source: u32,
    /// A predicate that turns the copy into zeros, or [`NONE`].
    pub(crate) ignore: u32,
}

/// An operation and the predicate that guards it: twice its number, plus 1 where it is negated.
pub(crate) struct Inst {
    pub(crate) op: Op,
    pub(crate) guard: u32,
}

/// Where an operation stands in the text.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) line: u32,
    pub(crate) text: std::sync::Arc<str>,
}
