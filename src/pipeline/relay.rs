//! Who predicts when: the model, and behind a certain noise level its refiner.

use std::time::{Duration, Instant};

use candle_core::Tensor;

use super::networks::Denoiser;
use super::{Engine, Plan};
use crate::error::{Error, Result};
use crate::text::Conditioning;

/// The networks of a run; one at a time has its buffers.
pub(super) struct Relay<'a> {
    engine: &'a Engine,
    plan: &'a Plan,
    size: [usize; 4],
    /// The model's, and the refiner's if there is one.
    conditionings: &'a [Conditioning],
    denoiser: Option<Denoiser<'a>>,
    switched: bool,
    first_load: Duration,
    later_load: Duration,
}

impl<'a> Relay<'a> {
    pub(super) fn new(
        engine: &'a Engine,
        plan: &'a Plan,
        size: [usize; 4],
        conditionings: &'a [Conditioning],
    ) -> Result<Self> {
        let mut relay = Self {
            engine,
            plan,
            size,
            conditionings,
            denoiser: None,
            switched: false,
            first_load: Duration::ZERO,
            later_load: Duration::ZERO,
        };
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

    /// The prediction for `sample`, by whose turn it is.
    pub(super) fn predict(&mut self, sample: &Tensor, timestep: f64) -> Result<Tensor> {
        if !self.switched && self.is_refiners(timestep) {
            self.switched = true;
            self.denoiser = None;
            let took = self.make_ready()?;
            self.later_load += took;
        }
        match &mut self.denoiser {
            Some(denoiser) => denoiser.predict(sample, timestep),
            None => Err(Error::Numeric("no network is ready".to_owned())),
        }
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
        self.denoiser = Some(engine.denoiser(self.plan, self.size, conditioning)?);
        Ok(start.elapsed())
    }
}
