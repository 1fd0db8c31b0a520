//! One step: the right kernel for its work and types.

use half::bf16;
use smallvec::SmallVec;

use super::ir::{Form, Part, Product, Step, ValueId, View, Work};
use super::memory::Memory;
use super::run::Prepared;
use super::store::{Layout, Loose, Packed};
use crate::cpu::Level;
use crate::cpu::aligned::Plain;
use crate::cpu::attention::{self, Shape, attention};
use crate::cpu::epilogue::{Epilogue, PerImage, Stored};
use crate::cpu::micro::{Brain, Half, Weight};
use crate::cpu::norm::{AdaptiveNorm, GroupNorm, Side, layer_norm, rms_norm, rotate, statistics};
use crate::cpu::panels::{self, Panels};
use crate::cpu::product::{Grid, Source, product};
use crate::cpu::view::NumbersMut;
use crate::cpu::windows::WindowAttention;
use crate::cpu::winograd::{self, Kept, WinogradWeights, convolve};
use crate::{Result, Wrap};

/// As many as a step usually reads, without a place of their own in memory.
type Few<T> = SmallVec<[T; 4]>;

/// Rows up to which weights are packed panel by panel: more would see a panel packed several times, each for 2048 of them.
const FEW_ROWS: usize = 6144;

/// Pixels that each tap reads, for result (0, 0).
pub(super) type Taps = Vec<(isize, isize)>;

/// The taps of every group of a product, for each of its phases.
pub(super) fn taps(product: &Product) -> Vec<Vec<Taps>> {
    let of = |part: &Part| -> Taps {
        let before = part.padding.before.cast_signed();
        let (kh, kw) = (part.kernel.0.cast_signed(), part.kernel.1.cast_signed());
        (0..kh)
            .flat_map(|y| (0..kw).map(move |x| (y - before, x - before)))
            .collect()
    };
    let groups = |taps: &dyn Fn(&Part) -> Taps| -> Vec<Taps> {
        product
            .parts
            .iter()
            .flat_map(|part| vec![taps(part); part.sources.len()])
            .collect()
    };
    if product.form != Form::Upsample {
        return vec![groups(&of)];
    }
    (0..4)
        .map(|phase| {
            let (dy, dx) = (phase / 2 - 1, phase % 2 - 1);
            groups(&|_| vec![(dy, dx), (dy, dx + 1), (dy + 1, dx), (dy + 1, dx + 1)])
        })
        .collect()
}

impl Memory<'_> {
    /// Computes a step.
    pub(super) fn step(
        &self,
        level: Level,
        step: &Step,
        prepared: &Prepared,
        workspace: &mut [u8],
    ) -> Result<()> {
        // SAFETY: a step reads no part of its result (`check_places`)
        let out = unsafe { self.write(step.out) };
        match (&step.work, prepared) {
            (
                Work::Product(product),
                Prepared::Product {
                    weights,
                    bias,
                    slopes,
                    taps,
                },
            ) => {
                let rows = product.size.0 * product.size.1;
                let epilogue = Epilogue {
                    bias: bias.as_ref().map(|b| b.as_slice()),
                    image: match product.image {
                        Some(image) => Some(PerImage::plain(self.read_f32(image)?, rows)),
                        None => None,
                    },
                    activation: product.activation,
                    slopes: slopes.as_ref().map(|s| s.as_slice()),
                    scale: product.scale,
                    gate: match product.gate {
                        Some((values, slot)) => Some(PerImage {
                            values: self.read_f32(values)?,
                            place: (self.channels(values) / product.columns.max(1), slot),
                            rows,
                        }),
                        None => None,
                    },
                    residual: product.residual.map(|r| self.read(r)),
                    gated: product.form == Form::Gated,
                };
                let run = Run {
                    memory: self,
                    level,
                    product,
                    taps,
                    epilogue: &epilogue,
                    batch: self.batch(step.out),
                };
                let packed;
                let weights = match weights {
                    Some(weights) => weights,
                    None => {
                        let (channels, kind) = self.program().sources(product);
                        let few = self.batch(step.out) * rows <= FEW_ROWS;
                        let loose = match few {
                            true => Loose::open(product, &channels, (kind, level))?,
                            false => None,
                        };
                        if let Some(loose) = loose {
                            match loose.layout() {
                                Layout::Bf16 => run.loose::<bf16>(&loose, out),
                                Layout::Half => run.loose::<Half>(&loose, out),
                                Layout::Brain => run.loose::<Brain>(&loose, out),
                                _ => run.loose::<f32>(&loose, out),
                            }
                            return Ok(());
                        }
                        packed = Packed::now(product, &channels, (kind, level))?;
                        &packed
                    }
                };
                match weights {
                    Packed::F32(w) => run.direct(w, out),
                    Packed::Bf16(w) => run.direct(w, out),
                    Packed::Half(w) => run.direct(w, out),
                    Packed::Brain(w) => run.direct(w, out),
                    Packed::WinogradF32(w) => run.winograd(w, out, workspace),
                    Packed::WinogradBf16(w) => run.winograd(w, out, workspace),
                }
                Ok(())
            }
            (
                Work::Attention {
                    q,
                    k,
                    v,
                    heads,
                    causal,
                    ..
                },
                prepared,
            ) => {
                let shape = self.attention_shape((*q, *k), step.out, *heads, *causal);
                let bias = match prepared {
                    Prepared::Table(bias) => Some(bias.as_slice()),
                    _ => None,
                };
                match out {
                    NumbersMut::F32(out) => attention(
                        level,
                        (&shape, bias),
                        (self.vectors(*q), self.vectors(*k), self.vectors(*v)),
                        out,
                        workspace,
                    ),
                    NumbersMut::Bf16(out) => attention(
                        level,
                        (&shape, bias),
                        (self.vectors(*q), self.vectors(*k), self.vectors(*v)),
                        out,
                        workspace,
                    ),
                }
                Ok(())
            }
            (Work::WindowAttention { q, k, v, windows }, Prepared::Table(tables)) => {
                let attention = WindowAttention {
                    batch: self.batch(step.out),
                    channels: self.channels(step.out),
                    windows,
                    tables,
                };
                attention.run(level, [self.read(*q), self.read(*k), self.read(*v)], out);
                Ok(())
            }
            (Work::LayerNorm { source, eps, .. }, Prepared::Affine { weight, bias }) => {
                layer_norm(level, self.read(*source), (weight, bias, *eps), out);
                Ok(())
            }
            (Work::RmsNorm { source, eps, .. }, Prepared::Table(weight)) => {
                rms_norm(level, self.read(*source), (weight, *eps), out);
                Ok(())
            }
            (
                Work::AdaptiveNorm {
                    source,
                    values,
                    eps,
                    shift,
                    scale,
                },
                _,
            ) => {
                let channels = self.channels(step.out);
                let norm = AdaptiveNorm {
                    channels,
                    rows: self.pixels(step.out),
                    values: self.read_f32(*values)?,
                    place: (self.channels(*values) / channels.max(1), *shift, *scale),
                    eps: *eps,
                };
                norm.run(level, self.read(*source), out);
                Ok(())
            }
            (
                Work::Rotate {
                    source,
                    heads,
                    turns,
                },
                _,
            ) => {
                let how = (turns.as_slice(), *heads, self.channels(step.out));
                rotate(level, self.read(*source), how, out);
                Ok(())
            }
            (
                Work::GroupNorm {
                    sources,
                    groups,
                    eps,
                    activation,
                    given,
                    ..
                },
                Prepared::Affine { weight, bias },
            ) => {
                let norm = GroupNorm {
                    batch: self.batch(step.out),
                    pixels: self.pixels(step.out),
                    groups: *groups,
                    eps: *eps,
                    weight,
                    bias,
                    activation: *activation,
                    given: given.map(|given| self.read_f32(given)).transpose()?,
                };
                let sides: Few<Side<'_>> = sources
                    .iter()
                    .map(|&s| Side {
                        data: self.read(s),
                        channels: self.channels(s),
                        pictures: self.batch(s),
                    })
                    .collect();
                norm.run(level, &sides, out, cast_workspace(workspace));
                Ok(())
            }
            (
                Work::Statistics {
                    source,
                    groups,
                    part,
                },
                _,
            ) => {
                let side = Side {
                    data: self.read(source.value),
                    channels: self.channels(source.value),
                    pictures: self.batch(source.value),
                };
                let NumbersMut::F32(out) = out else {
                    return Err(crate::Error::Mixed { op: "statistics" });
                };
                statistics(level, &side, ((source.h, source.w), part), *groups, out);
                Ok(())
            }
            (
                Work::Match {
                    source,
                    choice,
                    sizes,
                },
                _,
            ) => self.matched(
                level,
                (*source, *choice, sizes),
                (step.out, out),
                cast_workspace(workspace),
            ),
            (work, prepared) => self.pointwise(work, prepared, step.out, out),
        }
    }
}

/// The workspace as other numbers.
fn cast_workspace<T: Plain>(bytes: &mut [u8]) -> &mut [T] {
    // SAFETY: any bytes are numbers
    let (before, numbers, _) = unsafe { bytes.align_to_mut::<T>() };
    debug_assert!(before.is_empty(), "the workspace begins at a line");
    numbers
}

impl<'a> Memory<'a> {
    fn attention_shape(
        &self,
        (q, k): (ValueId, ValueId),
        out: ValueId,
        heads: usize,
        causal: bool,
    ) -> Shape {
        Shape {
            batch: self.batch(out),
            queries: self.pixels(q),
            keys: self.pixels(k),
            heads,
            width: self.channels(q) / heads,
            causal,
            kv_batch: self.batch(k),
            q_batch: self.batch(q),
        }
    }

    fn vectors<T: Plain>(&self, value: ValueId) -> attention::View<'a, T> {
        attention::View {
            data: self.operand(value),
            stride: self.channels(value),
        }
    }
}

/// A product about to run.
struct Run<'a> {
    memory: &'a Memory<'a>,
    level: Level,
    product: &'a Product,
    taps: &'a [Vec<Taps>],
    epilogue: &'a Epilogue<'a>,
    batch: usize,
}

impl Run<'_> {
    fn winograd<T: Kept>(
        &self,
        weights: &WinogradWeights<T>,
        out: NumbersMut<'_>,
        workspace: &mut [u8],
    ) {
        let (h, w) = self.product.size;
        let views = self.product.parts.iter();
        let views = views.flat_map(|part| part.sources.iter().map(move |view| (view, part.wrap)));
        let sources: Few<_> = views
            .map(|(view, wrap)| winograd::Source {
                wrap,
                ..self.picture::<T>(view, h)
            })
            .collect();
        let (how, what) = (
            (self.level, weights),
            ((self.batch, h, w), sources.as_slice()),
        );
        match out {
            NumbersMut::F32(out) => convolve(how, what, self.epilogue, out, workspace),
            NumbersMut::Bf16(out) => convolve(how, what, self.epilogue, out, workspace),
        }
    }

    fn direct<W: Weight>(&self, phases: &[Panels<W>], out: NumbersMut<'_>) {
        let phases: Few<_> = phases.iter().map(panels::Source::Packed).collect();
        match out {
            NumbersMut::F32(out) => self.phases(&phases, out),
            NumbersMut::Bf16(out) => self.phases(&phases, out),
        }
    }

    /// Panel by panel from the file.
    fn loose<W: Weight>(&self, weights: &Loose<'_>, out: NumbersMut<'_>) {
        let column =
            |column: usize, group: usize, out: &mut [f32]| weights.column(column, group, out);
        let phases = [panels::Source::<W>::Loose(weights.shape(), &column)];
        match out {
            NumbersMut::F32(out) => self.phases(&phases, out),
            NumbersMut::Bf16(out) => self.phases(&phases, out),
        }
    }

    fn phases<W: Weight, O: Stored>(&self, phases: &[panels::Source<'_, W>], out: &mut [O]) {
        let (h, w) = self.product.size;
        for (phase, (panels, taps)) in phases.iter().zip(self.taps).enumerate() {
            let grid = if self.product.form == Form::Upsample {
                Grid {
                    batch: self.batch,
                    h: h / 2,
                    w: w / 2,
                    place: (2, phase / 2, phase % 2),
                }
            } else {
                Grid::plain(self.batch, h, w)
            };
            let views = self
                .product
                .parts
                .iter()
                .flat_map(|part| part.sources.iter().map(move |view| (*view, part)));
            let sources: Few<Source<'_, W::Row>> = views
                .zip(taps)
                .map(|((view, part), taps)| self.source(view, part, taps))
                .collect();
            product(self.level, panels, (grid, &sources), self.epilogue, out);
        }
    }

    /// A source of a convolution of pictures `h` pixels high.
    fn picture<T: Plain>(&self, view: &View, h: usize) -> winograd::Source<'_, T> {
        let channels = self.memory.channels(view.value);
        winograd::Source {
            data: self.memory.operand(view.value),
            pictures: self.memory.batch(view.value),
            channels,
            pixel_stride: channels,
            enlarged: h / view.h.max(1),
            wrap: Wrap::default(),
        }
    }

    fn source<'b, T: Plain>(&'b self, view: View, part: &Part, taps: &'b Taps) -> Source<'b, T> {
        let channels = self.memory.channels(view.value);
        Source {
            data: self.memory.operand(view.value),
            pictures: self.memory.batch(view.value),
            h: view.h,
            w: view.w,
            channels,
            pixel_stride: channels,
            stride: part.stride,
            taps,
            wrap: part.wrap,
        }
    }
}
