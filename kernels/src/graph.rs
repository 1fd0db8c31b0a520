//! Recording: the calls of a network become nodes with known shapes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::op::LayerClass;
use crate::tensor::{Tensor, Value};
use crate::{Error, Op, Result, Window};

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

/// Group norms that are not each picture's own, where a graph is a part of a larger picture: the first ones go by means and variances that are
/// inputs, and those of the next are what is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedNorms {
    /// Norms whose statistics are given, by the names of [`Graph::norm_input`].
    pub given: usize,
    /// Height and width of what the network is given.
    pub of: (usize, usize),
    /// The part of that which the next norm's statistics are taken of; the rest is there to be convolved.
    pub part: Window,
}

/// What has been recorded.
#[derive(Default)]
struct Recorded {
    nodes: Vec<Node>,
    shared: Option<SharedNorms>,
    /// Group norms so far.
    norms: usize,
    /// Where the statistics of the first norm are that has none given.
    statistics: Option<NodeId>,
}

/// A network recorded at one shape. Cloning gives another handle to the same graph.
#[derive(Clone, Default)]
pub struct Graph(Arc<Mutex<Recorded>>);

impl Graph {
    /// An empty graph.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty graph whose group norms are shared.
    pub fn sharing(norms: SharedNorms) -> Self {
        Self(Arc::new(Mutex::new(Recorded {
            shared: Some(norms),
            ..Recorded::default()
        })))
    }

    /// The name of the input that norm `index` takes its statistics from, `[1, 2 · groups]`.
    pub fn norm_input(index: usize) -> String {
        format!("norm {index}")
    }

    /// How many group norms have been recorded.
    pub fn norms(&self) -> usize {
        self.lock().norms
    }

    /// The statistics of the first norm that has none given.
    pub fn statistics(&self) -> Option<Tensor> {
        let recorded = self.lock();
        let id = recorded.statistics?;
        Some(Tensor(Value::Node {
            graph: self.clone(),
            id,
            shape: recorded.nodes[id].shape.clone(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Recorded> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.lock().nodes.clone()
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
        let id = {
            let mut recorded = self.lock();
            recorded.nodes.push(node);
            recorded.nodes.len() - 1
        };
        Tensor(Value::Node {
            graph: self.clone(),
            id,
            shape,
        })
    }

    /// Counts a group norm; gives the input with its statistics, or asks for them, where they are shared.
    fn share(&self, groups: usize, inputs: &[&Tensor]) -> Result<Option<NodeId>> {
        let (index, shared) = {
            let mut recorded = self.lock();
            recorded.norms += 1;
            (recorded.norms - 1, recorded.shared)
        };
        let Some(shared) = shared.filter(|shared| index <= shared.given) else {
            return Ok(None);
        };
        if index < shared.given {
            let input = self.input(&Self::norm_input(index), &[1, 2 * groups]);
            return Ok(input.node(self));
        }
        let [x] = inputs else {
            return Err(Error::Mixed { op: "group_norm" });
        };
        let (_, _, h, w) = x.dims4()?;
        let scaled = |n: usize, size: usize, of: usize| n * size / of.max(1);
        let (down, across) = (|n| scaled(n, h, shared.of.0), |n| scaled(n, w, shared.of.1));
        let part = shared.part;
        let part = Window {
            top: down(part.top),
            left: across(part.left),
            height: down(part.height),
            width: across(part.width),
        };
        let statistics = crate::ops::apply(Op::Statistics { groups, part }, inputs)?;
        self.lock().statistics = statistics.node(self);
        Ok(None)
    }

    /// Notes a call whose inputs are all nodes of this graph.
    pub(crate) fn record(&self, op: Op, inputs: &[&Tensor], shape: Vec<usize>) -> Result<Tensor> {
        let mut ids = inputs
            .iter()
            .map(|tensor| match &tensor.0 {
                Value::Node { graph, id, .. } if Arc::ptr_eq(&graph.0, &self.0) => Ok(*id),
                _ => Err(Error::Mixed { op: op.name() }),
            })
            .collect::<Result<Vec<_>>>()?;
        if let Op::GroupNorm { groups, .. } = &op {
            ids.extend(self.share(*groups, inputs)?);
        }
        Ok(self.push(Node {
            kind: NodeKind::Compute { op, inputs: ids },
            shape,
        }))
    }
}
