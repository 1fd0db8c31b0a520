//! The noise of stochastic samplers: a Brownian motion over the noise levels of a run, which a seed alone decides, in whatever steps it is
//! asked for (torchsde 0.2.6 `BrownianTree`; k-diffusion `BrownianTreeNoiseSampler`).
//!
//! An interval is halved until a time that is asked for is an end. Each interval has a random number seed of its own, and its left half's
//! increment is the mean given the whole's, plus noise.

use super::noise::Generator;

/// A Brownian motion, one an image.
#[derive(Debug, Clone)]
pub struct BrownianTree {
    /// Gives generators of the same kind for other seeds.
    generator: Generator,
    whole: Interval,
    increment: Vec<f32>,
}

/// An interval with its place among the halves of the whole.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Interval {
    start: f64,
    end: f64,
    /// Among the intervals of the same depth, from the left.
    key: u64,
    depth: u32,
}

/// Halvings after which an interval is as short as times are told apart.
const DEEPEST: u32 = 60;

/// Times are told apart to six decimals.
fn rounded(time: f64) -> f64 {
    // as Python rounds: by the decimal digits of the exact value
    format!("{time:.6}").parse().unwrap_or(time)
}

impl BrownianTree {
    /// The motion between two noise levels, each of `n` elements, for the seed of `generator`, from which nothing is drawn.
    pub fn new(generator: &Generator, (low, high): (f64, f64), n: usize) -> Self {
        let (low, high) = (low.min(high), low.max(high));
        let seed = seeds(generator.seed(), None);
        let scale = (high - low).sqrt() as f32;
        let mut increment = generator.reseeded(seed).normal(n);
        for x in &mut increment {
            *x *= scale;
        }
        Self {
            generator: generator.clone(),
            whole: Interval {
                start: rounded(low),
                end: rounded(high),
                key: 0,
                depth: 0,
            },
            increment,
        }
    }

    /// Standard normal noise for the step from one noise level to another.
    pub fn noise(&self, from: f64, to: f64) -> Vec<f32> {
        let (low, high) = (from.min(to), from.max(to));
        let inside = |time: f64| rounded(time.clamp(self.whole.start, self.whole.end));
        let mut sum = vec![0.0; self.increment.len()];
        self.add(
            &self.whole,
            &self.increment,
            (inside(low), inside(high)),
            &mut sum,
        );
        // the motion goes from little noise to much
        let sign = if from > to { -1.0 } else { 1.0 };
        let length = (to as f32 - from as f32).abs().sqrt();
        for x in &mut sum {
            *x = *x * sign / length;
        }
        sum
    }

    /// Adds the increment between two times within `interval`, whose own is `increment`.
    fn add(&self, interval: &Interval, increment: &[f32], (from, to): (f64, f64), sum: &mut [f32]) {
        if from >= to {
            return;
        }
        if (from, to) == (interval.start, interval.end) || interval.depth > DEEPEST {
            for (sum, x) in sum.iter_mut().zip(increment) {
                *sum += x;
            }
            return;
        }
        let (left, right) = interval.halves();
        let (before, after) = self.split(interval, left.end, increment);
        self.add(&left, &before, (from, to.min(left.end)), sum);
        self.add(&right, &after, (from.max(left.end), to), sum);
    }

    /// The increments of an interval's halves.
    fn split(&self, interval: &Interval, middle: f64, increment: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (left, right) = (middle - interval.start, interval.end - middle);
        let share = 1.0 / (interval.end - interval.start);
        let deviation = (left * right * share).max(0.0).sqrt() as f32;
        let (left, share) = (left as f32, share as f32);
        let seed = seeds(
            self.generator.seed(),
            Some((interval.key, u64::from(interval.depth))),
        );
        let noise = self.generator.reseeded(seed).normal(increment.len());
        let value = |(w, x): (&f32, &f32)| left * w * share + deviation * x;
        let before: Vec<f32> = increment.iter().zip(&noise).map(value).collect();
        let after = increment.iter().zip(&before).map(|(w, l)| w - l).collect();
        (before, after)
    }
}

impl Interval {
    fn halves(&self) -> (Self, Self) {
        let middle = rounded(0.5 * (self.end + self.start));
        let half = |(start, end), key| Self {
            start,
            end,
            key,
            depth: self.depth + 1,
        };
        let key = self.key.wrapping_mul(2);
        (
            half((self.start, middle), key),
            half((middle, self.end), key.wrapping_add(1)),
        )
    }
}

/// Words of the pool that entropy is mixed in.
const POOL: usize = 24;

/// The first word that NumPy's `SeedSequence(entropy, spawn_key=spawn, pool_size=24)` generates (O'Neill's `seed_seq_fe`, numpy
/// `bit_generator.pyx`).
fn seeds(entropy: u64, spawn: Option<(u64, u64)>) -> u64 {
    let mut words = words_of(entropy);
    if let Some((key, depth)) = spawn {
        words.resize(words.len().max(POOL), 0);
        words.extend(words_of(key));
        words.extend(words_of(depth));
    }
    let mut constant = 0x43b0_d7e5u32;
    let mut hash = |value: u32| {
        let value = value ^ constant;
        constant = constant.wrapping_mul(0x931e_8875);
        let value = value.wrapping_mul(constant);
        value ^ (value >> 16)
    };
    let mix = |x: u32, y: u32| {
        let mixed = x
            .wrapping_mul(0xca01_f9dd)
            .wrapping_sub(y.wrapping_mul(0x4973_f715));
        mixed ^ (mixed >> 16)
    };
    let mut pool = [0u32; POOL];
    for (i, slot) in pool.iter_mut().enumerate() {
        *slot = hash(words.get(i).copied().unwrap_or(0));
    }
    for from in 0..POOL {
        for to in (0..POOL).filter(|&to| to != from) {
            pool[to] = mix(pool[to], hash(pool[from]));
        }
    }
    for &word in words.iter().skip(POOL) {
        for slot in &mut pool {
            *slot = mix(*slot, hash(word));
        }
    }
    let first = (pool[0] ^ 0x8b51_f9dd).wrapping_mul(0x8b51_f9ddu32.wrapping_mul(0x58f3_8ded));
    u64::from(first ^ (first >> 16))
}

/// 32 bits each, the low ones first; at least one.
fn words_of(value: u64) -> Vec<u32> {
    match (value as u32, (value >> 32) as u32) {
        (low, 0) => vec![low],
        (low, high) => vec![low, high],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_numpys() {
        // numpy.random.SeedSequence(seed, pool_size=24).generate_state(1), and with spawn_key=(key, depth)
        assert_eq!(seeds(0, None), 4_025_752_534);
        assert_eq!(seeds(1 << 40, None), 1_023_095_911);
        assert_eq!(seeds(42, Some((5, 3))), 3_084_123_560);
    }

    #[test]
    fn steps_add_up() {
        let tree = BrownianTree::new(&Generator::torch(3), (0.03, 14.6), 16);
        let step = |from: f64, to: f64| -> Vec<f32> {
            let scale = (from - to).sqrt() as f32;
            tree.noise(from, to).iter().map(|x| x * scale).collect()
        };
        let (a, b, whole) = (step(9.0, 4.0), step(4.0, 0.5), step(9.0, 0.5));
        for ((a, b), whole) in a.iter().zip(&b).zip(&whole) {
            assert!((a + b - whole).abs() < 1e-5);
        }
    }
}
