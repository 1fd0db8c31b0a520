//! The 32 lanes of a warp, and functions of all lanes at once.

/// A register of up to 32 bits, narrower ones with zeros above.
pub(crate) type L32 = [u32; 32];
/// A register of 64 bits.
pub(crate) type L64 = [u64; 32];

/// All lanes.
pub(crate) const FULL: u32 = u32::MAX;

/// The bit of each lane.
pub(crate) const BIT: L32 = {
    let mut out = [0; 32];
    let mut lane = 0;
    while lane < 32 {
        out[lane] = 1 << lane;
        lane += 1;
    }
    out
};

/// The lanes of a mask, from the lowest.
pub(crate) fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (lane < 32).then_some(lane as usize)
    })
}

/// An operation of every lane: a function of the widths that its operands have. Pure: it is computed for lanes that do not execute,
/// too, and the result left out there.
#[derive(Clone, Copy)]
pub(crate) enum Func {
    A1(fn(&L32) -> L32),
    A2(fn(&L32, &L32) -> L32),
    A3(fn(&L32, &L32, &L32) -> L32),
    A4(fn(&L32, &L32, &L32, &L32) -> L32),
    B1(fn(&L64) -> L64),
    B2(fn(&L64, &L64) -> L64),
    B3(fn(&L64, &L64, &L64) -> L64),
    /// 32 → 64.
    Widen(fn(&L32) -> L64),
    /// 64 → 32.
    Narrow(fn(&L64) -> L32),
    /// 32, 32 → 64.
    Wide2(fn(&L32, &L32) -> L64),
    /// 32, 32, 64 → 64.
    Wide3(fn(&L32, &L32, &L64) -> L64),
    /// 64, 32 → 64.
    Shift(fn(&L64, &L32) -> L64),
    /// 64, 32, 32 → 64.
    Field(fn(&L64, &L32, &L32) -> L64),
    /// 64, 64, 32, 32 → 64.
    Insert(fn(&L64, &L64, &L32, &L32) -> L64),
    /// 32, 32 → predicate.
    Test32(fn(&L32, &L32) -> u32),
    /// 64, 64 → predicate.
    Test64(fn(&L64, &L64) -> u32),
}

/// A function of one lane as a function of all; `m!(A2: |a: u32, b: u32| -> u32 { … })`.
macro_rules! m {
    ($kind:ident: |$($arg:ident: $from:ty),+| -> $to:ty { $($body:tt)+ }) => {{
        fn lanes($($arg: &[$from; 32]),+) -> [$to; 32] {
            let mut out = [0; 32];
            for lane in 0..32 {
                $(let $arg: $from = $arg[lane];)+
                out[lane] = { $($body)+ };
            }
            out
        }
        $crate::lanes::Func::$kind(lanes)
    }};
}
pub(crate) use m;

/// A test of one lane as a function of all.
macro_rules! test {
    ($kind:ident, $from:ty: |$a:ident, $b:ident| $body:expr) => {{
        // ordered and unordered comparisons differ where a float is NaN
        #[allow(
            clippy::neg_cmp_op_on_partial_ord,
            clippy::nonminimal_bool,
            clippy::double_comparisons
        )]
        #[allow(clippy::eq_op, clippy::redundant_closure_call)]
        fn lanes($a: &[$from; 32], $b: &[$from; 32]) -> u32 {
            let mut out = 0;
            for lane in 0..32 {
                let ($a, $b): ($from, $from) = ($a[lane], $b[lane]);
                out |= if $body { $crate::lanes::BIT[lane] } else { 0 };
            }
            out
        }
        $crate::lanes::Func::$kind(lanes)
    }};
}
pub(crate) use test;

/// The comparison of a name on two values that a conversion makes; floats' unordered forms and integers' unsigned names included.
macro_rules! compare {
    ($name:expr, $kind:ident, $from:ty, $convert:expr) => {
        match $name {
            "eq" => Some(test!($kind, $from: |a, b| $convert(a) == $convert(b))),
            "ne" => Some(test!($kind, $from: |a, b| { let (a, b) = ($convert(a), $convert(b)); a < b || a > b })),
            "lt" | "lo" => Some(test!($kind, $from: |a, b| $convert(a) < $convert(b))),
            "le" | "ls" => Some(test!($kind, $from: |a, b| $convert(a) <= $convert(b))),
            "gt" | "hi" => Some(test!($kind, $from: |a, b| $convert(a) > $convert(b))),
            "ge" | "hs" => Some(test!($kind, $from: |a, b| $convert(a) >= $convert(b))),
            "equ" => Some(test!($kind, $from: |a, b| { let (a, b) = ($convert(a), $convert(b)); !(a < b || a > b) })),
            "neu" => Some(test!($kind, $from: |a, b| $convert(a) != $convert(b))),
            "ltu" => Some(test!($kind, $from: |a, b| !($convert(a) >= $convert(b)))),
            "leu" => Some(test!($kind, $from: |a, b| !($convert(a) > $convert(b)))),
            "gtu" => Some(test!($kind, $from: |a, b| !($convert(a) <= $convert(b)))),
            "geu" => Some(test!($kind, $from: |a, b| !($convert(a) < $convert(b)))),
            "num" => Some(test!($kind, $from: |a, b| { let (a, b) = ($convert(a), $convert(b)); a == a && b == b })),
            "nan" => Some(test!($kind, $from: |a, b| { let (a, b) = ($convert(a), $convert(b)); a != a || b != b })),
            _ => None,
        }
    };
}
pub(crate) use compare;
