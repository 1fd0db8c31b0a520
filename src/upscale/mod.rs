//! Pictures made larger by a network of the ESRGAN family or of SwinIR's: opened once, run on pictures of any size, tile by tile.
//!
//! ```text
//! Checkpoint ─► weights::upscaler: structure and names ─► Upscaler::load
//! Picture ─► planes 0 … 1 ─► tiles that overlap ─► plan ─► laid together ─► Picture
//! ```

mod tiles;

use std::sync::Arc;

use candle_core::{DType, Device};
use sd_kernels::cpu::Level;
use sd_kernels::plan::{Feed, Options, Plan, Precision, Store};
use sd_kernels::{Graph, Source, Weights};
use sd_models::upscaler::{Config, Upscaler as Network};

pub use self::tiles::Tiling;
use self::tiles::{Axis, Canvas};
use crate::checkpoint::{Checkpoint, Family, detect, printable};
use crate::device::is_eager;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::picture::{Filter, Grey, MAX_SIDE, Picture};
use crate::weights::CheckpointSource;
use crate::weights::upscaler;

/// How often a network is applied at most to reach a factor.
const MOST_PASSES: usize = 3;
/// The largest factor that can be asked for.
pub const MAX_FACTOR: f64 = 64.0;

/// A network that makes pictures larger, ready to run.
pub struct Upscaler {
    network: Network,
    config: Config,
    device: Device,
    dtype: DType,
    /// Packed weights, where plans run the network; else the eager executor has them as tensors.
    store: Option<Store>,
}

/// Channels-first numbers of a picture, 0 to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Planes {
    /// `[channels, height, width]`.
    pub values: Vec<f32>,
    /// Pixels a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

/// What is told while a picture is made: tiles done, and how many there are. False stops.
pub type Watch<'a> = dyn FnMut(usize, usize) -> bool + 'a;

impl Upscaler {
    /// Reads an upscaler from a file.
    ///
    /// # Errors
    /// [`Error::BadModel`] when the file is something else, another network than those that are built, or not whole.
    pub fn load(checkpoint: &Checkpoint, device: &Device, dtype: DType) -> Result<Self> {
        let refused = |reason: String| Error::bad_model(checkpoint.path(), reason);
        let tensors = checkpoint.single().ok_or_else(|| {
            refused("it is a folder, expected the file of an upscaler".to_owned())
        })?;
        let shapes = |name: &str| tensors.info(name).map(|info| info.shape.clone());
        let found = upscaler::read(&shapes).map_err(|reason| {
            let detection = detect(checkpoint);
            refused(match detection.family {
                Family::Upscaler | Family::Unknown => reason,
                _ => format!(
                    "this is {}, expected an upscaler (of the ESRGAN family, SwinIR, Swin2SR, HAT)",
                    detection.title()
                ),
            })
        })?;
        let config = found.config.clone();
        if config.input() != config.output() || !matches!(config.input(), 1 | 3) {
            return Err(refused(format!(
                "the upscaler makes {} channels out of {}, expected 3 out of 3 or 1 out of 1",
                config.output(),
                config.input()
            )));
        }
        let layout = found.layout.clone();
        let source = Arc::new(CheckpointSource::new(Arc::clone(&tensors), layout));
        let weights = Weights::new(Arc::clone(&source) as Arc<dyn Source>, dtype, device);
        let network = Network::load(&weights, &config);
        let planned = device.is_cpu() && !is_eager();
        let asked = if planned {
            weights.check()
        } else {
            weights.finish()
        };
        asked.map_err(|error| refused(error.to_string()))?;
        let known = source.found();
        let mut rest = tensors.names().filter(|name| !known.contains(*name));
        if let Some(name) = rest.find(|name| found.covers(name)) {
            return Err(refused(format!(
                "the tensor `{}` has no place in a network of the {} kind, so the file is damaged or of another kind",
                printable(name),
                config.name()
            )));
        }
        Ok(Self {
            network,
            config,
            device: device.clone(),
            dtype,
            store: planned.then(Store::default),
        })
    }

    /// The structure of the network.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// How many pixels wide the network makes one pixel.
    pub fn scale(&self) -> usize {
        self.config.scale()
    }

    /// The picture, larger by the network's factor. Alpha passes through the network as a grey picture, unless it is the same everywhere.
    ///
    /// # Errors
    /// [`Error::Usage`] when the result would be larger than pictures may be; [`Error::NoMemory`] when it does not fit in memory;
    /// [`Error::Interrupted`] when `watch` says so; whatever the network gives.
    pub fn enlarge(
        &self,
        picture: &Picture,
        tiling: Tiling,
        watch: &mut Watch<'_>,
    ) -> Result<Picture> {
        let size = (picture.width() as usize, picture.height() as usize);
        let (width, height) = self.result_size(size)?;
        let plane = alpha_plane(picture);
        let runs = match (self.config.input(), &plane) {
            (1, Some(_)) => 4,
            (1, None) => 3,
            (_, Some(_)) => 2,
            (_, None) => 1,
        };
        let mut done_runs = 0;
        let mut run = |values: &[f32]| -> Result<Vec<f32>> {
            let planes = Planes {
                values: values.to_vec(),
                width: size.0,
                height: size.1,
            };
            let before = done_runs;
            done_runs += 1;
            let larger = self.run(&planes, tiling, &mut |done, all| {
                watch(before * all + done, runs * all)
            })?;
            Ok(larger.values)
        };
        let planar = picture.to_planar();
        let area = size.0 * size.1;
        let colours = match self.config.input() {
            1 => {
                let planes = planar.chunks(area).map(&mut run);
                planes.collect::<Result<Vec<_>>>()?.concat()
            }
            _ => run(&planar)?,
        };
        let larger = Picture::from_planar(width, height, &colours)?;
        drop(colours);
        let alpha = match (picture.alpha(), plane) {
            (None, _) => None,
            (Some(alpha), None) => {
                let value = alpha.values().first().copied().unwrap_or(u8::MAX);
                let count = width as usize * height as usize;
                Some(Grey::new(width, height, vec![value; count])?)
            }
            (Some(_), Some(plane)) => {
                let copies = match self.config.input() {
                    1 => run(&plane)?.repeat(3),
                    _ => run(&plane.repeat(3))?,
                };
                Some(Picture::from_planar(width, height, &copies)?.to_luma())
            }
        };
        larger.with_alpha(alpha)
    }

    /// The picture, larger by `factor`: the network is applied until it is large enough, three times at most, and what comes out is resized
    /// (Lanczos) to `factor` times the sides, rounded; so does A1111, but for rounding to multiples of 8.
    ///
    /// # Errors
    /// As [`Upscaler::enlarge`].
    pub fn enlarge_to(
        &self,
        picture: &Picture,
        factor: f64,
        tiling: Tiling,
        watch: &mut Watch<'_>,
    ) -> Result<Picture> {
        if !(factor.is_finite() && factor > 0.0 && factor <= MAX_FACTOR) {
            return Err(Error::Usage(format!(
                "the scale is {factor}, expected more than 0 and at most {MAX_FACTOR}"
            )));
        }
        let side = |pixels: u32| (f64::from(pixels) * factor).round().max(1.0);
        let (width, height) = (side(picture.width()), side(picture.height()));
        if width > f64::from(MAX_SIDE) || height > f64::from(MAX_SIDE) {
            return Err(too_large(width, height));
        }
        // at most MAX_SIDE
        let (width, height) = (width as u32, height as u32);
        let larger = self.enlarge_past(picture, (width, height), tiling, watch)?;
        larger.resize(width, height, Filter::Lanczos)
    }

    /// The network is applied until the picture has at least this width and height, three times at most.
    ///
    /// # Errors
    /// As [`Upscaler::enlarge`].
    pub fn enlarge_past(
        &self,
        picture: &Picture,
        (width, height): (u32, u32),
        tiling: Tiling,
        watch: &mut Watch<'_>,
    ) -> Result<Picture> {
        let mut larger = self.enlarge(picture, tiling, watch)?;
        for _ in 1..MOST_PASSES {
            let enough = larger.width() >= width && larger.height() >= height;
            if enough || self.scale() == 1 {
                break;
            }
            larger = self.enlarge(&larger, tiling, watch)?;
        }
        Ok(larger)
    }

    /// Planes of as many channels as the network takes → larger planes, not clipped.
    ///
    /// # Errors
    /// As [`Upscaler::enlarge`].
    pub fn run(&self, planes: &Planes, tiling: Tiling, watch: &mut Watch<'_>) -> Result<Planes> {
        let (channels, scale) = (self.config.input(), self.scale());
        if planes.width * planes.height * channels != planes.values.len()
            || planes.values.is_empty()
        {
            return Err(Error::Usage(format!(
                "{} numbers are no {channels} planes of {}x{}",
                planes.values.len(),
                planes.width,
                planes.height
            )));
        }
        let multiple = self.config.multiple();
        let padded = tiles::padded(planes, channels, multiple);
        let (across, down) = self.axes((padded.width, padded.height), tiling)?;
        let mut runner = self.runner((across.tile(), down.tile()))?;
        let mut canvas = Canvas::new(
            channels,
            (planes.width * scale, planes.height * scale),
            scale,
        )?;
        let all = across.count() * down.count();
        let mut done = 0;
        for y in 0..down.count() {
            for x in 0..across.count() {
                if !watch(done, all) {
                    return Err(Error::Interrupted);
                }
                let tile = tiles::cut(&padded, channels, (&across, x), (&down, y));
                canvas.add(runner.call(&tile)?, (&across, x), (&down, y));
                done += 1;
            }
        }
        watch(done, all);
        Ok(canvas.finish())
    }

    /// How many tiles [`Upscaler::run`] takes for planes of that width and height.
    ///
    /// # Errors
    /// When the network cannot take the size.
    pub fn tiles(&self, (width, height): (usize, usize), tiling: Tiling) -> Result<usize> {
        let multiple = self.config.multiple();
        let size = (
            width.next_multiple_of(multiple),
            height.next_multiple_of(multiple),
        );
        let (across, down) = self.axes(size, tiling)?;
        Ok(across.count() * down.count())
    }

    /// How tiles lie along both sides.
    fn axes(&self, (width, height): (usize, usize), tiling: Tiling) -> Result<(Axis, Axis)> {
        let multiple = self.config.multiple();
        // farther than that lies nothing
        let reach = self.config.reach().unwrap_or(MAX_SIDE as usize);
        let side = match tiling.side {
            Some(0) => width.max(height),
            Some(side) => side,
            None => self.fitting((width, height))?,
        };
        let overlap = tiling
            .overlap
            .unwrap_or_else(|| tiles::overlap(reach, side));
        if overlap > side / 2 && side < width.max(height) {
            return Err(Error::Usage(format!(
                "tiles of {side} pixels cannot overlap by {overlap}, expected at most half a tile"
            )));
        }
        let axis = |length| Axis::new(length, (side, overlap), (reach, multiple));
        Ok((axis(width), axis(height)))
    }

    /// The largest side of tiles for which there is room, among those that are tried.
    fn fitting(&self, (width, height): (usize, usize)) -> Result<usize> {
        /// Larger tiles than have room here lose little to overlaps.
        const MOST_BYTES: usize = 2 << 30;
        /// The part of what is free that may be taken.
        const SHARE: u64 = 4;
        const SIDES: [usize; 10] = [2048, 1536, 1024, 768, 512, 384, 320, 256, 192, 128];
        let free = Memory::of_networks().available.map(|free| free / SHARE);
        let room = free.map_or(MOST_BYTES, |free| {
            usize::try_from(free).map_or(MOST_BYTES, |free| free.min(MOST_BYTES))
        });
        let whole = width.max(height);
        let fits = |side: usize| -> Result<bool> {
            Ok(self.buffers((side.min(width), side.min(height)))? <= room)
        };
        for side in std::iter::once(whole).chain(SIDES) {
            if side <= whole.min(2 * SIDES[0]) && fits(side)? {
                return Ok(side);
            }
        }
        Ok(96.min(whole))
    }

    /// Bytes between layers for a tile.
    fn buffers(&self, size: (usize, usize)) -> Result<usize> {
        let (graph, output) = self.record(size)?;
        if self.store.is_none() {
            let bytes = graph.peak_elements() * self.dtype.size_in_bytes() as u64;
            return Ok(usize::try_from(bytes).unwrap_or(usize::MAX));
        }
        Ok(Plan::sizes(&graph, &output, &self.options())?.buffers)
    }

    fn record(&self, (width, height): (usize, usize)) -> Result<(Graph, sd_kernels::Tensor)> {
        let multiple = self.config.multiple();
        let graph = Graph::new();
        let shape = [
            1,
            self.config.input(),
            height.next_multiple_of(multiple),
            width.next_multiple_of(multiple),
        ];
        let output = self.network.forward(&graph.input("picture", &shape))?;
        Ok((graph, output))
    }

    fn options(&self) -> Options {
        let precision = match self.dtype {
            DType::BF16 => Precision::Bf16,
            _ => Precision::F32,
        };
        Options::new(Level::current(), precision)
    }

    fn runner(&self, size: (usize, usize)) -> Result<Runner<'_>> {
        let plan = match &self.store {
            Some(store) => {
                let (graph, output) = self.record(size)?;
                Some(Plan::compile(&graph, &output, &self.options(), store)?)
            }
            None => None,
        };
        Ok(Runner {
            upscaler: self,
            plan,
            size,
            out: Vec::new(),
        })
    }

    fn result_size(&self, (width, height): (usize, usize)) -> Result<(u32, u32)> {
        let side = |pixels: usize| u32::try_from(pixels.saturating_mul(self.scale())).ok();
        match (side(width), side(height)) {
            (Some(width), Some(height)) if width.max(height) <= MAX_SIDE => Ok((width, height)),
            _ => Err(too_large(
                (width * self.scale()) as f64,
                (height * self.scale()) as f64,
            )),
        }
    }
}

fn too_large(width: f64, height: f64) -> Error {
    Error::Usage(format!(
        "the result would have {width}x{height} pixels, expected at most {MAX_SIDE} a side; give a smaller picture"
    ))
}

/// Alpha in 0 … 1, where it differs from pixel to pixel.
fn alpha_plane(picture: &Picture) -> Option<Vec<f32>> {
    let alpha = picture.alpha()?;
    let values = alpha.values();
    let same = values.iter().all(|value| Some(value) == values.first());
    (!same).then(|| values.iter().map(|&v| f32::from(v) / 255.0).collect())
}

/// The network at one size.
struct Runner<'a> {
    upscaler: &'a Upscaler,
    plan: Option<Plan>,
    size: (usize, usize),
    out: Vec<f32>,
}

impl Runner<'_> {
    /// `[channels, h, w]` → `[channels, scale · h, scale · w]`.
    fn call(&mut self, values: &[f32]) -> Result<&[f32]> {
        if let Some(plan) = &mut self.plan {
            let feed = Feed {
                name: "picture",
                values,
            };
            plan.run(&[feed], &mut self.out)?;
            return Ok(&self.out);
        }
        let Upscaler {
            network,
            config,
            device,
            dtype,
            ..
        } = self.upscaler;
        let shape = (1, config.input(), self.size.1, self.size.0);
        let picture = candle_core::Tensor::from_slice(values, shape, device)?.to_dtype(*dtype)?;
        let larger = network.forward(&picture.into())?.into_data()?;
        self.out = larger.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        Ok(&self.out)
    }
}
