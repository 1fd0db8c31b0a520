//! What a PTX text says, before anything is resolved.

/// A state space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    Shared,
    Local,
    Const,
    Param,
}

/// How a type's bits are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Unsigned,
    Signed,
    Bits,
    /// IEEE floats: f16, f32, f64.
    Float,
    /// bf16.
    Brain,
    /// tf32 in a 32-bit register.
    Tensor,
    Predicate,
}

/// A fundamental type; `packed` is two of `bits` in one register of twice the width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Type {
    pub(crate) class: Class,
    pub(crate) bits: u32,
    pub(crate) packed: bool,
}

impl Type {
    /// The type of a name without its dot.
    pub(crate) fn named(name: &str) -> Option<Self> {
        let (class, bits, packed) = match name {
            "pred" => (Class::Predicate, 1, false),
            "u8" => (Class::Unsigned, 8, false),
            "u16" => (Class::Unsigned, 16, false),
            "u32" => (Class::Unsigned, 32, false),
            "u64" => (Class::Unsigned, 64, false),
            "s8" => (Class::Signed, 8, false),
            "s16" => (Class::Signed, 16, false),
            "s32" => (Class::Signed, 32, false),
            "s64" => (Class::Signed, 64, false),
            "b8" => (Class::Bits, 8, false),
            "b16" => (Class::Bits, 16, false),
            "b32" => (Class::Bits, 32, false),
            "b64" => (Class::Bits, 64, false),
            "f16" => (Class::Float, 16, false),
            "f32" => (Class::Float, 32, false),
            "f64" => (Class::Float, 64, false),
            "f16x2" => (Class::Float, 16, true),
            "bf16" => (Class::Brain, 16, false),
            "bf16x2" => (Class::Brain, 16, true),
            "tf32" => (Class::Tensor, 32, false),
            _ => return None,
        };
        Some(Self {
            class,
            bits,
            packed,
        })
    }

    /// Bits of a register that holds it.
    pub(crate) fn width(self) -> u32 {
        if self.packed {
            self.bits * 2
        } else {
            self.bits
        }
    }

    pub(crate) fn is_float(self) -> bool {
        matches!(self.class, Class::Float | Class::Brain | Class::Tensor)
    }

    pub(crate) fn is_signed(self) -> bool {
        self.class == Class::Signed
    }
}

/// A literal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Literal {
    /// An integer's low 64 bits.
    Integer(u64),
    /// `0f…`.
    Single(u32),
    /// `0d…`, and decimal fractions.
    Double(u64),
}

impl Literal {
    pub(crate) fn negated(self) -> Self {
        match self {
            Self::Integer(v) => Self::Integer(v.wrapping_neg()),
            Self::Single(v) => Self::Single(v ^ 1 << 31),
            Self::Double(v) => Self::Double(v ^ 1 << 63),
        }
    }

    /// The bits that a register of a type gets.
    pub(crate) fn bits(self, kind: Type) -> u64 {
        match (self, kind.class, kind.width()) {
            (Self::Integer(v), Class::Float, 32) => u64::from((v as i64 as f32).to_bits()),
            (Self::Integer(v), Class::Float, 64) => (v as i64 as f64).to_bits(),
            (Self::Integer(v), _, _) | (Self::Double(v), _, 64) => v,
            (Self::Single(v), Class::Float, 64) => f64::from(f32::from_bits(v)).to_bits(),
            (Self::Single(v), _, _) => u64::from(v),
            (Self::Double(v), _, _) => u64::from((f64::from_bits(v) as f32).to_bits()),
        }
    }
}

/// An operand as it is written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand {
    Name(String),
    /// A variable's address and an offset.
    Offset(String, i64),
    Literal(Literal),
    /// `{a, b}`.
    Vector(Vec<Operand>),
    /// `[base + offset]`; without a base the offset is the address.
    Address(Option<String>, i64),
    /// `a|b`.
    Pair(Box<Operand>, Box<Operand>),
    /// `!p`.
    Not(Box<Operand>),
    /// `(a, b)` of a call.
    Group(Vec<Operand>),
}

/// An instruction as it is written.
#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    pub(crate) line: u32,
    pub(crate) text: std::sync::Arc<str>,
    /// The predicate and whether it is negated.
    pub(crate) guard: Option<(String, bool)>,
    /// The operation, split at its dots.
    pub(crate) parts: Vec<String>,
    pub(crate) operands: Vec<Operand>,
}

/// A variable or parameter.
#[derive(Clone, Debug)]
pub(crate) struct Variable {
    pub(crate) name: String,
    pub(crate) space: Space,
    pub(crate) align: usize,
    /// Size in bytes, 0 for an array without a length.
    pub(crate) bytes: usize,
    pub(crate) init: Vec<u8>,
    pub(crate) line: u32,
}

/// What stands in a body.
#[derive(Clone, Debug)]
pub(crate) enum Statement {
    Open,
    Close,
    /// A register, or `count` of them numbered from 0 behind the name.
    Register {
        name: String,
        count: Option<u32>,
        kind: Type,
    },
    Variable(Variable),
    Label(String),
    /// `.branchtargets` behind a label.
    Targets(String, Vec<String>),
    Instruction(Instruction),
}

/// A kernel or function.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) entry: bool,
    pub(crate) line: u32,
    pub(crate) returns: Vec<Variable>,
    pub(crate) params: Vec<Variable>,
    pub(crate) max_threads: Option<u32>,
    pub(crate) body: Option<Vec<Statement>>,
}

/// A whole text.
#[derive(Debug, Default)]
pub(crate) struct Text {
    pub(crate) variables: Vec<Variable>,
    pub(crate) functions: Vec<Function>,
}
