//! Atomic operations, and additions with a carry.

use std::sync::atomic::Ordering::Relaxed;

use crate::error::Trap;
use crate::exec::{Machine, hold, resolve, wide};
use crate::halves::conversions;
use crate::integers::{high32, high64};
use crate::lanes::lanes;
use crate::op::{Atom, Atomic, Carry};
use crate::syntax::{Class, Space, Type};
use crate::warp::Warp;

/// The new value of an atomic operation.
fn result(atom: &Atom, old: u64, b: u64, c: u64) -> u64 {
    let Type {
        class,
        bits,
        packed,
    } = atom.kind;
    let signed = class == Class::Signed;
    let sign = |x: u64| (x as i64) << (64 - bits) >> (64 - bits);
    let keep = |x: u64| {
        if bits == 64 {
            x
        } else {
            x & ((1 << atom.kind.width()) - 1)
        }
    };
    match atom.what {
        Atomic::Add if class == Class::Float && bits == 32 => {
            u64::from((f32::from_bits(old as u32) + f32::from_bits(b as u32)).to_bits())
        }
        Atomic::Add if class == Class::Float && bits == 64 => {
            (f64::from_bits(old) + f64::from_bits(b)).to_bits()
        }
        Atomic::Add | Atomic::Min | Atomic::Max if matches!(class, Class::Float | Class::Brain) => {
            let (up, down) = conversions(class);
            let half = |x: u64, y: u64| {
                let (x, y) = (up(x as u32 & 0xffff), up(y as u32 & 0xffff));
                u64::from(down(match atom.what {
                    Atomic::Add => x + y,
                    Atomic::Min => crate::floats::min(x, y),
                    _ => crate::floats::max(x, y),
                }))
            };
            half(old, b)
                | if packed {
                    half(old >> 16, b >> 16) << 16
                } else {
                    0
                }
        }
        Atomic::Add => keep(old.wrapping_add(b)),
        Atomic::Min if signed => keep(sign(old).min(sign(b)) as u64),
        Atomic::Max if signed => keep(sign(old).max(sign(b)) as u64),
        Atomic::Min => old.min(b),
        Atomic::Max => old.max(b),
        Atomic::And => old & b,
        Atomic::Or => old | b,
        Atomic::Xor => old ^ b,
        Atomic::Exchange => b,
        Atomic::Compare if old == b => c,
        Atomic::Compare => old,
        Atomic::Increment => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        Atomic::Decrement => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
    }
}

impl Warp {
    /// Lanes take their turns from the lowest.
    pub(crate) fn atom(
        &mut self,
        atom: &Atom,
        mask: u32,
        machine: &mut Machine<'_>,
    ) -> Result<(), Trap> {
        let addresses = self.addresses(atom.base, atom.offset);
        for lane in lanes(mask) {
            let b = self.get(atom.b, lane);
            let c = atom.c.map_or(0, |c| self.get(c, lane));
            let size = atom.kind.width() / 8;
            let old = match resolve(atom.space, addresses[lane]) {
                (Space::Shared, address) => {
                    let words = machine.shared.atomic(lane as u32, address, size)?;
                    let (shift, half) = (
                        (address % 4 * 8) as u32,
                        if size == 2 { 0xffff } else { u32::MAX },
                    );
                    let mut old = u64::from(words[0] >> shift & half);
                    if size == 8 {
                        old |= u64::from(words[1]) << 32;
                    }
                    let new = result(atom, old, b, c);
                    words[0] = words[0] & !(half << shift) | (new as u32 & half) << shift;
                    if size == 8 {
                        words[1] = (new >> 32) as u32;
                    }
                    old
                }
                (_, address) => {
                    let (allocation, at) = machine.view.find(lane as u32, address, size, true)?;
                    let words = &allocation.words[at / 4..];
                    if size == 8 {
                        let _held = hold(machine.view.wide);
                        let old = u64::from(words[1].load(Relaxed)) << 32
                            | u64::from(words[0].load(Relaxed));
                        let new = result(atom, old, b, c);
                        words[0].store(new as u32, Relaxed);
                        words[1].store((new >> 32) as u32, Relaxed);
                        old
                    } else {
                        let (shift, half) =
                            (at as u32 % 4 * 8, if size == 2 { 0xffff } else { u32::MAX });
                        let mut word = words[0].load(Relaxed);
                        loop {
                            let old = u64::from(word >> shift & half);
                            let new = word & !(half << shift)
                                | (result(atom, old, b, c) as u32 & half) << shift;
                            match words[0].compare_exchange_weak(word, new, Relaxed, Relaxed) {
                                Ok(_) => break old,
                                Err(now) => word = now,
                            }
                        }
                    }
                }
            };
            if let Some(d) = atom.d {
                self.put(d, lane, old);
            }
        }
        Ok(())
    }

    /// `add.cc` and its family. A subtraction's carry is 1 where it borrows.
    pub(crate) fn carry(&mut self, op: &Carry, mask: u32) {
        let bits = if wide(op.d) { 64 } else { 32 };
        let ones = if bits == 64 {
            u64::MAX
        } else {
            u64::from(u32::MAX)
        };
        for lane in lanes(mask) {
            let (a, b) = (self.get(op.a, lane), self.get(op.b, lane));
            let carry = u128::from(op.from && self.carry >> lane & 1 == 1);
            let (a, b) = match op.product {
                None => (a, b),
                Some(false) => (a.wrapping_mul(b) & ones, self.get(op.c, lane)),
                Some(true) if bits == 64 => (high64(a, b, op.signed), self.get(op.c, lane)),
                Some(true) => (
                    u64::from(high32(a as u32, b as u32, op.signed)),
                    self.get(op.c, lane),
                ),
            };
            let value = if op.subtract {
                u128::from(a)
                    .wrapping_sub(u128::from(b))
                    .wrapping_sub(carry)
            } else {
                u128::from(a) + u128::from(b) + carry
            };
            if op.to {
                self.carry = self.carry & !(1 << lane) | ((value >> bits & 1) as u32) << lane;
            }
            self.put(op.d, lane, value as u64 & ones);
        }
    }
}
