//! Products against their definition in f64, at every level.

#![allow(clippy::unwrap_used, clippy::panic)]

use half::bf16;

use super::super::epilogue::PerImage;
use super::super::panels::Panels;
use super::*;
use crate::cpu::micro::Operand;

fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0).to_f32()
        })
        .collect()
}

struct Case {
    batch: usize,
    pictures: usize,
    h: usize,
    w: usize,
    channels: Vec<usize>,
    columns: usize,
    kernel: usize,
    stride: usize,
}

fn run<T: Operand + Weight<Row = T>>(level: Level, case: &Case) -> f64 {
    let Case {
        batch,
        pictures,
        h,
        w,
        ref channels,
        columns,
        kernel,
        stride,
    } = *case;
    let pad = kernel / 2;
    let (oh, ow) = (
        (h + 2 * pad - kernel) / stride + 1,
        (w + 2 * pad - kernel) / stride + 1,
    );
    let taps: Vec<(isize, isize)> = (0..kernel * kernel)
        .map(|t| {
            (
                (t / kernel) as isize - pad as isize,
                (t % kernel) as isize - pad as isize,
            )
        })
        .collect();
    let data: Vec<Vec<T>> = channels
        .iter()
        .enumerate()
        .map(|(i, &c)| {
            numbers(pictures * h * w * c + 1, i as u32)
                .into_iter()
                .map(<T as Operand>::from_f32)
                .collect()
        })
        .collect();
    let weights: Vec<Vec<f32>> = channels
        .iter()
        .enumerate()
        .map(|(i, &c)| numbers(columns * c * kernel * kernel, 77 + i as u32))
        .collect();
    let groups: Vec<Group> = channels
        .iter()
        .map(|&c| Group {
            taps: taps.len(),
            channels: c,
        })
        .collect();
    let panels = Panels::<T>::pack(columns, &groups, |column, g, out| {
        let n = out.len();
        out.copy_from_slice(&weights[g][column * n..][..n]);
    })
    .unwrap();
    let sources: Vec<Source<'_, T>> = channels
        .iter()
        .zip(&data)
        .map(|(&c, data)| Source {
            data,
            pictures,
            h,
            w,
            channels: c,
            pixel_stride: c,
            stride,
            taps: &taps,
            wrap: Wrap::default(),
        })
        .collect();
    let slopes = numbers(columns, 8);
    let (bias, image, more) = (
        numbers(columns, 5),
        numbers(2 * 3 * columns, 6),
        numbers(oh * ow * columns, 7),
    );
    let epilogue = Epilogue {
        bias: Some(&bias),
        image: Some(PerImage {
            values: &image,
            place: (3, 1),
            rows: oh * ow,
        }),
        gate: Some(PerImage {
            values: &image,
            place: (3, 2),
            rows: oh * ow,
        }),
        slopes: Some(&slopes),
        scale: Some(0.7),
        residual: Some(Numbers::F32(&more)),
        ..Epilogue::default()
    };
    let mut out = vec![f32::NAN; batch * oh * ow * columns];
    product(
        level,
        &panels::Source::Packed(&panels),
        (Grid::plain(batch, oh, ow), &sources),
        &epilogue,
        &mut out,
    );
    let mut worst = 0f64;
    for (i, got) in out.iter().enumerate() {
        let (row, o) = (i / columns, i % columns);
        let (b, y, x) = (row / (oh * ow), row % (oh * ow) / ow, row % ow);
        let of_picture = |slot: usize| f64::from(image[(b % 2 * 3 + slot) * columns + o]);
        let mut sum = f64::from(bias[o]) + of_picture(1);
        for (g, &c) in channels.iter().enumerate() {
            for (t, &(dy, dx)) in taps.iter().enumerate() {
                let (yy, xx) = ((y * stride) as isize + dy, (x * stride) as isize + dx);
                if yy < 0 || xx < 0 || yy >= h as isize || xx >= w as isize {
                    continue;
                }
                let at = ((b % pictures * h + yy as usize) * w + xx as usize) * c;
                for k in 0..c {
                    sum += f64::from(data[g][at + k].to_f32())
                        * f64::from(weights[g][(o * c + k) * taps.len() + t]);
                }
            }
        }
        let slope = if sum < 0.0 { f64::from(slopes[o]) } else { 1.0 };
        let want =
            sum * slope * 0.7 * of_picture(2) + f64::from(more[row % (oh * ow) * columns + o]);
        worst = worst.max((f64::from(*got) - want).abs());
    }
    worst
}

/// `(batch, pictures, height, width)`, channels of each source, columns, `(kernel, stride)`.
type Sizes<'a> = (
    (usize, usize, usize, usize),
    &'a [usize],
    usize,
    (usize, usize),
);

fn case(((batch, pictures, h, w), channels, columns, (kernel, stride)): Sizes<'_>) -> Case {
    Case {
        batch,
        pictures,
        h,
        w,
        channels: channels.to_vec(),
        columns,
        kernel,
        stride,
    }
}

/// Runs `check` at every level, for f32 and where there is such a thing for bf16.
fn at_every_level(check: impl Fn(Level, bool)) {
    for level in Level::supported() {
        check(level, false);
        if level.has_bf16() {
            check(level, true);
        }
    }
}

#[test]
fn equals_the_definition_at_odd_shapes() {
    let sizes: [Sizes<'_>; 10] = [
        ((1, 1, 1, 1), &[1], 1, (1, 1)),
        ((2, 1, 5, 7), &[6], 70, (3, 1)),
        ((2, 2, 9, 4), &[5], 33, (3, 2)),
        ((3, 1, 1, 77), &[24, 7], 130, (1, 1)),
        ((2, 2, 33, 40), &[8, 4], 5, (3, 1)),
        ((1, 1, 3, 3), &[64], 1000, (3, 1)),
        // nothing to compute
        ((0, 1, 2, 2), &[8], 16, (3, 1)),
        // long rows, many rows, many columns
        ((1, 1, 1, 3), &[10_241], 3, (1, 1)),
        ((1, 1, 1, 70_001), &[2], 1, (1, 1)),
        ((1, 1, 1, 1), &[3], 20_483, (1, 1)),
    ];
    for sizes in sizes {
        let case = case(sizes);
        // sums of n products of numbers below 1 are off by what their rounding adds up to
        let bound = 1e-4
            * (case.channels.iter().sum::<usize>() as f64 / 64.0)
                .max(1.0)
                .sqrt();
        at_every_level(|level, brain| {
            let error = if brain {
                run::<bf16>(level, &case)
            } else {
                run::<f32>(level, &case)
            };
            assert!(
                error < bound,
                "{} bf16 {brain} {sizes:?}: {error}",
                level.name()
            );
        });
    }
}

/// Bits of a 3×3 convolution by so many threads, whose rows lie evenly in part.
fn bits<T: Operand + Weight<Row = T>>(
    level: Level,
    threads: usize,
    (h, w): (usize, usize),
) -> Vec<u32> {
    let (channels, columns) = (40, 150);
    let group = Group { taps: 9, channels };
    let weights = numbers(columns * channels * 9, 3);
    let panels = Panels::<T>::pack(columns, &[group], |column, _, out| {
        let n = out.len();
        out.copy_from_slice(&weights[column * n..][..n]);
    })
    .unwrap();
    let data: Vec<T> = numbers(2 * h * w * channels, 4)
        .into_iter()
        .map(<T as Operand>::from_f32)
        .collect();
    let taps: Vec<(isize, isize)> = (0..9).map(|t| (t / 3 - 1, t % 3 - 1)).collect();
    let source = Source {
        data: &data,
        pictures: 2,
        h,
        w,
        channels,
        pixel_stride: channels,
        stride: 1,
        taps: &taps,
        wrap: Wrap { x: true, y: false },
    };
    let mut out = vec![0f32; 2 * h * w * columns];
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap();
    pool.install(|| {
        product(
            level,
            &panels::Source::Packed(&panels),
            (Grid::plain(2, h, w), &[source]),
            &Epilogue::default(),
            &mut out,
        );
    });
    out.into_iter().map(f32::to_bits).collect()
}

#[test]
fn bits_do_not_depend_on_threads() {
    for size in [(5, 7), (16, 16), (21, 40)] {
        at_every_level(|level, brain| {
            let of = |threads| match brain {
                true => bits::<bf16>(level, threads, size),
                false => bits::<f32>(level, threads, size),
            };
            let one = of(1);
            for threads in [2, 3, 7] {
                assert!(one == of(threads), "{} {size:?} {threads}", level.name());
            }
        });
    }
}

/// A row of `values` times columns of ones.
fn row_sums<T: Operand + Weight<Row = T>>(level: Level, rows: usize, values: &[f32]) -> Vec<f32> {
    let (channels, columns) = (values.len() / rows, 3);
    let group = Group { taps: 1, channels };
    let panels = Panels::<T>::pack(columns, &[group], |_, _, out| out.fill(1.0)).unwrap();
    let data: Vec<T> = values
        .iter()
        .map(|x| <T as Operand>::from_f32(*x))
        .collect();
    let source = Source {
        data: &data,
        pictures: 1,
        h: 1,
        w: rows,
        channels,
        pixel_stride: channels,
        stride: 1,
        taps: &[(0, 0)],
        wrap: Wrap::default(),
    };
    let mut out = vec![0.0; rows * columns];
    product(
        level,
        &panels::Source::Packed(&panels),
        (Grid::plain(1, 1, rows), &[source]),
        &Epilogue::default(),
        &mut out,
    );
    out
}

#[test]
fn extreme_values_stay_in_their_rows() {
    let mut values = vec![0.0; 5 * 8];
    values[..8].fill(1e38 / 8.0);
    values[9] = f32::INFINITY;
    values[16] = f32::NAN;
    values[24..32].fill(1e-30);
    // tiles sum numbers of even and of odd places apart
    values[32..].copy_from_slice(&[3e38, 0.0, -3e38, 0.0, 0.0, 0.0, 0.0, 1.0]);
    at_every_level(|level, brain| {
        let out = if brain {
            row_sums::<bf16>(level, 5, &values)
        } else {
            row_sums::<f32>(level, 5, &values)
        };
        for column in 0..3 {
            let row = |i: usize| out[i * 3 + column];
            assert!((row(0) / 1e38 - 1.0).abs() < 4e-3, "{}", level.name());
            assert!(row(1) > f32::MAX && row(2).is_nan(), "{}", level.name());
            assert!((row(3) / 8e-30 - 1.0).abs() < 4e-3, "{}", level.name());
            assert!((row(4) - 1.0).abs() < 1e-6, "{}", level.name());
        }
    });
}
