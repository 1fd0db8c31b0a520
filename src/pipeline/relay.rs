//! Who predicts when: the model, and behind a certain noise level its refiner.

use std::time::{Duration, Instant};

use candle_core::Tensor;

use super::guidance::guide;
use super::image_prompt::ImageTokens;
use super::networks::Denoiser;
use super::{Engine, Plan};
use crate::error::{Error, Result};
use crate::sampling::Call;
use crate::text::Conditioning;

/// The networks of a run; one at a time has its buffers.
pub(super) struct Relay<'a> {
    engine: &'a Engine,
    plan: &'a Plan,
    size: [usize; 4],
    /// The model's, and the refiner's if there is one.
    conditionings: &'a [Conditioning],
    /// Pictures beside the prompt, for the model alone.
    images: &'a [ImageTokens],
    /// One for all rows, or one for the negative prompt's and one for the prompt's.
    denoisers: Vec<Denoiser<'a>>,
    /// Which of the pictures act in them.
    acting: Vec<bool>,
    /// Calls so far.
    calls: usize,
    /// The network without some layers, while skip-layer guidance acts.
    lacking: Option<Denoiser<'a>>,
    switched: bool,
    first_load: Duration,
    later_load: Duration,
}

impl<'a> Relay<'a> {
    pub(super) fn new(
        engine: &'a Engine,
        plan: &'a Plan,
        size: [usize; 4],
        (conditionings, images): (&'a [Conditioning], &'a [ImageTokens]),
    ) -> Result<Self> {
        let mut relay = Self {
            engine,
            plan,
            size,
            conditionings,
            images,
            denoisers: Vec::new(),
            acting: Vec::new(),
            calls: 0,
            lacking: None,
            switched: false,
            first_load: Duration::ZERO,
            later_load: Duration::ZERO,
        };
        let first = plan.trajectory.calls.first().map(|call| call.timestep);
        relay.switched = first.is_some_and(|timestep| relay.is_refiners(timestep));
        relay.acting = relay.acting_now();
        relay.first_load = relay.make_ready()?;
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
        let timestep = call.timestep;
        let handed_over = !self.switched && self.is_refiners(timestep);
        self.switched |= handed_over;
        let acting = self.acting_now();
        if handed_over || acting != self.acting {
            self.acting = acting;
            self.denoisers.clear();
            let took = self.make_ready()?;
            self.later_load += took;
        }
        self.calls += 1;
        let denoisers = self.denoisers.iter_mut();
        let predictions = denoisers.map(|denoiser| denoiser.predict(sample, timestep));
        let predictions: Vec<Tensor> = predictions.collect::<Result<_>>()?;
        let predictions = match predictions.as_slice() {
            [] => return Err(Error::Numeric("no network is ready".to_owned())),
            [all] => all.clone(),
            parts => Tensor::cat(parts, 0)?,
        };
        let skipped = self.predict_lacking(sample, call)?;
        guide(self.plan, &predictions, skipped)
    }

    /// The prediction of the network without some layers, at the steps where it has a say.
    fn predict_lacking(&mut self, sample: &Tensor, call: &Call) -> Result<Option<Tensor>> {
        let steps = self.plan.trajectory.steps;
        let acting = self
            .plan
            .skip_layers
            .as_ref()
            .filter(|slg| self.plan.guided && !self.switched && slg.acts_at(call.step, steps));
        let (Some(slg), Some(conditioning)) = (acting, self.conditionings.first()) else {
            self.lacking = None;
            return Ok(None);
        };
        if self.lacking.is_none() {
            let start = Instant::now();
            let layers = Some(slg.layers.as_slice());
            let denoisers = self.engine.denoisers(
                self.plan,
                self.size,
                conditioning,
                (layers, &[], self.images),
            )?;
            self.lacking = denoisers.into_iter().next();
            self.later_load += start.elapsed();
        }
        let lacking = self.lacking.as_mut();
        lacking
            .map(|denoiser| denoiser.predict(sample, call.timestep))
            .transpose()
    }

    /// diffusers' cut in timesteps; A1111 rounds a fractional one.
    fn is_refiners(&self, timestep: f64) -> bool {
        let Some(refiner) = &self.engine.refiner else {
            return false;
        };
        let last = self.engine.spec.levels.len() as f64;
        timestep.round() < (last * (1.0 - refiner.switch)).round()
    }

    /// Which pictures act at the next call: none when it is the refiner's.
    fn acting_now(&self) -> Vec<bool> {
        let controls = self.plan.controls.iter();
        let acts = |calls: &Vec<bool>| calls.get(self.calls).is_some_and(|acts| *acts);
        controls
            .map(|control| !self.switched && acts(&control.calls))
            .collect()
    }

    fn make_ready(&mut self) -> Result<Duration> {
        let start = Instant::now();
        let turn = usize::from(self.switched);
        let engine = match (&self.engine.refiner, self.switched) {
            (Some(refiner), true) => &refiner.engine,
            _ => self.engine,
        };
        let Some(conditioning) = self.conditionings.get(turn) else {
            return Err(Error::Numeric("the prompt was not encoded".to_owned()));
        };
        let images = if self.switched { &[] } else { self.images };
        let beside = (None, self.acting.as_slice(), images);
        self.denoisers = engine.denoisers(self.plan, self.size, conditioning, beside)?;
        Ok(start.elapsed())
    }
}
