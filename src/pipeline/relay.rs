//! Who predicts when: the model, and behind a certain noise level its refiner; whole, or changed for guidance or for less work.

use std::time::{Duration, Instant};

use candle_core::Tensor;

use super::asks::{Ask, Asks, Text};
use super::conditions::Given;
use super::guidance::{Guide, Predictions, blurred};
use super::image_prompt::ImageTokens;
use super::kept::Kept;
use super::networks::{Denoiser, Outside, Predicted};
use super::regions::averaged;
use super::{Encodings, Engine, Plan};
use crate::error::{Error, Result};
use crate::sampling::{Call, Choices};
use sd_models::variant::Reuse;

/// The networks of a run. A plan is made at the first call that asks for it, and let go of behind the last.
pub(super) struct Relay<'a> {
    engine: &'a Engine,
    plan: &'a Plan,
    size: [usize; 4],
    /// The model's, and the refiner's if there is one.
    encodings: &'a [Encodings],
    /// What of a picture the model is given.
    given: Given,
    /// Pictures beside the prompt, for the model alone.
    images: &'a [ImageTokens],
    asks: Vec<Asks>,
    /// The call that comes next.
    next: usize,
    ready: Vec<(Ask, Denoiser<'a>)>,
    /// Features of the last call of a whole network, where later ones use them.
    deep: Option<Tensor>,
    /// What cross-attentions and self-attentions saw in the last call that kept it.
    cross: Kept,
    own: Kept,
    /// Which tokens stay where others are merged, of each picture.
    choices: Vec<Choices>,
    guide: Guide<'a>,
    first_load: Duration,
    later_load: Duration,
}

impl<'a> Relay<'a> {
    pub(super) fn new(
        (engine, plan): (&'a Engine, &'a Plan),
        size: [usize; 4],
        encodings: &'a [Encodings],
        (given, images, seeds): (Given, &'a [ImageTokens], &[u64]),
    ) -> Result<Self> {
        let mut relay = Self {
            engine,
            plan,
            size,
            encodings,
            given,
            images,
            asks: Asks::of(engine, plan)?,
            next: 0,
            ready: Vec::new(),
            deep: None,
            cross: Kept::default(),
            own: Kept::default(),
            choices: seeds.iter().map(|&seed| Choices::new(seed)).collect(),
            guide: Guide::new(plan),
            first_load: Duration::ZERO,
            later_load: Duration::ZERO,
        };
        relay.take_strengths(0);
        if let Some(first) = relay.asks.first().map(|asks| asks.main.clone()) {
            relay.make_ready(&first)?;
        }
        relay.first_load = std::mem::take(&mut relay.later_load);
        Ok(relay)
    }

    /// Seconds that making the plans took.
    pub(super) fn load_time(&self) -> Duration {
        self.first_load + self.later_load
    }

    /// Those of them after the first prediction.
    pub(super) fn later_load_time(&self) -> Duration {
        self.later_load
    }

    /// The guided prediction for `sample`, by whose turn it is.
    pub(super) fn predict(&mut self, sample: &Tensor, call: &Call) -> Result<Tensor> {
        let Some(asks) = self.asks.get(self.next).cloned() else {
            return Err(Error::Numeric(
                "the sampler calls the network too often".to_owned(),
            ));
        };
        if self.take_strengths(call.step) {
            // their buffers and old weights make room
            self.ready.clear();
        }
        let deep = self.deep.take();
        let main = self.ask(&asks.main, (sample, call), deep.as_ref())?;
        let mut taps = main.taps;
        let (texts, variant) = (&asks.main.texts, &asks.main.variant);
        if variant.cross == Reuse::Keep {
            self.cross = Kept::new(texts, main.cross);
        }
        if variant.own == Reuse::Keep {
            self.own = Kept::new(texts, main.own);
        }
        let mut predictions = self.sorted(&asks.main, &main.prediction)?;
        if let Some(ask) = &asks.apart {
            let all = self.ask(ask, (sample, call), None)?.prediction;
            let apart = self.sorted(ask, &all)?;
            predictions.negative = apart.negative;
            predictions.unseen = apart.unseen;
            predictions.empty = apart.empty;
        }
        let mass = match asks.degraded {
            Some(_) => taps.drain(..1).next(),
            None => None,
        };
        self.deep = match asks.main.variant.shallow {
            true => deep,
            false => taps.pop(),
        };
        if let Some(ask) = &asks.lacking {
            let all = self.ask(ask, (sample, call), None)?.prediction;
            predictions.lacking = self.sorted(ask, &all)?.prompt;
        }
        if let Some((ask, scale)) = &asks.perturbed {
            let all = self.ask(ask, (sample, call), None)?.prediction;
            let perturbed = self.sorted(ask, &all)?.prompt;
            predictions.perturbed = perturbed.map(|perturbed| (perturbed, *scale));
        }
        if let (Some(ask), Some(mass)) = (&asks.degraded, mass) {
            let degraded = degrade((sample, call), &predictions, &mass)?;
            let all = self.ask(ask, (&degraded, call), None)?.prediction;
            let of = self.sorted(ask, &all)?;
            predictions.degraded = of.negative.or(of.prompt);
        }
        self.next += 1;
        let later = self.asks.get(self.next..).unwrap_or_default();
        self.ready
            .retain(|(ask, _)| later.iter().any(|asks| asks.all().any(|a| a == ask)));
        self.guide.guide((sample, call), &predictions)
    }

    /// Predictions `[texts · n, c, h, w]` of an ask and what else it wants.
    fn ask(
        &mut self,
        ask: &Ask,
        (sample, call): (&Tensor, &Call),
        deep: Option<&Tensor>,
    ) -> Result<Predicted> {
        self.make_ready(ask)?;
        let own = match ask.variant.own {
            Reuse::Take => self.own.for_texts(&ask.texts)?,
            _ => Vec::new(),
        };
        let choices = &mut self.choices;
        let mut draw = |each: usize| {
            let all = choices.iter_mut().flat_map(|choices| choices.of_four(each));
            all.map(f32::from).collect()
        };
        let found = self.ready.iter_mut().find(|(ready, _)| ready == ask);
        let Some((_, denoiser)) = found else {
            return Err(Error::Numeric("no network is ready".to_owned()));
        };
        let outside = Outside {
            deep,
            own: &own,
            draw: &mut draw,
        };
        denoiser.predict_with(sample, call.timestep, outside)
    }

    /// Gives adapters the strengths that they have at a step; whether the network at work is another one now.
    fn take_strengths(&self, step: usize) -> bool {
        let steps = self.plan.trajectory.steps;
        let turn = self.asks.get(self.next).map_or(0, |asks| asks.main.turn);
        self.engine.networks.at_step(step, steps) && turn == 0
    }

    fn make_ready(&mut self, ask: &Ask) -> Result<()> {
        if self.ready.iter().any(|(ready, _)| ready == ask) {
            return Ok(());
        }
        let start = Instant::now();
        let Some(encodings) = self.encodings.get(ask.turn) else {
            return Err(Error::Numeric("the prompt was not encoded".to_owned()));
        };
        let calls = self.asks.iter().zip(&self.plan.trajectory.calls);
        let timesteps: Vec<f64> = calls
            .filter(|(asks, _)| asks.all().any(|a| a == ask))
            .map(|(_, call)| call.timestep)
            .collect();
        let engine = self.engine.by_turn(ask.turn);
        // a refiner takes latents alone
        let nothing = Given::default();
        let given = if ask.turn == 0 { &self.given } else { &nothing };
        let images = if ask.turn == 0 { self.images } else { &[] };
        let seen = match ask.variant.cross {
            Reuse::Take => self.cross.for_texts(&ask.texts)?,
            _ => Vec::new(),
        };
        let told = (encodings, given, images, seen);
        let denoiser = engine.denoiser(self.plan, (self.size, ask), told, &timesteps)?;
        self.ready.push((ask.clone(), denoiser));
        self.later_load += start.elapsed();
        Ok(())
    }

    /// Whose prediction is which; those of regions are averaged.
    fn sorted(&self, ask: &Ask, all: &Tensor) -> Result<Predictions> {
        let parts = match ask.texts.len() {
            1 => vec![all.clone()],
            count => all.chunk(count, 0)?,
        };
        let mut predictions = Predictions::default();
        let mut positive = Vec::new();
        for (text, part) in ask.texts.iter().zip(parts) {
            match text {
                Text::Unseen => predictions.unseen = Some(part),
                Text::Negative => predictions.negative = Some(part),
                Text::Prompt | Text::Region(_) => positive.push(part),
                Text::Empty => predictions.empty = Some(part),
            }
        }
        predictions.prompt = match positive.len() {
            0 | 1 => positive.pop(),
            _ => Some(averaged(&positive, &self.plan.regions)?),
        };
        Ok(predictions)
    }
}

/// The model's input with clean latents blurred where the network looks, and the noise as it was: `x + α · (blurred − x₀)`.
fn degrade(
    (sample, call): (&Tensor, &Call),
    predictions: &Predictions,
    mass: &Tensor,
) -> Result<Tensor> {
    let from = predictions
        .negative
        .as_ref()
        .or(predictions.prompt.as_ref());
    let Some(from) = from else {
        return Err(Error::Numeric("guidance needs a prediction".to_owned()));
    };
    // the negative prompt comes first
    let mass = mass.narrow(0, 0, from.dim(0)?)?;
    let (a, b) = call.denoised;
    let clean = ((sample * a)? + (from * b)?)?;
    let alpha = call.scale * call.now.0;
    Ok((sample + (blurred(&clean, &mass)? * alpha)?)?)
}
