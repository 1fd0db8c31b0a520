//! What a file says of one tensor, whatever container it lies in: name, type, shape, and where its bytes are.

use std::fmt;
use std::ops::Range;

use safetensors::Dtype;

/// The highest rank of a tensor.
pub(super) const MAX_RANK: usize = 8;
/// The largest dimension of a tensor.
const MAX_DIM: usize = 1 << 31;

/// What a file says of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name in the file. May hold any character: see [`super::printable`].
    pub name: String,
    /// The type of its elements.
    pub dtype: TensorType,
    /// Its dimensions, outermost first: at most 8, each at most 2³¹, their product checked.
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file, counted from the file's beginning; checked to lie inside.
    pub range: Range<usize>,
    /// How many elements of the range lie between neighbours along each axis, where they are not dense and row-major: pickled views.
    pub strides: Option<Vec<usize>>,
}

impl TensorInfo {
    /// How many elements it has.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// How many bytes it takes in the file.
    pub fn size(&self) -> usize {
        self.range.len()
    }

    /// Its elements dense and row-major, copied out of `bytes`, which are those of its range; `None` when they are too few.
    pub(super) fn gather(&self, strides: &[usize], bytes: &[u8]) -> Option<Vec<u8>> {
        let width = self.dtype.bytes(1)?;
        let count = self.elements();
        let mut out = Vec::with_capacity(count.checked_mul(width)?);
        let mut index = vec![0; self.shape.len()];
        for _ in 0..count {
            let element: usize = index
                .iter()
                .zip(strides)
                .map(|(i, stride)| i * stride)
                .sum();
            let start = element * width;
            out.extend_from_slice(bytes.get(start..start + width)?);
            for (i, &dim) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < dim {
                    break;
                }
                *i = 0;
            }
        }
        Some(out)
    }
}

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorType {
    /// Each element by itself.
    Plain(Dtype),
    /// Blocks of neighbours along the last axis, quantised together.
    Block(BlockType),
}

/// ggml's quantised types. A block's layout is described where it is read, in `weights/quantised.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are ggml's and all there is to say")]
pub enum BlockType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

impl TensorType {
    /// Bytes of `elements` of them; `None` when they do not end on a whole byte or block, or there are too many.
    pub fn bytes(self, elements: usize) -> Option<usize> {
        let (unit, bits) = match self {
            Self::Plain(dtype) => (1, dtype.bitsize()),
            Self::Block(block) => (block.elements(), 8 * block.bytes()),
        };
        if !elements.is_multiple_of(unit) {
            return None;
        }
        let bits = (elements / unit).checked_mul(bits)?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

impl BlockType {
    /// Elements of a block.
    pub fn elements(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }
}

impl From<Dtype> for TensorType {
    fn from(dtype: Dtype) -> Self {
        Self::Plain(dtype)
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(dtype) => dtype.fmt(f),
            Self::Block(block) => f.write_str(match block {
                BlockType::Q4_0 => "Q4_0",
                BlockType::Q4_1 => "Q4_1",
                BlockType::Q5_0 => "Q5_0",
                BlockType::Q5_1 => "Q5_1",
                BlockType::Q8_0 => "Q8_0",
                BlockType::Q2K => "Q2_K",
                BlockType::Q3K => "Q3_K",
                BlockType::Q4K => "Q4_K",
                BlockType::Q5K => "Q5_K",
                BlockType::Q6K => "Q6_K",
            }),
        }
    }
}

/// Finds a shape possible: rank, dimensions and their product, also when a zero elsewhere would hide that it does not fit. `shown` is the
/// tensor's name as it may be printed.
pub(super) fn check_shape(shown: &str, shape: &[usize]) -> Result<(), String> {
    if shape.len() > MAX_RANK {
        let rank = shape.len();
        return Err(format!(
            "tensor `{shown}` has {rank} dimensions, and {MAX_RANK} is the limit"
        ));
    }
    if let Some(dim) = shape.iter().find(|&&dim| dim > MAX_DIM) {
        return Err(format!(
            "tensor `{shown}` has a dimension of {dim}, and {MAX_DIM} is the limit"
        ));
    }
    // 64 bits an element, the widest there is
    let mut wide = shape.iter().filter(|&&dim| dim != 0);
    match wide.try_fold(64usize, |bits, &dim| bits.checked_mul(dim)) {
        Some(_) => Ok(()),
        None => Err(format!(
            "tensor `{shown}` has the impossible shape {shape:?}"
        )),
    }
}
