//! Where values are while steps run: slices into the arena and the tables.

use half::bf16;

use super::ir::{Program, Rate, Type, ValueId};
use super::place::Places;
use super::run::Tables;
use crate::cpu::aligned::Plain;
use crate::cpu::view::{Numbers, NumbersMut};
use crate::{Error, Result};

/// Numbers behind every value that may be read, and mean nothing: products read channels in pairs.
pub(super) const BEHIND: usize = 4;

/// The places of all values, for the length of a run of steps.
pub(super) struct Memory<'a> {
    /// The arena, and the tables of the timestep's values.
    base: *mut u8,
    tables: *mut f32,
    places: &'a Places,
    layout: &'a Tables,
    program: &'a Program,
    /// The steps make rows for all timesteps; else values of the timestep are the current row.
    whole: bool,
}

impl<'a> Memory<'a> {
    /// # Safety
    /// `base` points to `places.bytes` bytes, page-aligned, and `tables` to the numbers that `layout` describes; nobody else uses either while
    /// this lives.
    pub(super) unsafe fn new(
        (base, tables): (*mut u8, *mut f32),
        places: &'a Places,
        layout: &'a Tables,
        program: &'a Program,
        whole: bool,
    ) -> Self {
        Self {
            base,
            tables,
            places,
            layout,
            program,
            whole,
        }
    }

    pub(super) fn program(&self) -> &'a Program {
        self.program
    }

    /// Entries along the batch.
    pub(super) fn batch(&self, value: ValueId) -> usize {
        match self.program.values[value].rate {
            Rate::Timestep if self.whole => self.layout.timesteps.len(),
            _ => self.program.values[value].batch,
        }
    }

    pub(super) fn channels(&self, value: ValueId) -> usize {
        self.program.values[value].channels
    }

    pub(super) fn pixels(&self, value: ValueId) -> usize {
        self.program.values[value].pixels
    }

    pub(super) fn kind(&self, value: ValueId) -> Type {
        self.program.values[value].kind
    }

    fn len(&self, value: ValueId) -> usize {
        self.batch(value) * self.pixels(value) * self.channels(value)
    }

    /// Where a value begins.
    fn start(&self, value: ValueId) -> *mut u8 {
        let v = &self.program.values[value];
        if v.rate == Rate::Timestep {
            let row = if self.whole {
                0
            } else {
                self.layout.row * v.channels
            };
            return self
                .tables
                .wrapping_add(self.layout.offsets[value] + row)
                .cast();
        }
        self.base.wrapping_add(self.places.offsets[value])
    }

    /// The numbers of a value.
    pub(super) fn read(&self, value: ValueId) -> Numbers<'a> {
        match self.kind(value) {
            Type::F32 => Numbers::F32(&self.operand(value)[..self.len(value)]),
            Type::Bf16 => Numbers::Bf16(&self.operand(value)[..self.len(value)]),
        }
    }

    /// The numbers of a value that is stored in f32.
    pub(super) fn read_f32(&self, value: ValueId) -> Result<&'a [f32]> {
        match self.read(value) {
            Numbers::F32(x) => Ok(x),
            Numbers::Bf16(_) => Err(Error::Mixed { op: "plan" }),
        }
    }

    /// The numbers of a value stored as `T`, and a few behind it.
    ///
    /// # Panics
    /// When it is stored as another type: a mistake of the planner.
    pub(super) fn operand<T: Plain>(&self, value: ValueId) -> &'a [T] {
        assert_eq!(
            self.kind(value).bytes(),
            size_of::<T>(),
            "a value read as another type"
        );
        // SAFETY: the place of a value holds its numbers and as many bytes behind them as BEHIND numbers take (`place`, `prepare_timesteps`), at
        // an aligned offset; all bytes are numbers. Nobody writes here while the slice is used: a step's result lies apart from what it
        // reads (`check_places`), and one step runs at a time
        unsafe { std::slice::from_raw_parts(self.start(value).cast(), self.len(value) + BEHIND) }
    }

    /// The place of a step's result.
    ///
    /// # Safety
    /// No other slice of this value is used while this one is.
    pub(super) unsafe fn write(&self, value: ValueId) -> NumbersMut<'a> {
        let (start, len) = (self.start(value), self.len(value));
        match self.kind(value) {
            Type::F32 => {
                // SAFETY: as in `operand`; that nothing else refers to it is the caller's promise
                let numbers = unsafe { std::slice::from_raw_parts_mut(start.cast::<f32>(), len) };
                NumbersMut::F32(numbers)
            }
            Type::Bf16 => {
                // SAFETY: as above
                let numbers = unsafe { std::slice::from_raw_parts_mut(start.cast::<bf16>(), len) };
                NumbersMut::Bf16(numbers)
            }
        }
    }
}
