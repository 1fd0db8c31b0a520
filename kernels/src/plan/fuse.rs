//! From a recorded graph to a program: views and joins vanish, what follows a product moves into its epilogue, enlargements move into the
//! convolution behind them, and every value learns how often it is needed.
//!
//! Nodes are visited in recorded order. A product is held back until somebody needs its result; whoever follows and can be absorbed is.

use std::sync::Arc;

use super::Options;
use super::ir::{
    Form, Input, Output, Part, Product, Program, Rate, Step, Type, Value, ValueId, View, Work,
};
use super::types::choose_types;
use crate::cpu::matching::Matching;
use crate::cpu::product::MOST_CHANNELS;
use crate::cpu::winograd;
use crate::graph::{Node, NodeId, NodeKind};
use crate::op::LayerClass;
use crate::{Error, Op, Result};

/// What is known of a node so far.
#[derive(Clone)]
enum State {
    /// Stored.
    Ready(ValueId),
    /// The same numbers as another node.
    Alias(NodeId),
    /// A product that was not needed yet.
    Pending(Box<Product>),
    /// Nodes side by side along the channels, none of them such a row itself.
    Joined(Vec<NodeId>),
    /// A node enlarged to twice its height and width.
    Doubled(NodeId),
    /// Visited, and absorbed by another.
    Absorbed,
}

pub(super) struct Fuser<'a> {
    nodes: &'a [Node],
    options: &'a Options,
    states: Vec<State>,
    /// How many nodes read each, and the caller.
    uses: Vec<usize>,
    rates: Vec<Rate>,
    /// Smallest batch that holds all that differs.
    batches: Vec<usize>,
    /// Pixels of the largest picture.
    most: usize,
    program: Program,
}

/// Fuses the nodes that `output` and `taps` need.
pub(super) fn fuse(
    nodes: &[Node],
    (output, taps): (NodeId, &[NodeId]),
    options: &Options,
) -> Result<Program> {
    let mut fuser = Fuser::new(nodes, (output, taps), options);
    for id in 0..nodes.len() {
        fuser.visit(id)?;
    }
    fuser.program.output = fuser.output(output)?;
    for &tap in taps {
        let tap = fuser.output(tap)?;
        fuser.program.taps.push(tap);
    }
    let mut program = fuser.program;
    choose_types(&mut program, options);
    // stable: within a rate the order stays
    program
        .steps
        .sort_by_key(|step| program.values[step.out].rate);
    Ok(program)
}

impl<'a> Fuser<'a> {
    fn new(nodes: &'a [Node], (output, taps): (NodeId, &[NodeId]), options: &'a Options) -> Self {
        let needed = needed(nodes, (output, taps));
        let mut uses = vec![0; nodes.len()];
        for &wanted in taps.iter().chain([&output]) {
            uses[wanted] += 1;
        }
        let mut rates = Vec::with_capacity(nodes.len());
        let mut batches: Vec<usize> = Vec::with_capacity(nodes.len());
        for (id, node) in nodes.iter().enumerate() {
            let (rate, batch) = match &node.kind {
                NodeKind::Input(name) => options.input(name, &node.shape),
                NodeKind::Compute { inputs, .. } => {
                    for &input in inputs.iter().filter(|_| needed[id]) {
                        uses[input] += 1;
                    }
                    let rate = inputs.iter().map(|&i| rates[i]).max().unwrap_or(Rate::Call);
                    let batch = inputs.iter().map(|&i| batches[i]).max().unwrap_or(1);
                    // timesteps and other values of a run do not mix before the call
                    let mixed =
                        inputs.iter().any(|&i| rates[i] == Rate::Timestep) && rate == Rate::Run;
                    (if mixed { Rate::Call } else { rate }, batch)
                }
            };
            rates.push(rate);
            batches.push(batch);
        }
        let states = vec![State::Absorbed; nodes.len()];
        let pixels = nodes.iter().map(|node| match *node.shape {
            [_, _, h, w] => h * w,
            _ => 0,
        });
        Self {
            nodes,
            options,
            states,
            uses,
            rates,
            batches,
            most: pixels.max().unwrap_or(0),
            program: Program::default(),
        }
    }

    fn visit(&mut self, id: NodeId) -> Result<()> {
        if self.uses[id] == 0 && !matches!(self.nodes[id].kind, NodeKind::Input(_)) {
            return Ok(());
        }
        let nodes = self.nodes;
        self.states[id] = match &nodes[id].kind {
            NodeKind::Input(name) => {
                let value = self.value(id, &nodes[id].shape);
                let shape = nodes[id].shape.clone();
                self.program.inputs.push(Input {
                    name: name.clone(),
                    value,
                    shape,
                });
                State::Ready(value)
            }
            NodeKind::Compute { op, inputs } => self.compute(id, op, inputs)?,
        };
        Ok(())
    }

    fn compute(&mut self, id: NodeId, op: &Op, inputs: &[NodeId]) -> Result<State> {
        let x = inputs[0];
        if let Op::Conv2d { weight, .. } | Op::Linear { weight, .. } = op
            && let Some(&channels) = weight.shape().get(1)
            && channels > MOST_CHANNELS
        {
            return Err(Error::Shape {
                op: op.name(),
                expected: format!("at most {MOST_CHANNELS} channels in"),
                got: format!("{channels}"),
            });
        }
        Ok(match op {
            Op::Flatten | Op::Unflatten { .. } => State::Alias(x),
            Op::Conv2d { .. } => self.convolution(id, op, x)?,
            Op::Linear { weight, bias } => {
                let sources = self.sources(x)?;
                let pixels = |value: ValueId| self.program.values[value].pixels;
                let w = sources.first().map_or(0, |&value| pixels(value));
                let view = |value| View { value, h: 1, w };
                let part = Part {
                    weight: weight.clone(),
                    sources: sources.into_iter().map(view).collect(),
                    kernel: (1, 1),
                    stride: 1,
                    padding: crate::Padding::same(0),
                    wrap: crate::Wrap::default(),
                };
                State::Pending(Box::new(Product {
                    columns: weight.shape()[0],
                    parts: vec![part],
                    biases: bias.iter().cloned().collect(),
                    form: Form::Direct,
                    size: (1, w),
                    image: None,
                    activation: None,
                    slopes: None,
                    scale: None,
                    gate: None,
                    residual: None,
                }))
            }
            // joins of joins are one: dense blocks read the same pieces again and again
            Op::Concat => {
                let pieces = inputs
                    .iter()
                    .flat_map(|&i| match &self.states[self.origin(i)] {
                        State::Joined(pieces) => pieces.clone(),
                        _ => vec![i],
                    });
                State::Joined(pieces.collect())
            }
            Op::Upsample { h, w } => {
                let [_, _, sh, sw] = *self.nodes[x].shape else {
                    return Err(rank(op));
                };
                if (2 * sh, 2 * sw) == (*h, *w) {
                    State::Doubled(x)
                } else {
                    let source = View {
                        value: self.ready(x)?,
                        h: sh,
                        w: sw,
                    };
                    self.emit(
                        id,
                        Work::Upsample {
                            source,
                            h: *h,
                            w: *w,
                        },
                    )
                }
            }
            Op::AddChannels => match self.absorb(x, |p| {
                p.image.is_none() && p.is_linear() && p.form != Form::Gated
            }) {
                Some(mut product) => {
                    product.image = Some(self.ready(inputs[1])?);
                    State::Pending(product)
                }
                None => {
                    let pair = (self.ready(x)?, self.ready(inputs[1])?);
                    self.emit(id, Work::AddChannels(pair.0, pair.1))
                }
            },
            Op::Prelu { slopes } => {
                match self.absorb(x, |p| p.is_linear() && p.form != Form::Gated) {
                    Some(mut product) => {
                        product.slopes = Some(slopes.clone());
                        State::Pending(product)
                    }
                    None => {
                        let (source, slopes) = (self.ready(x)?, slopes.clone());
                        self.emit(id, Work::Prelu { source, slopes })
                    }
                }
            }
            Op::Affine { scale, shift } => {
                let free = |p: &Product| {
                    *shift == 0.0
                        && p.scale.is_none()
                        && p.gate.is_none()
                        && p.residual.is_none()
                        && p.form != Form::Gated
                };
                match self.absorb(x, free) {
                    Some(mut product) => {
                        product.scale = Some(*scale as f32);
                        State::Pending(product)
                    }
                    None => {
                        let work = self.plain(op, inputs)?;
                        self.emit(id, work)
                    }
                }
            }
            Op::Activate(activation) => {
                match self.absorb(x, |p| p.is_linear() && p.form != Form::Gated) {
                    Some(mut product) => {
                        product.activation = Some(*activation);
                        State::Pending(product)
                    }
                    None => {
                        let x = self.ready(x)?;
                        self.emit(id, Work::Activate(x, *activation))
                    }
                }
            }
            Op::Geglu => match self.absorb(x, |p| {
                p.is_linear() && p.image.is_none() && p.form == Form::Direct
            }) {
                Some(mut product) => {
                    product.form = Form::Gated;
                    State::Pending(product)
                }
                None => {
                    let x = self.ready(x)?;
                    self.emit(id, Work::Geglu(x))
                }
            },
            Op::Add => self.add(id, inputs[0], inputs[1])?,
            Op::Gate { slot } => match self.absorb(x, |p| {
                p.gate.is_none() && p.residual.is_none() && p.form == Form::Direct
            }) {
                Some(mut product) => {
                    product.gate = Some((self.ready(inputs[1])?, *slot));
                    State::Pending(product)
                }
                None => {
                    let (source, values) = (self.ready(x)?, self.ready(inputs[1])?);
                    let slot = *slot;
                    self.emit(
                        id,
                        Work::Gate {
                            source,
                            values,
                            slot,
                        },
                    )
                }
            },
            _ => {
                let work = self.plain(op, inputs)?;
                self.emit(id, work)
            }
        })
    }

    /// Operations that take part in no fusion.
    fn plain(&mut self, op: &Op, inputs: &[NodeId]) -> Result<Work> {
        let x = inputs[0];
        Ok(match op {
            Op::GroupNorm {
                weight,
                bias,
                groups,
                eps,
                activation,
            } => Work::GroupNorm {
                sources: self.sources(x)?,
                weight: weight.clone(),
                bias: bias.clone(),
                groups: *groups,
                eps: *eps,
                activation: *activation,
                given: inputs.get(1).map(|&given| self.ready(given)).transpose()?,
            },
            Op::Statistics { groups, part } => Work::Statistics {
                source: self.view(x)?,
                groups: *groups,
                part: *part,
            },
            Op::LayerNorm { weight, bias, eps } => Work::LayerNorm {
                source: self.ready(x)?,
                weight: weight.clone(),
                bias: bias.clone(),
                eps: *eps,
            },
            Op::AdaptiveNorm { eps, shift, scale } => Work::AdaptiveNorm {
                source: self.ready(x)?,
                values: self.ready(inputs[1])?,
                eps: *eps,
                shift: *shift,
                scale: *scale,
            },
            Op::RmsNorm { weight, eps } => Work::RmsNorm {
                source: self.ready(x)?,
                weight: weight.clone(),
                eps: *eps,
            },
            Op::Attention {
                heads,
                causal,
                relative,
            } => Work::Attention {
                q: self.ready(x)?,
                k: self.ready(inputs[1])?,
                v: self.ready(inputs[2])?,
                heads: *heads,
                causal: *causal,
                relative: relative.clone(),
            },
            Op::WindowAttention(windows) => Work::WindowAttention {
                q: self.ready(x)?,
                k: self.ready(inputs[1])?,
                v: self.ready(inputs[2])?,
                windows: windows.clone(),
            },
            Op::Shift { values } => Work::Shift {
                source: self.ready(x)?,
                values: Arc::clone(values),
            },
            Op::Means => Work::Means(self.ready(x)?),
            Op::AttentionMass { heads } => Work::AttentionMass {
                q: self.ready(x)?,
                k: self.ready(inputs[1])?,
                heads: *heads,
            },
            Op::LowFrequencies { scale } => Work::LowFrequencies {
                source: self.view(x)?,
                scale: *scale,
            },
            Op::Amplify { scale, by_mean } => Work::Amplify {
                source: self.ready(x)?,
                scale: *scale as f32,
                by_mean: *by_mean,
            },
            Op::Match { h, w, merged } => Work::Match {
                source: self.ready(x)?,
                choice: inputs.get(1).map(|&id| self.ready(id)).transpose()?,
                sizes: Matching {
                    h: *h,
                    w: *w,
                    merged: *merged,
                },
            },
            Op::Merge { .. } => Work::Merge {
                source: self.ready(x)?,
                places: self.ready(inputs[1])?,
            },
            Op::Unmerge => Work::Unmerge {
                source: self.ready(x)?,
                places: self.ready(inputs[1])?,
                residual: inputs.get(2).map(|&id| self.ready(id)).transpose()?,
            },
            Op::Rotate { heads, turns } => Work::Rotate {
                source: self.ready(x)?,
                heads: *heads,
                turns: turns.clone(),
            },
            Op::Multiply => Work::Multiply(self.ready(x)?, self.ready(inputs[1])?),
            Op::Join => Work::Join(self.ready(x)?, self.ready(inputs[1])?),
            Op::Tokens { first, .. } => Work::Tokens {
                source: self.ready(x)?,
                first: *first,
            },
            Op::AveragePool => Work::AveragePool(self.view(x)?),
            Op::Patchify { patch } => Work::Patchify {
                source: self.view(x)?,
                patch: *patch,
            },
            Op::Unpatchify {
                h, w, patch, order, ..
            } => Work::Unpatchify {
                source: View {
                    value: self.ready(x)?,
                    h: *h,
                    w: *w,
                },
                patch: *patch,
                order: *order,
            },
            Op::ScaleShift => Work::ScaleShift(self.ready(x)?, self.ready(inputs[1])?),
            Op::Affine { scale, shift } => Work::Affine {
                source: self.ready(x)?,
                scale: *scale as f32,
                shift: *shift as f32,
            },
            Op::Sinusoid {
                flip_sin_to_cos,
                freq_shift,
                ..
            } => Work::Sinusoid {
                source: self.ready(x)?,
                flip_sin_to_cos: *flip_sin_to_cos,
                freq_shift: *freq_shift,
            },
            Op::Embed { table } => Work::Embed {
                ids: self.ready(x)?,
                table: table.clone(),
            },
            Op::AddPositions { table, rows } => Work::AddPositions {
                source: self.ready(x)?,
                table: table.clone(),
                rows: rows.clone(),
            },
            other => return Err(rank(other)),
        })
    }

    fn convolution(&mut self, id: NodeId, op: &Op, x: NodeId) -> Result<State> {
        let Op::Conv2d {
            weight,
            bias,
            stride,
            padding,
            wrap,
        } = op
        else {
            return Err(rank(op));
        };
        let ([columns, _, kh, kw], [_, _, oh, ow]) =
            (weight.shape(), self.nodes[id].shape.as_slice())
        else {
            return Err(rank(op));
        };
        let mut part = Part {
            weight: weight.clone(),
            sources: Vec::new(),
            kernel: (*kh, *kw),
            stride: *stride,
            padding: *padding,
            wrap: *wrap,
        };
        let origin = self.origin(x);
        let form = match self.states[origin] {
            State::Doubled(small)
                if (*kh, *kw, *stride, *padding) == (3, 3, 1, crate::Padding::same(1)) =>
            {
                part.sources = self.views(small)?;
                match self.options.form(&part, *columns, ((*oh, *ow), self.most)) {
                    // fewer products than those of four 2×2 convolutions
                    Form::Winograd(winograd::Form::F4) => Form::Winograd(winograd::Form::F4),
                    _ => Form::Upsample,
                }
            }
            _ => {
                part.sources = self.views(x)?;
                self.options.form(&part, *columns, ((*oh, *ow), self.most))
            }
        };
        Ok(State::Pending(Box::new(Product {
            parts: vec![part],
            biases: bias.iter().cloned().collect(),
            form,
            size: (*oh, *ow),
            columns: *columns,
            image: None,
            activation: None,
            slopes: None,
            scale: None,
            gate: None,
            residual: None,
        })))
    }

    /// A sum becomes the residual of the later product; a 1×1 shortcut becomes more of its `k`.
    fn add(&mut self, id: NodeId, a: NodeId, b: NodeId) -> Result<State> {
        let (late, early) = if self.origin(a) > self.origin(b) {
            (a, b)
        } else {
            (b, a)
        };
        let free = |p: &Product| p.residual.is_none();
        // the later of the two may be the shortcut: what matters is who can take the other in
        let wide = |p: &Product| p.parts.iter().any(|part| part.kernel != (1, 1));
        let first = if self.pending(early).is_some_and(wide) {
            (early, late)
        } else {
            (late, early)
        };
        for (taker, other) in [first, (first.1, first.0)] {
            if let Some(mut product) = self.absorb(taker, free) {
                let foldable = |p: &Product| {
                    p.form == Form::Direct
                        && p.image.is_none()
                        && p.is_linear()
                        && p.parts.iter().all(|part| part.stride == 1)
                };
                let same = product.form == Form::Direct
                    && product.is_linear()
                    && self.pending(other).is_some_and(|p| p.size == product.size);
                match self.absorb(other, |p| same && foldable(p)) {
                    Some(shortcut) => {
                        product.parts.extend(shortcut.parts);
                        product.biases.extend(shortcut.biases);
                    }
                    None => product.residual = Some(self.ready(other)?),
                }
                return Ok(State::Pending(product));
            }
        }
        let pair = (self.ready(a)?, self.ready(b)?);
        Ok(self.emit(id, Work::Add(pair.0, pair.1)))
    }

    /// The node behind views.
    fn origin(&self, mut id: NodeId) -> NodeId {
        while let State::Alias(of) = self.states[id] {
            id = of;
        }
        id
    }

    fn pending(&self, id: NodeId) -> Option<&Product> {
        match &self.states[self.origin(id)] {
            State::Pending(product) => Some(product),
            _ => None,
        }
    }

    /// Takes a product that nobody else reads, if it `fits`.
    fn absorb(&mut self, id: NodeId, fits: impl Fn(&Product) -> bool) -> Option<Box<Product>> {
        let mut at = id;
        loop {
            if self.uses[at] != 1 {
                return None;
            }
            match &self.states[at] {
                State::Alias(of) => at = *of,
                State::Pending(product) if fits(product) => break,
                _ => return None,
            }
        }
        match std::mem::replace(&mut self.states[at], State::Absorbed) {
            State::Pending(product) => Some(product),
            other => {
                self.states[at] = other;
                None
            }
        }
    }

    /// The stored value of a node, computing now what was held back.
    fn ready(&mut self, id: NodeId) -> Result<ValueId> {
        let origin = self.origin(id);
        let state = self.states[origin].clone();
        let ready = match state {
            State::Ready(value) => return Ok(value),
            State::Pending(product) => self.emit(origin, Work::Product(*product)),
            State::Joined(pieces) => self.joined(origin, &pieces)?,
            State::Doubled(small) => {
                let [_, _, h, w] = *self.nodes[small].shape else {
                    return Err(Error::Mixed { op: "upsample" });
                };
                let source = View {
                    value: self.ready(small)?,
                    h,
                    w,
                };
                self.emit(
                    origin,
                    Work::Upsample {
                        source,
                        h: 2 * h,
                        w: 2 * w,
                    },
                )
            }
            State::Alias(_) | State::Absorbed => return Err(Error::Mixed { op: "plan" }),
        };
        self.states[origin] = ready;
        match self.states[origin] {
            State::Ready(value) => Ok(value),
            _ => Err(Error::Mixed { op: "plan" }),
        }
    }

    /// Copies nodes side by side, for those who want them in one piece.
    fn joined(&mut self, id: NodeId, pieces: &[NodeId]) -> Result<State> {
        let values = pieces.iter().map(|&piece| self.ready(piece));
        let values = values.collect::<Result<Vec<_>>>()?;
        Ok(self.emit(id, Work::Concat(values)))
    }

    /// A node that is asked for.
    fn output(&mut self, id: NodeId) -> Result<Output> {
        Ok(Output {
            value: self.ready(id)?,
            shape: self.nodes[id].shape.clone(),
        })
    }

    /// The stored values of a node: several where it is a join.
    fn sources(&mut self, id: NodeId) -> Result<Vec<ValueId>> {
        match self.states[self.origin(id)].clone() {
            State::Joined(pieces) => pieces.into_iter().map(|piece| self.ready(piece)).collect(),
            _ => Ok(vec![self.ready(id)?]),
        }
    }

    /// A node that is one picture.
    fn view(&mut self, id: NodeId) -> Result<View> {
        let [_, _, h, w] = *self.nodes[id].shape else {
            return Err(Error::Mixed { op: "view" });
        };
        let value = self.ready(id)?;
        Ok(View { value, h, w })
    }

    fn views(&mut self, id: NodeId) -> Result<Vec<View>> {
        let [_, _, h, w] = *self.nodes[id].shape else {
            return Err(Error::Mixed { op: "conv2d" });
        };
        Ok(self
            .sources(id)?
            .into_iter()
            .map(|value| View { value, h, w })
            .collect())
    }

    fn value(&mut self, id: NodeId, shape: &[usize]) -> ValueId {
        let (pixels, channels) = match *shape {
            [_, c, h, w] => (h * w, c),
            [_, s, c] => (s, c),
            // ids `[b, s]` and vectors `[b, c]` alike
            [_, c] => (1, c),
            _ => (1, 1),
        };
        let (rate, batch) = (self.rates[id], self.batches[id]);
        self.program.values.push(Value {
            rate,
            batch,
            pixels,
            channels,
            kind: Type::F32,
        });
        self.program.values.len() - 1
    }

    fn emit(&mut self, id: NodeId, work: Work) -> State {
        let out = self.value(id, &self.nodes[id].shape);
        let class = match &work {
            Work::Product(product) if product.parts.iter().any(|p| p.kernel != (1, 1)) => {
                LayerClass::Conv3x3
            }
            Work::Product(_) => LayerClass::Linear,
            Work::Attention { .. }
            | Work::WindowAttention { .. }
            | Work::AttentionMass { .. }
            | Work::Match { .. } => LayerClass::Attention,
            Work::GroupNorm { .. }
            | Work::Statistics { .. }
            | Work::LayerNorm { .. }
            | Work::AdaptiveNorm { .. }
            | Work::RmsNorm { .. } => LayerClass::Norm,
            _ => LayerClass::Other,
        };
        self.program.steps.push(Step { work, out, class });
        State::Ready(out)
    }
}

/// Which nodes `output` and `taps` depend on.
fn needed(nodes: &[Node], (output, taps): (NodeId, &[NodeId])) -> Vec<bool> {
    let mut needed = vec![false; nodes.len()];
    for &wanted in taps.iter().chain([&output]) {
        needed[wanted] = true;
    }
    for id in (0..nodes.len()).rev() {
        if let (true, NodeKind::Compute { inputs, .. }) = (needed[id], &nodes[id].kind) {
            for &input in inputs {
                needed[input] = true;
            }
        }
    }
    needed
}

fn rank(op: &Op) -> Error {
    Error::Shape {
        op: op.name(),
        expected: "inputs of the recorded rank".to_owned(),
        got: "another".to_owned(),
    }
}
