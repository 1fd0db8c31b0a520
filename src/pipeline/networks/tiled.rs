//! The autoencoder in parts: of a decoder the last levels, of an encoder the first ones are computed tile by tile. What sees the whole picture
//! (the middle's attention) is computed of the whole; and so that tiles agree, their norms go by the whole picture's means and variances, which
//! are taken norm after norm, each from all tiles with those before it known. Between norms there are convolutions alone, which see no further than
//! the tiles' margins: but for rounding, and for a sample of tiles where there are very many, the result is that of the whole.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use sd_kernels::graph::SharedNorms;
use sd_kernels::op::Window;
use sd_kernels::plan::{Feed, Options, Plan, Store};
use sd_kernels::{Graph, Weights, Wrap, ops};
use sd_models::vae::Encoder;

use super::super::coverage::{ENCODER, named};
use super::super::tiling::{
    Blended, Planes, Scale, Span, Surface, TileNorm, TilingMode, Watch, own_part, spans,
};
use super::{EncoderParts, Networks, Posterior, vae_options};
use crate::error::{Error, Result};
use crate::memory::Memory;

/// Pixels that statistics are taken of; of a larger picture, only some of its tiles are looked at, and no fewer than [`FEWEST`].
const SAMPLE: usize = 2048 * 2048;
/// See [`SAMPLE`].
const FEWEST: usize = 16;
/// The part of what is free that the autoencoder may take.
const SHARE: f64 = 0.85;

/// How a picture is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Parts {
    Whole,
    /// diffusers' tiles.
    Own,
    /// Tiles with the whole's norms; levels up to this one are not divided.
    Shared(usize),
}

/// What is free for the autoencoder now.
fn budget() -> Option<u64> {
    let free = Memory::of_networks().available?;
    Some((free as f64 * SHARE) as u64)
}

impl Networks {
    /// [`Networks::decode`] of a surface, in tiles where it is to be or has to be, of which `watch` is told.
    ///
    /// # Errors
    /// As [`Networks::decode`]; those of `watch`; [`Error::Unsupported`] for tiles with shared norms without plans.
    pub fn decode_as(
        &self,
        latents: &Tensor,
        dtype: DType,
        surface: &Surface,
        watch: &mut Watch<'_>,
    ) -> Result<Tensor> {
        let (_, _, h, w) = latents.dims4()?;
        let (parts, _) = self.decoding((w, h), dtype, surface, budget())?;
        if parts == Parts::Whole {
            return ops::wrapped(surface.wrap, || self.decode(latents, dtype));
        }
        self.one_by_one((latents, watch), |latents, watch| match parts {
            Parts::Shared(depth) => self.decode_shared((latents, dtype), surface, depth, watch),
            _ => self.decode_own((latents, dtype), surface.tiling.tile, watch),
        })
    }

    /// What `run` makes of each of a batch.
    fn one_by_one(
        &self,
        (batch, watch): (&Tensor, &mut Watch<'_>),
        run: impl Fn(&Tensor, &mut Watch<'_>) -> Result<Planes>,
    ) -> Result<Tensor> {
        let count = batch.dim(0)?;
        let one = |i| {
            let mut watch = |done, total| watch(i * total + done, count * total);
            let planes = run(&batch.narrow(0, i, 1)?, &mut watch)?;
            let [c, h, w] = planes.shape;
            Ok(Tensor::from_vec(planes.values, (1, c, h, w), &self.device)?)
        };
        let all = (0..count).map(one).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&all, 0)?)
    }

    /// How latents of `size` (width, height) are decoded within `budget` bytes, and how many it takes.
    pub(in super::super) fn decoding(
        &self,
        (w, h): (usize, usize),
        dtype: DType,
        surface: &Surface,
        budget: Option<u64>,
    ) -> Result<(Parts, u64)> {
        let tile = surface.tiling.tile;
        let options = vae_options(dtype);
        let whole = |w: usize, h: usize| -> Result<u64> {
            let (graph, picture) = self.record_vae((w, h), 1)?;
            self.bytes((&graph, &picture), &options, dtype)
        };
        let picture = (3 * 4 * self.vae.scale().pow(2) * w * h) as u64;
        let choice = Choice {
            surface,
            planned: self.planned.is_some(),
            small: w.max(h) <= tile && !surface.wrap.any(),
            depths: self.vae.depths(),
            budget,
        };
        choice.take(
            &|| whole(w, h),
            &|| Ok(whole(tile.min(w), tile.min(h))? + picture),
            &|depth| {
                let (channels, scale) = self.vae.features(depth);
                let (rows, columns) = self.tail_spans((h, w), surface, depth);
                let graph = Graph::new();
                let tile = [1, channels, rows[0].size, columns[0].size];
                let output = self.vae.tail(&graph.input("features", &tile), depth)?;
                let tail = self.bytes((&graph, &output), &tile_options(dtype), dtype)?;
                let features = (4 * channels * scale * scale * h * w) as u64;
                let graph = Graph::new();
                let latents = graph.input("latents", &[1, self.vae.latent_channels(), h, w]);
                let head = match self.vae.head(&latents, depth)? {
                    Some(output) => self.bytes((&graph, &output), &options, dtype)?,
                    None => 0,
                };
                Ok(features + head.max(tail + picture))
            },
        )
    }

    /// Bytes of a plan's buffers.
    fn bytes(
        &self,
        (graph, output): (&Graph, &sd_kernels::Tensor),
        options: &Options,
        dtype: DType,
    ) -> Result<u64> {
        if self.planned.is_none() {
            return Ok(graph.peak_elements() * dtype.size_in_bytes() as u64);
        }
        let sizes = Plan::sizes(graph, output, options)?;
        Ok((sizes.buffers + sizes.weights + sizes.transient) as u64)
    }

    /// The tiles of the features behind level `depth`.
    fn tail_spans(
        &self,
        (h, w): (usize, usize),
        surface: &Surface,
        depth: usize,
    ) -> (Vec<Span>, Vec<Span>) {
        let (_, scale) = self.vae.features(depth);
        let how = (surface.tiling.tile * scale, self.vae.reach(depth), 1);
        (
            spans(h * scale, how, surface.wrap.y),
            spans(w * scale, how, surface.wrap.x),
        )
    }

    fn decode_shared(
        &self,
        (latents, dtype): (&Tensor, DType),
        surface: &Surface,
        depth: usize,
        watch: &mut Watch<'_>,
    ) -> Result<Planes> {
        let (_, c, h, w) = latents.dims4()?;
        let mut values: Vec<f32> = latents.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        self.vae.prepare(&mut values, h * w);
        let options = vae_options(dtype);
        let store = self.vae_store();
        let (channels, scale) = self.vae.features(depth);
        let graph = Graph::new();
        let input = graph.input("latents", &[1, c, h, w]);
        let head = ops::wrapped(surface.wrap, || self.vae.head(&input, depth))?;
        let features = match head {
            Some(output) => run_once((&graph, &output), ("latents", &values), &options, store)?,
            None => values,
        };
        let (rows, columns) = self.tail_spans((h, w), surface, depth);
        let local = Local {
            input: Planes {
                values: features,
                shape: [channels, h * scale, w * scale],
            },
            scale: Scale::Up(self.vae.scale() / scale.max(1)),
            tiles: (rows, columns),
            // the margins hold what lies beyond an edge
            wrap: Wrap::default(),
            record: &|x| self.vae.tail(x, depth),
            options: tile_options(dtype),
            store: &Store::default(),
        };
        local.run(watch)
    }

    fn vae_store(&self) -> &Store {
        static NONE: std::sync::OnceLock<Store> = std::sync::OnceLock::new();
        match &self.planned {
            Some(planned) => &planned.vae,
            None => NONE.get_or_init(Store::default),
        }
    }

    fn decode_own(
        &self,
        (latents, dtype): (&Tensor, DType),
        tile: usize,
        watch: &mut Watch<'_>,
    ) -> Result<Planes> {
        let scale = self.vae.scale();
        let input = planes(latents)?;
        let [_, h, w] = input.shape;
        let blended = Blended {
            tile: (tile, tile * scale),
        };
        let mut network = |tile: Planes| {
            let [c, h, w] = tile.shape;
            let tile = Tensor::from_vec(tile.values, (1, c, h, w), &self.device)?;
            planes(&self.decode(&tile, dtype)?)
        };
        blended.run(&input, [3, h * scale, w * scale], &mut network, watch)
    }

    /// [`Networks::encode`] of a surface, in tiles where it is to be or has to be, of which `watch` is told.
    ///
    /// # Errors
    /// As [`Networks::encode`]; those of `watch`; [`Error::Unsupported`] for tiles with shared norms without plans.
    pub fn encode_as(
        &self,
        pictures: &Tensor,
        dtype: DType,
        surface: &Surface,
        watch: &mut Watch<'_>,
    ) -> Result<Posterior> {
        let (_, _, h, w) = pictures.dims4()?;
        let (parts, _) = self.encoding((w, h), dtype, surface, budget())?;
        if parts == Parts::Whole {
            return ops::wrapped(surface.wrap, || self.encode(pictures, dtype));
        }
        let moments = self.one_by_one((pictures, watch), |picture, watch| match parts {
            Parts::Shared(depth) => self.encode_shared((picture, dtype), surface, depth, watch),
            _ => self.encode_own((picture, dtype), surface.tiling.tile, watch),
        })?;
        Posterior::new(&moments)
    }

    /// How a picture of `size` (width, height) is encoded within `budget` bytes, and how many it takes.
    fn encoding(
        &self,
        (w, h): (usize, usize),
        dtype: DType,
        surface: &Surface,
        budget: Option<u64>,
    ) -> Result<(Parts, u64)> {
        let EncoderParts { config, source } = &self.encoder;
        let weights = Weights::new(Arc::clone(source), dtype, &self.device);
        let encoder = Encoder::load(&weights, config);
        let options = vae_options(dtype);
        let tile = surface.tiling.tile * config.scale();
        let whole = |w: usize, h: usize| -> Result<u64> {
            let graph = Graph::new();
            let output = encoder.moments(&graph.input("pictures", &[1, 3, h, w]))?;
            self.bytes((&graph, &output), &options, dtype)
        };
        let choice = Choice {
            surface,
            planned: self.planned.is_some(),
            small: w.max(h) <= tile && !surface.wrap.any(),
            depths: config.channels.len().saturating_sub(1),
            budget,
        };
        choice.take(
            &|| whole(w, h),
            &|| whole(tile.min(w), tile.min(h)),
            &|index| {
                let depth = index + 1;
                let (rows, columns) = head_spans((h, w), surface, (tile, depth), &encoder);
                let graph = Graph::new();
                let pixels = graph.input("pictures", &[1, 3, rows[0].size, columns[0].size]);
                let output = encoder.head(&pixels, depth)?;
                let head = self.bytes((&graph, &output), &tile_options(dtype), dtype)?;
                let shape = [1, encoder.features(depth), h >> depth, w >> depth];
                let graph = Graph::new();
                let output = encoder.tail(&graph.input("features", &shape), depth)?;
                let tail = self.bytes((&graph, &output), &options, dtype)?;
                let features = 4 * shape.iter().product::<usize>() as u64;
                Ok(features + head.max(tail))
            },
        )
    }

    fn encode_shared(
        &self,
        (picture, dtype): (&Tensor, DType),
        surface: &Surface,
        index: usize,
        watch: &mut Watch<'_>,
    ) -> Result<Planes> {
        let depth = index + 1;
        let EncoderParts { config, source } = &self.encoder;
        let weights = Weights::new(Arc::clone(source), dtype, &self.device);
        let encoder = Encoder::load(&weights, config);
        named(ENCODER, weights.check())?;
        let (options, store) = (vae_options(dtype), Store::default());
        let input = planes(picture)?;
        let [_, h, w] = input.shape;
        let tile = surface.tiling.tile * config.scale();
        let local = Local {
            tiles: head_spans((h, w), surface, (tile, depth), &encoder),
            input,
            scale: Scale::Down(1 << depth),
            wrap: surface.wrap,
            record: &|x| encoder.head(x, depth),
            options: tile_options(dtype),
            store: &Store::default(),
        };
        let features = local.run(watch)?;
        let [c, h, w] = features.shape;
        let graph = Graph::new();
        let input = graph.input("features", &[1, c, h, w]);
        let output = ops::wrapped(surface.wrap, || encoder.tail(&input, depth))?;
        let feed = ("features", features.values.as_slice());
        let values = run_once((&graph, &output), feed, &options, &store)?;
        let shape = output.dims4()?;
        Ok(Planes {
            values,
            shape: [shape.1, shape.2, shape.3],
        })
    }

    fn encode_own(
        &self,
        (picture, dtype): (&Tensor, DType),
        tile: usize,
        watch: &mut Watch<'_>,
    ) -> Result<Planes> {
        let config = &self.encoder.config;
        let scale = config.scale();
        let input = planes(picture)?;
        let [_, h, w] = input.shape;
        let blended = Blended {
            tile: (tile * scale, tile),
        };
        let shape = [2 * config.latent_channels, h / scale, w / scale];
        let mut network = |tile: Planes| {
            let [c, h, w] = tile.shape;
            let tile = Tensor::from_vec(tile.values, (1, c, h, w), &self.device)?;
            planes(&self.moments(&tile, dtype)?)
        };
        blended.run(&input, shape, &mut network, watch)
    }
}

/// Weights that all tiles read stay packed until the last has.
fn tile_options(dtype: DType) -> Options {
    Options {
        transient: false,
        ..vae_options(dtype)
    }
}

/// The tiles of a picture down to level `depth` of an encoder. Along an axis without edges there is one: the zeros behind the last pixel, which its
/// strided convolutions are given, are in one place only.
fn head_spans(
    (h, w): (usize, usize),
    surface: &Surface,
    (tile, depth): (usize, usize),
    encoder: &Encoder,
) -> (Vec<Span>, Vec<Span>) {
    let of = |size: usize, wraps: bool| {
        let tile = if wraps { tile.max(size) } else { tile };
        spans(size, (tile, encoder.reach(depth), 1 << depth), false)
    };
    (of(h, surface.wrap.y), of(w, surface.wrap.x))
}

/// What the way of dividing a picture depends on.
struct Choice<'a> {
    surface: &'a Surface,
    planned: bool,
    /// The picture is no larger than a tile.
    small: bool,
    depths: usize,
    budget: Option<u64>,
}

impl Choice<'_> {
    /// The way that takes the least work of those that fit; the one that takes the least memory where none does. `whole`, `own` and `shared` (of a
    /// depth, from the one with least memory on) tell bytes.
    fn take(
        &self,
        whole: &dyn Fn() -> Result<u64>,
        own: &dyn Fn() -> Result<u64>,
        shared: &dyn Fn(usize) -> Result<u64>,
    ) -> Result<(Parts, u64)> {
        let tiling = self.surface.tiling;
        let fits = |bytes: u64| self.budget.is_none_or(|budget| bytes <= budget);
        let own_norms = tiling.norm == TileNorm::Own;
        let possible = own_norms || (self.planned && self.depths > 0);
        if tiling.mode == TilingMode::On && !self.planned && !own_norms && !self.small {
            return Err(Error::Unsupported(
                "tiles with shared norms are for the CPU's plans; use --vae-tile-norm own"
                    .to_owned(),
            ));
        }
        if self.small || !possible || tiling.mode != TilingMode::On {
            let bytes = whole()?;
            let off = tiling.mode == TilingMode::Off || self.small || !possible;
            if off || fits(bytes) {
                return Ok((Parts::Whole, bytes));
            }
        }
        if own_norms {
            return Ok((Parts::Own, own()?));
        }
        let mut least = (Parts::Shared(0), u64::MAX);
        for depth in self.order() {
            let bytes = shared(depth)?;
            if fits(bytes) {
                return Ok((Parts::Shared(depth), bytes));
            }
            if bytes < least.1 {
                least = (Parts::Shared(depth), bytes);
            }
        }
        Ok(least)
    }

    /// Depths from that of which most is computed of the whole.
    fn order(&self) -> impl Iterator<Item = usize> + use<> {
        (0..self.depths).rev()
    }
}

/// The one picture of a tensor `[1, c, h, w]`.
fn planes(tensor: &Tensor) -> Result<Planes> {
    let (_, c, h, w) = tensor.dims4()?;
    Ok(Planes {
        values: tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?,
        shape: [c, h, w],
    })
}

fn run_once(
    (graph, output): (&Graph, &sd_kernels::Tensor),
    (name, values): (&str, &[f32]),
    options: &Options,
    store: &Store,
) -> Result<Vec<f32>> {
    let mut plan = Plan::compile(graph, output, options, store)?;
    let mut out = Vec::new();
    plan.run(&[Feed { name, values }], &mut out)?;
    Ok(out)
}

/// A network of convolutions and group norms, tile by tile.
struct Local<'a> {
    input: Planes,
    scale: Scale,
    /// Along the rows and the columns of `input`.
    tiles: (Vec<Span>, Vec<Span>),
    /// Axes along which a tile has no edges.
    wrap: Wrap,
    record: &'a dyn Fn(&sd_kernels::Tensor) -> sd_kernels::Result<sd_kernels::Tensor>,
    options: Options,
    store: &'a Store,
}

/// A plan for tiles of one size, and of one part that is their own.
struct Ready {
    plan: Plan,
    part: Option<Window>,
}

impl Local<'_> {
    fn run(&self, watch: &mut Watch<'_>) -> Result<Planes> {
        let (graph, output) = self.record(0, Window::default())?;
        let channels = output.dims4()?.1;
        let mut given: Vec<(String, Vec<f32>)> = Vec::new();
        let (looks, tiles) = (self.looked_at().count(), self.all().count());
        let total = graph.norms() * looks + tiles;
        let mut done = 0;
        let mut one_more = || {
            done += 1;
            watch(done, total)
        };
        for index in 0..graph.norms() {
            let statistics = self.statistics(&given, &mut one_more)?;
            given.push((Graph::norm_input(index), statistics));
        }
        let [_, h, w] = self.input.shape;
        let mut out = Planes::zeros([channels, self.scale.of(h), self.scale.of(w)]);
        let (mut ready, mut values) = (None, Vec::new());
        for (rows, columns) in self.all() {
            self.tile((rows, columns), &given, (&mut ready, false), &mut values)?;
            out.put(&values, (rows, columns), self.scale);
            one_more()?;
        }
        Ok(out)
    }

    fn all(&self) -> impl Iterator<Item = (&Span, &Span)> {
        let (rows, columns) = &self.tiles;
        rows.iter()
            .flat_map(move |row| columns.iter().map(move |column| (row, column)))
    }

    /// The network for a tile, with as many norms given.
    fn record(&self, given: usize, part: Window) -> Result<(Graph, sd_kernels::Tensor)> {
        let (h, w) = (self.tiles.0[0].size, self.tiles.1[0].size);
        let graph = Graph::sharing(SharedNorms {
            given,
            of: (h, w),
            part: match part.height {
                0 => Window {
                    top: 0,
                    left: 0,
                    height: h,
                    width: w,
                },
                _ => part,
            },
        });
        let input = graph.input("features", &[1, self.input.shape[0], h, w]);
        let output = ops::wrapped(self.wrap, || (self.record)(&input))?;
        Ok((graph, output))
    }

    /// One tile's results, or the statistics of its own part at the first norm that has none.
    fn tile(
        &self,
        (rows, columns): (&Span, &Span),
        given: &[(String, Vec<f32>)],
        (ready, statistics): (&mut Option<Ready>, bool),
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let part = statistics.then(|| own_part(rows, columns));
        if ready.as_ref().is_none_or(|ready| ready.part != part) {
            *ready = None; // its buffers make room
            let (graph, output) = self.record(given.len(), part.unwrap_or_default())?;
            let output = match statistics {
                true => graph.statistics().ok_or_else(|| {
                    Error::Numeric("a norm of the autoencoder was not recorded".to_owned())
                })?,
                false => output,
            };
            let plan = Plan::compile(&graph, &output, &self.options, self.store)?;
            *ready = Some(Ready { plan, part });
        }
        let values = self.input.cut(rows, columns);
        let mut feeds = vec![Feed {
            name: "features",
            values: &values,
        }];
        feeds.extend(given.iter().map(|(name, values)| Feed { name, values }));
        if let Some(ready) = ready {
            ready.plan.run(&feeds, out)?;
        }
        Ok(())
    }

    /// The tiles that statistics are taken of: all, or a part of them that lies evenly.
    fn looked_at(&self) -> impl Iterator<Item = (&Span, &Span)> {
        let across = self.tiles.1.len();
        let [_, h, w] = self.input.shape;
        let pixels = (h * w).max(self.scale.of(h) * self.scale.of(w));
        let tiles = self.tiles.0.len() * across;
        let every = (pixels / SAMPLE).min(tiles / FEWEST).max(1);
        let skew = (every * 2).div_ceil(5);
        let tiles = self.all().enumerate();
        tiles
            .filter(move |(i, _)| ((i / across) * skew + i % across).is_multiple_of(every))
            .map(|(_, tile)| tile)
    }

    /// Means and variances of the whole at the first norm that has none.
    fn statistics(
        &self,
        given: &[(String, Vec<f32>)],
        one_more: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<f32>> {
        let (mut pooled, mut ready, mut values) = (Pooled::default(), None, Vec::new());
        for (rows, columns) in self.looked_at() {
            self.tile((rows, columns), given, (&mut ready, true), &mut values)?;
            let part = own_part(rows, columns);
            pooled.add(&values, (part.height * part.width) as f64);
            one_more()?;
        }
        Ok(pooled.finish())
    }
}

/// Sums over tiles of means, and of squares about 0.
#[derive(Default)]
struct Pooled {
    means: Vec<f64>,
    squares: Vec<f64>,
    weight: f64,
}

impl Pooled {
    fn add(&mut self, values: &[f32], weight: f64) {
        let groups = values.len() / 2;
        self.means.resize(groups, 0.0);
        self.squares.resize(groups, 0.0);
        let (means, variances) = values.split_at(groups);
        for (i, (&mean, &variance)) in means.iter().zip(variances).enumerate() {
            let (mean, variance) = (f64::from(mean), f64::from(variance));
            self.means[i] += weight * mean;
            self.squares[i] += weight * (variance + mean * mean);
        }
        self.weight += weight;
    }

    fn finish(self) -> Vec<f32> {
        let weight = self.weight.max(1.0);
        let variance = |(mean, square): (&f64, &f64)| {
            let mean = mean / weight;
            (square / weight - mean * mean).max(0.0) as f32
        };
        let variances: Vec<f32> = self.means.iter().zip(&self.squares).map(variance).collect();
        let means = self.means.iter().map(|mean| (mean / weight) as f32);
        means.chain(variances).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::super::tiling::Tiling;
    use super::*;

    #[test]
    fn the_least_work_that_fits() {
        let bytes = [10, 18, 30, 60];
        let of = |mode, budget| {
            let surface = Surface {
                wrap: Wrap::default(),
                tiling: Tiling {
                    mode,
                    ..Tiling::default()
                },
            };
            let choice = Choice {
                surface: &surface,
                planned: true,
                small: false,
                depths: bytes.len(),
                budget,
            };
            let shared = |depth: usize| Ok(bytes[depth]);
            choice.take(&|| Ok(200), &|| Ok(5), &shared).unwrap()
        };
        assert_eq!(of(TilingMode::Auto, Some(250)), (Parts::Whole, 200));
        assert_eq!(of(TilingMode::Off, Some(1)), (Parts::Whole, 200));
        assert_eq!(of(TilingMode::Auto, Some(100)), (Parts::Shared(3), 60));
        assert_eq!(of(TilingMode::Auto, Some(40)), (Parts::Shared(2), 30));
        assert_eq!(of(TilingMode::On, Some(250)), (Parts::Shared(3), 60));
        for mode in [TilingMode::On, TilingMode::Auto] {
            assert_eq!(of(mode, Some(5)), (Parts::Shared(0), 10));
        }
    }
}
