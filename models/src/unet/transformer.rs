//! The spatial transformer: pixels look at each other and at the text (diffusers `Transformer2DModel`, `BasicTransformerBlock`).

use std::cell::Cell;

use sd_kernels::{Error, Op, Result, Tensor, Weights, ops};

use super::config::Level;
use super::given::{Given, Kind};
use super::image_prompt::ImagePrompt;
use crate::layers::{Attention, FeedForward, GroupNorm, LayerNorm, Linear};
use crate::lllite::steered;

/// Epsilon of the group norm in front, whatever the network's own.
const GROUP_EPS: f64 = 1e-6;
/// Epsilon of the layer norms.
const LAYER_EPS: f64 = 1e-5;

/// What cross-attention looks at.
pub(crate) struct Context<'a> {
    /// `[b, t, context]`.
    text: &'a Tensor,
    images: &'a [ImagePrompt<'a>],
    /// Cross-attentions that have looked at the images.
    seen: Cell<usize>,
}

impl<'a> Context<'a> {
    pub(crate) fn new(text: &'a Tensor, images: &'a [ImagePrompt<'a>]) -> Self {
        Self {
            text,
            images,
            seen: Cell::new(0),
        }
    }

    /// What the next cross-attention, in the order of the way through the network, sees by `queries [b, s, c]`; on top of the text in `seen`.
    fn images(&self, queries: &Tensor, seen: Tensor, heads: usize) -> Result<Tensor> {
        let index = self.seen.replace(self.seen.get() + 1);
        self.images.iter().try_fold(seen, |seen, image| {
            let more = image.attend(index, queries, heads)?;
            ops::add(&seen, &ops::affine(&more, image.scale, 0.0)?)
        })
    }

    /// Fails when the images have layers that nobody has used.
    pub(crate) fn finish(&self) -> Result<()> {
        let seen = self.seen.get();
        match self.images.iter().find(|image| image.layers.len() != seen) {
            Some(image) => Err(Error::Shape {
                op: "image prompt",
                expected: format!("a layer for each of {seen} cross-attentions"),
                got: image.layers.len().to_string(),
            }),
            None => Ok(()),
        }
    }
}

/// norm, linear in, blocks, linear out, plus the input. Files keep the two projections as linear layers or as 1×1 convolutions:
/// the same arithmetic.
pub(super) struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<Block>,
    proj_out: Linear,
}

impl Transformer {
    pub(super) fn load(weights: &Weights, groups: usize, depth: usize, level: &Level) -> Self {
        let c = level.channels;
        Self {
            norm: GroupNorm::load(&weights.at("norm"), c, groups, GROUP_EPS, None),
            proj_in: Linear::load(&weights.at("proj_in"), c, c),
            blocks: (0..depth)
                .map(|i| Block::load(&weights.at("transformer_blocks").at(i), level))
                .collect(),
            proj_out: Linear::load(&weights.at("proj_out"), c, c),
        }
    }

    /// The names of its self-attentions.
    pub(super) fn self_attentions(&self) -> impl Iterator<Item = &str> {
        let blocks = self.blocks.iter();
        let blocks = blocks.filter(|block| !block.only_cross_attention);
        blocks.map(|block| block.attn1_name.as_str())
    }

    /// `x [b, c, h, w]` → `[b, c, h, w]`.
    pub(super) fn forward(&self, x: &Tensor, given: &Given<'_>) -> Result<Tensor> {
        let (_, _, h, w) = x.dims4()?;
        let sequence = ops::flatten(&self.norm.forward(x)?)?; // [b, h·w, c]
        let mut y = self.proj_in.forward(&sequence)?;
        for block in &self.blocks {
            y = block.forward(&y, (h, w), given)?;
        }
        let y = ops::unflatten(&self.proj_out.forward(&y)?, h, w)?; // [b, c, h, w]
        ops::add(x, &y)
    }

    /// How much pixels of `x [b, c, h, w]` are looked at in the first block: `[b, 1, h, w]`.
    pub(super) fn mass(&self, x: &Tensor, given: &Given<'_>) -> Result<Option<Tensor>> {
        let (_, _, h, w) = x.dims4()?;
        let Some(block) = self.blocks.first() else {
            return Ok(None);
        };
        let sequence = ops::flatten(&self.norm.forward(x)?)?;
        let y = block.norm1.forward(&self.proj_in.forward(&sequence)?)?;
        let [q, k, _] = block.looks(y, None, given)?;
        ops::unflatten(&block.attn1.mass(&q, &k)?, h, w).map(Some)
    }
}

/// Self-attention, cross-attention, feed-forward, each behind a norm and around a residual.
struct Block {
    norm1: LayerNorm,
    attn1: Attention,
    attn1_name: String,
    only_cross_attention: bool,
    norm2: LayerNorm,
    attn2: Attention,
    attn2_name: String,
    norm3: LayerNorm,
    feed_forward: FeedForward,
}

impl Block {
    fn load(weights: &Weights, level: &Level) -> Self {
        let (c, heads) = (level.channels, level.heads);
        let norm = |name| LayerNorm::load(&weights.at(name), c, LAYER_EPS);
        let attention =
            |name, context| Attention::load(&weights.at(name), c, context, heads, false);
        let first_context = if level.only_cross_attention {
            level.context
        } else {
            c
        };
        Self {
            norm1: norm("norm1"),
            attn1: attention("attn1", first_context),
            attn1_name: weights.at("attn1").prefix().to_owned(),
            only_cross_attention: level.only_cross_attention,
            norm2: norm("norm2"),
            attn2: attention("attn2", level.context),
            attn2_name: weights.at("attn2").prefix().to_owned(),
            norm3: norm("norm3"),
            feed_forward: FeedForward::load(&weights.at("ff"), c),
        }
    }

    /// What queries, keys and values of the self-attention are made of: `h [b, s, c]`, unless a picture steers them; where tokens are merged, of those
    /// that are left.
    fn looks(
        &self,
        h: Tensor,
        places: Option<&(Tensor, usize)>,
        given: &Given<'_>,
    ) -> Result<[Tensor; 3]> {
        let merged = |x: Tensor| match places {
            Some((places, count)) => ops::apply(Op::Merge { count: *count }, &[&x, places]),
            None => Ok(x),
        };
        if given.lites.is_empty() {
            let h = merged(h)?;
            return Ok([h.clone(), h.clone(), h]);
        }
        let input = |part| {
            let name = format!("{}.{part}", self.attn1_name);
            merged(steered(given.lites, &name, &h)?)
        };
        Ok([input("to_q")?, input("to_k")?, input("to_v")?])
    }

    /// `x [b, h · w, c]` → `[b, h · w, c]`.
    fn forward(&self, x: &Tensor, size: (usize, usize), given: &Given<'_>) -> Result<Tensor> {
        let x = self.first(x, size, given)?;
        let x = match given.take(Kind::Cross, x.shape())? {
            Some(seen) => ops::add(&seen, &x)?,
            None => {
                let (h, context) = (self.norm2.forward(&x)?, &given.context);
                let q = match given.lites {
                    [] => h,
                    lites => steered(lites, &format!("{}.to_q", self.attn2_name), &h)?,
                };
                let also = |q: &Tensor, seen, heads| context.images(q, seen, heads);
                let text = context.text;
                let seen = self.attn2.forward_also([&q, text, text], &also)?;
                given.keep(Kind::Cross, &seen);
                ops::add(&seen, &x)?
            }
        };
        ops::add(&self.feed_forward.forward(&self.norm3.forward(&x)?)?, &x)
    }

    /// `x [b, h · w, c]` with what the first attention sees on it.
    fn first(&self, x: &Tensor, size: (usize, usize), given: &Given<'_>) -> Result<Tensor> {
        let kind = match self.only_cross_attention {
            true => Kind::Cross,
            false => Kind::Own,
        };
        if let Some(seen) = given.take(kind, x.shape())? {
            return ops::add(&seen, x);
        }
        let h = self.norm1.forward(x)?;
        let places = given.places(x, size)?;
        let [q, k, v] = self.looks(h, places.as_ref(), given)?;
        let nothing = |_: &Tensor, seen, _| Ok(seen);
        let seen = if self.only_cross_attention {
            self.attn1.forward(&q, given.context.text)?
        } else if given.variant.identities.contains(&self.attn1_name) {
            self.attn1.identity(&v)?
        } else {
            self.attn1.forward_also([&q, &k, &v], &nothing)?
        };
        let seen = match &places {
            Some((places, _)) if !given.keeps(kind) => {
                return ops::apply(Op::Unmerge, &[&seen, places, x]);
            }
            Some((places, _)) => ops::apply(Op::Unmerge, &[&seen, places])?,
            None => seen,
        };
        given.keep(kind, &seen);
        ops::add(&seen, x)
    }
}
