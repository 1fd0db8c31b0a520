#![allow(clippy::unwrap_used, clippy::panic)]

use half::bf16;

use super::super::epilogue::PerImage;
use super::*;
use crate::Activation;
use crate::cpu::aligned::Aligned;
use crate::cpu::micro::Operand;

/// Numbers from −1 to 1 that bf16 holds exactly.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0).to_f32()
        })
        .collect()
}

#[derive(Clone)]
struct Case {
    form: Form,
    pictures: (usize, usize, usize),
    /// Channels, pixel stride and pictures of each source.
    sources: Vec<(usize, usize, usize)>,
    columns: usize,
    enlarged: usize,
    threads: usize,
}

impl Case {
    fn new(form: Form, pictures: (usize, usize, usize), sources: &[usize], columns: usize) -> Self {
        let sources = sources.iter().map(|&c| (c, c, pictures.0)).collect();
        Self {
            form,
            pictures,
            sources,
            columns,
            enlarged: 1,
            threads: 2,
        }
    }

    fn channels(&self) -> Vec<usize> {
        self.sources.iter().map(|s| s.0).collect()
    }

    fn data(&self) -> Vec<Vec<f32>> {
        let (_, h, w) = self.pictures;
        self.sources
            .iter()
            .enumerate()
            .map(|(i, s)| {
                let pixels = (h / self.enlarged) * (w / self.enlarged);
                numbers(s.2 * pixels * s.1, 31 + i as u32)
            })
            .collect()
    }

    fn weights(&self) -> Vec<Vec<f32>> {
        self.sources
            .iter()
            .enumerate()
            .map(|(i, s)| numbers(self.columns * s.0 * 9, 77 + i as u32))
            .collect()
    }

    fn results(&self) -> usize {
        self.pictures.0 * self.pictures.1 * self.pictures.2 * self.columns
    }

    fn run<T: Kept, I: Kept, O: Kept>(
        &self,
        level: Level,
        epilogue: &Epilogue<'_>,
        form: Form,
    ) -> Vec<O> {
        let weights = self.weights();
        let packed = WinogradWeights::<T>::pack(
            form,
            self.columns,
            &self.channels(),
            |column, source, out| {
                let n = out.len();
                out.copy_from_slice(&weights[source][column * n..][..n]);
            },
        )
        .unwrap();
        let data: Vec<Vec<I>> = self
            .data()
            .iter()
            .map(|data| data.iter().map(|&x| <I as Operand>::from_f32(x)).collect())
            .collect();
        let sources: Vec<Source<'_, I>> = self
            .sources
            .iter()
            .zip(&data)
            .map(|(&(channels, pixel_stride, pictures), data)| Source {
                data,
                pictures,
                channels,
                pixel_stride,
                enlarged: self.enlarged,
                wrap: Wrap::default(),
            })
            .collect();
        let mut out = vec![O::of(f32::NAN); self.results()];
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(self.threads)
            .build()
            .unwrap();
        let shape = Shape {
            form,
            pictures: self.pictures,
            channels: &self.channels(),
            columns: self.columns,
        };
        let mut workspace = Aligned::<u8>::zeros(shape.workspace_bytes::<T>(self.threads)).unwrap();
        // what an earlier call left behind must not matter
        workspace.as_mut_slice().fill(0xff);
        pool.install(|| {
            convolve(
                (level, &packed),
                (self.pictures, &sources),
                epilogue,
                &mut out,
                workspace.as_mut_slice(),
            )
        });
        out
    }

    /// The definition, in f64.
    fn reference(&self, finish: impl Fn(f64, usize) -> f64) -> Vec<f64> {
        let ((_, h, w), (data, weights)) = (self.pictures, (self.data(), self.weights()));
        (0..self.results())
            .map(|i| {
                let (row, column) = (i / self.columns, i % self.columns);
                let (b, y, x) = (row / (h * w), row % (h * w) / w, row % w);
                let mut sum = 0f64;
                for (s, &(channels, stride, pictures)) in self.sources.iter().enumerate() {
                    for tap in 0..9 {
                        let (y, x) = ((y + tap / 3).wrapping_sub(1), (x + tap % 3).wrapping_sub(1));
                        if y < h && x < w {
                            let (h, w) = (h / self.enlarged, w / self.enlarged);
                            let (y, x) = (y / self.enlarged, x / self.enlarged);
                            let pixel =
                                &data[s][((b % pictures * h + y) * w + x) * stride..][..channels];
                            let taps = weights[s][column * channels * 9..]
                                .iter()
                                .skip(tap)
                                .step_by(9);
                            sum += pixel
                                .iter()
                                .zip(taps)
                                .map(|(x, w)| f64::from(*x) * f64::from(*w))
                                .sum::<f64>();
                        }
                    }
                }
                finish(sum, i)
            })
            .collect()
    }
}

/// √(Σ (got − want)² / Σ want²).
fn error<O: Kept>(got: &[O], want: &[f64]) -> f64 {
    let difference: f64 = got
        .iter()
        .zip(want)
        .map(|(got, want)| (f64::from(got.to_f32()) - want).powi(2))
        .sum();
    (difference / want.iter().map(|want| want * want).sum::<f64>()).sqrt()
}

fn shapes() -> Vec<Case> {
    use Form::{F2, F4};
    let mut cases = Vec::new();
    for form in [F2, F4] {
        cases.extend([
            Case::new(form, (1, 1, 1), &[1], 1),
            Case::new(form, (1, 2, 3), &[2], 17),
            Case::new(form, (2, 5, 7), &[6], 70),
            Case::new(form, (3, 7, 4), &[5, 24], 33),
            Case::new(form, (2, 13, 11), &[31], 130),
            Case::new(form, (1, 4, 97), &[40, 7], 64),
            Case::new(form, (1, 41, 3), &[33], 5),
            // many tiles of few channels, each thread its own
            Case::new(form, (1, 101, 118), &[3], 4),
        ]);
        let mut more = Case::new(form, (4, 6, 6), &[8, 3], 20);
        more.sources = vec![(8, 9, 2), (3, 7, 1)];
        cases.push(more);
        let mut enlarged = Case::new(form, (2, 14, 6), &[9], 21);
        enlarged.enlarged = 2;
        cases.push(enlarged);
    }
    cases
}

#[test]
fn equals_the_definition_at_odd_shapes() {
    for case in shapes() {
        let want = case.reference(|sum, _| sum);
        for level in Level::supported() {
            let name = format!(
                "{} {:?} {:?} {:?} {}",
                level.name(),
                case.form,
                case.pictures,
                case.sources,
                case.columns
            );
            let none = Epilogue::default();
            let got = error(&case.run::<f32, f32, f32>(level, &none, case.form), &want);
            assert!(got < 1e-6, "{name}: {got:e}");
            let got = error(&case.run::<f32, bf16, f32>(level, &none, case.form), &want);
            assert!(got < 1e-6, "{name}: {got:e}");
            if level.has_bf16() && case.form == Form::F2 {
                let got = error(&case.run::<bf16, bf16, f32>(level, &none, case.form), &want);
                assert!(got < 1e-2, "{name} bf16: {got:e}");
                let got = error(&case.run::<bf16, f32, bf16>(level, &none, case.form), &want);
                assert!(got < 1e-2, "{name} bf16: {got:e}");
            }
        }
    }
}

#[test]
fn rounds_as_little_as_said() {
    let none = Epilogue::default();
    for channels in [320, 1280] {
        let case = Case::new(Form::F2, (1, 10, 9), &[channels], 48);
        let want = case.reference(|sum, _| sum);
        for level in Level::supported() {
            for (form, most) in [(Form::F2, 1e-6), (Form::F4, 2e-6)] {
                let got = error(&case.run::<f32, f32, f32>(level, &none, form), &want);
                assert!(got < most, "{} {form:?} {channels}: {got:e}", level.name());
            }
            if level.has_bf16() {
                let got = error(&case.run::<bf16, bf16, f32>(level, &none, Form::F2), &want);
                assert!(got < 5e-3, "bf16 {channels}: {got:e}");
            }
        }
    }
}

#[test]
fn finishes_as_told() {
    let case = Case::new(Form::F4, (2, 9, 7), &[12], 70);
    let (bias, image, more) = (
        numbers(70, 5),
        numbers(2 * 70, 6),
        numbers(case.results() / 2, 7),
    );
    let more16: Vec<bf16> = more.iter().map(|&x| bf16::from_f32(x)).collect();
    let want = case.reference(|sum, i| {
        let x = sum + f64::from(bias[i % 70]) + f64::from(image[i / more.len() * 70 + i % 70]);
        x / (1.0 + (-x).exp()) + f64::from(more[i % more.len()])
    });
    let image = PerImage::plain(&image, 63);
    for more in [Numbers::F32(&more), Numbers::Bf16(&more16)] {
        let epilogue = Epilogue {
            bias: Some(&bias),
            image: Some(image),
            activation: Some(Activation::Silu),
            residual: Some(more),
            ..Epilogue::default()
        };
        for level in Level::supported() {
            for form in [Form::F2, Form::F4] {
                let got = error(&case.run::<f32, f32, f32>(level, &epilogue, form), &want);
                assert!(got < 1e-6, "{} {form:?}: {got:e}", level.name());
                let got = error(&case.run::<f32, f32, bf16>(level, &epilogue, form), &want);
                assert!(got < 3e-3, "{} {form:?}: {got:e}", level.name());
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let none = Epilogue::default();
    // few tiles, and many
    for mut case in [
        Case::new(Form::F2, (2, 16, 16), &[64], 200),
        Case::new(Form::F4, (1, 90, 97), &[8], 65),
        Case::new(Form::F4, (1, 64, 64), &[64], 65),
    ] {
        case.threads = 1;
        let level = Level::current();
        let one: Vec<f32> = case.run::<f32, f32, f32>(level, &none, case.form);
        for threads in [2, 3, 7] {
            case.threads = threads;
            let more: Vec<f32> = case.run::<f32, f32, f32>(level, &none, case.form);
            assert!(
                one.iter()
                    .zip(&more)
                    .all(|(a, b)| a.to_bits() == b.to_bits())
            );
        }
    }
}

#[test]
fn nothing_is_done_for_no_pictures() {
    let none = Epilogue::default();
    for pictures in [(0, 5, 5), (1, 0, 5), (1, 5, 0)] {
        let mut case = Case::new(Form::F4, pictures, &[4], 8);
        case.sources[0].2 = 1;
        assert!(
            case.run::<f32, f32, f32>(Level::current(), &none, Form::F4)
                .is_empty()
        );
    }
}

#[test]
fn large_numbers_stay_finite_and_sources_are_not_read_beyond_their_end() {
    // a large mean: transforms subtract neighbours, and must not lose what is left
    let case = Case::new(Form::F2, (1, 8, 8), &[64], 16);
    let weights = case.weights();
    let data: Vec<f32> = case.data()[0].iter().map(|x| 1000.0 + x).collect();
    let source = [Source {
        data: &data,
        pictures: 1,
        channels: 64,
        pixel_stride: 64,
        enlarged: 1,
        wrap: Wrap::default(),
    }];
    let mut out = vec![0f32; case.results()];
    for form in [Form::F2, Form::F4] {
        let packed = WinogradWeights::<f32>::pack(form, 16, &[64], |column, _, out| {
            out.copy_from_slice(&weights[0][column * 576..][..576])
        })
        .unwrap();
        let shape = Shape {
            form,
            pictures: (1, 8, 8),
            channels: &[64],
            columns: 16,
        };
        let mut workspace =
            Aligned::<u8>::zeros(shape.workspace_bytes::<f32>(rayon::current_num_threads()))
                .unwrap();
        convolve(
            (Level::current(), &packed),
            ((1, 8, 8), &source),
            &Epilogue::default(),
            &mut out,
            workspace.as_mut_slice(),
        );
        for (i, got) in out.iter().enumerate() {
            let (y, x, column) = (i / 16 / 8, i / 16 % 8, i % 16);
            let mut want = 0f64;
            for tap in 0..9 {
                let (y, x) = ((y + tap / 3).wrapping_sub(1), (x + tap % 3).wrapping_sub(1));
                if y < 8 && x < 8 {
                    want += (0..64)
                        .map(|c| {
                            f64::from(data[(y * 8 + x) * 64 + c])
                                * f64::from(weights[0][(column * 64 + c) * 9 + tap])
                        })
                        .sum::<f64>();
                }
            }
            assert!(
                (f64::from(*got) - want).abs() < 0.5,
                "{form:?} {got} {want}"
            );
        }
    }
}
