//! Recording: the calls of a network become nodes with known shapes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::op::LayerClass;
use crate::tensor::{Tensor, Value};
use crate::{Error, Op, Result};

/// The place of a node in its graph; inputs always come before those who read them.
pub type NodeId = usize;

/// What a node does.
#[derive(Debug, Clone)]
pub enum NodeKind {
    /// A value given from outside at every run: latents, timestep, context …
    Input(String),
    /// An operation on earlier nodes.
    Compute {
        /// The operation.
        op: Op,
        /// Its inputs, in order.
        inputs: Vec<NodeId>,
    },
}

/// One node: what it does and the shape of its result.
#[derive(Debug, Clone)]
pub struct Node {
    /// What it does.
    pub kind: NodeKind,
    /// The shape of its result.
    pub shape: Vec<usize>,
}

/// A network recorded at one shape. Cloning gives another handle to the same graph.
#[derive(Clone, Default)]
pub struct Graph(Arc<Mutex<Vec<Node>>>);

impl Graph {
    /// An empty graph.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an input of the given shape and gives the tensor that stands for it.
    pub fn input(&self, name: &str, shape: &[usize]) -> Tensor {
        self.push(Node {
            kind: NodeKind::Input(name.to_owned()),
            shape: shape.to_vec(),
        })
    }

    /// The recorded nodes, in an order in which they can be computed.
    pub fn nodes(&self) -> Vec<Node> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Floating-point operations of one run, by layer class.
    pub fn flop_by_class(&self) -> BTreeMap<LayerClass, u64> {
        let nodes = self.nodes();
        let mut sums: BTreeMap<_, u64> = LayerClass::ALL.iter().map(|&c| (c, 0)).collect();
        for node in &nodes {
            if let NodeKind::Compute { op, inputs } = &node.kind {
                let shapes: Vec<&[usize]> =
                    inputs.iter().map(|&i| nodes[i].shape.as_slice()).collect();
                *sums.entry(op.class()).or_default() += op.flop(&shapes, &node.shape);
            }
        }
        sums
    }

    /// The most elements that are alive at once during a run in recorded order, weights not counted.
    pub fn peak_elements(&self) -> u64 {
        let nodes = self.nodes();
        let mut last_use: Vec<NodeId> = (0..nodes.len()).collect();
        for (id, node) in nodes.iter().enumerate() {
            if let NodeKind::Compute { inputs, .. } = &node.kind {
                for &input in inputs {
                    last_use[input] = id;
                }
            }
        }
        let mut dies: Vec<Vec<NodeId>> = vec![Vec::new(); nodes.len()];
        for (id, &end) in last_use.iter().enumerate() {
            dies[end].push(id);
        }
        let size = |id: NodeId| nodes[id].shape.iter().map(|&n| n as u64).product::<u64>();
        let (mut alive, mut peak) = (0, 0);
        for (id, dead) in dies.iter().enumerate() {
            alive += size(id);
            peak = peak.max(alive);
            alive -= dead.iter().map(|&d| size(d)).sum::<u64>();
        }
        peak
    }

    /// Whether both are handles to one graph.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn push(&self, node: Node) -> Tensor {
        let shape = node.shape.clone();
        let mut nodes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.push(node);
        Tensor(Value::Node {
            graph: self.clone(),
            id: nodes.len() - 1,
            shape,
        })
    }

    /// Notes a call whose inputs are all nodes of this graph.
    pub(crate) fn record(&self, op: Op, inputs: &[&Tensor], shape: Vec<usize>) -> Result<Tensor> {
        let ids = inputs
            .iter()
            .map(|tensor| match &tensor.0 {
                Value::Node { graph, id, .. } if Arc::ptr_eq(&graph.0, &self.0) => Ok(*id),
                _ => Err(Error::Mixed { op: op.name() }),
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(self.push(Node {
            kind: NodeKind::Compute { op, inputs: ids },
            shape,
        }))
    }
}
