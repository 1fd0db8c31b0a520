//! Weights as networks see them: named, shaped, and read when an executor wants them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device};
use rayon::prelude::*;

use crate::{Error, Result};

/// Where the weights of one network come from, under the network's own names.
pub trait Source: Send + Sync {
    /// The shape of a tensor, or `None` when there is none of that name. A source that makes weights up gives the `wanted` shape.
    fn shape(&self, name: &str, wanted: &[usize]) -> Option<Vec<usize>>;

    /// A type that holds every number of a tensor as it is read: the one that it is stored as, or a wider one; for compressed numbers one that
    /// rounds far less than they did already. F32 where nothing is known.
    fn dtype(&self, name: &str) -> DType;

    /// Whether a tensor is kept in less room than 16-bit numbers take, so that whoever packs it should not keep what it becomes.
    fn is_compressed(&self, _name: &str) -> bool {
        false
    }

    /// What is added to the results of a linear layer or a convolution with this weight, in place of a change of the weight itself.
    fn beside(&self, _name: &str) -> Vec<LowRank> {
        Vec::new()
    }

    /// Opens a tensor to be read as `shape`, which holds as many numbers.
    ///
    /// # Errors
    /// When the tensor cannot be read; the message names it.
    fn open(&self, name: &str, shape: &[usize]) -> Result<Box<dyn Reader + '_>>;
}

/// The numbers of one tensor, converted as they are read: a piece at a time, by several threads.
pub trait Reader: Send + Sync {
    /// The numbers from `first` on, row-major, in f32: as many as `out` has.
    ///
    /// # Panics
    /// When the tensor ends before.
    fn read(&self, first: usize, out: &mut [f32]);
}

/// A change of a weight as two thin ones: `x ↦ scale · up(down(x))`, where `down` is a layer of the weight's own kind to `rank` channels, and `up` is
/// linear.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// What the source calls `down`, `[rank, inputs, ..]`.
    pub down: String,
    /// What the source calls `up`, `[outputs, rank]`.
    pub up: String,
    /// Channels in between.
    pub rank: usize,
    /// The factor.
    pub scale: f32,
}

/// A [`LowRank`] change, ready to be computed.
pub(crate) struct Beside {
    /// `[rank, inputs, ..]`, of the weight's rank.
    pub(crate) down: Param,
    /// `[outputs, rank]`, with as many axes.
    pub(crate) up: Param,
    pub(crate) scale: f32,
}

struct Inner {
    name: String,
    shape: Vec<usize>,
    dtype: DType,
    device: Device,
    source: Arc<dyn Source>,
    value: Mutex<Option<candle_core::Tensor>>,
    /// What was computed beside it, by name, so that the eager executor reads that once.
    beside: Mutex<BTreeMap<String, Param>>,
}

/// One weight: a name, the shape that the network wants, and the way to its values.
#[derive(Clone)]
pub struct Param(Arc<Inner>);

impl Param {
    /// The weight's full name inside its network.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The shape that the network asked for.
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// A type that holds every number as it is read.
    pub fn dtype(&self) -> DType {
        self.0.source.dtype(&self.0.name)
    }

    /// Whether it is kept in less room than 16-bit numbers take.
    pub fn is_compressed(&self) -> bool {
        self.0.source.is_compressed(&self.0.name)
    }

    /// What is to be added to the results of a layer with this weight.
    pub(crate) fn beside(&self) -> Vec<Beside> {
        let changes = self.0.source.beside(&self.0.name);
        let mut known = self.0.beside.lock().unwrap_or_else(PoisonError::into_inner);
        let mut param = |name: String, shape: Vec<usize>| {
            let new = |name: &String| {
                Self(Arc::new(Inner {
                    name: name.clone(),
                    shape,
                    dtype: self.0.dtype,
                    device: self.0.device.clone(),
                    source: Arc::clone(&self.0.source),
                    value: Mutex::default(),
                    beside: Mutex::default(),
                }))
            };
            known.entry(name).or_insert_with_key(new).clone()
        };
        let mut beside = |change: LowRank| {
            let mut down = self.0.shape.clone();
            let mut up = vec![1; down.len()];
            if let ([first, ..], [outputs, rank, ..]) = (down.as_mut_slice(), up.as_mut_slice()) {
                (*outputs, *rank) = (*first, change.rank);
                *first = change.rank;
            }
            Beside {
                down: param(change.down, down),
                up: param(change.up, up),
                scale: change.scale,
            }
        };
        changes.into_iter().map(&mut beside).collect()
    }

    /// Opens the weight to be read anew: for executors that pack weights into a layout of their own.
    ///
    /// # Errors
    /// When the source cannot read it.
    pub fn open(&self) -> Result<Box<dyn Reader + '_>> {
        self.0.source.open(&self.0.name, &self.0.shape)
    }

    /// All numbers, row-major.
    ///
    /// # Errors
    /// When the source cannot read them.
    pub fn numbers(&self) -> Result<Vec<f32>> {
        let mut numbers = vec![0.0; self.0.shape.iter().product()];
        self.open()?.read(0, &mut numbers);
        Ok(numbers)
    }

    /// The weight as a candle tensor, read at the first call and kept until [`Weights::release`].
    ///
    /// # Errors
    /// When the source cannot read it.
    pub fn value(&self) -> Result<candle_core::Tensor> {
        let mut kept = self.0.value.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tensor) = &*kept {
            return Ok(tensor.clone());
        }
        let shape = self.0.shape.as_slice();
        let tensor = candle_core::Tensor::from_vec(self.numbers()?, shape, &Device::Cpu)?;
        let tensor = tensor.to_dtype(self.0.dtype)?.to_device(&self.0.device)?;
        *kept = Some(tensor.clone());
        Ok(tensor)
    }
}

impl fmt::Display for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` {:?}", self.0.name, self.0.shape)
    }
}

impl fmt::Debug for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[derive(Default)]
struct Ledger {
    asked: Vec<Param>,
    problems: Vec<String>,
}

/// A cursor into the weights of one network: `weights.at("down_blocks").at(0)` and then [`Weights::param`].
///
/// It keeps a ledger of all that was asked for. A missing tensor or a wrong shape does not fail at once: [`Weights::finish`] reports
/// all of them together.
#[derive(Clone)]
pub struct Weights {
    source: Arc<dyn Source>,
    dtype: DType,
    device: Device,
    prefix: String,
    ledger: Arc<Mutex<Ledger>>,
}

/// How many problems one message lists.
const LISTED: usize = 10;

impl Weights {
    /// The weights of `source`, to be held as `dtype` on `device` by the eager executor.
    pub fn new(source: Arc<dyn Source>, dtype: DType, device: &Device) -> Self {
        Self {
            source,
            dtype,
            device: device.clone(),
            prefix: String::new(),
            ledger: Arc::default(),
        }
    }

    /// Where the weights come from.
    pub fn source(&self) -> &Arc<dyn Source> {
        &self.source
    }

    /// Weights of another source, held in the same way; nothing of it was asked for yet.
    #[must_use]
    pub fn over(&self, source: Arc<dyn Source>) -> Self {
        Self::new(source, self.dtype, &self.device)
    }

    /// The weights below `name`.
    #[must_use]
    pub fn at(&self, name: impl fmt::Display) -> Self {
        let prefix = if self.prefix.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.prefix)
        };
        Self {
            prefix,
            ..self.clone()
        }
    }

    /// The name below which weights are asked for.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    fn full_name(&self, name: &str) -> String {
        if self.prefix.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.prefix)
        }
    }

    /// Asks for a weight. Axes of size one at either end do not count: a linear layer may read what a file keeps as a 1×1 convolution.
    pub fn param(&self, name: &str, shape: &[usize]) -> Param {
        let full = self.full_name(name);
        let found = self.source.shape(&full, shape);
        let param = Param(Arc::new(Inner {
            name: full,
            shape: shape.to_vec(),
            dtype: self.dtype,
            device: self.device.clone(),
            source: Arc::clone(&self.source),
            value: Mutex::default(),
            beside: Mutex::default(),
        }));
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        match found {
            None => ledger.problems.push(format!(
                "tensor `{}` is missing, expected {shape:?}",
                param.name()
            )),
            Some(got) if significant(&got) != significant(shape) => ledger.problems.push(format!(
                "tensor `{}` has shape {got:?}, expected {shape:?}",
                param.name()
            )),
            Some(_) => ledger.asked.push(param.clone()),
        }
        param
    }

    /// Ends the loading of a network: fails if anything was missing or misshapen, else reads every weight (all cores) and gives
    /// the names that were asked for.
    ///
    /// # Errors
    /// [`Error::Weights`] that lists up to ten problems; whatever reading a tensor gives.
    pub fn finish(&self) -> Result<BTreeSet<String>> {
        let names = self.check()?;
        let asked = {
            let ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
            ledger.asked.clone()
        };
        asked
            .par_iter()
            .try_for_each(|param| param.value().map(|_| ()))?;
        Ok(names)
    }

    /// Lets go of every tensor that is kept; the next use reads it again.
    pub fn release(&self) {
        self.release_if(&|_| true);
    }

    /// The same for tensors of these names.
    pub fn release_if(&self, fits: &dyn Fn(&str) -> bool) {
        let ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        for param in ledger.asked.iter().filter(|param| fits(param.name())) {
            *param.0.value.lock().unwrap_or_else(PoisonError::into_inner) = None;
            let mut beside = param
                .0
                .beside
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            beside.clear();
        }
    }

    /// Bytes of everything that was asked for so far, in the type that the eager executor holds.
    pub fn bytes(&self) -> u64 {
        let ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let size = self.dtype.size_in_bytes() as u64;
        ledger
            .asked
            .iter()
            .map(|param| param.shape().iter().map(|&n| n as u64).product::<u64>() * size)
            .sum()
    }

    /// Like [`Weights::finish`], reading nothing: for recording a network and for executors that pack weights themselves.
    ///
    /// # Errors
    /// [`Error::Weights`] that lists up to ten problems.
    pub fn check(&self) -> Result<BTreeSet<String>> {
        let ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        if ledger.problems.is_empty() {
            return Ok(ledger.asked.iter().map(|p| p.name().to_owned()).collect());
        }
        let mut message = ledger.problems[..ledger.problems.len().min(LISTED)].join("; ");
        if ledger.problems.len() > LISTED {
            message += &format!("; and {} more", ledger.problems.len() - LISTED);
        }
        Err(Error::Weights(message))
    }
}

/// A shape without the axes of size one at its ends.
fn significant(shape: &[usize]) -> &[usize] {
    let start = shape.iter().position(|&n| n != 1).unwrap_or(shape.len());
    let end = shape.iter().rposition(|&n| n != 1).map_or(start, |i| i + 1);
    &shape[start..end]
}
