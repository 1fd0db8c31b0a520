//! Who predicts when: the model, and behind a certain noise level its refiner.

use std::time::{Duration, Instant};

use candle_core::Tensor;

use super::conditions::Given;
use super::guidance::guide;
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
    /// What of a picture the model is given.
    given: Given,
    denoiser: Option<Denoiser<'a>>,
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
        (conditionings, given): (&'a [Conditioning], Given),
    ) -> Result<Self> {
        let mut relay = Self {
            engine,
            plan,
            size,
            conditionings,
            given,
            denoiser: None,
            lacking: None,
            switched: false,
            first_load: Duration::ZERO,
            later_load: Duration::ZERO,
        };
        relay.take_strengths(0);
        let first = plan.trajectory.calls.first().map(|call| call.timestep);
        relay.switched = first.is_some_and(|timestep| relay.is_refiners(timestep));
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
        if !self.switched && self.is_refiners(timestep) {
            self.switched = true;
            self.denoiser = None;
            let took = self.make_ready()?;
            self.later_load += took;
        }
        if self.take_strengths(call.step) {
            // their buffers and old weights make room
            (self.denoiser, self.lacking) = (None, None);
            let took = self.make_ready()?;
            self.later_load += took;
        }
        let Some(denoiser) = &mut self.denoiser else {
            return Err(Error::Numeric("no network is ready".to_owned()));
        };
        let predictions = denoiser.predict(sample, timestep)?;
        let skipped = self.predict_lacking(sample, call)?;
        guide(self.plan, &predictions, skipped)
    }

    /// Gives adapters the strengths that they have at a step; whether the network at work is another one now.
    fn take_strengths(&self, step: usize) -> bool {
        let steps = self.plan.trajectory.steps;
        self.engine.networks.at_step(step, steps) && !self.switched
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
            let denoiser = self
                .engine
                .denoiser(self.plan, self.size, (conditioning, &self.given), layers)?;
            self.lacking = Some(denoiser);
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
        // a refiner takes latents alone
        let nothing = Given::default();
        let given = if self.switched { &nothing } else { &self.given };
        self.denoiser =
            Some(engine.denoiser(self.plan, self.size, (conditioning, given), None)?);
        Ok(start.elapsed())
    }
}
