//! The denoising network at one size: recorded with what steers it, made into a plan, called.

use std::borrow::Cow;
use std::cell::RefCell;

use candle_core::{DType, Tensor};
use sd_kernels::cpu::Level;
use sd_kernels::graph::NodeKind;
use sd_kernels::plan::{Feed, Options, Plan};
use sd_kernels::{Graph, Wrap, ops};
use sd_models::denoiser::{Inputs, Steering};
use sd_models::variant::{Outputs, Slot, Variant};

use super::super::conditions::{
    ADDED, CHOICE, CONTEXT, CROSS, Conditions, EXTRA, GUIDANCE, LABEL, REFERENCE, slot_input,
};
use super::super::control::{Acting, steer, values};
use super::super::image_prompt::{ActingImage, image_input, prompts};
use super::{Networks, precision};
use crate::error::Result;
use crate::memory::Memory;

/// What one call of the denoising network has to do.
pub(super) struct Work {
    /// Width and height of the latents.
    pub(super) size: (usize, usize),
    /// Latents in all.
    pub(super) batch: usize,
    /// Tokens of the context.
    pub(super) tokens: usize,
    /// Width and height of the latents that it looks at.
    pub(super) reference: Option<(usize, usize)>,
}

/// What a denoising network is run with or without, beside its inputs.
#[derive(Clone, Copy, Default)]
pub(super) struct Beside<'a> {
    /// Pictures that steer.
    pub(super) controls: &'a [Acting],
    /// Pictures beside the text.
    pub(super) images: &'a [ActingImage],
}

impl Networks {
    /// The names of a UNet's self-attentions.
    pub fn self_attentions(&self) -> Vec<&str> {
        self.unet.self_attentions()
    }

    /// The UNet for latents of one size under conditions of batch n or a multiple of it, changed as `variant` says. `timesteps` are those that
    /// will be asked for, and `wrap` the axes along which pictures have no edges.
    ///
    /// # Errors
    /// When a weight cannot be read or memory is short.
    pub fn denoiser(
        &self,
        [n, _, h, w]: [usize; 4],
        conditions: &Conditions,
        timesteps: &[f64],
        (variant, wrap): (&Variant, Wrap),
    ) -> Result<Denoiser<'_>> {
        let (batch, tokens, _) = conditions.context.dims3()?;
        let Some(planned) = &self.planned else {
            return Ok(Denoiser {
                networks: self,
                repeat: batch / n.max(1),
                wrap,
                how: How::Eager(conditions.to_dtype(self.dtype)?, variant.clone()),
            });
        };
        let beside = Beside {
            controls: &conditions.controls,
            images: &conditions.images,
        };
        let work = Work {
            size: (w, h),
            batch,
            tokens,
            reference: match &conditions.reference {
                Some(reference) => {
                    let (_, _, h, w) = reference.dims4()?;
                    Some((w, h))
                }
                None => None,
            },
        };
        let (graph, outputs) = ops::wrapped(wrap, || self.record(&work, beside, variant))?;
        let options = self.unet_options(batch / n.max(1), beside, (&graph, &outputs.prediction))?;
        let beside = (outputs.taps.len(), outputs.cross.len());
        let taps = [outputs.taps, outputs.cross, outputs.own].concat();
        let outputs = (&outputs.prediction, taps.as_slice());
        let mut plan = Plan::compile_tapped(&graph, outputs, &options, &planned.unet)?;
        let mut distinct: Vec<f32> = timesteps.iter().map(|&t| t as f32).collect();
        distinct.sort_by(f32::total_cmp);
        distinct.dedup();
        plan.prepare_timesteps(&distinct)?;
        Ok(Denoiser {
            networks: self,
            repeat: batch / n.max(1),
            wrap,
            how: How::Planned {
                plan: Box::new(plan),
                constants: self.constants(conditions, n)?,
                choices: inputs_of(&graph, CHOICE),
                beside,
                out: Vec::new(),
            },
        })
    }

    /// What stays the same during a run of `n` pictures, by the names of a plan's inputs.
    fn constants(
        &self,
        conditions: &Conditions,
        n: usize,
    ) -> Result<Vec<(Cow<'static, str>, Vec<f32>)>> {
        let own = conditions.named()?.into_iter();
        let own = own.map(|(name, values)| (Cow::from(name), values));
        let steering = values(&self.controls, &conditions.controls, n)?;
        let images = conditions.images.iter().map(|image| {
            let tokens = image.tokens.flatten_all()?.to_vec1()?;
            Ok((image_input(image.index), tokens))
        });
        let images = images.collect::<Result<Vec<_>>>()?;
        let seen = conditions.seen.iter().enumerate().map(|(i, seen)| {
            let values = seen.flatten_all()?.to_vec1()?;
            Ok((slot_input(Slot::Cross(i)), values))
        });
        let seen = seen.collect::<Result<Vec<_>>>()?;
        Ok(own.chain(steering).chain(images).chain(seen).collect())
    }

    /// One call of the UNet, recorded, for `batch` latents of `w × h` under contexts of `tokens`: what it costs and what it holds.
    ///
    /// # Errors
    /// When the network cannot take the size.
    pub fn record_unet(
        &self,
        (w, h): (usize, usize),
        (batch, tokens): (usize, usize),
    ) -> Result<(Graph, sd_kernels::Tensor)> {
        let work = Work {
            size: (w, h),
            batch,
            tokens,
            reference: None,
        };
        let controls = self.stand_ins();
        let beside = Beside {
            controls: &controls,
            ..Beside::default()
        };
        let (graph, outputs) = self.record(&work, beside, &Variant::default())?;
        Ok((graph, outputs.prediction))
    }

    /// All networks that steer, as far as sizes go.
    pub(super) fn stand_ins(&self) -> Vec<Acting> {
        let controls = self.controls.iter().enumerate();
        controls.map(|(i, control)| control.stand_in(i)).collect()
    }

    pub(super) fn record(
        &self,
        work: &Work,
        beside: Beside<'_>,
        variant: &Variant,
    ) -> Result<(Graph, Outputs)> {
        let Work {
            size: (w, h),
            batch,
            tokens,
            reference,
        } = *work;
        let graph = Graph::new();
        let config = &self.config;
        let latents = graph.input("sample", &[batch, config.latent_channels(), h, w]);
        let sample = match config.extra_channels() {
            0 => latents.clone(),
            more => ops::concat(&latents, &graph.input(EXTRA, &[batch, more, h, w]))?,
        };
        let timestep = graph.input("timestep", &[batch]);
        let context = graph.input(CONTEXT, &[batch, tokens, config.context_width()]);
        let vector = |name, width: Option<usize>| width.map(|w| graph.input(name, &[batch, w]));
        let added = vector(ADDED, config.added_width());
        let guidance = vector(GUIDANCE, config.guidance_width());
        let label = vector(LABEL, config.label_width());
        let channels = config.latent_channels();
        let reference = reference.map(|(w, h)| graph.input(REFERENCE, &[batch, channels, h, w]));
        let inputs = Inputs {
            sample: &sample,
            timestep: &timestep,
            context: &context,
            added: added.as_ref(),
            guidance: guidance.as_ref(),
            label: label.as_ref(),
            reference: reference.as_ref(),
            steering: Steering::default(),
        };
        // a ControlNet sees the latents alone
        let bare = Inputs {
            sample: &latents,
            ..inputs
        };
        let give = |name: &str, shape: &[usize]| Ok(graph.input(name, shape));
        let steered = steer(&self.controls, beside.controls, &bare, &give)?;
        let images = beside.images.iter();
        let tokens = images.map(|one| graph.input(&image_input(one.index), one.tokens.dims()));
        let tokens: Vec<sd_kernels::Tensor> = tokens.collect();
        let images = prompts(&self.image_prompts, beside.images, &tokens);
        let inputs = Inputs {
            steering: steered.beside(&images),
            ..inputs
        };
        let earlier = |slot, shape: &[usize]| Ok(graph.input(&slot_input(slot), shape));
        let outputs = self.unet.forward_as(&inputs, variant, Some(&earlier))?;
        Ok((graph, outputs))
    }

    /// How plans of the denoising network are made. Where there is no room for all of its packed weights, some are packed at every call.
    pub(super) fn unet_options(
        &self,
        texts: usize,
        beside: Beside<'_>,
        (graph, output): (&Graph, &sd_kernels::Tensor),
    ) -> Result<Options> {
        /// The part of what is free that weights may take.
        const SHARE: f64 = 0.8;
        let pictures = || {
            let controls = beside.controls.iter();
            controls.flat_map(Acting::inputs)
        };
        let images = beside.images.iter().map(|one| image_input(one.index));
        let constant = [CONTEXT, ADDED, GUIDANCE, EXTRA, REFERENCE, LABEL]
            .map(Cow::from)
            .into_iter();
        let named = |start| inputs_of(graph, start).into_iter().map(|(name, _)| name);
        let halved = std::iter::once(Cow::from("sample")).chain(pictures());
        let halved = halved.chain(named(CHOICE));
        let constant = constant.chain(pictures()).chain(images);
        let options = Options {
            timestep: Some("timestep"),
            constant: constant.chain(named(CROSS)).collect(),
            halved: halved.filter(|_| texts > 1).collect(),
            copies: texts,
            ..Options::new(Level::current(), precision(self.dtype))
        };
        let Some(free) = Memory::of_networks().available else {
            return Ok(options);
        };
        let sizes = Plan::sizes(graph, output, &options)?;
        let held = self
            .planned
            .as_ref()
            .map_or(0, |planned| planned.unet.bytes());
        let free = (free as f64 * SHARE) as usize + held;
        let keep = free.saturating_sub(sizes.buffers);
        Ok(match sizes.weights > keep {
            true => Options { keep, ..options },
            false => options,
        })
    }
}

/// The inputs of a graph whose names begin so, with their numbers for one of a batch.
fn inputs_of(graph: &Graph, start: &str) -> Vec<(Cow<'static, str>, usize)> {
    let nodes = graph.nodes().into_iter();
    let inputs = nodes.filter_map(|node| match node.kind {
        NodeKind::Input(name) if name.starts_with(start) => {
            Some((Cow::from(name), node.shape.iter().skip(1).product()))
        }
        _ => None,
    });
    inputs.collect()
}

/// What a changed network takes from outside at a call.
pub struct Outside<'a> {
    /// Deep features of an earlier call.
    pub deep: Option<&'a Tensor>,
    /// What self-attentions saw in an earlier call, `[b, s, c]` each, f32.
    pub own: &'a [Tensor],
    /// Gives for each picture so many numbers, each 0 to 3: which of four tokens stay.
    pub draw: &'a mut dyn FnMut(usize) -> Vec<f32>,
}

/// What a call gives, all in f32.
pub struct Predicted {
    /// `[texts · n, c, h, w]`, as the context has the texts.
    pub prediction: Tensor,
    /// As the variant asks for them.
    pub taps: Vec<Tensor>,
    /// What cross-attentions saw, `[texts · n, s, c]` each, if it is kept.
    pub cross: Vec<Tensor>,
    /// The same of self-attentions.
    pub own: Vec<Tensor>,
}

/// The UNet at one size, ready to be called.
pub struct Denoiser<'a> {
    networks: &'a Networks,
    /// How often the sample is in a batch: once for each text.
    repeat: usize,
    wrap: Wrap,
    how: How,
}

enum How {
    /// And how the network is changed.
    Eager(Conditions, Variant),
    Planned {
        plan: Box<Plan>,
        /// What does not change from call to call; until the first one.
        constants: Vec<(Cow<'static, str>, Vec<f32>)>,
        /// Inputs that say which tokens stay, with their numbers for a picture.
        choices: Vec<(Cow<'static, str>, usize)>,
        /// How many of the plan's taps are the variant's, and how many are what cross-attentions saw.
        beside: (usize, usize),
        out: Vec<f32>,
    },
}

impl Denoiser<'_> {
    /// The prediction in f32 for `sample [n, c, h, w]` in f32: `[texts · n, c, h, w]`, as the context has them.
    ///
    /// # Errors
    /// When the shapes do not fit or the executor fails.
    pub fn predict(&mut self, sample: &Tensor, timestep: f64) -> Result<Tensor> {
        let outside = Outside {
            deep: None,
            own: &[],
            draw: &mut |_| Vec::new(),
        };
        Ok(self.predict_with(sample, timestep, outside)?.prediction)
    }

    /// The same with what else the variant lets come out, and takes from outside.
    ///
    /// # Errors
    /// As [`Denoiser::predict`].
    pub fn predict_with(
        &mut self,
        sample: &Tensor,
        timestep: f64,
        outside: Outside<'_>,
    ) -> Result<Predicted> {
        let Networks {
            unet,
            controls,
            image_prompts,
            device,
            dtype,
            ..
        } = self.networks;
        match &mut self.how {
            How::Eager(conditions, variant) => {
                let (n, repeat) = (sample.dim(0)?, self.repeat);
                let mut sample = Tensor::cat(&vec![sample; self.repeat], 0)?.to_dtype(*dtype)?;
                let latents = sd_kernels::Tensor::from(sample.clone());
                if let Some(extra) = &conditions.extra {
                    sample = Tensor::cat(&[&sample, extra], 1)?;
                }
                let timestep = Tensor::full(timestep as f32, sample.dim(0)?, device)?;
                let node = |x: &Tensor| sd_kernels::Tensor::from(x.clone());
                let node_of = |x: &Option<Tensor>| x.as_ref().map(node);
                let (added, guidance) = (node_of(&conditions.added), node_of(&conditions.guidance));
                let (label, reference) =
                    (node_of(&conditions.label), node_of(&conditions.reference));
                let (batch, sample) = (sample.dim(0)?, sample.into());
                let inputs = Inputs {
                    sample: &sample,
                    timestep: &timestep.into(),
                    context: &node(&conditions.context),
                    added: added.as_ref(),
                    guidance: guidance.as_ref(),
                    label: label.as_ref(),
                    reference: reference.as_ref(),
                    steering: Steering::default(),
                };
                let given = values(controls, &conditions.controls, batch)?;
                let give = |name: &str, shape: &[usize]| {
                    let found = given.iter().find(|(own, _)| own == name);
                    let values = found.map(|(_, values)| values.clone()).unwrap_or_default();
                    let values = Tensor::from_vec(values, shape, device)?;
                    Ok(values.to_dtype(*dtype)?.into())
                };
                let bare = Inputs {
                    sample: &latents,
                    ..inputs
                };
                let acting = &conditions.controls;
                let steered = || steer(controls, acting, &bare, &give);
                let steered = ops::wrapped(self.wrap, steered)?;
                let images = &conditions.images;
                let tokens = images
                    .iter()
                    .map(|one| Ok(one.tokens.to_dtype(*dtype)?.into()));
                let tokens = tokens.collect::<Result<Vec<sd_kernels::Tensor>>>()?;
                let images = prompts(image_prompts, images, &tokens);
                let inputs = Inputs {
                    steering: steered.beside(&images),
                    ..inputs
                };
                let Outside { deep, own, draw } = outside;
                let draw = RefCell::new(draw);
                let earlier = |slot, shape: &[usize]| -> sd_kernels::Result<sd_kernels::Tensor> {
                    let found = match slot {
                        Slot::Deep => deep.cloned(),
                        Slot::Cross(index) => conditions.seen.get(index).cloned(),
                        Slot::Own(index) => own.get(index).cloned(),
                        Slot::Choice(_) => {
                            let each = shape.iter().skip(1).product();
                            let choice = draw.borrow_mut()(each);
                            let choice = Tensor::from_vec(choice, (n, each), device)?;
                            Some(Tensor::cat(&vec![choice; repeat], 0)?)
                        }
                    };
                    let missing = sd_kernels::Error::Mixed { op: "unet" };
                    Ok(found.ok_or(missing)?.to_dtype(*dtype)?.into())
                };
                let network = || unet.forward_as(&inputs, variant, Some(&earlier));
                let out = ops::wrapped(self.wrap, network)?;
                let data = |x: sd_kernels::Tensor| -> Result<Tensor> {
                    Ok(x.into_data()?.to_dtype(DType::F32)?)
                };
                let all = |list: Vec<sd_kernels::Tensor>| list.into_iter().map(data).collect();
                let (taps, cross, own): (Result<_>, Result<_>, Result<_>) =
                    (all(out.taps), all(out.cross), all(out.own));
                Ok(Predicted {
                    prediction: data(out.prediction)?,
                    taps: taps?,
                    cross: cross?,
                    own: own?,
                })
            }
            How::Planned {
                plan,
                constants,
                choices,
                beside: (tapped, crossed),
                out,
            } => {
                let sample = sample.flatten_all()?.to_vec1::<f32>()?;
                let timestep = [timestep as f32];
                let mut feeds = vec![
                    Feed {
                        name: "sample",
                        values: &sample,
                    },
                    Feed {
                        name: "timestep",
                        values: &timestep,
                    },
                ];
                for (name, values) in constants.iter() {
                    feeds.push(Feed { name, values });
                }
                let own = outside.own.iter().enumerate();
                let own = own.map(|(i, own)| (Slot::Own(i), own));
                let deep = outside.deep.map(|deep| (Slot::Deep, deep));
                let given = deep.into_iter().chain(own).map(|(slot, values)| {
                    let values = values.flatten_all()?.to_vec1::<f32>()?;
                    Ok((slot_input(slot), values))
                });
                let mut given = given.collect::<Result<Vec<_>>>()?;
                for (name, each) in choices.iter() {
                    given.push((name.clone(), (outside.draw)(*each)));
                }
                feeds.extend(given.iter().map(|(name, values)| Feed { name, values }));
                plan.run(&feeds, out)?;
                constants.clear();
                let prediction = Tensor::from_slice(out, plan.output_shape(), device)?;
                let shapes: Vec<Vec<usize>> = plan.tap_shapes().map(<[_]>::to_vec).collect();
                let mut taps = Vec::with_capacity(shapes.len());
                for (i, shape) in shapes.into_iter().enumerate() {
                    let mut values = Vec::new();
                    plan.tap(i, &mut values)?;
                    taps.push(Tensor::from_vec(values, shape, device)?);
                }
                let mut cross = taps.split_off(*tapped);
                let own = cross.split_off(*crossed);
                Ok(Predicted {
                    prediction,
                    taps,
                    cross,
                    own,
                })
            }
        }
    }
}
