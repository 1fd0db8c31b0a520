//! The tensor that networks handle: data, or a node of a graph that is being recorded.

use crate::graph::{Graph, NodeId};
use crate::{Error, Result};

/// A value inside a network: computed at once, or only noted. See the crate's documentation.
#[derive(Clone)]
pub struct Tensor(pub(crate) Value);

#[derive(Clone)]
pub(crate) enum Value {
    Data(candle_core::Tensor),
    Node {
        graph: Graph,
        id: NodeId,
        shape: Vec<usize>,
    },
}

impl Tensor {
    /// The tensor's shape.
    pub fn shape(&self) -> &[usize] {
        match &self.0 {
            Value::Data(tensor) => tensor.dims(),
            Value::Node { shape, .. } => shape,
        }
    }

    /// The sizes of a picture-like tensor `[b, c, h, w]`.
    ///
    /// # Errors
    /// When the rank is not 4.
    pub fn dims4(&self) -> Result<(usize, usize, usize, usize)> {
        match *self.shape() {
            [b, c, h, w] => Ok((b, c, h, w)),
            _ => Err(Error::Shape {
                op: "dims4",
                expected: "[b, c, h, w]".to_owned(),
                got: format!("{:?}", self.shape()),
            }),
        }
    }

    /// The node of `graph` that this is.
    pub(crate) fn node(&self, graph: &Graph) -> Option<NodeId> {
        match &self.0 {
            Value::Node { graph: own, id, .. } if own.is(graph) => Some(*id),
            _ => None,
        }
    }

    /// The data behind an eager tensor.
    ///
    /// # Errors
    /// When the tensor is a node of a recording, which holds no data.
    pub fn into_data(self) -> Result<candle_core::Tensor> {
        match self.0 {
            Value::Data(tensor) => Ok(tensor),
            Value::Node { .. } => Err(Error::Mixed { op: "into_data" }),
        }
    }
}

impl From<candle_core::Tensor> for Tensor {
    fn from(tensor: candle_core::Tensor) -> Self {
        Self(Value::Data(tensor))
    }
}
