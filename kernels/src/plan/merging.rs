//! Merging of tokens: which are alike, their means, and the way back.

use rayon::prelude::*;

use super::ir::ValueId;
use super::memory::Memory;
use super::pointwise::at;
use crate::cpu::Level;
use crate::cpu::matching::Matching;
use crate::cpu::simd::Number;
use crate::cpu::view::{Numbers, NumbersMut};
use crate::{Error, Result};

/// Numbers a task.
const CHUNK: usize = 1 << 13;

/// Calls `$f` with the slice behind numbers to write.
macro_rules! by_type {
    ($out:expr, |$name:ident| $f:expr) => {
        match $out {
            NumbersMut::F32($name) => $f,
            NumbersMut::Bf16($name) => $f,
        }
    };
}

/// Adds a row of `x`, which repeats where it is shorter.
fn add_row(x: Numbers<'_>, row: usize, sums: &mut [f32]) {
    fn of<T: Number>(x: &[T], first: usize, sums: &mut [f32]) {
        let row = &x[first % x.len()..][..sums.len()];
        sums.iter_mut()
            .zip(row)
            .for_each(|(sum, x)| *sum += x.f32());
    }
    match x {
        Numbers::F32(x) => of(x, row * sums.len(), sums),
        Numbers::Bf16(x) => of(x, row * sums.len(), sums),
    }
}

/// Writes rows, each of what `row(index, sums)` adds to zeros.
fn write_rows<O: Number>(out: &mut [O], c: usize, row: impl Fn(usize, &mut [f32]) + Sync) {
    out.par_chunks_mut(c.max(1))
        .enumerate()
        .with_min_len((CHUNK / c.max(1)).max(1))
        .for_each_init(
            || vec![0f32; c],
            |sums, (index, out)| {
                sums.fill(0.0);
                row(index, sums);
                out.iter_mut()
                    .zip(sums)
                    .for_each(|(out, sum)| *out = O::of(*sum));
            },
        );
}

impl Memory<'_> {
    /// Places of tokens, one picture after the other.
    pub(super) fn matched(
        &self,
        level: Level,
        (source, choice, sizes): (ValueId, Option<ValueId>, &Matching),
        (id, out): (ValueId, NumbersMut<'_>),
        workspace: &mut [f32],
    ) -> Result<()> {
        let (tokens, channels) = (self.pixels(id), self.channels(source));
        let (NumbersMut::F32(out), x) = (out, self.read(source)) else {
            return Err(Error::Mixed { op: "match" });
        };
        let choice = choice.map(|choice| (self.read(choice), self.channels(choice)));
        for (i, out) in out.chunks_mut(tokens).enumerate() {
            let read = |token, row: &mut [f32]| {
                row.fill(0.0);
                add_row(x, i * tokens + token, row);
            };
            let of_four = |cell: usize| match choice {
                Some((choice, cells)) => at(choice, i * cells + cell) as usize,
                None => 0,
            };
            sizes.run(level, (read, channels), of_four, (workspace, out))?;
        }
        Ok(())
    }

    /// Means of the tokens of each place.
    pub(super) fn merged(
        &self,
        (source, places): (ValueId, ValueId),
        id: ValueId,
        out: NumbersMut<'_>,
    ) -> Result<()> {
        let (tokens, c, count) = (self.pixels(places), self.channels(id), self.pixels(id));
        let (x, places) = (self.read(source), self.read_f32(places)?);
        // of every picture: where a place's tokens begin among all, and the tokens place by place
        let listed: Vec<(Vec<usize>, Vec<usize>)> = places
            .chunks(tokens)
            .map(|places| by_place(places, count))
            .collect();
        by_type!(out, |out| write_rows(out, c, |row, sums| {
            let (picture, place) = (row / count, row % count);
            let (starts, members) = &listed[picture % listed.len()];
            let members = &members[starts[place]..starts[place + 1]];
            for token in members {
                add_row(x, picture * tokens + token, sums);
            }
            if members.len() > 1 {
                let n = members.len() as f32;
                sums.iter_mut().for_each(|sum| *sum /= n);
            }
        }));
        Ok(())
    }

    /// What lies at each token's place, and what else is to be added.
    pub(super) fn unmerged(
        &self,
        (source, places): (ValueId, ValueId),
        residual: Option<ValueId>,
        (id, out): (ValueId, NumbersMut<'_>),
    ) -> Result<()> {
        let (tokens, c, count) = (self.pixels(id), self.channels(id), self.pixels(source));
        let (y, places) = (self.read(source), self.read_f32(places)?);
        let more = residual.map(|residual| self.read(residual));
        by_type!(out, |out| write_rows(out, c, |row, sums| {
            let place = places[row % places.len()] as usize;
            add_row(y, row / tokens * count + place, sums);
            if let Some(more) = more {
                add_row(more, row, sums);
            }
        }));
        Ok(())
    }
}

/// Where each place's tokens begin in a list of all, and that list.
fn by_place(places: &[f32], count: usize) -> (Vec<usize>, Vec<usize>) {
    let mut starts = vec![0; count + 1];
    for &place in places {
        starts[place as usize + 1] += 1;
    }
    for place in 0..count {
        starts[place + 1] += starts[place];
    }
    let (mut next, mut members) = (starts.clone(), vec![0; places.len()]);
    for (token, &place) in places.iter().enumerate() {
        members[next[place as usize]] = token;
        next[place as usize] += 1;
    }
    (starts, members)
}
