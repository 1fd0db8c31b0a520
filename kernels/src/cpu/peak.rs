//! What the processor's arithmetic gives at most: the yardstick of reports.

use std::time::{Duration, Instant};

use half::bf16;

use super::Level;
use super::aligned::{Aligned, Plain};
use super::micro::{NR, Operand, Segments, Tile};

/// Numbers of a row: a panel stays in the second-level cache, which feeds four vectors of weights to 24 products with ease.
const K: usize = 512;
/// Calls between looks at the clock.
const CALLS: u32 = 100;

/// GFLOP/s of all threads together in products of small blocks that never leave the caches of their core, the best of a few short runs; of bf16
/// numbers, or of f32.
///
/// Nothing larger can be faster by the same instructions. The level must have products of such numbers, else the answer is 0.
pub fn peak_gflops(level: Level, of_bf16: bool) -> f64 {
    if of_bf16 {
        measure::<bf16>(level)
    } else {
        measure::<f32>(level)
    }
}

fn measure<T: Operand + Plain>(level: Level) -> f64 {
    let count = T::rows(level).most;
    let Some(kernel) = T::kernel(level, count, NR) else {
        return 0.0;
    };
    let run = || {
        let some = || {
            // tiles are read a line of a cache at a time
            let mut some = Aligned::zeros(count.max(NR) * K).ok()?;
            some.as_mut_slice().fill(T::from_f32(0.5));
            Some(some)
        };
        let (Some(rows), Some(panel)) = (some(), some()) else {
            return 0.0;
        };
        let mut sums = vec![0f32; count * NR];
        let rows = rows.as_slice().chunks(K).take(count);
        let pointers: Vec<*const T> = rows.map(<[T]>::as_ptr).collect();
        let tile = Tile {
            a: pointers.as_ptr(),
            rows: count,
            segments: &Segments::one(K),
            panel: panel.as_slice().as_ptr(),
            c: sums.as_mut_ptr(),
            ldc: NR,
            add: false,
        };
        let (begin, mut calls) = (Instant::now(), 0u32);
        while begin.elapsed() < Duration::from_millis(20) {
            for _ in 0..CALLS {
                // SAFETY: `count` rows of K numbers, a panel of K × NR, `count` × NR sums; the level is one that the processor has
                unsafe { kernel(&tile) };
            }
            calls += CALLS;
        }
        std::hint::black_box(&sums);
        let flop = 2.0 * (count * NR * K) as f64 * f64::from(calls);
        flop / begin.elapsed().as_secs_f64() / 1e9
    };
    let all = || rayon::broadcast(|_| run()).iter().sum::<f64>();
    (0..5).map(|_| all()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_has_a_peak() {
        for level in Level::supported() {
            assert!(peak_gflops(level, false) > 0.0);
            assert_eq!(peak_gflops(level, true) > 0.0, level.has_bf16());
        }
    }
}
