//! A sampling run, compiled before it starts: network calls with linear combinations of a few registers between them.

use std::ops::{Add, Mul, Sub};

use super::threshold::Threshold;

/// A tensor-valued variable of a run, shaped like the latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Register {
    /// The latents: a picture's times [`Trajectory::init_latents`] plus noise times [`Trajectory::init_noise_sigma`] at the start, the result
    /// at the end.
    Sample,
    /// What the last network call saw.
    ModelInput,
    /// The (guided) prediction of the last network call.
    ModelOutput,
    /// A value kept for later.
    Saved(usize),
}

/// Σ coefficient · register.
pub type Combo = Vec<(Register, f64)>;

/// Standard normal noise of each image's own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// What it is multiplied by.
    pub factor: f64,
    /// The noise levels (from, to) over which a Brownian motion's increment, divided by the root of their distance, is the noise; none for
    /// the next numbers of the image's generator.
    pub between: Option<(f64, f64)>,
}

/// Where the noise of draws between two levels comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Brownian {
    /// The noise level that the motion begins at.
    pub low: f64,
    /// The one that it ends at.
    pub high: f64,
    /// A seed that takes the place of every image's own.
    pub seed: Option<u64>,
}

/// One assignment; everything is read before the target is written.
#[derive(Debug, Clone, PartialEq)]
pub enum Assign {
    /// `to = Σ terms + noise`. A draw is made whenever `noise` is given, also for a factor of zero, because the order of draws is part of
    /// what a seed means.
    Linear {
        /// The target.
        to: Register,
        /// What is summed.
        terms: Combo,
        /// The draw, if there is one.
        noise: Option<Draw>,
    },
    /// Limits a register to `low ..= high`.
    Clamp {
        /// The register.
        register: Register,
        /// Lower limit.
        low: f64,
        /// Upper limit.
        high: f64,
    },
    /// Limits each picture of a register by what is in it.
    Limit {
        /// The register.
        register: Register,
        /// How.
        to: Threshold,
    },
}

/// One call of the network and what follows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// What the network is told, 0 to 999, or 1000·σ of a flow; may be fractional.
    pub timestep: f64,
    /// The noise level, for display.
    pub sigma: f64,
    /// The step, as users count, that this call belongs to.
    pub step: usize,
    /// What the network sees.
    pub input: Combo,
    /// What is computed from its prediction, in order.
    pub then: Vec<Assign>,
    /// What latents of this call's level are multiplied by for the network.
    pub scale: f64,
    /// The estimate of the clean latents, not limited: `.0 · ModelInput + .1 · ModelOutput`. To make it z, the output is replaced by
    /// `(z − .0 · ModelInput)/.1`.
    pub denoised: (f64, f64),
    /// Clean latents z with noise ε at this call's level, in the scale of [`Register::Sample`]: `.0 · z + .1 · ε`.
    pub now: (f64, f64),
    /// The same at the level that diffusers' inpainting puts the known part of [`Register::Sample`] at after this call: the next entry of
    /// its scheduler's timesteps. (1, 0) after the last call.
    pub next: (f64, f64),
}

/// A compiled run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Trajectory {
    /// The picture's latents are multiplied by this; 0 for runs from pure noise.
    pub init_latents: f64,
    /// The initial noise is multiplied by this.
    pub init_noise_sigma: f64,
    /// The calls, in order.
    pub calls: Vec<Call>,
    /// The Brownian motion of each image, if draws ask for it.
    pub brownian: Option<Brownian>,
    /// How many [`Register::Saved`] there are.
    pub registers: usize,
    /// Steps as users count.
    pub steps: usize,
    /// The noise levels passed through, the final one included; empty for solvers that think in timesteps.
    pub sigmas: Vec<f64>,
}

impl Trajectory {
    /// The timestep of every call, in order.
    pub fn timesteps(&self) -> impl Iterator<Item = f64> + '_ {
        self.calls.iter().map(|call| call.timestep)
    }

    /// Whether every coefficient is a number: a schedule that visits a level twice makes some that are not.
    pub(super) fn is_finite(&self) -> bool {
        let finite = |terms: &Combo| terms.iter().all(|(_, c)| c.is_finite());
        let both = |(a, b): (f64, f64)| a.is_finite() && b.is_finite();
        both((self.init_latents, self.init_noise_sigma))
            && self.calls.iter().all(|call| {
                call.timestep.is_finite()
                    && both(call.denoised)
                    && both(call.now)
                    && finite(&call.input)
                    && call.then.iter().all(|assign| match assign {
                        Assign::Linear { terms, noise, .. } => {
                            finite(terms) && noise.is_none_or(|draw| draw.factor.is_finite())
                        }
                        Assign::Clamp { low, high, .. } => low <= high,
                        Assign::Limit { .. } => true,
                    })
            })
    }

    /// Each call's `next` from the `now` of the one behind it.
    pub(super) fn link(&mut self) {
        let mut behind = (1.0, 0.0);
        for call in self.calls.iter_mut().rev() {
            call.next = behind;
            behind = call.now;
        }
    }

    /// Lets the run begin at a picture's latents with the noise of the first call's level.
    pub(super) fn begin_at_picture(&mut self) {
        if let Some(call) = self.calls.first() {
            (self.init_latents, self.init_noise_sigma) = call.now;
        }
    }

    /// Executes a run from pure noise on plain slices: the reference for every other executor.
    pub fn run(
        &self,
        noise: &mut dyn FnMut() -> Vec<f32>,
        model: &mut dyn FnMut(&[f32], f64) -> Vec<f32>,
    ) -> Vec<f32> {
        self.run_from(
            &[],
            &mut Slices {
                noise: &mut |_| noise(),
                model,
                after: &mut |_, _| {},
            },
        )
    }

    /// The same from a picture's latents (none of them count as zeros).
    pub fn run_from(&self, latents: &[f32], slices: &mut Slices<'_>) -> Vec<f32> {
        let init: Vec<f64> = (slices.noise)(None)
            .iter()
            .zip(latents.iter().chain(std::iter::repeat(&0.0)))
            .map(|(&noise, &x)| {
                f64::from(x) * self.init_latents + f64::from(noise) * self.init_noise_sigma
            })
            .collect();
        let mut state = vec![vec![0f64; init.len()]; 3 + self.registers];
        state[0] = init;
        for call in &self.calls {
            state[1] = combine(&state, &call.input);
            let seen: Vec<f32> = state[1].iter().map(|&x| x as f32).collect();
            let predicted = (slices.model)(&seen, call.timestep);
            state[2] = predicted.into_iter().map(f64::from).collect();
            for assign in &call.then {
                assign.execute(&mut state, slices);
            }
            (slices.after)(call, &mut state[0]);
        }
        state[0].iter().map(|&x| x as f32).collect()
    }
}

/// What a run on plain slices asks for.
#[allow(missing_debug_implementations)]
pub struct Slices<'a> {
    /// The next draw, or the one between two noise levels.
    pub noise: &'a mut dyn FnMut(Option<(f64, f64)>) -> Vec<f32>,
    /// The network's prediction for what it sees at a timestep.
    pub model: &'a mut dyn FnMut(&[f32], f64) -> Vec<f32>,
    /// What is done to the latents after a call.
    pub after: &'a mut dyn FnMut(&Call, &mut [f64]),
}

fn place(register: Register) -> usize {
    match register {
        Register::Sample => 0,
        Register::ModelInput => 1,
        Register::ModelOutput => 2,
        Register::Saved(i) => 3 + i,
    }
}

fn combine(state: &[Vec<f64>], terms: &Combo) -> Vec<f64> {
    let n = state.first().map_or(0, Vec::len);
    let value = |k: usize| terms.iter().map(|&(r, c)| c * state[place(r)][k]).sum();
    (0..n).map(value).collect()
}

impl Assign {
    fn execute(&self, state: &mut [Vec<f64>], slices: &mut Slices<'_>) {
        match self {
            Self::Linear { to, terms, noise } => {
                let mut value = combine(state, terms);
                if let Some(draw) = noise {
                    for (value, drawn) in value.iter_mut().zip((slices.noise)(draw.between)) {
                        *value += draw.factor * f64::from(drawn);
                    }
                }
                state[place(*to)] = value;
            }
            Self::Clamp {
                register,
                low,
                high,
            } => {
                for value in &mut state[place(*register)] {
                    *value = value.clamp(*low, *high);
                }
            }
            Self::Limit { register, to } => to.limit(&mut state[place(*register)]),
        }
    }
}

/// A linear combination under construction: solvers write their formulas with it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Linear(Combo);

/// The latents.
pub(super) fn sample() -> Linear {
    Linear::of(Register::Sample)
}

/// What the network sees.
pub(super) fn input() -> Linear {
    Linear::of(Register::ModelInput)
}

/// The network's prediction.
pub(super) fn output() -> Linear {
    Linear::of(Register::ModelOutput)
}

/// A kept value.
pub(super) fn saved(index: usize) -> Linear {
    Linear::of(Register::Saved(index))
}

impl Linear {
    fn of(register: Register) -> Self {
        Self(vec![(register, 1.0)])
    }

    /// The terms that count.
    pub(super) fn combo(self) -> Combo {
        self.0.into_iter().filter(|&(_, c)| c != 0.0).collect()
    }

    /// `to = self`.
    pub(super) fn into(self, to: Register) -> Assign {
        Assign::Linear {
            to,
            terms: self.combo(),
            noise: None,
        }
    }

    /// `to = self + factor · noise`.
    pub(super) fn into_with_noise(self, to: Register, factor: f64) -> Assign {
        let draw = Draw {
            factor,
            between: None,
        };
        self.into_with(to, draw)
    }

    /// `to = self + draw`.
    pub(super) fn into_with(self, to: Register, draw: Draw) -> Assign {
        Assign::Linear {
            to,
            terms: self.combo(),
            noise: Some(draw),
        }
    }

    /// The factors of what the network sees and of what it predicts.
    pub(super) fn of_call(&self) -> (f64, f64) {
        let factor = |register| {
            let found = self.0.iter().find(|(r, _)| *r == register);
            found.map_or(0.0, |(_, c)| *c)
        };
        (factor(Register::ModelInput), factor(Register::ModelOutput))
    }
}

impl Add for Linear {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        for (register, coefficient) in other.0 {
            match self.0.iter_mut().find(|(r, _)| *r == register) {
                Some((_, c)) => *c += coefficient,
                None => self.0.push((register, coefficient)),
            }
        }
        self
    }
}

impl Mul<f64> for Linear {
    type Output = Self;

    fn mul(mut self, factor: f64) -> Self {
        for (_, coefficient) in &mut self.0 {
            *coefficient *= factor;
        }
        self
    }
}

impl Sub for Linear {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self + other * -1.0
    }
}
