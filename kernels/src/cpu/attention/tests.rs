//! Attention against its definition in f64, at every level.

#![allow(clippy::unwrap_used)]

use half::bf16;

use super::super::aligned::Aligned;
use super::*;

/// Numbers like a normal distribution's, of spread 1.
fn numbers<T: Element>(n: usize, seed: u32, scale: f32) -> Vec<T> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(99);
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n)
        .map(|_| T::of((uniform() + uniform() + uniform()) * scale))
        .collect()
}

/// The operands, `[batch, tokens, heads, width]`, and what is made of them in f64.
struct Case<T> {
    shape: Shape,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    bias: Option<Vec<f32>>,
}

impl<T: Element> Case<T> {
    /// Scores spread by `spread`.
    fn new(shape: Shape, spread: f32) -> Self {
        let vector = shape.heads * shape.width;
        Self {
            shape,
            q: numbers(shape.batch * shape.queries * vector, 1, spread),
            k: numbers(shape.kv_batch * shape.keys * vector, 2, 1.0),
            v: numbers(shape.kv_batch * shape.keys * vector, 3, 1.0),
            bias: None,
        }
    }

    fn reference(&self) -> Vec<f64> {
        let Shape {
            batch,
            queries,
            keys,
            heads,
            width,
            causal,
            kv_batch,
            q_batch: _,
        } = self.shape;
        let vector = heads * width;
        let mut out = vec![0.0; batch * queries * vector];
        for (i, out) in out.chunks_exact_mut(width).enumerate() {
            let (b, query, head) = (i / (queries * heads), i / heads % queries, i % heads);
            let at = |key: usize| ((b % kv_batch) * keys + key) * vector + head * width;
            let seen = if causal { keys.min(query + 1) } else { keys };
            let q = &self.q[i * width..][..width];
            let scores: Vec<f64> = (0..seen)
                .map(|key| {
                    let pairs = q.iter().zip(&self.k[at(key)..]);
                    let score: f64 = pairs
                        .map(|(q, k)| f64::from(q.to_f32()) * f64::from(k.to_f32()))
                        .sum();
                    match &self.bias {
                        None => score / (width as f64).sqrt(),
                        Some(bias) => {
                            let place = head * (queries + keys - 1) + keys - 1 + query - key;
                            score + f64::from(bias[place])
                        }
                    }
                })
                .collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
            for (key, score) in scores.iter().enumerate() {
                let weight = (score - largest).exp() / sum;
                for (out, v) in out.iter_mut().zip(&self.v[at(key)..]) {
                    *out += weight * f64::from(v.to_f32());
                }
            }
        }
        out
    }

    fn run(&self, level: Level) -> Vec<T> {
        let Shape { heads, width, .. } = self.shape;
        let stride = heads * width;
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|data| View { data, stride });
        let mut out = vec![T::of(f32::NAN); self.q.len()];
        let mut workspace = workspace::<T>(&self.shape);
        attention(
            level,
            (&self.shape, self.bias.as_deref()),
            (q, k, v),
            &mut out,
            workspace.as_mut_slice(),
        );
        out
    }

    /// ‖out − reference‖ / ‖reference‖.
    fn error(&self, level: Level) -> f64 {
        let (mut off, mut all) = (0.0, 0.0);
        for (out, want) in self.run(level).iter().zip(self.reference()) {
            off += (f64::from(out.to_f32()) - want).powi(2);
            all += want.powi(2);
        }
        // NaN is no error that passes
        if all == 0.0 {
            off.sqrt()
        } else {
            (off / all).sqrt()
        }
    }
}

/// Nothing that a run before left behind is used: the workspace is filled with what is not a number.
fn workspace<T: Element>(shape: &Shape) -> Aligned<u8> {
    let mut workspace =
        Aligned::zeros(shape.workspace_bytes::<T>(rayon::current_num_threads())).unwrap();
    workspace.as_mut_slice().fill(0xff);
    workspace
}

fn check(shape: Shape, spread: f32) {
    for level in Level::supported() {
        let error = Case::<f32>::new(shape, spread).error(level);
        assert!(error <= 1e-6, "{shape:?} f32 {}: {error}", level.name());
        if level.has_bf16() {
            let error = Case::<bf16>::new(shape, spread).error(level);
            // each rounding is off by up to 0.4 %, of a few numbers perhaps all
            let few = shape.batch * shape.queries * shape.heads * shape.width < 300;
            assert!(
                error <= if few { 1e-2 } else { 4e-3 },
                "{shape:?} bf16: {error}"
            );
        }
    }
}

fn shape(batch: usize, (queries, keys): (usize, usize), (heads, width): (usize, usize)) -> Shape {
    Shape {
        batch,
        queries,
        keys,
        heads,
        width,
        causal: false,
        kv_batch: batch,
        q_batch: batch,
    }
}

#[test]
fn equals_the_definition_at_odd_shapes() {
    for (queries, keys) in [
        (1, 1),
        (1, 77),
        (77, 1),
        (3, 2),
        (17, 47),
        (64, 48),
        (65, 49),
        (131, 259),
        (48, 513),
        (33, 1031),
    ] {
        for (heads, width) in [(1, 1), (3, 5), (2, 27), (8, 40), (1, 64), (2, 80)] {
            check(shape(2, (queries, keys), (heads, width)), 1.0);
        }
    }
    check(shape(1, (70, 130), (2, 160)), 1.0);
    check(shape(1, (67, 300), (1, 512)), 1.0);
}

#[test]
fn causal_sees_nothing_later() {
    for tokens in [1, 2, 63, 64, 65, 77, 150, 333] {
        let shape = Shape {
            causal: true,
            ..shape(2, (tokens, tokens), (3, 16))
        };
        check(shape, 1.0);
    }
    for (queries, keys) in [(5, 77), (200, 9), (129, 77)] {
        check(
            Shape {
                causal: true,
                ..shape(1, (queries, keys), (2, 5))
            },
            1.0,
        );
    }
}

#[test]
fn sequences_share_keys() {
    check(
        Shape {
            kv_batch: 1,
            ..shape(4, (70, 77), (2, 40))
        },
        1.0,
    );
    check(
        Shape {
            kv_batch: 2,
            ..shape(6, (9, 11), (2, 7))
        },
        1.0,
    );
}

/// At every level: keys, queries and values as `change` makes them, and errors within what each type allows.
fn check_changed(shape: Shape, change: impl Fn(usize, f32) -> [f32; 2]) {
    fn error<T: Element>(
        level: Level,
        shape: Shape,
        change: impl Fn(usize, f32) -> [f32; 2],
    ) -> f64 {
        let mut case = Case::<T>::new(shape, 1.0);
        for (which, numbers) in [&mut case.q, &mut case.k].into_iter().enumerate() {
            for (i, x) in numbers.iter_mut().enumerate() {
                *x = T::of(change(i, x.to_f32())[which]);
            }
        }
        case.error(level)
    }
    for level in Level::supported() {
        let off = error::<f32>(level, shape, &change);
        assert!(off <= 1e-6, "{shape:?} f32 {}: {off}", level.name());
        if level.has_bf16() {
            let off = error::<bf16>(level, shape, &change);
            assert!(off <= 4e-3, "{shape:?} bf16: {off}");
        }
    }
}

#[test]
fn large_scores_keep_their_order() {
    // spread 3000: weights of one key each, found anywhere. f32 rounds such scores to 1e-4, which the tolerance would not forgive where two
    // are close, hence whole numbers
    check_changed(shape(1, (70, 700), (2, 16)), |_, x| [(x * 30.0).round(); 2]);
}

#[test]
fn references_rise_late_and_often() {
    // scores grow along the keys, by up to 100 000: blocks raise the reference, of some queries only
    for (keys, slope) in [(300, 16.0), (1000, 1.0), (700, 128.0), (4000, 0.125)] {
        check_changed(shape(1, (66, keys), (1, 8)), |i, x| {
            let q = if i % 24 < 16 {
                (i % 5) as f32 / 4.0
            } else {
                -0.5
            };
            [q, ((x * 8.0).round() + (i / 8) as f32 * slope) / 4.0]
        });
    }
}

#[test]
fn biases_take_the_place_of_the_scale() {
    for (shape, causal) in [
        (shape(2, (37, 37), (3, 10)), false),
        (shape(1, (1, 1), (2, 4)), false),
        (shape(1, (5, 300), (2, 16)), false),
        (shape(1, (300, 290), (2, 64)), false),
        (shape(1, (77, 77), (2, 8)), true),
    ] {
        let shape = Shape { causal, ..shape };
        let count = shape.heads * (shape.queries + shape.keys - 1);
        for level in Level::supported() {
            let mut case = Case::<f32>::new(shape, 0.3);
            case.bias = Some(numbers(count, 9, 2.0));
            let error = case.error(level);
            assert!(error <= 1e-6, "{shape:?} {}: {error}", level.name());
            if level.has_bf16() {
                let mut case = Case::<bf16>::new(shape, 0.3);
                case.bias = Some(numbers(count, 9, 2.0));
                let error = case.error(level);
                assert!(error <= 1e-2, "{shape:?} bf16: {error}");
            }
        }
    }
}

#[test]
fn reads_fused_buffers() {
    let shape = shape(2, (37, 37), (3, 10));
    let vector = 30;
    for level in Level::supported() {
        let case = Case::<f32>::new(shape, 1.0);
        let mut fused = Vec::new();
        for i in 0..2 * 37 {
            for part in [&case.q, &case.k, &case.v] {
                fused.extend_from_slice(&part[i * vector..][..vector]);
            }
        }
        let [q, k, v] = [0, 1, 2].map(|part| View {
            data: &fused[part * vector..],
            stride: 3 * vector,
        });
        let mut out = vec![0f32; case.q.len()];
        attention(
            level,
            (&shape, None),
            (q, k, v),
            &mut out,
            workspace::<f32>(&shape).as_mut_slice(),
        );
        assert_eq!(out, case.run(level), "{}", level.name());
    }
}

#[test]
fn nothing_in_nothing_out() {
    for shape in [
        shape(0, (3, 3), (2, 4)),
        shape(1, (0, 3), (2, 4)),
        shape(1, (3, 0), (2, 4)),
        shape(1, (3, 3), (0, 4)),
        shape(1, (3, 3), (2, 0)),
    ] {
        assert!(
            Case::<f32>::new(shape, 1.0)
                .run(Level::Portable)
                .iter()
                .all(|&x| x == 0.0),
            "{shape:?}"
        );
    }
}

#[test]
fn what_is_not_a_number_stays_in_its_row() {
    let shape = shape(1, (70, 100), (1, 8));
    for level in Level::supported() {
        let mut case = Case::<f32>::new(shape, 1.0);
        case.q[3 * 8] = f32::NAN;
        for (i, row) in case.run(level).chunks_exact(8).enumerate() {
            assert!(
                row.iter().all(|x| x.is_nan() == (i == 3)),
                "{} {i}",
                level.name()
            );
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    fn same<T: Element + PartialEq>(level: Level, shape: Shape) -> bool {
        let case = Case::<T>::new(shape, 4.0);
        let with = |threads| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap()
                .install(|| case.run(level))
        };
        let one = with(1);
        with(2) == one && with(5) == one
    }
    let shape = Shape {
        causal: true,
        ..shape(2, (300, 300), (3, 20))
    };
    for level in Level::supported() {
        assert!(same::<f32>(level, shape));
        assert!(!level.has_bf16() || same::<bf16>(level, shape));
    }
}
