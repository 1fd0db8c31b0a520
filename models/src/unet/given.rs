//! What every block of a UNet is given beside its input, and what it leaves for later calls.

use std::cell::{Cell, RefCell};

use sd_kernels::ops::apply;
use sd_kernels::{Error, Op, Result, Tensor};

use super::transformer::Context;
use crate::lllite::Looking;
use crate::variant::{Earlier, Reuse, Slot, Variant};

/// What an attention looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The text.
    Cross,
    /// What looks.
    Own,
}

/// What every block is given beside its input.
pub(crate) struct Given<'a> {
    /// The embedded timestep.
    pub(super) temb: &'a Tensor,
    /// What cross-attention looks at.
    pub(super) context: Context<'a>,
    pub(super) variant: &'a Variant,
    /// What stands in front of attention.
    pub(super) lites: &'a [Looking<'a>],
    /// What comes from outside in a changed network.
    earlier: Option<&'a Earlier<'a>>,
    /// Height and width of the latents.
    size: (usize, usize),
    /// What entered the last layer of the block on the way up that was computed last.
    pub(super) deep: RefCell<Option<Tensor>>,
    cross: Outcomes,
    own: Outcomes,
    /// Matchings that have been given a choice.
    choices: Cell<usize>,
}

/// What attentions of one kind have seen, in the order of the way through the network.
#[derive(Default)]
struct Outcomes {
    kept: RefCell<Vec<Tensor>>,
    taken: Cell<usize>,
}

impl<'a> Given<'a> {
    pub(crate) fn new(temb: &'a Tensor, context: Context<'a>, variant: &'a Variant) -> Self {
        Self {
            temb,
            context,
            variant,
            lites: &[],
            earlier: None,
            size: (0, 0),
            deep: RefCell::default(),
            cross: Outcomes::default(),
            own: Outcomes::default(),
            choices: Cell::new(0),
        }
    }

    /// The same for a network of latents `size` high and wide, with what comes from outside and what stands in front of attention.
    pub(super) fn with(
        self,
        size: (usize, usize),
        earlier: Option<&'a Earlier<'a>>,
        lites: &'a [Looking<'a>],
    ) -> Self {
        Self {
            size,
            earlier,
            lites,
            ..self
        }
    }

    pub(super) fn note_deep(&self, x: &Tensor) {
        *self.deep.borrow_mut() = Some(x.clone());
    }

    /// A value from outside.
    pub(super) fn outside(&self, slot: Slot, shape: &[usize]) -> Result<Tensor> {
        match self.earlier {
            Some(earlier) => earlier(slot, shape),
            None => Err(Error::Shape {
                op: "unet",
                expected: format!("{slot:?} from outside"),
                got: "nothing".to_owned(),
            }),
        }
    }

    fn of(&self, kind: Kind) -> (&Outcomes, Reuse) {
        match kind {
            Kind::Cross => (&self.cross, self.variant.cross),
            Kind::Own => (&self.own, self.variant.own),
        }
    }

    /// What the next attention of a kind saw in an earlier call, `[b, s, c]`, where it is to be used again.
    pub(super) fn take(&self, kind: Kind, shape: &[usize]) -> Result<Option<Tensor>> {
        let (outcomes, reuse) = self.of(kind);
        if reuse != Reuse::Take {
            return Ok(None);
        }
        let index = outcomes.taken.replace(outcomes.taken.get() + 1);
        let slot = match kind {
            Kind::Cross => Slot::Cross(index),
            Kind::Own => Slot::Own(index),
        };
        self.outside(slot, shape).map(Some)
    }

    /// Whether later calls use what attentions of a kind see.
    pub(super) fn keeps(&self, kind: Kind) -> bool {
        self.of(kind).1 == Reuse::Keep
    }

    /// Notes what an attention saw, where later calls use it.
    pub(super) fn keep(&self, kind: Kind, seen: &Tensor) {
        if self.keeps(kind) {
            self.of(kind).0.kept.borrow_mut().push(seen.clone());
        }
    }

    /// What attentions of a kind have seen and later calls use.
    pub(super) fn kept(&self, kind: Kind) -> Vec<Tensor> {
        self.of(kind).0.kept.take()
    }

    /// Each token's place among those that are left of `x [b, h · w, c]`, what a block begins with, and how many those are; nothing where all of them are.
    pub(super) fn places(
        &self,
        x: &Tensor,
        (h, w): (usize, usize),
    ) -> Result<Option<(Tensor, usize)>> {
        let Some(merging) = self.variant.merging else {
            return Ok(None);
        };
        let Some(merged) = merging.merged((h, w), self.size) else {
            return Ok(None);
        };
        let op = Op::Match { h, w, merged };
        let places = if merging.random {
            let index = self.choices.replace(self.choices.get() + 1);
            let batch = x.shape().first().copied().unwrap_or(1);
            let choice = self.outside(Slot::Choice(index), &[batch, (h / 2) * (w / 2)])?;
            apply(op, &[x, &choice])?
        } else {
            apply(op, &[x])?
        };
        Ok(Some((places, h * w - merged)))
    }
}
